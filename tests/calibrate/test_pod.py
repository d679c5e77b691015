"""Meshes, logical shards and their sums; calibration in shards on one device."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from qjax.calibrate.blocks import Block
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.pod import Pod, start
from qjax.calibrate.preemption import Preempted, preemptible, stop_if_asked
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.sharded_calibration import rounds_of
from qjax.calibrate.states import States

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Of eight virtual devices, which a process can have only from its start.
SUMS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from qjax.calibrate.pod import DATA, Pod, each, mean_over_shards

rng = np.random.default_rng(0)
x = rng.normal(size=(8, 5, 7)) * 10.0 ** rng.integers(-6, 6, (8, 1, 1))
x = x.astype(np.float32)
wanted = np.zeros((5, 7), np.float32)
for one in x:
    wanted = wanted + one * one
wanted /= np.float32(8)
for data in (1, 2, 4, 8):
    pod = Pod.of(data=data, devices=jax.devices()[:data])
    for ordered in (True, False):
        def device(counts, x):
            found = each(counts[0], lambda a: a * a, x)
            return mean_over_shards(counts[1], found, ordered=ordered, devices=data)
        run = jax.jit(jax.shard_map(
            device, mesh=pod.mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False))
        found = pod.get(run(pod.put(np.array([8 // data, 8], np.int32)), pod.put(x, DATA)))
        if ordered:
            np.testing.assert_array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
print("all sums agree")
"""


def test_ordered_means_have_the_same_bits_on_1_to_8_devices_and_fast_ones_to_1e_6():
    code = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'\n"
    done = subprocess.run(
        [sys.executable, "-c", code + SUMS], capture_output=True, text=True, check=False
    )
    assert "all sums agree" in done.stdout, done.stderr[-3000:]


def test_a_mesh_has_as_many_places_as_there_are_devices():
    with pytest.raises(ValueError, match=r"mesh.data times mesh.block.*1; got 2 times 1"):
        Pod.of(data=2, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="at least 1"):
        Pod.of(block=0)
    pod = Pod.single()
    assert (pod.data, pod.block, pod.processes, pod.writes) == (1, 1, 1, True)


def test_what_names_the_other_processes_goes_together():
    with pytest.raises(ValueError, match="go together"):
        start(coordinator="127.0.0.1:1234")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": CalibrationSet(items=6)}, r"data.items must be a multiple of the 4 shards"),
        ({"pairs": 6}, r"pairs must be a multiple"),
        ({"fit": FitSettings(batch=2)}, r"fit.batch must be a multiple"),
        ({"shards": None, "at_once": 2}, "at_once needs shards"),
        ({"schedule": "serial", "fits": "network"}, "shards need schedule='refresh'"),
        ({"shards": 0}, "at least 1"),
        ({"reduction": "quick"}, "ordered or fast"),
    ],
)
def test_shards_that_do_not_suit_the_settings_are_refused(changes, words):
    settings = {
        "steps": 2,
        "data": CalibrationSet(items=8),
        "pairs": 16,
        "fit": FitSettings(batch=8),
        "shards": 4,
    }
    with pytest.raises(ValueError, match=words):
        SerialParallel(**settings | changes)


def test_rounds_take_alike_blocks_in_the_order_of_execution():
    blocks = [Block(str(i), None, (), kind) for i, kind in enumerate("abaaba")]
    groups = ((blocks[0], blocks[2], blocks[3], blocks[5]), (blocks[1], blocks[4]))
    everything = lambda _: True
    assert rounds_of(blocks, groups, 3, everything) == [(0, [0, 1, 2]), (1, [0, 1]), (0, [3])]
    assert rounds_of(blocks, groups, 1, everything) == [
        (0, [0]),
        (1, [0]),
        (0, [1]),
        (0, [2]),
        (1, [1]),
        (0, [3]),
    ]
    assert rounds_of(blocks, groups, 2, lambda block: block.structure == "b") == [(1, [0, 1])]


def stage(**changes):
    settings = {
        "steps": 2,
        "data": CalibrationSet(items=4),
        "batch": 4,
        "pairs": 8,
        "ranges": "minmax",
        "fits": "blocks",
        "keep_every": 8,
        "fit": FitSettings(weights="latent", iterations=24, batch=4, chunk=8),
        "shards": 2,
        "at_once": 2,
    }
    return SerialParallel(**settings | changes)


def leaves(pipe):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((pipe.params, pipe.step_table.entries))]


def fitted(dit, quantize, out=None):
    """A run, and what it says of its blocks."""
    found = {}
    recipe = Recipe(quant=quantize(dit, bits=3).quant, stages=(stage(),))
    listen = lambda e: found.update({e["block"]: e}) if e["event"] == "block" else None
    return run(dit, recipe, out=out, seed=1, on_event=listen), found


def test_in_shards_every_block_is_fitted(dit, quantize):
    _, found = fitted(dit, quantize)
    assert set(found) == {"blocks_0", "blocks_1", "final_modulation"}
    assert max(event["ratio"] for event in found.values()) < 0.9


@pytest.mark.slow
def test_in_shards_a_broken_run_goes_on_to_the_same_bits(dit, quantize, tmp_path, monkeypatch):
    whole, _ = fitted(dit, quantize)
    keep, kept = States.keep, []

    def once(self, name, iteration, state):
        keep(self, name, iteration, state)
        self.finish()
        kept.append((name, iteration))
        raise KeyboardInterrupt

    monkeypatch.setattr(States, "keep", once)
    for _ in range(10):
        try:
            again, _ = fitted(dit, quantize, tmp_path / "run")
            break
        except KeyboardInterrupt:
            pass
    # Two rounds of 24 iterations, each broken off after 8 and after 16.
    assert kept == [(f"refresh-0-round-{r}", n) for r in (0, 1) for n in (8, 16)]
    for a, b in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list((tmp_path / "run").glob("*/*-state-*"))


def test_a_process_that_is_told_to_stop_ends_where_it_is_safe():
    import os
    import signal

    with preemptible():
        stop_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="kept") as error:
            stop_if_asked()
    assert error.value.code == 143
    with preemptible():
        stop_if_asked()  # that was another run
