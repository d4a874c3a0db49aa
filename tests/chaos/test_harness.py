"""The checks of this suite fail where they should, and its faults reach the workers of Ray."""

import json

import pytest
import ray
import zarr

from chaos.scene import NAME, here


def flip(scene):
    path = scene.out / "0" / "c" / "0" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def leave_something(scene):
    (scene.out / ".0.partial").touch()


def lose_a_mark(scene):
    zarr.open_array(str(scene.out / "ledger" / "predict"), mode="r+")[3] = 0


def leave_the_lock(scene):
    (scene.out.parent / f".{NAME}.lock").write_text("{}")


def lose_a_level(scene):
    (scene.out / "1" / "zarr.json").unlink()


@pytest.mark.parametrize(
    "spoil", [flip, leave_something, lose_a_mark, leave_the_lock, lose_a_level]
)
def test_whatever_differs_from_an_undisturbed_run_is_seen(spoil, scene):
    ended, _ = here(scene.serial())
    assert ended.code == 0, ended.said
    scene.check()
    spoil(scene)
    with pytest.raises(AssertionError):
        scene.check()


def test_a_label_that_is_listed_too_early_is_seen(scene):
    ended, _ = here(scene.serial())
    assert ended.code == 0, ended.said
    scene.check_unlisted()
    lose_a_mark(scene)
    with pytest.raises(AssertionError):
        scene.check_unlisted()


def test_a_block_that_is_computed_again_is_seen(scene, monkeypatch):
    ended, ran = here(scene.serial())
    assert len(ran) == len(scene.done())
    ended, ran = here(scene.serial("--overwrite"))
    assert ended.code == 0, ended.said
    assert set(ran) == scene.done()
    document = json.loads((scene.image / "labels" / "zarr.json").read_text())
    assert document["attributes"]["ome"]["labels"] == [NAME]
    done = scene.done()
    monkeypatch.setattr(scene, "done", lambda: done)
    monkeypatch.setattr(scene, "check_unlisted", lambda: None)
    lose_a_mark(scene)
    with pytest.raises(AssertionError, match="computed again"):
        scene.go_on(scene.serial())


def test_faults_reach_the_workers_of_ray(one_ray):
    has_injector = ray.remote(lambda: "injector" in __import__("sys").modules)
    assert ray.get(has_injector.remote())
