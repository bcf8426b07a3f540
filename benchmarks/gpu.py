"""The group of cases for a CUDA device: launch-bound and large ones, eager and replayed.

For each engine: the time of a product between two events of the stream, and the sum of the
times of its kernels. Where both are the same, the device never waits for the host. Ours run
under `torch.cuda.set_sync_debug_mode("error")`: a product that waits for the device fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import linearize as lz
from benchmarks import engines, report
from benchmarks.case import Case, Limit, Problem, Tensors, flat, randn
from benchmarks.cases import burgers, chain, mlp, transformer
from benchmarks.measure import CALLS, error, reference

Result = dict[str, Any]


def unavailable() -> str | None:
    """Return why the group cannot run here, or None."""
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


# -- cases ------------------------------------------------------------------------------


def _triton(n: int, dtype: torch.dtype) -> Problem:
    """Return eight layers of a Triton-written SiLU; in float64 the same in PyTorch's terms."""
    x, w = randn(n, dtype=dtype), [randn(n, dtype=dtype, seed=s) for s in range(8)]
    reference_only = dtype == torch.float64
    if reference_only:
        silu: Any = torch.nn.functional.silu
    else:
        from benchmarks.triton_functions import SiLU

        silu = SiLU.apply

    def f(x: torch.Tensor) -> torch.Tensor:
        for weight in w:
            x = silu(x * weight)
        return x

    def limit() -> Limit:
        y, factors = x, []
        for weight in w:
            z = y * weight
            s = torch.sigmoid(z)
            factors.append(s * (1 + z * (1 - s)) * weight)
            y = z * s

        def product(v: torch.Tensor) -> torch.Tensor:
            for factor in factors:
                v = v * factor
            return v

        return Limit(product, product)

    return Problem(f, (x,), limit)


def cases() -> tuple[Case, ...]:
    """Return the cases: those under a millisecond wait for launches, the others do not."""
    small, large = "small", "large"
    found = [
        Case("pointwise chain, n = 1,000", small, lambda d: chain.problem(1000, d)),
        Case("MLP 6 x 64, batch 16", small, lambda d: mlp.wrt_input(64, 16, d)),
        Case(
            "transformer layer 64, 8 x 32",
            small,
            lambda d: transformer.problem(64, 32, 8, d, inputs=True),
        ),
        Case("Burgers, 50 steps, n = 1,000", small, lambda d: burgers.problem(1000, 50, d)),
        Case("MLP 6 x 4096, batch 2048", large, lambda d: mlp.wrt_input(4096, 2048, d)),
        Case(
            "transformer layer 1024, 16 x 256, parameters",
            large,
            lambda d: transformer.problem(1024, 256, 16, d, inputs=False),
        ),
        Case("Burgers, 20 steps, n = 10,000,000", large, lambda d: burgers.problem(10**7, 20, d)),
    ]
    if importlib.util.find_spec("triton") is not None:
        found += [
            Case("Triton Function, n = 10,000", small, lambda d: _triton(10_000, d)),
            Case("Triton Function, n = 20,000,000", large, lambda d: _triton(20_000_000, d)),
        ]
    return tuple(found)


# -- engines ----------------------------------------------------------------------------

Product = Callable[..., Any]


