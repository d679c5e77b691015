"""Broken files are refused or read, by every reader; the long run is scripts/fuzz_readers.py."""

import runpy
from pathlib import Path

import pytest

from qjax.core.config import QuantConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_readers.py"


def test_readers_refuse_broken_files_and_nothing_worse(tmp_path):
    table = runpy.run_path(str(SCRIPT))["fuzz"](300, seed=1, failures=tmp_path / "failures")
    assert len(table) == 9 and sum(sum(counts.values()) for counts in table.values()) == 300
    failed = [path.read_text() for path in (tmp_path / "failures").glob("*.txt")]
    assert not failed, "\n".join(failed)
    for name, counts in table.items():
        assert counts["refused"] > 0, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight: {bits: 4", "is not YAML"),
        ("a: &a [1]\nb: *a", "has references"),
        ("1: 2", "has no field 1"),
        ("[]", "must hold a mapping"),
        ('weight: {bits: !!int ""}', "is not YAML"),
        ("a: 2020-99-99", "config.yaml is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_a_config_file_that_is_none_is_a_value_error(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_yaml(path)
