"""Checkpoint maps: names segment by segment, tensors joined and cut, and configs read in both directions."""

from __future__ import annotations

import copy
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle.dsl import syntax as sx
from heddle.dsl.checkpoint import CallValue, evaluate, read_config, tensor_map, write_config
from heddle.dsl.diagnostics import SpecError
from heddle.dsl.load import load, shipped_folder
from heddle.dsl.parse import parse
from heddle.dsl.program import Init, Parameter, Weight
from heddle.dsl.source import Source


def the_map(*lines: str) -> sx.Checkpoint:
    """A map with these lines."""
    body = "\n".join(f"    {line}" for line in lines)
    (checkpoint,) = parse(Source("a.spec", f'checkpoint huggingface "A" for a:\n{body}\n')).declarations
    assert isinstance(checkpoint, sx.Checkpoint)
    return checkpoint


def parameters(text: str) -> tuple[sx.Parameter, ...]:
    """The parameters of a model: `parameters("hidden, ffn = 4 * hidden")`."""
    (model,) = parse(Source("a.spec", f"model a({text}):\n    return 1\n")).declarations
    assert isinstance(model, sx.Function)
    return model.parameters


def weight(path: str, layout: str, **kinds: str) -> Parameter:
    """A weight: `weight("layer.0.attention.q.weight", "heads=2 head_dim=3 | hidden=5", attention="block")`.

    `|` separates the axes that are stored; `kinds` say what a segment stands for where that is not its own name.
    """
    axes = [dict(item.split("=") for item in axis.split()) for axis in layout.split("|")]
    dims = tuple((name, int(size)) for axis in axes for name, size in axis.items())
    segments = tuple(int(s) if s.isdigit() else s for s in path.split("."))
    names = tuple(name for name, _ in dims)
    made = Weight(path, names, Init("zeros"), "linear", layout=tuple(tuple(axis) for axis in axes))
    return Parameter(segments, dims, tuple(kinds.get(str(s)) for s in segments), Init("zeros"), made)


def names(checkpoint: sx.Checkpoint, *weights: Parameter, values=None) -> list[str]:
    return [e.theirs for e in tensor_map(checkpoint, weights, values).entries]


def codes(caught: pytest.ExceptionInfo[SpecError]) -> list[str]:
    return [d.code for d in caught.value.diagnostics]


# --- names ---------------------------------------------------------------------------------------


def test_a_segment_is_renamed_dropped_or_kept() -> None:
    m = the_map('embedding = "model.embed"', 'layer[i] = "model.layers.{i}"; mamba2 = "mixer"; mamba2.y = ""')
    paths = ["embedding.weight", "layer.7.mamba2.y.A_log", "layer.7.mamba2.norm.weight", "y.weight"]
    assert names(m, *(weight(path, "hidden=3") for path in paths)) == [
        "model.embed.weight", "model.layers.7.mixer.A_log", "model.layers.7.mixer.norm.weight", "y.weight"]  # fmt: skip


def test_a_segment_matches_by_the_block_or_op_that_it_stands_for() -> None:
    m = the_map('attention.q = "{half}_proj"', 'rms_norm = "norm"')
    near = weight("near.q.weight", "heads=2|hidden=3", near="attention")
    assert names(m, near, weight("early.weight", "hidden=3", early="rms_norm"), values={"half": 3}) == [
        "near.3_proj.weight", "norm.weight"]  # fmt: skip


def test_later_lines_win_and_longer_paths_do_not() -> None:
    inner, outer = weight("attention.q.weight", "heads=2|hidden=3"), weight("q.weight", "heads=2")
    assert names(the_map('attention.q? = "a"', 'q = "b"'), inner) == ["attention.b.weight"]
    assert names(the_map('q = "b"', 'attention.q = "a"'), inner, outer) == ["attention.a.weight", "b.weight"]


