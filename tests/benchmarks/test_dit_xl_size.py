"""DiT-XL/2 at full size: bytes in 4 bits, and the memory that quantizing it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "dit_xl_size.py"

pytestmark = [pytest.mark.slow, pytest.mark.torch_oracle]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the script finds; the plain range, since the searched one gives the same bytes."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("size") / "out.json"
    command = [sys.executable, str(SCRIPT), "--method", "minmax", "--out", str(out)]
    subprocess.run(command, check=True)
    (row,) = json.loads(out.read_text())["rows"]
    return row


def test_it_takes_at_most_355_megabytes_stored_live_and_on_disk(measured):
    assert measured["blocks"] == 28
    assert measured["quantized_bytes"] <= 355e6
    assert measured["live_device_bytes"] <= 355e6
    assert measured["saved_bytes"] <= 355e6


def test_the_plan_of_its_shapes_knew_the_bytes(measured):
    assert measured["planned_bytes"] == measured["quantized_bytes"]


def test_quantizing_while_loading_takes_less_than_the_float_weights_and_a_gibibyte(measured):
    assert measured["peak_bytes"] <= measured["float16_bytes"] + 2**30
