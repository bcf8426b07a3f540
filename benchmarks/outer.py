"""Outer loops: a new point, K products with its Jacobian, the next point.

    python -m benchmarks.outer                    # all cases, K = 1, 10, 100
    python -m benchmarks.outer --only Bratu -k 10
    python -m benchmarks.outer --docs docs/benchmarks.md

This is what Newton, Gauss-Newton and time stepping do, and what a user waits for. Every engine
does the same work: at each of 20 points its own run of f and K products J·v, one after the
other. The first point, with recording and compilation, is a column of its own; the figure of
an engine is the time of all later points by their number, in units of one run of f alone.
Engines take turns point by point, in one process with one thread, and processor time is taken.
Before it is timed, each is compared with central differences of f in double precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

import linearize as lz  # noqa: E402
from benchmarks.case import Problem, Tensors, flat  # noqa: E402
from benchmarks.cases import bratu, bundle, burgers, mlp, networks, opaque, transformer  # noqa: E402
from benchmarks.engines import NotInstalledError, double_backward, forget_programs  # noqa: E402
from benchmarks.report import markdown, rewrite  # noqa: E402

#: One iteration: the point and the directions, to the products.
Step: TypeAlias = Callable[[Tensors, Sequence[Tensors]], Sequence[Any]]
POINTS, ROUNDS = 20, 3
PRODUCTS = (1, 10, 100)
#: Seconds that one engine may take in one round; it goes to fewer points for that.
PATIENCE = 20.0
BEGIN, END = "<!-- begin outer loops -->", "<!-- end outer loops -->"


@dataclasses.dataclass(frozen=True)
class Loop:
    """A function that is linearized at many points."""

    name: str
    make: Callable[[torch.dtype], Problem]
    dtype: torch.dtype = torch.float32
    tolerance: float = 5e-3


LOOPS = (
    *(Loop(f"Bratu {n} x {n}", lambda d, n=n: bratu.problem(n, d)) for n in (32, 128, 512)),
    Loop("Burgers, 20 steps, n = 100", lambda d: burgers.problem(100, 20, d)),
    Loop("Burgers, 50 steps, n = 1,000", lambda d: burgers.problem(1000, 50, d)),
    Loop("MLP 6 x 64, batch 16", lambda d: mlp.wrt_parameters(64, 16, d)),
    Loop("MLP 6 x 256, batch 128", lambda d: mlp.wrt_parameters(256, 128, d)),
    Loop("transformer layer", lambda d: transformer.problem(128, 64, 8, d, inputs=False)),
    Loop("bundle adjustment", lambda d: bundle.problem("problem_01", None, d), torch.float64),
    Loop("GPT-2, 23 M parameters", networks.gpt2),
    Loop("Llama, 20 M parameters", networks.llama),
    Loop("inlined custom Function", opaque.inlined),
    Loop("opaque NumPy fixpoint, n = 1,000", lambda d: opaque.fixpoint(1000, d), torch.float64),
)


# -- engines ------------------------------------------------------------------------------


def ours(problem: Problem) -> Step:
    """One `Linearizer` for all points."""
    return _linearizer(problem.f)


def ours_compiled_f(problem: Problem) -> Step:
    """The same for a function under `torch.compile`."""
    return _linearizer(torch.compile(problem.f))


def ours_compiled(problem: Problem) -> Step:
    """`Linearizer(f, compile=True)`."""
    return _linearizer(problem.f, compile=True)


def _linearizer(f: Callable[..., Any], **options: Any) -> Step:
    forget_programs()
    lin = lz.Linearizer(f, maxsize=0, **options)

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        jvp_fn = lin.at(*x).jvp_fn
        return [jvp_fn(*v) for v in vs]

    return step


def forward_mode(problem: Problem) -> Step:
    """`torch.func.jvp`, which runs f at each product."""
    f = problem.functional or problem.f
    return lambda x, vs: [torch.func.jvp(f, x, v)[1] for v in vs]


def func_linearize(problem: Problem) -> Step:
    """`torch.func.linearize`, at each point anew."""
    f = problem.functional or problem.f

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        push = torch.func.linearize(f, *x)[1]
        return [push(*v) for v in vs]

    return step


def two_backwards(problem: Problem) -> Step:
    """The trick with two backwards, with the graph of the first kept."""

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        jvp = double_backward(dataclasses.replace(problem, primals=x)).jvp
        assert jvp is not None
        return [jvp(*v) for v in vs]

    return step


def jitted(problem: Problem) -> Step:
    """`jax.jit` around `jax.linearize` and a scan over the products."""
    try:
        import jax
        from jax import lax
    except ImportError:
        raise NotInstalledError("jax") from None
    if problem.jax is None:
        raise NotImplementedError("no counterpart")
    jax.config.update("jax_enable_x64", val=True)
    f, _ = problem.jax()

    @jax.jit
    def run(x: Any, vs: Any) -> Any:
        _, push = jax.linearize(f, *x)
        return lax.map(lambda v: push(*v), vs)

    stacks: dict[int, Any] = {}

    def step(x: Tensors, vs: Sequence[Tensors]) -> list[Any]:
        if len(vs) not in stacks:  # directions are at hand in the form that an engine wants
            columns = [torch.stack(c).numpy() for c in zip(*vs, strict=True)]
            stacks[len(vs)] = [jax.device_put(c) for c in columns]
        given = [jax.device_put(t.numpy()) for t in x]
        out = jax.block_until_ready(run(given, stacks[len(vs)]))
        return list(out) if not isinstance(out, (tuple, list)) else list(zip(*out, strict=True))

    return step


OURS = "linearize"
ENGINES: dict[str, Callable[[Problem], Step]] = {
    OURS: ours,
    "linearize, compiled f": ours_compiled_f,
    "linearize, compile=True": ours_compiled,
    "torch.func.jvp": forward_mode,
    "torch.func.linearize": func_linearize,
    "double backward": two_backwards,
    "jax.jit": jitted,
}


# -- one case -----------------------------------------------------------------------------


def directions(problem: Problem, count: int) -> list[Tensors]:
    """Return tangents, the same for each call."""
    return [_normal(problem.primals, 100 + k, 1.0) for k in range(count)]


def points(problem: Problem, count: int) -> list[Tensors]:
    """Return points near the given one, the same for each call."""
    found = []
    for k in range(count):
        shift = _normal(problem.primals, 1000 + k, 1e-2)
        found.append(tuple(p + d for p, d in zip(problem.primals, shift, strict=True)))
    return found


def _normal(like: Tensors, seed: int, size: float) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (size * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)
        for t in like
    )


def wrong(loop: Loop, step: Step) -> bool:
    """Whether an engine's product is not the one that central differences give."""
    problem, exact = loop.make(loop.dtype), loop.make(torch.float64)
    for x in points(problem, 2):
        (v,) = directions(problem, 1)
        got = flat(step(x, [v])[0])
        wide, along = (tuple(t.double() for t in ts) for ts in (x, v))
        h = 1e-4

        def at(k: float) -> Tensors:
            moved = (p + k * t for p, t in zip(wide, along, strict=True))  # noqa: B023
            with torch.no_grad():
                return flat(exact.f(*moved))

        for g, a, b in zip(got, at(h), at(-h), strict=True):
            expected = (a - b) / (2 * h)
            off = (torch.as_tensor(g).double() - expected).abs().max()
            if not off <= loop.tolerance * expected.abs().max():
                return True
    return False


