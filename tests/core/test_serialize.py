"""Saving and loading trees: exact, complete or not at all, and refusing what was changed."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core import manifest, serialize
from qjax.core.config import ActSpec
from qjax.core.linen import box
from qjax.core.manifest import MANIFEST
from qjax.core.qtensor import QTensor, from_codes, is_qtensor
from qjax.core.safetensors_io import open_tensors, write_tensors

RECORD = {"model": "DiT", "sizes": [1, 2.5, None], "nested": {"guided": True}}
REFUSED = (ValueError, FileNotFoundError)


def qtensor(shape, scale_shape, *, bits, zero_point=False, **fields) -> QTensor:
    rng = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    draw = lambda size: jnp.asarray(rng.integers(low, high, size), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 1, scale_shape), jnp.bfloat16)
    zero = draw(scale_shape) if zero_point else None
    pack = jax.jit(functools.partial(from_codes, bits=bits, **fields))
    return pack(draw(shape), scale, zero)


def tree() -> dict:
    """One leaf of every kind there is on disk."""
    grouped = ActSpec(bits=6, mode="static", granularity="per_group", group_size=(4, None))
    return {
        "attn": {"query": {"kernel": qtensor((8, 2, 4), (2, 2, 4), bits=4, axis=-3)}},
        "down": {
            "kernel": qtensor((5, 4), (1, 4), bits=3, zero_point=True),  # 5 is padded
            "bias": jnp.arange(4, dtype=jnp.float32),
        },
        "native": box(qtensor((8, 4), (2, 4), bits=4, layout="native", act=grouped)),
        "up": {
            "kernel": box(qtensor((8, 4), (1, 4), bits=8, layout="native", act=ActSpec())),
            "bias": jnp.ones(4, jnp.bfloat16),
        },
        "half": jnp.asarray(0.5, jnp.float16),
        "count": np.arange(3, dtype=np.int64),
    }


def assert_same(a, b) -> None:
    """Equal structure, classes, static fields, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def params():
    return tree()


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A saved folder, to be read only."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    serialize.save(folder, params, RECORD)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of it, to be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in listing(saved).items():
        (folder / name).write_bytes(data)
    return folder


