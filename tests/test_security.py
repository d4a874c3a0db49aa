"""What others wrote cannot run, lead elsewhere or fill the memory; what is secret stays so.

Each attack is planted and each canary proved to work where nobody guards.
"""

import json
import os
import pickle
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from helpers import config_of, noise, write_image, write_model
from helpers import run_command as run
from training_data import blobs, write_annotated
from zarr.core.array import AsyncArray
from zarr.core.dtype import UInt8
from zarr.core.metadata.v2 import ArrayV2Metadata
from zarr.storage import MemoryStore, StorePath

from bigseg import guards
from bigseg.checkpoint import hash_model, load_model, load_state, read_card
from bigseg.config import SegmentConfig, TrainConfig, UNetSpec, load_train_config
from bigseg.errors import (
    ConfigError,
    ModelFileError,
    NotOmeZarrError,
    OutputError,
)
from bigseg.ledger import Ledger
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.settings import parse_settings

SERIAL = ("--executor", "serial")
SPEC = UNetSpec.build(2, out_channels=2, depth=1, width=4)


class Canary:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """Where the file would be; at the end it is not there."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists(), "a canary that never sings proves nothing"
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise((4, 40, 40)), chunks=(1, 20, 20))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


# Nothing is unpickled.


def pickles(canary):
    """Pickles as files: of Python in all protocols, of torch old and new, of numpy."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"raw{protocol}", pickle.dumps(Canary(canary), protocol)
    for modern in (True, False):
        path = canary.with_name("torch.pt")
        torch.save({"w": Canary(canary)}, path, _use_new_zipfile_serialization=modern)
        yield f"torch{modern}", path.read_bytes()
    path = canary.with_name("array.npy")
    np.save(path, np.array([Canary(canary)], object), allow_pickle=True)
    yield "numpy", path.read_bytes()


def test_no_pickle_is_loaded_as_a_model_or_a_training_state(canary, tmp_path, image):
    for name, data in pickles(canary):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        for load in (load_model, read_card, hash_model, load_state):
            with pytest.raises(ModelFileError):
                load(str(path))
        for command in ("segment", "plan", "bench"):
            code, said = run(command, image, "--model", path, "--executor", "serial")
            assert code == 3, (command, name, said)


def test_a_run_folder_of_pickles_is_not_loaded(canary, tmp_path):
    data, labels = blobs((2, 40, 40))
    url = write_annotated(str(tmp_path / "a.zarr"), data, labels, "zyx", chunks=(1, 40, 40))
    args = ["train", url, "--labels", "cells", "--out", tmp_path / "run", "--executor", "serial"]
    args += ["--dims", 2, "--steps", 2, "--val-region", "1:2,:,:"]
    config = tmp_path / "c.yaml"
    config.write_text("net: {depth: 1, width: 4}\npatch: [16, 16]\nbatch: 1\ntask: instances\n")
    assert run(*args, "-c", config)[0] == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    for _, pickled in pickles(canary):
        for name in ("state-0", "state-1", "best"):
            (tmp_path / "run" / "checkpoints" / f"{name}.safetensors").write_bytes(pickled)
        code, said = run(*args, "-c", config)
        assert code in (0, 3), said
        if code == 0:  # It began anew, and wrote its own files over the pickles.
            (tmp_path / "run" / "model.safetensors").unlink()


def poison(array_path, canary, how):
    """Make an array of Zarr 2 whose chunks are pickles."""
    # Not known to zarr (3.1.6) in metadata, so that it refuses before bigseg does.
    array = zarr.open_array(str(array_path), mode="r")
    shape, chunks, dtype = array.shape, array.chunks, array.dtype
    for path in sorted(Path(array_path).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    pickler = {"id": "pickle", "protocol": 4}
    meta = {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunks,
        "dtype": "|O" if how == "object" else dtype.str,
        "order": "C",
        "fill_value": 0,
        "dimension_separator": ".",
        "compressor": pickler if how == "compressor" else None,
        "filters": None if how == "compressor" else [pickler],
    }
    (Path(array_path) / ".zarray").write_text(json.dumps(meta))
    for place in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunks, strict=True))):
        (Path(array_path) / ".".join(map(str, place))).write_bytes(pickle.dumps(Canary(canary)))


