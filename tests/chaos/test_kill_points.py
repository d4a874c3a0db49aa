"""A kill at each moment at which something could be half done."""

import pytest

from chaos.faults import SLOWLY, Fault, pace
from chaos.scene import N_BLOCKS, Watch, here

# Marks reach the disk all the time, so that there is something to go on from.
OFTEN = {"FLUSH_EVERY_S": 0.02}

WORKER = {
    "before and after it reads": (
        Fault("before-read", "kill", at=r"^predict 10$"),
        Fault("after-read", "kill", at=r"^predict 34$"),
    ),
    "before a chunk has its name, and before it is reported": (
        Fault("before-rename", "kill", at=r"/cells/0/c/", skip=10),
        Fault("after-write", "kill", at=r"^predict 34$"),
    ),
}

DRIVER = {
    "between a chunk and its mark": Fault("before-mark", "kill", at=r"^predict 40$"),
    "between the marks and their name": Fault(
        "before-rename", "kill", at=r"/ledger/predict/c/", skip=4
    ),
    "between the lock and its name": Fault("before-rename", "kill", at=r"\.cells\.lock$"),
    "before the output is an image": Fault("before-rename", "kill", at=r"/cells/zarr\.json$"),
    "between the output and its ledger": Fault("after-create", "kill"),
    "between a coarse chunk and its name": Fault("before-rename", "kill", at=r"/cells/1/c/"),
    "before it is listed": Fault("before-list", "kill"),
    "between the list and its name": Fault("before-rename", "kill", at=r"/labels/zarr\.json$"),
    "between the list and the end of the ledger": Fault("before-finish", "kill"),
}


@pytest.mark.parametrize("moment", WORKER)
def test_a_worker_killed_at_any_moment_is_replaced(moment, scene, faults, one_ray):
    faults.plan(SLOWLY, *WORKER[moment])
    with Watch(scene):
        ended, _ = here(scene.on_ray())
    assert ended.code == 0, ended.said
    assert faults.have_all_struck()
    assert max(faults.computed().values()) <= 3
    scene.check()


@pytest.mark.parametrize("moment", DRIVER)
def test_a_run_killed_at_any_moment_goes_on_with_the_same_command(moment, scene, faults):
    faults.plan(pace(0.03), DRIVER[moment], ledger=OFTEN)
    with Watch(scene):
        ended = scene.run(scene.serial())
    assert ended.code == -9, ended.said
    assert faults.have_all_struck()
    n_done, was_ready = len(scene.done()), len(faults.at("before-mark")) > N_BLOCKS // 2
    assert not was_ready or n_done > N_BLOCKS // 2
    scene.go_on(scene.serial())
    scene.check()
