"""Bytes of DiT-XL/2 at full size in 4 bits, and the memory that quantizing it takes.

    python benchmarks/dit_xl_size.py

One process makes a checkpoint: diffusers' own `DiTTransformer2DModel` with random weights, the
embedder of block 0 copied to all blocks as in the published checkpoint, saved in float16. A
second one loads it with `qjax.load(folder, quantize=...)`, which quantizes every tensor as it
is read, and saves the result. Memory is `ru_maxrss` at the end of the load less that before
it, all modules imported and JAX started: what the process took at its peak. Results go to
`benchmarks/results/dit_xl_size.json`. Needs torch and about 5 GB of disk and memory.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp

import qjax
from qjax import recipes
from qjax.core.config import QuantConfig, Rule
from qjax.core.quantize import plan, tree_bytes
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule

SAMPLER = DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False)


def config(method: str) -> QuantConfig:
    """The rules of `w4a16` (W4, symmetric, groups of 128), by the given method."""
    quant = recipes.w4a16().quant
    assert quant.weight is not None and quant.weight.symmetric
    weight = dataclasses.replace(quant.weight, method=method, group_size=128)
    return dataclasses.replace(quant, weight=weight)


def make_checkpoint(folder: Path, sizes: DiTConfig) -> None:
    """Write a pipeline in the layout of diffusers, its transformer by diffusers itself."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    options = {k: v for k, v in sizes.to_diffusers().items() if not k.startswith("_")}
    model = DiTTransformer2DModel(**options)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    model.half().save_pretrained(folder / "transformer", safe_serialization=True)
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    scheduler = json.dumps(SAMPLER.to_diffusers())
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)


def measure(folder: Path, saved: Path, method: str) -> dict[str, Any]:
    """Load and quantize the checkpoint, save it, and count; in a process of its own."""
    jnp.zeros(1).block_until_ready()  # JAX has started
    before, live_before = _peak_bytes(), _live_bytes()
    start = time.perf_counter()
    pipe = qjax.load(folder, quantize=config(method))
    jax.block_until_ready(pipe.params)
    seconds, peak = time.perf_counter() - start, _peak_bytes() - before
    live = _live_bytes() - live_before
    pipe.save(saved)
    return {
        "method": method,
        "quantized_bytes": tree_bytes(pipe.params),
        "live_device_bytes": live,
        "saved_bytes": sum(path.stat().st_size for path in saved.iterdir()),
        "checkpoint_bytes": _weights(folder).stat().st_size,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
    }


def planned(sizes: DiTConfig, method: str) -> dict[str, int]:
    """What the plan says: 16-bit and quantized bytes, and with the last adaLN in 16 bits."""
    shapes = abstract_params(build_denoiser("DiTTransformer2DModel", sizes.to_diffusers()))
    quant = config(method)
    rule = Rule(pattern="final_modulation/kernel")
    kept = dataclasses.replace(quant, rules=(*quant.rules, rule))
    return {
        "float16_bytes": plan(shapes, quant).bytes_before,
        "planned_bytes": plan(shapes, quant).bytes_after,
        "planned_bytes_final_modulation_16_bit": plan(shapes, kept).bytes_after,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _live_bytes() -> int:
    """Bytes of all live JAX arrays; sub-byte codes are packed in uint8, so they count truly."""
    return sum(array.nbytes for array in jax.live_arrays())


def _weights(folder: Path) -> Path:
    (path,) = (folder / "transformer").glob("*.safetensors")
    return path


def _alone(*arguments: str) -> str:
    """This script with other arguments in a process of its own; its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return (done.stdout.splitlines() or [""])[-1]


def main() -> None:
    """Make, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("minmax", "mse"), default="mse", help="of the ranges")
    parser.add_argument("--layers", type=int, default=28, help="blocks; fewer to try it out")
    parser.add_argument("--out", type=Path, help="where to write, instead of results/")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = dataclasses.replace(DiTConfig.dit_xl_2(), num_layers=args.layers)
    if args.make:
        make_checkpoint(args.make, sizes)
        return
    if args.measure:
        print(json.dumps(measure(*args.measure, args.method)))
        return
    options = ("--layers", str(args.layers), "--method", args.method)
    with tempfile.TemporaryDirectory() as scratch:
        folder, saved = Path(scratch, "float"), Path(scratch, "saved")
        folder.mkdir()
        _alone("--make", str(folder), *options)
        measured = json.loads(_alone("--measure", str(folder), str(saved), *options))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    row = {"model": "DiT-XL/2", "blocks": args.layers, "setting": "W4 symmetric, groups of 128"}
    row |= measured | planned(sizes, args.method)
    print(json.dumps(row | versions, indent=1))
    _timing.write("dit_xl_size", [row | versions], out=args.out)


if __name__ == "__main__":
    main()
