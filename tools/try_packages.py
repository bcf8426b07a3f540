"""Try the Functions of published packages, and write the table into the page.

python tools/try_packages.py --docs docs/packages.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tests.packages.outcomes import BOTH, WORDS, outcome
from tests.packages.published import CASES

BEGIN, END = "<!-- written by the run: begin -->", "<!-- written by the run: end -->"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""


def row(name: str) -> str:
    package, _, what = name.partition(": ")
    try:
        found = outcome(CASES[name])
    except ImportError:
        return f"| {package} | `{what}` | not installed | |"
    note = found.note.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
    note = note if found.kind == BOTH else note.partition(": give it")[0].partition(": pass")[0]
    return f"| {package} {version(package)} | `{what}` | {WORDS[found.kind]} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, help="the page that gets the table")
    arguments = parser.parse_args()
    rows = []
    for name in CASES:
        rows.append(row(name))
        print(rows[-1], flush=True)
    head = ["| Package | Function | Outcome | |", "|---|---|---|---|"]
    text = "\n".join([f"With PyTorch {torch.__version__}.", "", *head, *rows])
    if arguments.docs:
        page = arguments.docs.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        page = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
        arguments.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
