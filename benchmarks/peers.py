"""bigseg beside its peers, and against its own raw forward: ratios, measured in turns.

    python benchmarks/peers.py --peer-python PEERS/bin/python            all figures
    python benchmarks/peers.py --peer-python PEERS/bin/python b c        some of them
    python benchmarks/peers.py --quick --peer-python PEERS/bin/python    do the scripts still run?

    a  efficiency: the raw forward of all tiles / the wall time from Zarr to Zarr
    b  MONAI SlidingWindowInferer, volume and labels in memory
    c  torch-em predict_with_halo_pipelined, the same Zarr in, Zarr out
    d  dask.array.map_overlap around our forward, Zarr in, Zarr out
    g  two workers of one thread against one
    h  what scheduling costs the driver

Every measurement is a process of its own; contestants take turns (A B C A B C ...), medians are
shown with the smallest and the largest. Ours is `bigseg segment` on a private Ray, from start to
exit, for three volumes in a row and for nine: a sixth of the difference is what a volume costs once
the workers are warm, and the rest is shown as the start. Peers are timed around their call only:
imports, loading, compiling and one warm-up are free for them. Where a peer is exact, its labels
must be ours away from the borders of the volume, or the run fails. How to make the peers'
environment: requirements-peers.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr
from bench import (
    EARNEST,
    HERE,
    QUICK,
    SHORT_RESULT,
    Bench,
    Ours,
    Row,
    finish,
    last_json,
    machine,
    spread,
    start,
)
from own_figures import Raw, Scaling, efficiency, scheduling
from setting import halo_of, read_network, write_network, write_volume

from bigseg.engine import available_cpus

if TYPE_CHECKING:
    from collections.abc import Sequence

FIGURES = "abcdgh"
MOST_DIFFERENT = 1e-3


@dataclass(frozen=True)
class Contestant:
    """A peer in one configuration; `exact` says that its labels must be ours."""

    figure: str
    name: str
    script: str
    arguments: tuple[str, ...]
    sides: tuple[int, ...]
    exact: bool


def main() -> None:
    """Measure, print, write."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.scratch) as scratch:
        bench = make_bench(options, Path(scratch))
        result: dict[str, Any] = {"machine": machine(bench)}
        print(json.dumps(result["machine"]), flush=True)
        if set("abcdg") & set(options.figures):
            result |= rounds(bench, options.figures, options.block)
        if "h" in options.figures:
            result["h"] = scheduling(bench)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_bench(options: argparse.Namespace, folder: Path) -> Bench:
    """The network is written, and who works with how many threads is settled."""
    size = QUICK if options.quick else EARNEST
    write_network(folder, width=size.width, depth=size.depth)
    n_cpus = available_cpus()
    on_gpu = torch.cuda.is_available()
    default = 1 if on_gpu else n_cpus if n_cpus <= 4 else n_cpus // 4
    return Bench(
        folder=folder,
        peer_python=options.peer_python,
        size=size,
        repeats=1 if options.quick else options.repeats,
        n_cpus=n_cpus,
        n_workers=options.workers or default,
        tile=options.tile,
    )


def rounds(bench: Bench, figures: Sequence[str], block: int | None) -> dict[str, Any]:
    """Ours, our network alone, and every contestant in turn, some times over.

    `block` is the side of the blocks of those peers whose best one is searched otherwise.
    """
    image = write_volume(bench.folder, bench.size.shape)
    contestants = [c for c in all_contestants(bench) if c.figure in figures]
    chosen = [(c, best_side(bench, c, image, block)) for c in contestants]
    ours, network = Ours("bigseg segment"), Raw()
    scaling = Scaling(bench, ours) if "g" in figures and Scaling.is_possible(bench) else None
    rows = [Row(c.name, notes={"side": side}) for c, side in chosen]
    for number in range(bench.repeats):
        tile = ours.measure(bench, workers=bench.n_workers, tile=bench.tile)
        if "a" in figures:
            network.measure(bench)
        ours_labels = result_of(bench.folder / SHORT_RESULT)[: bench.size.shape[0]]
        for row, (contestant, side) in zip(rows, chosen, strict=True):
            figures_of = run_peer(bench, contestant, side, image)
            row.seconds.append(figures_of["seconds"])
            row.forward_s.append(figures_of["forward_s"])
            row.notes["n_forwards"] = figures_of["n_forwards"]
            row.notes["peak_gib"] = max(figures_of["peak_gib"], row.notes.get("peak_gib", 0))
            # A block that is the whole volume starts its poolings elsewhere: exact, and not ours.
            is_ours = contestant.exact and side < min(bench.size.shape)
            row.notes["different"] = check_labels(bench, contestant, ours_labels, is_ours=is_ours)
        if scaling is not None:
            scaling.measure(bench, tile)
        seconds = {"ours": ours, "raw": network.together, **{row.name: row for row in rows}}
        seconds |= {} if scaling is None else {"one worker": scaling.one}
        last = {name: round(of.seconds[-1], 2) for name, of in seconds.items() if of.seconds}
        print(f"  round {number + 1}: {json.dumps(last)}", flush=True)
    found: dict[str, Any] = {}
    if "a" in figures:
        found["a"] = efficiency(bench, ours, network)
    if scaling is not None:
        found["g"] = scaling.report()
    if rows:
        found["peers"] = peer_table(ours, rows, n_voxels=math.prod(bench.size.shape))
    return found


