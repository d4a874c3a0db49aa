"""What all commands share: how a command ends, where progress goes, how options are read.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 unexpected; 2 wrong
usage; 3 the input cannot be used; 4 finished with blocks set aside; 5 resources; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from bigseg.errors import BigsegError, UsageError
from bigseg.guards import check_location, printable, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bigseg.config import SegmentConfig
    from bigseg.rules import RuleOptions


class Command(click.Command):
    """A command that ends with one sentence and an exit code where it cannot go on."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        """Run it; a traceback is shown with -v only."""
        verbose = bool(ctx.params.pop("verbose", False)) or ctx.find_root().params["verbose"]
        level = logging.INFO if verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        try:
            return super().invoke(ctx)
        except BigsegError as error:
            self._explain(str(error), verbose=verbose)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            way_on = ": the same command goes on from here"
            if ctx.params.get("overwrite"):
                way_on = ": the same command without --overwrite goes on from here"
            if self.name not in ("train", "segment", "instances"):
                way_on = ""
            click.echo(f"interrupted{way_on}", err=True)
            sys.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            sentence = without_secrets(f"unexpected {type(error).__name__}: {error}")
            self._explain(sentence, verbose=verbose)
            sys.exit(1)

    @staticmethod
    def _explain(sentence: str, *, verbose: bool) -> None:
        click.echo(f"error: {printable(sentence)}", err=True)
        if verbose:
            click.echo(printable(traceback.format_exc()), err=True)


class Group(click.Group):
    """The commands in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in order of definition."""
        del ctx
        return list(self.commands)


verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Say more, and show tracebacks."
)
executor_option = click.option(
    "--executor",
    type=click.Choice(["ray", "serial"]),
    default="ray",
    show_default=True,
    help="serial: in this process, on one GPU.",
)
address_option = click.option(
    "--address", metavar="ADDRESS", help="A running Ray cluster; default RAY_ADDRESS."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def progress_bar() -> Any:  # noqa: ANN401 - a context manager that gives a Progress
    """The display of progress on stderr."""
    from bigseg.progress import make_progress

    return make_progress(sys.stderr)


@contextmanager
def first_interrupt_asks() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second interrupts as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        del number, frame
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        # Not through Python's own buffers: the signal may have come in the midst of a write.
        os.write(2, b"\nstopping after the blocks in flight; once more stops at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def absolute(url: str) -> str:
    """The location as every worker of a cluster reads it, whatever its working directory.

    Raises:
        UsageError: it holds a password or the like, which nobody should read in a log.
    """
    check_location(url)
    return url if "://" in url or "::" in url else os.path.abspath(url)


def integers(text: str | None, option: str) -> tuple[int, ...] | None:
    """The integers of an option such as `--tile 64,256,256`."""
    return None if text is None else tuple(map(int, _parts(text, option, int)))


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """The numbers of an option such as `--voxel-size 0.5,0.1,0.1`."""
    return None if text is None else tuple(map(float, _parts(text, option, float)))


def _parts(text: str, option: str, kind: type[int] | type[float]) -> Sequence[str]:
    parts = text.split(",")
    try:
        for part in parts:
            kind(part)
    except ValueError:
        raise UsageError(
            f"{option} {text!r}: give numbers separated by commas, one for each axis"
        ) from None
    return parts


_WORKER_OPTIONS = (
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Default: one for each GPU, else as many as suit the processors.",
    ),
    executor_option,
    address_option,
)

# The settings of InstanceRule; what is left out is the model's.
_RULE_OPTIONS = (
    click.option(
        "--threshold", type=float, metavar="P", help="Seeds: inside at least so probable."
    ),
    click.option(
        "--foreground", type=float, metavar="P", help="Objects: not background so probably."
    ),
    click.option(
        "--erode", type=click.IntRange(min=0), metavar="STEPS", help="Shrink seeds first."
    ),
    click.option("--grow", type=click.IntRange(min=0), metavar="STEPS", help="Grow them again."),
    click.option("--min-size", type=click.IntRange(min=1), metavar="VOXELS", help="Smallest seed."),
    click.option(
        "--connectivity",
        type=click.Choice(["4", "8", "6", "18", "26"]),
        help="Neighbours of a seed's voxel: 4 or 8 in planes, 6, 18 or 26 in volumes.",
    ),
    click.option(
        "--link",
        type=click.Choice(["z", "t", "none"]),
        help="Join planes or frames where seeds overlap.",
    ),
    click.option(
        "--fill-holes/--no-fill-holes", default=None, help="Background inside an object is its own."
    ),
)

# The settings of SegmentConfig, the same for every command that makes a plan.
_SEGMENT_OPTIONS = (
    click.argument("image"),
    click.option(
        "--model", required=True, metavar="FILE", help="A model that `bigseg train` made."
    ),
    click.option("--name", default="bigseg", show_default=True, help="Name of the labels."),
    click.option("--out", metavar="OUT.zarr", help="A store of its own instead of IMAGE/labels."),
    click.option(
        "--output",
        type=click.Choice(["labels", "probabilities", "instances"]),
        help="Default: what the model was trained for, classes (labels) or instances.",
    ),
    click.option(
        "--keep-probabilities",
        is_flag=True,
        help="Of instances: let `bigseg instances` make them again by another rule.",
    ),
    click.option(
        "--prob-dtype",
        type=click.Choice(["uint8", "float16", "float32"]),
        default="uint8",
        show_default=True,
        help="Type of probabilities; of uint8 255 is 1.",
    ),
    click.option(
        "--level",
        type=click.IntRange(min=0),
        help="Pyramid level; default: the nearest to the model's voxel size.",
    ),
    click.option(
        "--channel",
        type=click.IntRange(min=0),
        multiple=True,
        help="May be repeated; default: those that the model learned from.",
    ),
    click.option("--time", type=click.IntRange(min=0), help="Time point; all by default."),
    click.option(
        "--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Background outside; context is read."
    ),
    click.option("--block", metavar="Z,Y,X", help="Core of a block, rounded up to whole tiles."),
    click.option(
        "--tile", metavar="Z,Y,X", help="One forward pass; default: the best for --memory."
    ),
    click.option(
        "--engine",
        type=click.Choice(["auto", "torch", "compiled", "openvino", "tensorrt"]),
        default="auto",
        show_default=True,
        help="What computes the network; auto: the fastest that is installed.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="auto: bf16 where the hardware has it, else fp32.",
    ),
    click.option(
        "--norm",
        type=click.Choice(["volume", "model"]),
        default="volume",
        show_default=True,
        help="Brightness: as measured on this volume, or as in the training images.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Of one worker, such as 6GiB; default: its share of the machine.",
    ),
    click.option(
        "--mask",
        metavar="IMAGE",
        help="Label or binary image of any resolution; background where it is 0.",
    ),
    click.option(
        "--skip-below",
        type=float,
        metavar="VALUE",
        help="Background where the intensity on --skip-level is below.",
    ),
    click.option("--skip-level", type=click.IntRange(min=0), help="Default: the coarsest level."),
    click.option(
        "--transform",
        metavar="FILE.py:FUNCTION",
        help="From Dask array to Dask array, before the network.",
    ),
    click.option(
        "--on-bad-chunk",
        type=click.Choice(["set-aside", "fill"]),
        default="set-aside",
        show_default=True,
        help="Chunks of IMAGE that cannot be decoded: leave out their blocks, or read fill values.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace a result that bigseg made."),
)


def segment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the image and all options of `segment`."""
    return _with((*_SEGMENT_OPTIONS, *_WORKER_OPTIONS, *_RULE_OPTIONS), command)


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where it works."""
    return _with(_WORKER_OPTIONS, command)


def rule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say how objects are made."""
    return _with(_RULE_OPTIONS, command)


