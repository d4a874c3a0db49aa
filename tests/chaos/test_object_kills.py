"""A kill at each moment at which the objects of an image could be half made."""

import json
import shutil

import numpy as np
import pytest
from helpers import write_image
from planting import planted_shapes, write_planting_model

from chaos.faults import SLOWLY, Fault, pace
from chaos.scene import NAME, Scene, here
from chaos.test_random_kills import KillLater

OFTEN = {"FLUSH_EVERY_S": 0.02}

# A driver killed there, with the stage that must not have begun yet.
MOMENTS = {
    "between the file of a block and its mark": Fault("before-mark", "kill", at=r"^seeds 5$"),
    "between a file of components and its name": Fault(
        "before-rename", "kill", at=r"/scratch/seeds/", skip=3
    ),
    "between a file of pairs and its name": Fault(
        "before-rename", "kill", at=r"/scratch/pairs/", skip=3
    ),
    "in the middle of numbering": Fault("before-rename", "kill", at=r"/scratch/number/", skip=3),
    "between the numbers and the arrays for them": Fault(
        "before-rename", "kill", at=r"/scratch/count/"
    ),
    "before the arrays are an image": Fault("before-rename", "kill", at=r"/cells/1/zarr\.json$"),
    "between labels and their name": Fault("before-rename", "kill", at=r"/cells/0/c/", skip=3),
    "in the middle of filling holes": Fault("before-rename", "kill", at=r"/scratch/close/", skip=3),
    "between the table and its name": Fault("before-rename", "kill", at=r"objects\.parquet$"),
    "between the list and the end of the ledger": Fault("before-finish", "kill"),
}


class ObjectScene(Scene):
    """Planted objects, and the model that sees them."""

    def _make(self):
        write_image(self._pristine, planted_shapes(), chunks=(8, 16, 16), n_levels=2)
        self.model = write_planting_model(self.root / "model.safetensors")

    def words(self, *options):
        words = ["segment", self.image, "--model", self.model, "--name", NAME, "--tile", "8,8,8"]
        words += ["--block", "8,16,24", "--engine", "torch", "--precision", "fp32"]
        words += ["--erode", 1, "--grow", 3, "--fill-holes", "--memory", "4GiB", *options]
        return [str(word) for word in words]

    def _check_truth(self, labels):
        assert len(np.unique(labels)) > 3, "the result must have something to lose"
        assert not (self.out / "scratch").exists()


@pytest.fixture(scope="module")
def objects_stage(tmp_path_factory, faults):
    scene = ObjectScene(tmp_path_factory.mktemp("objects"), faults)
    scene.truth()
    return scene


@pytest.fixture
def objects(objects_stage):
    """Planted objects that are not segmented yet."""
    objects_stage.fresh()
    yield objects_stage
    objects_stage.fresh()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_it_makes_objects_goes_on(moment, objects, faults):
    faults.plan(pace(0.01), MOMENTS[moment], ledger=OFTEN)
    ended = objects.run(objects.serial())
    assert ended.code == -9, ended.said
    assert faults.have_all_struck()
    assert not objects.is_listed() or moment.startswith("between the list")
    objects.go_on(objects.serial())
    objects.check()


def test_workers_killed_at_a_random_moment_lose_no_object(objects, faults, chance, one_ray):
    faults.plan(SLOWLY)
    with KillLater(faults, chance, 2, n_blocks=70) as killer:
        ended, _ = here(objects.on_ray())
    assert ended.code == 0, ended.said
    assert len(killer.killed) == 2
    objects.check()


def test_a_change_of_rule_killed_while_it_deletes_goes_on(objects, faults):
    objects.run(objects.serial("--keep-probabilities"))
    words = ["instances", str(objects.out), "--grow", "1", "--executor", "serial"]
    ended, _ = here(words)
    assert ended.code == 0, ended.said
    truth = {p: p.read_bytes() for p in sorted((objects.out / "0").rglob("*")) if p.is_file()}
    shutil.rmtree(objects.out)
    objects.run(objects.serial("--keep-probabilities"))
    for moment in (
        Fault("before-rename", "kill", at=r"/ledger/zarr\.json$", skip=1),
        Fault("before-rename", "kill", at=r"/cells/zarr\.json$"),
        Fault("before-rename", "kill", at=r"/scratch/number/"),
    ):
        faults.plan(moment, ledger=OFTEN)
        assert objects.run(words).code == -9
        attributes = json.loads((objects.out / "ledger" / "zarr.json").read_text())["attributes"]
        assert not attributes["finished"]
    faults.forget()
    ended, _ = here(words)
    assert ended.code == 0, ended.said
    assert truth == {
        p: p.read_bytes() for p in sorted((objects.out / "0").rglob("*")) if p.is_file()
    }
