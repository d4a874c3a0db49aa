"""A program for components.py: dask-image on a mask, timed.

It prints seconds by name. The mask is labelled in the chunks of 128 voxels that bigseg's blocks
have, by two threads; the result is computed whole.
"""

from __future__ import annotations

import json
import sys
import time

import dask
import dask.array as da
import numpy as np
from dask_image.ndmeasure import label

if __name__ == "__main__":
    mask = np.load(sys.argv[1])
    started = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=2):
        found, n = label(da.from_array(mask, chunks=128))
        dask.compute(found, n)
    print(json.dumps({"dask-image": time.perf_counter() - started}))
