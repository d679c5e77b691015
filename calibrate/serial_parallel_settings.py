"""The settings of serial-to-parallel calibration; `serial_parallel.py` says what they make of it."""

import dataclasses
from typing import Literal

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import Method
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.rollout import shared_steps
from qjax.calibrate.trajectory import require_no_history
from qjax.models.pipeline import Pipeline

Fits = Literal["blocks", "network", "both", "ranges"]
Schedule = Literal["refresh", "serial", "register"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialParallelSettings:
    """How the two phases alternate.

    Attributes:
      steps: Steps of the sampler, those of its later use; None: not chosen yet, which `check`
        refuses.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: The calibration set.
      groups: Groups of neighbouring steps that share a range; None: every step has its own.
      samples: Whose samples the fit is made on: the quantized network's, the float one's, or, with
        `"float_first"`, the float one's until the first refresh (DAgger begins so).
      fits: What is fitted in the parallel phase; `"both"` gives blocks the first half of the
        iterations and the network the second.
      schedule: `"refresh"`: roll-outs and fits in turn. Online (`register.py`), the whole
        network: `"register"` with all steps in every batch, `"serial"` with one after the other.
      refreshes: Roll-outs, each followed by its share of the iterations.
      fresh: Whether every roll-out begins with noise of its own, what items are told staying; else
        all begin with the same, and the log says how far the samples have moved.
      shift_every: Iterations after which samples move on, online.
      horizon: Steps after which samples are compared, the whole network being fitted
        (`trajectory.py`); 0 compares the network's answers.
      pairs: Pairs of an item and a step that the fit is made on.
      fit: How blocks, or the network, are fitted.
      ranges: How a range is found in the serial phase.
      last_ranges: Whether a last roll-out finds the ranges anew, on the final weights; else they
        stay as they were learned. None: only if they were not (`fit.act_rate=0`).
      batch: Items that run at once in roll-outs and captures.
      memory_gib: Most that the data of the blocks being fitted may take.
      keep_every: Iterations of a fit after which its state is kept on disk.
      shards: Logical shards of the data, spread over the devices of a pod; the numbers depend on
        how many there are, and not on the devices. None: the data is one, on one device.
      at_once: Most alike blocks that are fitted at the same time, on what the network gives them
        before the first of these is fitted; needs `shards`.
      reduction: How gradients of shards are added up: `"ordered"`, which has the same bits on
        any devices, or `"fast"`, which has them up to float32's rounding.
    """

    steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=CalibrationSet)
    groups: int | None = None
    samples: Literal["quantized", "float", "float_first"] = "quantized"
    fits: Fits = "blocks"
    schedule: Schedule = "refresh"
    refreshes: int = 1
    fresh: bool = True
    shift_every: int = 1
    horizon: int = 0
    pairs: int = 512
    fit: FitSettings = dataclasses.field(default_factory=FitSettings)
    ranges: Method = "mse"
    last_ranges: bool | None = None
    batch: int = 64
    memory_gib: float = 4.0
    keep_every: int = 500
    shards: int | None = None
    at_once: int = 1
    reduction: Literal["ordered", "fast"] = "ordered"

    def __post_init__(self):
        for name in ("refreshes", "pairs", "batch", "shift_every", "keep_every", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name, allowed in (
            ("samples", ("quantized", "float", "float_first")),
            ("fits", ("blocks", "network", "both", "ranges")),
            ("schedule", ("refresh", "serial", "register")),
            ("ranges", ("minmax", "mse")),
            ("reduction", ("ordered", "fast")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if self.horizon < 0:
            raise ValueError(f"horizon must be at least 0; got {self.horizon}.")
        whole = self.fits in ("network", "both")
        if (self.horizon or self.fit.distillation) and not whole:
            raise ValueError(
                f"horizon and distillation need fits='network' or 'both'; got {self.fits!r}."
            )
        if self.schedule != "refresh" and (
            self.fits != "network" or self.samples != "quantized" or self.horizon
        ):
            raise ValueError(
                f"schedule={self.schedule!r} fits the network online, on its own samples and "
                "answers: it needs fits='network', samples='quantized' and horizon=0; got "
                f"{self.fits!r}, {self.samples!r} and {self.horizon}."
            )
        if self.horizon and self.fit.distillation:
            raise ValueError("distillation compares one step; use it with horizon=0.")
        self._check_shards()

    def _check_shards(self) -> None:
        if self.shards is None:
            if self.at_once != 1:
                raise ValueError(f"at_once needs shards; got at_once={self.at_once}, shards=None.")
            return
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1; got {self.shards}.")
        for name, count in (
            ("data.items", self.data.items),
            ("fit.batch", self.fit.batch),
            ("pairs", self.pairs),
        ):
            if count % self.shards:
                raise ValueError(
                    f"{name} must be a multiple of the {self.shards} shards; got {count}."
                )
        if self.schedule != "refresh" or self.horizon or self.fit.order != "shuffled":
            raise ValueError(
                "shards need schedule='refresh', horizon=0 and fit.order='shuffled'; got "
                f"{self.schedule!r}, {self.horizon} and {self.fit.order!r}."
            )

    @property
    def finds_last_ranges(self) -> bool:
        """Whether a last roll-out finds ranges anew."""
        if self.fits == "ranges":
            return False  # the roll-out before was that
        return self.fit.act_rate == 0 if self.last_ranges is None else self.last_ranges

    def check(self, pipe: Pipeline) -> int:
        """The steps of the sampler, if all that can be told beforehand is in order.

        Args:
          pipe: The float pipeline.

        Raises:
          ValueError: If the steps are not chosen, or are too few for `horizon` or `groups`, the
            calibration set does not suit the model, or its sampler does not suit `horizon`.
        """
        if self.steps is None:
            raise ValueError(
                "ranges are fitted for every step of the sampler, whose number is not chosen: give "
                "steps (on the command line --steps), and the guidance_scale of the later use."
            )
        calls = len(pipe.sampler.rows(self.steps, eta=self.eta)["t"])
        if self.horizon > calls:
            raise ValueError(
                f"horizon must be at most the {calls} steps of the sampler; got {self.horizon}."
            )
        if self.groups is not None:
            shared_steps(calls, self.groups)
        if self.shards is not None and calls * self.data.items < self.shards:
            raise ValueError(
                f"{calls} steps of {self.data.items} items are fewer than {self.shards} shards."
            )
        self.data.check(pipe)
        if self.horizon:
            require_no_history(pipe.sampler)
        return self.steps
