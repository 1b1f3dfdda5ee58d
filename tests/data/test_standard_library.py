"""The embedded corpus: there on every Python, the same every time, mixed, and without repetitions."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mor.data import standard_library
from mor.data.standard_library import StandardLibrary


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(StandardLibrary(max_bytes=1_500_000).documents())


def test_it_has_as_much_text_as_asked_for(documents: list[str]):
    num_bytes = sum(len(document.encode()) for document in documents)
    assert 1_300_000 < num_bytes <= 1_500_000
    assert len(documents) > 100
    assert all(document.strip() for document in documents)


def test_all_kinds_have_their_share(documents: list[str]):
    sources = sum(len(document) for document in documents if document.startswith("# "))
    modules = sum(len(document) for document in documents if document.startswith("Module "))
    assert 0.2 < sources / sum(map(len, documents)) < 0.4
    assert 0.2 < modules / sum(map(len, documents)) < 0.6


def test_no_long_paragraph_occurs_twice(documents: list[str]):
    paragraphs = [part.strip() for document in documents for part in document.split("\n\n") if len(part) >= 80]
    assert len(paragraphs) == len(set(paragraphs))


def test_it_is_the_same_in_another_process():
    program = (
        "import hashlib; from mor.data.standard_library import StandardLibrary\n"
        "print(hashlib.sha256('\\0'.join(StandardLibrary(max_bytes=300_000).documents()).encode()).hexdigest())"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    here = "\0".join(StandardLibrary(max_bytes=300_000).documents())
    assert other.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_description_and_options():
    described = StandardLibrary(max_bytes=10).describe()
    assert described["max_bytes"] == 10
    assert described["python"].endswith(sys.version.split()[0].rstrip("+"))
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        StandardLibrary(max_bytes=0)


def test_a_python_without_topics_still_has_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert sum(map(len, StandardLibrary(max_bytes=200_000).documents())) > 100_000


def test_a_module_is_parted_into_documentation_and_source(tmp_path: Path):
    source = (
        '"""About.\n\n    Indented.\n    """\nimport os\n\x0c\nclass A(Base, metaclass=M):\n    """A class."""\n\n'
        '    def f(self, x: int = 1, *rest):\n        """Only this."""\n\n    def g(self): "shares a line"\n\n'
        "if True:\n    def h():\n        'Deep.'\n        return 1  # kept\n"
    )
    (tmp_path / "b.py").write_text(source)
    documentation, rest = standard_library._split_module("a.b", tmp_path / "b.py")
    for part in ("Module a.b", "About.\n\nIndented.", "class A(Base)\nA class.", "Deep."):
        assert part in documentation
    assert "method f(self, x: int=1, *rest)\nOnly this." in documentation
    assert "function h()\nDeep." in documentation
    assert rest.startswith("# a.b\nimport os\n\x0c\nclass A(Base, metaclass=M):\n")
    assert "return 1  # kept" in rest
    assert '"""' not in rest
    ast.parse(rest)


@pytest.mark.parametrize("source", [b"def broken(:\n", b"# caf\xe9\n", b"x = '\0'\n"])
def test_what_cannot_be_parsed_is_left_out(source: bytes, tmp_path: Path):
    (tmp_path / "a.py").write_bytes(source)
    assert standard_library._split_module("a", tmp_path / "a.py") == ("", "")
