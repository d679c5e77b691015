"""Check types of the whole library: `python scripts/check_types.py [mypy's arguments]`.

The folders `models`, `calibrate` and `kernels` are subpackages of `qjax`, by a mapping in
`pyproject.toml` that type checkers do not follow. So this lays the packages out as they are
installed, by links in mypy's own cache folder, and runs mypy there; what it prints are the
paths in the repository.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# A place of its own that stays the same, so that mypy's cache remains true from run to run.
LAYOUT = REPOSITORY / ".mypy_cache" / "layout"
CACHE = REPOSITORY / ".mypy_cache" / "of-layout"


def lay_out(mapping: dict[str, str]) -> None:
    """Link every top-level package into `LAYOUT`, under the name it is imported by."""
    shutil.rmtree(LAYOUT, ignore_errors=True)  # links are removed, not what they lead to
    (LAYOUT / "qjax").mkdir(parents=True)
    for path in (REPOSITORY / "qjax").iterdir():
        (LAYOUT / "qjax" / path.name).symlink_to(path)
    for name, source in mapping.items():
        LAYOUT.joinpath(*name.split(".")).symlink_to(REPOSITORY / source)


def main() -> int:
    """Run mypy and return its exit status."""
    pyproject = REPOSITORY / "pyproject.toml"
    mapping = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-dir"]
    lay_out(mapping)
    options = ["--config-file", str(pyproject), "--cache-dir", str(CACHE), *sys.argv[1:]]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options],
        cwd=LAYOUT,
        env={**os.environ, "MYPYPATH": str(LAYOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in result.stdout.splitlines():
        inner = line.removeprefix("qjax/")
        print(inner if inner.split("/")[0] in mapping.values() else line)
    sys.stderr.write(result.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
