"""A cluster of two nodes on one machine, one of which is lost."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from chaos.faults import SLOWLY, wait_until
from chaos.scene import N_BLOCKS, wait_for_blocks

PROGRAM = Path(__file__).parent / "two_nodes.py"


class Nodes(NamedTuple):
    """Where the cluster is, the process to kill to lose a node, how to get in."""

    address: str
    raylet: int
    environment: dict[str, str]


@pytest.fixture
def nodes(faults):
    """A processor on each."""
    (faults.ray_folder / "ray").mkdir(exist_ok=True)
    # A cluster that runs does not say that it asks for a token.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    program = subprocess.Popen(
        [sys.executable, PROGRAM],
        env={**faults.environment(), **token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = json.loads(program.stdout.readline())
        yield Nodes(said["address"], said["raylet"], token)
    finally:
        family = psutil.Process(program.pid).children(recursive=True)
        program.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(20)
        for process in (*family, program):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        program.stdout.close()
        program.wait(10)


def test_a_lost_node_costs_its_blocks_in_flight_and_nothing_else(scene, faults, nodes, chance):
    faults.plan(SLOWLY, ledger={"FLUSH_EVERY_S": 0.1})
    running = scene.start(scene.on_ray("--address", nodes.address), **nodes.environment)
    wait_until(lambda: len(faults.pids_at_work()) == 2, within_s=60, what="a worker on each node")
    wait_for_blocks(faults, chance.randrange(4, N_BLOCKS // 2))
    os.kill(nodes.raylet, signal.SIGKILL)
    lost = time.monotonic()
    ended = running.end(within_s=120)
    assert ended.code == 0, ended.said
    assert time.monotonic() - lost < 60
    assert max(faults.computed().values()) <= 2
    scene.check()
