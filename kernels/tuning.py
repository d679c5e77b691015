"""Choices of an implementation that were measured on this machine, kept for later programs.

`qjax tune` times the candidates for every matmul of a model (`qjax.tune`) and writes the fastest
into a file in the user's cache folder, under the kind of chip and the version of JAX. Where
a program is traced, `quant_matmul.choose` looks here before it goes by its rules. Without
the file, as after an installation, the rules alone decide: what nobody measured does not
change from machine to machine.
"""

import contextlib
import contextvars
import functools
import json
import os
import platform as platform_
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.kernels import quant_matmul_hopper, tiles_tpu, weight_matmul_hopper
from qjax.kernels.problem import Problem, why_not
from qjax.kernels.quant_matmul_xla import PIECE_VALUES, SMALL_VALUES
from qjax.kernels.target import current_target

# Goes up whenever blocks or rules change: what was measured before holds no more.
RULES = 2
PIECES = (2048, 1024, 768, 512, 384, 256, 128, 64)
TPU_ROWS, TPU_COLUMNS = (128, 256, 512, 1024), (128, 256, 512, 1024)


class Choice(NamedTuple):
    """An implementation and the sizes of its blocks; None for its own rule.

    Of xla the columns of a piece, of tpu `Blocks`, of hopper a `Tile` or, of floats, a `Cut`.
    """

    implementation: str
    blocks: tuple[int, ...] | None = None


def path() -> Path:
    """The file of choices: `tuning.json` in `$QJAX_CACHE`, or in `qjax` of the user's cache.

    Raises:
      ValueError: If `$QJAX_CACHE` is a place in a bucket.
    """
    own = os.environ.get("QJAX_CACHE")
    if own and "://" in own:
        raise ValueError(f"QJAX_CACHE must be a folder of this machine; got {own!r}.")
    if own:
        return Path(own) / "tuning.json"
    # Not Path.home(), which raises where a container's user has none.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "qjax" / "tuning.json"


def machine() -> str:
    """What choices hold for: the kind of chip and the version of JAX."""
    platform, kind = current_target()
    if platform == "cpu":
        kind = f"{processor()}, {os.cpu_count()} cores"
    return f"{kind}, jax {jax.__version__}, rules {RULES}"


@functools.cache
def processor() -> str:
    """Name of this machine's processor, its architecture where the system tells no more."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform_.processor() or platform_.machine()


_RECORDED: contextvars.ContextVar[list[Problem] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Every problem that is chosen for while programs are traced within."""
    found: list[Problem] = []
    token = _RECORDED.set(found)
    try:
        yield found
    finally:
        _RECORDED.reset(token)


def record(problem: Problem) -> None:
    """Add a problem to what is being recorded, if anything is."""
    found = _RECORDED.get()
    if found is not None and isinstance(problem.rows, int):
        found.append(problem)


_INSTEAD: contextvars.ContextVar[Mapping[str, Choice] | None] = contextvars.ContextVar(
    "instead", default=None
)


@contextlib.contextmanager
def using(instead: Mapping[Problem, Choice]) -> Iterator[None]:
    """Programs traced within take these choices, and the rules for all else, not the file.

    A choice must be one of its problem's `candidates`.
    """
    token = _INSTEAD.set({problem.name(): one for problem, one in instead.items()})
    try:
        yield
    finally:
        _INSTEAD.reset(token)


_read: tuple[tuple[str, int, int] | None, dict[str, Any]] = (None, {})


def choice(problem: Problem) -> Choice | None:
    """What was measured to be fastest for a problem on this machine; None if nothing was."""
    instead = _INSTEAD.get()
    if instead is not None:
        return instead.get(problem.name())
    if not isinstance(problem.rows, int):
        return None
    found = choices().get(problem.name())
    if not isinstance(found, dict):
        return None
    blocks = found.get("blocks")
    kept = Choice(found.get("implementation", ""), tuple(blocks) if type(blocks) is list else None)
    # Blocks that somebody wrote by hand could leave out a part of the result.
    return kept if kept in candidates(problem) else None


def choices() -> dict[str, Any]:
    """The file's choices for this machine, by the names of problems."""
    return _of_this_machine(_file())


def _of_this_machine(known: Mapping[str, Any]) -> dict[str, Any]:
    found = known.get(machine(), {})
    return found if isinstance(found, dict) else {}


