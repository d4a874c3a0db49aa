"""A result to verify, how it is looked at, and where its chunks lie."""

from pathlib import Path

import numpy as np
from helpers import config_of, noise, write_image, write_model
from zarr_images import write_image as write_version

from bigseg.config import UNetSpec
from bigseg.ledger import Ledger, checksum_of
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.verify import verify
from bigseg.volume import open_volume

# With these random weights every block has all three classes.
SPEC = UNetSpec.build(3, out_channels=3, depth=1, width=4)
SHAPE = (8, 36, 24)
TILE = (4, 16, 16)


def model_in(folder):
    """A model with random weights."""
    return write_model(folder / "model.safetensors", SPEC)[1]


def image_in(folder):
    """An image of noise with three levels."""
    return write_image(folder / "image.zarr", noise(SHAPE), chunks=(4, 16, 16), n_levels=3)


def run(image, model, out=None, **options):
    """A finished result of a serial run: its settings and its plan."""
    defaults = {"tile": TILE, "output": "labels"} if out is None else {"tile": TILE}
    config = config_of(image, model, out, **{**defaults, **options})
    result = segment_serially(config, NullProgress())
    assert result.is_complete, result.failed
    return config, result.plan


def look(url, **options):
    """What a verification of a result finds."""
    return verify(str(url), progress=NullProgress(), **{"n_seams": 6, "n_chunks": 99, **options})


def wrong_by_check(verification):
    """How many findings each check has that has any."""
    return {check.name: len(check.findings) for check in verification.checks if check.findings}


def files_of(url):
    """The content of every file of a result but those of its ledger."""
    files = (p for p in Path(url).rglob("*") if p.is_file())
    return {
        str(p.relative_to(url)): p.read_bytes()
        for p in files
        if "ledger" not in p.relative_to(url).parts
    }


def chunk_of(url, *place, level=0):
    """Where a chunk lies."""
    return Path(url, str(level), "c", *map(str, place))


def with_mask(tmp_path):
    """Settings with a mask that leaves blocks empty."""
    mask = np.zeros((8, 12, 12), np.uint8)
    mask[2:7, 3:10, 2:7] = 1
    scale = (1.0, 3.0, 2.0)
    url = write_version(str(tmp_path / "mask.zarr"), [mask], "zyx", scale0=scale)
    return {"mask": url}


def overwrite(url, stage, block, values):
    """Write a block and its mark, as if a stage had made it so."""
    ledger = Ledger.open(f"{url}/ledger")
    level = list(ledger.stages).index(stage)
    open_volume(url, level=level).write(block.core, values)
    ledger.mark(stage, block.index, checksum_of(np.ascontiguousarray(values).data))
    ledger.flush()


def without_context(image, model, core, folder, **options):
    """What the voxels of a core become when all around them is dark."""
    data = open_volume(image).array[:]
    alone = np.zeros_like(data)
    alone[core.slices[1:]] = data[core.slices[1:]]
    dark = write_image(folder / "dark.zarr", alone, chunks=(4, 16, 16))
    run(dark, model, folder / "dark-out.zarr", **options)
    volume = open_volume(str(folder / "dark-out.zarr"))
    return volume.read(core, range(volume.n_channels))


def tear(path):
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
