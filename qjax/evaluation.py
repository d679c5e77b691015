"""evaluate: how good a model's pictures are, and how far quantization has moved them.

Pictures are drawn in parts, measured and thrown away; what is kept of each is a few numbers and
the features that some networks see in it (`evaluation_parts`). All metrics read pictures of 8
bits, as a PNG holds them. Picture i of every model comes from the same noise, whatever the batch,
so two models are compared pair by pair.

| metric | what it needs | what it tells |
|---|---|---|
| `psnr`, `ssim` | a reference model | likeness of each pair, by pixels |
| `lpips-alex`, `lpips-vgg` | and the weights of LPIPS | likeness of each pair, as people see it |
| `fid`, `sfid` | Inception's weights; a reference model or pictures | distance of two sets |
| `pr`, `kid` | Inception's weights or a shipped model; the same | precision and recall; distance |
| `is` | Inception's weights | how sure and how various the classes are |
| `fd` | a shipped model, whose classifier looks | as FID, to the real test set too |
| `clip` | a CLIP model, and prompts | likeness of each picture and its text |

FID between a quantized model's pictures and those of the float model from the same noise is what
papers on quantization call FID to float; it is the `fid` against a reference model here.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from qjax._version import __version__
from qjax.comparison import device_words, is_zoo, model_name
from qjax.core.metrics import FeatureStatistics
from qjax.core.mirror import Mirror, mirrored
from qjax.core.places import is_remote, local_path
from qjax.core.safetensors_io import atomic_write
from qjax.evaluation_choice import METRICS, Choice, Given, choose
from qjax.evaluation_data import Evaluation, NetUsed, as_dict
from qjax.evaluation_measuring import Measuring, Progress, measure
from qjax.evaluation_nets import ZOO, Nets, load_nets, zoo_net
from qjax.evaluation_parts import RUN, Parts
from qjax.evaluation_pictures import Folder, fingerprint, folder_of, read_statistics
from qjax.evaluation_scores import Against, Scoring, draws_of_sets, scores
from qjax.models import inception as inception_net
from qjax.models.mesh import batch_of, wait, writes
from qjax.models.pipeline import Pipeline
from qjax.models.weight_files import file_sha256
from qjax.report_layers import how_quantized
from qjax.zoo import judge

__all__ = ["METRICS", "evaluate"]

DEFAULT_IMAGES = 512
RESULT = "evaluation.json"
REAL = "the real test set"
ZOO_SHAPE = (32, 32, 1)
PACKAGES = ("jax", "flax", "numpy", "scipy")


def evaluate(
    pipe: Pipeline,
    *,
    reference: Pipeline | None = None,
    images: Path | str | None = None,
    metrics: Sequence[str] | None = None,
    num_images: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    inception: Path | str | None = None,
    lpips: Sequence[Path | str] = (),
    clip: Path | str | None = None,
    steps: int = 20,
    guidance_scale: float | None = None,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    part_size: int = 256,
    resamples: int | None = None,
    out: Path | str | None = None,
    mesh: Mesh | None = None,
    names: tuple[str, str] | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Scores of a model's pictures, with intervals.

    Args:
      pipe: The model.
      reference: A model to hold it against, picture by picture from the same noise and set
        against set: the float model of a quantized one.
      images: A folder of pictures of one size to hold it against, or a `.npz` of their Inception
        statistics (`mu`, `sigma`).
      metrics: Of `METRICS`; None for all that can be computed, with a word on the others.
      num_images: Pictures of each model; by default one a prompt, else 512.
      labels: Classes, in turn; by default all that the model has.
      prompts: Texts, in turn, for models that read prompts.
      inception: The weights of pytorch-fid, `.pth` or as safetensors: a file, or
        `owner/name:FILE` on the hub.
      lpips: Files of torchvision's AlexNet or VGG16 and of LPIPS' linear heads, in any order.
      clip: Folder or hub id of a transformers CLIP model.
      steps: Steps of the sampler.
      guidance_scale: Weight of classifier-free guidance; None for none.
      eta: Share of fresh noise.
      seed: Of the noise; picture i is the same whatever else is drawn.
      batch_size: Most pictures at a time, on a mesh of every device; what is drawn does not
        depend on it. All of a part, `part_size`, at most.
      part_size: Pictures of which a run that is killed may lose the work.
      resamples: Of the intervals of sets of pictures. None: 200, for `fid` and `sfid` 20, because
        a Frechet distance of features as wide as Inception's takes seconds; 0 for no such
        intervals.
      out: Folder that keeps what was measured, here or in a bucket; the same run goes on there,
        and `evaluation.json` is the result. None keeps nothing. Several processes all have to see
        it.
      mesh: Devices to spread the pictures over (`Pipeline.on`); what was drawn is measured on one.
        None draws on one, too. Of several processes all call this alike, and all get the scores.
      names: What to call model and reference.
      on_progress: Called with pictures done, all pictures, and what comes next.

    Returns:
      The scores; `evaluation_data.score_table` shows them.

    Raises:
      ValueError: If a metric that was asked for cannot be computed, all of them named; if the two
        models draw pictures of different sizes, or one of them reads prompts and the other does
        not; if labels, prompts and numbers do not suit; if `out` belongs to another run. Nothing
        has been drawn then, and nothing written.
      FileNotFoundError: If a file or folder is missing.
    """
    if batch_size < 1 or part_size < 1 or resamples == 1 or (resamples or 0) < 0:
        raise ValueError(
            "batch_size and part_size must be at least 1, and resamples 0 or at least 2; got "
            f"{batch_size=}, {part_size=}, {resamples=}."
        )
    n = _count(num_images, prompts)
    labels = _labels(pipe, labels, prompts)
    _check_models(pipe, reference)
    nets = load_nets(inception_file=inception, lpips_files=lpips, clip=clip)
    pictures = _pictures(images, pipe)
    choice = _choose(metrics, pipe, reference, pictures, nets, prompts, n)
    used = _used(choice, nets)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "seed": seed,
    }
    claim = {
        "model": fingerprint(pipe),
        "reference": None if reference is None else fingerprint(reference),
        "images": pictures.digest,
        "metrics": list(choice.metrics),
        "nets": {net.name: list(net.sha256) for net in used},
        "labels": None if labels is None else list(labels),
        "prompts": _digest(prompts),
        "num_images": n,
        "part_size": part_size,
    }
    pipes = {"a": pipe} | ({} if reference is None else {"b": reference})
    if mesh is not None:
        pipes = {side: one.on(mesh) for side, one in pipes.items()}
    drawn_at_once = batch_of(min(part_size, n), batch_size, mesh)
    with _working_folder(out, mesh) as (folder, mirror):
        parts = Parts(folder, claim | settings, mesh=mesh, mirror=mirror)
        measuring = Measuring(
            pipes=pipes,
            choice=choice,
            nets=nets,
            settings=settings | {"labels": labels, "prompts": prompts},
            drawn_at_once=drawn_at_once,
            batch_size=drawn_at_once // (1 if mesh is None else mesh.size),
            part_size=part_size,
        )
        measure(parts, measuring, n, pictures.folder, on_progress or (lambda *_: None))
        parts.complete()
        own, other = _names(names, pipe, reference)
        scoring = Scoring(
            model=own,
            reference=other,
            sets=_sets(choice, other, pictures),
            choice=choice,
            resamples=resamples,
        )
        evaluation = Evaluation(
            model=own,
            reference=other,
            images=None if images is None else str(images),
            scores=scores(parts, scoring),
            left_out=choice.left_out,
            num_images=n,
            told=_told(labels, prompts),
            nets=used,
            resamples=draws_of_sets(scoring),
            device=device_words(mesh),
            versions={"qjax": __version__} | {p: importlib.metadata.version(p) for p in PACKAGES},
            **settings,
        )
        if folder is not None and parts.writes:
            _write(folder / RESULT, evaluation)
        if mirror is not None:
            mirror.push()
    return evaluation


