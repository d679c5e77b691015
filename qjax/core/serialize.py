"""A quantized params tree on disk: one safetensors file and one JSON manifest.

safetensors holds arrays and nothing else, and no integers below 8 bits; so sub-byte codes are
stored packed, as U8, and the manifest (`manifest.py`) says what the arrays mean. Loading needs
no float weights and runs no code from the files; whatever does not agree is an error before
any leaf is returned.

A folder appears complete or not at all: it is written beside its place and moved there.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax.core.locks import clear_left_behind, exchange, hold
from qjax.core.manifest import (
    MANIFEST,
    WEIGHTS,
    array_digest,
    arrays_of,
    read_manifest,
    rebuild,
    write_manifest,
)
from qjax.core.places import is_remote
from qjax.core.plan import name_some
from qjax.core.remote import fetch, sending
from qjax.core.safetensors_io import atomic_write, open_tensors, write_tensors
from qjax.core.typing import Params


def save(
    folder: str | os.PathLike[str],
    params: Params,
    record: Mapping[str, Any],
    *,
    files: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write `params` and `record` into `folder`, and copies of other files.

    Args:
      folder: Created; if it holds an older save it is replaced, anything else is refused. One in
        a bucket is written on this machine and sent (`remote.sending`).
      params: Nested mappings of arrays and QTensors.
      record: What else to keep, for JSON: model, config, sampler.
      files: Files to copy, by their names below `folder`: those of a tokenizer.

    A save that was broken off by a kill leaves a folder `.NAME-...` beside `folder`, which the
    next save there removes.

    Raises:
      OSError: If it cannot be written: the message says which file and, on a full disk, how many
        bytes it needs. An older save stays as it was.
      ValueError: If `folder` holds something that is not a save of this library or is the
        working folder, a key is no text, holds a `/` or a `#`, or names an empty branch, or
        `record` is not JSON.
      TypeError: If a leaf is neither an array nor a QTensor.
    """
    if is_remote(folder):
        with sending(folder) as here:
            save(here, params, record, files=files)
        return
    folder = Path(folder)
    if folder.is_symlink():  # a link to a folder stays one
        folder = folder.resolve()
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"A save takes the place of its folder, and {folder} is the working folder or holds "
            "it. Save into a new folder."
        )
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_new and not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds something else than a save (there is no {MANIFEST} in it), so it is "
            "not replaced. Save into a new folder."
        )
    leaves = dict(flatten(params))
    arrays = {name: a for path, leaf in leaves.items() for name, a in arrays_of(path, leaf)}
    digests = {name: array_digest(array) for name, array in arrays.items()}
    text = write_manifest(record, leaves, digests)

    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_left_behind(folder.parent, _beside(folder))
    beside, held = _new_folder_beside(folder)
    try:
        write_tensors(beside / WEIGHTS, arrays, {"format": "qjax"})
        with atomic_write(beside / MANIFEST) as file:
            file.write(text.encode())
        for name, source in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(beside / name) as copy, open(source, "rb") as original:
                shutil.copyfileobj(original, copy)
        os.chmod(beside, 0o777 & ~_umask())
        _put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        os.close(held)


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The params tree and the record that `save` wrote; from a bucket through a copy here.

    Raises:
      FileNotFoundError: If the folder holds no save.
      ValueError: If the manifest is of a newer schema or malformed, arrays are missing, extra
        or changed; all of them are named.
    """
    folder = fetch(folder, (MANIFEST, WEIGHTS)) if is_remote(folder) else Path(folder)
    manifest = read_manifest(folder)
    tensors = open_tensors(folder / WEIGHTS)
    expected, stored = manifest["tensors"], dict(tensors)
    if expected.keys() != stored.keys():
        missing, extra = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
        raise ValueError(
            f"{folder / WEIGHTS} does not hold what {MANIFEST} lists; missing: "
            f"{name_some(missing)}; unexpected: {name_some(extra)}. Copy the folder again."
        )
    arrays, changed = {}, []
    for name, tensor in stored.items():
        array = tensor.read()
        if array_digest(array) != expected[name]["sha256"]:
            changed.append(name)
        arrays[name] = array
    if changed:
        raise ValueError(
            f"{folder / WEIGHTS} was changed after it was saved: the hashes of "
            f"{name_some(sorted(changed))} differ from {MANIFEST}. Copy the folder again."
        )
    tree = _nest({path: rebuild(path, leaf, arrays) for path, leaf in manifest["leaves"].items()})
    if arrays:
        raise ValueError(f"No leaf of {folder / MANIFEST} owns {name_some(sorted(arrays))}.")
    return tree, manifest["record"]


def params_digest(params: Params) -> str:
    """SHA-256 over the paths and the values of a tree: equal for equal models."""
    return digest_of({path: leaf_digest(path, leaf) for path, leaf in flatten(params)})


def leaf_digest(path: str, leaf: Any) -> str:
    """SHA-256 of one leaf: for loaders that see one tensor at a time."""
    return digest_of({name: array_digest(array) for name, array in arrays_of(path, leaf)})


def digest_of(digests: Mapping[str, str]) -> str:
    """The digest of a tree from those of its leaves by path, in any order."""
    lines = (f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def flatten(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Paths joined with `/` and leaves, QTensors whole.

    Raises:
      ValueError: If a key could not be told from another in a path, or a branch is empty.
    """
    for key, value in params.items():
        if not isinstance(key, str) or not key or "/" in key or "#" in key:
            raise ValueError(
                f"Keys of a params tree must be text without '/' and '#'; got {key!r} in "
                f"{'/'.join(path) or 'the root'}. Rename it."
            )
        name = "/".join((*path, key))
        if not isinstance(value, Mapping):
            yield name, value
        elif value:
            yield from flatten(value, (*path, key))
        else:
            raise ValueError(f"Branches of a params tree must hold leaves; {name} is empty.")


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    branches: dict[tuple[str, ...], dict[str, Any]] = {(): tree}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        if "#" in path or not all((*parents, name)):
            raise ValueError(f"The manifest has a leaf without a proper path: {path!r}.")
        for depth in range(1, len(parents) + 1):
            at = tuple(parents[:depth])
            if at not in branches:
                branch: dict[str, Any] = {}
                _add(branches[at[:-1]], at[-1], branch, path)
                branches[at] = branch
        _add(branches[tuple(parents)], name, leaf, path)
    return tree


