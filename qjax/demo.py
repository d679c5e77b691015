"""demo: every shipped model quantized, saved, loaded, sampled and compared, with pages.

What is timed and judged is the model that was saved and read back, so the files are what the
numbers are about.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import qjax
from qjax import api, recipes, report
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.core.places import local_path
from qjax.core.safetensors_io import atomic_write
from qjax.models.pipeline import Pipeline
from qjax.report_data import ComparisonReport, as_dict
from qjax.report_index import Entry, save_index
from qjax.report_words import bytes_text, stage_progress
from qjax.timing import Phases

# Where the shipped models' pictures are recognized best without becoming alike; 3 adds little
# (benchmarks/zoo_quality.py).
GUIDANCE = 2.0
RECIPES = ("w8a8", "w4a8", "w4a16")
# The three systems at the same bits: each, and together. Q-DiT's is meant for transformers.
SYSTEMS = ("w4a8", "s2p_w4a8", "ptqd_w4a8", "s2p_ptqd_w4a8")
SYSTEMS_OF_DIT = (*SYSTEMS[:3], "q_dit_w4a8", "q_dit_s2p_ptqd_w4a8")
ITERATIONS = 300
# Timed runs behind every speed; more where the demo takes its time anyway.
REPEATS, REPEATS_OF_FULL = 3, 7
RESULTS = "demo.json"
INDEX = "index.html"

WHAT = (
    "Small models that ship with qjax, each trained by it on Fashion-MNIST, were stored in 8 and 4 "
    "bits, read back from disk, and asked for the same pictures as the float model."
)
BITS = (
    "W8 and W4 are the bits of a weight; A8 means that the arithmetic is in 8-bit integers, too, "
    "A16 that it is in float."
)

Tell = Callable[[float, float, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """What the demo found for one model.

    Attributes:
      name: Of the model.
      report: The comparison.
      page: Its page.
      grid: Its pictures.
      folders: Where each quantized model was saved.
      bytes_on_disk: Of each of them, all files; the float model's under `"float"`.
    """

    name: str
    report: ComparisonReport
    page: Path
    grid: Path
    folders: Mapping[str, Path]
    bytes_on_disk: Mapping[str, int]

    def disk_row(self) -> tuple[str, ...]:
        """Files of the float model and of every variant, for a table."""
        sizes = [self.bytes_on_disk[variant.name] for variant in self.report.variants]
        return ("files on disk", *map(bytes_text, (self.bytes_on_disk["float"], *sizes)))


def models_to_show(*, everything: bool) -> list[str]:
    """The shipped models; of those that differ in what they predict alone only the first.

    Args:
      everything: Whether the others are shown, too.
    """
    names = qjax.zoo_names()
    return names if everything else [name for name in names if not name.endswith("-v")]


def recipes_to_show(model: str, *, everything: bool) -> tuple[str, ...]:
    """The data-free recipes, or the three systems that suit a model, each and together.

    Models that differ in what they predict alone are shown with the data-free ones.

    Args:
      model: A shipped one.
      everything: Whether the systems are shown, at 4 and 8 bits.
    """
    if not everything or model.endswith("-v"):
        return RECIPES
    return SYSTEMS_OF_DIT if "dit" in model else SYSTEMS


def run_demo(
    out: Path,
    *,
    models: Sequence[str],
    images: int,
    steps: int,
    names: Mapping[str, Sequence[str]],
    seed: int,
    thorough: bool,
    phases: Phases,
    tell: Tell,
) -> list[Shown]:
    """Run the demo on every shipped model and write its pages into `out`.

    Args:
      out: Folder for everything; created.
      models: Shipped models.
      images: Pictures by each model.
      steps: Steps of the sampler.
      names: Recipes by model.
      seed: Of the noise.
      thorough: Whether speeds are medians of more runs, and the effect of every layer alone is
        measured.
      phases: Counts the seconds of each phase.
      tell: Progress: called with work done, all work and what comes next.

    Raises:
      ValueError: If no models are shipped, or `out` holds something else.
    """
    if not models:
        raise ValueError("No models came with this installation; install qjax again.")
    out = local_path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).exists():
        raise ValueError(f"the folder {out} is not empty and not of an earlier demo; name another.")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RESULTS).exists():
        save_results(out, {})  # the folder is a demo's from now on, and can be gone on with
    repeats = REPEATS_OF_FULL if thorough else REPEATS
    each = 3 if thorough else 2
    work = {model: each * len(names[model]) + 2 + repeats for model in models}
    shown, begin = [], 0
    for model in models:

        def here(done: float, words: str, begin: int = begin, model: str = model) -> None:
            tell(begin + done, sum(work.values()), f"{model}, {words}")

        shown.append(_one(model, out, images, steps, names[model], seed, thorough, phases, here))
        begin += work[model]
    _write_index(out, shown)
    return shown


def _one(
    model: str,
    out: Path,
    images: int,
    steps: int,
    names: Sequence[str],
    seed: int,
    thorough: bool,
    phases: Phases,
    tell: Callable[[float, str], None],
) -> Shown:
    with phases.count("load"):
        pipe = qjax.load(model)
    folders = {name: out / f"{model}-{name}" for name in names}
    variants: dict[str, Pipeline] = {}
    for i, name in enumerate(names):
        tell(i, f"quantizing to {name}")
        recipe = recipes.by_name(name)
        if recipe.stages:
            with phases.count("calibrate and save"):
                folders[name] = _calibrated(pipe, recipe, folders[name], steps, seed, i, tell)
        else:
            with phases.count("quantize and save"):
                qjax.quantize(pipe, recipe.quant).save(folders[name])
        with phases.count("load"):
            variants[name] = qjax.load(folders[name])
    sizes = {name: api.folder_bytes(folder) for name, folder in folders.items()}
    sizes["float"] = api.folder_bytes(api.locate(model)[0])
    with phases.follow() as begin:

        def progress(done: int, total: int, words: str) -> None:
            begin("draw" if "images" in words else "time" if "speed" in words else "judge")
            tell(len(names) + min(done, total), words)

        found = qjax.compare(
            pipe,
            variants,
            num_images=images,
            steps=steps,
            guidance_scale=GUIDANCE,
            seed=seed,
            repeats=REPEATS_OF_FULL if thorough else REPEATS,
            sensitivity=thorough,
            recipes={name: recipes.by_name(name) for name in names},
            on_progress=progress,
        )
    found = _with_files(out, found, folders, sizes)
    page, grid = out / f"{model}.html", out / f"{model}.png"
    with phases.count("pages"):
        report.save_html(found, page)
        report.save_png(report.image_grid(found), grid)
    return Shown(
        name=model, report=found, page=page, grid=grid, folders=folders, bytes_on_disk=sizes
    )


def _calibrated(
    pipe: Pipeline,
    recipe: Recipe,
    out: Path,
    steps: int,
    seed: int,
    done: int,
    tell: Callable[[float, str], None],
) -> Path:
    """Run a recipe with all its stages for the demo's sampler; gives the folder of the result.

    An earlier demo's run of the same recipe is not computed again.
    """
    of = len(recipe.stages)
    on_stage, on_event = stage_progress(
        lambda stages, words: tell(done + stages / of, f"{recipe.name}, {words}")
    )
    recipe = recipe.with_settings(steps=steps, guidance_scale=GUIDANCE)
    fits: list[Any] = [one.fit for one in recipe.stages if isinstance(one, SerialParallel)]
    if fits:
        recipe = recipe.with_settings(fit=dataclasses.replace(fits[0], iterations=ITERATIONS))
    run(pipe, recipe, out=out, seed=seed, on_stage=on_stage, on_event=on_event)
    return out / "final"


def _with_files(
    out: Path, found: ComparisonReport, folders: Mapping[str, Path], sizes: Mapping[str, int]
) -> ComparisonReport:
    """The report with a note on the files of every variant."""
    variants = []
    for variant in found.variants:
        note = (
            f"Saved in {folders[variant.name].relative_to(out)}: {bytes_text(sizes[variant.name])} on disk, "
            "manifest included. These pictures were made with what was saved."
        )
        variants.append(dataclasses.replace(variant, notes=(*variant.notes, note)))
    return dataclasses.replace(found, variants=tuple(variants))


def results(shown: Sequence[Shown], phases: Phases) -> dict:
    """Everything but the pictures, for JSON."""
    return {
        "models": {
            one.name: as_dict(one.report)
            | {
                "page": str(one.page),
                "grid": str(one.grid),
                "folders": {name: str(folder) for name, folder in one.folders.items()},
                "bytes_on_disk": dict(one.bytes_on_disk),
            }
            for one in shown
        },
        "seconds": {name: round(spent, 2) for name, spent in phases.seconds.items()},
    }


def _write_index(out: Path, shown: Sequence[Shown]) -> None:
    entries = [
        Entry(
            report=one.report,
            links=(
                ("the whole report, with pictures", one.page.name),
                ("all pictures as one PNG", one.grid.name),
            ),
            extra=(one.disk_row(),),
        )
        for one in shown
    ]
    save_index(out / INDEX, "qjax demo", (WHAT, BITS), entries)


def save_results(out: Path, document: Mapping) -> None:
    """Write `demo.json`, by which the folder is known as a demo's."""
    with atomic_write(out / RESULTS) as file:
        file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
