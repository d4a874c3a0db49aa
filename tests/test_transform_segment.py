"""A transform in the workers gives what segmenting the transformed volume gives."""

import numpy as np
import pytest
from helpers import config_of, noise, write_image, write_model

from bigseg.cluster import connect
from bigseg.config import NormRule, UNetSpec
from bigseg.errors import InputError, UsageError
from bigseg.on_ray import segment_on_ray
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.volume import open_volume

SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)
SHAPE = (11, 40, 33)
CODE = """
from functools import partial
from scipy.ndimage import uniform_filter

def subtract(image):
    image = image.astype("float32")
    mean = partial(uniform_filter, size=(1, 1, 3, 7, 7), mode="reflect")
    return image - image.map_overlap(mean, depth=(0, 0, 1, 3, 3), boundary="reflect")

subtract.depth = (1, 3, 3)

def double(image):
    return image.astype("uint16") * 2
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(CODE)
    return path


def transformed(data):
    """The same by numpy and scipy on the whole volume."""
    from scipy.ndimage import uniform_filter

    data = data.astype(np.float32)
    return data - uniform_filter(data, size=(3, 7, 7), mode="reflect")


@pytest.mark.parametrize("rule", [NormRule(kind="fixed", offset=0, scale=40), NormRule()])
@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_it_equals_transforming_the_whole_volume_first(tmp_path, code, executor, rule):
    data = noise(SHAPE)
    model = write_model(tmp_path / "model.safetensors", SPEC, norm=rule)[1]
    options = {"prob_dtype": "float32", "tile": (4, 16, 16)}
    image = write_image(tmp_path / "image.zarr", data, chunks=(4, 16, 16))
    whole = write_image(tmp_path / "whole.zarr", transformed(data), chunks=(4, 16, 16))
    truth = segment_serially(
        config_of(whole, model, tmp_path / "truth.zarr", **options), NullProgress()
    )
    config = config_of(
        image,
        model,
        tmp_path / "out.zarr",
        transform=f"{code}:subtract",
        executor=executor,
        workers=2,
        **options,
    )
    if executor == "serial":
        result = segment_serially(config, NullProgress())
    else:
        with connect("local", n_cpus=2):
            result = segment_on_ray(config, NullProgress())
    assert result.plan.constants.offset == pytest.approx(truth.plan.constants.offset, abs=1e-4)
    found, expected = (open_volume(r.plan.output.url).array[:] for r in (result, truth))
    # The constants of floats are sums, whose order differs by the blocks of the statistics.
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if rule.kind == "fixed":
        np.testing.assert_array_equal(found, expected)


def test_its_file_is_part_of_the_fingerprint(tmp_path, code):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16))
    model = write_model(tmp_path / "model.safetensors", SPEC)[1]
    config = config_of(image, model, tmp_path / "out.zarr", transform=f"{code}:double")
    result = segment_serially(config, NullProgress())
    assert result.plan.transform.dtype == "uint16"
    assert segment_serially(config, NullProgress()).n_done_before == len(result.plan.grid)
    code.write_text(CODE + "\n# another thought\n")
    with pytest.raises(UsageError, match=r"transform\.sha256"):
        segment_serially(config, NullProgress())
    with pytest.raises(UsageError, match="transform"):
        segment_serially(config.model_copy(update={"transform": None}), NullProgress())


def test_it_must_give_the_channels_that_the_model_reads(tmp_path, code):
    data = noise((2, *SHAPE))
    image = write_image(tmp_path / "image.zarr", data, chunks=(1, 4, 16, 16), dims="czyx")
    code.write_text("def mean(image):\n    return image.mean(axis=0, keepdims=True)\n")
    model = write_model(tmp_path / "model.safetensors", SPEC)[1]
    out = tmp_path / "out.zarr"
    config = config_of(
        image, model, out, transform=f"{code}:mean", channels=(0, 1), tile=(4, 16, 16)
    )
    assert segment_serially(config, NullProgress()).is_complete
    two = UNetSpec.build(3, out_channels=2, depth=1, width=2, in_channels=2)
    other = write_model(tmp_path / "two.safetensors", two)[1]
    with pytest.raises(InputError, match="reads 2 channels, the transform mean gives 1"):
        segment_serially(
            config.model_copy(update={"model": other, "out": str(tmp_path / "p.zarr")}),
            NullProgress(),
        )


def test_the_dask_view_of_the_output_has_the_blocks_of_the_grid(tmp_path):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16))
    model = write_model(tmp_path / "model.safetensors", SPEC)[1]
    config = config_of(
        image, model, tmp_path / "out.zarr", output="labels", tile=(4, 8, 8), block=(8, 16, 24)
    )
    plan = segment_serially(config, NullProgress()).plan
    view = open_volume(plan.output.url).dask()
    assert view.chunks[1:] == plan.grid.chunks
    assert view.numblocks[1:] == plan.grid.shape
    assert plan.core != plan.output.write_unit
