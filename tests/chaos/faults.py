"""The test's side of the injector: what is to break, and what was reached."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

PLANTED = Path(__file__).parent / "planted"


@dataclass(frozen=True)
class Fault:
    """What happens where a point is reached with something that matches `at`.

    `kill`, `stop` (SIGSTOP), `sleep` for `value` seconds, or an OSError with the number `value`.
    The first `skip` times pass. `whose` says who suffers: `all`, `one` (the first to come), or
    `others` (all but the first).
    """

    point: str
    action: str
    at: str = ""
    value: float = 0.0
    skip: int = 0
    times: int = 1
    whose: Literal["all", "one", "others"] = "all"


ALWAYS = 1_000_000


def pace(block_s: float) -> Fault:
    """So many seconds more for every block: quick runs have no middle."""
    return Fault("before-work", "sleep", value=block_s, times=ALWAYS)


def is_pace(fault: dict[str, Any]) -> bool:
    return fault["action"] == "sleep"


SLOWLY = pace(0.06)


class Reached(NamedTuple):
    pid: int
    point: str
    what: str


class Faults:
    """The folder that the injector in other processes reads, and where it notes what it met."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.folder = folder
        # Paths of Ray's sockets must stay short.
        self.ray_folder = ray_folder
        self.plan()

    def plan(self, *faults: Fault, **constants: dict[str, Any]) -> None:
        """Begin anew with these; `constants` as segment={"NAME": value} for bigseg.segment."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "hits").mkdir(parents=True)
        self.change(*faults, **constants)

    def change(self, *faults: Fault, **constants: dict[str, Any]) -> None:
        """Other faults from now on; what was reached stays noted."""
        plan = {
            "faults": [{"id": f"{f.action}-{i}", **asdict(f)} for i, f in enumerate(faults)],
            "constants": {f"bigseg.{name}": values for name, values in constants.items()},
        }
        new = self.folder / f"plan-{time.monotonic_ns()}"
        new.write_text(json.dumps(plan))
        os.replace(new, self.folder / "plan.json")

    def forget(self) -> None:
        """No faults, and nothing noted."""
        self.plan()

    @property
    def log(self) -> list[Reached]:
        """The points that were reached, in order."""
        try:
            lines = (self.folder / "log").read_text().splitlines()
        except FileNotFoundError:
            return []
        parts = (line.split(" ", 2) for line in lines)
        return [Reached(int(pid), point, what) for pid, point, what in parts]

    def at(self, point: str) -> list[Reached]:
        """The times that one point was reached."""
        return [line for line in self.log if line.point == point]

    def computed(self) -> Counter[str]:
        """How often the work on each block was begun, by `stage number`."""
        return Counter(line.what for line in self.at("before-work"))

    def pids_at_work(self) -> list[int]:
        """The processes that have worked on blocks, in the order in which they came."""
        return list(dict.fromkeys(line.pid for line in self.at("before-work")))

    def have_all_struck(self) -> bool:
        """Whether each fault of the plan, but for the pace, has been suffered at least once."""
        faults = json.loads((self.folder / "plan.json").read_text())["faults"]
        hits = [self.folder / "hits" / f"{f['id']}.{f['skip']}" for f in faults if not is_pace(f)]
        return all(hit.is_symlink() for hit in hits)

    def suffered(self, action: str) -> list[int]:
        """The pids of those that met faults of this kind, those that were skipped among them."""
        links = sorted((self.folder / "hits").glob(f"{action}-*.[0-9]*"))
        return [int(os.readlink(link)) for link in links]

    def environment(self) -> dict[str, str]:
        """What a process needs that is to be broken."""
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        return {
            **inherited,
            "BIGSEG_CHAOS": str(self.folder),
            "PYTHONPATH": str(PLANTED),
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def wait_until(is_true: Callable[[], object], *, within_s: float, what: str) -> None:
    """Return as soon as something holds; fails when it does not in time."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.02)