def _add(branch: dict[str, Any], name: str, node: Any, path: str) -> None:
    if name in branch:
        raise ValueError(f"The manifest has a leaf and a branch of one name on the way to {path}.")
    branch[name] = node


def _beside(folder: Path) -> re.Pattern[str]:
    """Names of the folders in which saves of `folder` are written, and old ones end."""
    return re.compile(rf"\.{re.escape(_short(folder.name))}-[0-9a-f]{{16}}(-old)?")


def _short(name: str) -> str:
    """Names have 255 bytes at most; of long ones a hash stands for the rest."""
    raw = os.fsencode(name)
    return name if len(raw) <= 200 else hashlib.sha256(raw).hexdigest()


def _new_folder_beside(folder: Path) -> tuple[Path, int]:
    """A new folder and a descriptor that says, as long as it is open, that we are at work there."""
    while True:
        beside = folder.with_name(f".{_short(folder.name)}-{secrets.token_hex(8)}")
        beside.mkdir(mode=0o700)
        held = hold(beside)
        if held is not None:
            return beside, held


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(beside: Path, folder: Path) -> None:
    """Move `beside` to `folder`; an older save there is kept until the new one stands.

    Where the system can exchange two folders in one step (Linux, macOS), there is a save at
    `folder` at all times. Elsewhere there is none for a moment, and a process that is killed
    just then leaves the old one beside it, under a name that ends in `-old`.
    """
    if not folder.exists():
        os.replace(beside, folder)
        return
    if exchange(beside, folder):
        return  # what was old is removed as `beside`
    old = beside.with_name(beside.name + "-old")
    os.replace(folder, old)
    try:
        os.replace(beside, folder)
    except BaseException:
        if not folder.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
