"""Strict dtype promotion and one thread of torch for every test, and what several files use."""

import importlib.metadata
import os
import tempfile

# torch reads it when it is imported. Its networks here are tiny: threads that wait for one
# another take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# To fuse loops takes XLA:CPU most of the time of a compilation. Later ones cannot be told, and
# end the process if they are.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# What `qjax tune` found on this machine has no part in tests.
os.environ["QJAX_CACHE"] = os.path.join(tempfile.gettempdir(), "qjax-tests-without-tuning")

import collections
import fnmatch
import gc
import itertools
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from huggingface_hub.utils import filter_repo_objects

jax.config.update("jax_numpy_dtype_promotion", "strict")
pytest.register_assert_rewrite("parity")


FILES, TESTS = itertools.count(), itertools.count()


@pytest.fixture(autouse=True, scope="module")
def few_collections():
    """What is imported and compiled by now stays: looking for garbage in it takes long.

    Some of it becomes garbage later, which every tenth file takes away.
    """
    if next(FILES) % 10 == 9:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def few_programs():
    """A process of tests compiles thousands of programs; looked at after every 20th."""
    yield
    if next(TESTS) % 20 == 0 and "qjax.calibrate" in sys.modules:
        from qjax.calibrate.programs import drop_programs

        if drop_programs():
            gc.unfreeze()
            gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Cases that a test's `quick_cases` do not name are slow."""
    quick = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("quick_cases"):
            named = any(fnmatch.fnmatchcase(item.callspec.id, case) for case in mark.args)
            quick[item.nodeid.partition("[")[0]] += named
            if not named:
                item.add_marker(pytest.mark.slow)
    lost = [test for test, count in quick.items() if not count]
    if lost and not any("::" in word for word in config.args):
        raise pytest.UsageError(f"quick_cases name no case of {', '.join(lost)}")


def pytest_sessionfinish():
    """Other plugins look at who refers to what, which frozen objects do not tell."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter):
    """Says what could not be tested on this machine, which a count of skips hides."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)}
    for reason in sorted(reasons):
        if "NOT TESTED" in reason:
            terminalreporter.write_line(reason.removeprefix("Skipped: "))


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Programs are compiled in less than half the time, and run more slowly.

    Not in files marked `optimized`: what they look at is made by the compiler's passes, or numbers
    of two programs must have equal bits.
    """
    quick = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class PodJobs:
    """Jobs of several processes that meet over loopback, in `tests/calibrate/pod_job.py`."""

    @staticmethod
    def free_port() -> int:
        """A port that nothing listens on."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return one.getsockname()[1]

    def begin(self, log, *words, processes=1, env=None, disk=None):
        """The processes of a job, started; what they say goes to the end of `log`.

        `disk()` is a folder for each of them, where they are and have what is temporary.
        """
        others = [self.free_port(), processes] if processes > 1 else []
        job = Path(__file__).with_name("calibrate") / "pod_job.py"
        begun = []
        for process in range(processes):
            here = disk() if disk else None
            temporary = {"TMPDIR": str(here)} if here else {}
            line = [sys.executable, job, *words, *others, *([process] if others else [])]
            with open(log, "ab") as end:
                begun.append(
                    subprocess.Popen(
                        list(map(str, line)),
                        stdout=end,
                        stderr=end,
                        cwd=here,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {}) | temporary,
                    )
                )
        return begun

    @staticmethod
    def wait(jobs, seconds=900):
        """Their exit statuses; none is left behind."""
        end = time.monotonic() + seconds
        try:
            return [job.wait(max(end - time.monotonic(), 1)) for job in jobs]
        finally:
            PodJobs.kill(*jobs)

    @staticmethod
    def until(there, jobs, seconds=600):
        """Wait for what running processes make."""
        end = time.monotonic() + seconds
        try:
            while not there():
                assert time.monotonic() < end, "the job did not come so far"
                assert all(job.poll() is None for job in jobs), "the job ended before"
                time.sleep(0.05)
        except BaseException:
            PodJobs.kill(*jobs)
            raise

    @staticmethod
    def kill(*jobs):
        """End them at once, in this order."""
        for job in jobs:
            job.kill()
            job.wait()


@pytest.fixture(scope="session")
def pod_jobs():
    """Starts processes of a job and waits for them."""
    return PodJobs()


@pytest.fixture
def run(capsys):
    """Runs a command line; gives exit status, stdout and stderr."""

    from qjax import cli

    def run(*words):
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