def replayed(product: Product, arguments: Tensors) -> Product:
    """Capture a product into a CUDA graph and return its replay with arguments copied in."""
    static = [a.clone() for a in arguments]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up lazily must not be captured
        for _ in range(CALLS):
            product(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flat(product(*static))

    def replay(*given: torch.Tensor) -> Tensors:
        for kept, new in zip(static, given, strict=True):
            kept.copy_(new)
        graph.replay()
        return tuple(t.clone() for t in results)

    return replay


def _makers(v: Tensors) -> dict[str, Callable[[Problem], Product]]:
    def jvp_of(make: Callable[[Problem], engines.Made]) -> Callable[[Problem], Product]:
        return lambda problem: make(problem).jvp  # type: ignore[return-value]

    def captured(make: Callable[[Problem], engines.Made]) -> Callable[[Problem], Product]:
        return lambda problem: replayed(make(problem).jvp, v)  # type: ignore[arg-type]

    found = {
        engines.OURS: jvp_of(engines.ours),
        "linearize, captured": captured(engines.ours),
        "torch.func.jvp": jvp_of(engines.func_each),
        "torch.func.linearize": jvp_of(engines.func_linearize),
        "double backward": jvp_of(engines.double_backward),
        engines.LIMIT: jvp_of(engines.limit),
        "limit, captured": captured(engines.limit),
    }
    if "compile" in inspect.signature(lz.Linearizer).parameters:

        def compiled(problem: Problem) -> Product:
            options: Any = {"compile": True}
            return lz.Linearizer(problem.f, **options).at(*problem.primals).jvp_fn

        found["linearize, compile=True"] = compiled
    return found


# -- measurements -----------------------------------------------------------------------


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Turn a wait for the device into an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def seconds(work: Callable[[], Any], count: int = 20) -> float:
    """Return the time of one call between two events of the stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count / 1e3


def kernel_seconds(work: Callable[[], Any], count: int = 5) -> float:
    """Return the sum of the times of the kernels of one call."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(count):
            work()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / count / 1e6


def _on_another_stream(work: Callable[[], Any]) -> Tensors:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = flat(work())
    torch.cuda.current_stream().wait_stream(side)
    return found


def measure(case: Case, rounds: int) -> Result:
    """Return the times of J·v of all engines on one case, each verified first."""
    with torch.device("cuda"):
        known, problem = reference(case), case.make(case.dtype)
    v = tuple(t.to(case.dtype) for t in known.tangents)
    result: Result = {"case": case.name, "size": case.size, "engines": {}}
    works: dict[str, Callable[[], Any]] = {}
    for name, make in _makers(v).items():
        try:
            product = make(problem)
            work = lambda product=product: product(*v)  # noqa: E731
            off = max(error(flat(work()), known.jvp) for _ in range(CALLS))
            off = max(off, error(_on_another_stream(work), known.jvp))
            if name.startswith(engines.OURS):
                with no_synchronisation():
                    work()
        except Exception as reason:
            result["engines"][name] = {"fails": f"{type(reason).__name__}: {reason}"[:200]}
            continue
        if not off <= case.tolerance:
            result["engines"][name] = {"wrong": off, "direction": "jvp"}
            continue
        result["engines"][name] = {"error": off}
        works[name] = work
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    for name, work in works.items():
        entry = result["engines"][name]
        entry["jvp"] = statistics.median(times[name])
        entry["kernels"] = kernel_seconds(work)
    return result


def table(results: list[Result]) -> Iterator[list[str]]:
    """Yield µs of the stream (of the kernels alone)."""
    names = list(dict.fromkeys(n for r in results for n in r["engines"]))
    yield ["case", *names]
    for r in results:
        cells = []
        for name in names:
            e = r["engines"].get(name, {})
            text = next(iter(e), "–")
            if "jvp" in e:
                text = f"{e['jvp'] * 1e6:.0f} ({e['kernels'] * 1e6:.0f})"
            cells.append(text)
        yield [r["case"], *cells]


def main(rounds: int, only: str, out: Path) -> int:
    """Run the group, print its table and write JSON; say why where it cannot run."""
    reason = unavailable()
    if reason is not None:
        print(f"gpu group skipped: {reason}")
        return 0
    results = []
    for case in cases():
        if only in case.name:
            print(case.name, flush=True)
            results.append(measure(case, rounds))
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": device, "results": results}, indent=1))
    if results:
        print(f"\nJ·v on {device}, µs of the stream (of its kernels)\n")
        print(report.text(table(results)))
    return 0
