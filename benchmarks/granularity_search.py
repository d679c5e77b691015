"""What do groups, dynamic ranges and the search gain? `python benchmarks/granularity_search.py`

The ablation of Q-DiT (Chen et al., 2025, table 3) in its order, on a shipped transformer:

| row | weights | inputs |
|---|---|---|
| rtn | a range for every output channel | one range for all steps and tokens (static) |
| + group | groups of `--group` input channels | the same groups, ranges static |
| + dynamic | the same | the same groups, a range for every token |
| + dynamic, samples | the same | ranges shared by all tokens of a picture (simulated) |
| + gptq | rounded by GPTQ | as in + dynamic |
| + search | groups by layer, at the BitOps of `--group` everywhere, then GPTQ | the same groups |
| + search, latent | the same, by errors of latents | |
| + search, ilp | the same, by errors of layers, exactly | |
| w8, static | 8 bits, groups | one range for all steps and tokens |
| w8, by step | the same | one range for every step |
| w8, dynamic | the same | a range for every token |

Rounding is to nearest but where GPTQ is named, and ranges are asymmetric throughout. The last
three are the paper's comparison of inputs' ranges, at weights whose error is small. Layers are
those of the paper: qkv, proj, fc1 and fc2 of every block; adaLN has weights in groups and float
inputs. The search draws pictures with the guidance of the evaluation, from other noise. Every row
is judged on the same noise; latent error is the relative L2 distance of the final latents to the
float model's, FD the Frechet distance of the pictures' features to the float model's pictures and
to real ones.

With `--outliers F` a few input channels of every layer that follows an adaLN or makes values are
F times as large and the weights that read them as much smaller, so that the float network stays
what it is (`models/smoothing_pairs.py`): real transformers have such channels, the shipped one
has none.

What calibrates or searches is run for every seed (`--seeds`); searches are told with what they
found on their own noise and on fresh noise, for the winner and for the uniform groups. Rows in the
result file are kept, and with `--work` searches go on where they were killed and leave plots of
their fronts. Writes `benchmarks/results/granularity_search.json`.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections import ChainMap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from _judge import Judge
from _rows import Rows, shown
from _timing import RESULTS

import qjax
from qjax import recipes
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.evolution import EvolutionSettings
from qjax.calibrate.fitted import quantized_kernels
from qjax.calibrate.genome_forward import Candidates, GenomeNetwork, KernelFormat
from qjax.calibrate.gptq_stage import GPTQ
from qjax.calibrate.granularity_search import GranularitySearch
from qjax.calibrate.recipe import Recipe, Stage, run
from qjax.calibrate.requantize import with_leaves
from qjax.calibrate.rollout import Items
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.student import Student
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.plan import Axes
from qjax.core.quantize import tree_bytes
from qjax.core.serialize import flatten
from qjax.models.sampling import draw_noise, image_keys
from qjax.models.smoothing_pairs import foldable_pairs, folded
from qjax.search_plot import save_fronts
from qjax.zoo import judge

GUIDANCE = 2.0
EVALUATION_SEED = 20252
NAME = "granularity_search"
CHOICES = (8, 16, 32, 64, 128)
SEARCHED = r"blocks_\d+/(attn|mlp)/.*"
ROWS = (
    "rtn",
    "+ group",
    "+ dynamic",
    "+ dynamic, samples",
    "+ gptq",
    "+ search",
    "+ search, latent",
    "+ search, ilp",
    "w8, static",
    "w8, by step",
    "w8, dynamic",
)
RANDOM = ("rtn", "+ group", "+ gptq", "+ search", "w8, static", "w8, by step")
OUTLIERS = 16  # every so many channels is one


def quant(row: str, bits: int, act_bits: int, group: int) -> QuantConfig:
    """The rules of a row, before any search."""
    side = row.startswith("w8")
    weight = WeightSpec(bits=8 if side else bits, symmetric=False)
    mode = "per_step" if row == "w8, by step" else "static"
    act = ActSpec(bits=act_bits, mode=mode, granularity="per_tensor", symmetric=False)
    if side:
        weight = dataclasses.replace(weight, granularity="per_group", group_size=group)
        if row == "w8, dynamic":
            act = dataclasses.replace(act, mode="dynamic", granularity="per_token")
    elif row != "rtn":
        weight = dataclasses.replace(weight, granularity="per_group", group_size=group)
        act = dataclasses.replace(act, granularity="per_group", group_size=group)
    if not side and row not in ("rtn", "+ group"):
        act = dataclasses.replace(act, mode="dynamic")
    rules = (
        *recipes.EDGES,
        Rule(pattern=r"final_modulation/kernel", reason="part of the final layer"),
        Rule(pattern=r"blocks_\d+/modulation/kernel", weight=weight),
    )
    return QuantConfig(
        rules=rules, weight=weight, act=act, float_dtype="float16", allow_unmatched=True
    )


def stages(row: str, args: argparse.Namespace) -> tuple[Stage, ...]:
    """What follows the rules of a row."""
    shared = {
        "steps": args.steps,
        "guidance_scale": GUIDANCE,
        "data": CalibrationSet(items=args.search_images),
    }
    if row in ("rtn", "+ group", "w8, static", "w8, by step"):
        return (
            SerialParallel(
                **shared,
                groups=None if row == "w8, by step" else 1,
                samples="float",
                fits="ranges",
                ranges="minmax",
            ),
        )
    if "dynamic" in row:
        return ()
    rounding = GPTQ(**shared)
    if row == "+ gptq":
        return (rounding,)
    objective = {"+ search": "fd", "+ search, latent": "latent", "+ search, ilp": "layers"}[row]
    half = args.population // 2
    return (
        GranularitySearch(
            uniform=args.group,
            choices=CHOICES,
            layers=SEARCHED,
            objective=objective,
            solver="ilp" if row.endswith("ilp") else "evolution",
            features=str(judge.FOLDER) if objective == "fd" else None,
            reference=args.reference,
            **shared,
            finalists=args.keep,
            evolution=EvolutionSettings(
                population=args.population,
                keep=args.keep,
                crossovers=half,
                mutations=args.population - half,
                generations=args.generations,
            ),
        ),
        rounding,
    )


def with_outliers(pipe: qjax.Pipeline, factor: float) -> qjax.Pipeline:
    """The same function, with some channels of layers' inputs `factor` times as large."""
    leaves, changed = dict(flatten(pipe.params)), {}
    none = (jnp.zeros((1, *pipe.shape)), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))
    for pair in foldable_pairs(lambda: pipe.apply({"params": pipe.params}, *none)):
        channels = leaves[f"{pair.consumers[0]}/kernel"].shape[-2]
        s = jnp.ones(channels).at[::OUTLIERS].set(1 / factor)
        changed |= folded(ChainMap(changed, leaves), pair, s)
    return pipe.replace(params=with_leaves(pipe.params, changed))


