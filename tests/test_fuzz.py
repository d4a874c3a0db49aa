"""Whatever others wrote, only bigseg's own errors come out, and soon.

benchmarks/fuzz.py goes on for longer. What was found has an example here, which failed first.
"""

import pytest
from fuzzing import NAMES, Targets, nested
from hypothesis import HealthCheck, Phase, given, settings

from bigseg import ngff
from bigseg.errors import BigsegError, InputError, NotOmeZarrError, UsageError
from bigseg.units import parse_bytes


@pytest.fixture(scope="module")
def targets():
    with Targets() as found:
        yield found


@pytest.mark.parametrize("name", NAMES)
def test_only_our_own_errors_come_out(targets, name):
    target = targets[name]
    taken = []

    @settings(
        max_examples=150,
        deadline=None,
        database=None,
        # What it finds is small already, and shrinking it takes minutes.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def attack(value):
        taken.append(target.attack(value))

    attack()
    assert any(taken), "not one input was good enough to go all the way"
    assert not all(taken), "not one input was refused"


def image_with(*steps):
    """Metadata of an image (y, x) whose only level is placed by these transformations."""
    axes = [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    level = {"path": "0", "coordinateTransformations": list(steps)}
    return {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}}


def deep_sequence(depth):
    step = {"type": "scale", "scale": [1.0, 1.0]}
    for _ in range(depth):
        step = {"type": "sequence", "transformations": [step]}
    return step


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([{"type": "scale", "scale": [10**400, 1]}], InputError),
        ([{"type": "scale", "scale": [1e300, 1]}] * 2, InputError),
        ([{"type": "scale", "scale": [1e-300, 1]}] * 2, InputError),
        ([deep_sequence(400)], InputError),
        ([{"type": "scale", "scale": nested(900)}], InputError),
        ([{"type": nested(900)}], BigsegError),
    ],
    ids=["digits", "overflow", "underflow", "deep", "deep values", "deep type"],
)
def test_a_level_that_no_number_places_is_refused(steps, error):
    with pytest.raises(error) as caught:
        ngff.parse_multiscale(image_with(*steps), where="x.zarr")
    assert len(str(caught.value)) < 500


def test_names_that_are_none_are_left_out():
    assert ngff.listed_labels({"labels": "cells"}) == ()
    assert ngff.listed_labels({"labels": ["cells", nested(900), None, 3]}) == ("cells", "3")
    plate = {"plate": {"wells": [{"path": nested(900)}, {"path": "A/1"}]}}
    assert ngff.image_paths(plate) == ["A/1/0"]
    with pytest.raises(NotOmeZarrError, match="is a plate of 1 wells"):
        ngff.parse_multiscale(plate, where="x.zarr")


def test_more_memory_than_there_is_is_refused():
    with pytest.raises(UsageError, match="is more memory than there is"):
        parse_bytes("9" * 400 + "T")
