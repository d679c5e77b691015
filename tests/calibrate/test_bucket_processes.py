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
# Processes with two devices each keep states, and say what another job finds.
STATES = """
import os, sys
what, port, processes, process = sys.argv[1], *map(int, sys.argv[2:])
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from etils import epath
from qjax.calibrate.pod import BLOCK, Pod, start
from qjax.calibrate.states import States

if processes > 1:
    start(coordinator=f"127.0.0.1:{port}", processes=processes, process=process)
pod = Pod.of(data=1, block=2 * processes)
states = States(epath.Path("gs://bucket/run/parts"), pod)
made = lambda n: pod.put({"a": np.arange(4.0) + n, "b": {"c": np.full((4, 3), n)}}, BLOCK)
if what == "keep":
    assert states.last("fit") is None
    for n in (4, 8, 12):
        states.keep("fit", n, made(n))
    states.keep("other", 4, made(4))
    states.finish()
else:
    assert states.last("fit") == 8, states.last("fit")
    found = pod.get(states.read("fit", 8, made(0)))
    np.testing.assert_array_equal(found["a"], np.arange(4.0) + 8)
    np.testing.assert_array_equal(found["b"]["c"], np.full((4, 3), 8))
    states.keep("fit", 12, made(13))
    states.finish()
    assert states.last("fit") == 12
    assert pod.get(states.read("fit", 12, made(0)))["a"][0] == 13
    states.drop("fit")
    assert states.last("fit") is None and states.last("other") == 4
print("all states agree")
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


@pytest.fixture
def begin(pod_jobs, pod, tmp_path):
    """Starts the processes of a job, each in an empty folder of its own."""
    _, environment = pod

    def disk():
        folder = tmp_path / f"disk-{time.monotonic_ns()}"
        folder.mkdir()
        return folder

    def begin(out, devices, data, block, processes=1):
        words = (out, devices, data, block, "whole")
        return pod_jobs.begin(
            tmp_path / "log", *words, processes=processes, env=environment, disk=disk
        )

    return begin


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


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
def test_states_that_processes_kept_in_a_bucket_others_read_and_what_was_broken_off_is_none(
    gcs, pod_jobs, tmp_path, writers, readers
):
    store, environment = gcs

    def job(what, processes):
        words = [sys.executable, "-c", STATES, what, str(pod_jobs.free_port()), str(processes)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs = [
            subprocess.Popen([*words, str(process)], env=environment, cwd=tmp_path, **streams)
            for process in range(processes)
        ]
        try:
            for one in jobs:
                out, err = one.communicate(timeout=300)
                assert "all states agree" in out, err[-3000:]
        finally:
            for one in jobs:
                one.kill()

    job("keep", writers)
    folder = "run/parts/fit-state-"
    kept = {name.removeprefix(folder).split("/")[0] for name in store.names("bucket")}
    assert {"8", "12"} <= kept and "4" not in kept
    # As if the last one had been broken off before its end.
    del store.objects["bucket", f"{folder}12/commit_success.txt"]
    job("read", readers)
    assert not any(name.startswith(folder) for name in store.names("bucket"))


def test_two_processes_in_a_bucket_end_with_the_bits_of_one_on_a_disk_though_killed(
    begin, pod, pod_jobs, tmp_path
):
    store, _ = pod
    local = tmp_path / "local"
    log = tmp_path / "log"
    assert pod_jobs.wait(begin(local, 8, 8, 1)) == [0], log.read_text()[-4000:]
    whole = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (local / "final").iterdir()
    }
    jobs = begin(OUT, 4, 4, 2, processes=2)
    kept = lambda: any(
        name.startswith(f"{PARTS}/refresh-0-network-state-") and name.endswith("commit_success.txt")
        for name in store.names("bucket")
    )
    pod_jobs.until(kept, jobs)
    pod_jobs.kill(*reversed(jobs))
    assert not any(name.startswith("run/final/") for name in store.names("bucket"))
    # Another number of devices and processes, another disk; the lease's holder is gone.
    assert pod_jobs.wait(begin(OUT, 2, 2, 1)) == [0], log.read_text()[-4000:]
    events = store.objects["bucket", f"{PARTS}/log.jsonl"][0].decode().splitlines()
    assert any(json.loads(line)["event"] == "read" for line in events)
    assert final_of(store) == whole
    left = [name for name in store.names("bucket") if "-state-" in name or "/." in name]
    assert left == []


def test_told_to_stop_all_processes_keep_what_they_have_in_the_bucket(
    begin, pod, pod_jobs, tmp_path
):
    store, _ = pod
    jobs = begin(OUT, 2, 4, 1, processes=2)
    is_part = lambda name: name.startswith(PARTS) and name.endswith(".safetensors")
    pod_jobs.until(lambda: any(map(is_part, store.names("bucket"))), jobs)
    jobs[1].send_signal(signal.SIGTERM)
    log = tmp_path / "log"
    assert pod_jobs.wait(jobs) == [143, 143], log.read_text()[-4000:]
    assert "run/.qjax-lease" not in store.names("bucket")
    # Two processes again, on empty disks: both read what the bucket has.
    assert pod_jobs.wait(begin(OUT, 2, 4, 1, processes=2)) == [0, 0], log.read_text()[-4000:]
    assert final_of(store)
    assert not [name for name in store.names("bucket") if "-state-" in name]