def measure(loop: Loop, k: int, rounds: int, engines: Sequence[str]) -> dict[str, Any]:
    """Time all engines on one function."""
    problem = loop.make(loop.dtype)
    vs, at = directions(problem, k), points(problem, POINTS)
    found: dict[str, Any] = {}
    for name in engines:
        try:
            if wrong(loop, ENGINES[name](loop.make(loop.dtype))):
                found[name] = {"fails": "wrong"}
                continue
            found[name] = {"first": [], "later": []}
        except NotInstalledError:
            found[name] = {"fails": "not installed"}
        except Exception as error:
            found[name] = {"fails": type(error).__name__ if name != OURS else repr(error)}
    alone: list[float] = []
    for _ in range(rounds):
        _one_round(problem, at, vs, found, alone)
    result: dict[str, Any] = {"case": loop.name, "k": k, "f": min(alone), "engines": {}}
    for name, entry in found.items():
        if "fails" in entry:
            result["engines"][name] = entry
        else:
            later = statistics.median(entry["later"])
            result["engines"][name] = {"first": entry["first"][0], "later": later}
    return result


def _one_round(
    problem: Problem,
    at: Sequence[Tensors],
    vs: Sequence[Tensors],
    found: dict[str, Any],
    alone: list[float],
) -> None:
    steps = {n: ENGINES[n](problem) for n, e in found.items() if "fails" not in e}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    once: list[float] = []
    gc.collect()
    for x in at:
        for name, step in steps.items():
            times = spent[name]
            if len(times) >= 4 and sum(times) > PATIENCE:
                continue
            begin = time.process_time()
            step(x, vs)
            times.append(time.process_time() - begin)
        begin = time.process_time()
        with torch.no_grad():
            problem.f(*x)
        once.append(time.process_time() - begin)
    alone.append(statistics.median(once))
    for name, times in spent.items():
        found[name]["first"].append(times[0])
        found[name]["later"].append(sum(times[1:]) / len(times[1:]))


