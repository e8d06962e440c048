"""`with:` on a model or block: rules that build something else around what stood there.

A rule selects calls by path. Its right side is built around `it`, the function that would have been called, and is
called in its place, under the same name. What a rule made is no longer selected by its sheet; what it wrapped is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .. import syntax as sx
from ..arithmetic import kind
from ..diagnostics import Diagnostic, Label, did_you_mean, fail
from ..load import File, Found
from ..program import WRAPPED
from ..selectors import START, Selector, States, read
from ..source import Span
from .bodies import required_inputs
from .environment import Environment, Scope
from .machine import Machine
from .values import Tensor, Waiting


@dataclass(eq=False)
class Rewrite:
    """A rule of a sheet; `used` says of each selector whether it selected anything so far."""

    selectors: tuple[Selector, ...]
    value: sx.Expr
    span: Span
    used: list[bool]


@dataclass(eq=False)
class Rewrites:
    """The rules of one variant, in order: a later one wins."""

    name: str
    file: File
    rules: tuple[Rewrite, ...]

    def start(self) -> tuple[tuple[States, ...], ...]:
        """The states of every selector at the root of the variant."""
        return tuple((START,) * len(rule.selectors) for rule in self.rules)


def advance(scope: Scope, names: Iterable[str | None], index: tuple[int, int] | None = None) -> Scope:
    """The rules in force one segment further down."""
    names = tuple(names)
    return tuple(
        (sheet, tuple(
            tuple(s.advance(state, names, index) for s, state in zip(rule.selectors, states, strict=True))
            for rule, states in zip(sheet.rules, all_states, strict=True)
        ))
        for sheet, all_states in scope
    )  # fmt: skip


def scope_of(callee: Waiting) -> Scope:
    """The rules in force in the body of a function."""
    own = tuple((sheet, sheet.start()) for sheet in callee.sheets)
    return own if callee.place is None else own + callee.place


def scope_key(scope: Scope) -> Any:
    """A hashable summary: bodies under equal states are equal."""
    return tuple((id(sheet), states) for sheet, states in scope)


class Rewriting(Machine):
    """Application of rules to calls; a part of `Elaborator`."""

    def sheet_of(self, found: Found, env: Environment) -> Rewrites:
        """The rules of a variant, selectors read; the same ones each time."""
        variant = found.declaration
        assert isinstance(variant, sx.Variant)
        if id(variant) not in self.sheets:
            rules = []
            for rule in (r for r in variant.rules if isinstance(r, sx.Apply)):  # `names` refuses any other
                selectors = tuple(read(s, lambda e: self.whole_numbers(e, env)) for s in rule.selectors)
                rules.append(Rewrite(selectors, rule.value, rule.span, [False] * len(selectors)))
            self.sheets[id(variant)] = Rewrites(variant.name, found.file, tuple(rules))
        return self.sheets[id(variant)]

    def rewritten(self, callee: Waiting, env: Environment, hint: str | None) -> tuple[Waiting, str | None]:
        """What is called in the place of `callee`, and by which name; its `place` is decided."""
        self.segments.update({callee.name} if hint is None else {callee.name, hint})
        if callee.place is not None:
            return callee, WRAPPED if callee.is_it else hint
        around_it, name = (env.scope, hint) if callee.shared is None else (callee.shared.scope, callee.shared.name)
        outer = advance(around_it, (name, callee.name))  # a shared block stands where it is declared
        current = replace(callee, place=scope_of(callee) + outer, sheets=())
        for i, (sheet, states) in enumerate(outer):
            rule = self._last_match(sheet, states)
            if rule is None:
                continue
            around = Environment(sheet.file, env.builder, scope=())
            settings = {name: where for name, where in current.spans.items() if name in current.settings}
            around.bind(WRAPPED, replace(current, spans=settings, shared=None, is_it=True), rule.span)
            made = self.value(rule.value, around)
            if not isinstance(made, Waiting):
                raise fail(
                    "wrong-type",
                    f"a rule builds a function around `it`, this is {kind(made)}",
                    rule.value.span,
                    help="`lora(it, rank = 8)` wraps it, `it(mask = full)` changes an argument",
                )
            if made.place is None:  # something new: the rules of this sheet do not select its parts
                made = replace(made, place=scope_of(made) + outer[i + 1 :], sheets=())
            current = replace(made, shared=callee.shared, is_it=False)
            hint = hint or callee.name
        return current, hint

    def _last_match(self, sheet: Rewrites, states: tuple[tuple[States, ...], ...]) -> Rewrite | None:
        found = None
        for rule, each in zip(sheet.rules, states, strict=True):
            for i, (selector, state) in enumerate(zip(rule.selectors, each, strict=True)):
                if selector.accepts(state):
                    rule.used[i] = True
                    found = rule
        return found

    def unused_rules(self) -> Iterable[Diagnostic]:
        """A diagnostic for every selector that selected nothing: `selects-nothing`."""
        for sheet in self.sheets.values():
            for rule in sheet.rules:
                for selector, used in zip(rule.selectors, rule.used, strict=True):
                    if not used and not self.may_be_absent(selector):
                        yield self.selects_nothing(selector, rule.span, f"`{sheet.name}`")

    def may_be_absent(self, selector: Selector) -> bool:
        """A model may lack an op or a standard block that is selected, or selected in; all else must be there."""
        known = self.standard | set(self.ops)
        return selector.optional or any(s.name in known and s.name not in self.segments for s in selector.steps)

    def selects_nothing(self, selector: Selector, span: Span, where: str) -> Diagnostic:
        last, first = selector.steps[-1].name, selector.steps[0].name
        help = did_you_mean(last, self.segments, "a part") or f"`{selector}?` may select nothing"
        if last in self.segments and last != first:
            help = f"`{last}` exists, but not there; `{last} in {first}` selects it at any depth"
        return Diagnostic(
            "selects-nothing",
            f"`{selector}` selects nothing in {where}",
            Label(span, "this rule does nothing"),
            help=help,
        )

    def invoke(self, callee: Waiting, tensors: dict[str, Any], env: Environment, span: Span, hint: str | None) -> Any:
        """Call a function with inputs that may be named as those of the function that it took the place of."""
        given = list(tensors.values())
        if callee.op is None and callee.found is None:
            return given[0]
        names = self.input_names(callee)
        if not set(tensors) <= set(names):
            if any(not isinstance(t, Tensor) for t in given):
                raise fail("not-built-yet", f"`{callee.name}` around the sources of attention is not built yet", span)
            if len(given) > len(names):
                raise fail(
                    "wrong-arity",
                    f"`{callee.name}` takes {len(names)} inputs, and stands for a call with {len(given)}",
                    span,
                )
            tensors = dict(zip(names, given, strict=False))
        missing = [] if callee.op is not None else [n for n in required_inputs(callee.block) if n not in tensors]
        if missing:
            raise fail(
                "missing-argument",
                f"`{callee.name}` needs the input `{missing[0]}` too",
                span,
                f"`{callee.name}` stands here by a rule",
                [Label(callee.block.name_span, "declared here")],
            )
        return self.apply(callee, tensors, env, span, hint)