def searched(out: Path) -> tuple[dict, float]:
    """What won a search, and its seconds in all processes if it was resumed, from its log."""
    total, winner = 0.0, {}
    for log in out.rglob("log.jsonl"):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        clock = [0.0, *(event["seconds"] for event in events)]
        # A new process begins at 0 again.
        total += sum(b - a if b >= a else b for a, b in itertools.pairwise(clock))
        for event in events:
            if event["event"] == "winner":
                winner = {k: v for k, v in event.items() if k not in ("event", "seconds")}
    return winner, round(total, 1)


def markdown(known: Rows) -> str:
    """The rows as tables: means over seeds, and their standard deviations."""
    lines = []
    for mine in known.by("model", "bits", "outliers"):
        first = mine[0]
        outliers = first["outliers"]
        said = f", channels planted that are {outliers:g} times as large" if outliers > 1 else ""
        lines += [
            "",
            (
                f"`{first['model']}`, {first['bits']}, groups of {first['group']}, {first['steps']} steps, "
                f"{first['images']} pictures{said}"
            ),
            "",
            "| row | seeds | latent error | FD to the float model | FD to real | kB | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in sorted({row["row"] for row in mine}, key=ROWS.index):
            found = [row for row in mine if row["row"] == name]

            lines.append(
                f"| {name} | {len(found)} | {shown(found, 'latent_error', 4)} | {shown(found, 'fd_to_float', 3)} | "
                f"{shown(found, 'fd_to_real', 2)} | {found[0]['bytes'] / 1e3:,.0f} | "
                f"{np.mean([row['seconds'] for row in found]):.0f} |"
            )
    return "\n".join(lines).strip()


class SearchJudge(Judge):
    """Draws with ranges of samples, too."""

    def draw_with_ranges_of_samples(self, pipe: qjax.Pipeline) -> np.ndarray:
        """The same with ranges shared by all tokens of a picture, simulated in float."""
        student = Student.of(pipe, self.pipe.params)
        layers = []
        for path, q in quantized_kernels(pipe.params).items():
            if q.act is None:
                continue
            weight = WeightSpec(bits=q.bits, symmetric=False)
            group = q.group_size or q.shape[-2]
            dtype = np.dtype(q.scale.dtype).name
            layers.append((path, KernelFormat((group,), weight, Axes(-2, (-1,)), dtype), q.act))
        network = GenomeNetwork(
            pipe.apply, pipe.sampler, pipe.guidance_channels, tuple(layers), (), "sample"
        )
        candidates = Candidates.of(network, student.params, self.pipe.params)
        count = len(self.settings["labels"])
        keys = image_keys(self.settings["key"], jnp.arange(count, dtype=jnp.uint32))
        told, null = pipe.condition(count, labels=self.settings["labels"], guided=True)
        items = Items(draw_noise(keys, pipe.shape), told, null, keys)
        parts = candidates.draw(
            np.zeros((1, len(layers)), np.int32),
            items,
            pipe.sampler.rows(self.steps),
            guidance_scale=jnp.float32(GUIDANCE),
            batch=64,
        )
        return np.concatenate([part[0] for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print what is known, and no more")
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--outliers", type=float, default=1.0, help="factor of planted channels")
    parser.add_argument("--bits", nargs="+", default=["4/8", "3/8"], help="of weights and inputs")
    parser.add_argument("--group", type=int, default=32, help="the uniform group size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=512, help="pictures of the evaluation")
    parser.add_argument("--search-images", type=int, default=128)
    parser.add_argument("--reference", default="float", choices=("float", "real"))
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--keep", type=int, default=5)
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--work", type=Path, help="folder for the parts of searches")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    args = parser.parse_args()
    known = Rows(NAME, args.out)
    if args.table:
        print(markdown(known))
        return
    with tempfile.TemporaryDirectory(prefix="search-") as temporary:
        measure(args, known, args.work or Path(temporary))


def measure(args: argparse.Namespace, known: Rows, work: Path) -> None:
    """Add every row that is not known yet; searches keep their parts in `work`."""
    pipe = qjax.load(args.model)
    if args.outliers > 1:
        pipe = with_outliers(pipe, args.outliers)
    judged = None
    for bits, act_bits in (map(int, text.split("/")) for text in args.bits):
        for row in args.rows:
            random = "search" in row or row in RANDOM
            for seed in range(args.seeds if random else 1):
                what = {
                    "model": args.model,
                    "bits": f"W{bits}A{act_bits}",
                    "group": args.group,
                    "outliers": args.outliers,
                    "steps": args.steps,
                    "images": args.images,
                    "row": row,
                    "seed": seed,
                }
                if "search" in row:
                    what |= {
                        "search_images": args.search_images,
                        "population": args.population,
                        "generations": args.generations,
                        "reference": args.reference,
                    }
                if known.has(what):
                    continue
                judged = judged or SearchJudge(
                    pipe,
                    args.images,
                    args.steps,
                    guidance_scale=GUIDANCE,
                    seed=EVALUATION_SEED,
                    to_real=True,
                )
                config = quant(row, bits, act_bits, args.group)
                recipe = Recipe(quant=config, stages=stages(row, args), name=row)
                out = None
                if "search" in row:
                    out = work / f"w{bits}a{act_bits}-{args.outliers:g}-{recipe.digest()}-{seed}"
                start = time.perf_counter()
                made = run(pipe, recipe, seed=seed, out=out)
                seconds = time.perf_counter() - start
                if row.endswith("samples"):
                    latents = judged.draw_with_ranges_of_samples(made)
                else:
                    latents = judged.draw(made)
                won = {}
                if "search" in row:
                    won, seconds = searched(out)
                result = {
                    **what,
                    **judged(latents),
                    "bytes": tree_bytes(made.params),
                    "seconds": round(seconds, 1),
                    "search": won,
                }
                if out is not None and args.work is not None:
                    save_fronts(out)
                known.add(result)


if __name__ == "__main__":
    main()
