"""The documentation: what it links to and names exists, what it shows runs."""

import ast
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

import qjax
from qjax import cli
from qjax.cli_options import resolve

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
PAGES += sorted((REPOSITORY / "colab").glob("*.md"))
# Pages whose blocks of Python follow one another, in one interpreter.
RUN = [DOCS / "quickstart.md", DOCS / "concepts.md", *sorted((DOCS / "howto").glob("*.md"))]
# A block that takes long is below a comment that does not show.
BLOCK = re.compile(r"^(<!-- slow -->\n)?```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)```.*?^\1```$", flags=re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What `#...` may stand behind a link to a page: its headings, as the hosting sites spell them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(path), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        twins = [known for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known)]
        found.add(f"{slug}-{len(twins)}" if twins else slug)
    return found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(path):
    broken = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", prose(path)):
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert broken == []


def exists(name: str) -> bool:
    """Whether `qjax.module.Class.method` is there, submodules imported on the way."""
    target, path = qjax, "qjax"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(target, part):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                return False
        target = getattr(target, part)
    return True


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_full_names_in_the_text_are_of_things_that_exist(path):
    named = set(re.findall(r"`(qjax(?:\.\w+)+)(?:\([^`]*)?`", prose(path))) - {"qjax.json"}
    assert sorted(name for name in named if not exists(name)) == []


def test_a_name_that_does_not_exist_would_be_found():
    assert exists("qjax.calibrate.gptq.gptq") and exists("qjax.Pipeline.save")
    assert not exists("qjax.calibrate.gptq.no_such_function") and not exists("qjax.nothing")


def test_every_method_page_maps_equations_to_functions_that_the_reference_has():
    reference = {
        module
        for page in (DOCS / "api").glob("*.md")
        for module in re.findall(r"automodule:: (\S+)", page.read_text())
    }
    methods = prose(DOCS / "methods.md")
    for heading in ("AdaRound", "LSQ", "GPTQ", "Serial to parallel", "Q-DiT", "PTQD"):
        section = methods.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        named = re.findall(r"`(qjax(?:\.\w+)+)", section)
        assert len(named) >= 4, heading
        for name in named:
            modules = {name.rsplit(".", depth)[0] for depth in range(3)}
            assert modules & reference, f"{name} is in no page of docs/api"


