"""Strict dtype promotion and one thread of torch for every test, quick compilation, a key."""

import os

# torch reads it when it is imported. Its networks here are tiny: threads that wait for one
# another take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc

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
