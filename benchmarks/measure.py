"""Verify, then time side by side; memory; runs of the function."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import autograd
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _ExperimentalConfig,
)
from torch.utils._python_dispatch import TorchDispatchMode

import linearize as lz
from benchmarks.case import Case, Problem, Tensors, flat, single
from benchmarks.engines import ENGINES, LIMIT, OURS, Made, NotInstalledError, point

Result = dict[str, Any]
MANY_CALLS, SETTLE = 600, 2.0  # products (seconds) after which the best form has taken over
CALLS = 5  # a program that is run again is simplified: the fifth product is a steady one
SLOW = 0.3  # seconds; what takes longer is timed in fewer rounds


# -- the reference ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """Directions, and the products with them in float64."""

    tangents: Tensors
    cotangents: Tensors
    jvp: Tensors
    vjp: Tensors | None


def _normal(like: Tensors, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device)
        for t in like
    )


def reference(case: Case) -> Reference:
    """Return the products in float64, independently of this package.

    Of opaque code there is no derivative but the one by hand, which is compared with central
    differences first.
    """
    problem = case.make(torch.float64)
    primals = problem.primals
    leaves = tuple(p.detach().clone().requires_grad_() for p in primals)
    y = flat(problem.f(*leaves))
    v, u = _normal(primals, 2), _normal(y, 3)
    if case.opaque:
        made = problem.limit()
        jv, uj = flat(made.jvp(*v)), flat(made.vjp(*u))
        h = 1e-5
        ahead, behind = (
            flat(problem.f(*(p + s * t for p, t in zip(primals, v, strict=True)))) for s in (h, -h)
        )
        difference = tuple((a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True))
        if not error(jv, difference) < 1e-6:
            raise AssertionError(f"{case.name}: the limit is not the derivative")
        sides = [sum((a * b).sum() for a, b in zip(*ab, strict=True)) for ab in ((jv, u), (uj, v))]
        if not torch.isclose(*sides, rtol=1e-8):
            raise AssertionError(f"{case.name}: the limit's vjp is not its jvp's transpose")
        return Reference(v, u, jv, uj)
    weights = tuple(torch.zeros_like(t, requires_grad=True) for t in y)
    pulled = torch.autograd.grad(y, leaves, weights, create_graph=True)
    jv = torch.autograd.grad(pulled, weights, v, retain_graph=True)
    uj = torch.autograd.grad(y, leaves, u)
    if problem.middle is None:
        return Reference(v, u, jv, uj)
    y = flat(problem.f(*leaves))
    return Reference(v, u, torch.autograd.grad(y, leaves, flat(problem.middle(*jv))), None)


def error(found: Tensors, expected: Tensors) -> float:
    """Return the largest difference, relative to the largest entry of what is expected."""
    if len(found) != len(expected):
        return float("inf")
    pairs = [(a.detach().double(), b) for a, b in zip(found, expected, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(scale, 1e-300)


# -- clocks -----------------------------------------------------------------------------


#: Time that the process has used: all run in one thread, and others may use the machine too.
clock = time.process_time


def seconds(work: Callable[[], Any], least: float = 1e-3) -> float:
    """Return the time of one call, repeated until it can be read off a clock."""
    count = 1
    while True:
        start = clock()
        for _ in range(count):
            work()
        taken = clock() - start
        if taken > least:
            return taken / count
        count *= max(2, int(1.2 * least / max(taken, 1e-7)))


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the medians over rounds, in each of which everybody has a turn."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds):
        for name, one in work.items():
            if i < 2 or times[name][0] < SLOW or (i < 3 and times[name][0] < 1):
                times[name].append(seconds(one))
    return {name: statistics.median(t) for name, t in times.items()}


# -- memory, runs, operations --------------------------------------------------------------


def memory(work: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes that PyTorch holds more after `work`, and the most in between.

    What `work` returns is alive when the first number is taken. Only memory of PyTorch's
    allocator counts. The profiler is asked for nothing else, which its public face cannot do:
    with every operation written down this would take longer than all the rest.
    """
    config = ProfilerConfig(
        ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    activities = {ProfilerActivity.CPU}
    gc.collect()
    autograd._prepare_profiler(config, activities)
    autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
    try:
        kept = work()
        gc.collect()
    finally:
        events = autograd._disable_profiler().events()
    steps = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if _allocates(e))
    totals = np.cumsum([size for *_, size in steps] or [0])
    del kept
    return int(totals[-1]), max(0, int(totals.max()))


