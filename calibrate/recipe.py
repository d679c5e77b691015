"""Recipe: what to quantize, then an ordered list of stages that make it better.

`quant` alone is data-free. Every stage is a frozen dataclass with its own settings and a
`run(state, key, work) -> state`, a function of the first two: `work` keeps its parts on disk while
they are made and takes its log. Order, resuming, hashing and progress are defined once, here,
over the list. A recipe hashes to a name, and so does every prefix of its stages, which is how an
interrupted run knows how far it came.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.calibrate.pod import Pod
from qjax.calibrate.preemption import preemptible
from qjax.calibrate.programs import drop_programs
from qjax.calibrate.work import OnEvent, Work
from qjax.core.config import QuantConfig
from qjax.core.locks import locked
from qjax.core.mirror import Mirror, mirrored
from qjax.core.places import is_remote, local_path
from qjax.core.plain_json import read_json
from qjax.core.quantize import quantize
from qjax.core.remote import RemoteFolder
from qjax.core.safetensors_io import atomic_write, open_tensors, write_tensors
from qjax.core.serialize import flatten, params_digest
from qjax.core.typing import Params, PRNGKeyArray
from qjax.models.denoisers import build_denoiser
from qjax.models.loading import load_pipeline
from qjax.models.network_digest import network_digest
from qjax.models.pipeline import Pipeline
from qjax.models.saving import method_name, with_digest

RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class State:
    """What goes from stage to stage.

    Attributes:
      teacher: The float pipeline; no stage changes it.
      student: The quantized pipeline so far.
      floats: The float params that the student's integers stand for, where a stage has moved
        something between layers or into a branch of them; None: the teacher's.
    """

    teacher: Pipeline
    student: Pipeline
    floats: Params | None = None


@runtime_checkable
class Stage(Protocol):
    """A frozen dataclass of settings that improves a quantized pipeline.

    It may have a method `check(pipe)` that raises what can be told of the settings and the float
    pipeline before anything is computed; `run` calls those of all stages first. One that is fitted
    to the result of all others says so with `comes_last = True`.
    """

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state after this stage, the same for equal states and keys.

        Args:
          state: What came before.
          key: Of all its randomness.
          work: Keeps the parts of a long stage, so that it can go on where it was killed.
        """
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
                f"stages must be frozen dataclasses with run(state, key, work); got {', '.join(wrong)}."
            )
        early = [type(s).__name__ for s in self.stages[:-1] if getattr(s, "comes_last", False)]
        if early:
            raise ValueError(
                f"{', '.join(early)} is fitted to what all others have made, and comes last; got "
                f"{', '.join(type(stage).__name__ for stage in self.stages)}."
            )

    def with_settings(self, **changes: Any) -> "Recipe":
        """The recipe with these settings in every stage that has them.

        Raises:
          ValueError: If no stage has one of them.
        """
        had = {name for stage in self.stages for name in _fields(stage)}
        if unknown := sorted(changes.keys() - had):
            names = ", ".join(type(stage).__name__ for stage in self.stages) or "none"
            raise ValueError(
                f"{self.name} has no stage with {', '.join(unknown)}; its stages are {names}."
            )
        old: tuple[Any, ...] = self.stages
        stages = tuple(
            dataclasses.replace(
                stage, **{name: changes[name] for name in _fields(stage) if name in changes}
            )
            for stage in old
        )
        return dataclasses.replace(self, stages=stages)

    def digest(self, stages: int | None = None) -> str:
        """Hash of the settings up to and including the first `stages` stages; None for all.

        Raises:
          TypeError: If a stage has settings that are no numbers, texts, None, or tuples and
            dicts of them, whose hash would not be the same in another run.
        """
        parts: list[Any] = [self.quant.to_dict()]
        for stage in self.stages[:stages]:
            fields: Any = stage
            parts.append([type(stage).__name__, dataclasses.asdict(fields)])
        try:
            text = json.dumps(parts, sort_keys=True)
        except TypeError as error:
            raise TypeError(
                f"Settings of stages must be numbers, texts, and tuples or dicts of them: {error}."
            ) from None
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields(stage: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(stage)]


def _is_stage(stage: Any) -> bool:
    if isinstance(stage, type) or not isinstance(stage, Stage):
        return False
    return dataclasses.is_dataclass(stage) and stage.__dataclass_params__.frozen


def quant_config(recipe: Recipe | QuantConfig) -> QuantConfig:
    """The data-free part of a recipe; a config is its own."""
    if isinstance(recipe, Recipe):
        return recipe.quant
    if isinstance(recipe, QuantConfig):
        return recipe
    way_out = " Call it: w8a8(), not w8a8." if callable(recipe) else ""
    raise TypeError(f"A QuantConfig or a Recipe is needed; got {type(recipe).__name__}.{way_out}")


def quantize_pipeline(pipe: Pipeline, recipe: Recipe | QuantConfig) -> Pipeline:
    """The pipeline with quantized params; data-free.

    It remembers the rules, the recipe's name, and the hash of the float params where it has a
    source.
    """
    config = quant_config(recipe)
    params = quantize(pipe.params, config)
    source = None if pipe.source is None else with_digest(pipe)
    return pipe.replace(
        params=params,
        quant=config,
        method=method_name(config),
        recipe=data_free_name(recipe),
        source=source,
    )


