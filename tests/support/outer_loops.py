"""Outer loops at random: programs at several points each, by two `Linearizer`s, against autograd.

A case is a random function of two primals that reads constants, settings, attributes and
globals. Between its points change: which of the constants are one and the same tensor or lie on
one storage, their strides, dtypes and whether they require grad, branches, numbers, sizes,
hooks. Points are held while others come and are asked again at the end. What programs of one
case leave in the process is there in the next.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import linearize as lz

D, S = torch.float64, torch.float32
Value: TypeAlias = torch.Tensor
#: A global that some of the functions read.
SCALE = 1.0


class Cubed(Function):
    """A backward only, which looks at an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Value, factor: float) -> Value:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x.sin() ** 3

    @staticmethod
    def backward(ctx: Any, g: Value) -> Any:
        (x,) = ctx.saved_tensors
        slope = 3 * x.sin() ** 2 * x.cos()
        return (g * slope * ctx.factor if ctx.factor > 1 else ctx.factor * (slope * g)), None


class Various(Function):
    """A backward only, which does what a graph does not show: by a setting, a global, a part."""

    @staticmethod
    def forward(ctx: Any, x: Value, a: Value, power: int) -> Value:
        ctx.save_for_backward(x, a)
        ctx.power = power
        return x.sin() * a

    @staticmethod
    def backward(ctx: Any, g: Value) -> Any:
        x, a = ctx.saved_tensors
        of_x = torch.empty_like(g)
        of_x[ctx.power :] = (g * a * x.cos())[ctx.power :]
        of_x[: ctx.power] = g[: ctx.power] * SCALE * (a * x.cos() / SCALE)[: ctx.power]
        return of_x, g * x.sin() if ctx.needs_input_grad[1] else None, None


def patched(x: Value, y: Value, s: Settings, k: int) -> Value:
    """Write slices of a buffer that may hold something."""
    out = x.new_full((len(x) + 2,), float(s.branch))
    out[s.power % 3 : s.power % 3 + len(x)] = x.sin()
    out[k % 3] = s.number
    return out[1 : len(x) + 1] * y


class Scaled(Function):
    """Both methods, new style."""

    @staticmethod
    def forward(x: Value, a: Value) -> Value:
        return x * a

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Value) -> Any:
        x, a = ctx.saved_tensors
        return g * a, g * x

    @staticmethod
    def jvp(ctx: Any, dx: Value, da: Value) -> Value:
        x, a = ctx.saved_tensors
        return (0 if dx is None else dx * a) + (0 if da is None else da * x)


class Hidden(Function):
    """Leaves PyTorch in every method; two outputs."""

    @staticmethod
    def forward(ctx: Any, x: Value) -> Any:
        ctx.cos = x.detach().cos().numpy()
        return x.sin(), 2 * x

    @staticmethod
    def backward(ctx: Any, g: Value, h: Value) -> Value:
        return torch.from_numpy(g.numpy() * ctx.cos) + 2 * h

    @staticmethod
    def jvp(ctx: Any, t: Value) -> Any:
        return torch.from_numpy(t.numpy() * ctx.cos), 2 * t


# -- constants ---------------------------------------------------------------------------------

KINDS = ("vector", "matrix", "mask", "index", "kernel")


