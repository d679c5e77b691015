"""A working folder on this machine that stands for one in a bucket.

What writes locks, appends to logs and moves folders works on a local disk. A `Mirror` has a local
folder, brings into it what the bucket has (`get`), and puts what has changed there into the bucket
(`push`): what is new first, manifests after all else, and then goes what is there no more. A job
that is killed at any place leaves in the bucket what it would have left on a disk.

One job at a time writes. A lease says which: an object with the name of the holder and the time,
written again as long as the holder lives. Where the client of the bucket can write an object only
if there is none (`gs://`, `s3://`), two jobs never begin at once. Taking over a lease that is too
old is not as safe: both may do so, and the one that wrote first finds out at its next `push`.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from qjax.core.manifest import MANIFEST
from qjax.core.remote import RemoteFolder, files_below, is_hidden

LEASE = ".qjax-lease"
"""Name of the lease in a folder of a bucket."""

BEAT, STALE = 20.0, 120.0
"""Seconds between two writings of a lease, and after which it is nobody's."""


class Mirror:
    """A folder in a bucket and the local one that stands for it; `mirrored` makes one.

    Attributes:
      local: The local folder.
      writes: Whether this process puts anything into the bucket.
    """

    def __init__(self, remote: RemoteFolder, local: Path, lease: "Lease | None"):
        self.local, self.writes = local, lease is not None
        self._remote, self._lease = remote, lease
        self._known: dict[str, tuple[int, ...]] = {}

    @property
    def url(self) -> str:
        """The folder in the bucket."""
        return self._remote.url

    def url_of(self, path: Path) -> str:
        """Where in the bucket a path of the local folder is."""
        name = self._name(path)
        return f"{self.url}/{name}" if name else self.url

    def get(self, path: Path) -> None:
        """Bring a file, or the files of a folder but not of folders in it, if they are there."""
        name = self._name(path)
        depth = name.count("/") + 1 if name else 0
        for found, entry in self._remote.files(name).items():
            if found == name or found.count("/") == depth:
                self._bring(found, entry)

    def get_save(self, folder: Path) -> None:
        """Bring a save, if it is there whole."""
        name = self._name(folder)
        there = self._remote.files(name)
        if f"{name}/{MANIFEST}" in there:
            for found, entry in there.items():
                self._bring(found, entry)

    def drop(self, path: Path) -> None:
        """Have a file that is not here deleted at the next `push`, if the bucket has it."""
        if not path.exists():
            self._known.setdefault(self._name(path), ())

    def push(self) -> None:
        """Put into the bucket what is new or other here, then delete there what was dropped here.

        Raises:
          BlockingIOError: If another job has taken over the folder in the bucket.
        """
        if self._lease is None:
            return
        self._lease.check()
        now = {name: _signature(stat) for name, stat in files_below(self.local).items()}
        self._remote.upload(self.local, [n for n in now if self._known.get(n) != now[n]])
        for name in self._known.keys() - now.keys():
            self._remote.remove(name)
        self._known = now

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.local).as_posix()
        return "" if name == "." else name

    def _bring(self, name: str, entry: Any) -> None:
        path = self.local / name
        if not is_hidden(name) and not path.exists():
            self._remote.download(name, entry, path)
            self._known[name] = _signature(path.stat())


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@contextlib.contextmanager
def mirrored(
    url: str | os.PathLike[str],
    *,
    holds: str,
    writes: bool = True,
    wait: Callable[[str], None] = lambda name: None,
) -> Iterator[Mirror]:
    """A mirror of a folder in a bucket, for as long as the block lasts; the local folder goes then.

    Args:
      url: The folder in the bucket.
      holds: A file that says whose the folder is, and is brought at once.
      writes: Whether this process writes; of those that work together one does.
      wait: Returns when all that work together have come to the place of that name.

    Raises:
      ValueError: If there is something in the folder, and not the file that says whose it is.
      BlockingIOError: If another job has the folder; the message says which.
    """
    remote = RemoteFolder(url)
    with contextlib.ExitStack() as stack:
        lease = None
        if writes:
            there = {name for name in remote.files() if not is_hidden(name)}
            if there and holds not in there:
                raise ValueError(
                    f"{remote.url} is not empty, and there is no {holds} in it. Use another folder."
                )
            lease = stack.enter_context(Lease(remote))
        wait("lease")
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjax-mirror-"))
        mirror = Mirror(remote, Path(scratch) / remote.name, lease)
        mirror.local.mkdir()
        mirror.get(mirror.local / holds)
        yield mirror


class Lease:
    """The right to write into a folder of a bucket, taken and kept within a `with` block."""

    def __init__(self, remote: RemoteFolder):
        self._remote, self._over = remote, threading.Event()
        self._me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "token": secrets.token_hex(8),
        }
        self._thread = threading.Thread(target=self._renew, name="qjax-lease", daemon=True)

    def __enter__(self) -> Self:
        if not self._remote.write(LEASE, self._text(), new=True):
            theirs = self._read()
            if theirs is not None and _is_held(theirs):
                raise self._refusal(theirs)
            if theirs is not None:
                warnings.warn(
                    f"{_words(theirs)} had {self._remote.url} and is gone; going on there.",
                    stacklevel=2,
                )
            self._remote.write(LEASE, self._text())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it will be too old in a while
            theirs = self._read()
            if theirs is not None and theirs.get("token") == self._me["token"]:
                self._remote.remove(LEASE)

    def check(self) -> None:
        """That nobody else has taken the lease.

        Raises:
          BlockingIOError: If somebody has.
        """
        theirs = self._read()
        if theirs is None:
            self._remote.write(LEASE, self._text(), new=True)
        elif theirs.get("token") != self._me["token"]:
            raise self._refusal(theirs)

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            # A bucket that cannot be reached now may be at the next beat; `push` raises.
            with contextlib.suppress(OSError):
                theirs = self._read()
                if theirs is not None and theirs.get("token") == self._me["token"]:
                    self._remote.write(LEASE, self._text())

    def _text(self) -> bytes:
        return (json.dumps(self._me | {"time": time.time()}) + "\n").encode()

    def _read(self) -> dict[str, Any] | None:
        data = self._remote.read(LEASE)
        try:
            theirs = json.loads(data or b"null")
        except ValueError:
            theirs = {}
        return theirs if theirs is None or isinstance(theirs, dict) else {}

    def _refusal(self, theirs: dict[str, Any]) -> BlockingIOError:
        return BlockingIOError(
            errno.EWOULDBLOCK,
            f"{self._remote.url} is being written by {_words(theirs)}. Wait until that is done "
            f"(one that was killed is forgotten after {STALE:.0f} seconds), or use another folder.",
        )


def _words(theirs: dict[str, Any]) -> str:
    return f"process {theirs.get('pid')!s:.20} on {theirs.get('host')!s:.100}"


def _is_held(theirs: dict[str, Any]) -> bool:
    """Whether the holder of a lease may be at work."""
    at, pid = theirs.get("time"), theirs.get("pid")
    if not isinstance(at, int | float) or time.time() - at > STALE:
        return False
    if theirs.get("host") != socket.gethostname() or type(pid) is not int or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
