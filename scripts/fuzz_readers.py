"""Reads a million broken files: `python scripts/fuzz_readers.py --executions 1000000`

Every reader of files that people download gets mutated copies of good ones: flipped bits, cut and
doubled parts, other numbers, pieces of other files. What they say about their hashes is made
true again, so that the checks behind are reached. A reader may refuse, with a `ValueError` or
an `OSError`, or read what is good in spite of all; anything else is a failure: another error,
more than 5 seconds of a processor, or more memory than `ROOM` beyond what the process has. Failures are written
to a folder, and the exit status is 1.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.calibrate import recipe_file
from qjax.core import manifest, safetensors_io, serialize
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.checkpoints import load_checkpoint
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.dit_keys import diffusers_keys
from qjax.models.lora import load_lora
from qjax.models.unet2d_condition_config import UNet2DConditionConfig

REFUSALS = (ValueError, OSError)
SECONDS = 5
ROOM = 512 * 2**20

INTERESTING = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
)
TOKENS = [
    *(str(n) for n in INTERESTING),
    *(
        "-1",
        "1.5",
        "1e309",
        "NaN",
        "-Infinity",
        "null",
        "true",
        "[]",
        "{}",
        '""',
        "[[[[",
        '"\\ud800"',
    ),
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"BF16"', '"U8"', '"F4"'),
    *(
        "../x",
        "/etc/passwd",
        "a: &a [*a]",
        "!!python/object:os.system",
        '!!int ""',
        '!!bool "x"',
        "\x00",
        "\ufeff",
        "é",
    ),
]


class Target(NamedTuple):
    """A reader.

    Attributes:
      name: Said in the table.
      seeds: Good files.
      read: Reads the bytes of one.
      share: How many of a hundred executions it gets; slow readers get fewer.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], Any]
    share: int


