"""Reads a million broken files: `python scripts/fuzz_readers.py --executions 1000000`

Every reader of files that people download gets mutated copies of good ones: flipped bits, cut
and doubled parts, other numbers, pieces of other files and, where a file is JSON, other values,
keys and depths at any place of it. What they say about their hashes is made true again, so
that the checks behind are reached. A copy that fails in a new place or a new way is kept and
mutated further, so that the search goes on from what it has found.

A reader may refuse, with a `ValueError` or an `OSError`, or read what is good in spite of all;
anything else is a failure: another error, more than `SECONDS` of a processor, or more memory than
`ROOM` beyond what the process has. Failures are written to a folder, and the exit status is 1.

Executions come in rounds of 10,000 with a seed of their own each. With `--out` the counts are
written after every round, and the same command goes on after the last one. Several processes
share the work by other values of `--seed`.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.calibrate import recipe, recipe_file
from qjax.calibrate.similarity import load_feature_net
from qjax.calibrate.work import Work
from qjax.core import manifest, plain_yaml, safetensors_io, serialize
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.steps import StepTable, TableKey
from qjax.evaluation_parts import Parts
from qjax.evaluation_pictures import read_statistics
from qjax.kernels import tuning
from qjax.kernels.packing import Format
from qjax.models import clip_score
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.checkpoints import load_checkpoint
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.dit_keys import diffusers_keys
from qjax.models.loading import load_pipeline
from qjax.models.lora import load_lora
from qjax.models.samplers import sampler_from_diffusers
from qjax.models.text_encoders.clip_config import CLIPTextConfig
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

ZOO = Path(qjax.__file__).parent / "zoo"
REFUSALS = (ValueError, OSError)
SECONDS = 10
ROOM = 512 * 2**20
ROUND = 10_000
KEPT = 300  # mutated files of a reader that are mutated further

POWERS = (7, 8, 15, 16, 31, 32, 53, 63, 64)
INTERESTING = (0, 1, 2, 127, 255, 2**31 - 1, *(2**n for n in POWERS))
VALUES = (
    *INTERESTING,
    *(-1, -8, -128, -(2**31), -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-45, 1e308, -1.5),
    *(float("nan"), float("inf"), float("-inf"), None, True, False, [], {}, [[]], {"a": 1}),
    *("", "x", "../x", "/etc/passwd", "a/../../b", "c:x", "a\\b", "a\x00b", "\ud800", ".", "F32"),
    *([0], [1, 2], [[1], [2]], [None], ["x"], [2**32, 2**32], [1] * 65, "x" * 5000),
)
NAMES = ("dtype", "shape", "data_offsets", "__metadata__")
TAGS = ("a: &a [*a]", "!!python/object:os.system", '!!int ""', '!!bool "x"', "!!binary x")
TOKENS = (
    *map(str, INTERESTING),
    *("-1", "1.5", "1e309", "NaN", "-Infinity", "null", "true", "[]", "{}", '""', '"\\ud800"'),
    *(f'"{name}"' for name in (*NAMES, "F32", "BF16", "U8", "F4")),
    *TAGS,
    *("../x", "/etc/passwd", "\x00", "\ufeff", "é", "[" * 4, "[" * 20_000, '{"a":' * 20_000),
    *("9" * 5000, "1:" * 500, "0x" + "f" * 5000, "<<: {a: 1}", "2020-99-99"),
)


class Target(NamedTuple):
    """A reader.

    Attributes:
      name: Said in the table.
      seeds: Good files.
      read: Reads the bytes of one.
      share: How many of a thousand executions it gets; slow readers get fewer.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], Any]
    share: int


