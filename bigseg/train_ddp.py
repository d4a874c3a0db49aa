"""Training on every GPU of a cluster, or here: the launch of the loop with Ray Train.

    driver: recipe ──> Ray Train ──> N workers, each: the loop of training.py, gradients averaged
       │                                │ rank 0 writes journal, states, model
       └────── follows the journal <── RUN

A worker that dies takes the group with it; Ray starts a new one, which goes on from the last state
in RUN. Those states are bigseg's own: Ray's storage is a temporary folder, because Ray resumes any
run of the same name, whatever its settings.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from bigseg import store
from bigseg.cluster import connect, set_worker_threads
from bigseg.engine import pick_device
from bigseg.errors import (
    BigsegError,
    ConfigError,
    InputError,
    InputNotFoundError,
    ResourceError,
    UsageError,
)
from bigseg.lock import Lock, check_owner
from bigseg.progress import NullProgress
from bigseg.recipe import Recipe
from bigseg.runs import Journal, RunFiles, TrainResult, finished, open_run, stored_run
from bigseg.training import Runtime, latest_step, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigseg.cluster import Cluster
    from bigseg.config import TrainConfig
    from bigseg.engine import Device
    from bigseg.progress import Progress, Task

logger = logging.getLogger(__name__)

GPU_WORKER_CPUS = 4
FOLLOW_EVERY_S = 1.0
MAX_FAILURE_BYTES = 1 << 16


def train(
    config: TrainConfig,
    out: str,
    *,
    executor: Literal["ray", "serial"] = "ray",
    address: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    after_step: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train what `config` says into the folder `out`; the same call again goes on where it ended.

    `serial` runs one worker in this process, on its GPU or all its processors. `after_step` is
    called on every worker with its rank and the steps done; it must be picklable for Ray.

    Raises:
        ConfigError: settings that contradict each other, the images, or the run in `out`.
        InputError: images or labels that cannot be used, or training that diverges.
        ResourceError: no cluster, too few GPUs or processors, or workers that keep dying.
        OutputError: `out` cannot be written, or another run writes it.
    """
    stored = None if overwrite else stored_run(config, out)
    if stored is not None and (result := finished(stored, out)) is not None:
        logger.info("%s is finished: %d steps", out, result.steps)
        return result
    call = _Call(config, out, stored, overwrite, progress or NullProgress(), after_step or _nothing)
    with Lock.acquire(out) as lock:
        guard = partial(check_owner, out, lock.owner)
        if executor == "serial":
            first = _train_here(call, guard)
        else:
            first = _train_on_ray(call, address, guard)
        # Nobody writes there any more: what is left is of runs that were killed.
        store.sweep(out)
    recipe = stored_run(config, out)
    assert recipe is not None
    result = finished(recipe, out, first_step=first)
    assert result is not None
    return result


def _nothing(rank: int, step: int) -> None:
    pass


@dataclass(frozen=True)
class _Call:
    """What `train` was called with, and the run that is there already."""

    config: TrainConfig
    out: str
    stored: Recipe | None
    overwrite: bool
    progress: Progress
    after: Callable[[int, int], None]

    def recipe(self, device: Device) -> Recipe:
        """The stored recipe, or a new one for devices of this kind."""
        return self.stored or open_run(
            self.config, self.out, device=device, overwrite=self.overwrite
        )


def _train_here(call: _Call, guard: Callable[[], None]) -> int:
    if call.config.workers > 1:
        raise ConfigError(
            f"workers: {call.config.workers} with the serial executor, which has one: use the ray "
            "executor, or workers: 1"
        )
    device = pick_device()
    recipe = call.recipe("cuda" if device.type == "cuda" else "cpu")
    with ExitStack() as stack:
        bar = _Bar(call.progress, recipe.config.steps, stack)
        bar.show(latest_step(recipe, call.out))

        def after_step(step: int) -> None:
            bar.show(step)
            call.after(0, step)

        return run(recipe, call.out, Runtime(device, guard=guard), after_step=after_step)


class _Bar:
    """A progress task that begins with the first steps it is shown."""

    def __init__(self, progress: Progress, total: int, stack: ExitStack) -> None:
        self._progress, self._total, self._stack = progress, total, stack
        self._task: Task | None = None
        self._step = 0

    def show(self, step: int) -> None:
        """Show that `step` steps are done; what is done when it begins was done earlier."""
        if self._task is None:
            self._step = step
            self._task = self._stack.enter_context(
                self._progress.task("train", total=self._total, unit="steps", done=step)
            )
        if step > self._step:
            self._task.advance(step - self._step)
            self._step = step


# On Ray.


def _train_on_ray(call: _Call, address: str | None, guard: Callable[[], None]) -> int:
    with connect(address) as cluster:
        share = share_of(call.config.workers, cluster)
        recipe = call.recipe("cuda" if share.use_gpu else "cpu")
        files = RunFiles(call.out)
        first = latest_step(recipe, call.out)
        if store.exists(files.failure):
            store.write_atomic(files.failure, b"")
        with _following(files, call.progress, recipe.config.steps, first):
            _fit(recipe, call, share, guard)
        _raise_noted(files)
    return first


@dataclass(frozen=True)
class Share:
    """What each of `n_workers` gets: a GPU or not, and processors, which are its threads."""

    n_workers: int
    use_gpu: bool
    n_cpus: int


