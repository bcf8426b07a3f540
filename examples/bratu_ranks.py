"""Solve Δu + λ·exp(u) = 0 on a square that is split over the ranks of torch.distributed.

Each rank has some rows of the grid and needs those beside them: once gathered by a collective,
once sent by a custom Function. Newton–Krylov is written in PyTorch: GMRES on vectors of which each
rank has a part, with the inner products of `linearize.distributed`, and preconditioned by the
block of the Laplacian that belongs to the rank. One, two and four ranks find the same solution.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dnn
from gallery import figure, options, save, table
from on_ranks import counting, on_ranks

import linearize as lz
import linearize.distributed as lzd

PARAMETER = 6.0
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "isend")


class Neighbours(torch.autograd.Function):
    """The last row of the rank above and the first of the rank below; zero at the boundary."""

    @staticmethod
    def forward(part: torch.Tensor) -> torch.Tensor:
        return swap(up=part[0], down=part[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rows = len(inputs[0])

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return swap(up=v[0], down=v[-1])

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        back = swap(up=u[0], down=u[1])  # what came from above goes back there
        grad = u.new_zeros(ctx.rows, u.shape[1])
        grad[-1] += back[1]
        grad[0] += back[0]
        return grad


def swap(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Send a row to each neighbour, and return those that come: from above, from below."""
    rank, world = dist.get_rank(), dist.get_world_size()
    came = torch.zeros(2, len(up), dtype=up.dtype)
    pairs = [(rank - 1, up, came[0]), (rank + 1, down, came[1])]
    work = []
    for other, row, place in pairs:
        if 0 <= other < world:
            work += [dist.isend(row.contiguous(), other), dist.irecv(place, other)]
    for w in work:
        w.wait()
    return came


def gathered_rows(part: torch.Tensor) -> torch.Tensor:
    """Do the same by a collective: all ranks get the border rows of all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    borders = dnn.all_gather(torch.stack([part[0], part[-1]]))
    zero = torch.zeros_like(part[0])
    above = borders[rank - 1][1] if rank > 0 else zero
    below = borders[rank + 1][0] if rank < world - 1 else zero
    return torch.stack([above, below])


def residual(
    exchange: Callable[[torch.Tensor], torch.Tensor], n: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return Δu + λ·exp(u) at a rank's rows of an n by n grid, scaled by h²."""

    def f(part: torch.Tensor) -> torch.Tensor:
        above, below = exchange(part)
        tall = torch.cat([above[None], part, below[None]])
        wide = torch.nn.functional.pad(part, (1, 1))
        laplacian = tall[2:] + tall[:-2] + wide[:, 2:] + wide[:, :-2] - 4 * part
        return laplacian + PARAMETER / (n + 1) ** 2 * torch.exp(part)

    return f


