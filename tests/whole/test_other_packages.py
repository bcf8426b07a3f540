"""Other packages in the same process: some replace functions of PyTorch by their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPLACE = """
import types
import torch

def wrapped(old):
    def _new_function(*args, **kwargs):
        return old(*args, **kwargs)
    return _new_function

KINDS = types.BuiltinFunctionType, types.FunctionType, types.MethodDescriptorType
KEPT = "is_tensor compile typename as_subclass requires_grad_".split()
count = 0
for owner in (torch, torch.Tensor, torch.nn.functional, torch.linalg, torch.special, torch.fft):
    for name in dir(owner):
        old = getattr(owner, name)
        if isinstance(old, KINDS) and not name.startswith("_") and name not in KEPT:
            setattr(owner, name, wrapped(old))
            count += 1
torch.autograd.grad = wrapped(torch.autograd.grad)
torch.autograd.backward = wrapped(torch.autograd.backward)
apply = torch.autograd.Function.__dict__["apply"]  # from PyTorch 2.15 on, written in C
if isinstance(apply, classmethod):
    torch.autograd.Function.apply = classmethod(wrapped(apply.__func__))
assert count > 1000
"""
USE = """
import torch
import linearize as lz

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

D = torch.float64
torch.manual_seed(0)
W, places = 0.3 * torch.randn(3, 3, dtype=D), torch.tensor([1, 0, 1])

def f(x):
    y = torch.tanh(x[places] @ W) * x.sum()
    z = torch.nn.functional.layer_norm(torch.nn.functional.linear(y, W), (3,))
    z = z.index_select(0, places) + torch.cat([y[:1], Cube.apply(y)[1:]])
    z = z.clone()
    z[0] *= 2
    return torch.where(z > 0, z, z.exp()) * torch.linalg.vector_norm(x)

lin = lz.Linearizer(f)
for i in range(3):
    x = torch.tensor([1.5, 2.0], dtype=D) + 0.1 * i
    here = lin.at(x)
    J = torch.autograd.functional.jacobian(f, x)
    for k in range(6):
        v, u = torch.randn(2, dtype=D), torch.randn(3, dtype=D)
        torch.testing.assert_close(here.jvp_fn(v), J @ v)
        torch.testing.assert_close(here.vjp_fn(u)[0], J.T @ u)
    torch.testing.assert_close(here.jvp_fn.batched(torch.eye(2, dtype=D)), J.T)
"""
PACKAGES = """
accelerate botorch deepinv e3nn einops entmax fastai gpytorch kornia lightning linear_operator
peft pyro pytorch_lightning sentence_transformers snntorch spacy stable_baselines3 theseus timm
torch_geometric torchaudio torchdiffeq torchkbnufft torchmetrics torchopt torchrl
torchsparsegradutils torchtext torchvision transformers ultralytics warp xitorch
""".split()
#: A package that is broken for reasons of its own is none that could disturb.
TRY = """
import importlib, sys
for name in {names}:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, "cannot be imported:", error)
"""


def run(*parts: str) -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(parts)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
        timeout=300,
    )
    assert not done.returncode, done.stderr[-2000:]


@pytest.mark.parametrize("first", ["import torch", "import linearize"])
def test_every_function_replaced(first: str) -> None:
    """Before this package is imported and after it, by functions of another name."""
    run(first, REPLACE, USE)


def installed() -> list[str]:
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


@pytest.mark.skipif(not installed(), reason="none of the packages is installed")
@pytest.mark.parametrize("first", ["import torch", "import linearize"])
def test_beside_packages_that_are_installed(first: str) -> None:
    """All that there are of those that are used most on top of PyTorch."""
    run(first, TRY.format(names=installed()), USE)
