import hashlib
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from scipy import ndimage

from bigseg.blocks import Region
from bigseg.errors import OutputError, UsageError
from bigseg.pyramid import mean_downsample, mode_downsample
from bigseg.sample import make_sample
from bigseg.targets import boundary
from bigseg.tissue import Tissue
from bigseg.volume import Volume, open_volume

VOXEL_UM = (1.0, 0.5, 0.5)
SMALL = (24, 140, 100)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    return make_sample(str(tmp_path_factory.mktemp("sample") / "cells.zarr"), shape=SMALL, seed=3)


def whole(volume: Volume) -> np.ndarray:
    return volume.read(Region.of_shape(volume.shape))[0, 0]


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path: Path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_sample(str(tmp_path / name), shape=(12, 70, 60), seed=seed)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a") != bytes_of(tmp_path / "c")


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_region_rendered_by_itself_is_that_part_of_the_whole(data: st.DataObject):
    whole_region = Region.of_shape((20, 50, 60))
    tissue = Tissue(data.draw(st.integers(0, 3)), whole_region.shape, VOXEL_UM)
    intervals = [
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in whole_region.shape
    ]
    region = Region(tuple(a for a, _ in intervals), tuple(b for _, b in intervals))
    light, cells = tissue.render(region)
    all_light, all_cells = tissue.render(whole_region)
    np.testing.assert_array_equal(light, all_light[region.slices])
    np.testing.assert_array_equal(cells, all_cells[region.slices])


def test_cells_are_connected_touch_each_other_and_leave_gaps():
    _, cells = Tissue(0, (40, 160, 160), VOXEL_UM).render(Region.of_shape((40, 160, 160)))
    boxes = [(i, box) for i, box in enumerate(ndimage.find_objects(cells), 1) if box is not None]
    in_parts = sum(ndimage.label(cells[b] == i, np.ones((3, 3, 3)))[1] > 1 for i, b in boxes)
    assert len(boxes) > 200
    assert in_parts <= 0.01 * len(boxes)  # corners of cells that the volume's end cuts off
    left, right = cells[:, :, :-1], cells[:, :, 1:]
    touching = np.unique(left[(left != right) & (left > 0) & (right > 0)])
    assert len(touching) > 0.8 * len(boxes)
    assert 0.1 < (cells == 0).mean() < 0.5


def best_threshold_iou(image: np.ndarray, mask: np.ndarray) -> float:
    """The best over all thresholds, for the voxels above it or those up to it."""
    in_mask = np.cumsum(np.bincount(image[mask], minlength=256))
    below = np.cumsum(np.bincount(image.ravel(), minlength=256))
    n = in_mask[-1]
    low = in_mask / (n + below - in_mask)
    high = (n - in_mask) / (n + (below[-1] - below) - (n - in_mask))
    return float(max(low.max(), high.max()))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_threshold_finds_the_borders(seed: int):
    light, cells = Tissue(seed, (64, 256, 256), VOXEL_UM).render(Region((8, 0, 0), (32, 256, 256)))
    classes = boundary(cells, border_vox=2.0, voxel_size=VOXEL_UM)
    smooth = np.rint(ndimage.gaussian_filter(light.astype(np.float32), (0.4, 0.8, 0.8)))
    for image in (light, smooth.astype(np.uint8)):
        scores = [best_threshold_iou(image, classes == k) for k in range(3)]
        assert scores[2] < 0.45  # a U-Net of width 12 reaches 0.64 in 600 steps
        assert np.mean(scores) < 0.45  # and 0.74


def test_an_eight_bit_image_is_neither_clipped_nor_flat():
    light, _ = Tissue(0, (32, 128, 128), VOXEL_UM).render(Region.of_shape((32, 128, 128)))
    assert np.ptp(np.percentile(light, (1, 99.8))) > 100
    assert np.isin(light, (0, 255)).mean() < 0.02


