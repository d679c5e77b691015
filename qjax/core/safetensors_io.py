"""Strict reading and atomic writing of safetensors files.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes,
little-endian and row-major. The header maps each name to `dtype`, `shape` and `data_offsets`
(begin and end, counted from the end of the header); `__metadata__` maps text to text.

The reader trusts nothing: the whole header is checked before a byte of data is read, so a
file that is truncated, overlapping or lying about its sizes is refused with a `ValueError`
that names file, tensor and rule. It knows bfloat16 and float8, which the official NumPy and
Flax readers do not load. The writer never touches the caller's mapping, holds one tensor at
a time, and moves the finished file into place, so that neither bad input nor a crash leaves
half a file. It also stores a digest of the header: the format itself cannot tell an `F16`
from an `I16` when a byte flips.

References:
  Format, https://github.com/huggingface/safetensors#format
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import struct
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from qjax.core.locks import clear_left_behind, try_lock
from qjax.core.places import local_path
from qjax.core.plain_json import unique

# The official implementation refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What systems say of a full disk, a full quota, and a file that may not be larger."""

_LENGTH = struct.Struct("<Q")
_DIGEST = "qjax.header_sha256"
_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class ArrayLike(Protocol):
    """What can be written: it knows its shape and dtype, and `np.asarray` gives its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class _Source:
    """An open file, closed with the last tensor that refers to it.

    Holding it open keeps offsets true when a newer file is moved over the same path. Plain
    reads, not a memory map: a file that shrinks meanwhile is an error, not a dead process.
    """

    def __init__(self, path: Path):
        # Not blocking: opening a pipe would wait for its other end.
        flags = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, os.O_RDONLY | flags)
        weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "it must be a plain file, and no folder, pipe or device.")
        self.path = path
        self.file = io.FileIO(descriptor, closefd=False)
        self.size = status.st_size
        self.lock = Lock()

    def read_into(self, out: memoryview, offset: int) -> bool:
        """Fill `out` from `offset` on; False when the file ends first."""
        with self.lock:  # threads share the position
            self.file.seek(offset)
            while len(out):
                count = self.file.readinto(out)
                if not count:
                    return False
                out = out[count:]
            return True


@dataclass(frozen=True, kw_only=True, eq=False)
class LazyTensor:
    """One tensor of an open file; nothing is read before `read`.

    Attributes:
      name: Its key in the file.
      shape: Its shape.
      dtype: Its NumPy dtype (bfloat16 and float8 are those of `ml_dtypes`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _source: _Source = field(repr=False)
    _offset: int = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, which is what `read` allocates."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A fresh, aligned, writable array with the tensor's values.

        Raises:
          ValueError: If the file has shrunk since it was opened, or holds a boolean that is
            neither 0 nor 1.
        """
        array = np.empty(self.shape, self.dtype)
        raw = array.reshape(-1).view(np.uint8)
        if not self._source.read_into(raw.data, self._offset):
            raise _error(
                self._source.path,
                f"tensor {self.name!r} ends beyond the file, which "
                "has shrunk since it was opened. Load it again.",
            )
        if self.dtype == np.bool_ and raw.size and raw.max() > 1:
            raise _error(
                self._source.path,
                f"tensor {self.name!r} is BOOL and holds the byte "
                f"{raw.max()}, which is neither 0 nor 1. Get the file again.",
            )
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"reading tensor {self.name!r} makes an array; got copy=False.")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def open_tensors(path: str | os.PathLike[str]) -> Mapping[str, LazyTensor]:
    """The tensors of a safetensors file, by name, in the order of their bytes.

    Args:
      path: A local file. It stays open as long as any of its tensors is referred to.

    Returns:
      A read-only mapping. Only the header has been read.

    Raises:
      ValueError: If the file breaks the format: see the module's docstring.
      FileNotFoundError: If there is none.
    """
    tensors, _ = _open(path)
    return MappingProxyType(tensors)


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The file's `__metadata__`, after the same checks as `open_tensors`.

    The digest that `write_tensors` adds is left out, so what was passed there comes back.
    """
    _, text = _open(path)
    return text


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a safetensors file that appears complete or not at all.

    Equal input gives equal bytes: tensors stand widest dtype first and then by name, so that
    each is aligned to its dtype, as the official writer has them.

    Args:
      path: The file to create or replace. Its folder must exist.
      tensors: Arrays of NumPy or JAX, `LazyTensor`s, or whatever has a shape and a dtype and
        `np.asarray` can read; read one at a time while writing.
      metadata: Text to text.

    Raises:
      ValueError: If a name or a dtype is not one the format has (int4 is not: pack it into
        uint8), or a value does not match the shape and dtype it announced.
      TypeError: If a name, or a key or value of `metadata`, is not text.
      OSError: If it cannot be written; on a full disk it says how many bytes it needs.
    """
    path = local_path(path)
    header = _header(path, tensors, metadata)
    data = sum(prod(t.shape) * _dtype(t).itemsize for t in tensors.values())
    needed = _LENGTH.size + len(header) + data
    try:
        with atomic_write(path) as file:
            file.write(_LENGTH.pack(len(header)))
            file.write(header)
            for name in _file_order(tensors):
                file.write(_little_endian_bytes(path, name, tensors[name]))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, f"{path} needs {needed:,} bytes: {error.strerror}") from None


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and vanishes if not.

    The temporary file lies in the same folder; it is flushed to the disk before it is moved,
    and the folder after, so that a crash leaves the old file or the new one. What a process
    that was killed has left of its temporary file goes with the next writing of `path`.

    Raises:
      OSError: If it cannot be written; on a full disk it says how much was written and is free.
    """
    path = local_path(path)
    # Names have 255 bytes at most; of long ones a hash stands for the rest.
    stem = path.name
    if len(os.fsencode(stem)) > 200:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    clear_left_behind(path.parent, re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{16}}\.tmp"))
    temporary = path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            try_lock(file.fileno())
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise _with_room(error, path, file.fileno()) from None
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _with_room(error: OSError, path: Path, descriptor: int) -> OSError:
    """An error of a full disk with the file's name, what was written and what is free."""
    if error.errno not in FULL:
        return error
    if error.filename is not None:
        return error
    written, free = os.fstat(descriptor).st_size, shutil.disk_usage(path.parent).free
    return OSError(
        error.errno,
        f"{os.strerror(error.errno)} after {written:,} bytes of {path}, with {free:,} bytes free "
        "on that disk; what was there before is as it was. Make room, and do it again",
    )


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata."""
    source = _Source(local_path(path))
    header, start = _read_header(source)
    text = header.pop("__metadata__", {})
    if not isinstance(text, dict) or not all(isinstance(v, str) for v in text.values()):
        raise _error(source.path, f"__metadata__ must map text to text; got {_show(text)}.")
    tensors = [_check_entry(source, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor._offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor._offset != end:
            raise _error(
                source.path,
                f"tensors must follow each other without overlap or hole; got "
                f"{_show(tensor.name)} at byte {tensor._offset - start} of the data, "
                f"{end - start} expected.",
            )
        end += tensor.nbytes
    if end != source.size:
        raise _error(
            source.path,
            f"the tensors must fill the file; got {end - start} bytes of tensors and "
            f"{source.size - start} bytes of data. Get the file again.",
        )
    digest = text.pop(_DIGEST, None)
    if digest is not None and digest != _header_digest(header, text):
        raise _error(
            source.path,
            "the header does not match its digest. Get the file again or, where another tool "
            f"rewrote it on purpose, remove {_DIGEST!r} from its metadata.",
        )
    return {tensor.name: tensor for tensor in tensors}, text


def _read_header(source: _Source) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data begins."""
    prefix = bytearray(_LENGTH.size)
    if not source.read_into(memoryview(prefix), 0):
        raise _error(
            source.path,
            f"a safetensors file has at least {_LENGTH.size} bytes; got {source.size}.",
        )
    (length,) = _LENGTH.unpack(prefix)
    start = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or start > source.size:
        raise _error(
            source.path,
            f"the header must lie inside the file and have at most {MAX_HEADER_BYTES} bytes; got "
            f"a header of {length} bytes in a file of {source.size}. It is truncated, or not a "
            "safetensors file.",
        )
    raw = bytearray(length)
    if not source.read_into(memoryview(raw), _LENGTH.size):
        raise _error(source.path, "the file has shrunk while it was read. Load it again.")
    if not raw.startswith(b"{"):
        raise _error(source.path, f"the header must begin with '{{'; got {_show(bytes(raw[:16]))}.")
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise _error(source.path, f"the header must be one JSON object; got {error}.") from None
    return header, start


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text}, which JSON does not have")


