"""From `grammar.lark` to the tables that the parser runs on: `python -m heddle.dsl.tables` writes `grammar_tables.py`.

lark proves that the grammar is LALR(1) without conflicts and computes the tables; building them takes a fifth of a
second, so they are committed, and a test says whether they are in step with the grammar.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_PATTERNS = ("NAME", "NUMBER", "LONG_STRING", "STRING")
HEAD = '''"""Made from `grammar.lark` by `python -m heddle.dsl.tables`: change that, not this."""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations
'''


def grammar_tables(grammar: str) -> dict[str, Any]:
    """The tables of a grammar as plain data. Raises lark's `GrammarError` for a conflict.

    KEYWORDS and SIGNS map spellings to terminals, PATTERNS terminals to regular expressions. RULES are (what is made,
    number of symbols, method, children): method `""` collects children for the rule around it, and a leading `?` lets
    an only child stand for the whole; children are places of symbols, None for what is absent, and negative (-1 is
    place 0) where a collection is spliced in.
    ROWS are the states: `TERMINAL action ...`, an action n > 0 goes to state n - 1, n < 0 applies rule -n - 1.
    """
    from lark import Lark

    lark = Lark(grammar, parser="lalr", maybe_placeholders=True)
    keywords: dict[str, str] = {}
    signs: dict[str, str] = {}
    patterns: dict[str, str] = {}
    for terminal in lark.terminals:
        words = re.fullmatch(r"(?:\(\?:)?([a-z|]+)\)?", terminal.pattern.value)
        if words:
            keywords.update(dict.fromkeys(words[1].split("|"), terminal.name))
        elif terminal.name in _PATTERNS:
            patterns[terminal.name] = terminal.pattern.value
        else:
            signs[terminal.pattern.value] = terminal.name
    table = lark.parser.parser._parse_table
    rules = {rule: i for i, rule in enumerate(sorted(lark.rules, key=lambda rule: (str(rule.origin.name), str(rule))))}
    order = _walk(table)
    rows = []
    for state in order:
        row = []
        for symbol, (action, argument) in sorted(table.states[state].items()):
            row.append(f"{symbol} {order[argument] + 1 if str(action) == 'Shift' else -1 - rules[argument]}")
        rows.append(" ".join(row))
    return {
        "KEYWORDS": dict(sorted(keywords.items())),
        "SIGNS": dict(sorted(signs.items())),
        "PATTERNS": {name: patterns[name] for name in _PATTERNS},
        "RULES": tuple(map(_rule, rules)),
        "END": order[table.end_states["start"]],
        "ROWS": tuple(rows),
    }


def _walk(table: Any) -> dict[int, int]:
    """A number for each state that depends on the grammar only, not on the order of sets; the start is 0."""
    order = {table.start_states["start"]: 0}
    waiting = list(order)
    for state in waiting:
        for _, (action, argument) in sorted(table.states[state].items()):
            if str(action) == "Shift" and argument not in order:
                order[argument] = len(order)
                waiting.append(argument)
    return order


def _rule(rule: Any) -> tuple[str, int, str, tuple[int | None, ...]]:
    children: list[int | None] = []
    absent = iter(rule.options.empty_indices or (False,) * len(rule.expansion))
    for place, symbol in enumerate(rule.expansion):
        while next(absent):
            children.append(None)
        if symbol.is_term:
            if not symbol.filter_out:
                children.append(place)
        else:
            children.append(-1 - place if symbol.name.startswith("_") else place)
    children += [None for is_absent in absent if is_absent]
    name = str(rule.origin.name)
    callback = "" if name.startswith("_") else str(rule.alias or name)
    passes = "?" if rule.options.expand1 and not rule.alias else ""
    return name, len(rule.expansion), f"{passes}{callback}", tuple(children)


def source_text(tables: dict[str, Any]) -> str:
    """The tables as a Python module."""
    parts = [HEAD]
    for name, value in tables.items():
        parts.append(f"{name} = {value!r}\n" if not isinstance(value, (tuple, dict)) else _collection(name, value))
    return "\n".join(parts)


def _collection(name: str, value: tuple[Any, ...] | dict[str, str]) -> str:
    items = [f"{k!r}: {v!r}" for k, v in value.items()] if isinstance(value, dict) else [repr(v) for v in value]
    opened, closed = "{}" if isinstance(value, dict) else "()"
    lines = "".join(f"    {item},\n" for item in items)
    kind = "dict[str, str]" if isinstance(value, dict) else "tuple[tuple[str, int, str, tuple[int | None, ...]], ...]"
    return f"{name}: {kind if name != 'ROWS' else 'tuple[str, ...]'} = {opened}\n{lines}{closed}\n"


if __name__ == "__main__":
    text = source_text(grammar_tables((HERE / "grammar.lark").read_text(encoding="utf-8")))
    (HERE / "grammar_tables.py").write_text(text, encoding="utf-8")
