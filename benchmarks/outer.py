"""Outer loops: a new point, K products with its Jacobian, the next point.

    python -m benchmarks.outer                    # all cases, K = 1, 2, 10, 100
    python -m benchmarks.outer --only Bratu -k 10
    python -m benchmarks.outer --docs docs/benchmarks.md

This is what Newton, Gauss-Newton and time stepping do, and what a user waits for. Every engine
does the same work: at each of 20 points its own run of f and K products J·v, one after the
other. The very first point, with recording and compilation, is measured by itself. Its products
and those of a second point are compared with central differences of f in double precision, or
with PyTorch's gradient where the value is one number; who is wrong is not timed. Then engines
take turns point by point, in one process with one thread, and processor time is taken. The figure
of an engine is its time for all these points by their number, the median of some rounds. There
are as many points and rounds as the patience allows.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import json
import os
import pstats
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    # What is compiled is compiled, by this process, and not found on a disk.
    ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"),
    ("TORCHINDUCTOR_COMPILE_THREADS", "1"),
    ("TQDM_DISABLE", "1"),
):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

from benchmarks import outer_page, whole_runs  # noqa: E402
from benchmarks.case import Problem, Tensors, flat  # noqa: E402
from benchmarks.cases import bratu, bundle, burgers, matmul, mlp, networks, opaque, transformer  # noqa: E402
from benchmarks.engines import NotInstalledError  # noqa: E402
from benchmarks.report import markdown, rewrite  # noqa: E402
from benchmarks.steps import COMPILED, COMPILED_F, ENGINES, JITTED, OURS, Ours, Step  # noqa: E402

POINTS, ROUNDS = 20, 3
PRODUCTS = (1, 2, 10, 100)
#: Seconds of processor time for one case with one number of products: of all engines together,
#: and of one of them.
PATIENCE, SHARE = 6.0, 0.8
#: Who takes longer than so many runs of f at the second point is not timed any further.
SLOW = 2000


@dataclasses.dataclass(frozen=True)
class Loop:
    """A function that is linearized at many points.

    Attributes
    ----------
    name, make, dtype
        As those of a case.
    tolerance
        Of the products against central differences, relative to the largest entry.
    launched
        Whether its operations take no longer than it takes to call them.
    most, first
        How many products at most, a hundred of a language model say what ten do; and at first.
    """

    name: str
    make: Callable[[torch.dtype], Problem]
    dtype: torch.dtype = torch.float32
    tolerance: float = 5e-3
    launched: bool = False
    most: int = 100
    first: int = 10


LOOPS = (
    Loop("Bratu 32 x 32", lambda d: bratu.problem(32, d), launched=True),
    Loop("Bratu 128 x 128", lambda d: bratu.problem(128, d), launched=True),
    Loop("Bratu 512 x 512", lambda d: bratu.problem(512, d)),
    Loop("Burgers, 20 steps, n = 100", lambda d: burgers.problem(100, 20, d), launched=True),
    Loop("Burgers, 50 steps, n = 1,000", lambda d: burgers.problem(1000, 50, d), launched=True),
    Loop("MLP 6 x 64, batch 16", lambda d: mlp.wrt_parameters(64, 16, d), launched=True),
    Loop("MLP 6 x 256, batch 128", lambda d: mlp.wrt_parameters(256, 128, d)),
    Loop("transformer layer", lambda d: transformer.problem(128, 64, 8, d, inputs=False)),
    Loop(
        "bundle adjustment, 5,421 markers",
        lambda d: bundle.problem("problem_01.bin", None, d),
        torch.float64,
    ),
    Loop("GPT-2, 23 M parameters", networks.gpt2, most=10, first=4),
    Loop("Llama, 20 M parameters", networks.llama, most=10, first=4),
    Loop("inlined custom Function", opaque.inlined, launched=True),
    Loop("opaque NumPy fixpoint, n = 1,000", lambda d: opaque.fixpoint(1000, d), torch.float64),
)


# -- points and directions ----------------------------------------------------------------


def directions(problem: Problem, count: int) -> list[Tensors]:
    """Return tangents, the same for each call."""
    return [_normal(problem.primals, 100 + k, 1.0) for k in range(count)]


def points(problem: Problem, count: int) -> Iterator[Tensors]:
    """Yield points near the given one, the same for each call."""
    for k in range(count):
        shift = _normal(problem.primals, 1000 + k, 1e-2)
        yield tuple(p + d for p, d in zip(problem.primals, shift, strict=True))


def _normal(like: Tensors, seed: int, size: float) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (size * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)
        for t in like
    )


# -- the first point, and whether it is right -----------------------------------------------


class Reference:
    """What the products are, in double precision: by central differences, or by a gradient."""

    def __init__(self, loop: Loop) -> None:
        self._f = loop.make(torch.float64).f
        self._tolerance = loop.tolerance
        self._known: dict[tuple[int, int], Tensors] = {}

    def wrong(self, key: tuple[int, int], x: Tensors, v: Tensors, got: Any) -> bool:
        """Whether a product with the direction and at the point of a number is not J·v."""
        if key not in self._known:
            self._known[key] = self._difference(x, v)
        found = [torch.as_tensor(g).double() for g in flat(got)]
        return not all(
            (g - known).abs().max() <= self._tolerance * known.abs().max()
            for g, known in zip(found, self._known[key], strict=True)
        )

    def _difference(self, x: Tensors, v: Tensors) -> Tensors:
        wide, along = (tuple(t.double() for t in ts) for ts in (x, v))
        size = max(1.0, max(float(t.abs().max()) for t in along))
        h = 1e-7 / size  # so short that hardly any kink lies in between

        def at(k: float) -> Tensors:
            with torch.no_grad():
                return flat(self._f(*(p + k * t for p, t in zip(wide, along, strict=True))))

        if at(0)[0].dim():
            return tuple((a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True))
        # A loss: language models take some steps in single precision, too few digits for that.
        leaves = [t.requires_grad_() for t in wide]
        slopes = torch.autograd.grad(self._f(*leaves), leaves)
        return (sum(((g * t).sum() for g, t in zip(slopes, along, strict=True)), torch.zeros(())),)


def spent() -> float:
    """Return the processor time so far, compilers that were called included."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def begin(
    loop: Loop, name: str, reference: Reference, problem: Problem
) -> tuple[Step | None, dict[str, Any]]:
    """Return an engine that has been to two points, and the seconds of the first."""
    vs = directions(problem, loop.first)
    _compile_into(name)
    try:
        gc.collect()
        start = spent()
        step = ENGINES[name](problem)
        taken = []
        for k, x in enumerate(points(problem, 2)):
            products = step(x, vs)
            taken.append(spent() - start)
            for j in (0, 2, len(vs) - 1):
                if reference.wrong((k, j), x, vs[j], products[j]):
                    return None, {"fails": "wrong"}
            start = spent()
        if taken[1] > SLOW * _seconds(lambda: _plain(problem, problem.primals)):
            return None, {"first": taken[0], "fails": f"over {SLOW:,}"}
    except NotInstalledError:
        return None, {"fails": "not installed"}
    except NotImplementedError as error:
        return None, {"fails": "–" if str(error) == "no counterpart" else type(error).__name__}
    except Exception as error:
        return None, {"fails": type(error).__name__ if name != OURS else repr(error)}
    return step, {"first": taken[0]}