@pytest.mark.parametrize("how", ["filter", "compressor", "object"])
def test_no_array_is_unpickled(canary, image, model, how, monkeypatch):
    # Older versions of numcodecs ask nobody.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    poison(f"{image}/0", canary, how)
    place = os.path.join(image, "labels", "cells")
    write_image(place, noise((4, 40, 40)), chunks=(1, 20, 20))
    poison(f"{place}/0", canary, how)
    chunk = Path(image, "0", "0.0.0").read_bytes()
    numcodecs.get_codec({"id": "pickle"}).decode(chunk)
    assert canary.exists(), "what is planted would run"
    canary.unlink()
    for args in (
        ["info", image],
        ["plan", image, "--model", model],
        ["segment", image, "--model", model, "--executor", "serial"],
        ["evaluate", place, place],
        ["train", image, "--labels", "cells", "--out", canary.with_name("run"), *SERIAL],
    ):
        code, said = run(*args)
        assert code == 3, (args, said)
        assert "not understood by zarr" in said or "labels 'cells' not found" in said, said


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_an_array_that_zarr_would_unpickle_is_refused(place):
    """Zarr refuses the metadata as they are stored; whoever makes the array otherwise meets us."""
    pickler = numcodecs.Pickle()
    codecs = {"filters": (pickler,)} if place == "filters" else {"compressor": pickler}
    metadata = ArrayV2Metadata(
        shape=(4,), dtype=UInt8(), chunks=(4,), fill_value=0, order="C", **codecs
    )
    array = zarr.Array(AsyncArray(metadata, StorePath(MemoryStore())))
    with pytest.raises(NotOmeZarrError, match="can run code when they are read, so bigseg never"):
        guards.check_array(array, "a.zarr/0")