def block_inverse(rows: int, n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what solves with the Laplacian on a rank's rows alone."""
    line = lambda k: torch.diag(torch.ones(k - 1), 1) + torch.diag(torch.ones(k - 1), -1)  # noqa: E731
    block = torch.kron(line(rows), torch.eye(n)) + torch.kron(torch.eye(rows), line(n))
    block = block.double() - 4 * torch.eye(rows * n, dtype=torch.float64)
    factors = torch.linalg.lu_factor(block)
    return lambda b: torch.linalg.lu_solve(*factors, b[:, None])[:, 0]


def gmres(
    A: Any, b: torch.Tensor, inverse: Callable[[torch.Tensor], torch.Tensor], rtol: float
) -> tuple[torch.Tensor, int]:
    """Solve A·x = b on vectors of parts: Saad and Schultz (1986), preconditioned on the right."""
    space = A.out_space
    beta = lzd.norm(space, b)
    basis, columns = [b / beta], []
    while True:
        w = A @ inverse(basis[-1])
        column = []
        for q in basis:
            column.append(lzd.dot(space, q, w))
            w = w - column[-1] * q
        column.append(lzd.norm(space, w))
        columns.append(torch.stack(column))
        k = len(columns)
        H = torch.zeros(k + 1, k, dtype=torch.float64)
        for j, h in enumerate(columns):
            H[: len(h), j] = h
        right = torch.zeros(k + 1, 1, dtype=torch.float64)
        right[0] = beta
        y = torch.linalg.lstsq(H, right, driver="gelsd").solution
        if float((H @ y - right).norm()) <= rtol * float(beta) or k == 400:
            return inverse(torch.stack(basis, 1) @ y[:, 0]), k
        basis.append(w / column[-1])


def solve(kind: str, n: int) -> dict[str, Any]:
    """Solve on this rank, and count what it takes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = len(torch.arange(n).tensor_split(world)[rank])
    runs = 0
    f = residual(gathered_rows if kind == "collective" else Neighbours.apply, n)

    def counted(part: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return f(part)

    linearizer, inverse = lz.Linearizer(counted), block_inverse(rows, n)
    u = torch.zeros(rows, n, dtype=torch.float64)
    steps = products = 0
    began = time.perf_counter()
    while True:
        here = linearizer.at(u)
        J = here.jacobian if kind == "collective" else lzd.parted(here.jacobian)
        value = here.value.reshape(-1)
        if float(lzd.norm(J.out_space, value)) < 1e-13 * n:
            break
        if steps == 20:
            raise RuntimeError("Newton's method did not converge")
        change, k = gmres(J, -value, inverse, 1e-10)
        u = u + change.reshape(u.shape)
        steps, products = steps + 1, products + k
    seconds = time.perf_counter() - began
    with counting(*COLLECTIVES) as per_run:
        f(u)
    v = torch.randn(rows * n, dtype=torch.float64)
    for _ in range(8):
        J @ v
    with counting(*COLLECTIVES) as per_product:
        for _ in range(10):
            J @ v
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, u)
    return {
        "u": torch.cat(parts),
        "steps": steps,
        "products": products,
        "runs": runs,
        "kept": here.nbytes,
        "f": len(per_run),
        "product": len(per_product) / 10,
        "agreeing": sum(name == "agree" for name, _ in per_product) / 10,
        "seconds": seconds,
    }


def solve_all(kinds: Sequence[str], n: int) -> dict[str, Any]:
    """Solve with each kind of exchange."""
    return {kind: solve(kind, n) for kind in kinds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Solve on one, two and four ranks, print a table, draw solution and partition."""
    wanted = options(__doc__, "bratu_ranks", arguments)
    n, worlds = (12, (1, 2)) if wanted.quick else (32, (1, 2, 4))
    kinds = ("collective", "isend, irecv")
    lines = []
    found = {k: ranks[0] for k, ranks in on_ranks(worlds, solve_all, kinds, n).items()}
    for kind in kinds:
        for world in worlds:
            one, this = found[1][kind], found[world][kind]
            off = float((this["u"] - found[1][kinds[0]]["u"]).abs().max())
            if off > 1e-10 or this["steps"] != one["steps"] or this["runs"] != this["steps"] + 1:
                raise RuntimeError(f"{world} ranks, {kind}: not what one rank finds")
            row = [f"{kind}, ranks: {world}", this["steps"], this["runs"], this["products"]]
            told = this["agreeing"]
            row += [this["f"], f"{this['product'] - told:g} + {told:g}"]
            row += [f"{this['kept']:,}", f"{off:.0e}", f"{this['seconds']:.2f}"]
            lines.append(row)
    header = ["halo exchange", "Newton steps", "runs of f", "J·v", "messages of f", "of J·v"]
    print(table([*header, "bytes kept", "difference", "seconds"], lines))
    print("Messages of J·v: as many as of f, and those by which ranks agree on the product.")
    made, axes = figure(1, width=5)
    image = axes[0, 0].imshow(found[1][kinds[0]]["u"].numpy(), extent=(0, 1, 1, 0), cmap="viridis")
    made.colorbar(image)
    for cut in [len(r) for r in torch.arange(n).tensor_split(worlds[-1])][:-1]:
        axes[0, 0].axhline(cut / n * (1 + len(axes[0, 0].lines)), color="white", ls="--")
    axes[0, 0].set_title(f"Δu + {PARAMETER:g}·exp(u) = 0 on {worlds[-1]} ranks")
    save(made, wanted.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
