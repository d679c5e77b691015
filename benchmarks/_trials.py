"""What every trial of `faults.py` stands on: processes that are killed, small models, digests.

Every trial is a process of its own, forked from this one, which has imported the library and
computed nothing.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

import qjax
from qjax.calibrate.recipe import Recipe, run
from qjax.core import serialize
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.locks import LOCK
from qjax.core.safetensors_io import atomic_write, write_tensors
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig

ZOO = Path(qjax.__file__).parent / "zoo"
FORK = multiprocessing.get_context("fork")
W4 = QuantConfig(weight=WeightSpec(bits=4))


class Wrong(AssertionError):
    """Something was lost, half-written or not refused."""


def check(claim: bool, words: str) -> None:
    """Raise `Wrong` with `words` unless the claim holds."""
    if not claim:
        raise Wrong(words)


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives in a process of its own; what it raises is raised here as `Wrong`."""
    return _ended(*_started(work))


def _started(work: Callable[[], Any]) -> tuple[BaseProcess, Connection]:
    answer, other = FORK.Pipe(duplex=False)

    def main() -> None:
        try:
            other.send((True, work()))
        except BaseException:  # noqa: BLE001, told to the parent
            other.send((False, traceback.format_exc()))

    process = FORK.Process(target=main)
    process.start()
    other.close()
    return process, answer


def _ended(process: BaseProcess, answer: Connection) -> Any:
    try:
        fine, value = answer.recv()
    except EOFError:
        fine, value = False, "the process ended without an answer"
    process.join()
    check(fine, str(value))
    return value


def killed(
    work: Callable[[], Any], seconds: float, begun: Callable[[], Any] = lambda: True
) -> bool:
    """Run `work` in a process and kill it; whether it was still at work.

    Args:
      work: What is broken off.
      seconds: After which, counted from when it has `begun`.
      begun: Looked at all the time; from the start if nothing is given.
    """
    process = FORK.Process(target=silent, args=(work,))
    process.start()
    while process.is_alive() and not begun():
        time.sleep(0.0005)
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def seen(work: Callable[[], Any], thing: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that `work` takes in a process, and for how many of them `thing` was there."""
    begin = time.perf_counter()
    process, answer = _started(work)
    times = []
    while not answer.poll(0.0005):
        if thing():
            times.append(time.perf_counter())
    _ended(process, answer)
    check(bool(times), "what was looked for was never there")
    return time.perf_counter() - begin, times[-1] - times[0]


def silent(work: Callable[[], Any]) -> None:
    """Run `work`; what it says as an error goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hidden(folder: Path) -> list[str]:
    """Names of what kills have left."""
    return sorted(p.name for p in folder.rglob(".*") if p.name not in (LOCK, ".tuning.lock"))


def tree(value: float, mb: float = 0.2) -> dict[str, Any]:
    """Params all of one value."""
    count = int(mb * 2**20 / 4 / 8)
    return {f"layer_{i}": {"kernel": np.full(count, value, np.float32)} for i in range(8)}


def timed(work: Callable[[], Any]) -> float:
    """The seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def version_of(out: Path) -> tuple[int, set[float]]:
    """The version that a save of `tree` tells, and all values in it."""
    params, record = serialize.load(out)
    kernels = np.stack([np.asarray(part["kernel"]) for part in params.values()])
    return record["version"], set(np.unique(kernels).tolist())


@dataclasses.dataclass(frozen=True)
class Parts:
    """A stage of several parts, each of which takes a while."""

    count: int = 8
    seconds: float = 0.03

    def run(self, state: Any, key: Any, work: Any) -> Any:
        """The state, with a step table's worth of parts written and read again."""
        total = 0.0
        for i in range(self.count):
            arrays = work.part(f"part-{i}", lambda i=i: self._make(i))
            total += float(np.asarray(arrays["x"])[0])
        params = dict(state.student.params)
        params["patch_embed"] = dict(params["patch_embed"])
        params["patch_embed"]["bias"] = params["patch_embed"]["bias"] + total
        return dataclasses.replace(state, student=state.student.replace(params=params))

    def _make(self, i: int) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        return {"x": np.random.default_rng(i).random(20_000, np.float32)}


def small_model(folder: Path, **sizes: int) -> Path:
    """A DiT in diffusers' layout with random weights."""
    fields = {"sample_size": 8, "in_channels": 4, "num_heads": 2, "head_dim": 16} | sizes
    config = DiTConfig(**({"patch_size": 2, "num_layers": 1, "num_classes": 3} | fields))
    shutil.copytree(ZOO / "fashion-dit", folder)
    (folder / "zoo.json").unlink()
    network = build_denoiser("DiTTransformer2DModel", config.to_diffusers())
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    write_tensors(weights, {k: _Random(t.shape) for k, t in network.targets.items()})
    with atomic_write(folder / "transformer" / "config.json") as file:
        file.write(json.dumps(config.to_diffusers()).encode())
    return folder


@dataclasses.dataclass(frozen=True)
class _Random:
    """Random weights that are made when they are written."""

    shape: tuple[int, ...]
    dtype: type = np.float32

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rng = np.random.default_rng(len(self.shape))
        return rng.standard_normal(self.shape, np.float32) * np.float32(0.02)


def calibrate(model: Path, out: Path, stage: Parts) -> None:
    """A calibration of two alike stages, of a model in a folder."""
    run(qjax.load(str(model)), Recipe(quant=W4, stages=(stage, stage)), out=out, seed=1)


def calibration(model: Path, out: Path, stage: Parts) -> Callable[[], None]:
    """`calibrate` that is still to be called."""
    return lambda: calibrate(model, out, stage)
