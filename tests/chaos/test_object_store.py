"""An object store (S3) that fails: what passes is survived, what does not ends the run at once."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from chaos.faults import SLOWLY, Fault, wait_until
from chaos.proxy import Proxy, Trouble
from chaos.scene import N_BLOCKS, assert_same, lasting

pytest.importorskip("s3fs", reason="a store on S3 needs s3fs")
pytest.importorskip("moto.server", reason="the store on loopback is moto's")

IMAGE = "s3://bucket/image.zarr"
# Seconds instead of half a minute; what is tried how often stays as it is.
QUICK = {"BACK_OFF_S": (0.1, 0.2, 0.4)}


@pytest.fixture(scope="module")
def moto():
    """The port of a store of this module's own, and its process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(port), within_s=30, what="moto answers")
        yield port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def answers(port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=1).status == 200
    return False


class S3:
    """The store as the tests see it, and the environment of the commands, which see the proxy."""

    def __init__(self, port, proxy):
        import s3fs

        self.port, self.proxy = port, proxy
        self.fs = s3fs.S3FileSystem(
            endpoint_url=f"http://127.0.0.1:{port}",
            key="k",
            secret="s",
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self.environment = {
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "FSSPEC_S3_ENDPOINT_URL": proxy.url,
            # One layer of retries less: bigseg's own are what is tested.
            "FSSPEC_S3": json.dumps(
                {"config_kwargs": {"read_timeout": 2, "retries": {"max_attempts": 1}}}
            ),
        }

    def fresh(self, image):
        """The bucket with the image and nothing else."""
        url = f"http://127.0.0.1:{self.port}/moto-api/reset"
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5).close()
        self.fs.mkdir("bucket")
        self.fs.put(str(image), "bucket/image.zarr", recursive=True)
        self.proxy.suffer()

    def files(self):
        """What lies in the bucket, but for what says how long it took."""
        found = self.fs.cat(self.fs.find("bucket"))
        kept = {name: lasting(name, raw) for name, raw in found.items()}
        return {name: content for name, content in kept.items() if content is not None}

    def is_listed(self):
        name = "bucket/image.zarr/labels/zarr.json"
        if not self.fs.exists(name):
            return False
        return "cells" in json.loads(self.fs.cat(name))["attributes"]["ome"]["labels"]


@pytest.fixture(scope="module")
def bucket(moto):
    with Proxy(moto) as proxy:
        yield S3(moto, proxy)


@pytest.fixture
def s3(bucket, scene):
    bucket.fresh(scene.image)
    return bucket


def words(scene):
    return [IMAGE if word == str(scene.image) else word for word in scene.serial()]


@pytest.fixture(scope="module")
def truth(bucket, stage):
    """What an undisturbed run leaves in the bucket."""
    stage.fresh()
    bucket.fresh(stage.image)
    ended = stage.run(words(stage), **bucket.environment)
    assert ended.code == 0, ended.said
    assert bucket.is_listed()
    return bucket.files(), sum(bucket.proxy.requests.values())


def check(s3, truth):
    assert_same(s3.files(), truth[0])


def test_what_passes_is_survived_with_equal_bytes_and_few_requests(scene, faults, s3, truth):
    chunk, result = r"/image\.zarr/0/c/", r"/cells/0/c/"
    troubles = [
        Trouble("GET", chunk, 503, skip=3, times=2),
        Trouble("GET", chunk, 500, skip=9),
        Trouble("GET", chunk, 429, skip=13),
        Trouble("GET", chunk, "reset", skip=17),
        Trouble("GET", chunk, "truncate", skip=21),
        Trouble("GET", chunk, "hang", skip=25),
        Trouble("PUT", result, 503, skip=3, times=2),
        Trouble("PUT", result, 500, skip=9),
        Trouble("PUT", result, "reset", skip=14),
        Trouble("PUT", result, "deaf", skip=20),
        Trouble("PUT", r"\.cells\.lock", "deaf"),
        Trouble("PUT", r"/ledger/", 503, skip=4),
        Trouble("GET", r"/labels/", 503, skip=2),
    ]
    faults.plan(patience=QUICK)
    s3.proxy.suffer(*troubles)
    ended = scene.run(words(scene), **s3.environment)
    assert ended.code == 0, ended.said
    assert [t.n_suffered for t in troubles] == [t.times for t in troubles]
    assert truth[1] < 12 * N_BLOCKS, "undisturbed, most requests are for voxels"
    assert sum(s3.proxy.requests.values()) < 1.2 * truth[1] + 100
    check(s3, truth)


def test_a_store_that_stays_away_ends_the_run_after_a_bounded_number_of_tries(
    scene, faults, s3, truth
):
    away = Trouble("PUT", r"/cells/0/c/", 503, skip=6, times=10**6)
    faults.plan(patience=QUICK)
    s3.proxy.suffer(away)
    ended = scene.start(words(scene), **s3.environment).end(within_s=240)
    assert ended.code == 5, ended.said
    assert "Traceback" not in ended.said
    assert len(faults.at("before-work")) < 40, "it does not ask in vain for every block"
    most = max(n for (method, _), n in s3.proxy.requests.items() if method == "PUT")
    assert most <= 40, "a store in need of rest is not stormed"
    assert not s3.is_listed()
    s3.proxy.suffer()
    ended = scene.run(words(scene), **s3.environment)
    assert ended.code == 0, ended.said
    check(s3, truth)


@pytest.mark.parametrize(
    ("method", "at"), [("GET", r"/image\.zarr/0/c/"), ("PUT", r"/cells/0/c/")], ids=["in", "out"]
)
def test_no_permission_ends_the_run_at_once(method, at, scene, faults, s3, truth):
    faults.plan(SLOWLY)
    s3.proxy.suffer(Trouble(method, at, 403, skip=8, times=10**6))
    started = time.monotonic()
    ended = scene.run(words(scene), **s3.environment)
    assert time.monotonic() - started < 30
    assert ended.code == 5, ended.said
    assert "Traceback" not in ended.said
    refused = sum(n for (m, path), n in s3.proxy.requests.items() if m == method)
    assert refused < truth[1]
    assert len(faults.at("before-work")) < 40, "the rest is not tried"
    assert not s3.is_listed()


def test_a_killed_run_on_a_store_goes_on_and_its_lock_is_taken_over(scene, faults, s3, truth):
    faults.plan(
        SLOWLY, Fault("before-mark", "kill", at="^predict 30$"), ledger={"FLUSH_EVERY_S": 0.1}
    )
    ended = scene.run(words(scene), **s3.environment)
    assert ended.code == -9, ended.said
    assert s3.fs.exists("bucket/image.zarr/labels/.cells.lock")
    assert not s3.is_listed()
    faults.forget()
    ended = scene.run(words(scene), **s3.environment)
    assert ended.code == 0, ended.said
    assert "took over" in ended.said
    assert 0 < len(faults.computed()) < 45, "the ledger in the store is what it goes on from"
    assert set(faults.computed().values()) == {1}
    check(s3, truth)


def test_a_second_run_on_a_store_is_refused_while_the_first_lives(scene, faults, s3, truth):
    faults.plan(SLOWLY)
    first = scene.start(words(scene), **s3.environment)
    wait_until(lambda: faults.at("before-work"), within_s=60, what="the first is at work")
    second = scene.run(words(scene), **s3.environment)
    assert second.code == 5, second.said
    assert f"process {first.pid}" in second.said
    assert os.uname().nodename in second.said
    assert first.end().code == 0
    check(s3, truth)