def _count(num_images: int | None, prompts: Sequence[str] | None) -> int:
    n = num_images
    if n is None:
        n = DEFAULT_IMAGES if prompts is None else len(prompts)
    if n < 1:
        raise ValueError(f"num_images must be at least 1; got {n}.")
    return n


def _labels(
    pipe: Pipeline, labels: Sequence[int] | None, prompts: Sequence[str] | None
) -> Sequence[int] | None:
    """The classes to draw in turn; None for a model without."""
    for name, said in (("labels", labels), ("prompts", prompts)):
        if said is not None and not len(said):
            raise ValueError(f"{name} must hold one at least; got none. Leave them out.")
    if pipe.reads_prompts and prompts is None:
        raise ValueError("this model reads prompts; got prompts=None. Pass prompts=[...].")
    if labels is not None or not pipe.num_labels or pipe.reads_prompts:
        return labels
    return range(pipe.num_labels - (pipe.null_label == pipe.num_labels - 1))


def _check_models(pipe: Pipeline, reference: Pipeline | None) -> None:
    if pipe.image_shape[-1] not in (1, 3):
        raise ValueError(
            f"pictures have 1 or 3 channels; got samples of {pipe.shape}. Latents have to be "
            "decoded first."
        )
    if reference is not None and (reference.image_shape, reference.shape) != (
        pipe.image_shape,
        pipe.shape,
    ):
        raise ValueError(
            "two models can be held against each other if their samples have one shape; got "
            f"{pipe.shape} and {reference.shape}."
        )
    if reference is not None and reference.reads_prompts != pipe.reads_prompts:
        prompted, other = ("model", "reference") if pipe.reads_prompts else ("reference", "model")
        raise ValueError(
            "two models can be held against each other if they are told the same; the "
            f"{prompted} reads prompts, the {other} labels."
        )


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """The pictures that somebody gave: files, or statistics, or none."""

    name: str = ""
    folder: Folder | None = None
    statistics: Mapping[str, FeatureStatistics] | None = None
    digest: str | None = None


