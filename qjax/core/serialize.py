"""A quantized params tree on disk: one safetensors file and one JSON manifest.

safetensors holds arrays and nothing else, and no integers below 8 bits; so sub-byte codes are
stored packed, as U8, and `qjax.json` says what the arrays mean: for every leaf its static
fields, for every array its SHA-256. Loading needs no float weights and runs no code from the
files; whatever does not agree is an error before any leaf is returned.

A folder appears complete or not at all: it is written beside its place and moved there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax._version import __version__
from qjax.core.config import ActSpec
from qjax.core.linen import BoxedQTensor
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.safetensors_io import open_tensors, write_tensors
from qjax.core.typing import Params
from qjax.kernels import packing

MANIFEST = "qjax.json"
WEIGHTS = "model.safetensors"
SCHEMA_VERSION = 1

_PARTS = ("qvalue", "scale", "zero_point")


def save(folder: Path | str, params: Params, record: Mapping[str, Any]) -> None:
    """Write `params` and `record` into `folder`.

    Args:
      folder: Created; if it holds an older save it is replaced, anything else is refused.
      params: Nested mappings of arrays and QTensors.
      record: What else to keep, for JSON: model, config, sampler.

    Raises:
      ValueError: If `folder` holds something that is not a save of this library, a key holds a
        `/` or a `#`, or `record` is not JSON.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no {MANIFEST}, so it is not replaced. Save into "
            "a new folder."
        )
    leaves = dict(flatten(params))
    arrays = {name: array for path, leaf in leaves.items() for name, array in _arrays(path, leaf)}
    manifest = {
        "format": "qjax",
        "schema_version": SCHEMA_VERSION,
        "qjax_version": __version__,
        "record": dict(record),
        "leaves": {path: _describe(leaf) for path, leaf in leaves.items()},
        "tensors": {name: {"sha256": _digest(array)} for name, array in arrays.items()},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_tensors(beside / WEIGHTS, arrays, {"format": "qjax"})
        (beside / MANIFEST).write_text(text)
        os.chmod(beside, 0o755)
        _put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load(folder: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The params tree and the record that `save` wrote.

    Raises:
      FileNotFoundError: If the folder holds no save.
      ValueError: If the manifest is of a newer schema or malformed, arrays are missing, extra
        or changed; all of them are named.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    tensors = open_tensors(folder / WEIGHTS)
    expected, stored = manifest["tensors"], dict(tensors)
    if expected.keys() != stored.keys():
        missing, extra = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
        raise ValueError(
            f"{folder / WEIGHTS} does not hold what {MANIFEST} lists; missing: "
            f"{_names(missing)}; unexpected: {_names(extra)}. Copy the folder again."
        )
    arrays, changed = {}, []
    for name, tensor in stored.items():
        array = tensor.read()
        if _digest(array) != expected[name]["sha256"]:
            changed.append(name)
        arrays[name] = array
    if changed:
        raise ValueError(
            f"{folder / WEIGHTS} was changed after it was saved: the hashes of "
            f"{_names(sorted(changed))} differ from {MANIFEST}. Copy the folder again."
        )
    leaves = {path: _rebuild(path, kind, arrays) for path, kind in manifest["leaves"].items()}
    if arrays:
        raise ValueError(f"No leaf of {folder / MANIFEST} owns {_names(sorted(arrays))}.")
    return _nest(leaves), manifest["record"]


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The checked manifest of a saved folder.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no JSON, not ours, of a newer schema, or lacks a part.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; it is no folder saved by qjax.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy the folder again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "qjax":
        raise ValueError(f"{path} is not a qjax manifest: its format is not 'qjax'.")
    version = manifest.get("schema_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} needs a schema_version of 1 or more; got {version!r}.")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, this qjax reads up to {SCHEMA_VERSION}. "
            f"Upgrade qjax (it was written by {manifest.get('qjax_version')})."
        )
    wrong = [name for name in ("record", "leaves", "tensors") if type(manifest.get(name)) is not dict]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}. Copy the folder again.")
    bad = [
        name
        for name, entry in manifest["tensors"].items()
        if type(entry) is not dict or type(entry.get("sha256")) is not str
    ]
    if bad:
        raise ValueError(f"{path} has no sha256 for {_names(bad)}. Copy the folder again.")
    return manifest


def params_digest(params: Params) -> str:
    """SHA-256 over the paths and the values of a tree: equal for equal models."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params)):
        for name, array in _arrays(path, leaf):
            digest.update(name.encode() + b"\0" + _digest(array).encode())
    return digest.hexdigest()


def flatten(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Paths joined with `/` and leaves, QTensors whole."""
    for key, value in params.items():
        name = str(key)
        if not name or "/" in name or "#" in name:
            raise ValueError(f"Keys of a params tree must have no '/' and no '#'; got {name!r}.")
        if isinstance(value, Mapping):
            yield from flatten(value, (*path, name))
        else:
            yield "/".join((*path, name)), value


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"The manifest has a leaf above the leaf {path}.")
        if name in node:
            raise ValueError(f"The manifest has a leaf and a branch at {path}.")
        node[name] = leaf
    return tree


