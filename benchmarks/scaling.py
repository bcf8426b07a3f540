"""How long a product takes on many ranks: a model, and the page that says what it predicts.

Nothing is measured here: `benchmarks.ranks` hands in what it has counted and timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.report import markdown

Found: TypeAlias = Mapping[int, Sequence[Mapping[str, Any]]]
PRODUCTS = "J·v", "Jᵀ·u"
#: Bytes of the all-reductions from which latency and bandwidth are read.
PINGS = 64, 1 << 22
RANKS = tuple(4**k for k in range(7))


@dataclasses.dataclass(frozen=True)
class Network:
    """A message of m bytes takes `latency` + m · `byte` seconds."""

    latency: float
    byte: float

    def time(self, kind: str, m: float, p: int) -> float:
        """Return the seconds that a message of a kind takes among p ranks."""
        return FORMULAS[kind](m, p, self.latency, self.byte) if p > 1 else 0.0


def _all_reduce(m: float, p: int, a: float, b: float) -> float:
    rounds = math.ceil(math.log2(p))
    return min(rounds * (a + m * b), 2 * rounds * a + 2 * (p - 1) / p * m * b)


FORMULAS: dict[str, Callable[[float, int, float, float], float]] = {
    "all_reduce": _all_reduce,
    "agree": _all_reduce,
    "all_gather": lambda m, p, a, b: math.ceil(math.log2(p)) * a + (p - 1) * m * b,
    "reduce_scatter": lambda m, p, a, b: math.ceil(math.log2(p)) * a + (p - 1) / p * m * b,
    "isend": lambda m, p, a, b: a / 2 + m * b,  # of two, to both sides at one time
}
#: What a cluster may have: a latency of two microseconds, and 25 gigabytes per second.
CLUSTER = Network(2e-6, 1 / 25e9)


@dataclasses.dataclass(frozen=True)
class Work:
    """The local work of a product: so much for any, so much shared by the ranks."""

    fixed: float
    shared: float

    @classmethod
    def fitted(cls, times: Mapping[int, float]) -> Work:
        """Return what is nearest to times on some numbers of ranks, by least squares."""
        xs, ys = [1 / p for p in times], list(times.values())
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slope = max(0.0, slope / sum((x - mean_x) ** 2 for x in xs))
        return cls(max(0.0, mean_y - slope * mean_x), slope)

    def time(self, p: int, larger: float = 1.0) -> float:
        """Return the seconds on p ranks, of a problem that is larger by a factor."""
        return self.fixed + larger * self.shared / p


def network_of(found: Found) -> Network:
    """Return latency and bandwidth as two ranks have them."""
    small, large = (max(r["ping"][size] for r in found[2]) for size in PINGS)
    byte = max(0.0, (large - small) / (PINGS[1] - PINGS[0]))
    return Network(max(small - PINGS[0] * byte, 1e-7), byte)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is taken to more ranks than there are.

    Attributes
    ----------
    name
        Of the case that was measured.
    says
        What the larger one is.
    larger
        How many times as much work it is.
    bytes_of
        The bytes of a message, from those that were measured, and the ranks.
    """

    name: str
    says: str
    larger: float
    bytes_of: Callable[[float, int], float]


#: Of the message to several parts that a reduce-scatter takes, each rank has one.
PROBLEMS = (
    Problem("grid, borders gathered", "a grid of 16,384 x 16,384", 32.0**2, lambda m, p: 32 * m),
    Problem("grid, `isend` and `irecv`", "the same", 32.0**2, lambda m, p: 32 * m),
    Problem(
        "layers, tensor-parallel",
        "layers of width 8,192 and 32,768 inside, a batch of 512",
        64.0 * 64 * 8,
        lambda m, p: 64 * 8 * m,
    ),
)


def messages(found: Found, case: str, product: str, world: int) -> list[tuple[str, float]]:
    """Return the messages of the rank that sends most."""
    ranks = [r[case][product]["messages"] for r in found[world]]
    sent: list[tuple[str, float]] = max(ranks, key=lambda ms: sum(m for _, m in ms))
    return sent


def predicted(
    network: Network, found: Found, case: str, product: str, p: int, scale: Callable[..., float]
) -> float:
    """Return the seconds that the messages of a product take."""
    most = max(found)
    total = 0.0
    for kind, m in messages(found, case, product, p if p in found else most):
        if kind == "reduce_scatter" and p not in found:
            m = m / most * p  # one part for each rank
        total += network.time(kind, m if kind == "agree" else scale(m, p), p)
    return total


def local_times(found: Found, case: str, product: str) -> dict[int, float]:
    """Return the local work by the number of ranks."""
    return {p: max(r[case][product]["local"] for r in ranks) for p, ranks in found.items()}