class Hub:
    """The hub, in a folder: repositories by id and revision, and what it was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.error = folder, [], None

    def files(self, repository: str, revision: str | None = None) -> Path:
        return self.folder / "repositories" / repository / (revision or "main")

    def branches(self, repository: str) -> list[str]:
        folder = self.folder / "repositories" / repository
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def create_repo(self, repository, *, private, exist_ok):
        self._note("create_repo", repository=repository, private=private)
        assert exist_ok

    def create_branch(self, repository, *, branch, exist_ok):
        self._note("create_branch", repository=repository, branch=branch)
        assert exist_ok

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, revision, commit_message):
        there = sorted(p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*.*"))
        names = list(filter_repo_objects(there, allow_patterns=allow_patterns))
        self._note("upload_folder", names=names, revision=revision, message=commit_message)
        for name in names:
            place = self.files(repo_id, revision) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder_path / name, place)
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/1")

    def snapshot_download(self, repository, *, revision=None, allow_patterns, token=None):
        self._note("snapshot_download", revision=revision, patterns=allow_patterns)
        # A branch and the one commit on it, which is a name of its own.
        commits = {f"{sum(map(ord, name)):040x}": name for name in self.branches(repository)}
        branch = commits.get(revision, revision or "main")
        commit = f"{sum(map(ord, branch)):040x}"
        source = self.files(repository, branch)
        if not source.is_dir():
            raise OSError(f"404 Client Error.\nRepository {repository} not found")
        there = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        cached = self.folder / "cache" / repository / commit
        for name in filter_repo_objects(there, allow_patterns=allow_patterns):
            (cached / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, cached / name)
        cached.mkdir(parents=True, exist_ok=True)
        return str(cached)

    def asked(self, name: str) -> list[dict]:
        return [words for call, words in self.calls if call == name]

    def _note(self, call: str, **words) -> None:
        self.calls.append((call, words))
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """The functions of huggingface_hub that the library calls, on a folder instead of a network."""
    fake = Hub(tmp_path_factory.mktemp("hub"))

    def api(*, token=None):
        fake.calls.append(("HfApi", {"token": token}))
        return fake

    monkeypatch.setattr("huggingface_hub.HfApi", api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


class Buckets:
    """All buckets of `gs://`, as folders of this machine.

    Attributes:
      root: Where they are.
      changes: Names of what was put or deleted so far, in order.
      dies_at: The number of the change at which whoever makes it dies, as does all after it.
    """

    def __init__(self, root):
        self.root, self.changes, self.dies_at = root, [], None

    def change(self, what, path):
        """Note a change, or die instead."""
        if self.dies_at is not None and len(self.changes) >= self.dies_at:
            raise Killed(f"{what} {path}")
        self.changes.append(f"{what} {path.rsplit('/', 1)[-1]}")


class Killed(BaseException):
    """The process has come to its end, whatever it was about to do."""


@pytest.fixture
def buckets(tmp_path_factory, monkeypatch):
    """What fsspec has for `gs://` in place of a network: a local folder that can fail."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    here = Buckets(tmp_path_factory.mktemp("buckets"))

    class LocalBuckets(DirFileSystem):
        protocol, cachable = "gs", False

        def __init__(self, **_):
            super().__init__(path=str(here.root), fs=LocalFileSystem(auto_mkdir=True))

        def put_file(self, lpath, rpath, **kwargs):
            here.change("put", rpath)
            super().put_file(lpath, rpath, **kwargs)

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            if mode == "create" and self.exists(path):
                raise FileExistsError(path)
            here.change("put", path)
            (here.root / path).parent.mkdir(parents=True, exist_ok=True)
            super().pipe_file(path, value, **kwargs)

        def rm_file(self, path):
            here.change("delete", path)
            super().rm_file(path)

    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "gs", LocalBuckets)
    here.Killed = Killed
    return here


@pytest.fixture(scope="session")
def products():
    """`products(function, *args)`: the matmuls and convolutions of a program, counted."""

    def products(function, *args):
        """Every dot and convolution of a program, inner ones too: (name, dtypes in and out)."""
        found = collections.Counter()

        def walk(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                    dtypes = (*(v.aval.dtype for v in eqn.invars), eqn.outvars[0].aval.dtype)
                    found[eqn.primitive.name, tuple(map(str, dtypes))] += 1
                for value in jax.tree.leaves(
                    list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
                ):
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        walk(inner)

        walk(jax.make_jaxpr(function)(*args).jaxpr)
        return found

    return products


@pytest.fixture(scope="module")
def standard_promotion():
    """optax adds floats and int32 counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
