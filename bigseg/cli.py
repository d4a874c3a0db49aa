"""The command line: parse, call one function, print. Everything heavy is imported inside.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 unexpected; 2 wrong
usage; 3 the input cannot be used; 4 finished with blocks set aside; 5 resources; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

from bigseg import __version__
from bigseg.errors import BigsegError, IncompleteError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.segment import SegmentResult


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
            click.echo("interrupted: the same command goes on from here", err=True)
            sys.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            self._explain(f"unexpected {type(error).__name__}: {error}", verbose=verbose)
            sys.exit(1)

    @staticmethod
    def _explain(sentence: str, *, verbose: bool) -> None:
        click.echo(f"error: {sentence}", err=True)
        if verbose:
            click.echo(traceback.format_exc(), err=True)


class Group(click.Group):
    """The commands in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in order of definition."""
        del ctx
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bigseg")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
def main(verbose: bool) -> None:
    """Train a U-Net on a few annotated crops; segment OME-Zarr volumes of any size.

    \b
    Example:
      bigseg demo                                       everything once, on made-up data
      bigseg convert stack.tif image.zarr --voxel-size 0.05,0.004,0.004
      bigseg train image.zarr --labels cells --out run
      bigseg segment image.zarr --model run/model.safetensors
    """  # noqa: D301 - \b keeps click from refilling
    del verbose


_verbose = click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="SRC... OUT.zarr")
@click.option("--labels", metavar="NAME", help="Write labels NAME beside the image OUT.zarr.")
@click.option("--axes", metavar="zyx", help="What the axes of the source are, of t, c, z, y, x.")
@click.option("--voxel-size", metavar="Z,Y,X", help="Voxel size along the spatial axes.")
@click.option("--unit", default="micrometer", show_default=True, help="Unit of the voxel size.")
@click.option("--ome-version", type=click.Choice(["0.5", "0.4"]), default="0.5", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that bigseg made.")
@_verbose
def convert(
    paths: tuple[str, ...],
    labels: str | None,
    axes: str | None,
    voxel_size: str | None,
    unit: str,
    ome_version: str,
    overwrite: bool,
) -> None:
    """TIFF, PNG stacks and HDF5 datasets into OME-Zarr, with a pyramid.

    \b
    Examples:
      bigseg convert stack.tif image.zarr --voxel-size 0.05,0.004,0.004
      bigseg convert planes/*.png image.zarr --axes zyx
      bigseg convert file.h5:/raw image.zarr
      bigseg convert truth.tif image.zarr --labels cells
    """  # noqa: D301
    from bigseg.convert import convert as run

    if len(paths) < 2:
        raise UsageError(f"convert needs sources and an output, {paths[0]!r} is only one of them")
    with _progress() as progress:
        volume = run(
            paths[:-1],
            paths[-1],
            labels=labels,
            axes=axes,
            voxel_size=_numbers(voxel_size, "--voxel-size"),
            unit=unit,
            version="0.4" if ome_version == "0.4" else "0.5",
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(volume.url)


@main.command()
@click.argument("url")
@_json
@_verbose
def info(url: str, as_json: bool) -> None:
    """What is in an OME-Zarr: axes, voxel size, levels, chunks, labels.

    \b
    Example:
      bigseg info image.zarr
    """  # noqa: D301
    from bigseg.info import as_text, describe

    description = describe(url)
    click.echo(json.dumps(description, indent=2) if as_json else as_text(description))


@main.command()
@click.argument("url", metavar="OUT.zarr")
@click.option("--shape", default="64,256,256", show_default=True, help="z,y,x (or y,x) in voxels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@_verbose
def sample(url: str, shape: str, seed: int) -> None:
    """A synthetic volume of touching cells with its true labels `cells`.

    \b
    Example:
      bigseg sample cells.zarr --shape 64,256,256
    """  # noqa: D301
    from bigseg.sample import make_sample

    sides = _integers(shape, "--shape")
    assert sides is not None
    with _progress() as progress:
        volume = make_sample(url, shape=sides, seed=seed, progress=progress)
    click.echo(volume.url)


@main.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("--labels", metavar="NAME", help="The labels in each image to learn from.")
@click.option("--out", required=True, metavar="RUN", help="Folder of the run.")
@click.option("-c", "--config", metavar="FILE", help="YAML with any setting; options win over it.")
@click.option("--task", type=click.Choice(["semantic", "boundary"]), help="Labels are classes, or "
              "instances of which background, inside and border are learnt.")  # fmt: skip
@click.option("--dims", type=click.Choice(["2", "3"]), help="2-D or 3-D network.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps.")
@click.option("--workers", type=click.IntRange(min=1), help="Data-parallel workers.")
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--level", type=click.IntRange(min=0), help="Pyramid level to train on.")
@click.option("--channel", type=click.IntRange(min=0), multiple=True, help="May be repeated.")
@click.option("--time", type=click.IntRange(min=0), help="Time point; all by default.")
@click.option("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Where to train.")
@click.option("--val-region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Where to validate.")
@click.option("--executor", type=click.Choice(["ray", "serial"]), default="ray", show_default=True)
@click.option("--address", metavar="ADDRESS", help="A running Ray cluster; default RAY_ADDRESS.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder of another run.")
@_verbose
def train(
    images: tuple[str, ...],
    out: str,
    config: str | None,
    channel: tuple[int, ...],
    executor: str,
    address: str | None,
    overwrite: bool,
    **settings: Any,  # noqa: ANN401 - each is a key of TrainConfig, which checks them
) -> None:
    """Fit a U-Net to annotated images; the same command again goes on.

    \b
    Examples:
      bigseg train image.zarr --labels cells --out run --dims 2 --steps 1000
      bigseg train a.zarr b.zarr --labels nuclei --out run --workers 4
      bigseg train -c config.yaml --out run
    """  # noqa: D301
    from bigseg.config import load_train_config
    from bigseg.train_ddp import train as run

    given = {"images": images, "channels": channel, **settings}
    given["dims"] = int(given["dims"]) if given["dims"] else None
    overrides = {key: value for key, value in given.items() if value not in (None, ())}
    if "images" in overrides:
        overrides["images"] = tuple(map(_absolute, images))
    with _progress() as progress:
        result = run(
            load_train_config(config, overrides),
            _absolute(out),
            executor="serial" if executor == "serial" else "ray",
            address=address,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(
        f"{result.model_url}: {result.steps} steps in {result.seconds:.0f} s, "
        f"best validation Dice {result.best_score:.4f}"
    )


@main.command()
@click.argument("image")
@click.option("--model", required=True, metavar="FILE", help="A model that `bigseg train` made.")
@click.option("--name", default="bigseg", show_default=True, help="Name of the labels.")
@click.option("--out", metavar="OUT.zarr", help="A store of its own instead of IMAGE/labels.")
@click.option("--output", type=click.Choice(["labels", "probabilities"]), default="labels",
              show_default=True)  # fmt: skip
@click.option("--prob-dtype", type=click.Choice(["uint8", "float16", "float32"]), default="uint8",
              show_default=True)  # fmt: skip
@click.option("--level", type=click.IntRange(min=0), help="Pyramid level; default: the nearest to "
              "the model's voxel size.")  # fmt: skip
@click.option("--channel", type=click.IntRange(min=0), multiple=True, help="May be repeated.")
@click.option("--time", type=click.IntRange(min=0), help="Time point; all by default.")
@click.option("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Background outside; context is read.")
@click.option("--block", metavar="Z,Y,X", help="Core of a block, rounded up to whole tiles.")
@click.option("--tile", metavar="Z,Y,X", help="One forward pass; default: within 2 GiB.")
@click.option("--workers", type=click.IntRange(min=1))
@click.option("--executor", type=click.Choice(["ray", "serial"]), default="ray", show_default=True)
@click.option("--address", metavar="ADDRESS", help="A running Ray cluster; default RAY_ADDRESS.")
@click.option("--engine", type=click.Choice(["auto", "torch", "openvino"]), default="auto",
              show_default=True)  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
              show_default=True)  # fmt: skip
@click.option("--norm", type=click.Choice(["volume", "model"]), default="volume",
              show_default=True, help="Constants: this volume's or the training's.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a result that bigseg made.")
@_verbose
def segment(
    image: str,
    model: str,
    out: str | None,
    channel: tuple[int, ...],
    block: str | None,
    tile: str | None,
    **settings: Any,  # noqa: ANN401 - each is a key of SegmentConfig, which checks them
) -> None:
    """Segment a volume block by block, exactly as if it had fitted in memory.

    The labels lie beside the image (IMAGE/labels/NAME). The same command again goes on.

    \b
    Examples:
      bigseg segment image.zarr --model run/model.safetensors
      bigseg segment image.zarr --model run/model.safetensors --output probabilities --out p.zarr
    """  # noqa: D301
    from bigseg.config import SegmentConfig, parse_settings

    values = {
        **settings,
        "image": _absolute(image),
        "model": _absolute(model),
        "out": _absolute(out) if out else None,
        "channels": channel or None,
        "block": _integers(block, "--block"),
        "tile": _integers(tile, "--tile"),
    }
    config = parse_settings(SegmentConfig, values, source="options")
    with _progress() as progress:
        if config.executor == "serial":
            from bigseg.segment import segment_serially as run
        else:
            from bigseg.infer_actor import segment_on_ray as run
        result = run(config, progress)
    _tell(result)


@main.command()
@click.argument("pred")
@click.argument("truth")
@click.option("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Compare only there.")
@_json
@_verbose
def evaluate(pred: str, truth: str, region: str | None, as_json: bool) -> None:
    """Scores of labels against true labels, summed over blocks.

    \b
    Example:
      bigseg evaluate image.zarr/labels/bigseg image.zarr/labels/cells --region 100:150,:,:
    """  # noqa: D301
    from bigseg.evaluate import evaluate_urls

    scores = evaluate_urls(pred, truth, region=region)
    click.echo(json.dumps(scores.as_dict(), indent=2) if as_json else scores.as_text())


@main.command()
@click.argument("folder", default="demo", metavar="[DIR]")
@click.option("--open", "show", is_flag=True, help="Open the picture when done.")
@_verbose
def demo(folder: str, show: bool) -> None:
    """Sample, train, segment, evaluate: the whole way once, on this computer, in minutes.

    \b
    Example:
      bigseg demo
    """  # noqa: D301
    from bigseg.demo import run_demo

    with _progress() as progress:
        result = run_demo(_absolute(folder), progress)
    click.echo(result.as_text())
    if show:
        click.launch(result.picture)


def _tell(result: SegmentResult) -> None:
    """Print what a segmentation did; raises where blocks were set aside."""
    from bigseg.view import save_result_picture
    from bigseg.volume import open_volume

    plan = result.plan
    if result.n_done_before:
        click.echo(
            f"went on from {result.n_done_before} of {result.n_blocks} finished blocks", err=True
        )
    click.echo(f"core {plan.core[1:]} voxels, tile {plan.tile[1:]}, {plan.engine}", err=True)
    if not result.is_complete:
        reasons = "\n".join(f"  {report.error}" for report in result.failed[:20])
        raise IncompleteError(
            f"{len(result.failed)} of {result.n_blocks} blocks were set aside; the same command "
            f"tries them again:\n{reasons}"
        )
    source = open_volume(plan.source.url, level=plan.source.level)
    picture = save_result_picture(
        source,
        open_volume(plan.output.url),
        plan.region,
        channel=plan.source.channels[0],
        kind="classes" if plan.output.kind == "labels" else "probability",
    )
    click.echo(f"{plan.output.url}: {result.n_blocks} blocks in {result.seconds:.1f} s")
    click.echo(f"{picture}: a middle plane, raw | result | overlay")


def _progress() -> Any:  # noqa: ANN401 - a context manager that gives a Progress
    from bigseg.progress import make_progress

    return make_progress(sys.stderr)


def _absolute(url: str) -> str:
    """The location as every worker of a cluster reads it, whatever its working directory."""
    return url if "://" in url or "::" in url else os.path.abspath(url)


def _integers(text: str | None, option: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(map(int, _parts(text, option, int)))


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
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
