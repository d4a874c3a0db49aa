"""`ray job submit` trains and segments on a running cluster with token authentication on.

The test starts a head of its own on loopback and ends it by its process group; it never calls
`ray stop`, which would end every Ray of the user.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import zarr
from helpers import noise, write_image

from bigseg.volume import open_volume


class Head(NamedTuple):
    dashboard: str
    address: str
    environment: dict


def free_port(taken):
    """A port outside 10002-19999, which Ray keeps for its workers."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if not 10002 <= port <= 19999 and port not in taken:
            taken.add(port)
            return port


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The addresses and the environment of a client of a head on loopback."""
    # Ray's sockets lie in the temporary folder, and their paths must stay short.
    folder = tmp_path_factory.mktemp("r")
    short = f"/tmp/bigseg-{secrets.token_hex(3)}"
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    taken = set()
    dashboard = free_port(taken)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "port": free_port(taken),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(taken),
        "ray-client-server-port": free_port(taken),
        "num-cpus": 2,
        "temp-dir": short,
        "min-worker-port": 20200,
        "max-worker-port": 20999,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", token.read_text())
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{options['port']}", environment)
    finally:
        end(process, short)


def end(process, folder):
    """End the head and all that it started: its children, and whoever names its folder."""
    ours = psutil.Process(process.pid).children(recursive=True)
    ours += [
        p for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or ())
    ]
    for each in (*ours, psutil.Process(process.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(10)
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(url, token):
    deadline = time.monotonic() + 60
    while True:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def submit(head, *words):
    command = ["-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard, "--"]
    return python(head, *command, sys.executable, "-m", "bigseg", *words)


def python(head, *words):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_without_the_token_the_cluster_answers_nobody(head):
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=5)


def test_train_and_segment_run_as_jobs(head, tmp_path):
    data = noise((6, 64, 64))
    image = write_image(tmp_path / "image.zarr", data, chunks=(1, 64, 64))
    labels = (data > 128).astype(np.uint8)
    listed = zarr.create_group(tmp_path / "image.zarr" / "labels", zarr_format=3)
    listed.attrs["ome"] = {"version": "0.5", "labels": ["bright"]}
    write_image(tmp_path / "image.zarr" / "labels" / "bright", labels, chunks=(1, 64, 64))
    settings = tmp_path / "config.yaml"
    settings.write_text("net: {depth: 1, width: 4}\npatch: [32, 32]\nbatch: 2\n")
    run = tmp_path / "run"
    said = submit(
        *(head, "train", image, "--labels", "bright", "--out", run, "-c", settings),
        *("--dims", 2, "--steps", 4, "--workers", 1),
    )
    assert "model.safetensors: 4 steps" in said
    said = submit(head, "segment", image, "--model", run / "model.safetensors", "--workers", 2)
    assert "labels/bigseg" in said
    found = open_volume(image).label("bigseg")
    assert found.shape == (1, 6, 64, 64)
    assert set(np.unique(found.array[:])) <= {0, 1}
    # The same from outside, by the cluster's address instead of as a job.
    words = ("segment", image, "--model", run / "model.safetensors", "--name", "again")
    python(head, "-m", "bigseg", *words, "--address", head.address)
    again = open_volume(image).label("again")
    np.testing.assert_array_equal(again.array[:], found.array[:])
