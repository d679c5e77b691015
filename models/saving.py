"""A pipeline on disk in the library's own format, and back without the float weights.

What `qjax.core.serialize` writes: params and step table as one tree, and in the manifest's
record what it takes to build network and sampler again, the rules by which the params were
quantized, and the hash of the float params they were made of. Layers that a time table stands
for may be missing from the params; the record names them (`saving_time`).
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.core import serialize
from qjax.core.config import QuantConfig
from qjax.core.layers import LOW_RANK
from qjax.core.manifest import MANIFEST
from qjax.core.qtensor import is_qtensor
from qjax.core.steps import StepTable, TableKey
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.lora import detach
from qjax.models.model_card import CARD, Report, model_card
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import Sampler, sampler_from_diffusers
from qjax.models.saving_sides import read_sides, sides_of
from qjax.models.saving_time import read_time, without_dropped, write_time
from qjax.models.time_table import dropped_layers

_FIELDS = (
    "shape",
    "null_label",
    "num_labels",
    "guidance_channels",
    "method",
    "buckets",
    "smoothed",
    "recipe",
)


def save_pipeline(
    pipe: Pipeline,
    folder: str | os.PathLike[str],
    *,
    report: Report | None = None,
    card: str | None = None,
    place: str | None = None,
) -> None:
    """Write a pipeline, quantized or not, so that `load_pipeline` finds it again.

    Its network, sampler, step table, rules and the hash of the float parameters go along, and a
    model card, which nobody reads back.

    Args:
      pipe: The pipeline.
      folder: As for `serialize.save`.
      report: A comparison with the float model, for the card.
      card: Text of the card; None writes one (`model_card.py`).
      place: Hub id that the card loads the model from.

    Raises:
      ValueError: If `load_pipeline` could not build it again: it does not say which network it
        runs (it came from `from_apply` without a `source`), or one without a port here; if
        the report is of several pipelines.
    """
    source = with_digest(pipe)
    model = build_denoiser(source.model, source.config).model
    table, sides = pipe.step_table or StepTable(), sides_of(pipe)
    record = {
        "source": {**dataclasses.asdict(source), "config": dict(source.config)},
        "sampler": pipe.sampler.to_diffusers(),
        "fields": {name: getattr(pipe, name) for name in _FIELDS},
        "quant": None if pipe.quant is None else pipe.quant.to_dict(),
        "step_table": {name: dataclasses.asdict(key) for name, key in table.keys},
        "sides": sides.record,
    }
    tree: dict[str, Any] = {"params": pipe.params}
    if table.entries:
        tree["step_table"] = table.entries
    if sides.params:
        tree["sides"] = sides.params
    with tempfile.TemporaryDirectory() as scratch:
        record["time"], files = write_time(pipe, model, Path(scratch))
        if card is None:
            card = model_card(pipe.replace(source=source), place=place, report=report)
        file = Path(scratch) / CARD
        file.write_text(card, encoding="utf-8")
        serialize.save(folder, tree, record, files=sides.files | files | {CARD: file})


def with_digest(pipe: Pipeline) -> Source:
    """The source of a pipeline, with the hash of its float parameters where all are at hand.

    Raises:
      ValueError: If the pipeline has no source.
    """
    source = pipe.source
    if source is None:
        raise ValueError(
            "A pipeline can be saved if its source says which network it runs; this one came "
            "from from_apply without one. Save its params with qjax.core.serialize.save."
        )
    leaves = jax.tree.leaves(dict(pipe.params), is_leaf=is_qtensor)
    model = getattr(pipe.apply, "__self__", None)
    if not any(map(is_qtensor, leaves)) and not dropped_layers(model, pipe.params):
        # LoRAs beside the weights do not make them others.
        digest = serialize.params_digest(detach(pipe.params))
        source = dataclasses.replace(source, sha256=digest)
    return source


def method_name(config: QuantConfig) -> str:
    """A short hash of a config: what a step table's entries are compared with."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_saved(folder: Path) -> Pipeline:
    """The pipeline that `save_pipeline` wrote.

    Raises:
      FileNotFoundError: If the folder holds no save.
      ValueError: If the files were changed, or do not describe a pipeline of this library.
    """
    tree, record = serialize.load(folder)
    try:
        source = Source(**record["source"])
        sampler: Sampler = sampler_from_diffusers(record["sampler"])
        quant = None if record["quant"] is None else QuantConfig.from_dict(record["quant"])
        denoiser = build_denoiser(source.model, source.config)
        # Saves from before there were sides, or time tables, have none.
        time = record.get("time", {"dropped": [], "sha256": None})
        expected = without_dropped(denoiser.model, abstract_params(denoiser), time)
        sides = (
            read_sides(folder, record["sides"], tree.get("sides", {})) if "sides" in record else {}
        )
        pipe = Pipeline.from_apply(
            denoiser.model.apply,
            tree["params"],
            sampler,
            source=source,
            quant=quant,
            step_table=_step_table(record["step_table"], tree.get("step_table", {})),
            time_layers=read_time(folder, time),
            **record["fields"],
            **sides,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} does not describe a pipeline: {error!r}.") from None
    _check_shapes(folder, expected, pipe.params)
    return pipe


def _step_table(keys: Mapping[str, Any], entries: Mapping[str, Any]) -> StepTable | None:
    """The saved table, each entry checked against its key; None if there was none."""
    if keys.keys() != entries.keys():
        raise ValueError(
            f"The step table needs a key for every entry; got keys {sorted(keys)} and entries "
            f"{sorted(entries)}."
        )
    for path, leaf in serialize.flatten(entries) if entries else ():
        values = np.asarray(leaf, np.float32)
        is_scale = path.rsplit("/", 1)[-1] == "act_scale"
        if not np.isfinite(values).all() or (is_scale and not (values > 0).all()):
            raise ValueError(
                f"The step table must hold finite numbers, and scales above 0; {path} does not."
            )
    table = StepTable()
    for name, key in keys.items():
        table = table.with_entry(name, entries[name], key=TableKey(**key))
    return table if entries else None


def _check_shapes(folder: Path, expected: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """That the saved leaves are those of the model, by path and logical shape; LoRAs may join."""
    want = {path: tuple(leaf.shape) for path, leaf in serialize.flatten(expected)}
    have = {
        path: tuple(leaf.shape)
        for path, leaf in serialize.flatten(params)
        if path.rsplit("/", 1)[-1] not in LOW_RANK
    }
    problems = [f"missing {path}" for path in want.keys() - have.keys()]
    problems += [f"unexpected {path}" for path in have.keys() - want.keys()]
    problems += [
        f"{path} {list(have[path])} instead of {list(want[path])}"
        for path in want.keys() & have.keys()
        if want[path] != have[path]
    ]
    if problems:
        raise ValueError(
            f"The params in {folder} do not fit its config: {'; '.join(sorted(problems)[:20])}."
        )
