"""Curvature products against curvlinops, on the same models: seconds per product, and memory.

    python -m benchmarks.curvature

Both sides go over the same batches in float64, where they must agree to 1e-10. The time of a
product is the smallest over the rounds, the two sides taking turns; the first product is given
apart, since linearizing and recording belong to it. Memory is what stays between products.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from benchmarks.report import rewrite
from linearize.curvature import Curvature, gauss_newton, hessian

PAGE = Path("docs/curvature.md")
MARKS = "<!-- curvature: begin -->", "<!-- curvature: end -->"


def mlp() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], nn.Module]:
    """Return a classifier of 784 inputs, with two batches."""
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    data = [(torch.randn(64, 784), torch.randint(10, (64,))) for _ in range(2)]
    return model, data, nn.CrossEntropyLoss()


def narrow() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], nn.Module]:
    """Return a deep and narrow regression, as physics-informed networks are."""
    layers: list[nn.Module] = [nn.Linear(2, 32), nn.Tanh()]
    for _ in range(6):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    data = [(torch.randn(256, 2), torch.randn(256, 1))]
    return model, data, nn.MSELoss()


def convnet() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], nn.Module]:
    """Return a small convolutional classifier."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )
    data = [(torch.randn(32, 1, 28, 28), torch.randint(10, (32,)))]
    return model, data, nn.CrossEntropyLoss()


CASES = {"mlp": mlp, "narrow": narrow, "convnet": convnet}


def seconds(call: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(name: str, kind: str, rounds: int) -> str:
    """Return one row of the table."""
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    torch.manual_seed(0)
    model, data, loss = CASES[name]()
    params = {k: p.detach() for k, p in model.named_parameters()}
    count = sum(p.numel() for p in params.values())
    v = torch.randn(count)

    def ours() -> Curvature:
        def apply(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(model, p, (x,))

        if kind == "GGN":
            return gauss_newton(apply, params, loss, data, reduction="mean")
        return hessian(lambda p, x, y: loss(apply(p, x), y), params, data, reduction="mean")

    theirs_type = GGNLinearOperator if kind == "GGN" else HessianLinearOperator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = theirs_type(model, loss, list(model.parameters()), data)
        want = theirs @ v
    made: list[Curvature] = []
    first = seconds(lambda: made.append(ours()) or made[0] @ v)  # type: ignore[func-returns-value]
    operator = made[0]
    mine, other = [], []
    for _ in range(rounds):
        mine.append(seconds(lambda: operator @ v))
        other.append(seconds(lambda: theirs @ v))
    error = float((operator @ v - want).abs().max() / want.abs().max())
    assert error < 1e-10, f"{name} {kind}: relative difference {error:.1e}"
    a, b, second = min(mine[1:]), min(other), mine[0]
    return (
        f"| {name} | {kind} | {count} | {1e3 * first:.1f} | {1e3 * second:.2f} | {1e3 * a:.2f} | "
        f"{1e3 * b:.2f} | {b / a:.1f} | {operator.nbytes / 2**20:.1f} |"
    )


def main() -> None:
    """Print the table and write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_dtype(torch.float64)
    lines = [
        "| model | matrix | n | first (ms) | second | later | curvlinops | ratio | MiB kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        for kind in ("GGN", "Hessian"):
            lines.append(compare(name, kind, given.rounds))
            print(lines[-1], flush=True)
    rewrite(PAGE, "\n".join(lines) + "\n", *MARKS)


if __name__ == "__main__":
    main()
