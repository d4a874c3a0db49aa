"""Hostile inputs for a while.

    python benchmarks/fuzz.py --seconds 300 [--only metadata]

The inputs and what they are given to are those of tests/test_fuzz.py. Prints a line for each target
and every finding with the input that found it; exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import reprlib
import resource
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fuzzing import NAMES, Target, Targets

ROUND = 400


def fuzz(target: Target, seconds: float, first_seed: int) -> tuple[int, int, dict[str, str]]:
    """Cases, those that were taken, and findings by place: the first input of each."""
    end_s = time.monotonic() + seconds
    n_cases = n_taken = 0
    findings: dict[str, str] = {}

    def attack(value: object) -> None:
        nonlocal n_cases, n_taken
        if time.monotonic() > end_s:
            return
        n_cases += 1
        try:
            n_taken += target.attack(value)
        except Exception as error:  # what a fuzzer is for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "bigseg/" in f.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {type(error).__name__}"
            findings.setdefault(place, f"{str(error)[:200]}\n      {reprlib.repr(value)}")

    while time.monotonic() < end_s:
        options = settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(first_seed)(options(given(target.inputs)(attack)))()
        first_seed += 1
    return n_cases, n_taken, findings


def main() -> int:
    """Fuzz every target for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=NAMES, action="append")
    asked = parser.parse_args()
    names = asked.only or NAMES
    n_findings = 0
    reprlib.aRepr.maxlevel, reprlib.aRepr.maxstring, reprlib.aRepr.maxother = 8, 200, 200
    with Targets() as targets:
        for name in names:
            began = time.monotonic()
            n, taken, findings = fuzz(targets[name], asked.seconds / len(names), asked.seed)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(
                f"{name:10s} {n:7d} cases in {time.monotonic() - began:5.0f} s, {taken} taken, "
                f"{len(findings)} findings, peak memory {peak} MiB",
                flush=True,
            )
            for place, what in findings.items():
                print(f"  {place}: {what}", flush=True)
            n_findings += len(findings)
    return 1 if n_findings else 0


if __name__ == "__main__":
    sys.exit(main())