_PLACES: dict[str, tempfile.TemporaryDirectory[str]] = {}


def _compile_into(engine: str) -> None:
    """Have what is compiled for an engine in a place of its own: none finds another's files."""
    if engine in (COMPILED, COMPILED_F):
        place = _PLACES.setdefault(engine, tempfile.TemporaryDirectory())
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = place.name


def load(engines: Sequence[str]) -> None:
    """Have everything imported, and headers compiled, that a process needs only once."""
    tiny = Loop("", lambda d: matmul.problem(4, d))
    reference, problem = Reference(tiny), tiny.make(tiny.dtype)
    for name in engines:
        begin(tiny, name, reference, problem)


# -- all further points ---------------------------------------------------------------------


def measure(
    loop: Loop, counts: Sequence[int], rounds: int, engines: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the times of all engines for one function, for one number of products each."""
    torch.compiler.reset()
    problem, reference = loop.make(loop.dtype), Reference(loop)
    begun = {name: begin(loop, name, reference, problem) for name in engines}
    steps = {name: step for name, (step, _) in begun.items() if step is not None}
    for k in counts:
        if k <= loop.most:
            result = _timed(problem, k, rounds, steps)
            for name, (_, entry) in begun.items():
                result["engines"][name] = entry | result["engines"].get(name, {})
            parts = {n: _parts(problem, s, k) for n, s in steps.items() if isinstance(s, Ours)}
            yield {"case": loop.name, "launched": loop.launched, **result, "parts": parts}


def _timed(problem: Problem, k: int, rounds: int, steps: dict[str, Step]) -> dict[str, Any]:
    vs = directions(problem, k)
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    alone: list[float] = []
    _settle(problem, vs, steps)
    gc.collect()
    deadline = time.process_time() + PATIENCE
    for _ in range(rounds):
        for name in steps:
            times[name].append([])
        for x in points(problem, POINTS):
            if alone and time.process_time() > deadline:
                break
            _one_point(x, vs, steps, times)
            alone.append(_seconds(lambda x=x: _plain(problem, x)))
    found = {}
    for name, by_round in times.items():
        means = [statistics.mean(r) for r in by_round if r]
        found[name] = {
            "later": statistics.median(means),
            "points": sum(len(r) for r in by_round),
        }
    return {"k": k, "f": statistics.median(alone), "engines": found}


def _settle(problem: Problem, vs: Sequence[Tensors], steps: dict[str, Step]) -> None:
    """Have JAX compile for this number of products, which is not part of any point."""
    if JITTED in steps:
        steps[JITTED](problem.primals, vs)


def _one_point(
    x: Tensors,
    vs: Sequence[Tensors],
    steps: dict[str, Step],
    times: dict[str, list[list[float]]],
) -> None:
    for name, step in steps.items():
        so_far = [t for of_round in times[name] for t in of_round]
        if not so_far or sum(so_far) < SHARE:
            times[name][-1].append(_seconds(lambda step=step: step(x, vs)))


def _plain(problem: Problem, x: Tensors) -> None:
    with torch.no_grad():
        problem.f(*x)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


# -- where the time goes --------------------------------------------------------------------


def _parts(problem: Problem, step: Ours, k: int) -> dict[str, Any]:
    """Return what the parts of an iteration take, and the shares of the rooms in their code."""
    vs, found = directions(problem, k), []
    at, profile = list(points(problem, 5)), cProfile.Profile(time.process_time)
    deadline = time.process_time() + SHARE / 2
    for x in at:
        found.append(step.parts(x, vs))
        if time.process_time() > deadline:
            break
    profile.enable()
    for x in at[: len(found)]:
        step(x, vs)
    profile.disable()
    middle = [statistics.median(column) for column in zip(*found, strict=True)]
    return {"times": dict(zip(Ours.PARTS, middle, strict=True)), "rooms": _rooms(profile)}


def _rooms(profile: cProfile.Profile) -> dict[str, float]:
    """Return the shares of the rooms, of PyTorch's operations and of f, the largest first."""
    shares: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        inside = Path(file).parts
        if "linearize" in inside[:-1]:
            after = inside[len(inside) - 1 - inside[::-1].index("linearize") :]
            shares[after[1] if len(after) > 2 else "faces"] += own
        elif file == "~":
            shares["C++"] += own
        else:
            shares["written out" if file.startswith("<") else "f, torch, Python"] += own
    total = sum(shares.values())
    return {name: own / total for name, own in shares.most_common()}


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
    known: list[dict[str, Any]] = []
    if given.resume and given.out.exists():
        known = json.loads(given.out.read_text())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    counts, engines = given.k or PRODUCTS, given.engine or tuple(ENGINES)
    tasks: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        (loop.name, lambda loop=loop: measure(loop, counts, given.rounds, engines))
        for loop in LOOPS
    ]
    tasks += [
        (name, lambda make=make, name=name: iter([whole_runs.measure(name, make)]))
        for name, make in whole_runs.RUNS.items()
    ]
    load(engines)
    for name, task in tasks:
        if given.only not in name or any(r["case"] == name for r in known):
            continue
        print(name, end="", flush=True)
        mine = []
        try:
            for result in task():
                mine.append(result)
                print(f", K = {result['k']}", end="", flush=True)
        except NotInstalledError as error:
            print(f" is left out: {error} is not installed", end="")
        except Exception as error:  # the others are measured all the same
            print(f" is left out: {error!r}", end="")
        print(flush=True)
        known += mine
        given.out.write_text(json.dumps(known, indent=1))
    for table in outer_page.tables(known):
        print(f"\n{markdown(table)}")
    if given.docs is not None:
        rewrite(given.docs, outer_page.page(known), outer_page.BEGIN, outer_page.END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
