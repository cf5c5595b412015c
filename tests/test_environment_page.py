"""docs/environment.md names every environment variable that the package reads, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "environment.md"
OWN = re.compile(r"CLOQ_[A-Z][A-Z_]*")


def sources() -> list[Path]:
    rooms = [path for room in ("cloq_export", "kernels", "formats") for path in (ROOT / room).rglob("*.py")]
    return [*rooms, ROOT / "setup.py", ROOT / "tests" / "vllm" / "conftest.py"]


def home(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("cloq_export/")


def constants(tree: ast.Module) -> dict[str, str]:
    """Return the texts that a module gives a name at its top."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def read_names(tree: ast.Module, texts: dict[str, str]) -> Iterator[str]:
    """Yield the variables that a module takes from os.environ by a name of its own or a text."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and is_environ(node.value):
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if (
                node.func.attr in ("get", "pop", "setdefault") and is_environ(node.func.value)
            ) or node.func.attr == "getenv":
                key = node.args[0]
        elif isinstance(node, ast.Compare) and any(is_environ(right) for right in node.comparators):
            key = node.left
        if isinstance(key, ast.Constant):
            yield key.value
        elif isinstance(key, ast.Name | ast.Attribute):
            name = key.id if isinstance(key, ast.Name) else key.attr
            if name in texts:
                yield texts[name]


def is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def in_code() -> dict[str, set[str]]:
    """Return variable -> the files that read it."""
    trees = {home(path): ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    # Variables have names of their own everywhere: a constant may be imported from another module.
    texts = {name: text for tree in trees.values() for name, text in constants(tree).items() if OWN.fullmatch(text)}
    found: dict[str, set[str]] = {}
    for place, tree in trees.items():
        for name in read_names(tree, texts | constants(tree)):
            found.setdefault(name, set()).add(place)
    return found


def on_page() -> dict[str, set[str]]:
    """Return variable -> the files that the page says read it."""
    found: dict[str, set[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            places = set(re.findall(r"`([^`]+)`", cells[-1]))
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), places)
    return found


def test_the_page_names_what_the_code_reads() -> None:
    code, page = in_code(), on_page()
    assert set(code) == set(page)
    for name, places in page.items():
        assert places <= code[name], f"{name} is read in {code[name]}"


def test_no_variable_is_named_in_the_code_and_not_on_the_page() -> None:
    """A read that the test above does not see, such as one through a function, still names its variable."""
    named = {name for path in sources() for name in OWN.findall(path.read_text(encoding="utf-8"))}
    macros = {"CLOQ_HAVE_"}  # of the C++ build
    assert named - macros == {name for name in on_page() if name.startswith("CLOQ_")}


def test_the_prefix() -> None:
    own = {name for name in on_page() if name.startswith("CLOQ_")}
    assert {name for name in own if not name.startswith("CLOQ_EXPORT_")} == {"CLOQ_DATA"}