def keep(measured: Mapping[Problem, Choice]) -> Path:
    """Write choices for this machine into the file, beside what it has."""
    mine = {problem.name(): one._asdict() for problem, one in measured.items()}
    check_writable()
    file = path()
    with _only_one(file):
        known = dict(_file())
        known[machine()] = choices() | mine
        # Nobody else is at it: what is there of this name was left by a process that was killed.
        for left in file.parent.glob(f".{file.stem}-*.tmp"):
            left.unlink(missing_ok=True)
        new = file.with_name(f".{file.stem}-{os.getpid()}.tmp")
        try:
            with open(new, "w", encoding="utf-8") as text:
                json.dump(known, text, indent=1, sort_keys=True)
                text.flush()
                os.fsync(text.fileno())
            os.replace(new, file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    return file


@contextlib.contextmanager
def _only_one(file: Path) -> Iterator[None]:
    """One process at a time, so that two that tune at once keep the choices of both.

    The lock ends with the process; its file stays. Where there are no such locks, the last wins.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(file.with_name(f".{file.stem}.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_writable() -> None:
    """Raises `OSError` if `keep` could not write: to be known before an hour of measuring."""
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path().parent):
        pass


def _file() -> dict[str, Any]:
    """The file's contents, read again where it has changed; nothing if it cannot be read."""
    global _read
    file = path()
    try:
        status = file.stat()
        version = (str(file), status.st_mtime_ns, status.st_ino)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return {}
        known = _read
        if known[0] != version:
            known = _read = (version, _parsed(file))
    except OSError:
        return {}
    return known[1]


def _parsed(file: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it can, and is not what `keep` writes.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} must be the JSON that `qjax tune` writes: {error}. Delete it, and tune again."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} must hold a mapping, as `qjax tune` writes it; got {type(found).__name__}. "
            "Delete it, and tune again."
        )
    return found


def candidates(problem: Problem) -> list[Choice]:
    """Everything worth a try on the device that programs are traced for, XLA by its rule first.

    On a CPU no piece of weights that are unpacked is larger than twice the rule's, but for small
    ones: without the loop over pieces a model would hold all its weights unpacked at once.
    """
    found = [Choice("xla")]
    if current_target().platform == "cpu":
        found += _pieces(problem)
    if why_not("tpu", problem) is None:
        found += _for_tpu(problem)
    if why_not("hopper", problem) is None:
        found += _for_hopper(problem)
    return found


def _pieces(problem: Problem) -> list[Choice]:
    rows, size, columns, groups, fmt, *_ = problem
    wider = fmt.widens or groups > 1 or not problem.codes
    pieces = [columns, *(n for n in PIECES if n < columns)]
    if wider and size * columns > SMALL_VALUES:
        pieces = [n for n in pieces if n < columns and n * size <= 2 * PIECE_VALUES]
    return [Choice("xla", (piece,)) for piece in pieces if wider or rows * columns > 2**18]


def _for_tpu(problem: Problem) -> list[Choice]:
    rows, size, columns, groups, fmt, dtype, *_ = problem
    itemsize = jnp.dtype(dtype).itemsize
    own = tiles_tpu.choose_blocks(rows, size, columns, groups=groups, fmt=fmt, itemsize=itemsize)
    assert own is not None  # what `why_not` is for
    found = [Choice("tpu")]
    for m in (n for n in TPU_ROWS if n <= max(rows, TPU_ROWS[0])):
        for n in (n for n in TPU_COLUMNS if n <= max(columns, TPU_COLUMNS[0])):
            blocks = tiles_tpu.Blocks(min(m, rows), n, own.k)
            if blocks != own and tiles_tpu.fits(blocks, fmt, itemsize):
                found.append(Choice("tpu", tuple(blocks)))
    return found


def _for_hopper(problem: Problem) -> list[Choice]:
    rows, size, columns, groups, fmt, *_ = problem
    if not problem.codes:
        own_cut = weight_matmul_hopper.choose_cut(size, columns, fmt)
        cuts = weight_matmul_hopper.cuts(size, fmt)
        return [Choice("hopper"), *(Choice("hopper", tuple(c)) for c in cuts if c != own_cut)]
    group = size // groups if groups > 1 else None
    sizes = {"group": group, "itemsize": jnp.dtype(problem.out).itemsize}
    tiles = quant_matmul_hopper.tiles(rows, size, columns, **sizes)
    own = quant_matmul_hopper.choose_tile(rows, size, columns, **sizes)
    return [Choice("hopper"), *(Choice("hopper", tuple(t)) for t in tiles if t != own)]
