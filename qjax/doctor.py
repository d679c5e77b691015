"""What this machine can do for the library, finding by finding.

A finding is a plain sentence with a grade: fine, worth knowing, or wrong. Nothing is
installed, downloaded or changed.
"""

import contextlib
import functools
import importlib.metadata
import os
import platform
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax import zoo
from qjax._version import __version__
from qjax.bench import LayerCall, what_runs
from qjax.core import ops
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.quantize import quantize_leaf
from qjax.kernels import quant_matmul as kernels
from qjax.kernels import tuning
from qjax.kernels.packing import Format, pack
from qjax.kernels.target import current_target
from qjax.kernels.tiles_hopper import why_not_chip
from qjax.report_words import bytes_text, number_text
from qjax.timing import interleaved

Grade = Literal["ok", "note", "wrong"]

OLDEST = {"jax": "0.7.2", "flax": "0.11.2"}
NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors")
OPTIONAL = {
    "diffusers": "only to compare ports with the originals",
    "transformers": "only for tokenizers and text encoders",
    "torch": "only for weights that are pickles (.ckpt, .pth, .bin) and for the parity tests",
}
# Settings from outside that change what is computed.
VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DISABLE_JIT",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
)
# The matmul that is timed: rows, inputs and outputs as in a block of DiT-XL/2.
SPEED_SHAPE = (256, 1152, 1152)
W8A8 = QuantConfig(weight=WeightSpec(bits=8), act=ActSpec())
# Relative error of a convolution of normal numbers at W8A8 is about 1 %.
CONV_ERROR = 0.03
# Files by which the system shows an accelerator, and what JAX needs for it.
ACCELERATORS = {"/dev/nvidia0": "an NVIDIA GPU", "/dev/accel0": "a TPU"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      about: What, in a word or two.
      grade: Fine, worth knowing, or wrong.
      text: The finding, a sentence.
    """

    about: str
    grade: Grade
    text: str


def findings() -> Iterator[Finding]:
    """Everything there is to say; looks as it goes."""
    yield Finding(
        about="qjax",
        grade="ok",
        text=f"qjax {__version__} runs on Python {platform.python_version()} ({platform.system()}).",
    )
    yield from _versions()
    yield from _devices()
    yield from _implementations()
    yield _speed()
    yield from _machine()
    yield from _files()
    yield from _settings()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = [part for part in version.split(".")[:3] if part.isdigit()]
    return tuple(map(int, parts))


def _versions() -> Iterator[Finding]:
    found = {package: _version(package) for package in NEEDED}
    missing = [package for package, version in found.items() if version is None]
    yield Finding(
        about="packages",
        grade="wrong" if missing else "ok",
        text=f"Missing, though needed: {', '.join(missing)}."
        if missing
        else f"Installed: {', '.join(f'{name} {version}' for name, version in found.items())}.",
    )
    for package, oldest in OLDEST.items():
        version = found[package]
        if version is not None and _numbers(version) < _numbers(oldest):
            text = f"{package} {version} is older than {oldest}, the oldest that is tested."
            yield Finding(about=package, grade="wrong", text=text)
    for package, use in OPTIONAL.items():
        version = _version(package)
        if version is None:
            text = f"{package} is not installed; it is needed {use}."
            yield Finding(about=package, grade="note", text=text)
        else:
            text = f"{package} {version} is installed; it is needed {use}."
            yield Finding(about=package, grade="ok", text=text)


def _devices() -> Iterator[Finding]:
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    platform_name = devices[0].platform
    if platform_name == "cpu":
        there = [words for path, words in ACCELERATORS.items() if Path(path).exists()]
        text = "JAX computes on the CPU: right for the shipped models, slow for large ones."
        if there:
            text += f" There is {there[0]} that it does not use: install jax for it."
        text += " Accelerators need jax[cuda12] or jax[tpu]."
        yield Finding(about="devices", grade="note", text=text)
    else:
        yield Finding(
            about="devices",
            grade="ok",
            text=f"JAX computes on {len(devices)} x {', '.join(kinds)} ({platform_name}).",
        )
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        yield Finding(
            about="device memory",
            grade="ok",
            text=f"{bytes_text(free)} of {bytes_text(stats['bytes_limit'])} are free on the "
            "first device.",
        )


def _implementations() -> Iterator[Finding]:
    """Each implementation of each low-bit matmul is tried on a small case, and checked."""
    yield _kernels()
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-127, 128, (8, 256)), jnp.int8)
    weights = jnp.asarray(rng.integers(-8, 8, (256, 128)), jnp.int8)
    one, scales = jnp.ones((8, 1), jnp.float32), jnp.ones((1, 128), jnp.float32)
    exact = np.asarray(codes, np.int64) @ np.asarray(weights, np.int64)
    # Floats that hold every code; packed weights, which all kernels take.
    floats, fmt = codes.astype(jnp.bfloat16), Format(bits=4, block=256, packed=True)
    w4 = pack(weights, bits=4), scales, None
    for name in typing.get_args(kernels.Implementation):
        if name == "auto":
            continue
        yield _try(
            f"W4A8 matmul, {name}",
            functools.partial(
                kernels.quant_matmul, codes, one, None, *w4, fmt=fmt, implementation=name
            ),
            exact,
        )
        yield _try(
            f"W4A16 matmul, {name}",
            functools.partial(kernels.weight_matmul, floats, *w4, fmt=fmt, implementation=name),
            exact,
        )
    yield _convolution()


def _kernels() -> Finding:
    """Which implementation low-bit matmuls get here, and who says so."""
    platform, kind = current_target()
    hopper = platform == "gpu" and why_not_chip(kind) is None
    if platform == "tpu":
        text = "Packed and grouped weights get Pallas kernels, plain int8 ones XLA's int8 matmul."
    elif hopper:
        text = (
            "Low-bit matmuls run by XLA unless `qjax tune` finds the Pallas kernels for Hopper "
            "faster, which have not been measured."
        )
    elif platform == "gpu":
        text = f"Low-bit matmuls run by XLA: the Pallas kernels need a Hopper GPU, got {kind}."
    else:
        text = "Low-bit matmuls run by XLA, int8 where activations are quantized."
    try:
        found = len(tuning.choices())
    except ValueError as error:
        return Finding(about="kernels", grade="wrong", text=str(error))
    measured = (
        f"{found} measured choices in {tuning.path()}" if found else "no measured choices yet"
    )
    return Finding(about="kernels", grade="ok", text=f"{text} `qjax tune`: {measured}.")


def _convolution() -> Finding:
    """A small W8A8 convolution against the float one it stands for."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 16), np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 16, 8), np.float32))
    q = quantize_leaf("layer/kernel", w, W8A8)
    error = np.linalg.norm(ops.conv(x, q) - ops.conv(x, w)) / np.linalg.norm(ops.conv(x, w))
    call = LayerCall(
        path="", kind="conv", shape=w.shape, input_shape=x.shape, dtype=x.dtype, padding="SAME"
    )
    text = f"A W8A8 convolution runs as {what_runs(call, q, x)}, {error:.1%} from float32."
    return Finding(about="convolution", grade="ok" if error < CONV_ERROR else "wrong", text=text)


def _try(about: str, run: Callable[[], jax.Array], exact: np.ndarray) -> Finding:
    try:
        answer = np.asarray(run())
    except NotImplementedError as error:
        return Finding(about=about, grade="note", text=f"Not here: {error}")
    # Whatever a compiler says, the other findings are wanted too.
    except Exception as error:  # noqa: BLE001
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return Finding(about=about, grade="wrong", text=f"Fails here: {said}; please report it.")
    if np.array_equal(answer, exact.astype(answer.dtype)):
        return Finding(about=about, grade="ok", text="Runs here and is exact on a small case.")
    worst = np.abs(answer.astype(np.float64) - exact).max()
    text = f"Runs here and is WRONG by up to {worst:g} on a small case; please report it."
    return Finding(about=about, grade="wrong", text=text)


def _speed() -> Finding:
    """Whether low-bit arithmetic pays here, on one matmul."""
    m, k, n = SPEED_SHAPE
    x = jax.random.normal(jax.random.key(0), (m, k))
    w = jax.random.normal(jax.random.key(1), (k, n))
    q = quantize_leaf("layer/kernel", w, W8A8)
    run = jax.jit(ops.matmul)
    seconds = interleaved({"float": lambda: run(x, w), "int8": lambda: run(x, q)})
    ratio = seconds["int8"] / seconds["float"]
    verdict = "faster" if ratio < 1 else "SLOWER"
    return Finding(
        about="speed",
        grade="ok" if ratio < 1 else "note",
        text=f"A W8A8 matmul of {m} x {k} x {n}, its quantization included, takes "
        f"{number_text(ratio)} times the time of float32: {verdict} (median of 7 rounds in "
        "turn). `qjax bench MODEL` times every layer.",
    )


def _machine() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    text = f"{usable} of {cores} cores may be used." if usable < cores else f"{cores} cores."
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
        if load > cores:
            text += f" They are busy (load {load:.1f}), so times vary."
    yield Finding(about="processor", grade="ok", text=text)
    total, free = _memory()
    if total is not None:
        words = f"{bytes_text(total)} of memory"
        if free is not None:
            words += f", {bytes_text(free)} free"
        yield Finding(about="memory", grade="ok", text=f"{words}.")


def _memory() -> tuple[int | None, int | None]:
    """Bytes of main memory, all and available; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return fields["MemTotal"], fields["MemAvailable"]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return None, None


def _files() -> Iterator[Finding]:
    names = zoo.names()
    yield Finding(
        about="shipped models",
        grade="ok" if names else "wrong",
        text=f"{', '.join(names)}." if names else "None were found; the installation is not whole.",
    )
    import huggingface_hub.constants as hub

    cache = Path(hub.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    offline = " Offline mode is on, so nothing is downloaded." if hub.HF_HUB_OFFLINE else ""
    yield Finding(
        about="Hugging Face cache",
        grade="ok",
        text=f"{models or 'No'} model{'' if models == 1 else 's'} in {cache}.{offline}",
    )


def _settings() -> Iterator[Finding]:
    for name in VARIABLES:
        if value := os.environ.get(name):
            yield Finding(about="environment", grade="note", text=f"{name} is set to {value!r}.")
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        yield Finding(
            about="JAX", grade="note", text="64-bit types are on; this library needs none of them."
        )