def _with(options: Sequence[Any], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def rule_of(options: dict[str, Any]) -> RuleOptions:
    """What `rule_options` were given; they are taken out of `options`."""
    from bigseg.rules import RuleOptions
    from bigseg.settings import parse_settings

    neighbours = options.pop("connectivity")
    others = RuleOptions.model_fields.keys() - {"neighbours"}
    values = {key: options.pop(key) for key in others}
    values["neighbours"] = None if neighbours is None else int(neighbours)
    return parse_settings(RuleOptions, values, source="options")


def say(result: Any, *, as_json: bool) -> None:  # noqa: ANN401 - each says itself in both ways
    """Print a result, as JSON or as text."""
    text = json.dumps(result.as_dict(), indent=2) if as_json else printable(result.as_text())
    click.echo(text)


def segment_config(options: dict[str, Any]) -> SegmentConfig:
    """The settings that `segment_options` were given."""
    from bigseg.config import SegmentConfig
    from bigseg.settings import parse_settings
    from bigseg.units import parse_bytes

    rule = rule_of(options)
    values = {
        **options,
        "rule": rule,
        "image": absolute(options["image"]),
        "model": absolute(options["model"]),
        "out": absolute(options["out"]) if options["out"] else None,
        "mask": absolute(options["mask"]) if options["mask"] else None,
        "channels": options["channel"] or None,
        "block": integers(options["block"], "--block"),
        "tile": integers(options["tile"], "--tile"),
        "memory": parse_bytes(options["memory"]) if options["memory"] else None,
    }
    del values["channel"]
    return parse_settings(SegmentConfig, values, source="options")
