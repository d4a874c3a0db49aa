"""What is given to bigseg and cannot be used: the exact sentence and exit code for each; and what
looks bad and works, compared with the result of the same thing given plainly."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import noise, write_image, write_model
from safetensors.torch import save
from torch import zeros
from zarr.codecs import BytesCodec, GzipCodec
from zarr.storage import LocalStore
from zarr_images import metadata

from bigseg import cli
from bigseg.config import NormRule, UNetSpec

SHAPE = (6, 40, 40)
RAW = noise(SHAPE)
SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)
SEGMENT = "segment {0}/image.zarr --model {0}/model.safetensors"
TRAIN = "train {0}/image.zarr --labels cells --out {0}/run --executor serial"
HOW = ("--executor", "serial", "--engine", "torch", "--precision", "fp32")

Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A command line ({0} is the folder), what lies there, and how it must end.

    In what it says, `*` stands for words of another library.
    """

    name: str
    words: str
    says: str
    code: int
    plant: Plant = lambda folder: None


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """An image with labels `cells`, and models."""
    folder = tmp_path_factory.mktemp("stock")
    write_image(folder / "image.zarr", RAW, chunks=(2, 20, 20))
    labels = zarr.create_group(folder / "image.zarr" / "labels", zarr_format=3)
    labels.attrs["ome"] = {"version": "0.5", "labels": ["cells"]}
    write_image(labels_path(folder), (noise(SHAPE, seed=1) > 128).astype("u1"), chunks=(2, 20, 20))
    write_model(folder / "model.safetensors", SPEC)
    write_model(folder / "measured.safetensors", SPEC, norm=NormRule())
    write_model(folder / "sized.safetensors", SPEC, voxel_um=(1.0, 1.0, 1.0))
    pair = UNetSpec.build(3, in_channels=2, out_channels=2, depth=1, width=2)
    write_model(folder / "pair.safetensors", pair, channels=(0, 1))
    write_model(folder / "flat.safetensors", UNetSpec.build(2, out_channels=2, depth=1, width=2))
    return folder


def labels_path(folder):
    return folder / "image.zarr" / "labels" / "cells"


@pytest.fixture
def folder(stock, tmp_path):
    """A copy of the stock."""
    shutil.copytree(stock, tmp_path / "f")
    return tmp_path / "f"


def call(words, folder):
    split = [word.format(folder) for word in words.split()]
    how = HOW if split[0] in ("segment", "plan") and "--executor" not in split else ()
    return CliRunner().invoke(cli.main, [*split, *how])


# What is planted.


