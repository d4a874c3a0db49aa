"""The private Ray is nobody else's, and no secret of the environment is written anywhere."""

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import ray
from helpers import noise, write_image, write_model
from training_data import blobs, write_annotated

from bigseg.cluster import connect
from bigseg.config import UNetSpec

SERIAL = ("--executor", "serial")
SPEC = UNetSpec.build(2, out_channels=2, depth=1, width=4)


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise((4, 40, 40)), chunks=(1, 20, 20))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "CANARY-aws-secret-4711",
    "AWS_SESSION_TOKEN": "CANARY-aws-session-4712",
    "RAY_AUTH_TOKEN": "CANARYray" + "0" * 40,
    "AZURE_STORAGE_KEY": "CANARY-azure-4713",
}


def files_with_secrets(*folders):
    found = []
    for folder in folders:
        for path in Path(folder).rglob("*"):
            if path.is_file() and b"CANARY" in path.read_bytes():
                found.append(path)
    return found


def test_no_secret_of_the_environment_is_written_anywhere(tmp_path, image, model):
    """Ray's own logs too: the folder is looked at before it is deleted."""
    data, labels = blobs((2, 40, 40))
    url = write_annotated(str(tmp_path / "a.zarr"), data, labels, "zyx", chunks=(1, 40, 40))
    (tmp_path / "c.yaml").write_text("net: {depth: 1, width: 4}\npatch: [16, 16]\nbatch: 1\n")
    code = f"""
        import os, sys, pathlib, shutil
        from bigseg import cluster
        from bigseg.cli import main
        removing = shutil.rmtree
        def keep(path, **options):
            if pathlib.Path(path).name.startswith("bigseg-"):
                shutil.copytree(path, {str(tmp_path / "ray")!r}, dirs_exist_ok=True,
                                ignore=lambda _, names: [n for n in names if n == "sockets"])
            removing(path, **options)
        cluster.shutil.rmtree = keep
        main(["segment", {image!r}, "--model", {model!r}, "--workers", "1", "-v"],
             standalone_mode=False)
        main(["train", {url!r}, "--labels", "cells", "--out", {str(tmp_path / "run")!r}, "-c",
              {str(tmp_path / "c.yaml")!r}, "--steps", "2", "--dims", "2", "--task", "instances",
              "--val-region", "1:2,:,:", "-v"], standalone_mode=False)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **SECRETS},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "CANARY" not in result.stdout + result.stderr
    assert list((tmp_path / "ray").rglob("raylet.out")), "no log of Ray was looked at"
    assert files_with_secrets(tmp_path) == []


# The Ray that bigseg starts.


@pytest.fixture(scope="module")
def private():
    """A private Ray: its folder, and its processes with the sockets on which they listen."""
    with connect("local", n_cpus=2) as cluster:
        assert cluster.is_local
        ray.get(ray.remote(lambda: 0).remote())
        folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent.parent
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        found = {}
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                sockets = process.net_connections("inet")
                places = [c.laddr for c in sockets if c.status == psutil.CONN_LISTEN]
                found[process.pid] = (" ".join(process.cmdline()), places)
        yield folder, found
    assert not folder.exists()


def test_the_private_ray_listens_on_loopback_only(private):
    _, found = private
    places = [place for _, sockets in found.values() for place in sockets]
    assert len(places) > 5
    assert {place.ip.removeprefix("::ffff:") for place in places} == {"127.0.0.1"}, found


def test_nobody_else_enters_the_folder_of_the_private_ray(private):
    folder, _ = private
    assert folder.stat().st_mode & 0o077 == 0
    assert folder.stat().st_uid == os.getuid()


def test_no_token_stands_in_a_command_line(private):
    _, found = private
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) >= 32
    assert not [command for command, _ in found.values() if token in command]


@pytest.mark.parametrize("who", ["without a token", "with a wrong token", "the owner"])
def test_who_has_no_token_cannot_use_the_private_ray(private, tmp_path, who):
    """The service behind which jobs, actors and their code lie."""
    address = ray.get_runtime_context().gcs_address
    code = "import sys; from ray._raylet import GcsClient; "
    code += "print('let in', GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 10))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # Without a home, where Ray would look for a token of the user's.
    environment["HOME"] = str(tmp_path)
    if who != "without a token":
        wrong = who == "with a wrong token"
        environment["RAY_AUTH_MODE"] = "token"
        environment["RAY_AUTH_TOKEN"] = "wrong" * 10 if wrong else os.environ["RAY_AUTH_TOKEN"]
    result = subprocess.run(
        [sys.executable, "-c", code, address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ("let in" in result.stdout) == (who == "the owner"), result.stderr[-1000:]
    if who != "the owner":
        assert result.returncode != 0
        assert "RAY_AUTH_TOKEN" in result.stderr
