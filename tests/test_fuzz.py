"""Broken files are refused or read, by every reader; the long run is scripts/fuzz_readers.py."""

import resource
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from qjax.core.config import QuantConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_readers.py"


@pytest.fixture(scope="module")
def fuzzer():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="fuzz_readers"))


def test_readers_refuse_broken_files_and_nothing_worse(fuzzer, tmp_path):
    table = fuzzer.fuzz(500, seed=1, failures=tmp_path / "failures")
    assert sum(sum(counts.values()) for counts in table.values()) == 500
    failed = [path.read_text() for path in (tmp_path / "failures").glob("*.txt")]
    assert not failed, "\n".join(failed)
    assert len(table) >= 20 and sum(counts["refused"] for counts in table.values()) > 250


@pytest.mark.parametrize("kind", ["a KeyError", "an empty message", "a hang", "all memory"])
def test_a_reader_that_does_worse_is_found_and_limits_are_as_before(
    kind, fuzzer, tmp_path, monkeypatch
):
    def read(data):
        if kind == "a KeyError":
            return {}[data]
        if kind == "an empty message":
            raise ValueError
        if kind == "all memory":
            return bytearray(4 * fuzzer.ROOM)
        while True:
            pass

    monkeypatch.setitem(fuzzer._execute.__globals__, "SECONDS", 0.2)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    target = fuzzer.Target("worse", [b"{}"], read, 1000)
    found = dict(fuzzer.rounds([target], 2, 0, tmp_path))
    assert found == {2: {"worse": {"FAILED": 2}}}
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before


def test_limits_are_as_before_when_fuzzing_is_interrupted(fuzzer, tmp_path):
    def read(data):
        raise KeyboardInterrupt

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    with pytest.raises(KeyboardInterrupt):
        list(fuzzer.rounds([fuzzer.Target("one", [b"{}"], read, 1000)], 2, 0, tmp_path))
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before


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
