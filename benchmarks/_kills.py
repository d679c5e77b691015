"""Processes that are killed while they write: the old files or the new ones are there, whole."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from _trials import (
    FORK,
    Parts,
    calibrate,
    calibration,
    check,
    digests,
    forked,
    hidden,
    killed,
    seen,
    small_model,
    timed,
    tree,
    version_of,
)

from qjax.conversion import convert_checkpoint
from qjax.core import serialize
from qjax.kernels import tuning
from qjax.kernels.packing import Format


def kills_in_saves(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Saves over a save: the old or the new one is there, whole; no other."""
    out = folder / "model"
    forked(lambda: serialize.save(out, tree(0), {"version": 0}))
    seconds = forked(lambda: timed(lambda: serialize.save(out, tree(0), {"version": 0})))

    def work() -> None:
        for i in range(1, 10_000):
            serialize.save(out, tree(i), {"version": i})

    found: dict[str, int] = {"killed": 0, "left something behind": 0}
    for _ in range(count):
        found["killed"] += killed(work, 0.02 + rng.random() * 3 * seconds)
        version, values = forked(lambda: version_of(out))
        check(values == {float(version)}, f"version {version} with values {values}")
        found["left something behind"] += bool(hidden(folder))
        forked(lambda: serialize.save(out, tree(0), {"version": 0}))
        check(not hidden(folder), f"not cleared: {hidden(folder)}")
    return found


def kills_in_calibrations(folder: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """Runs that are started again after each kill, until they end: with the same bits."""
    model, stage = small_model(folder / "float"), Parts()
    whole = folder / "whole"
    seconds = forked(lambda: timed(lambda: calibrate(model, whole, stage)))
    found = {"killed": 0, "runs ended": 0}
    out, number = folder / "run-0", 0
    while found["killed"] < count:
        if killed(calibration(model, out, stage), (0.2 + rng.random()) * seconds):
            found["killed"] += 1
            continue
        number, out = _ended(out, whole, number, folder)
        found["runs ended"] += 1
    forked(lambda: calibrate(model, out, stage))
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
    seconds = forked(lambda: timed(lambda: convert_checkpoint(model, whole)))
    good = digests(whole)
    found = {"killed": 0, "no model yet": 0, "whole": 0}
    out = folder / "out"
    index = out / "model_index.json"
    for number in range(count):
        # In turns at any time, and when the index, which comes last, is there.
        last = number % 2 == 1
        moment, begun = (0.0, index.exists) if last else (rng.random() * seconds, lambda: True)
        found["killed"] += killed(lambda: convert_checkpoint(model, out), moment, begun)
        if index.exists():
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

    model, out = small_model(folder / "float", num_heads=8, head_dim=64), folder / "out"
    words = ["quantize", str(model), "--out", str(out), "--overwrite", "--json", "--recipe"]

    def quantize(recipe: str) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        check(main([*words, recipe]) == 0, "quantize failed")

    # `beside` is there from when the first file of a save is made until the old save is removed.
    beside = lambda: next(folder.glob(f".{out.name}-*"), None)
    good = {}
    for recipe in ("w8a8", "w4a8"):
        seconds, writes = seen(lambda recipe=recipe: quantize(recipe), beside)
        good[recipe] = digests(out)
    found = {"killed": 0, "while it wrote": 0, "old": 0, "new": 0}
    now = "w4a8"
    for number in range(count):
        new = "w8a8" if now == "w4a8" else "w4a8"
        # In turns at any time, and while it writes.
        writing = number % 2 == 1
        moment = rng.random() * (writes if writing else 0.8 * seconds)
        begun = beside if writing else lambda: True
        at_work = killed(lambda new=new: quantize(new), moment, begun)
        found["killed"] += at_work
        found["while it wrote"] += at_work and beside() is not None
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
