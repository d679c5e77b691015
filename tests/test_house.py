"""The house itself: packages, import directions, docstrings and their examples, the README."""

import ast
import doctest
import importlib
import importlib.metadata
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
README = (REPOSITORY / "README.md").read_text()

# The top-level folders and what they are imported as.
FOLDERS = {"qjax": "qjax"} | {path: name for name, path in SETUPTOOLS["package-dir"].items()}

# Imports point down: a module imports from its own floor and from those below. The first
# prefix that fits decides. At the bottom are names without code that every floor shares.
FLOORS = {
    "qjax.core.typing": 0,
    "qjax._version": 0,
    "qjax.kernels": 1,
    "qjax.core": 2,
    "qjax.models": 3,
    "qjax.calibrate": 4,
    "qjax": 5,
    "tests": 6,
}

NEEDED_ONLY_INSIDE_FUNCTIONS = ("diffusers", "transformers", "torch", "matplotlib")


def module_name(path: Path) -> str:
    """The name a file of the library is imported by."""
    top, *rest = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join([FOLDERS[top], *rest]).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for folder in FOLDERS
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).rstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def floor_of(name: str) -> int:
    fits = [f for f in FLOORS if name == f or name.startswith(f"{f}.")]
    return FLOORS[fits[0]]


def test_the_list_of_packages_is_that_of_the_folders():
    found = {
        name.rpartition(".")[0] if path.name != "__init__.py" else name
        for name, path in MODULES.items()
    }
    assert sorted(found) == sorted(SETUPTOOLS["packages"])


def test_every_package_has_an_init_file():
    """Without one the folder is a namespace package, which wheels and type checkers lose."""
    missing = [
        path.parent for path in MODULES.values() if not (path.parent / "__init__.py").exists()
    ]
    assert missing == []


def test_every_file_of_the_packages_gets_into_the_wheel():
    patterns = SETUPTOOLS["package-data"]
    lost = []
    for folder, package in FOLDERS.items():
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            inside = path.relative_to(REPOSITORY / folder)
            names = [(package, inside.as_posix())]
            if len(inside.parts) > 1:
                names.append((f"{package}.{inside.parts[0]}", Path(*inside.parts[1:]).as_posix()))
            if not any(
                fnmatch(name, pattern.removeprefix("**/"))
                for owner, name in names
                for pattern in [*patterns["*"], *patterns.get(owner, [])]
            ):
                lost.append(str(path.relative_to(REPOSITORY)))
    assert lost == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    upwards = [
        f"line {line}: {target}"
        for line, target in imports(parse(MODULES[name]), package)
        if target.split(".")[0] in ("qjax", "tests") and floor_of(target) > floor_of(name)
    ]
    assert upwards == []


def python_files() -> list[Path]:
    folders = [*FOLDERS, "tests", "benchmarks", "scripts", "colab"]
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def test_nobody_imports_a_top_level_folder_by_its_own_name():
    """`import models` works at the repository's root, and makes a second copy of every class."""
    second_names = FOLDERS.keys() - {"qjax"}
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {target}"
        for path in python_files()
        for line, target in imports(parse(path), "")
        if target.split(".")[0] in second_names
    ]
    assert wrong == []


def test_importing_the_whole_library_needs_no_heavy_third_party():
    lines = [
        "import importlib, sys",
        f"for name in {sorted(set(MODULES) - {'qjax.__main__'})!r}:",
        "    importlib.import_module(name)",
        f"print([n for n in {NEEDED_ONLY_INSIDE_FUNCTIONS!r} if n in sys.modules])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of those classes."""
    public = [node for node in tree.body if is_public(node)]
    yield from public
    for node in public:
        if isinstance(node, ast.ClassDef):
            yield from (method for method in node.body if is_public(method))


def is_public(node: ast.AST) -> bool:
    """Whether `node` defines a name for callers; a setter shares its getter's docstring."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return False
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return node.name != "setup" and not any(text.endswith(".setter") for text in decorators)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("_version")])
def test_every_public_name_has_a_docstring(name):
    tree = parse(MODULES[name])
    empty = not tree.body
    without = [
        f"line {node.lineno}: {node.name}"
        for node in public_definitions(tree)
        if ast.get_docstring(node) is None and not is_only_a_signature(node)
    ]
    assert (empty or ast.get_docstring(tree) is not None, without) == (True, [])


def is_only_a_signature(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether this is an overload, or an attribute that a protocol asks for."""
    body = node.body
    return len(body) == 1 and isinstance(body[0], ast.Expr) and ast.unparse(body[0]) == "..."


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if ">>>" in path.read_text()])
def test_examples_in_docstrings_are_true(name):
    module = importlib.import_module(name)
    # The examples read as if written below `import jax, jax.numpy as jnp, numpy as np, qjax`.
    shared = {"jax": jax, "jnp": jnp, "np": np, "qjax": qjax}
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        module, name, globs={**shared, **vars(module)}
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize("name", MODULES)
def test_nothing_that_is_read_can_run_code(name):
    """What SECURITY.md promises."""
    calls = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "torch.load"}
    found = [
        f"line {line}: {target}"
        for line, target in imports(parse(MODULES[name]), name)
        if target.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    ]
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            pickled = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            # The restricted reader, in the one place that runs in another process.
            safe = name == "qjax.models.pickles" and "weights_only=True" in ast.unparse(node)
            if (called in calls and not safe) or pickled:
                found.append(f"line {node.lineno}: {called}")
    assert found == []


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language and body of the fenced blocks of a Markdown text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_readme_sets_up_and_runs_in_one_line():
    assert code_blocks(section("Run it"))[0][1] == "pip install . && qjax demo\n"