def test_no_ledger_is_unpickled(canary, image, model, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    out = str(canary.with_name("out.zarr"))
    config = config_of(image, model, out, tile=(20, 20))
    segment_serially(config, NullProgress())
    ledger = Ledger.open(f"{out}/ledger")
    assert ledger is not None
    poison(f"{out}/ledger/predict", canary, "filter")
    meta = Path(out, "ledger", "zarr.json")
    document = json.loads(meta.read_text())
    meta.unlink()
    Path(out, "ledger", ".zgroup").write_text('{"zarr_format": 2}')
    Path(out, "ledger", ".zattrs").write_text(json.dumps(document["attributes"]))
    with pytest.raises(OutputError, match="is damaged or no ledger of bigseg's"):
        segment_serially(config, NullProgress())


def test_convert_reads_no_pickles(canary, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([Canary(canary)], object), allow_pickle=True)
    code, said = run("convert", path, tmp_path / "out.zarr")
    assert (code, "does not read" in said) == (3, True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = noise((4, 8, 8))
        file["raw"].attrs["element_size_um"] = np.void(pickle.dumps(Canary(canary)))
    code, said = run("convert", f"{tmp_path / 'a.h5'}:/raw", tmp_path / "out.zarr")
    assert code in (0, 3), said


@pytest.mark.parametrize(
    "tag", ["python/object/apply:pathlib.Path.touch", "python/object/new:pathlib.Path.touch"]
)
def test_no_tag_of_yaml_runs(canary, tmp_path, tag):
    path = tmp_path / "c.yaml"
    path.write_text(f"images: !!{tag} [!!python/object/apply:pathlib.Path [{canary}]]\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_train_config(path, {})
    code, _ = run("train", "-c", path, "--out", tmp_path / "run")
    assert code == 2


# Model files and settings are bounded.


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start, stop, *, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(stop - start) // 4] if shape is None else shape,
        "data_offsets": [start, stop],
    }


HEADERS = {
    "longer than memory": (1 << 60).to_bytes(8, "little") + b"{" + bytes(100),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep in the description": file_of(
        {"__metadata__": {"bigseg": "[" * 100_000, "sha256": "x"}, "a": tensor(0, 4)}, bytes(4)
    ),
    "digits": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 10**6 + b"]}}"
    ),
    "infinite": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', bytes(4)),
    "infinity": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', bytes(4)),
    "not a number": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "huge float": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e308]}}', bytes(4)),
    "twice": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "overlap": file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "gap": file_of({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "negative": file_of({"a": tensor(-4, 4)}, bytes(4)),
    "backwards": file_of({"a": tensor(4, 0, shape=[1]), "b": tensor(0, 4)}, bytes(4)),
    "overflowing shape": file_of({"a": tensor(0, 4, shape=[2**32, 2**32, 2**32])}, bytes(4)),
    "overflow to nothing": file_of({"a": tensor(0, 0, shape=[2**62, 4, 0])}),
    "negative shape": file_of({"a": tensor(0, 4, shape=[-1, -1])}, bytes(4)),
    "text for a shape": file_of({"a": tensor(0, 4, shape=["1"])}, bytes(4)),
    "truth for a shape": file_of({"a": tensor(0, 4, shape=[True])}, bytes(4)),
    "many axes": file_of({"a": tensor(0, 4, shape=[1] * 10_000)}, bytes(4)),
    "unknown type": file_of({"a": tensor(0, 4, dtype="O")}, bytes(4)),
    "numbers for texts": file_of({"__metadata__": {"bigseg": 1, "sha256": 2}}),
    "half a character": file_of(b'{"__metadata__": {"bigseg": "\\ud800", "sha256": "\\ud800"}}'),
    "a list for texts": file_of({"__metadata__": [1]}),
    "a description that is none": file_of({"__metadata__": {"bigseg": "3", "sha256": "x"}}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused_in_one_sentence(tmp_path, name):
    path = tmp_path / "m.safetensors"
    path.write_bytes(HEADERS[name])
    for load in (load_model, read_card, hash_model, load_state):
        with pytest.raises(ModelFileError) as caught:
            load(str(path))
        assert len(str(caught.value)) < 1000


def test_a_large_file_of_something_else_is_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(ModelFileError, match="is not a model file"):
        load_model(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nimages: [*b, *b]\n",
        "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nimages: {<<: [*b, *b]}\n",
        "images: &a [*a]\n",
        "steps: " + "9" * 100_000 + "\n",
        "steps: " + "1:" * 200_000 + "1\n",
        "steps: 1" + "0" * 4200 + "\n",
        "steps: 2026-99-99\n",
        "steps: !!timestamp x\n",
        "steps: !!bool x\n",
        "steps: !!int ''\n",
        "steps: !!float x\n",
        "steps: 1.0e+308\n",
        "steps: .inf\n",
        "optim: {lr: .nan}\n",
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        "[" * 5000,
        "{a: " * 5000,
        "- " * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_train_config(path, {})
    assert len(str(caught.value)) < 1500


# Secrets stay where they are.

WITH_SECRETS = [
    "https://user:PW-CANARY@host/image.zarr",
    "https://PW-CANARY@host/image.zarr",
    "https://host/image.zarr?X-Amz-Signature=PW-CANARY",
    "s3://KEY:PW-CANARY@bucket/image.zarr",
    "s3://bucket/image.zarr?versionId=PW-CANARY",
    "sftp://user:PW-CANARY@host/image.zarr",
    "https://user:PW/CANARY@host/image.zarr",
    "simplecache::https://user:PW-CANARY@host/image.zarr",
    "zip://image.zarr::https://host/a.zip?token=PW-CANARY",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_a_location_with_a_secret_is_refused_without_repeating_it(tmp_path, url, image, model):
    for args in (
        ["info", url],
        ["segment", url, "--model", model],
        ["segment", image, "--model", url],
        ["segment", image, "--model", model, "--out", url, "--executor", "serial"],
        ["segment", image, "--model", model, "--mask", url, "--executor", "serial"],
        ["plan", url, "--model", model],
        ["train", url, "--labels", "x", "--out", tmp_path / "run"],
        ["train", image, "--labels", "x", "--out", url],
        ["evaluate", url, image],
        ["sample", url],
        ["convert", "a.tif", url],
    ):
        code, said = run(*args)
        assert code in (2, 3), (args, said)
        assert "CANARY" not in said, args
    with pytest.raises(ConfigError) as caught:
        parse_settings(SegmentConfig, {"image": url, "model": model}, source="options")
    assert "CANARY" not in str(caught.value)
    for images in ([url], url, {"a": url}):
        with pytest.raises(ConfigError) as caught:
            parse_settings(TrainConfig, {"images": images, "labels": "x"}, source="options")
        assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "/data/what?.zarr",
        "C:/data/a.zarr",
        "s3://bucket/a@b/image.zarr",
        "https://host:8080/a/image.zarr",
        "http://[::1]:9000/image.zarr",
        "abfs://container@account.dfs.core.windows.net/image.zarr",
        "sftp://user@host/image.zarr",
        "file:///data/what?.zarr",
        "memory://a/b",
        "zip://image.zarr::s3://bucket/a.zip",
        "simplecache::s3://bucket/image.zarr",
    ],
)
def test_a_location_without_a_secret_is_taken(url):
    assert guards.check_location(url) == url


def test_errors_of_stores_are_shown_without_what_locations_hold():
    said = guards.without_secrets("403 for url 'https://u:pw@h/a?X-Amz-Signature=abc&x=1' (denied)")
    assert said == "403 for url 'https://…@h/a?…' (denied)"


def test_what_a_terminal_would_obey_is_written_out(image):
    def change(ome):
        ome["multiscales"][0]["name"] = "x"
        ome["omero"] = {"channels": [{"label": "\x1b]0;owned\x07\u202e"}]}
        ome["multiscales"][0]["axes"][0]["unit"] = "\x1b[31m"

    path = Path(image, "zarr.json")
    document = json.loads(path.read_text())
    change(document["attributes"]["ome"])
    path.write_text(json.dumps(document))
    code, said = run("info", image)
    assert code == 0
    assert "\x1b" not in said
    assert guards.printable("a\x1b[2J\nb\u202e\ud800") == "a\\x1b[2J\nb\\u202e\\ud800"
