"""Options of the command line: declared once, read from flags, `key=value` and a file.

An option of a command is its flag (`--steps 20`), a `key=value` (`steps=20`) and a key of the
`--config` file (`steps: 20`) under one name. The command line goes before the file, the file
before the default; saying a thing twice on the command line is an error. Where a command takes
a recipe, `quant` in the file and `quant.weight.bits=3` on the command line change it.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qjax.core.places import is_remote, local_path
from qjax.core.plain_yaml import read_yaml

QUANT = "quant"
_OVERRIDE = re.compile(r"[A-Za-z][\w.-]*=")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command.

    Attributes:
      name: As on the command line, words joined with `-`.
      read: Makes a value of what YAML or the command line gives.
      help: What it does, without a full stop.
      default: Its value where nobody says anything.
      required: Whether somebody has to.
      metavar: What its value is called in the help; None for a switch.
      repeated: Whether the flag may be given several times; `read` gets a list then, and of
        what is said as `key=value` or in the file whatever that is.
    """

    name: str
    read: Callable[[Any], Any]
    help: str
    default: Any = None
    required: bool = False
    metavar: str | None = None
    repeated: bool = False

    @property
    def field(self) -> str:
        """The attribute that holds its value."""
        return self.name.replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
      name: As on the command line.
      help: What it does, without a full stop.
      run: `run(settings, output)`, which returns what `--json` prints.
      arguments: Names of what must be given, in order, with a word on each.
      options: What may be given.
      takes_quant: Whether `quant` changes its recipe.
      example: A line that can be typed.
    """

    name: str
    help: str
    run: Callable[[SimpleNamespace, Any], Mapping[str, Any]]
    arguments: tuple[tuple[str, str], ...] = ()
    options: tuple[Option, ...] = ()
    takes_quant: bool = False
    example: str = ""


def whole(least: int = 0) -> Callable[[Any], int]:
    """Reads a whole number that is at least `least`."""

    def read(value: Any) -> int:
        number = _number(value, int, "a whole number")
        if number < least:
            raise ValueError(f"must be at least {least}; got {number}")
        return number

    return read


def real(value: Any) -> float:
    """Reads a number."""
    return _number(value, float, "a number")


def _number(value: Any, kind: type, words: str) -> Any:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {words}; got {value!r}") from None


def text(value: Any) -> str:
    """Reads a text."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text; got {value!r}")
    return value


def path(value: Any) -> Path:
    """Reads a path of this machine."""
    return local_path(text(value)).expanduser()


def place(value: Any) -> Path | str:
    """Reads a path of this machine, or a place in a bucket, which stays a text."""
    return text(value) if is_remote(text(value)) else path(value)


def near_miss(word: str, words: Sequence[str]) -> str:
    """` Did you mean steps?` of a misspelt word; nothing where none is near."""
    near = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def one_of(choices: Sequence[str]) -> Callable[[Any], str]:
    """Reads one of some texts."""

    def read(value: Any) -> str:
        if value not in choices:
            hint = near_miss(str(value), choices)
            raise ValueError(
                f"must be one of {', '.join(choices)}; got {value!r}{hint and '.' + hint}"
            )
        return value

    return read


def switch(value: Any) -> bool:
    """Reads yes or no."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false; got {value!r}")
    return value


def texts(value: Any) -> list[str]:
    """Reads a list, or a text of parts between commas."""
    parts = value if isinstance(value, list) else str(value).split(",")
    found = [str(part).strip() for part in parts]
    if not all(found) or isinstance(value, bool):
        raise ValueError(f"must be names or numbers with commas between them; got {value!r}")
    return found


def files_with_scales(value: Any) -> list[tuple[Path, float]]:
    """Reads one or a list of `FILE` or `FILE:SCALE`; the scale is 1 where none is said."""
    found = []
    for one in value if isinstance(value, list) else [value]:
        name, colon, last = text(one).rpartition(":")
        try:
            scale = real(last) if colon and name else None
        except ValueError:  # a path with a colon in it
            scale = None
        found.append((path(one), 1.0) if scale is None else (path(name), scale))
    return found


def add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give `parser` the arguments and flags of `command`."""
    for name, words in command.arguments:
        parser.add_argument(name.lower(), metavar=name, help=words)
    for option in command.options:
        settings: dict[str, Any] = {"default": None, "help": _help(option), "dest": option.field}
        if option.metavar is None:
            settings |= {"action": "store_const", "const": True}
        else:
            settings |= {"metavar": option.metavar}
            settings |= {"action": "append"} if option.repeated else {}
        parser.add_argument(f"--{option.name}", **settings)


def _help(option: Option) -> str:
    words = option.help
    if option.required:
        words += " (needed)"
    elif option.default is not None and option.metavar is not None:
        words += f" (default: {option.default})"
    return words.replace("%", "%%")