def _check_entry(source: _Source, start: int, name: str, entry: Any) -> LazyTensor:
    """The tensor that a header's entry describes, once it has been checked by itself."""

    def error(message: str) -> ValueError:
        return _error(source.path, f"tensor {_show(name)} {message}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(f"must have exactly dtype, shape and data_offsets; got {_show(entry)}.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise error(
            f"has a dtype this reader does not know; got {_show(code)}, known are "
            f"{', '.join(_DTYPES)}."
        )
    if not _are_sizes(shape) or len(shape) > 64:  # NumPy has 64 axes at most
        raise error(f"must have a shape of at most 64 integers from 0 on; got {_show(shape)}.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"must have data_offsets [begin, end] from 0 on; got {_show(offsets)}.")
    begin, end = offsets
    dtype = _DTYPES[code]
    # Axes of length 0 do not excuse the others: NumPy cannot make such an array either.
    if prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise error(f"is larger than any array can be; got shape {_show(shape)}.")
    if prod(shape) * dtype.itemsize != end - begin:
        raise error(
            f"must take as many bytes as its shape and dtype say; got {_show(shape)} of {code}, "
            f"{prod(shape) * dtype.itemsize} bytes, in a range of {end - begin}."
        )
    if start + end > source.size:
        raise error(
            f"must end inside the file; got end {end} in {source.size - start} bytes of data. "
            "The file is truncated: get it again."
        )
    return LazyTensor(
        name=name, shape=tuple(shape), dtype=dtype, _source=source, _offset=start + begin
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _header(path: Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str]) -> bytes:
    """The header of a new file, padded with spaces so that the data is aligned."""
    text = {key: value for key, value in metadata.items() if key != _DIGEST}
    for value in (*tensors, *text, *text.values()):
        if not isinstance(value, str):
            raise TypeError(f"{path}: names and metadata must be text; got {_show(value)}.")
    if "__metadata__" in tensors:
        raise _error(path, "no tensor can have the name '__metadata__'; the format uses it itself.")
    header: dict[str, Any] = {}
    begin = 0
    for name in _file_order(tensors):
        shape, dtype = tensors[name].shape, _dtype(tensors[name])
        if dtype not in _CODES:
            raise _error(
                path,
                f"tensor {_show(name)} must have one of the dtypes {', '.join(_DTYPES)}; got "
                f"{dtype}. Cast it or, below 8 bits, pack it into uint8.",
            )
        end = begin + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": [int(size) for size in shape],
            "data_offsets": [begin, end],
        }
        begin = end
    text = {**dict(sorted(text.items())), _DIGEST: _header_digest(header, text)}
    try:
        raw = _json({"__metadata__": text, **header})
    except UnicodeEncodeError as error:
        raise _error(path, f"names and metadata must be valid Unicode; got {error}.") from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise _error(
            path, f"names, shapes and metadata must fit {MAX_HEADER_BYTES} bytes; got {len(raw)}."
        )
    return raw


def _header_digest(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what the header says, however it is spaced and ordered."""
    text = json.dumps([entries, metadata], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _dtype(tensor: ArrayLike) -> np.dtype:
    try:
        return np.dtype(tensor.dtype).newbyteorder("=")
    except TypeError as error:
        raise TypeError(f"tensors must be arrays of NumPy or JAX; got {type(tensor)}.") from error


def _file_order(tensors: Mapping[str, ArrayLike]) -> list[str]:
    return sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))


def _little_endian_bytes(path: Path, name: str, tensor: ArrayLike) -> memoryview:
    """The values as bytes; a copy only where order or alignment ask for one."""
    array = np.asarray(tensor, order="C")
    if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
        raise _error(
            path,
            f"tensor {_show(name)} must read as it announced itself; got {array.shape} of "
            f"{array.dtype}, announced {tuple(tensor.shape)} of {tensor.dtype}.",
        )
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return array.reshape(-1).view(np.uint8).data


def _error(path: Path, message: str) -> ValueError:
    return ValueError(f"{path}: {message}")


def _show(value: Any) -> str:
    """`repr` cut to a readable length: headers may come from anybody."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= 200 else f"{text[:197]}..."
