"""Large graphs: no recursion, and work and memory in proportion to the number of nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import linearize as lz
from tests.support.comparing import CALLS

D = torch.float64


def chain(n: int, x: torch.Tensor) -> torch.Tensor:
    """n nodes one after the other; simplified, a single multiplication."""
    for _ in range(n // 3):
        x = x + torch.sin(x) * 1e-4
    return x


def fan(n: int, x: torch.Tensor) -> torch.Tensor:
    """n nodes side by side, joined at the end."""
    return torch.stack([x[i % 5] * (i / n) for i in range(n // 2)]).sum() * x


def ladder(n: int, x: torch.Tensor) -> torch.Tensor:
    """Every step uses the one before and the input: nothing to fold but the factor."""
    h = x
    for _ in range(n // 4):
        h = h.cumsum(0) * 0.4
        h = h.flip(0) + x
    return h


def calls(work: Callable[[], Any]) -> int:
    """Count the Python and C functions that are called."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def counts(f: Callable[[int, torch.Tensor], torch.Tensor], n: int) -> list[int]:
    """Count the calls of each step of a point's life."""
    x = torch.linspace(0.1, 0.5, 5, dtype=D)
    lin = lz.Linearizer(lambda x: f(n, x))
    held: list[Any] = []
    steps = [calls(lambda: held.append(lin.at(x)))]
    (here,) = held
    steps += [calls(lambda: here.jvp_fn(x)) for _ in range(CALLS)]
    steps += [calls(lambda: here.vjp_fn(x)) for _ in range(CALLS)]
    steps += [calls(lin.stats), calls(lambda: lin.at(x)), calls(here.close)]
    return steps


@pytest.mark.parametrize("f", [chain, fan, ladder])
def test_work_grows_in_proportion(f: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Four times the nodes take about four times the calls, at every step."""
    small, large = counts(f, 250), counts(f, 1000)
    assert small[1] > 2500  # the counting sees the recording
    for a, b in zip(small, large, strict=True):
        assert b <= 4.4 * a + 100


def test_what_is_kept_grows_in_proportion() -> None:
    x = torch.linspace(0.1, 0.5, 5, dtype=D)
    sizes = []
    for n in (500, 2000):
        here = lz.Linearizer(lambda x, n=n: chain(n, x), simplify=False).at(x)
        for _ in range(CALLS):
            here.jvp_fn(x)
            here.vjp_fn(x)
        sizes.append(here.nbytes)
    assert 0 < sizes[1] <= 4.1 * sizes[0]


def test_a_graph_much_deeper_than_the_recursion_limit() -> None:
    x = torch.linspace(0.1, 0.5, 5, dtype=D)
    n = 5 * sys.getrecursionlimit()
    assert n >= 5000
    here = lz.Linearizer(lambda x: chain(n, x)).at(x)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(chain(n, leaf).sum(), leaf)
    assert float(slope.abs().max()) > 1e-12
    for call in range(CALLS):
        v = torch.randn(5, dtype=D, generator=torch.Generator().manual_seed(call))
        torch.testing.assert_close(here.jvp_fn(v), v * slope, rtol=1e-8, atol=0.0)
        torch.testing.assert_close(here.vjp_fn(v)[0], v * slope, rtol=1e-8, atol=0.0)


DEATHS = """
import threading, torch, linearize as lz
from linearize.func import jvp

class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g

def f(x):
    for _ in range(3000):
        x = torch.sin(x) * 1.1
    return x

kept = []

def keeps(x):
    y = f(x)
    kept.append(y)
    return y * 2

def use():
    x = torch.ones(2)
    lz.Linearizer(f).at(x)  # dropped without a product
    here = lz.Linearizer(f).at(x)
    here.jvp_fn(x)  # recorded, and the graph let go
    here = lz.Linearizer(lambda x: Identity.apply(f(x))).at(x)
    here.vjp_fn(x)  # the context keeps the graph below it
    del here
    lz.Linearizer(keeps).at(x).vjp_fn(x)
    kept.clear()  # a user's own reference goes last
    jvp(f, (x.requires_grad_(),), (x.detach(),))
    done.append(1)

done = []
threading.stack_size(256 * 1024)
thread = threading.Thread(target=use)
thread.start()
thread.join()
assert done
print("alive")
"""


def test_a_deep_graph_dies_without_recursion() -> None:
    """PyTorch destroys nodes that Python has seen one inside the other; on a small stack of
    256 KiB, some thousand of them overflow it."""
    run = subprocess.run(
        [sys.executable, "-c", DEATHS], capture_output=True, text=True, check=False
    )
    assert run.stdout == "alive\n", run.stderr


HUGE = """
import sys, torch, linearize as lz
from tests.whole.test_large import chain, ladder

x = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
f = {"chain": chain, "ladder": ladder}[sys.argv[1]]
here = lz.Linearizer(lambda x: f(100_000, x)).at(x)
for _ in range(4):
    forward, back = here.jvp_fn(x), here.vjp_fn(x)[0]
    torch.testing.assert_close(x @ forward, x @ back, rtol=1e-6, atol=1e-9)
del here
print("alive")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "ladder"])
def test_a_hundred_thousand_nodes(name: str) -> None:
    command = [sys.executable, "-c", HUGE, name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "alive\n", run.stderr