def test_iterations_inside_iterations() -> None:
    m = the_map('outer[i].inner[j] = "in.{j}.of.{i}"', 'outer = ""')
    deep = weight("outer.4.inner.2.weight", "hidden=3")
    assert names(m, deep) == ["4.in.2.of.4.weight"]
    assert names(the_map('outer[a] = "o{a}"'), deep) == ["o4.inner.2.weight"]


def test_a_name_may_compute_with_values_of_the_model() -> None:
    m = the_map('out = "layers.{length(ahead) - 1}.norm"')
    assert names(m, weight("out.weight", "hidden=3"), values={"ahead": "*E"}) == ["layers.1.norm.weight"]


def test_a_condition_silences_a_line() -> None:
    m = the_map('out = "head" if not tied')
    w = weight("out.weight", "hidden=3")
    assert names(m, w, values={"tied": False}) == ["head.weight"]
    assert names(m, w, values={"tied": True}) == ["out.weight"]


@st.composite
def models(draw):
    """Distinct paths of a model with loops, each weight with its dims."""
    words = st.sampled_from("abcdefg")
    paths = draw(st.lists(st.lists(words, min_size=1, max_size=4).map(tuple), min_size=1, max_size=12, unique=True))
    number = st.integers(0, 11).map(str)
    looped = [path if draw(st.booleans()) else (path[0] + "s", draw(number), *path[1:]) for path in paths]
    return [weight(".".join((*path, "weight")), "rows=2|hidden=3") for path in dict.fromkeys(looped)]


@given(models(), st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from(["", "x", "y", "a", "b.c"])))
def test_a_map_is_total_and_one_to_one_or_says_why_not(weights, renames) -> None:
    """Whatever the lines: each weight has one home and each name one weight, or two weights are named that collide."""
    lines = [f'{word}? = "{name}"' for word, name in renames.items()] or ['q? = "q"']
    simple = [[part for s in w.path for part in renames.get(str(s), str(s)).split(".") if part] for w in weights]
    if len(set(map(tuple, simple))) < len(simple):
        with pytest.raises(SpecError) as caught:
            tensor_map(the_map(*lines), weights)
        assert set(codes(caught)) == {"map-collision"}
        return
    entries = tensor_map(the_map(*lines), weights).entries
    assert [e.theirs.split(".") for e in entries] == simple
    assert sorted(p.name for e in entries for p in e.pieces) == sorted(w.name for w in weights)
    assert len({e.theirs for e in entries}) == len(entries) == len(weights)


# --- several of ours in one of theirs ------------------------------------------------------------


def test_rows_and_columns() -> None:
    parts = [weight("m.z.weight", "heads=2 head_dim=3 | hidden=5"), weight("m.dt.weight", "heads=2 | hidden=5"),
             weight("m.z.bias", "heads=2 head_dim=3"), weight("m.dt.bias", "heads=2")]  # fmt: skip
    matrix, vector = tensor_map(the_map('m.[dt, z] = "in_proj" as rows'), parts).entries
    assert (matrix.theirs, matrix.shape, [p.name for p in matrix.pieces]) == (
        "m.in_proj.weight", (8, 5), ["m.dt.weight", "m.z.weight"])  # fmt: skip
    assert (vector.theirs, vector.shape) == ("m.in_proj.bias", (8,))
    sides = [weight(f"{n}.weight", "out=4|hidden=5") for n in "eh"]
    (wide,) = tensor_map(the_map('[e, h] = "eh" as columns'), sides).entries
    assert (wide.shape, wide.axis) == ((4, 10), 1)


def test_axes_of_length_one_are_stored() -> None:
    (entry,) = tensor_map(
        the_map('[u, b] = "conv" as rows'),
        [weight("u.weight", "heads=2 head_dim=3||taps=4"), weight("b.weight", "groups=5||taps=4")],
    ).entries
    assert entry.shape == (11, 1, 4)


