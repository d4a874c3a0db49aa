"""A place with an image and a model, the commands that run there, and what they must leave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from click.testing import CliRunner
from helpers import noise, write_image, write_model

from bigseg import stages
from bigseg.cli import main
from bigseg.config import UNetSpec
from chaos.faults import Faults, wait_until

SHAPE, TILE = (16, 64, 48), (4, 16, 16)
N_BLOCKS = 48
NAME = "cells"
RAYS_OWN = ("", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    said: str
    seconds: float


class Running:
    """A command in a process group of its own, as a shell starts it."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._started = time.monotonic()
        self._family: dict[int, psutil.Process] = {}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bigseg", *words],
                env=environment,
                # Where pictures of results on remote stores are written.
                cwd=log.parent,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """The processes that this one has started so far, and theirs, that still live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                self._family[child.pid] = child
        return [p for p in self._family.values() if is_alive(p)]

    def wait_for_family(self, *, within_s: float = 30.0) -> None:
        """Return when all that it started has ended.

        But for two of Ray's own, which look for a killed Ray for a minute before they end (2.60).
        """
        deadline = time.monotonic() + within_s
        while left := [p for p in self.family() if name_of(p) not in RAYS_OWN]:
            names = list(map(name_of, left))
            assert time.monotonic() < deadline, f"still there after {within_s:g} s: {names}"
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends it to the whole foreground group."""
        os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL of the command itself, not of what it has started."""
        self.family()
        self.process.kill()
        self.process.wait(10)

    def end(self, *, within_s: float = 90.0) -> Ended:
        """Wait for its end."""
        code = self.process.wait(within_s)
        return Ended(code, self.said(), time.monotonic() - self._started)

    def said(self) -> str:
        return self._log.read_text()

    def clear(self) -> None:
        """End what is left of it."""
        for process in (*self.family(), self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


def name_of(process: psutil.Process) -> str:
    """What it calls itself."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs or is stopped; one that nobody has waited for has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Scene:
    """An image with its model; `fresh` puts them back as they were."""

    def __init__(self, root: Path, faults: Faults) -> None:
        self.root, self.faults = root, faults
        self.image, self.out = root / "image.zarr", root / "image.zarr" / "labels" / NAME
        self._pristine = root / "pristine.zarr"
        self.model = ""
        self._make()
        self._running: list[Running] = []
        self._truth: dict[str, bytes] | None = None

    def _make(self) -> None:
        """The image as it is before it is segmented, and the model."""
        write_image(self._pristine, noise(SHAPE), chunks=TILE, n_levels=3)
        spec = UNetSpec.build(3, out_channels=3, depth=1, width=4)
        self.model = write_model(self.root / "model.safetensors", spec)[1]

    def _check_truth(self, labels: np.ndarray) -> None:
        """Refuse a truth that nothing could be lost of."""
        assert len(np.unique(labels)) == 3, "the result must have something to lose"
        assert sum(len(m) for m in marks_of(self.out).values()) > N_BLOCKS

    def fresh(self) -> None:
        """The image without labels, no faults, and no command running."""
        for running in self._running:
            running.clear()
        self._running.clear()
        shutil.rmtree(self.image, ignore_errors=True)
        shutil.copytree(self._pristine, self.image)
        self.faults.forget()

    def words(self, *options: object) -> list[str]:
        """The command that every case gives."""
        sides = ",".join(map(str, TILE))
        words = ["segment", self.image, "--model", self.model, "--name", NAME, "--tile", sides]
        words += ["--block", sides, "--engine", "torch", "--precision", "fp32"]
        words += ["--norm", "volume", "--memory", "4GiB", *options]
        return [str(word) for word in words]

    def serial(self, *options: object) -> list[str]:
        return self.words("--executor", "serial", *options)

    def on_ray(self, *options: object) -> list[str]:
        return self.words("--workers", 2, *options)

    def start(self, words: list[str], **environment: str) -> Running:
        """The command in a process of its own, which suffers what the faults say."""
        log = self.root / f"said-{len(self._running)}"
        running = Running(words, {**self.faults.environment(), **environment}, log)
        self._running.append(running)
        return running

    def run(self, words: list[str], **environment: str) -> Ended:
        """The command in a process of its own, to its end."""
        return self.start(words, **environment).end()

    def truth(self) -> dict[str, bytes]:
        """What an undisturbed run leaves."""
        if self._truth is None:
            self.fresh()
            ended, _ = here(self.serial())
            assert ended.code == 0, ended.said
            self._truth = files_of(self.image)
            self._check_truth(np.asarray(zarr.open_array(str(self.out / "0"), mode="r")[:]))
            self.fresh()
        return self._truth

    def check(self) -> None:
        """What is there is what an undisturbed run leaves: voxels, metadata, marks, the list."""
        assert_same(files_of(self.image), self.truth())

    def done(self) -> set[str]:
        """The blocks that the ledger has, as `stage number`."""
        marks = marks_of(self.out)
        return {f"{stage} {i}" for stage in marks for i in np.flatnonzero(marks[stage])}

    def is_listed(self) -> bool:
        return NAME in listed(self.image)

    def check_unlisted(self) -> None:
        """Not listed before it is complete."""
        if self.is_listed():
            marks = marks_of(self.out)
            assert marks
            assert all(of_stage.all() for of_stage in marks.values())

    def go_on(self, words: list[str]) -> Ended:
        """The same command again, in this process: done blocks stay done, the rest is done once."""
        self.check_unlisted()
        done = self.done()
        self.faults.forget()
        ended, ran = here(words)
        assert ended.code == 0, ended.said
        # Of the blocks that Ray's workers compute, the injector in them keeps the count.
        again = set(ran) | set(self.faults.computed())
        assert not again & done, "blocks were computed again that the ledger had"
        assert len(ran) == len(set(ran))
        assert set(self.faults.computed().values()) <= {1}
        return ended


