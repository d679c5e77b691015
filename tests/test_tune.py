"""The fastest candidate is found, and only where it clearly is."""

import json

import jax.numpy as jnp
import pytest

import qjax
from qjax import bench, tune
from qjax.kernels import tuning
from qjax.kernels.packing import Format
from qjax.kernels.problem import Problem
from qjax.kernels.tuning import Choice

PROBLEM = Problem(8, 64, 128, 1, Format(4, 64, packed=True), jnp.int8)


@pytest.fixture
def pretended(monkeypatch):
    """Times that a test gives by candidate; every candidate still runs once."""

    def pretend(seconds, again=None):
        times = iter([seconds, again])

        def interleaved(calls, **_):
            given = next(times)
            for call in calls.values():
                call()
            return {name: given.get(name, 1.0) for name in calls}

        monkeypatch.setattr(tune, "interleaved", interleaved)

    return pretend


def test_the_fastest_is_chosen_if_it_is_so_twice(pretended):
    pretended({str(Choice("xla", (64,))): 0.5}, {"rule": 1.0, "best": 0.6})
    (found,) = tune.tune([PROBLEM])
    assert found.choice == Choice("xla", (64,))
    assert (found.seconds, found.seconds_rule) == (0.6, 1.0)
    assert found.tried == len(tuning.candidates(PROBLEM)) and not found.failed


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_what_runs_is_the_matmul_that_was_asked_for(dtype):
    """With its zero points and the dtype of its result, in the programs that are timed."""
    one = PROBLEM._replace(dtype=dtype, out=jnp.bfloat16, x_zero=dtype == jnp.int8, w_zero=True)
    with tuning.recording() as found:
        result = tune._program(one, {})(*tune._operands(one))
    assert found == [one]
    assert result.shape == (8, 128) and result.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("first", "again"), [({}, None), ({str(Choice("xla", (64,))): 0.5}, {"best": 0.99})]
)
def test_what_is_not_clearly_faster_is_left_to_the_rule(pretended, first, again):
    pretended(first, again)
    (found,) = tune.tune([PROBLEM])
    assert found.choice == Choice("xla")
    assert found.seconds == found.seconds_rule


def test_a_candidate_that_does_not_compile_is_reported(pretended, monkeypatch):
    pretended({})
    bad = Choice("xla", ("no number",))
    monkeypatch.setattr(tuning, "candidates", lambda _: [Choice("xla"), bad])
    (found,) = tune.tune([PROBLEM])
    ((choice, why),) = found.failed
    assert choice == Choice("xla", ("no number",)) and why


def test_a_failure_without_words_is_reported_by_its_kind(pretended, monkeypatch):
    pretended({})
    program = tune._program

    def failing(problem, choices):
        def fail(*args):
            raise AssertionError

        return fail if choices else program(problem, choices)

    monkeypatch.setattr(tune, "_program", failing)
    (found,) = tune.tune([PROBLEM])
    assert found.choice == Choice("xla") and found.tried == 0
    assert {why for _, why in found.failed} == {"AssertionError"}


def test_a_candidate_with_another_result_is_refused(pretended, monkeypatch):
    pretended({})
    program = tune._program

    def wrong(problem, choices):
        run = program(problem, choices)
        return (lambda *args: run(*args) + 1) if choices else run

    monkeypatch.setattr(tune, "_program", wrong)
    (found,) = tune.tune([PROBLEM])
    assert found.choice == Choice("xla") and found.tried == 0
    assert len(found.failed) == len(tuning.candidates(PROBLEM))
    assert {why for _, why in found.failed} == {"its result is WRONG; please report it"}


@pytest.mark.slow
def test_the_command_keeps_what_it_finds_and_later_programs_use_it(run, monkeypatch, tmp_path):
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "PIECES", (64,))  # few candidates, for few programs to compile
    command = ["tune", "fashion-dit", "--recipe", "w4a8", "--batch", "1", "--rounds", "1", "--json"]
    data = json.loads(run(*command).out)
    kept = json.loads((tmp_path / "tuning.json").read_text())
    assert list(kept) == [data["machine"]]
    assert set(kept[data["machine"]]) == {one["problem"] for one in data["matmuls"]}
    # 6 different layers, of one picture and, guided, of two.
    assert len(data["matmuls"]) == 12
    for one in bench.matmuls(qjax.quantize(qjax.load("fashion-dit"), qjax.recipes.w4a8()), 1):
        (found,) = (m for m in data["matmuls"] if m["problem"] == one.name())
        blocks = found["blocks"] and tuple(found["blocks"])
        assert tuning.choice(one) == Choice(found["implementation"], blocks)
    assert all(one["tried"] > 1 and one["seconds"] > 0 for one in data["matmuls"])