@pytest.mark.parametrize(
    ("form", "layout", "parts", "shape"),
    [("[heads, parts, head_dim, hidden]", "heads=2 head_dim=3|hidden=5", 3, (18, 5)),
     ("[parts, heads, head_dim, hidden]", "heads=2 head_dim=3|hidden=5", 3, (18, 5)),
     ("[hidden, parts, heads, head_dim]", "heads=2 head_dim=3|hidden=5", 3, (5, 18)),
     ("[hidden, heads, head_dim]", "heads=2 head_dim=3|hidden=5", 1, (5, 6)),
     ("[hidden, vocab]", "vocab=7|hidden=5", 1, (5, 7)),
     ("[heads, parts, head_dim, hidden]", "heads=2 head_dim=3", 3, (18,))],
)  # fmt: skip
def test_other_orders_of_axes(form, layout, parts, shape) -> None:
    """The shape is ours, flattened as we store it, with the parts beside the output dims."""
    members = "qkv"[:parts]
    (entry,) = tensor_map(
        the_map(f'a.[{", ".join(members)}] = "x" as {form}'), [weight(f"a.{m}.weight", layout) for m in members]
    ).entries
    assert entry.shape == shape


def test_one_tensor_of_theirs_for_each_index() -> None:
    m = the_map('expert = "experts.{experts}"', 'expert.[up, gate] = "both" as rows')
    weights = [weight(f"moe.expert.{n}.weight", "experts=3|ffn=4|hidden=5") for n in ("up", "gate")]
    entries = tensor_map(m, weights).entries
    assert [e.theirs for e in entries] == [f"moe.experts.{i}.both.weight" for i in range(3)]
    assert {e.shape for e in entries} == {(8, 5)}
    assert [(p.name, p.index, p.shape) for p in entries[2].pieces] == [
        ("moe.expert.up.weight", 2, (4, 5)), ("moe.expert.gate.weight", 2, (4, 5))]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "weights", "code", "said"),
    [('[q, k] = "x"', ["q:a=2", "k:a=2"], "map-collision", "`q` and `k` would both be `x`"),
     ('q = "k"', ["q:a=2", "k:a=2"], "map-collision", "would both be `k`"),
     ('q = ""', ["q:a=2"], "map-shape", "`q` would have no name"),
     ('[q, k] = "x" as sides', ["q:a=2", "k:a=2"], "map-shape", "`sides` is no way to join"),
     ('[q, k] = "x" as rows', ["q:a=2"], "map-shape", "`x` lacks its part `k`"),
     ('[q, k] = "x" as rows', ["q:a=2|b=3", "k:a=2|b=4"], "map-shape", "do not fit side by side"),
     ('[q, k] = "x" as columns', ["q:a=2", "k:a=2"], "map-shape", "do not fit side by side"),
     ('[q, k] = "x" as [parts, a]', ["q:a=2|b=3", "k:a=2|b=3"], "map-shape", "each dim of `q` once: a, b"),
     ('[q, k] = "x" as [a, a, parts, b]', ["q:a=2|b=3", "k:a=2|b=3"], "map-shape", "once"),
     ('[q, k] = "x" as [parts, a]', ["q:a=2", "k:a=3"], "map-shape", "have not the same dims"),
     ('[q, k] = "x" as [a, b]', ["q:a=2|b=3", "k:a=2|b=3"], "map-shape", "`parts` must stand"),
     ('q = "x" as [a, c, b]', ["q:a=2 b=3|c=4"], "map-shape", "must stand side by side"),
     ('q = "x.{nothing}"', ["q:a=2"], "map-shape", "`{nothing}` stands for no number"),
     ('q = "x.{1 +}"', ["q:a=2"], "map-shape", "stands for no number"),
     ('q = "x.{b}"', ["q:a=2|b=3"], "map-shape", "only its first dim `a`"),
     ('q = "x.{b}{a}"', ["q:a=2|b=3"], "map-shape", "an index for each of"),
     ('layer[2] = "x"', ["layer.2.q:a=2"], "map-shape", "a path of names"),
     ('layer[i, j] = "x"', ["layer.2.q:a=2"], "map-shape", "a path of names"),
     ('expert = "e.{a}"', ["e.1:a=2", "expert:a=2"], "map-collision", "would both be `e.1`"),
     ('final_norm = "x"', ["final:a=2"], "map-unused-line", "no weight of the model is at `final_norm`"),
     ('layer[i].q = "x"', ["layer.q:a=2"], "map-unused-line", "at `layer[i].q`")],
)  # fmt: skip
def test_what_a_map_cannot_be(line, weights, code, said) -> None:
    with pytest.raises(SpecError) as caught:
        tensor_map(the_map(line), [weight(*w.split(":")) for w in weights])
    assert code in codes(caught)
    assert any(said in d.message for d in caught.value.diagnostics)
    assert all(d.primary.span.source.name == "a.spec" for d in caught.value.diagnostics)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    m = the_map('[a, b] = "x"', 'nothing = "y"', '[c, d] = "z" as rows')
    with pytest.raises(SpecError) as caught:
        tensor_map(m, [weight(f"{n}", "rows=2") for n in "abc"])
    assert codes(caught) == ["map-collision", "map-unused-line", "map-shape"]


