"""The engine that is taken is measurably faster than the default, or the default."""

import logging
from itertools import permutations

import numpy as np
import pytest
from helpers import write_model
from hypothesis import given
from hypothesis import strategies as st

from bigseg import probe as room
from bigseg.config import UNetSpec
from bigseg.engine import EngineSpec, build_engine, resolve_engine
from bigseg.errors import ResourceError
from bigseg.probe import WORTH, Timing, choose, probe, probe_key, remember, remembered
from bigseg.reuse import save_entry

SPEC = UNetSpec.build(2, out_channels=2, depth=1, width=4)
SHAPE = (1, 1, 32, 36)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGSEG_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def net(tmp_path):
    return write_model(tmp_path / "m.safetensors", SPEC)[0]


def engine(name):
    return EngineSpec(name=name, device="cpu", precision="fp32", version="1", isa="avx2")


def timing(name, seconds):
    return Timing(engine(name), seconds, 1.0, 1e-6)


def test_each_engine_is_timed_and_held_against_the_truth(net):
    engines = [resolve_engine(name, "fp32", device="cpu") for name in ("openvino", "torch")]
    found = probe(net, engines, input_shape=SHAPE, n_threads=1)
    assert [t.engine for t in found] == engines
    assert all(0 < t.seconds < 10 and 0 < t.build_s < 60 for t in found)
    assert 0 < found[0].largest_difference < 1e-5
    assert found[1].largest_difference == 0


def test_the_difference_is_the_largest_of_any_probability(net, monkeypatch):
    def shifted(*arguments, **options):
        forward = build_engine(*arguments, **options)

        def wrong(batch):
            result = forward(batch)
            result[0, 1, 2, 3] += 0.25
            return result

        return wrong

    monkeypatch.setattr(room, "build_engine", shifted)
    (found,) = probe(
        net, [resolve_engine("torch", "fp32", device="cpu")], input_shape=SHAPE, n_threads=1
    )
    assert found.largest_difference == pytest.approx(0.25, abs=1e-6)


def test_an_engine_that_cannot_be_built_is_left_out_and_said(net, caplog):
    good = resolve_engine("torch", "fp32", device="cpu")
    foreign = good.model_copy(update={"version": "0.1"})
    found = probe(net, [foreign, good], input_shape=SHAPE, n_threads=1)
    assert [t.engine for t in found] == [good]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.message.startswith(f"engine {foreign} is left out: the plan asks for")
    assert probe(net, [foreign], input_shape=SHAPE, n_threads=1) == []


def test_passes_take_turns(net, monkeypatch):
    order = []

    def recording(net, spec, **options):
        def forward(batch):
            order.append(spec.name)
            return np.zeros((1, 2, 16, 20), np.float32)

        return forward

    monkeypatch.setattr(room, "build_engine", recording)
    engines = [engine("openvino"), engine("torch")]
    probe(net, engines, input_shape=SHAPE, n_threads=1, repeats=3)
    assert order == ["openvino", "torch"] * 4


@given(st.lists(st.floats(1e-4, 1e3), min_size=3, max_size=3))
def test_the_fastest_is_taken_but_the_default_unless_another_is_a_tenth_faster(seconds):
    timings = [
        timing(*pair) for pair in zip(("openvino", "compiled", "torch"), seconds, strict=True)
    ]
    for default in timings:
        for order in permutations(timings):
            chosen, sentence = choose(order, default=default.engine)
            others = [t for t in timings if t.seconds <= WORTH * default.seconds]
            assert chosen.seconds == min([default, *others], key=lambda t: t.seconds).seconds
            assert (chosen is default) == (not others)
            assert sentence.startswith(f"{chosen.engine.name} in fp32: ")
            assert all(t.engine.name in sentence for t in timings)


def test_the_sentence_says_what_was_taken_and_why():
    openvino, compiled = timing("openvino", 0.5), timing("compiled", 0.25)
    near = timing("torch", 0.49)
    assert choose([openvino, compiled], default=openvino.engine)[1] == (
        "compiled in fp32: the fastest, 2 times as fast as the default "
        "(one tile: openvino 0.5 s, compiled 0.25 s)"
    )
    assert choose([openvino, near], default=openvino.engine)[1] == (
        "openvino in fp32: the default; torch is less than a tenth faster "
        "(one tile: openvino 0.5 s, torch 0.49 s)"
    )
    assert choose([openvino], default=openvino.engine)[1] == (
        "openvino in fp32: the fastest (one tile: openvino 0.5 s)"
    )


def test_a_default_that_could_not_be_built_gives_way_to_the_fastest():
    timings = [timing("torch", 0.5), timing("compiled", 0.49)]
    assert choose(timings, default=engine("openvino"))[0] is timings[1]
    with pytest.raises(ResourceError, match="no engine could be built here"):
        choose([], default=engine("openvino"))


def test_timings_are_remembered():
    timings = [timing("openvino", 0.1), timing("torch", 1 / 3)]
    assert remembered("key") is None
    remember("key", timings)
    assert remembered("key") == timings
    assert remembered("other") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'[{"engine": {"name": "other"}}]', b"3"])
def test_timings_that_are_damaged_are_not_used(content, kept, caplog):
    remember("key", [timing("torch", 1.0)])
    (entry,) = kept.iterdir()
    entry.write_bytes(content)
    assert remembered("key") is None
    save_entry(entry.name, content)
    assert remembered("key") is None
    assert "are not used" in caplog.text


def test_timings_are_of_one_network_tile_and_set_of_engines():
    engines = [engine("openvino"), engine("torch")]
    keys = [
        probe_key(SPEC, engines, input_shape=SHAPE, n_threads=1),
        probe_key(SPEC, engines[:1], input_shape=SHAPE, n_threads=1),
        probe_key(SPEC, engines, input_shape=(1, 1, 32, 40), n_threads=1),
        probe_key(SPEC, engines, input_shape=SHAPE, n_threads=2),
        probe_key(
            SPEC.model_copy(update={"widths": (8, 8)}), engines, input_shape=SHAPE, n_threads=1
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == probe_key(SPEC, engines, input_shape=list(SHAPE), n_threads=1)
