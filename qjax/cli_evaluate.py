"""The command that scores a model's pictures: eval."""

from types import SimpleNamespace
from typing import Any

from qjax.cli_mesh import SPREAD, chosen_mesh
from qjax.cli_models import MODEL, SEED, load_model
from qjax.cli_options import Command, Option, path, place, text, texts, whole
from qjax.cli_output import Output
from qjax.cli_pictures import (
    ETA,
    GUIDANCE,
    LABELS,
    PROMPTS,
    STEPS,
    label_numbers,
    prompt_lines,
    short_name,
)
from qjax.evaluation import DEFAULT_IMAGES, METRICS, evaluate
from qjax.evaluation_data import as_dict, score_table


def several(value: Any) -> list[str]:
    """Reads a text or a list of them."""
    return [text(one) for one in (value if isinstance(value, list) else [value])]


def run(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """Scores with intervals, and a line on every metric that was left out."""
    mesh = chosen_mesh(settings, output)
    model = load_model(settings.model, output)
    reference = None
    if settings.reference is not None:
        reference = load_model(settings.reference, output)
    with output.progress("evaluating") as tell:
        found = evaluate(
            model,
            reference=reference,
            images=settings.images,
            metrics=settings.metrics,
            num_images=settings.num_images,
            labels=label_numbers(settings.labels, model),
            prompts=prompt_lines(settings.prompts),
            inception=settings.inception,
            lpips=settings.lpips or (),
            clip=settings.clip,
            steps=settings.steps,
            guidance_scale=settings.guidance,
            eta=settings.eta,
            seed=settings.seed,
            batch_size=settings.batch_size,
            part_size=settings.part_size,
            resamples=settings.resamples,
            out=settings.out,
            mesh=mesh,
            names=(short_name(settings.model), short_name(settings.reference or "")),
            on_progress=tell,
        )
    pictures = "picture" if found.num_images == 1 else "pictures"
    sampler = f"{found.num_images:,} {pictures} of {found.told}, {found.steps} steps"
    if found.guidance_scale is not None:
        sampler += f", guidance {found.guidance_scale:g}"
    output.say(
        score_table(found),
        f"{sampler}, eta {found.eta:g}, seed {found.seed}; {found.device}",
        *dict.fromkeys(f"{one.metric}: {one.note}" for one in found.scores if one.note),
    )
    output.say(*(f"{net.name} from {', '.join(net.files)}" for net in found.nets if net.files))
    output.say(*(f"left out: {one.metric} {one.reason}" for one in found.left_out))
    if settings.out is not None:
        output.say(f"kept in {settings.out}")
    return as_dict(found) | {"out": settings.out}


COMMANDS = (
    Command(
        name="eval",
        help="score a model's pictures: likeness to a float model's, FID, CLIP score and others",
        run=run,
        arguments=(MODEL,),
        options=(
            Option(
                name="reference",
                read=text,
                metavar="MODEL_A",
                help="model to hold it against from the same noise, the float one of a quantized",
            ),
            Option(
                name="images",
                read=path,
                metavar="FOLDER",
                help="pictures to hold it against, or a .npz of their mu and sigma",
            ),
            Option(
                name="metrics",
                read=texts,
                metavar="NAMES",
                help=f"of {','.join(METRICS)} (default: all that can be computed)",
            ),
            Option(
                name="num-images",
                read=whole(1),
                metavar="N",
                help=f"pictures of each model (default: one a prompt, else {DEFAULT_IMAGES})",
            ),
            LABELS,
            PROMPTS,
            Option(
                name="inception",
                read=text,
                metavar="FILE",
                help="Inception weights of pytorch-fid; a file, or owner/name:FILE on the hub",
            ),
            Option(
                name="lpips",
                read=several,
                metavar="FILE",
                help="weights of LPIPS, backbone and heads; may be given several times",
                repeated=True,
            ),
            Option(
                name="clip",
                read=text,
                metavar="MODEL",
                help="CLIP model of transformers, a folder or a hub id",
            ),
            STEPS,
            GUIDANCE,
            ETA,
            SEED,
            Option(
                name="batch-size",
                read=whole(1),
                metavar="N",
                default=64,
                help="most pictures at a time, of every device; what is drawn does not depend on it",
            ),
            Option(
                name="part-size",
                read=whole(1),
                metavar="N",
                default=256,
                help="pictures after which --out is written",
            ),
            Option(
                name="resamples",
                read=whole(),
                metavar="N",
                help="behind the intervals of FID and the like; 0 for none (default: 200 or 20)",
            ),
            Option(
                name="out",
                read=place,
                metavar="DIR",
                help="folder to keep what was measured in; a run that was killed goes on there",
            ),
            *SPREAD,
        ),
        example="qjax eval fashion-dit-w4a8 --reference fashion-dit --num-images 512",
    ),
)
