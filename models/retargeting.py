"""Step tables of pipelines for another number of steps, and the time table of a pipeline.

Every entry of a step table says in its key what it was fitted for. For another run

| entry | depends on | is |
|---|---|---|
| `"time"` | timesteps | computed again from the float time layers |
| `"quant"` | timesteps | resampled: each new step takes the row nearest in log-SNR |
| `"noise_correction"` | all of its key | left out, with a warning: it has to be fitted again, which `calibrate.noise_refit.refit` does |
| any other | all of its key | left out, with a warning |

An entry that suits the run is kept as it is. How near two steps are is told by
`log(alpha_bar / (1 - alpha_bar))`, for what a network sees is set by the noise and not by t.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from qjax.core.layers import LOW_RANK
from qjax.core.plan import name_some
from qjax.core.serialize import flatten
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Params
from qjax.models.denoisers import build_denoiser
from qjax.models.pipeline import Pipeline
from qjax.models.saving import with_digest
from qjax.models.saving_time import SIDE_FILE
from qjax.models.time_rows import COLLECTION, TabulatesTime
from qjax.models.time_table import (
    drop_time_layers,
    dropped_layers,
    replaced_layers,
    split_layers,
    time_table,
)

__all__ = [
    "Fate",
    "Keep",
    "network_of",
    "precalculate_time",
    "resample_rows",
    "retarget",
    "retargeted",
]

Keep = Literal["float16", "float32"]
"""The dtype in which float time layers are kept."""


def network_of(pipe: Pipeline) -> Any:
    """The module that a pipeline runs.

    Raises:
      ValueError: If it is a stranger's function, of which nothing is known.
    """
    bound = getattr(pipe.apply, "__self__", None)
    if isinstance(bound, TabulatesTime):
        return bound
    if pipe.source is None:
        name = getattr(pipe.apply, "__qualname__", type(pipe.apply).__name__)
        raise ValueError(
            f"What depends on t alone is known of the networks of this library only; the pipeline "
            f"came from from_apply with {name} and has no source. Leave time information "
            "precalculation out of the recipe, or add a port of the network to the library."
        )
    return build_denoiser(pipe.source.model, pipe.source.config).model


def precalculate_time(
    pipe: Pipeline, params: Params, *, steps: int, keep: Keep | None = "float16"
) -> Pipeline:
    """The pipeline with a time table, and without the layers that it stands for.

    Args:
      pipe: The pipeline, float or quantized.
      params: Float params of the same network: a teacher's, or its own.
      steps: Of the sampler. A step table that is there already must have its timesteps.
      keep: Dtype in which the float layers are kept beside the params (and saved in a file of
        their own), so that the table can be made for other steps; None keeps nothing.

    Raises:
      ValueError: If there can be no table; if the pipeline's step table is of other
        timesteps; if a LoRA stands beside time layers, or they do not fit `keep`.
    """
    model = network_of(pipe)
    wanted = replaced_layers(model)
    _check_low_rank(wanted, pipe.params, params)
    run = pipe.table_key(steps=steps)
    others = pipe.step_table or StepTable()
    others = others.drop(COLLECTION) if COLLECTION in others.entries else others
    try:
        others.check(TableKey(timesteps=run.timesteps))
    except ValueError as error:
        raise ValueError(
            f"A time table must have the timesteps of the entries beside it; got {steps=}: {error}"
        ) from None
    table = _with_time(others, model, params, run)
    layers = split_layers(params, wanted)[1]
    source = None if pipe.source is None else with_digest(pipe)  # the hash is of all params
    return pipe.replace(
        params=drop_time_layers(model, pipe.params)[0],
        step_table=table,
        time_layers=None if keep is None else _kept(layers, keep),
        source=source,
    )


def retarget(
    pipe: Pipeline, *, steps: int, eta: float | None = None, guidance_scale: float | None = None
) -> Pipeline:
    """The pipeline with its step table made to suit another run; the head of the file says how.

    Args:
      pipe: The pipeline; with another sampler if that is what changes.
      steps: Steps of the run.
      eta: Of the run; None if no entry shall be judged by it.
      guidance_scale: Likewise.

    Raises:
      ValueError: If the float time layers are not at hand, or activation ranges were fitted
        for what cannot be resampled: another prediction type, or other weights.
    """
    made, fates = retargeted(pipe, steps=steps, eta=eta, guidance_scale=guidance_scale)
    if lost := [f"{name!r} ({fate.reason})" for name, fate in fates.items() if fate.lost]:
        warnings.warn(
            f"retarget left out what was fitted for another run: {'; '.join(lost)}. Fit it again "
            "by calibrating at these settings.",
            stacklevel=3,
        )
    return made


class Fate(NamedTuple):
    """What became of an entry.

    Attributes:
      what: `"kept"`, `"computed again"`, `"resampled"` or `"left out"`.
      reason: What differed; empty where it was kept.
    """

    what: str
    reason: str = ""

    @property
    def lost(self) -> bool:
        """Whether it is no more in the table."""
        return self.what == "left out"

    def __str__(self) -> str:
        return f"{self.what} ({self.reason})" if self.reason else self.what


def retargeted(
    pipe: Pipeline, *, steps: int, eta: float | None = None, guidance_scale: float | None = None
) -> tuple[Pipeline, dict[str, Fate]]:
    """`retarget`, without its warning: the pipeline, and what became of every entry by name.

    Args:
      pipe: As there.
      steps: As there.
      eta: As there.
      guidance_scale: As there.

    Raises:
      ValueError: As there.
    """
    run = pipe.table_key(steps=steps, eta=eta or 0.0, guidance_scale=guidance_scale)
    run = dataclasses.replace(
        run,
        eta=None if eta is None else run.eta,
        guidance_scale=None if guidance_scale is None else run.guidance_scale,
        guidance_rescale=None,
    )
    old, new, fates = pipe.step_table or StepTable(), StepTable(), {}
    for name, key in old.keys:
        differs = ", ".join(key.mismatch(run)) or "other steps"
        if not key.mismatch(run) and old.steps == len(run.timesteps or ()):
            new = new.with_entry(name, old.entries[name], key=key)
            fates[name] = Fate("kept")
        elif name in _ENTRIES:
            new = _ENTRIES[name](pipe, new, key, run)
            fates[name] = Fate("computed again" if name == COLLECTION else "resampled", differs)
        else:
            fates[name] = Fate("left out", differs)
    bound = getattr(pipe.apply, "__self__", None)
    if COLLECTION not in old.entries and dropped_layers(bound, pipe.params):
        new = _time(pipe, new, TableKey(), run)
        fates[COLLECTION] = Fate("computed again", "it was missing")
    return pipe.replace(step_table=new if new.entries else None), fates


def resample_rows(
    rows: Any,
    old_alpha_bar: Sequence[float] | np.ndarray,
    new_alpha_bar: Sequence[float] | np.ndarray,
) -> Any:
    """For every new step the row of the old step whose log-SNR is nearest; of two, the earlier.

    Args:
      rows: Tree of arrays `[s, ...]`.
      old_alpha_bar: Share of the signal's power at the old steps, `[s]`, 0 to 1.
      new_alpha_bar: The same at the new steps, `[s2]`.

    Returns:
      The tree with leaves `[s2, ...]`.

    Example:
      >>> resample_rows(np.array([10, 20, 30]), [0.1, 0.5, 0.9], [0.15, 0.8]).tolist()
      [10, 30]
    """
    old, new = _log_snr(old_alpha_bar), _log_snr(new_alpha_bar)
    nearest = np.argmin(np.abs(new[:, None] - old[None, :]), axis=1)
    return jax.tree.map(lambda leaf: leaf[nearest], rows)


def _log_snr(alpha_bar: Sequence[float] | np.ndarray) -> np.ndarray:
    """Finite at both ends, so that steps of pure noise have a distance, 0 to each other."""
    a = np.clip(np.asarray(alpha_bar, np.float64), 1e-12, 1 - 1e-12)
    return np.log(a) - np.log1p(-a)


def _time(pipe: Pipeline, table: StepTable, key: TableKey, run: TableKey) -> StepTable:
    """`table` with the time table of another run."""
    del key
    model = network_of(pipe)
    layers = pipe.time_layers
    if layers is None:
        if dropped := dropped_layers(model, pipe.params):
            raise ValueError(
                f"A time table for other steps is made of the float time layers; "
                f"{name_some(list(dropped))} were dropped and {SIDE_FILE} is missing. Put it back "
                "into the folder of the pipeline and load it again, or calibrate with "
                "TimePrecalculation(steps=..., keep='float16')."
            )
        layers = pipe.params
    return _with_time(table, model, layers, run)


def _quant(pipe: Pipeline, table: StepTable, key: TableKey, run: TableKey) -> StepTable:
    """`table` with the activation ranges of the nearest steps."""
    others = dataclasses.replace(run, timesteps=None)
    problems = key.mismatch(others)
    schedule = getattr(pipe.sampler, "schedule", None)
    if problems or key.timesteps is None or run.timesteps is None or schedule is None:
        said = ", ".join(problems) or "a sampler without a schedule, or ranges without timesteps"
        raise ValueError(
            f"Activation ranges are resampled where only the timesteps differ; got {said}. "
            "Calibrate again at the run's settings."
        )
    assert pipe.step_table is not None  # it has the entry
    rows = pipe.step_table.entries["quant"]
    rows = resample_rows(rows, schedule.at(key.timesteps), schedule.at(run.timesteps))
    return table.with_entry("quant", rows, key=dataclasses.replace(key, timesteps=run.timesteps))


_ENTRIES: dict[str, Callable[[Pipeline, StepTable, TableKey, TableKey], StepTable]] = {
    COLLECTION: _time,
    "quant": _quant,
}
"""How an entry is made for another run: of the pipeline, the table so far, and both keys."""


def _with_time(table: StepTable, model: Any, params: Params, run: TableKey) -> StepTable:
    assert run.timesteps is not None  # a sampler's key has them
    rows = time_table(model, params, run.timesteps)
    return table.with_entry(COLLECTION, rows, key=TableKey(timesteps=run.timesteps))


def _kept(layers: Params, keep: Keep) -> dict[str, Any]:
    """The layers on the host, in the dtype in which they are kept."""
    if keep not in ("float16", "float32"):
        raise ValueError(f"keep must be 'float16', 'float32' or None; got {keep!r}.")
    kept = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), dict(layers))
    with np.errstate(over="ignore"):
        cast = jax.tree.map(lambda leaf: leaf.astype(keep), kept)
    if wrong := [path for path, leaf in flatten(cast) if not np.isfinite(leaf).all()]:
        raise ValueError(
            f"Time layers that are kept must fit {keep}; {name_some(wrong)} do not. Use "
            "keep='float32'."
        )
    return cast


def _check_low_rank(layers: Sequence[str], *trees: Params) -> None:
    """That no low-rank branch, whose weight may change later, would be in the table for good."""
    found = {
        path
        for tree in trees
        for path, _ in flatten(split_layers(tree, layers)[1])
        if path.rsplit("/", 1)[-1] in LOW_RANK
    }
    if found:
        raise ValueError(
            f"A time table is made of layers without a LoRA beside them; got "
            f"{name_some(sorted(found))}. Fuse it into the float model first: "
            "pipe.with_lora(path, fuse=True)."
        )
