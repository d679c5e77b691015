"""Files that are damaged, disks that are full, memory that is short."""

import ctypes
import itertools
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _trials import W4, check, forked, hidden, small_model, tree, version_of

import qjax
from qjax.core import serialize
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.safetensors_io import open_tensors, write_tensors


def damaged_files(folder: Path, rng: random.Random, step: int) -> dict[str, Any]:
    """Every byte changed, every length cut to, tensors swapped: refused, or the same values."""

    def work() -> dict[str, int]:
        import jax.numpy as jnp

        out = folder / "save"
        params = {
            "a": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)))},
            "b": {"kernel": jnp.ones((8, 8)), "bias": jnp.arange(8.0)},
        }
        config = QuantConfig(weight=WeightSpec(bits=4, symmetric=False))
        serialize.save(out, qjax.quantize(params, config), {"name": "x"})
        good = serialize.params_digest(serialize.load(out)[0])
        found = {"bytes changed": 0, "cut": 0, "longer": 0, "swapped": 0}
        outcome = {"refused": 0, "read the same values": 0}

        def attempt(path: Path, data: bytes, kind: str) -> None:
            path.write_bytes(data)
            found[kind] += 1
            try:
                digest = serialize.params_digest(serialize.load(out)[0])
            except ValueError:
                outcome["refused"] += 1
                return
            check(digest == good, f"{kind} of {path.name} gives other values")
            outcome["read the same values"] += 1

        for path in sorted(out.iterdir()):
            data = path.read_bytes()
            for at in range(0, len(data), step):
                for change in (1 << rng.randrange(8), 0xFF):
                    new = bytearray(data)
                    new[at] ^= change
                    attempt(path, bytes(new), "bytes changed")
                attempt(path, data[:at], "cut")
            for more in (b"\0", b" ", data):
                attempt(path, data + more, "longer")
            path.write_bytes(data)
        weights = out / serialize.WEIGHTS
        data = weights.read_bytes()
        tensors = {name: tensor.read() for name, tensor in open_tensors(weights).items()}
        for (a, left), (b, right) in itertools.combinations(tensors.items(), 2):
            if not np.array_equal(left, right):
                write_tensors(weights, tensors | {a: right, b: left}, {})
                attempt(weights, weights.read_bytes(), "swapped")
        weights.write_bytes(data)
        check(serialize.params_digest(serialize.load(out)[0]) == good, "the original does not load")
        return found | outcome

    return forked(work)


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[tuple[Path, str]]:
    """A folder on a disk of some bytes; where we may not mount one, a limit of files instead."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={size}".encode()
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, options) == 0:
        try:
            yield disk, "a tmpfs of that size"
        finally:
            libc.umount2(os.fsencode(disk), 2)
        return
    yield disk, "RLIMIT_FSIZE (no right to mount)"


def full_disks(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """At many sizes: the old save is untouched, and the error names file and bytes."""
    old, new = tree(1, mb=0.25), tree(2, mb=1)
    found: dict[str, Any] = {"disks too small": 0, "saved": 0, "how": ""}
    for i in range(count):
        size = (512 + 1600 * i // count) * 1024
        with _small_disk(folder, size) as (disk, how):
            found["how"] = how
            out = disk / f"model-{i}"
            forked(lambda out=out: serialize.save(out, old, {"version": 1}))

            def work(out: Path = out, size: int = size, how: str = how) -> str:
                if how.startswith("RLIMIT"):
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 300 * 1024, size))
                try:
                    serialize.save(out, new, {"version": 2})
                except OSError as error:
                    return str(error)
                return ""

            said = forked(work)
            version, values = forked(lambda out=out: version_of(out))
            check(values == {float(version)}, "a save is half-written")
            check(version == (1 if said else 2), "the old save is gone")
            check(not hidden(disk), f"left: {hidden(disk)}")
            if said:
                check(serialize.WEIGHTS in said and "bytes" in said, f"not named: {said}")
            found["disks too small" if said else "saved"] += 1
    check(found["disks too small"] > 0 and found["saved"] > 0, f"one-sided: {found}")
    return found


def memory(folder: Path, rng: random.Random, layers: int) -> dict[str, Any]:
    """Quantized while it is read: the float model is never whole in memory."""
    model = small_model(folder / "float", num_heads=8, head_dim=64, num_layers=layers)
    tiny = small_model(folder / "tiny")
    size = (model / "transformer/diffusion_pytorch_model.safetensors").stat().st_size

    def peak(path: Path) -> tuple[int, int, int]:
        pipe = qjax.load(str(path), quantize=W4)
        pipe.save(folder / f"{path.name}-saved")
        written = sum(f.stat().st_size for f in (folder / f"{path.name}-saved").iterdir())
        largest = max(leaf.nbytes for leaf in _floats(path))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, written, largest

    base, _, _ = forked(lambda: peak(tiny))
    top, written, largest = forked(lambda: peak(model))
    # The result, once more while it is written, a few leaves on their way, and room of malloc.
    budget = 2 * written + 6 * largest + 16 * 2**20
    found = {
        "float model, MB": round(size / 2**20),
        "largest leaf, MB": round(largest / 2**20, 1),
        "quantized, MB": round(written / 2**20, 1),
        "peak beyond that of a tiny model, MB": round((top - base) / 2**20, 1),
        "budget, MB": round(budget / 2**20, 1),
    }
    check(top - base <= budget < size, f"over the budget: {found}")
    return found


def _floats(path: Path) -> list[Any]:
    weights = path / "transformer/diffusion_pytorch_model.safetensors"
    return list(open_tensors(weights).values())
