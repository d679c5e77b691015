"""What happens to files when things go wrong: `python benchmarks/faults.py`

Processes are killed while they write, files are damaged, disks are full, memory is short, two jobs
want one folder, clocks run backwards and locales differ. Each case is tried many times, and the
counts go into `benchmarks/results/faults.json` and `docs/faults.md`. The exit status is 1 if
anything was lost or half-written.

Every trial is a process of its own, forked from this one, which has imported the library and
computed nothing.
"""

import argparse
import ctypes
import dataclasses
import datetime
import hashlib
import itertools
import json
import locale
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import numpy as np

import qjax
from qjax.calibrate.recipe import Recipe, run
from qjax.conversion import convert_checkpoint
from qjax.core import serialize
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.locks import LOCK
from qjax.core.safetensors_io import atomic_write, open_tensors, write_tensors
from qjax.kernels import tuning
from qjax.kernels.packing import Format
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig

ROOT = Path(__file__).parents[1]
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
    answer, other = FORK.Pipe(duplex=False)

    def main() -> None:
        try:
            other.send((True, work()))
        except BaseException:  # noqa: BLE001, told to the parent
            other.send((False, traceback.format_exc()))

    process = FORK.Process(target=main)
    process.start()
    other.close()
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
    process = FORK.Process(target=_silent, args=(work,))
    process.start()
    while process.is_alive() and not begun():
        time.sleep(0.0005)
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def _silent(work: Callable[[], Any]) -> None:
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


