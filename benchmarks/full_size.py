"""Bytes of a model at full size in 4 bits, and the memory that quantizing it takes.

    python benchmarks/full_size.py dit_xl_2
    python benchmarks/full_size.py sdxl --method minmax

One process makes a checkpoint: diffusers' own class with random weights, saved in float16; of
DiT the embedder of block 0 is copied to all blocks, as in the published checkpoint. A second one
loads it with `qjax.load(folder, quantize=...)`, which quantizes every tensor as it is read, and
saves the result. Memory is `ru_maxrss` at the end of the load less that before it, all modules
imported and JAX started: what the process took at its peak. Results go to
`benchmarks/results/full_size_MODEL.json`. Needs torch; DiT-XL/2 about 5 GB of disk and memory,
the UNet of Stable Diffusion XL 8 GB of disk and 11 GB of memory.
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
from qjax.models.unet2d_condition_config import UNet2DConditionConfig

SAMPLER = DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False)


def config(method: str) -> QuantConfig:
    """The rules of `w4a16` (W4, symmetric, groups of 128 or 64), by the given method."""
    quant = recipes.w4a16().quant
    assert quant.weight is not None and quant.weight.symmetric
    weight = dataclasses.replace(quant.weight, method=method)
    return dataclasses.replace(quant, weight=weight)


def config_of(model: str, layers: int | None) -> DiTConfig | UNet2DConditionConfig:
    """The published sizes, or fewer blocks of DiT to try it out."""
    if model == "sdxl":
        return UNet2DConditionConfig.sdxl()
    sizes = DiTConfig.dit_xl_2()
    return sizes if layers is None else dataclasses.replace(sizes, num_layers=layers)


def make_checkpoint(folder: Path, sizes: DiTConfig | UNet2DConditionConfig) -> None:
    """Write a pipeline in the layout of diffusers, its denoiser by diffusers itself."""
    import diffusers
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    options = {k: v for k, v in sizes.to_diffusers().items() if not k.startswith("_")}
    name = sizes.to_diffusers()["_class_name"]
    component = "transformer" if isinstance(sizes, DiTConfig) else "unet"
    model = getattr(diffusers, name)(**options)
    if component == "transformer":
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    model.save_pretrained(folder / component, safe_serialization=True, max_shard_size="20GB")
    index = {
        "_class_name": "Pipeline",
        component: ["diffusers", name],
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


def planned(sizes: DiTConfig | UNet2DConditionConfig, method: str) -> dict[str, int]:
    """What the plan says: 16-bit and quantized bytes, of DiT with the last adaLN in 16 bits too."""
    described = sizes.to_diffusers()
    shapes = abstract_params(build_denoiser(described["_class_name"], described))
    quant = config(method)
    before, after = plan(shapes, quant).bytes_before, plan(shapes, quant).bytes_after
    if not isinstance(sizes, DiTConfig):
        return {"float16_bytes": before, "planned_bytes": after}
    rule = Rule(pattern="final_modulation/kernel")
    kept = dataclasses.replace(quant, rules=(*quant.rules, rule))
    return {
        "float16_bytes": before,
        "planned_bytes": after,
        "planned_bytes_final_modulation_16_bit": plan(shapes, kept).bytes_after,
    }


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _live_bytes() -> int:
    """Bytes of all live JAX arrays; sub-byte codes are packed in uint8, so they count truly."""
    return sum(array.nbytes for array in jax.live_arrays())


def _weights(folder: Path) -> Path:
    (path,) = folder.glob("*/*.safetensors")
    return path


def _alone(*arguments: str) -> str:
    """This script with other arguments in a process of its own; its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return (done.stdout.splitlines() or [""])[-1]


def main() -> None:
    """Make, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("dit_xl_2", "sdxl"))
    parser.add_argument("--method", choices=("minmax", "mse"), default="mse", help="of the ranges")
    parser.add_argument("--layers", type=int, help="blocks of DiT; fewer to try it out")
    parser.add_argument("--out", type=Path, help="where to write, instead of results/")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = config_of(args.model, args.layers)
    if args.make:
        make_checkpoint(args.make, sizes)
        return
    if args.measure:
        print(json.dumps(measure(*args.measure, args.method)))
        return
    options = [args.model, "--method", args.method]
    options += [] if args.layers is None else ["--layers", str(args.layers)]
    with tempfile.TemporaryDirectory() as scratch:
        folder, saved = Path(scratch, "float"), Path(scratch, "saved")
        folder.mkdir()
        _alone("--make", str(folder), *options)
        measured = json.loads(_alone("--measure", str(folder), str(saved), *options))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    row = {"model": args.model, "layers": args.layers, "setting": "W4, groups of 128 or 64"}
    row |= measured | planned(sizes, args.method)
    print(json.dumps(row | versions, indent=1))
    _timing.write(f"full_size_{args.model}", [row | versions], out=args.out)


if __name__ == "__main__":
    main()
