"""Blocks of the published sizes reconstruct at W4A8 within 8 GiB, everything included."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["sd1.4 resnet", "sdxl transformer", "dit-xl/2"])
def test_a_full_size_block_fits_for_20_iterations_within_8_gibibytes(name):
    import full_size_blocks

    found = full_size_blocks.measure_alone(name)
    assert found["iterations"] == 20
    assert np.isfinite(found["last_error"]) and found["last_error"] < found["first_error"]
    assert found["peak_bytes"] <= 8 * 2**30
