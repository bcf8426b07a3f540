"""Check that every module of the package imports only modules on lower floors.

The table below is read as one long list: a module may import those listed before it, at
the top of the file or inside a function. Private parts of torch may be imported or named
in ``_torch`` only.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "linearize"
FLOORS = (
    ("errors", "_torch", "_progress", "_tables", "_layout"),
    (
        "_trees",
        "_callables",
        "_writing",
        "_lines",
        "_origin",
        "_recipes",
        "_space",
        "_residual",
        "_program",
        "_memo",
    ),
    (
        "_linearity",
        "_generate",
        "_flat",
        "_batching",
        "_execute",
        "_short",
        "_segments",
        "_contexts",
        "_functions",
        "_reads",
        "_trace",
        "_capture",
        "_formulas",
        "_nodes",
        "_storage",
        "_constants",
        "_signature",
        "_recorder",
        "_node_programs",
        "_record",
    ),
    (
        "_materialize",
        "_rules",
        "_kernel_formulas",
        "_kernel_rules",
        "_norm_rules",
        "_transpose",
        "_adjoint",
        "_copies",
        "_joining",
        "_moves",
        "_contractions",
        "_row_matrices",
        "_rows",
        "_equal_numbers",
        "_folding",
        "_simplify",
        "_banded",
        "_dense",
        "_compile",
        "_replay",
        "_vectorize",
        "_structure",
        "_sharing",
        "_takeover",
        "_source",
    ),
    ("_plan", "products", "_operator", "operators"),
    ("_cost", "_drawing", "inside", "_page", "linearization"),
    ("linearizer", "_gradient"),
    ("_history", "_matrices", "functional", "func", "_dependence", "sparse"),
    ("testing", "curvature", "distributed", "implicit", "scipy", "cupy", "__init__"),
)
RANK = {name: rank for rank, name in enumerate(name for floor in FLOORS for name in floor)}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The package is flat: one dot is the package itself.
            parts = [PACKAGE] * bool(node.level) + [node.module] * bool(node.module)
            base = ".".join(str(part) for part in parts)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def private_torch(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every use of a private part of torch."""
    named = ((n.lineno, ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    for line, name in [*imports(tree), *named]:
        root, *rest = name.split(".")
        if root == "torch" and any(p[:1] == "_" and p[:2] != "__" for p in rest):
            yield line, name


def faults(path: Path) -> Iterator[str]:
    """Yield one message for each rule that the module breaks."""
    module = path.stem
    if module not in RANK:
        yield f"{path}: {module} has no place in the table of {Path(__file__).name}"
        return
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for line, name in imports(tree):
        root, *rest = name.split(".")
        if root != PACKAGE:
            continue
        target = rest[0] if rest and rest[0] in RANK else "__init__"
        if RANK[target] >= RANK[module]:
            yield f"{path}:{line}: {module} must not import {target}, which is not below it"
    if module != "_torch":
        for line, name in private_torch(tree):
            yield f"{path}:{line}: {name} is private to torch; reach it through _torch"


def main() -> int:
    """Print the faults and return the exit status."""
    paths = sorted((Path(__file__).parents[1] / PACKAGE).glob("**/*.py"))
    found = [message for path in paths for message in faults(path)]
    print("\n".join(found) if found else f"{len(paths)} modules, each importing only lower ones.")
    return bool(found) or not paths


if __name__ == "__main__":
    sys.exit(main())
