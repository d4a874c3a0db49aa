"""Names of units: those of the OME-Zarr specification, and those that writers use instead."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bigseg.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

# The length units of the specification (UDUNITS-2 names), in micrometer.
UNIT_TO_UM = {
    "yoctometer": 1e-18,
    "zeptometer": 1e-15,
    "attometer": 1e-12,
    "femtometer": 1e-9,
    "picometer": 1e-6,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "inch": 25_400.0,
    "decimeter": 1e5,
    "foot": 304_800.0,
    "yard": 914_400.0,
    "meter": 1e6,
    "decameter": 1e7,
    "hectometer": 1e8,
    "kilometer": 1e9,
    "mile": 1_609_344_000.0,
    "megameter": 1e12,
    "gigameter": 1e15,
    "terameter": 1e18,
    "petameter": 1e21,
    "exameter": 1e24,
    "parsec": 3.085_677_581_491_367e22,
    "zettameter": 1e27,
    "yottameter": 1e30,
}
# Names that writers use and the specification does not allow; they are understood, never written.
ALIASES = {
    "um": "micrometer",
    "µm": "micrometer",  # micro sign
    "μm": "micrometer",  # Greek mu
    "micron": "micrometer",
    "microns": "micrometer",
    "micrometre": "micrometer",
    "nm": "nanometer",
    "nanometre": "nanometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "pm": "picometer",
    "ångström": "angstrom",
    "s": "second",
    "sec": "second",
    "ms": "millisecond",
    "min": "minute",
    "h": "hour",
}


def canonical_unit(unit: str | None) -> str | None:
    """The specification's name for a unit where one is known, else the unit as it was."""
    if unit is None:
        return None
    singular = unit[:-1] if unit.endswith("s") and len(unit) > 3 else unit
    return next((ALIASES[u] for u in (unit, singular) if u in ALIASES), singular)


def nearest_size(
    sizes: Sequence[Sequence[float]], wanted: Sequence[float], *, tolerance: float, where: str
) -> int:
    """Index of the entry of `sizes` that is nearest to `wanted`, by the largest ratio of any axis.

    Entries with more axes than `wanted` are compared by their last ones (a 2-D model in a volume).

    Raises:
        InputError: entries have fewer axes, or the nearest is more than `tolerance` times off.
    """
    n = len(wanted)
    if any(len(size) < n for size in sizes):
        raise InputError(f"{where} has fewer spatial axes than the model's {n}: use a 2-D model")
    ratios = [
        max(max(a / b, b / a) for a, b in zip(size[-n:], wanted, strict=True)) for size in sizes
    ]
    best = min(range(len(ratios)), key=lambda i: ratios[i])
    if ratios[best] > tolerance * (1 + 1e-9):
        there = "; ".join(f"level {i}: {format_um(size)}" for i, size in enumerate(sizes))
        raise InputError(
            f"no level of {where} has voxels within a factor {tolerance:g} of the model's "
            f"{format_um(wanted)} ({there}): choose one with `--level`, or resample the image"
        )
    return best


def format_um(sizes: Sequence[float]) -> str:
    """Voxel sizes for a message: '0.5×0.1×0.1 µm'."""
    return "×".join(f"{s:.4g}" for s in sizes) + " µm"


def format_bytes(n: float) -> str:
    """Bytes for a message: '6.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"


def parse_bytes(text: str) -> int:
    """The bytes that '6GiB', '6.5G', '512 MB' or a plain number mean.

    K, M, G and T with or without 'iB' count in 1024s, with 'B' alone in 1000s.

    Raises:
        UsageError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB|B)?|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no size of memory: write it as 6GiB or 500MiB")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    if len(number) > 30:
        raise UsageError(f"{text[:30]!r}... is more memory than there is: write it as 6GiB")
    return int(float(number) * base**power)
