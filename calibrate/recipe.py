"""Recipe: what to quantize, then an ordered list of stages that make it better.

`quant` alone is data-free. Every stage is a frozen dataclass with its own settings and a pure
`run(state, key) -> state`; order, resuming, hashing and progress are defined once, here, over
the list. A recipe hashes to a name, and so does every prefix of its stages, which is how an
interrupted run knows how far it came.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from qjax.core.config import QuantConfig
from qjax.core.quantize import quantize
from qjax.core.typing import PRNGKeyArray
from qjax.models.loading import load_pipeline, method_name
from qjax.models.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class State:
    """What goes from stage to stage.

    Attributes:
      teacher: The float pipeline; no stage changes it.
      student: The quantized pipeline so far.
    """

    teacher: Pipeline
    student: Pipeline


@runtime_checkable
class Stage(Protocol):
    """A frozen dataclass of settings that improves a quantized pipeline."""

    def run(self, state: State, key: PRNGKeyArray) -> State:
        """The state after this stage; a pure function of its arguments."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules for the weights and activations, and the stages that follow.

    Attributes:
      quant: What `qjax.quantize` does.
      stages: What `qjax.calibrate.run` does after it, in order.
      name: What to call it in tables and file names.
    """

    quant: QuantConfig
    stages: tuple[Stage, ...] = ()
    name: str = "custom"

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        if wrong := [type(stage).__name__ for stage in self.stages if not _is_stage(stage)]:
            raise TypeError(
                f"stages must be frozen dataclasses with run(state, key); got {', '.join(wrong)}."
            )

    def digest(self, stages: int | None = None) -> str:
        """Hash of the settings up to and including the first `stages` stages; None for all."""
        parts = [self.quant.to_dict()]
        for stage in self.stages[:stages]:
            parts.append({"stage": type(stage).__name__, **dataclasses.asdict(stage)})
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_stage(stage: Any) -> bool:
    return isinstance(stage, Stage) and dataclasses.is_dataclass(stage)


def quant_config(recipe: Recipe | QuantConfig) -> QuantConfig:
    """The data-free part of a recipe; a config is its own."""
    if isinstance(recipe, Recipe):
        return recipe.quant
    if isinstance(recipe, QuantConfig):
        return recipe
    raise TypeError(f"A QuantConfig or a Recipe is needed; got {type(recipe).__name__}.")


def quantize_pipeline(pipe: Pipeline, recipe: Recipe | QuantConfig) -> Pipeline:
    """The pipeline with quantized params; data-free."""
    config = quant_config(recipe)
    params = quantize(pipe.params, config)
    return pipe.replace(params=params, method=method_name(config))


def run(
    pipe: Pipeline,
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    resume: bool = True,
    seed: int = 0,
    on_stage: Callable[[int, int, str], None] | None = None,
) -> Pipeline:
    """Quantize `pipe` and run the recipe's stages; the same seed gives the same bits.

    Args:
      pipe: The float pipeline.
      recipe: What to do.
      out: Folder for the result of every stage; None keeps nothing.
      resume: Whether to go on after the last stage whose result lies in `out`.
      seed: Of all randomness; each stage has a key of its own, by its position.
      on_stage: Progress: called with the stages done, all stages, and the next one's name.

    Returns:
      The quantized pipeline; with `out` it is also saved there, in `out/final`.

    Raises:
      ValueError: If `out` holds the stages of another recipe, seed or model.
    """
    out = None if out is None else Path(out)
    state = State(teacher=pipe, student=quantize_pipeline(pipe, recipe))
    total, done = len(recipe.stages), 0
    if out is not None:
        _claim(out, recipe, seed, pipe)
        done, student = _furthest(out, recipe) if resume else (0, None)
        state = state if student is None else dataclasses.replace(state, student=student)
    key = jax.random.key(seed)
    for i in range(done, total):
        stage = recipe.stages[i]
        if on_stage is not None:
            on_stage(i, total, type(stage).__name__)
        state = stage.run(state, jax.random.fold_in(key, i))
        if out is not None:
            state.student.save(out / _stage_folder(recipe, i))
    if on_stage is not None:
        on_stage(total, total, "done")
    if out is not None:
        state.student.save(out / "final")
    return state.student


def _stage_folder(recipe: Recipe, i: int) -> str:
    return f"stage-{i}-{type(recipe.stages[i]).__name__.lower()}"


def _claim(out: Path, recipe: Recipe, seed: int, pipe: Pipeline) -> None:
    """Write down what the folder is for, or see that it is for this."""
    source = None if pipe.source is None else pipe.source.name
    mine = {"recipe": recipe.digest(), "name": recipe.name, "seed": seed, "model": source}
    path = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        theirs = json.loads(path.read_text())
        if wrong := [key for key in mine if theirs.get(key) != mine[key]]:
            raise ValueError(
                f"{out} belongs to another run: "
                + ", ".join(f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in wrong)
                + ". Use another folder."
            )
    else:
        path.write_text(json.dumps(mine, indent=1) + "\n")


def _furthest(out: Path, recipe: Recipe) -> tuple[int, Pipeline | None]:
    for i in reversed(range(len(recipe.stages))):
        folder = out / _stage_folder(recipe, i)
        if folder.exists():
            return i + 1, load_pipeline(folder)
    return 0, None
