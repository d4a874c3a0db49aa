"""Chunks that are damaged: of the input, while the run reads it; of the output, behind its back."""

import json
import shutil

import numpy as np
import pytest
import zarr

from chaos.scene import N_BLOCKS, here

# In the middle of the input, also of the plane that the picture at the end shows.
CHUNK = "0/c/2/1/1"


@pytest.fixture
def spoilt(scene):
    """The image with half a chunk, and a function that restores it."""
    path = scene.image / CHUNK
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return lambda: path.write_bytes(whole)


def test_a_damaged_chunk_of_the_input_sets_aside_what_needs_it_until_it_is_restored(
    scene, spoilt, one_ray
):
    words = scene.on_ray()
    ended, _ = here(words)
    assert ended.code == 4, ended.said
    assert CHUNK in ended.said
    assert "blocks were set aside" in ended.said
    assert not scene.is_listed()
    done = scene.done()
    assert 0 < len(done) < N_BLOCKS
    assert all(block.startswith("predict ") for block in done), "no level is built on holes"
    spoilt()
    scene.go_on(words)
    scene.check()


def test_a_damaged_chunk_of_the_input_is_filled_where_that_is_asked_for(scene, spoilt):
    ended, _ = here(scene.serial("--on-bad-chunk", "fill"))
    assert ended.code == 0, ended.said
    assert CHUNK in ended.said
    assert scene.is_listed()
    record = json.loads((scene.out / "ledger" / "zarr.json").read_text())["attributes"]["record"]
    assert len(record["filled_chunks"]) == 1
    assert CHUNK in record["filled_chunks"][0]
    filled = zarr.open_array(str(scene.out / "0"), mode="r")[:]
    spoilt()
    # The fill value itself, stored: what is not stored at all is empty space.
    with zarr.config.set({"array.write_empty_chunks": True}):
        image = zarr.open_array(str(scene.image / "0"), mode="r+")
        image[8:12, 16:32, 16:32] = image.fill_value
    assert (scene.image / CHUNK).exists()
    shutil.rmtree(scene.out.parent)
    ended, _ = here(scene.serial())
    assert ended.code == 0, ended.said
    np.testing.assert_array_equal(zarr.open_array(str(scene.out / "0"), mode="r")[:], filled)


def torn(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def gone(path):
    path.unlink()


@pytest.mark.parametrize("damage", [torn, flipped, gone])
@pytest.mark.parametrize("chunk", ["0/c/2/1/0", "1/c/0/0/0"])
def test_verify_finds_a_damaged_chunk_of_the_output_and_the_same_command_mends_it(
    damage, chunk, scene
):
    ended, _ = here(scene.serial())
    assert ended.code == 0, ended.said
    damage(scene.out / chunk)
    ended, _ = here(["verify", str(scene.out)])
    assert ended.code == 4, ended.said
    assert not scene.is_listed(), "what is damaged is no longer offered"
    ended, ran = here(scene.serial())
    assert ended.code == 0, ended.said
    n_fine = sum(block.startswith("predict ") for block in ran)
    assert n_fine == (1 if chunk.startswith("0/") else 0)
    scene.check()
    ended, _ = here(["verify", str(scene.out)])
    assert ended.code == 0, ended.said