def _pictures(images: Path | str | None, pipe: Pipeline) -> _Pictures:
    if images is None:
        return _Pictures()
    path = local_path(images)
    if path.suffix == ".npz":
        statistics = read_statistics(path)
        widths = {"pool": inception_net.POOL_FEATURES, "spatial": inception_net.SPATIAL_FEATURES}
        for key, of_key in statistics.items():
            if len(of_key.mean) != widths[key]:
                raise ValueError(
                    f"{path} must hold statistics of Inception's {widths[key]} features; its mean "
                    f"has {len(of_key.mean)} numbers. Take them from the layer that FID is of."
                )
        return _Pictures(name=path.name, statistics=statistics, digest=file_sha256(path)[:16])
    folder = folder_of(path, grey=pipe.image_shape[-1] == 1)
    size = folder.read([0]).shape[1:]
    if is_zoo(pipe) and size != ZOO_SHAPE:
        raise ValueError(
            f"the classifier of the shipped models sees pictures of 32 x 32; those in {path} are "
            f"{size[1]} x {size[0]}. Shrink them."
        )
    name = path.name or str(path)
    if size != pipe.image_shape:
        name += f", {size[1]} x {size[0]}"  # Inception sees both enlarged or shrunk to one size
    return _Pictures(name=name, folder=folder, digest=folder.digest())


def _choose(
    asked: Sequence[str] | None,
    pipe: Pipeline,
    reference: Pipeline | None,
    pictures: _Pictures,
    nets: Nets,
    prompts: Sequence[str] | None,
    n: int,
) -> Choice:
    net, clip = nets.named("Inception"), nets.named("CLIP")
    given = Given(
        image_shape=pipe.image_shape,
        num_images=n,
        zoo=is_zoo(pipe),
        reference=reference is not None,
        folder=0 if pictures.folder is None else len(pictures.folder.files),
        statistics=tuple(pictures.statistics or ()),
        prompts=prompts is not None,
        inception=None if net is None else net.name,
        lpips=tuple(nets.lpips),
        clip=None if clip is None else clip.name,
    )
    verified = net is not None and net.verified is True
    return choose(asked, given, verified=verified, zoo_net=ZOO)


def _used(choice: Choice, nets: Nets) -> tuple[NetUsed, ...]:
    """The networks that are asked."""
    known = {net.name: net for net in nets.used}
    wanted = dict.fromkeys(choice.nets.values())
    return tuple(zoo_net() if name == ZOO else known[name] for name in wanted)


@contextlib.contextmanager
def _working_folder(
    out: Path | str | None, mesh: Mesh | None
) -> Iterator[tuple[Path | None, Mirror | None]]:
    """The folder of this machine that parts are kept in, and the mirror of a bucket's."""
    if out is None:
        yield None, None
    elif is_remote(out):
        together = lambda name: wait(name, mesh)
        with mirrored(out, holds=RUN, writes=writes(mesh), wait=together) as mirror:
            mirror.get(mirror.local)
            yield mirror.local, mirror
    else:
        yield local_path(out), None


def _sets(choice: Choice, reference: str | None, pictures: _Pictures) -> tuple[Against, ...]:
    sets = []
    if reference is not None:
        sets.append(Against(name=reference, side="b", paired=True))
    if pictures.folder is not None:
        sets.append(Against(name=pictures.name, side="r"))
    if pictures.statistics is not None:
        sets.append(Against(name=pictures.name, statistics=pictures.statistics))
    if "fd" in choice.metrics:
        sets.append(Against(name=REAL, statistics={"zoo": judge.real_statistics()}))
    return tuple(sets)


def _names(
    given: tuple[str, str] | None, pipe: Pipeline, reference: Pipeline | None
) -> tuple[str, str | None]:
    """What to call two models, which may be one model, float and quantized: never the same."""
    if reference is None:
        return (_full_name(pipe) if given is None else given[0]), None
    own, other = given or (_full_name(pipe), _full_name(reference))
    return own, f"{other}, the reference" if own == other else other


def _full_name(pipe: Pipeline) -> str:
    how = how_quantized(pipe.params) if pipe.quant is not None else ""
    return f"{model_name(pipe)}, {how}" if how else model_name(pipe)


def _told(labels: Sequence[int] | None, prompts: Sequence[str] | None) -> str:
    if prompts is not None:
        return f"{len(prompts):,} prompts in turn"
    return "nothing" if labels is None else f"{len(labels):,} classes in turn"


def _digest(prompts: Sequence[str] | None) -> str | None:
    if prompts is None:
        return None
    text = "\0".join(prompts)
    return f"{len(prompts)}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write(file_path: Path, evaluation: Evaluation) -> None:
    from qjax.cli_output import plain  # a skin over the library, like this file

    text = json.dumps(plain(as_dict(evaluation)), indent=1, allow_nan=False)
    with atomic_write(file_path) as file:
        file.write((text + "\n").encode())
