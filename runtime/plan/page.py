"""A plan as one page of HTML that needs nothing else: bars of memory, the pipeline's timeline, messages, and who holds
which part of what."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import jinja2
from markupsafe import Markup

from ..tables import amount, size
from .drawing import drawing, listed
from .show import BYTES, _merged, ranks_of

MOST = 64  # ranks that get a row of their own
COLOURS = ("#4878a8", "#7aa6c2", "#a06890", "#999999", "#d08770", "#cccccc")

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ p.model }} under {{ p.layout }}</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
td, th { padding: 0.1em 0.8em 0.1em 0; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
.bar { display: flex; width: 40em; height: 1.1em; background: #eee; position: relative; }
.bar span { display: block; height: 100%; }
.key span { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.3em 0 1em; }
.over { color: #b00; }
.line { display: flex; margin: 0 0 1.5em; }
.line svg { display: block; flex: none; }
.line svg text { font: 12px sans-serif; fill: #444; }
.line svg text.number { font-size: 10px; text-anchor: middle; pointer-events: none; }
.scroll { overflow-x: auto; }
.tick { stroke: #ddd; }
rect.idle { fill: #eeeeee; }
span.idle { background: #eeeeee; outline: 1px solid #ccc; }
summary { cursor: pointer; font-size: 120%; margin: 1em 0 0.5em; }
td.words { text-align: left; }
.stages td { white-space: nowrap; }
code { font-size: 95%; }
</style>
</head>
<body>
<h1>{{ p.model }} under <code>{{ p.layout }}</code></h1>
<p>{{ "{:,}".format(p.parameters) }} parameters on {{ "{:,}".format(p.ranks) }} &times; {{ p.device }} in
{{ p.precision }}; mesh
{% for axis, ranks in p.mesh.items() %}<code>{{ axis }} = {{ ranks }}</code>{{ ", " if not loop.last }}{% endfor %}.
A step is {{ "{:,}".format(p.batch) }} rows of {{ "{:,}".format(p.seq) }} tokens in {{ p.microbatches }} micro-batches:
{{ "%.4g" % p.seconds }} s, {{ amount(p.tokens_per_second) }} tokens a second, MFU {{ "%.1f" % (100 * p.mfu) }} %.</p>
{% if not p.fits %}<p class="over">Does not fit: a rank needs {{ size(p.over_bytes) }} more than it has.</p>
<ul>{% for line in p.helps %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if p.pipeline %}<h2>The pipeline</h2>
<p>{{ p.pipeline.stages }} stages over <code>{{ p.pipeline.axis }}</code>, {{ p.pipeline.schedule }}: the micro-batches
of a step take {{ "%.4g" % p.pipeline.seconds }} s, in which ranks wait {{ "%.1f" % (100 * p.pipeline.bubble) }} % of
what they work.</p>
{{ timeline }}
<table class="stages"><tr><th>stage</th><th>ranks</th><th style="text-align: left">holds</th><th>parameters</th>
<th>saved a micro-batch</th><th>in flight</th><th>forward</th><th>backward</th>
{% if 'W' in stages[0][1].seconds %}<th>of weights</th>{% endif %}<th>FLOP a step</th>
<th>sent a micro-batch</th></tr>
{% for group, row in stages %}<tr><td>{{ row.stage }}</td><td>{{ ranks_of(group).partition(" ")[2] }}</td>
<td class="words"><code>{{ row.holds | join(", ") }}</code></td><td>{{ "{:,}".format(row.parameters) }}</td>
<td>{{ size(row.saved) }}</td><td>{{ row.in_flight }}</td>
{% for seconds in row.seconds.values() %}<td>{{ "%.4g" % (1000 * seconds) }} ms</td>{% endfor %}
<td>{{ amount(row.flops) }}</td>
<td>{{ size(row.sent.values() | sum) }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Memory by rank</h2>
<p class="key">{% for _, name, colour in kinds %}
<span style="background: {{ colour }}"></span>{{ name }}{% endfor %}</p>
<table>
{% for bar in bars %}<tr><td>{{ bar.name }}</td><td><div class="bar" title="{{ bar.title }}">
{%- for part in bar.parts %}
<span style="width: {{ "%.3f" % part.width }}%; background: {{ part.colour }}" title="{{ part.title }}"></span>
{%- endfor %}
</div></td><td>{{ bar.title }}</td></tr>
{% endfor %}</table>
{% for stage in p.groups %}{% if p.pipeline %}
<details{{ " open" if loop.first }}><summary>{{ ranks_of(stage) }}: stage{{ "s" if stage.stages | length > 1 }}
{{ listed(stage) }}</summary>{% endif %}
<h2>What is saved and done, by block</h2>
<table><tr><th>block</th><th>parameters</th><th>saved bytes</th><th>FLOP a step</th><th>messages</th></tr>
{% for row in stage.blocks %}<tr><td><code>{{ row.block }}</code></td><td>{{ "{:,}".format(row.parameters) }}</td>
<td>{{ "{:,}".format(row.saved) }}</td><td>{{ amount(row.flops) }}</td><td>{{ "{:,}".format(row.messages) }}</td></tr>
{% endfor %}</table>
<h2>By line of the spec</h2>
<table><tr><th>line</th><th>saved bytes</th><th>weight bytes</th></tr>
{% for row in stage.lines %}<tr><td><code>{{ row.line or "-" }}</code></td><td>{{ "{:,}".format(row.saved) }}</td>
<td>{{ "{:,}".format(row.parameters) }}</td></tr>
{% endfor %}</table>
<h2>Messages of a step</h2>
<table>
<tr><th>message</th><th>phase</th><th>axes</th><th>ranks</th><th>count</th><th>bytes</th><th>on the wire</th></tr>
{% for row in merged(stage.collectives) %}<tr><td>{{ row.kind }}</td><td>{{ row.phase }}</td>
<td>{{ row.axes | join(" x ") }}{{ "" if row.inside_node else " (between nodes)" }}</td><td>{{ row.ranks }}</td>
<td>{{ "{:,}".format(row.count) }}</td><td>{{ "{:,}".format(row.bytes) }}</td><td>{{ size(row.wire_bytes) }}</td></tr>
{% endfor %}</table>
<h2>Who holds which part</h2>
<p>{{ shown }}</p>
<table><tr><th>weight</th><th>whole</th><th>a rank's</th><th>ranks: part of each split dim</th></tr>
{% for row in slices(stage) %}
<tr><td><code>{{ row.path }}</code></td><td>{{ row.whole }}</td><td>{{ row.shape }}</td>
<td style="text-align: left">{{ row.parts }}</td></tr>
{% endfor %}</table>{% if p.pipeline %}</details>{% endif %}
{% endfor %}
</body>
</html>
"""