def data_free_name(recipe: Recipe | QuantConfig) -> str | None:
    """What to call the data-free part of a recipe; None for bare rules."""
    if not isinstance(recipe, Recipe):
        return None
    return f"{recipe.name}, without its stages" if recipe.stages else recipe.name


def run(
    pipe: Pipeline,
    recipe: Recipe,
    *,
    out: Path | str | Mirror | None = None,
    resume: bool = True,
    seed: int = 0,
    on_stage: Callable[[int, int, str], None] | None = None,
    on_event: OnEvent | None = None,
    pod: Pod | None = None,
) -> Pipeline:
    """Quantize `pipe` and run the recipe's stages; the same seed gives the same bits.

    Args:
      pipe: The float pipeline.
      recipe: What to do.
      out: Folder for the result of every stage, of this machine or in a bucket, `gs://...`, or
        what `opened` gives of one, and for the parts of the stage at hand; None keeps nothing. Of a
        pipeline without a source (`from_apply`), which cannot be saved, the parts of all stages
        stay there instead, and the same call, given the same `apply` again, reads them.
      resume: Whether to go on after the last stage whose result lies in `out`.
      seed: Of all randomness; each stage has a key of its own, by its position.
      on_stage: Progress: called with the stages done, all stages, and the next one's name.
      on_event: Progress within stages: called with every event of their logs, which with `out`
        are also in the `log.jsonl` of the folder of a stage's parts.
      pod: Devices that stages with `shards` run on; what the other stages do every process does
        for itself. All processes of a pod call this alike, and `out` is a folder that all of
        them see, in a bucket for example. None: the default device.

    Returns:
      The quantized pipeline; with `out` it is also saved there, in `out/final`, if it has a
      source.

    Raises:
      ValueError: If `out` holds the stages of another recipe, seed or model, the source of `pipe`
        names a network without a port, or a stage's settings do not suit it; before anything is
        computed.
      BlockingIOError: If another process is at work in `out`; the message says which. Of buckets
        `qjax.core.mirror` says how far that is sure.
      OSError: If a bucket cannot be read or written; what is done is kept there.
      Preempted: If the process is told to stop (SIGTERM); what is done is kept.
    """
    for stage in recipe.stages:
        check = getattr(stage, "check", None)
        if check is not None:
            check(pipe)
    claim: dict[str, Any] = {}
    settings: dict[str, Any] = {
        "resume": resume,
        "seed": seed,
        "on_stage": on_stage,
        "on_event": on_event,
        "pod": pod,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemptible())
        if out is not None:
            claim = _claim_of(pipe, recipe, seed)  # fails before the folder is made
        mirror, folder = None, None
        if isinstance(out, Mirror):
            mirror = out
        elif out is not None and is_remote(out):
            mirror = stack.enter_context(opened(out, pod))
        elif out is not None:
            folder = local_path(out)
        if mirror is not None:
            folder = mirror.local
        if folder is not None:
            _check_claim(folder, claim, mirror)
            if pod is None or pod.writes:
                stack.enter_context(locked(folder))
        return _run(pipe, recipe, folder, mirror, claim, **settings)


def opened(
    url: str | os.PathLike[str], pod: Pod | None = None
) -> contextlib.AbstractContextManager[Mirror]:
    """The mirror of a run's folder in a bucket, for a `with` block; `run` takes it as `out`.

    Raises:
      ValueError: If the folder holds something else than a run, or `pod` is given and it is not
        in `gs://`, where alone its states can be kept.
      BlockingIOError: If another job is at work there.
    """
    if pod is None:
        return mirrored(url, holds=RUN)
    if not os.fspath(url).startswith("gs://"):
        raise ValueError(
            f"on a mesh the folder must be one that all hosts see or begin with gs://; got {url}."
        )
    return mirrored(url, holds=RUN, writes=pod.writes, wait=pod.wait)