def here(words: list[str]) -> tuple[Ended, list[str]]:
    """A command in this process, and the blocks that were computed in it."""
    ran: list[str] = []
    make_stage = stages.make_stage

    def counting(plan: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        stage = make_stage(plan, name, *args, **kwargs)
        work = stage.work

        def counted(block: Any, data: Any) -> Any:
            ran.append(f"{name} {block.index}")
            return work(block, data)

        stage.work = counted
        return stage

    started = time.monotonic()
    stages.make_stage = counting
    try:
        result = CliRunner().invoke(main, words)
    finally:
        stages.make_stage = make_stage
    return Ended(result.exit_code, result.output, time.monotonic() - started), ran


def files_of(root: Path) -> dict[str, bytes]:
    """The content of every file, but for what says how long a run took and what went wrong."""
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    kept = {name: lasting(name, raw) for name, raw in found.items()}
    return {name: content for name, content in kept.items() if content is not None}


def lasting(name: str, raw: bytes) -> bytes | None:
    if name.endswith("ledger/zarr.json"):
        document = json.loads(raw)
        document["attributes"].pop("record", None)
        return json.dumps(document, sort_keys=True).encode()
    if name.endswith("ledger/troubles.json"):
        return raw if any(json.loads(raw).values()) else None
    return raw


def assert_same(found: dict[str, bytes], truth: dict[str, bytes]) -> None:
    too_many, missing = sorted(found.keys() - truth.keys()), sorted(truth.keys() - found.keys())
    assert (too_many, missing) == ([], [])
    different = [name for name in truth if found[name] != truth[name]]
    assert different == []


def marks_of(out: Path | str) -> dict[str, np.ndarray]:
    """The ledger's marks by stage; empty where there is no ledger yet."""
    # By the names of folders: zarr warns of files that are being written.
    found = sorted(path.parent for path in Path(out).glob("ledger/*/zarr.json"))
    return {p.name: np.asarray(zarr.open_array(str(p), mode="r")[:]) for p in found}


def listed(image: Path) -> list[str]:
    try:
        document = json.loads((image / "labels" / "zarr.json").read_text())
    except FileNotFoundError:
        return []
    names = document["attributes"].get("ome", {}).get("labels", [])
    assert isinstance(names, list)
    return names


class Watch:
    """Looks again and again, while a run goes on, that nothing is listed before it is complete."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.n_looks = 0
        self._wrong: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        assert self.n_looks > 3, "the run was too short to be watched"
        assert not self._wrong, self._wrong

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.n_looks += 1
            try:
                self._scene.check_unlisted()
            except Exception as error:
                # Of a thread; the test that goes on fails at its end.
                self._wrong.append(f"{type(error).__name__}: {error}")


def wait_for_blocks(faults: Faults, n: int, *, within_s: float = 60.0) -> None:
    """Return when the work on `n` blocks has begun."""
    wait_until(lambda: len(faults.computed()) >= n, within_s=within_s, what=f"{n} blocks at work")
