"""Kills at random moments: of one worker, of all, of the driver, of both one after the other."""

import contextlib
import os
import signal
import threading

import pytest

from chaos.faults import SLOWLY, Faults, wait_until
from chaos.scene import N_BLOCKS, Watch, here, wait_for_blocks

pytestmark = pytest.mark.usefixtures("one_ray")


class KillLater:
    """Kills workers in the middle of a run that goes on in this process."""

    def __init__(self, faults: Faults, chance, n_workers: int, *, n_blocks=N_BLOCKS) -> None:
        self._faults, self._chance, self._n = faults, chance, n_workers
        self._n_blocks = n_blocks
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self.killed: list[int] = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(60)

    def _kill(self):
        wait_for_blocks(self._faults, self._chance.randrange(2, self._n_blocks - 8))
        threading.Event().wait(self._chance.uniform(0, 0.2))
        wait_until(lambda: len(self._faults.pids_at_work()) >= self._n, within_s=20, what="workers")
        pids = self._faults.pids_at_work()
        for pid in self._chance.sample(pids, min(self._n, len(pids))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)


@pytest.mark.parametrize("n_workers", [1, 2], ids=["one worker", "all workers"])
def test_workers_killed_at_a_random_moment_are_replaced(n_workers, scene, faults, chance):
    faults.plan(SLOWLY)
    with Watch(scene), KillLater(faults, chance, n_workers) as killer:
        ended, _ = here(scene.on_ray())
    assert ended.code == 0, ended.said
    assert len(killer.killed) == n_workers
    assert max(faults.computed().values()) <= 3
    scene.check()


def test_a_driver_killed_at_a_random_moment_leaves_no_process_and_goes_on(scene, faults, chance):
    faults.plan(SLOWLY, ledger={"FLUSH_EVERY_S": 0.1})
    running = scene.start(scene.on_ray())
    wait_for_blocks(faults, chance.randrange(2, N_BLOCKS - 4))
    running.kill()
    assert len(running.family()) > 1, "the workers outlive it for a moment"
    running.wait_for_family()
    ended = scene.go_on(scene.on_ray())
    assert ended.code == 0
    scene.check()


def test_killed_again_and_again_it_still_ends_in_the_same_bytes(scene, faults, chance):
    for _ in range(2):
        faults.plan(SLOWLY, ledger={"FLUSH_EVERY_S": 0.1})
        running = scene.start(scene.serial())
        n_left = N_BLOCKS - len(scene.done())
        if n_left > 4:
            wait_for_blocks(faults, chance.randrange(2, n_left))
        running.kill()
        scene.check_unlisted()
    scene.go_on(scene.serial())
    scene.check()
