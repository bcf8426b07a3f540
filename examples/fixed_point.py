"""Train a network whose output is a fixed point, by implicit differentiation.

A deep equilibrium model returns z with z = tanh(W·z + U·x + b), found by iteration. The gradient
does not need the iterations: `linearize.implicit.root` attaches it to the z that was found, at one
run of the layer and one solve with its transposed Jacobian. It is checked by finite differences
and by differentiating through the iterations, which takes memory for each of them.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gallery import figure, options, save, table
from scipy.sparse.linalg import gmres
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import linearize as lz
import linearize.implicit
import linearize.scipy

Parameters = dict[str, torch.Tensor]


class Equilibrium:
    """The layer, its fixed point, and what the answers cost."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.parameters: Parameters = {
            "W": normal(hidden, hidden, scale=0.4 / hidden**0.5),
            "U": normal(hidden, inputs, scale=1 / inputs**0.5),
            "b": normal(hidden, scale=0.1),
            "out": normal(classes, hidden, scale=1 / hidden**0.5),
        }
        for t in self.parameters.values():
            t.requires_grad_()
        self.runs = 0

    def layer(self, z: torch.Tensor, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """Return tanh(W·z + U·x + b) for rows z and x."""
        self.runs += 1
        return torch.tanh(z @ p["W"].T + x @ p["U"].T + p["b"])

    @torch.no_grad()
    def contract(self) -> None:
        """Keep the layer a contraction, so that there is one fixed point."""
        W = self.parameters["W"]
        W.mul_(min(1.0, 0.9 / float(torch.linalg.matrix_norm(W, 2))))

    @torch.no_grad()
    def found(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """Iterate until nothing changes; nobody needs to know how z was found."""
        z = torch.zeros(len(x), len(p["b"]), dtype=x.dtype)
        for _ in range(1000):
            z, before = self.layer(z, x, p), z
            if float((z - before).abs().max()) < 1e-12:
                return z
        raise RuntimeError("the iteration does not converge")

    def implicit(self, x: torch.Tensor, p: Parameters) -> torch.Tensor:
        """Return the fixed point with its derivatives by the parameters."""
        z = self.found(x, p)
        inner = {name: p[name] for name in ("W", "U", "b")}
        return lz.implicit.root(
            lambda z, q: z - self.layer(z, x, q), z, inner, solve=solve, tol=1e-10
        )

    def unrolled(self, x: torch.Tensor, p: Parameters, steps: int) -> torch.Tensor:
        """Return what so many iterations give; autograd keeps each of them."""
        z = torch.zeros(len(x), len(p["b"]), dtype=x.dtype)
        for _ in range(steps):
            z = self.layer(z, x, p)
        return z


def solve(A: Any, b: torch.Tensor) -> torch.Tensor:
    """Solve by SciPy's GMRES."""
    x, _ = gmres(lz.scipy.aslinearoperator(A), b.numpy(), rtol=1e-10, restart=60)
    return torch.from_numpy(x)


@dataclasses.dataclass
class Gradient:
    """A gradient by all parameters, and what it took."""

    flat: torch.Tensor
    runs: int
    bytes: int
    seconds: float

    def error(self, known: torch.Tensor) -> float:
        """Return the relative error."""
        return float((self.flat - known).norm() / known.norm())


def gradient(model: Equilibrium, loss: Callable[[], torch.Tensor]) -> Gradient:
    """Differentiate, and count the runs of the layer and the bytes that are kept for it."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model.runs, began = 0, time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = loss()
    found = torch.autograd.grad(value, list(model.parameters.values()))
    seconds = time.process_time() - began
    flat = torch.cat([g.flatten() for g in found])
    return Gradient(flat, model.runs, sum(kept.values()), seconds)


def check(
    model: Equilibrium, x: torch.Tensor, y: torch.Tensor, steps: Sequence[int]
) -> tuple[dict[str, Gradient], torch.Tensor, float]:
    """Differentiate in several ways; return also a reference and the error by differences."""
    p = model.parameters

    def loss(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z @ p["out"].T, y)

    def through(count: int) -> Gradient:
        return gradient(model, lambda: loss(model.unrolled(x, p, count)))

    found = {f"through {n} iterations": through(n) for n in steps}
    found["implicit"] = gradient(model, lambda: loss(model.implicit(x, p)))
    known = through(400).flat

    # The slope along a random direction, by central differences of the converged loss.
    draw = torch.Generator().manual_seed(1)
    direction = torch.randn(known.shape, generator=draw, dtype=known.dtype)
    pieces = direction.split([t.numel() for t in p.values()])
    h, values = 1e-5, []
    for sign in (1, -1):
        q = {
            n: (t + sign * h * d.view_as(t)).detach()
            for (n, t), d in zip(p.items(), pieces, strict=True)
        }
        values.append(float(F.cross_entropy(model.found(x, q) @ q["out"].T, y)))
    slope = (values[0] - values[1]) / (2 * h)
    return found, known, abs(slope / float(found["implicit"].flat @ direction) - 1)


def train(
    model: Equilibrium, data: Sequence[torch.Tensor], epochs: int, quiet: bool
) -> list[tuple[float, float]]:
    """Train with Adam on implicit gradients; return losses and accuracies on unseen digits."""
    x, unseen, y, answers = data
    optimizer = torch.optim.Adam(model.parameters.values(), lr=5e-3)
    history = []
    for epoch in tqdm(range(epochs), unit="epoch", disable=quiet, leave=False):
        draw = torch.Generator().manual_seed(epoch)
        losses = []
        for rows in torch.randperm(len(x), generator=draw).split(256):
            optimizer.zero_grad()
            z = model.implicit(x[rows], model.parameters)
            loss = F.cross_entropy(z @ model.parameters["out"].T, y[rows])
            loss.backward()
            optimizer.step()
            model.contract()
            losses.append(loss.item())
        with torch.no_grad():
            guessed = model.found(unseen, model.parameters) @ model.parameters["out"].T
            right = float((guessed.argmax(1) == answers).double().mean())
        history.append((sum(losses) / len(losses), right))
    return history


def picture(
    errors: dict[int, float], ours: float, history: list[tuple[float, float]], path: Path
) -> None:
    """Draw the error of unrolled gradients, and how the training went."""
    made, ((left, right),) = figure(2)
    left.semilogy(list(errors), list(errors.values()), "o-", label="through the iterations")
    left.axhline(ours, color="C1", label="implicit")
    left.set(xlabel="iterations", ylabel="relative error of the gradient")
    left.legend()
    right.semilogy([loss for loss, _ in history], "C0", label="loss")
    right.set(xlabel="epoch", ylabel="loss")
    twin = right.twinx()
    twin.plot([accuracy for _, accuracy in history], "C1")
    twin.set_ylabel("accuracy on unseen digits", color="C1")
    save(made, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, check the gradient, draw; return 1 if it is wrong."""
    chosen = options(__doc__, "fixed_point", arguments)
    X, labels = load_digits(return_X_y=True)
    parts = train_test_split(X / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    data = [torch.from_numpy(part) for part in parts]
    if chosen.quick:
        data = [data[0][:256], data[1], data[2][:256], data[3]]
    model = Equilibrium(64, 10 if chosen.quick else 40, 10)
    history = train(model, data, 4 if chosen.quick else 20, chosen.quiet)
    loss, accuracy = history[-1]
    print(f"{len(data[0])} digits, {len(history)} epochs: loss {loss:.4f},", end=" ")
    print(f"accuracy on {len(data[1])} unseen digits {accuracy:.3f}\n")

    steps = (2, 5, 10, 20, 40, 80)
    found, known, slope = check(model, data[0][:256].clone(), data[2][:256], steps)
    rows = [
        [name, g.runs, f"{g.bytes / 2**20:.2f}", f"{1e3 * g.seconds:.1f}", f"{g.error(known):.0e}"]
        for name, g in found.items()
    ]
    print(table(("gradient for 256 digits", "runs of f", "MiB kept", "ms", "error"), rows))
    print(f"Its slope along a random direction, against finite differences: {slope:.0e}")
    ours = found["implicit"].error(known)
    errors = {n: found[f"through {n} iterations"].error(known) for n in steps}
    picture(errors, ours, history, chosen.out)
    if ours > 1e-8 or slope > 1e-5:
        print("The gradient is wrong.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
