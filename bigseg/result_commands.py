"""The commands that look at a result, or change it: status, verify, objects, instances, clean."""

from __future__ import annotations

import sys
from typing import Any

import click

from bigseg.console import (
    Command,
    absolute,
    first_interrupt_asks,
    json_option,
    progress_bar,
    rule_of,
    rule_options,
    say,
    verbose_option,
    worker_options,
)
from bigseg.errors import IncompleteError, UsageError
from bigseg.guards import printable


@click.command(cls=Command)
@click.argument("url", metavar="OUT")
@json_option
@verbose_option
def status(url: str, as_json: bool) -> None:
    """How far a segmentation is: blocks, rate, time left, what failed, and how to go on.

    OUT is the result: IMAGE/labels/NAME, or what --out named. Nothing is written.

    \b
    Example:
      bigseg status image.zarr/labels/bigseg
    """  # noqa: D301
    from bigseg.status import read_status

    say(read_status(absolute(url)), as_json=as_json)


@click.command(cls=Command)
@click.argument("url", metavar="OUT")
@click.option("--seams", default=16, show_default=True, type=click.IntRange(min=0),
              help="Places across borders of blocks to compute again.")  # fmt: skip
@click.option("--chunks", default=64, show_default=True, type=click.IntRange(min=0),
              help="Chunks of the pyramid to compute again.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--transform", metavar="FILE.py:FUNCTION", help="The one of `segment`, if any.")
@json_option
@verbose_option
def verify(
    url: str, seams: int, chunks: int, seed: int, transform: str | None, as_json: bool
) -> None:
    """Read a result again, compute parts of it again, and take back what is wrong.

    The same `bigseg segment` command then makes again what was taken back.

    \b
    Example:
      bigseg verify image.zarr/labels/bigseg
    """  # noqa: D301
    from bigseg.transform import load_transform
    from bigseg.verify import verify as run

    with progress_bar() as progress:
        verification = run(
            absolute(url),
            n_seams=seams,
            n_chunks=chunks,
            seed=seed,
            transform=load_transform(transform) if transform else None,
            progress=progress,
        )
    say(verification, as_json=as_json)
    if not verification.is_right:
        raise IncompleteError(verification.sentence)


@click.command(cls=Command)
@click.argument("url", metavar="OUT")
@click.option("--yes", is_flag=True, help="Delete an unfinished result without asking.")
@verbose_option
def clean(url: str, yes: bool) -> None:
    """Remove what a run that was killed left: temporary files, its lock, an unfinished result.

    A finished result stays.

    \b
    Example:
      bigseg clean image.zarr/labels/bigseg
    """  # noqa: D301
    from bigseg.cleanup import find_leftovers, remove_leftovers

    found = find_leftovers(absolute(url))
    if found.deletes_result and not yes:
        if not can_answer():
            raise UsageError(f"{found.question} nobody can be asked here: say --yes to delete it")
        click.confirm(found.question, abort=True, err=True)
    if not found.is_nothing:
        remove_leftovers(found)
    click.echo(printable(found.as_text()))


def can_answer() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty()


@click.command(cls=Command)
@click.argument("url", metavar="OUT")
@click.option("--csv", "as_csv", is_flag=True, help="All rows, for other programs.")
@verbose_option
def objects(url: str, as_csv: bool) -> None:
    """The table of objects of a result: size, place, intensity, whether they touch the border.

    The same table is OUT/objects.parquet.

    \b
    Examples:
      bigseg objects image.zarr/labels/bigseg
      bigseg objects image.zarr/labels/bigseg --csv > objects.csv
    """  # noqa: D301
    from bigseg.table import objects_url, preview, write_csv

    table = objects_url(absolute(url))
    if as_csv:
        write_csv(table, sys.stdout)
    else:
        click.echo(preview(table))


@click.command(cls=Command)
@click.argument("url", metavar="OUT")
@rule_options
@worker_options
@verbose_option
def instances(url: str, **options: Any) -> None:  # noqa: ANN401 - each is a key of some settings
    """Make the objects of a result again by another rule, without the network.

    The result must have been made with --keep-probabilities. What is not said stays as it was.

    \b
    Example:
      bigseg instances image.zarr/labels/bigseg --threshold 0.7 --grow 6
    """  # noqa: D301
    from bigseg.account import conclusion
    from bigseg.rerun import remake_instances

    with progress_bar() as progress:
        result = remake_instances(
            absolute(url),
            rule_of(options),
            workers=options["workers"],
            executor=options["executor"],
            address=options["address"],
            progress=progress,
            stopping=first_interrupt_asks,
        )
    for line in conclusion(result):
        click.echo(printable(line))
