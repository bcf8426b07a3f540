"""Run every example in full, one after another; with --docs, write outputs and pictures down."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = (
    "nist_regression",
    "bundle_adjustment",
    "bratu",
    "bratu_ranks",
    "tensor_parallel",
    "physics_informed",
    "laplace",
    "spectrum",
    "fixed_point",
    "triton_norm",
)
#: Examples that print one line for each of many problems: the page shows the end only.
LAST_LINES = {"nist_regression": 8}
#: What an example says that lacks something: its part of the page stays as it is.
NOT_RUN = "Not run"


def run(name: str, quick: bool) -> tuple[int, str]:
    """Run one example; print what it prints, and return it with its exit status."""
    print(f"\n==> {name}", flush=True)
    began = time.perf_counter()
    command = [
        sys.executable,
        str(HERE / f"{name}.py"),
        "--out",
        str(HERE / "out" / f"{name}.png"),
    ]
    # The NIST problems are quick as they are.
    command += ["--quick"] if quick and name != "nist_regression" else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    print(f"({time.perf_counter() - began:.0f} seconds)")
    return done.returncode, done.stdout


def written(page: str, name: str, printed: str) -> str:
    """Return the page with this output between the marks of the example."""
    lines = [line for line in printed.splitlines() if not line.startswith(("Picture:", "Plot:"))]
    shown = "\n".join(lines[-LAST_LINES.get(name, len(lines)) :]).strip("\n")
    begin, end = f"<!-- output of {name} -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no place for {name}: {begin} … {end}")
    return pattern.sub(lambda _: f"{begin}\n\n```text\n{shown}\n```\n\n{end}", page)


def shrink(picture: Path, target: Path) -> None:
    """Write a picture with few colours, no wider than the page."""
    with Image.open(picture) as image:
        image.thumbnail((900, 1200), Image.Resampling.LANCZOS)
        image.convert("RGB").quantize(160).save(target, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small versions, in a minute")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="PAGE",
        help="write the outputs into this page, and the pictures beside it into _static/examples",
    )
    given = parser.parse_args(arguments)
    failed = []
    for name in given.only:
        status, printed = run(name, given.quick)
        if status:
            failed.append(name)
        elif given.docs is not None and not printed.startswith(NOT_RUN):
            page = given.docs.read_text(encoding="utf-8")
            given.docs.write_text(written(page, name, printed), encoding="utf-8")
            pictures = given.docs.parent / "_static" / "examples"
            pictures.mkdir(parents=True, exist_ok=True)
            shrink(HERE / "out" / f"{name}.png", pictures / f"{name}.png")
    if failed:
        print(f"\nFailed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