def page(data: dict[str, Any]) -> str:
    """The page of a plan's data; the same data, the same bytes."""
    kinds = [(key, name, colour) for (key, name), colour in zip(BYTES, COLOURS, strict=True)]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    return environment.from_string(TEMPLATE).render(
        p=data, kinds=kinds, bars=_bars(data, kinds), amount=amount, size=size, merged=_merged,
        slices=lambda group: _slices(group, data["factors"]), ranks_of=ranks_of, listed=listed,
        timeline=Markup(drawing(data)) if data["pipeline"] else "",
        stages=sorted(((g, s) for g in data["groups"] for s in g["stages"]), key=lambda pair: pair[1]["stage"]),
        shown="Ranks that hold the same part of a weight are listed together; iterations that lie alike are one row.",
    )  # fmt: skip


def _bars(data: dict[str, Any], kinds: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """A bar a rank; of very many ranks that are alike, one for all."""
    bars = []
    for group in data["groups"]:
        held = group["bytes"]
        most = max(held["capacity"], held["total"])
        parts = [
            {"width": 100 * held[key] / most, "colour": colour, "title": f"{name}: {held[key]:,} bytes"}
            for key, name, colour in kinds
        ]
        title = f"{size(held['total'])} of {size(held['capacity'])}"
        named = [(group["ranks"]["first"], ranks_of(group))]
        if data["ranks"] <= MOST:
            named = [(rank, f"rank {rank}") for rank in _ranks(group)]
        bars += [{"first": first, "name": name, "title": title, "parts": parts} for first, name in named]
    return sorted(bars, key=lambda bar: bar["first"])


def _ranks(group: dict[str, Any]) -> list[int]:
    return [rank for first, count in group["ranks"]["runs"] for rank in range(first, first + count)]


def _slices(group: dict[str, Any], mesh: dict[str, int]) -> list[dict[str, str]]:
    """Each weight, iterations that lie alike in one row, with the ranks of each part."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    here = set(_ranks(group)) if prod(mesh.values()) <= MOST else None
    for w in group["weights"]:
        path = ".".join("*" if p.isdigit() else p for p in w["path"].split("."))
        whole = ", ".join(f"{d} = {n}" for d, n in zip(w["dims"], w["whole"], strict=True))
        key = (path, whole, tuple(w["shape"]))
        if key not in rows:
            rows[key] = {"path": path, "whole": whole, "shape": str(w["shape"]), "parts": _parts(w, mesh, here)}
    return list(rows.values())


def _parts(weight: dict[str, Any], mesh: dict[str, int], here: set[int] | None) -> str:
    """`heads/tensor: ranks 0, 2: [0:16]; ranks 1, 3: [16:32]`, of the ranks that hold any, None for very many."""
    split = [(d, axes, n) for d, axes, n in zip(weight["dims"], weight["split"], weight["shape"], strict=True) if axes]
    if not split:
        return "all of it on each"
    named = ", ".join(f"{d} over {' x '.join(axes)}" for d, axes, _ in split)
    if here is None or any(a not in mesh for _, axes, _ in split for a in axes):
        return named
    found: dict[str, list[str]] = {}
    for rank, place in enumerate(product(*(range(n) for n in mesh.values()))):
        if rank not in here:
            continue
        where = dict(zip(mesh, place, strict=True))
        starts = []
        for d, axes, n in split:
            index = 0
            for axis in axes:
                index = index * mesh[axis] + where[axis]
            starts.append(f"{d}[{index * n}:{index * n + n}]")
        found.setdefault(", ".join(starts), []).append(str(rank))
    return f"{named}: " + "; ".join(f"ranks {', '.join(ranks)}: {part}" for part, ranks in found.items())
