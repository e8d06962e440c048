"""Where a sequence is split: which way a use takes, by bytes or because the layout says so, and what it is told if not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load_text
from heddle.lowering.pipeline import lower
from heddle.lowering.placement.prove import prove
from heddle.runtime.check import program_of
from heddle.runtime.compile import build


def decoder(heads: int, kv_heads: int, rules: str) -> Any:
    """A decoder of one layer of attention under a layout."""
    text = f"""
model one(vocab = 32, hidden = 16):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + attention(rms_norm(embedding), heads = {heads}, kv_heads = {kv_heads}, head_dim = 4)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits

layout drawn:
""" + "".join(f"    {line.strip()}\n" for line in rules.strip().splitlines())
    return load_text(text)


def sharded(loaded: Any) -> Any:
    return lower(program_of(loaded), until="shard", layout=layout_of(loaded))


def collectives(program: Any, block: str = "attention") -> list[tuple[str, tuple[str, ...]]]:
    """Those of a block, in order."""
    nodes = program.graphs[block].nodes
    return [(n.attr("kind"), n.attr("axes")) for n in nodes if n.op == "convert" and n.attr("kind") != "convert"]


def errors(loaded: Any) -> list[Any]:
    with pytest.raises(SpecError) as raised:
        sharded(loaded)
    return list(raised.value.diagnostics)


# --- bytes decide ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(kv=st.sampled_from([1, 2, 3, 4, 8]), group=st.sampled_from([1, 2, 3, 4, 8]),
       ranks=st.sampled_from([2, 3, 4, 6, 8, 16]), tensor=st.sampled_from([1, 2]))  # fmt: skip
def test_the_way_that_moves_fewer_bytes_is_taken(kv: int, group: int, ranks: int, tensor: int) -> None:
    """Against the formulas of both, by hand: n (t - 1) / t of k and v gathered, n (t - 1) / t^2 of q, k, v and o moved.
    An axis is factored only for what is chosen."""
    tensor = tensor if kv % tensor == 0 else 1
    made = sharded(decoder(kv * group, kv, f"mesh context = {ranks}, tensor = {tensor}\nshard seq over context\n"
                           "shard heads, kv_heads over tensor"))  # fmt: skip
    heads, keys = kv * group // tensor, kv // tensor
    gathered = 2 * keys * (ranks - 1) / ranks
    # Of fewer key heads than ranks each is gathered by those that share it, then they are moved among the groups of these.
    outer = min(keys, ranks)
    shared = 2 * keys * (1 / outer - 1 / ranks + (outer - 1) / outer**2)
    moved = 2 * heads * (ranks - 1) / ranks**2 + shared
    if heads % ranks or keys % ranks and ranks % keys:
        moved = float("inf")
    kinds = [kind for kind, axes in collectives(made) if "context" in axes[0]]
    if moved < gathered - 1e-9:
        assert kinds.count("all_to_all") == (2 if keys == 1 else 4)
        assert kinds.count("all_gather") == (2 if keys < ranks else 0)
        assert len(made.laid.mesh.names("context")) == (2 if 1 < keys < ranks else 1)
    else:
        assert kinds == ["all_gather"] * 2 and made.laid.mesh.names("context") == ("context",)
    assert prove(made) == ()


def test_the_reason_stands_above_the_collective() -> None:
    loaded = decoder(8, 8, "mesh context = 4\nshard seq over context")
    source = build(program_of(loaded), layout=layout_of(loaded)).source
    reason = "# context: heads for positions, 24 values a (batch, seq) instead of 48 values a (batch, seq)\n"
    assert reason + "        q_moved = spmd.all_to_all" in source
    assert reason + "        o_moved = spmd.all_to_all" in source
    loaded = decoder(8, 2, "mesh context = 2\nshard seq over context")
    source = build(program_of(loaded), layout=layout_of(loaded)).source
    reason = "# context: 8 values a (batch, seq), where heads for positions are 20 values a (batch, seq)\n"
    assert reason + "        k_all = spmd.all_gather" in source


# --- the layout says so ---------------------------------------------------------------------------


def test_a_layout_may_name_either() -> None:
    rules = "mesh context = 4\nshard seq over context\n"
    assert [k for k, _ in collectives(sharded(decoder(8, 8, rules + "attend: all_gather")))] == ["all_gather"] * 2
    forced = sharded(decoder(8, 4, rules.replace("4", "2") + "attention: exchange(heads)"))
    assert [k for k, _ in collectives(forced)] == ["all_to_all"] * 4
    later = sharded(decoder(8, 8, rules + "attention: exchange(heads)\nattend: all_gather"))
    assert [k for k, _ in collectives(later)] == ["all_gather"] * 2


def test_fewer_key_heads_than_ranks_are_shared_by_some() -> None:
    """As over `tensor`: the axis is factored, the outer part splits key heads, the inner one gathers them."""
    made = sharded(decoder(8, 2, "mesh context = 4\nshard seq over context\nattend: exchange(heads)"))
    assert [(a.name, a.size) for a in made.laid.mesh.atoms] == [("context.0", 2), ("context.1", 2)]
    inner, outer = ("context.1",), ("context.0",)
    both = ("context.0", "context.1")
    kinds = collectives(made)
    assert kinds.count(("all_to_all", both)) == 2  # of the queries, and of the result
    assert kinds.count(("all_gather", inner)) == 2 and kinds.count(("all_to_all", outer)) == 2
    assert len(kinds) == 6 and prove(made) == ()


def test_what_is_pointwise_between_two_uses_stays_where_it_is() -> None:
    text = """
