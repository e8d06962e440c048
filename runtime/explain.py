"""Pages of error codes, and graphs behind a pass."""

from __future__ import annotations

from ..codegen.lock import Lock
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


def explain_graphs(
    program: Program, after: str | None, layout: Layout | None = None, target: str = "cpu", lock: Lock | None = None
) -> str:
    """The graphs of a model in the notation of specs, behind a pass (the last if not named), and below them what is
    one kernel, which products are by a lock, and what is none. Behind the last, warns of uses of ops that have none as
    `compile` does. Raises `unknown-pass`, `unknown-target`."""
    from ..lowering.chains.told import told
    from ..lowering.notation import print_graphs
    from ..lowering.pipeline import PASSES, lower
    from .compile import emitted, target_of, tell
    from .epilogues import told as of_products

    names = ["build", *(p.name for p in PASSES)]
    if after is not None and after not in names:
        raise UserError(
            "unknown-pass",
            f"no pass is named `{after}`",
            help=did_you_mean(after, names, "a pass") or f"passes, in order: {', '.join(names)}",
        )
    graphs = lower(program, after, layout, target_of(target))
    if graphs.target.kernels and after in (None, names[-1]):
        tell(emitted(graphs))
    lines = [f"#   {line}" for g in graphs.callees_first() if (found := told(graphs, g) + of_products(graphs, g, lock))
             for line in (f"of `{g.name}`:", *(f"  {line}" for line in found))]  # fmt: skip
    return print_graphs(graphs) + ("\n# Kernels\n" + "\n".join(lines) + "\n" if lines else "")
