"""Runs in a bucket: broken off anywhere they go on from an empty disk, to the bits of a local run."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.pod import Pod
from qjax.calibrate.recipe import Recipe, State, opened, recipe_of_run, run
from qjax.calibrate.work import Work
from qjax.core import mirror as mirrors
from qjax.core.manifest import MANIFEST, WEIGHTS
from qjax.core.mirror import LEASE
from qjax.core.qtensor import is_qtensor

pytestmark = pytest.mark.usefixtures("standard_promotion")

URL = "gs://bucket/runs/one"
PARTS = 3


@dataclasses.dataclass(frozen=True)
class Walk:
    """A stage of parts, each made of the one before it, that also changes the floats.

    Like the fits of the real stages it keeps the last part alone, and goes on after it.
    """

    amount: float = 0.1

    def run(self, state: State, key: jax.Array, work: Work) -> State:
        floats = state.teacher.params if state.floats is None else state.floats
        value, first = jnp.mean(jax.tree.leaves(floats)[0]), 0
        for i in range(PARTS):
            if work.has(f"at-{i}"):
                first = i
        for i in range(first, PARTS):
            here = value  # that of the part before

            def make(here=here, i=i):
                return {
                    "value": here + self.amount * jax.random.uniform(jax.random.fold_in(key, i))
                }

            value = work.part(f"at-{i}", make)["value"]
            work.drop(f"at-{i - 1}")
        scaled = jax.tree.map(
            lambda q: (
                q.replace(scale=q.scale * value.astype(q.scale.dtype)) if is_qtensor(q) else q
            ),
            state.student.params,
            is_leaf=is_qtensor,
        )
        moved = jax.tree.map(lambda a: a + value.astype(a.dtype), dict(floats))
        student = state.student.replace(params=scaled)
        return dataclasses.replace(state, student=student, floats=moved)


@pytest.fixture
def recipe(dit, quantize):
    return Recipe(quant=quantize(dit, act=None).quant, stages=(Walk(), Walk(amount=0.2)), name="w")


def digest(folder):
    """Of all files of a run's folder but its logs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "log.jsonl":
            name = path.relative_to(folder).as_posix()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"final/{MANIFEST}" in found
    return found


def killed_at(buckets, count, start):
    """Whether `start` came to its end though it is killed after `count` changes of the bucket."""
    buckets.dies_at = len(buckets.changes) + count
    try:
        start()
    except buckets.Killed:
        return False
    finally:
        buckets.dies_at = None
    return True


@pytest.fixture
def dead_are_forgotten(monkeypatch):
    """The lease of a killed job counts no more, without waiting."""
    monkeypatch.setattr(mirrors, "STALE", -1)


