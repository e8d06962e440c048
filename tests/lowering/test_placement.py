"""The proof of layouts: it accepts all that the compiler lays out, and no mistake that changes a number.

A mutant that the proof accepts is run on simulated ranks, and must equal one device in its loss, every gradient and
their norm. `benchmarks/layout_mutants.py` runs all of them, also those that are rejected.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import Phase, assume, given, reject, settings
from hypothesis import strategies as st

from heddle.dsl.diagnostics import InternalError, SpecError
from heddle.dsl.layout import layout_of
from heddle.dsl.load import load, load_text, shipped_folder
from heddle.dsl.program import Node, Program, Type, Value
from heddle.lowering.pipeline import lower
from heddle.lowering.placement.prove import UnprovedLayout, prove, require_proved
from heddle.lowering.placement.rules import converted, known
from heddle.lowering.placement.types import Atom, I, Mesh, P, Place, R, everywhere, steps
from heddle.runtime.check import program_of

from .decoders import VOCAB, decoders, program
from .mutants import Mutant, mutants
from .sharded import BASES, BIASED, HARMLESS, Twin

TWINS = sorted(str(p.relative_to(shipped_folder())) for p in shipped_folder().glob("*/tiny*.spec"))
TWINS += ["lra/listops.spec", "lra/text.spec"]
# A case takes a second on a busy machine: it is found, not made small.
found = settings(phases=[Phase.explicit, Phase.generate])


@st.composite
def layouts(draw: Any) -> str:
    """Rules of a layout: up to 16 ranks, dims over one axis, the rest of the rules there or not."""
    data, context, tensor = (draw(st.sampled_from(n)) for n in ((1, 2, 3), (1, 2), (1, 2, 3, 4, 8)))
    assume(1 < data * context * tensor <= 16)
    dims = draw(st.lists(st.sampled_from(["vocab?", "heads?", "kv_heads?", "groups?", "ffn?", "width?"]), unique=True))
    lines = [f"mesh data = {data}, context = {context}, tensor = {tensor}"]
    lines += [f"shard {', '.join(dims)} over tensor"] if dims else []
    lines += ["shard seq? over tensor between blocks"] if draw(st.booleans()) else []
    lines += ["shard seq? over context"] if context > 1 else []
    lines += ["shard batch? over data"] if draw(st.booleans()) else []
    lines += ["shard parameters over data"] if draw(st.booleans()) else []
    return "layout drawn:\n" + "".join(f"    {line}\n" for line in lines)


def laid_out(made: Any, rules: str) -> Any:
    """The sharded program; a layout that cannot be is no case."""
    try:
        return lower(made, until="shard", layout=layout_of(load_text(rules)))
    except SpecError:
        reject()


# --- nothing that the compiler makes is refused ------------------------------------------------------


@cache
def shipped(file: str) -> Program:
    return program_of(load(shipped_folder() / file))


@settings(found, max_examples=40)
@given(file=st.sampled_from(TWINS), rules=layouts())
def test_every_layout_of_a_shipped_family_is_proved(file: str, rules: str) -> None:
    made = laid_out(shipped(file), rules)
    assert prove(made) == (), f"{file}\n{rules}"


@settings(found, max_examples=40)
@given(text=decoders(), rules=layouts())
def test_every_layout_of_any_decoder_is_proved(text: str, rules: str) -> None:
    made = laid_out(program(text.replace(f"vocab = {VOCAB}", "vocab = 48")), rules)
    assert prove(made) == (), f"{text}\n{rules}"


# --- no mistake is accepted ---------------------------------------------------------------------------


@cache
def mistakes(base: Twin) -> list[Mutant]:
    return list(mutants(base.sharded))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_what_mistakes_are_made_of_is_right(base: Twin) -> None:
    """Each base is proved, and equals one device as it is."""
    assert prove(base.sharded) == ()
    assert base.far(Mutant("none", "", base.sharded)) < HARMLESS


def test_all_mistakes_of_one_program_are_found() -> None:
    """None of this one's changes no number, so that all are refused."""
    assert [str(m) for m in mistakes(BASES[0]) if not prove(m.program)] == []


@settings(found, max_examples=500)
@given(data=st.data())
def test_no_mistake_that_changes_a_number_is_accepted(data: Any) -> None:
    base = data.draw(st.sampled_from(BASES[1:]))
    mutant = data.draw(st.sampled_from(mistakes(base)))
    if not prove(mutant.program):
        assert base.far(mutant) < HARMLESS, f"{base}: {mutant}"


def test_a_dim_that_one_op_sums_away_and_keeps_is_not_cut_there() -> None:
    """Scores are sums over `head_dim`, values have it: an `attend` of parts would be a softmax of parts."""
    base = Twin(BIASED, "mesh tensor = 2\nshard head_dim over tensor")
    assert prove(base.sharded) == () and base.far(Mutant("none", "", base.sharded)) < HARMLESS


def test_a_finding_says_what_where_and_over_which_factor() -> None:
    wrong = next(m for m in mistakes(BASES[0]) if m.kind == "drop")
    with pytest.raises(UnprovedLayout) as raised:
        require_proved(wrong.program)
    assert isinstance(raised.value, InternalError)
    (finding,) = raised.value.findings
    assert str(finding) in str(raised.value)
    assert finding.to_json()["factor"] == finding.factor
    assert finding.to_json()["spec"] is not None, "no line of the spec"


# --- conversions --------------------------------------------------------------------------------------

MESH = Mesh((Atom("data", "data", 2), Atom("tensor.0", "tensor", 2), Atom("tensor.1", "tensor", 2), Atom("c", "c", 2)))


@st.composite
def places(draw: Any, letters: str) -> Place:
    place = everywhere(2, R, MESH.names())
    for atom in MESH.names():
        place = place.put(atom, draw(st.sampled_from([*letters, 0, 1])), MESH.names())
    return place


@st.composite
def stored(draw: Any) -> Place:
    """As weights may be: axes that split what is stored stand inside of others, whatever their order in the mesh."""
    place = draw(places(R + I + P))
    axes = draw(st.permutations(["data", "tensor", "c"]))
    splits = tuple(tuple(sorted(s, key=lambda a: (axes.index(MESH.axis(a)), a))) for s in place.splits)
    return Place(splits, place.letters)


@settings(max_examples=400)
@given(have=stored(), want=places(R + I))
def test_the_steps_from_a_place_end_where_they_should(have: Place, want: Place) -> None:
    """Each is legal for what is there, gathers the innermost factors, and splits in the order of the type."""
    try:
        todo = steps(have, want, MESH)
    except InternalError:
        assume(False)  # no way from one letter to another
    now = known(have.splits, dict(have.letters), True, MESH)
    for step in todo:
        attrs = (("kind", step.kind), ("axes", step.atoms), ("src", step.src), ("dst", step.dst))
        now = converted(Node((Value("y", Type("real", ())),), "convert", ("x",), attrs), now, MESH)
    assert now.place == want