def resolve(
    command: Command, flags: argparse.Namespace, rest: Sequence[str], config: Path | None
) -> SimpleNamespace:
    """The settings of a run: arguments, options, and `quant`, the changes to a recipe.

    Args:
      command: What is run.
      flags: What argparse made of the flags.
      rest: What it did not understand: the `key=value` overrides.
      config: The file, if one was named.

    Raises:
      ValueError: If an option is unknown, missing, said twice or of a wrong value.
      FileNotFoundError: If there is no such file.
    """
    options = {option.field: option for option in command.options}
    typed = {field: value for field in options if (value := getattr(flags, field)) is not None}
    quant: dict[str, Any] = {}
    filed = _read_file(config, command, options)
    _merge(quant, filed.pop(QUANT, {}))
    said: dict[str, Any] = {}
    for word in rest:
        if word.startswith("-"):
            raise ValueError(_unknown(command, word.lstrip("-").partition("=")[0]))
        if not _OVERRIDE.match(word):
            raise ValueError(f"{word!r} is too many for {command.name}; settings are key=value.")
        key, _, raw = word.partition("=")
        value = _parse(key, raw)
        field = key.replace("-", "_")
        if command.takes_quant and key.split(".")[0] == QUANT:
            _merge(said.setdefault(QUANT, {}), _nest(key, value)[QUANT], once=key)
        elif field in typed or field in said:
            raise ValueError(f"{key} is given twice on the command line.")
        elif field in options:
            said[field] = value
        else:
            raise ValueError(_unknown(command, key))
    _merge(quant, said.pop(QUANT, {}))
    given = filed | typed | said
    values: dict[str, Any] = {
        name.lower(): getattr(flags, name.lower()) for name, _ in command.arguments
    }
    for field, option in options.items():
        values[field] = _value(option, given.get(field))
    missing = [
        option.name
        for field, option in options.items()
        if option.required and values[field] is None
    ]
    if missing:
        raise ValueError(
            f"{command.name} needs {', '.join(f'--{name}' for name in missing)}"
            + (f", as in `{command.example}`." if command.example else ".")
        )
    return SimpleNamespace(**values, quant=quant)


def _value(option: Option, given: Any) -> Any:
    if given is None:
        return option.default
    try:
        return option.read(given)
    except ValueError as error:
        words = f"{option.name} {error}"
        raise ValueError(words if words.endswith("?") else f"{words}.") from None


def _read_file(
    config: Path | None, command: Command, options: Mapping[str, Option]
) -> dict[str, Any]:
    if config is None:
        return {}
    if not config.is_file():
        raise FileNotFoundError(f"There is no config file {config}.")
    data = read_yaml(config, config.read_bytes())
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{config} must hold option names and values; got {type(data).__name__}.")
    found = {}
    for key, value in data.items():
        field = str(key).replace("-", "_")
        if field == QUANT and command.takes_quant:
            if not isinstance(value, dict):
                raise ValueError(
                    f"{QUANT} in {config} must hold fields of a QuantConfig; got {value!r}."
                )
        elif field not in options:
            raise ValueError(f"{config}: {_unknown(command, str(key))}")
        found[field] = value
    return found


def _parse(key: str, raw: str) -> Any:
    try:
        return read_yaml(key, raw)
    except ValueError as error:
        raise ValueError(f"{key}={raw} is not understood: {_one_line(error)}.") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown(command: Command, key: str) -> str:
    names = [option.name for option in command.options]
    if command.takes_quant:
        names.append(f"{QUANT}.*")
    hint = near_miss(key, names)
    return f"{command.name} has no option {key!r}; it has {', '.join(names) or 'none'}.{hint}"


def _nest(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` of `"a.b"`."""
    *parents, name = key.split(".")
    if not all((*parents, name)):
        raise ValueError(
            f"{key!r} must be names with dots between them, such as quant.weight.bits."
        )
    nested = {name: value}
    for parent in reversed(parents):
        nested = {parent: nested}
    return nested


def _merge(into: dict[str, Any], new: Any, *, once: str = "") -> None:
    """Put `new` into `into`, mappings within mappings; `once` names what must not be there."""
    if not isinstance(new, Mapping):
        raise ValueError(f"{QUANT} must hold fields, as in quant.weight.bits=3; got {new!r}.")
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, once=once)
        elif once and key in into:
            raise ValueError(f"{once} is given twice on the command line.")
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def apply_quant(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A QuantConfig's dict with changes: fields replace fields, new rules go before the old.

    A field set to null goes back to its default.
    """
    merged: dict[str, Any] = {}
    _merge(merged, base)
    for key, value in changes.items():
        if key == "rules":
            rules = value if isinstance(value, list) else [value]
            merged[key] = [*rules, *merged.get(key, [])]
        else:
            _merge(merged, {key: value})
    return {key: value for key, value in merged.items() if value is not None}
