"""The reference is complete: every public name stands in it, and in the place of its own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import linearize

DOCS = Path(__file__).parents[2] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")


def modules() -> list[ModuleType]:
    """Return the public modules."""
    names = [m.name for m in pkgutil.iter_modules(linearize.__path__) if m.name[0] != "_"]
    return [linearize, *(importlib.import_module(f"linearize.{name}") for name in names)]


def public(module: ModuleType) -> list[str]:
    """Return a module's public names."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, x in vars(module).items()
        if name[0] != "_"
        and (inspect.isclass(x) or inspect.isfunction(x))
        and x.__module__ == module.__name__
    ]


NAMES = [(m.__name__, name) for m in modules() for name in public(m)]


def directives() -> dict[str, str]:
    """Return the options of each autodoc directive of the page by what it documents."""
    found = re.findall(r"\.\. auto\w+:: ([\w.]+)[^\n]*\n((?: +:[^\n]*\n)*)", API)
    assert found
    return dict(found)


def is_documented(module: str, name: str) -> bool:
    """Whether a directive covers a name: its own, or its module's with that member."""
    known = directives()
    x = getattr(importlib.import_module(module), name)
    if inspect.ismodule(x):
        return x.__name__ in known
    # A name that one module takes over from another stands where it is at home.
    homes = {module, getattr(x, "__module__", module)}
    if getattr(linearize, name, None) is x:
        homes.add("linearize")
    if any(f"{home}.{name}" in known for home in homes):
        return True
    for home in homes & known.keys():
        options = known[home]
        members = re.search(r":members:([^\n]*)", options)
        excluded = re.search(r":exclude-members:([^\n]*)", options)
        chosen = [m.strip() for m in members[1].split(",")] if members else None
        dropped = [m.strip() for m in excluded[1].split(",")] if excluded else []
        if chosen is not None and name not in dropped and (chosen == [""] or name in chosen):
            return True
    return False


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_reference_has_every_public_name(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
    assert is_documented(module, name), f"{module}.{name} is missing from docs/api.md"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_everything_public_has_a_docstring(module: str, name: str) -> None:
    x: Any = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(x)
    if inspect.isclass(x):
        for member, value in vars(x).items():
            if member[0] != "_" and (callable(value) or isinstance(value, property)):
                text = inspect.getdoc(getattr(x, member))
                assert text, f"{module}.{name}.{member}"
                # Sphinx takes `a: b` at the beginning for a type and a description.
                mistaken = isinstance(value, property) and ":" in text.partition("\n")[0]
                assert not mistaken, f"{module}.{name}.{member}: a colon in the first line"


def test_every_page_can_be_reached() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {
        line.strip()
        for tree in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL)
        for line in tree.splitlines()
    }
    pages = {p.stem for p in DOCS.glob("*.md")} - {"index"}
    assert pages <= listed


@pytest.mark.parametrize(
    "page",
    [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"],
    ids=lambda p: p.name,
)
def test_links_and_doors_exist(page: Path) -> None:
    """Sphinx sees the pages in `docs` only, and knows nothing of the Makefile."""
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (DOCS.parent / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(
        r"^make ([a-z-]+)", text, re.MULTILINE
    )
    assert set(named) <= targets
    prose = re.sub(r"```.*?```|`[^`\n]*`", "code", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        assert link.startswith("https://") or (page.parent / link).exists(), link
