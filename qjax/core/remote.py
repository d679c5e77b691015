"""Folders in a bucket: `gs://`, `s3://` and `az://`, through fsspec.

A bucket holds objects under names, not folders. An object is there whole or not at all; a folder of
several is half there while it is written. So the manifest of a save goes up last, and an older
one goes before anything of its save is replaced: where a manifest is, the save is whole.

Libraries that read and write folders of this machine get a copy here (`fetch`), or write one that
is sent (`sending`).
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from qjax.core.manifest import MANIFEST, WEIGHTS

UNFINISHED = ".qjax-unfinished"
"""Name of the object that says that a save is on its way, or was broken off."""

_BACKENDS = {"gs": '"qjax-diffusion[gcs]"', "s3": "s3fs", "az": "adlfs"}
# By these the clients tell one version of an object from another; each has some of them.
_VERSION = ("generation", "ETag", "etag", "md5Hash", "content_md5", "LastModified", "mtime")


class Entry(NamedTuple):
    """An object: its bytes, and whatever tells its version from others."""

    size: int
    version: str


class RemoteFolder:
    """A folder in a bucket.

    Args:
      url: `gs://bucket/folder`, for example.

    Raises:
      ValueError: If it names no bucket, or `..` is in it.
      OSError: If the library that speaks to such buckets is not installed. All methods raise it
        where the bucket does not answer as it should.
    """

    def __init__(self, url: str | os.PathLike[str]):
        scheme, _, place = os.fspath(url).partition("://")
        self._root = place.rstrip("/")
        if not self._root or not _is_safe(self._root):
            raise ValueError(f"{os.fspath(url)!r} must be {scheme}://BUCKET/FOLDER.")
        self.url = f"{scheme}://{self._root}"
        try:
            import fsspec  # only those who have a bucket need it

            with _explained(self.url):
                # What another machine has just written must be seen.
                self._fs = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            raise OSError(
                f"{self.url} cannot be reached: {error}. `pip install {_BACKENDS[scheme]}`."
            ) from error

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self._root.rsplit("/", 1)[-1]

    def files(self, below: str = "") -> dict[str, Entry]:
        """All objects of the folder, or of what lies at `below`, by their names in the folder."""
        with _explained(self.url):
            try:
                found = self._fs.find(self._at(below), detail=True)
            except FileNotFoundError:
                found = {}
        entries = {}
        for path, info in found.items():
            name = path[len(self._root) + 1 :]
            if not name or name.endswith("/"):  # what browsers of buckets put for empty folders
                continue
            version = [str(info[key]) for key in _VERSION if info.get(key) is not None]
            entries[name] = Entry(int(info["size"]), " ".join(version))
        return entries

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None if there is none."""
        with _explained(f"{self.url}/{name}"):
            try:
                return self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Whether the object was written; False if it must be new and is there."""
        with _explained(f"{self.url}/{name}"):
            try:
                self._fs.pipe_file(self._at(name), data, mode="create" if new else "overwrite")
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""
        with _explained(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def download(self, name: str, entry: Entry, to: Path) -> None:
        """A copy of an object; the file appears when it is whole.

        Raises:
          ValueError: If a file of that name would not stay in a folder of this machine.
        """
        if not _is_safe(name):
            raise ValueError(f"{self.url} holds a name that is not safe to copy: {name!r}.")
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name[:200]}.partial")
        try:
            with _explained(f"{self.url}/{name}"):
                self._fs.get_file(self._at(name), os.fspath(partial))
            if (size := partial.stat().st_size) != entry.size:
                raise OSError(f"{self.url}/{name} has {entry.size} bytes; {size} came. Try again.")
            os.replace(partial, to)
        finally:
            partial.unlink(missing_ok=True)

    def upload(self, folder: Path, names: Collection[str]) -> None:
        """Put files of a local folder under their names; manifests last, older ones away first.

        The weights of a save whose manifest is there already, byte for byte, are not sent again.
        """
        manifests = [name for name in names if _is_manifest(name)]
        others = dict.fromkeys(sorted(set(names) - set(manifests)))
        for name in manifests:
            old = self.read(name)
            if old == (folder / name).read_bytes():
                others.pop(name.removesuffix(MANIFEST) + WEIGHTS, None)
            elif old is not None:
                self.remove(name)
        for name in (*others, *sorted(manifests)):
            with _explained(f"{self.url}/{name}"):
                self._fs.put_file(os.fspath(folder / name), self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Whatever a client of buckets raises, as an OSError that names the place."""
    try:
        yield
    except (OSError, ImportError, ValueError, TypeError, AttributeError):
        raise
    except Exception as error:  # each client has errors of its own
        raise OSError(
            f"{url}: {type(error).__name__}: {error}. See that the bucket exists and that this "
            "machine may use it (`gcloud auth application-default login`)."
        ) from error


def _is_safe(name: str) -> bool:
    """Whether a name, of parts with `/` between them, stays below a folder on every system."""
    return all(
        part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in name.split("/")
    )


def is_hidden(name: str) -> bool:
    """Whether a part of a name begins with a dot: locks, leases, files on their way."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _is_manifest(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == MANIFEST


def fetch(url: str | os.PathLike[str], patterns: Iterable[str]) -> Path:
    """A local copy of a folder in a bucket: of files that match a pattern, `*` standing for `/` too.

    It stays until the process ends. What was copied before is not copied again, unless something
    in the folder has changed: then all is.

    Raises:
      FileNotFoundError: If there is nothing at that place.
    """
    folder = RemoteFolder(url)
    there = folder.files()
    if not there:
        raise FileNotFoundError(f"There is nothing at {folder.url}.")
    key = hashlib.sha256(repr((folder.url, sorted(there.items()))).encode()).hexdigest()[:32]
    local = _scratch() / key / folder.name
    local.mkdir(parents=True, exist_ok=True)
    patterns = tuple(patterns)
    for name, entry in there.items():
        wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
        if wanted and not is_hidden(name) and not (local / name).exists():
            folder.download(name, entry, local / name)
    return local


@functools.cache
def _scratch() -> Path:
    """A folder that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="qjax-fetched-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def sending(url: str | os.PathLike[str]) -> Iterator[Path]:
    """A local folder to save into; what is there when the block ends well takes the place of `url`.

    While an older save is being replaced there is none; broken off then, the next save is taken.

    Raises:
      ValueError: If something else than a save is there.
    """
    target = RemoteFolder(url)
    there = target.files()
    if not may_replace(there):
        raise ValueError(
            f"{target.url} holds something else than a save (there is no {MANIFEST} in it), so it "
            "is not replaced. Save into a new folder."
        )
    with tempfile.TemporaryDirectory(prefix="qjax-save-") as scratch:
        folder = Path(scratch) / target.name
        yield folder
        names = files_below(folder)
        target.write(UNFINISHED, b"")
        target.upload(folder, names)
        for name in there.keys() - names - {UNFINISHED}:
            target.remove(name)
        target.remove(UNFINISHED)


def may_replace(there: Collection[str]) -> bool:
    """Whether a save may take the place of objects of these names."""
    return not there or MANIFEST in there or UNFINISHED in there


def files_below(folder: Path) -> dict[str, Any]:
    """Names and stats of the files of a local folder, hidden ones left out."""
    names = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    return {name: path.stat() for name, path in sorted(names.items()) if not is_hidden(name)}