def test_the_readme_tests_in_one_line():
    assert code_blocks(section("Test it"))[0][1] == 'pip install -e ".[test]" && pytest\n'


def test_the_commands_in_the_readme_exist(capsys):
    assert PYPROJECT["project"]["scripts"]["qjax"] == "qjax.cli:main"
    from qjax.cli import main

    commands = {
        shlex.split(line)[1]
        for language, body in code_blocks(README)
        if language in ("", "sh", "bash")
        for line in re.findall(r"\bqjax \w[^&|]*", body)
    }
    assert {"demo", "plan"} <= commands
    for command in sorted(commands):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0, command
        assert command in capsys.readouterr().out


def test_the_python_in_the_readme_parses_and_names_what_exists():
    blocks = [body for language, body in code_blocks(README) if language == "python"]
    assert blocks
    for body in blocks:
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("qjax."):
                target = qjax
                for part in ast.unparse(node).split(".")[1:]:
                    target = getattr(target, part)


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (language, body), *_ = code_blocks(section("Ten lines"))
    assert language == "python"
    (tmp_path / "ten_lines.py").write_text(body)
    runpy.run_path("ten_lines.py")
    assert (tmp_path / "report.html").stat().st_size > 0


def documents() -> list[Path]:
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_links_between_documents_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text())
    broken = [link for link in links if not (path.parent / link).exists()]
    assert broken == []


def text_files() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository, caches and build outputs left out."""
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = [
            name
            for name in folders
            if name in (".ci", ".github")
            or not (name.startswith(".") or name.endswith(".egg-info"))
            and name not in ("__pycache__", "build", "dist", "runs", "qjax-demo", "shared", "site")
        ]
        for name in names:
            path = Path(folder, name)
            if name == ".git":  # of a second working tree, a file that says where the first is
                continue
            if path.suffix in (".safetensors", ".png", ".npz", ".pyc"):
                continue
            yield path, path.read_text(encoding="utf-8")


def test_no_file_knows_the_machine_it_was_written_on():
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt/venvs)/|[A-Z]:\\Users")
    found = [
        f"{path.relative_to(REPOSITORY)}: {match.group()}"
        for path, text in text_files()
        if path != Path(__file__)
        for match in [home.search(text)]
        if match
    ]
    assert found == []


def test_nobody_is_told_to_install_the_strangers_package():
    """The name `qjax` on PyPI belongs to an unrelated project."""
    install = re.compile(
        r"(?:pip3?|pipx|uv|conda)\s+(?:install|add)\s+(?:-\S+\s+)*[\"']?qjax(?![\w-])"
    )
    named = re.compile(r"(?i)never|not\b|unrelated|stranger")
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for path, text in text_files()
        if path != Path(__file__)
        for line in text.splitlines()
        if install.search(line) and not named.search(line)
    ]
    assert found == []


def test_the_version_is_written_in_one_place():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "qjax._version.__version__"}
    written = [name for name, path in MODULES.items() if "__version__ =" in path.read_text()]
    assert written == ["qjax._version"]
    assert qjax.__version__ == importlib.metadata.version(PYPROJECT["project"]["name"])


def test_the_tables_of_the_readme_are_those_of_the_results(tmp_path):
    """`python scripts/measured_tables.py` writes them; a result file that changes shows."""
    check = [sys.executable, str(REPOSITORY / "scripts" / "measured_tables.py"), "--check"]
    subprocess.run(check, check=True)
    copy = tmp_path / "repository"
    for folder in ("scripts", "benchmarks/results"):
        shutil.copytree(REPOSITORY / folder, copy / folder)
    (copy / "docs").mkdir()
    shutil.copy(REPOSITORY / "docs" / "benchmarks.md", copy / "docs")
    readme = README
    (copy / "README.md").write_text(readme.replace("| Stable Diffusion v1-4 | 1719", "| no | 1"))
    check[1] = str(copy / "scripts" / "measured_tables.py")
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "not those of benchmarks/results" in done.stderr
    subprocess.run(check[:2], check=True)
    assert (copy / "README.md").read_text() == readme
