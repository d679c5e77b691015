"""The fast part of the suite on the oldest and the newest JAX and Flax; TPUs; the site.

    nox -s floor     jax 0.7.2, flax 0.11.2: what a stock Colab notebook has
    nox -s newest    the newest of both, on a Python >= 3.12 if this machine has one
    nox -s tpu       kernels and blocks through the compiler of TPUs, which needs no TPU
    nox -s notebooks all notebooks, top to bottom, in fresh kernels
    nox -s colab     the first notebook on jax 0.7.2, flax 0.11.2 and Colab's Python, or near it
    nox -s docs      the site, with warnings as errors; `nox -s docs -- FOLDER` keeps it

All leave out torch, diffusers and transformers, which the library itself imports only where
they are used: what needs them skips itself, and runs in the full suite.
"""

import os
import subprocess
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["floor", "newest", "tpu", "notebooks", "colab", "docs"]

PYPROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
FLOOR = ("jax==0.7.2", "jaxlib==0.7.2", "flax==0.11.2")
NEWEST = ("jax", "jaxlib", "flax")
TPU = ("jax[tpu]>=0.10", "flax")

TPU_TESTS = ("tests/kernels/test_tpu_compile.py", "tests/calibrate/test_compile_ahead.py")

# Chosen per session, and what only the oracles of the full suite need.
LEFT_OUT = {"jax", "flax", "torch", "diffusers", "transformers", "selenium"}
# What a release of JAX or Flax can break: numbers, kernels, layers, the scan, the house; and what
# must work without torch, which these sessions really lack. The report, the command line and
# the zoo stand on these, and run in the full suite.
FAST = (
    *("-m", "not slow and not torch_oracle"),
    *("tests/core", "tests/kernels", "tests/models"),
    *("tests/test_house.py", "tests/test_without_torch.py"),
)


def requirements(extra: str = "test") -> list[str]:
    """What the library and an extra of it need, from `pyproject.toml`, without `LEFT_OUT`."""
    listed = [*PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"][extra]]
    return [line for line in listed if Requirement(line).name not in LEFT_OUT]


def find_python(highest: int = 14) -> str | None:
    """The highest Python from 3.12 to 3.`highest` that runs: on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(highest, 11, -1):
        name = f"python3.{minor}"
        versions = sorted(pyenv.glob(f"versions/3.{minor}.*/bin/{name}"), reverse=True)
        for candidate in [name, *map(str, versions)]:
            code = f"import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, {minor}))"
            try:
                # A shim of pyenv is there even where the version behind it is not active.
                done = subprocess.run([candidate, "-c", code], capture_output=True, check=False)
            except OSError:
                continue
            if done.returncode == 0:
                return candidate
    return None


def run_fast_part(session: nox.Session, *versions: str) -> None:
    """Install the given jax and flax, then the library without its dependencies, and test."""
    session.install(*versions, *requirements())
    session.install("--no-deps", "-e", ".")
    session.run(
        "python", "-c", "import jax, flax; print('jax', jax.__version__, 'flax', flax.__version__)"
    )
    session.run("pytest", *(session.posargs or FAST))


def run_notebooks(session: nox.Session, versions: tuple[str, ...], *names: str) -> None:
    """Install the given jax and flax and the library, and run notebooks with the session's kernel."""
    session.install(*versions, *requirements("notebooks"))
    session.install("--no-deps", "-e", ".")
    # Kernels are looked for here first: none of the user's may answer to the same name.
    session.env["JUPYTER_PATH"] = str(Path(session.virtualenv.location, "share", "jupyter"))
    session.run(
        "python", "scripts/notebooks.py", "--cells", "--jobs=2", *(session.posargs or names)
    )


NEWEST_PYTHON = find_python()
COLAB_PYTHON = find_python(13)


@nox.session
def floor(session: nox.Session) -> None:
    """The fast part on the oldest supported jax and flax."""
    run_fast_part(session, *FLOOR)


@nox.session(python=NEWEST_PYTHON)
def newest(session: nox.Session) -> None:
    """The fast part on the newest jax and flax, which need a Python >= 3.12."""
    if NEWEST_PYTHON is None:
        session.skip("NOT TESTED on the newest jax and flax: no Python >= 3.12 was found here")
    run_fast_part(session, *NEWEST)


@nox.session
def tpu(session: nox.Session) -> None:
    """Programs compiled by libtpu, on a CPU."""
    session.install(*TPU, *requirements())
    session.install("--no-deps", "-e", ".")
    session.env["JAX_PLATFORMS"] = "cpu"
    session.run("pytest", *(session.posargs or TPU_TESTS))


@nox.session
def notebooks(session: nox.Session) -> None:
    """All notebooks, top to bottom."""
    run_notebooks(session, NEWEST)


@nox.session(python=COLAB_PYTHON)
def colab(session: nox.Session) -> None:
    """The first notebook on the versions that a stock Colab runtime has."""
    if COLAB_PYTHON is None:
        session.skip("NOT TESTED as on Colab: no Python 3.12 or 3.13 was found here")
    run_notebooks(session, FLOOR, "1")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, built anew; the library is imported for its docstrings."""
    listed = [*PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"]["docs"]]
    heavy = {"torch", "diffusers", "transformers"}  # imported inside functions only
    session.install(*(line for line in listed if Requirement(line).name not in heavy))
    session.install("--no-deps", "-e", ".")
    out = session.posargs[0] if session.posargs else session.create_tmp()
    session.run("sphinx-build", "-W", "--keep-going", "-E", "-q", "-b", "html", "docs", out)
