"""Who is at work on a folder or a file: one process at a time, and what the dead left behind.

A lock is the operating system's (`flock`), held on an open file, and ends with the process that
holds it, however that ends. So there are no stale locks: the file may stay, the lock does not.
Where the system has no such locks (Windows, some network disks), nothing is locked and nothing
that was left behind is removed.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2

LOCK = ".qjax-lock"
"""Name of the file in a locked folder."""


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder: True if it is ours now, False if another's, None: no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that no other process works on in the meantime.

    It is created, and goes again if nothing was put into it.

    Raises:
      BlockingIOError: If another process does; the message says which.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if try_lock(descriptor) is False:
                raise BlockingIOError(
                    errno.EWOULDBLOCK,
                    f"{folder} is being written by {_holder(descriptor)}. Wait until that is done, "
                    "or use another folder.",
                )
            if not _is_at(descriptor, path):  # its holder was done and has removed it
                continue
            who = {"pid": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(who) + "\n").encode(), 0)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                if new:
                    with contextlib.suppress(OSError):  # it is not empty
                        folder.rmdir()
            return
        finally:
            os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(who['pid'])} on {who['host']!s:.100}"
    except (ValueError, TypeError, KeyError):
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def hold(path: Path) -> int | None:
    """An open descriptor that locks a new file or folder; None if it was taken for a dead one's.

    `clear_left_behind` removes what nobody holds, and might come before this.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if try_lock(descriptor) is False or not _is_at(descriptor, path):
        os.close(descriptor)
        return None
    return descriptor


def clear_left_behind(folder: Path, pattern: re.Pattern[str]) -> None:
    """Remove files and folders of these names that a process that is gone has left half-written."""
    for path in list(folder.iterdir()):
        if not pattern.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            if try_lock(descriptor):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        except OSError:
            continue  # another process was faster, or may and we may not
        finally:
            os.close(descriptor)


def exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system has no such step."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        left, right = os.fsencode(a), os.fsencode(b)
        if hasattr(library, "renameat2"):
            here = ctypes.c_int(_AT_FDCWD)
            done = library.renameat2(here, left, here, right, ctypes.c_uint(_RENAME_EXCHANGE))
        elif hasattr(library, "renamex_np"):  # macOS
            done = library.renamex_np(left, right, ctypes.c_uint(_RENAME_SWAP))
        else:
            return False
    except (OSError, TypeError):  # no library of C to be found: Windows
        return False
    return done == 0
