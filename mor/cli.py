"""The `mor` command: one table of sub-commands, of which only the chosen one is imported.

Exit codes: 0 done, 1 failed, 2 the user's mistake (one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TextIO

from mor import __version__


@dataclass(frozen=True, kw_only=True)
class Command:
    """A sub-command: the module with `add_arguments(parser)` and `run(arguments)`, what it does in a phrase, and
    whether it takes further `--a.b=c` options, which it finds in `arguments.overrides`, and whether it takes any number
    of words, between which options may stand."""

    module: str
    summary: str
    takes_overrides: bool = False
    takes_words: bool = False


COMMANDS: dict[str, Command] = {
    "demo": Command(module="demo", summary="train a small model beside its twins and show what it learned"),
    "train": Command(module="train", summary="train a model from a recipe or an options file", takes_overrides=True),
    "generate": Command(module="generate", summary="write text, every token coloured by its recursion depth"),
    "serve": Command(module="serve", summary="serve a model over HTTP, with OpenAI's interface and a page"),
    "evaluate": Command(module="evaluate", summary="measure how well a model predicts held-out text, causally"),
    "show": Command(
        module="show", summary="show the depths and router scores of a given text, or compare runs", takes_words=True
    ),
    "calibrate": Command(module="calibrate", summary="find the thresholds for every depth budget and store them"),
    "convert": Command(module="convert", summary="convert Llama-family or the authors' checkpoints"),
    "data": Command(module="data", summary="make token shards, train a tokenizer, or look into shards"),
    "bench": Command(module="bench", summary="measure tokens per second of models in the engine"),
    "study": Command(module="study", summary="run declared grids of training runs"),
    "results": Command(module="results", summary="make tables and figures of studies from stored results"),
    "recipes": Command(module="recipes", summary="list the runs that train knows by name"),
}


class UserError(Exception):
    """A mistake on the command line; its text is the whole message."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mor` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(arguments)
        except SystemExit as stop:  # argparse after --help
            return int(stop.code or 0)
        except KeyboardInterrupt:
            return _complain("mor: interrupted", 130)
        except BrokenPipeError:
            _close_output()
            return 1
        except UserError as error:
            return _complain(str(error), 2)
        except (ValueError, OSError, ImportError) as error:
            return _complain(f"mor: {_in_one_line(error)}", 2)
        except (RuntimeError, FloatingPointError, MemoryError) as error:
            return _complain(f"mor: {_in_one_line(error) or type(error).__name__}", 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"mor {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"mor: unknown command {name!r}; did you mean {nearest!r}? `mor --help` lists them all")
    command = COMMANDS[name]
    module = importlib.import_module(f"mor.commands.{command.module}")
    parser = Parser(prog=f"mor {name}", description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    module.add_arguments(parser)
    parse = parser.parse_known_intermixed_args if command.takes_words else parser.parse_known_args
    known, rest = parse(arguments[1:])
    overrides = [word for word in rest if command.takes_overrides and word.startswith("--")]
    if rest != overrides:
        wrong = next(word for word in rest if word not in overrides)
        parser.error(f"unexpected argument {wrong!r}{_suggestion(wrong, parser)}")
    known.overrides = overrides
    return int(module.run(known) or 0)


def overview() -> str:
    """What `mor --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = "usage: mor COMMAND ...\n\nMixture-of-Recursions language models (arXiv 2507.10524).\n\ncommands:\n"
    return head + "\n".join(lines) + "\n\n`mor COMMAND --help` says more; `mor --version` prints the version."


def _suggestion(word: str, parser: argparse.ArgumentParser) -> str:
    options = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(word.partition("=")[0], options, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest and word.startswith("-") else ""


def _in_one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return " ".join(text.split())


def _complain(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _close_output() -> None:
    """Whoever read the output went away; nothing more can be written, not even by the interpreter at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):
        print(f"mor: warning: {' '.join(str(message).split())}", file=sys.stderr)
