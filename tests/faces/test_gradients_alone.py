"""Values and gradients alone: a change of what f reads is seen, wherever that is kept."""

from __future__ import annotations

import contextvars
import functools
import sys
import sysconfig
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linearize._capture.classes import installed_class
from linearize._capture.reach import Reach
from linearize.scipy import ScalarFunction


def _installed(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function of an installed package that reads a tensor of that package's."""
    file = str(Path(sysconfig.get_paths()["purelib"]) / "somebody" / "__init__.py")
    module = types.ModuleType("somebody")
    module.__file__ = file
    module.weight = tensor  # type: ignore[attr-defined]
    exec(compile("def scaled(x):\n    return x * weight", file, "exec"), module.__dict__)
    scaled: Callable[[torch.Tensor], torch.Tensor] = module.scaled
    return scaled


def _of_installed_class(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a module of an installed class whose code reads a tensor of its package's."""
    file = str(Path(sysconfig.get_paths()["purelib"]) / "somebody" / "__init__.py")
    module = types.ModuleType("somebody")
    module.__file__ = file
    module.__dict__.update(weight=tensor, Module=torch.nn.Module)
    code = "class Scaled(Module):\n    def forward(self, x):\n        return x * weight"
    exec(compile(code, file, "exec"), module.__dict__)
    sys.modules["somebody"] = module
    try:
        net = torch.nn.Sequential(module.Scaled())
        installed_class(module.Scaled)
    finally:
        del sys.modules["somebody"]
    return net


def _in_local(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    local = threading.local()
    local.w = tensor
    return lambda x: x * local.w


def _cached(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    box = [tensor]

    @functools.lru_cache
    def w() -> torch.Tensor:
        return box.pop()

    w()
    return lambda x: x * w()


def _attribute(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    holder = torch.zeros(1)
    holder.w = tensor  # type: ignore[attr-defined]
    return lambda x: x * holder.w  # type: ignore[attr-defined]


def _slope(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    holder = torch.zeros_like(tensor)
    holder.grad = tensor
    return lambda x: x * holder.grad


def _in_context(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    held = contextvars.ContextVar[torch.Tensor]("held")
    held.set(tensor)
    return lambda x: x * held.get()


def _closure(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * tensor


HOLDERS = (_installed, _of_installed_class, _in_local, _cached, _attribute, _slope, _in_context)


@pytest.mark.parametrize("holds", [*HOLDERS, _closure])
def test_a_tensor_that_f_reads_is_changed_in_place(holds: Callable[..., Any]) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    inner = holds(w)
    problem = ScalarFunction(lambda x: inner(x).square().sum() / 2, np.zeros(3))
    x = np.array([1.0, -1.0, 2.0])
    for _ in range(3):
        slope = (w.numpy() ** 2) * x
        assert problem.fun(x) == pytest.approx(x @ slope / 2)
        np.testing.assert_allclose(problem.jac(x), slope)
        w.mul_(2)
        np.testing.assert_allclose(problem.jac(x), 4 * slope)
        assert problem.fun(x) == pytest.approx(2 * x @ slope)


def test_what_is_read_is_known_or_watched() -> None:
    w = torch.ones(3)
    for holds in HOLDERS:
        assert not Reach(holds(w)).now().whole, holds
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    for f in (_closure(w), net, lambda x: torch.nn.functional.softplus(net(x) @ w).mean()):
        assert Reach(f).now().whole