def test_memory_for_a_core_does_not_depend_on_the_volume():
    tissue = Tissue(0, (512, 1024, 1024), VOXEL_UM)
    tracemalloc.start()
    tissue.render(Region((256, 512, 512), (320, 576, 576)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert tissue.label_dtype == np.uint32
    assert Tissue(0, (64, 256, 256), VOXEL_UM).label_dtype == np.uint16


def test_the_image_and_its_labels_are_what_the_tissue_renders(sample: Volume):
    light, cells = Tissue(3, SMALL, VOXEL_UM).render(Region.of_shape(SMALL))
    np.testing.assert_array_equal(whole(sample), light)
    np.testing.assert_array_equal(whole(sample.label("cells")), cells)
    assert (sample.dtype, sample.label("cells").dtype) == (np.uint8, np.uint16)
    assert sample.voxel_um == VOXEL_UM
    assert sample.provenance == {
        "sample": {"seed": 3, "shape": list(SMALL), "voxel_um": list(VOXEL_UM)}
    }


def test_the_pyramids_are_means_and_majorities_of_level_0(sample: Volume):
    labels = sample.label("cells")
    assert sample.n_levels == labels.n_levels == 2
    assert sample.at(1).voxel_um == (1.0, 1.0, 1.0)
    assert sample.multiscale.levels[1].translation == (0.0, 0.25, 0.25)
    np.testing.assert_array_equal(whole(sample.at(1)), mean_downsample(whole(sample), (1, 2, 2)))
    np.testing.assert_array_equal(whole(labels.at(1)), mode_downsample(whole(labels), (1, 2, 2)))


def test_validators_accept_the_sample(sample: Volume):
    image = Image.from_zarr(zarr.open_group(sample.url, mode="r"))
    assert image.labels is not None
    assert image.labels.ome_attributes.labels == ["cells", "tissue"]
    yaozarrs.validate_zarr_store(sample.url)


def test_a_shape_of_two_numbers_gives_one_section(tmp_path: Path):
    section = make_sample(str(tmp_path / "section.zarr"), shape=(300, 200))
    assert section.spatial_axes == "yx"
    assert (section.shape, section.voxel_um) == ((1, 1, 300, 200), (0.5, 0.5))
    assert [section.at(i).shape[-2:] for i in range(section.n_levels)] == [
        (300, 200),
        (150, 100),
        (75, 50),
    ]
    assert len(np.unique(whole(section.label("cells")))) > 50


def test_a_place_that_is_taken_is_refused_and_overwrite_replaces_only_samples(tmp_path: Path):
    url = str(tmp_path / "a.zarr")
    make_sample(url, shape=(32, 32))
    with pytest.raises(OutputError, match=r"a\.zarr exists: give another name or use --overwrite"):
        make_sample(url, shape=(32, 32), seed=1)
    make_sample(url, shape=(32, 32), seed=1, overwrite=True)
    assert open_volume(url).provenance["sample"]["seed"] == 1

    zarr.create_group(str(tmp_path / "other.zarr"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    for name in ("other.zarr", "folder"):
        with pytest.raises(OutputError, match=rf"{name} exists and is no sample of bigseg's"):
            make_sample(str(tmp_path / name), shape=(32, 32), overwrite=True)
    assert (tmp_path / "folder" / "thesis.txt").exists()


def test_a_sample_that_was_cut_short_lists_no_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(tissue: Tissue, region: Region) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tissue, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        make_sample(str(tmp_path / "a.zarr"), shape=(32, 32))
    assert open_volume(str(tmp_path / "a.zarr")).label_names() == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": (64,)}, "shape (64,) makes no sample: give 3 numbers (z, y, x) or 2 (y, x)"),
        ({"shape": (4, 64, 64)}, "of at least 8 voxels"),
        ({"voxel_um": (1.0, 0.5)}, "voxel size (1.0, 0.5) does not fit shape (64, 256, 256)"),
        ({"voxel_um": (1.0, 0.5, 0.0)}, "give 3 numbers from 0.05 to 5 micrometer"),
        ({"seed": -1}, "seed -1 is not from 0 to 2**32 - 1"),
    ],
)
def test_what_no_sample_can_be_is_refused(tmp_path: Path, options: dict, text: str):
    with pytest.raises(UsageError, match=re.escape(text)):
        make_sample(str(tmp_path / "a.zarr"), **options)
    assert not (tmp_path / "a.zarr").exists()


def test_the_tissue_is_derived_from_all_cells_at_once(sample: Volume):
    cells, tissue = (whole(sample.label(name)) for name in ("cells", "tissue"))
    np.testing.assert_array_equal(tissue, boundary(cells, border_vox=2.0, voxel_size=VOXEL_UM))
