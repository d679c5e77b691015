"""A few trials of every fault; the whole table is `python benchmarks/faults.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the script forks and mounts")
def test_whatever_goes_wrong_nothing_is_lost_or_half_written(tmp_path):
    out, page = tmp_path / "faults.json", tmp_path / "faults.md"
    words = [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--page", str(page)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 11 and all(case["held"] for case in cases.values())
    assert "Nothing was lost" in page.read_text(encoding="utf-8")
