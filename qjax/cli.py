"""The command line: `qjax COMMAND ...`, a thin skin over the library.

    qjax demo                                   see it work on the shipped models
    qjax quantize fashion-dit --recipe w4a8 --out fashion-dit-w4a8
    qjax compare fashion-dit fashion-dit-w4a8 --out report.html

Exit status: 0 done; 2 bad input, said in one line on stderr; 130 interrupted; 1 for `doctor`
where something is wrong.
"""

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from qjax import (
    cli_calibrate,
    cli_convert,
    cli_demo,
    cli_evaluate,
    cli_machine,
    cli_models,
    cli_pictures,
)
from qjax._version import __version__
from qjax.cli_options import Command, add_options, near_miss, resolve
from qjax.cli_output import Output
from qjax.core.places import local_path

COMMANDS: tuple[Command, ...] = (
    *cli_demo.COMMANDS,
    *cli_models.COMMANDS,
    *cli_calibrate.COMMANDS,
    *cli_pictures.COMMANDS,
    *cli_evaluate.COMMANDS,
    *cli_machine.COMMANDS,
    *cli_convert.COMMANDS,
)

# What the library raises where the input is wrong.
BAD_INPUT = (ValueError, TypeError, NotImplementedError, OSError, OverflowError)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are exceptions, so that they are worded in one place."""

    def error(self, message: str):
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if wrong:
            names = [command.name for command in COMMANDS]
            raise ValueError(
                f"there is no command {wrong[1]!r}; there are {', '.join(names)}."
                f"{near_miss(wrong[1], names)}"
            )
        raise ValueError(f"{message}; `{self.prog} --help` shows what there is.")


def _layout(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=28)


def _parser() -> _Parser:
    parser = _Parser(
        prog="qjax",
        description="Quantize diffusion models after training and run them at low bits in JAX.",
        epilog="`qjax COMMAND --help` shows the options of a command. Start with `qjax demo`.",
        allow_abbrev=False,
        formatter_class=_layout,
    )
    parser.add_argument("--version", action="version", version=f"qjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        words = "Every option may also be written name=value, or stand in the --config file."
        if command.takes_quant:
            words += (
                " quant.weight.bits=3, quant.weight.group_size=64, quant.act=null and so on"
                " change the recipe; `quant:` in the file does the same."
            )
        if command.example:
            words += f" Example: {command.example}"
        child = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=words,
            allow_abbrev=False,
            formatter_class=_layout,
        )
        add_options(child, command)
        child.add_argument("--config", metavar="FILE.yaml", help="options, by name")
        child.add_argument(
            "--json", action="store_true", help="print one JSON document, nothing else"
        )
        child.add_argument(
            "--traceback", action="store_true", help="show where an error comes from"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
      argv: The words after `qjax`; those of this process if None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("qjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BAD_INPUT as error:
        if "--traceback" in words:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"qjax: error: {message}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    parser = _parser()
    flags, rest = parser.parse_known_args(words)
    if flags.command is None:
        parser.print_help()
        return 2 if rest else 0
    (command,) = (command for command in COMMANDS if command.name == flags.command)
    config = None if flags.config is None else local_path(flags.config)
    settings = resolve(command, flags, rest, config)
    output = Output(as_json=flags.json)
    with warnings.catch_warnings():
        # Remarks of the library become lines on stderr; warnings of other kinds stay.
        warnings.filterwarnings("always", category=UserWarning, module=r"qjax(\.|$)")
        warnings.showwarning = lambda message, *_, **__: output.remark(str(message))
        result = dict(command.run(settings, output))
    status = result.pop("exit_status", 0)
    output.document(result)
    return status