def test_a_run_in_a_bucket_leaves_what_a_local_one_does_and_nothing_here(
    dit, recipe, buckets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    local = run(dit, recipe, out=tmp_path / "local", seed=3)
    there = run(dit, recipe, out=URL, seed=3)
    assert os.listdir(tmp_path) == ["local"]
    assert digest(buckets.root / "bucket/runs/one") == digest(tmp_path / "local")
    for a, b in zip(jax.tree.leaves(local.params), jax.tree.leaves(there.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert recipe_of_run(f"{URL}/final") == "w"
    loaded = qjax.load(f"{URL}/final")
    for a, b in zip(jax.tree.leaves(local.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*is gone; going on there:UserWarning")
@pytest.mark.parametrize(
    "stride", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_killed_at_any_change_of_the_bucket_a_run_goes_on_from_an_empty_disk_to_the_same_bits(
    dit, recipe, buckets, tmp_path, dead_are_forgotten, stride
):
    run(dit, recipe, out=tmp_path / "local", seed=3)
    whole = digest(tmp_path / "local")
    for count in range(0, 1000, stride):
        url, folder = f"gs://bucket/run-{count}", buckets.root / f"bucket/run-{count}"
        start = lambda url=url: run(dit, recipe, out=url, seed=3)
        if killed_at(buckets, count, start):
            break
        assert not folder.exists() or LEASE in os.listdir(folder) or count == 0
        start()
        assert digest(folder) == whole, count
    assert count > 20  # lease, claim, parts, logs, two stages and their end


@pytest.mark.filterwarnings("ignore:.*is gone; going on there:UserWarning")
def test_what_was_done_before_is_not_done_again(dit, recipe, buckets, tmp_path, dead_are_forgotten):
    events = []
    start = lambda: run(dit, recipe, out=URL, seed=3, on_event=events.append)
    # Lease, claim, and of two parts a file and the log; the third part is lost.
    assert not killed_at(buckets, 6, start)
    assert [e["part"] for e in events if e["event"] == "wrote"] == ["at-0", "at-1", "at-2"]
    events.clear()
    start()
    assert [e["part"] for e in events if e["event"] == "read"] == ["at-1"]
    assert [e["part"] for e in events if e["event"] == "wrote"] == ["at-2", "at-0", "at-1", "at-2"]
    log = (buckets.root / "bucket/runs/one/stage-0-walk-parts/log.jsonl").read_text()
    assert log.count('"wrote"') == 3 and log.count('"read"') == 1


def test_a_finished_run_is_not_sent_again(dit, recipe, buckets):
    run(dit, recipe, out=URL, seed=3)
    buckets.changes.clear()
    stages = []
    run(dit, recipe, out=URL, seed=3, on_stage=lambda done, total, name: stages.append(name))
    assert stages == ["done"]
    sent = [change for change in buckets.changes if ".safetensors" in change and "put" in change]
    assert sent == [] and f"delete {MANIFEST}" not in buckets.changes


def test_without_resume_every_stage_runs_again_in_a_bucket(dit, recipe, buckets, tmp_path):
    run(dit, recipe, out=tmp_path / "local", seed=3)
    run(dit, recipe, out=URL, seed=3)
    stages = []
    tell = lambda done, total, name: stages.append(name)
    run(dit, recipe, out=URL, seed=3, resume=False, on_stage=tell)
    assert stages == ["Walk", "Walk", "done"]
    assert digest(buckets.root / "bucket/runs/one") == digest(tmp_path / "local")


def test_the_folder_of_another_run_in_a_bucket_is_refused_by_its_place(dit, recipe, buckets):
    run(dit, recipe, out=URL, seed=3)
    before = digest(buckets.root / "bucket/runs/one")
    with pytest.raises(ValueError, match=f"{URL} belongs to another run: seed 3, now 4"):
        run(dit, recipe, out=URL, seed=4)
    assert digest(buckets.root / "bucket/runs/one") == before


def test_a_second_run_in_a_bucket_is_refused_while_the_first_one_works(dit, recipe, buckets):
    with (
        opened(URL) as mirror,
        pytest.raises(BlockingIOError, match=f"{URL} is being written by"),
    ):
        run(dit, recipe, out=URL, seed=3)
    run(dit, recipe, out=mirror.url, seed=3)


def test_what_another_process_wrote_is_brought_when_it_is_read(buckets):
    with opened(URL) as mirror:
        first = Work(mirror.local / "parts", mirror=mirror)
        first.part("a", lambda: {"x": jnp.arange(3)})
        with mirrors.mirrored(URL, holds="run.json", writes=False) as other:
            second = Work(other.local / "parts", mirror=other)
            second.has = lambda name: True  # as the first process says
            found = second.part("a", lambda: pytest.fail("it is there"))
            np.testing.assert_array_equal(found["x"], np.arange(3))


def test_on_a_mesh_a_bucket_must_be_one_that_states_can_be_kept_in(dit, recipe, buckets):
    with pytest.raises(ValueError, match="begin with gs://; got s3://bucket/run"):
        run(dit, recipe, out="s3://bucket/run", pod=Pod.single())


def test_the_command_without_stages_reads_and_writes_buckets_alone(
    dit, run, buckets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    dit.save("gs://bucket/model")
    words = (
        "calibrate",
        "gs://bucket/model",
        "--recipe",
        "w8a8",
        "--json",
        "--out",
        "gs://bucket/run",
    )
    result = run(*words)
    assert result.status == 0, result.err
    assert json.loads(result.out)["out"] == "gs://bucket/run/final"
    assert os.listdir(tmp_path) == []
    assert sorted(os.listdir(buckets.root / "bucket/run")) == ["final", "run.json"]
    (buckets.root / "bucket/run/run.json").unlink()
    result = run(*words)
    assert result.status == 2 and "gs://bucket/run is not empty" in result.err


@pytest.mark.slow
def test_the_command_runs_in_a_bucket_end_to_end(dit, run, buckets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit.save("gs://bucket/model")
    settings = ("--steps", "2", "--items", "4", "--iterations", "3", "--guidance", "2", "--json")
    words = ("calibrate", "gs://bucket/model", "--recipe", "s2p_w4a8", *settings)
    result = run(*words, "--out", "gs://bucket/run")
    assert result.status == 0, result.err
    assert os.listdir(tmp_path) == []
    assert run(*words, "--out", tmp_path / "local").status == 0
    said = json.loads(result.out)
    assert said["out"] == "gs://bucket/run/final" and said["losses"] == "gs://bucket/run/loss.svg"
    there, local = buckets.root / "bucket/run", tmp_path / "local"
    names = lambda folder: {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert names(there) == names(local)
    for name in (f"final/{WEIGHTS}", f"final/{MANIFEST}"):
        assert (there / name).read_bytes() == (local / name).read_bytes()
    again = run(*words, "--seed", "1", "--out", "gs://bucket/run")
    assert (
        again.status == 2 and "gs://bucket/run belongs to another run: seed 0, now 1" in again.err
    )


def test_a_place_that_is_none_is_refused_before_anything_is_computed(
    dit, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for out in (Path(URL), "http://host/run"):
        with pytest.raises(ValueError, match="slashes|must be a local path"):
            run(dit, recipe, out=out, on_stage=pytest.fail)
    assert os.listdir(tmp_path) == []
