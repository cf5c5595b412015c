"""Plots as inline SVG: text and shapes alone, sized by the page, coloured by its style sheet.

Colours are the classes `s0` to `s5` of the page, so that one drawing suits light and dark screens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 46
_LEGEND_LINE = 20
# Keeps whole points inside the frame.
_MARGIN = 8
COLOURS = 6

Series = tuple[str, Sequence[float], Sequence[float]]
Points = tuple[str, Sequence[float], Sequence[float], Sequence[float | None]]


def line_plot(series: Sequence[Series], *, x_label: str, y_label: str, log_y: bool = False) -> Markup:
    """Return lines over a linear x axis.

    Args:
        series: (label, x, y); values that are not finite, or not positive on a logarithmic axis, are left out.
        x_label: of the x axis.
        y_label: of the y axis.
        log_y: logarithmic y axis.
    """
    kept = [
        (label, [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y) and (y > 0 or not log_y)])
        for label, xs, ys in series
    ]
    every = [pair for _, pairs in kept for pair in pairs]
    if not every:
        return Markup("")
    to_x, x_ticks = _linear_axis([x for x, _ in every], _LEFT, _WIDTH - _RIGHT)
    ys = [y for _, y in every]
    to_y, y_ticks = (_log_axis if log_y else _linear_axis)(ys, _HEIGHT - _BOTTOM, _TOP)
    shapes = []
    for number, (_, pairs) in enumerate(kept):
        if pairs:
            path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in pairs)
            shapes.append(Markup('<polyline {} points="{}"/>').format(_stroke(number), path))
    return _frame(
        shapes, [label for label, _ in kept], _line_sample, _Side(x_ticks, to_x, x_label), _Side(y_ticks, to_y, y_label)
    )


def scatter_plot(
    series: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Return points over a linear x axis, each with a bar of one standard error to either side.

    Args:
        series: (label, x, y, standard errors); values that are not finite, or not positive on a logarithmic axis, are
            left out, and a standard error that is None or NaN draws no bar.
        x_label: of the x axis.
        y_label: of the y axis.
        log_y: logarithmic y axis.
        level: (label, y) of a line across the plot; one that is not finite, or not positive, is left out likewise.
    """
    least = 0.0 if log_y else -math.inf
    kept = [
        (
            label,
            [
                # A bar that would reach 0 on a logarithmic axis ends at its point.
                (x, y, y - error if y - error > least else y, y + error)
                for x, y, error in zip(xs, ys, [e if e and math.isfinite(e) else 0.0 for e in errors], strict=True)
                if math.isfinite(y) and y > least
            ],
        )
        for label, xs, ys, errors in series
    ]
    every = [point for _, points in kept for point in points]
    if not every:
        return Markup("")
    to_x, x_ticks = _linear_axis([x for x, *_ in every], _LEFT + _MARGIN, _WIDTH - _RIGHT - _MARGIN)
    heights = [height for _, _, low, high in every for height in (low, high)]
    levels = [level] if level is not None and math.isfinite(level[1]) and level[1] > least else []
    heights += [height for _, height in levels]
    to_y, y_ticks = (_log_axis if log_y else _linear_axis)(heights, _HEIGHT - _BOTTOM - _MARGIN, _TOP + _MARGIN)
    shapes = []
    for number, (_, points) in enumerate(kept):
        for x, y, low, high in points:
            if high > low:
                bar = Markup('<line class="bar s{0}" x1="{1:.1f}" y1="{2:.1f}" x2="{1:.1f}" y2="{3:.1f}"/>')
                shapes.append(bar.format(number % COLOURS, to_x(x), to_y(low), to_y(high)))
            shapes.append(_marker(number, to_x(x), to_y(y)))
    across = Markup('<line class="level" x1="{}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>')
    shapes += [across.format(_LEFT, to_y(height), _WIDTH - _RIGHT, to_y(height)) for _, height in levels]

    def sample(number: int, y: float) -> Markup:
        if number < len(kept):
            return _marker(number, _LEFT + 13, y)
        return across.format(_LEFT, y, _LEFT + 26, y)

    labels = [label for label, _ in (*kept, *levels)]
    sides = _Side(x_ticks, to_x, x_label), _Side(y_ticks, to_y, y_label)
    return _frame(shapes, labels, sample, *sides)


