"""The command line: parse, call one function, print. Everything heavy is imported inside.

console.py has what the commands share.
"""

from __future__ import annotations

import json
from typing import Any

import click

from bigseg import __version__
from bigseg.console import (
    Group,
    absolute,
    address_option,
    executor_option,
    first_interrupt_asks,
    integers,
    json_option,
    numbers,
    progress_bar,
    say,
    segment_config,
    segment_options,
    verbose_option,
)
from bigseg.errors import UsageError
from bigseg.guards import printable
from bigseg.result_commands import clean, instances, objects, status, verify


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bigseg")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and show tracebacks.")
def main(verbose: bool) -> None:
    """Train a U-Net on a few annotated crops; segment OME-Zarr volumes of any size.

    \b
    Example:
      bigseg demo                                       everything once, on made-up data
      bigseg convert stack.tif image.zarr --voxel-size 0.05,0.004,0.004
      bigseg train image.zarr --labels cells --task instances --out run
      bigseg segment image.zarr --model run/model.safetensors
    """  # noqa: D301 - \b keeps click from refilling
    del verbose


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="SRC... OUT.zarr")
@click.option("--labels", metavar="NAME", help="Write labels NAME beside the image OUT.zarr.")
@click.option("--each", metavar="[PATTERN]", is_flag=False, flag_value="{name}", help="Every file "
              "becomes an image of its own in folder OUT, named as the file or by the {name} part "
              "of PATTERN: {name}_raw makes a.zarr of a_raw.tif.")  # fmt: skip