def test_a_line_may_speak_of_a_block_that_this_model_lacks_and_of_no_other_nothing() -> None:
    kinds = frozenset({"attention", "mlp"})
    q = weight("attention.q.weight", "rows=2")
    assert tensor_map(the_map('mlp.up = "u"', 'attention.q = "q"'), [q], kinds=kinds).entries
    with pytest.raises(SpecError) as caught:
        tensor_map(the_map('attention.qq = "q"'), [q], kinds=kinds)
    assert codes(caught) == ["map-unused-line"]
    assert tensor_map(the_map('attention.qq? = "q"'), [q], kinds=kinds).entries


def test_what_is_ignored() -> None:
    m = tensor_map(the_map('ignore "a.{i}.inv_freq", "mtp.*"'), [])
    assert [m.is_ignored(n) for n in ("a.12.inv_freq", "a.x.inv_freq", "a.1.inv_freq.b", "mtp.a.b", "xmtp.a")] == [
        True, False, False, True, False]  # fmt: skip
    assert not tensor_map(the_map('q? = "q"'), []).is_ignored("")


# --- configs -------------------------------------------------------------------------------------

SCALED = the_map(
    "hidden = config.hidden_size; heads = config.num_heads",
    "head_dim = config.head_dim; head_dim = hidden // heads if config.head_dim == none",
    "theta? = config.rope_theta; theta = config.rope.theta",
    'scaling = identity if config.rope.type == "default"',
    'scaling = squeeze(factor = config.rope.factor) if config.rope.type == "linear"',
    'scaling = blend(low = config.rope.low, high = config.rope.high) if config.rope.type == "blend"',
    'spell(pattern, {"M": ["scan", "mamba"], "-": "mlp"}) = config.layer_types',
    "pattern? = config.pattern",
    "length(pattern) = config.num_layers",
    'eps = config.eps; "silu" = config.act; false = config.bias',
    "1e-30 = config.least if config.least == none",
)
PARAMETERS = parameters(
    "hidden, heads, pattern, head_dim = hidden / heads, theta = 10000, scaling = identity, eps = 1e-5"
)
SMALL = {"hidden_size": 12, "num_heads": 3, "layer_types": ["scan", "mlp"]}


def read(**config):
    return read_config(SCALED, SMALL | config, PARAMETERS)


def refused(**config) -> str:
    with pytest.raises(SpecError) as caught:
        read(**config)
    assert set(codes(caught)) == {"config-mismatch"}
    return "\n".join(d.message + (f" [{d.help}]" if d.help else "") for d in caught.value.diagnostics)


