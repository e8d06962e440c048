"""State space duality: a scan with a decay that the data choose (Mamba-2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....dsl.diagnostics import fail
from ....dsl.program import Init
from ...op import Monoid, Op, OpCall, Setting, Typing, WeightRule, shown
from .lift import lift


def _bind(call: OpCall) -> dict[str, tuple[Any, ...]]:
    u, b = call.tensors["u"].dims, call.tensors["b"].dims
    if len(u) < 3 or len(b) < 3:
        short = "u" if len(u) < 3 else "b"
        raise fail(
            "too-few-dims",
            f"`{short}` of `ssd` needs a sequence dim and two more",
            call.span_of(short),
            f"this is {shown(call.tensors[short])}",
        )
    heads, groups = u[-2], b[-2]
    call.known(u[-1], "u"), call.known(b[-1], "b")
    if call.known(heads, "u") % call.known(groups, "b"):
        raise fail(
            "not-exact",
            f"`{heads.name}` = {heads.size} does not divide into `{groups.name}` = {groups.size}",
            call.span,
            f"{heads.size} divided by {groups.size} leaves {heads.size % groups.size}",
        )
    return {"S": (u[-3],), "H": (heads,), "P": (u[-1],), "G": (groups,), "N": (b[-1],)}


def _flops(sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
    """Facts sheet of Mamba-2: scores 2 Q N G, weighted sum 2 Q H P, states 4 H P N, for each row."""
    chunk, inner = attrs["chunk"], sizes["H"] * sizes["P"]
    return 2.0 * chunk * sizes["N"] * sizes["G"] + 2.0 * chunk * inner + 4.0 * inner * sizes["N"]


def _bound(call: OpCall, u: str, b: str) -> dict[str, tuple[Any, ...]]:
    first, second = call.tensors[u].dims, call.tensors[b].dims
    return {"S": (first[-3],), "H": (first[-2],), "P": (first[-1],), "G": (second[-2],), "N": (second[-1],)}


def _leave(call: OpCall) -> Typing:
    bound = _bound(call, "u", "b")
    lead = tuple(call.tensors["u"].dims[:-3])
    heads = (*lead, *bound["H"])
    return Typing(bound, tuple(call.tensors.values()), (("real", heads), ("real", (*heads, *bound["P"], *bound["N"]))))


def _before(call: OpCall) -> Typing:
    state = call.tensors["state"]
    bound = {f: (d,) for f, d in zip("HPN", state.dims[-3:], strict=True)}
    return Typing(bound, tuple(call.tensors.values()), (("real", tuple(state.dims)),))


def _inside(call: OpCall) -> Typing:
    return Typing(_bound(call, "u", "b"), tuple(call.tensors.values()), (("real", tuple(call.tensors["u"].dims)),))


def _behind(call: OpCall) -> Typing:
    return Typing(_bound(call, "y", "c"), tuple(call.tensors.values()), (("real", tuple(call.tensors["y"].dims)),))


OPS = (
    Op(
        name="ssd",
        text="u[*, S>, H, P], dt[*, S>, H], b[*, S>, G, N], c[*, S>, G, N+], A_log[H], D[H], dt_bias[H] "
        "-> y[*, S, H, P]",
        meaning="state = exp(d A) state + d u b', y = state c + D u, with d = softplus(dt + dt_bias), A = -exp(A_log)",
        settings=(Setting("chunk", "whole", 128, "rows that are computed as one product; does not change the result"),),
        weights=(
            WeightRule("A_log", Init("log_uniform", (1.0, 16.0)), keep=True),
            WeightRule("D", Init("ones"), keep=True),
            WeightRule("dt_bias", Init("softplus_inverse_log_uniform", (0.001, 0.1, 1e-4)), keep=True),
        ),
        bind=_bind,
        linear=(("u",), ("b", "D"), ("c", "D")),
        coordinates=True,
        grouped=(("H", "G"),),
        scored="u",
        lift=lift,
        monoid=Monoid("S", ("decay", "state"), peers="earlier", receiver_free=True),
        flops=_flops,
        source="Dao and Gu 2024, Transformers are SSMs, section 6; initial values of Megatron-LM's mixer",
    ),
    Op(
        name="ssd_leave",
        part_of="ssd",
        text="u[*, S+, H, P], dt[*, S+, H], b[*, S+, G, N], A_log[H], dt_bias[H] -> decay[*, H], state[*, H, P, N]",
        meaning="by what rows let an earlier state decay, and the state that they leave; made by the compiler",
        infer_with=_leave,
        coordinates=True,
        grouped=(("H", "G"),),
        rigid=("N",),
        hands_over=True,
        flops=lambda sizes, attrs: 2.0 * sizes["H"] * sizes["P"] * sizes["N"],
        source="ours: the state of the scan's monoid",
    ),
    Op(
        name="ssd_before",
        part_of="ssd",
        text="decay[*, H], state[*, H, P, N] -> enter[*, H, P, N]",
        meaning="the state that the ranks before this one leave together; made by the compiler",
        settings=(Setting("axes", "text", ()),),
        infer_with=_before,
        linear=(("state",),),
        meets="all_gather",
        flops=lambda sizes, attrs: 0.0,
        source="ours: the exclusive combine of the scan's monoid over ranks",
    ),
    Op(
        name="ssd_inside",
        part_of="ssd",
        text="u[*, S, H, P], dt[*, S, H], b[*, S, G, N], c[*, S, G, N], A_log[H], D[H], dt_bias[H] -> y[*, S, H, P]",
        meaning="the scan of rows as if none stood before them; made by the compiler",
        settings=(Setting("chunk", "whole", 128),),
        infer_with=_inside,
        linear=(("u",), ("b", "D"), ("c", "D")),
        coordinates=True,
        grouped=(("H", "G"),),
        rigid=("N",),
        flops=_flops,
        source="ours: ssd on one rank's rows",
    ),
    Op(
        name="ssd_behind",
        part_of="ssd",
        text="y[*, S, H, P], dt[*, S, H], c[*, S, G, N], A_log[H], dt_bias[H], enter[*, H, P, N] -> z[*, S, H, P]",
        meaning="what rows give behind a state that enters: y + decay * (enter c); made by the compiler",
        infer_with=_behind,
        coordinates=True,
        grouped=(("H", "G"),),
        rigid=("N",),
        handed=("enter",),
        flops=lambda sizes, attrs: 2.0 * sizes["H"] * sizes["P"] * sizes["N"],
        source="ours: the finish of the scan's monoid",
    ),
)
