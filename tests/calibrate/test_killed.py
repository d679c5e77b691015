"""Killed anywhere, a run goes on when it is started again, and ends with the same bits."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.time_table import TimePrecalculation
from qjax.calibrate.work import Work

pytestmark = pytest.mark.usefixtures("standard_promotion")

KILLS = 5


def digest(folder):
    """Of all files of a save."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_after_every_part_and_within_every_fit_a_run_can_be_broken_off(
    dit, quantize, tmp_path, monkeypatch
):
    fit = FitSettings(weights="latent", iterations=24, batch=8, chunk=4, freeze=0.3)
    stage = SerialParallel(
        steps=2,
        data=CalibrationSet(items=4),
        batch=4,
        ranges="minmax",
        fits="network",
        refreshes=2,
        keep_every=4,
        last_ranges=True,
        fit=fit,
    )
    stages = (stage, TimePrecalculation(steps=2))
    recipe = Recipe(quant=quantize(dit, bits=3).quant, stages=stages)
    start = lambda name: run(dit, recipe, out=tmp_path / name, seed=1)
    start("whole")
    part, written = Work.part, []

    def once(self, name, make):
        known = self.has(name)
        arrays = part(self, name, make)
        if not known:
            written.append(name)
            raise KeyboardInterrupt
        return arrays

    monkeypatch.setattr(Work, "part", once)
    for count in itertools.count(1):
        try:
            start("broken")
        except KeyboardInterrupt:
            assert len(written) == count
        else:
            break
    fits = [["network-at-4", "network-at-8", "network"], ["network-at-16", "network-at-20"]]
    assert written == [
        "roll-out-0",
        *(f"refresh-0-{name}" for name in fits[0]),
        "roll-out-1",
        *(f"refresh-1-{name}" for name in [*fits[1], "network"]),
        "roll-out-last",
    ]
    assert digest(tmp_path / "broken" / "final") == digest(tmp_path / "whole" / "final")
    assert not list(tmp_path.glob("*/*-parts/*.safetensors"))


def calibrate(model, out):
    """`qjax calibrate` in a process of its own; both folders by their names."""
    words = ("calibrate", model.name, "--recipe", "s2p_w4a8", "--out", out.name, "--json")
    settings = ("--steps", "3", "--items", "16", "--iterations", "300", "--guidance", "2")
    return subprocess.Popen(
        [sys.executable, "-m", "qjax", *words, *settings],
        cwd=model.parent,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_time_goes_on_when_started_again(dit, tmp_path):
    model, whole = tmp_path / "model", tmp_path / "whole"
    dit.save(model)
    begin = time.monotonic()
    out, err = calibrate(model, whole).communicate()
    seconds = time.monotonic() - begin
    assert json.loads(out)["stages"] == ["SerialParallel", "TimePrecalculation"], err
    print(f"uninterrupted: {seconds:.1f} s")

    random.seed(20)
    # One in every fifth of the time, shuffled, from one second on.
    moments = [1 + (seconds - 1) * (i + random.random()) / KILLS for i in range(KILLS)]
    random.shuffle(moments)
    folder, number = tmp_path / "run-0", 0
    while moments:
        process = calibrate(model, folder)
        try:
            process.wait(timeout=moments[0])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            parts = sorted(path.stem for path in folder.glob("*-parts/*.safetensors"))
            print(f"killed after {moments.pop(0):.1f} s of run {number}, with {parts}")
        _, err = process.communicate()
        if process.returncode != -signal.SIGKILL:
            # It was done before its time: the next run begins anew.
            assert process.returncode == 0, err
            print(f"run {number} is done")
            assert digest(folder / "final") == digest(whole / "final")
            number += 1
            folder = tmp_path / f"run-{number}"
    _, err = calibrate(model, folder).communicate()
    print(f"run {number} is done")
    found = digest(folder / "final")
    assert found == digest(whole / "final"), err
    print(f"model.safetensors: sha256 {found['model.safetensors']}, as uninterrupted")