def _run(
    pipe: Pipeline,
    recipe: Recipe,
    folder: Path | None,
    mirror: Mirror | None,
    claim: Mapping[str, Any],
    *,
    resume: bool,
    seed: int,
    on_stage: Callable[[int, int, str], None] | None,
    on_event: OnEvent | None,
    pod: Pod | None,
) -> Pipeline:
    """`run`, in a folder that is ours alone."""
    writes = pod is None or pod.writes
    saves = folder is not None and writes and pipe.source is not None
    total, done, student, floats = len(recipe.stages), 0, None, None
    if folder is not None:
        # Again: another run may have had the folder until just now.
        _check_claim(folder, claim, mirror)
        done, student = _furthest(folder, recipe, mirror) if resume else (0, None)
        if mirror is not None:
            if done:
                mirror.get(_floats_file(folder, recipe, done - 1))
            for i in range(total):
                mirror.get(_parts_folder(folder, recipe, i))
        floats = _read_floats(folder, recipe, done - 1)
        _wait(pod, "claimed")
    if student is None:
        student = quantize_pipeline(pipe, recipe).replace(recipe=recipe.name)
    if folder is not None and writes:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / RUN) as file:
            file.write((json.dumps(claim, indent=1) + "\n").encode())
        for i in range(done):
            _remove_parts(_parts_folder(folder, recipe, i))
        for i in range(done - 1):  # a run that was killed may not have come to this
            floats_file = _floats_file(folder, recipe, i)
            floats_file.unlink(missing_ok=True)
            if mirror is not None:
                mirror.drop(floats_file)
        _push(mirror)
    state = State(teacher=pipe, student=student, floats=floats)
    key = jax.random.key(seed)
    for i in range(done, total):
        stage = recipe.stages[i]
        if on_stage is not None:
            on_stage(i, total, type(stage).__name__)
        parts = None if folder is None else _parts_folder(folder, recipe, i)
        if parts is not None and not resume and writes:
            _remove_parts(parts)
        _wait(pod, f"stage {i}")
        drop_programs()
        state = stage.run(state, jax.random.fold_in(key, i), Work(parts, on_event, pod, mirror))
        if folder is not None and saves:
            _write_floats(folder, recipe, i, state.floats)
            state.student.save(folder / _stage_folder(recipe, i))
            if i > 0:
                _floats_file(folder, recipe, i - 1).unlink(missing_ok=True)
            _remove_parts(parts)
            _push(mirror)
    if on_stage is not None:
        on_stage(total, total, "done")
    if folder is not None and saves:
        state.student.save(folder / "final")
        _push(mirror)
    _wait(pod, "done")
    return state.student


def _push(mirror: Mirror | None) -> None:
    if mirror is not None:
        mirror.push()


def _wait(pod: Pod | None, name: str) -> None:
    if pod is not None:
        pod.wait(name)


def _remove_parts(folder: Path | None) -> None:
    """What a finished stage needs no more: its parts, but not its log."""
    if folder is not None:
        for path in (*folder.glob("*.safetensors"), *folder.glob(".*.safetensors.*.tmp")):
            path.unlink()


def _floats_file(folder: Path, recipe: Recipe, i: int) -> Path:
    """What a stage that changes the float params leaves for the next ones."""
    return folder / f"{_stage_folder(recipe, i)}-floats.safetensors"


def _write_floats(folder: Path, recipe: Recipe, i: int, floats: Params | None) -> None:
    if floats is not None and i + 1 < len(recipe.stages):
        arrays = {path: np.asarray(leaf) for path, leaf in flatten(floats)}
        write_tensors(_floats_file(folder, recipe, i), arrays, {})


def _read_floats(folder: Path, recipe: Recipe, i: int) -> Params | None:
    if i < 0 or not (path := _floats_file(folder, recipe, i)).exists():
        return None
    leaves = {key: jnp.asarray(t.read()) for key, t in open_tensors(path).items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def _stage_folder(recipe: Recipe, i: int) -> str:
    return f"stage-{i}-{type(recipe.stages[i]).__name__.lower()}"


def _parts_folder(folder: Path, recipe: Recipe, i: int) -> Path:
    return folder / f"{_stage_folder(recipe, i)}-parts"


def _claim_of(pipe: Pipeline, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a run's folder is for; fails for pipelines that no folder could hold."""
    settings = {"recipe": recipe.digest(), "name": recipe.name, "seed": seed}
    if pipe.source is None:
        digests = {"network": network_digest(pipe), "params": params_digest(pipe.params)}
        return settings | {"model": None} | digests
    source = with_digest(pipe)
    build_denoiser(source.model, source.config)
    return settings | {"model": source.name, "params": source.sha256}


def _check_claim(out: Path, mine: Mapping[str, Any], mirror: Mirror | None = None) -> None:
    """That the folder is new, or for this run."""
    path = out / RUN
    named = out if mirror is None else mirror.url
    if not path.exists():
        return
    try:
        theirs = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error} It is not what a run has written; use another folder.") from None
    if wrong := [key for key in mine if theirs.get(key) != mine[key]]:
        raise ValueError(
            f"{named} belongs to another run: "
            + ", ".join(f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in wrong)
            + ". Use another folder."
        )


def recipe_of_run(final: Path | str) -> str | None:
    """Name of the recipe whose run wrote the folder `final`; None if that cannot be read."""
    try:
        if is_remote(final):
            parent, _, _ = os.fspath(final).rstrip("/").rpartition("/")
            text = (RemoteFolder(parent).read(RUN) or b"").decode()
        else:
            text = (Path(final).resolve().parent / RUN).read_text(encoding="utf-8")
        name = json.loads(text)["name"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _furthest(out: Path, recipe: Recipe, mirror: Mirror | None) -> tuple[int, Pipeline | None]:
    """How many stages are done, and the pipeline after the last of them."""
    for i in reversed(range(len(recipe.stages))):
        folder = out / _stage_folder(recipe, i)
        if mirror is not None:
            mirror.get_save(folder)
        if folder.exists():
            return i + 1, load_pipeline(folder)
    return 0, None
