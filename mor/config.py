"""Options as frozen dataclasses: read from dictionaries, YAML files and `--a.b=c` overrides.

A run is described by nested dataclasses; this module only moves values in and out of them. A key that does not exist is
an error that names the nearest one; a value of the wrong type is an error that names the key, the value and the type.

Types understood: bool, int, float, str, Path, None, Any, Literal, unions, lists, tuples, dictionaries and dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null", "~")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTES = "'\""


class _Text(str):
    """A value as typed on a command line: its type is decided by the field that receives it."""


def from_dict(cls: type[Options], values: Mapping[str, Any], *, name: str = "") -> Options:
    """Build `cls` from `values`; `name` is the dotted prefix used in messages.

    Raises ValueError for an unknown key (naming the nearest), a missing key without a default, or a wrong type.
    """
    hints = _field_types(cls)
    for key in values:
        if key not in hints:
            raise _unknown_key(cls, key, name)
    for key, expected in hints.items():
        if key not in values and _is_required(cls, key):
            raise ValueError(f"option {_join(name, key)!r} is missing; expected {_describe(expected)}")
    return cls(**{key: _convert(value, hints[key], _join(name, key)) for key, value in values.items()})


def to_dict(options: DataclassInstance) -> dict[str, Any]:
    """The options as dictionaries, lists and scalars that JSON and YAML can hold; `from_dict` inverts it."""
    return {key: _plain(getattr(options, key)) for key in _field_types(type(options))}


def load_yaml(cls: type[Options], path: str | Path) -> Options:
    """Build `cls` from a YAML file, in which `1e-3` is a number.

    Raises FileNotFoundError for a missing file, ValueError for one that is not a YAML mapping or does not fit `cls`.
    """
    values = _read_yaml(Path(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a mapping of options")
    return from_dict(cls, cast("dict[str, Any]", values))


def apply_overrides(options: Options, overrides: Sequence[str]) -> Options:
    """A copy of `options` with `--a.b=c` overrides applied; of two for the same key, the later wins.

    A key of a dictionary field is set the same way (`--model.hidden_size=64`), and `--flag` alone means `--flag=true`.
    Values are read by the type of their field: `1e-3`, `true`, `none`, `[1, 2]` or `1,2`, `{a: 1}`.
    Raises ValueError as `from_dict` does.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        _insert(tree, key.strip().replace("-", "_").split("."), _Text(text if equals else "true"), override)
    return cast(Options, _merge(options, tree, type(options), ""))


