"""Run the notebooks of `colab/`: from their text, top to bottom, in fresh kernels.

    python scripts/notebooks.py                execute all; an error anywhere fails
    python scripts/notebooks.py 1 3            those whose names begin so
    python scripts/notebooks.py --jobs 2       two at a time, all of them; fails if one has failed
    python scripts/notebooks.py --write 2      execute, and store the outputs in the .ipynb
    python scripts/notebooks.py --prose        store changed prose; outputs stay, the code has to

The text (`colab/NAME.py`, jupytext's percent format) is the source; `colab/NAME.ipynb` is made
of it here and nowhere else. A notebook runs in a temporary folder, without a model hub. Of its
outputs what a machine adds is left out (times of execution, identifiers, folders, notices on
stderr), and the hash of the code that they come from is kept in the metadata.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat

FOLDER = Path(__file__).parents[1] / "colab"
MAX_OUTPUT = 150_000
"""Characters of one stored output; a picture of 110 kB."""
MAX_PNG = 60_000
"""Characters of a picture without loss; larger ones are stored as JPEG."""
SECONDS = 900
"""Most that one cell may take."""

# What the kernel's environment has besides: the notebooks need no network, and what was tuned on
# this machine has no part in what is stored.
QUIET = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

_ERROR = re.compile(r"^Traceback|\bError\b|\bERROR\b|Warning:|^E\d{4}", flags=re.MULTILINE)


def sources() -> list[Path]:
    """The texts, in order."""
    return sorted(FOLDER.glob("[0-9]_*.py"))


def source_digest(cells: list[Any]) -> str:
    """sha256 of the cells of code: what outputs depend on, equal for a text and its notebook.

    Where a clone comes from is left out.
    """
    text = "\0".join(cell.source.strip() for cell in cells if cell.cell_type == "code")
    text = re.sub("^REPOSITORY = .*$", "", text, flags=re.MULTILINE)
    return hashlib.sha256(text.encode()).hexdigest()


def made_of(path: Path) -> Any:
    """The notebook of a text, without outputs; the same text gives the same notebook."""
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell.metadata = nbformat.NotebookNode()
    notebook.metadata = nbformat.from_dict(
        {
            "accelerator": "GPU",
            "colab": {"provenance": []},
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def execute(path: Path, *, on_cell: Callable[[str, float], None] | None = None) -> Any:
    """The notebook of a text with its outputs, run in a fresh kernel and an empty folder.

    Args:
      path: The text.
      on_cell: Called with the first line of every cell of code and the seconds that it took.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell fails.
      RuntimeError: If a cell writes of an error or a warning to stderr.
    """
    from nbclient import NotebookClient

    notebook = made_of(path)
    environment = {**os.environ, **QUIET}
    with tempfile.TemporaryDirectory() as folder:
        environment["QJAX_CACHE"] = str(Path(folder, "cache"))
        # The folder is the notebook's own: it is the working folder of the kernel, too.
        work = Path(folder, "work")
        work.mkdir()
        begin = time.perf_counter()

        def executed(cell: Any, **_: Any) -> None:
            nonlocal begin
            if on_cell is not None and cell.cell_type == "code":
                on_cell(cell.source.partition("\n")[0], time.perf_counter() - begin)
            begin = time.perf_counter()

        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": work}},
            on_cell_executed=executed,
            coalesce_streams=True,
        )
        client.execute(env=environment)
    complaints = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stderr" and _ERROR.search(output.text)
    ]
    if complaints:
        raise RuntimeError(f"{path.name} wrote to stderr:\n{''.join(complaints)}")
    return notebook


def _as_jpeg(png: str) -> str:
    """A picture in base64 of PNG, in base64 of JPEG."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.save(file, "JPEG", quality=80, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def stored(notebook: Any) -> Any:
    """An executed notebook as it is kept.

    Raises:
      RuntimeError: If an output is too large to be stored, or knows the folder it was made in.
    """
    here = tempfile.gettempdir()
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type != "code":
            continue
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output["metadata"] = {}
            if len(output.get("data", {}).get("image/png", "")) > MAX_PNG:
                output.data["image/jpeg"] = _as_jpeg(output.data.pop("image/png"))
            text = str(output)
            if len(text) > MAX_OUTPUT:
                raise RuntimeError(f"an output has {len(text):,} characters: {text[:80]}...")
            if here in text or str(Path.home()) in text:
                raise RuntimeError(f"an output names a folder of this machine: {text[:400]}")
    notebook.metadata["qjax"] = {"source_sha256": source_digest(notebook.cells)}
    nbformat.validate(notebook)
    return notebook


def with_stored_outputs(path: Path) -> Any:
    """The notebook of a text with the outputs that lie beside it.

    Raises:
      ValueError: If these are of other code.
    """
    notebook, old = made_of(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    if old.metadata["qjax"]["source_sha256"] != source_digest(notebook.cells):
        raise ValueError(f"the code of {path.name} has changed since it ran; use --write.")
    ran = [cell for cell in old.cells if cell.cell_type == "code"]
    for cell, was in zip(
        [cell for cell in notebook.cells if cell.cell_type == "code"], ran, strict=True
    ):
        cell.outputs, cell.execution_count = was.outputs, was.execution_count
    return notebook


def _kernel_seconds() -> float:
    """Of processor cores, by kernels that have ended: unlike the clock, alike on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(path: Path, *, cells: bool, write: bool) -> None:
    """Execute a notebook and say how long it took; what it prints begins with its number."""

    def print_cell(line: str, seconds: float) -> None:
        print(f"  {path.stem[0]}  {seconds:6.1f} s  {line[:80]}", flush=True)

    begin, cpu = time.perf_counter(), _kernel_seconds()
    notebook = execute(path, on_cell=print_cell if cells else None)
    wall, cpu = time.perf_counter() - begin, _kernel_seconds() - cpu
    print(f"{path.stem}: {wall:.0f} s, {cpu:.0f} s of a processor core", flush=True)
    if write:
        nbformat.write(stored(notebook), path.with_suffix(".ipynb"))


def run_in_processes(paths: Sequence[Path], options: Sequence[str], *, jobs: int) -> list[str]:
    """The names of those that failed; each runs in a process of this script, `jobs` at a time."""

    def one(path: Path) -> int:
        words = [sys.executable, __file__, path.stem, *options]
        return subprocess.run(words, check=False).returncode

    pool = ThreadPoolExecutor(jobs)
    try:
        codes = list(pool.map(one, paths))
    finally:
        pool.shutdown(cancel_futures=True)
    return [path.stem for path, code in zip(paths, codes, strict=True) if code]


def main() -> None:
    """Execute what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; all if none")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    parser.add_argument("--prose", action="store_true", help="execute nothing; store the prose")
    parser.add_argument("--cells", action="store_true", help="print the seconds of every cell")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks that run at a time")
    settings = parser.parse_args()
    if settings.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {settings.jobs}")
    chosen = [path for path in sources() if path.name.startswith(tuple(settings.names) or "")]
    if not chosen:
        parser.error(f"no notebook of that name; there are {', '.join(p.stem for p in sources())}")
    if settings.prose:
        for path in chosen:
            nbformat.write(stored(with_stored_outputs(path)), path.with_suffix(".ipynb"))
        return
    if settings.jobs == 1:
        for path in chosen:
            run(path, cells=settings.cells, write=settings.write)
        return
    options = [f"--{name}" for name in ("cells", "write") if getattr(settings, name)]
    if failed := run_in_processes(chosen, options, jobs=settings.jobs):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
