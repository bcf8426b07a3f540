"""What the public modules show: public names only, each module without an import of its own."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import linearize

FACES = [m.name for m in pkgutil.iter_modules(linearize.__path__) if m.name[0] != "_"]


def run(code: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout.strip()


@pytest.mark.parametrize("face", FACES)
def test_dir_of_a_module_shows_its_public_names(face: str) -> None:
    module = importlib.import_module(f"linearize.{face}")
    assert dir(module) == sorted(module.__all__)
    for name in dir(module):
        assert name[0] != "_"
        assert getattr(module, name) is not None


def test_dir_of_the_package_shows_its_public_names_and_modules() -> None:
    names = dir(linearize)
    assert set(names) == {"__version__", *linearize.__all__, *FACES}
    for name in names:
        assert getattr(linearize, name) is not None


@pytest.mark.parametrize("face", FACES)
def test_every_module_says_first_what_it_is_for(face: str) -> None:
    text = importlib.import_module(f"linearize.{face}").__doc__
    assert text is not None
    first = text.partition("\n")[0]
    assert first[0].isupper()
    assert "loor" not in first


def test_a_module_is_loaded_when_it_is_first_asked_for() -> None:
    asked = ", ".join(f"lz.{face}.__name__" for face in FACES)
    code = (
        "import torch, sys; before = set(sys.modules); import linearize as lz;"
        f"print(*(set(sys.modules) - before)); print(*({asked}), 'cupy' in sys.modules)"
    )
    at_once, later = (line.split() for line in run(code).splitlines())
    assert "linearize.operators" in at_once
    for name in ("scipy", "functional", "func", "distributed", "curvature", "testing"):
        assert f"linearize.{name}" not in at_once
    assert not {"scipy", "networkx", "torch._dynamo"} & set(at_once)
    assert later == [*(f"linearize.{face}" for face in FACES), "False"]


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'linearize' has no attribute 'linearise'"):
        _ = linearize.linearise  # type: ignore[attr-defined]
    assert not hasattr(linearize, "products")
    assert not hasattr(linearize, "inside")


def test_without_scipy_the_names_can_still_be_gone_through() -> None:
    code = (
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'scipy': raise ImportError(name)\n"
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'scipy' else found(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import inspect, linearize as lz\n"
        "names = [name for name, _ in inspect.getmembers(lz)]\n"
        "print('scipy' in names, 'sparse' in names, 'func' in names)\n"
        "try: lz.scipy\n"
        "except ImportError as error: print(error)\n"
    )
    assert run(code).split() == ["False", "False", "True", "scipy"]
