"""Compile a sampling step of full-size models for a TPU, on a machine that has none.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_compile.py

Needs `pip install "jax[tpu]"` for libtpu, whose compiler runs on a CPU host. Nothing is
executed and no weights exist: params are shapes, quantized as `quantize` quantizes shapes.
Settings are bfloat16 and the recipes' with other floats in bfloat16. A step is the guided
prediction of a batch of images, twice as many through the network, and the update of DDIM. HBM is
what the compiler says the program holds: arguments, results (less those that share memory with
arguments) and temporaries. Results go to `benchmarks/results/tpu_compile.json`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import re
import time
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax import recipes
from qjax.core.quantize import quantize, tree_bytes
from qjax.kernels.target import target
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.published import PUBLISHED, published_shapes
from qjax.models.samplers import DDIM
from qjax.models.sampling import guided_prediction
from qjax.models.schedules import Schedule
from qjax.models.unet2d_condition_inputs import abstract_inputs

GUIDANCE_SCALE = 4.0
SAMPLER = DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False)


def variant(model: str, setting: str) -> Any:
    """Shapes of the params: in bfloat16, or by a recipe with floats in bfloat16."""
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), published_shapes(model)
    )
    if setting == "bf16":
        return half
    # float16, which the recipes store floats in, is no native type of a TPU.
    quant = recipes.by_name(setting).quant
    return quantize(half, dataclasses.replace(quant, float_dtype="bfloat16"))


def inputs(model: str, batch: int) -> tuple[Any, Any, dict[str, Any]]:
    """Latents, labels or text, and settings of the guidance."""
    config = PUBLISHED[model]()
    if isinstance(config, DiTConfig):
        side = config.sample_size
        x_t = jax.ShapeDtypeStruct((batch, side, side, config.in_channels), jnp.float32)
        return x_t, jax.ShapeDtypeStruct((batch,), jnp.int32), {"guidance_channels": 3}
    x_t, _, conditioning = abstract_inputs(config, batch=batch, size=(config.sample_size,) * 2)
    return x_t, conditioning, {}


def compile_step(model: str, params: Any, batch: int, device: Any) -> dict[str, Any]:
    """Seconds to lower and compile one step for `device`, and the memory it takes there."""
    replicated = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    config = PUBLISHED[model]().to_diffusers()
    network = build_denoiser(config["_class_name"], config).model.clone(dtype=jnp.bfloat16)
    x_t, labels, settings = inputs(model, batch)
    predict = functools.partial(
        guided_prediction, network.apply, guidance_scale=GUIDANCE_SCALE, **settings
    )

    def step(params, row, x_t, labels, null_labels):
        prediction = predict({"params": params}, x_t, row["t"], labels, null_labels)
        x_prev, _ = SAMPLER.step(row, (), x_t, prediction, jnp.zeros_like(x_t))
        return x_prev

    row = {name: jnp.asarray(value[0]) for name, value in SAMPLER.rows(20).items()}
    args = jax.tree.map(on_device, (params, row, x_t, labels, labels))
    start = time.perf_counter()
    with target("tpu", device.device_kind):
        lowered = jax.jit(step, donate_argnums=2).lower(*args)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "lower_seconds": round(lowered_at - start, 1),
        "compile_seconds": round(done - lowered_at, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "hbm_bytes": held,
        "program_bytes": memory.generated_code_size_in_bytes,
        "int8_matmuls": int8_matmuls(text),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


def int8_matmuls(text: str) -> int:
    """Matmuls (convolutions, to this compiler) of the compiled program with int32 sums."""
    return len(re.findall(r"= s32\[[^\]]*\]\S* (?:convolution|dot)\(", text))


def main() -> None:
    """Compile every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2", help="one device of it is used")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 8],
        help="images; guidance computes twice as many",
    )
    parser.add_argument("--models", nargs="+", default=["dit-xl-2-256", "sd-v1-4"])
    parser.add_argument("--settings", nargs="+", default=["bf16", "w8a8", "w4a8"])
    parser.add_argument("--out", type=Path, help="where to write, instead of results/")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    device = topology.devices[0]
    rows: list[dict[str, Any]] = []
    for model, batch in itertools.product(args.models, args.batch):
        of_bf16, bf16_bytes = None, tree_bytes(variant(model, "bf16"))
        for setting in args.settings:
            params = variant(model, setting)
            found = compile_step(model, params, batch, device)
            of_bf16 = found["hbm_bytes"] if setting == "bf16" else of_bf16
            row = {"model": model, "setting": setting, "target": device.device_kind}
            row |= {"batch": batch, "libtpu": importlib.metadata.version("libtpu")}
            row |= {"params_bytes": tree_bytes(params), "bf16_bytes": bf16_bytes, **found}
            row["hbm_over_bf16"] = of_bf16 and found["hbm_bytes"] / of_bf16
            rows.append(row)
            print(_timing.table([row]), flush=True)
    _timing.write("tpu_compile", rows, out=args.out)


if __name__ == "__main__":
    main()