def _arrays(path: str, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a leaf by their name in the file; codes below 8 bits packed."""
    if not is_qtensor(leaf):
        yield path, np.asarray(leaf)
        return
    packed = leaf if leaf.bits == 8 else leaf.with_layout("packed")
    for part in _PARTS:
        if (array := getattr(packed, part)) is not None:
            yield f"{path}#{part}", np.asarray(array)


def _describe(leaf: Any) -> dict[str, Any]:
    if not is_qtensor(leaf):
        return {"kind": "array"}
    act = None
    if leaf.act is not None:
        act = {key: _plain(value) for key, value in dataclasses.asdict(leaf.act).items()}
    return {
        "kind": "qtensor",
        "boxed": isinstance(leaf, BoxedQTensor),
        "bits": leaf.bits,
        "axis": leaf.axis,
        "size": leaf.shape[leaf.axis],
        "layout": leaf.layout,
        "dtype": leaf.dtype_name,
        "zero_point": leaf.zero_point is not None,
        "act": act,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rebuild(path: str, kind: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The leaf that `_describe` described; takes its arrays out of `arrays`."""

    def take(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"The manifest's leaf {path} needs the array {name}, which is not there.")
        return arrays.pop(name)

    if kind == {"kind": "array"}:
        return jnp.asarray(take(path))
    fields = {"kind", "boxed", "bits", "axis", "size", "layout", "dtype", "zero_point", "act"}
    if not isinstance(kind, dict) or kind.keys() != fields or kind["kind"] != "qtensor":
        raise ValueError(f"The manifest does not describe the leaf {path} as this qjax does.")
    _check_fields(path, kind)
    bits, axis = kind["bits"], kind["axis"]
    qvalue, scale = take(f"{path}#qvalue"), take(f"{path}#scale")
    zero_point = take(f"{path}#zero_point") if kind["zero_point"] else None
    block, pad, packed_layout = 1, 0, bits < 8 or kind["layout"] == "packed"
    stored = qvalue.shape[axis] if -axis <= qvalue.ndim else -1
    if packed_layout:
        block, length, pad = packing.packed_size(kind["size"], bits)
    else:
        length = kind["size"]
    dtype = np.uint8 if packed_layout else np.int8
    if stored != length or qvalue.dtype != dtype:
        raise ValueError(
            f"The codes of {path} do not fit its description: {qvalue.dtype} "
            f"{list(qvalue.shape)} for {kind['size']} values of {bits} bits along axis {axis}."
        )
    shape = list(qvalue.shape)
    shape[axis] = kind["size"]
    for part in (scale,) if zero_point is None else (scale, zero_point):
        if part.ndim != len(shape) or any(
            b < 1 or a % b for a, b in zip(shape, part.shape, strict=True)
        ):
            raise ValueError(f"The scales of {path} {list(part.shape)} do not fit {shape}.")
    values = np.asarray(scale, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"The scales of {path} must be finite and above 0.")
    q = (BoxedQTensor if kind["boxed"] else QTensor)(
        qvalue=jnp.asarray(qvalue),
        scale=jnp.asarray(scale),
        zero_point=None if zero_point is None else jnp.asarray(zero_point),
        bits=bits,
        axis=axis,
        block=block,
        pad=pad,
        layout="packed" if packed_layout else "native",
        dtype_name=kind["dtype"],
        act=_act(path, kind["act"]),
    )
    return q.with_layout(kind["layout"])


def _check_fields(path: str, kind: Mapping[str, Any]) -> None:
    checks = {
        "bits": kind["bits"] in packing.PLANES and type(kind["bits"]) is int,
        "axis": type(kind["axis"]) is int and -8 <= kind["axis"] < 0,
        "size": type(kind["size"]) is int and kind["size"] > 0,
        "layout": kind["layout"] in ("native", "packed"),
        "dtype": kind["dtype"] in ("float32", "float16", "bfloat16"),
        "zero_point": type(kind["zero_point"]) is bool,
        "boxed": type(kind["boxed"]) is bool,
    }
    if wrong := [f"{name}={kind[name]!r}" for name, fine in checks.items() if not fine]:
        raise ValueError(f"The manifest describes {path} with impossible values: {', '.join(wrong)}.")


def _act(path: str, act: Any) -> ActSpec | None:
    if act is None:
        return None
    try:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in act.items()}
        return ActSpec(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"The manifest's act of {path} is not understood: {error}") from None


def _digest(array: np.ndarray) -> str:
    head = f"{array.dtype.name}{list(array.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _put_in_place(beside: Path, folder: Path) -> None:
    """Move `beside` to `folder`; an older save there is kept until the new one stands."""
    if not folder.exists():
        os.replace(beside, folder)
        return
    old = beside.with_name(beside.name + "-old")
    os.replace(folder, old)
    try:
        os.replace(beside, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
