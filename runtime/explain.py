"""Pages of error codes, and graphs behind a pass."""

from __future__ import annotations

from ..dsl.diagnostics import did_you_mean
from ..dsl.layout import Layout
from ..dsl.program import Program
from .errors import UserError


def explain_code(code: str) -> str:
    """The page of an error code. Raises UserError `unknown-code`."""
    from ..dsl.pages import codes, explain

    page = explain(code)
    if page is None:
        raise UserError("unknown-code", f"no error has the code `{code}`", help=did_you_mean(code, codes(), "a code"))
    return page


def explain_graphs(program: Program, after: str | None, layout: Layout | None = None) -> str:
    """The graphs of a model in the notation of specs, behind a pass (the last if not named). Raises `unknown-pass`."""
    from ..lowering.notation import print_graphs
    from ..lowering.pipeline import PASSES, lower

    names = ["build", *(p.name for p in PASSES)]
    if after is not None and after not in names:
        raise UserError(
            "unknown-pass",
            f"no pass is named `{after}`",
            help=did_you_mean(after, names, "a pass") or f"passes, in order: {', '.join(names)}",
        )
    return print_graphs(lower(program, after, layout))
