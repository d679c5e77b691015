"""The manifest of a saved tree: what its arrays mean, and that they are what was saved.

`qjax.json` holds a schema version, a record for whoever saved, for every leaf its static
fields, for every array its SHA-256, and a SHA-256 of all that. It is data from outside: here
every field is checked before it is believed, and whatever is wrong is a `ValueError`. The
hashes are for accidents: who forges the arrays can forge them too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._version import __version__
from qjax.core.config import ActSpec
from qjax.core.linen import BoxedQTensor
from qjax.core.places import local_path
from qjax.core.plain_json import read_json
from qjax.core.plan import name_some
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.kernels import packing

MANIFEST = "qjax.json"
WEIGHTS = "model.safetensors"
SCHEMA_VERSION = 1

_PARTS = ("qvalue", "scale", "zero_point")
_FIELDS = {"kind", "boxed", "bits", "axis", "size", "layout", "dtype", "zero_point", "act"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def write_manifest(
    record: Mapping[str, Any], leaves: Mapping[str, Any], digests: Mapping[str, str]
) -> str:
    """The text of a manifest.

    Args:
      record: What whoever saves wants to keep, for JSON.
      leaves: Arrays and QTensors by path.
      digests: SHA-256 of every array by its name in the weights' file.

    Raises:
      ValueError: If `record` is not JSON.
    """
    manifest = {
        "format": "qjax",
        "schema_version": SCHEMA_VERSION,
        "qjax_version": __version__,
        "record": record,
        "leaves": {path: _describe(leaf) for path, leaf in leaves.items()},
        "tensors": {name: {"sha256": digest} for name, digest in digests.items()},
    }
    try:
        # Keys become text before they are hashed, as who reads the file will see them.
        manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record must be JSON (mappings, lists, text, finite numbers): {error}."
        ) from None
    manifest["sha256"] = _manifest_digest(manifest)
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The checked manifest of a saved folder.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no JSON, not ours, of a newer schema, lacks a part, or is not what
        its own hash says.
    """
    path = local_path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; it is no folder saved by qjax.")
    try:
        manifest = read_json(path)
        digest = _manifest_digest(manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error} Copy the folder again.") from None
    if manifest.get("format") != "qjax":
        raise ValueError(f"{path} is not a qjax manifest: its format is not 'qjax'.")
    version = manifest.get("schema_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} needs a schema_version of 1 or more; got {version!r}.")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, this qjax reads up to {SCHEMA_VERSION}. "
            f"Upgrade qjax (it was written by {manifest.get('qjax_version')})."
        )
    parts = ("record", "leaves", "tensors")
    if wrong := [name for name in parts if type(manifest.get(name)) is not dict]:
        raise ValueError(f"{path} lacks {', '.join(wrong)}. Copy the folder again.")
    if manifest.get("sha256") != digest:
        raise ValueError(
            f"{path} was changed after it was saved: its own hash differs. Copy the folder again."
        )
    hashes = {name: entry for name, entry in manifest["tensors"].items() if not _has_hash(entry)}
    if hashes:
        raise ValueError(
            f"{path} has no sha256 for {name_some(list(hashes))}. Copy the folder again."
        )
    return manifest


