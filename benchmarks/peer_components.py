"""A program for components.py: components of a mask by dask-image and by igneous, timed.

    python peer_components.py mask.npy FOLDER dask-image|igneous

It prints seconds. dask-image labels the mask in the chunks of 128 voxels that bigseg's
blocks have, by two threads; the result is computed whole. igneous labels a precomputed volume in
FOLDER, best one in memory, in tasks of 256 voxels, by two processes; what it takes to put the mask
there is not counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import igneous.task_creation as tasks
import numpy as np
from cloudvolume import CloudVolume
from dask_image.ndmeasure import label
from igneous.tasks.image.ccl import create_relabeling
from taskqueue import LocalTaskQueue

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK, TASK = (128, 128, 128), (256, 256, 256)


def by_dask_image(mask: NDArray[Any], _: str) -> float:
    """Seconds."""
    started = time.perf_counter()
    with dask.config.set(scheduler="threads", num_workers=2):
        found, n = label(da.from_array(mask, chunks=128))
        dask.compute(found, n)
    return time.perf_counter() - started


def by_igneous(mask: NDArray[Any], folder: str) -> float:
    """Seconds of its four steps: faces, equivalences, numbers, relabelling."""
    source, target = f"file://{folder}/mask", f"file://{folder}/labels"
    CloudVolume.from_numpy(
        np.asfortranarray(mask), source, chunk_size=CHUNK, layer_type="segmentation"
    )
    queue = LocalTaskQueue(parallel=2)
    started = time.perf_counter()
    queue.insert_all(tasks.create_ccl_face_tasks(source, mip=0, shape=TASK))
    queue.insert_all(tasks.create_ccl_equivalence_tasks(source, mip=0, shape=TASK))
    create_relabeling(source, 0, TASK)
    queue.insert_all(tasks.create_ccl_relabel_tasks(source, target, mip=0, shape=TASK))
    return time.perf_counter() - started


PEERS = {"dask-image": by_dask_image, "igneous": by_igneous}

if __name__ == "__main__":
    mask, folder = np.load(sys.argv[1]), sys.argv[2]
    # What they say of themselves is no result.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        seconds = PEERS[sys.argv[3]](mask, folder)
    print(json.dumps({"seconds": seconds}))
