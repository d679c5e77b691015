"""Settings of the site: `sphinx-build -W -b html docs BUILD`, from the root of the repository.

Pages are Markdown that reads as well where it lies; the site adds the reference, made of the
docstrings, and turns every `qjax.module.name` of the text into a link there.
"""

import importlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import qjax

project = "qjax"
copyright = "The qjax authors"
release = version = qjax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["logs", "_build"]

html_theme = "furo"
html_title = f"qjax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}

# Links of the kind `page.md#a-heading` lead to headings down to this depth.
myst_heading_anchors = 4

# In docstrings single backticks are code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Pages whose text stands elsewhere in the repository.
COPIES = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "notebooks": "colab/README.md",
}
# A link to a file: the words in brackets, its path, and what follows a `#`.
LINK = re.compile(r"(\[[^\]]*\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Characters of code that are kept in one line.
SHORT = 24
NAME = re.compile(r"(qjax(?:\.\w+)+)(?:\(.*\))?")
# Code between backticks, which keeps its characters; and what means something to reST outside.
CODE_OR_MARK = re.compile(r"(`[^`]*`|^ *\* )|([|*])|(?<=\w)(_)(?=[\s.,;:)]|$)", flags=re.MULTILINE)


def resolve(name: str) -> Any:
    """What `qjax.module.name` or `qjax.module.Class.method` is.

    Raises:
      AttributeError: If there is no such thing.
    """
    target: Any = qjax
    path = "qjax"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(target, part):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                raise AttributeError(f"there is no {path}") from None
        target = getattr(target, part)
    return target


def documented_name(name: str) -> str:
    """The name under which the reference has what `name` is: that of the module defining it."""
    target = resolve(name)
    short = getattr(target, "__name__", "")
    if callable(target) and not isinstance(target, type) and getattr(qjax, short, None) is target:
        return f"qjax.{short}"
    if hasattr(target, "__qualname__") and hasattr(target, "__module__"):
        return f"{target.__module__}.{target.__qualname__}"
    return name


class MarkShortCode(SphinxTransform):
    """Marks code that fits into a line even on a phone, for the style sheet."""

    default_priority = 390

    def apply(self, **kwargs: Any) -> None:
        for literal in self.document.findall(nodes.literal):
            if len(literal.astext()) <= SHORT:
                literal["classes"].append("short")


class LinkNames(SphinxTransform):
    """Turns code that is the full name of something in the library into a link to it."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            match = NAME.fullmatch(literal.astext())
            linked = isinstance(literal.parent, nodes.reference | pending_xref | nodes.title)
            if match is None or linked:
                continue
            try:
                target = documented_name(match[1])
            except AttributeError:  # a file's or a command's name; tests resolve those of pages
                continue
            link = pending_xref(
                "",
                literal.deepcopy(),
                refdoc=self.env.current_document.docname,
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(link)


def to_rest(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reST of a docstring: prose with code, tables and formulas as in Markdown."""
    out: list[str] = []
    for kind, group in itertools.groupby(kinds(lines), key=lambda pair: pair[0]):
        block = [line for _, line in group]
        if kind == "table":
            out += table_rows(block)
        elif kind == "formula":
            out += ["::", "", *block, ""]
        elif kind == "example":
            out += block
        else:
            out += escape("\n".join(block)).split("\n")
    if what in ("attribute", "property"):
        # An empty comment: napoleon takes what stands before a colon in the first line for a type.
        out = ["..", "", *out]
    lines[:] = out


def escape(text: str) -> str:
    """`text` with what reST takes for markup outside of code made plain."""
    escaped = CODE_OR_MARK.sub(lambda m: m[1] or f"\\{m[2] or m[3]}", text)
    # Code ends at a word's end in reST; `nnx.Param`s does not.
    return re.sub(r"(`[^`]*`)(\w?)", lambda m: m[1] + (f"\\ {m[2]}" if m[2] else ""), escaped)


def kinds(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Every line of a docstring, and whether it is text, or of an example, table or formula."""
    kind, margin, before = "text", 0, ""
    for line in lines:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            # A blank line within a formula belongs to it.
            yield kind if kind == "formula" else "text", line
        else:
            if stripped.startswith((">>>", "...")):
                kind = "example"
            elif stripped.startswith("|") and stripped.endswith("|") and stripped.count("|") > 2:
                kind = "table"
            elif kind == "formula" and indent > margin:
                pass
            elif not before and indent >= margin + 4 and margin == 0:
                kind = "formula"
            elif kind != "example" or not before:
                kind, margin = "text", indent
            yield kind, line
        before = stripped


def table_rows(lines: list[str]) -> list[str]:
    """A table of Markdown as one of reST."""
    indent = " " * (len(lines[0]) - len(lines[0].lstrip()))
    out = ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set("".join(cells)) <= {"-", ":"} and any(cells):
            continue
        for start, cell in zip(["* -", *["  -"] * len(cells)], cells, strict=False):
            out.append(f"{indent}   {start} {escape(cell)}".rstrip())
    return [*out, ""]


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """The text of a page: copies of files from elsewhere, and links that lead to pages."""
    file = ROOT / COPIES[docname] if docname in COPIES else HERE / f"{docname}.md"
    text = file.read_text(encoding="utf-8").replace("<!-- commands -->", commands_text())
    pages = {ROOT / path: HERE / f"{name}.md" for name, path in COPIES.items()}
    pages[ROOT / "README.md"] = HERE / "index.md"

    def to_page(match: re.Match[str]) -> str:
        words, target, anchor = match[1], (file.parent / match[2]).resolve(), match[3] or ""
        target = pages.get(target, target)
        if not target.is_relative_to(HERE):  # a file of the repository that is no page
            return words.strip("[]")
        return f"{words}({os.path.relpath(target, (HERE / docname).parent)}{anchor})"

    source[0] = LINK.sub(to_page, text)


def commands_text() -> str:
    """What the parser knows of the commands."""
    from qjax.cli import COMMANDS

    parts = []
    for command in COMMANDS:
        words = " ".join(name for name, _ in command.arguments)
        parts += [f"## qjax {command.name}\n", f"{command.help[0].upper()}{command.help[1:]}.\n"]
        if command.example:
            parts.append(f"```sh\n{command.example}\n```\n")
        table = [(f"`{name}`", help) for name, help in command.arguments]
        for option in command.options:
            value = "" if option.metavar is None else f" {option.metavar}"
            notes = ["needed"] if option.required else []
            if option.repeated:
                notes.append("may be given several times")
            if option.default is not None and option.metavar is not None:
                notes.append(f"default {option.default}")
            note = f" ({', '.join(notes)})" if notes else ""
            table.append((f"`--{option.name}{value}`", option.help + note))
        if command.takes_quant:
            table.append(("`quant.*=VALUE`", "changes the recipe, as `quant.weight.bits=3`"))
        if table:
            rows = [f"| {name} | {help.replace('|', '/')} |" for name, help in table]
            parts.append("\n".join([f"| {words or 'option'} | |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add what is above to Sphinx."""
    app.add_transform(MarkShortCode)
    app.add_transform(LinkNames)
    # Before napoleon, which makes lists of the sections.
    app.connect("autodoc-process-docstring", to_rest, priority=400)
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True}
