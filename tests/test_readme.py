"""The README's file tree is the repository's, with a phrase for each file.

The tree is the fenced block whose first line is `mor/`: two spaces of indentation per folder, folders end in `/`, and a
phrase follows each name after at least two spaces. `__init__.py` files are left out. Of `tests/`, which mirrors `mor/`,
only folders are listed, and of what a command writes only the folder, with a phrase.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTED = ("mor", "assets", "bench", "docs", "tests")
WRITTEN = ("bench/results/studies/", "docs/results/")  # by `mor results`


def tree_block(readme: str) -> str:
    """The text between the fences of the block that begins with `mor/`."""
    for block in re.findall(r"^```\w*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL):
        if re.match(r"mor/(\s|$)", block):
            return block
    raise ValueError("README.md has no fenced block that begins with 'mor/'")


def parse_tree(block: str) -> dict[str, str]:
    """Path -> phrase of every line of the tree; folders keep their closing slash."""
    entries: dict[str, str] = {}
    above: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        entry = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line.rstrip())
        if entry is None:
            raise ValueError(f"{line!r} is not a name, or a name and a phrase with two spaces between")
        indent, name, phrase = entry.groups()
        above = above[: len(indent) // 2]
        entries["".join([*above, name])] = phrase or ""
        if name.endswith("/"):
            above.append(name)
    return entries


def repository_tree() -> set[str]:
    """Every file under the listed folders, and every folder that holds one; some folders alone."""
    paths = [path for top in LISTED for path in (ROOT / top).rglob("*") if path.is_file()]
    files = [path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts]
    folders = {f"{folder}/" for file in files for folder in file.parents if folder.parts}
    alone = ("tests/", *WRITTEN)
    return folders | {str(file) for file in files if file.name != "__init__.py" and not str(file).startswith(alone)}


def test_readme_lists_every_file_and_nothing_else() -> None:
    listed = set(parse_tree(tree_block((ROOT / "README.md").read_text())))
    actual = repository_tree()
    difference = {"not in README.md": sorted(actual - listed), "not in the repository": sorted(listed - actual)}
    assert difference == {"not in README.md": [], "not in the repository": []}


def test_readme_gives_every_file_a_phrase() -> None:
    entries = parse_tree(tree_block((ROOT / "README.md").read_text()))
    assert [path for path, phrase in entries.items() if not phrase and (path in WRITTEN or path[-1] != "/")] == []


def test_parsing_a_tree() -> None:
    tree = "mor/\n  cli.py  the command\n  model/\n    cost.py   costs\nbench/  measured\n"
    assert parse_tree(tree_block(f"# x\n```bash\nmake\n```\n```text\n{tree}```\n")) == {
        "mor/": "",
        "mor/cli.py": "the command",
        "mor/model/": "",
        "mor/model/cost.py": "costs",
        "bench/": "measured",
    }


def test_a_broken_tree_is_named() -> None:
    with pytest.raises(ValueError, match="no fenced block"):
        tree_block("# x\n```\nelse\n```\n")
    with pytest.raises(ValueError, match="two spaces between"):
        parse_tree("mor/\n  cli.py one space\n")
