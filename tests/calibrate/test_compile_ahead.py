"""Programs of a calibration compiled for slices that are not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from qjax.calibrate.blocks import Block
from qjax.calibrate.compile_ahead import (
    AheadOfTime,
    _collectives,
    _compiled,
    mesh_for,
    topology_devices,
)
from qjax.topology_plan import summary

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler of TPUs, is not installed",
)


def plan(model, topology, *words):
    command = [sys.executable, "-m", "qjax", "plan", model, "--recipe", "s2p_w4a8", "--json"]
    done = subprocess.run(
        [*command, "--topology", topology, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["topology"]


@pytest.mark.parametrize(
    ("count", "data", "block", "found"),
    [
        (256, None, None, (8, 32)),
        (4, None, None, (4, 1)),
        (12, None, None, (4, 3)),
        (64, None, 16, (4, 16)),
        (64, 2, None, (2, 32)),
    ],
)
def test_devices_lie_along_data_as_far_as_shards_go(count, data, block, found):
    assert mesh_for(count, 8, data, block) == found


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:4", "v5e:axb", ""])
def test_a_topology_is_a_chip_and_a_shape(name):
    with pytest.raises(ValueError, match="as v5e:16x16"):
        topology_devices(name)


def test_collectives_are_counted_with_what_they_send():
    text = """
  %a = f32[8,16]{1,0} all-to-all(f32[8,16]{1,0} %p), channel_id=1
  %b = (bf16[4]{0}, s32[2,2]{1,0}) all-reduce-start(%q, %r), to_apply=%add
  %c = f32[] add(%x, %y)
"""
    assert list(_collectives(text)) == [("all-to-all", 512), ("all-reduce", 8 + 16)]


class Refused:
    """A program that no chip can hold."""

    def compile(self, **_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (65.12G) exceeds available HBM (15.75G)."
        )


def test_a_program_that_no_chip_can_hold_does_not_fit():
    program = _compiled("collect inputs", (Block("a", None, (), "a"),), Refused())
    assert program.hbm_bytes == int(65.12 * 2**30)
    found = AheadOfTime("v5e:2x2", 4, 1, (program,), "whole", 2.0, 1)
    assert found.rolled_out == program.hbm_bytes + 1
    assert not found.fits
    assert "does NOT fit; mesh.weights=sharded" in summary(found)[-1]
    in_parts = dataclasses.replace(found, weights="sharded")
    assert "mesh.weights" not in summary(in_parts)[-1]
    assert "a smaller --batch" in summary(in_parts)[-1]


@libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x4"])
def test_a_shipped_model_is_compiled_for_a_slice(topology):
    found = plan("fashion-dit", topology)
    collects, fits, samples = (
        [p for p in found["programs"] if p["what"].startswith(what)]
        for what in ("collect", "fit", "sample")
    )
    assert [p["collectives"] for p in collects] == [{}, {}]  # every device runs its own items
    # Alike blocks run one program.
    assert len(fits) == len(samples) < sum(p["blocks"] for p in fits)
    assert found["mesh"]["data"] * found["mesh"]["block"] == {"v5e:2x2": 4, "v6e:2x4": 8}[topology]
    for program in fits:
        assert program["collectives"]["all-to-all"] >= 1  # shards' gradients change hands
        assert program["temp_bytes"] > 0
    assert found["fits"]
    assert found["fit_bytes"] < 2**30


@libtpu
@pytest.mark.slow
def test_in_parts_the_networks_leave_room_where_data_is_collected():
    whole, parts = (
        plan("dit-xl-2-256", "v5e:4x4", *words) for words in ([], ["mesh.weights=sharded"])
    )
    collects = [p for p in parts["programs"] if p["what"].startswith("collect")]
    assert sum(p["collectives"]["all-gather"] for p in collects) > 100  # of layer after layer
    float_bytes, student_bytes = 1.35e9, 0.36e9
    # Each of the two programs has one network among its arguments.
    arguments = lambda found: sum(
        p["argument_bytes"] for p in found["programs"] if p["what"].startswith("collect")
    )
    saved = arguments(whole) - arguments(parts)
    assert saved > 0.8 * (float_bytes + student_bytes) * 15 / 16
    assert parts["collect_bytes"] < whole["collect_bytes"] - 0.8 * float_bytes * 15 / 16


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit-xl-2-256", "sd-v1-4", "sdxl-1.0"])
def test_a_full_size_model_fits_a_slice(model):
    words = ["--batch", "8"] if model == "sdxl-1.0" else []
    found = plan(model, "v5e:16x16", *words)
    assert found["mesh"] == {"data": 8, "block": 32}
    assert found["fits"]
    held = ("roll_out_bytes", "collect_bytes", "fit_bytes", "sample_bytes")
    assert max(found[name] for name in held) < 16e9
