"""A program for components.py: dask-image and scipy on the mask in shared memory, timed.

It prints seconds by name. Each labels in the chunks of 128 voxels that bigseg's blocks have; the
result is computed whole.
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing.shared_memory import SharedMemory

import dask
import dask.array as da
import numpy as np
from dask_image.ndmeasure import label

if __name__ == "__main__":
    memory = SharedMemory(name=sys.argv[1])
    shape = tuple(map(int, sys.argv[2].split(",")))
    mask = np.ndarray(shape, np.uint8, memory.buf)[0]
    started = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=2):
        found, n = label(da.from_array(mask, chunks=128))
        dask.compute(found, n)
    print(json.dumps({"dask-image": time.perf_counter() - started}))
