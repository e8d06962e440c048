"""From a config to the arguments of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import syntax as sx
from ..diagnostics import Collector, Label, fail, listed
from ..source import Span
from .config import field_of, fields_in, get, is_plain, is_spelled, lines, same, shown, spelled, target
from .static import MISSING, MissingField, evaluate


def read_config(
    checkpoint: sx.Checkpoint, config: Mapping[str, Any], parameters: Sequence[sx.Parameter]
) -> dict[str, Any]:
    """The arguments that a config gives to a model with these parameters; those that keep their default are left out.

    Raises `SpecError` `config-mismatch` with everything that does not hold.
    """
    return _Reader(checkpoint, config, parameters).read()


class _Reader(Mapping[str, Any]):
    """The environment of the lines: a parameter's value is found when a line asks for it, so their order is free."""

    def __init__(self, checkpoint: sx.Checkpoint, config: Mapping[str, Any], parameters: Sequence[sx.Parameter]):
        self.checkpoint, self.config = checkpoint, config
        self.parameters = {p.name: p for p in parameters}
        self.lines: dict[str, list[tuple[sx.Selector, sx.Equation]]] = {p.name: [] for p in parameters}
        self.compared: list[tuple[sx.Selector, sx.Equation]] = []
        self.found: dict[str, Any] = {}
        self.silent: set[str] = set()
        self.open: set[str] = set()
        self.collector = Collector()
        for selector, line in lines(checkpoint):
            name = target(selector, self.parameters)
            (self.compared if name is None else self.lines.setdefault(name, [])).append((selector, line))

    def read(self) -> dict[str, Any]:
        for name in self.parameters:
            self._find(name)
        for selector, line in self.compared:
            with self.collector.collecting():
                self._compare(selector, line)
        self.collector.finish()
        return {name: self.found[name] for name in self.parameters if name in self.found}

    # --- what an expression sees -----------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        if name == "config":
            return self.config
        self._find(name)
        if name in self.found:
            return self.found[name]
        default = self.parameters[name].default
        if default is None or name in self.open:
            raise MissingField
        self.open.add(name)
        try:
            return evaluate(default, self)
        finally:
            self.open.discard(name)

    def __contains__(self, name: object) -> bool:
        return name == "config" or name in self.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(("config", *self.parameters))

    def __len__(self) -> int:
        return 1 + len(self.parameters)

    # --- parameters ------------------------------------------------------------------------------

    def _find(self, name: str) -> None:
        if name in self.found or name in self.silent or name in self.open:
            return
        self.open.add(name)
        try:
            with self.collector.collecting():
                self._say(name)
        finally:
            self.open.discard(name)
            if name not in self.found:
                self.silent.add(name)

    def _say(self, name: str) -> None:
        holds: sx.Equation | None = None
        for selector, line in self.lines[name]:
            value = self._spoken(selector, line)
            if value is MISSING:
                continue
            if not is_plain(value):
                where = field_of(line.theirs) or "the config"
                raise fail(
                    "config-mismatch",
                    f"`{where}` is {shown(value)}, which `{name}` cannot be",
                    line.span,
                    "expected a number, a line of text without quotes, or a list of such",
                )
            if holds is None:
                self.found[name], holds = value, line
            elif not same(value, self.found[name]):
                raise fail(
                    "config-mismatch",
                    f"`{_source(holds)}` gives `{name}` = {shown(self.found[name])}, "
                    f"`{_source(line)}` gives {shown(value)}",
                    line.span,
                    "must agree",
                    [Label(holds.span, "holds, since it comes first")],
                )
        if holds is None:
            self._stay_silent(name)

    def _spoken(self, selector: sx.Selector, line: sx.Equation) -> Any:
        """What a line says, or `MISSING`."""
        try:
            if line.condition is not None and not evaluate(line.condition, self):
                return MISSING
            value = evaluate(line.theirs, self)
        except MissingField:
            return MISSING
        if value is MISSING or value is None:
            return MISSING
        return _letters(selector.value, value) if is_spelled(selector.value) else value

    def _stay_silent(self, name: str) -> None:
        """No line speaks: right if the config says nothing and there is a default."""
        mine = self.lines[name]
        named = fields_in(*(e for _, line in mine for e in (line.condition, line.theirs)))
        there = [f for f in named if get(self.config, f) is not MISSING]
        about = [line for _, line in mine if set(there) & set(fields_in(line.condition, line.theirs))] or [
            line for _, line in mine
        ]
        span = about[0].span if about else self.checkpoint.name_span
        if there:
            absent = [f for f in named if f not in there]
            help = self._known(name) or (f"not in the config: {listed(absent)}" if absent else None)
            raise fail(
                "config-mismatch",
                f"{self._unknown(name, there)}: no line of this map gives `{name}` for that",
                span,
                help=help,
            )
        if self.parameters[name].default is None:
            what = f"the config has no {listed(named)}" if named else "no line of the map gives it"
            help = f"add `{named[0]}` to the config" if named else f"a line such as `{name} = config.{name}` gives it"
            raise fail("config-mismatch", f"`{name}` has no value: {what}", span, help=help)

    def _unknown(self, name: str, there: list[str]) -> str:
        """The fields that decide and that no line knows; of a list its first such word."""
        for selector, line in self.lines[name]:
            field = field_of(line.theirs)
            words = get(self.config, field) if field else MISSING
            if is_spelled(selector.value) and isinstance(words, list):
                known = [w for ws in spelled(selector.value)[1].values() for w in ws]
                strange = [w for w in words if w not in known]
                if strange:
                    return f"`{field}` has {shown(strange[0])}"
        deciding = fields_in(*(line.condition for _, line in self.lines[name]))
        chosen = [f for f in there if f in deciding] or there
        return " and ".join(f"`{f}` is {shown(get(self.config, f))}" for f in chosen)

    def _known(self, name: str) -> str | None:
        """The constants that the conditions and words of a parameter know."""
        known: dict[str, None] = {}
        for selector, line in self.lines[name]:
            if is_spelled(selector.value):
                known.update(dict.fromkeys(shown(w) for ws in spelled(selector.value)[1].values() for w in ws))
            condition = line.condition
            if isinstance(condition, sx.Binary):
                known.update(
                    dict.fromkeys(
                        shown(e.value)
                        for e in (condition.left, condition.right)
                        if isinstance(e, (sx.String, sx.Number))
                    )
                )
        return f"the map knows {', '.join(known)}" if known else None

    # --- comparisons -----------------------------------------------------------------------------

    def _compare(self, selector: sx.Selector, line: sx.Equation) -> None:
        try:
            if line.condition is not None and not evaluate(line.condition, self):
                return
            theirs = evaluate(line.theirs, self)
            if theirs is MISSING or theirs is None:
                return
            ours = evaluate(selector.value, self)
        except MissingField:
            return
        if not same(ours, theirs):
            raise fail(
                "config-mismatch",
                f"`{_source(line)}` is {shown(theirs)}, this map holds for {shown(ours)}",
                _whole(selector, line),
                "must be equal",
                help=f"a model with {shown(theirs)} needs another spec, or another map",
            )


def _whole(selector: sx.Selector, line: sx.Equation) -> Span:
    return selector.span.to(line.span) if selector.span.source is line.span.source else line.span


def _source(line: sx.Equation) -> str:
    return field_of(line.theirs) or ", ".join(fields_in(line.theirs, line.condition)) or line.theirs.span.text


def _letters(expr: sx.Expr, words: Any) -> Any:
    """The letters that a list of words spells, or `MISSING` where one is unknown."""
    _, table = spelled(expr)
    back = {word: letter for letter, spellings in table.items() for word in spellings}
    if not isinstance(words, list) or not all(isinstance(w, str) and w in back for w in words):
        return MISSING
    return "".join(back[w] for w in words)
