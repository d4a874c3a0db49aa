"""What the driver does between the stages of instances: numbers, arrays for them, and the table.

    components and pairs of all blocks ──> numbers 1..N of each block ──> arrays of the type for N
    pieces of background and pairs     ──> what becomes of each block's pieces
    sums of all blocks                 ──> the table of objects

Each of these is one block of a stage of its own: cut short, it is done again from its beginning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bigseg import layout, scratch, stitch
from bigseg.grow_stages import pack_numbers
from bigseg.joining import Tables
from bigseg.ledger import checksum_of
from bigseg.objects import ObjectSums
from bigseg.packing import pack, unpack
from bigseg.plan import CLOSE, HOLES, NUMBER, OBJECTS, SEEDS, Plan, output_spec, smallest_type
from bigseg.scratch import BlockFiles
from bigseg.seed_stages import ComponentFiles
from bigseg.table import TableSpec, objects_url, write_table
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

COUNT = "count"


def carry_out_alone(plan: Plan, stage: str, guard: Callable[[], None]) -> int:
    """Do one of the stages `plan.ALONE`; gives its mark. `guard` is called before each write.

    Raises:
        OutputError: what blocks have left is gone or damaged, or something cannot be written.
    """
    if stage == NUMBER:
        return _number(plan, guard)
    if stage == CLOSE:
        stitch.fill(_tables(plan, HOLES), _writer(plan, CLOSE, guard))
        return 1
    assert stage == OBJECTS
    guard()
    return _write_table(plan)


def read_count(plan: Plan) -> int:
    """The number of objects, once they have been numbered.

    Raises:
        OutputError: the file that says it is gone or damaged.
    """
    files = BlockFiles.of(plan, COUNT)
    return int(files.load(0, lambda data: unpack(data, COUNT, most_bytes=8))[COUNT][0])


def _number(plan: Plan, guard: Callable[[], None]) -> int:
    assert plan.instances is not None
    rule = plan.instances.rule
    n = stitch.number(
        _tables(plan, SEEDS),
        _writer(plan, NUMBER, guard),
        min_size=rule.min_size,
    )
    guard()
    data = pack(COUNT, {COUNT: np.array([n], np.uint64)})
    BlockFiles.of(plan, COUNT).write(0, data)
    dtype = str(smallest_type(n))
    if rule.fill_holes:
        scratch.create_array(plan, scratch.array_url(plan, scratch.GROWN), dtype)
        scratch.create_array(plan, scratch.array_url(plan, scratch.GAPS), "uint32")
    _create_output(plan, dtype)
    return checksum_of(data)


def _create_output(plan: Plan, dtype: str) -> None:
    source = open_volume(plan.source.url, level=plan.source.level)
    spec = output_spec(plan, dtype)
    volumes = [source.at(level) for level in range(source.level, source.n_levels)]
    ms = layout.output_multiscale(
        source.multiscale, spec, name=plan.output.name, first_level=source.level
    )
    beside = layout.path_to_image(source.url, plan.output.url)
    layout.complete_image(plan.output.url, ms, [v.shape for v in volumes], spec, source=beside)


def _tables(plan: Plan, kind: str) -> Tables:
    files = ComponentFiles(plan, kind)
    return Tables(plan.clipped_grid, plan.source.shape, files.read_table, files.read_pairs)


def _writer(
    plan: Plan, kind: str, guard: Callable[[], None]
) -> Callable[[int, NDArray[np.uint64]], None]:
    files = BlockFiles.of(plan, kind)

    def write(block: int, numbers: NDArray[np.uint64]) -> None:
        guard()
        files.write(block, pack_numbers(numbers))

    return write


def _write_table(plan: Plan) -> int:
    source = open_volume(plan.source.url, level=plan.source.level)
    files, n = BlockFiles.of(plan, OBJECTS), read_count(plan)
    spec = TableSpec.of(
        source.multiscale,
        source.level,
        region=plan.region,
        n_times=source.shape[0],
        channels=source.channel_names,
    )
    write_table(
        objects_url(plan.output.url),
        lambda block: files.load(block, ObjectSums.from_bytes),
        n_blocks=len(plan.grid),
        n_objects=n,
        spec=spec,
    )
    return 1