model one(vocab = 32, hidden = 16):
    tokens[batch, seq]: token
    embedding = embed(tokens, vocab -> hidden)
    x = embedding + mamba2(rms_norm(embedding), heads = 4, head_dim = 4, state = 4, groups = 2)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits

layout drawn:
    mesh context = 2
    shard seq over context
    mamba2: exchange(heads, groups)
"""
    made = sharded(load_text(text))
    assert prove(made) == ()
    # u, b, c and dt go there, y comes back: what stands between convolution and scan is not moved.
    assert [k for k, _ in collectives(made, "mamba2")] == ["all_to_all"] * 5
    assert not any(n.op in ("ssd_leave", "rows_before") for n in made.graphs["mamba2"].nodes)


@pytest.mark.parametrize(
    ("rules", "kind", "count"),
    [("attend: exchange(heads)", "all_to_all", 4), ("attend: ring", "send", 1), ("attend: all_gather", "all_gather", 2)],
)
def test_a_contract_counts_what_a_way_makes(rules: str, kind: str, count: int) -> None:
    text = f"mesh context = 2\nshard seq over context\n{rules}\nexpect {kind} per attention "
    for bound in (f"== {count}", f"<= {count}"):
        lower(program_of(loaded := decoder(4, 4, text + bound)), layout=layout_of(loaded))
    with pytest.raises(SpecError) as raised:
        lower(program_of(loaded := decoder(4, 4, f"{text}< {count}")), layout=layout_of(loaded))
    assert [d.code for d in raised.value.diagnostics] == ["contract-broken"]


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv", "mesh", "way", "code", "message", "help"),
    [
        (6, 6, "context = 4", "attend: exchange(heads)", "uneven-split",
         "`heads` = 6 does not divide over the 4 ranks of `context`", "`context = 3` or `context = 6` would do"),
        (12, 6, "context = 4", "attend: exchange(heads)", "uneven-split",
         "`kv_heads` = 6 does not divide over the 4 ranks of `context`", "`context = 3` or `context = 6` would do"),
        (8, 8, "context = 4, tensor = 4", "attend: exchange(heads)", "uneven-split",
         "`heads` = 8, of which a rank of the other axes has 2, does not divide over the 4 ranks of `context`",
         "`context = 2` would do"),
        (4, 4, "context = 2", "attend: exchange(head_dim)", "selects-nothing",
         "`attend` has no dim `head_dim` that can be split for a sequence", None),
        (4, 4, "context = 2", "attnd: exchange(heads)", "selects-nothing",
         "nothing of `one` is named `attnd`", "something named `attend` exists"),
        (4, 4, "context = 2", "rms_norm: ring", "selects-nothing",
         "`rms_norm` reads no keys, which `ring` is about", "`exchange(DIM)` is for all that runs along a sequence"),
        (4, 4, "context = 2", "attend: rong", "unknown-name", "this is no way to lay something out",
         "a way named `ring` exists"),
        (4, 4, "context = 2", "attend: exchange", "missing-argument",
         "`exchange` needs the dim that is split in place of the sequence", "`exchange(heads)`, for example"),
        (4, 4, "context = 2", "attend: exchange(heads, heads)", "duplicate-argument", "`heads` is exchanged twice", None),
        (4, 4, "context = 2", "attend: exchange(2)", "wrong-type", "`exchange` takes names of dims", None),
        (4, 4, "context = 2", "attend: exchange(dims = heads)", "unknown-setting",
         "`exchange` has no setting `dims`", "it has no settings"),
        (4, 4, "context = 2", "attend: ring(order = spiral)", "unknown-name", "this is no order of positions",
         "orders are `zigzag`; without one ranks keep their own"),
        (4, 4, "context = 2", "gather: ahead(layers = 1)", "not-built-yet",
         "`ahead` as a way of a layout is not built yet", None),
    ],
)  # fmt: skip
def test_a_way_that_cannot_be_is_told_why(
    heads: int, kv: int, mesh: str, way: str, code: str, message: str, help: str | None
) -> None:
    split = "shard heads, kv_heads over tensor\n" if "tensor" in mesh else ""
    (found,) = errors(decoder(heads, kv, f"mesh {mesh}\nshard seq over context\n{split}{way}"))
    assert (found.code, found.message) == (code, message)
    assert found.primary.span.text.strip() and (help is None or found.help == help)


def test_a_sequence_of_which_rows_have_several_is_not_split():
    """Coordinates of ranks count the tokens of one sequence a row; it was an error of the ranks."""
    loaded = load_text(
        'use lra_pair from "lra/lra.spec"\n\n'
        "model pair = lra_pair(vocab = 17, classes = 2, context = 16, hidden = 16, ffn = 16, heads = 2, span = 2, rank = 2)\n\n"
        "layout split:\n    mesh context = 2\n    shard seq over context\n"
    )
    with pytest.raises(SpecError) as caught:
        build(program_of(loaded), layout=layout_of(loaded))
    assert caught.value.diagnostics[0].code == "not-built-yet"
    assert "each row of a batch has several" in str(caught.value)
