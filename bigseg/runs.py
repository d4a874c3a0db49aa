"""The folder of a training run: what is in it, and whether a call may go on with it.

    RUN/config.yaml                 the settings, resolved; can be given to another run
    RUN/recipe.json                 everything that was decided; a rerun goes on from it
    RUN/metrics.jsonl               a line every few steps and one for each validation
    RUN/checkpoints/state-0, -1     weights and optimiser, written in turn: the last two
    RUN/checkpoints/best            the model with the best validation score so far
    RUN/model.safetensors           that model, written last: the run is finished; for task
                                    instances with the rule that makes objects of its output

It knows files and recipes, and nothing of networks at work. Every file is replaced whole, so the
folder may be on any store that all workers reach.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigseg import store
from bigseg.checkpoint import read_card, save_state
from bigseg.config import TrainConfig, dump_yaml
from bigseg.errors import ConfigError, InputError, InputNotFoundError, OutputError
from bigseg.recipe import Recipe, differences, make_recipe
from bigseg.settings import parse_settings

if TYPE_CHECKING:
    from bigseg.config import ModelCard
    from bigseg.engine import Device

MAX_JOURNAL_BYTES = 256 << 20
MAX_RECIPE_BYTES = 64 << 20
MAX_MODEL_BYTES = 16 << 30


@dataclass(frozen=True)
class RunFiles:
    """The locations of a run; `url` may be on any store that all workers reach."""

    url: str

    def at(self, *parts: str) -> str:
        """A location inside the run."""
        return store.join(self.url, *parts)

    @property
    def model(self) -> str:
        """The finished model."""
        return self.at("model.safetensors")

    @property
    def recipe(self) -> str:
        """What was decided."""
        return self.at("recipe.json")

    @property
    def metrics(self) -> str:
        """The journal."""
        return self.at("metrics.jsonl")

    @property
    def best(self) -> str:
        """The best model so far."""
        return self.at("checkpoints", "best.safetensors")

    @property
    def failure(self) -> str:
        """The note of a worker that failed where trying again is of no use; else empty."""
        return self.at("failure.json")

    @property
    def states(self) -> tuple[str, str]:
        """The two training states, written in turn."""
        return self.at("checkpoints", "state-0.safetensors"), self.at(
            "checkpoints", "state-1.safetensors"
        )


@dataclass(frozen=True)
class TrainResult:
    """A finished run: `first_step` is where the last call began, `steps` where it was finished.

    `instances` says how objects are made, and how good they are, for task instances.
    """

    model_url: str
    metrics_url: str
    steps: int
    first_step: int
    best_step: int
    best_score: float
    seconds: float
    instances: str | None = None


class Journal:
    """The lines of metrics.jsonl, rewritten whole; a run that goes on drops what comes after."""

    def __init__(self, url: str, up_to_step: int) -> None:
        self.url = url
        self._lines = [line for line in self.read(url) if line["step"] <= up_to_step]

    @staticmethod
    def read(url: str) -> list[dict[str, Any]]:
        """The lines there are; none where there is no journal yet."""
        try:
            text = store.read_bytes(url, limit_bytes=MAX_JOURNAL_BYTES).decode()
        except InputNotFoundError:
            return []
        try:
            lines = [json.loads(line) for line in text.splitlines()]
            if all(isinstance(line["step"], int) for line in lines):
                return lines
        except (ValueError, KeyError, TypeError):
            pass
        raise InputError(
            f"{url} is damaged, it is not the journal that a run wrote: delete it, and the run "
            "goes on with a new one"
        )

    def add(self, **values: Any) -> None:  # noqa: ANN401
        """Note a line; `write` stores it."""
        self._lines.append(values)

    def write(self) -> None:
        """Store all lines."""
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        store.write_atomic(self.url, text.encode())


def stored_run(asked: TrainConfig, url: str) -> Recipe | None:
    """The recipe of the run at `url`, if there is one; `asked` must agree with it.

    Raises:
        ConfigError: `asked` has other settings, which are named, or the recipe is damaged.
    """
    if (stored := _stored_recipe(RunFiles(url))) is None:
        return None
    if different := differences(stored, asked):
        raise ConfigError(
            f"{url} holds a run with other settings ({'; '.join(different)}): give another --out, "
            "or --overwrite to begin anew"
        )
    return stored


def open_run(asked: TrainConfig, url: str, *, device: Device, overwrite: bool = False) -> Recipe:
    """The recipe of the run at `url`: the stored one, or a new one that is stored there.

    With `overwrite` what an earlier run left is emptied, after the new recipe was found good.

    Raises:
        ConfigError: settings that contradict each other, the images, or the stored run.
        InputError: images or labels that cannot be used.
        OutputError: the place cannot be written, or holds a model that is of no run.
    """
    files = RunFiles(url)
    if not overwrite and (stored := stored_run(asked, url)) is not None:
        return stored
    if not overwrite and _is_there(files.model):
        raise OutputError(
            f"{url} holds a model but not the run that made it: give another --out, or "
            "--overwrite to replace it"
        )
    recipe = make_recipe(asked, device=device)
    _forget(files)
    store.write_atomic(files.at("config.yaml"), dump_yaml(recipe.config).encode())
    store.write_atomic(files.recipe, recipe.model_dump_json(indent=1).encode())
    return recipe


def finished(recipe: Recipe, url: str, *, first_step: int | None = None) -> TrainResult | None:
    """What the run at `url` gave, or None where it is not finished."""
    files = RunFiles(url)
    if not _is_there(files.model):
        return None
    card = read_card(files.model)
    trained = card.trained
    if trained.get("fingerprint") != recipe.fingerprint:
        raise OutputError(
            f"{files.model} was not made by the run in {url}: move it away, or use --overwrite"
        )
    lines = Journal.read(files.metrics)
    return TrainResult(
        model_url=files.model,
        metrics_url=files.metrics,
        steps=trained["steps"],
        first_step=trained["steps"] if first_step is None else first_step,
        best_step=trained["step"],
        best_score=trained["score"],
        seconds=max((line["seconds"] for line in lines), default=0.0),
        instances=_rule_in_words(card),
    )


def _rule_in_words(card: ModelCard) -> str | None:
    rule, found = card.instances, card.trained.get("instances")
    if rule is None:
        return None
    words = (
        f"objects: threshold {rule.threshold:g}, erode {rule.erode}, grow {rule.grow}, foreground "
        f"{rule.foreground:g}, seeds of at least {rule.min_size} voxels"
    )
    if found is None:
        return f"{words} (the defaults: too few objects to choose by)"
    # Models of before do not say what was learnt.
    counts_learnt = found.get("learnt_score") is not None
    learnt = f" and {found['n_learnt']} learnt" if counts_learnt else ""
    return (
        f"{words}; chosen on {found['n_objects']} held-out{learnt} objects; mean AP of the "
        f"held-out ones {found['average_precision']:.4f}, Rand error {found['rand_error']:.4f}"
    )


def _stored_recipe(files: RunFiles) -> Recipe | None:
    try:
        text = store.read_bytes(files.recipe, limit_bytes=MAX_RECIPE_BYTES)
    except InputNotFoundError:
        return None
    except InputError as error:
        raise OutputError(f"{files.url} cannot be the folder of a run: {error}") from None
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{files.recipe} is damaged: use --overwrite to begin anew, or give another --out"
        )
    return parse_settings(Recipe, values, source=files.recipe)


def _forget(files: RunFiles) -> None:
    """Empty what an earlier run left: the model first, so that none is taken for the new one."""
    if _is_there(files.model):
        store.write_atomic(files.model, b"")
    if store.exists(files.metrics):
        store.write_atomic(files.metrics, b"")
    for url in files.states:
        if store.exists(url):
            save_state(url, {}, {"step": 0, "fingerprint": ""})


def _is_there(model_url: str) -> bool:
    try:
        return bool(store.read_bytes(model_url, limit_bytes=MAX_MODEL_BYTES))
    except InputNotFoundError:
        return False
