"""Calibration by several processes with virtual devices, over loopback; killed and started anew."""

import hashlib
import signal

import pytest

pytestmark = pytest.mark.slow

PARTS = "stage-0-serialparallel-parts"


@pytest.fixture(scope="module")
def begin(pod_jobs):
    """Starts the processes of a job."""

    def begin(out, devices, data, block, processes=1, weights="whole"):
        words = (out, devices, data, block, weights)
        return pod_jobs.begin(said(out), *words, processes=processes)

    return begin


def said(out):
    """Where its processes say what they do."""
    return out.with_name(f"{out.name}.log")


def digest(out):
    files = sorted(path for path in (out / "final").rglob("*") if path.is_file())
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kept(out):
    return any(out.glob(f"{PARTS}/refresh-0-network-state-*"))


@pytest.fixture(scope="module")
def whole(begin, pod_jobs, tmp_path_factory):
    """The result of one process with eight devices."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert pod_jobs.wait(begin(out, 8, 8, 1)) == [0], said(out).read_text()[-4000:]
    return digest(out)


def test_two_processes_end_with_the_bits_of_one_though_one_of_them_is_killed(
    begin, pod_jobs, whole, tmp_path
):
    out = tmp_path / "run"
    jobs = begin(out, 4, 4, 2, processes=2)
    pod_jobs.until(lambda: kept(out), jobs)
    # The first would find out by itself, after the heartbeat's timeout.
    pod_jobs.kill(jobs[1], jobs[0])
    assert not (out / "final").exists()
    # Another number of devices, and of processes.
    assert pod_jobs.wait(begin(out, 2, 2, 1)) == [0], said(out).read_text()[-4000:]
    log = (out / PARTS / "log.jsonl").read_text()
    assert '"read"' in log  # what was done before was not done again
    assert digest(out) == whole


@pytest.mark.parametrize(("devices", "data", "processes"), [(4, 4, 1), (2, 4, 2)])
def test_weights_of_which_every_device_has_a_part_give_the_same_bits(
    begin, pod_jobs, whole, tmp_path, devices, data, processes
):
    out = tmp_path / "run"
    jobs = begin(out, devices, data, 1, processes, weights="sharded")
    assert pod_jobs.wait(jobs) == [0] * processes, said(out).read_text()[-4000:]
    assert digest(out) == whole


def test_told_to_stop_all_processes_keep_what_they_have_and_end(begin, pod_jobs, whole, tmp_path):
    out = tmp_path / "run"
    jobs = begin(out, 2, 4, 1, processes=2)
    pod_jobs.until(
        lambda: (out / PARTS).exists() and any((out / PARTS).glob("*.safetensors")), jobs
    )
    jobs[1].send_signal(signal.SIGTERM)
    assert pod_jobs.wait(jobs) == [143, 143]
    assert not (out / "final").exists()
    assert pod_jobs.wait(begin(out, 4, 2, 2)) == [0], said(out).read_text()[-4000:]
    assert digest(out) == whole
