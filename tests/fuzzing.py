"""What hostile input is made of, and what it is given to: for test_fuzz.py and benchmarks/fuzz.py.

A target takes one input and ends in one of two ways: it returns, and what it returned was checked,
or it raises an error of bigseg's own. Inputs begin as valid ones, because what is random all
through is refused at the first byte.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import noise, write_image
from hypothesis import strategies as st
from zarr_images import metadata

from bigseg import console, convert, guards, ngff, store
from bigseg.blocks import parse_region
from bigseg.checkpoint import load_model, load_state, save_model, save_state
from bigseg.config import ModelCard, SegmentConfig, UNetSpec, load_train_config
from bigseg.errors import BigsegError
from bigseg.info import as_text, describe
from bigseg.model import UNet
from bigseg.settings import parse_settings
from bigseg.units import canonical_unit, parse_bytes

SLOWEST_S = 5.0
LONGEST_MESSAGE = 50_000
LARGEST_DOCUMENT = 500_000


@dataclass(frozen=True)
class Target:
    """Inputs, what is made of each, and what that is given to."""

    inputs: st.SearchStrategy[Any]
    run: Callable[[Any], None]
    make: Callable[[Any], Any] = lambda value: value

    def attack(self, value: Any) -> bool:
        """Whether the input was taken; fails where something else than our own errors came out."""
        case = self.make(value)
        began = time.process_time()
        try:
            self.run(case)
        except BigsegError as error:
            if not 0 < len(str(error)) < LONGEST_MESSAGE:
                raise AssertionError("a message for nobody") from error
            return False
        finally:
            assert time.process_time() - began < SLOWEST_S, "it took too long"
        return True


# Values.


def nested(depth: int) -> Any:
    value: Any = []
    for i in range(depth):
        value = [value] if i % 2 else {"transformations": [value], "type": "sequence"}
    return value


NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, 10**4000]),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 5e-324, -0.0]),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            *("../x", "/etc/passwd", "s3://b/k", "0", "..", "", "a\0b", "\ud800", "\x1b[2J"),
            *(
                "scale",
                "translation",
                "sequence",
                "identity",
                "affine",
                "path",
                "0.4",
                "0.5",
                "0.6",
            ),
            *("0.6.dev3", "t", "c", "z", "y", "x", "space", "time", "channel", "micrometer", "nm"),
            *(
                "pickle",
                "zstd",
                "bytes",
                "gzip",
                "blosc",
                "|O",
                "<f8",
                "uint8",
                "float16",
                "x" * 300,
            ),
        ]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
JUNK = st.one_of(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from([nested(20), nested(400), [0.5] * 2000, ["x"] * 2000]),
)
EDIT = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(["set", "delete", "rename", "repeat", "copy", "wrap"]),
    JUNK,
    WORDS,
)
EDITS = st.lists(EDIT, min_size=1, max_size=5)


def places(document: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every container in it with every key, from the outside in."""
    if depth > 30:
        return []
    items: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document[:50]))
    found = [(document, key) for key, _ in items]
    for _, value in items:
        found += places(value, depth + 1)
    return found


def edited(document: Any, edits: list[tuple[int, str, Any, str]]) -> Any:
    """A copy of the document with changes at places that the numbers choose."""
    document = copy.deepcopy(document)
    for number, kind, junk, word in edits:
        found = places(document)
        if not found:
            return copy.deepcopy(junk)
        holder, key = found[number % len(found)]
        value = holder[key]
        if kind == "set":
            holder[key] = copy.deepcopy(junk)
        elif kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[word] = holder.pop(key)
        elif kind == "repeat" and isinstance(value, list):
            holder[key] = value * (1 + number % 70)
        elif kind == "copy":
            other, name = found[(number * 31) % len(found)]
            holder[key] = copy.deepcopy(other[name])
        elif kind == "wrap":
            holder[key] = [value]
        # What is copied and repeated grows without end.
        if len(json.dumps(document)) > LARGEST_DOCUMENT:
            return None
    return document


