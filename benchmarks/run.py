"""The command line: measure cases, print tables, write JSON, the plot and the page.

Times are processor times of one process with one thread, medians over interleaved rounds:
ratios mean something even on a busy machine, absolute times little. Results are written after
every case; with `--resume`, what was measured before a run was cut off is taken over.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Read when the libraries are loaded: one thread for everybody, and no messages.
for name, value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("KINETO_LOG_LEVEL", "99"),
):
    os.environ.setdefault(name, value)

import torch  # noqa: E402

from benchmarks import break_even, gpu, report  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.engines import COMPILED, ENGINES, compiled  # noqa: E402
from benchmarks.measure import measure  # noqa: E402

COMMAND, ROUNDS = "make bench", 7
PLOT = "_static/benchmarks.svg"


def versions() -> dict[str, Any]:
    """Return what the measurements depend on."""
    found = {"torch": torch.__version__.split("+")[0], "python": platform.python_version()}
    for name in ("jax", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    described = ", ".join(f"{name} {version}" for name, version in found.items())
    return {**found, "with": described, "machine": platform.machine(), "cores": os.cpu_count()}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of timing (7)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--size", choices=("small", "medium", "large"), action="append")
    parser.add_argument("--group", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/results.json"))
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--docs", type=Path, help="a page whose generated part is rewritten")
    parser.add_argument("--compile", action="store_true", help="with compile=True as an engine")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options(arguments)
    if given.group == "gpu":
        return gpu.main(given.rounds, given.only, given.out.with_name("gpu.json"))
    cases = [c for c in CASES if given.only in c.name and c.size in (given.size or c.size)]
    if given.list or not cases:
        print("\n".join(f"{c.size:8s}{c.name}" for c in cases) or "no case of this name and size")
        return 0 if cases else 2
    if given.compile:
        ENGINES[COMPILED] = compiled
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = versions()
    known: dict[str, Any] = {}
    if given.resume and given.out.exists():
        known = {r["case"]: r for r in json.loads(given.out.read_text())["results"]}
    results = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for i, case in enumerate(cases):
            begin = time.perf_counter()
            print(f"[{i + 1}/{len(cases)}] {case.name}", end=" ", flush=True)
            result = known.get(case.name) or measure(case, given.rounds)
            print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
            results.append(result)
            given.out.write_text(json.dumps({**about, "results": results}, indent=1))
    except KeyboardInterrupt:
        print("\ncut off; --resume goes on from here", file=sys.stderr)
        if not results:
            return 130
    print(f"\n{report.terminal(results)}\n\nWritten to {given.out}")
    if given.docs is not None:
        if len(results) < len(CASES):
            print(f"{given.docs} is left as it is: it shows all cases or none")
            return 0
        changed = f" ARGS='--rounds {given.rounds}'" if given.rounds != ROUNDS else ""
        report.rewrite(given.docs, report.page(results, about, f"{COMMAND}{changed}"))
        report.plot(results, given.docs.parent / PLOT)
        if (given.docs.parent / break_even.PAGE).exists():
            break_even.main(given.docs.parent)
        print(f"Written to {given.docs} and {given.docs.parent / PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
