"""What nobody can do without: `python -m benchmarks.floors` writes tables.

The targets of the benchmark that are missed are compared with what PyTorch and Python take for
the least that has to be done: reading a graph, watching what f reads, several matrix products
at once.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks.case import Case, flat
from benchmarks.cases import CASES
from benchmarks.report import markdown, rewrite
from benchmarks.stages import SHOWN

PAGE = Path("docs/benchmarks.md")
READING = "<!-- reading: begin -->", "<!-- reading: end -->"
STACKING = "<!-- stacking: begin -->", "<!-- stacking: end -->"
COUNT = 16


class Watching(TorchFunctionMode):
    """Does nothing at each operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def least(run: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> float:
    """Return the seconds of the quickest of some runs, what comes `before` each not counted."""
    taken = []
    for _ in range(rounds):
        before()
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def walk(outputs: Sequence[torch.Tensor]) -> int:
    """Look once at each node of a graph: edges, shapes, saved tensors; return how many."""
    seen: set[Any] = set()
    stack = [y.grad_fn for y in outputs if y.grad_fn is not None]
    names: dict[type, list[str]] = {}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node)
        if kind not in names:
            names[kind] = [n for n in dir(kind) if n.startswith("_saved_")]
        for m in node._input_metadata:
            m.shape, m.dtype, m.device  # noqa: B018
        for name in names[kind]:
            value = getattr(node, name)
            if isinstance(value, torch.Tensor):
                value.shape, value.stride(), value.dtype
        stack += [child for child, _ in node.next_functions if child is not None]
    return len(seen)


def reading(rounds: int) -> Iterator[list[str]]:
    """Yield a table of what looking at f and at its graph takes, in runs of f under autograd."""
    yield [
        "case",
        "nodes",
        "under autograd, ms",
        "after other work",
        "with an idle watcher",
        "one look at each node",
    ]
    for case in CASES:
        if case.name in SHOWN:
            yield _reading(case, rounds)


def _reading(case: Case, rounds: int) -> list[str]:
    problem = case.make(case.dtype)
    leaves = [p.detach().clone().requires_grad_() for p in problem.primals]

    def watched() -> Any:
        with Watching():
            return problem.f(*leaves)

    outputs = flat(problem.f(*leaves))
    count = walk(outputs)
    elsewhere = torch.ones(1 << 22)  # more than the processor's own caches hold
    gc.collect()
    gc.freeze()
    try:
        base = least(lambda: problem.f(*leaves), rounds)
        after = least(lambda: problem.f(*leaves), rounds, elsewhere.sum)
        watching = least(watched, rounds)
        looking = least(lambda: walk(outputs), rounds)
    finally:
        gc.unfreeze()
    return [
        case.name,
        str(count),
        f"{base * 1e3:.2f}",
        f"{after / base:.2f}",
        f"{watching / base:.2f}",
        f"{looking / base:.2f}",
    ]


def stacking(rounds: int) -> Iterator[list[str]]:
    """Yield a table of what many operations at once take, over one after the other."""
    yield ["operation", "one, µs", f"{COUNT} at once / {COUNT} singly"]
    for rows, n in ((16, 64), (128, 256), (256, 512)):
        w, v = torch.randn(n, n), torch.randn(COUNT, rows, n)
        yield _stacked(
            f"product of {rows} x {n} with {n} x {n}",
            lambda v=v, w=w: [x @ w for x in v],
            lambda v=v, w=w: v.view(-1, v.shape[2]) @ w,
            rounds,
        )
    for batch, channels, size in ((2, 8, 8), (8, 16, 32)):
        w = torch.randn(channels, channels, 3, 3)
        v = torch.randn(COUNT, batch, channels, size, size)
        yield _stacked(
            f"convolution 3 x 3 of {batch} x {channels} x {size}²",
            lambda v=v, w=w: [torch.conv2d(x, w) for x in v],
            lambda v=v, w=w: torch.conv2d(v.flatten(0, 1), w),
            rounds,
        )
    for n in (1_000, 32_768, 100_000):
        d, v = torch.randn(n), torch.randn(COUNT, n)
        yield _stacked(
            f"multiplication of {n:,} numbers",
            lambda v=v, d=d: [x * d for x in v],
            lambda v=v, d=d: v * d,
            rounds,
        )


def _stacked(
    name: str, singly: Callable[[], Any], together: Callable[[], Any], rounds: int
) -> list[str]:
    alone = least(singly, rounds)
    return [name, f"{alone / COUNT * 1e6:.1f}", f"{least(together, rounds) / alone:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for table, marks in ((reading, READING), (stacking, STACKING)):
        rows = []
        for row in table(given.rounds):
            rows.append(row)
            print(*row, sep="  ", flush=True)
        rewrite(PAGE, markdown(rows), *marks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
