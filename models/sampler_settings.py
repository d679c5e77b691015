"""The settings of a sampler, as diffusers' scheduler configs spell them, and what it offers.

Settings are read from a config by the names diffusers gives them. Keys that belong to another
scheduler's update and say nothing about the model are left alone, as diffusers leaves them;
whatever else is unknown and set is refused, all of it in one error.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from qjax.core.steps import TableKey
from qjax.core.typing import Array, Float
from qjax.models.config_values import value_problems
from qjax.models.schedules import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    Schedule,
    spaced_timesteps,
)

__all__ = ["DIFFUSERS_SPACINGS", "Row", "SamplerSettings", "as_rows"]

DIFFUSERS_SPACINGS = ("leading", "trailing", "linspace")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
    "beta_schedule": BETA_SCHEDULES,
    # The other one, "continuous", gives the network log sigma / 4 in place of a timestep.
    "timestep_type": ("discrete",),
}

# Settings of one scheduler's update, without effect on the others; the last two are found in
# old configs only. What asks for another update by a flag (clip_sample, use_karras_sigmas) is
# not among them: set to True it is refused by samplers that cannot do it.
_OF_OTHERS = {
    "algorithm_type",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "original_inference_steps",
    "sample_max_value",
    "set_alpha_to_one",
    "skip_prk_steps",
    "solver_order",
    "solver_type",
    "time_shift_type",
    "timestep_scaling",
    "variance_type",
    "tensor_format",
    "timestep_values",
}

Row = Mapping[str, Array]
"""The coefficients of one step, scalars; `t` is int32, or float32 where the sampler visits
fractional timesteps, and the others are float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerSettings(abc.ABC):
    """What all samplers have in common; the fields are those of diffusers' configs."""

    name: ClassVar[str]
    """Name in step tables and messages."""
    diffusers_class: ClassVar[str]
    """Name of the scheduler class with the same update."""
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings of the class with few values, and the values."""

    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """The noise schedule of training."""
    prediction_type: str = "epsilon"
    """What the network answers, one of `PREDICTION_TYPES`."""
    timestep_spacing: str = "leading"
    """Which timesteps are visited, one of `SPACINGS` (`schedules.spaced_timesteps`)."""
    steps_offset: int = 0
    """Added to the timesteps of `"leading"`."""

    def __post_init__(self) -> None:
        of_schedule = {name: getattr(self.schedule, name) for name in _names(Schedule)}
        self._raise_for(self._bad_choices(of_schedule | vars(self)))

    @abc.abstractmethod
    def timesteps(self, steps: int) -> np.ndarray:
        """The timestep of every call of the network, never rising; int64 if all are whole."""

    @abc.abstractmethod
    def rows(self, steps: int, *, eta: float = 0.0) -> dict[str, np.ndarray]:
        """The coefficients of every call, as the class's module names them, each `[s]`."""

    @abc.abstractmethod
    def table_key(
        self, steps: int, *, eta: float = 0.0, guidance_scale: float | None = None
    ) -> TableKey:
        """The settings of a run, as the entries of a step table are compared with them."""

    @abc.abstractmethod
    def init(self, x_t: Float[Array, "b h w c"]) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def step(
        self,
        row: Row,
        state: Any,
        x_t: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c2"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """The sample of the next step, and the state."""

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The sampler with the settings of a scheduler's config.

        The class named in the config is not looked at, so DDIM can be read from the config
        of a PNDM or Euler scheduler, as diffusers allows; `sampler_from_diffusers` looks.
        What the config leaves out is as the diffusers scheduler of this class has it.

        Raises:
          ValueError: If the config has unknown keys that are set, or unknown values; it names
            all of them.
        """
        # Defaults of the class that wrote the config, which diffusers does not hand on either.
        defaults = set(config.get("_use_default_values", ()))
        said = {k: v for k, v in config.items() if not k.startswith("_") and k not in defaults}
        own = _names(cls) - {"schedule"}
        known = own | _names(Schedule) | _OF_OTHERS | {*_CHOICES, *cls.choices}
        bad = cls._bad_choices(said)
        for key, value in said.items():
            # None and False switch off a setting that we do not have: nothing is lost.
            if key not in known and value not in (None, False):
                bad.append(f"{key}={value!r} (unknown)")
        bad = bad or value_problems(cls, said) + value_problems(Schedule, said)
        cls._raise_for(bad)
        schedule = Schedule.from_diffusers(cls().schedule.to_diffusers() | said)
        return cls(schedule=schedule, **{key: value for key, value in said.items() if key in own})

    def to_diffusers(self) -> dict[str, Any]:
        """The scheduler config of diffusers; `timestep_spacing="respaced"` only we can read.

        Settings that are None or infinite are left out: they are defaults, and JSON knows no
        infinity.
        """
        own = {name: getattr(self, name) for name in sorted(_names(type(self)) - {"schedule"})}
        own = {k: v for k, v in own.items() if v is not None and not _is_infinite(v)}
        return {"_class_name": self.diffusers_class, **self.schedule.to_diffusers(), **own}

    def _spaced(self, steps: int) -> np.ndarray:
        """The whole timesteps of the settings' spacing, int64 `[s]`."""
        return spaced_timesteps(
            steps,
            num_train_timesteps=self.schedule.num_train_timesteps,
            spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
        )

    def _key(
        self,
        steps: int,
        guidance_scale: float | None,
        *,
        eta: float | None = None,
        sampler: str | None = None,
    ) -> TableKey:
        """The table key of a run; `sampler` in place of the plain name."""
        return TableKey(
            timesteps=tuple(self.timesteps(steps).tolist()),
            sampler=sampler or self.name,
            eta=eta,
            guidance_scale=1.0 if guidance_scale is None else float(guidance_scale),
            prediction_type=self.prediction_type,
            sampler_config=self.digest(),
        )

    def digest(self) -> str:
        """A short hash of the settings."""
        text = json.dumps(self.to_diffusers(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _check_eta(self, eta: float) -> None:
        """Raise for an `eta` in a sampler that has none."""
        if eta != 0:
            raise ValueError(
                f"{type(self).__name__} has no eta; got {eta=}. Leave it out, or use DDIM to "
                f"vary it."
            )

    @classmethod
    def _bad_choices(cls, config: Mapping[str, Any]) -> list[str]:
        """Every setting whose value is not among its choices, with the choices."""
        return [
            f"{key}={config[key]!r} (one of {', '.join(map(str, choices))})"
            for key, choices in (_CHOICES | dict(cls.choices)).items()
            if key in config and config[key] not in choices
        ]

    @classmethod
    def _raise_for(cls, bad: list[str]) -> None:
        if bad:
            raise ValueError(
                f"every setting of {cls.__name__} must be one it knows; got {'; '.join(bad)}."
            )


def as_rows(timesteps: np.ndarray, **columns: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the scan: `t` as int32 or, where timesteps are fractional, float32, the rest float32.

    Args:
      timesteps: `[s]`, integers or floats.
      **columns: The coefficients, each `[s]` or one for all steps.
    """
    whole = np.issubdtype(timesteps.dtype, np.integer)
    rows = {"t": timesteps.astype(np.int32 if whole else np.float32)}
    for name, column in columns.items():
        rows[name] = np.broadcast_to(column, timesteps.shape).astype(np.float32)
    return rows


def _names(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)