def test_absent_and_null_fields_say_nothing() -> None:
    wanted = {"hidden": 12, "heads": 3, "pattern": "M-", "head_dim": 4}
    assert read() == wanted
    assert read(head_dim=None, rope=None, eps=None, act=None, bias=None, num_layers=None) == wanted
    assert read(head_dim=5, eps=1e-6) == wanted | {"head_dim": 5, "eps": 1e-6}


def test_waiting_functions_and_older_spellings() -> None:
    assert read(rope={"type": "linear", "factor": 2.0})["scaling"] == CallValue("squeeze", (("factor", 2.0),))
    assert read(rope={"type": "default"})["scaling"] == CallValue("identity")
    for config in ({"rope_theta": 5}, {"rope": {"theta": 5}}, {"rope_theta": 5, "rope": {"theta": 5.0}}):
        assert read(**config)["theta"] == 5
    assert read(layer_types=["mamba", "scan", "mlp"])["pattern"] == "MM-"
    assert read(layer_types=None, pattern="MM-")["pattern"] == "MM-"


@pytest.mark.parametrize(
    ("config", "said"),
    [({"hidden_size": None}, "`hidden` has no value: the config has no `hidden_size`"),
     ({"layer_types": None}, "`pattern` has no value: the config has no `layer_types`, `pattern`"),
     ({"rope": {"type": "yarn"}}, '`rope.type` is "yarn": no line of this map gives `scaling` for that'),
     ({"rope": {"type": "yarn"}}, '[the map knows "default", "linear", "blend"]'),
     ({"rope": {"type": "linear"}}, "no line of this map gives `scaling`"),
     ({"rope": {"factor": 2}}, "`rope.factor` is 2: no line of this map gives `scaling`"),
     ({"rope_theta": 4, "rope": {"theta": 5}}, "`rope_theta` gives `theta` = 4, `rope.theta` gives 5"),
     ({"layer_types": ["scan", "moe"]}, '`layer_types` has "moe"'),
     ({"layer_types": [["mlp"]]}, '`layer_types` has ["mlp"]'),
     ({"layer_types": 3}, "`layer_types` is 3"),
     ({"layer_types": ["scan"], "pattern": "M-"}, '`layer_types` gives `pattern` = "M", `pattern` gives "M-"'),
     ({"num_layers": 3}, "`num_layers` is 3, this map holds for 2"),
     ({"act": "gelu"}, '`act` is "gelu", this map holds for "silu"'),
     ({"bias": True}, "`bias` is true, this map holds for false"),
     ({"bias": 0}, "`bias` is 0, this map holds for false"),
     ({"eps": float("nan")}, "`eps` is nan, which `eps` cannot be"),
     ({"hidden_size": {"a": 1}}, '`hidden_size` is {"a": 1}, which `hidden` cannot be'),
     ({"layer_types": None, "pattern": 'M"'}, "which `pattern` cannot be")],
)  # fmt: skip
def test_a_config_that_the_map_does_not_know(config, said) -> None:
    assert said in refused(**config)


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    text = refused(hidden_size=None, act="gelu", rope={"type": "yarn"}, num_layers=7)
    assert len(text.splitlines()) == 4


arguments = st.fixed_dictionaries({
    "hidden": st.integers(1, 10**6), "heads": st.integers(1, 99), "pattern": st.text("M-", min_size=1, max_size=9),
    "head_dim": st.integers(1, 999), "theta": st.integers(1, 10**7) | st.floats(1e-3, 1e9),
    "scaling": st.one_of(
        st.just(CallValue("identity")), st.builds(lambda f: CallValue("squeeze", (("factor", f),)), st.floats(1, 9)),
        st.builds(lambda a, b: CallValue("blend", (("high", a), ("low", b))), st.integers(1, 9), st.integers(1, 9))),
    "eps": st.floats(1e-12, 1),
})  # fmt: skip
foreign = st.dictionaries(st.text(string.ascii_letters, min_size=9), st.none() | st.integers() | st.lists(st.text()))


