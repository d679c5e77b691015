"""The licence of a model, as its files say it.

A repository of the hub says it at the head of its README.md, between two lines `---`; the models
of the zoo in `zoo.json`. It is a note for the model card: what cannot be read is no licence.
"""

import re
from pathlib import Path

from qjax.core.plain_json import read_json
from qjax.core.plain_yaml import read_yaml

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{1,63}")
_LONGEST = 1 << 20  # bytes of a README.md that are looked at


def license_of(folder: Path) -> str | None:
    """What the files of a folder say of its licence, in the hub's spelling; None if nothing."""
    said = _of_readme(folder / "README.md") or _of_zoo(folder / "zoo.json")
    if not isinstance(said, str) or not _LICENSE.fullmatch(said):
        return None
    return said.lower()


def front_matter(text: str) -> dict:
    """The mapping at the head of a README.md; empty if there is none that can be read."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\s*(?:\n|$)", text, flags=re.DOTALL)
    if found is None:
        return {}
    try:
        data = read_yaml("README.md", found[1])
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _of_readme(path: Path) -> object:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return front_matter(file.read(_LONGEST).decode("utf-8", "replace")).get("license")


def _of_zoo(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        return read_json(path).get("license")
    except ValueError:
        return None
