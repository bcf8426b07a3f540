"""Measure J·v of all engines side by side; print a table and write it as JSON.

Times are units of one run of f without autograd, medians over interleaved rounds in one
process and one thread: ratios mean something on a noisy machine, absolute times little. Each
engine's product is compared with one in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case
from benchmarks.engines import ENGINES

BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"
TOLERANCE = 2e-3  # of float32 against float64, relative to the largest entry


def seconds(work: Callable[[], Any], least: float = 2e-3) -> float:
    """Return the time of one call, repeated until it can be read off a clock."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            work()
        taken = time.perf_counter() - start
        if taken > least:
            return taken / count
        count *= max(2, int(1.2 * least / max(taken, 1e-7)))


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a direction and J·v in float64, by finite differences for opaque code."""
    f, (x,) = case.make(torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if not case.opaque:
        return v, torch.func.jvp(f, (x,), (v,))[1]
    h = 1e-5
    return v, (f(x + h * v) - f(x - h * v)) / (2 * h)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return, by engine, the median times of a product and of the set-up, or why there is none."""
    v64, expected = reference(case)
    dtype = torch.float64 if case.opaque else torch.float32
    f, primals = case.make(dtype)
    v = v64.to(dtype)
    engines = dict(ENGINES)
    if case.by_hand is not None:
        engines["by hand"] = lambda f, *p: case.by_hand(*p)  # type: ignore[misc]
    result: dict[str, Any] = {"case": case.name, "engines": {}}
    products: dict[str, Callable[[], Any]] = {}
    makers: dict[str, Callable[[], Any]] = {}
    for name, make in engines.items():
        try:
            product = make(f, *primals)
            for _ in range(4):  # a program that is run again is simplified
                got = product(v)
        except Exception as error:
            result["engines"][name] = {"fails": f"{type(error).__name__}: {error}"[:120]}
            continue
        off = float((got.double() - expected).abs().max() / expected.abs().max())
        if not off <= TOLERANCE:
            result["engines"][name] = {"wrong": off}
            continue
        products[name] = lambda product=product: product(v)
        makers[name] = lambda make=make: make(f, *primals)(v)
        result["engines"][name] = {"error": off}
    with torch.no_grad():
        runs = [seconds(lambda: f(*primals)) for _ in range(rounds)]
    times: dict[str, list[float]] = {name: [] for name in products}
    first: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, product in products.items():
            times[name].append(seconds(product))
    for _ in range(min(rounds, 3)):
        for name, maker in makers.items():
            first[name].append(seconds(maker))
    result["forward_ms"] = statistics.median(runs) * 1e3
    for name in products:
        entry = result["engines"][name]
        entry["jvp"] = statistics.median(times[name]) / statistics.median(runs)
        entry["first"] = statistics.median(first[name]) / statistics.median(runs)
    return result


def show(results: list[dict[str, Any]], key: str, title: str) -> None:
    """Print one table."""
    names = [*ENGINES, "by hand"]
    print(f"\n{title}, in runs of f without autograd")
    print(f"{'':42s}" + "".join(f"{n:>22s}" for n in names))
    for r in results:
        cells = []
        for name in names:
            entry = r["engines"].get(name, {})
            text = f"{entry[key]:.4g}" if key in entry else next(iter(entry), "-")
            cells.append(f"{text:>22s}")
        print(f"{r['case']:42s}" + "".join(cells))


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the tables for the documentation."""
    names = [*ENGINES, "by hand"]
    parts = [
        f"torch {torch.__version__.split('+')[0]}, one thread, float32 (the opaque case float64)."
    ]
    for key, title in (("jvp", "Steady J·v"), ("first", "Set-up and the first J·v")):
        parts.append(
            f"\n## {title}\n\n| case | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
        )
        for r in results:
            cells = []
            for name in names:
                entry = r["engines"].get(name, {})
                cells.append(f"{entry[key]:.3g}" if key in entry else next(iter(entry), "–"))
            parts.append(f"| {r['case']} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/jvp.json"))
    parser.add_argument("--docs", type=Path, help="a page whose generated part is rewritten")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    for case in CASES:
        if options.only in case.name:
            print(f"{case.name} ...", flush=True)
            results.append(measure(case, options.rounds))
    show(results, "jvp", "Steady J·v")
    show(results, "first", "Set-up and the first J·v")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1))
    print(f"\nWritten to {options.out}")
    if options.docs is not None:
        head, _, rest = options.docs.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        options.docs.write_text(f"{head}{BEGIN}\n{markdown(results)}{END}{tail}")


if __name__ == "__main__":
    main()