def _ms(t: float) -> str:
    return f"{t * 1e3:.3g}"


def checked(found: Found) -> Iterator[list[str]]:
    """Yield what the model says of what was measured."""
    yield ["f", "product", "ranks", "local work, ms", "messages, ms", "sum", "measured", "ratio"]
    network = network_of(found)
    for problem in PROBLEMS:
        for product in PRODUCTS:
            local = local_times(found, problem.name, product)
            for p, ranks in found.items():
                told = predicted(network, found, problem.name, product, p, lambda m, p: m)
                real = max(r[problem.name][product]["whole"] for r in ranks)
                both = local[p] + told
                yield [
                    problem.name, product, str(p), _ms(local[p]), _ms(told), _ms(both),
                    _ms(real), f"{both / real:.2f}",
                ]  # fmt: skip


def foretold(found: Found, problem: Problem) -> Iterator[list[str]]:
    """Yield what the model says of more ranks."""
    yield ["ranks", "local work, ms", "messages, ms", "product, ms", "speed-up", "agreeing"]
    product = PRODUCTS[0]
    work = Work.fitted(local_times(found, problem.name, product))
    first = work.time(1, problem.larger)
    for p in RANKS:
        local = work.time(p, problem.larger)
        told = predicted(CLUSTER, found, problem.name, product, p, problem.bytes_of)
        told_of = [
            m for kind, m in messages(found, problem.name, product, max(found)) if kind == "agree"
        ]
        agreeing = sum(CLUSTER.time("agree", m, p) for m in told_of) / (local + told)
        yield [
            f"{p:,}", _ms(local), _ms(told), _ms(local + told),
            f"{first / (local + told):,.3g}", f"{100 * agreeing:.2g} %",
        ]  # fmt: skip


def page(found: Found) -> str:
    """Return the page."""
    network = network_of(found)
    parts = [
        _INTRODUCTION.format(
            latency=network.latency * 1e6,
            rate=1e-9 / network.byte if network.byte else math.inf,
        ),
        markdown(list(checked(found))) + "\n",
        _AHEAD,
    ]
    for problem in PROBLEMS:
        title = f"**{problem.name[0].upper()}{problem.name[1:]}**: {problem.says}.\n"
        parts += [title, markdown(list(foretold(found, problem))) + "\n"]
    return "\n".join(parts).rstrip() + "\n"


_INTRODUCTION = """# Many ranks, on paper

Written by `python -m benchmarks.ranks --docs docs`, from messages that were counted and times that
were taken on 1, 2 and 4 ranks; how an f communicates stands on the page on
[more than one process](distributed.md).

A product sends what f sends, and the numbers by which the ranks agree on it. So its time on p
ranks is that of its local work, and of these messages:

| of m bytes | takes, with latency α and β seconds per byte |
|---|---|
| `isend` and `irecv`, to both sides | α + 2mβ |
| all-gather, m from each rank | ⌈log₂ p⌉ α + (p − 1) mβ |
| reduce-scatter, m in all | ⌈log₂ p⌉ α + (p − 1)/p mβ |
| all-reduce | the less of ⌈log₂ p⌉ (α + mβ) and 2 ⌈log₂ p⌉ α + 2 (p − 1)/p mβ |

These are the formulas of R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective
communication operations in MPICH", International Journal of High Performance Computing
Applications 19, 2005, without the time of the additions. The local work is a + b/p: calls of
operations take a, however small the parts are, and b is shared.

## What was measured

α = {latency:.0f} µs and β = 1 / ({rate:.2g} GB/s) are those of two ranks, from an all-reduction of
64 bytes and one of four megabytes: gloo between processes of one machine of two cores, which had
other work: what is measured has waiting in it, for ranks that had to wait for a core, which the
model knows nothing of. *Local work* is the product of f without its messages, on as many ranks.
Where collectives communicate, there is the message by which ranks agree; custom Functions do
without.

A ratio below one is time that the model does not have: waiting for a core, and on one rank what
surrounds a message, copies and the calls themselves. Times of several ranks on such a machine say
whether the model is of the right size, not more; run the script on one that is quiet.
"""

_AHEAD = """
## What follows for many

Here α = 2 µs and β = 1 / (25 GB/s), which is an assumption: what clusters have between machines of
one network. The problems are larger, and a rank is one core of the machine above; a and b are
fitted to its times. *Agreeing* is the share of the message by which ranks agree.

What can be seen: with neighbours alone the messages hardly grow, and the product is faster until
its calls of operations are what is left. Gathered borders get to all ranks, so that there are more
of them the more ranks there are: good for some tens. Layers that are split wait for as many
all-reductions as they have, of a size that does not fall: good as long as the matrices are large.
"""
