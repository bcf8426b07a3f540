"""A survey of everyday functions: ten new points, K products at each, beside the best of PyTorch.

    python -m benchmarks.survey                     # all workloads, K = 1, 3, 10
    python -m benchmarks.survey --only filter -k 1

Small functions of many kinds, most of them launch-bound, where what a new point costs besides f
decides. The rivals are what a user of PyTorch would write: `torch.func.jvp` at each product, the
trick with two backwards over a graph that is kept, and `torch.autograd.grad` over a kept graph;
the best of them counts. Ways take turns point by point, in one process with one thread; each
figure is the second shortest of the points' processor times, after three points to warm up.
A workload loses where ours takes more than 1.2 times as long as the best rival.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

import linearize as lz
from benchmarks.case import Tensors, seeded
from benchmarks.engines import forget_programs
from benchmarks.outer import _normal
from benchmarks.report import markdown

T = torch.Tensor
POINTS, WARM = 10, 3
#: More than this times the best rival is a loss.
LOSES = 1.2
#: What is timed: the point, with tangents and cotangents to apply its products to.
Way: TypeAlias = Callable[[Tensors, Sequence[Tensors], Sequence[T]], Any]


# -- workloads ----------------------------------------------------------------------------


def _rand(*shape: int) -> T:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _layers(width: int, count: int) -> Tensors:
    return tuple(
        t for k in range(count) for t in (_rand(width, width + k)[:, :width] / width, _rand(width))
    )


def rosenbrock(x: T) -> T:
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


def decay(p: T) -> T:
    t = torch.linspace(0, 1, 40)
    return p[0] * torch.exp(-p[1] * t) + p[2] * torch.exp(-p[3] * t)


def motion(x: T) -> T:
    """One step of a body around a centre, as an extended Kalman filter linearizes it."""
    p, v = x[:3], x[3:]
    return torch.cat([p + 0.1 * v, v - 0.1 * p / p.norm() ** 3])


def arm(q: T) -> T:
    angles = q.cumsum(0)
    return torch.stack([angles.cos().sum(), angles.sin().sum()])


def pendulum(x: T) -> T:
    for _ in range(20):
        angle, speed = x[0], x[1]
        x = torch.stack([angle + 0.05 * speed, speed - 0.05 * angle.sin()])
    return x


def lorenz(x: T) -> T:
    def slope(s: T) -> T:
        return torch.stack([10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - s[2]])

    for _ in range(5):
        half = x + 0.005 * slope(x)
        x = x + 0.01 * slope(half)
    return x


def bratu(u: T) -> T:
    p = F.pad(u, (1, 1, 1, 1))
    around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
    return 1e3 * (around - 4 * u) + u.exp()


def burgers(u: T) -> T:
    for _ in range(20):
        u = u - 0.1 * u * (u - u.roll(1)) + 0.05 * (u.roll(1) - 2 * u + u.roll(-1))
    return u


def heat(k: T) -> T:
    u = torch.linspace(0, 1, 64)
    for _ in range(10):
        u = u + 0.1 * k * (u.roll(1) - 2 * u + u.roll(-1))
    return u


def spectrum(x: T) -> T:
    return torch.fft.irfft(torch.fft.rfft(x.sin()) * 0.5, n=x.shape[0])


def perceptron(*p: T) -> T:
    y = _rand(16, 64)
    for w, b in zip(p[::2], p[1::2], strict=True):
        y = torch.tanh(F.linear(y, w, b))
    return y


def inputs_of_a_network(x: T) -> T:
    w = _rand(64, 64) / 8
    for _ in range(4):
        x = F.gelu(x @ w)
    return x


def attention(q: T, k: T, v: T) -> T:
    heads = [t.view(16, 4, 8).transpose(0, 1) for t in (q, k, v)]
    weights = torch.softmax(heads[0] @ heads[1].transpose(1, 2) / 8**0.5, -1)
    return (weights @ heads[2]).transpose(0, 1).reshape(16, 32)


def recurrent(h: T) -> T:
    w = _rand(32, 32) / 16
    for _ in range(10):
        h = torch.tanh(h @ w + 0.1)
    return h


def logistic(w: T) -> T:
    return F.cross_entropy(_rand(200, 20) @ w, torch.arange(200) % 5)


def mixture(mean: T, weight: T) -> T:
    off = (_rand(100, 1) - mean) ** 2
    return torch.logsumexp(weight.log_softmax(0) - 4 * off, 1)


def kernel(x: T) -> T:
    points = x.view(20, 3)
    return torch.exp(-((points[:, None] - points[None]) ** 2).sum(-1)).sum(1)


def solved(a: T) -> T:
    return torch.linalg.solve(a @ a.T + torch.eye(16), torch.ones(16))


def indexed(x: T) -> T:
    i = torch.arange(300) * 7 % 100
    return torch.zeros(50).index_add(0, torch.arange(300) % 50, x[i].sin() * x[i.flip(0)])


def camera(pose: T, points: T) -> T:
    turned = points + torch.linalg.cross(pose[:3].expand_as(points), points) + pose[3:]
    return turned[:, :2] / (2 + turned[:, 2:])


def _convolutions() -> tuple[Callable[..., T], Tensors]:
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    )
    named = {k: p.detach() for k, p in net.eval().named_parameters()}
    x = _rand(4, 3, 16, 16)

    def convolutions(*p: T) -> T:
        found: T = torch.func.functional_call(net, dict(zip(named, p, strict=True)), (x,))
        return found

    return convolutions, tuple(named.values())


WORKLOADS: tuple[tuple[str, Callable[[], tuple[Callable[..., T], Tensors]]], ...] = (
    ("Rosenbrock residual of 20", lambda: (rosenbrock, (_rand(20),))),
    ("least squares of two decays", lambda: (decay, (_rand(4),))),
    ("extended Kalman filter", lambda: (motion, (_rand(6),))),
    ("robot arm of 7", lambda: (arm, (_rand(7),))),
    ("pendulum, 20 steps", lambda: (pendulum, (_rand(2),))),
    ("Lorenz, 5 midpoint steps", lambda: (lorenz, (_rand(3),))),
    ("Bratu 32 x 32", lambda: (bratu, (_rand(32, 32),))),
    ("Burgers 20 x 100", lambda: (burgers, (_rand(100),))),
    ("heat by its coefficient", lambda: (heat, (_rand(64),))),
    ("real FFT of 256", lambda: (spectrum, (_rand(256),))),
    ("perceptron by parameters", lambda: (perceptron, _layers(64, 6))),
    ("perceptron by inputs", lambda: (inputs_of_a_network, (_rand(8, 64),))),
    ("attention, 4 heads", lambda: (attention, (_rand(16, 32), _rand(16, 32), _rand(16, 32)))),
    ("recurrent network", lambda: (recurrent, (_rand(4, 32),))),
    ("convolutions, batch norm", _convolutions),
    ("softmax regression", lambda: (logistic, (_rand(20, 5),))),
    ("mixture of 5", lambda: (mixture, (_rand(5), _rand(5)))),
    ("kernel of 20 points", lambda: (kernel, (_rand(60),))),
    ("linear solve of 16", lambda: (solved, (_rand(16, 16),))),
    ("gather and scatter", lambda: (indexed, (_rand(100),))),
    ("camera and 50 points", lambda: (camera, (_rand(6), _rand(50, 3)))),
)


# -- ways ---------------------------------------------------------------------------------


def ours(f: Callable[..., T]) -> Way:
    forget_programs()
    lin = lz.Linearizer(f, maxsize=0)

    def way(x: Tensors, vs: Sequence[Tensors], us: Sequence[T]) -> Any:
        here = lin.at(*x)
        return [here.jvp_fn(*v) for v in vs], [here.vjp_fn(u) for u in us]

    return way


def forward_mode(f: Callable[..., T]) -> Way:
    def way(x: Tensors, vs: Sequence[Tensors], us: Sequence[T]) -> Any:
        forward = [torch.func.jvp(f, x, v)[1] for v in vs]
        return forward, _backward(f, x, us)

    return way


def kept_graph(f: Callable[..., T]) -> Way:
    """The trick with two backwards, which gives both products from one graph."""

    def way(x: Tensors, vs: Sequence[Tensors], us: Sequence[T]) -> Any:
        if not vs:
            return [], _backward(f, x, us)
        leaves = [t.detach().requires_grad_() for t in x]
        y = f(*leaves)
        back = [torch.autograd.grad(y, leaves, u, retain_graph=True) for u in us]
        w = torch.zeros_like(y, requires_grad=True)
        grads = torch.autograd.grad(y, leaves, w, create_graph=True)
        chosen = [(g, i) for i, g in enumerate(grads) if g.requires_grad]
        only, places = [g for g, _ in chosen], [i for _, i in chosen]
        forward = [
            torch.autograd.grad(only, w, [v[i] for i in places], retain_graph=True)[0] for v in vs
        ]
        return forward, back

    return way


def _backward(f: Callable[..., T], x: Tensors, us: Sequence[T]) -> list[Tensors]:
    if not us:
        return []
    leaves = [t.detach().requires_grad_() for t in x]
    y, last = f(*leaves), len(us) - 1
    return [torch.autograd.grad(y, leaves, u, retain_graph=k < last) for k, u in enumerate(us)]


OURS = "linearize"
WAYS: dict[str, Callable[[Callable[..., T]], Way]] = {
    OURS: ours,
    "torch.func.jvp": forward_mode,
    "kept graph": kept_graph,
}
DIRECTIONS = ("J·v", "Jᵀ·u", "both")


# -- one workload -------------------------------------------------------------------------


def measure(f: Callable[..., T], primals: Tensors, direction: str, k: int) -> dict[str, float]:
    """Return the seconds that each way takes for a point; only of ways that are right."""
    points = [
        tuple(p + d for p, d in zip(primals, _normal(primals, 1000 + i, 1e-2), strict=True))
        for i in range(WARM + POINTS)
    ]
    y = f(*primals)
    vs = [] if direction == "Jᵀ·u" else [_normal(primals, i, 1.0) for i in range(k)]
    us = [] if direction == "J·v" else [_normal((y,), 100 + i, 1.0)[0] for i in range(k)]
    ways = {name: make(f) for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i, x in enumerate(points):
        found: dict[str, Any] = {}
        for name in list(ways):
            try:
                begin = time.process_time()
                found[name] = ways[name](x, vs, us)
                times[name].append(time.process_time() - begin)
            except (RuntimeError, NotImplementedError):
                del ways[name], times[name]
        if i == 0:
            _compare(found)
    return {name: sorted(spent[WARM:])[1] for name, spent in times.items()}


def _compare(found: dict[str, Any]) -> None:
    """Raise if ways do not give the same."""
    mine = torch.utils._pytree.tree_leaves(found[OURS])
    for name, theirs in found.items():
        for a, b in zip(mine, torch.utils._pytree.tree_leaves(theirs), strict=True):
            if not (a - b).abs().max() <= 1e-3 * (1 + b.abs().max()):
                raise AssertionError(f"{name} gives something else")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survey", description=__doc__)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("-k", type=int, action="append", help="products at each point")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = [(d, k) for d in given.direction or DIRECTIONS for k in given.k or (1, 3, 10)]
    lost: dict[tuple[str, int], list[bool]] = {pair: [] for pair in asked}
    rows = [["workload", "f, µs", *(f"{d}, K = {k}" for d, k in asked)]]
    for name, make in WORKLOADS:
        if given.only not in name:
            continue
        f, primals = make()
        row = [name, f"{_alone(f, primals) * 1e6:.0f}"]
        for direction, k in asked:
            found = measure(f, primals, direction, k)
            best = min([t for n, t in found.items() if n != OURS])
            lost[direction, k].append(found[OURS] > LOSES * best)
            row.append(f"{found[OURS] / best:.2f}")
        rows.append(row)
        print(name, flush=True)
    rows.append(["loses", "", *(f"{sum(lost[pair])} of {len(lost[pair])}" for pair in asked)])
    print(f"\nTime of ours over that of the best rival:\n\n{markdown(rows)}")
    return 0


def _alone(f: Callable[..., T], primals: Tensors) -> float:
    spent = []
    for _ in range(POINTS):
        begin = time.process_time()
        f(*primals)
        spent.append(time.process_time() - begin)
    return sorted(spent)[1]


if __name__ == "__main__":
    sys.exit(main())
