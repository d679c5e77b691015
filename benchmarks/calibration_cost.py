"""What calibrating the published models costs: `python benchmarks/calibration_cost.py`

Evaluations of the networks, FLOP and bytes of serial-to-parallel calibration (the recipe
`s2p_w4a8`: 3 roll-outs and a last one for ranges, 64 items, 20 steps, both halves of guidance,
512 pairs a refresh, 600 iterations of 32) and of AdaRound block by block; counted, from shapes
alone. Seconds are a projection, not a measurement: FLOP over a share of an accelerator's rate.

- FLOP of an evaluation: its matmuls, convolutions and attention, twice their multiplications;
  with its gradient three times that. Quantizing in float is not counted.
- A roll-out sees every batch twice, to find the ranges and to step with them.
- Fitting block after block, a block's inputs are captured from the quantized and its targets
  from the float network, run whole for every block; its iterations over all blocks are those of
  one network.
- Bytes: `float` the network's params in float32; `state` those of teacher and student, what is
  fitted and Adam's two moments; `activations` all results of matmuls and convolutions of a batch
  in float32, about what a gradient of the whole network keeps; `buffer` samples of a roll-out.

Writes `benchmarks/results/calibration_cost.json`.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _timing import table, write

from qjax import recipes
from qjax.calibrate.blocks import find_blocks
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.core.quantize import plan
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs

NAME = "calibration_cost"
MODELS: dict[str, DiTConfig | UNet2DConditionConfig] = {
    "Stable Diffusion v1-4": UNet2DConditionConfig.sd_v1_4(),
    "Stable Diffusion XL 1.0": UNet2DConditionConfig.sdxl(),
    "DiT-XL/2": DiTConfig.dit_xl_2(),
}
STEPS, HALVES = 20, 2
RATES = {"tf32": 495e12, "bf16": 990e12}
"""FLOP/s of an H100 SXM without sparsity, by its data sheet."""
SHARE = 0.4
"""Of the rate, assumed to be reached."""
PUBLISHED = {"iterations": 20_000, "batch": 32}
"""Of AdaRound, a block (BRECQ, Q-Diffusion)."""
WITH_GRADIENT = 3


class Counted(NamedTuple):
    """Of one evaluation on one item: FLOP, and bytes of what its products come to in float32."""

    flop: float
    activations: float


def counted(jaxpr: Any) -> Counted:
    """The products in a program, those of programs within it included."""
    flop, activations = 0.0, 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            depth = float(np.prod([equation.invars[0].aval.shape[axis] for axis in left]))
        elif equation.primitive.name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = equation.invars[1].aval.shape
            depth = float(np.prod(kernel)) / kernel[spec[0]]
        else:
            # What is not a program among the parameters has no equations.
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    found = counted(inner)
                    flop, activations = flop + found.flop, activations + found.activations
            continue
        size = float(np.prod(out.shape))
        flop, activations = flop + 2 * depth * size, activations + 4 * size
    return Counted(flop, activations)


def inputs_of(
    config: DiTConfig | UNet2DConditionConfig, shape: tuple[int, int, int]
) -> tuple[Any, ...]:
    """Shapes of one item: sample, timestep, and what the network is told."""
    if isinstance(config, UNet2DConditionConfig):
        return tuple(abstract_inputs(config, batch=1, size=shape[:2]))
    return (
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def row(name: str) -> dict[str, Any]:
    """Counts of one model."""
    config = MODELS[name]
    described = config.to_diffusers()
    denoiser = build_denoiser(described["_class_name"], described)
    params = abstract_params(denoiser)
    inputs = inputs_of(config, denoiser.fields["shape"])
    apply = lambda params, *inputs: denoiser.model.apply({"params": params}, *inputs)
    one = counted(jax.make_jaxpr(apply)(params, *inputs).jaxpr)
    recipe = recipes.s2p_w4a8(steps=STEPS)
    stage = recipe.stages[0]
    assert isinstance(stage, SerialParallel)
    layers = {
        entry.path.removesuffix("/kernel"): 0
        for entry in plan(params, recipe.quant).entries
        if entry.weight is not None
    }
    # Leaves become arrays only within eval_shape, where they cost nothing.
    blank = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    blocks = len(find_blocks(lambda: apply(*jax.tree.map(blank, (params, *inputs))), layers))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    roll_outs = (stage.refreshes + 1) * STEPS * stage.data.items * HALVES * 2
    answers = stage.refreshes * stage.pairs * HALVES
    fit = stage.fit.iterations * stage.fit.batch * WITH_GRADIENT
    captures = 2 * blocks * stage.refreshes * stage.pairs * HALVES
    published = PUBLISHED["iterations"] * PUBLISHED["batch"] * WITH_GRADIENT
    variants = {
        "s2p, network": roll_outs + answers + fit,
        "s2p, blocks": roll_outs + captures + fit,
        "adaround, blocks, 2000 iterations": captures // stage.refreshes
        + 2000 * PUBLISHED["batch"] * WITH_GRADIENT,
        "adaround, blocks, published 20000": captures // stage.refreshes + published,
    }
    minutes = {
        f"{kind}, {dtype}": count * one.flop / (SHARE * rate) / 60
        for kind, count in variants.items()
        for dtype, rate in RATES.items()
    }
    latent = 4 * float(np.prod(inputs[0].shape))
    return {
        "model": name,
        "blocks": blocks,
        "tflop_per_evaluation": one.flop / 1e12,
        "evaluations_in_roll_outs": roll_outs,
        "evaluations_for_answers": answers,
        "evaluations_in_fit_gradients_as_3": fit,
        "evaluations_for_captures_of_blocks": captures,
        "evaluations": variants,
        "float_gb": size / 1e9,
        "state_gb_network": 5 * size / 1e9,
        "activations_gb_an_item_network": one.activations / 1e9,
        "buffer_gb": STEPS * stage.data.items * latent / 1e9,
        "share_of_rate_assumed": SHARE,
        "minutes_projected": minutes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rows = [row(name) for name in MODELS]
    flat = [{k: v for k, v in one.items() if not isinstance(v, dict)} for one in rows]
    print(table(flat))
    print(table([{"model": one["model"], **one["minutes_projected"]} for one in rows]))
    print(write(NAME, rows, out=args.out))


if __name__ == "__main__":
    main()
