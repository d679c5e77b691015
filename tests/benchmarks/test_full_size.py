"""DiT-XL/2 and SDXL at full size: bytes in 4 bits, and the memory that quantizing takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"

pytestmark = [pytest.mark.slow, pytest.mark.torch_oracle]


def run(model, folder):
    """What the script finds; the plain range, since the searched one gives the same bytes."""
    pytest.importorskip("torch")
    out = folder / "out.json"
    command = [sys.executable, str(SCRIPT), model, "--method", "minmax", "--out", str(out)]
    subprocess.run(command, check=True)
    (row,) = json.loads(out.read_text())["rows"]
    return row


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run("dit_xl_2", tmp_path_factory.mktemp("size"))


def test_it_takes_at_most_355_megabytes_stored_live_and_on_disk(measured):
    assert measured["layers"] is None
    assert measured["quantized_bytes"] <= 355e6
    assert measured["live_device_bytes"] <= 355e6
    assert measured["saved_bytes"] <= 355e6


def test_the_plan_of_its_shapes_knew_the_bytes(measured):
    assert measured["planned_bytes"] == measured["quantized_bytes"]


def test_quantizing_while_loading_takes_less_than_the_float_weights_and_a_gibibyte(measured):
    assert measured["peak_bytes"] <= measured["float16_bytes"] + 2**30


def test_sdxl_is_converted_and_quantized_within_its_16_bit_size_and_two_gibibytes(tmp_path):
    measured = run("sdxl", tmp_path)
    assert measured["peak_bytes"] <= measured["float16_bytes"] + 2 * 2**30
    assert measured["planned_bytes"] == measured["quantized_bytes"]
    assert measured["quantized_bytes"] <= 0.29 * measured["float16_bytes"]
