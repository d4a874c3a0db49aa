"""What workers say of their blocks: small values that cross from process to process."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bigseg.errors import BigsegError, InputError, LockedError
from bigseg.patience import is_permanent, is_transient

if TYPE_CHECKING:
    from bigseg.blocks import Block
    from bigseg.pipeline import Outcome


@dataclass(frozen=True)
class Spent:
    """What a worker spent: seconds at work and waiting, and decoded bytes from the store.

    `busy_s` is the time in which the engine computed: on a GPU that of the device.
    """

    busy_s: float = 0.0
    wait_read_s: float = 0.0
    wait_write_s: float = 0.0
    idle_s: float = 0.0
    wall_s: float = 0.0
    bytes_fetched: int = 0
    bytes_written: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(self._values(), other._values(), strict=True)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the record."""
        return {key: round(value, 3) for key, value in vars(self).items()}

    def as_text(self) -> str:
        """How busy the engine was, and what it waited for."""
        if self.wall_s <= 0:
            return ""
        busy = f"busy {min(1.0, self.busy_s / self.wall_s):.0%}".replace("%", " %")
        waits = {
            "reading": self.wait_read_s,
            "writing": self.wait_write_s,
            "blocks": self.idle_s,
        }
        worst = max(waits, key=lambda name: waits[name])
        # A GPU computes on while its thread waits for what it has begun.
        if waits[worst] < 0.05 * self.wall_s or self.busy_s > 0.95 * self.wall_s:
            return busy
        return f"{busy}, waits for {worst}"

    def _values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class BlockReport:
    """What a worker says of a block: the mark of what it wrote, or why it could not.

    `kind` of an error: `input` is the same for every worker, `store` may pass but did not in time,
    `permanent` ends the run. `filled` are
    the chunks of the input for which it read fill values, because they cannot be decoded. `spent`
    is what the worker spent since it last said so, in some of its reports.
    """

    block: int
    checksum: int = 0
    error: str | None = None
    details: str | None = None
    kind: Literal["", "input", "store", "permanent"] = ""
    filled: tuple[str, ...] = ()
    spent: Spent | None = None


def report_of(outcome: Outcome[Block, int]) -> BlockReport:
    """The report of a block that left the pipeline."""
    if outcome.error is None:
        assert outcome.written is not None
        return BlockReport(outcome.item.index, checksum=outcome.written)
    error = outcome.error
    reason = str(error) if isinstance(error, BigsegError) else f"{type(error).__name__}: {error}"
    details = "".join(traceback.format_exception(error))
    return BlockReport(
        outcome.item.index,
        error=f"block {outcome.item.core}: {reason}",
        details=details,
        kind=_kind_of(error),
    )


def _kind_of(error: BaseException) -> Literal["", "input", "store", "permanent"]:
    if is_permanent(error) or isinstance(error, LockedError):
        return "permanent"
    if is_transient(error):
        return "store"
    return "input" if isinstance(error, InputError) else ""