class TooSlow(BaseException):
    """Raised by the alarm; no reader catches it."""


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to eight changes to a copy: of its values where it is JSON, or of its bytes."""
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError, RecursionError):
            return _other_values(rng, json.loads(data))
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(new)
        at = rng.randrange(size) if size else 0
        length = rng.choice((1, 2, 4, 8, 32, 200))
        kind = rng.randrange(9)
        if kind == 0 and size:
            new[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            new[at] = rng.randrange(256)
        elif kind == 2:
            del new[at : at + length]
        elif kind == 3:
            new[at:at] = new[at : at + length]
        elif kind == 4:
            new[at:at] = rng.choice(TOKENS).encode("utf-8", "surrogatepass")
        elif kind == 5:
            new[at : at + length] = rng.choice(TOKENS).encode("utf-8", "surrogatepass")
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other)) if other else 0
            new[at : at + length] = other[start : start + rng.choice((4, 32, 400))]
        elif kind == 7:
            del new[at:]
        else:
            _other_number(rng, new, at)
    return bytes(new)


def _other_values(rng: random.Random, value: Any) -> bytes:
    """A JSON text in which some values are others, gone, twice, deeper or under another key."""
    root = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(9)
        if kind < 5:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 5 and holder is not root:
            del holder[key]
        elif kind == 6:
            other, there = rng.choice(places)
            holder[key] = copy.deepcopy(other[there])
        elif kind == 7:
            value = holder[key]
            holder[key] = rng.choice(([value], [value, copy.deepcopy(value)], {"a": value}))
        elif isinstance(holder, dict):
            name = rng.choice(("x", "../x", "", "a/b", "a#b", f"{key}x"))
            holder[name] = copy.deepcopy(holder[key])
        elif type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, holder[key]))
    return json.dumps(root[0]).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of lists and mappings, as what holds it and where."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in list(pairs):
        yield value, key
        if isinstance(inside, dict | list):
            yield from _places(inside)


def _other_number(rng: random.Random, new: bytearray, at: int) -> None:
    """Replace the next number of the text."""
    digits = b"0123456789"
    start = next((i for i in range(at, min(at + 400, len(new))) if new[i] in digits), None)
    if start is None:
        return
    end = start
    while end < len(new) and new[end] in digits:
        end += 1
    value = int(new[start : min(end, start + 18)])
    other = rng.choice((value + 1, value - 1, value * 2, -value, rng.choice(INTERESTING)))
    new[start:end] = str(other).encode()


def with_length(text: bytes) -> bytes:
    """A safetensors file of a header and some data."""
    return struct.pack("<Q", len(text)) + text + bytes(range(64))


def targets(folder: Path) -> list[Target]:
    """All readers, with good files made in `folder`."""
    rng = np.random.default_rng(0)
    found = [
        *_tensor_readers(folder, rng),
        *_lora_readers(folder, rng),
        *_config_readers(folder),
        *_folder_readers(folder),
        *_setting_readers(folder),
        *_evaluation_readers(folder),
    ]
    assert sum(target.share for target in found) == 1000
    return found


def _fresh(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _tensor_readers(folder: Path, rng: np.random.Generator) -> list[Target]:
    """safetensors files, the shards of a checkpoint, a part of a calibration."""
    file = folder / "file.safetensors"

    def read(data: bytes) -> None:
        found = safetensors_io.open_tensors(_fresh(data, file))
        for tensor in found.values():
            tensor.read()
        safetensors_io.metadata(file)

    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": np.arange(5, dtype=np.int8),
    }
    safetensors_io.write_tensors(file, tensors, {"format": "pt"})
    plain = file.read_bytes()
    one = {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    two = {
        "x": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]},
        "y": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [32, 64]},
        "__metadata__": {"a": "b"},
    }
    headers = [json.dumps(header).encode() for header in (one, two)]

    # A folder of diffusers' layout, of two shards.
    shards = folder / "shards"
    shards.mkdir()
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, key in zip(names, tensors, strict=True):
        safetensors_io.write_tensors(shards / name, {key: tensors[key]})
    weight_map = dict(zip(tensors, names, strict=True))
    index = json.dumps({"metadata": {"total_size": 53}, "weight_map": weight_map}).encode()
    index_file = shards / f"{stem}.safetensors.index.json"
    (shards / "config.json").write_text('{"_class_name": "X"}')

    def read_index(data: bytes) -> None:
        _fresh(data, index_file)
        load_checkpoint(shards)

    parts = folder / "parts"
    parts.mkdir()

    def read_part(data: bytes) -> None:
        _fresh(data, parts / "one.safetensors")
        Work(parts).part("one", dict)
        (parts / "log.jsonl").unlink(missing_ok=True)

    return [
        Target("safetensors", [plain, with_length(headers[0])], read, 220),
        Target("safetensors, header", headers, lambda data: read(with_length(data)), 300),
        Target("index of shards", [index], read_index, 60),
        Target("part of a calibration", [plain], read_part, 20),
    ]


def _lora_readers(folder: Path, rng: np.random.Generator) -> list[Target]:
    """A LoRA of two layers of a tiny DiT, and its settings inside and beside it."""
    table = {"unet": diffusers_keys(_tiny_dit())}
    halves = {}
    for key, target in table["unet"].items():
        if key.endswith(("to_q.weight", "to_k.weight")):
            o, i = target.shape
            name = "unet." + key.removesuffix(".weight")
            halves[f"{name}.lora_A.weight"] = rng.standard_normal((2, i)).astype(np.float32)
            halves[f"{name}.lora_B.weight"] = rng.standard_normal((o, 2)).astype(np.float32)
            halves[f"{name}.alpha"] = np.float32(4)
    (folder / "lora").mkdir()
    file, beside = folder / "lora" / "x.safetensors", folder / "lora" / "adapter_config.json"
    inside = json.dumps({"unet.r": 2, "unet.lora_alpha": 4})
    safetensors_io.write_tensors(file, halves, {"lora_adapter_metadata": inside})
    lora = file.read_bytes()
    length = struct.unpack("<Q", lora[:8])[0]
    header = json.loads(lora[8 : 8 + length])
    header["__metadata__"] = {"lora_adapter_metadata": inside}  # no digest, which would refuse all
    settings = {"r": 2, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"to_q": 1}}
    plain = folder / "lora" / "plain.safetensors"
    factors = {key: value for key, value in halves.items() if not key.endswith("alpha")}
    safetensors_io.write_tensors(plain, factors, {})

    def read_header(data: bytes) -> None:
        load_lora(_fresh(struct.pack("<Q", len(data)) + data + lora[8 + length :], file), table)

    def read_settings(data: bytes) -> None:
        _fresh(data, beside)
        try:
            load_lora(plain, table)
        finally:
            beside.unlink()

    return [
        Target("LoRA", [lora], lambda data: load_lora(_fresh(data, file), table), 40),
        Target("LoRA, header", [json.dumps(header).encode()], read_header, 40),
        Target("LoRA, settings", [json.dumps(settings).encode()], read_settings, 30),
    ]


def _tiny_dit() -> DiTConfig:
    sizes = {"sample_size": 4, "in_channels": 1, "num_heads": 2, "head_dim": 4}
    return DiTConfig(**sizes, patch_size=2, num_layers=1, num_classes=3)


def _config_readers(folder: Path) -> list[Target]:
    """Configs of networks and samplers."""
    dit = _tiny_dit().to_diffusers()
    small = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    condition = dataclasses.replace(UNet2DConditionConfig.sd_v1_4(), **small).to_diffusers()
    sdxl = UNet2DConditionConfig.sdxl().to_diffusers()
    ddpm = UNet2DConfig.ddpm_cifar10().to_diffusers()
    tiny = {"block_out_channels": (32, 64), "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    tiny_unet = dataclasses.replace(UNet2DConfig.ddpm_cifar10(), **tiny, **blocks).to_diffusers()
    text = CLIPTextConfig(num_hidden_layers=2).to_transformers()
    both = {"model_type": "clip", "text_config": text, "vision_config": {"image_size": 224}}
    scheduler = json.loads((ZOO / "fashion-dit/scheduler/scheduler_config.json").read_bytes())
    samplers = [scheduler, {**scheduler, "_class_name": "DPMSolverMultistepScheduler"}]
    samplers = [one for one in samplers if _reads(sampler_from_diffusers, one)]
    component = folder / "component"
    component.mkdir()
    tensors = {"a": np.zeros(2, np.float32)}
    safetensors_io.write_tensors(component / "diffusion_pytorch_model.safetensors", tensors)
    features = folder / "features"
    shutil.copytree(ZOO / "fashion-features", features)
    feature = (features / "config.json").read_bytes()

    def build(data: bytes) -> None:
        _fresh(data, component / "config.json")
        config = load_checkpoint(component).config
        build_denoiser(str(config.get("_class_name")), config)

    def read_feature(data: bytes) -> None:
        _fresh(data, features / "config.json")
        load_feature_net(features)

    def of(read: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], Any]:
        def run(data: bytes) -> None:
            _fresh(data, component / "config.json")
            read(load_checkpoint(component).config)

        return run

    def texts(*configs: Any) -> list[bytes]:
        return [json.dumps(config).encode() for config in configs]

    autoencoder = AutoencoderKLConfig().to_diffusers()
    vq = VQModelConfig.vq_f4().to_diffusers()
    return [
        Target("config, whole DiT", texts(dit), build, 20),
        Target("config, whole UNet", texts(tiny_unet, condition), build, 2),
        Target("config, UNet with text", texts(condition, sdxl), of(_condition), 30),
        Target("config, UNet", texts(ddpm), of(UNet2DConfig.from_diffusers), 20),
        Target("config, KL", texts(autoencoder), of(AutoencoderKLConfig.from_diffusers), 15),
        Target("config, VQ", texts(vq), of(VQModelConfig.from_diffusers), 15),
        Target("config, CLIP", texts(text), of(CLIPTextConfig.from_transformers), 15),
        Target("config, CLIP with pictures", texts(both), of(clip_score._towers), 15),
        Target("config, sampler", texts(*samplers), of(sampler_from_diffusers), 20),
        Target("config, features", [feature], read_feature, 2),
    ]


def _condition(config: dict[str, Any]) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_diffusers(config)


def _reads(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except REFUSALS:
        return False
    return True


def _folder_readers(folder: Path) -> list[Target]:
    """Whole folders of pipelines, in diffusers' layout and in our own, one file of them broken."""
    model = folder / "model"
    shutil.copytree(ZOO / "fashion-dit", model)
    network = build_denoiser("DiTTransformer2DModel", _tiny_dit().to_diffusers())
    tensors = {key: np.ones(one.shape, np.float32) for key, one in network.targets.items()}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    safetensors_io.write_tensors(model / weights, tensors)
    (model / "transformer/config.json").write_text(json.dumps(_tiny_dit().to_diffusers()))
    names = ("model_index.json", "scheduler/scheduler_config.json", "zoo.json")
    good = {name: (model / name).read_bytes() for name in names}

    def read_model(name: str) -> Callable[[bytes], Any]:
        def run(data: bytes) -> None:
            _fresh(data, model / name)
            try:
                load_pipeline(model)
            finally:
                _fresh(good[name], model / name)

        return run

    # A save of a quantized tree, and one of a quantized pipeline: their manifests, resealed.
    tree = folder / "tree"
    params = {"a": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    config = QuantConfig(weight=WeightSpec(bits=4, symmetric=False))
    serialize.save(tree, qjax.quantize(params, config), {"x": 1})
    saved = folder / "saved"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = qjax.quantize(load_pipeline(model), QuantConfig(weight=WeightSpec(bits=8)))
        key = TableKey(timesteps=(501, 1), eta=0.0)
        table = StepTable().with_entry("quant", {"x": {"act_scale": jnp.ones(2)}}, key=key)
        pipe.replace(step_table=table).save(saved)

    def read_save(at: Path, load: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        def run(data: bytes) -> None:
            _fresh(_resealed(data), at / manifest.MANIFEST)
            load(at)

        return run

    return [
        *(Target(f"model, {name}", [good[name]], read_model(name), 1) for name in names),
        Target(
            "save of a tree",
            [(tree / manifest.MANIFEST).read_bytes()],
            read_save(tree, serialize.load),
            36,
        ),
        Target(
            "save of a pipeline",
            [(saved / manifest.MANIFEST).read_bytes()],
            read_save(saved, load_pipeline),
            2,
        ),
    ]


def _resealed(data: bytes) -> bytes:
    """A manifest whose own hash is right again; as broken as it is where that cannot be."""
    try:
        value = json.loads(data)
        value["sha256"] = manifest._manifest_digest(value)
        return json.dumps(value).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data


def _setting_readers(folder: Path) -> list[Target]:
    """Files of settings: quantization, searches, tuning, the claim of a run."""
    rule = Rule(
        pattern="a/.*",
        weight=WeightSpec(bits=4, granularity="per_group", group_size=(64, None)),
    )
    quant = QuantConfig(rules=(rule,), weight=WeightSpec(bits=8), act=ActSpec(bits=8))
    yaml_file = folder / "config.yaml"
    quant.to_yaml(yaml_file)
    as_yaml, as_json = yaml_file.read_bytes(), json.dumps(quant.to_dict()).encode()

    params = {"a": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    search = recipe_file.SearchRecipe(
        architecture=recipe_file.kernel_shapes(params),
        quant=QuantConfig(weight=WeightSpec(bits=4, granularity="per_group", group_size=32)),
        groups={"a/kernel": 32},
        settings={"seed": 0},
        result={"fitness": 1.0},
    )
    searches = []
    for name in ("search.yaml", "search.json"):
        recipe_file.save_search(folder / name, search)
        searches.append((folder / name).read_bytes())

    def read_search(data: bytes) -> None:
        path = folder / ("found.json" if data.lstrip()[:1] == b"{" else "found.yaml")
        try:
            value = json.loads(data)
            value.pop("sha256")
            value["sha256"] = recipe_file._digest(value)
            data = json.dumps(value).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # it stays as broken as it is
        recipe_file.load_search(_fresh(data, path))

    problem = tuning.Problem(
        256, 512, 512, 1, Format(bits=4, block=256, pad=0), jnp.dtype("float32")
    )
    os.environ["QJAX_CACHE"] = str(folder / "cache")
    tuned = tuning.keep({problem: tuning.Choice("xla", (128,))}).read_bytes()

    def read_tuning(data: bytes) -> None:
        _fresh(data, tuning.path())
        tuning._read = (None, {})  # two writes may fall into one tick of the file system
        tuning.choice(problem)

    claims = folder / "claims"
    claims.mkdir()
    claim = {"recipe": "a", "name": "b", "seed": 0, "model": "c", "params": "d"}

    def read_claim(data: bytes) -> None:
        _fresh(data, claims / recipe.RUN)
        recipe._check_claim(claims, claim)

    def read_yaml(data: bytes) -> None:
        plain_yaml.read_yaml(yaml_file, data)

    return [
        Target(
            "QuantConfig",
            [as_yaml, as_json],
            lambda data: QuantConfig.from_yaml(_fresh(data, yaml_file)),
            30,
        ),
        Target(
            "YAML", [as_yaml, b"a: [1, 2.5, yes, x]\nb: {c: null, d: 2020-01-01}\n"], read_yaml, 10
        ),
        Target("search recipe", searches, read_search, 15),
        Target("choices of tuning", [tuned], read_tuning, 10),
        Target("claim of a run", [json.dumps(claim).encode()], read_claim, 10),
    ]


def _evaluation_readers(folder: Path) -> list[Target]:
    """Statistics of pictures, and the claim of an evaluation."""
    statistics, packed = folder / "statistics.npz", folder / "packed.npz"
    found = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(statistics, **found)
    np.savez_compressed(packed, **found)
    good = [statistics.read_bytes(), packed.read_bytes()]
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    claim = {"model": "a", "metrics": ["fd"], "nets": {"n": ["0"]}, "seed": 0, "steps": 2}

    def read_claim(data: bytes) -> None:
        _fresh(data, evaluation / recipe.RUN)
        Parts(evaluation, claim)

    return [
        Target(
            "statistics of pictures",
            good,
            lambda data: read_statistics(_fresh(data, statistics)),
            15,
        ),
        Target("claim of an evaluation", [json.dumps(claim).encode()], read_claim, 5),
    ]


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {SECONDS} seconds")


Table = dict[str, collections.Counter]


def fuzz(count: int, seed: int, failures: Path) -> Table:
    """Outcomes by reader; failures are written into a folder.

    Args:
      count: Executions.
      seed: Of all randomness.
      failures: Folder for inputs that fail, with what was raised.
    """
    table: Table = collections.defaultdict(collections.Counter)
    with _readers() as found:
        for _, part in rounds(found, count, seed, failures):
            _add(table, part)
    return table


def rounds(
    found: list[Target], count: int, seed: int, failures: Path, done: int = 0
) -> Iterator[tuple[int, Table]]:
    """The number of executions and their outcomes, round by round, from `done` on.

    Address space and time of an execution are limited within; both limits are as they were
    afterwards, whatever is raised.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, _too_slow)
    try:
        for begin in range(done, count, ROUND):
            size = min(ROUND, count - begin)
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, limits[1]))
            yield size, _round(found, random.Random(f"{seed}/{begin}"), size, failures)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def _readers() -> Iterator[list[Target]]:
    """All readers with their good files, which have been read once."""
    memory = Path("/dev/shm")  # no disk is worn
    folder = Path(tempfile.mkdtemp(prefix="qjax-fuzz-", dir=memory if memory.is_dir() else None))
    cache = os.environ.get("QJAX_CACHE")
    try:
        found = targets(folder)
        for target in found:
            for one in target.seeds:
                target.read(one)
        yield found
    finally:
        os.environ.pop("QJAX_CACHE", None)
        if cache is not None:
            os.environ["QJAX_CACHE"] = cache
        shutil.rmtree(folder, ignore_errors=True)


def _round(found: list[Target], rng: random.Random, count: int, failures: Path) -> Table:
    """Outcomes of some executions; what fails in a new way is mutated further."""
    table: Table = collections.defaultdict(collections.Counter)
    pools = {target.name: list(target.seeds) for target in found}
    seen: set[Any] = set()
    others = [seed for target in found for seed in target.seeds]
    chosen = rng.choices(found, [target.share for target in found], k=count)
    for target in chosen:
        pool = pools[target.name]
        # Of files that fail in a new way every other one: most of what they become fails early.
        data = mutated(rng, rng.choice(pool if rng.random() < 0.5 else target.seeds), others)
        outcome, place = _execute(target, data)
        if outcome == "FAILED":
            _keep(failures, target.name, data, place)
        known = (target.name, place[-1] if place else None)
        if known not in seen and len(data) < 10_000:
            seen.add(known)
            pool.append(data)
            if len(pool) > KEPT:
                del pool[rng.randrange(len(target.seeds), KEPT)]
        table[target.name][outcome] += 1
    return table


def _execute(target: Target, data: bytes) -> tuple[str, list[str]]:
    """The outcome of one, and where it was decided."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(data)
        return "read", []
    except REFUSALS as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return ("refused" if str(error) else "FAILED"), _place(error)
    except (Exception, TooSlow) as error:  # noqa: BLE001, what else a reader raises is the finding
        signal.setitimer(signal.ITIMER_PROF, 0)
        return "FAILED", _place(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _place(error: BaseException) -> list[str]:
    """The lines of our code on the way to an error, the last one with its kind."""
    lines, at = [], error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        if "qjax" in code.co_filename or not lines:
            lines.append(f"{code.co_filename}:{at.tb_lineno}")
        at = at.tb_next
    # The words without numbers and names tell checks on one line apart.
    words = "".join(letter for letter in str(error)[-120:] if letter.isalpha())
    return [*lines, f"{lines[-1]} {type(error).__name__} {words[:60]}"]


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _keep(failures: Path, name: str, data: bytes, place: list[str]) -> None:
    failures.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{name}{place[-2:-1]}".encode()).hexdigest()[:12]
    if not (failures / f"{key}.txt").exists():
        (failures / key).write_bytes(data)
        (failures / f"{key}.txt").write_text("\n".join([name, *place, repr(data[:2000])]) + "\n")
        print(f"FAILED {name}: {place[-1]} ({failures / key})", file=sys.stderr)


def _add(table: Table, part: Table) -> None:
    for name, counts in part.items():
        table[name].update(counts)


def _summary(table: Table, count: int, seed: int, seconds: float) -> dict[str, Any]:
    """What is written: counts, and what they were made with."""
    versions = ("jax", "flax", "numpy", "safetensors", "PyYAML", "ml_dtypes")
    root = Path(__file__).parents[1]
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "executions": count,
        "failed": sum(counts["FAILED"] for counts in table.values()),
        "seed": seed,
        "seconds": round(seconds, 1),
        "per_second": round(count / seconds, 1) if seconds else None,
        "limits": {"seconds": SECONDS, "bytes_beyond_the_process": ROOM},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "readers": {
            name: {kind: counts[kind] for kind in ("read", "refused", "FAILED")}
            for name, counts in sorted(table.items())
        },
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git(
            "status", "--porcelain", "--", "qjax", "models", "calibrate", "kernels"
        ),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _before(out: Path | None, seed: int) -> tuple[int, float, Table]:
    """Executions, seconds and counts of the rounds that an earlier start has done."""
    table: Table = collections.defaultdict(collections.Counter)
    if out is None or not out.exists():
        return 0, 0.0, table
    old = json.loads(out.read_text(encoding="utf-8"))
    now = _summary(table, 0, seed, 0.0)
    if any(old[key] != now[key] for key in ("seed", "commit", "changed_files")):
        sys.exit(f"{out} is of another seed or of other code. Move it away, or choose another.")
    _add(table, {name: collections.Counter(counts) for name, counts in old["readers"].items()})
    return old["executions"], old["seconds"], table


def _joined(paths: list[Path]) -> dict[str, Any]:
    """One summary of several processes' that ran the same code with other seeds."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    table: Table = collections.defaultdict(collections.Counter)
    for part in parts:
        _add(table, {name: collections.Counter(kinds) for name, kinds in part["readers"].items()})
    seeds = [part["seed"] for part in parts]
    same = ("commit", "changed_files", "limits", "versions", "python")
    if len(set(seeds)) < len(seeds) or any(part[k] != parts[0][k] for part in parts for k in same):
        sys.exit("summaries can be joined if seeds differ and code, versions and limits do not.")
    total, seconds = (sum(part[key] for part in parts) for key in ("executions", "seconds"))
    return parts[0] | {
        "executions": total,
        "failed": sum(part["failed"] for part in parts),
        "seed": seeds,
        "seconds": round(seconds, 1),
        "per_second": round(total / seconds, 1),
        "peak_memory_mb": max(part["peak_memory_mb"] for part in parts),
        "readers": {name: dict(kinds) for name, kinds in sorted(table.items())},
    }


def main() -> None:
    """Print a table of outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--out", type=Path, help="JSON of the counts, written after every round")
    parser.add_argument("--join", type=Path, nargs="+", help="only join these summaries into --out")
    args = parser.parse_args()
    if args.join:
        args.out.write_text(json.dumps(_joined(args.join), indent=1) + "\n", encoding="utf-8")
        return
    jax.config.update("jax_platforms", "cpu")
    done, before, table = _before(args.out, args.seed)
    start = time.perf_counter() - before
    with _readers() as found:
        for size, part in rounds(found, args.executions, args.seed, args.failures, done):
            done += size
            _add(table, part)
            summary = _summary(table, done, args.seed, time.perf_counter() - start)
            print(
                f"{done:,} in {summary['seconds']:,.0f} s, {summary['failed']} failed", flush=True
            )
            if args.out is not None:
                with safetensors_io.atomic_write(args.out) as file:
                    file.write((json.dumps(summary, indent=1) + "\n").encode())
    print(f"{'reader':40} {'read':>9} {'refused':>9} {'FAILED':>9}")
    for name, counts in sorted(table.items()):
        print(f"{name:40} {counts['read']:9,} {counts['refused']:9,} {counts['FAILED']:9,}")
    failed = sum(counts["FAILED"] for counts in table.values())
    seconds = time.perf_counter() - start
    print(f"{done:,} executions, seed {args.seed}, in {seconds:,.0f} s: {failed:,} failed.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
