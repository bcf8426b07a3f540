"""Drawings of linear programs, as SVG."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from .._execute.binding import BoundProgram
from .._programs.numbers import Numbers
from .._programs.program import Equation, Operation
from .._programs.values import Var
from .._spaces.memory import total_bytes
from .._text.labels import lines_of, name_of, named
from .._text.tables import clipped, escaped, size
from .layout import Layout, layered

#: Sizes of text, in units of the drawing. Letters of equal width can be reckoned with.
_FONT, _LETTER, _LINE = 12, 7.4, 16
_MOST_LETTERS = 34
_MARGIN, _CAPTION, _BETWEEN = 16, 34, 56
#: More inputs than this are put together where they go the same way.
_MANY = 6

_STYLE = """
.lz-draw text { font: 12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  fill: #1f2328; }
.lz-draw .lz-op { font-weight: 600; } .lz-draw .lz-small { fill: #59636e; }
.lz-draw .lz-ground { fill: #ffffff; }
.lz-draw .lz-edge { fill: none; stroke: #8a929b; stroke-width: 1.3; }
.lz-draw .lz-tip { fill: #8a929b; }
.lz-draw rect.lz-built { fill: #e6effb; stroke: #4a82c3; }
.lz-draw rect.lz-opaque { fill: #fdebd0; stroke: #c98a2b; }
.lz-draw rect.lz-end { fill: #eceff2; stroke: #8a929b; }
.lz-draw rect.lz-cut { fill: none; stroke: #8a929b; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  .lz-draw text { fill: #e6edf3; } .lz-draw .lz-small { fill: #9da7b3; }
  .lz-draw .lz-ground { fill: #15181d; }
  .lz-draw .lz-edge { stroke: #7d8590; } .lz-draw .lz-tip { fill: #7d8590; }
  .lz-draw rect.lz-built { fill: #1c2b40; stroke: #5b97dd; }
  .lz-draw rect.lz-opaque { fill: #3d2c11; stroke: #d69e45; }
  .lz-draw rect.lz-end { fill: #272c33; stroke: #7d8590; }
  .lz-draw rect.lz-cut { stroke: #7d8590; }
}
""".strip()


class Drawing:
    """A drawing as SVG. Notebooks show it; `save` writes it; `str` is its text."""

    __slots__ = ("svg",)

    def __init__(self, svg: str) -> None:
        self.svg = svg

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the drawing to a file, which can be opened in a browser.

        Parameters
        ----------
        path
            Where; an existing file is replaced.

        Returns
        -------
        pathlib.Path
            The file.
        """
        path = Path(path)
        path.write_text(self.svg + "\n", encoding="utf-8")
        return path

    def _repr_svg_(self) -> str:
        return self.svg

    def __str__(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing: SVG, {len(self.svg):,} characters>"


@dataclasses.dataclass(slots=True)
class _Box:
    kind: str
    lines: list[str]
    tip: str = ""

    def __post_init__(self) -> None:
        self.lines = [clipped(line, _MOST_LETTERS) for line in self.lines if line]

    @property
    def size(self) -> tuple[float, float]:
        longest = max(map(len, self.lines))
        return longest * _LETTER + 20, len(self.lines) * _LINE + 12


def draw(programs: Sequence[BoundProgram], limit: int = 30) -> Drawing:
    """Draw programs beside each other.

    Of programs with more equations than `limit` the beginning and the end are drawn, with one box
    for what lies between.
    """
    parts = []
    left, height = float(_MARGIN), 0.0
    for program in programs:
        caption = _caption(program)
        boxes, edges = _boxes(program, max(limit, 2))
        layout = layered([box.size for box in boxes], edges)
        width = max(layout.width, *(len(text) * _LETTER for text in caption))
        parts.append(f'<g transform="translate({left:.1f} {_MARGIN})">')
        parts += [
            f'<text x="0" y="{_FONT + i * _LINE}"{kind}>{escaped(text)}</text>'
            for i, (text, kind) in enumerate(
                zip(caption, (' class="lz-op"', ' class="lz-small"'), strict=True)
            )
        ]
        shift = (width - layout.width) / 2
        parts.append(f'<g transform="translate({shift:.1f} {_CAPTION + 10})">')
        parts += _edges(layout)
        for box, centre in zip(boxes, layout.centres, strict=True):
            parts += _drawn(box, centre)
        parts.append("</g></g>")
        left += width + _BETWEEN
        height = max(height, layout.height + _CAPTION + 10 + 2 * _MARGIN)
    width = left - _BETWEEN + _MARGIN
    names = escaped(" and ".join(program.name for program in programs))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lz-draw" role="img" '
        f'aria-label="Drawing of the linear programs {names}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
    )
    ground = f'<rect class="lz-ground" width="{width:.0f}" height="{height:.0f}"/>'
    return Drawing("\n".join([head, f"<style>{_STYLE}</style>", ground, *parts, "</svg>"]))


def _caption(program: BoundProgram) -> tuple[str, str]:
    kept = size(total_bytes(program.kept_tensors()))
    count = len(program.equations)
    zero = sum(v is None for v in program.outputs)
    zeros = f", {zero} of {len(program.outputs)} results zero" if zero else ""
    return program.name, f"{count:,} equation{'s' * (count != 1)}, {kept} kept{zeros}"


# -- what is drawn ----------------------------------------------------------------------------


def _boxes(program: BoundProgram, limit: int) -> tuple[list[_Box], list[tuple[int, int]]]:
    """Return the boxes in topological order, and the edges."""
    equations, texts, numbers = program.equations, _texts(program), program.numbers()
    hidden = range(0)
    if len(equations) > limit:
        hidden = range(limit // 2, len(equations) - (limit - limit // 2))
    readers: dict[Var, dict[int, None]] = {v: {} for v in program.inputs}
    for i, eq in enumerate(equations):
        for v in eq.inputs():
            if v in readers:
                readers[v][hidden.start if i in hidden else i] = None
    boxes: list[_Box] = []
    edges: list[tuple[int, int]] = []
    #: The box that each variable comes from.
    origin: dict[Var, int] = {}
    for group in _groups(readers, {v: tuple(read) for v, read in readers.items()}):
        origin.update(dict.fromkeys(group, len(boxes)))
        boxes.append(_end("input", group, program.inputs))
    for i, eq in enumerate(equations):
        if i not in hidden:
            boxes.append(_box(eq, numbers, texts[i]))
        elif i == hidden.start:
            boxes.append(_skipped([equations[j] for j in hidden], numbers))
        here = len(boxes) - 1
        edges += [(origin[v], here) for v in eq.inputs() if origin[v] != here]
        origin.update((v, here) for v in eq.outputs if v is not None)
    for group in _groups((v for v in program.outputs if v is not None), origin):
        boxes.append(_end("result", group, program.outputs))
        edges.append((origin[group[0]], len(boxes) - 1))
    return boxes, list(dict.fromkeys(edges))


def _groups(variables: Iterable[Var], way: Mapping[Var, Hashable]) -> list[list[Var]]:
    """Put many variables together that come or go the same way; leave few as they are."""
    distinct = list(dict.fromkeys(variables))
    if len(distinct) <= _MANY:
        return [[v] for v in distinct]
    groups: dict[Hashable, list[Var]] = {}
    for v in distinct:
        groups.setdefault(way[v], []).append(v)
    return list(groups.values())


def _end(what: str, group: Sequence[Var], of: Sequence[Var | None]) -> _Box:
    """Return the box of inputs or results."""
    places = [i for i, v in enumerate(of) if v in group]
    if len(places) == 1:
        label = what if len(of) == 1 else f"{what} {places[0]}"
        return _Box("end", [label, str(group[0].spec)])
    return _Box("end", [f"{len(places)} {what}s", size(sum(v.spec.nbytes for v in group))])


def _box(eq: Equation, numbers: Numbers, tip: str) -> _Box:
    outs = [str(v.spec) for v in eq.outputs if v is not None]
    result = outs[0] if len(outs) == 1 else f"{len(outs)} results"
    opaque = isinstance(eq.op, Operation)
    kept = [numbers[c] for c in eq.constants()]
    if isinstance(eq.op, Operation):
        kept += eq.op.bytes_kept()
    bytes_kept = f"keeps {size(total_bytes(kept))}" if kept else ""
    source = name_of(eq.source)
    lines = [
        line for s in (eq.source, *(c.source for c in eq.constants())) for line in lines_of(s)
    ]
    return _Box(
        "opaque" if opaque else "built",
        [eq.kind, result, bytes_kept, source if source != eq.kind else "", named(lines)],
        tip,
    )


def _skipped(inside: Sequence[Equation], numbers: Numbers) -> _Box:
    kinds = dict.fromkeys(eq.kind for eq in inside)
    kept = size(total_bytes(numbers[c] for eq in inside for c in eq.constants()))
    shown = ", ".join(list(kinds)[:8]) + (", …" if len(kinds) > 8 else "")
    return _Box("cut", [f"… {len(inside):,} more equations …", shown, f"keep {kept}"])


def _texts(program: BoundProgram) -> list[str]:
    """Return each equation as it is printed."""
    lines = str(program).splitlines()
    return [line.strip() for line in lines[1 + len(program.residuals()) : -1]]


# -- SVG --------------------------------------------------------------------------------------


def _drawn(box: _Box, centre: tuple[float, float]) -> Iterable[str]:
    (x, y), (w, h) = centre, box.size
    tip = f"<title>{escaped(box.tip)}</title>" if box.tip else ""
    yield (
        f'<g>{tip}<rect class="lz-{box.kind}" x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" '
        f'width="{w:.1f}" height="{h:.1f}" rx="6"/>'
    )
    for i, line in enumerate(box.lines):
        kind = "lz-op" if i == 0 else "lz-small"
        below = y - h / 2 + 6 + _LINE * i + _FONT
        yield (
            f'<text class="{kind}" x="{x:.1f}" y="{below:.1f}" text-anchor="middle">'
            f"{escaped(line)}</text>"
        )
    yield "</g>"


def _edges(layout: Layout) -> Iterable[str]:
    for points in layout.routes:
        (x, y), *_ = points
        path = [f"M{x:.1f} {y:.1f}"]
        for i, (u, v) in enumerate(points[1:]):
            end = v - 6 if i == len(points) - 2 else v
            if i % 2 == 0:
                path.append(f"V{end:.1f}")
            else:
                bend = (y + v) / 2
                path.append(f"C{x:.1f} {bend:.1f} {u:.1f} {bend:.1f} {u:.1f} {v:.1f}")
            x, y = u, v
        yield f'<path class="lz-edge" d="{" ".join(path)}"/>'
        yield f'<path class="lz-tip" d="M{x:.1f} {y:.1f} l-4 -7 h8 z"/>'
