"""The typed settings of a network, a model, and a training run; YAML in and out.

All values are frozen and checked once, here, at the edge. Axis tuples are in the order z, y, x
(3-D) or y, x (2-D). Lengths are in voxels unless the name says otherwise.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from bigseg.plain_yaml import read_yaml
from bigseg.rules import InstanceRule, RuleOptions
from bigseg.settings import Location, Settings, parse_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_CONFIG_BYTES = 1 << 20
# Far beyond any useful network; a model file that claims more is damaged or hostile.
LARGEST_STRIDE = 1024
LARGEST_KERNEL = 63

Positive = Annotated[int, Field(ge=1)]
Axes = tuple[int, ...]
OnBadChunk = Literal["set-aside", "fill"]
OutputKind = Literal["labels", "probabilities", "instances"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class UNetSpec(Settings):
    """The U-Net of Ronneberger et al. 2015 (2-D) and Cicek et al. 2016 (3-D), layer by layer.

    Level 0 is the finest. Level l has `n_convs` convolutions of `kernels[l]` with `widths[l]`
    channels on the contracting path, and as many again on the expanding path except at the bottom.
    Between levels l and l+1 lie a max pooling and an up-convolution of `strides[l]`. With `mirror`
    the probabilities are the mean of those of all mirror images along the axes of the network.
    """

    dims: Literal[2, 3]
    in_channels: Positive = 1
    out_channels: Positive
    widths: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]
    kernels: tuple[tuple[Positive, ...], ...]
    strides: tuple[tuple[Positive, ...], ...]
    n_convs: Annotated[int, Field(ge=1, le=8)] = 2
    norm: Literal["batch", "none"] = "batch"
    padding: Literal["valid", "same"] = "valid"
    mirror: bool = False

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if len(self.kernels) != len(self.widths) or len(self.strides) != len(self.widths) - 1:
            raise ValueError(
                f"{len(self.widths)} widths need {len(self.widths)} kernels and "
                f"{len(self.widths) - 1} strides, not {len(self.kernels)} and {len(self.strides)}"
            )
        if any(len(v) != self.dims for v in (*self.kernels, *self.strides)):
            raise ValueError(f"each kernel and stride needs {self.dims} numbers, one for each axis")
        if any(k % 2 == 0 for kernel in self.kernels for k in kernel):
            raise ValueError("kernel sizes must be odd, so that the halo is the same on both sides")
        if any(math.prod(axis) > LARGEST_STRIDE for axis in zip(*self.strides, strict=True)):
            raise ValueError(f"the strides of an axis must multiply to at most {LARGEST_STRIDE}")
        if any(k > LARGEST_KERNEL for kernel in self.kernels for k in kernel):
            raise ValueError(f"kernel sizes must be at most {LARGEST_KERNEL}")
        return self

    @property
    def depth(self) -> int:
        """Number of poolings."""
        return len(self.strides)

    @property
    def n_passes(self) -> int:
        """How often the layers run for one output: once for each mirror image."""
        return int(2**self.dims) if self.mirror else 1

    @classmethod
    def build(
        cls,
        dims: Literal[2, 3],
        *,
        out_channels: int,
        depth: int,
        width: int,
        in_channels: int = 1,
        voxel_um: Sequence[float] | None = None,
        padding: Literal["valid", "same"] = "valid",
        mirror: bool = False,
    ) -> UNetSpec:
        """A U-Net whose width doubles at every level.

        With `voxel_um` an axis whose voxels are at least twice as long as the shortest axis' is
        neither pooled nor convolved until pooling has brought the others up to it (the rule of the
        anisotropic 3-D U-Nets; Isensee et al. 2021).
        """
        size = [float(v) for v in voxel_um] if voxel_um is not None else [1.0] * dims
        kernels: list[tuple[int, ...]] = []
        strides: list[tuple[int, ...]] = []
        for _ in range(depth + 1):
            coarse = [s >= 2.0 * min(size) * (1 - 1e-3) for s in size]
            kernels.append(tuple(1 if c else 3 for c in coarse))
            stride = tuple(1 if c else 2 for c in coarse)
            strides.append(stride)
            size = [s * f for s, f in zip(size, stride, strict=True)]
        return cls(
            dims=dims,
            in_channels=in_channels,
            out_channels=out_channels,
            widths=tuple(width * 2**level for level in range(depth + 1)),
            kernels=tuple(kernels),
            strides=tuple(strides[:depth]),
            padding=padding,
            mirror=mirror,
        )


class NormRule(Settings):
    """How intensities become network input: (intensity - offset) / scale, constants by rule.

    percentile: offset is the `low` percentile, scale the distance to the `high` one.
    meanstd: offset is the mean, scale the standard deviation.
    fixed: `offset` and `scale` as given, the same for every volume.
    """

    kind: Literal["percentile", "meanstd", "fixed"] = "percentile"
    low: Annotated[float, Field(ge=0, le=100)] = 1.0
    high: Annotated[float, Field(ge=0, le=100)] = 99.8
    offset: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low percentile {self.low} must be below high percentile {self.high}")
        return self


class NormConstants(Settings):
    """What a rule gave for one volume: input = (intensity - offset) / scale, for each channel."""

    offset: tuple[float, ...]
    scale: tuple[Annotated[float, Field(gt=0)], ...]
    level: int = 0
    n_voxels: int = 0


class ModelCard(Settings):
    """All that segmenting needs to know about a model; it travels in the model file's header."""

    format: Literal[1] = 1
    spec: UNetSpec
    classes: tuple[str, ...]
    task: Literal["semantic", "instances"] = "semantic"
    instances: InstanceRule | None = None
    voxel_um: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    norm: NormRule = NormRule()
    norm_constants: NormConstants | None = None
    channels: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    trained: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.classes) != self.spec.out_channels:
            raise ValueError(
                f"{len(self.classes)} class names for {self.spec.out_channels} output channels"
            )
        if self.voxel_um is not None and len(self.voxel_um) != self.spec.dims:
            raise ValueError(f"voxel_um needs {self.spec.dims} numbers")
        constants, n = self.norm_constants, self.spec.in_channels
        if constants is not None and not len(constants.offset) == len(constants.scale) == n:
            raise ValueError(f"norm_constants need {n} offsets and scales, one for each channel")
        return self


