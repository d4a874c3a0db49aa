"""Settings are checked once, at the edge, with errors that name the key and the way out."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.config import (
    MAX_CONFIG_BYTES,
    AugmentConfig,
    LossConfig,
    ModelCard,
    NetConfig,
    NormConstants,
    NormRule,
    OptimConfig,
    SegmentConfig,
    TrainConfig,
    UNetSpec,
    WeightMap,
    dump_yaml,
    load_train_config,
    parse_settings,
)
from bigseg.errors import ConfigError, UsageError

LEAST = {"images": ["a.zarr"], "labels": "cells"}


def write(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(model, values):
    with pytest.raises(ConfigError) as caught:
        parse_settings(model, values, source="options")
    return str(caught.value)


printable = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories="C"))


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        TrainConfig,
        images=st.lists(printable, min_size=1, max_size=3).map(tuple),
        labels=printable,
        region=st.sampled_from([None, "0:10,0:20,:", "10:20", "null", "1e3", "yes"]),
        ignore=st.none() | st.integers(),
        classes=st.none() | st.lists(printable, max_size=3).map(tuple),
        net=st.builds(NetConfig, depth=st.none() | st.integers(0, 7)),
        optim=st.builds(OptimConfig, lr=st.floats(1e-12, 1e3)),
        val_images=st.lists(printable, max_size=2).map(tuple),
        border_um=st.none() | st.floats(1e-6, 1e6),
        loss=st.builds(
            LossConfig,
            dice=st.floats(0, 1e9),
            weight_map=st.none() | st.builds(WeightMap, w0=st.floats(0.1, 1000)),
        ),
        augment=st.builds(AugmentConfig, elastic_vox=st.floats(0, 1e9), flip=st.booleans()),
        norm=st.builds(NormRule, kind=st.sampled_from(["percentile", "meanstd"])),
        patch=st.none() | st.tuples(st.integers(1, 512), st.integers(1, 512)),
    )
)
def test_yaml_reads_back_what_was_written(tmp_path_factory, config):
    path = write(tmp_path_factory.mktemp("round"), dump_yaml(config))
    assert load_train_config(path, {}) == config


def test_options_win_over_the_file(tmp_path):
    path = write(tmp_path, "images: [a.zarr]\nlabels: cells\nsteps: 5\noptim: {lr: 1e-3}\n")
    config = load_train_config(path, {"steps": 7})
    # YAML 1.1 takes 1e-3 for a string; the setting is a number all the same.
    assert (config.steps, config.optim.lr, config.images) == (7, 1e-3, ("a.zarr",))


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ({"stepps": 5}, "options: unknown setting 'stepps'; did you mean 'steps'?"),
        ({"optim": {"lrr": 1}}, "options: unknown setting 'optim.lrr'; did you mean 'lr'?"),
        ({"net": {"dept": 3}}, "options: unknown setting 'net.dept'; did you mean 'depth'?"),
        ({"norm": {"hi": 3}}, "unknown setting 'norm.hi'; did you mean 'high'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, sentence):
    assert sentence in complaint(TrainConfig, {**LEAST, **key})


def test_a_misspelt_key_that_must_be_there_is_named_and_not_called_missing():
    said = complaint(TrainConfig, {"image": ["a.zarr"], "labels": "cells"})
    assert said == "options: unknown setting 'image'; did you mean 'images'?"


def test_a_missing_key_is_named():
    assert complaint(TrainConfig, {"labels": "x"}) == (
        "options: the setting 'images' is missing; give it"
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": "many"}, "options: steps = 'many': Input should be a valid integer"),
        ({"steps": 0}, "options: steps = 0: Input should be greater than or equal to 1"),
        ({"steps": 2.5}, "options: steps = 2.5: Input should be a valid integer"),
        ({"images": "a.zarr"}, "options: images = 'a.zarr': Input should be a valid tuple"),
        ({"images": []}, "images = []: Tuple should have at least 1 item"),
        ({"labels": 3}, "labels = 3: Input should be a valid string"),
        ({"optim": 3}, "options: optim = 3"),
        ({"task": "boundary"}, "task = 'boundary': Input should be 'semantic' or 'instances'"),
        ({"dims": 4}, "dims = 4"),
        ({"border_um": 0}, "border_um = 0: Input should be greater than 0"),
        ({"loss": {"weight_map": {"w0": -1}}}, "loss.weight_map.w0 = -1: Input should be greater"),
        ({"augment": {"scale": 1.0}}, "augment.scale = 1.0: Input should be less than 1"),
        ({"norm": {"low": 60, "high": 40}}, "low percentile 60.0 must be below high percentile 40"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key_and_rule(values, sentence):
    assert sentence in complaint(TrainConfig, {**LEAST, **values})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_are_refused(value):
    said = complaint(TrainConfig, {**LEAST, "optim": {"lr": value}})
    assert said == f"options: optim.lr = {value!r} is not a finite number; give one"


def test_infinities_in_yaml_are_refused(tmp_path):
    path = write(tmp_path, "images: [a]\nlabels: b\noptim: {lr: .inf}\n")
    with pytest.raises(ConfigError, match=r"optim\.lr = inf is not a finite number"):
        load_train_config(path, {})


def test_a_long_value_is_shown_in_short():
    said = complaint(TrainConfig, {**LEAST, "steps": list(range(100_000))})
    assert len(said) < 200


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: 1\nlabels: a\nsteps: 2\n", "key 'steps' is given twice"),
        ("optim: {lr: 1, lr: 2}\n", "key 'lr' is given twice"),
        ("- a\n- b\n", "must be a mapping of settings, such as `steps: 500`"),
        ("", "must be a mapping of settings"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
        ("[" * 500, "is not valid YAML"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("images: [a]\nlabels: b\n1: 2\n", "1 = 1: Keys should be strings"),
    ],
)
def test_yaml_that_is_none_of_settings_is_refused(tmp_path, text, sentence):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_train_config(path, {})
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    path = write(tmp_path, "# " + "x" * MAX_CONFIG_BYTES)
    with pytest.raises(ConfigError, match=r"has more than 1048576 bytes: give a smaller file"):
        load_train_config(path, {})


def test_a_file_that_is_absent_or_binary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file.*; check the path"):
        load_train_config(tmp_path / "none.yaml", {})
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_train_config(tmp_path / "b.yaml", {})


def test_settings_are_frozen():
    config = TrainConfig(**LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 129, "a\n", "a b"])
def test_a_name_of_labels_that_is_no_plain_name_is_refused(name):
    said = complaint(SegmentConfig, {"image": "i", "model": "m", "name": name})
    assert "options: name = " in said


SPEC = {
    "dims": 2,
    "out_channels": 2,
    "widths": (4, 8),
    "kernels": ((3, 3), (3, 3)),
    "strides": ((2, 2),),
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"strides": ()}, "2 widths need 2 kernels and 1 strides, not 2 and 0"),
        ({"kernels": ((3, 3),)}, "2 widths need 2 kernels and 1 strides, not 1 and 1"),
        ({"strides": ((2, 2, 2),)}, "each kernel and stride needs 2 numbers, one for each axis"),
        ({"kernels": ((3, 3), (3, 2))}, "kernel sizes must be odd"),
        ({"kernels": ((3, 3), (3, 65))}, "kernel sizes must be at most 63"),
        ({"strides": ((2, 10**9),)}, "the strides of an axis must multiply to at most 1024"),
        ({"widths": ()}, "at least 1 item"),
        ({"widths": (4, 0)}, "greater than or equal to 1"),
        ({"dims": 1}, "dims"),
        ({"n_convs": 9}, "n_convs"),
        ({"norm": "instance"}, "norm"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change, sentence):
    assert sentence in complaint(UNetSpec, {**SPEC, **change})


def test_anisotropic_networks_pool_long_axes_late():
    spec = UNetSpec.build(3, out_channels=2, depth=3, width=8, voxel_um=(0.04, 0.01, 0.01))
    assert spec.strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert spec.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert spec.widths == (8, 16, 32, 64)
    assert spec.depth == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classes": ("a",)}, "1 class names for 2 output channels"),
        ({"voxel_um": (1.0, 1.0, 1.0)}, "voxel_um needs 2 numbers"),
        ({"voxel_um": (1.0, 0.0)}, "greater than 0"),
        (
            {"norm_constants": NormConstants(offset=(0.0, 0.0), scale=(1.0, 1.0))},
            "norm_constants need 1 offsets and scales, one for each channel",
        ),
        ({"format": 2}, "format"),
    ],
)
def test_a_model_card_that_contradicts_itself_is_refused(change, sentence):
    values = {"spec": UNetSpec(**SPEC), "classes": ("a", "b"), **change}
    assert sentence in complaint(ModelCard, values)


def test_configuration_errors_are_usage_errors_with_exit_code_2():
    assert issubclass(ConfigError, UsageError)
    assert issubclass(ConfigError, ValueError)
    assert ConfigError.exit_code == 2


def test_an_unknown_setting_inside_an_optional_one_is_answered_with_its_neighbours():
    with pytest.raises(ConfigError, match="did you mean 'sigma_um'"):
        load_train_config(
            None,
            {"images": ("a",), "labels": "b", "loss": {"weight_map": {"sigma": 1.0}}},
        )