def _allocates(event: Any) -> bool:
    return bool(event.name() == "[memory]")


def graph_bytes(problem: Problem) -> int:
    """Return the bytes that the autograd graph of f holds besides primals and constants."""
    leaves = [p.detach().requires_grad_() for p in problem.primals]
    return memory(lambda: problem.f(*leaves))[0]


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(op).removeprefix("aten.").removesuffix(".default")] += 1
        return op(*args, **(kwargs or {}))


def operations(product: Callable[[], Any]) -> dict[str, int]:
    """Return what PyTorch is asked to do in one product."""
    with _Names() as names:
        product()
    return dict(sorted(names.found.items()))


class _Counted:
    """A function that counts its runs."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.runs = f, 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return self.f(*args)


def _counted(problem: Problem) -> tuple[Problem, Callable[[], int]]:
    f = _Counted(problem.f)
    functional = None if problem.functional is None else _Counted(problem.functional)
    jax, counters = problem.jax, [f] + [functional] * (functional is not None)

    def counted_jax() -> Any:
        assert jax is not None
        g, primals = jax()
        counters.append(_Counted(g))
        return counters[-1], primals

    changed = dataclasses.replace(
        problem, f=f, functional=functional, jax=None if jax is None else counted_jax
    )
    return changed, lambda: sum(c.runs for c in counters if c is not None)


# -- one case ---------------------------------------------------------------------------


class Engine:
    """One engine at work on one case: what it makes, and its two products on fixed vectors."""

    def __init__(
        self, make: Callable[[Problem], Made], problem: Problem, known: Reference
    ) -> None:
        dtype = problem.primals[0].dtype
        self._make, self._problem, self._known = make, problem, known
        self._v = tuple(t.to(dtype) for t in known.tangents)
        self._u = tuple(t.to(dtype) for t in known.cotangents)
        self.products = self.set_up()

    def set_up(self) -> dict[str, Callable[[], Any]]:
        """Make the engine's products anew; each is a call without arguments."""
        made = self._make(self._problem)
        v, u = (tuple(map(made.convert, side)) for side in (self._v, self._u))
        jvp, vjp, wait, middle = made.jvp, made.vjp, made.wait, self._problem.middle
        if middle is not None:
            if jvp is None or vjp is None:
                raise NotImplementedError("one direction only")
            return {"jvp": lambda: wait(vjp(*flat(middle(*flat(jvp(*v))))))}
        found: dict[str, Callable[[], Any]] = {}
        if jvp is not None:
            found["jvp"] = lambda: wait(jvp(*v))
        if vjp is not None:
            found["vjp"] = lambda: wait(vjp(*u))
        return found

    def first(self) -> Any:
        """Make the products and run each once; return what lives on."""
        self.once(products := self.set_up())
        return products

    def once(self, products: Mapping[str, Callable[[], Any]] | None = None) -> None:
        """Run each product once."""
        for product in (products or self.products).values():
            product()

    def verified(self, tolerance: float) -> Result:
        """Run every product several times and compare: `error`, or `wrong`."""
        worst = 0.0
        for name, product in self.products.items():
            expected = getattr(self._known, name)
            for _ in range(CALLS):
                found = tuple(torch.as_tensor(np.asarray(t)) for t in flat(_plain(product())))
                worst = max(worst, error(found, expected))
                if not worst <= tolerance:
                    return {"wrong": worst, "direction": name}
        return {"error": worst}


