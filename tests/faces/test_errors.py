"""Every error class: documented with cause, remedy and an example, and raised by a test."""

from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path

import pytest

from linearize import errors

ROOT = Path(__file__).parents[2]
CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.LinearizeError) and cls is not errors.LinearizeError
]


def test_there_are_error_classes() -> None:
    assert len(CLASSES) >= 11


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_is_documented_with_an_example(cls: type) -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {cls.__name__}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
    assert section, f"docs/errors.md has no section on {cls.__name__}"
    assert "*Cause:*" in section[1]
    assert "*Remedy:*" in section[1]
    assert f"raises({cls.__name__}, " in section[1]  # the page's code blocks are run
    (row,) = (
        line for line in page.splitlines() if line.startswith("|") and f".{cls.__name__}`" in line
    )
    base = cls.__mro__[1] if cls.__mro__[1] is not errors.LinearizeError else cls.__mro__[2:]
    names = [base.__name__] if isinstance(base, type) else [b.__name__ for b in base]
    assert any(f"`{name}`" in row for name in names)
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_is_a_built_in_error_too(cls: type) -> None:
    built_in = [
        b for b in cls.__mro__ if b.__module__ == "builtins" and b not in (Exception, object)
    ]
    assert any(getattr(builtins, b.__name__) is b for b in built_in if b is not BaseException)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_is_raised_by_a_test(cls: type) -> None:
    """That the test passes is what the test itself shows."""
    expected = re.compile(rf"pytest\.raises\(\(?[^)]*\b{cls.__name__}\b")
    own = Path(__file__).name
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if p.name != own]
    assert any(expected.search(p.read_text(encoding="utf-8")) for p in files)


def test_nothing_else_is_raised_by_the_package() -> None:
    """Where the package raises something itself, it is one of its own."""
    modules = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "linearize").rglob("*.py"))]
    own = {cls.__name__ for cls in CLASSES}
    # Some are caught again inside the package.
    caught = r"^class (\w+)\((?:Linearize|Opaque|Unsupported|Runtime)Error\)"
    own.update(*(re.findall(caught, m, re.MULTILINE) for m in modules))
    allowed = own | {"LinearizeError", "NotImplementedError", "KeyError", "RuntimeError"}
    allowed.add("AttributeError")  # by the `__getattr__` of the package, as Python wants it
    for module in modules:
        for name in re.findall(r"^\s+raise ([A-Z]\w+)\(", module, re.MULTILINE):
            assert name in allowed, f"{module.splitlines()[0]} raises {name}"
