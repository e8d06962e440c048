"""Names that are bound once: in pipelines and recipes each is a file on disk, a cache key and a place to resume."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from . import syntax as sx
from .diagnostics import Diagnostic, Label
from .source import Span

Bound = dict[str, tuple[str, Span]]


def bound_twice(d: sx.Declaration) -> Iterator[Diagnostic]:
    """Names that a pipeline or recipe binds a second time. Code: bound-twice."""
    if isinstance(d, sx.Function) and d.keyword in ("pipeline", "recipe"):
        bound: Bound = {p.name: ("a parameter", _first(p.span, p.name)) for p in d.parameters}
        yield from _body(d.body, bound, d.keyword)


def _body(body: Iterable[sx.Statement], bound: Bound, keyword: str) -> Iterator[Diagnostic]:
    for statement in body:
        match statement:
            case sx.Input(name=name, span=span):
                bound.setdefault(name, ("an input", _first(span, name)))
            case sx.Assign(names=names, span=span):
                for name in names:
                    yield from _bind(name, _first(span, name), bound, keyword)
            case sx.If(branches=branches, otherwise=otherwise):
                after = dict(bound)
                for inner in (*(b for _, b in branches), otherwise):
                    branch = dict(bound)
                    yield from _body(inner, branch, keyword)
                    after.update(branch)
                bound.update(after)
            case sx.For(names=names, body=inner, span=span):
                yield from _body(inner, {**bound, **{n: ("a loop variable", _first(span, n)) for n in names}}, keyword)


def _bind(name: str, span: Span, bound: Bound, keyword: str) -> Iterator[Diagnostic]:
    if name in bound:
        what, first = bound[name]
        yield Diagnostic(
            "bound-twice",
            f"`{name}` is bound twice: in a {keyword} a name is bound once",
            Label(span, "again here"),
            (Label(first, f"first here, as {what}"),),
            "choose another name",
        )
    bound.setdefault(name, ("a variable", span))


def _first(span: Span, name: str) -> Span:
    """The place of a name in a construct: its first occurrence as a word."""
    match = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", span.text)
    start = span.start + (match.start() if match else 0)
    return Span(span.source, start, start + len(name))
