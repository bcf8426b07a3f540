"""Products of an f that communicates: what is kept, sent, and waited for, on 1, 2 and 4 ranks.

    python -m benchmarks.ranks                   # a table
    python -m benchmarks.ranks --docs docs       # into docs/distributed.md and docs/scaling.md

Messages and their bytes are counted by standing in the place of the functions of
`torch.distributed`; a message has the bytes that a rank hands in. The local work is the product
of the same f with its messages left out, on as many ranks at one time. A time is that of the
quickest of several rounds, on the rank that takes longest. Ranks are processes of one machine, and
speak over gloo's TCP.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dnn

import linearize as lz
from benchmarks import scaling
from benchmarks.report import markdown, rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from bratu_ranks import Neighbours, gathered_rows, residual
from on_ranks import counting, on_ranks

#: A message: who sends, and how many bytes.
Message: TypeAlias = tuple[str, int]
Function: TypeAlias = Callable[..., torch.Tensor]
WORLDS = (1, 2, 4)
GRID, WIDTH, HIDDEN, BATCH, LAYERS = 512, 128, 512, 64, 2
WARM, ROUNDS = 8, 40
COUNTED = ("all_gather", "reduce_scatter", "all_reduce", "isend")
MARKS = "<!-- begin ranks -->", "<!-- end ranks -->"


# -- functions --------------------------------------------------------------------------------


def grid(exchange: Function) -> tuple[Function, Any]:
    """Return Bratu's residual on this rank's rows of a grid, and where it is taken."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.arange(GRID).tensor_split(world)[rank]
    x = torch.linspace(0, torch.pi, GRID, dtype=torch.float64).sin()
    return residual(exchange, GRID), x[rows][:, None] * x


def network(total: Function) -> tuple[Function, Any]:
    """Return layers that are split over the ranks by columns, then by rows (Megatron-LM)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=draw)
    weights = []
    for _ in range(LAYERS):
        A, B = (
            torch.randn(*shape, dtype=torch.float64, generator=draw) / shape[0] ** 0.5
            for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
        )
        own = slice(rank * HIDDEN // world, (rank + 1) * HIDDEN // world)
        weights.append((A[:, own].contiguous(), B[own].contiguous()))

    def f(weights: Any) -> torch.Tensor:
        y = data
        for A, B in weights:
            y = y + total(torch.tanh(y @ A) @ B)
        return y.tensor_split(world)[rank]

    return f, weights


@dataclasses.dataclass(frozen=True)
class Case:
    """An f with its messages, and without."""

    name: str
    make: Callable[[Function], tuple[Function, Any]]
    speaks: Function
    silent: Function


CASES = (
    Case("grid, borders gathered", grid, gathered_rows, lambda part: part[[-1, 0]]),
    Case("grid, `isend` and `irecv`", grid, Neighbours.apply, lambda part: part[[-1, 0]]),
    Case("layers, tensor-parallel", network, dnn.all_reduce, lambda t: t),
)


# -- measuring --------------------------------------------------------------------------------


def seconds(*calls: Callable[[], Any]) -> list[tuple[float, float]]:
    """Return the time of each of some calls, which take turns, and that of the processor."""
    found: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARM):
            call()
    for _ in range(ROUNDS):
        for call, times in zip(calls, found, strict=True):
            dist.barrier()
            began = time.perf_counter(), time.process_time()
            call()
            ended = time.perf_counter(), time.process_time()
            times.append((ended[0] - began[0], ended[1] - began[1]))
    return [(min(t for t, _ in times), min(t for _, t in times)) for times in found]


def measured(case: Case) -> dict[str, Any]:
    """Measure a case on this rank."""
    f, x = case.make(case.speaks)
    here, alone = (
        lz.Linearizer(case.make(g)[0], dense_limit=0).at(x) for g in (case.speaks, case.silent)
    )
    draw = torch.Generator().manual_seed(dist.get_rank())
    v, u = (
        space.element_of([spec.random(draw) for spec in space.tensors])
        for space in (here.in_space, here.out_space)
    )
    products = {"J·v": lambda p: p.jvp_fn(*v), "Jᵀ·u": lambda p: p.vjp_fn(u)}
    found: dict[str, Any] = {"kept": here.nbytes}
    with counting(*COUNTED) as found["f"], torch.no_grad():
        f(x)
    for name, product in products.items():
        local, whole = seconds(partial(product, alone), partial(product, here))
        with counting(*COUNTED) as messages:
            product(here)
        found[name] = {
            "messages": messages,
            "local": local[0],
            "whole": whole[0],
            "processor": (local[1], whole[1]),
        }
    return found


def ping() -> dict[int, float]:
    """Return how long all-reductions of some sizes take."""
    tensors = {size: torch.zeros(size // 8, dtype=torch.float64) for size in scaling.PINGS}
    times = seconds(*(partial(dist.all_reduce, t) for t in tensors.values()))
    return {size: t for size, (t, _) in zip(tensors, times, strict=True)}


def found_here() -> dict[str, Any]:
    """Return all that is measured on this rank."""
    return {"ping": ping()} | {case.name: measured(case) for case in CASES}


# -- what is written --------------------------------------------------------------------------


def sent(messages: Sequence[Message]) -> str:
    """Return how many messages there are, and their bytes."""
    own = [size for name, size in messages if name != "agree"]
    return f"{len(own)}, {sum(own):,} B" if own else "–"


def table(found: dict[int, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Yield one line for each case and number of ranks."""
    yield [
        "f", "ranks", "bytes kept", "f sends", "J·v sends", "Jᵀ·u sends", "to agree",
        "processor, ms", "local work, ms",
    ]  # fmt: skip
    for case in CASES:
        for world, ranks in found.items():
            here = [r[case.name] for r in ranks]
            most = max(here, key=lambda r: sum(size for _, size in r["f"]))
            products = [most[name] for name in scaling.PRODUCTS]
            told = [size for name, size in products[0]["messages"] if name == "agree"]
            work, whole = (
                ", ".join(
                    f"{max(r[name]['processor'][i] for r in here) * 1e3:.2f}"
                    for name in scaling.PRODUCTS
                )
                for i in (0, 1)
            )
            yield [
                case.name,
                str(world),
                f"{max(r['kept'] for r in here):,}",
                sent(most["f"]),
                *(sent(p["messages"]) for p in products),
                f"{len(told)}, {sum(told)} B",
                whole,
                work,
            ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, help="the folder of pages to be written")
    options = parser.parse_args(arguments)
    found = on_ranks(WORLDS, found_here)
    rows = markdown(list(table(found)))
    page = scaling.page(found)
    print(rows, page, sep="\n\n")
    if options.docs:
        rewrite(options.docs / "distributed.md", rows + "\n", *MARKS)
        (options.docs / "scaling.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
