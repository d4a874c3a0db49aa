"""How the probabilities of a network become numbered objects: the rule, and changes to it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from bigseg.errors import UsageError
from bigseg.settings import Settings

Neighbours = Literal[4, 6, 8, 18, 26]
# How many neighbours a voxel has, and along how many axes at most they differ from it.
NEIGHBOURS: dict[int, dict[Neighbours, int]] = {2: {4: 1, 8: 2}, 3: {6: 1, 18: 2, 26: 3}}

Positive = Annotated[int, Field(ge=1)]


class InstanceRule(Settings):
    """How the probabilities of background, inside and border become numbered objects.

    threshold: seeds are where the inside is at least so probable.
    foreground: objects grow where everything but the background is at least so probable.
    erode: steps by which seeds shrink first, so that thin bridges between objects break.
    grow: steps by which they grow again within the foreground.
    min_size: voxels of the smallest seed that counts.
    connectivity: along how many axes neighbouring voxels of a seed may differ: 1 faces (4 in a
        plane, 6 in a volume), 2 edges (8, 18), 3 corners (26).
    link: planes that a 2-D network segments are joined along z, or frames along t, where their
        seeds overlap.
    fill_holes: background that one object encloses becomes part of it.

    A step is one voxel of the finest axis; coarser ones step less often.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    foreground: Annotated[float, Field(gt=0, le=1)] = 0.5
    erode: Annotated[int, Field(ge=0, le=64)] = 1
    grow: Annotated[int, Field(ge=0, le=64)] = 4
    min_size: Positive = 1
    connectivity: Literal[1, 2, 3] = 1
    link: Literal["z", "t"] | None = None
    fill_holes: bool = False

    @property
    def inside_at(self) -> int:
        """The smallest probability of the inside of a seed, in 255ths."""
        return math.ceil(255 * self.threshold - 1e-9)

    @property
    def foreground_at(self) -> int:
        """The smallest probability of all but the background of an object, in 255ths."""
        return math.ceil(255 * self.foreground - 1e-9)


class RuleOptions(Settings):
    """What of a rule a user says otherwise; None leaves it as it is.

    `neighbours` of a voxel give the rule's connectivity: 4 or 8 in planes, 6, 18 or 26 in volumes.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    foreground: Annotated[float, Field(gt=0, le=1)] | None = None
    erode: Annotated[int, Field(ge=0, le=64)] | None = None
    grow: Annotated[int, Field(ge=0, le=64)] | None = None
    min_size: Positive | None = None
    neighbours: Neighbours | None = None
    link: Literal["z", "t", "none"] | None = None
    fill_holes: bool | None = None

    def applied_to(self, rule: InstanceRule, dims: Literal[2, 3]) -> InstanceRule:
        """The rule with what is said here, for a network that sees planes (2) or volumes (3).

        Raises:
            UsageError: neighbours that are those of the other.
        """
        said = self.model_dump(exclude_none=True)
        if said.get("link") == "none":
            said["link"] = None
        if (n := said.pop("neighbours", None)) is not None:
            if n not in NEIGHBOURS[dims]:
                *others, last = map(str, NEIGHBOURS[dims])
                what = {2: "planes", 3: "volumes"}[dims]
                raise UsageError(
                    f"--connectivity {n}: the network sees {what}, where a voxel has "
                    f"{', '.join(others)} or {last} neighbours: choose one of those"
                )
            said["connectivity"] = NEIGHBOURS[dims][n]
        return rule.model_copy(update=said)


def n_neighbours(dims: int, connectivity: int) -> Neighbours:
    """How many neighbours a voxel has in planes (`dims` 2) or volumes (3)."""
    return max(n for n, axes in NEIGHBOURS[dims].items() if axes <= connectivity)
