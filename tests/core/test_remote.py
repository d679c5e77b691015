"""Places in a bucket: which are, what is copied from them, and what a save leaves at every moment."""

import os
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest
from etils import epath

from qjax.core import remote, serialize
from qjax.core.manifest import MANIFEST, WEIGHTS
from qjax.core.places import is_remote, local_path
from qjax.core.remote import UNFINISHED, RemoteFolder, fetch, sending

URL = "gs://bucket/models/one"


def params(value, size=3):
    return {"layer": {"kernel": jnp.full((size, 2), value, jnp.float32)}}


def value_of(url):
    tree, record = serialize.load(url)
    assert record == {"value": float(tree["layer"]["kernel"][0, 0])}
    return record["value"]


def save(url, value, **settings):
    serialize.save(url, params(value, **settings), {"value": float(value)})


@pytest.mark.parametrize("place", [URL, "s3://bucket/one", "az://box/one", epath.Path(URL)])
def test_a_place_in_a_bucket_is_remote_and_no_local_path(place):
    assert is_remote(place)
    with pytest.raises(ValueError, match=r"must be a path of this machine.*Copy it here"):
        local_path(place)


@pytest.mark.parametrize(
    "place", ["run", "./gs:", "/tmp/a:b/c", "C:/run", "owner/name:FILE", "a.b"]
)
def test_a_path_of_this_machine_is_taken_as_it_is(place):
    assert not is_remote(place) and local_path(place) == Path(place)


@pytest.mark.parametrize(
    "place", ["http://host/one", "hf://owner/name", "file:///one", "gcs://b/c"]
)
def test_another_scheme_is_refused_by_name(place):
    with pytest.raises(ValueError, match=f"gs://.*got {place.partition(':')[0]}://"):
        is_remote(place)


def test_a_place_that_pathlib_has_spoilt_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Give a text, 'gs://bucket/models/one', or an etils"):
        is_remote(Path(URL))


@pytest.mark.parametrize("url", ["gs://", "gs:///", "gs://bucket/../other", "gs://bucket//one"])
def test_a_place_without_bucket_or_with_dots_is_refused(buckets, url):
    with pytest.raises(ValueError, match="must be gs://BUCKET/FOLDER"):
        RemoteFolder(url)


