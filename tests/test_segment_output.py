"""What a segmentation leaves: labels or probabilities, in the image's version, for every axis."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import RESOURCES, config_of, noise, write_image, write_model
from zarr_images import pyramid_of, validate
from zarr_images import write_image as write_version

from bigseg.config import NormRule, UNetSpec
from bigseg.errors import InputError
from bigseg.ledger import checksum_of
from bigseg.plan import PREDICT
from bigseg.predictor import Encoding
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially
from bigseg.volume import open_volume

SPEC = UNetSpec.build(3, out_channels=3, depth=1, width=2)
SHAPE = (8, 36, 20)
OPTIONS = {"tile": (4, 16, 16), "output": "labels"}


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16), n_levels=3)


@pytest.fixture
def model(tmp_path):
    # A seed with which all three classes come out.
    return write_model(tmp_path / "model.safetensors", SPEC, seed=4)[1]


def run(config):
    return segment_serially(config, NullProgress())


def levels_of(url):
    volume = open_volume(url)
    return [volume.at(i).array[:] for i in range(volume.n_levels)]


@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(1, "uint8"), (2, "uint8"), (5, "uint8"), (300, "uint16")]
)
def test_labels_are_the_most_probable_class_and_the_first_of_equals(n_classes, dtype):
    # Few different values, so that ties are frequent.
    data = np.random.default_rng(3).integers(0, 4, (n_classes, 1, 3, 5, 7)).astype(np.float32)
    found = Encoding("labels", np.dtype(dtype))(data)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, data.argmax(axis=0, keepdims=True))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "tczyx"])
def test_labels_beside_an_image_have_its_version_and_pass_foreign_validators(
    tmp_path, version, axes
):
    sizes = {"t": 2, "c": 2, "z": 4, "y": 24, "x": 20}
    data = noise([sizes[a] for a in axes])
    factors = [2 if a in "yx" else 1 for a in axes]
    levels = pyramid_of(data, 3, factors)
    image = write_version(str(tmp_path / "image.zarr"), levels, axes, version=version)
    spec = UNetSpec.build(2, out_channels=3, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    assert run(config_of(image, model, None, output="labels")).is_complete
    label = open_volume(image).label("bigseg")
    assert label.multiscale.version == version
    assert label.multiscale.axis_names == tuple(a for a in axes if a != "c")
    assert [label.at(i).shape for i in range(3)] == [
        open_volume(image).at(i).shape for i in range(3)
    ]
    name = "zarr.json" if version == "0.5" else ".zattrs"
    text = json.loads((Path(label.url) / name).read_text())
    assert "bigseg" in (text["attributes"] if version == "0.5" else text)
    validate(image)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_probabilities_are_an_image_with_a_channel_for_each_class(tmp_path, version, model):
    levels = pyramid_of(noise((4, 24, 20)), 2, (1, 2, 2))
    image = write_version(str(tmp_path / "image.zarr"), levels, "zyx", version=version)
    out = str(tmp_path / "p.zarr")
    assert run(config_of(image, model, out, prob_dtype="float32")).is_complete
    found = open_volume(out)
    assert found.multiscale.axis_names == ("c", "z", "y", "x")
    assert found.channel_names == ("class 0", "class 1", "class 2")
    np.testing.assert_allclose(found.array[:].sum(0), 1, atol=1e-5)
    # The coarser level is the mean of the finer one.
    fine, coarse = levels_of(out)
    mean = fine.reshape(3, 4, 12, 2, 10, 2).mean((3, 5))
    np.testing.assert_allclose(coarse, mean, atol=1e-6)
    validate(out)


def test_one_time_point_is_that_of_all_and_the_others_stay_background(tmp_path):
    data = noise((3, 2, 24, 20), seed=8)
    image = write_image(tmp_path / "i.zarr", data, chunks=(1, 1, 16, 16), dims="tzyx", n_levels=2)
    spec = UNetSpec.build(2, out_channels=2, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    run(config_of(image, model, tmp_path / "all.zarr"))
    run(config_of(image, model, tmp_path / "one.zarr", time=1))
    for whole, part in zip(
        levels_of(str(tmp_path / "all.zarr")), levels_of(str(tmp_path / "one.zarr")), strict=True
    ):
        assert whole.shape[:2] == (3, 2)
        np.testing.assert_array_equal(part[1], whole[1])
        assert whole.any(axis=(1, 2, 3, 4)).all()
        assert not part[[0, 2]].any()


def test_each_time_point_is_segmented_by_itself(tmp_path):
    data = noise((2, 3, 20, 24), seed=9)
    spec = UNetSpec.build(3, out_channels=2, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    movie = write_image(tmp_path / "m.zarr", data, chunks=(1, 2, 16, 16), dims="tzyx")
    run(config_of(movie, model, tmp_path / "movie.zarr", prob_dtype="float32"))
    both = levels_of(str(tmp_path / "movie.zarr"))[0]
    for t in range(2):
        frame = write_image(tmp_path / f"{t}.zarr", data[t], chunks=(2, 16, 16))
        run(config_of(frame, model, tmp_path / f"f{t}.zarr", prob_dtype="float32"))
        np.testing.assert_array_equal(both[t], levels_of(str(tmp_path / f"f{t}.zarr"))[0])


def test_a_network_of_several_channels_reads_them_in_its_order(tmp_path):
    data = noise((3, 4, 20, 24), seed=10)
    spec = UNetSpec.build(3, out_channels=2, depth=1, width=2, in_channels=2)
    _, model = write_model(tmp_path / "m.safetensors", spec, channels=(2, 0))
    image = write_image(tmp_path / "i.zarr", data, chunks=(1, 4, 16, 16), dims="czyx")
    reordered = write_image(tmp_path / "r.zarr", data[[2, 0]], chunks=(2, 4, 16, 16), dims="czyx")
    results = {}
    for name, source, channels in [
        ("card", image, None),
        ("told", reordered, (0, 1)),
        ("swapped", image, (0, 2)),
    ]:
        out = tmp_path / f"{name}.zarr"
        run(config_of(source, model, out, channels=channels, prob_dtype="float32"))
        results[name] = levels_of(str(out))[0]
    np.testing.assert_array_equal(results["card"], results["told"])
    assert not np.array_equal(results["card"], results["swapped"])


def test_a_coarser_level_is_segmented_as_an_image_of_its_own(image, model, tmp_path):
    out = tmp_path / "o.zarr"
    assert run(config_of(image, model, out, level=1, **OPTIONS)).is_complete
    found = open_volume(str(out))
    assert found.n_levels == 2
    source = open_volume(image)
    for level in range(2):
        assert found.at(level).shape == source.at(level + 1).shape
        assert found.at(level).voxel_um == source.at(level + 1).voxel_um
    alone = write_image(tmp_path / "a.zarr", source.at(1).array[:], chunks=(4, 16, 16))
    run(config_of(alone, model, tmp_path / "b.zarr", **OPTIONS))
    np.testing.assert_array_equal(levels_of(str(out))[0], levels_of(str(tmp_path / "b.zarr"))[0])


def test_the_pyramid_of_a_region_is_the_same_as_of_the_whole_where_it_is_inside(image, model):
    run(config_of(image, model, None, **OPTIONS, name="whole"))
    run(config_of(image, model, None, **OPTIONS, name="part", region="0:8,8:32,4:16"))
    whole, part = (levels_of(f"{image}/labels/{name}") for name in ("whole", "part"))
    for level, (a, b) in enumerate(zip(whole, part, strict=True)):
        f = 2**level
        inside = (slice(None), slice(8 // f, 32 // f), slice(4 // f, 16 // f))
        np.testing.assert_array_equal(b[inside], a[inside])
        outside = np.ones(b.shape, bool)
        outside[inside] = False
        assert not b[outside].any()


def test_an_image_without_contrast_is_refused_before_anything_is_written(tmp_path):
    image = write_image(tmp_path / "i.zarr", np.full((4, 8, 8), 7, np.uint8), chunks=(4, 8, 8))
    _, model = write_model(tmp_path / "m.safetensors", SPEC, norm=NormRule())
    with pytest.raises(InputError, match="has the same value"):
        run(config_of(image, model, None, output="labels"))
    assert not (tmp_path / "i.zarr" / "labels").exists()


def test_every_mark_is_the_checksum_of_what_lies_on_disk(image, model):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    plan, ledger = prepare(config, RESOURCES)
    output = open_volume(plan.output.url)
    for block in itertools.islice(plan.grid, 0, None, 5):
        stored = output.read(block.core)
        assert ledger.checksum(PREDICT, block.index) == checksum_of(
            np.ascontiguousarray(stored).data
        )
    assert ledger.record["blocks"] == 14
