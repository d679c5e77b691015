"""Which paths are places in a bucket, and which must be paths of this machine."""

import os
import re
from pathlib import Path

SCHEMES = ("gs", "s3", "az")
"""What a remote place begins with, before a colon and two slashes."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")  # of one letter: a drive of Windows


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a place in a bucket: a text or an `epath.Path` with one of `SCHEMES`.

    Raises:
      ValueError: If it has another scheme, or pathlib has taken a slash away from it.
    """
    text = os.fspath(path)
    found = _SCHEME.match(text)
    if found is None:
        return False
    scheme, slashes = found.groups()
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise ValueError(
            f"{text!r} must be a local path or begin with one of {known}; got {scheme}://. "
            "Copy it to this machine; of the Hugging Face hub give the id, owner/name."
        )
    if len(slashes) != 2:
        raise ValueError(
            f"{text!r} has no two slashes behind {scheme}:, as pathlib leaves it. Give a text, "
            f"'{scheme}://{text[found.end() :]}', or an etils.epath.Path."
        )
    return True


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path, where only one of this machine will do.

    Raises:
      ValueError: If it is a place in a bucket, or begins with another scheme.
    """
    if is_remote(path):
        raise ValueError(
            f"{os.fspath(path)!r} must be a path of this machine: places in a bucket are taken "
            "for models and for the folders of quantize, calibrate and eval alone. Copy it here "
            "(`gcloud storage cp -r`), or mount the bucket."
        )
    return Path(path)