def test_what_is_saved_into_a_bucket_comes_back_bit_for_bit(buckets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(URL, 3)
    save(tmp_path / "here", 3)
    for name in (MANIFEST, WEIGHTS):
        there = buckets.root / "bucket/models/one" / name
        assert there.read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert value_of(URL) == value_of(epath.Path(URL)) == 3
    assert os.listdir(tmp_path) == ["here"]


def test_a_newer_save_is_seen_at_once(buckets):
    for value in (1, 2, 3):
        save(URL, value)
        assert value_of(URL) == value


def test_a_save_replaces_an_older_one_and_nothing_else(buckets):
    folder = buckets.root / "bucket/models/one"
    save(URL, 1)
    (folder / "more").mkdir()
    (folder / "more/old.txt").write_text("of the older save")
    save(URL, 2)
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [WEIGHTS, MANIFEST]
    (buckets.root / "bucket/notes").mkdir()
    (buckets.root / "bucket/notes/a.txt").write_text("mine")
    for url in ("gs://bucket/notes", "gs://bucket"):
        before = list(buckets.changes)
        with pytest.raises(ValueError, match=f"{url} holds something else than a save"):
            save(url, 1)
        assert buckets.changes == before


def test_broken_off_anywhere_a_save_is_the_old_one_or_none_and_the_next_one_is_taken(buckets):
    save(URL, 1)
    begin = len(buckets.changes)
    save(URL, 2)
    steps = len(buckets.changes) - begin
    assert steps == 5  # marker, older manifest, weights, manifest, marker
    found = []
    for step in range(steps):
        save(URL, 1)
        buckets.dies_at = len(buckets.changes) + step
        with pytest.raises(buckets.Killed):
            save(URL, 2)
        buckets.dies_at = None
        try:
            found.append(value_of(URL))
        except FileNotFoundError as error:
            assert f"no {MANIFEST}" in str(error)
            found.append(None)
        save(URL, 2)
        assert value_of(URL) == 2
    assert found == [1, 1, None, None, 2]


def test_the_same_weights_are_not_sent_twice(buckets):
    save(URL, 1)
    buckets.changes.clear()
    save(URL, 1)
    assert f"put {WEIGHTS}" not in buckets.changes and f"delete {MANIFEST}" not in buckets.changes


def test_a_save_that_fails_here_leaves_the_bucket_as_it_was(buckets):
    with pytest.raises(ValueError, match="must be JSON"):
        serialize.save(URL, params(1), {"value": object()})
    assert buckets.changes == []


def test_only_what_is_asked_for_is_copied_and_only_once(buckets):
    folder = buckets.root / "bucket/models/one"
    (folder / "unet").mkdir(parents=True)
    for name in (
        "model_index.json",
        "unet/config.json",
        "unet/weights.safetensors",
        ".hidden.json",
    ):
        (folder / name).write_text("{}")
    configs = fetch(URL, ["*.json"])
    names = lambda: {str(p.relative_to(configs)) for p in configs.rglob("*") if p.is_file()}
    assert configs.name == "one" and names() == {"model_index.json", "unet/config.json"}
    (configs / "unet/config.json").write_text("kept")
    assert fetch(URL, ["*.json", "*.safetensors"]) == configs
    assert "unet/weights.safetensors" in names()
    assert (configs / "unet/config.json").read_text() == "kept"


def test_a_copy_that_comes_short_is_no_copy(buckets, monkeypatch):
    save(URL, 1)
    folder = RemoteFolder(URL)
    cut = lambda self, path, to, **_: Path(to).write_bytes(b"{")
    monkeypatch.setattr(type(folder._fs), "get_file", cut)
    with pytest.raises(OSError, match=r"qjax.json has \d+ bytes; 1 came"):
        fetch(URL, [MANIFEST])
    monkeypatch.undo()


def test_an_absent_place_is_named(buckets):
    with pytest.raises(FileNotFoundError, match="nothing at gs://bucket/models/two"):
        fetch("gs://bucket/models/two", ["*"])


@pytest.mark.parametrize("name", ["../out", "a/../../out", "a/..", "C:out", "a\\out", "a//out"])
def test_names_that_lead_out_of_the_folder_are_refused(buckets, monkeypatch, name):
    folder = RemoteFolder(URL)
    found = {f"bucket/models/one/{name}": {"size": 1}}
    monkeypatch.setattr(type(folder._fs), "find", lambda self, path, **_: found)
    with pytest.raises(ValueError, match="not safe to copy"):
        fetch(URL, ["*"])


def test_without_the_client_of_a_bucket_the_error_says_what_to_install(monkeypatch):
    def missing(scheme, **_):
        raise ImportError(f"no client of {scheme}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(OSError, match=r'no client of gs. `pip install "qjax-diffusion\[gcs\]"`'):
        RemoteFolder(URL)


def test_errors_of_a_client_name_the_place(buckets, monkeypatch):
    class Forbidden(Exception):
        pass

    def refuse(self, path, **_):
        raise Forbidden("403")

    folder = RemoteFolder(URL)
    monkeypatch.setattr(type(folder._fs), "find", refuse)
    with pytest.raises(OSError, match=f"{URL}: Forbidden: 403. See that the bucket exists"):
        folder.files()


def test_a_block_that_fails_sends_nothing(buckets):
    with pytest.raises(ZeroDivisionError), sending(URL) as folder:
        folder.mkdir()
        (folder / "a.txt").write_text("a")
        raise ZeroDivisionError
    assert buckets.changes == []


def test_a_broken_off_save_says_that_it_is_one(buckets):
    assert not remote.may_replace({"a"})
    assert remote.may_replace({"a", UNFINISHED}) and remote.may_replace({MANIFEST})