class AugmentConfig(Settings):
    """Ranges of the random changes to training patches; 0 switches one off.

    Elastic deformation is that of the U-Net paper: random displacements on a coarse grid with
    standard deviation `elastic_vox`, interpolated by cubic splines. Each change of intensities
    happens with `probability`, and so do rotation, scaling and deformation, all at once.
    """

    flip: bool = True
    rotate90: bool = True
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 180.0
    tilt_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.15
    elastic_vox: Annotated[float, Field(ge=0)] = 6.0
    elastic_grid_vox: Annotated[float, Field(ge=4)] = 64.0
    brightness: Annotated[float, Field(ge=0)] = 0.1
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.2
    noise: Annotated[float, Field(ge=0)] = 0.05
    blur_vox: Annotated[float, Field(ge=0)] = 0.8
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5


class NetConfig(Settings):
    """The network to build; None leaves the choice to bigseg.

    `mirror` takes the mean over all mirror images where the network is used, validation included,
    and never where it learns: four passes in 2-D, eight in 3-D.
    """

    depth: Annotated[int, Field(ge=0, le=7)] | None = None
    width: Annotated[int, Field(ge=1, le=1024)] | None = None
    padding: Literal["valid", "same"] = "valid"
    anisotropic: bool = True
    mirror: bool = False