@click.option("--axes", metavar="zyx", help="What the axes of the source are, of t, c, z, y, x.")
@click.option("--voxel-size", metavar="Z,Y,X", help="Voxel size along the spatial axes.")
@click.option("--unit", default="micrometer", show_default=True, help="Unit of the voxel size.")
@click.option("--ome-version", type=click.Choice(["0.5", "0.4"]), default="0.5", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that bigseg made.")
@verbose_option
def convert(
    paths: tuple[str, ...],
    labels: str | None,
    each: str | None,
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
      bigseg convert *_raw.tif images --each {name}_raw
      bigseg convert *_cells.tif images --each {name}_cells --labels cells
    """  # noqa: D301
    from bigseg.convert import Conversion
    from bigseg.folders import convert_files

    if len(paths) < 2:
        raise UsageError(f"convert needs sources and an output, {paths[0]!r} is only one of them")
    wanted = Conversion(
        labels=labels,
        axes=axes,
        voxel_size=numbers(voxel_size, "--voxel-size"),
        unit=unit,
        version="0.4" if ome_version == "0.4" else "0.5",
        overwrite=overwrite,
    )
    with progress_bar() as progress:
        made = convert_files(wanted, paths[:-1], paths[-1], each=each, progress=progress)
    click.echo("\n".join(made))


@main.command()
@click.argument("url")
@json_option
@verbose_option
def info(url: str, as_json: bool) -> None:
    """What is in an OME-Zarr: axes, voxel size, levels, chunks, labels.

    \b
    Example:
      bigseg info image.zarr
    """  # noqa: D301
    from bigseg.info import as_text, describe

    description = describe(url)
    click.echo(json.dumps(description, indent=2) if as_json else printable(as_text(description)))


@main.command()
@click.argument("url", metavar="OUT.zarr")
@click.option("--shape", default="64,256,256", show_default=True, help="z,y,x (or y,x) in voxels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@verbose_option
def sample(url: str, shape: str, seed: int) -> None:
    """A synthetic volume of touching cells with its true labels `cells`.

    \b
    Example:
      bigseg sample cells.zarr --shape 64,256,256
    """  # noqa: D301
    from bigseg.sample import make_sample

    sides = integers(shape, "--shape")
    assert sides is not None
    with progress_bar() as progress:
        volume = make_sample(url, shape=sides, seed=seed, progress=progress)
    click.echo(volume.url)


@main.command()
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option("--labels", metavar="NAME", help="The labels in each image to learn from.")
@click.option("--out", required=True, metavar="RUN", help="Folder of the run.")
@click.option("-c", "--config", metavar="FILE", help="YAML with any setting; options win over it.")
@click.option("--task", type=click.Choice(["semantic", "instances"]), help="Labels are classes, or "
              "instances of which background, inside and border are learnt.")  # fmt: skip
@click.option("--dims", type=click.Choice(["2", "3"]), help="2-D or 3-D network; "
              "default 3 where all images have at least 32 planes and voxels less than three times "
              "as long along z as along y.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Training steps.")
@click.option("--workers", type=click.IntRange(min=1), help="Default 1; each has a GPU, where "
              "there are GPUs, and adds a batch to every step.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--level", type=click.IntRange(min=0), help="Pyramid level to train on.")
@click.option("--channel", type=click.IntRange(min=0), multiple=True,
              help="Channel to learn from; may be repeated; default 0 alone.")  # fmt: skip
@click.option("--time", type=click.IntRange(min=0), help="Time point; all by default.")
@click.option("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Where to train.")
@click.option("--val-region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Where to validate.")
@click.option("--val-image", metavar="IMAGE", multiple=True, help="Validate on the whole of it, "
              "instead of a part of each image; may be repeated.")  # fmt: skip
@executor_option
@address_option
@click.option("--overwrite", is_flag=True, help="Start anew in a folder of another run.")
@verbose_option
def train(
    images: tuple[str, ...],
    out: str,
    config: str | None,
    channel: tuple[int, ...],
    val_image: tuple[str, ...],
    executor: str,
    address: str | None,
    overwrite: bool,
    **settings: Any,  # noqa: ANN401 - each is a key of TrainConfig, which checks them
) -> None:
    """Fit a U-Net to annotated images; the same command again goes on.

    \b
    Examples:
      bigseg train image.zarr --labels cells --task instances --out run
      bigseg train images --labels tissue --out run --dims 2 --steps 2000 --workers 4
      bigseg train -c config.yaml --out run
    """  # noqa: D301
    from bigseg.config import load_train_config
    from bigseg.folders import images_in
    from bigseg.train_ddp import train as run

    given = {"images": images, "channels": channel, "val_images": val_image, **settings}
    given["dims"] = int(given["dims"]) if given["dims"] else None
    overrides = {key: value for key, value in given.items() if value not in (None, ())}
    for key in {"images", "val_images"} & overrides.keys():
        overrides[key] = images_in(map(absolute, overrides[key]))
    with progress_bar() as progress:
        result = run(
            load_train_config(config, overrides),
            absolute(out),
            executor="serial" if executor == "serial" else "ray",
            address=address,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(
        f"{result.model_url}: {result.steps} steps in {result.seconds:.0f} s, "
        f"best validation Dice {result.best_score:.4f}"
    )
    if result.instances is not None:
        click.echo(result.instances)


@main.command()
@segment_options
@verbose_option
def segment(**options: Any) -> None:  # noqa: ANN401 - each is a key of SegmentConfig
    """Segment a volume block by block, exactly as if it had fitted in memory.

    The labels lie beside the image (IMAGE/labels/NAME). The same command again goes on.

    \b
    Examples:
      bigseg segment image.zarr --model run/model.safetensors
      bigseg segment image.zarr --model run/model.safetensors --output probabilities --out p.zarr
    """  # noqa: D301
    from bigseg.account import conclusion, remarks

    config = segment_config(options)
    with progress_bar() as progress:
        if config.executor == "serial":
            from bigseg.segment import segment_serially as run
        else:
            from bigseg.on_ray import segment_on_ray as run
        result = run(config, progress, stopping=first_interrupt_asks)
    for line in remarks(result):
        click.echo(printable(line), err=True)
    for line in conclusion(result):
        click.echo(printable(line))


@main.command()
@segment_options
@json_option
@verbose_option
def plan(as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """What `segment` with the same options would do and cost; nothing is written.

    \b
    Example:
      bigseg plan image.zarr --model run/model.safetensors
    """  # noqa: D301
    from bigseg.bench import foresee

    say(foresee(segment_config(options)), as_json=as_json)


@main.command()
@segment_options
@click.option("--blocks", default=8, show_default=True, type=click.IntRange(min=1),
              help="Blocks to segment for the measurement.")  # fmt: skip
@json_option
@verbose_option
def bench(blocks: int, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """How fast the network is on this machine, and how much of that segmenting keeps.

    Measures every engine on one tile, then segments some blocks in the middle of the volume into a
    temporary place.

    \b
    Example:
      bigseg bench image.zarr --model run/model.safetensors
    """  # noqa: D301
    from bigseg.bench import run_bench

    with progress_bar() as progress:
        result = run_bench(segment_config(options), n_blocks=blocks, progress=progress)
    say(result, as_json=as_json)


@main.command()
@click.argument("pred")
@click.argument("truth")
@click.option("--region", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Compare only there.")
@json_option
@verbose_option
def evaluate(pred: str, truth: str, region: str | None, as_json: bool) -> None:
    """Scores of labels against true labels, summed over blocks.

    \b
    Example:
      bigseg evaluate image.zarr/labels/bigseg image.zarr/labels/cells --region 100:150,:,:
    """  # noqa: D301
    from bigseg.evaluate import evaluate_urls

    say(evaluate_urls(pred, truth, region=region), as_json=as_json)


@main.command()
@click.argument("folder", default="demo", metavar="[DIR]")
@click.option("--open", "show", is_flag=True, help="Open the picture when done.")
@verbose_option
def demo(folder: str, show: bool) -> None:
    """Sample, train, segment, evaluate: the whole way once, on this computer, in minutes.

    \b
    Example:
      bigseg demo
    """  # noqa: D301
    from bigseg.demo import run_demo

    with progress_bar() as progress:
        result = run_demo(absolute(folder), progress)
    click.echo(result.as_text())
    if show:
        click.launch(result.picture)


for _command in (status, verify, objects, instances, clean):
    main.add_command(_command)
