"""Compile a sampling step of full-size DiT-XL/2 for a TPU, on a machine that has none.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/tpu_compile.py

Needs `pip install "jax[tpu]"` for libtpu, whose compiler runs on a CPU host. Nothing is
executed and no weights exist: params are shapes, quantized as `quantize` quantizes shapes.
A step is the guided prediction of a batch of images, twice as many through the network, and
the update of DDIM. HBM is what the compiler says the program holds: arguments, results (less
those that share memory with arguments) and temporaries. Results go to
`benchmarks/results/tpu_compile.json`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
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
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiT, DiTConfig
from qjax.models.samplers import DDIM
from qjax.models.sampling import guided_prediction
from qjax.models.schedules import Schedule

GUIDANCE_SCALE = 4.0
SAMPLER = DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False)


def variants(config: DiTConfig) -> dict[str, Any]:
    """Shapes of the params by setting: bfloat16, and the recipes with floats in bfloat16."""
    floats = abstract_params(build_denoiser("DiTTransformer2DModel", config.to_diffusers()))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), floats)
    # float16, which the recipes store floats in, is no native type of a TPU.
    rules = lambda name: dataclasses.replace(recipes.by_name(name).quant, float_dtype="bfloat16")
    return {"bf16": half} | {name: quantize(half, rules(name)) for name in ("w8a8", "w4a8")}


def compile_step(params: Any, config: DiTConfig, batch: int, device: Any) -> dict[str, Any]:
    """Seconds to lower and compile one step for `device`, and the memory it takes there."""
    replicated = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    apply = DiT(config, dtype=jnp.bfloat16).apply
    predict = functools.partial(
        guided_prediction,
        apply,
        guidance_scale=GUIDANCE_SCALE,
        guidance_channels=3,
    )

    def step(params, row, x_t, labels):
        null_labels = jnp.full_like(labels, config.num_classes)
        prediction = predict({"params": params}, x_t, row["t"], labels, null_labels)
        x_prev, _ = SAMPLER.step(row, (), x_t, prediction, jnp.zeros_like(x_t))
        return x_prev

    row = {name: jnp.asarray(value[0]) for name, value in SAMPLER.rows(20).items()}
    x_t = jnp.zeros((batch, config.sample_size, config.sample_size, config.in_channels))
    labels = jnp.zeros((batch,), jnp.int32)
    args = jax.tree.map(on_device, (params, row, x_t, labels))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=2).lower(*args)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "lower_seconds": round(lowered_at - start, 1),
        "compile_seconds": round(done - lowered_at, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "hbm_bytes": held,
        "program_bytes": memory.generated_code_size_in_bytes,
        "int8_matmuls": int8_matmuls(compiled.as_text()),
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
    parser.add_argument("--only", nargs="*", help="settings, by name; all of them by default")
    parser.add_argument("--out", type=Path, help="where to write, instead of results/")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    config = DiTConfig.dit_xl_2()
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        of_bf16 = None
        for name, params in variants(config).items():
            if args.only and name not in args.only:
                continue
            found = compile_step(params, config, batch, topology.devices[0])
            of_bf16 = found["hbm_bytes"] if name == "bf16" else of_bf16
            row = {"setting": name, "target": topology.devices[0].device_kind, "batch": batch}
            row["libtpu"] = importlib.metadata.version("libtpu")
            row |= {"params_bytes": tree_bytes(params), **found}
            row["hbm_over_bf16"] = of_bf16 and found["hbm_bytes"] / of_bf16
            rows.append(row)
            print(_timing.table([row]), flush=True)
    _timing.write("tpu_compile", rows, out=args.out)


if __name__ == "__main__":
    main()
