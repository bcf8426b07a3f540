"""The command: run the operators that are left to run, then write the page.

make conformance                               all, or what is left of a run cut off
make conformance ARGS='--ops svd,cdist --fresh'
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import report
from .database import names
from .runner import Task, load, record, run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools" / "conformance" / "out" / "results.jsonl"
PAGE = ROOT / "docs" / "conformance.md"
#: Samples of each operator; None for all.
PLAN: dict[str, int | None] = {"float64": None, "complex128": None, "float32": 3}


def _options(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", help="only these operators, separated by commas")
    parser.add_argument("--samples", type=int, help="only the first N samples of each operator")
    parser.add_argument("--dtype", choices=PLAN, action="append", help="only this dtype")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one operator")
    parser.add_argument("--fresh", action="store_true", help="run finished operators anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    return parser.parse_args(args)


def _tasks(options: argparse.Namespace) -> list[Task]:
    wanted = set(options.ops.split(",")) if options.ops else None
    tasks = []
    for dtype, limit in PLAN.items():
        if options.dtype and dtype not in options.dtype:
            continue
        limits = [n for n in (limit, options.samples) if n is not None]
        least = min(limits, default=None)
        found = names(getattr(torch, dtype))
        tasks += [Task(n, dtype, least) for n in found if wanted is None or n in wanted]
    if wanted is not None and (unknown := wanted - {t.operator for t in tasks}):
        sys.exit(f"no such differentiable operator: {', '.join(sorted(unknown))}")
    return tasks


def main(args: list[str]) -> int:
    """Run, print what is not right, write the page after a full run; 1 if anything is wrong."""
    options = _options(args)
    version = torch.__version__.partition("+")[0]
    tasks = _tasks(options)
    done = {} if options.fresh else load(options.results, version)
    if options.fresh and not options.ops and not options.dtype:
        options.results.unlink(missing_ok=True)
    left = [task for task in tasks if task not in done]
    print(f"{len(tasks)} operators to compare, {len(left)} left to run")
    began = time.monotonic()
    for count, (task, result) in enumerate(run(left, options.jobs, options.timeout), 1):
        record(options.results, version, task, result)
        done[task] = result
        if result["outcome"] not in ("right", "not comparable", "disputed"):
            _say(task, result)
        if count % 100 == 0:
            print(f"{count} of {len(left)} after {time.monotonic() - began:.0f} s", flush=True)
    results = {task: done[task] for task in tasks}
    print(report.summary(results))
    if not options.ops and not options.dtype:
        command = " ".join(["make conformance", *([f"ARGS='{' '.join(args)}'"] if args else [])])
        report.write(PAGE, results, version, command)
        print(f"Written to {PAGE.relative_to(ROOT)}")
    return int(any(r["outcome"] in ("wrong", "failed") for r in results.values()))


def _say(task: Task, result: dict[str, Any]) -> None:
    where = f"{task.operator} {task.dtype} sample {result.get('sample')}"
    print(f"{result['outcome']}: {where}: {result['reason']} {result['counts']}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