def image(values: Any, *, name="image.zarr", chunks=(2, 20, 20), **options) -> Plant:
    """Another image in place of the stock's."""

    def plant(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
        made = values() if callable(values) else values
        write_image(folder / name, made, chunks=chunks[-made.ndim :], **options)

    return plant


def attributes(names="zyx", scale=(1.0, 1.0, 1.0), **changes) -> Plant:
    """Other metadata for the image."""

    def plant(folder):
        made = metadata("0.5", names, [scale])
        made["ome"]["multiscales"][0].update(changes)
        zarr.open_group(folder / "image.zarr", mode="r+").attrs.put(made)

    return plant


def without_scale(folder):
    attributes()(folder)
    group = zarr.open_group(folder / "image.zarr", mode="r+")
    found = group.attrs.asdict()
    found["ome"]["multiscales"][0]["datasets"] = [{"path": "0"}]
    group.attrs.put(found)


def text(name, content) -> Plant:
    """A file."""

    def plant(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return plant


def labels(values, **options) -> Plant:
    """Other labels in place of `cells`."""

    def plant(folder):
        shutil.rmtree(labels_path(folder))
        write_image(labels_path(folder), values, chunks=options.pop("chunks", (2, 20, 20)))

    return plant


def model(change: Callable[[bytes], bytes]) -> Plant:
    """The model's file, damaged."""

    def plant(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return plant


def zipped(folder):
    with zipfile.ZipFile(folder / "model.safetensors", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02.")


def array_of(dtype, values=None, **options) -> Plant:
    """The image's array in another type, shape or chunks."""

    def plant(folder):
        shutil.rmtree(folder / "image.zarr" / "0")
        group = zarr.open_group(folder / "image.zarr", mode="r+")
        settings = {"shape": SHAPE, "chunks": (2, 20, 20), **options}
        array = group.create_array("0", dtype=dtype, **settings)
        if values is not None:
            array[...] = values

    return plant


def bare_array(folder):
    zarr.create_array(folder / "bare.zarr", data=RAW)


def empty_group(folder):
    zarr.create_group(folder / "empty.zarr", zarr_format=3)


def an_axis_of_phase(folder):
    axes = [{"name": "phase", "type": "phase"}, *({"name": n, "type": "space"} for n in "yx")]
    attributes(axes=axes)(folder)


def text_array(folder):
    shutil.rmtree(folder / "image.zarr")
    group = zarr.create_group(folder / "image.zarr", zarr_format=2)
    group.attrs.update(metadata("0.4", "zyx", [(1.0, 1.0, 1.0)]))
    group.create_array("0", shape=SHAPE, chunks=(2, 20, 20), dtype="<U4")


def cut(name) -> Plant:
    """A file that lost its second half."""

    def plant(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return plant


def level_missing(folder):
    two = metadata("0.5", "zyx", [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0)])["ome"]["multiscales"][0]
    attributes(datasets=two["datasets"])(folder)


def transform(code) -> Plant:
    return text("t.py", code)


def loop(folder):
    (folder / "loop.zarr").symlink_to("loop.zarr")


def several(*plants: Plant) -> Plant:
    def plant(folder):
        for one in plants:
            one(folder)

    return plant


def foreign(folder):
    write_image(folder / "other.zarr", RAW, chunks=(2, 20, 20))
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("years of work")


def yaml_of(content) -> Plant:
    return text("c.yaml", content)


ZARR = zarr.__version__
NAN = float("nan")
WITH_YAML = f"{TRAIN} -c {{0}}/c.yaml"
IDS = np.zeros(SHAPE, np.uint64)
IDS[1:4, 3:20, 3:20] = 2**63 + 5
IDS[2:5, 22:38, 5:30] = 17
IDS[0:2, 25:39, 30:39] = 2**40

CASES = [
    # The image is not there, or is something else.
    Case(
        "no image",
        "segment {0}/none.zarr --model {0}/model.safetensors",
        "no such image: {0}/none.zarr; check the path",
        3,
    ),
    Case(
        "nothing to tell of",
        "info {0}/none.zarr",
        "no such image: {0}/none.zarr; check the path",
        3,
    ),
    Case(
        "a TIFF",
        "segment {0}/stack.tif --model {0}/model.safetensors",
        "{0}/stack.tif is a file, not an OME-Zarr image: convert it first with `bigseg convert "
        "{0}/stack.tif OUT.ome.zarr`",
        3,
        text("stack.tif", b"II*\0"),
    ),
    Case(
        "a text",
        "info {0}/notes.txt",
        "{0}/notes.txt is a file, not an OME-Zarr image: give the directory of an OME-Zarr image",
        3,
        text("notes.txt", "no image"),
    ),
    Case(
        "a directory without metadata",
        "segment {0}/thesis --model {0}/model.safetensors",
        "{0}/thesis is a directory without Zarr metadata: check the path",
        3,
        foreign,
    ),
    Case(
        "a directory of images",
        "segment {0} --model {0}/model.safetensors",
        "{0} is a directory without Zarr metadata: give one of image.zarr in it",
        3,
    ),
    Case(
        "a bare array",
        "segment {0}/bare.zarr --model {0}/model.safetensors",
        "{0}/bare.zarr is a single Zarr array: give the image that holds it",
        3,
        bare_array,
    ),
    Case(
        "a level instead of the image",
        "segment {0}/image.zarr/0 --model {0}/model.safetensors",
        "{0}/image.zarr/0 is level 0 of an image: give {0}/image.zarr with `--level 0`",
        3,
    ),
    Case(
        "a group without an image",
        "segment {0}/empty.zarr --model {0}/model.safetensors",
        "{0}/empty.zarr is a Zarr group without OME-Zarr metadata (multiscales): check the path, "
        "or convert the image with `bigseg convert`",
        3,
        empty_group,
    ),
    Case(
        "a link to itself",
        "segment {0}/loop.zarr --model {0}/model.safetensors",
        "{0}/loop.zarr cannot be read: Too many levels of symbolic links; check its rights",
        3,
        loop,
    ),
    Case(
        "metadata that are no JSON",
        SEGMENT,
        f"{{0}}/image.zarr is damaged or not understood by zarr {ZARR}: Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1); check its metadata",
        3,
        text("image.zarr/zarr.json", "{broken"),
    ),
    Case(
        "metadata that are a list",
        SEGMENT,
        f"{{0}}/image.zarr is damaged or not understood by zarr {ZARR}: *; check its metadata",
        3,
        text("image.zarr/zarr.json", "[1, 2]"),
    ),
    Case(
        "an empty file as metadata of a level",
        SEGMENT,
        f"{{0}}/image.zarr/0 is damaged or not understood by zarr {ZARR}: Expecting value: line 1 "
        "column 1 (char 0); check its metadata",
        3,
        text("image.zarr/0/zarr.json", ""),
    ),
    Case(
        "a level that is missing",
        f"{SEGMENT} --level 1",
        "level 1 of {0}/image.zarr is listed, but its array {0}/image.zarr/1 is missing: copy the "
        "image again",
        3,
        level_missing,
    ),
    # The image contradicts itself, or is nothing to segment.
    Case(
        "axes in another order",
        SEGMENT,
        "{0}/image.zarr has the axes z,c,y; they must be different, in the order time, channel, "
        "space, and hold y and x: write the image with such axes",
        3,
        attributes("zcy"),
    ),
    Case(
        "an axis of another kind",
        SEGMENT,
        "{0}/image.zarr has an axis 'phase' of type 'phase'; bigseg reads time t, channel c and "
        "space z, y, x: write the image with those axes only",
        3,
        an_axis_of_phase,
    ),
    Case(
        "fewer axes than the array has",
        SEGMENT,
        "{0}/image.zarr/0 has 3 axes, its image states y,x: correct the metadata",
        3,
        attributes("yx", (1.0, 1.0)),
    ),
    Case(
        "a negative scale",
        SEGMENT,
        "{0}/image.zarr has the scale [1.0, -1.0, 1.0]; it must be 3 positive numbers, one for "
        "each axis: correct the metadata",
        3,
        attributes(scale=(1.0, -1.0, 1.0)),
    ),
    Case(
        "a scale of zero",
        SEGMENT,
        "{0}/image.zarr has the scale [0.0, 1.0, 1.0]; it must be 3 positive numbers, one for each "
        "axis: correct the metadata",
        3,
        attributes(scale=(0.0, 1.0, 1.0)),
    ),
    Case(
        "a scale for other axes",
        SEGMENT,
        "{0}/image.zarr has the scale [1.0, 1.0]; it must be 3 positive numbers, one for each "
        "axis: correct the metadata",
        3,
        attributes(scale=(1.0, 1.0)),
    ),
    Case(
        "no scale, and a model that knows its own",
        "segment {0}/image.zarr --model {0}/sized.safetensors",
        "{0}/image.zarr has no voxel size in units of length, the model has 1×1×1 µm: choose a "
        "level with `--level`",
        3,
        without_scale,
    ),
    Case(
        "an axis of no voxels",
        SEGMENT,
        "{0}/image.zarr/0 is empty, its shape (z,y,x) is (0, 40, 40): copy it again",
        3,
        array_of("uint8", shape=(0, 40, 40)),
    ),
    Case(
        "complex numbers",
        SEGMENT,
        "{0}/image.zarr/0 holds values of type complex64; bigseg reads integers, booleans and "
        "floating-point numbers up to 64 bits: convert it first",
        3,
        array_of("complex64"),
    ),
    Case(
        "texts",
        SEGMENT,
        "{0}/image.zarr/0 holds values of type <U4; bigseg reads integers, booleans and "
        "floating-point numbers up to 64 bits: convert it first",
        3,
        text_array,
    ),
    Case(
        "one value everywhere",
        "segment {0}/image.zarr --model {0}/measured.safetensors",
        "channel 0 of {0}/image.zarr has the same value (42) everywhere, so that there is no "
        "contrast to normalise: check the channel, level and time point, or take the constants of "
        "the model (segment with --norm model)",
        3,
        image(np.full(SHAPE, 42, np.uint8)),
    ),
    Case(
        "no finite value",
        "segment {0}/image.zarr --model {0}/measured.safetensors",
        "channel 0 of {0}/image.zarr has no finite value in the 9600 voxels of level 0 that are "
        "measured: check the channel and the level, or copy the image again",
        3,
        image(np.full(SHAPE, NAN, np.float32)),
    ),
    Case(
        "values beyond float32",
        "segment {0}/image.zarr --model {0}/measured.safetensors",
        "channel 0 of {0}/image.zarr has values from 0 to 2.55e+302, beyond what float32 holds: "
        "rescale the image",
        3,
        image(lambda: RAW.astype(np.float64) * 1e300),
    ),
    Case(
        "values that float32 does not tell apart",
        "segment {0}/image.zarr --model {0}/measured.safetensors",
        "channel 0 of {0}/image.zarr has values from 1.9455e-303 to 2.54998e-298, which "
        "float32 does not tell apart: rescale the image",
        3,
        image(lambda: RAW.astype(np.float64) * 1e-300),
    ),
    Case(
        "a damaged chunk where the statistics look",
        "segment {0}/image.zarr --model {0}/measured.safetensors",
        "chunk 0/c/1/0/1 of {0}/image.zarr cannot be decoded (*): restore it from a copy, or use "
        "--on-bad-chunk fill to segment its voxels as the fill value",
        3,
        cut("image.zarr/0/c/1/0/1"),
    ),
    # The model.
    Case(
        "no model",
        "segment {0}/image.zarr --model {0}/gone.safetensors",
        "no such file: {0}/gone.safetensors; check the path",
        3,
    ),
    Case(
        "a directory as model",
        "segment {0}/image.zarr --model {0}/thesis",
        "{0}/thesis cannot be read: Is a directory; give a readable file",
        3,
        foreign,
    ),
    Case(
        "an empty model",
        SEGMENT,
        "{0}/model.safetensors is truncated: it ends after 0 bytes; copy it again",
        3,
        model(lambda data: b""),
    ),
    Case(
        "a truncated model",
        SEGMENT,
        "{0}/model.safetensors is truncated: it ends after 200 bytes; copy it again",
        3,
        model(lambda data: data[:200]),
    ),
    Case(
        "a pickle as model",
        SEGMENT,
        "{0}/model.safetensors is a PyTorch pickle, which can run code when it is loaded, so "
        "bigseg never loads one: give the model.safetensors of a training run",
        3,
        model(lambda data: pickle.dumps({"weights": [1.0] * 20}, protocol=2)),
    ),
    Case(
        "a PyTorch archive as model",
        SEGMENT,
        "{0}/model.safetensors is a PyTorch pickle, which can run code when it is loaded, so "
        "bigseg never loads one: give the model.safetensors of a training run",
        3,
        zipped,
    ),
    Case(
        "a text as model",
        SEGMENT,
        "{0}/model.safetensors is not a model file, it begins with b'weights:': give the "
        "model.safetensors of a training run",
        3,
        model(lambda data: b"weights: 1, 2, 3"),
    ),
    Case(
        "a model of another program",
        SEGMENT,
        "{0}/model.safetensors is a safetensors file without the description of a bigseg model: "
        "give the model.safetensors of a training run",
        3,
        model(lambda data: save({"weight": zeros(3)})),
    ),
    Case(
        "a 3-D model and a plane",
        SEGMENT,
        "{0}/image.zarr is a 2-D image (yx), {0}/model.safetensors a 3-D model: train a 2-D model "
        "(bigseg train --dims 2), or give a volume with a z axis",
        3,
        image(RAW[0], dims="yx"),
    ),
    Case(
        "a model of more channels than the image",
        "segment {0}/image.zarr --model {0}/pair.safetensors",
        "channel 1 is not in {0}/image.zarr, which has 1 (0): choose with --channel",
        3,
    ),
    Case(
        "fewer channels than the model has",
        "segment {0}/image.zarr --model {0}/pair.safetensors --channel 0",
        "{0}/pair.safetensors reads 2 channels, --channel names 1: name as many as the model has",
        3,
    ),
    # Options of segment.
    Case(
        "a level that is not there",
        f"{SEGMENT} --level 9",
        "{0}/image.zarr has no level 9; it has 0: choose one with `--level`",
        3,
    ),
    Case(
        "a channel that is not there",
        f"{SEGMENT} --channel 7",
        "channel 7 is not in {0}/image.zarr, which has 1 (0): choose with --channel",
        3,
    ),
    Case(
        "a time point of an image without time",
        f"{SEGMENT} --time 3",
        "--time 3: the image has 1 time points, 0 to 0: choose one of those, or leave --time out",
        2,
    ),
    Case(
        "a tile of two sides for a 3-D model",
        f"{SEGMENT} --tile 3,4",
        "a tile of (1, 1, 3, 4) (t, z, y, x) does not fit the network: its sides must be multiples "
        "of its stride (2, 2, 2), and it has one time point: give such a --tile",
        2,
    ),
    Case(
        "a tile of one side",
        f"{SEGMENT} --tile 16",
        "--tile 16: give z,y,x or y,x in voxels",
        2,
    ),
    Case(
        "a tile of words",
        f"{SEGMENT} --tile 4,big,4",
        "--tile '4,big,4': give numbers separated by commas, one for each axis",
        2,
    ),
    Case(
        "a block of no voxels",
        f"{SEGMENT} --block 0,16,16",
        "--block 0,16,16: give z,y,x or y,x in voxels",
        2,
    ),
    Case(
        "a region outside",
        f"{SEGMENT} --region 0:9,:,:",
        "region '0:9,:,:': '0:9' is empty or outside the axis, which runs from 0 to 6: "
        "give a part of it",
        2,
    ),
    Case(
        "a region backwards",
        f"{SEGMENT} --region 0:6,30:10,:",
        "region '0:6,30:10,:': '30:10' is empty or outside the axis, which runs from 0 to 40: "
        "give a part of it",
        2,
    ),
    Case(
        "a region that is none",
        f"{SEGMENT} --region here,there,:",
        "region 'here,there,:': 'here' is not an interval of integers; write it as 0:6",
        2,
    ),
    Case(
        "a region of two axes",
        f"{SEGMENT} --region 0:9,:",
        "region '0:9,:' has 2 axes, the volume has 3 (zyx): write z0:z1,y0:y1,x0:x1",
        2,
    ),
    Case(
        "a mask that is not there",
        f"{SEGMENT} --mask {{0}}/mask.zarr",
        "no such image: {0}/mask.zarr; check the path",
        3,
    ),
    Case(
        "a mask of another field of view",
        f"{SEGMENT} --mask {{0}}/mask.zarr",
        "the mask {0}/mask.zarr covers 6×30×40 µm along z, y, x, level 0 of {0}/image.zarr covers "
        "6×40×40 µm: they must show the same field of view; give another mask, or correct its "
        "voxel size",
        3,
        image(RAW[:, :30], name="mask.zarr"),
    ),
    Case(
        "an intensity that is no number",
        f"{SEGMENT} --skip-below nan",
        "options: skip_below = nan is not a finite number; give one",
        2,
    ),
    Case(
        "a level to skip by, and nothing to skip",
        f"{SEGMENT} --skip-level 0",
        "--skip-level 0 says where to look, not for what: add --skip-below VALUE, or leave it out",
        2,
    ),
    Case(
        "a level to skip by that is not there",
        f"{SEGMENT} --skip-below 3 --skip-level 4",
        "--skip-level 4: {0}/image.zarr has no such level, it has 0: choose among those",
        2,
    ),
    Case(
        "memory of no size",
        f"{SEGMENT} --memory 10XB",
        "'10XB' is no size of memory: write it as 6GiB or 500MiB",
        2,
    ),
    Case(
        "no constants in the model",
        f"{SEGMENT} --norm model",
        "{0}/model.safetensors holds no constants of its training volume: use --norm volume",
        3,
    ),
    Case(
        "a name that is a path",
        f"{SEGMENT} --name ../x",
        "options: name = '../x': a name has up to 128 letters from a to z, digits, '.', '_' and "
        "'-', and begins with a letter or digit; give such a name",
        2,
    ),
    Case(
        "probabilities among the labels",
        f"{SEGMENT} --output probabilities",
        "--output probabilities makes an image of its own: say where with --out",
        2,
    ),
    # The output.
    Case(
        "the input as output",
        f"{SEGMENT} --out {{0}}/image.zarr",
        "--out {0}/image.zarr holds the image itself: say another place for the output",
        2,
    ),
    Case(
        "the folder of the input as output",
        f"{SEGMENT} --out {{0}} --overwrite",
        "--out {0} holds the image itself: say another place for the output",
        2,
    ),
    Case(
        "an output within an array of the input",
        f"{SEGMENT} --out {{0}}/image.zarr/0/c/out.zarr",
        "--out {0}/image.zarr/0/c/out.zarr lies inside the image {0}/image.zarr: say another place "
        "for the output, or leave out --out and give labels beside the image a --name",
        2,
    ),
    Case(
        "an output within the input by a link",
        f"{SEGMENT} --out {{0}}/link/out.zarr",
        "--out {0}/link/out.zarr lies inside the image {0}/image.zarr: say another place for the "
        "output, or leave out --out and give labels beside the image a --name",
        2,
        lambda folder: (folder / "link").symlink_to(folder / "image.zarr" / "0"),
    ),
    Case(
        "an output that another program made",
        f"{SEGMENT} --out {{0}}/other.zarr",
        "{0}/other.zarr exists: give another name or use --overwrite",
        5,
        foreign,
    ),
    Case(
        "an output that another program made, to be overwritten",
        f"{SEGMENT} --out {{0}}/other.zarr --overwrite",
        "{0}/other.zarr was not made by bigseg segment, so --overwrite does not delete it: delete "
        "it yourself or choose another --name or --out",
        5,
        foreign,
    ),
    Case(
        "an output that is somebody's folder, to be overwritten",
        f"{SEGMENT} --out {{0}}/thesis --overwrite",
        "{0}/thesis was not made by bigseg segment, so --overwrite does not delete it: delete it "
        "yourself or choose another --name or --out",
        5,
        foreign,
    ),
    Case(
        "labels that were drawn by hand as output",
        f"{SEGMENT} --name cells",
        "{0}/image.zarr/labels/cells exists: give another name or use --overwrite",
        5,
    ),
    Case(
        "an output below a file",
        f"{SEGMENT} --out {{0}}/notes.txt/out.zarr",
        "{0}/notes.txt/out.zarr cannot be written: Not a directory; check rights and space or give "
        "another output",
        5,
        text("notes.txt", ""),
    ),
    Case(
        "an output where nobody may write",
        f"{SEGMENT} --out /proc/bigseg/out.zarr",
        "/proc/bigseg/out.zarr cannot be written: No such file or directory; check rights and "
        "space or give another output",
        5,
    ),
    Case(
        "a name that no file system holds",
        f"{SEGMENT} --out {{0}}/{'x' * 300}.zarr",
        f"{{0}}/{'x' * 300}.zarr cannot be written: File name too long; check rights and space or "
        "give another output",
        5,
    ),
    # Transforms.
    Case(
        "no file of a transform",
        f"{SEGMENT} --transform {{0}}/t.py:f",
        "--transform {0}/t.py cannot be read: No such file or directory; check the path",
        2,
    ),
    Case(
        "a file without a function",
        f"{SEGMENT} --transform {{0}}/t.py",
        "--transform '{0}/t.py' does not name a function in a file: write FILE.py:FUNCTION",
        2,
        transform("def f(x):\n    return x\n"),
    ),
    Case(
        "a function that is not in the file",
        f"{SEGMENT} --transform {{0}}/t.py:smoth",
        "t.py has no function 'smoth'; did you mean 'smooth'?",
        2,
        transform("def smooth(x):\n    return x\n"),
    ),
    Case(
        "a transform that raises",
        f"{SEGMENT} --transform {{0}}/t.py:f",
        "f of t.py raises ZeroDivisionError in line 2 (division by zero) for an image (c, t, z, y, "
        "x) of shape (1, 1, 6, 8, 8) and type uint8: correct it",
        2,
        transform("def f(x):\n    return x * (1 / 0)\n"),
    ),
    Case(
        "a transform that changes the shape",
        f"{SEGMENT} --transform {{0}}/t.py:f",
        "f of t.py makes (1, 1, 3, 8, 8) of an image (c, t, z, y, x) of shape (1, 1, 6, 8, 8): it "
        "may change the number of channels only",
        2,
        transform("def f(x):\n    return x[:, :, ::2]\n"),
    ),
    # Training.
    Case(
        "labels of no such name",
        "train {0}/image.zarr --labels nuclei --out {0}/run --executor serial",
        "labels 'nuclei' not found in {0}/image.zarr; there are: cells: give one of those",
        3,
    ),
    Case(
        "labels of another shape",
        TRAIN,
        "labels 'cells' of {0}/image.zarr have (1, 6, 30, 40) voxels (t, z, y, x), the image has "
        "(1, 6, 40, 40) at level 0: choose a level that both have, or write labels of the image's "
        "extent",
        3,
        labels(RAW[:, :30]),
    ),
    Case(
        "labels that are no integers",
        TRAIN,
        "labels 'cells' of {0}/image.zarr are of type float32, but labels are integers: convert "
        "them",
        3,
        labels(RAW.astype(np.float32)),
    ),
    Case(
        "numbered objects as classes",
        TRAIN,
        "labels 'cells' of {0}/image.zarr have values from 0 to 9223372036854775813, but classes "
        "are numbered 0 to 255: for numbered objects use `task: instances`, for voxels without "
        "annotation set `ignore`",
        3,
        labels(IDS),
    ),
    Case(
        "nothing is annotated",
        WITH_YAML,
        "no voxel of region of {0}/image.zarr is annotated in 'cells': choose one where there are "
        "labels",
        3,
        several(labels(np.full(SHAPE, 255, np.uint8)), yaml_of("ignore: 255\n")),
    ),
    Case(
        "one class only",
        TRAIN,
        "the labels 'cells' hold only the value 1 in the training region: a network needs two "
        "classes to learn; choose another region, or labels that name the background too",
        3,
        labels(np.ones(SHAPE, np.uint8)),
    ),
    Case(
        "a region to validate that is outside",
        f"{TRAIN} --val-region 4:9,:,:",
        "{0}/image.zarr: region '4:9,:,:': '4:9' is empty or outside the axis, which runs "
        "from 0 to 6: give a part of it",
        2,
    ),
    Case(
        "no images",
        "train --labels cells --out {0}/run --executor serial",
        "options: the setting 'images' is missing; give it",
        2,
    ),
    Case(
        "no configuration",
        WITH_YAML,
        "configuration {0}/c.yaml cannot be read: [Errno 2] No such file or directory: "
        "'{0}/c.yaml'; check the path",
        2,
    ),
    Case(
        "an unknown setting",
        WITH_YAML,
        "{0}/c.yaml: unknown setting 'stepps'; did you mean 'steps'?",
        2,
        yaml_of("stepps: 5\n"),
    ),
    Case(
        "a setting given twice",
        WITH_YAML,
        "configuration {0}/c.yaml is not valid YAML: key 'steps' is given twice; correct it",
        2,
        yaml_of("steps: 5\nseed: 1\nsteps: 6\n"),
    ),
    Case(
        "a tab in the YAML",
        WITH_YAML,
        "configuration {0}/c.yaml is not valid YAML: while scanning for the next token found "
        "character '\\t' that cannot start any token in \"<unicode string>\", line 2, column 1: "
        "lr: 1 ^; correct it",
        2,
        yaml_of("optim:\n\tlr: 1\n"),
    ),
    Case(
        "a YAML that is a list",
        WITH_YAML,
        "configuration {0}/c.yaml must be a mapping of settings, such as `steps: 500`",
        2,
        yaml_of("- steps\n- 5\n"),
    ),
    Case(
        "a YAML that would run code",
        WITH_YAML,
        "configuration {0}/c.yaml is not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd' in \"<unicode string>\", line 1, column "
        "9: labels: !!python/object/apply:os.getcwd [] ^; correct it",
        2,
        yaml_of("labels: !!python/object/apply:os.getcwd []\n"),
    ),
    Case(
        "a YAML that is too large",
        WITH_YAML,
        "configuration {0}/c.yaml has more than 1048576 bytes: give a smaller file",
        2,
        yaml_of("# " + "x" * (1 << 20)),
    ),
    Case(
        "a learning rate that is no number",
        WITH_YAML,
        "{0}/c.yaml: optim.lr = nan is not a finite number; give one",
        2,
        yaml_of("optim: {lr: .nan}\n"),
    ),
    Case(
        "a patch that the network cannot compute",
        WITH_YAML,
        "patch: [7, 7] is not what the network can compute, its poolings need other sizes: the "
        "next that fits is [8, 8]",
        2,
        yaml_of("dims: 2\nnet: {depth: 1, width: 2}\npatch: [7, 7]\n"),
    ),
    Case(
        "a damaged chunk of the image to learn from",
        WITH_YAML,
        "chunk 0/c/1/0/1 of {0}/image.zarr cannot be decoded (*): restore it from a copy",
        3,
        several(cut("image.zarr/0/c/1/0/1"), yaml_of("dims: 2\nsteps: 1\n")),
    ),
    # Evaluating and converting.
    Case(
        "a damaged chunk of the labels to compare",
        "evaluate {0}/image.zarr/labels/cells {0}/image.zarr/labels/cells",
        "chunk 0/c/0/1/0 of {0}/image.zarr/labels/cells cannot be decoded (*): restore it from a "
        "copy",
        3,
        cut("image.zarr/labels/cells/0/c/0/1/0"),
    ),
    Case(
        "scores of other shapes",
        "evaluate {0}/image.zarr/labels/cells {0}/small.zarr",
        "{0}/image.zarr/labels/cells has shape (1, 6, 40, 40) (t, z, y, x), {0}/small.zarr has (1, "
        "6, 30, 40): they must be the same voxels; choose the level of the same size",
        3,
        image(RAW[:, :30], name="small.zarr"),
    ),
    Case(
        "scores of intensities",
        "evaluate {0}/float.zarr {0}/image.zarr/labels/cells",
        "{0}/float.zarr has values of type float32, but labels are integers: give a label image "
        "(IMAGE/labels/NAME)",
        3,
        image(RAW.astype(np.float32), name="float.zarr"),
    ),
    Case(
        "a source that is not there",
        "convert {0}/none.tif {0}/out.zarr",
        "no such file: {0}/none.tif; check the path",
        3,
    ),
    Case(
        "a source that is no TIFF",
        "convert {0}/bad.tif {0}/out.zarr",
        "{0}/bad.tif is no TIFF file that can be read (*): save it again",
        3,
        text("bad.tif", "no TIFF at all"),
    ),
    Case(
        "an output without a source",
        "convert {0}/out.zarr",
        "convert needs sources and an output, '{0}/out.zarr' is only one of them",
        2,
    ),
    Case(
        "a sample of one side",
        "sample {0}/s.zarr --shape 32",
        "shape (32,) makes no sample: give 3 numbers (z, y, x) or 2 (y, x) of at least 8 voxels",
        2,
    ),
]

USAGE = {
    "no workers": (
        f"{SEGMENT} --workers 0",
        "Invalid value for '--workers': 0 is not in the range x>=1.",
    ),
    "an unknown option": (f"{SEGMENT} --speed 9", "No such option"),
    "an unknown command": ("segmant {0}", "No such command 'segmant'."),
    "an unknown choice": (
        f"{SEGMENT} --on-bad-chunk ignore",
        "Invalid value for '--on-bad-chunk': 'ignore' is not one of 'set-aside', 'fill'.",
    ),
    "no model": ("segment {0}/image.zarr", "Missing option '--model'."),
    "a level below zero": (
        f"{SEGMENT} --level -1",
        "Invalid value for '--level': -1 is not in the range x>=0.",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gets_its_sentence_and_its_exit_code(case, folder):
    case.plant(folder)
    before = files_of(folder)
    result = call(case.words, folder)
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, result.stderr
    start, star, end = f"error: {case.says.format(folder)}".partition("*")
    shown = start + star + end if told[0].startswith(start) and told[0].endswith(end) else told[0]
    assert (shown if star else told[0]) == start + star + end
    assert result.exit_code == case.code
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    # Nothing is left behind, and nothing that was there is lost.
    assert files_of(folder) == before


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_told_by_the_parser(name, folder):
    words, says = USAGE[name]
    result = call(words, folder)
    assert result.exit_code == 2
    assert f"Error: {says}" in result.stderr.splitlines()[-1]


def test_too_little_memory_says_how_much_is_needed(folder):
    result = call(f"{SEGMENT} --memory 1MiB", folder)
    assert result.exit_code == 2
    start, _, end = result.stderr.strip().splitlines()[-1].partition(" voxels needs ")
    assert start.startswith("error: --memory 1 MiB: a worker with tiles of ")
    assert end.endswith(" MiB: give more memory")


def test_damaged_weights_are_named_by_both_hashes(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = call(SEGMENT, folder)
    assert result.exit_code == 3
    assert "was damaged after it was written: its sha256 is " in result.stderr
    assert result.stderr.strip().endswith("…; copy it again or train anew")


def test_no_space_ends_with_5_and_the_reason(folder):
    """In a process of its own, whose files may have 2000 bytes as if the disk were full."""
    words = SEGMENT.format(folder).split()
    done = subprocess.run(
        [sys.executable, "-m", "bigseg", *words, *HOW, "--out", f"{folder}/o.zarr"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        env={**os.environ, "BIGSEG_CACHE": str(folder)},
    )
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


def refuse(self, *args):
    raise PermissionError(13, "Permission denied")


def test_an_output_that_may_not_be_written_ends_with_5(folder, monkeypatch):
    """Rights do not bind the superuser, so the error of the system is planted."""
    monkeypatch.setattr("bigseg.writing.UnitWriter.write", refuse)
    result = call(SEGMENT, folder)
    assert result.exit_code == 5, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert f"of {folder}/image.zarr/labels/bigseg cannot be written: Permission denied" in told[0]


def test_an_image_that_may_not_be_read_ends_with_5_and_is_not_taken_for_damaged(
    folder, monkeypatch
):
    array_of("uint8", RAW, compressors=GzipCodec())(folder)

    async def get(self, key, *args, **options):
        if key.startswith("c/"):
            raise PermissionError(13, "Permission denied")
        return await original(self, key, *args, **options)

    original = LocalStore.get
    monkeypatch.setattr(LocalStore, "get", get)
    result = call(f"{SEGMENT} --on-bad-chunk fill", folder)
    assert result.exit_code == 5, result.stderr
    assert "cannot be decoded" not in result.stderr
    assert "Permission denied" in result.stderr


# What looks bad and works.


def result_of(folder, where="image.zarr"):
    return zarr.open_array(folder / where / "labels" / "bigseg" / "0", mode="r")[...]


def segmented(folder, options=""):
    result = call(f"{SEGMENT} {options}", folder)
    assert result.exit_code == 0, result.stderr
    return result_of(folder)


@pytest.fixture(scope="module")
def plain(stock, tmp_path_factory):
    """The result for an image, as it is written by the plant."""

    def of(values, dims="zyx"):
        folder = tmp_path_factory.mktemp("plain")
        shutil.copytree(stock, folder / "f")
        image(np.asarray(values), dims=dims)(folder / "f")
        return segmented(folder / "f")

    return of


SPOILT = RAW.astype(np.float32)
SPOILT[2, 10:13, 20] = np.nan, np.inf, -np.inf


def test_voxels_that_are_not_finite_count_as_the_offset(folder, plain):
    """The offset of these models is 100."""
    image(SPOILT)(folder)
    wanted = np.where(np.isfinite(SPOILT), SPOILT, np.float32(100))
    np.testing.assert_array_equal(segmented(folder), plain(wanted))


def test_voxels_that_are_not_finite_are_counted_in_a_warning(folder, caplog):
    image(SPOILT)(folder)
    result = call("segment {0}/image.zarr --model {0}/measured.safetensors", folder)
    assert result.exit_code == 0, result.stderr
    assert (
        f"channel 0 of {folder}/image.zarr: 3 of the 9600 voxels of level 0 that are measured are "
        "not finite (NaN or infinite); the network sees the offset in their place"
    ) in caplog.messages


@pytest.mark.parametrize("dtype", [">u2", "float64", "int64", ">f4", ">i8"])
def test_other_types_give_what_the_plain_type_gives(folder, plain, dtype):
    values = RAW.astype(np.dtype(dtype).newbyteorder("=")) * 2
    is_big = dtype.startswith(">")
    array_of(dtype, values, serializer=BytesCodec(endian="big") if is_big else "auto")(folder)
    np.testing.assert_array_equal(segmented(folder), plain(RAW.astype(np.uint16) * 2))


def test_booleans_give_what_zeros_and_ones_give(folder, plain):
    image(RAW > 128)(folder)
    np.testing.assert_array_equal(segmented(folder), plain((RAW > 128).astype(np.uint8)))


def test_a_volume_of_one_voxel_and_one_smaller_than_the_halo_work(folder):
    for shape in ((1, 1, 1), (1, 40, 1), (2, 3, 2)):
        values = RAW[tuple(slice(0, n) for n in shape)]
        image(values, chunks=shape)(folder)
        assert segmented(folder).shape == shape


def test_a_chunk_larger_than_the_volume_works(folder, plain):
    array_of("uint8", RAW, chunks=(64, 64, 64))(folder)
    np.testing.assert_array_equal(segmented(folder), plain(RAW))


def test_chunks_that_are_not_stored_are_background(folder, plain):
    (folder / "image.zarr" / "0" / "c" / "0" / "0" / "0").unlink()
    found = segmented(folder)
    assert not found[:2, :20, :20].any()
    np.testing.assert_array_equal(found[:, 34:], plain(RAW)[:, 34:])


def test_an_image_without_scale_is_segmented_when_the_level_is_named(folder, plain):
    without_scale(folder)
    np.testing.assert_array_equal(segmented(folder, "--level 0"), plain(RAW))


def test_a_plane_is_segmented_with_a_tile_of_two_sides(folder):
    image(RAW[0], dims="yx")(folder)
    words = "segment {0}/image.zarr --model {0}/flat.safetensors --tile 16,16"
    result = call(words, folder)
    assert result.exit_code == 0, result.stderr
    assert result_of(folder).shape == (40, 40)


def test_blanks_and_other_letters_in_a_path_work(folder, plain):
    place = folder / "ein Bild ü β 100%2e"
    place.mkdir()
    for name in ("image.zarr", "model.safetensors"):
        shutil.move(folder / name, place / name)
    words = ["segment", f"{place}/image.zarr", "--model", f"{place}/model.safetensors", *HOW]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(result_of(place), plain(RAW))


TINY = """
task: instances
dims: 2
steps: 2
batch: 1
patch: {patch}
net: {{depth: 1, width: 2}}
precision: fp32
"""


@pytest.mark.parametrize("patch", [[20, 20], [88, 88]])
def test_ids_of_64_bits_with_gaps_and_patches_larger_than_the_volume_train(folder, patch):
    labels(IDS)(folder)
    yaml_of(TINY.format(patch=patch))(folder)
    result = call(WITH_YAML, folder)
    assert result.exit_code == 0, result.stderr
    assert (folder / "run" / "model.safetensors").stat().st_size > 0


def test_ids_of_64_bits_with_gaps_are_scored_as_the_same_objects_with_small_ids(folder):
    labels(IDS)(folder)
    small = np.unique(IDS, return_inverse=True)[1].reshape(SHAPE).astype(np.uint8)
    image(small, name="small.zarr")(folder)
    words = "evaluate {0}/image.zarr/labels/cells {0}/small.zarr --json"
    scores = json.loads(call(words, folder).stdout)
    assert scores["n_truth_objects"] == 3
    assert scores["adapted_rand_error"]["error"] == pytest.approx(0)
