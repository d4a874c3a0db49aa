"""Chunks that cannot be decoded: named with their keys; set aside, or filled and listed."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import NORM, config_of, noise, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, WrapperStore
from zarr_images import metadata

from bigseg import cli
from bigseg.blocks import Region
from bigseg.cache import ChunkCache
from bigseg.config import NormRule, UNetSpec
from bigseg.damage import read_box
from bigseg.errors import BadChunkError
from bigseg.filling import SourceVolume
from bigseg.ledger import Ledger
from bigseg.plan import PREDICT, Plan
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.volume import open_volume

SHAPE = (8, 32, 48)
CHUNK = (4, 16, 16)
FILL = 7

CODECS = {
    "zstd": {"compressors": ZstdCodec(level=1)},
    "zstd with a checksum": {"compressors": ZstdCodec(level=1, checksum=True)},
    "blosc": {"compressors": BloscCodec(cname="lz4")},
    "gzip": {"compressors": GzipCodec()},
    "none": {"compressors": None},
    "crc32c": {"compressors": Crc32cCodec()},
    "zstd under crc32c": {"compressors": (ZstdCodec(level=1), Crc32cCodec())},
    "shards": {
        "compressors": ZstdCodec(level=1, checksum=True),
        "shards": (8, 16, 32),
    },
}
CHECKED = {"zstd with a checksum", "gzip", "crc32c", "zstd under crc32c", "shards"}


def cut_in_half(data):
    return data[: len(data) // 2]


def made_empty(data):
    del data
    return b""


def made_noise(data):
    return np.random.default_rng(9).bytes(len(data))


def one_bit_flipped(data):
    """In the first chunk of a shard, else in the middle."""
    place = 40
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES = [cut_in_half, made_empty, made_noise, one_bit_flipped]
CASES = [
    (codec, damage)
    for codec, damage in itertools.product(CODECS, DAMAGES)
    # Nothing in these bytes says that they are others than were written.
    if not (damage is one_bit_flipped and codec not in CHECKED)
    and (codec, damage) != ("none", made_noise)
]


def write(path, data, *, axes="zyx", chunks=CHUNK, **options):
    """An image of one level with fill value 7."""
    group = zarr.create_group(path, zarr_format=3)
    group.attrs.update(metadata("0.5", axes, [(1.0,) * len(axes)]))
    settings = {"fill_value": FILL, "dimension_names": list(axes), **options}
    # A chunk of fill values is stored too: a missing one would be background.
    config = {"write_empty_chunks": True}
    group.create_array("0", data=data, chunks=chunks, config=config, **settings)
    return str(path)


def damage_object(url, key, damage):
    path = Path(url, "0", key)
    path.write_bytes(damage(path.read_bytes()))


def region(*sides):
    """A region of one time point from (start, stop) along z, y, x."""
    return Region((0, *(a for a, _ in sides)), (1, *(b for _, b in sides)))


WHOLE = Region.of_shape((1, *SHAPE))


def expected_damage(codec, damage):
    """The key in the message, and the box (z, y, x) that cannot be read."""
    if codec != "shards":
        return "0/c/1/0/2", np.s_[4:8, 0:16, 32:48]
    if damage is one_bit_flipped:
        return "0/c/0/1/0[0,0,0]", np.s_[0:4, 16:32, 0:16]
    return "0/c/0/1/0[0,0,0]", np.s_[0:8, 16:32, 0:32]


@pytest.mark.parametrize(("codec", "damage"), CASES)
def test_a_damaged_chunk_is_named_and_filled_whatever_the_codec(tmp_path, codec, damage):
    data = noise(SHAPE, dtype=np.uint16)
    url = write(tmp_path / "image.zarr", data, **CODECS[codec])
    name, box = expected_damage(codec, damage)
    damage_object(url, name.removeprefix("0/").partition("[")[0], damage)
    volume = open_volume(url)

    with pytest.raises(BadChunkError) as caught:
        volume.read(WHOLE)
    head, _, rest = str(caught.value).partition(" (")
    assert head == f"chunk {name} of {url} cannot be decoded"
    assert rest.endswith("): restore it from a copy")
    assert len(rest) > len("): restore it from a copy") + 8

    filled = data.copy()
    filled[box] = FILL
    source = SourceVolume.of(volume, "fill")
    np.testing.assert_array_equal(source.read(WHOLE)[0, 0], filled)
    listed = source.filled_in(WHOLE, (0,))
    assert name in listed
    assert len(listed) == (4 if codec == "shards" and damage is not one_bit_flipped else 1)
    elsewhere = region((0, 4), (0, 16), (0, 48))
    np.testing.assert_array_equal(volume.read(elsewhere)[0, 0], data[0:4, 0:16])
    assert source.filled_in(elsewhere, (0,)) == ()


@pytest.mark.parametrize("codec", ["zstd", "blosc", "gzip"])
@pytest.mark.parametrize("damage", [cut_in_half, made_empty, made_noise])
def test_a_damaged_chunk_of_zarr_2_is_named(tmp_path, codec, damage):
    import numcodecs

    compressor = {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc(), "gzip": numcodecs.GZip()}
    group = zarr.create_group(tmp_path / "image.zarr", zarr_format=2)
    group.attrs.update(metadata("0.4", "zyx", [(1.0, 1.0, 1.0)]))
    group.create_array("0", data=noise(SHAPE), chunks=CHUNK, compressors=compressor[codec])
    url = str(tmp_path / "image.zarr")
    damage_object(url, "1.0.2", damage)
    with pytest.raises(BadChunkError, match=r"chunk 0/1\.0\.2 of .* cannot be decoded \(.+\): "):
        open_volume(url).read(WHOLE)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_whatever_is_damaged_and_read_only_voxels_of_damaged_chunks_are_filled(
    tmp_path_factory, data
):
    axes = data.draw(st.sampled_from(["yx", "zyx", "czyx", "tzyx"]))
    sizes = [data.draw(st.integers(1, 9)) for _ in axes]
    chunk = [data.draw(st.integers(1, 5)) for _ in axes]
    times = [data.draw(st.integers(1, 2)) for _ in axes]
    shard = [c * k for c, k in zip(chunk, times, strict=True)]
    is_sharded = data.draw(st.booleans())
    values = np.random.default_rng(0).integers(10, 200, sizes).astype(np.uint8)
    url = write(
        tmp_path_factory.mktemp("any") / "image.zarr",
        values,
        axes=axes,
        chunks=tuple(chunk),
        shards=tuple(shard) if is_sharded else None,
        compressors=ZstdCodec(checksum=True),
    )
    unit = shard if is_sharded else chunk
    places = list(itertools.product(*(range(-(-n // u)) for n, u in zip(sizes, unit, strict=True))))
    broken = data.draw(st.lists(st.sampled_from(places), max_size=3, unique=True))
    is_bad = np.zeros(sizes, bool)
    for place in broken:
        damage_object(url, "/".join(["c", *map(str, place)]), cut_in_half)
        box = tuple(slice(p * u, (p + 1) * u) for p, u in zip(place, unit, strict=True))
        is_bad[box] = True

    volume = open_volume(url)
    source = SourceVolume.of(volume, "fill")
    start = [data.draw(st.integers(0, n - 1)) for n in volume.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, volume.shape, strict=True)]
    part = Region(tuple(start), tuple(stop))
    channels = range(volume.n_channels)

    def canonical(stored):
        missing = [i for i, name in enumerate("ctzyx") if name not in axes]
        moved = stored.transpose([axes.index(n) for n in "ctzyx" if n in axes])
        return np.expand_dims(moved, missing)[(slice(None), *part.slices)]

    wanted = np.where(canonical(is_bad), FILL, canonical(values))
    for reader in (source, ChunkCache(source, channels, budget_bytes=10_000)):
        if isinstance(reader, ChunkCache):
            found = reader.read(part).data
        else:
            found = reader.read(part, channels)
        np.testing.assert_array_equal(found, wanted)

    keys = {key.partition("[")[0] for key in source.filled_in(part, channels)}
    touched = {
        "/".join(["0", "c", *map(str, place)])
        for place in broken
        if canonical(box_of(place, unit, sizes)).any()
    }
    assert keys == touched
    if touched:
        with pytest.raises(BadChunkError) as caught:
            volume.read(part, channels)
        assert any(f"chunk {key}" in str(caught.value) for key in touched)
    else:
        np.testing.assert_array_equal(volume.read(part, channels), wanted)


def box_of(place, unit, sizes):
    inside = np.zeros(sizes, bool)
    inside[tuple(slice(p * u, (p + 1) * u) for p, u in zip(place, unit, strict=True))] = True
    return inside


class Failing(WrapperStore):
    """A store that meets an error when one key is read, `times` times."""

    def __init__(self, store, key, error, times=10**6):
        super().__init__(store)
        self.key, self.error, self.left = key, error, times

    async def get(self, key, prototype, byte_range=None):
        if key.endswith(self.key) and self.left > 0:
            self.left -= 1
            if isinstance(self.error, bytes):
                return prototype.buffer.from_bytes(self.error)
            raise self.error
        return await self._store.get(key, prototype, byte_range)

    async def getsize(self, key):
        return await self._store.getsize(key)


def read_through(url, error, times=10**6):
    """What is read of an array whose chunk c/1/0/2 meets an error, and the bad chunks."""
    store = Failing(LocalStore(url, read_only=True), "c/1/0/2", error, times)
    array = zarr.open_array(store, path="0", mode="r")
    bad = []
    return read_box(array, tuple(slice(0, n) for n in SHAPE), bad.append), bad


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), ConnectionResetError(), OSError(5, "I/O error")],
)
def test_an_error_of_the_store_is_no_damage(tmp_path, error):
    url = write(tmp_path / "image.zarr", noise(SHAPE))
    with pytest.raises(type(error)) as caught:
        read_through(url, error)
    assert caught.value is error


def test_an_error_that_has_gone_when_it_is_looked_into_is_no_damage(tmp_path):
    data = noise(SHAPE)
    url = write(tmp_path / "image.zarr", data)
    found, bad = read_through(url, b"no zstd", times=1)
    np.testing.assert_array_equal(found, data)
    assert bad == []


class Watched(WrapperStore):
    """A store that notes which objects are asked for their size, before they are read through."""

    async def getsize(self, key):
        self.looked_at.append(key)
        return await self._store.getsize(key)


def test_a_damaged_shard_is_read_through_once_whatever_the_number_of_its_chunks(tmp_path):
    url = write(tmp_path / "image.zarr", noise(SHAPE), **CODECS["shards"])
    damage_object(url, "c/0/0/0", cut_in_half)
    store = Watched(LocalStore(url, read_only=True))
    store.looked_at = []
    bad = []
    array = zarr.open_array(store, path="0", mode="r")
    read_box(array, tuple(slice(0, n) for n in SHAPE), bad.append)
    assert [chunk.key for chunk in bad] == [
        f"c/0/0/0[{z},0,{x}]" for z, x in itertools.product(range(2), range(2))
    ]
    assert store.looked_at == ["0/c/0/0/0"]


@pytest.mark.parametrize("error", [ZeroDivisionError(), MemoryError(), KeyError("x"), EOFError()])
def test_whatever_a_decoder_raises_is_damage(tmp_path, error):
    url = write(tmp_path / "image.zarr", noise(SHAPE))
    _, bad = read_through(url, error)
    assert [chunk.key for chunk in bad] == ["c/1/0/2"]
    assert bad[0].reason


def test_a_link_to_itself_in_place_of_a_chunk_is_damage_with_its_reason(tmp_path):
    url = write(tmp_path / "image.zarr", noise(SHAPE))
    chunk = Path(url, "0", "c/1/0/2")
    chunk.unlink()
    chunk.symlink_to(chunk.name)
    with pytest.raises(BadChunkError, match=r"chunk 0/c/1/0/2 .*symbolic links"):
        open_volume(url).read(WHOLE)


# Segmenting.

SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)
TILE = (4, 16, 16)
# The middle of the last row of a damaged chunk, far from some blocks and near to others.
BAD = "c/1/0/2"
BAD_BOX = np.s_[4:8, 0:16, 32:48]
RAW = noise((8, 32, 80))


@pytest.fixture
def image(tmp_path):
    return write(tmp_path / "image.zarr", RAW)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


def run(image, model, out, **options):
    config = config_of(image, model, out, prob_dtype="float32", tile=TILE, **options)
    return segment_serially(config, NullProgress())


def values_of(out):
    return open_volume(str(out)).array[:]


def test_only_blocks_that_need_a_damaged_chunk_are_set_aside(image, model, tmp_path):
    run(image, model, tmp_path / "whole.zarr")
    whole = Path(image, "0", BAD).read_bytes()
    damage_object(image, BAD, cut_in_half)
    out = tmp_path / "out.zarr"
    result = run(image, model, out)
    assert not result.is_complete
    told = [report.error for report in result.failed]
    sentence = (
        f"chunk 0/{BAD} of {image} cannot be decoded (a chunk cannot be read or decompressed: "
    )
    assert all(sentence.partition(" (")[0] in text for text in told)
    assert all(
        text.endswith("as the fill value") and "--on-bad-chunk fill" in text for text in told
    )
    assert {report.kind for report in result.failed} == {"input"}
    touching = {block.index for block in result.plan.grid if needs_bad_chunk(result.plan, block)}
    assert {report.block for report in result.failed} == touching
    assert 0 < len(touching) < len(result.plan.grid)
    found, undisturbed = values_of(out), values_of(tmp_path / "whole.zarr")
    for block in result.plan.grid:
        if block.index not in touching:
            box = (slice(None), *block.core.slices[1:])
            np.testing.assert_array_equal(found[box], undisturbed[box])
    Path(image, "0", BAD).write_bytes(whole)
    again = run(image, model, out)
    assert again.is_complete
    assert again.n_done_before == len(result.plan.grid) - len(touching)
    np.testing.assert_array_equal(values_of(out), undisturbed)


def needs_bad_chunk(plan: Plan, block):
    from bigseg.predict import region_inside, tile_geometry

    grown = region_inside(tile_geometry(SPEC, plan.tile).grown(block.core), plan.source.shape)
    ends = zip(grown.start[1:], grown.stop[1:], BAD_BOX, strict=True)
    return all(a < s.stop and b > s.start for a, b, s in ends)


def test_filled_is_as_if_the_fill_value_were_stored(image, model, tmp_path):
    instead = RAW.copy()
    instead[BAD_BOX] = FILL
    run(write(tmp_path / "instead.zarr", instead), model, tmp_path / "wanted.zarr")
    damage_object(image, BAD, made_noise)
    result = run(image, model, tmp_path / "out.zarr", on_bad_chunk="fill")
    assert result.is_complete
    np.testing.assert_array_equal(
        values_of(tmp_path / "out.zarr"), values_of(tmp_path / "wanted.zarr")
    )
    assert list(result.filled) == [f"0/{BAD}"]
    ledger = Ledger.open(str(tmp_path / "out.zarr" / "ledger"))
    assert ledger is not None
    assert list(ledger.filled) == [f"0/{BAD}"]


def test_a_run_that_set_blocks_aside_goes_on_with_filling(image, model, tmp_path):
    damage_object(image, BAD, made_empty)
    run(image, model, tmp_path / "wanted.zarr", on_bad_chunk="fill")
    out = tmp_path / "out.zarr"
    before = run(image, model, out)
    after = run(image, model, out, on_bad_chunk="fill")
    assert after.is_complete
    assert after.n_done_before == before.n_done > 0
    np.testing.assert_array_equal(values_of(out), values_of(tmp_path / "wanted.zarr"))
    assert before.plan.fingerprint == after.plan.fingerprint


def test_a_plan_without_the_rule_sets_aside(image, model, tmp_path):
    plan = run(image, model, tmp_path / "out.zarr").plan
    stored = plan.model_dump(mode="json")
    del stored["on_bad_chunk"]
    assert Plan.model_validate(stored) == plan
    assert plan.on_bad_chunk == "set-aside"


def test_every_block_that_read_a_filled_chunk_lists_it(image, model, tmp_path):
    """Also those that took it from the cache."""
    from bigseg.stages import Worker

    damage_object(image, BAD, cut_in_half)
    plan = run(image, model, tmp_path / "out.zarr", on_bad_chunk="fill").plan
    assert plan.cache_bytes > 0
    with Worker(plan, 1) as worker:
        reports = list(worker.run(PREDICT, range(len(plan.grid))))
    for block, report in zip(plan.grid, sorted(reports, key=lambda r: r.block), strict=True):
        assert report.filled == ((f"0/{BAD}",) if needs_bad_chunk(plan, block) else ())


def test_statistics_name_a_damaged_chunk_or_count_it_as_filled(image, tmp_path, caplog):
    model = write_model(tmp_path / "model.safetensors", SPEC, norm=NormRule())[1]
    damage_object(image, BAD, cut_in_half)
    with pytest.raises(BadChunkError, match=f"chunk 0/{BAD} of .*--on-bad-chunk fill"):
        run(image, model, tmp_path / "out.zarr")
    instead = RAW.copy()
    instead[BAD_BOX] = FILL
    wanted = run(write(tmp_path / "instead.zarr", instead), model, tmp_path / "wanted.zarr")
    result = run(image, model, tmp_path / "out.zarr", on_bad_chunk="fill")
    assert result.plan.constants == wanted.plan.constants
    assert any("are read as the fill value" in text for text in caplog.messages)


def test_the_input_of_a_transform_is_filled(image, model, tmp_path):
    code = "def inverted(image):\n    return 255 - image\n\n\ninverted.depth = (0, 2, 2)\n"
    (tmp_path / "t.py").write_text(code)
    options = {"transform": f"{tmp_path / 't.py'}:inverted"}
    instead = RAW.copy()
    instead[BAD_BOX] = FILL
    run(write(tmp_path / "instead.zarr", instead), model, tmp_path / "wanted.zarr", **options)
    damage_object(image, BAD, cut_in_half)
    result = run(image, model, tmp_path / "out.zarr", on_bad_chunk="fill", **options)
    assert list(result.filled) == [f"0/{BAD}"]
    np.testing.assert_array_equal(
        values_of(tmp_path / "out.zarr"), values_of(tmp_path / "wanted.zarr")
    )


def test_a_mask_is_never_filled(image, model, tmp_path):
    mask = write(tmp_path / "mask.zarr", np.ones(RAW.shape, np.uint8))
    damage_object(mask, BAD, cut_in_half)
    result = run(image, model, tmp_path / "out.zarr", mask=mask, on_bad_chunk="fill")
    assert result.failed
    assert all(f"chunk 0/{BAD} of {mask} cannot" in report.error for report in result.failed)
    assert all(report.error.endswith("restore it from a copy") for report in result.failed)


def test_a_damaged_chunk_of_the_result_is_named_with_the_way_out(image, model, tmp_path):
    group = zarr.open_group(image, mode="r+")
    group.create_array("1", data=RAW[:, ::2, ::2], chunks=CHUNK, dimension_names=list("zyx"))
    group.attrs.update(metadata("0.5", "zyx", [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0)]))
    out = tmp_path / "out.zarr"
    run(image, model, out)
    ledger = Ledger.open(str(out / "ledger"))
    assert ledger is not None
    ledger.unmark("pyramid-1", range(ledger.n_done("pyramid-1")))
    ledger.flush()
    chunk = next(p for p in sorted((out / "0" / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(cut_in_half(chunk.read_bytes()))
    result = run(image, model, out)
    assert not result.is_complete
    assert all(
        report.error.endswith(f"or let `bigseg verify {out}` find what must be made again")
        for report in result.failed
    )


def test_the_command_ends_with_4_and_names_the_chunk_or_with_0_and_lists_it(image, model, tmp_path):
    damage_object(image, BAD, cut_in_half)
    words = ["segment", image, "--model", model, "--executor", "serial", "--tile", "4,16,16"]
    words += ["--engine", "torch", "--precision", "fp32"]
    aside = CliRunner().invoke(cli.main, words)
    assert aside.exit_code == 4, aside.output
    assert f"chunk 0/{BAD} of {image} cannot be decoded" in aside.stderr
    filled = CliRunner().invoke(cli.main, [*words, "--on-bad-chunk", "fill"])
    assert filled.exit_code == 0, filled.output
    assert f"0/{BAD}" in filled.stderr


def test_the_norm_of_these_models_reads_no_voxel():
    """So that what fails above is the segmentation, not the plan."""
    assert NORM.kind == "fixed"
