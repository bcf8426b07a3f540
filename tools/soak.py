"""Make many points and products, and see that the process does not grow.

Every point has primals of its own and a run of its own; most are used for one product, every
hundredth for all the rest, through every stage of a program's life. A custom Function with
attributes on its context takes part, results with history, batches, points that are held and
closed, errors. Sampled are the resident memory and the numbers of live objects.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import linearize as lz

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
SIZE = 32


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.slope = x.cos()
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
        return u * ctx.slope

    @staticmethod
    def jvp(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        return v * ctx.slope


@dataclasses.dataclass(frozen=True)
class Sample:
    points: int
    products: int
    seconds: float
    resident: float  # MiB
    objects: int
    tensors: int


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # the largest so far, where there is nothing better
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


def sample(points: int, products: int, seconds: float) -> Sample:
    gc.collect()
    alive = gc.get_objects()
    tensors = sum(type(o) is torch.Tensor for o in alive)
    return Sample(points, products, seconds, resident(), len(alive), tensors)


def soak(
    points: int, products: int, samples: int = 20, tell: Callable[[Sample], None] | None = None
) -> Iterator[Sample]:
    """Yield a sample at the start, after a warm-up, and at each further part of the work."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / SIZE**0.5

    def f(x: torch.Tensor) -> torch.Tensor:
        if bool(x[0] > 1e6):
            raise ValueError("on purpose")
        h = Sine.apply(weight @ x)
        return torch.cat([h[1:], h[:1]]).mul_(1.5).tanh() * x

    lin = lz.Linearizer(f, maxsize=8)
    held: deque[Any] = deque(maxlen=16)
    often = max((products - points) // max(points // 100, 1), 1)
    done, begin = 0, time.perf_counter()
    for i in range(points):
        x = torch.full((SIZE,), (i % 997) / 997)
        here = lin.at(x)
        held.append((x, here.jvp_fn) if i % 3 else here)
        if i % 100 == 99:
            done += many(here, x, often)
        else:
            done += 1
            product = here.vjp_fn if i % 2 else here.jvp_fn
            product(x)
        if i % 1000 == 500:
            here.close()
            try:
                lin.at(torch.full((SIZE,), 1e9))
            except ValueError:
                pass
            else:
                raise AssertionError("f must fail here")
        if (i + 1) % max(points // samples, 1) == 0:
            now = sample(i + 1, done, time.perf_counter() - begin)
            if tell is not None:
                tell(now)
            yield now


def many(here: lz.Linearization, x: torch.Tensor, count: int) -> int:
    """Apply both products `count` times in all, in every way that there is."""
    batch = torch.stack([x] * 5)
    here.jvp_fn.batched(batch)
    here.vjp_fn.batched(batch)
    v = x.clone().requires_grad_()
    torch.autograd.grad(here.jvp_fn(v).sum(), v)
    for k in range(max(count - 12, 1)):
        (here.vjp_fn if k % 2 else here.jvp_fn)(x)
    return max(count - 12, 1) + 12


def grown(samples: list[Sample]) -> float:
    """Return by how many MiB the second half of the run is larger than the first.

    The first tenth is left out, while caches fill.
    """
    rest = samples[len(samples) // 10 :]
    half = len(rest) // 2
    return max(s.resident for s in rest[half:]) - max(s.resident for s in rest[:half])


def page(samples: list[Sample]) -> str:
    lines = [
        "| points | products | minutes | resident memory (MiB) | live objects | live tensors |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.points:,} | {s.products:,} | {s.seconds / 60:.1f} | {s.resident:.1f} "
        f"| {s.objects:,} | {s.tensors:,} |"
        for s in samples
    ]
    lines += ["", f"Growth from the first to the second half: {grown(samples):.1f} MiB. "]
    lines[-1] += f"PyTorch {torch.__version__.partition('+')[0]}, "
    lines[-1] += f"Python {sys.version.partition(' ')[0]}, {sys.platform}."
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--limit", type=float, default=8.0, help="MiB that it may grow")
    parser.add_argument("--docs", type=Path, help="page whose table is written anew")
    given = parser.parse_args()
    torch.set_num_threads(1)

    def tell(s: Sample) -> None:
        print(
            f"{s.points:>9,} points  {s.products:>11,} products  {s.resident:.1f} MiB", flush=True
        )

    samples = list(soak(given.points, given.products, tell=tell))
    if given.docs is not None:
        before, _, rest = given.docs.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        given.docs.write_text(f"{before}{BEGIN}\n{page(samples)}\n{END}{after}", encoding="utf-8")
    print(f"grown by {grown(samples):.1f} MiB")
    return int(grown(samples) > given.limit)


if __name__ == "__main__":
    sys.exit(main())
