"""How far a segmentation is, read from what lies on disk: its ledger and its lock.

It reads only, holds no lock, and may be asked while a run writes: each file is whole at any moment.
It knows the stored plan as plain values, so that it answers at once, and for results of other
versions of bigseg too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigseg import layout, store
from bigseg.errors import NotOmeZarrError
from bigseg.ledger import Ledger
from bigseg.lock import read_lock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bigseg.lock import LockState

State = Literal["finished", "running", "abandoned", "unfinished"]

MAX_LISTED = 20
PREDICT = "predict"

_WORDS: dict[State, str] = {
    "finished": "finished",
    "running": "a run is at work",
    "abandoned": "abandoned: the run on it ended without finishing",
    "unfinished": "not finished, and no run is at work",
}


@dataclass(frozen=True)
class StageStatus:
    """The blocks of one stage: all, those done, of which empty, and those that were set aside."""

    name: str
    n_blocks: int
    n_done: int
    n_empty: int
    n_failed: int

    @property
    def n_left(self) -> int:
        """Blocks that are not done, those that were set aside among them."""
        return self.n_blocks - self.n_done

    def as_text(self) -> str:
        """A line for people."""
        parts = [f"{self.n_done} of {self.n_blocks} blocks done"]
        if self.n_empty:
            parts.append(f"{self.n_empty} of them empty")
        if self.n_failed:
            parts.append(f"{self.n_failed} set aside")
        if self.n_left:
            parts.append(f"{self.n_left} left")
        return f"  {self.name:<10} {', '.join(parts)}"


@dataclass(frozen=True)
class Owner:
    """Whose run holds the lock, or held it when it died."""

    host: str
    pid: int
    age_s: float
    is_alive: bool


@dataclass(frozen=True)
class Status:
    """A snapshot of a result.

    The last is `list`, where labels lie beside their image: one step, done when the image names
    them. `blocks_per_s`, `mvox_per_s` and `left_s` are of the stage at work, and None where no run
    lives or nothing is known yet. `plan` is the plan as it was stored, empty where a run was cut
    off before there was one.
    """

    url: str
    state: State
    stages: tuple[StageStatus, ...]
    failures: tuple[str, ...]
    n_failures: int
    filled: tuple[str, ...]
    owner: Owner | None
    blocks_per_s: float | None
    mvox_per_s: float | None
    left_s: float | None
    plan: Mapping[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether all is done and noted."""
        return self.state == "finished"

    @property
    def n_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(s.n_blocks for s in self.stages if s.name != "list")

    @property
    def n_done(self) -> int:
        """Blocks of all stages that are done."""
        return sum(s.n_done for s in self.stages if s.name != "list")

    @property
    def way_on(self) -> str:
        """What to do next."""
        if self.state == "finished":
            return "nothing is left to do; `bigseg verify` checks what was written"
        if self.state == "running":
            return "wait for its end; after an interruption the same command goes on"
        command = "the same `bigseg segment` command"
        if self.plan:
            command = f"`{_command(self.plan)}` with the options of the first call"
        return f"{command} goes on from here; `bigseg clean` removes it"

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON; the keys stay as they are.

        url; state (finished, running, abandoned or unfinished); image, model, engine and output
        (labels, probabilities or instances; each null where no plan was stored); stages: a list of
        name, blocks, done, empty, failed, left; failures (reasons, the first 20) and failed (how
        many); filled (chunks of the image that could not be decoded); owner: null, or host, pid,
        age_s, alive; blocks_per_s, mvox_per_s, left_s (or null); way_on.
        """
        return {
            "url": self.url,
            "state": self.state,
            "image": _at(self.plan, "source", "url"),
            "model": _at(self.plan, "model", "url"),
            "engine": _engine(self.plan),
            "output": _at(self.plan, "output", "kind"),
            "stages": [
                {
                    "name": s.name,
                    "blocks": s.n_blocks,
                    "done": s.n_done,
                    "empty": s.n_empty,
                    "failed": s.n_failed,
                    "left": s.n_left,
                }
                for s in self.stages
            ],
            "failures": list(self.failures),
            "failed": self.n_failures,
            "filled": list(self.filled),
            "owner": self.owner
            and {
                "host": self.owner.host,
                "pid": self.owner.pid,
                "age_s": round(self.owner.age_s, 1),
                "alive": self.owner.is_alive,
            },
            "blocks_per_s": self.blocks_per_s,
            "mvox_per_s": self.mvox_per_s,
            "left_s": self.left_s,
            "way_on": self.way_on,
        }

    def as_text(self) -> str:
        """Lines for people."""
        lines = [f"{self.url}: {_WORDS[self.state]}"]
        if self.owner is not None:
            lines.append(
                f"  run        on {self.owner.host}, process {self.owner.pid}, last sign of life "
                f"{max(0.0, self.owner.age_s):.0f} s ago"
            )
        if self.plan:
            lines += [
                f"  image      {_at(self.plan, 'source', 'url')}",
                f"  model      {_at(self.plan, 'model', 'url')}",
                f"  engine     {_engine(self.plan)}",
            ]
        lines += [stage.as_text() for stage in self.stages]
        if self.state == "running":
            lines.append(f"  rate       {self._rate_text()}")
        lines += [f"  set aside  {reason}" for reason in self.failures]
        if self.n_failures > len(self.failures):
            lines.append(f"  set aside  and {self.n_failures - len(self.failures)} more")
        if self.filled:
            lines.append(
                f"  filled     {len(self.filled)} chunks of the image could not be decoded, such "
                f"as {self.filled[0]}"
            )
        return "\n".join([*lines, f"  next       {self.way_on}"])

    def _rate_text(self) -> str:
        parts = []
        if self.mvox_per_s is not None:
            parts.append(f"{self.mvox_per_s:.3g} Mvox/s")
        if self.blocks_per_s is not None:
            parts.append(f"{self.blocks_per_s:.3g} blocks/s")
        if self.left_s is not None:
            minutes, seconds = divmod(round(self.left_s), 60)
            parts.append(f"this stage is done in {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        return ", ".join(parts) or "not known yet"


def read_status(url: str) -> Status:
    """How far the result at `url` is.

    Raises:
        InputNotFoundError: there is nothing.
        NotOmeZarrError: `bigseg segment` did not make what is there, or its ledger is damaged.
    """
    url = url.rstrip("/") or url
    ledger = open_result(url)
    lock = read_lock(url)
    plan = ledger.plan if ledger else {}
    stages = _stages(url, ledger, lock) if ledger else ()
    failures = ledger.failures if ledger else {}
    is_finished = ledger is not None and ledger.is_finished and not any(s.n_left for s in stages)
    blocks_per_s, mvox_per_s, left_s = _pace(stages, plan, lock)
    return Status(
        url=url,
        state=_state(lock, is_finished=is_finished),
        stages=stages,
        failures=tuple(failures[key] for key in sorted(failures)[:MAX_LISTED]),
        n_failures=len(failures),
        filled=tuple(ledger.filled) if ledger else (),
        owner=None if lock is None else Owner(lock.host, lock.pid, lock.age_s, lock.is_alive),
        blocks_per_s=blocks_per_s,
        mvox_per_s=mvox_per_s,
        left_s=left_s,
        plan=plan,
    )


def open_result(url: str) -> Ledger | None:
    """The ledger of a result, to be read; None where a run was cut off before there was one.

    Raises:
        InputNotFoundError: there is nothing.
        NotOmeZarrError: `bigseg segment` did not make what is there, or its ledger is damaged.
    """
    provenance = store.open_group(url, mode="r").attrs.get(layout.PROVENANCE)
    if not isinstance(provenance, dict) or "fingerprint" not in provenance:
        names = layout.listed_labels(url)
        hint = f"{url}/labels/{names[0]}" if names else "IMAGE/labels/NAME, or what --out named"
        raise NotOmeZarrError(f"{url} was not made by `bigseg segment`: give its result, {hint}")
    ledger = Ledger.open(store.join(url, "ledger"), read_only=True)
    if ledger is None:
        return None
    try:
        for stage in ledger.stages:
            ledger.n_done(stage)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise NotOmeZarrError(
            f"the ledger of {url} is damaged ({' '.join(str(error).split())[:200]}): what is done "
            "is not known; start anew with --overwrite"
        ) from None
    return ledger


def image_of(url: str) -> str | None:
    """The image beside which a result lies, IMAGE of IMAGE/labels/NAME; None elsewhere."""
    labels = store.parent(url)
    return store.parent(labels) if store.name_of(labels) == "labels" else None


def _state(lock: LockState | None, *, is_finished: bool) -> State:
    if lock is not None and lock.is_alive:
        return "running"
    if is_finished:
        return "finished"
    return "unfinished" if lock is None else "abandoned"


def _stages(url: str, ledger: Ledger, lock: LockState | None) -> tuple[StageStatus, ...]:
    failed = [stage for stage, _ in ledger.failures]
    stages = [
        StageStatus(
            name,
            n_blocks,
            # A living run says more often how far it is than it writes its ledger.
            max(ledger.n_done(name), _noted(lock, name)),
            ledger.n_empty(name),
            failed.count(name),
        )
        for name, n_blocks in ledger.stages.items()
    ]
    image = image_of(url)
    if image is not None and _at(ledger.plan, "output", "beside"):
        is_listed = store.name_of(url) in layout.listed_labels(image)
        stages.append(StageStatus("list", 1, int(is_listed), 0, 0))
    return tuple(stages)


def _noted(lock: LockState | None, stage: str) -> int:
    """How many blocks of a stage a living run says to be done."""
    if lock is None or not lock.is_alive or lock.notes.get("stage") != stage:
        return 0
    n_done = lock.notes.get("n_done")
    return n_done if isinstance(n_done, int) else 0


def _pace(
    stages: tuple[StageStatus, ...], plan: Mapping[str, Any], lock: LockState | None
) -> tuple[float | None, float | None, float | None]:
    """Blocks and million voxels a second, and seconds left, of the stage at work."""
    if lock is None or not lock.is_alive:
        return None, None, None
    mvox_per_s, blocks_per_s = (
        _positive(lock.notes.get(key)) for key in ("mvox_per_s", "blocks_per_s")
    )
    stage = next((s for s in stages if s.name == lock.notes.get("stage")), None)
    if stage is None:
        return None, mvox_per_s, None
    if blocks_per_s is None and mvox_per_s is not None and stage.name == PREDICT:
        blocks_per_s = mvox_per_s * 1e6 * stage.n_blocks / max(1, _region_voxels(plan))
    left_s = None if blocks_per_s is None else stage.n_left / blocks_per_s
    return _rounded(blocks_per_s), mvox_per_s, _rounded(left_s)


def _region_voxels(plan: Mapping[str, Any]) -> int:
    ends = zip(plan.get("region_start", ()), plan.get("region_stop", ()), strict=True)
    return math.prod(b - a for a, b in ends)


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _at(plan: Mapping[str, Any], *keys: str) -> Any:  # noqa: ANN401
    """A value of the stored plan, None where it has none."""
    value: Any = plan
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _engine(plan: Mapping[str, Any]) -> str | None:
    if not isinstance(plan.get("engine"), dict):
        return None
    name, version, device, precision = (
        _at(plan, "engine", key) for key in ("name", "version", "device", "precision")
    )
    return f"{name} {version} on {device} in {precision}"


def _command(plan: Mapping[str, Any]) -> str:
    where = f"--out {_at(plan, 'output', 'url')}"
    if _at(plan, "output", "beside"):
        where = f"--name {_at(plan, 'output', 'name')}"
    source, model = _at(plan, "source", "url"), _at(plan, "model", "url")
    return f"bigseg segment {source} --model {model} {where}"