def pool(n: int, seed: int) -> dict[str, list[Value]]:
    """Return tensors of each kind, some of which lie on one storage, in double precision."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Value:
        return torch.randn(*shape, dtype=D, generator=g)

    base, square = rand(3 * n), rand(n + 1, n + 1)
    places = torch.randint(n, (2 * n,), generator=g)
    bits = rand(2 * n) > 0
    return {
        "vector": [
            rand(n),
            rand(n),
            base[:n],
            base[1 : n + 1],
            base[: 2 * n : 2],
            rand(1).expand(n),
            rand(n).requires_grad_(),
        ],
        "matrix": [
            rand(n, n),
            rand(n, n).t(),
            square[:n, :n],
            square[1:, 1:],
            square[:n, :n].t(),
            rand(n).expand(n, n),
            rand(n, n).requires_grad_(),
        ],
        "mask": [bits[:n], bits[1 : n + 1], rand(n) > 0, rand(n) > 0.5, bits[::2]],
        "index": [places[:n], places[1 : n + 1], places[::2], torch.arange(n), places[n:]],
        "kernel": [rand(1, 1, 3), rand(1, 1, 3), base[:3].view(1, 1, 3), base[1:4].view(1, 1, 3)],
    }


def single(constants: dict[str, list[Value]]) -> dict[str, list[Value]]:
    """Return the same in single precision: what was one storage is one still."""
    storages: dict[int, Value] = {}

    def cast(t: Value) -> Value:
        if not t.is_floating_point():
            return t
        whole = t.detach().new_empty(0).set_(t.untyped_storage())
        mine = storages.setdefault(whole.data_ptr(), whole.float())
        made = mine.as_strided(t.shape, t.stride(), t.storage_offset())
        return made.detach().requires_grad_(t.requires_grad)

    return {kind: [cast(t) for t in some] for kind, some in constants.items()}


@dataclasses.dataclass
class Settings:
    """What f reads besides its arguments."""

    constants: dict[str, list[Value]]
    chosen: dict[tuple[str, int], int]
    number: float = 0.7
    step: float = 0.1
    power: int = 2
    branch: bool = False
    hooked: bool = False
    written: bool = False
    mixed: bool = False

    def get(self, kind: str, slot: int) -> Value:
        some = self.constants[kind]
        return some[self.chosen[kind, slot] % len(some)]


# -- steps -------------------------------------------------------------------------------------

Step: TypeAlias = Callable[[Value, Value, Settings, int], Value]


def calm(x: Value) -> Value:
    """Keep numbers of order one."""
    return x / (1 + x.detach().abs().amax())


def vector(s: Settings, k: int, like: Value) -> Value:
    c = s.get("vector", k % 3)
    return c.to(S if like.dtype == D else like.dtype) if s.mixed and k % 2 else c


def written(x: Value, y: Value, s: Settings, k: int) -> Value:
    x = x.clone()
    if s.written:
        x[k % 2 :: 2] = y[k % 2 :: 2] * 2
        x[0] *= s.number
    else:
        x.mul_(y).add_(1)
    return x


def branched(x: Value, y: Value, s: Settings, k: int) -> Value:
    return x.sin() * y if s.branch else (x + y).cos()


def by_number(x: Value, y: Value, s: Settings, k: int) -> Value:
    return x * y if float(x.detach().sum()) > 0 else x - y.tanh()


def hooked(x: Value, y: Value, s: Settings, k: int) -> Value:
    z = x * y
    if s.hooked and z.requires_grad:
        z.register_hook(lambda g: None)
    return z


def saved_twice(x: Value, y: Value, s: Settings, k: int) -> Value:
    t = x.tanh()
    other = t if s.branch else y.sigmoid()
    return x.exp().clamp(max=3) * t.detach() * other.detach() + t


def linear(x: Value, y: Value, s: Settings, k: int) -> Value:
    first, second = s.get("matrix", k % 2), s.get("matrix", (k + 1) % 2)
    return calm(F.linear(F.linear(x, first).tanh(), second, vector(s, k - k % 2, x)))


STEPS: dict[str, Step] = {
    "sin": lambda x, y, s, k: x.sin(),
    "tanh": lambda x, y, s, k: x.tanh() * 1.3,
    "softmax": lambda x, y, s, k: x.softmax(0) * y,
    "relu": lambda x, y, s, k: F.relu(x) - F.relu(-y) * 0.1,
    "square": lambda x, y, s, k: calm(x * x),
    "power": lambda x, y, s, k: calm(x.abs() + 0.5) ** s.power,
    "number": lambda x, y, s, k: x * s.number + SCALE,
    "global": lambda x, y, s, k: (x * SCALE).sin(),
    "product": lambda x, y, s, k: x * y,
    "factor": lambda x, y, s, k: x * vector(s, k, x),
    "factors": lambda x, y, s, k: (x * vector(s, k, x)).tanh() * vector(s, k + 1, x),
    "divided": lambda x, y, s, k: x / (1 + vector(s, k, x) ** 2),
    "added": lambda x, y, s, k: x + vector(s, k, x),
    "addcmul": lambda x, y, s, k: torch.addcmul(x, y, s.get("vector", k % 3), value=s.number),
    "lerp": lambda x, y, s, k: torch.lerp(x, y, s.get("vector", k % 3)),
    "where": lambda x, y, s, k: torch.where(s.get("mask", k % 2), x.sin(), y),
    "masked_fill": lambda x, y, s, k: x.masked_fill(s.get("mask", k % 2), s.number),
    "index": lambda x, y, s, k: x[s.get("index", k % 2)] * y,
    "gather": lambda x, y, s, k: x.gather(0, s.get("index", k % 2)).sin(),
    "index_add": lambda x, y, s, k: calm(x.index_add(0, s.get("index", k % 2), y)),
    "scatter_add": lambda x, y, s, k: calm(x.scatter_add(0, s.get("index", k % 2), y)),
    "matmul": lambda x, y, s, k: calm(s.get("matrix", k % 2) @ x),
    "row": lambda x, y, s, k: calm(x @ s.get("matrix", k % 2)) * y,
    "bilinear": lambda x, y, s, k: calm(torch.einsum("i,ij,j->i", x, s.get("matrix", k % 2), y)),
    "linear": linear,
    "conv": lambda x, y, s, k: F.conv1d(x[None, None], s.get("kernel", k % 2), padding=1)[0, 0],
    "norm": lambda x, y, s, k: F.layer_norm(x, x.shape, s.get("vector", k % 3), None, 0.1),
    "cumsum": lambda x, y, s, k: x.cumsum(0) * 0.3,
    "sum": lambda x, y, s, k: x.sum() * 0.2 + y,
    "mean": lambda x, y, s, k: x - x.mean(),
    "length": lambda x, y, s, k: x / (1 + torch.linalg.vector_norm(y)),
    "loss": lambda x, y, s, k: F.mse_loss(x, s.get("vector", k % 3), reduction="none"),
    "scaled": lambda x, y, s, k: torch.add(x, y, alpha=s.step) / (1 + s.step) - y * s.step,
    "time step": lambda x, y, s, k: x + s.step * (x.roll(1) - 2 * x + x.roll(-1)) - s.step * x * y,
    "lerped": lambda x, y, s, k: torch.lerp(x, y, s.step),
    "leaky": lambda x, y, s, k: F.leaky_relu(x, s.step) * s.number,
    "addmv": lambda x, y, s, k: calm(
        torch.addmv(x, s.get("matrix", k % 2), y, alpha=s.step, beta=s.number)
    ),
    "padded": lambda x, y, s, k: torch.cat(
        [x.new_ones(s.power), x.sin(), x.new_ones(3 - s.power)]
    )[k % 2 : k % 2 + len(x)],
    "circular": lambda x, y, s, k: F.pad(x[None], (s.power - 1, 3 - s.power), mode="circular")[
        0, 1 : len(x) + 1
    ],
    "patched": patched,
    "strided": lambda x, y, s, k: x.sin().as_strided((2,), (1,), s.power - 1).sum() * y,
    "spectrum": lambda x, y, s, k: torch.fft.irfft(torch.fft.rfft(x) * (1 + s.step), len(x)),
    "checkpointed": lambda x, y, s, k: checkpoint(
        lambda a: (a.sin() if s.branch else a * s.get("vector", k % 3)) * s.step,
        x,
        use_reentrant=False,
    ),
    "Various": lambda x, y, s, k: Various.apply(
        x, y if k % 2 else s.get("vector", k % 3).to(x.dtype), s.power
    ),
    "flip": lambda x, y, s, k: x.flip(0) + y,
    "roll": lambda x, y, s, k: x.roll(s.power) - 0.5 * y,
    "cat": lambda x, y, s, k: torch.cat([x[k % 3 :], y[: k % 3]]),
    "outer": lambda x, y, s, k: calm(torch.outer(x, y).sum(k % 2)),
    "detach": lambda x, y, s, k: x.detach() * y,
    "in place": written,
    "branch": branched,
    "by number": by_number,
    "hook": hooked,
    "saved twice": saved_twice,
    "checkpoint": lambda x, y, s, k: checkpoint(
        lambda a: (a * s.get("vector", k % 3)).sin(), x, use_reentrant=False
    ),
    "Cubed": lambda x, y, s, k: Cubed.apply(x, 1 + s.number),
    "Scaled": lambda x, y, s, k: Scaled.apply(
        x, s.get("vector", k % 3).to(x.dtype) if k % 2 else y
    ),
    "Hidden": lambda x, y, s, k: sum(Hidden.apply(x)) * y,
}


@dataclasses.dataclass
class Case:
    """A random function and its points."""

    seed: int
    found: Counter[str] = dataclasses.field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.dtype = S if rng.random() < 0.15 else D
        #: Few kinds of steps and few constants: then it matters which of them are the same.
        names = rng.sample(sorted(STEPS), rng.randint(2, 8))
        self.palette = rng.sample(range(7), rng.randint(2, 3))
        self.steps = [
            (rng.choice(names), rng.randrange(9), rng.randrange(9), rng.randrange(6))
            for _ in range(rng.randint(2, 8))
        ]
        self.outputs = rng.choice((1, 1, 2))
        self.pools = {n: pool(n, self.seed + n) for n in (4, 5)}
        self.settings = self.now = self.drawn()
        self.options = {
            "simplify": rng.random() < 0.85,
            "maxsize": rng.choice((0, 2, None)),
            "check": rng.choice(("structure", "structure", "always", "never")),
        }
        #: By how much entries of the Jacobian in single precision are off.
        self.lost = 0.0
        self.many = 40 if rng.random() < 0.15 else 6

    def drawn(self) -> Settings:
        """Return settings; often nothing but constants changes, else half of what can."""
        rng = self.rng
        old: Settings | None = getattr(self, "settings", None)
        slots = [(kind, i) for kind in KINDS for i in range(3)]
        chosen = {slot: rng.choice(self.palette) for slot in slots}
        if old is not None and rng.random() < 0.5:
            step = rng.uniform(0.1, 2) if rng.random() < 0.5 else old.step
            return dataclasses.replace(old, chosen=chosen, step=step)
        made = Settings(
            self.pools[4 if rng.random() < 0.85 else 5],
            chosen,
            rng.choice((0.7, 1.0, 0.0, -0.0, 2.5)),
            rng.choice((rng.uniform(0.1, 2), 0.7, 1.0, 0.0, 2)),
            rng.choice((1, 2, 3)),
            *(rng.random() < 0.5 for _ in range(3)),
            mixed=rng.random() < 0.2,
        )
        if old is not None:
            for field in dataclasses.fields(Settings):
                if rng.random() < 0.5:
                    setattr(made, field.name, getattr(old, field.name))
        return made

    def f(self, x: Value, p: Value) -> Any:
        """Run the steps with the settings of the moment."""
        values = [x, p]
        for name, a, b, k in self.steps:
            first, second = values[-1 - a % 2], values[b % len(values)]
            values.append(STEPS[name](first, second, self.now, k).to(x.dtype))
        return values[-1] if self.outputs == 1 else (values[-1], values[len(values) // 2])

    def matrix(self, x: Value, p: Value) -> Value:
        """Return the Jacobian by autograd, row by row."""
        x, p = (t.detach().clone().requires_grad_() for t in (x, p))
        y = self.f(x, p)
        rows = []
        for out in y if isinstance(y, tuple) else (y,):
            for e in out.flatten():
                if not out.requires_grad:
                    rows.append(torch.zeros(2 * len(x), dtype=x.dtype))
                    continue
                got = torch.autograd.grad(e, (x, p), retain_graph=True, materialize_grads=True)
                rows.append(torch.cat(got))
        return torch.stack(rows).detach()

    def run(self) -> None:
        """Go through the points; raise if a product differs."""
        global SCALE
        linearizers = [lz.Linearizer(self.f, **self.options) for _ in range(2)]
        held: list[tuple[Any, Value, float]] = []
        for point in range(self.rng.randint(3, 7)):
            if point:
                self.settings = self.drawn()
                if self.rng.random() < 0.2:
                    SCALE = self.rng.choice((1.0, 1.5))
            n = len(self.settings.constants["mask"][0])
            g = torch.Generator().manual_seed(self.seed * 100 + point)
            x, p = torch.randn(2, n, dtype=D, generator=g).unbind()
            self.now = self.settings
            jacobian = self.matrix(x, p)
            if not bool(jacobian.isfinite().all()):
                self.found["not finite"] += 1
                continue
            if self.dtype == S:
                self.now = dataclasses.replace(self.now, constants=single(self.now.constants))
                x, p = x.float(), p.float()
                # What f itself loses in single precision is no mistake of the products.
                self.lost = 10 * float((self.matrix(x, p).to(D) - jacobian).abs().max())
            here = self.rng.choice(linearizers).at(x, p)
            self.products(here, jacobian, self.many)
            held.append((here, jacobian, self.lost))
            if self.rng.random() < 0.3:
                self.stacks(here, jacobian)
        for here, jacobian, self.lost in held:
            self.products(here, jacobian, 2)
        self.found["points"] += len(held)

    def products(self, here: Any, jacobian: Value, count: int) -> None:
        """Compare products, some with a direction that is zero."""
        rows, columns = jacobian.shape
        for _ in range(count):
            v, u = self.direction(columns), self.direction(rows)
            parts = v.split(columns // 2)
            some = [t if bool(t.any()) else None for t in parts]
            got = here.jvp_fn(*([parts[0], None] if some == [None, None] else some))
            self.same(torch.cat(got) if isinstance(got, tuple) else got, jacobian @ v.to(D), "J v")
            given: Any = tuple(u.split(rows // 2)) if self.outputs == 2 else u
            self.same(torch.cat(here.vjp_fn(given)), jacobian.T @ u.to(D), "Jt u")
            self.found["products"] += 2

    def direction(self, count: int) -> Value:
        """Return random numbers, sometimes with zeros in one half."""
        numbers = torch.tensor([self.rng.gauss(0, 1) for _ in range(count)], dtype=self.dtype)
        if self.rng.random() < 0.15:
            half = self.rng.randrange(2) * (count // 2)
            numbers[half : half + count // 2] = 0
        return numbers

    def stacks(self, here: Any, jacobian: Value) -> None:
        """Compare stacks of products of several sizes."""
        rows, columns = jacobian.shape
        for size in self.rng.sample((1, 2, 3, 5, 8), 2):
            vs = torch.stack([self.direction(columns) for _ in range(size)])
            us = torch.stack([self.direction(rows) for _ in range(size)])
            got = here.jvp_fn.batched(*vs.split(columns // 2, 1))
            got = torch.cat(got, 1) if isinstance(got, tuple) else got
            self.same(got, vs.to(D) @ jacobian.T, f"J v, {size} at once")
            given: Any = tuple(us.split(rows // 2, 1)) if self.outputs == 2 else us
            self.same(torch.cat(here.vjp_fn.batched(given), 1), us.to(D) @ jacobian, "Jt u, stack")
            self.found["stacks"] += 2

    def same(self, got: Value, expected: Value, what: str) -> None:
        tolerance = (1e-9 if self.dtype == D else 1e-3) + self.lost
        size = float(expected.abs().max()) + 1
        if got.dtype != self.dtype or float((got.to(D) - expected).abs().max()) > tolerance * size:
            names = [name for name, *_ in self.steps]
            raise AssertionError(
                f"case {self.seed}, {what}: {got.tolist()} for {expected.tolist()}; "
                f"{names}, {self.options}, {self.settings}"
            )


def run(seed: int, cases: int) -> Counter[str]:
    """Go through cases; return what was met, refusals by their words."""
    found: Counter[str] = Counter()
    for i in range(cases):
        case = Case(seed * 1_000_003 + i)
        try:
            case.run()
        except lz.LinearizeError as error:
            text = str(error).partition("\n")[0]
            found[f"refused by {type(error).__name__}: {text}"] += 1
        found.update(case.found)
        found["cases"] += 1
    return found