def kills_in_saves(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Saves over a save: the old or the new one is there, whole; no other."""
    out = folder / "model"
    forked(lambda: serialize.save(out, tree(0), {"version": 0}))
    seconds = forked(lambda: _timed(lambda: serialize.save(out, tree(0), {"version": 0})))

    def work() -> None:
        for i in range(1, 10_000):
            serialize.save(out, tree(i), {"version": i})

    found: dict[str, int] = {"killed": 0, "left something behind": 0}
    for _ in range(count):
        found["killed"] += killed(work, 0.02 + rng.random() * 3 * seconds)
        version, values = forked(lambda: _version(out))
        check(values == {float(version)}, f"version {version} with values {values}")
        found["left something behind"] += bool(hidden(folder))
        forked(lambda: serialize.save(out, tree(0), {"version": 0}))
        check(not hidden(folder), f"not cleared: {hidden(folder)}")
    return found


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _version(out: Path) -> tuple[int, set[float]]:
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


def _calibrate(model: Path, out: Path, stage: Parts) -> None:
    run(qjax.load(str(model)), Recipe(quant=W4, stages=(stage, stage)), out=out, seed=1)


def _calibration(model: Path, out: Path, stage: Parts) -> Callable[[], None]:
    return lambda: _calibrate(model, out, stage)


def kills_in_calibrations(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Runs that are started again after each kill, until they end: with the same bits."""
    model, stage = small_model(folder / "float"), Parts()
    whole = folder / "whole"
    seconds = forked(lambda: _timed(lambda: _calibrate(model, whole, stage)))
    found = {"killed": 0, "runs ended": 0}
    out, number = folder / "run-0", 0
    while found["killed"] < count:
        if killed(_calibration(model, out, stage), (0.2 + rng.random()) * seconds):
            found["killed"] += 1
            continue
        number, out = _ended(out, whole, number, folder)
        found["runs ended"] += 1
    forked(lambda: _calibrate(model, out, stage))
    _ended(out, whole, number, folder)
    found["runs ended"] += 1
    return found


def _ended(out: Path, whole: Path, number: int, folder: Path) -> tuple[int, Path]:
    check((out / "final").exists(), f"{out} did not end")
    check(digests(out / "final") == digests(whole / "final"), f"{out} ended with other bits")
    check(not hidden(out), f"not cleared: {hidden(out)}")
    return number + 1, folder / f"run-{number + 1}"


def kills_in_conversions(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """A folder with an index is whole; without one it is none, and is converted again."""
    model, whole = small_model(folder / "float"), folder / "whole"
    seconds = forked(lambda: _timed(lambda: convert_checkpoint(model, whole)))
    good = digests(whole)
    found = {"killed": 0, "no model yet": 0, "whole": 0}
    out = folder / "out"
    for _ in range(count):
        found["killed"] += killed(lambda: convert_checkpoint(model, out), rng.random() * seconds)
        if (out / "model_index.json").exists():
            have = {k: v for k, v in digests(out).items() if not Path(k).name.startswith(".")}
            check(have == good, "a folder with an index is not whole")
            found["whole"] += 1
        else:
            found["no model yet"] += 1
        forked(lambda: convert_checkpoint(model, out))
        check(digests(out) == good, "converting again gives other files, or leaves some")
        shutil.rmtree(out)
    return found


def kills_in_quantize(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """`qjax quantize --overwrite` over a save: the old or the new one is there, whole."""
    from qjax.cli import main

    model, out = small_model(folder / "float"), folder / "out"
    words = ["quantize", str(model), "--out", str(out), "--overwrite", "--json", "--recipe"]

    def quantize(recipe: str) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        check(main([*words, recipe]) == 0, "quantize failed")

    good = {}
    for recipe in ("w8a8", "w4a8"):
        seconds = forked(lambda recipe=recipe: _timed(lambda: quantize(recipe)))
        good[recipe] = digests(out)
    found = {"killed": 0, "while it wrote": 0, "old": 0, "new": 0}
    now = "w4a8"
    for number in range(count):
        new = "w8a8" if now == "w4a8" else "w4a8"
        # At any time, and in turns within some milliseconds of the first file it makes.
        writing = number % 2 == 1
        moment = rng.random() * (0.03 if writing else 0.8 * seconds)
        begun = (lambda: hidden(folder)) if writing else (lambda: True)
        at_work = killed(lambda new=new: quantize(new), moment, begun)
        found["killed"] += at_work
        found["while it wrote"] += at_work and bool(hidden(folder))
        have = digests(out)
        check(have in good.values(), "neither the old nor the new save")
        found["new" if have == good[new] else "old"] += 1
        forked(lambda new=new: quantize(new))
        check(digests(out) == good[new] and not hidden(folder), f"left: {hidden(folder)}")
        now = new
    return found


def kills_in_tuning(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """The file of choices is readable, and keeps what was in it; two at once lose nothing."""
    os.environ["QJAX_CACHE"] = str(folder)
    problem = lambda n: tuning.Problem(n, 512, 512, 1, Format(4, 256, 0), np.dtype("float32"))
    choice = tuning.Choice("xla", (128,))

    def work(start: int = 1000) -> None:
        for i in range(start, start + 10_000):
            tuning.keep({problem(i % 40): choice})

    forked(lambda: str(tuning.keep({problem(1): choice})))
    found = {"killed": 0, "choices after two wrote at once": 0}
    for _ in range(count):
        found["killed"] += killed(work, 0.3 + rng.random() * 0.5)
        names = forked(lambda: list(tuning.choices()))
        check(forked(lambda: problem(1).name()) in names, "a choice was lost")
    (folder / "tuning.json").unlink()
    both = [
        FORK.Process(
            target=lambda k=k: [tuning.keep({problem(100 * k + i): choice}) for i in range(20)]
        )
        for k in (1, 2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    found["choices after two wrote at once"] = len(forked(lambda: list(tuning.choices())))
    check(found["choices after two wrote at once"] == 40, "two that tune at once lose choices")
    check(not hidden(folder), f"left: {hidden(folder)}")
    del os.environ["QJAX_CACHE"]
    return found


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
            version, values = forked(lambda out=out: _version(out))
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


def two_jobs(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """A folder that a process works in refuses a second one, and is free after a kill."""
    model, slow = small_model(folder / "float"), Parts(seconds=60)
    quick = Parts(seconds=0)
    found = {"second refused, with the first one's pid and host": 0, "taken over after a kill": 0}
    for i in range(count):
        out = folder / f"out-{i}"
        first = FORK.Process(target=_silent, args=(lambda out=out: _calibrate(model, out, slow),))
        first.start()
        while not (out / LOCK).exists():
            time.sleep(0.05)
            check(first.is_alive(), "the first job ended")
        time.sleep(0.1)

        def second(out: Path = out) -> str:
            try:
                _calibrate(model, out, slow)
            except BlockingIOError as error:
                return str(error)
            return "not refused"

        said = forked(second)
        check(f"process {first.pid} on {platform.node()}" in said, said)
        found["second refused, with the first one's pid and host"] += 1
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        check((out / LOCK).exists(), "the file of the lock should have stayed")
        shutil.rmtree(out / "stage-0-parts-parts", ignore_errors=True)
        (out / "run.json").unlink(missing_ok=True)
        forked(lambda out=out: _calibrate(model, out, quick))
        check(not (out / LOCK).exists(), "the lock was not removed")
        found["taken over after a kill"] += 1
    return found


def clocks(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Clocks that run backwards and dates of files in the past change nothing."""
    model, stage = small_model(folder / "float"), Parts(seconds=0)
    forked(lambda: _calibrate(model, folder / "whole", stage))

    def backwards(out: Path) -> None:
        now = time.time()
        ticks = iter(range(10**9))
        time.time = lambda: now - 86_400 * next(ticks)
        _calibrate(model, out, stage)

    for i in range(count):
        out = folder / f"out-{i}"
        killed(lambda out=out: _calibrate(model, out, Parts(seconds=0.02)), 0.5 + rng.random())
        for path in out.rglob("*"):
            os.utime(path, (0, 0))
        shutil.rmtree(out, ignore_errors=True)
        forked(lambda out=out: backwards(out))
        check(digests(out / "final") == digests(folder / "whole/final"), "the clock matters")
    return {"runs with a clock that goes back a day at every look": count}


def places(folder: Path, rng: random.Random, _: int) -> dict[str, Any]:
    """Locales, names of folders, rights: the same bits, or an error and nothing written."""
    model = small_model(folder / "float")
    code = "import sys, qjax; q = qjax.load(sys.argv[1]); "
    code += "qjax.quantize(q, qjax.recipes.w4a8()).save(sys.argv[2])"
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout
    found: dict[str, Any] = {"locales": [], "names": 0, "refused without the right": 0}
    names = ["plain", "mit Leerzeichen", "модель 模型 ı İ", "x" * 240, "a'b$c;d"]
    wanted = ["C", "C.utf8", "tr_TR.utf8", "de_DE.utf8"]
    good: dict[str, str] = {}
    for i, name in enumerate(wanted):
        if name not in ("C", "C.utf8") and name not in known.split():
            continue
        out = folder / names[i % len(names)] / names[(i + 1) % len(names)]
        env = os.environ | {"LC_ALL": name, "LANG": name, "PYTHONUTF8": "0"}
        env |= {"PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, os.fsencode(model), os.fsencode(out)],
            env=env,
            capture_output=True,
            check=False,
        )
        check(done.returncode == 0, done.stderr.decode(errors="replace")[-500:])
        good = good or digests(out)
        check(digests(out) == good, f"{name} gives other bits")
        found["locales"].append(name)
    for name in names:
        forked(lambda name=name: serialize.save(folder / name / name, tree(1), {"version": 1}))
        forked(lambda name=name: serialize.save(folder / name / name, tree(2), {"version": 2}))
        check(forked(lambda name=name: _version(folder / name / name))[0] == 2, name)
        found["names"] += 1

    def without_right(mode: int) -> str:
        place = folder / f"shut-{mode:o}"
        place.mkdir(mode=0o755)
        serialize.save(place / "save", tree(1), {"version": 1})
        os.chmod(place, mode)
        if os.getuid() == 0:
            for one in (folder, *folder.parents):
                if one.is_relative_to(tempfile.gettempdir()) and one != Path(tempfile.gettempdir()):
                    os.chmod(one, 0o755)
            os.setuid(65534)
        try:
            serialize.save(place / "save", tree(2), {"version": 2})
        except OSError as error:
            check(str(place) in str(error), f"not named: {error}")
            return "refused"
        return "written"

    check(forked(lambda: without_right(0o555)) == "refused", "a folder without right was written")
    check(forked(lambda: _version(folder / "shut-555/save"))[0] == 1, "the old save is gone")
    found["refused without the right"] += 1

    def masked() -> str:
        os.umask(0o077)
        serialize.save(folder / "masked", tree(1), {"version": 1})
        return ",".join(f"{p.stat().st_mode & 0o777:o}" for p in (folder / "masked").iterdir())

    check(forked(masked) == "600,600", "umask 077 is not followed")
    found["umask 077"] = "followed"
    return found


CASES: dict[str, tuple[Callable[[Path, random.Random, int], dict[str, Any]], int, int]] = {
    "killed while a model is saved over another": (kills_in_saves, 40, 3),
    "killed while a calibration writes its parts and stages": (kills_in_calibrations, 8, 1),
    "killed while a checkpoint is converted": (kills_in_conversions, 8, 1),
    "killed in `qjax quantize --overwrite`": (kills_in_quantize, 24, 2),
    "killed while choices of tuning are kept": (kills_in_tuning, 10, 1),
    "damaged files of a save": (damaged_files, 1, 40),
    "full disks": (full_disks, 24, 4),
    "quantized while it is read, within a budget of memory": (memory, 12, 6),
    "two jobs on one folder": (two_jobs, 3, 1),
    "clocks that run backwards": (clocks, 2, 1),
    "locales, names, rights": (places, 1, 1),
}
"""What each line of the table runs, how often, and how often with `--quick`; of damaged files
every how manieth byte, of memory the layers of the model."""


def to_markdown(result: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Faults",
        "",
        "What happens to files when processes die, disks are full and files are damaged, tried by",
        "`python benchmarks/faults.py`, which writes this page.",
        "",
        "| fault | what was tried | counts | held |",
        "|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        counts = case.get("counts", {})
        said = "; ".join(
            f"{key}: {', '.join(value) if isinstance(value, list) else f'{value:,}' if isinstance(value, int) else value}"
            for key, value in counts.items()
        )
        held = "yes" if case["held"] else f"**no**: {case['error'][-200:]}"
        lines.append(f"| {name} | {case['claim']} | {said} | {' '.join(held.split())} |")
    kills = sum(case.get("counts", {}).get("killed", 0) for case in result["cases"].values())
    lines += [
        "",
        f"{kills} processes were killed at work.",
        f"{'Nothing' if result['held'] else 'Something'} was lost or half-written.",
        f"{result['seconds']:,} s on {result['machine']}, Python {result['python']},",
        f"commit {result['commit'][:12]}, {result['date']}.",
        "",
        "What stays after a kill, and when it goes:",
        "",
        "| left | where | removed by |",
        "|---|---|---|",
        "| `.NAME-0123456789abcdef` | beside a saved folder | the next save to `NAME` |",
        "| `.NAME.0123456789abcdef.tmp` | beside a file | the next writing of that file |",
        "| `.qjax-lock`: no lock without its process | in a calibration's folder | the next run |",
        "| `.tuning.lock` | in the cache folder | nothing: it is empty and stays |",
        "| a folder without `model_index.json` | where `qjax convert` wrote | nothing: delete it |",
        "",
        "Only what no living process holds is removed (`qjax/core/locks.py`). Where the system cannot",
        "exchange two folders in one step, a kill in the middle of replacing a save leaves the old one",
        "under `.NAME-...-old` and none at `NAME`.",
        "",
        "Weights of others, in diffusers' layout, carry no hashes: a changed byte of their data cannot",
        "be told from another value. Their headers are checked, and values that are not finite refused.",
        "",
        "Folders in buckets have their tests: a job dies at every change of the bucket, and another on",
        "an empty disk ends with the same bits (`tests/core/test_remote.py`, `tests/calibrate/test_bucket.py`,",
        "and with real clients and SIGKILL `tests/calibrate/test_bucket_processes.py`).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few trials of each, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cases whose names hold this text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/faults.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    locale.setlocale(locale.LC_ALL, "")
    begin, cases = time.perf_counter(), {}
    for name, (case, often, quick) in CASES.items():
        if args.only and args.only not in name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="qjax-faults-"))
        start = time.perf_counter()
        entry: dict[str, Any] = {"claim": (case.__doc__ or "").splitlines()[0], "held": True}
        try:
            entry["counts"] = case(folder, random.Random(args.seed), quick if args.quick else often)
        except Wrong as error:
            entry |= {"held": False, "error": str(error)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        entry["seconds"] = round(time.perf_counter() - start, 1)
        cases[name] = entry
        print(f"{name}: {json.dumps(entry, ensure_ascii=False)}", flush=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    seconds = round(time.perf_counter() - begin)
    if args.only and args.out.exists():  # one case anew, the others as they were
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if old["commit"] == commit:
            cases = {name: (old["cases"] | cases).get(name) for name in CASES}
            cases = {name: case for name, case in cases.items() if case is not None}
            seconds += old["seconds"]
    result = {
        "held": all(case["held"] for case in cases.values()),
        "cases": cases,
        "seed": args.seed,
        "seconds": seconds,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    for path, text in (
        (args.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
        (args.page, to_markdown(result)),
    ):
        with atomic_write(path) as file:
            file.write(text.encode())
    sys.exit(0 if result["held"] else 1)


if __name__ == "__main__":
    main()