class TooSlow(BaseException):
    """Raised by the alarm; no reader catches it."""


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to eight changes to a copy."""
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
    file = folder / "file.safetensors"

    def fresh(data: bytes, path: Path) -> Path:
        path.write_bytes(data)
        return path

    def read_tensors(data: bytes) -> None:
        found = safetensors_io.open_tensors(fresh(data, file))
        for tensor in found.values():
            tensor.read()
        safetensors_io.metadata(file)

    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": np.arange(5, dtype=np.int8),
    }
    safetensors_io.write_tensors(file, tensors, {"format": "pt"})
    plain = file.read_bytes()
    header = {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    two = {
        "x": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]},
        "y": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [32, 64]},
        "__metadata__": {"a": "b"},
    }

    # A LoRA of two layers of a tiny DiT, and its settings beside it.
    config = DiTConfig(
        sample_size=4,
        patch_size=2,
        in_channels=1,
        num_layers=1,
        num_heads=2,
        head_dim=4,
        num_classes=3,
    )
    table = {"unet": diffusers_keys(config)}
    halves = {}
    for key, target in table["unet"].items():
        if key.endswith(("to_q.weight", "to_k.weight")):
            o, i = target.shape
            name = "unet." + key.removesuffix(".weight")
            halves[f"{name}.lora_A.weight"] = rng.standard_normal((2, i)).astype(np.float32)
            halves[f"{name}.lora_B.weight"] = rng.standard_normal((o, 2)).astype(np.float32)
    lora_file = folder / "lora.safetensors"
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 4})
    safetensors_io.write_tensors(lora_file, halves, {"lora_adapter_metadata": settings})
    lora = lora_file.read_bytes()
    load_lora(lora_file, table)  # the seed is good

    # A folder of diffusers' layout, of one file and of two shards.
    shards = folder / "shards"
    shards.mkdir()
    stem = "diffusion_pytorch_model"
    safetensors_io.write_tensors(shards / f"{stem}-00001-of-00002.safetensors", {"a": tensors["a"]})
    safetensors_io.write_tensors(shards / f"{stem}-00002-of-00002.safetensors", {"b": tensors["b"]})
    names = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    index = json.dumps({"metadata": {"total_size": 53}, "weight_map": names}).encode()
    index_file = shards / f"{stem}.safetensors.index.json"
    (shards / "config.json").write_text('{"_class_name": "X"}')

    def read_index(data: bytes) -> None:
        fresh(data, index_file)
        load_checkpoint(shards)

    unet = dataclasses.replace(
        UNet2DConditionConfig.sd_v1_4(), block_out_channels=(32, 32, 32, 32), layers_per_block=1
    )
    configs = [json.dumps(one.to_diffusers()).encode() for one in (config, unet)]

    def read_config(data: bytes) -> None:
        path = fresh(data, shards / "config.json")
        fresh(index, index_file)
        try:
            found = load_checkpoint(shards).config
            build_denoiser(str(found.get("_class_name")), found)
        finally:
            path.write_text('{"_class_name": "X"}')

    autoencoder = [json.dumps(AutoencoderKLConfig().to_diffusers()).encode()]

    def read_autoencoder(data: bytes) -> None:
        value = json.loads(data)
        if isinstance(value, dict):
            AutoencoderKLConfig.from_diffusers(value)

    quant = QuantConfig(
        rules=(
            Rule(
                pattern="a/.*",
                weight=WeightSpec(bits=4, granularity="per_group", group_size=(64, None)),
            ),
        ),
        weight=WeightSpec(bits=8),
        act=ActSpec(bits=8),
    )
    yaml_file = folder / "config.yaml"
    quant.to_yaml(yaml_file)
    quant_text = yaml_file.read_bytes()

    # A save of a quantized tree: its manifest, resealed.
    saved = folder / "saved"
    params = {"a": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    serialize.save(saved, qjax.quantize(params, QuantConfig(weight=WeightSpec(bits=4))), {"x": 1})
    good = (saved / manifest.MANIFEST).read_bytes()

    def read_save(data: bytes) -> None:
        try:
            value = json.loads(data)
            value["sha256"] = manifest._manifest_digest(value)
            data = json.dumps(value).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            pass  # it stays as broken as it is
        fresh(data, saved / manifest.MANIFEST)
        serialize.load(saved)

    search = recipe_file.SearchRecipe(
        architecture=recipe_file.kernel_shapes(params),
        quant=QuantConfig(weight=WeightSpec(bits=4, granularity="per_group", group_size=32)),
        groups={"a/kernel": 32},
        settings={"seed": 0},
        result={"fitness": 1.0},
    )
    search_files = []
    for name in ("search.yaml", "search.json"):
        recipe_file.save_search(folder / name, search)
        search_files.append((folder / name).read_bytes())

    def read_search(data: bytes) -> None:
        path = folder / ("found.json" if data.lstrip()[:1] == b"{" else "found.yaml")
        try:
            value = json.loads(data)
            stored = value.pop("sha256")
            value["sha256"] = recipe_file._digest(value) if stored else stored
            data = json.dumps(value).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        recipe_file.load_search(fresh(data, path))

    return [
        Target("safetensors", [plain, with_length(json.dumps(header).encode())], read_tensors, 30),
        Target(
            "safetensors, header of the right length",
            [json.dumps(header).encode(), json.dumps(two).encode()],
            lambda data: read_tensors(with_length(data)),
            30,
        ),
        Target("LoRA", [lora], lambda data: load_lora(fresh(data, lora_file), table), 10),
        Target("index of shards", [index], read_index, 6),
        Target("config of a denoiser", configs, read_config, 4),
        Target("config of an autoencoder", autoencoder, read_autoencoder, 4),
        Target(
            "QuantConfig", [quant_text], lambda d: QuantConfig.from_yaml(fresh(d, yaml_file)), 6
        ),
        Target("saved folder", [good], read_save, 6),
        Target("search recipe", search_files, read_search, 4),
    ]


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {SECONDS} seconds")


def executions(
    found: list[Target], rng: random.Random, count: int
) -> Iterator[tuple[Target, bytes]]:
    """Readers in turn, by their shares, with a broken file each."""
    wheel = [target for target in found for _ in range(target.share)]
    others = [seed for target in found for seed in target.seeds]
    for _ in range(count):
        target = rng.choice(wheel)
        yield target, mutated(rng, rng.choice(target.seeds), others)


def fuzz(count: int, seed: int, failures: Path) -> dict[str, collections.Counter]:
    """Outcomes by reader; failures are written into a folder."""
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    folder = Path(
        tempfile.mkdtemp(prefix="qjax-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )
    signal.signal(signal.SIGPROF, _too_slow)
    try:
        found = targets(folder)
        for target in found:  # all seeds are good, and what they need is imported
            for one in target.seeds:
                target.read(one)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, limits[1]))
        for target, data in executions(found, random.Random(seed), count):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    target.read(data)
                outcome = "read"
            except REFUSALS as error:
                outcome = "refused"
                if not str(error):
                    outcome = "FAILED"
                    _keep(failures, target.name, data)
            except (Exception, TooSlow):  # noqa: BLE001, what else a reader raises is the finding
                outcome = "FAILED"
                _keep(failures, target.name, data)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            table[target.name][outcome] += 1
        resource.setrlimit(resource.RLIMIT_AS, limits)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return table


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _keep(failures: Path, name: str, data: bytes) -> None:
    failures.mkdir(parents=True, exist_ok=True)
    error = traceback.format_exc()
    where = error.strip().splitlines()[-1][:60]
    place = [line for line in error.splitlines() if line.strip().startswith("File")][-1]
    key = hashlib.sha256(f"{name}{place}".encode()).hexdigest()[:12]
    if not (failures / f"{key}.txt").exists():
        (failures / key).write_bytes(data)
        (failures / f"{key}.txt").write_text(f"{name}\n{error}")
        print(f"FAILED {name}: {where} ({failures / key})", file=sys.stderr)


def main() -> None:
    """Print a table of outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    start = time.perf_counter()
    table = fuzz(args.executions, args.seed, args.failures)
    print(f"{'reader':40} {'read':>9} {'refused':>9} {'FAILED':>9}")
    for name, counts in table.items():
        print(f"{name:40} {counts['read']:9,} {counts['refused']:9,} {counts['FAILED']:9,}")
    total = sum(sum(counts.values()) for counts in table.values())
    failed = sum(counts["FAILED"] for counts in table.values())
    seconds = time.perf_counter() - start
    print(f"{total:,} executions, seed {args.seed}, in {seconds:,.0f} s: {failed:,} failed.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
