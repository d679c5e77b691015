"""load, quantize, plan, compare and evaluate: the few functions that join the floors."""

import difflib
import os
import warnings
from pathlib import Path
from typing import Any

from qjax import zoo
from qjax.calibrate.recipe import Recipe, data_free_name, quant_config, quantize_pipeline
from qjax.comparison import compare as compare
from qjax.core import quantize as core
from qjax.core.config import QuantConfig
from qjax.core.places import is_remote
from qjax.core.plan import Plan
from qjax.core.remote import RemoteFolder
from qjax.core.typing import Params
from qjax.evaluation import evaluate as evaluate
from qjax.models.hub import download, split_revision
from qjax.models.loading import copied_here, load_pipeline, load_shapes
from qjax.models.pipeline import Pipeline
from qjax.models.published import PUBLISHED, published_shapes


def zoo_names() -> list[str]:
    """Names of the diffusion models that ship with the package."""
    return zoo.names()


def load(
    model: str | Path,
    *,
    quantize: QuantConfig | Recipe | None = None,
    revision: str | None = None,
    **options,
) -> Pipeline:
    """The pipeline of a shipped model, a local folder, a saved pipeline or a hub repository.

    Args:
      model: `"fashion-dit"`; a folder in diffusers' layout or written by `Pipeline.save`, of this
        machine or in a bucket, `"gs://bucket/folder"`; or an id on the Hugging Face hub, `"owner/name"` or `"owner/name@revision"`, in either
        layout. A shipped model goes before a folder of the same name, which `"./fashion-dit"`
        means.
      quantize: Quantize every tensor as it is read; the float model is never in memory whole.
      revision: Branch, tag or commit of a hub repository; None for its main branch.
      **options: `dtype`, `variant`, `on_tensor` of `qjax.models.loading.load_pipeline`.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If what there is cannot be read in full.
    """
    config = None if quantize is None else quant_config(quantize)
    folder, name = locate(model, revision=revision, variant=options.get("variant"))
    pipe = load_pipeline(folder, quantize=config, name=name, **options)
    return pipe if quantize is None else pipe.replace(recipe=data_free_name(quantize))


def locate(
    model: str | Path,
    *,
    weights: bool = True,
    revision: str | None = None,
    variant: str | None = None,
) -> tuple[Path, str | None]:
    """The folder that `load(model)` reads, and the model's name where it is not the folder's.

    A repository of the hub is downloaded, or found in the cache of an earlier download; of a folder
    in a bucket there is a copy until the process ends. Without `weights` the configs alone, and of
    several variants of weights the one that is read.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If a repository has no layout that is read here, or there is a revision of what
        is not on the hub.
    """
    name = os.fspath(model)
    if is_remote(model):
        if revision is not None:
            raise ValueError(
                f"revision is for repositories of the hub; got {revision!r} for {name}."
            )
        return copied_here(model, weights=weights), None
    if revision is not None and (name in zoo_names() or Path(model).is_dir()):
        raise ValueError(f"revision is for repositories of the hub; got {revision!r} for {name}.")
    if name in zoo_names():
        if Path(name).is_dir():
            warnings.warn(
                f"{name} is the model that ships with qjax; the folder of that name is "
                f"{os.path.join('.', name)}.",
                stacklevel=3,
            )
        return zoo.FOLDER / name, name
    if Path(model).is_dir():
        return Path(model), None
    hub_id = split_revision(name)
    if hub_id is not None and not Path(name).exists():
        repository, at = hub_id
        if at is not None and revision not in (None, at):
            raise ValueError(
                f"{name} names a revision, and revision={revision!r} another; give one of them."
            )
        revision = at or revision
        folder = download(repository, weights=weights, variant=variant, revision=revision)
        return folder, repository
    near = difflib.get_close_matches(name, zoo_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(
        f"{name!r} is no model of the zoo ({', '.join(zoo_names())}), no local folder and no hub "
        f"id of the form owner/name, with @revision behind it or without.{hint}"
    )


def shapes(model: str | Path) -> Params:
    """The params of `load(model)` as shapes, for `plan`: no weights are read or downloaded.

    Args:
      model: As for `load`, or the name of a published denoiser: one of `models.published`.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: As `load`, as far as the configs tell.
    """
    if str(model) in PUBLISHED and not Path(model).exists():
        return published_shapes(str(model))
    try:
        return load_shapes(locate(model, weights=False)[0])
    except FileNotFoundError as error:
        known = f" Published models that can be planned: {', '.join(PUBLISHED)}."
        raise FileNotFoundError(f"{error}{known}") from error


def folder_bytes(folder: Path | str) -> int:
    """Bytes of all files below a folder, here or in a bucket."""
    if is_remote(folder):
        return sum(entry.size for entry in RemoteFolder(folder).files().values())
    folder = Path(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def quantize(target: Any, config: QuantConfig | Recipe, *, box: bool = True) -> Any:
    """`target` with low-bit weights; data-free, and nothing is mutated.

    Args:
      target: A Flax params tree, an `nnx.State`, an `nnx.Module`, or a `Pipeline`.
      config: Rules, or a recipe, whose stages are left out: they need data
        (`qjax.calibrate.run`).
      box: See `qjax.core.quantize.quantize`.

    Returns:
      The same kind of thing, with QTensors for the kernels that the rules choose.
    """
    if isinstance(config, Recipe) and config.stages:
        names = ", ".join(type(stage).__name__ for stage in config.stages)
        warnings.warn(
            f"qjax.quantize is data-free and leaves out the stages {names} of the recipe "
            f"{config.name!r}; qjax.calibrate.run runs them.",
            stacklevel=2,
        )
    if isinstance(target, Pipeline):
        return quantize_pipeline(target, config)
    return core.quantize(target, quant_config(config), box=box)


def plan(target: Any, config: QuantConfig | Recipe) -> Plan:
    """What `quantize(target, config)` would do, leaf by leaf; print it."""
    params = target.params if isinstance(target, Pipeline) else target
    return core.plan(params, quant_config(config))
