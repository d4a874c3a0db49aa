"""What checking a result finds, as values, as JSON and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bigseg.blocks import Region

CheckName = Literal["metadata", "blocks", "pyramid", "seams"]

MOST_IN_TEXT = 20
MOST_IN_JSON = 1000

_UNITS: dict[CheckName, str] = {
    "metadata": "levels",
    "blocks": "blocks read again",
    "pyramid": "chunks made again",
    "seams": "places made again",
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and where: a stage, its block, a region (t, z, y, x) of its level.

    A seam lies in several blocks, so `block` is None there; metadata have no region.
    """

    stage: str
    block: int | None
    region: Region | None
    reason: str

    def __str__(self) -> str:
        where = " ".join(str(part) for part in (self.stage, self.region) if part)
        return f"{where}: {self.reason}" if where else self.reason

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON: stage, block, region, reason."""
        region = None if self.region is None else str(self.region)
        return {
            "stage": self.stage,
            "block": self.block,
            "region": region,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Check:
    """One check: how much was looked at, and what is wrong.

    `not_done` says why it could not be made, or not everywhere; `remark` what else is to be known.
    """

    name: CheckName
    n_checked: int
    findings: tuple[Finding, ...] = ()
    not_done: str = ""
    remark: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON: name, checked, wrong, findings (the first 1000), not_done, remark."""
        return {
            "name": self.name,
            "checked": self.n_checked,
            "wrong": len(self.findings),
            "findings": [finding.as_dict() for finding in self.findings[:MOST_IN_JSON]],
            "not_done": self.not_done,
            "remark": self.remark,
        }

    def as_lines(self) -> list[str]:
        """Lines for people."""
        verdict = f"{len(self.findings)} wrong" if self.findings else "nothing wrong"
        first = f"  {self.name:<9} {self.n_checked} {_UNITS[self.name]}, {verdict}"
        lines = [f"{first} ({self.remark})" if self.remark else first]
        lines += [f"    {finding}" for finding in self.findings[:MOST_IN_TEXT]]
        if len(self.findings) > MOST_IN_TEXT:
            lines.append(f"    and {len(self.findings) - MOST_IN_TEXT} more")
        return [*lines, f"    not checked: {self.not_done}"] if self.not_done else lines


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the checks in order, and the blocks that were taken back.

    `needs_network` says that those can only be made again by the network, over the whole volume.
    `made_at` is where the result was made, if it was moved since: then nothing is taken back.
    """

    url: str
    is_finished: bool
    n_blocks: int
    n_done: int
    checks: tuple[Check, ...]
    n_taken_back: int
    needs_network: bool = False
    made_at: str | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that is wrong."""
        return tuple(finding for check in self.checks for finding in check.findings)

    @property
    def is_right(self) -> bool:
        """Whether the result is finished, all checks were made, and nothing is wrong."""
        complete = self.is_finished and not any(check.not_done for check in self.checks)
        return complete and not self.findings

    @property
    def sentence(self) -> str:
        """What is the matter and what to do, empty where nothing is the matter."""
        if self.n_taken_back:
            return (
                f"{self.url} is wrong in {len(self.findings)} places, and {self.n_taken_back} "
                "blocks were taken back: the same `bigseg segment` command makes them again"
                + (_WITH_THE_NETWORK if self.needs_network else "")
            )
        if self.findings and self.made_at:
            return (
                f"{self.url} is wrong in {len(self.findings)} places, and nothing was taken back, "
                f"because `bigseg segment` goes on only where it was made, at {self.made_at}: move "
                "it back there, its image too, and verify it again"
            )
        if self.findings and all(finding.stage == "list" for finding in self.findings):
            return f"{self.findings[0].reason}: the same `bigseg segment` command mends it"
        if self.findings:
            return (
                f"{self.url} is not as bigseg wrote it ({self.findings[0]}): bring back what was "
                "changed, or start anew with `bigseg segment --overwrite`"
            )
        if not self.is_finished:
            return (
                f"{self.url} is not finished, {self.n_done} of {self.n_blocks} blocks are done and "
                "nothing is wrong with those: the same `bigseg segment` command goes on"
            )
        for check in self.checks:
            if check.not_done:
                return (
                    f"nothing wrong was found in {self.url}, but not all could be checked "
                    f"({check.name}: {check.not_done}): bring that back, or leave the check out "
                    f"with {_LEAVE_OUT.get(check.name, 'another option')}"
                )
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON; the keys stay as they are.

        url; right; finished; blocks and done (of all stages); taken_back (blocks); checks: a list
        of name, checked, wrong, findings (stage, block, region, reason), not_done, remark.
        """
        return {
            "url": self.url,
            "right": self.is_right,
            "finished": self.is_finished,
            "blocks": self.n_blocks,
            "done": self.n_done,
            "taken_back": self.n_taken_back,
            "checks": [check.as_dict() for check in self.checks],
        }

    def as_text(self) -> str:
        """Lines for people."""
        lines = [f"{self.url}: {self.n_done} of {self.n_blocks} blocks done"]
        lines += [line for check in self.checks for line in check.as_lines()]
        return "\n".join(lines)


_WITH_THE_NETWORK = (
    ", and with them all others, with the network over the whole volume, because the "
    "probabilities of its objects were not kept (--keep-probabilities)"
)
_LEAVE_OUT: dict[CheckName, str] = {"pyramid": "--chunks 0", "seams": "--seams 0"}
