"""A pipeline's schedule as a picture: a row a rank, a box an action, gaps where a rank waits."""

from __future__ import annotations

from html import escape
from math import ceil, log10
from typing import Any

from .show import ranks_of

PAGE, MOST_WIDTH, RIGHT = 990, 12_000, 84  # pixels: of all, of a picture that scrolls, of what stands right of it
ROW, GAP, TOP, AXIS = 26, 6, 6, 26
DIGIT, MARGIN = 5.5, 1.9  # of a number in a box: what a digit takes, and what is beside it
MOST_BOXES, MOST_OF_ALL = 6_000, 20_000  # with numbers, and of a picture of all that a browser draws at once
SHADES = {"F": ("#2f5f93", "#c3d8ec"), "B": ("#b4552d", "#f3d3bd"), "W": ("#4a7c4e", "#cfe3cf")}
NAMES = {"F": "forward", "B": "backward", "W": "gradients of weights"}


def drawing(data: dict[str, Any]) -> str:
    """HTML of the timeline of a plan's data: as wide as the page, and where boxes are too narrow there for numbers,
    once more for scrolling."""
    line = data["pipeline"]
    rows, end = line["timeline"], line["seconds"]
    boxes = [box for row in rows for box in row]
    names = ["stage" + "s" * (len(g["stages"]) > 1) + f" {listed(g)}" for g in data["groups"]]
    left = 18 + round(6.2 * max(map(len, names)))
    width = PAGE - left - RIGHT
    usual = sorted(box[4] - box[3] for box in boxes)[len(boxes) // 4]
    wanted = DIGIT * len(str(data["microbatches"] - 1)) + MARGIN + 1
    wide = min(MOST_WIDTH, ceil(end / usual * wanted)) if usual else width

    def framed(picture: str) -> str:
        return _framed(data, names, left, picture)

    parts = [_legend(line["chunks"], {box[0] for box in boxes})]
    if len(boxes) <= MOST_OF_ALL:
        parts.append(framed(_picture(line, width, end)))
    if wide > width:
        shown = end * min(1.0, MOST_BOXES / len(boxes))
        words = "The schedule with the numbers of micro-batches" + (", its beginning" if shown < end else "")
        parts += [f"<p>{words}; it scrolls.</p>", framed(_picture(line, max(width, round(wide * shown / end)), shown))]
    return "\n".join(parts)


def listed(group: dict[str, Any]) -> str:
    """The stages of a group."""
    return ", ".join(str(stage["stage"]) for stage in group["stages"])


def _framed(data: dict[str, Any], names: list[str], width: int, picture: str) -> str:
    """A picture between the names of its rows and how long they wait."""
    line, left, right = data["pipeline"], [], []
    for i, (group, name, waiting) in enumerate(zip(data["groups"], names, line["waiting"], strict=True)):
        y = TOP + i * (ROW + GAP) + ROW * 0.68
        title = f"<title>{escape(ranks_of(group))}</title>"
        left.append(f'<text x="{width - 8}" y="{y:.1f}" text-anchor="end">{title}{name}</text>')
        right.append(f'<text x="8" y="{y:.1f}">waits {waiting / line["seconds"]:.0%}</text>')
    height = _height(len(names))
    one, two = (
        f'<svg width="{w}" height="{height}">{"".join(texts)}</svg>' for w, texts in ((width, left), (RIGHT, right))
    )
    return f'<div class="line">{one}<div class="scroll">{picture}</div>{two}</div>'


def _height(rows: int) -> int:
    return TOP + rows * (ROW + GAP) + AXIS


def _picture(line: dict[str, Any], width: int, end: float) -> str:
    """The rows up to a time, `width` pixels for it."""
    scale, rows = width / end if end else 0.0, line["timeline"]
    bottom = TOP + len(rows) * (ROW + GAP)
    size = f'width="{width + 4}" height="{_height(len(rows))}"'
    found = [f'<svg {size} role="img" aria-label="timeline of the pipeline">']
    for tick, name in _ticks(end, width):
        x = tick * scale
        where = "start" if not tick else "middle" if x < width - 20 else "end"
        found.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" class="tick"/>')
        found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{where}">{name}</text>')
    for i, row in enumerate(rows):
        y = TOP + i * (ROW + GAP)
        found.append(f'<rect x="0" y="{y}" width="{width}" height="{ROW}" class="idle"/>')
        found += [_box(line, box, y, scale) for box in row if box[3] < end]
    return "".join(found) + "</svg>"


def _box(line: dict[str, Any], box: list[Any], y: int, scale: float) -> str:
    kind, batch, stage, start, stop = box
    chunk = stage // line["ranks"]
    fill, ink = colour(kind, chunk, line["chunks"])
    x, width = start * scale, (stop - start) * scale
    words = f"{NAMES.get(kind, kind)} of micro-batch {batch} on stage {stage}: {_time(start)} to {_time(stop)}"
    edge = min(0.6, width / 8)
    found = (f'<rect x="{x + edge:.2f}" y="{y}" width="{max(0.0, width - 2 * edge):.2f}" height="{ROW}" '
             f'fill="{fill}"><title>{words}</title></rect>')  # fmt: skip
    if width >= DIGIT * len(str(batch)) + MARGIN:
        place = f'x="{x + width / 2:.1f}" y="{y + ROW * 0.65:.1f}"'
        found += f'<text {place} class="number" style="fill: {ink}">{batch}</text>'
    return found


def colour(kind: str, chunk: int, chunks: int) -> tuple[str, str]:
    """(of a box, of words on it): the first chunk is the darkest."""
    dark, light = SHADES.get(kind, ("#5b7f4a", "#d5e3cc"))
    share = chunk / max(1, chunks - 1) if chunks > 1 else 0.0
    mixed = (round(int(dark[i : i + 2], 16) * (1 - share) + int(light[i : i + 2], 16) * share) for i in (1, 3, 5))
    return "#" + "".join(f"{c:02x}" for c in mixed), "#ffffff" if share < 0.5 else "#222222"


def _legend(chunks: int, kinds: set[str]) -> str:
    shown = []
    for kind, name in ((kind, name) for kind, name in NAMES.items() if kind in kinds):
        for chunk in range(chunks):
            words = f"{name}, chunk {chunk}" if chunks > 1 else name
            shown.append(f'<span style="background: {colour(kind, chunk, chunks)[0]}"></span>{words}')
    return f'<p class="key">{"".join(shown)}<span class="idle"></span>waiting</p>'


def _ticks(end: float, width: int) -> list[tuple[float, str]]:
    """Round times, about 90 pixels apart, with their names."""
    if not end:
        return []
    rough = end / max(1, width / 90)
    power = 10.0 ** int(log10(rough) // 1)
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
    return [(i * step, _time(i * step, step)) for i in range(int(end / step) + 1)]


def _time(seconds: float, step: float = 0.0) -> str:
    """With as many digits as a step of it needs."""
    unit, one = next(((u, o) for u, o in (("s", 1.0), ("ms", 1e-3)) if (step or seconds) >= o / 10), ("µs", 1e-6))
    return "0" if not seconds else f"{seconds / one:.{3 if not step else max(0, -int(log10(step / one) // 1))}f} {unit}"