# OME-Zarr metadata.

SCALES = {"yx": [[0.5, 0.5], [1.0, 1.0]], "tczyx": [[1, 1, 2.0, 0.5, 0.5]], "zyx": [[3, 1, 1]]}
DOCUMENTS = [
    metadata(version, axes, scales, translations=shifts, channels=names)
    for version in ("0.4", "0.5", "0.6.dev3")
    for axes, scales in SCALES.items()
    for shifts in (None, [[0.25] * len(axes)] * len(scales))
    for names in ((), ("a", "b"))
]
DOCUMENTS += [
    {"ome": {"version": "0.5", "plate": {"wells": [{"path": "A/1"}]}}},
    {"ome": {"version": "0.5", "well": {"images": [{"path": "0"}]}}},
    {"ome": {"version": "0.5", "labels": ["cells", "nuclei"]}},
    {"ome": {"version": "0.5", "series": ["0", "1"]}, "bioformats2raw.layout": 3},
]


def mixed(parts: tuple[Any, Any, list[Any]]) -> Any:
    """A document with the keys of another one over its own, changed here and there."""
    first, second, edits = parts
    if len(edits) % 3 == 0:
        first = {**copy.deepcopy(first), **copy.deepcopy(second)}
    return edited(first, edits)


def run_metadata(document: Any) -> None:
    if not isinstance(document, dict):
        return
    for path in ngff.image_paths(document):
        assert isinstance(path, str)
    assert all(isinstance(name, str) for name in ngff.listed_labels(document))
    ms = ngff.parse_multiscale(document, where="/data/x.zarr")
    assert 0 < len(ms.levels) <= ngff.MAX_LEVELS
    for level in ms.levels:
        assert all(0 < s < math.inf for s in level.scale)
        assert all(math.isfinite(t) for t in level.translation)
        assert len(level.scale) == len(level.translation) == len(ms.axes)
        assert os.path.normpath(store.join("/data/x.zarr", level.path)).startswith("/data/x.zarr/")
    ms.voxel_um(0)
    ms.without_channels().with_channels(["a", "b"])


# Whole images, as files.


class _Image:
    """One small image in a temporary folder, whose documents are replaced; made once."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="bigseg-fuzz-")
        self.url = write_image(
            Path(self.folder, "image.zarr"), noise((3, 20, 20)), chunks=(1, 10, 10), n_levels=2
        )
        self.group = json.loads(Path(self.url, "zarr.json").read_text())
        self.array = json.loads(Path(self.url, "0", "zarr.json").read_text())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def images(image: _Image) -> Target:
    def make(edits: tuple[list[Any], list[Any], bytes]) -> None:
        documents = (edited(image.group, edits[0]), edited(image.array, edits[1]))
        for path, document in zip(("zarr.json", "0/zarr.json"), documents, strict=True):
            text = json.dumps(document).encode("utf-8", "surrogatepass")
            Path(image.url, path).write_bytes(text + edits[2])

    def run(_: None) -> None:
        guards.printable(as_text(describe(image.url))).encode()
        json.dumps(describe(image.url)).encode()

    few = st.lists(EDIT, max_size=3)
    tail = st.sampled_from([b"", b"", b"", b" ", b"}", b"\xff", b"\0"])
    return Target(st.tuples(few, few, tail), run, make)


# Model files.


def _model_bytes() -> tuple[bytes, bytes]:
    spec = UNetSpec.build(2, out_channels=2, depth=1, width=2)
    torch.manual_seed(0)
    card = ModelCard(spec=spec, classes=("a", "b"), voxel_um=(0.5, 0.5))
    save_model("memory://fuzz/model", UNet(spec), card)
    save_state("memory://fuzz/state", {"w": torch.arange(6.0)}, {"step": 3})
    return tuple(  # type: ignore[return-value]
        store.read_bytes(f"memory://fuzz/{name}", limit_bytes=1 << 20)
        for name in ("model", "state")
    )


def _cut_up(raw: bytes, cuts: list[tuple[int, str, bytes]]) -> bytes:
    data = bytearray(raw)
    for number, kind, piece in cuts:
        at = number % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << number % 8
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "remove":
            del data[at : at + len(piece)]
        elif kind == "header":
            data[8 + number % 64 : 8 + number % 64 + len(piece)] = piece
    return bytes(data)


def _with_header(raw: bytes, edits: list[Any], *, is_hashed: bool) -> bytes:
    """The file with changes to its header, and a hash that is right again or not."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for key in ("bigseg", "bigseg-training"):
        if key in header["__metadata__"] and len(edits) % 2:
            described = edited(json.loads(header["__metadata__"][key]), edits)
            header["__metadata__"][key] = json.dumps(described)
            break
    else:
        header = edited(header, edits)
    words = header.get("__metadata__") if isinstance(header, dict) else None
    if is_hashed and isinstance(words, dict):
        table = {k: v for k, v in header.items() if k != "__metadata__"}
        text = next((v for k, v in words.items() if str(k).startswith("bigseg")), "")
        canonical = json.dumps(table, sort_keys=True, separators=(",", ":"))
        parts = (str(text), canonical)
        digest = hashlib.sha256("".join(parts).encode("utf-8", "replace") + raw[start:])
        words["sha256"] = digest.hexdigest()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[start:]