@pytest.mark.parametrize(("package", "page"), [(qjax, "front"), (qjax.calibrate, "calibrate")])
def test_the_reference_names_what_a_package_exports(package, page):
    tree = ast.parse(Path(package.__file__).read_text())
    found = [name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    named = set(re.findall(r"`(?:qjax\.)?(\w+)`", (DOCS / "api" / f"{page}.md").read_text()))
    assert {name.asname for name in found if name.asname[0] != "_"} - named == set()


@pytest.mark.parametrize(
    "module",
    sorted(
        module
        for page in (DOCS / "api").glob("*.md")
        for module in re.findall(r"automodule:: (\S+)", page.read_text())
    ),
)
def test_modules_of_the_reference_can_be_imported(module):
    importlib.import_module(module)


def shell_lines(text: str) -> list[str]:
    """The `qjax ...` lines of the shell blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if "qjax " in part]


COMMANDS = [
    (name_of(path), line)
    for path in PAGES
    for line in shell_lines(path.read_text(encoding="utf-8"))
    if line.startswith("qjax ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_are_understood(page, line):
    parse(line)


def parse(line: str):
    """The settings of a line, by the parser that `qjax` itself has."""
    words = shlex.split(line, comments=True)[1:]
    flags, rest = cli._parser().parse_known_args(words)
    (command,) = (command for command in cli.COMMANDS if command.name == flags.command)
    return resolve(command, flags, rest, None)


@pytest.mark.parametrize(
    "line",
    ["qjax plan", "qjax plan M --recipe w5a5", "qjax generate M --no-such 1", "qjax nothing"],
)
def test_a_command_line_that_is_wrong_would_be_found(line):
    with pytest.raises(ValueError):
        parse(line)


def options(line: str) -> tuple[list[str], str | None]:
    """What a command is given without a name, and its --out."""
    words = shlex.split(line.replace("--out=", "--out "), comments=True)
    out = words[words.index("--out") + 1] if "--out" in words else None
    first = next((i for i, word in enumerate(words) if word[0] == "-"), len(words))
    return [word for word in words[2:first] if "=" not in word], out


def written_by_python(text: str) -> list[str]:
    """The folders that a page's Python writes: once for each run, and once for all saves.

    A save replaces an older one.
    """
    code = "\n".join(code for _, code in BLOCK.findall(text))
    saves, runs = set(), []
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        given = (
            call.args[:1] if name == "save" else [k.value for k in call.keywords if k.arg == "out"]
        )
        place = [one.value for one in given if isinstance(one, ast.Constant)]
        saves.update(place if name == "save" else ())
        runs += place if name in ("run", "evaluate") else ()
    return [*saves, *runs]


def written(text: str) -> list[str]:
    """And those that its commands write."""
    command = re.compile(r"qjax (quantize|calibrate|eval|convert) ")
    outs = [options(line)[1] for line in shell_lines(text) if command.match(line)]
    return [*written_by_python(text), *(out for out in outs if out)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_that_is_followed_writes_no_folder_twice(path):
    """A second run is refused, by a model that is there or as another run's folder."""
    found = [one for one in written(path.read_text(encoding="utf-8")) if one != "DIR"]
    assert sorted(found) == sorted(set(found))


TWICE = """
```python
pipe.save("a")
pipe.save("a")
qjax.calibrate.run(
    pipe, recipe,
    out="b",
)
qjax.evaluate(pipe, out="c")
```

```sh
qjax eval M --out "b" --steps 3
qjax quantize M --recipe w4a8 --out=c
```
"""


def test_a_folder_that_is_written_twice_would_be_found():
    assert sorted(written(TWICE)) == ["a", "b", "b", "c", "c"]


# Of whom models on the hub are, or of nobody: what begins so is not made on the page.
ELSEWHERE = {"somebody", "facebook", "gs:"}
TAKE_A_MODEL = re.compile(r"qjax (quantize|calibrate|generate|compare|eval|inspect|push|bench) ")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_models_that_commands_take_are_the_readers_or_shipped_or_made_on_the_page(path):
    """Those in capitals are the reader's. What commands make stands before; Python, anywhere."""
    text = path.read_text(encoding="utf-8")
    known = {*qjax.zoo_names(), *ELSEWHERE, *written_by_python(text)}
    for line in shell_lines(text):
        words, out = options(line)
        models = words[: 2 if line.startswith("qjax compare") else 1]
        for model in models if TAKE_A_MODEL.match(line) else ():
            assert model.isupper() or model.partition("/")[0] in known, line
        known |= {out} - {None}


def script(path: Path, *, slow: bool) -> str:
    """The Python of a page, every line where it is in the page: errors name that line."""
    text = path.read_text(encoding="utf-8")
    out = [""] * text.count("\n")
    for match in BLOCK.finditer(text):
        if slow or not match[1]:
            first = text[: match.start(2)].count("\n")
            out[first : first + match[2].count("\n")] = match[2].splitlines()
    return "\n".join(out)


def run_page(path: Path, folder: Path, *, slow: bool) -> None:
    file = folder / f"{path.stem}_page.py"
    file.write_text(script(path, slow=slow), encoding="utf-8")
    runpy.run_path(str(file), run_name=path.stem)


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_the_python_of_a_page_runs(path, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert script(path, slow=False).strip()
    run_page(path, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in RUN if "<!-- slow -->" in path.read_text()], ids=name_of
)
def test_all_the_python_of_a_page_runs(path, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    run_page(path, tmp_path, slow=True)


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL)
    patterns = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    listed = {page for pattern in patterns for page in DOCS.glob(f"{pattern}.md")}
    assert {page for page in PAGES if page.is_relative_to(DOCS)} - listed == {DOCS / "index.md"}
