"""No path in an image leads elsewhere, no link is written through, no size fills the memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from helpers import noise, write_image, write_model
from helpers import run_command as run

from bigseg import layout, store
from bigseg.config import UNetSpec
from bigseg.errors import (
    InputError,
    OutputError,
)
from bigseg.volume import open_volume

SERIAL = ("--executor", "serial")
SPEC = UNetSpec.build(2, out_channels=2, depth=1, width=4)


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise((4, 40, 40)), chunks=(1, 20, 20))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


# Nothing leaves the store.


def attributes_of(image):
    return json.loads(Path(image, "zarr.json").read_text())["attributes"]


def edit(image, change):
    path = Path(image, "zarr.json")
    document = json.loads(path.read_text())
    change(document["attributes"]["ome"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.zarr/0", "/etc", "//host/x", "a/../../secret.zarr/0", "s3://b/k", "file:x"),
        *("0/..", ".", "", "a\\b", "0\0", "0\n", "\ud800", "x/zip::memory", "~/../x/..", "\x1b[2J"),
    ],
)
def test_a_level_outside_the_image_is_not_read(tmp_path, image, model, path):
    write_image(tmp_path / "secret.zarr", np.full((4, 40, 40), 7, np.uint8), chunks=(1, 20, 20))

    def change(ome):
        ome["multiscales"][0]["datasets"][0]["path"] = path

    edit(image, change)
    for args in (["info", image], ["segment", image, "--model", model, "--executor", "serial"]):
        code, said = run(*args)
        assert code == 3, said
        assert "leaves the store or is empty" in said
        assert said.isprintable() or "\x1b" not in said


def test_labels_outside_the_image_are_not_read(tmp_path, image):
    write_image(tmp_path / "secret.zarr", noise((4, 40, 40)), chunks=(1, 20, 20))
    labels = zarr.create_group(f"{image}/labels", zarr_format=3)
    names = ["../../secret.zarr", "/etc", "s3://x/y", str(tmp_path / "secret.zarr")]
    labels.attrs["ome"] = {"version": "0.5", "labels": names}
    for name in names:
        with pytest.raises(InputError, match="leaves the store or is empty"):
            open_volume(image).label(name)
        code, _ = run("train", image, "--labels", name, "--out", tmp_path / "run", *SERIAL)
        assert code == 3


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", "x\n", "s3:x", "\\x"])
def test_a_result_is_named_inside_the_image_only(tmp_path, image, model, name):
    before = sorted(tmp_path.rglob("*"))
    code, _ = run("segment", image, "--model", model, "--name", name, "--executor", "serial")
    assert code == 2
    np.save(tmp_path / "x.npy", noise((2, 2)))
    (tmp_path / "x.npy").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_source_that_labels_name_is_not_opened(tmp_path, image):
    place = f"{image}/labels/cells"
    write_image(place, noise((4, 40, 40)), chunks=(1, 20, 20))

    def change(ome):
        ome["image-label"] = {"source": {"image": "../../../../etc/passwd"}}

    edit(place, change)
    assert open_volume(place).shape == (1, 4, 40, 40)


# Links are followed to read, and never to write or delete.


@pytest.fixture
def precious(tmp_path):
    """A directory of the user's that stays as it is, whatever happens."""
    folder = tmp_path / "precious"
    write_image(folder / "data.zarr", noise((4, 40, 40), seed=5), chunks=(1, 20, 20))

    def content():
        return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    before = content()
    yield folder
    assert content() == before


def test_levels_that_are_links_are_read(precious, image):
    target = Path(image, "0")
    for path in sorted(target.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    target.rmdir()
    target.symlink_to(precious / "data.zarr" / "0")
    np.testing.assert_array_equal(open_volume(image).array[:], noise((4, 40, 40), seed=5))


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_output_is_a_link(precious, tmp_path, image, model, overwrite):
    extra = ["--overwrite"] if overwrite else []
    for target in (precious, precious / "data.zarr", tmp_path / "nothing"):
        link = tmp_path / "out.zarr"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        args = ["segment", image, "--model", model, "--out", link, "--executor", "serial", *extra]
        code, said = run(*args)
        assert code == 5, said
        assert f"the link {link}" in said
        for command in (["sample", link, "--shape", "4,32,32"],):
            assert run(*command)[0] != 0
        assert link.is_symlink()
        assert not (tmp_path / "nothing").exists()


def test_an_output_moved_behind_a_link_is_not_deleted(precious, tmp_path, image, model):
    out = tmp_path / "out.zarr"
    args = ["segment", image, "--model", model, "--out", out, "--executor", "serial"]
    assert run(*args)[0] == 0
    out.rename(precious.with_name("moved.zarr"))
    out.symlink_to(precious.with_name("moved.zarr"))
    code, said = run(*args, "--overwrite")
    assert code == 5, said
    assert (precious.with_name("moved.zarr") / "ledger" / "zarr.json").exists()


def test_no_labels_are_written_through_a_link(precious, tmp_path, image, model):
    Path(image, "labels").symlink_to(precious)
    code, said = run("segment", image, "--model", model, "--executor", "serial")
    assert code == 5, said
    assert "follows links only to read" in said
    source = tmp_path / "a.h5"
    with h5py.File(source, "w") as file:
        file["raw"] = noise((4, 40, 40))
    code, said = run("convert", f"{source}:/raw", image, "--labels", "cells")
    assert code == 5, said


def test_no_chunk_is_written_through_a_link(precious, tmp_path):
    group = store.open_group(str(tmp_path / "a.zarr"), mode="a")
    # One chunk: of several, others would still be on their way when the first is refused.
    array = group.create_array("0", shape=(4,), chunks=(4,), dtype="uint8")
    (tmp_path / "a.zarr" / "0" / "c").symlink_to(precious)
    with pytest.raises(OutputError, match="put a directory in its place"):
        store.writable(store.open_array(str(tmp_path / "a.zarr/0"), mode="r"))[:] = 1
    (tmp_path / "a.zarr" / "0" / "c").unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "a.zarr" / "0" / "c").mkdir()
    (tmp_path / "a.zarr" / "0" / "c" / "0").symlink_to(victim)
    store.writable(array)[:] = 1
    assert victim.read_bytes() == b"mine"
    assert array[:].tolist() == [1] * 4


