"""What a sheet may say: settings that exist, axes that the mesh has, rules that belong there.

What selectors mean is decided on a model; all else in a sheet can be checked without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from . import syntax as sx
from .diagnostics import Diagnostic, Label, did_you_mean, listed
from .load import File
from .source import Span
from .vocabulary import PRECISION_SETTINGS

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
BETWEEN = ("blocks", "microbatches")
_WORDS = {
    sx.Mesh: "mesh",
    sx.Shard: "shard",
    sx.Stages: "stages",
    sx.Recompute: "recompute",
    sx.Expect: "expect",
    sx.Scoped: "in",
}
_SAYS = {
    "precision": "rules of a precision are `setting = format` and `selector: format`",
    "layout": "rules of a layout are `selector: how`, or start with mesh, shard, stages, recompute, expect or in",
    "model": "rules of a model are `selector: what is built there`",
}
Axes = dict[str, Span] | None


def sheet_errors(file: File, d: sx.Declaration) -> Iterator[Diagnostic]:
    """What is wrong in the rules of a declaration; nothing for one without rules.

    Codes: wrong-rule, unknown-setting, unknown-name (axes, collectives), duplicate-name (axes), wrong-base.
    """
    if not isinstance(d, (sx.Sheet, sx.Variant)):
        return
    if d.keyword not in ("precision", "layout"):
        for rule in d.rules:
            if not isinstance(rule, sx.Apply):
                yield _misplaced(rule, "model")
        return
    axes: Axes = _axes(d.rules)
    if isinstance(d, sx.Variant):
        yield from _base_errors(file, d)
        axes = axes or _inherited(file, d)
    yield from _rules(d.keyword, d.rules, axes)


def _rules(keyword: str, rules: Iterable[sx.Rule], axes: Axes) -> Iterator[Diagnostic]:
    for rule in rules:
        if isinstance(rule, sx.Apply):
            continue
        if isinstance(rule, sx.Setting):
            yield from _setting(keyword, rule)
        elif keyword == "precision":
            yield _misplaced(rule, keyword)
        elif isinstance(rule, sx.Scoped):
            yield from _rules(keyword, rule.rules, _axes(rule.rules) or axes)
        elif isinstance(rule, sx.Mesh):
            yield from _mesh(rule)
        elif isinstance(rule, sx.Shard):
            for name in rule.axes:
                yield from _axis(name, _behind(rule.span, "over", name), axes)
            if rule.between not in (None, *BETWEEN):
                yield Diagnostic(
                    "unknown-name",
                    f"nothing is sharded between `{rule.between}`",
                    Label(_behind(rule.span, "between", rule.between), "not found"),
                    help="`between blocks` is the residual stream outside blocks; parameters may be whole from a "
                    "forward pass to its backward pass, and split `between microbatches`",
                )
        elif isinstance(rule, sx.Stages):
            yield from _axis(rule.axis, _behind(rule.span, "over", rule.axis), axes)
        elif isinstance(rule, sx.Expect) and rule.what not in COLLECTIVES:
            yield Diagnostic(
                "unknown-name",
                f"no collective is named `{rule.what}`",
                Label(_behind(rule.span, "expect", rule.what), "not found"),
                help=did_you_mean(rule.what, COLLECTIVES, "a collective")
                or f"collectives are {', '.join(COLLECTIVES)}",
            )


def _setting(keyword: str, rule: sx.Setting) -> Iterator[Diagnostic]:
    if keyword == "layout":
        yield _misplaced(rule, keyword)
    elif rule.name not in PRECISION_SETTINGS:
        span = Span(rule.span.source, rule.span.start, rule.span.start + len(rule.name))
        yield Diagnostic(
            "unknown-setting",
            f"a precision has no setting `{rule.name}`",
            Label(span, "not known"),
            help=did_you_mean(rule.name, PRECISION_SETTINGS, "a setting")
            or f"settings are {', '.join(PRECISION_SETTINGS)}",
        )


def _misplaced(rule: sx.Rule, keyword: str) -> Diagnostic:
    what = f"the setting `{rule.name}`" if isinstance(rule, sx.Setting) else f"`{_WORDS[type(rule)]}`"
    first = re.match(r"\w+", rule.span.text)
    span = Span(rule.span.source, rule.span.start, rule.span.start + (first.end() if first else 1))
    return Diagnostic("wrong-rule", f"{what} does not belong in a {keyword}", Label(span), help=_SAYS[keyword])


def _mesh(rule: sx.Mesh) -> Iterator[Diagnostic]:
    seen: dict[str, Span] = {}
    for axis in rule.axes:
        span = Span(axis.span.source, axis.span.start, axis.span.start + len(axis.name))
        if axis.name in seen:
            yield Diagnostic(
                "duplicate-name",
                f"two axes are named `{axis.name}`",
                Label(span, "the second"),
                (Label(seen[axis.name], "the first"),),
            )
        seen.setdefault(axis.name, span)


def _axis(name: str, span: Span, axes: Axes) -> Iterator[Diagnostic]:
    """An axis that the mesh must have; `axes` is None where the mesh is not known."""
    if axes is None or name in axes:
        return
    known = ", ".join(axes)
    mesh = (Label(next(iter(axes.values())).to(list(axes.values())[-1]), f"the mesh has {known}"),) if axes else ()
    yield Diagnostic(
        "unknown-name",
        f"no axis of the mesh is named `{name}`",
        Label(span, "not found"),
        mesh,
        did_you_mean(name, axes, "an axis") or (None if axes else "`mesh data = 4` makes an axis"),
    )


# --- what a sheet is made from -------------------------------------------------------------------


def _base_errors(file: File, d: sx.Variant) -> Iterator[Diagnostic]:
    if not isinstance(d.value, sx.Name):
        yield Diagnostic(
            "wrong-base",
            f"a {d.keyword} is made from the name of another {d.keyword}",
            Label(d.value.span, "this is no name"),
            help=f"`{d.keyword} {d.name} = other with:`",
        )
        return
    found = file.lookup(d.value.id)
    if found is None:
        return  # the names say so
    keyword = getattr(found.declaration, "keyword", "checkpoint map")
    if keyword != d.keyword:
        yield Diagnostic(
            "wrong-base",
            f"`{d.value.id}` is a {keyword}, not a {d.keyword}",
            Label(d.value.span, f"expected a {d.keyword}"),
            (Label(found.declaration.name_span, "declared here"),),
            help=_others(file, d),
        )
    elif (chain := _chain(file, d))[-1] == d.name:
        yield Diagnostic(
            "cyclic-definition",
            f"`{d.name}` is made from itself: {' -> '.join(chain)}",
            Label(d.value.span),
            help=_without_base(d),
        )


def _others(file: File, d: sx.Variant) -> str:
    """What a sheet could be made from instead."""
    own = [n for n, o in file.declared.items() if getattr(o, "keyword", "") == d.keyword and n != d.name]
    if own:
        return f"{d.keyword}s of this file: {listed(own[:3])}"
    return _without_base(d)


def _without_base(d: sx.Variant) -> str:
    return f"a {d.keyword} that is made from no other starts with `{d.keyword} {d.name}:`"


def _chain(file: File, d: sx.Variant) -> list[str]:
    """The names that a sheet is made from, up to one without a base or one that comes again."""
    chain = [d.name]
    at: sx.Declaration = d
    while isinstance(at, sx.Variant) and isinstance(at.value, sx.Name):
        found = file.lookup(at.value.id)
        if found is None or at.value.id in chain[1:]:
            break
        chain.append(at.value.id)
        if chain[-1] == d.name:
            break
        at, file = found.declaration, found.file
    return chain


def _inherited(file: File, d: sx.Variant) -> Axes:
    """The mesh of the sheet that one is made from; None where that is not known."""
    at: sx.Declaration = d
    for _ in range(100):
        if not (isinstance(at, sx.Variant) and isinstance(at.value, sx.Name)):
            break
        found = file.lookup(at.value.id)
        if found is None or getattr(found.declaration, "keyword", "") != d.keyword:
            return None
        assert isinstance(found.declaration, (sx.Sheet, sx.Variant))
        at, file = found.declaration, found.file
        if axes := _axes(at.rules):
            return axes
    return {} if isinstance(at, sx.Sheet) else None


def _axes(rules: Iterable[sx.Rule]) -> dict[str, Span]:
    """The axes of the last mesh among rules: a verb that is said again replaces what it said."""
    found: dict[str, Span] = {}
    for rule in rules:
        if isinstance(rule, sx.Mesh):
            found = {a.name: Span(a.span.source, a.span.start, a.span.start + len(a.name)) for a in rule.axes}
    return found


def _behind(span: Span, word: str, name: str) -> Span:
    """Where a name stands behind a word of a rule."""
    match = re.search(rf"\b{word}\b.*?\b({re.escape(name)})\b", span.text, re.DOTALL)
    return Span(span.source, span.start + match.start(1), span.start + match.end(1)) if match else span