@given(values=arguments, carried=st.none() | foreign, before=arguments)
def test_what_is_written_is_read_again(values, carried, before) -> None:
    """For all arguments; fields that the map does not know stay, whatever the config was before."""
    spoken = write_config(SCALED, before, PARAMETERS) | {"rope_theta": before["theta"], "pattern": before["pattern"]}
    if carried is not None:
        carried |= spoken
    kept = copy.deepcopy(carried or {})
    written = write_config(SCALED, values, PARAMETERS, carried)
    again = read_config(SCALED, written, PARAMETERS)
    assert {k: again[k] for k in values if k != "scaling"} == {k: v for k, v in values.items() if k != "scaling"}
    assert again["scaling"].name == values["scaling"].name
    assert dict(again["scaling"].arguments) == dict(values["scaling"].arguments)
    assert (written["act"], written["bias"], written["num_layers"]) == ("silu", False, len(values["pattern"]))
    assert carried is None or kept == carried
    assert all(written[k] == v for k, v in kept.items() if k not in spoken)


def test_an_older_spelling_goes_only_where_it_would_contradict() -> None:
    values = read() | {"theta": 5}
    assert write_config(SCALED, values, PARAMETERS, {"rope_theta": 5})["rope_theta"] == 5
    assert "rope_theta" not in write_config(SCALED, values, PARAMETERS, {"rope_theta": 6})
    older = the_map(
        's = squeeze(factor = config.new.factor, least = config.new.least) if config.new.type == "linear"',
        's? = squeeze(least = config.old.least, factor = config.old.factor) if config.old.type == "linear"',
    )
    now, more = CallValue("squeeze", (("factor", 2), ("least", 1))), parameters("s = identity")
    old = {"type": "linear", "factor": 2, "least": 1}
    assert write_config(older, {"s": now}, more, {"old": old}) == {"old": old, "new": old}
    assert write_config(older, {"s": now}, more, {"old": old | {"factor": 3}}) == {"new": old}


def test_a_guard_sees_the_config_that_came_along() -> None:
    assert write_config(SCALED, read(), PARAMETERS)["least"] == 1e-30
    assert write_config(SCALED, read(), PARAMETERS, {"least": 0.001})["least"] == 0.001


@pytest.mark.parametrize(
    ("values", "said"),
    [({"scaling": CallValue("yarn", (("factor", 2),))}, "no line of the map can write `scaling` = yarn(factor = 2)"),
     ({"scaling": CallValue("squeeze", (("factor", 2), ("more", 3)))}, "no line of the map can write `scaling`"),
     ({"scaling": CallValue("squeeze")}, "no line of the map can write `scaling` = squeeze"),
     ({"scaling": 3}, "no line of the map can write `scaling` = 3"),
     ({"pattern": "ME"}, '`pattern` has "E", for which `layer_types` has no word'),
     ({"pattern": ["M"]}, "`spell` writes the letters of a string")],
)  # fmt: skip
def test_values_that_no_line_can_write(values, said) -> None:
    with pytest.raises(SpecError) as caught:
        write_config(SCALED, read() | values, PARAMETERS)
    assert set(codes(caught)) == {"config-mismatch"}
    assert any(said in d.message for d in caught.value.diagnostics)


def test_a_parameter_without_a_line_may_only_have_its_default() -> None:
    few, more = the_map("hidden = config.hidden_size"), parameters("hidden, experts = none, twice = 2 * hidden")
    assert write_config(few, {"hidden": 4, "experts": None, "twice": 8}, more) == {"hidden_size": 4}
    with pytest.raises(SpecError, match="`experts` = 8"):
        write_config(few, {"hidden": 4, "experts": 8, "twice": 8}, more)
    with pytest.raises(SpecError, match="`twice` = 9"):
        write_config(few, {"hidden": 4, "experts": None, "twice": 9}, more)


