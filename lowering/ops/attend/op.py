"""Attention of queries to any number of sources of keys and values under one softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....dsl import syntax as sx
from ....dsl.diagnostics import fail
from ...clocks import spread
from ...op import Monoid, Op, OpCall, Setting, Typing, _match, alone_along, check_rate, join_leading, mismatch
from .lift import lift


def _infer(call: OpCall) -> Typing:
    """q[*, Q, H, D], each source k[*, S, KV, D], v[*, S, KV, E]; H is a multiple of KV. A source may have a query of
    its own, like q, and either scores bias[*, Q, H, N] of which its distance picks one, or slope[H], which it is times.
    """
    q = call.tensors["q"]
    signature = call.op.signature
    call.op._check_kinds(call)
    check_rate(call)
    bindings: dict[str, tuple[Any, ...]] = {}
    leading = _match(call, signature.operand("q"), q, bindings)
    sequences: list[tuple[Any, Any]] = []
    sources = list(zip(call.tensors["k"], call.tensors["v"], strict=True))
    for i, (k, v) in enumerate(sources):
        mine = {"D": bindings["D"]}
        for name, tensor in (("k", k), ("v", v)):
            join_leading(leading, _match(call, signature.operand(name), tensor, mine), call)
        for formal in ("K", "E"):
            if bindings.setdefault(formal, mine[formal]) != mine[formal]:
                raise mismatch(call, "k", mine[formal], bindings[formal])
        bindings["S" if i == 0 else f"S{i + 1}"] = mine["S"]
        sequences.append((bindings["Q"][0], mine["S"][0]))
    # Rows without places of their own, as learned queries, see all and are seen by all.
    everywhere = [mask == sx.Constant(True) for mask in call.settings["masks"]]
    whole = {id(query): all(everywhere) for query, _ in sequences}
    for (_, key), seen in zip(sequences, everywhere, strict=True):
        whole[id(key)] = whole.get(id(key), True) and seen
    for dim, name in ((bindings["Q"][0], "q"), *((s[0], "k") for f, s in bindings.items() if f[0] == "S")):
        if not dim.sequence and not whole[id(dim)]:
            raise fail(
                "no-sequence",
                f"`attend` runs along sequences, and `{dim.name}` is none",
                call.span_of(name),
                help="the last dim of an input of kind `token` is one, and what is computed from it row by row; "
                "other dims attend and are attended to under the mask `full`",
            )
        alone_along(call, leading, dim)
    (heads,), (kv_heads,) = bindings["H"], bindings["K"]
    call.known(bindings["D"][0], "q")
    if call.known(heads, "q") % call.known(kv_heads, "k"):
        raise fail(
            "indivisible-heads",
            f"`{heads.name}` = {heads.size} query heads cannot share "
            f"`{kv_heads.name}` = {kv_heads.size} key heads evenly",
            call.span,
            f"{heads.size} divided by {kv_heads.size} leaves {heads.size % kv_heads.size}",
        )
    columns = [call.tensors["k"], call.tensors["v"]]
    for name in call.settings["options"]:
        columns.append(call.tensors[name])
        for i, tensor in enumerate(call.tensors[name]):
            if tensor is not None:
                mine = {f: bindings[f] for f in ("Q", "H", "D")}
                before = _match(call, signature.operand(name), tensor, mine)
                if signature.operand(name).leading:
                    join_leading(leading, before, call)
                if name == "bias":
                    call.known(mine["N"][0], name)
                    bindings["N" if i == 0 else f"N{i + 1}"] = mine["N"]
    result = leading + bindings["Q"] + bindings["H"] + bindings["E"]
    return Typing(
        bindings,
        (q, *(t for source in zip(*columns, strict=True) for t in source)),
        (("real", result),),
        tuple(sequences),
    )


def _verify(node: Any, graph: Any) -> None:
    """Distances of score biases stay among the places that these have. Raises `out-of-range`, `not-built-yet`."""
    bindings = dict(node.bindings)
    for i, (distance, mask) in enumerate(zip(node.attr("distances", ()), node.attr("masks"), strict=False)):
        bound = bindings.get("N" if i == 0 else f"N{i + 1}")
        if not bound:  # no bias, or a slope, which any distance may be times
            continue
        query, key = (graph.dims[node.bound(f)[0]].clock for f in ("Q", "S" if i == 0 else f"S{i + 1}"))
        places = graph.size(bound[0])
        found = None if query is None or key is None else spread(distance, mask, query, key)
        if found is None:
            raise fail(
                "not-built-yet",
                "a bias by distance under a mask that does not bound it is not built yet",
                node.spans[0],
                f"the mask of source {i + 1} must bound the distance",
            )
        if found[0] < 0 or found[1] >= places:
            raise fail(
                "out-of-range",
                f"the bias of source {i + 1} has {places} places, its distance runs from {found[0]} to {found[1]}",
                node.spans[0],
                f"`{bound[0]}` = {places}",
            )


def _flops(sizes: Mapping[str, int], attrs: Mapping[str, Any]) -> float:
    """Scores and weighted values, for each query and each key that it sees."""
    return 2.0 * sizes["H"] * (sizes["D"] + sizes["E"])


_TEXT = (
    "q[*, Q, H, D+], k...[*, S@, K, D+], v...[*, S@, K, E], query...?[*, Q, H, D+], bias...?[*, Q, H, N], "
    "slope...?[H] -> o[*, Q, H, E]"
)
_SETTINGS = (
    Setting("masks", "mask", meaning="one a source: comparisons of coordinates of `query` and `key`"),
    Setting("scale", "number", None, "factor of the scores; head_dim ^ -0.5 if not given"),
    Setting("options", "names", (), "what sources have beside keys and values: query, bias, slope"),
    Setting("distances", "mask", (), "one a source: which place of its bias a score gets, or what is times its slope"),
    Setting("dropout", "number", 0.0, "while training, the probability that a weight of the softmax is zero"),
)
OPS = (
    Op(
        name="attend",
        text=_TEXT,
        meaning="softmax over every key that the masks allow of scale * (q . k), times v; 0 where none is allowed; "
        "while training a weight w is w / (1 - dropout) with probability 1 - dropout and else 0",
        settings=_SETTINGS,
        linear=(("v",),),
        random="dropout",
        grouped=(("H", "K"),),
        coordinates=True,
        monoid=Monoid("S", ("max", "sum", "weighted_values"), peers="masked", receiver_free=False),
        flops=_flops,
        infer_with=_infer,
        lift=lift,
        verify=_verify,
        source="Vaswani et al. 2017, eq. 1; groups: Ainslie et al. 2023; one softmax over sources: Zhu et al. 2021; "
        "slopes: Press et al. 2022, ALiBi; "
        "dropout: Vaswani et al. 2017, as released; Radford et al. 2019",
    ),
    Op(
        name="attend_ring",
        text=_TEXT,
        meaning="attend, where each rank has some of the keys and is told those of the others; made by the compiler",
        settings=(
            *_SETTINGS,
            Setting("axes", "text", ()),
            Setting("order", "text", None, "in which order ranks have positions while they attend; None: their own"),
            Setting("why", "text", "", "the reason, where there was a choice"),
        ),
        linear=(("v",),),
        random="dropout",
        grouped=(("H", "K"),),
        coordinates=True,
        meets="send",
        part_of="attend",
        flops=_flops,
        infer_with=_infer,
        source="Liu et al. 2023, Ring Attention; order: Brandon et al. 2023, Striped Attention; Llama 3 2024, 3.3.2",
    ),
)
