"""A custom Function made of Triton kernels, linearized on a GPU without running it again.

Root-mean-square normalisation of rows as one fused kernel; its Jacobian is symmetric, so that a
second kernel is both `jvp` and `backward`. A network that contains it is fitted by Gauss–Newton
with conjugate gradients: products call the second kernel only. It runs on a GPU; elsewhere it says
so and stops, unless TRITON_INTERPRET=1 makes Triton's interpreter check the kernels on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gallery import figure, options, save, table
from tqdm import tqdm

import linearize as lz

Parameters = dict[str, torch.Tensor]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Return why the kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's builds for CUDA)"
    if not torch.cuda.is_available() and not INTERPRETED:
        return (
            "there is no CUDA device; TRITON_INTERPRET=1 checks the kernels in Triton's "
            "interpreter, on the CPU"
        )
    return None


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of x over the root of their mean squares, as plain torch."""
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()


def problem(norm: Callable[..., torch.Tensor], size: int, device: str) -> tuple[Any, Parameters]:
    """Return the residuals of a network that should give back what another one gave."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    x = normal(2 * size, size)
    names = ("a", "b", "c")
    true = {name: normal(size, size) / size**0.5 for name in names}
    start = {name: t + 0.3 * normal(size, size) / size**0.5 for name, t in true.items()}

    def network(p: Parameters) -> torch.Tensor:
        h = norm(x @ p["a"])
        h = h + norm(F.silu(h @ p["b"]))
        return norm(h) @ p["c"]

    with torch.no_grad():
        wanted = network(true)
    return (lambda p: (network(p) - wanted) / wanted.numel() ** 0.5), start


def fit(
    f: Any, start: Parameters, steps: int, iterations: int, bar: Any
) -> tuple[list[float], int]:
    """Take damped Gauss–Newton steps; return the losses and how many products they took."""
    from torchsparsegradutils.utils import linear_cg

    p, losses, products = start, [], 0
    linearizer = lz.Linearizer(f, maxsize=1)
    for _ in range(steps):
        here = linearizer.at(p)
        losses.append(float(here.value.square().sum()))
        G = here.jacobian.gram()
        (gradient,) = here.vjp_fn(here.value)
        b = torch.cat([-t.flatten() for t in gradient.values()])

        def damped(v: torch.Tensor, G: Any = G, damping: float = 1e-3 * losses[-1]) -> Any:
            nonlocal products
            products += 1
            return G @ v + damping * v

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "CG terminated")  # early, which is meant
            step = linear_cg(damped, b, max_iter=iterations, tolerance=1e-2)
        pieces = step.split([t.numel() for t in p.values()])
        p = {n: t + d.view_as(t) for (n, t), d in zip(p.items(), pieces, strict=True)}
        bar.set_postfix_str(f"loss {losses[-1]:.1e}")
        bar.update()
    losses.append(float(f(p).square().sum()))
    return losses, products


def difference(a: Parameters | torch.Tensor, b: Parameters | torch.Tensor) -> float:
    """Return the relative difference of two vectors."""
    x, y = (
        torch.cat([s.flatten() for s in t.values()]) if isinstance(t, dict) else t for t in (a, b)
    )
    return float((x - y).norm() / y.norm())


def milliseconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the time of one call."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(min(4, repeats)):  # so that everything is compiled
        call()
    finish()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return 1e3 * (time.perf_counter() - began) / repeats


def compare(size: int, device: str, repeats: int) -> tuple[list[list[Any]], float]:
    """Time products through the kernels and through plain torch; return their difference too."""
    from triton_kernels import Launches, TritonNorm

    f, p = problem(TritonNorm.apply, size, device)
    g, _ = problem(plain_norm, size, device)
    draw = torch.Generator().manual_seed(1)
    v = {n: torch.randn(t.shape, generator=draw).to(device) for n, t in p.items()}
    value, known = torch.func.jvp(g, (p,), (v,))
    u = torch.randn(value.shape, generator=draw).to(device)
    (back,) = torch.func.vjp(g, p)[1](u)

    ours, plain = lz.Linearizer(f).at(p), lz.Linearizer(g).at(p)
    Launches.forward = 0
    worst = 0.0
    for _ in range(4):
        worst = max(worst, difference(ours.jvp_fn(v), known))
        worst = max(worst, difference(ours.vjp_fn(u)[0], back))
    tasks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "kernels, linearize": (lambda: ours.jvp_fn(v), lambda: ours.vjp_fn(u)),
        "plain torch, linearize": (lambda: plain.jvp_fn(v), lambda: plain.vjp_fn(u)),
        "plain torch, torch.func": (
            lambda: torch.func.jvp(g, (p,), (v,)),
            lambda: torch.func.vjp(g, p)[1](u),
        ),
    }
    rows = []
    for name, calls in tasks.items():
        rows.append([name, *(f"{milliseconds(call, device, repeats):.3f}" for call in calls)])
    if Launches.forward:
        raise RuntimeError(f"the forward kernel ran {Launches.forward} times in products")
    return rows, worst


def picture(losses: list[float], rows: list[list[Any]], path: Path) -> None:
    """Draw the fit, and how long products take."""
    made, ((left, right),) = figure(2)
    left.semilogy(losses, "o-")
    left.set(xlabel="Gauss–Newton step", ylabel="loss")
    names = [row[0].replace(", ", ",\n") for row in rows]
    for k, label in enumerate(("J·v", "Jᵀ·u")):
        places = [i + 0.4 * k for i in range(len(rows))]
        right.barh(places, [float(row[1 + k]) for row in rows], 0.4, label=label)
    right.set_yticks([i + 0.2 for i in range(len(rows))], names, fontsize=8)
    right.set(xlabel="milliseconds", xscale="log")
    right.legend(fontsize=8)
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, fit, time, draw; return 1 if a product is wrong, 0 also where nothing can run."""
    chosen = options(__doc__, "triton_norm", arguments)
    reason = missing()
    if reason is not None:
        print(f"Not run: {reason}.")
        return 0
    from triton_kernels import Launches, TritonNorm

    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    quick = chosen.quick or INTERPRETED  # which is slow
    size, steps, iterations, repeats = (5, 2, 20, 1) if quick else (1024, 8, 60, 50)
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter on the CPU"
    rows, worst = compare(size, device, repeats)
    f, start = problem(TritonNorm.apply, size, device)
    Launches.forward = Launches.product = 0
    with tqdm(total=steps, unit="step", disable=chosen.quiet, leave=False) as bar:
        losses, products = fit(f, start, steps, iterations, bar)
    print(f"{where}, {3 * size**2} weights, {2 * size**2} residuals")
    print(f"{steps} Gauss–Newton steps: loss {losses[0]:.1e} to {losses[-1]:.1e},", end=" ")
    print(f"{products} products with JᵀJ")
    print(
        f"Kernels launched: forward {Launches.forward} times (3 for each of {steps + 1} runs",
        end=" ",
    )
    print(f"of f), Jacobian {Launches.product} times")
    print(f"Products differ from those of torch.func by {worst:.0e} (float32)\n")
    print(table(("ms per product", "J·v", "Jᵀ·u"), rows))
    picture(losses, rows, chosen.out)
    if worst > 1e-4 or Launches.forward != 3 * (steps + 1) or losses[-1] > 0.1 * losses[0]:
        print("A product is wrong, f ran too often, or the fit failed.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
