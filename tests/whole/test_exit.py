"""Plain scripts end with the status that they ask for, whatever they still hold.

Each runs in a process of its own that comes to its end as any script does: not by `os._exit`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

#: Imports the packages once and forks for each script, which goes on as the main program.
RUNNER = """
import os, sys, traceback
import torch, linearize, linearize.func, linearize.scipy
torch.set_num_threads(1)
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    print(os.path.basename(path), os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()
sys.argv = [path]
exec(compile(open(path).read(), path, "exec"), globals())
"""

#: What most scripts begin with: f comes from another module, points share programs.
BEGIN = """
import torch, linearize as lz, other
D = torch.float64
ones = torch.ones(6, dtype=D)
lin = lz.Linearizer(other.f)
points = [torch.randn(6, dtype=D) for _ in range(3)]
def go(times=4, **options):
    for p in points:
        h = lin.at(p)
        for _ in range(times):
            h.jvp_fn(ones)
    return h
"""

OTHER = """
import torch
def f(x):
    return torch.stack([x.sin().sum(), (x * x).sum(), x[0] * x[1]])
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3
    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g
"""

#: The scripts, and the status with which each must end.
SCRIPTS: dict[str, tuple[int, str]] = {
    "held by a global name": (0, "h = go()"),
    "no memo": (0, "lin = lz.Linearizer(other.f, maxsize=0)\nh = go()"),
    "both closures, one used": (
        0,
        "h = go(); j = h.jvp_fn; k = h.vjp_fn; del h; k(torch.ones(3, dtype=D))",
    ),
    "one closure of a new point": (0, "k = lin.at(points[0]).vjp_fn"),
    "an operator and its gram": (
        0,
        "go(); J = lin.at(points[0]).jacobian; G = J.gram(); G @ ones",
    ),
    "a SciPy operator": (
        0,
        "import linearize.scipy\nA = lz.scipy.aslinearoperator(go().jacobian); A @ ones.numpy()",
    ),
    "a custom Function": (
        0,
        """
        lin = lz.Linearizer(lambda x: other.Cube.apply(x).sin(), maxsize=0)
        kept = [lin.at(p) for p in points]
        for h in kept:
            for _ in range(5): h.jvp_fn(ones); h.vjp_fn(ones)
        """,
    ),
    "sys.exit": (3, "import sys\nh = go()\nsys.exit(3)"),
    "an exception": (1, "h = go()\nraise ValueError('on purpose')"),
    "an exception inside f": (
        1,
        """
        h = go()
        def broken(x):
            y = x.sin()
            raise ValueError(y)
        lz.Linearizer(broken).at(points[0])
        """,
    ),
    "threads that have ended": (
        0,
        """
        import threading
        kept = []
        threads = [threading.Thread(target=lambda: kept.append(go())) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        """,
    ),
    "a daemon thread": (
        0,
        """
        import threading, time
        ready = threading.Event()
        def work():
            h = go(); ready.set()
            while True: time.sleep(0.01)
        threading.Thread(target=work, daemon=True).start()
        ready.wait()
        """,
    ),
    "a fork": (
        0,
        """
        import os
        h = go()
        child = os.fork()
        h.jvp_fn(ones)
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
    ),
    "a cell that is run again": (
        0,
        """
        for _ in range(3):
            exec("lin = lz.Linearizer(lambda x: other.f(x)); h = go(); j = h.jacobian", globals())
        """,
    ),
    "an open with block": (0, "scope = lin.__enter__(); h = go()"),
    "at exit": (
        0,
        "import atexit\nh = go()\natexit.register(lambda: h.vjp_fn(torch.ones(3, dtype=D)))",
    ),
    "a cycle": (0, "h = go()\nclass C: pass\nc = C(); c.me = c; c.h = h; c.lin = lin; del h, lin"),
    "gradients of products": (
        0,
        "h = go(); v = ones.clone().requires_grad_(); y = h.jvp_fn(v).sum(); y.backward()",
    ),
    "linearize.func": (
        0,
        "value, pull = lz.func.vjp(other.f, points[0]); pull(torch.ones(3, dtype=D))",
    ),
    "a module": (
        0,
        """
        net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()).double()
        h = lz.Linearizer(lambda p: torch.func.functional_call(net, p, (ones,))).at(
            {k: t.detach() for k, t in net.named_parameters()})
        u = h.vjp_fn(ones)
        """,
    ),
    "a generator that is not finished": (
        0,
        "def g():\n    h = go()\n    while True: yield h.jvp_fn(ones)\nstream = g(); next(stream)",
    ),
}


def test_scripts_end_with_their_status(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "other.py").write_text(OTHER)
    expected = {}
    for i, (status, body) in enumerate(SCRIPTS.values()):
        name = f"script{i}.py"
        (tmp_path / name).write_text(BEGIN + textwrap.dedent(body) + "\n")
        expected[name] = status
    done = subprocess.run(
        [sys.executable, "runner.py", *expected],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    got = {
        name: int(code) for name, _, code in (x.partition(" ") for x in done.stdout.splitlines())
    }
    wrong = {
        title: (got.get(name), status)
        for (title, (status, _)), name in zip(SCRIPTS.items(), expected, strict=True)
        if got.get(name) != status
    }
    assert not wrong, done.stderr[-4000:]
    assert "Exception ignored" not in done.stderr