# -- tables -------------------------------------------------------------------------------


def _cell(entry: dict[str, Any], key: str, unit: float) -> str:
    if "fails" in entry:
        return str(entry["fails"])
    return f"{entry[key] / unit:.3g}"


def rows(results: Sequence[dict[str, Any]], key: str) -> Iterator[list[str]]:
    """Yield a table, in runs of f alone."""
    yield ["case", "K", "f, ms", *ENGINES]
    for r in results:
        cells = [_cell(r["engines"].get(n, {"fails": "–"}), key, r["f"]) for n in ENGINES]
        yield [r["case"], str(r["k"]), f"{r['f'] * 1e3:.3g}", *cells]


#: Ratios that are wanted: ours (the best counts), the rival, from which K on, at most how much.
TARGETS: tuple[tuple[str, Sequence[str], str, int, float], ...] = (
    ("torch.func.jvp, K = 1", (OURS,), "torch.func.jvp", 1, 1.2),
    ("torch.func.jvp, K >= 10", (OURS,), "torch.func.jvp", 10, 0.4),
    ("double backward, K >= 10", (OURS,), "double backward", 10, 1.0),
    ("jax.jit, K >= 10", tuple(ENGINES)[:3], "jax.jit", 10, 1.0),
)


def targets(results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield which targets are met."""
    yield ["target", "wanted at most", "met", "worst", "where"]
    for title, mine, rival, least, limit in TARGETS:
        ratios = []
        for r in results:
            known = {n: e["later"] for n, e in r["engines"].items() if "later" in e}
            right = r["k"] == least if least == 1 else r["k"] >= least
            chosen = [known[n] for n in mine if n in known]
            if right and rival in known and chosen:
                ratios.append((min(chosen) / known[rival], f"{r['case']}, K = {r['k']}"))
        if ratios:
            met = sum(ratio <= limit for ratio, _ in ratios)
            worst, where = max(ratios)
            yield [title, f"{limit}", f"{met} of {len(ratios)}", f"{worst:.2f}", where]


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the generated part of the page."""
    return "\n\n".join(
        (
            "Time of one outer iteration, in runs of f alone without autograd; later points:",
            markdown(rows(results, "later")),
            "The first point, with everything that is recorded and compiled there:",
            markdown(rows(results, "first")),
            markdown(targets(results)),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; write the page if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outer", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("-k", type=int, action="append", help="products at each point")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--engine", action="append", choices=tuple(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/outer.json"))
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--docs", type=Path, help="a page whose generated part is rewritten")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    if given.resume and given.out.exists():
        found = {(r["case"], r["k"]): r for r in json.loads(given.out.read_text())}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for loop in LOOPS:
        for k in given.k or PRODUCTS:
            if given.only not in loop.name:
                continue
            print(f"{loop.name}, K = {k}", flush=True)
            if (loop.name, k) in found:
                continue
            try:
                result = measure(loop, k, given.rounds, given.engine or tuple(ENGINES))
            except NotInstalledError as error:
                print(f"  left out: {error} is not installed")
                continue
            found[loop.name, k] = result
            given.out.write_text(json.dumps(list(found.values()), indent=1))
    results = list(found.values())
    for table in (rows(results, "later"), rows(results, "first"), targets(results)):
        print(f"\n{markdown(table)}")
    if given.docs is not None:
        rewrite(given.docs, page(results), BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
