"""Line charts as SVG, readable on a light and on a dark page, without any package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 230, 54, 58
COLOURS = ("#1f77c9", "#d9730d", "#2e9e4f", "#a154c7", "#c73b54", "#0d9ba6", "#8a7a1f")
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #24292f }
    .title { font-size: 15px; font-weight: 600 }
    .grid { stroke: #24292f; stroke-opacity: .14 }
    .line { fill: none; stroke-width: 2.2 }
    @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .grid { stroke: #e6edf3 } }
"""
Points = Sequence[tuple[float, float]]


def line_chart(title: str, across: str, upward: str, lines: Mapping[str, Points], *, log_y: bool = True) -> str:
    """*lines* maps a name to points with positive x, at least one line with a point; x is logarithmic."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    place_x = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT, log=True)
    ticks = _powers(min(ys), max(ys)) if log_y else _steps(max(ys))
    place_y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        f'<text x="{LEFT}" y="44">{escape(upward)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(across)}</text>',
    ]
    for tick in ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for x in xs:
        parts.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x:,g}</text>')
    parts += [_line(i, points, place_x, place_y) for i, points in enumerate(lines.values())]
    parts += _names({name: place_y(points[-1][1]) for name, points in lines.items()})
    return "\n".join([*parts, "</svg>\n"])


def _line(index: int, points: Points, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    colour = COLOURS[index % len(COLOURS)]
    placed = [(place_x(x), place_y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>' for x, y in placed)
    return f'<polyline class="line" stroke="{colour}" points="{path}"/>{dots}'


def _names(ends: Mapping[str, float]) -> list[str]:
    """Each name beside the end of its line, moved down where it would cover another."""
    labels, last = [], -math.inf
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ends)}
    overflow = max(0.0, _lowest(ends) - (HEIGHT - BOTTOM))
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        last = max(y - overflow, last + 18)
        dot = f'<circle cx="{WIDTH - RIGHT + 16}" cy="{last:.1f}" r="4.5" fill="{colours[name]}"/>'
        labels.append(f'{dot}<text x="{WIDTH - RIGHT + 26}" y="{last + 4.5:.1f}">{escape(name)}</text>')
    return labels


def _lowest(ends: Mapping[str, float]) -> float:
    last = -math.inf
    for y in sorted(ends.values()):
        last = max(y, last + 18)
    return last


def _scale(low: float, high: float, begin: float, end: float, *, log: bool) -> Callable[[float], float]:
    measure: Callable[[float], float] = math.log10 if log else float
    span = (measure(high) - measure(low)) or 1.0
    return lambda value: begin + (measure(value) - measure(low)) / span * (end - begin)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten around both, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last) for step in steps] + [10.0**last]
    return [t for i, t in enumerate(ticks) if ticks[min(i + 1, len(ticks) - 1)] > low and ticks[max(i - 1, 0)] < high]


def _steps(high: float) -> list[float]:
    power: float = 10.0 ** math.floor(math.log10(high))
    step = next(power * f for f in (0.2, 0.5, 1, 2) if power * f * 5 >= high)
    return [step * i for i in range(math.ceil(high / step) + 1)]