def edit(folder: Path, change, *, seal: bool = True) -> None:
    """Apply `change` to the manifest; `seal` gives it the hash that belongs to it."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    if seal:
        data["sha256"] = manifest._manifest_digest(data)
    (folder / MANIFEST).write_text(json.dumps(data))


# Round trips.


def test_a_tree_loads_as_it_was_saved(saved, params):
    loaded, record = serialize.load(saved)
    assert_same(loaded, params)
    assert record == RECORD


def test_sub_byte_codes_take_their_bits_on_disk(saved):
    tensors = open_tensors(saved / serialize.WEIGHTS)
    assert tensors["attn/query/kernel#qvalue"].nbytes == 8 * 2 * 4 // 2
    assert tensors["native#qvalue"].nbytes == 8 * 4 // 2
    assert tensors["up/kernel#qvalue"].dtype == np.int8


def test_equal_trees_make_equal_files(saved, params, tmp_path):
    serialize.save(tmp_path / "again", params, dict(reversed(RECORD.items())))
    assert listing(tmp_path / "again") == listing(saved)


def test_a_folder_can_be_read_by_others(saved):
    assert saved.stat().st_mode & 0o777 == 0o755


def test_a_save_replaces_an_older_one_and_leaves_nothing_else(params, tmp_path):
    serialize.save(tmp_path / "model", {"w": jnp.ones(2)}, {})
    serialize.save(tmp_path / "model", {"w": jnp.zeros(3)}, {"n": 1})
    assert_same(serialize.load(tmp_path / "model")[0], {"w": jnp.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        serialize.save(folder, {"w": jnp.ones(2)}, {})
        assert serialize.load(folder)[0]["w"].shape == (2,)


def test_record_keys_that_json_turns_into_text_do_not_break_the_hash(tmp_path):
    serialize.save(tmp_path / "m", {"w": jnp.ones(1)}, {"labels": {2: "b", 10: "k"}})
    assert serialize.load(tmp_path / "m")[1] == {"labels": {"2": "b", "10": "k"}}


def test_the_digest_of_a_tree_is_of_its_paths_and_values(params, saved):
    digest = serialize.params_digest(params)
    assert digest == serialize.params_digest(serialize.load(saved)[0])
    assert digest == serialize.params_digest(dict(reversed(params.items())))
    other = {**params, "half": jnp.asarray(0.25, jnp.float16)}
    renamed = {"name" if key == "half" else key: leaf for key, leaf in params.items()}
    retyped = {**params, "half": jnp.asarray(0.5, jnp.float32)}
    digests = {serialize.params_digest(t) for t in (params, other, renamed, retyped)}
    assert len(digests) == 4


def test_the_digest_can_be_taken_leaf_by_leaf(params):
    by_leaf = {path: serialize.leaf_digest(path, x) for path, x in serialize.flatten(params)}
    assert serialize.digest_of(by_leaf) == serialize.params_digest(params)


# What is not saved, with nothing written.


@pytest.mark.parametrize(
    ("params", "record", "error"),
    [
        ({"a/b": jnp.ones(1)}, {}, "text without '/' and '#'; got 'a/b' in the root"),
        ({"a": {"b#c": jnp.ones(1)}}, {}, "got 'b#c' in a"),
        ({1: jnp.ones(1)}, {}, "got 1 in the root"),
        ({"a": {}}, {}, "must hold leaves; a is empty"),
        ({"a": [jnp.ones(1)]}, {}, "a must be an array or a QTensor; got list"),
        ({"a": jnp.ones(1)}, {"x": jnp.ones(1)}, "record must be JSON"),
        ({"a": jnp.ones(1)}, {"x": float("nan")}, "record must be JSON"),
        ({"a": jnp.ones(1, jnp.int4)}, {}, "pack it into uint8"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, params, record, error):
    with pytest.raises((ValueError, TypeError), match=error):
        serialize.save(tmp_path / "model", params, record)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    before = listing(tmp_path)
    for name in ("home", "file"):
        with pytest.raises(ValueError, match="Save into a new folder"):
            serialize.save(tmp_path / name, {"w": jnp.ones(1)}, {})
    assert listing(tmp_path) == before


@pytest.mark.parametrize("folder", (".", "..", "{cwd}"))
def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch, folder):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ValueError, match="the working folder or holds it. Save into a new folder"):
        serialize.save(folder.format(cwd=tmp_path / "work"), {"w": jnp.ones(2)}, {})
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("call", ["write_tensors", "atomic_write"])
def test_a_save_that_fails_leaves_the_old_one_and_no_litter(copied, monkeypatch, call):
    before = listing(copied.parent)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(serialize, call, fail)
    with pytest.raises(OSError, match="no space left"):
        serialize.save(copied, {"w": jnp.ones(1)}, {})
    assert listing(copied.parent) == before


def test_an_interrupted_replacement_restores_the_old_save(copied, monkeypatch):
    monkeypatch.setattr(serialize, "exchange", lambda a, b: False)  # as on Windows
    before = listing(copied.parent)
    replace, calls = serialize.os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 4:  # two finished files, the old folder aside, then the new one
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(serialize.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serialize.save(copied, {"w": jnp.ones(1)}, {})
    assert listing(copied.parent) == before


# What is not loaded.


def test_a_manifest_of_a_newer_schema_is_refused_with_the_way_out(copied):
    edit(copied, lambda data: data.update(schema_version=2, qjax_version="9.9"))
    with pytest.raises(ValueError, match=r"schema_version 2, .* reads up to 1. Upgrade .*9\.9"):
        serialize.load(copied)


def test_a_wrong_hash_is_named(copied):
    def swap(data):
        data["tensors"]["up/bias"]["sha256"] = "0" * 64

    edit(copied, swap)
    with pytest.raises(ValueError, match=r"the hashes of up/bias differ from qjax.json"):
        serialize.load(copied)


def test_tampered_weights_are_named(copied):
    path = copied / serialize.WEIGHTS
    tensors = {name: tensor.read() for name, tensor in open_tensors(path).items()}
    for name in ("up/bias", "native#scale"):
        tensors[name] = tensors[name] * np.asarray(2, tensors[name].dtype)
    write_tensors(path, tensors, {"format": "qjax"})
    with pytest.raises(ValueError, match="the hashes of native#scale, up/bias differ"):
        serialize.load(copied)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(copied, kept):
    path = copied / serialize.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    before = listing(copied)
    with pytest.raises(ValueError, match=serialize.WEIGHTS):
        serialize.load(copied)
    assert listing(copied) == before


def test_missing_and_extra_arrays_are_named(copied):
    path = copied / serialize.WEIGHTS
    tensors = {name: tensor.read() for name, tensor in open_tensors(path).items()}
    tensors["stray"] = tensors.pop("up/bias")
    write_tensors(path, tensors, {"format": "qjax"})
    with pytest.raises(ValueError, match="missing: up/bias; unexpected: stray"):
        serialize.load(copied)


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no qjax.json"):
        serialize.load(tmp_path / "nowhere")
    (copied / serialize.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=serialize.WEIGHTS):
        serialize.load(copied)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": "gguf"}', "[" * 100_000, '{"format": "qjax"}', "\udcff"],
)
def test_what_is_no_manifest_is_refused(copied, text):
    (copied / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=MANIFEST):
        serialize.load(copied)


def test_a_changed_manifest_is_refused_though_it_makes_sense(copied):
    def narrow(data):
        data["leaves"]["up/kernel"]["act"]["bits"] = 4

    edit(copied, narrow, seal=False)
    with pytest.raises(ValueError, match="its own hash differs. Copy the folder again"):
        serialize.load(copied)


@pytest.mark.parametrize(
    ("path", "changes", "error"),
    [
        ("up/kernel", {"bits": 7}, "bits=7"),
        ("up/kernel", {"bits": [8]}, r"bits=\[8\]"),
        ("up/kernel", {"axis": 1}, "axis=1"),
        ("up/kernel", {"size": 9}, "codes of up/kernel do not fit"),
        ("up/kernel", {"dtype": "int8"}, "dtype='int8'"),
        ("up/kernel", {"act": {"bits": 8, "colour": "red"}}, "act of up/kernel is not understood"),
        ("up/kernel", {"act": {"bits": 8.0}}, "act of up/kernel"),
        ("up/kernel", {"act": {"symmetric": 1}}, "act of up/kernel"),
        ("up/kernel", {"act": [8]}, "act of up/kernel is not understood"),
        ("up/kernel", {"zero_point": True}, "needs an array up/kernel#zero_point"),
        ("down/kernel", {"zero_point": False}, "owns down/kernel#zero_point"),
        ("attn/query/kernel", {"axis": -2}, "codes of attn/query/kernel do not fit"),
        ("native", {"bits": 5}, "codes of native do not fit"),
        ("up/bias", {"extra": 1}, "does not describe the leaf up/bias"),
    ],
)
def test_a_sealed_manifest_is_still_checked_field_by_field(copied, path, changes, error):
    edit(copied, lambda data: data["leaves"][path].update(changes))
    with pytest.raises(ValueError, match=error):
        serialize.load(copied)


@pytest.mark.parametrize("path", ["", "up//bias", "up", "up/bias/deep", "up/bias#scale", "/"])
def test_paths_that_make_no_tree_are_refused(copied, path):
    edit(copied, lambda data: data["leaves"].update({path: data["leaves"].pop("half")}))
    with pytest.raises(ValueError, match=r"leaf|array"):
        serialize.load(copied)


# Property tests of the reader: it refuses, or it loads what was saved; nothing else happens.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-9, 9)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["packed", "native", "qtensor", "array", "float16", "up/bias", "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(node, path=()) -> list[tuple]:
    """The path of every value in a JSON tree, the root left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def mutate(data: st.DataObject, root: dict) -> dict:
    """`root` with one to three keys deleted, renamed, or given another value."""
    root = copy.deepcopy(root)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, key = data.draw(st.sampled_from(places(root)))
        node = root
        for parent in parents:
            node = node[parent]
        action = data.draw(st.sampled_from(["delete", "replace", "rename"]))
        if action == "replace":
            node[key] = data.draw(JSON)
        elif action == "delete" or isinstance(node, list):
            del node[key]
        else:
            node[data.draw(st.text(max_size=8))] = node.pop(key)
        if not places(root):
            break
    return root


