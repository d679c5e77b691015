"""GPTQ as a stage: block after block, every layer by the inputs that the quantized network has.

The float sampler is rolled out, and on pairs of an item and a step of it, both halves of
guidance, `H = X^T X` is summed up for every quantized layer of a block: the blocks before it
are quantized already, and so are the inputs themselves (`collect.py`). All layers of a block are
rounded by one pass. A layer whose error is no less than that of rounding to nearest keeps the
latter, and the log says so.

A convolution is rounded as the matmul of its patches that it is.

References:
  Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323;
  Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.calibrate.blocks import Block
from qjax.calibrate.calibration import Calibration
from qjax.calibrate.collect import Data, Samples
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import quantize_input
from qjax.calibrate.gptq import GPTQSettings, gptq, output_error
from qjax.calibrate.ranges import Method
from qjax.calibrate.recipe import State
from qjax.calibrate.reconstruction import FitSettings, Runner
from qjax.calibrate.requantize import method_of, spec_of
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.simulate import is_conv, simulated
from qjax.calibrate.work import Work
from qjax.core.qtensor import QTensor, from_codes
from qjax.core.typing import Array, Float, Params, PRNGKeyArray
from qjax.kernels.quant_conv_xla import explicit_padding, im2col, pad_image

__all__ = ["GPTQ", "layer_hessians"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(GPTQSettings):
    """The stage of a recipe that rounds weights by GPTQ.

    Attributes:
      steps: Steps of the sampler, those of its later use; None: not chosen yet, which `check`
        refuses.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: The calibration set.
      samples: Whose samples the network is asked at.
      pairs: Pairs of an item and a step that inputs are taken at.
      groups: Groups of steps that share a range, for ranges that are fitted.
      ranges: How a range is found, for those.
      batch: Items that run at once.
      memory_gib: Most that the inputs of a block may take.
      most_inputs: Layers with more inputs (taps counted) keep rounding to nearest: `H` has
        their number squared.
    """

    steps: int | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=CalibrationSet)
    samples: Literal["quantized", "float"] = "float"
    pairs: int = 256
    groups: int | None = None
    ranges: Method = "minmax"
    batch: int = 64
    memory_gib: float = 4.0
    most_inputs: int = 12288

    @property
    def settings(self) -> SerialParallelSettings:
        """The same as settings of a serial-to-parallel run."""
        names = ("steps", "eta", "guidance_scale", "data", "samples", "pairs", "groups", "ranges")
        shared = {name: getattr(self, name) for name in (*names, "batch", "memory_gib")}
        fit = FitSettings(iterations=1, weights="nearest", act_rate=0.0)
        return SerialParallelSettings(**shared, fits="blocks", fit=fit)

    def check(self, pipe: Any) -> int:
        """As `SerialParallelSettings.check`."""
        return self.settings.check(pipe)

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with the student's integers rounded anew.

        Raises:
          ValueError: If nothing is quantized, or the calibration set does not suit the model.
        """
        run = _Run(state.teacher, state.student, self.settings, key, work, floats=state.floats)
        run.stage = self
        if not any(fmt.reads_rows for fmt in run.student.formats.values()):
            run.settings = dataclasses.replace(run.settings, last_ranges=False)
        return dataclasses.replace(state, student=run.run())