def _plain(y: Any) -> Any:
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in flat(y))


def measure(
    case: Case,
    rounds: int,
    engines: Mapping[str, Callable[[Problem], Made]] = ENGINES,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Return all measurements of one case; times are seconds.

    An engine that raises is entered as `fails`, one whose product is not that of the float64
    reference as `wrong`, and neither is timed.
    """
    known = reference(case)
    problem = case.make(case.dtype)
    result: Result = {
        "case": case.name,
        "size": case.size,
        "kind": case.kind,
        "by_blas": case.by_blas,
        "opaque": case.opaque,
        "engines": {},
    }
    alive: dict[str, Engine] = {}
    for name, make in engines.items():
        say(f"  verifying {name}")
        entry: Result
        try:
            counted, runs = _counted(problem)
            start = clock()
            engine = Engine(make, counted, known)
            engine.once()
            at_first, cold = runs(), clock() - start
            entry = engine.verified(case.tolerance)
            entry |= {"runs": at_first, "cold": cold}
        except NotInstalledError:
            entry = {"missing": "not installed"}
        except NotImplementedError as reason:
            entry = {"missing": str(reason)}
        except Exception as reason:
            entry = {"fails": f"{type(reason).__name__}: {reason}"[:200]}
        result["engines"][name] = entry
        if "error" in entry:
            alive[name] = engine
    gc.collect()
    gc.freeze()  # what is alive now need not be looked through again and again
    try:
        _times(result, problem, alive, rounds, say)
    finally:
        gc.unfreeze()
    _memory(result, problem, alive, say)
    if OURS in alive:
        _ours(result, problem, known, alive[OURS], rounds, say)
    for name in (OURS, LIMIT):
        if name in alive:
            result["engines"][name]["operations"] = {
                which: operations(product) for which, product in alive[name].products.items()
            }
    return result


def _settle(engine: Engine) -> None:
    """Ask for as many products as a matrix takes to pay, as far as that does not take long."""
    for product in engine.products.values():
        end = time.perf_counter() + SETTLE
        for _ in range(MANY_CALLS):
            product()
            if time.perf_counter() > end:
                break


def _times(
    result: Result, problem: Problem, alive: dict[str, Engine], rounds: int, say: Any
) -> None:
    leaves = [p.detach().clone().requires_grad_() for p in problem.primals]

    def forward() -> Any:
        with torch.no_grad():
            return problem.f(*problem.primals)

    runs = {"autograd": lambda: problem.f(*leaves)}
    if problem.functional is None:  # a gradient cannot be computed without autograd
        runs["forward"] = forward
    if OURS in alive:
        say("  many products")
        _settle(alive[OURS])
    say("  timing the products")
    work: dict[str, Callable[[], Any]] = {f"f {name}": run for name, run in runs.items()}
    for name, engine in alive.items():
        for which, product in engine.products.items():
            work[f"{which} {name}"] = product
    steady = interleaved(work, rounds)
    result["autograd"] = steady["f autograd"]
    result["forward"] = steady.get("f forward", steady["f autograd"])
    for name, engine in alive.items():
        for which in engine.products:
            result["engines"][name][which] = steady[f"{which} {name}"]
    say("  timing the set-up")
    # What took long when it was verified is not made over and over again.
    entries = result["engines"]
    brisk = {
        name: e.first for name, e in alive.items() if name == OURS or entries[name]["cold"] < SLOW
    }
    first = interleaved(brisk, min(rounds, 5))
    for name, engine in alive.items():
        entry = entries[name]
        entry["first"] = first.get(name, entry["cold"])
        entry["setup"] = entry["first"] - sum(entry[which] for which in engine.products)


def _memory(result: Result, problem: Problem, alive: dict[str, Engine], say: Any) -> None:
    say("  memory")
    gc.collect()
    gc.freeze()  # what is alive now need not be looked through again and again
    try:
        _each_memory(result, problem, alive)
    finally:
        gc.unfreeze()


def _each_memory(result: Result, problem: Problem, alive: dict[str, Engine]) -> None:
    result["graph_bytes"] = graph_bytes(problem)
    for name, engine in alive.items():
        if name.startswith("jax"):
            continue  # not PyTorch's allocator

        def work(engine: Engine = engine, calls: int = CALLS if name == OURS else 2) -> Any:
            products = engine.set_up()
            for product in products.values():
                for _ in range(calls):
                    product()
            return products

        entry = result["engines"][name]
        entry["retained_bytes"], entry["peak_bytes"] = memory(work)


def _ours(
    result: Result, problem: Problem, known: Reference, engine: Engine, rounds: int, say: Any
) -> None:
    say("  new points, many vectors")
    entry = result["engines"][OURS]
    dtype = problem.primals[0].dtype
    lin = lz.Linearizer(problem.f, maxsize=1)
    v, u = (tuple(t.to(dtype) for t in side) for side in (known.tangents, known.cotangents))

    def visit_with(by: lz.Linearizer) -> None:
        # Other tensor objects are another point; to make its numbers is the solver's affair.
        made = point(by, tuple(p.detach() for p in problem.primals))
        assert made.jvp is not None
        assert made.vjp is not None
        made.jvp(*v)
        made.vjp(*u)

    def visits() -> Iterator[None]:
        while True:
            visit_with(lin)
            yield

    visit = visits()
    for _ in range(8):
        next(visit)
    taken = interleaved(
        {
            "again": lambda: next(visit),
            "met": lambda: visit_with(lz.Linearizer(problem.f, maxsize=1)),
        },
        min(rounds, 5),
    )
    made = point(lin, problem.primals)
    assert made.jvp is not None
    assert made.vjp is not None
    jvp, vjp = made.jvp, made.vjp
    for _ in range(CALLS):
        jvp(*v), vjp(*u)
    steady = interleaved({"jvp": lambda: jvp(*v), "vjp": lambda: vjp(*u)}, rounds)
    for name, key in (("again", "relinearize"), ("met", "met")):
        entry[key] = taken[name] - steady["jvp"] - steady["vjp"]
    entry["nbytes"] = lin.at(*problem.primals).nbytes
    if max(sum(t.numel() for t in side) for side in (v, u)) > MANY:
        return
    here = lin.at(*problem.primals)
    many = 16
    vs = tuple(torch.stack([t * (1 + 0.1 * k) for k in range(many)]) for t in v)
    us = tuple(torch.stack([t * (1 + 0.1 * k) for k in range(many)]) for t in u)
    rows_v, rows_u = (list(zip(*side, strict=True)) for side in (vs, us))
    try:
        for which, batched, one, stacked, rows in (
            ("jvp", here.jvp_fn.batched, jvp, vs, rows_v),
            ("vjp", lambda *u: here.vjp_fn.batched(single(u)), vjp, us, rows_u),
        ):
            for _ in range(CALLS):
                found = flat(batched(*stacked))
            expected = [flat(one(*row)) for row in rows]
            together = tuple(torch.stack(c).double() for c in zip(*expected, strict=True))
            off = error(found, together)
            if not off <= 1e-3:
                raise AssertionError(f"batched products differ by {off:.1e}")
            work = {
                "batched": lambda batched=batched, stacked=stacked: batched(*stacked),
                "singly": lambda one=one, rows=rows: [one(*row) for row in rows],
            }
            times = interleaved(work, min(rounds, 5))
            entry[f"batched_{which}"] = times["batched"] / times["singly"]
    except Exception as reason:
        entry["batched_fails"] = f"{type(reason).__name__}: {reason}"[:200]


MANY = 4_000_000  # entries of a vector from which on sixteen of them are not tried
