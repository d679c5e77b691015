"""A local folder that stands for one in a bucket, and who may write there."""

import json
import os
import socket
import time

import pytest

from qjax.core import mirror as mirrors
from qjax.core.manifest import MANIFEST, WEIGHTS
from qjax.core.mirror import LEASE, mirrored

URL = "gs://bucket/run"
CLAIM = "run.json"


@pytest.fixture
def there(buckets):
    """The folder in the bucket, with what a run has left."""
    folder = buckets.root / "bucket/run"
    (folder / "parts/fit-state-3").mkdir(parents=True)
    for name in (CLAIM, "parts/a.safetensors", "parts/log.jsonl", "parts/fit-state-3/d"):
        (folder / name).write_text(name)
    return folder


def write(folder, name, text="text"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def lease(there, **changes):
    said = {"pid": 1, "host": "elsewhere", "token": "t", "time": time.time()} | changes
    (there / LEASE).write_text(json.dumps(said))


def test_it_brings_what_is_asked_for(there):
    with mirrored(URL, holds=CLAIM) as mirror:
        here = mirror.local
        names = lambda: {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
        assert names() == {CLAIM}
        mirror.get(here / "parts" / "absent.safetensors")
        mirror.get(here / "parts")
        assert names() == {CLAIM, "parts/a.safetensors", "parts/log.jsonl"}
        write(here, "parts/log.jsonl", "longer")
        mirror.get(here / "parts")
        assert (here / "parts/log.jsonl").read_text() == "longer"
        assert mirror.url_of(here) == URL and mirror.url_of(here / "parts") == f"{URL}/parts"
    assert not here.exists()


def test_a_save_is_brought_whole_or_not_at_all(there):
    for name in (f"one/{WEIGHTS}", f"one/{MANIFEST}", "one/tokenizer/vocab.json", f"two/{WEIGHTS}"):
        write(there, name)
    with mirrored(URL, holds=CLAIM) as mirror:
        mirror.get_save(mirror.local / "one")
        mirror.get_save(mirror.local / "two")
        assert (mirror.local / "one/tokenizer/vocab.json").exists()
        assert not (mirror.local / "two").exists()


def test_it_puts_what_is_new_or_other_and_deletes_what_was_dropped(buckets, there):
    write(there, "left/by/somebody")
    with mirrored(URL, holds=CLAIM) as mirror:
        here = mirror.local
        mirror.get(here / "parts")
        buckets.changes.clear()
        mirror.push()
        assert buckets.changes == []
        write(here, "parts/log.jsonl", "longer")
        write(here, "parts/b.safetensors")
        write(here, f"stage/{MANIFEST}")
        write(here, f"stage/{WEIGHTS}")
        write(here, "parts/.b.safetensors.tmp")
        (here / "parts/a.safetensors").unlink()
        mirror.push()
        assert buckets.changes == [
            "put b.safetensors",
            "put log.jsonl",
            f"put {WEIGHTS}",
            f"put {MANIFEST}",
            "delete a.safetensors",
        ]
    names = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
    assert names == {
        *(CLAIM, "left/by/somebody", "parts/b.safetensors", "parts/log.jsonl"),
        *(f"stage/{MANIFEST}", f"stage/{WEIGHTS}", "parts/fit-state-3/d"),
    }


def test_one_that_does_not_write_changes_nothing(buckets, there):
    buckets.dies_at = 0
    lease(there)
    met = []
    with mirrored(URL, holds=CLAIM, writes=False, wait=met.append) as mirror:
        write(mirror.local, "more")
        mirror.push()
    assert met == ["lease"]


def test_a_folder_of_something_else_is_refused_and_left_alone(buckets):
    write(buckets.root, "bucket/photos/a.jpg")
    with (
        pytest.raises(
            ValueError, match="gs://bucket/photos is not empty, and there is no run.json"
        ),
        mirrored("gs://bucket/photos", holds=CLAIM),
    ):
        pass
    assert buckets.changes == []


def test_a_second_job_is_refused_and_the_first_named(there):
    with mirrored(URL, holds=CLAIM):
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with (
            pytest.raises(BlockingIOError, match=f"{URL} is being written by {who}. Wait"),
            mirrored(URL, holds=CLAIM),
        ):
            pass
        assert (there / LEASE).exists()
    assert not (there / LEASE).exists()
    with mirrored(URL, holds=CLAIM):
        pass


@pytest.mark.parametrize("age", [0, 100])
def test_a_lease_of_another_machine_counts_while_it_is_fresh(there, age):
    lease(there, time=time.time() - age)
    with pytest.raises(BlockingIOError, match="process 1 on elsewhere"), mirrored(URL, holds=CLAIM):
        pass
    assert json.loads((there / LEASE).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(
    "changes", [{"time": 0}, {"time": None}, {"host": socket.gethostname(), "pid": 2**22 + 1}]
)
def test_the_lease_of_one_that_is_gone_is_taken_over_with_a_word(there, changes):
    lease(there, **changes)
    with pytest.warns(UserWarning, match="is gone; going on there"), mirrored(URL, holds=CLAIM):
        assert json.loads((there / LEASE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"time": "now"}', '{"time": 1e999}'])
def test_a_spoilt_lease_is_no_lease_or_held(there, text):
    (there / LEASE).write_text(text)
    if text == '{"time": 1e999}':  # written by a clock that is ahead: held
        with pytest.raises(BlockingIOError), mirrored(URL, holds=CLAIM):
            pass
    elif text:
        with pytest.warns(UserWarning, match="is gone"), mirrored(URL, holds=CLAIM):
            pass
    else:
        with mirrored(URL, holds=CLAIM):
            pass


def test_who_has_lost_the_lease_stops_at_the_next_push(buckets, there):
    with mirrored(URL, holds=CLAIM) as mirror:
        lease(there)
        write(mirror.local, "more")
        with pytest.raises(BlockingIOError, match="process 1 on elsewhere"):
            mirror.push()
        assert not (there / "more").exists()
    assert json.loads((there / LEASE).read_text())["host"] == "elsewhere"  # not ours to remove


def test_a_lease_is_renewed_while_its_holder_lives(there, monkeypatch):
    monkeypatch.setattr(mirrors, "BEAT", 0.01)
    with mirrored(URL, holds=CLAIM):
        first = (there / LEASE).read_text()
        end = time.monotonic() + 10
        while (there / LEASE).read_text() in (first, ""):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_lease_that_somebody_deleted_is_written_again(there):
    with mirrored(URL, holds=CLAIM) as mirror:
        (there / LEASE).unlink()
        mirror.push()
        assert (there / LEASE).exists()
