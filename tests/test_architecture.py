"""The shape of the code: which module may import which, and how long files and functions may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("mor/**/*.py"))
STANDARD_LIBRARY = sys.stdlib_module_names | {"_typeshed"}  # the latter exists for type checkers alone
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one part of the package may import besides the standard library. None: anything."""

    part: str
    internal: tuple[str, ...] | None = None
    external: tuple[str, ...] | None = None
    relative_only: bool = False


BASE = ("mor.config", "mor.files", "mor.quiet")
MODEL_LIBRARIES = ("torch", "transformers", "huggingface_hub", "numpy", "safetensors")
# The engine's plans are made of integers: these files hold no torch, and one of them counts in numpy.
ENGINE_PLANNING = tuple(
    f"mor.engine.{name}"
    for name in ("block_pool", "cache_shape", "limits", "params", "prefix_cache", "request", "scheduler", "slot_pages")
)

# The first level whose part a file belongs to is the one that counts.
LEVELS = (
    Level(part="mor.config", internal=(), external=("yaml",)),
    Level(part="mor.files", internal=(), external=()),
    Level(part="mor.quiet", internal=(), external=("transformers",)),
    Level(part="mor.loading", internal=("mor.quiet", "mor.data", "mor.model")),
    Level(part="mor.model.depth_plan", internal=(), external=()),
    Level(  # these files also ship as Hugging Face remote code, so they name each other relatively
        part="mor.model",
        internal=("mor.model",),
        external=MODEL_LIBRARIES,
        relative_only=True,
    ),
    Level(part="mor.data", internal=(*BASE, "mor.data")),
    Level(part="mor.convert", internal=(*BASE, "mor.model", "mor.convert")),
    Level(part="mor.train", internal=(*BASE, "mor.data", "mor.model", "mor.train")),
    Level(part="mor.engine.slot_pages", internal=ENGINE_PLANNING, external=("numpy",)),
    *(Level(part=part, internal=ENGINE_PLANNING, external=()) for part in ENGINE_PLANNING),
    Level(part="mor.engine", internal=(*BASE, "mor.data", "mor.model", "mor.loading", "mor.engine")),
    Level(part="mor.evaluate", internal=(*BASE, "mor.data", "mor.model", "mor.evaluate")),
    Level(part="mor"),
)


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module by its absolute name, and whether it was named relatively."""

    module: str
    relative: bool
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions included; `from package import name` counts as package.name."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module=alias.name, relative=False, line=node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module=f"{base}.{alias.name}", relative=node.level > 0, line=node.lineno)


def is_within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def is_allowed(found: Import, level: Level) -> bool:
    top = found.module.split(".")[0]
    if top == "mor":
        inside = level.internal is None or is_within(found.module, (*level.internal, "mor.__version__"))
        return inside and (found.relative or not level.relative_only)
    return top in STANDARD_LIBRARY or level.external is None or top in level.external


def forbidden_imports(path: Path) -> list[str]:
    level = next(level for level in LEVELS if is_within(module_name(path), (level.part,)))
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}; {level.part} may not"
        for found in imports(path)
        if not is_allowed(found, level)
    ]


def test_imports_point_downwards() -> None:
    assert [line for path in SOURCES for line in forbidden_imports(path)] == []


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("mor/model/depth_plan.py", "import math", True),
        ("mor/model/depth_plan.py", "from . import cost", False),
        ("mor/model/depth_plan.py", "def f():\n    import torch", False),
        ("mor/model/layers.py", "from .depth_plan import DepthPlan\nimport torch.nn", True),
        ("mor/model/layers.py", "from mor.model.depth_plan import DepthPlan", False),
        ("mor/model/layers.py", "from ..config import from_dict", False),
        ("mor/model/layers.py", "import rich", False),
        ("mor/data/loader.py", "from mor.model import cost", False),
        ("mor/data/loader.py", "from mor.data.shards import TokenShards", True),
        ("mor/train/loop.py", "from mor import evaluate", False),
        ("mor/engine/scheduler.py", "from mor.engine.request import Request", True),
        ("mor/engine/scheduler.py", "from mor.engine.runner import Runner", False),
        ("mor/engine/block_pool.py", "import torch", False),
        ("mor/engine/scheduler.py", "import numpy", False),
        ("mor/engine/slot_pages.py", "import numpy", True),
        ("mor/engine/slot_pages.py", "import torch", False),
        ("mor/engine/runner.py", "from mor.model.modeling_mor import MorForCausalLM\nimport torch", True),
        ("mor/engine/engine.py", "from mor.train.loop import train", False),
        ("mor/cli.py", "from mor.train.loop import train", True),
    ],
)
def test_the_import_rule_itself(
    file: str, source: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert (forbidden_imports(path) == []) is allowed


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert too_long == []
