"""Real clients of Google Cloud Storage, gcsfs and Orbax, with a server on loopback; pods there."""

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gcsfs")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OUT = "gs://bucket/run"
PARTS = "run/stage-0-serialparallel-parts"
FILES = """
import sys
import numpy as np, jax.numpy as jnp
from qjax.core import serialize
from qjax.core.mirror import mirrored
from qjax.core.remote import RemoteFolder, fetch

params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1500, 1500)), jnp.float32)}
for value in (1, 2):
    serialize.save("gs://bucket/model", params, {"value": value})
    found, record = serialize.load("gs://bucket/model")
    assert record == {"value": value}
    np.testing.assert_array_equal(found["kernel"], params["kernel"])
folder = RemoteFolder("gs://bucket/model")
assert sorted(folder.files()) == ["model.safetensors", "qjax.json"], folder.files()
assert folder.write("new", b"1", new=True) and not folder.write("new", b"2", new=True)
assert folder.read("new") == b"1" and folder.read("absent") is None
folder.remove("new"), folder.remove("new")
assert sorted(folder.files()) == ["model.safetensors", "qjax.json"]
assert RemoteFolder("gs://bucket/absent").files() == {}
with mirrored("gs://bucket/job", holds="run.json") as mirror:
    (mirror.local / "run.json").write_text("{}")
    mirror.push()
    try:
        with mirrored("gs://bucket/job", holds="run.json"):
            raise SystemExit("a second job was let in")
    except BlockingIOError as error:
        print("refused:", error)
print("all files agree")
"""


@pytest.fixture
def gcs():
    """The store of a server, and the environment of its clients."""
    with runpy.run_path(str(HERE / "gcs_server.py"))["serve"]() as (store, environment):
        yield store, os.environ | environment | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture
def pod(gcs, dit, tmp_path):
    """The same, with a small model in the bucket, which jobs of `pod_job.py` take."""
    store, environment = gcs
    dit.save(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        store.put("bucket", f"model/{path.name}", path.read_bytes(), None)
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "POD_MODEL": "gs://bucket/model"}
    return store, environment | quick


def begin(tmp_path, environment, out, devices, data, block, processes=1):
    """The processes of a job, each in an empty folder of its own, started."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    jobs = []
    for process in range(processes):
        words = [out, devices, data, block]
        words += [port, processes, process] if processes > 1 else []
        disk = tmp_path / f"disk-{time.monotonic_ns()}"
        disk.mkdir()
        with open(tmp_path / "log", "ab") as log:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "pod_job.py"), *map(str, words)],
                    stdout=log,
                    stderr=log,
                    cwd=disk,
                    env=environment | {"TMPDIR": str(disk)},
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


def final_of(store):
    names = [name for name in store.names("bucket") if name.startswith("run/final/")]
    assert names
    read = lambda name: store.objects["bucket", name][0]
    return {name.rsplit("/", 1)[1]: hashlib.sha256(read(name)).hexdigest() for name in names}


def test_gcsfs_reads_and_writes_what_the_local_disk_does(gcs):
    _, environment = gcs
    done = subprocess.run(
        [sys.executable, "-c", FILES], capture_output=True, text=True, env=environment, check=False
    )
    assert "all files agree" in done.stdout, done.stderr[-3000:]
    assert "refused: [Errno 11] gs://bucket/job is being written by process" in done.stdout


def test_two_processes_in_a_bucket_end_with_the_bits_of_one_on_a_disk_though_killed(pod, tmp_path):
    store, environment = pod
    local = tmp_path / "local"
    log = tmp_path / "log"
    assert wait(begin(tmp_path, environment, local, 8, 8, 1)) == [0], log.read_text()[-4000:]
    whole = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (local / "final").iterdir()
    }
    jobs = begin(tmp_path, environment, OUT, 4, 4, 2, processes=2)
    kept = lambda: any(
        name.startswith(f"{PARTS}/refresh-0-network-state-") and name.endswith("commit_success.txt")
        for name in store.names("bucket")
    )
    until(kept, jobs)
    for job in reversed(jobs):
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not any(name.startswith("run/final/") for name in store.names("bucket"))
    # Another number of devices and processes, another disk; the lease's holder is gone.
    assert wait(begin(tmp_path, environment, OUT, 2, 2, 1)) == [0], log.read_text()[-4000:]
    events = store.objects["bucket", f"{PARTS}/log.jsonl"][0].decode().splitlines()
    assert any(json.loads(line)["event"] == "read" for line in events)
    assert final_of(store) == whole
    left = [name for name in store.names("bucket") if "-state-" in name or "/." in name]
    assert left == []


def test_told_to_stop_all_processes_keep_what_they_have_in_the_bucket(pod, tmp_path):
    store, environment = pod
    jobs = begin(tmp_path, environment, OUT, 2, 4, 1, processes=2)
    until(lambda: any(n.endswith(".safetensors") for n in store.names("bucket")), jobs)
    jobs[1].send_signal(signal.SIGTERM)
    log = tmp_path / "log"
    assert wait(jobs) == [143, 143], log.read_text()[-4000:]
    assert "run/.qjax-lease" not in store.names("bucket")
    # Two processes again, on empty disks: both read what the bucket has.
    assert wait(begin(tmp_path, environment, OUT, 2, 4, 1, 2)) == [0, 0], log.read_text()[-4000:]
    assert final_of(store)
    assert not [name for name in store.names("bucket") if "-state-" in name]