def histogram_plot(
    series: Sequence[tuple[str, Sequence[float], Sequence[int]]], *, x_label: str, y_label: str
) -> Markup:
    """Return histograms over powers of ten as outlines, each as shares of its own total.

    Args:
        series: (label, edges, counts), one more count than edges: the first and the last bin are open.
        x_label: of the x axis.
        y_label: of the y axis.
    """
    known = [(label, list(edges), list(counts)) for label, edges, counts in series if sum(counts)]
    if not known:
        return Markup("")
    used = [i for _, _, counts in known for i, count in enumerate(counts) if count]
    first, last = min(used), max(used)
    exponents = [math.log10(edge) for edge in known[0][1]]
    step = exponents[1] - exponents[0]
    # Open bins are drawn as wide as the others.
    borders = [exponents[0] - step, *exponents, exponents[-1] + step]
    to_x, _ = _linear_axis([borders[first], borders[last + 1]], _LEFT, _WIDTH - _RIGHT)
    whole = range(math.ceil(borders[first]), math.floor(borders[last + 1]) + 1)
    x_ticks = [(float(e), f"1e{e}") for e in whole]
    shares = [(label, [count / sum(counts) for count in counts]) for label, _, counts in known]
    to_y, y_ticks = _linear_axis([0.0, max(max(values) for _, values in shares)], _HEIGHT - _BOTTOM, _TOP)
    shapes = []
    for number, (_, values) in enumerate(shares):
        corners = [(borders[first], 0.0)]
        for i in range(first, last + 1):
            corners += [(borders[i], values[i]), (borders[i + 1], values[i])]
        corners.append((borders[last + 1], 0.0))
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in corners)
        shapes.append(Markup('<polyline {} points="{}"/>').format(_stroke(number), path))
    return _frame(
        shapes,
        [label for label, _ in shares],
        _line_sample,
        _Side(x_ticks, to_x, x_label),
        _Side(y_ticks, to_y, y_label),
    )


def matrix_plot(
    rows: Sequence[str], columns: Sequence[str], cells: Callable[[str, str], tuple[str, str] | None]
) -> Markup:
    """Return a matrix of coloured squares.

    Args:
        rows: names of the rows.
        columns: names of the columns.
        cells: from a row and a column to (style class, tooltip), None for an empty cell.
    """
    side, left = 18, 12 + 7 * max(map(len, rows), default=1)
    top = 12 + 7 * max(map(len, columns), default=1)
    width, height = left + side * len(columns) + 8, top + side * len(rows) + 8
    shapes = []
    for number, name in enumerate(columns):
        x = left + side * number + side * 0.7
        shapes.append(Markup('<text transform="translate({:.1f},{}) rotate(-90)">{}</text>').format(x, top - 6, name))
    for line, row in enumerate(rows):
        y = top + side * line
        shapes.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(left - 6, y + side * 0.72, row)
        )
        for number, column in enumerate(columns):
            cell = cells(row, column)
            if cell is not None:
                shapes.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                        cell[0], left + side * number, y, side - 2, side - 2, cell[1]
                    )
                )
    return Markup('<svg class="matrix" viewBox="0 0 {0} {1}" style="max-width:{0}px" role="img">{2}</svg>').format(
        width, height, Markup("").join(shapes)
    )


