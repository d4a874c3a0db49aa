"""The training loop of one worker: a plain torch function that runs alone or as one of many.

    batch ──> network ──> loss ──> gradients (averaged over the workers) ──> AdamW ──> next step
                 every few steps, on rank 0: journal; validate, keep the best; save the state
                 at the end, on rank 0: the rule that makes objects of the best model's output

A step depends on the state before it and on its number only, so a run that was cut off and goes on
ends in the same bytes (on one worker and one machine).
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigseg import store
from bigseg.checkpoint import load_model, load_state, save_model, save_state
from bigseg.errors import InputError, InputNotFoundError, ModelFileError, OutputError
from bigseg.losses import segmentation_loss
from bigseg.model import UNet
from bigseg.runs import Journal, RunFiles
from bigseg.tuning import FEWEST_OBJECTS, choose_rule
from bigseg.validation import judged_objects, validate
from bigseg.weightmap import extra_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from bigseg.config import ModelCard, TrainConfig
    from bigseg.patches import Batch
    from bigseg.recipe import Recipe

logger = logging.getLogger(__name__)

SAVES_PER_RUN = 100
LINES_PER_RUN = 500


def _alone(number: int) -> list[int]:
    return [number]


def _unguarded() -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """What this worker is among `n_ranks`: alone, unless the launcher says otherwise.

    `wrap` makes a module average its gradients over the workers; `gather` gives every worker's
    number, in order of rank. `guard` is called before anything is written, and raises where another
    run has taken the folder over.
    """

    device: torch.device
    rank: int = 0
    n_ranks: int = 1
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)
    gather: Callable[[int], list[int]] = field(default=_alone)
    guard: Callable[[], None] = field(default=_unguarded)


def run(
    recipe: Recipe,
    url: str,
    runtime: Runtime,
    *,
    after_step: Callable[[int], None] = lambda step: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Train from the last state of the run at `url` to its end; gives the step where it began.

    `after_step` is called with the number of steps done. An error that it raises ends the loop;
    the next call goes on from the last state.

    Raises:
        InputError: images or labels that cannot be used, or training that diverges.
        OutputError: the run cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        return _Trainer(recipe, RunFiles(url), runtime, clock).train(after_step)


def latest_step(recipe: Recipe, url: str) -> int:
    """The step from which `run` would go on; 0 where there is no state yet."""
    found = [_load_slot(state, recipe.fingerprint) for state in RunFiles(url).states]
    return max(int(meta.get("step", 0)) for _, meta in found)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, at most half the run, then half a cosine down to 0."""
    warmup = min(config.optim.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    done = (step - warmup) / (config.steps - warmup)
    return config.optim.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class _Standing:
    """What a state holds beside tensors."""

    step: int = 0
    best_step: int = 0
    best_score: float = -1.0
    seconds: float = 0.0
    slot: int = 1


class _Trainer:
    """One worker's network, optimiser and standing."""

    def __init__(
        self, recipe: Recipe, files: RunFiles, runtime: Runtime, clock: Callable[[], float]
    ) -> None:
        self.recipe, self.config, self.files, self.runtime = recipe, recipe.config, files, runtime
        self.clock = clock
        torch.manual_seed(self.config.seed)
        net = UNet(recipe.card.spec)
        self.layout: Any = torch.channels_last if self.config.dims == 2 else torch.channels_last_3d
        # torch's own omission: `to` with a memory format alone is missing in its types.
        self.net: UNet = net.to(runtime.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.class_weights = (
            None
            if recipe.class_weights is None
            else torch.tensor(recipe.class_weights, device=runtime.device)
        )
        self.standing = _Standing()
        state = self._newest_state()
        self.module = runtime.wrap(self.net)
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=optim.lr, weight_decay=optim.weight_decay
        )
        self._restore_optimizer(state)

    def train(self, after_step: Callable[[int], None]) -> int:
        """Run to the end; gives the step where it began."""
        first, is_first_rank = self.standing.step, self.runtime.rank == 0
        journal = Journal(self.files.metrics, first)
        sampler = self.recipe.sampler(self.runtime.device)
        batches = sampler.stream(
            range(first, self.config.steps),
            rank=self.runtime.rank,
            n_threads=_reading_threads(self.runtime.device),
        )
        began = self.window_began = self.clock()
        before = self.standing.seconds
        losses: list[Tensor] = []
        with _fixed_shapes(self.runtime.device), closing(batches):
            for batch in batches:
                losses.append(self._step(batch))
                self.standing.step = batch.step + 1
                self.standing.seconds = before + self.clock() - began
                if due := self._due():
                    if is_first_rank:
                        self._record(journal, losses, due)
                    losses = []
                after_step(self.standing.step)
        if is_first_rank:
            self._finish()
        return first

    def _step(self, batch: Batch) -> Tensor:
        """One step of gradient descent; gives the loss, still on the device."""
        image = batch.image.contiguous(memory_format=self.layout)
        with torch.autocast(
            self.runtime.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            logits = self.module(image)
        loss = segmentation_loss(
            logits,
            batch.target,
            dice=self.config.loss.dice,
            class_weights=self.class_weights,
            extra_weights=self._extra_weights(batch),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, batch.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _extra_weights(self, batch: Batch) -> Tensor | None:
        rule = self.config.loss.weight_map
        if rule is None or batch.closeness is None:
            return None
        return extra_weights(batch.target, batch.closeness, w0=rule.w0, where=rule.where)

    def _due(self) -> set[str]:
        """What follows this step: report, validate, save; nothing after most steps."""
        assert self.config.val_every is not None
        step, steps = self.standing.step, self.config.steps
        every = {
            "report": max(20, steps // LINES_PER_RUN),
            "validate": self.config.val_every,
            "save": min(self.config.val_every, max(50, math.ceil(steps / SAVES_PER_RUN))),
        }
        due = {name for name, n in every.items() if step % n == 0 or step == steps}
        # The best score is part of the state, so a validation is followed by a save.
        return due | {"save"} if "validate" in due else due

    def _record(self, journal: Journal, losses: list[Tensor], due: set[str]) -> None:
        now = self.standing
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {now.step}, so the training diverged: use a smaller "
                f"optim.lr than {self.config.optim.lr:g}, or look for extreme intensities"
            )
        n_patches = len(losses) * (self.config.batch or 0) * self.runtime.n_ranks
        self.runtime.guard()
        journal.add(
            step=now.step,
            loss=loss,
            lr=learning_rate(self.config, now.step - 1),
            seconds=round(now.seconds, 3),
            patches_per_s=round(n_patches / max(1e-9, self.clock() - self.window_began), 3),
        )
        if "validate" in due:
            self._validate(journal)
        journal.write()
        if "save" in due:
            self._save()
        self.window_began = self.clock()

    def _validate(self, journal: Journal) -> None:
        now = self.standing
        found = validate(self.net, self.recipe, device=self.runtime.device)
        journal.add(step=now.step, seconds=round(now.seconds, 3), **found.as_dict())
        if found.score > now.best_score:
            now.best_score, now.best_step = found.score, now.step
            save_model(self.files.best, self.net, self._card(found.as_dict()))

    def _card(self, scores: dict[str, Any]) -> ModelCard:
        sources = self.recipe.sources
        trained = {
            "step": self.standing.step,
            "steps": self.config.steps,
            "score": self.standing.best_score,
            **scores,
            "images": [store.name_of(s.url) for s in sources if s.train.n_voxels],
            "val_images": [store.name_of(s.url) for s in sources if not s.train.n_voxels],
            "labels": self.config.labels,
            "fingerprint": self.recipe.fingerprint,
        }
        return self.recipe.card.model_copy(update={"trained": trained})

    def _save(self) -> None:
        now = self.standing
        now.slot = 1 - now.slot
        tensors = {f"net.{name}": t for name, t in self.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optim.{name}.{key}"] = value
        meta = {
            "step": now.step,
            "best_step": now.best_step,
            "best_score": now.best_score,
            "seconds": now.seconds,
            "fingerprint": self.recipe.fingerprint,
        }
        save_state(self.files.states[now.slot], tensors, meta)

    def _newest_state(self) -> dict[str, Tensor]:
        """Take up the newest state that is whole; gives its tensors, none at the beginning."""
        found = [_load_slot(url, self.recipe.fingerprint) for url in self.files.states]
        newest = max((0, 1), key=lambda slot: found[slot][1].get("step", 0))
        tensors, meta = found[newest]
        if tensors:
            known = {key: meta[key] for key in ("step", "best_step", "best_score", "seconds")}
            self.standing = _Standing(**known, slot=newest)
            prefix = "net."
            self.net.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
            logger.info("going on from step %d of %s", self.standing.step, self.files.url)
        steps = self.runtime.gather(self.standing.step)
        if len(set(steps)) > 1:
            raise OutputError(
                f"the workers find {self.files.url} at steps {steps}: give an --out that all nodes "
                "of the cluster share"
            )
        return tensors

    def _restore_optimizer(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.net.named_parameters() if state else ():
            moments = {
                key: torch.empty_like(parameter).copy_(state[f"optim.{name}.{key}"])
                for key in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {"step": state[f"optim.{name}.step"], **moments}

    def _finish(self) -> None:
        net, card = load_model(self.files.best)
        if self.config.task == "instances":
            card = self._with_rule(net, card)
        self.runtime.guard()
        save_model(self.files.model, net, card)

    def _with_rule(self, net: UNet, card: ModelCard) -> ModelCard:
        """The card with the rule that makes the best objects of what is annotated."""
        logger.info("choosing the rule that makes objects of probabilities")
        choice = choose_rule(judged_objects(net, self.recipe, device=self.runtime.device))
        if choice is None:
            logger.warning(
                "the validation regions hold fewer than %d objects, too few to choose a rule by, "
                "so the model keeps the default one: validate on more, with val_region or "
                "val_images",
                FEWEST_OBJECTS,
            )
            return card
        rule, score = choice
        trained = {**card.trained, "instances": score.as_dict()}
        return card.model_copy(update={"instances": rule, "trained": trained})


def _load_slot(url: str, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A training state of this run; nothing where there is none, or a damaged one (logged)."""
    try:
        tensors, meta = load_state(url)
    except InputNotFoundError:
        return {}, {}
    except ModelFileError as error:
        logger.warning("a training state is skipped, the one before it is used: %s", error)
        return {}, {}
    return (tensors, meta) if meta.get("fingerprint") == fingerprint else ({}, {})


def _reading_threads(device: torch.device) -> int:
    """A thread draws a 3-D patch in half a second on one processor (measured; a plane in 10 ms).

    A step takes a GPU far less, which changes the patches itself; on processors it gets quicker as
    they get more.
    """
    return 3 if device.type == "cuda" else max(1, min(4, torch.get_num_threads() // 4))


def _fixed_shapes(device: torch.device) -> AbstractContextManager[Any]:
    """All patches have one shape: cuDNN may try out its algorithms once."""
    if device.type == "cuda":
        manager: AbstractContextManager[Any] = torch.backends.cudnn.flags(benchmark=True)
        return manager
    return nullcontext()