def models() -> Target:
    files = _model_bytes()

    def make(case: tuple[int, list[Any], list[Any], bool]) -> int:
        which, cuts, edits, is_hashed = case
        raw = files[which]
        if edits:
            raw = _with_header(raw, edits, is_hashed=is_hashed)
        store.write_atomic("memory://fuzz/case", _cut_up(raw, cuts))
        return which

    def run(which: int) -> None:
        if which:
            tensors, meta = load_state("memory://fuzz/case")
            assert isinstance(meta, dict)
            assert all(isinstance(t, torch.Tensor) for t in tensors.values())
        else:
            net, card = load_model("memory://fuzz/case")
            assert len(card.classes) == card.spec.out_channels
            assert not net.training

    kinds = st.sampled_from(["flip", "cut", "insert", "remove", "header"])
    cut = st.tuples(st.integers(0, 10**6), kinds, st.binary(max_size=40))
    cases = st.tuples(
        st.integers(0, 1), st.lists(cut, max_size=2), st.lists(EDIT, max_size=3), st.booleans()
    )
    return Target(cases, run, make)


# Paths, options and settings.

PARTS = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from(["..", ".", "", "a", "labels", "%2e%2e", "\\", ":", "::", "~", "\0", "\n"]),
        max_size=6,
    ).map("/".join),
)
BASES = st.sampled_from(["/data/x.zarr", "rel/x.zarr", "s3://bucket/x", "memory://a", "/"])


def run_join(case: tuple[str, str]) -> None:
    base, part = case
    url = store.join(base, part)
    start = base if base.endswith("/") else f"{base}/"
    assert url.startswith(start)
    assert len(url) > len(start)
    if "://" not in base:
        assert os.path.normpath(url).startswith(start)
    assert guards.printable(url) == url
    url.encode()


def run_location(text: str) -> None:
    assert guards.check_location(text) == text


LOCATIONS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            [
                "https://",
                "s3://",
                "sftp://",
                "user",
                ":",
                "@",
                "/",
                "?",
                "#",
                "::",
                "pw",
                "[::1]",
                ".",
            ]
        ),
        max_size=8,
    ).map("".join),
)


@dataclass(frozen=True)
class _Source:
    """What convert asks of a file before it reads it."""

    shape: tuple[int, ...]
    axes: str | None = None
    name: str = "a.tif"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("uint8")

    @property
    def voxel_um(self) -> dict[str, float]:
        return {}


