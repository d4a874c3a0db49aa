"""Small images and models that several tests need, made without bigseg's own writers."""

import itertools
from contextlib import contextmanager

import numpy as np
import torch
import zarr
from click.testing import CliRunner

from bigseg.checkpoint import save_model
from bigseg.cli import main
from bigseg.config import ModelCard, NormRule, SegmentConfig, UNetSpec
from bigseg.machine import Resources
from bigseg.model import UNet

NORM = NormRule(kind="fixed", offset=100.0, scale=50.0)


def write_image(path, data, *, chunks, shards=None, dims="zyx", n_levels=1):
    """An OME-Zarr 0.5 image made with zarr alone; further levels are strided by 2 in y and x."""
    group = zarr.create_group(path, zarr_format=3)
    axes = [{"name": a, "type": _TYPES.get(a, "space")} for a in dims]
    for axis in axes:
        if axis["type"] == "space":
            axis["unit"] = "micrometer"
    levels = []
    for level in range(n_levels):
        factors = [2**level if a in "yx" else 1 for a in dims]
        part = data[tuple(slice(None, None, f) for f in factors)]
        fitting = tuple(min(c, n) for c, n in zip(chunks, part.shape, strict=True))
        group.create_array(
            str(level), data=part, chunks=fitting, shards=shards, dimension_names=list(dims)
        )
        scale = {"type": "scale", "scale": [float(f) for f in factors]}
        levels.append({"path": str(level), "coordinateTransformations": [scale]})
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    return str(path)


_TYPES = {"t": "time", "c": "channel"}


def write_model(path, spec: UNetSpec, *, seed=0, **card):
    """A U-Net with random weights and random batch statistics."""
    torch.manual_seed(seed)
    net = UNet(spec)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    classes = tuple(f"class {i}" for i in range(spec.out_channels))
    norm = card.pop("norm", NORM)
    save_model(str(path), net.eval(), ModelCard(spec=spec, classes=classes, norm=norm, **card))
    return net.eval(), str(path)


def noise(shape, *, seed=0, dtype=np.uint8):
    """Independent voxels: any shift or seam shows."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


# Small workers, whatever the machine.
RESOURCES = Resources(device="cpu", n_workers=2, n_threads=1, memory_bytes=4 << 30)


def config_of(image, model, out, **options):
    """Settings of a small serial run in float32 on torch, with any option changed."""
    defaults = {
        "output": "probabilities",
        "engine": "torch",
        "precision": "fp32",
        "executor": "serial",
        "out": None if out is None else str(out),
    }
    return SegmentConfig(image=image, model=model, **{**defaults, **options})


def run_command(*args):
    """The exit code and everything that `bigseg` with these words said."""
    result = CliRunner().invoke(main, list(map(str, args)))
    return result.exit_code, result.output


class Recorder:
    """A progress that notes what it is told, and calls `after` with the number of units done."""

    def __init__(self, after=None):
        self.tasks = []
        self._after = after or (lambda _: None)

    @contextmanager
    def task(self, label, *, total, unit, done=0):
        entry = {"label": label, "total": total, "unit": unit, "done": done}
        self.tasks.append(entry)
        yield _Recording(entry, self._after)


class _Recording:
    def __init__(self, entry, after):
        self._entry, self._after = entry, after

    def advance(self, n=1, *, voxels=0, note=""):
        del voxels, note
        self._entry["done"] += n
        self._after(self._entry["done"])


def assert_writable(grid, volume):
    """No two blocks share a write unit, and each writes whole ones."""
    seen = set()
    unit = volume.write_unit
    for block in grid:
        ends = zip(block.core.start, block.core.stop, unit, volume.shape, strict=True)
        assert all(a % u == 0 and (b % u == 0 or b == n) for a, b, u, n in ends), block
        sides = zip(block.core.start, block.core.stop, unit, strict=True)
        units = set(itertools.product(*(range(a // u, -(-b // u)) for a, b, u in sides)))
        assert not units & seen
        seen |= units
