"""Calibration by several processes with virtual devices, over loopback; killed and started anew."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

JOB = Path(__file__).with_name("pod_job.py")
PARTS = "stage-0-serialparallel-parts"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def begin(out, devices, data, block, processes=1, weights="whole"):
    """The processes of a job, started."""
    port = free_port()
    jobs = []
    for process in range(processes):
        words = [out, devices, data, block, weights]
        words += [port, processes, process] if processes > 1 else []
        with open(f"{out}.log.{process}", "ab") as log:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, str(JOB), *map(str, words)],
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                )
            )
    return jobs


def wait(jobs, seconds=900):
    end = time.monotonic() + seconds
    try:
        return [job.wait(max(end - time.monotonic(), 1)) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()


def until(there, jobs, seconds=600):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "the job did not come so far"
        assert all(job.poll() is None for job in jobs), "the job ended before"
        time.sleep(0.05)


def digest(out):
    files = sorted(path for path in (out / "final").rglob("*") if path.is_file())
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kept(out):
    return any(out.glob(f"{PARTS}/refresh-0-network-state-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of one process with eight devices."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert wait(begin(out, 8, 8, 1)) == [0], Path(f"{out}.log.0").read_text()[-4000:]
    return digest(out)


def test_two_processes_end_with_the_bits_of_one_though_one_of_them_is_killed(whole, tmp_path):
    out = tmp_path / "run"
    jobs = begin(out, 4, 4, 2, processes=2)
    until(lambda: kept(out), jobs)
    jobs[1].send_signal(signal.SIGKILL)
    jobs[1].wait()
    jobs[0].kill()  # it would find out by itself, after the heartbeat's timeout
    jobs[0].wait()
    assert not (out / "final").exists()
    # Another number of devices, and of processes.
    assert wait(begin(out, 2, 2, 1)) == [0], Path(f"{out}.log.0").read_text()[-4000:]
    log = (out / PARTS / "log.jsonl").read_text()
    assert '"read"' in log  # what was done before was not done again
    assert digest(out) == whole


@pytest.mark.parametrize(("devices", "data", "processes"), [(4, 4, 1), (2, 4, 2)])
def test_weights_of_which_every_device_has_a_part_give_the_same_bits(
    whole, tmp_path, devices, data, processes
):
    out = tmp_path / "run"
    jobs = begin(out, devices, data, 1, processes, weights="sharded")
    assert wait(jobs) == [0] * processes, Path(f"{out}.log.0").read_text()[-4000:]
    assert digest(out) == whole


def test_told_to_stop_all_processes_keep_what_they_have_and_end(whole, tmp_path):
    out = tmp_path / "run"
    jobs = begin(out, 2, 4, 1, processes=2)
    until(lambda: (out / PARTS).exists() and any((out / PARTS).glob("*.safetensors")), jobs)
    jobs[1].send_signal(signal.SIGTERM)
    assert wait(jobs) == [143, 143]
    assert not (out / "final").exists()
    assert wait(begin(out, 4, 2, 2)) == [0], Path(f"{out}.log.0").read_text()[-4000:]
    assert digest(out) == whole