def run_options(case: tuple[str, str, tuple[int, ...]]) -> None:
    """Every parser of an option gets the text; one that refuses it does not spare the others."""
    text, other, shape = case
    parsers: list[Callable[[], Any]] = [
        lambda: parse_region(text, shape),
        lambda: parse_bytes(text),
        lambda: console.integers(text, "--tile"),
        lambda: canonical_unit(text),
        lambda: convert._resolve_axes(_Source(shape), text),
        lambda: convert._resolve_scale(
            convert._Placed(_Source(shape), "tczyx"[-len(shape) :]),
            console.numbers(text, "--voxel-size"),
            other,
        ),
        lambda: parse_settings(
            SegmentConfig, {"image": text, "model": other, "name": text}, source="options"
        ),
    ]
    refused: list[BigsegError] = []
    for parse in parsers:
        try:
            parse()
        except BigsegError as error:
            refused.append(error)
    if len(refused) >= len(parsers) - 1:  # A unit may have any name.
        raise max(refused, key=lambda error: len(str(error)))


PIECES = [
    *("0", "1", "-1", ":", ",", ".", " ", "e", "inf", "nan", "GiB", "K", "9" * 400, "9" * 5000),
    *("z", "y", "x", "t", "c", "_", "+", "\u0663", "\n", "\x1b", "\ud800", "None"),
]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
SHAPES = st.sampled_from([(4, 5), (3, 4, 5), (2, 3, 4, 5), (2**40, 2**40, 2**40)])

YAML_LINES = [
    *("images: [a.zarr]", "labels: cells", "steps: 10", "dims: 2", "region: 0:1,:,:", "seed: 0"),
    *("net: {depth: 2, width: 8}", "optim:", "  lr: 1e-3", "  lr: .inf", "augment: {flip: no}"),
    *("- a", "? [a, b]", "x: &a [1, 2]", "y: *a", "<<: {steps: 3}", "steps: !!int ''", "---"),
    *("z: !!python/name:os.system", "t: 2026-13-99", "b: !!binary '*'", "s: !!set {a, b}"),
    *(
        "classes: [a, {b: c}]",
        "patch: [1:2:3, 0x1F, 0b1, 010, 1_000]",
        "k: !!bool maybe",
        "...",
        "%YAML 9.9",
    ),
    *(
        "n: " + "9" * 5000,
        "d: " + "[" * 300,
        "o: !!omap [a: 1]",
        "m: |2\n  x",
        "{",
        "}",
        "\t",
        "@",
        "`",
    ),
]
YAML = st.one_of(
    st.lists(st.sampled_from(YAML_LINES), max_size=10).map("\n".join),
    st.text(max_size=60),
    st.tuples(
        st.lists(st.sampled_from(YAML_LINES), max_size=8).map("\n".join), st.text(max_size=5)
    ).map("\n".join),
)


def settings_files(folder: str) -> Target:
    path = Path(folder, "config.yaml")

    def make(case: tuple[bool, str]) -> None:
        is_whole, text = case
        start = "images: [a.zarr]\nlabels: cells\n" if is_whole else ""
        path.write_bytes((start + text).encode("utf-8", "surrogatepass"))

    def run(_: None) -> None:
        load_train_config(path, {})

    return Target(st.tuples(st.booleans(), YAML), run, make)


class Targets:
    """All of them, by name; a context manager, because some need a folder."""

    def __enter__(self) -> dict[str, Target]:
        self._image = _Image()
        documents = st.tuples(st.sampled_from(DOCUMENTS), st.sampled_from(DOCUMENTS), EDITS)
        return {
            "metadata": Target(documents, run_metadata, mixed),
            "images": images(self._image),
            "models": models(),
            "join": Target(st.tuples(BASES, PARTS), run_join),
            "locations": Target(LOCATIONS, run_location),
            "options": Target(st.tuples(TEXTS, TEXTS, SHAPES), run_options),
            "settings": settings_files(self._image.folder),
        }

    def __exit__(self, *_: object) -> None:
        self._image.remove()


NAMES = ("metadata", "images", "models", "join", "locations", "options", "settings")