def test_deleting_follows_no_link(precious, tmp_path):
    url = tmp_path / "a.zarr"
    store.open_group(str(url), mode="a")
    (url / "sub").mkdir()
    for place in (url / "0", url / "sub" / "deep"):
        place.symlink_to(precious)
    store.remove(str(url))
    link = tmp_path / "link.zarr"
    link.symlink_to(precious / "data.zarr")
    with pytest.raises(OutputError, match="follows links only to read"):
        store.remove(str(link))
    assert link.is_symlink()


def test_links_on_the_way_to_an_output_are_the_users_own(precious, tmp_path, image, model):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "scratch").symlink_to(disk)
    out = tmp_path / "scratch" / "out.zarr"
    code, said = run("segment", image, "--model", model, "--out", out, "--executor", "serial")
    assert code == 0, said
    (tmp_path / "linked.zarr").symlink_to(image)
    code, said = run("segment", tmp_path / "linked.zarr", "--model", model, "--executor", "serial")
    assert code == 0, said
    assert layout.listed_labels(image) == ("bigseg",)


# Sizes are checked before memory is taken.

IN_A_SMALL_PROCESS = """
    import json, resource, sys, time
    import numpy as np
    from bigseg.info import describe
    from bigseg.volume import open_volume
    from bigseg.blocks import Region
    from bigseg.errors import BigsegError
    import bigseg.planner, bigseg.bench
    from bigseg.config import SegmentConfig
    urls, model = json.loads(sys.argv[1]), sys.argv[2]
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30, size + 3 * 2**30))
    def plan(url):
        return bigseg.bench.foresee(
            SegmentConfig(image=url, model=model, out="/nowhere/x.zarr", norm="model",
                          executor="serial", memory=2**30)).as_dict()
    def read(url):
        v = open_volume(url)
        return v.read(Region((0, 0, 0, 0), tuple(min(n, 8) for n in v.shape))).sum()
    for name, url in urls.items():
        # Forecasting what a plan of this size reads takes half a minute, whatever its size.
        for do in (describe, read) if name == "10^15 voxels" else (describe, read, plan):
            began = time.process_time()
            try:
                do(url); said = "fine"
            except BaseException as error:
                said = f"{'ours' if isinstance(error, BigsegError) else 'FOREIGN'} "
                said += f"{type(error).__name__}: {error}"
            seconds = round(time.process_time() - began, 2)
            print(json.dumps([name, do.__name__, seconds, said[:400]]), flush=True)
"""


def huge(tmp_path, name, *, shape=(4, 40, 40), chunks=(1, 20, 20), ome=None, array=None):
    """An image that states these sizes, and has no chunks."""
    url = write_image(tmp_path / f"{name}.zarr", noise((4, 40, 40)), chunks=(1, 20, 20))
    shutil.rmtree(Path(url, "0", "c"))
    path = Path(url, "0", "zarr.json")
    document = json.loads(path.read_text())
    document["shape"] = shape
    document["chunk_grid"]["configuration"]["chunk_shape"] = chunks
    document.update(array or {})
    path.write_text(json.dumps(document))
    if ome is not None:
        edit(url, ome)
    return url


def sharded(shard, chunk):
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}]
    index = [*inner, {"name": "crc32c"}]
    configuration = {"chunk_shape": chunk, "codecs": inner, "index_codecs": index}
    grid = {"name": "regular", "configuration": {"chunk_shape": shard}}
    codec = {"name": "sharding_indexed", "configuration": configuration}
    return {"codecs": [codec], "chunk_grid": grid}