def standalone(plot: Markup) -> str:
    """Return a plot as a picture of its own: what the page's style sheet would say stands in it.

    Args:
        plot: of one of the functions above.
    """
    light = ("#0b62a4", "#d1495b", "#2e8b57", "#8d5fd3", "#b26a00", "#5f6b6d")
    dark = ("#62aef0", "#ff8c99", "#64c993", "#bd9cff", "#e3a341", "#9aa7ab")

    def rules(colours: Sequence[str], text: str, grid: str) -> str:
        own = [f".s{n}{{fill:{c}}}.line.s{n},.bar.s{n}{{fill:none;stroke:{c}}}" for n, c in enumerate(colours)]
        return f"text{{fill:{text}}}.grid{{stroke:{grid}}}.level{{stroke:{text}}}" + "".join(own)

    style = (
        "text{font:12px system-ui,sans-serif}.line{fill:none;stroke-width:2}.bar{stroke-width:1}"
        ".level{stroke-dasharray:6 4}"
        + rules(light, "#1c1c1c", "#ddd")
        + f"@media(prefers-color-scheme:dark){{{rules(dark, '#e8e8e8', '#363b40')}}}"
    )
    opening, _, rest = str(plot).partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def _stroke(number: int) -> Markup:
    """Return the style of a line; when the colours are used up, the next lines are dashed."""
    dash = Markup(' stroke-dasharray="{} 4"').format(2 * (number // COLOURS)) if number >= COLOURS else ""
    return Markup('class="line s{}"{}').format(number % COLOURS, dash)


# Corners around the middle, in units of a marker's radius: square, triangle, diamond; before them comes the circle.
_MARKERS = (
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
)
_RADIUS = 3.2


def _marker(number: int, x: float, y: float) -> Markup:
    """Return a point; when the colours are used up, the next points have another shape."""
    colour, shape = f"s{number % COLOURS}", number // COLOURS % (len(_MARKERS) + 1)
    if shape == 0:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(colour, x, y, _RADIUS)
    corners = " ".join(f"{x + _RADIUS * a:.1f},{y + _RADIUS * b:.1f}" for a, b in _MARKERS[shape - 1])
    return Markup('<polygon class="{}" points="{}"/>').format(colour, corners)


def _line_sample(number: int, y: float) -> Markup:
    line = Markup('<line {} x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return line.format(_stroke(number), _LEFT, y, _LEFT + 26, y)


Axis = Callable[[float], float]
Ticks = list[tuple[float, str]]


def _linear_axis(values: Sequence[float], start: float, end: float) -> tuple[Axis, Ticks]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    ticks = []
    value = math.ceil(low / step) * step
    while value <= high + step * 1e-9:
        ticks.append((value, f"{value:.6g}" if abs(value) > step * 1e-9 else "0"))
        value += step
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def _log_axis(values: Sequence[float], start: float, end: float) -> tuple[Axis, Ticks]:
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 1:
        # Less than a decade: whole powers of ten would leave the axis without a number.
        axis, ticks = _linear_axis(values, start, end)
        return axis, ticks
    decades = range(math.floor(low), math.floor(high) + 1)
    if high - low < 3:
        # Powers of ten alone would leave too few numbers.
        steps = [factor * 10.0**e for e in decades for factor in (1, 2, 5)]
        ticks = [(step, f"{step:.6g}") for step in steps if low <= math.log10(step) <= high]
    else:
        ticks = [(10.0**e, f"1e{e}") for e in decades if low <= e]
    return lambda v: start + (math.log10(v) - low) / (high - low) * (end - start), ticks


@dataclasses.dataclass(frozen=True)
class _Side:
    """An axis: where values stand on it, its ticks, and what it says."""

    ticks: Ticks
    place: Axis
    label: str


def _frame(
    shapes: Sequence[Markup],
    labels: Sequence[str],
    sample: Callable[[int, float], Markup],
    x_side: _Side,
    y_side: _Side,
) -> Markup:
    height = _HEIGHT + _LEGEND_LINE * len(labels)
    parts = []
    for value, text in x_side.ticks:
        x, foot = x_side.place(value), _HEIGHT - _BOTTOM
        parts.append(Markup('<line class="grid" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>').format(x, _TOP, foot))
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, foot + 16, text))
    for value, text in y_side.ticks:
        y = y_side.place(value)
        parts.append(
            Markup('<line class="grid" x1="{0}" y1="{2:.1f}" x2="{1}" y2="{2:.1f}"/>').format(_LEFT, _WIDTH - _RIGHT, y)
        )
        parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, text))
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle_x, _HEIGHT - 10, x_side.label)
    )
    upright = Markup('<text transform="translate(12,{}) rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(upright.format(middle_y, y_side.label))
    for number, label in enumerate(labels):
        y = _HEIGHT + _LEGEND_LINE * number
        parts.append(sample(number, y + 5))
        parts.append(Markup('<text x="{}" y="{}">{}</text>').format(_LEFT + 34, y + 9, label))
    title = escape(f"{y_side.label} over {x_side.label}")
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        _WIDTH, height, title, Markup("").join(parts), Markup("").join(shapes)
    )