def share_of(n_workers: int, cluster: Cluster) -> Share:
    """One GPU a worker where the cluster has GPUs, else an equal part of the processors.

    Raises:
        ResourceError: there are fewer than workers: Ray would wait for them for ever.
    """
    use_gpu = cluster.n_gpus > 0
    n, kind = (cluster.n_gpus, "GPUs") if use_gpu else (cluster.n_cpus, "processors")
    if n_workers > n:
        raise ResourceError(
            f"{n_workers} workers need {n_workers} {kind}, the cluster has {n}: use --workers "
            f"{max(1, n)}, or a larger cluster"
        )
    cpus = cluster.cpus_a_worker(n_workers)
    return Share(n_workers, use_gpu, min(GPU_WORKER_CPUS, cpus) if use_gpu else cpus)


def _fit(recipe: Recipe, call: _Call, share: Share, guard: Callable[[], None]) -> None:
    """Run the workers to their end.

    Raises:
        ResourceError: they could not be started, or kept dying.
    """
    # Read by Ray's controller; a worker that is gone is noticed after two minutes, not ten.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")
    settings = {
        "recipe": recipe.model_dump(mode="json"),
        "out": call.out,
        "folder": os.getcwd(),
        "n_threads": share.n_cpus,
        "after": call.after,
        "guard": guard,
    }
    with tempfile.TemporaryDirectory(prefix="bigseg-train-", ignore_cleanup_errors=True) as folder:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=share.n_workers,
                use_gpu=share.use_gpu,
                resources_per_worker={"CPU": share.n_cpus, "GPU": int(share.use_gpu)},
            ),
            run_config=RunConfig(
                name=f"bigseg-{uuid.uuid4().hex[:12]}",
                storage_path=folder,
                # The types are those of Ray Train's first version (ray 2.60).
                failure_config=FailureConfig(max_failures=3, controller_failure_limit=2),  # type: ignore[call-arg]
            ),
        )
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise _cause(error.worker_failures) from error
        except ray.train.ControllerError as error:
            raise ResourceError(
                f"the training workers could not be started ({error.controller_failure}): check "
                "that the cluster has what they need with `ray status`"
            ) from error


def _cause(failures: dict[int, Exception]) -> BigsegError:
    """What the workers of a group that died again and again died of."""
    # Ray wraps what the loop raised; the original is reached by its private name only (2.60).
    causes = {rank: getattr(e, "_base_exc", e) for rank, e in failures.items()}
    for cause in causes.values():
        if isinstance(cause, BigsegError):
            return cause
    rank, cause = next(iter(causes.items()))
    reason = str(cause).strip().rpartition("\n")[2] or type(cause).__name__
    return ResourceError(
        f"the training workers died four times, last rank {rank} of {type(cause).__name__} "
        f"({reason}): free memory or look into Ray's logs; the same command goes on from the last "
        "state"
    )


def _worker(settings: dict[str, Any]) -> None:
    """One worker: the loop, between Ray's process group and the run folder."""
    if os.path.isdir(settings["folder"]):
        os.chdir(settings["folder"])  # Relative paths mean what they mean to the driver.
    files = RunFiles(settings["out"])
    if _noted(files) is not None:
        return  # Another attempt would end in the same way.
    set_worker_threads(settings["n_threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    runtime = Runtime(
        device=ray.train.torch.get_device(),
        rank=rank,
        n_ranks=context.get_world_size(),
        wrap=ray.train.torch.prepare_model,
        gather=_gather,
        guard=settings["guard"],
    )
    after: Callable[[int, int], None] = settings["after"]
    recipe = Recipe.model_validate(settings["recipe"])
    with _noting(files):
        run(recipe, files.url, runtime, after_step=lambda step: after(rank, step))


@contextmanager
def _noting(files: RunFiles) -> Iterator[None]:
    """Note an error that would come again, so that the next attempt ends at once."""
    try:
        yield
    except (InputError, UsageError) as error:
        note = {"type": type(error).__name__, "message": str(error)}
        store.write_atomic(files.failure, json.dumps(note).encode())
        raise


def _gather(number: int) -> list[int]:
    if not torch.distributed.is_initialized():
        return [number]
    mine = torch.tensor([number], device=ray.train.torch.get_device())
    every = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    return [int(n) for n in every]


def _noted(files: RunFiles) -> BigsegError | None:
    """The error that a worker noted because trying again is of no use."""
    try:
        text = store.read_bytes(files.failure, limit_bytes=MAX_FAILURE_BYTES)
    except InputNotFoundError:
        return None
    if not text:
        return None
    try:
        note = json.loads(text)
        kind: type[BigsegError] = {"ConfigError": ConfigError, "UsageError": UsageError}.get(
            note["type"], InputError
        )
        return kind(note["message"])
    except (ValueError, KeyError, TypeError):
        # Damaged: the next attempt meets the error again.
        return None


def _raise_noted(files: RunFiles) -> None:
    if (error := _noted(files)) is not None:
        store.write_atomic(files.failure, b"")
        raise error


@contextmanager
def _following(files: RunFiles, progress: Progress, total: int, first: int) -> Iterator[None]:
    """Show the steps that the journal reports while the body runs."""
    ended = threading.Event()

    def follow() -> None:
        with ExitStack() as stack:
            bar = _Bar(progress, total, stack)
            bar.show(first)
            while not ended.wait(FOLLOW_EVERY_S):
                _show_journal(files, bar)
            _show_journal(files, bar)

    thread = threading.Thread(target=follow, name="follow-journal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show_journal(files: RunFiles, bar: _Bar) -> None:
    try:
        lines = Journal.read(files.metrics)
    except InputError:  # A store that does not answer now may do so in a second.
        return
    if lines:
        bar.show(lines[-1]["step"])
