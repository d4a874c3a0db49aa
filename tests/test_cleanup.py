"""Only what a dead run left is removed, and nothing that is whole, alive or someone else's."""

import shutil
from pathlib import Path

import pytest
import zarr
from helpers import RESOURCES, config_of, noise, write_image, write_model
from test_status import abandon

from bigseg import store
from bigseg.cleanup import find_leftovers, remove_leftovers
from bigseg.config import UNetSpec
from bigseg.errors import InputNotFoundError, LockedError, OutputError
from bigseg.layout import list_label
from bigseg.lock import Lock, lock_url
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially
from bigseg.volume import open_volume

SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished result beside its image, and one that was only begun."""
    folder = tmp_path_factory.mktemp("made")
    image = write_image(folder / "image.zarr", noise((8, 20, 20)), chunks=(4, 16, 16))
    model = write_model(folder / "model.safetensors", SPEC)[1]
    options = {"tile": (4, 16, 16), "output": "labels"}
    segment_serially(config_of(image, model, None, **options), NullProgress())
    prepare(config_of(image, model, None, name="begun", **options), RESOURCES)
    return image


@pytest.fixture
def image(made, tmp_path):
    return str(shutil.copytree(made, tmp_path / "image.zarr"))


def clean(url):
    found = find_leftovers(url)
    remove_leftovers(found)
    return found


def files_in(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_finished_result_without_leftovers_has_nothing_to_remove(image):
    before = files_in(image)
    found = find_leftovers(f"{image}/labels/bigseg/")
    assert found.is_nothing
    assert "nothing to remove" in found.as_text()
    assert files_in(image) == before


def test_what_cut_off_writes_left_goes_and_the_finished_result_stays(image):
    url = f"{image}/labels/bigseg"
    before = files_in(image)
    abandon(url)
    partials = [
        Path(url, "0", "c", "0", ".0.abc.partial"),
        Path(url, "ledger", ".zarr.json.def.partial"),
        Path(image, "labels", "..bigseg.lock.123.partial"),
    ]
    for partial in partials:
        partial.write_bytes(b"seven..")
    others = Path(image, "labels", "..other.lock.123.partial")
    others.write_bytes(b"another run's")
    found = find_leftovers(url)
    assert (found.n_partials, found.n_bytes, found.has_lock) == (3, 21, True)
    assert not found.deletes_result
    remove_leftovers(found)
    assert "3 files of writes that were cut off and the lock of a run that ended, 21 bytes" in (
        found.as_text()
    )
    assert files_in(image) == {**before, others: b"another run's"}
    assert open_volume(image).label_names() == ("bigseg",)


def test_an_unfinished_result_is_taken_from_the_list_and_deleted_whole(image):
    url = f"{image}/labels/begun"
    list_label(image, "begun")
    abandon(url)
    found = find_leftovers(url)
    assert found.deletes_result
    assert "which is not finished (predict 0 of 8 blocks" in found.question
    assert found.n_bytes == sum(map(len, files_in(url).values()))
    remove_leftovers(found)
    assert not Path(url).exists()
    assert not Path(lock_url(url)).exists()
    assert open_volume(image).label_names() == ("bigseg",)
    assert "removed the unfinished result and the lock" in found.as_text()


def test_a_result_without_its_ledger_is_unfinished(image):
    url = f"{image}/labels/begun"
    store.remove(f"{url}/ledger")
    assert "holds nothing yet" in find_leftovers(url).question
    clean(url)
    assert not Path(url).exists()


def test_a_creation_that_was_killed_at_its_first_write_is_removed(tmp_path):
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / ".zarr.json.abc.partial").write_bytes(b"{")
    found = clean(str(out))
    assert found.deletes_result
    assert not out.exists()


def test_a_lock_alone_is_removed(tmp_path):
    out = str(tmp_path / "out.zarr")
    abandon(out)
    found = clean(out)
    assert found.has_lock
    assert found.status is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_removed_while_a_run_lives(image):
    for name in ("begun", "bigseg"):
        url = f"{image}/labels/{name}"
        found = find_leftovers(url)
        with Lock.acquire(url):
            before = files_in(image)
            with pytest.raises(LockedError, match=r"process \d+.*then clean"):
                find_leftovers(url)
            with pytest.raises(LockedError):
                remove_leftovers(found)
            assert files_in(image) == before


def test_a_result_that_was_finished_in_the_meantime_stays(image):
    url = f"{image}/labels/bigseg"
    ledger = zarr.open_group(f"{url}/ledger", mode="r+")
    ledger.attrs["finished"] = False
    found = find_leftovers(url)
    assert found.deletes_result
    ledger.attrs["finished"] = True
    remove_leftovers(found)
    assert Path(url, "0").exists()


def test_what_bigseg_did_not_make_is_never_removed(image, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    zarr.create_group(str(tmp_path / "group.zarr"), attributes={"a": 1})
    before = files_in(tmp_path)
    for foreign in ("folder", "empty", "file", "group.zarr", "image.zarr"):
        with pytest.raises(OutputError, match="nothing is removed"):
            find_leftovers(str(tmp_path / foreign))
    with pytest.raises(InputNotFoundError, match="no such result"):
        find_leftovers(str(tmp_path / "none.zarr"))
    assert files_in(tmp_path) == before
    assert (tmp_path / "empty").is_dir()


def test_a_link_is_not_followed(image, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(f"{image}/labels/begun")
    before = files_in(image)
    with pytest.raises(OutputError):
        clean(str(link))
    assert files_in(image) == before
