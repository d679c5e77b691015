"""demo: every shipped model quantized, saved, loaded, sampled and compared, with pages.

What is timed and judged is the model that was saved and read back, so the files are what the
numbers are about.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import qjax
from qjax import api, recipes, report
from qjax.core.safetensors_io import atomic_write
from qjax.models.pipeline import Pipeline
from qjax.report_data import ComparisonReport, as_dict
from qjax.report_index import Entry, save_index
from qjax.report_words import bytes_text
from qjax.timing import Phases

# Where the shipped models' pictures are recognized best without becoming alike; 3 adds little
# (benchmarks/zoo_quality.py).
GUIDANCE = 2.0
RECIPES = ("w8a8", "w4a8", "w4a16")
REPEATS = 3
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


def run_demo(
    out: Path,
    *,
    models: Sequence[str],
    images: int,
    steps: int,
    names: Sequence[str],
    seed: int,
    phases: Phases,
    tell: Tell,
) -> list[Shown]:
    """Run the demo on every shipped model and write its pages into `out`.

    Args:
      out: Folder for everything; created.
      models: Shipped models.
      images: Pictures by each model.
      steps: Steps of the sampler.
      names: Recipes.
      seed: Of the noise.
      phases: Counts the seconds of each phase.
      tell: Progress: called with work done, all work and what comes next.

    Raises:
      ValueError: If no models are shipped, or `out` holds something else.
    """
    if not models:
        raise ValueError("No models came with this installation; install qjax again.")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).exists():
        raise ValueError(f"the folder {out} is not empty and not of an earlier demo; name another.")
    out.mkdir(parents=True, exist_ok=True)
    each = 2 * len(names) + 2 + REPEATS
    shown = []
    for i, model in enumerate(models):
        begin = i * each

        def here(done: int, words: str, begin: int = begin, model: str = model) -> None:
            tell(begin + done, each * len(models), f"{model}, {words}")

        shown.append(_one(model, out, images, steps, names, seed, phases, here))
    _write_index(out, shown)
    return shown


def _one(
    model: str,
    out: Path,
    images: int,
    steps: int,
    names: Sequence[str],
    seed: int,
    phases: Phases,
    tell: Callable[[int, str], None],
) -> Shown:
    with phases.count("load"):
        pipe = qjax.load(model)
    folders = {name: out / f"{model}-{name}" for name in names}
    variants: dict[str, Pipeline] = {}
    for i, name in enumerate(names):
        tell(i, f"quantizing to {name}")
        with phases.count("quantize and save"):
            qjax.quantize(pipe, recipes.by_name(name).quant).save(folders[name])
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
            repeats=REPEATS,
            on_progress=progress,
        )
    found = _with_files(found, folders, sizes)
    page, grid = out / f"{model}.html", out / f"{model}.png"
    with phases.count("pages"):
        report.save_html(found, page)
        report.save_png(report.image_grid(found), grid)
    return Shown(
        name=model, report=found, page=page, grid=grid, folders=folders, bytes_on_disk=sizes
    )


def _with_files(
    found: ComparisonReport, folders: Mapping[str, Path], sizes: Mapping[str, int]
) -> ComparisonReport:
    """The report with a note on the files of every variant."""
    variants = []
    for variant in found.variants:
        note = (
            f"Saved in {folders[variant.name].name}: {bytes_text(sizes[variant.name])} on disk, "
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