class _Run(Calibration):
    """A calibration whose blocks are rounded, not fitted."""

    stage: GPTQ

    def fit_blocks(self, samples: list[Samples], refresh: int, fit: FitSettings) -> None:
        blocks = self._blocks(samples)
        for number, (block, runner, data) in enumerate(blocks):
            make = functools.partial(self._round, block, runner, data)
            part = self.work.part(f"block-{number}", make)
            found: dict[str, QTensor] = {}
            for layer in block.layers:
                if f"{layer}:codes" in part:
                    path = block.absolute(layer)
                    like = self.student.kernels[path]
                    found[path] = from_codes(
                        part[f"{layer}:codes"],
                        part[f"{layer}:scale"],
                        part.get(f"{layer}:zero_point"),
                        like=like,
                        layout=like.layout,
                    )
            self.student = self.student.with_codes(found)
            self.work.log("rounded", block=block.path, share=round((number + 1) / len(blocks), 4))
        self.forwards += 2 * len(blocks) * len(samples) * len(samples[0].t)

    def _round(
        self, block: Block, runner: Runner, collected: Callable[[], Data]
    ) -> dict[str, Array]:
        data = collected()
        fixed = self.student.fixed(block)
        params = self.student.block_params(block, fixed)
        acts = {
            layer: self.tables[block.absolute(layer)]
            for layer in block.layers
            if block.absolute(layer) in self.tables
        }
        small = tuple(
            layer for layer, fmt in runner.formats if _inputs(fmt.shape) <= self.stage.most_inputs
        )
        hessians = layer_hessians(runner, params, data, acts, only=small, batch=self.settings.batch)
        part: dict[str, Array] = {}
        for layer in block.layers:
            path = block.absolute(layer)
            if layer not in hessians:
                self.work.log("kept", layer=path, inputs=_inputs(self.student.kernels[path].shape))
                continue
            q, w, hessian = self.student.kernels[path], fixed[layer]["w"], hessians[layer]
            spec, group_size = spec_of(q, method_of(self.pipe.quant, f"{path}/kernel", q.shape))
            matrix = w.reshape(-1, w.shape[-1])
            codes = gptq(
                matrix,
                hessian,
                spec,
                group_size=group_size,
                scale_dtype=q.scale.dtype,
                settings=GPTQSettings(
                    **{
                        f.name: getattr(self.stage, f.name)
                        for f in dataclasses.fields(GPTQSettings)
                    }
                ),
            )
            shape = q.scale.shape
            zero = None if codes.zero_point is None else codes.zero_point.reshape(shape)
            made = from_codes(
                codes.codes.reshape(w.shape), codes.scale.reshape(shape), zero, like=q
            )
            errors = [
                float(
                    output_error(matrix, one.dequantize(jnp.float32).reshape(matrix.shape), hessian)
                )
                for one in (q, made)
            ]
            better = errors[1] < errors[0]
            self.work.log("layer", layer=path, nearest=errors[0], gptq=errors[1], taken=better)
            if better:
                part[f"{layer}:codes"] = codes.codes.reshape(w.shape)
                part[f"{layer}:scale"] = codes.scale.reshape(shape)
                if zero is not None:
                    part[f"{layer}:zero_point"] = zero
        return part or {"none": jnp.zeros((1,))}


def _inputs(shape: tuple[int, ...]) -> int:
    """Rows of a kernel read as a matrix."""
    return math.prod(shape[:-1])


def layer_hessians(
    runner: Runner,
    params: Params,
    data: Data,
    acts: Mapping[str, Mapping[str, Array]],
    *,
    only: tuple[str, ...],
    batch: int,
) -> dict[str, Float[Array, "i i"]]:
    """`X^T X / n` of the quantized inputs of a block's layers, n rows of X in all.

    Args:
      runner: The block.
      params: Its params; its own layers in float.
      data: Its inputs, as `collect` gives them.
      acts: Tables of ranges, by layer.
      only: Layers wanted.
      batch: Items that run at once; a rest that fills no batch is left out.
    """
    items = len(data.group)
    batch = min(batch, items)
    total: dict[str, Array] = {}
    for start in range(0, items - batch + 1, batch):
        part = jax.tree.map(lambda a, s=start: a[s : s + batch], (data.inputs, data.group))
        found = _hessians(runner, only, params, acts, *part)
        total = found if not total else jax.tree.map(jnp.add, total, found)
    count = items // batch
    return {layer: hessian / count for layer, hessian in total.items()}


@functools.partial(jax.jit, static_argnames=("runner", "only"))
def _hessians(runner: Runner, only: tuple[str, ...], params, acts, inputs, group):
    formats = dict(runner.formats)
    found: dict[str, Array] = {}

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        if path not in formats:
            return x
        act = formats[path].act
        if act is not None:
            x = quantize_input(x, act, module, jax.tree.map(lambda a: a[group], acts.get(path)))
        if path in only:
            rows = _rows(module, x, formats[path].shape).astype(jnp.float32)
            found[path] = jnp.matmul(rows.T, rows, precision="highest") / rows.shape[0]
        return x

    assert runner.module is not None
    args, kwargs = inputs
    with simulated(hook):
        runner.module.apply({"params": params}, *args, **kwargs)
    return found


def _rows(module: nn.Module, x: Array, shape: tuple[int, ...]) -> Float[Array, "m i"]:
    """A layer's input as the rows that multiply its kernel, read as a matrix."""
    if not is_conv(module):
        return x.reshape(-1, x.shape[-1])
    strides: Any = getattr(module, "strides", 1)
    stride = strides if isinstance(strides, int) else strides[0]
    pads = explicit_padding(module.padding, x.shape[1:3], shape[:2], stride)
    patches = im2col(pad_image(x, pads, None), (shape[0], shape[1]), stride)
    return patches.reshape(-1, patches.shape[-1])
