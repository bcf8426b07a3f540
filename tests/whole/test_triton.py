"""Triton kernels on the CPU, by Triton's interpreter, in a process of its own.

Triton is no requirement of the development tools: its wheel has 270 MB, a gigabyte unpacked.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)

#: Three layers at two points, in both directions, of forms that take over by and by.
PRODUCTS = """
import torch
import linearize as lz
from benchmarks.triton_functions import SiLU

weights = [torch.randn(1500, generator=torch.Generator().manual_seed(k)) for k in range(3)]
runs = 0


def network(x, silu):
    for w in weights:
        x = silu(x * w)
    return x


def f(x):
    global runs
    runs += 1
    return network(x, SiLU.apply)


def plain(x):
    return network(x, torch.nn.functional.silu)


lin = lz.Linearizer(f)
for k in range(2):
    x, v = weights[k].cos(), weights[k].sin()
    value, expected = torch.func.jvp(plain, (x,), (v,))
    (back,) = torch.func.vjp(plain, x)[1](v)
    here = lin.at(x)
    torch.testing.assert_close(here.value, value)
    for _ in range(5):
        torch.testing.assert_close(here.jvp_fn(v), expected)
        torch.testing.assert_close(here.vjp_fn(v)[0], back)
    vs = torch.stack([v, 2 * v, -v])
    torch.testing.assert_close(here.jvp_fn.batched(vs)[1], 2 * expected)
print(runs, lin.stats().recorded)
"""


def test_a_function_of_triton_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "1"]
