"""Stores that other programs wrote, and real images, opened, described and converted."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs

from bigseg.blocks import Region
from bigseg.convert import convert
from bigseg.errors import InputError, NotOmeZarrError
from bigseg.info import as_text, describe
from bigseg.volume import (
    OutputSpec,
    create_pyramid,
    list_label,
    nearest_level,
    open_volume,
    unlist_label,
)

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
STORES = DATA / "ome_zarr"
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not STORES.is_dir(), reason=f"the real data are not at {DATA}"),
]


def spec() -> OutputSpec:
    return OutputSpec(np.dtype("uint32"), (1, 8, 64, 64), None, (), {"version": "0"})


def test_an_idr_image_that_lists_one_level_opens_with_its_labels() -> None:
    volume = open_volume(str(STORES / "6001240_labels_v0.5.zarr"))
    assert (volume.n_levels, volume.n_channels, volume.shape) == (1, 2, (1, 236, 68, 67))
    assert volume.channel_names == ("LaminB1", "Dapi")
    assert volume.write_unit == (1, 10, 512, 512)
    data = volume.read(Region((0, 100, 10, 10), (1, 110, 60, 60)), (0, 1))
    assert data.max() > data.min() > 0
    label = volume.label("0")
    # The labels have four levels; the one of the image's extent is meant.
    assert (label.level, label.n_levels, label.shape) == (2, 4, volume.shape)
    nuclei = label.read(Region.of_shape(label.shape))
    assert nuclei.max() > 20
    # Nuclei are bright in the DNA channel.
    whole = volume.read(Region.of_shape(volume.shape), (1,))
    assert whole[nuclei > 0].mean() > 2 * whole[nuclei == 0].mean()


def test_a_film_of_version_0_4_opens_at_every_level_and_time() -> None:
    volume = open_volume(str(STORES / "tubhiswt4D_sub.zarr"))
    assert volume.shape == (3, 2, 512, 512)
    assert volume.multiscale.version == "0.4"
    # The file says "seconds", which the specification does not know.
    assert volume.multiscale.axes[0].unit == "second"
    for level in range(3):
        at = volume.at(level)
        frame = at.read(Region((2, 0, 0, 0), (3, *at.shape[1:])))
        assert frame.shape == (1, 1, 2, 512 >> level, 512 >> level)
        assert at.label("embryo").shape == at.shape
    assert nearest_level(volume, (1.0, 2.0, 2.0)) == 1


def test_a_plate_is_refused_with_its_image_and_the_image_opens() -> None:
    plate = str(STORES / "plate_ones.zarr")
    with pytest.raises(
        NotOmeZarrError, match=r"is a plate of 1 wells: give .*plate_ones.zarr/B/03/0"
    ):
        open_volume(plate)
    assert describe(plate)["images"] == ["B/03/0"]
    # Its paths are integers.
    assert open_volume(f"{plate}/B/03/0").shape == (1, 3, 1080, 1280)


def test_a_flat_image_with_nested_levels_opens() -> None:
    volume = open_volume(str(STORES / "simple_0.5"), level=1)
    assert volume.spatial_axes == "yx"
    assert volume.shape == (1, 1, 5, 5)
    assert volume.voxel_um == (0.008, 0.06)
    assert volume.multiscale.levels[1].translation == (2.0, 15.0)
    with pytest.raises(NotOmeZarrError, match=r"is level 0 of an image: give .*simple_0.5 with"):
        open_volume(str(STORES / "simple_0.5/scale0/image"))


def test_every_store_can_be_described() -> None:
    for path in STORES.iterdir():
        assert str(path) in as_text(describe(str(path)))


# yaozarrs looks at the image beside, whose time unit is "seconds".
@pytest.mark.filterwarnings("ignore:(?s).*Time axis unit 'seconds'")
@pytest.mark.parametrize("name", ["6001240_labels_v0.5.zarr", "tubhiswt4D_sub.zarr", "simple_0.5"])
def test_labels_written_beside_foreign_images_are_valid(tmp_path: Path, name: str) -> None:
    image = str(shutil.copytree(STORES / name, tmp_path / name))
    volume = open_volume(image)
    before = volume.label_names()
    label = create_pyramid(volume, f"{image}/labels/bigseg", spec(), name="bigseg")
    for level in range(label.n_levels):
        at = label.at(level)
        at.write(Region.of_shape(at.shape), np.ones((1, *at.shape), "uint32"))
    assert open_volume(image).label_names() == before
    list_label(image, "bigseg")
    assert open_volume(image).label_names() == (*before, "bigseg")
    yaozarrs.validate_zarr_store(label.url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic, on ome-zarr-models' shadowed fields
        import ome_zarr_models.v04
        import ome_zarr_models.v05
        import zarr

        models = ome_zarr_models.v04 if volume.multiscale.version == "0.4" else ome_zarr_models.v05
        models.ImageLabel.from_zarr(zarr.open_group(label.url, mode="r"))
    unlist_label(image, "bigseg")
    assert open_volume(image).label_names() == before


def test_an_em_stack_and_its_cells_convert_exactly(tmp_path: Path) -> None:
    out = str(tmp_path / "em.ome.zarr")
    volume = convert([str(DATA / "isbi2012/images.tif")], out, voxel_size=(50, 4, 4), unit="nm")
    cells = convert([str(DATA / "isbi2012/cells.tif")], out, labels="cells")
    for converted, name in ((volume, "images"), (cells, "cells")):
        np.testing.assert_array_equal(
            converted.read(Region.of_shape(converted.shape))[0, 0],
            tifffile.imread(DATA / f"isbi2012/{name}.tif"),
        )
    assert [volume.at(i).shape[1:] for i in range(volume.n_levels)] == [
        (24, 512, 512),
        (24, 256, 256),
        (24, 128, 128),
    ]
    yaozarrs.validate_zarr_store(out)


def test_an_hdf5_file_brings_its_voxel_size(tmp_path: Path) -> None:
    volume = convert(
        [f"{DATA}/nuclei3d/gonuclear_1135.h5:/raw"], str(tmp_path / "n.ome.zarr"), version="0.4"
    )
    np.testing.assert_allclose(volume.voxel_um or (), (0.28371837, 0.12678642, 0.12678642))
    assert volume.multiscale.version == "0.4"
    label = convert([f"{DATA}/nuclei3d/gonuclear_1135.h5:/label"], volume.url, labels="nuclei")
    assert label.dtype == np.dtype("uint8")
    assert label.read(Region.of_shape(label.shape)).max() == 54
    yaozarrs.validate_zarr_store(volume.url)


def test_an_image_given_as_tiff_names_the_command_that_converts_it() -> None:
    with pytest.raises(NotOmeZarrError, match=r"`bigseg convert .*image.tif OUT.ome.zarr`"):
        open_volume(str(DATA / "fib25/image.tif"))
    with pytest.raises(InputError, match="is a file, not an OME-Zarr image"):
        convert([str(DATA / "fib25/bodies.tif")], str(DATA / "fib25/image.tif"), labels="x")
