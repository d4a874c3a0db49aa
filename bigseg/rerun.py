"""Making the objects of a result again by another rule, from probabilities that were kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

from bigseg.config import SegmentConfig
from bigseg.errors import IncompleteError, UsageError
from bigseg.instance_plan import with_rule
from bigseg.ledger import Ledger
from bigseg.lock import Lock
from bigseg.on_ray import on_ray
from bigseg.places import Here
from bigseg.plan import PREDICT
from bigseg.results import begun_plan, change_rule, has_probabilities, ledger_url
from bigseg.segment import SegmentResult, Stopping, carry_out, never
from bigseg.status import open_result
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from bigseg.machine import Resources
    from bigseg.places import Place
    from bigseg.plan import Plan
    from bigseg.progress import Progress
    from bigseg.rules import RuleOptions


def remake_instances(
    url: str,
    options: RuleOptions,
    *,
    workers: int | None = None,
    executor: Literal["ray", "serial"] = "ray",
    address: str | None = None,
    progress: Progress,
    stopping: Stopping = never,
) -> SegmentResult:
    """The result at `url` with objects by a rule changed as `options` say.

    The same call goes on where one was cut off. With nothing changed only what is missing is made.

    Raises:
        NotOmeZarrError: `bigseg segment` did not make what is there.
        UsageError: it holds no instances, or their probabilities were not kept, or it was moved.
        IncompleteError: not all probabilities are there yet.
        LockedError: a run writes it.
        KeyboardInterrupt: it was stopped; the blocks in flight were finished.
    """
    url = url.rstrip("/") or url
    plan = _plan_of(url)
    config = SegmentConfig(
        image=plan.source.url,
        model=plan.model.url,
        workers=workers,
        executor=executor,
        address=address,
    )
    here: AbstractContextManager[Place] = (
        nullcontext(Here()) if executor == "serial" else on_ray(config)
    )
    with here as place, Lock.acquire(url) as lock:
        ledger = Ledger.open(ledger_url(url), guard=lock.check)
        assert ledger is not None, "it was there a moment ago"
        plan = begun_plan(ledger, url)
        assert plan.instances is not None
        source = open_volume(plan.source.url, level=plan.source.level)
        changed = plan.model_copy(update={"instances": with_rule(plan.instances, options, source)})
        if changed != plan:
            change_rule(plan, changed, ledger, lock.check)
        plan_here = _for_workers(changed, ledger, place.resources.shared_by(workers or 1))
        with place.executor(plan_here, None, lock.owner) as pool, stopping() as stop:
            return carry_out(plan_here, ledger, pool, progress, stop=stop, note=lock.note)


def _plan_of(url: str) -> Plan:
    """The plan of a result whose objects can be made again."""
    ledger = open_result(url)
    if ledger is None:
        raise IncompleteError(
            f"{url} was begun and holds nothing yet: the same `bigseg segment` command goes on"
        )
    plan = begun_plan(ledger, url)
    if plan.instances is None:
        raise UsageError(
            f"{url} holds {plan.output.kind}, not instances: segment with a model that was trained "
            "with --task instances"
        )
    if not plan.instances.keep_probabilities:
        raise UsageError(
            f"{url} was made without --keep-probabilities, so its objects can only be made again "
            "with the network: segment with other options and --overwrite"
        )
    if plan.output.url != url:
        raise UsageError(
            f"{url} was made at {plan.output.url} and has been moved: move it back, or segment anew"
        )
    if not has_probabilities(plan):
        raise UsageError(
            f"{url} has lost its folder probabilities, from which objects are made again: bring it "
            "back from a copy, or segment anew with --overwrite"
        )
    n_done, n_blocks = ledger.n_done(PREDICT), ledger.stages[PREDICT]
    if n_done < n_blocks:
        raise IncompleteError(
            f"{url} has the probabilities of {n_done} of {n_blocks} blocks: let the `bigseg "
            "segment` command that began it finish first"
        )
    return plan


def _for_workers(plan: Plan, ledger: Ledger, resources: Resources) -> Plan:
    """The plan for workers with these resources; it gives the same bytes."""
    # A run that met a bad chunk can have gone on with another rule than the plan that was stored.
    rule = "fill" if ledger.filled else plan.on_bad_chunk
    return plan.model_copy(update={"memory_bytes": resources.memory_bytes, "on_bad_chunk": rule})