def test_none_is_no_field_unless_something_else_would_be_taken() -> None:
    m = the_map("ffn = config.ffn", 'span = config.span; span = 4096 if not "span" in config', "hidden = config.hidden")
    more = parameters("hidden, ffn = none, span = none")
    for carried in (None, {"ffn": 3, "span": 5}):
        assert write_config(m, {"hidden": 4, "ffn": None, "span": None}, more, carried) == {"hidden": 4, "span": None}
    assert read_config(m, {"hidden": 4, "span": None}, more) == {"hidden": 4}
    assert read_config(m, {"hidden": 4}, more) == {"hidden": 4, "span": 4096}


def test_the_order_of_lines_is_free() -> None:
    backwards = the_map(
        "head_dim = hidden // heads if config.head_dim == none",
        "head_dim = config.head_dim",
        "heads = config.num_heads",
        "hidden = config.hidden_size",
    )
    found = read_config(backwards, SMALL, parameters("hidden, heads, head_dim"))
    assert found == {"hidden": 12, "heads": 3, "head_dim": 4}
    circle = the_map("hidden = heads", "heads = hidden")
    with pytest.raises(SpecError, match="has no value"):
        read_config(circle, {}, parameters("hidden, heads"))
    assert read_config(circle, {}, parameters("hidden = heads, heads = hidden")) == {}


# --- shipped maps --------------------------------------------------------------------------------

json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["default", "linear", "llama3", "mamba", "full_attention", "M-*", "relu2", "silu"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), inner),
    max_leaves=6,
)  # fmt: skip


REFUSALS = {"config-mismatch", "wrong-type", "no-such-member", "divide-by-zero", "too-large"}


def shipped():
    files = (load(path) for path in sorted(shipped_folder().glob("*/*.spec")))
    return [(file, checkpoint) for file in files for checkpoint in file.checkpoints]


@pytest.mark.parametrize(("file", "checkpoint"), shipped(), ids=[c.target for _, c in shipped()])
@given(data=st.data())
def test_any_config_is_read_or_refused(file, checkpoint, data) -> None:
    """Whatever JSON the fields hold: arguments that are plain values, or errors of the map."""
    fields = sorted(
        {
            part
            for line in checkpoint.equations
            if isinstance(line, sx.Equation)
            for part in words_of(line.theirs) | words_of(line.condition)
        }
    )
    config = data.draw(st.dictionaries(st.sampled_from(fields), json))
    declared = file.declared[checkpoint.model.id]
    try:
        found = read_config(checkpoint, config, declared.parameters)
    except SpecError as error:
        assert {d.code for d in error.diagnostics} <= REFUSALS
    else:
        assert set(found) <= {p.name for p in declared.parameters}


def words_of(node) -> set[str]:
    """Every name of a member in an expression."""
    if not isinstance(node, sx.Syntax):
        return set()
    inner = [c for v in vars(node).values() for c in (v if isinstance(v, tuple) else (v,))]
    return set().union({node.name} if isinstance(node, sx.Member) else set(), *(words_of(c) for c in inner))


# --- expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1 + 2 * 3", 7), ("7 // 2", 3), ("2 ^ 3", 8), ('3 * "ab"', "ababab"), ("[1] + [2]", [1, 2]), ("not true", False),
     ('"a" in ["a", "b"]', True), ('"x" in config', True), ('"y" in config', False), ("config.x.y", 5),
     ("config.z == none", True),
     ("1 if config.z else 2", 2), ("[i * i for i in 4]", [0, 1, 4, 9]),
     ("[i for i in [1, 2, 3] if i != 2]", [1, 3]),
     ("length(config.list)", 2), ("max(1, 4)", 4), ('{"a": 1}["a"]', 1), ("-3", -3), ("config.list[1]", 20),
     ("f(2, g = 3)", CallValue("f", ((None, 2), ("g", 3)))), ("[config.list] in config", False)],
)  # fmt: skip
def test_expressions(text, value) -> None:
    (block,) = parse(Source("a.spec", f"block a():\n    return {text}\n")).declarations
    assert evaluate(block.body[0].values[0], {"config": {"x": {"y": 5}, "list": [10, 20]}}) == value
