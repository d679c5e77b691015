"""Strict dtype promotion and one thread of torch for every test, and what several files use."""

import os
import tempfile

# torch reads it when it is imported. Its networks here are tiny: threads that wait for one
# another take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What `qjax tune` found on this machine has no part in tests.
os.environ["QJAX_CACHE"] = os.path.join(tempfile.gettempdir(), "qjax-tests-without-tuning")

import collections
import gc
import sys
from types import SimpleNamespace

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def few_collections():
    """What is imported and compiled by now stays: looking for garbage in it takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def few_programs():
    """A process of tests compiles thousands of programs."""
    yield
    if "qjax.calibrate" in sys.modules:
        from qjax.calibrate.programs import drop_programs

        drop_programs()


def pytest_terminal_summary(terminalreporter):
    """Says what could not be tested on this machine, which a count of skips hides."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)}
    for reason in sorted(reasons):
        if "NOT TESTED" in reason:
            terminalreporter.write_line(reason.removeprefix("Skipped: "))


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of this file are compiled in less than half the time, and run more slowly.

    For files of tiny networks that run a few times each: `usefixtures("quick_compilation")`.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(capsys):
    """Runs a command line; gives exit status, stdout and stderr."""

    from qjax import cli

    def run(*words):
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def products():
    """`products(function, *args)`: the matmuls and convolutions of a program, counted."""

    def products(function, *args):
        """Every dot and convolution of a program, inner ones too: (name, dtypes in and out)."""
        found = collections.Counter()

        def walk(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                    dtypes = (*(v.aval.dtype for v in eqn.invars), eqn.outvars[0].aval.dtype)
                    found[eqn.primitive.name, tuple(map(str, dtypes))] += 1
                for value in jax.tree.leaves(
                    list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
                ):
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        walk(inner)

        walk(jax.make_jaxpr(function)(*args).jaxpr)
        return found

    return products


@pytest.fixture(scope="module")
def standard_promotion():
    """optax adds floats and int32 counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
