"""A noise correction fitted again, for a run that a saved pipeline was not fitted for.

It needs the float network that the quantized one was made of. How the correction was fitted,
whose samples it was collected on and what is corrected, stands in its key and is kept.
"""

import dataclasses
import json

import jax

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import ENTRY, HOW, NoiseCorrection
from qjax.calibrate.recipe import State
from qjax.calibrate.work import OnEvent, Work
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.core.steps import StepTable
from qjax.models.pipeline import Pipeline
from qjax.models.saving import with_digest

__all__ = ["refit", "settings_of"]


def settings_of(
    pipe: Pipeline,
    *,
    steps: int,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
) -> NoiseCorrection:
    """The settings of a pipeline's correction, for another run.

    Args:
      pipe: A pipeline with a correction.
      steps: Of the run.
      eta: Likewise.
      guidance_scale: Likewise.
      data: What to collect on, of as many items as the correction was; None for labels in turn.

    Raises:
      KeyError: If it has none.
    """
    how = json.loads((pipe.step_table or StepTable()).key(ENTRY).settings or "{}")
    plain = NoiseCorrection(steps=steps, eta=eta, guidance_scale=guidance_scale)
    items = how.get("items", plain.data.items)
    words = dataclasses.replace(plain.data if data is None else data, items=items)
    known = {name: how[name] for name in HOW if name in how}
    return dataclasses.replace(plain, data=words, **known)


def refit(
    pipe: Pipeline,
    teacher: Pipeline,
    settings: NoiseCorrection,
    *,
    seed: int = 0,
    on_event: OnEvent | None = None,
) -> Pipeline:
    """A quantized pipeline with a correction for another run, the rest of its table kept.

    Args:
      pipe: The quantized pipeline; its other entries must be of the run's timesteps
        (`Pipeline.retarget`).
      teacher: The float one.
      settings: Of the run, and of the correction (`settings_of`).
      seed: Of the items' noise.
      on_event: Progress: called with every event of the log.

    Raises:
      ValueError: If an entry is of other settings, or `teacher` is not the float network that
        `pipe` was made of.
    """
    wrong = None
    made_of = None if pipe.source is None else pipe.source.sha256
    if any(is_qtensor(leaf) for _, leaf in flatten(teacher.params)):
        wrong = "it is quantized itself"
    elif made_of is not None and with_digest(teacher).sha256 != made_of:
        wrong = "its params have another hash"
    if wrong is not None:
        raise ValueError(
            "noise is what parts a quantized network from the float one that it was made of; the "
            f"model given is not that: {wrong}. Give the float model that was quantized."
        )
    work = Work(None, on_event)
    return settings.run(State(teacher, pipe), jax.random.key(seed), work).student
