"""Objects made again and gone on with: by which rule, on which machine, at what cost."""

from dataclasses import replace

import numpy as np
import pytest
from planting import config_for, labels_at, planted_shapes, truth_of

from bigseg import rerun
from bigseg.blocks import Region
from bigseg.errors import UsageError
from bigseg.ledger import Ledger
from bigseg.places import Here
from bigseg.progress import NullProgress
from bigseg.rerun import remake_instances
from bigseg.results import ledger_url
from bigseg.rules import RuleOptions
from bigseg.segment import segment_serially
from bigseg.verify import verify
from bigseg.volume import open_volume

BLOCK = (24, 24, 48)


def run(config):
    result = segment_serially(config, NullProgress())
    assert result.is_complete, result.failed
    return result


def remake(out, **rule):
    options = {"executor": "serial", "progress": NullProgress()}
    result = remake_instances(str(out), RuleOptions(**rule), **options)
    assert result.is_complete, result.failed
    return result


def spoil(volume):
    """Other voxels in the first core of a volume, in whole write units."""
    core = Region((0, 0, 0, 0), (1, 24, min(24, volume.shape[2]), volume.shape[3]))
    voxels = volume.read(core, range(volume.n_channels))
    volume.write(core, voxels[..., ::-1].copy())


@pytest.mark.parametrize("said_again", [False, True])
def test_segment_goes_on_by_the_rule_that_instances_changed(planted, tmp_path, said_again):
    image, model = planted
    out, changed = tmp_path / "out.zarr", {"threshold": 0.7, "erode": 0, "grow": 2}
    run(config_for(image, model, out, {}, block=BLOCK, keep_probabilities=True))
    remake(out, **changed)
    spoil(open_volume(str(out / "probabilities")))
    assert verify(str(out), n_seams=0, progress=NullProgress()).n_taken_back
    other = config_for(image, model, out, {"erode": 1}, block=BLOCK)
    with pytest.raises(UsageError, match=r"made with other settings \(instances.rule.erode: 0, no"):
        segment_serially(other, NullProgress())
    result = run(config_for(image, model, out, {}, block=BLOCK, keep_probabilities=said_again))
    assert result.plan.instances.keep_probabilities
    assert 0 < result.n_done_before < result.n_blocks
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), changed)[0])


def test_what_was_said_of_objects_once_need_not_be_said_again(planted, tmp_path):
    image, model = planted
    out, rule = tmp_path / "out.zarr", {"erode": 0, "grow": 2, "fill_holes": True}
    run(config_for(image, model, out, rule, block=BLOCK))
    again = run(config_for(image, model, out, {}, block=BLOCK))
    assert again.n_done_before == again.n_blocks
    kept = config_for(image, model, out, {}, block=BLOCK, keep_probabilities=True)
    with pytest.raises(UsageError, match="keep_probabilities: False, not True"):
        segment_serially(kept, NullProgress())


def test_objects_are_made_again_with_the_memory_of_this_machine(planted, tmp_path, monkeypatch):
    carried_out = []

    class Small(Here):
        def __init__(self):
            super().__init__()
            self.resources = replace(self.resources, n_workers=2, memory_bytes=1 << 28)

        def executor(self, plan, transform, owner=None):
            carried_out.append(plan)
            return super().executor(plan, transform, owner)

    image, model = planted
    out, rule = tmp_path / "out.zarr", {"erode": 0, "grow": 2}
    run(config_for(image, model, out, {}, block=BLOCK, keep_probabilities=True, memory=32 << 30))
    monkeypatch.setattr(rerun, "Here", Small)
    remake(out, **rule)
    options = {"executor": "serial", "progress": NullProgress()}
    remake_instances(str(out), RuleOptions(), workers=4, **options)
    assert [plan.memory_bytes for plan in carried_out] == [1 << 28, 1 << 27]
    assert Ledger.open(ledger_url(str(out))).plan["memory_bytes"] == 32 << 30
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("what", ["labels", "table", "pyramid"])
def test_verify_says_when_mending_takes_the_network(planted, tmp_path, keep, what):
    image, model = planted
    out = tmp_path / "out.zarr"
    run(config_for(image, model, out, {}, block=BLOCK, keep_probabilities=keep))
    if what == "table":
        (out / "objects.parquet").unlink()
    else:
        spoil(open_volume(str(out), level=1 if what == "pyramid" else 0))
    found = verify(str(out), n_seams=0, progress=NullProgress())
    assert found.n_taken_back
    says_so = "with the network over the whole volume" in found.sentence
    assert says_so == (what != "pyramid" and not keep)
