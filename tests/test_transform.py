"""A transform by regions is the transform of the whole volume; what is wrong with one is said."""

import hashlib
import itertools
import pickle
import subprocess
import sys
import threading
from functools import partial
from textwrap import dedent

import numpy as np
import pytest
from helpers import noise, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, maximum_filter

from bigseg import transform as room
from bigseg.blocks import Region
from bigseg.config import NormRule
from bigseg.errors import InputError, UsageError
from bigseg.predict import read_mirrored
from bigseg.statistics import norm_constants
from bigseg.transform import Transform, TransformedVolume, TransformPlan, describe, load_transform
from bigseg.volume import open_volume

SOURCE = """
    from functools import partial
    from scipy.ndimage import gaussian_filter, maximum_filter

    def invert(image):
        return 255 - image

    def smooth(image):
        by_one = partial(gaussian_filter, sigma=(0, 0, 1, 1, 1), truncate=2, mode="reflect")
        depth = {1: 0, 2: 2, 3: 2, 4: 2}
        return image.astype("float32").map_overlap(by_one, depth=depth, boundary="reflect")

    smooth.depth = 2

    def brightest_of_channels(image):
        largest = partial(maximum_filter, size=(1, 1, 3, 1, 5), mode="constant")
        image = image.map_overlap(largest, depth=(0, 0, 1, 0, 2), boundary=0)
        return image.max(axis=0, keepdims=True)

    brightest_of_channels.depth = [1, 0, 2]

    def bright(image):
        return image > 128

    def at_once(image):
        return image.compute(scheduler="synchronous") * 2.0
"""
# What each function makes of the whole volume (c, t, z, y, x), without Dask and without blocks.
ORACLES = {
    "invert": lambda whole: 255 - whole,
    "smooth": lambda whole: gaussian_filter(
        whole.astype(np.float32), (0, 0, 1, 1, 1), truncate=2, mode="reflect"
    ),
    "brightest_of_channels": lambda whole: maximum_filter(
        whole, (1, 1, 3, 1, 5), mode="constant"
    ).max(axis=0, keepdims=True),
    "bright": lambda whole: whole > 128,
    "at_once": lambda whole: whole * 2.0,
}


def transform_of(text, name, **options):
    return Transform.from_source(dedent(text), name, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    numbers = itertools.count()
    return lambda: str(root / f"{next(numbers)}.zarr")


def volume_of(folder, shape, *, seed=0, dtype=np.uint8, **options):
    """Noise (c, t, z, y, x) as an image, and in memory."""
    data = noise(shape, seed=seed, dtype=dtype)
    chunks = [min(n, c) for n, c in zip(shape, (1, 1, 4, 8, 8), strict=True)]
    order = data.transpose(1, 0, 2, 3, 4)
    chunks = [chunks[i] for i in (1, 0, 2, 3, 4)]
    return open_volume(write_image(folder(), order, chunks=chunks, dims="tczyx", **options)), data


def transformed(source, channels, transform):
    return TransformedVolume(
        lambda region: source.read(region, channels),
        source,
        channels,
        transform,
        describe(transform, source, channels),
    )


def refused(text, call):
    with pytest.raises(UsageError) as caught:
        call()
    assert text in str(caught.value)


@st.composite
def cases(draw):
    shape = tuple(
        draw(st.tuples(*(st.integers(a, b) for a, b in [(2, 3), (1, 2), *[(3, 14)] * 3])))
    )
    start = tuple(draw(st.integers(0, n - 1)) for n in shape[1:])
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape[1:], strict=True))
    return shape, Region(start, stop), draw(st.permutations(range(shape[0])))[: shape[0] - 1]