def list_options(options: DataclassInstance, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted name, expected type in words, value) of every option, depth first: what a help text prints."""
    for key, expected in _field_types(type(options)).items():
        value = getattr(options, key)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from list_options(value, _join(name, key))
        else:
            yield _join(name, key), _describe(expected), value


def _field_types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _is_required(cls: Any, key: str) -> bool:
    field = next(field for field in dataclasses.fields(cls) if field.name == key)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return str(value) if isinstance(value, Path) else value


def _unknown_key(cls: Any, key: object, name: str) -> ValueError:
    def likeness(candidate: str) -> float:
        parts = (candidate, candidate.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, str(key), part).ratio() for part in parts)

    nearest = max(_dotted_names(cls), key=likeness, default=None)
    hint = f"did you mean {_join(name, nearest)!r}?" if nearest else f"{cls.__name__} has no options"
    return ValueError(f"unknown option {_join(name, str(key))!r}; {hint}")


def _dotted_names(cls: Any) -> Iterator[str]:
    for key, expected in _field_types(cls).items():
        yield key
        for member in _members(expected):
            if dataclasses.is_dataclass(member):
                yield from (_join(key, inner) for inner in _dotted_names(member))


def _members(expected: Any) -> tuple[Any, ...]:
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def _describe(expected: Any) -> str:
    if expected is type(None):
        return "none"
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    if len(_members(expected)) > 1:
        return " | ".join(map(_describe, _members(expected)))
    if get_args(expected):
        container = getattr(get_origin(expected), "__name__", str(expected))
        return f"{container}[{', '.join('...' if a is Ellipsis else _describe(a) for a in get_args(expected))}]"
    return getattr(expected, "__name__", str(expected))


def _wrong_type(value: Any, expected: Any, name: str) -> ValueError:
    kind = "" if isinstance(value, _Text) else f" ({type(value).__name__})"
    shown = repr(str(value)) if isinstance(value, _Text) else repr(value)
    return ValueError(f"option {name}={shown}{kind} does not fit; expected {_describe(expected)}")


def _convert(value: Any, expected: Any, name: str) -> Any:
    """`value` as the type `expected`, or ValueError."""
    if expected is Any:
        return _guess(value)
    if len(_members(expected)) > 1:
        return _convert_union(value, expected, name)
    if dataclasses.is_dataclass(expected):
        return _convert_dataclass(value, cast("type[DataclassInstance]", expected), name)
    container = get_origin(expected) or expected
    if container is Literal:
        return _convert_literal(value, expected, name)
    if container in (list, tuple, Sequence):
        return _convert_sequence(value, expected, name)
    if container in (dict, Mapping):
        return _convert_mapping(value, expected, name)
    return _convert_text(value, expected, name) if isinstance(value, _Text) else _convert_scalar(value, expected, name)


def _convert_scalar(value: Any, expected: Any, name: str) -> Any:
    if expected is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is int and isinstance(value, float) and value.is_integer():
        return int(value)
    raise _wrong_type(value, expected, name)


def _convert_text(text: _Text, expected: Any, name: str) -> Any:
    word = text.strip().lower()
    if expected is str:
        return str(text)
    if expected is Path:
        return Path(str(text))
    if expected is bool and word in _TRUE + _FALSE:
        return word in _TRUE
    if expected is type(None) and word in _NONE:
        return None
    if expected in (int, float):
        number = _number(word)
        if number is not None:
            return _convert_scalar(number, expected, name)
    raise _wrong_type(text, expected, name)


def _convert_literal(value: Any, expected: Any, name: str) -> Any:
    for choice in get_args(expected):
        if isinstance(value, _Text) and str(choice).lower() == value.strip().lower():
            return choice
        if type(value) is type(choice) and value == choice:
            return choice
    raise _wrong_type(value, expected, name)


def _convert_union(value: Any, expected: Any, name: str) -> Any:
    members = _members(expected)
    if isinstance(value, Mapping):
        fitting = [m for m in members if dataclasses.is_dataclass(m) or (get_origin(m) or m) in (dict, Mapping)]
        if len(fitting) == 1:  # its own message says more than "does not fit"
            return _convert(value, fitting[0], name)
    kind = cast("type[object]", type(_guess(value)))
    for member in sorted(members, key=lambda member: 2 if member in (str, Path) else member is not kind):
        try:
            return _convert(value, member, name)
        except ValueError:
            continue
    raise _wrong_type(value, expected, name)


def _convert_dataclass(value: Any, expected: type[DataclassInstance], name: str) -> Any:
    if isinstance(value, expected):
        return value
    if isinstance(value, _Text) and value.strip().startswith("{"):
        value = _split_mapping(value)
    if not isinstance(value, Mapping):
        raise _wrong_type(value, expected, name)
    return from_dict(expected, cast("Mapping[str, Any]", value), name=name)


def _convert_sequence(value: Any, expected: Any, name: str) -> Any:
    if isinstance(value, _Text):
        value = _split(value)
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(value, expected, name)
    items = cast("Sequence[Any]", value)
    is_tuple = (get_origin(expected) or expected) is tuple
    types_given = get_args(expected) or (Any, ...)
    is_fixed = is_tuple and types_given[-1] is not Ellipsis
    if is_fixed and len(types_given) != len(items):
        raise _wrong_type(items, expected, name)
    item_types = types_given if is_fixed else types_given[:1] * len(items)
    converted = [_convert(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(zip(items, item_types))]
    return tuple(converted) if is_tuple else converted


def _convert_mapping(value: Any, expected: Any, name: str) -> Any:
    if isinstance(value, _Text) and value.strip().startswith("{"):
        value = _split_mapping(value)
    if not isinstance(value, Mapping):
        raise _wrong_type(value, expected, name)
    key_type, item_type = get_args(expected) or (Any, Any)
    items = cast("Mapping[Any, Any]", value).items()
    return {_convert(key, key_type, name): _convert(item, item_type, _join(name, str(key))) for key, item in items}


def _number(word: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return None


def _guess(value: Any) -> Any:
    """What typed text most likely means where no field says: none, a boolean, a number, a list, a mapping, or text."""
    if isinstance(value, Mapping):
        return {key: _guess(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return _guess_text(value) if isinstance(value, _Text) else value


def _guess_text(text: _Text) -> Any:
    word = text.strip().lower()
    if word in _NONE:
        return None
    if word in ("true", "false"):
        return word == "true"
    if any(character.isdigit() for character in word) and (number := _number(word)) is not None:
        return number
    if word.startswith(("[", "(")):
        return [_guess(item) for item in _split(text)]
    if word.startswith("{"):
        return _guess(_split_mapping(text))
    return str(text)


def _split(text: str) -> list[_Text]:
    """The items of `[a, b]`, `(a, b)` or `a, b`, without the quotes around them; commas in brackets or quotes stay."""
    text = text.strip()
    if text and _BRACKETS.get(text[0]) == text[-1]:
        text = text[1:-1]
    items: list[str] = [""]
    closing: list[str] = []
    for character in text:
        if character == "," and not closing:
            items.append("")
            continue
        is_quoted = bool(closing) and closing[-1] in _QUOTES
        if closing and character == closing[-1]:
            closing.pop()
        elif not is_quoted and character in (*_BRACKETS, *_QUOTES):
            closing.append(_BRACKETS.get(character, character))
        items[-1] += character
    if not items[-1].strip():
        items.pop()
    return [_unquote(item) for item in items]


def _split_mapping(text: str) -> dict[str, _Text]:
    pairs = [item.partition(":") for item in _split(text)]
    return {str(_unquote(key)): _unquote(value) for key, _, value in pairs}


def _unquote(text: str) -> _Text:
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES
    return _Text(text[1:-1] if is_quoted else text)


def _insert(tree: dict[str, Any], path: list[str], text: _Text, override: str) -> None:
    if not all(path):
        raise ValueError(f"override {override!r} has an empty name; expected --name.of.option=value")
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = text


def _merge(current: Any, change: Any, expected: Any, name: str) -> Any:
    """`current`, a value of type `expected`, with the tree of overrides `change` applied."""
    if isinstance(change, _Text):
        return _convert(change, expected, name)
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        hints = _field_types(type(current))
        for key in change:
            if key not in hints:
                raise _unknown_key(type(current), key, name)
        changes = {k: _merge(getattr(current, k), v, hints[k], _join(name, k)) for k, v in change.items()}
        return dataclasses.replace(current, **changes)
    if isinstance(current, Mapping):
        kept = cast("Mapping[str, Any]", current)
        item_type = (get_args(expected) or (Any, Any))[-1]
        changes = {k: _merge(kept.get(k), v, item_type, _join(name, k)) for k, v in change.items()}
        return {**kept, **changes}
    return _convert(change, expected, name)


def _read_yaml(path: Path) -> Any:
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 as PyYAML reads it, except that `1e-3` is a number and a key given twice is an error."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [str(key.value) for key, _ in cast("list[tuple[yaml.Node, yaml.Node]]", node.value)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"key {key!r} is given twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    add_resolver = cast("Callable[..., None]", Loader.add_implicit_resolver)  # pyright: ignore[reportUnknownMemberType]
    add_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"])
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such options file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
