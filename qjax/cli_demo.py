"""The command to begin with: see it work."""

from types import SimpleNamespace
from typing import Any

from qjax import demo as demo_
from qjax import report
from qjax.api import folder_bytes
from qjax.cli_models import SEED
from qjax.cli_options import Command, Option, path, switch, whole
from qjax.cli_output import Output
from qjax.report_words import number_text
from qjax.timing import Phases

QUICK = {"num_images": 64, "steps": 10}
FULL = {"num_images": 256, "steps": 20}


def demo(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Every shipped model in float and at low bits: a table, pictures, a page each."""
    size = FULL if settings.full else QUICK
    images = settings.num_images or size["num_images"]
    steps = settings.steps or size["steps"]
    models = demo_.models_to_show(everything=settings.full)
    phases = Phases()
    with output.progress("demo") as tell:
        shown = demo_.run_demo(
            settings.out,
            models=models,
            images=images,
            steps=steps,
            names={
                model: demo_.recipes_to_show(model, everything=settings.full) for model in models
            },
            seed=settings.seed,
            thorough=settings.full,
            phases=phases,
            tell=tell,
        )
    document = demo_.results(shown, phases) | {"index": str(settings.out / demo_.INDEX)}
    demo_.save_results(settings.out, document)
    for one in shown:
        table = report.summary_table(one.report)
        table.add_row(*one.disk_row())
        output.say(table, *one.report.notes, "")
    spent = ", ".join(f"{name} {number_text(s, 2)} s" for name, s in phases.seconds.items())
    example = min(shown[0].folders.values(), key=folder_bytes)
    output.say(
        f"index: {settings.out / demo_.INDEX}",
        *(f"{one.name}: {one.page} and {one.grid}" for one in shown),
        f"{number_text(phases.total)} s in all: {spent}",
        f"next: qjax generate {example} --labels 3,7 --guidance 2 --out pictures.png",
    )
    return document


COMMANDS = (
    Command(
        name="demo",
        help="quantize the shipped models, draw, compare, and write pages: start here",
        run=demo,
        options=(
            Option(
                name="full",
                read=switch,
                default=False,
                help="the three systems at 4 and 8 bits, each and together, calibrated (an hour or "
                f"two on a CPU), each layer's sensitivity, {FULL['num_images']} pictures and {FULL['steps']} steps instead of "
                f"{QUICK['num_images']} and {QUICK['steps']}; the same DIR again resumes",
            ),
            Option(
                name="out",
                read=path,
                metavar="DIR",
                default=path("qjax-demo"),
                help="folder to write",
            ),
            Option(name="num-images", read=whole(2), metavar="N", help="pictures by each model"),
            Option(name="steps", read=whole(1), metavar="N", help="steps of the sampler"),
            SEED,
        ),
        example="qjax demo",
    ),
)
