"""Steps have the lengths that voxels have, whatever the units of their axes."""

import numpy as np
import pytest
from helpers import RESOURCES
from planting import config_for, write_planting_model
from zarr_images import metadata
from zarr_images import write_image as write_version

from bigseg.planner import make_plan


@pytest.mark.parametrize(
    ("dims", "units", "scale", "ratios"),
    [
        (3, ("micrometer", "nanometer", "nanometer"), (1.0, 250.0, 250.0), (4.0, 1.0, 1.0)),
        (3, ("nanometer", "angstrom", "nanometer"), (30.0, 80.0, 8.0), (3.75, 1.0, 1.0)),
        (3, ("nanometer", "nanometer", "nanometer"), (37.0, 10.0, 10.0), (3.7, 1.0, 1.0)),
        (3, (None, "nanometer", "nanometer"), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)),
        (3, (None, None, None), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)),
        (2, (None, "micrometer", "nanometer"), (7.0, 1.0, 500.0), (2.0, 1.0)),
        (2, ("nanometer", None, None), (7.0, 3.0, 1.0), (3.0, 1.0)),
    ],
)
def test_axes_step_by_their_lengths_also_in_different_units(tmp_path, dims, units, scale, ratios):
    attributes = metadata("0.5", "zyx", [scale], unit=None)
    for axis, unit in zip(attributes["ome"]["multiscales"][0]["axes"], units, strict=True):
        if unit:
            axis["unit"] = unit
    data = np.zeros((8, 16, 16), np.uint8)
    image = write_version(str(tmp_path / "image.zarr"), [data], "zyx", attributes=attributes)
    model = write_planting_model(tmp_path / "model.safetensors", dims=dims)
    config = config_for(image, model, tmp_path / "out.zarr", {}, tile=(8,) * dims)
    plan = make_plan(config, RESOURCES)
    if len(set(units)) == 1:
        assert plan.instances.ratios == ratios
    assert plan.instances.ratios == pytest.approx(ratios, rel=1e-9)