def levels(n):
    def change(ome):
        first = ome["multiscales"][0]["datasets"][0]
        ome["multiscales"][0]["datasets"] = [first] * n

    return change


def channels(n):
    def change(ome):
        ome["omero"] = {"channels": [{"label": "x"}] * n}

    return change


def with_axes(names):
    def change(ome):
        kinds = {"t": "time", "c": "channel"}
        ome["multiscales"][0]["axes"] = [{"name": a, "type": kinds.get(a, "space")} for a in names]
        scale = {"type": "scale", "scale": [1.0] * len(names)}
        ome["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [scale]

    return change


def bomb(n_bytes):
    """A frame of zstd that holds `n_bytes` zeros, in four bytes for each 128 KiB."""
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    n_blocks = n_bytes >> 17
    last = (1 << 17 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    head = (
        b"\x28\xb5\x2f\xfd" + bytes([0b11 << 6]) + bytes([7 << 3]) + n_bytes.to_bytes(8, "little")
    )
    return head + block * (n_blocks - 1) + last


def hostile_sizes(tmp_path):
    far = 2**62
    big = {"shape": (10**6, 10**6, 10**6), "chunks": (10**5, 10**5, 10**5)}
    found = {
        "chunk of 10^15 voxels": huge(tmp_path, "chunk", **big),
        "shape 2^62": huge(tmp_path, "long", shape=(far, far, far)),
        "one long axis": huge(tmp_path, "axis", shape=(1, 1, far), chunks=(1, 1, 1)),
        "10^18 chunks": huge(tmp_path, "grid", shape=(10**6,) * 3, chunks=(1, 1, 1)),
        "10^18 voxels": huge(tmp_path, "exa", shape=(10**6,) * 3, chunks=(64, 64, 64)),
        "10^15 voxels": huge(tmp_path, "peta", shape=(10**5,) * 3, chunks=(128, 128, 128)),
        "shard of 10^12 chunks": huge(
            tmp_path, "shard", shape=(10**5,) * 3, array=sharded((10**4,) * 3, (1, 1, 1))
        ),
        "chunks of nothing": huge(tmp_path, "zero", chunks=(0, 20, 20)),
        "negative chunks": huge(tmp_path, "negative", chunks=(-1, 20, 20)),
        "fractions": huge(tmp_path, "fraction", shape=(4.5, 40, 40)),
        "texts": huge(tmp_path, "text", shape=("4", 40, 40)),
        "10^5 levels": huge(tmp_path, "levels", ome=levels(100_000)),
        "10^5 names": huge(tmp_path, "names", ome=channels(100_000)),
        "2^40 channels": huge(
            tmp_path,
            "channels",
            shape=(2**40, 4, 40, 40),
            chunks=(2**30, 1, 1, 1),
            ome=with_axes("czyx"),
            array={"dimension_names": list("czyx")},
        ),
    }
    metadata = huge(tmp_path, "metadata")
    with Path(metadata, "zarr.json").open("ab") as file:
        file.truncate(1 << 30)
    found["metadata of 1 GiB"] = metadata
    endless = huge(tmp_path, "endless")
    Path(endless, "zarr.json").unlink()
    Path(endless, "zarr.json").symlink_to("/dev/zero")
    found["metadata without end"] = endless
    for name, data in {
        "zstd bomb": bomb(100 << 30),
        "zstd that claims": bomb(1 << 20)[:6] + (100 << 30).to_bytes(8, "little") + bytes(9),
    }.items():
        url = huge(tmp_path, name.replace(" ", "-"))
        path = Path(url, "0", "c", "0", "0", "0")
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        found[name] = url
    return found


def test_hostile_sizes_cost_neither_time_nor_memory(tmp_path):
    from bigseg.config import NormConstants

    constants = NormConstants(offset=(0.0,), scale=(1.0,))
    _, model = write_model(tmp_path / "model.safetensors", SPEC, norm_constants=constants)
    urls = hostile_sizes(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_A_SMALL_PROCESS), json.dumps(urls), model],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 3 * len(urls) - 1, (result.stderr[-2000:], lines[-3:])
    wrong = [line for line in lines if line[2] > 8 or "FOREIGN" in line[3]]
    assert not wrong, "\n".join(map(str, wrong))
    said = {(name, what): text for name, what, _, text in lines}
    assert said["10^15 voxels", "describe"] == said["10^15 voxels", "read"] == "fine"
    for name in ("zstd bomb", "zstd that claims"):
        assert "announces 107374182400 bytes where a chunk has 400" in said[name, "read"]
    assert "larger than any volume" in said["one long axis", "plan"]
    # How many depends on the machine's memory and on the precision it multiplies in.
    found = re.search(r"would be (\d+) blocks, more than 268435456", said["10^18 chunks", "plan"])
    assert found, said["10^18 chunks", "plan"]
    assert int(found[1]) > 268435456