@pytest.mark.parametrize("name", ORACLES)
@given(case=cases(), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_a_region_of_the_transformed_volume_is_that_of_the_whole(folder, name, case, seed):
    shape, region, channels = case
    source, data = volume_of(folder, shape, seed=seed)
    volume = transformed(source, channels, transform_of(SOURCE, name))
    whole = ORACLES[name](data[channels])
    assert (volume.n_channels, *volume.shape) == whole.shape
    assert volume.dtype == whole.dtype
    for chosen in (range(len(whole)), [len(whole) - 1], [0, 0]):
        got = volume.read(region, chosen)
        np.testing.assert_array_equal(got, whole[(list(chosen), *region.slices)])
        assert got.flags.c_contiguous
        assert got.dtype == volume.dtype


def test_outside_the_volume_it_is_the_transformed_volume_that_is_mirrored(folder):
    source, data = volume_of(folder, (1, 1, 5, 12, 13))
    volume = transformed(source, (0,), transform_of(SOURCE, "smooth"))
    pads = [(0, 0), (0, 0), (3, 1), (6, 2), (0, 9)]
    wanted = np.pad(ORACLES["smooth"](data), pads, mode="reflect")
    region = Region.of_shape(source.shape).grow((0, 3, 6, 0), (0, 1, 2, 9))
    np.testing.assert_array_equal(read_mirrored(volume, region, (0,)), wanted)


def test_only_the_region_and_its_context_are_read(folder):
    source, _ = volume_of(folder, (1, 1, 20, 30, 40))
    transform = transform_of(SOURCE, "smooth")
    read = []

    def reader(region):
        read.append(region)
        return source.read(region)

    plan = describe(transform, source, (0,))
    volume = TransformedVolume(reader, source, (0,), transform, plan)
    volume.read(Region((0, 1, 10, 38), (1, 4, 12, 40)))
    assert read == [Region((0, 0, 8, 36), (1, 6, 14, 40))]


def test_the_example_of_the_docstring_runs_and_is_exact(folder):
    lines = room.__doc__.partition("# my.py\n")[2].partition("context along")[0].splitlines()
    text = "from functools import partial\nfrom scipy.ndimage import gaussian_filter\n"
    transform = transform_of(text + dedent("\n".join(lines)), "subtract_background")
    assert transform.depth == (0, 0, 24, 24)
    source, data = volume_of(folder, (1, 1, 2, 30, 130))
    volume = transformed(source, (0,), transform)
    image = data.astype(np.float32)
    whole = image - gaussian_filter(image, (0, 0, 0, 8, 8), truncate=3)
    for region in (Region((0, 0, 5, 60), (1, 2, 20, 70)), Region((0, 1, 0, 0), (1, 2, 30, 130))):
        np.testing.assert_array_equal(volume.read(region), whole[(slice(None), *region.slices)])


@pytest.mark.parametrize("name", ["invert", "smooth", "brightest_of_channels"])
@pytest.mark.parametrize("rule", [NormRule(), NormRule(kind="meanstd")])
def test_statistics_are_those_of_the_transformed_volume(folder, name, rule):
    source, data = volume_of(folder, (2, 1, 9, 20, 30), n_levels=2)
    volume = transformed(source, (0, 1), transform_of(SOURCE, name))
    got = norm_constants(volume, rule, range(volume.n_channels))
    whole = ORACLES[name](data)
    memory = open_volume(
        write_image(folder(), whole.transpose(1, 0, 2, 3, 4), chunks=(1, 1, 4, 8, 8), dims="tczyx")
    )
    assert got == norm_constants(memory, rule, range(len(whole)))
    assert got.level == 0


def test_it_has_the_names_and_places_of_its_source(folder):
    source, _ = volume_of(folder, (3, 1, 5, 9, 9), n_levels=2)
    coarse = source.at(1)
    volume = transformed(coarse, (2, 0), transform_of(SOURCE, "invert"))
    for name in ("url", "level", "shape", "scale", "chunk_shape", "write_unit"):
        assert getattr(volume, name) == getattr(coarse, name)
    assert volume.channel_names == ("2", "0")
    reduced = transformed(coarse, (2, 0), transform_of(SOURCE, "brightest_of_channels"))
    assert reduced.channel_names == ("0",)
    assert (volume.n_levels, volume.at(1)) == (2, volume)
    with pytest.raises(InputError, match=r"level 0 of .* is not transformed, only level 1 is"):
        volume.at(0)


def test_an_empty_region_needs_no_transform_and_one_outside_is_refused(folder):
    source, _ = volume_of(folder, (1, 1, 5, 9, 9))
    volume = transformed(source, (0,), transform_of(SOURCE, "smooth"))
    got = volume.read(Region((0, 2, 3, 3), (1, 2, 5, 5)))
    assert (got.shape, got.dtype) == ((1, 1, 0, 2, 2), np.dtype("float32"))
    outside = Region((0, 0, 0, 0), (1, 6, 9, 9))
    refused("region 0:1,0:6,0:9,0:9 is not inside", lambda: volume.read(outside))
    refused(
        "channels (1,) are not all among the 1 that smooth",
        lambda: volume.read(Region.of_shape(source.shape), (1,)),
    )


def test_a_description_is_plan_data_and_changes_with_any_byte_of_the_file(folder):
    source, _ = volume_of(folder, (2, 1, 5, 9, 9))
    text = dedent(SOURCE)
    plan = describe(Transform.from_source(text, "smooth"), source, (1,))
    assert TransformPlan.model_validate_json(plan.model_dump_json()) == plan
    assert (plan.depth, plan.dtype, plan.n_channels) == ((0, 2, 2, 2), "float32", 1)
    others = [text + "\n", "\n" + text, text + "#", text.replace("255 -", "254 -")]
    hashes = {Transform.from_source(changed, "invert").sha256 for changed in others}
    assert len(hashes | {plan.sha256}) == len(others) + 1
    changed = Transform.from_source(text + "#", "smooth")
    refused(
        "is not what was planned with",
        lambda: TransformedVolume(source.read, source, (1,), changed, plan),
    )


def test_a_file_is_known_by_the_bytes_that_it_has_on_disk(tmp_path):
    text = b"\xef\xbb\xbf# coding: utf-8\r\nunit = '\xc2\xb5m'\r\nf = abs\r\n"
    (tmp_path / "my.py").write_bytes(text)
    transform = load_transform(f"{tmp_path}/my.py:f")
    assert transform.sha256 == hashlib.sha256(text).hexdigest()
    assert (transform.file, transform.depth) == ("my.py", (0, 0, 0, 0))
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_another_process_needs_the_text_only(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Doubled:\n"
        "    factor: int = 2\n"
        "    def __call__(self, image):\n"
        "        return image * self.factor\n"
        "twice = Doubled()\ntwice.depth = 3\n"
    )
    pickled = pickle.dumps(load_transform(f"{path}:twice"))
    path.unlink()
    code = (
        "import pickle, sys, numpy as np; transform = pickle.load(sys.stdin.buffer)\n"
        "print(transform.apply(np.full((1, 1, 1, 1, 2), 21)).ravel(), transform.depth)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, input=pickled, capture_output=True, check=True)
    assert run.stdout.decode().split() == ["[42", "42]", "(0,", "3,", "3,", "3)"]


def test_a_file_is_executed_once_in_a_process_and_not_for_being_described(tmp_path, folder):
    count = tmp_path / "count"
    note = f"with open({str(count)!r}, 'a') as file:\n    file.write('x')\n"
    (tmp_path / "my.py").write_text(note + "def f(image):\n    return image\n")
    source, _ = volume_of(folder, (1, 1, 5, 9, 9))
    pickle.loads(pickle.dumps(load_transform(f"{tmp_path}/my.py:f")))
    plan = describe(load_transform(f"{tmp_path}/my.py:f"), source, (0,))
    TransformPlan.model_validate_json(plan.model_dump_json())
    assert count.read_text() == "x"


def test_a_file_is_executed_as_python_executes_it_by_itself():
    text = "def f(image: int):\n    return image\n"
    assert Transform.from_source(text, "f").function.__annotations__ == {"image": int}


def test_the_graph_is_computed_in_the_thread_that_reads(folder):
    text = """
        import threading
        threads = set()

        def note(block):
            threads.add(threading.get_ident())
            return block

        def f(image):
            return image.rechunk((1, 1, 2, 4, 4)).map_blocks(note)
    """
    source, _ = volume_of(folder, (1, 1, 5, 20, 20))
    transform = transform_of(text, "f")
    transformed(source, (0,), transform).read(Region.of_shape(source.shape))
    assert sys.modules[transform.function.__module__].threads == {threading.get_ident()}


@pytest.mark.parametrize("location", ["my.py", "my.py:", ":f", "my.py:a b", ""])
def test_a_location_names_a_file_and_a_function(location):
    refused("write FILE.py:FUNCTION", lambda: load_transform(location))


def test_a_file_that_cannot_be_used_is_refused_with_the_line(tmp_path):
    path = tmp_path / "my.py"
    load = partial(load_transform, f"{path}:f")
    refused(f"--transform {path} cannot be read: No such file or directory; check the path", load)
    path.write_bytes(b"\xff\xfe")
    refused(f"--transform {path} is no Python file in UTF-8 (invalid start byte at byte 0)", load)
    path.write_text("a = 1\ndef f(image:\n    return image\n")
    refused("--transform my.py raises SyntaxError in line 2 ('(' was never closed)", load)
    path.write_bytes(b"def f(image):\0\n")
    # A ValueError before Python 3.11.4, a SyntaxError since.
    refused("--transform my.py raises ", load)
    refused("Error (source code string cannot contain null bytes): correct the file", load)
    path.write_text("def g():\n    raise KeyError('k')\n\ng()\n")
    refused("--transform my.py raises KeyError in line 2 ('k'): correct the file", load)
    path.write_text("import sys\nsys.exit(0)\n")
    refused("--transform my.py raises SystemExit in line 2 (0)", load)
    path.write_text("import no_such_package_anywhere\n")
    refused("--transform my.py raises ModuleNotFoundError in line 1 (No module named", load)
    path.write_text("#" * (room.MAX_SOURCE_BYTES + 1))
    refused(f"has more than the {room.MAX_SOURCE_BYTES} bytes allowed", load)


def test_a_file_that_failed_can_be_loaded_again_when_it_no_longer_does(tmp_path):
    (tmp_path / "my.py").write_text(f"open({str(tmp_path / 'there')!r}).close()\nf = abs\n")
    refused("FileNotFoundError in line 1", lambda: load_transform(f"{tmp_path}/my.py:f"))
    (tmp_path / "there").touch()
    assert load_transform(f"{tmp_path}/my.py:f").function is abs


def test_a_function_that_is_not_there_is_named_with_the_near_ones():
    refused(
        "my.py has no function 'smoth'; did you mean 'smooth'?",
        lambda: transform_of(SOURCE, "smoth", file="my.py"),
    )
    refused(
        "my.py has no function 'zzz'; it has at_once, bright, brightest_of_channels, invert, "
        "smooth: choose one",
        lambda: transform_of(SOURCE, "zzz", file="my.py"),
    )
    refused("has no function 'f'; it has none: add one", lambda: transform_of("f = 1", "f"))


@pytest.mark.parametrize(
    "depth", ["-1", "(0, -1, 0)", "(1, 2)", "(1, 2, 3, 4)", "1.5", "'1'", "()"]
)
def test_a_depth_that_is_none_is_refused(depth):
    text = f"def f(image):\n    return image\nf.depth = {depth}\n"
    refused(
        f"f.depth of my.py is {depth}, and must be voxels along z, y, x from 0 on: "
        "write f.depth = (0, 25, 25), or one integer for all three",
        lambda: Transform.from_source(text, "f", file="my.py"),
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("image[:, :, ::2]", "it may change the number of channels only"),
        ("image[0]", "it may change the number of channels only"),
        ("image[:0]", "it may change the number of channels only"),
        ("[1, 2]", "f of my.py gives a list, where a Dask array (c, t, z, y, x) is needed"),
        ("None", "f of my.py gives a NoneType, where a Dask array"),
        ("image * 1j", "f of my.py gives values of type complex128, where booleans, integers or"),
        ("image / image.nothing", "f of my.py raises AttributeError in line 2 ("),
        ("image.map_blocks(fail, dtype=int)", "f of my.py raises ArithmeticError in line 4 (no)"),
        ("image - image.mean()", "set f.depth to the context that it needs, and use no statistics"),
        ("image.map_overlap(max3, depth=1)", "more than its depth of 0, 0, 0 voxels (z, y, x)"),
        ("image.cumsum(axis=2)", "more than its depth of 0, 0, 0 voxels"),
        ("image.cumsum(axis=1)", "more than its depth of 0, 0, 0 voxels"),
        ("image if image.shape[2] > 9 else image.astype(float)", "other values, channels or types"),
    ],
)
def test_a_function_that_gives_what_it_may_not_is_refused_before_the_run(folder, body, message):
    text = (
        f"def f(image):\n    return {body}\n"
        "def fail(block):\n    if block.size: raise ArithmeticError('no')\n"
        "from scipy.ndimage import maximum_filter\n"
        "def max3(block):\n    return maximum_filter(block, 3)\n"
    )
    transform = Transform.from_source(text, "f", file="my.py")
    source, _ = volume_of(folder, (1, 3, 12, 20, 20))
    refused(message, lambda: describe(transform, source, (0,)))


def test_a_function_that_gives_another_type_elsewhere_is_refused_with_the_region(folder):
    text = "def f(image):\n    return image.astype('u1' if image.compute().max() > 3 else 'u2')\n"
    data = noise((1, 1, 4, 20, 20))
    data[..., :4] = 0
    source = open_volume(write_image(folder(), data, chunks=(1, 1, 4, 8, 8), dims="tczyx"))
    volume = transformed(source, (0,), Transform.from_source(text, "f"))
    refused(
        "f gives 1 channels of uint16 for 0:1,0:4,0:4,0:4, elsewhere 1 of uint8",
        lambda: volume.read(Region((0, 0, 0, 0), (1, 4, 4, 4))),
    )


def test_tails_of_filters_beyond_the_depth_are_allowed(folder):
    source, _ = volume_of(folder, (1, 1, 20, 40, 40))
    text = dedent(SOURCE).replace("truncate=2", "truncate=4").replace(": 2", ": 4")
    transform = Transform.from_source(
        text.replace("smooth.depth = 2", "smooth.depth = 3"), "smooth"
    )
    assert describe(transform, source, (0,)).depth == (0, 3, 3, 3)