def _has_hash(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all that a manifest says, however it is spaced and ordered."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def arrays_of(path: str, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a leaf by their name in the file; codes below 8 bits packed."""
    if not is_qtensor(leaf):
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
            raise TypeError(f"{path} must be an array or a QTensor; got {type(leaf).__name__}.")
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


def rebuild(path: str, kind: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The leaf that the manifest describes; takes its arrays out of `arrays`."""

    def take(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(
                f"The leaf {path} of the manifest needs an array {name}; there is none."
            )
        return arrays.pop(name)

    if kind == {"kind": "array"}:
        return _as_jax(take(path))
    if not isinstance(kind, dict) or kind.keys() != _FIELDS or kind["kind"] != "qtensor":
        raise ValueError(f"The manifest does not describe the leaf {path} as this qjax does.")
    _check_fields(path, kind)
    qvalue, scale = take(f"{path}#qvalue"), take(f"{path}#scale")
    zero_point = take(f"{path}#zero_point") if kind["zero_point"] else None
    packed = kind["bits"] < 8 or kind["layout"] == "packed"
    block, length, pad = 1, kind["size"], 0
    if packed:
        block, length, pad = packing.packed_size(kind["size"], kind["bits"])
    axis = kind["axis"]
    stored = qvalue.shape[axis] if -axis <= qvalue.ndim >= 2 else -1
    if stored != length or qvalue.dtype != (np.uint8 if packed else np.int8):
        raise ValueError(
            f"The codes of {path} do not fit its description: {qvalue.dtype} "
            f"{list(qvalue.shape)} for {kind['size']} values of {kind['bits']} bits along axis "
            f"{axis}."
        )
    shape = list(qvalue.shape)
    shape[axis] = kind["size"]
    _check_scales(path, shape, scale, zero_point, kind["bits"])
    q = (BoxedQTensor if kind["boxed"] else QTensor)(
        qvalue=jnp.asarray(qvalue),
        scale=jnp.asarray(scale),
        zero_point=None if zero_point is None else jnp.asarray(zero_point),
        bits=kind["bits"],
        axis=axis,
        block=block,
        pad=pad,
        layout="packed" if packed else "native",
        dtype_name=kind["dtype"],
        act=_act(path, kind["act"]),
    )
    return q.with_layout(kind["layout"])


def _as_jax(array: np.ndarray) -> Any:
    """A JAX array, but for 64-bit values that JAX would cut to 32 bits without x64."""
    kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if kept else array


def _check_fields(path: str, kind: Mapping[str, Any]) -> None:
    checks = {
        "bits": type(kind["bits"]) is int and kind["bits"] in packing.PLANES,
        "axis": type(kind["axis"]) is int and -8 <= kind["axis"] < 0,
        "size": type(kind["size"]) is int and kind["size"] > 0,
        "layout": kind["layout"] in ("native", "packed"),
        "dtype": kind["dtype"] in _FLOATS,
        "zero_point": type(kind["zero_point"]) is bool,
        "boxed": type(kind["boxed"]) is bool,
    }
    if wrong := [f"{name}={kind[name]!r}" for name, fine in checks.items() if not fine]:
        raise ValueError(
            f"The manifest describes {path} with impossible values: {', '.join(wrong)}."
        )


def _check_scales(
    path: str, shape: list[int], scale: np.ndarray, zero_point: np.ndarray | None, bits: int
) -> None:
    for part in (scale,) if zero_point is None else (scale, zero_point):
        if part.ndim != len(shape) or any(
            b < 1 or a % b for a, b in zip(shape, part.shape, strict=True)
        ):
            raise ValueError(f"The scales of {path} {list(part.shape)} do not fit {shape}.")
    if zero_point is not None and (zero_point.dtype != np.int8 or zero_point.shape != scale.shape):
        raise ValueError(f"The zero points of {path} must be int8 and as many as its scales.")
    if zero_point is not None and zero_point.size:
        least, most = int(zero_point.min()), int(zero_point.max())
        if least < -(2 ** (bits - 1)) or most >= 2 ** (bits - 1):
            raise ValueError(
                f"The zero points of {path} must be codes of {bits} bits; they reach from {least} "
                f"to {most}."
            )
    if scale.dtype.name not in _FLOATS:
        raise ValueError(f"The scales of {path} must be floats; they are {scale.dtype}.")
    values = np.asarray(scale, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"The scales of {path} must be finite and above 0.")


def _act(path: str, act: Any) -> ActSpec | None:
    if act is None:
        return None
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in act.items()}
        spec = ActSpec(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"The manifest's act of {path} is not understood: {error}") from None
    if type(spec.bits) is not int or type(spec.symmetric) is not bool:
        raise ValueError(f"The manifest's act of {path} has impossible values: {spec}.")
    return spec


def array_digest(array: np.ndarray) -> str:
    """SHA-256 over the dtype, the shape and the bytes of an array."""
    head = f"{array.dtype.name}{list(array.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