def load_with(files: dict[str, bytes], name: str, content: bytes):
    """What loading gives once the file `name` has another content."""
    with tempfile.TemporaryDirectory() as folder:
        for other, data in {**files, name: content}.items():
            (Path(folder) / other).write_bytes(data)
        before = listing(Path(folder))
        try:
            loaded, _ = serialize.load(folder)
        except REFUSED as error:
            assert str(error)
            loaded = None
        assert listing(Path(folder)) == before
        return loaded


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mutation_of_the_manifest_is_refused_or_changes_nothing(saved, params, data):
    files = listing(saved)
    mutated = mutate(data, json.loads(files[MANIFEST]))
    loaded = load_with(files, MANIFEST, json.dumps(mutated).encode())
    if loaded is not None:
        assert_same(loaded, params)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_forged_manifest_is_refused_or_gives_leaves_of_sound_form(saved, data):
    files = listing(saved)
    mutated = mutate(data, json.loads(files[MANIFEST]))
    mutated["sha256"] = manifest._manifest_digest(mutated)
    loaded = load_with(files, MANIFEST, json.dumps(mutated).encode())
    for leaf in jax.tree.leaves(loaded, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            assert jax.eval_shape(QTensor.dequantize, leaf).shape == leaf.shape


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from([MANIFEST, serialize.WEIGHTS]))
def test_any_corruption_of_bytes_is_refused_or_changes_nothing(saved, params, data, name):
    files = listing(saved)
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(len(content) - 1, 0)))
        cut = data.draw(st.sampled_from([0, 1, 1, 8, len(content)]))
        content[start : start + cut] = data.draw(st.binary(max_size=4))
    loaded = load_with(files, name, bytes(content))
    if loaded is not None:
        assert_same(loaded, params)
