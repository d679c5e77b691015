"""The notebooks of `colab/`: as their texts say, and running from top to bottom."""

import ast
import importlib.util
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "colab"
TEXTS = sorted(FOLDER.glob("[0-9]_*.py"))
SWITCH = re.compile(r"^FULL = False$", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def notebooks():
    """The script that runs notebooks, as a module."""
    pytest.importorskip("jupytext")
    path = REPOSITORY / "scripts" / "notebooks.py"
    spec = importlib.util.spec_from_file_location("notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(text):
    """The notebook beside a text, as the JSON that it is."""
    return json.loads(text.with_suffix(".ipynb").read_text())


def source(cell):
    return "".join(cell["source"])


def code(text):
    return [source(cell) for cell in stored(text)["cells"] if cell["cell_type"] == "code"]


each = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def test_there_are_five_and_each_has_its_pair():
    assert [path.stem[0] for path in TEXTS] == list("12345")
    assert [path.with_suffix(".py") for path in sorted(FOLDER.glob("*.ipynb"))] == TEXTS


@each
def test_a_notebook_agrees_with_its_text_cell_by_cell(text, notebooks):
    made = [(cell.cell_type, cell.source) for cell in notebooks.made_of(text).cells]
    kept = [(cell["cell_type"], source(cell)) for cell in stored(text)["cells"]]
    assert kept == made, "run `python scripts/notebooks.py --write`"


@each
def test_the_outputs_of_a_notebook_came_from_its_source(text, notebooks):
    notebook, made = stored(text), notebooks.made_of(text)
    digest = notebook["metadata"]["qjax"]["source_sha256"]
    assert digest == notebooks.source_digest(made.cells)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "stream" in kinds and "error" not in kinds


def test_changed_code_is_told_from_the_code_that_ran(notebooks):
    cells = notebooks.made_of(TEXTS[0]).cells
    before = notebooks.source_digest(cells)
    last = [cell for cell in cells if cell.cell_type == "code"][-1]
    last.source += "\n"
    assert notebooks.source_digest(cells) == before
    first = next(cell for cell in cells if cell.cell_type == "code")
    first.source = first.source.replace("OWNER/qjax", "somebody/qjax")  # as in colab/README.md
    assert notebooks.source_digest(cells) == before
    last.source += "x"
    assert notebooks.source_digest(cells) != before


def test_of_notebooks_that_run_at_once_all_run_and_those_that_failed_are_named(
    notebooks, tmp_path, monkeypatch
):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys; name, option = sys.argv[1:]\n"
        "pathlib.Path(__file__).with_name(name).write_text(option)\n"
        "sys.exit(name in ('2', '4'))\n"
    )
    monkeypatch.setattr(notebooks, "__file__", str(script))
    paths = [Path(f"{i}.py") for i in range(1, 6)]
    assert notebooks.run_in_processes(paths, ["--cells"], jobs=2) == ["2", "4"]
    assert [(tmp_path / path.stem).read_text() for path in paths] == ["--cells"] * 5


def test_prose_can_change_without_a_run_and_code_cannot(notebooks, tmp_path):
    text = tmp_path / TEXTS[0].name
    words = TEXTS[0].read_text()
    text.with_suffix(".ipynb").write_text(TEXTS[0].with_suffix(".ipynb").read_text())
    text.write_text(words.replace("in five minutes", "in a few minutes"))
    notebook = notebooks.with_stored_outputs(text)
    assert "in a few minutes" in notebook.cells[0].source
    kept = [cell["outputs"] for cell in stored(text)["cells"] if cell["cell_type"] == "code"]
    assert [c.outputs for c in notebook.cells if c.cell_type == "code"] and any(kept)
    text.write_text(words.replace("FULL = False", "FULL = True"))
    with pytest.raises(ValueError, match="has changed since it ran; use --write"):
        notebooks.with_stored_outputs(text)


@each
def test_a_notebook_is_set_up_from_the_repository_and_prints_where_it_runs(text):
    first = code(text)[0]
    assert '"git", "clone"' in first and 'find_spec("qjax") is None' in first
    assert "./qjax-repository" in first
    assert {"jax.devices()", "qjax.__version__", "jax.__version__", "flax.__version__"} <= {
        ast.unparse(node) for node in ast.walk(ast.parse(first)) if isinstance(node, ast.expr)
    }


@each
def test_the_first_cell_can_run_twice_takes_an_uploaded_clone_and_asks_for_an_address(
    text, monkeypatch, tmp_path
):
    install = code(text)[0].partition("import flax")[0]
    install = re.sub(
        r'"https://github.com/.*?"', '"https://github.com/OWNER/qjax"', install, count=1
    )
    commands, file = [], tmp_path / "first.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    with pytest.raises(ValueError, match="address of your clone's origin into REPOSITORY"):
        file.write_text(install)
        runpy.run_path(str(file))
    assert commands == []
    file.write_text(install.replace("/OWNER/", "/somebody/", 1))
    runpy.run_path(str(file))
    (tmp_path / "qjax-repository").mkdir()
    runpy.run_path(str(file))
    assert [words[0] == "git" for words in commands] == [True, False, False]
    assert [words[-1] for words in commands] == ["qjax-repository", *["./qjax-repository"] * 2]


def test_all_notebooks_name_one_repository():
    named = {
        re.search(r"github\.com/([\w-]+/[\w-]+)\"|github/([\w-]+/[\w-]+)/blob", line).group(1, 2)
        for text in TEXTS
        for line in text.read_text().splitlines()
        if "colab-badge" in line or line.startswith("REPOSITORY")
    }
    assert len({one or other for one, other in named}) == 1
    for text in TEXTS:
        assert f"blob/main/colab/{text.stem}.ipynb" in text.read_text()


@each
def test_no_notebook_installs_the_strangers_package_or_knows_a_machine(text):
    for path in (text, text.with_suffix(".ipynb")):
        words = path.read_text()
        assert not re.search(r"\binstall\b[^\n]*[\s\"']qjax[\s\"'\\]", words)
        assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|content|work|opt|usr|Users)/", words)


@each
def test_one_switch_takes_the_model_of_the_hub_and_is_off(text):
    assert sum(len(SWITCH.findall(cell)) for cell in code(text)) == 1
    assert re.search(r"\bif FULL\b", "\n".join(code(text)))


@each
def test_a_notebook_says_what_a_t4_does(text):
    words = " ".join(source(cell) for cell in stored(text)["cells"])
    assert "T4" in words and "XLA path" in words


@each
def test_stored_outputs_are_small_and_without_what_a_run_adds(text):
    notebook = stored(text)
    assert set(notebook["metadata"]) == {
        *("accelerator", "colab", "jupytext", "kernelspec", "language_info", "qjax")
    }
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        for output in cell.get("outputs", ()):
            assert len(json.dumps(output)) < 200_000
            assert output.get("name") != "stderr"


@pytest.mark.slow
@each
def test_a_notebook_runs_from_top_to_bottom_without_a_network(text, notebooks, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = notebooks.execute(text)
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(map(bool, shown)) == sum(
        bool(cell["outputs"]) for cell in stored(text)["cells"] if cell["cell_type"] == "code"
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", ["1 / 0", "import sys; print('Traceback ...', file=sys.stderr)"])
def test_a_cell_that_fails_or_complains_fails_the_run(line, notebooks, tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = tmp_path / "9_broken.py"
    path.write_text(f"# %%\n{line}\n")
    with pytest.raises(Exception, match="ZeroDivisionError|wrote to stderr"):
        notebooks.execute(path)
