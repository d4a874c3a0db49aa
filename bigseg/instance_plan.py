"""What a plan says of instances: whether they are asked for, the rule, how scratch space is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigseg.blocks import nearest_divisor
from bigseg.errors import UsageError
from bigseg.plan import InstancePlan
from bigseg.rules import InstanceRule
from bigseg.steps import Steps
from bigseg.units import UNIT_TO_UM

if TYPE_CHECKING:
    from bigseg.blocks import Vec
    from bigseg.config import ModelCard, OutputKind, SegmentConfig
    from bigseg.plan import Plan
    from bigseg.rules import RuleOptions
    from bigseg.volume import Volume

# What a neighbour decodes too much of for a margin of a few voxels stays small.
SCRATCH_SIDE = {2: 128, 3: 32}


def kind_of(config: SegmentConfig, card: ModelCard) -> OutputKind:
    """What the user asked for, else what the model was trained for."""
    return config.output or ("instances" if card.task == "instances" else "labels")


def predicted_type(
    config: SegmentConfig, card: ModelCard, begun: Plan | None = None
) -> tuple[str, int]:
    """Type and number of channels of what the predict stage writes."""
    n_classes, kind = card.spec.out_channels, kind_of(config, card)
    if kind == "probabilities":
        return config.prob_dtype, n_classes
    if kind == "instances":
        return "uint8", n_classes if _keeps_probabilities(config, begun) else 1
    return "uint8" if n_classes <= 256 else "uint16", 1


def plan_instances(
    config: SegmentConfig, card: ModelCard, source: Volume, core: Vec, *, begun: Plan | None
) -> InstancePlan | None:
    """How the objects of an image are made; None where they are not asked for.

    What the user leaves open is as in the result that was begun, else as in the model.

    Raises:
        UsageError: the rule does not fit the image or the network, or there are no objects.
    """
    if kind_of(config, card) != "instances":
        _refuse(config, kind_of(config, card))
        return None
    dims = card.spec.dims
    sides = [SCRATCH_SIDE[dims] if axis >= 4 - dims else 1 for axis in range(4)]
    rule = card.instances or InstanceRule()
    if begun is not None and begun.instances is not None:
        # `bigseg instances` can have changed it since.
        rule = begun.instances.rule
    plan = InstancePlan(
        rule=rule,
        dims=dims,
        ratios=Steps.of(_voxel_size(source, dims)).ratios,
        keep_probabilities=_keeps_probabilities(config, begun),
        chunk=tuple(nearest_divisor(c, side) for c, side in zip(core, sides, strict=True)),
    )
    return with_rule(plan, config.rule, source)


def with_rule(plan: InstancePlan, options: RuleOptions, source: Volume) -> InstancePlan:
    """The same with another rule.

    Raises:
        UsageError: the rule does not fit the image or the network.
    """
    rule = options.applied_to(plan.rule, plan.dims)
    if rule.link == "z" and plan.dims == 3:
        raise UsageError("--link z: a 3-D network sees all planes together: leave it out")
    lengths = {"t": source.shape[0], "z": source.shape[1]}
    if rule.link is not None and lengths[rule.link] == 1:
        raise UsageError(
            f"--link {rule.link}: {source.url} has nothing to join along {rule.link}: leave it out"
        )
    return plan.model_copy(update={"rule": rule})


def _keeps_probabilities(config: SegmentConfig, begun: Plan | None) -> bool:
    """Whether they are kept; nobody can say that they are not, so that once said is enough."""
    return config.keep_probabilities or (begun is not None and begun.keeps_probabilities)


def _voxel_size(source: Volume, dims: int) -> tuple[float, ...]:
    """Voxel size along the axes of an object: in one unit of length, else as the image says."""
    sizes, multiscale = source.scale[-dims:], source.multiscale
    units = [
        multiscale.axes[multiscale.axis_names.index(name)].unit
        for name in source.spatial_axes[-dims:]
    ]
    lengths_um = [UNIT_TO_UM.get(unit or "") for unit in units]
    if len(set(units)) == 1 or None in lengths_um:
        # Not converted for nothing: ratios that differ in the last digit are another plan.
        return sizes
    return tuple(size * um for size, um in zip(sizes, lengths_um, strict=True) if um is not None)


def _refuse(config: SegmentConfig, kind: str) -> None:
    """Options that say nothing of what is asked for."""
    given = [*config.rule.model_dump(exclude_none=True)]
    given += ["keep_probabilities"] if config.keep_probabilities else []
    if given:
        option = {"neighbours": "connectivity"}.get(given[0], given[0])
        raise UsageError(
            f"--{option.replace('_', '-')} says how objects are made, and {kind} are asked for: "
            "leave it out, or add --output instances"
        )