class OptimConfig(Settings):
    """AdamW under a cosine schedule with linear warm-up."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class WeightMap(Settings):
    """Extra weight of what lies between two objects, as in the U-Net paper (weightmap.py).

    `sigma_um` in micrometer, or the image's own units; None: five voxels of the finest axis.
    `where: gaps` leaves it to the voxels that are not inside an object, so that what separates two
    objects outweighs what it separates; `everywhere` is the paper's.
    """

    w0: Annotated[float, Field(gt=0, le=1000)] = 10.0
    sigma_um: Annotated[float, Field(gt=0)] | None = None
    where: Literal["everywhere", "gaps"] = "everywhere"


class LossConfig(Settings):
    """Cross-entropy plus `dice` times a soft Dice loss; both skip ignored voxels.

    With `balance` each class weighs the inverse square root of its share of the annotated voxels.
    With `weight_map` voxels between objects weigh more; of the cross-entropy only, as `balance`.
    """

    dice: Annotated[float, Field(ge=0)] = 1.0
    balance: bool = False
    weight_map: WeightMap | None = None


class TrainConfig(Settings):
    """A training run, whole; what `config.yaml` holds.

    `images` are OME-Zarr locations, each with labels `labels`. `region` and `val_region` are
    written z0:z1,y0:y1,x0:x1 at `level`. `val_images` are validated on whole instead of a part of
    each of the `images`, and not learned from, even where they are among them. With `task:
    instances` the classes background, inside and border are derived from instance labels, with
    borders `border_um` wide: in micrometer, or the image's own units; None: two voxels of the
    finest axis.
    """

    images: Annotated[tuple[Location, ...], Field(min_length=1)]
    val_images: tuple[Location, ...] = ()
    labels: str
    level: Annotated[int, Field(ge=0)] = 0
    channels: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    time: Annotated[int, Field(ge=0)] | None = None
    region: str | None = None
    val_region: str | None = None
    task: Literal["semantic", "instances"] = "semantic"
    classes: tuple[str, ...] | None = None
    ignore: int | None = None
    border_um: Annotated[float, Field(gt=0)] | None = None
    dims: Literal[2, 3] | None = None
    net: NetConfig = NetConfig()
    norm: NormRule = NormRule()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    patch: Axes | None = None
    batch: Positive | None = None
    steps: Positive = 1000
    val_every: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: Positive = 1
    seed: Annotated[int, Field(ge=0)] = 0


class SegmentConfig(Settings):
    """What a user says about one segmentation; everything else is decided by the plan.

    `memory` is bytes of main memory for each worker; `transform` is `file.py:function`. Without
    `output` a model of instances gives those, another one classes.
    """

    image: Location
    model: Location
    name: str = "bigseg"
    out: Location | None = None
    output: OutputKind | None = None
    rule: RuleOptions = RuleOptions()
    keep_probabilities: bool = False
    prob_dtype: Literal["uint8", "float16", "float32"] = "uint8"
    level: Annotated[int, Field(ge=0)] | None = None
    channels: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    time: Annotated[int, Field(ge=0)] | None = None
    region: str | None = None
    block: Axes | None = None
    tile: Axes | None = None
    workers: Positive | None = None
    executor: Literal["ray", "serial"] = "ray"
    address: str | None = None
    memory: Positive | None = None
    engine: Literal["auto", "torch", "compiled", "openvino", "tensorrt"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    norm: Literal["volume", "model"] = "volume"
    mask: Location | None = None
    skip_below: float | None = None
    skip_level: Annotated[int, Field(ge=0)] | None = None
    transform: str | None = None
    on_bad_chunk: OnBadChunk = "set-aside"
    overwrite: bool = False

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "a name has up to 128 letters from a to z, digits, '.', '_' and '-', and begins "
                "with a letter or digit; give such a name"
            )
        return name


def load_train_config(path: str | Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The training settings of a YAML file, with `overrides` (from the command line) on top.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a wrong value, no mapping,
            a file that is too large or not YAML.

    """
    values: dict[str, Any] = (
        {} if path is None else read_yaml(Path(path), limit_bytes=MAX_CONFIG_BYTES)
    )
    return parse_settings(TrainConfig, {**values, **overrides}, source=str(path or "options"))


def dump_yaml(settings: Settings) -> str:
    """The settings as YAML that `load_train_config` reads back to an equal value."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
