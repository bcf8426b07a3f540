"""Check which module of the package imports which.

The folder shows the flow: a file may import from the rooms above its own in the table below,
and from its own room without circles. At the top of the package stand `errors`, on which
everything rests, and the public faces, which may import any room and each other without
circles. An import inside a function is an import too. Private parts of torch may be imported
or named in the room `_torch` only.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "linearize"
ROOMS = (
    "errors",
    "_torch",
    "_text",
    "_spaces",
    "_programs",
    "_capture",
    "_execute",
    "_record",
    "_transpose",
    "_check",
    "_simplify",
    "_forms",
    "_reuse",
    "_inspect",
    "_points",
    "_derivatives",
)
#: The place of what stands at the top of the package, and of the public packages there.
FACES = len(ROOMS)


def place(module: str) -> int:
    """Return where the room of a module stands; -1 for one that is not in the table."""
    room = module.split(".")[1] if "." in module else ""
    if room in ROOMS:
        return ROOMS.index(room)
    return -1 if room.startswith("_") else FACES


def named(path: Path, root: Path) -> str:
    """Return the full name of the module in a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str = "") -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything that a module of `package` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if node.level else []
            parts = above[: len(above) - node.level + 1] + [node.module] * bool(node.module)
            base = ".".join(map(str, parts))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def module_of(name: str, modules: dict[str, Path]) -> str:
    """Return the module that is imported, or has the name that is imported."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def private_torch(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every use of a private part of torch."""
    attributes = (
        (n.lineno, ast.unparse(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    )
    for line, name in [*imports(tree), *attributes]:
        root, *rest = name.split(".")
        if root == "torch" and any(p[:1] == "_" and p[:2] != "__" for p in rest):
            yield line, name


def faults(modules: dict[str, Path]) -> Iterator[str]:
    """Yield one message for each rule that is broken."""
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        graph[module] = set()
        if place(module) < 0:
            yield f"{path}: its room has no place in the table of {Path(__file__).name}"
        for line, name in imports(tree, package):
            if name.split(".")[0] != PACKAGE:
                continue
            target = module_of(name, modules)
            graph[module].add(target)
            if place(target) > place(module):
                yield f"{path}:{line}: {module} must not import {target}: its room comes later"
        if not module.startswith(f"{PACKAGE}._torch"):
            for line, name in private_torch(tree):
                yield f"{path}:{line}: {name} is private to torch; reach it through _torch"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle of imports: {' <- '.join(error.args[1])}"


def main() -> int:
    """Print the faults and return the exit status."""
    root = Path(__file__).parents[1]
    modules = {named(p, root): p for p in sorted((root / PACKAGE).glob("**/*.py"))}
    found = list(faults(modules))
    print("\n".join(found) if found else f"{len(modules)} modules, no arrow upwards, no circle.")
    return bool(found) or not modules


if __name__ == "__main__":
    sys.exit(main())
