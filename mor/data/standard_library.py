"""The embedded corpus: text that every Python installation carries.

Three kinds of documents: the language reference by topics, what the docstrings of each module say, and the modules' own
sources without those docstrings. A paragraph that was given once is not given again, so that a validation split is not
a copy of the training one.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mor.data.stream import CountedStream, DocumentStream, Position

DEFAULT_BYTES = 6_000_000

# Goes up when the documents change for the same Python, so that token shards made before are not taken for new ones.
_EDITION = 1
# Shares of the bytes while all kinds last: topics and docstrings are prose, of which there is less than of code.
_SHARES = {"topics": 0.2, "documentation": 0.5, "sources": 0.3}
# Tables and test data rather than text, or files that differ between machines.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages encodings pydoc_data ensurepip __pycache__ __phello__".split()
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_REPEATABLE_CHARACTERS = 80

_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class StandardLibrary:
    """The embedded corpus as a source of documents: the same on every run of one Python, about `max_bytes` of it."""

    def __init__(self, *, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1")
        self.max_bytes = max_bytes

    def describe(self) -> dict[str, Any]:
        """The Python whose text it is, and how much is taken."""
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return {"kind": "standard library", "python": python, "max_bytes": self.max_bytes, "edition": _EDITION}

    def documents(self, position: Position | None = None) -> DocumentStream:
        """The documents, all kinds mixed, up to the first that would exceed `max_bytes`."""
        return CountedStream(self._texts(), position)

    def _texts(self) -> Iterator[str]:
        modules = {name: functools.cache(functools.partial(_split_module, name, path)) for name, path in _modules()}
        builtin = {name: functools.partial(_builtin_documentation, name) for name in _builtin_modules()}
        topics = _topics()
        kinds = {
            "topics": (topics[name] for name in _scattered(topics)),
            "documentation": (
                builtin[name]() if name in builtin else modules[name]()[0] for name in _scattered([*builtin, *modules])
            ),
            "sources": (modules[name]()[1] for name in _scattered(modules)),
        }
        num_bytes = 0
        for text in _without_repetitions(_mixed(kinds)):
            num_bytes += len(text.encode())
            if num_bytes > self.max_bytes:
                return
            yield text


def _scattered(names: Iterable[str]) -> list[str]:
    """The names in a fixed order that mixes subjects, so that any part of them is a sample."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _mixed(kinds: Mapping[str, Iterator[str]]) -> Iterator[str]:
    """The documents of all kinds, each time of the kind that is furthest behind its share of the characters."""
    given = dict.fromkeys(kinds, 0)
    while given:
        kind = min(given, key=lambda kind: given[kind] / _SHARES[kind])
        text = next(kinds[kind], None)
        if text is None:
            del given[kind]
            continue
        given[kind] += len(text)
        yield text


def _without_repetitions(texts: Iterable[str]) -> Iterator[str]:
    """The texts without the paragraphs, of 80 characters or more, that occurred before."""
    seen: set[bytes] = set()
    for text in texts:
        kept: list[str] = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= _REPEATABLE_CHARACTERS:
                digest = hashlib.sha256(paragraph.strip().encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            kept.append(paragraph)
        rest = "\n\n".join(kept).strip("\n")
        if rest:
            yield rest + "\n"


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        return {}


def _builtin_modules() -> list[str]:
    """The public modules that are compiled into the interpreter, and so have docstrings but no source."""
    return [name for name in sys.builtin_module_names if not name.startswith("_")]


def _builtin_documentation(name: str) -> str:
    return "\n\n".join(_describe_members(name, importlib.import_module(name)))


def _describe_members(name: str, owner: Any) -> Iterator[str]:
    yield f"{name}\n\n{inspect.cleandoc(owner.__doc__ or '')}"
    for member, value in sorted(vars(owner).items()):
        if member.startswith("_"):
            continue
        if inspect.isclass(value) and not inspect.isclass(owner):
            yield from _describe_members(f"{name}.{member}", value)
        elif inspect.isroutine(value) and value.__doc__:
            yield f"{name}.{member}\n\n{inspect.cleandoc(value.__doc__)}"


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of the modules of the standard library that are written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(_SKIPPED_PREFIXES):
            continue
        yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path


def _split_module(name: str, path: Path) -> tuple[str, str]:
    """(what the docstrings of a module say, its source without them); both empty if this Python cannot read it."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
            source = file.read()
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return "", ""
    lines = [line + "\n" for line in source.split("\n")]  # as Python counts them: a form feed ends no line
    paragraphs = [f"Module {name}"]
    for definition, depth in _definitions(tree, 0):
        docstring = ast.get_docstring(definition)
        if docstring:
            paragraphs.append(_heading(definition, depth) + docstring)
            _remove(lines, definition)
    documentation = "\n\n".join(paragraphs) if len(paragraphs) > 1 else ""
    return documentation, f"# {name}\n" + "".join(lines)


def _definitions(node: ast.AST, depth: int) -> Iterator[tuple[_Definition, int]]:
    """The module, classes and functions at or below `node` in the order of the text, with how deep they are nested."""
    if isinstance(node, _Definition):
        yield node, depth
        depth += 1
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, (ast.stmt, ast.ExceptHandler)):
                yield from _definitions(child, depth)


def _heading(definition: _Definition, depth: int) -> str:
    if isinstance(definition, ast.Module):
        return ""
    if isinstance(definition, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, definition.bases))
        return f"class {definition.name}({bases})\n" if bases else f"class {definition.name}\n"
    return f"{'method' if depth > 1 else 'function'} {definition.name}({ast.unparse(definition.args)})\n"


def _remove(lines: list[str], definition: _Definition) -> None:
    """Blank the lines of the docstring, unless it shares them with code or is the whole body."""
    docstring = definition.body[0]
    assert docstring.end_lineno is not None
    first, last = docstring.lineno - 1, docstring.end_lineno
    is_alone = not lines[first][: docstring.col_offset].strip() and lines[last - 1].rstrip().endswith(("'", '"'))
    if is_alone:
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        lines[first:last] = [f"{indent}...\n" if len(definition.body) == 1 else ""] + [""] * (last - first - 1)
