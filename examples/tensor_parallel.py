"""Find the largest eigenvalues of the Gauss-Newton matrix of a network that is split over ranks.

The layers of the network are split by `parallelize_module` of torch.distributed, so that its
parameters are DTensors. The matrix is Jᵀ·J for the Jacobian of its outputs by all parameters,
known by products; f runs once. Lanczos' method is written in PyTorch, on pytrees of DTensors,
whose inner products are those of the whole. One, two and four ranks find the eigenvalues of the
matrix that one process writes out.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from gallery import figure, options, save, table
from on_ranks import on_ranks
from torch import nn
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.func import functional_call, jacrev

import linearize as lz

WANTED = 8
#: What ranks say to each other in a product.
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


class Network(nn.Module):
    """Two hidden layers that each are split: one by its outputs, the next by its inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, dtype=torch.float64)
        self.second = nn.Linear(width, 10, dtype=torch.float64)
        self.third = nn.Linear(10, width, dtype=torch.float64)
        self.fourth = nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return three outputs for each row."""
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.fourth(torch.tanh(self.third(x)))


def network(width: int) -> Network:
    """Return the network, the same wherever it is made."""
    torch.manual_seed(0)
    return Network(width)


def inputs(rows: int) -> torch.Tensor:
    """Return what the network is applied to, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator)


def lanczos(A: lz.operators.LinearOperator, start: Any, steps: int) -> torch.Tensor:
    """Return eigenvalues of a symmetric operator, with all vectors kept orthogonal.

    Golub and Van Loan, Matrix Computations, section 10.3. Vectors are elements of the operator's
    space, pytrees of tensors; `dot` is the inner product of whole vectors.
    """
    space = A.in_space
    q = scaled(start, 1 / space.norm(start))
    basis, diagonal, beside = [q], [], []
    for _ in range(steps):
        w = A(basis[-1])
        diagonal.append(space.dot(basis[-1], w))
        for _ in range(2):  # a second time for what rounding left
            for q in basis:
                w = added(w, q, -space.dot(q, w))
        beside.append(space.norm(w))
        if beside[-1] < 1e-12 * diagonal[0]:
            break
        basis.append(scaled(w, 1 / beside[-1]))
    T = torch.diag(torch.stack(diagonal))
    off = torch.stack(beside[: len(diagonal) - 1])
    return torch.linalg.eigvalsh(T + torch.diag(off, 1) + torch.diag(off, -1)).flip(0)


def scaled(v: Any, factor: torch.Tensor) -> Any:
    """Return a multiple of a pytree."""
    return {name: t * float(factor) for name, t in v.items()}


def added(v: Any, w: Any, factor: torch.Tensor) -> Any:
    """Return v + factor·w for pytrees."""
    return {name: t + float(factor) * w[name] for name, t in v.items()}


def solve(width: int, rows: int, steps: int) -> dict[str, Any]:
    """Find the eigenvalues on this rank, and count what it takes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    plan |= {"third": ColwiseParallel(), "fourth": RowwiseParallel()}
    model = parallelize_module(network(width), mesh, plan)
    x = inputs(rows)
    runs = 0

    def f(parameters: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        y: torch.Tensor = functional_call(model, parameters, (x,))
        return y

    began = time.perf_counter()
    here = lz.Linearizer(f).at({name: p.detach() for name, p in model.named_parameters()})
    A = here.jacobian.gram()
    start = A.in_space.random(torch.Generator().manual_seed(2))
    found = lanczos(A, start, steps)[:WANTED]
    seconds = time.perf_counter() - began
    programs = here.program
    return {
        "eigenvalues": found,
        "runs": runs,
        "kept": here.nbytes,
        "messages": [counted(str(p)) for p in (programs.pushforward, programs.pullback)],
        "seconds": seconds,
    }


def counted(program: str) -> int:
    """Count the collectives of a program that is printed."""
    words = Counter(word for line in program.splitlines() for word in line.split("("))
    return sum(count for word, count in words.items() if word.endswith(COLLECTIVES))


def whole(width: int, rows: int) -> torch.Tensor:
    """Return the eigenvalues of the matrix, written out by one process."""
    model, x = network(width), inputs(rows)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    J = torch.cat([b.reshape(3 * rows, -1) for b in blocks.values()], 1)
    return torch.linalg.eigvalsh(J @ J.T).flip(0)[:WANTED]


def main(arguments: Sequence[str] | None = None) -> int:
    """Find the eigenvalues on one, two and four ranks, print a table, draw them."""
    wanted = options(__doc__, "tensor_parallel", arguments)
    width, rows, steps = (8, 4, 14) if wanted.quick else (128, 8, 24)
    worlds = (2,) if wanted.quick else (1, 2, 4)
    exact = whole(width, rows)
    lines = []
    found = {n: ranks[0] for n, ranks in on_ranks(worlds, solve, width, rows, steps).items()}
    for world, this in found.items():
        off = float(((this["eigenvalues"] - exact) / exact[0]).abs().max())
        if off > 1e-10 or this["runs"] != 1:
            raise RuntimeError(f"{world} ranks: not what one process finds")
        row = [f"ranks: {world}", this["runs"], f"{this['eigenvalues'][0]:.6f}", f"{off:.0e}"]
        row += [*this["messages"], f"{this['kept']:,}", f"{this['seconds']:.2f}"]
        lines.append(row)
    header = ["", "runs of f", "largest", "difference", "messages of J·v", "of Jᵀ·u"]
    print(table([*header, "bytes kept", "seconds"], lines))
    made, axes = figure(1, width=5)
    axes[0, 0].semilogy(range(1, WANTED + 1), exact, "k_", ms=22, label="matrix, one process")
    for (world, this), mark in zip(found.items(), "o+x", strict=False):
        values = this["eigenvalues"]
        axes[0, 0].semilogy(range(1, WANTED + 1), values, mark, mfc="none", label=f"{world} ranks")
    axes[0, 0].set_title("largest eigenvalues of Jᵀ·J")
    axes[0, 0].legend()
    save(made, wanted.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