def all_contestants(bench: Bench) -> list[Contestant]:
    """The peers of the figures b, c and d."""
    size, halo = bench.size, halo_of(read_network(bench.folder))
    window, blocks = (size.window,), size.blocks
    monai, torch_em = "peer_monai.py", "peer_torch_em.py"
    shipped, ours = ("--engine", "shipped"), ("--engine", "ours")
    wide, exact = ("--halo", str(size.wide_halo)), ("--halo", str(halo))
    return [
        Contestant("b", "MONAI as shipped", monai, shipped, window, exact=False),
        Contestant("b", "MONAI, our engine", monai, ours, window, exact=False),
        Contestant(
            "c",
            f"torch-em as shipped, halo {size.wide_halo}",
            torch_em,
            shipped + wide,
            blocks,
            exact=False,
        ),
        Contestant(
            "c", f"torch-em as shipped, halo {halo}", torch_em, shipped + exact, blocks, exact=True
        ),
        Contestant("c", "torch-em, our engine", torch_em, ours, blocks, exact=True),
        Contestant("d", "dask map_overlap, our engine", "peer_dask.py", ours, blocks, exact=True),
    ]


def best_side(bench: Bench, contestant: Contestant, image: Path, known: int | None) -> int:
    """The block or window with which the peer is fastest, from one run of each unless known."""
    if len(contestant.sides) == 1:
        return contestant.sides[0]
    if known is not None:
        return known
    seconds = {}
    for side in contestant.sides:
        seconds[side] = run_peer(bench, contestant, side, image)["seconds"]
        print(f"  {contestant.name}: side {side}: {seconds[side]:.2f} s", flush=True)
    return min(seconds, key=lambda side: seconds[side])


def run_peer(bench: Bench, contestant: Contestant, side: int, image: Path) -> dict[str, Any]:
    """What the script of the peer reports."""
    command = [
        bench.peer_python,
        str(HERE / contestant.script),
        *bench.shared(image),
        *("--out", str(peer_out(bench, contestant))),
        *("--threads", str(bench.n_cpus)),
        *("--side", str(side)),
        *contestant.arguments,
    ]
    return last_json(finish(start(command), command))


def peer_out(bench: Bench, contestant: Contestant) -> Path:
    """Where the peer puts its labels."""
    return bench.folder / ("peer.npy" if contestant.figure == "b" else "peer.zarr")


def check_labels(bench: Bench, contestant: Contestant, ours: np.ndarray, *, is_ours: bool) -> float:
    """The share of voxels that differ, away from the borders, where peers extend otherwise."""
    path = peer_out(bench, contestant)
    theirs = np.load(path) if path.suffix == ".npy" else zarr.open_array(str(path), mode="r")[:]
    halo = halo_of(read_network(bench.folder))
    inner = (slice(halo, -halo),) * 3
    different = float(np.mean(theirs[inner] != ours[inner]))
    if is_ours and different > MOST_DIFFERENT:
        raise SystemExit(f"{contestant.name}: {different:.2%} of the voxels are not ours")
    return different


def result_of(out: Path) -> np.ndarray:
    """Our labels (z, y, x); both classes must be there, or comparing them says nothing."""
    group = zarr.open_group(str(out), mode="r")
    array = group["0"]
    assert isinstance(array, zarr.Array)
    labels = np.squeeze(np.asarray(array[:]))
    share = float(np.mean(labels == 1))
    assert 0.05 < share < 0.95, share
    return labels


def peer_table(ours: Ours, rows: Sequence[Row], *, n_voxels: int) -> list[dict[str, Any]]:
    """Print the rows as a table and give them as data."""
    net = statistics.median(ours.seconds)
    print(f"\nbigseg segment: {spread(ours)} s a volume, and {ours.start_s:.2f} s once")
    print(f"\n| {'contestant':34} | block | seconds (range) | its forward | R | not ours | GiB |")
    print("|---|---|---|---|---|---|---|")
    print(f"| bigseg, Zarr to Zarr on Ray | | {spread(ours)} | | 1 | | |")
    table: list[dict[str, Any]] = [
        {"name": ours.name, "short_s": ours.short, "longer_s": ours.longer, "net_s": net}
    ]
    for row in rows:
        note, ratio = row.notes, row.median / net
        forward_s = statistics.median(row.forward_s)
        print(
            f"| {row.name} | {note['side']} | {spread(row)} | {forward_s:.2f} | "
            f"{ratio:.2f} | {note['different']:.2%} | {note['peak_gib']} |"
        )
        measured = {"seconds": row.seconds, "forward_s": row.forward_s, "R": ratio}
        table.append({"name": row.name, **note, **measured})
    print(f"{n_voxels / net / 1e6:.2f} Mvox/s of ours", flush=True)
    return table


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", help="of a b c d g h; all by default")
    parser.add_argument("--peer-python", help="the peers' interpreter, for b, c and d")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="of ours; default as bigseg chooses")
    parser.add_argument("--block", type=int, help="best of the peers, from an earlier search")
    parser.add_argument("--tile", type=int, nargs=3, help="of ours (z y x); default as planned")
    parser.add_argument("--quick", action="store_true", help="tiny: only whether it runs")
    parser.add_argument("--scratch", type=Path, help="where the volumes lie while it runs")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    options = parser.parse_args()
    options.figures = options.figures or list(FIGURES)
    if unknown := set(options.figures) - set(FIGURES):
        parser.error(f"figures are {' '.join(FIGURES)}, not {' '.join(sorted(unknown))}")
    if set("bcd") & set(options.figures) and options.peer_python is None:
        parser.error("b, c and d need --peer-python: see requirements-peers.txt")
    return options


if __name__ == "__main__":
    main()
