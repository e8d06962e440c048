"""Every shipped spec: sizes, length, bytes; every tiny twin: what trains is what generates, and documents do not
leak."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.load import load, shipped_folder
from heddle.lowering.cost import active_parameters
from heddle.lowering.pipeline import lower
from heddle.runtime.check import check_file, program_of
from heddle.runtime.compile import build, instantiate

from .published import ACTIVE, INPUTS, PARAMETERS, ROUNDED, TWINS

SPECS = sorted(p for p in shipped_folder().glob("*/*.spec") if p.parent.name != "std")


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@functools.cache
def program(name):
    return program_of(load(shipped_folder() / f"{name}.spec"))


@functools.cache
def twin(name):
    """The tiny twin in fp64, with weights large enough to see every path."""
    model = instantiate(build(program(name)), seed=3).cast(torch.float64).eval()
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=source, dtype=p.dtype))
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    assert sum(p.count for p in program(name).tensors()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_active_parameters(name):
    """Of a layer of experts those that a token is routed to; of all other models everything."""
    made = program(name)
    buffers = sum(p.count for p in made.tensors() if not p.weight.trained)
    assert active_parameters(lower(made)) + buffers == ACTIVE.get(name, PARAMETERS[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_parameter_counts(name):
    assert abs(program(name).num_parameters() / ROUNDED[name] - 1) < 5e-5


@pytest.mark.parametrize("name", ["nemotron_h/nemotron_h_56b", "nemotron4/nemotron4_340b"])
def test_the_module_on_the_meta_device_has_these_parameters(name):
    model = instantiate(build(program(name)), seed=None, device="meta")
    assert sum(p.numel() for p in model.parameters()) == program(name).num_parameters()
    assert set(model.state_dict()) == {p.name for p in program(name).parameters()}


@pytest.mark.parametrize("path", SPECS, ids=name_of)
def test_specs_check_and_are_short(path):
    check_file(load(path))
    text = path.read_text()
    models = text.split("checkpoint huggingface")[0]
    is_family = path.stem == path.parent.name
    assert len(models.splitlines()) <= (80 if is_family else 20)
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("path", SPECS, ids=name_of)
def test_same_spec_same_bytes(path):
    file = load(path)
    for name, p in check_file(file).programs.items():
        assert build(p).source == build(program_of(load(path), name)).source


def test_compile_time_does_not_grow_with_depth():
    """The number of graphs and nodes of the 118-layer model is that of a five-layer one."""
    deep, shallow = lower(program("nemotron_h/nemotron_h_56b")), lower(program("nemotron_h/tiny"))
    assert len(deep.graphs) == len(shallow.graphs)
    assert [len(g.nodes) for g in deep.graphs.values()] == [len(g.nodes) for g in shallow.graphs.values()]


# --- streaming -----------------------------------------------------------------------------------


@st.composite
def streams(draw):
    """Documents of one to three rows: lengths, and how the rows are fed."""
    rows = draw(st.integers(1, 3))
    documents = [draw(st.lists(st.integers(1, 11), min_size=1, max_size=4)) for _ in range(rows)]
    return documents, draw(st.integers(0, 2**31 - 1))


def packed(documents, generator):
    """(tokens, document) of each row of documents, as lists of whole documents."""
    return [[torch.randint(0, 256, (n,), generator=generator) for n in row] for row in documents]


def more(name, model, tokens, salt=0):
    """The inputs besides tokens of documents [rows, n], drawn; a document's first groups do not depend on its length."""
    found = {}
    for other, behind in INPUTS.get(name, {}).items():
        groups = model.follows[other].groups(tokens.shape[1])
        sources = [torch.Generator().manual_seed(1000 * salt + i) for i in range(len(tokens))]
        found[other] = torch.stack([torch.randint(0, 256, (groups, *behind), generator=s) for s in sources])
    return found


def whole_logits(name, model, row, salt):
    """Each document run alone, then side by side."""
    with torch.no_grad():
        return torch.cat([model(d[None], **more(name, model, d[None], salt + i))[0] for i, d in enumerate(row)])


def packed_inputs(name, model, row, salt):
    """The rows of further inputs of documents side by side, in order."""
    each = [more(name, model, d[None], salt + i) for i, d in enumerate(row)]
    return {other: torch.cat([e[other][0] for e in each]) for other in INPUTS.get(name, {})}


def coming(name, model, stream, rows, used, **step):
    """What a step needs of further inputs: the next rows of each, or arbitrary ones where `rows` is None."""
    found = {}
    for other, (groups, there) in model.coming(stream, **step).items():
        behind = INPUTS[name][other]
        found[other] = torch.randint(0, 256, (*groups.shape, *behind))
        for i, n in enumerate(there.expand(groups.shape).sum(1).tolist() if rows is not None else ()):
            found[other][i, :n] = rows[i][other][used[i] : used[i] + n]
            used[i] += n
    return found


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=25, deadline=None)
@given(case=streams())
def test_any_feeding_equals_each_document_alone(name, case):
    """Ragged counts, changing widths, wrong tokens that are fed and rolled back, poison behind the count."""
    documents, seed = case
    generator = torch.Generator().manual_seed(seed)
    model = twin(name)
    rows = packed(documents, generator)
    wanted = [whole_logits(name, model, row, 100 * i) for i, row in enumerate(rows)]
    others = [packed_inputs(name, model, row, 100 * i) for i, row in enumerate(rows)]
    used = [0] * len(rows)
    tokens = [torch.cat(row) for row in rows]
    starts = [torch.cat([torch.arange(len(d)) == 0 for d in row]) for row in rows]
    slack = 3
    total = max(len(t) for t in tokens)
    stream = model.stream(len(rows), 4 * total + 64, rollback=slack)
    fed = [0] * len(rows)
    got = [[] for _ in rows]
    while any(f < len(t) for f, t in zip(fed, tokens)):
        width = [1, 2, 5, 9][int(torch.randint(0, 4, (), generator=generator))]
        wrong = int(torch.randint(0, slack + 1, (), generator=generator))
        if wrong:
            junk = torch.randint(0, 256, (len(rows), wrong), generator=generator)
            begin = torch.rand(len(rows), wrong, generator=generator) < 0.3
            model.prefill(junk, stream, start=begin, **coming(name, model, stream, None, used, seq=wrong, start=begin))
            stream.rollback(wrong)
        count = [
            int(torch.randint(0, min(width, len(t) - f) + 1, (), generator=generator)) for f, t in zip(fed, tokens)
        ]
        chunk = torch.full((len(rows), width), 10**9)  # poison: no such token
        begin = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, n in enumerate(count):
            chunk[i, :n] = tokens[i][fed[i] : fed[i] + n]
            begin[i, :n] = starts[i][fed[i] : fed[i] + n]
        step = {"count": torch.tensor(count), "start": begin}
        rest = coming(name, model, stream, others, used, seq=width, **step)
        logits = model.prefill(chunk, stream, **step, **rest)
        for i, n in enumerate(count):
            got[i].append(logits[i, :n])
            fed[i] += n
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(torch.cat(mine), theirs, rtol=0, atol=1e-10)


def between(name, model, tokens, first, last):
    """What comes of further inputs with the tokens first .. last - 1 of documents."""
    at = {other: slice(*(clock.groups(n) for n in (first, last))) for other, clock in model.follows.items()}
    return {other: rows[:, at[other]] for other, rows in more(name, model, tokens).items()}


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=10, deadline=None)
@given(length=st.integers(2, 24), seed=st.integers(0, 2**31 - 1))
def test_token_by_token_and_prefix(name, length, seed):
    """Decode = forward, and forward(T)[:t] = forward(t)."""
    model = twin(name)
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        full = model(tokens, **more(name, model, tokens))
        stream = model.stream(2, length)
        steps = torch.cat(
            [
                model.decode(tokens[:, i : i + 1], stream, **between(name, model, tokens, i, i + 1))
                for i in range(length)
            ],
            1,
        )
        torch.testing.assert_close(steps, full, rtol=0, atol=1e-10)
        half = tokens[:, : length // 2 + 1]
        torch.testing.assert_close(model(half, **more(name, model, half)), full[:, : half.shape[1]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TWINS)
def test_restore_one_row_while_others_go_on(name):
    model = twin(name)
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens, **more(name, model, tokens))
        stream = model.stream(3, 64)
        model.prefill(tokens[:, :7], stream, **between(name, model, tokens, 0, 7))
        snapshot = stream.snapshot()
        middle = between(name, model, tokens, 7, 12)
        model.prefill(tokens[:, 7:12], stream, **middle)
        stream.restore(snapshot, rows=[1])
        count = torch.tensor([0, 5, 0])
        again = model.prefill(tokens[:, 7:12], stream, count=count, **middle)
        torch.testing.assert_close(again[1], full[1, 7:12], rtol=0, atol=1e-10)
        rest = model.prefill(tokens[:, 12:], stream, **between(name, model, tokens, 12, 20))
        torch.testing.assert_close(rest, full[:, 12:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), which=st.integers(0, 3), seed=st.integers(0, 2**31 - 1)
)
def test_a_document_never_sees_another(name, lengths, which, seed):
    """Perturbing one packed document leaves the others' logits and the gradients of their losses bit-identical.

    With experts, to rounding: an expert multiplies the rows of all documents that chose it at once, and how many these
    are decides how a product is summed.
    """
    model = twin(name)
    which %= len(lengths)
    generator = torch.Generator().manual_seed(seed)
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    tokens = torch.randint(0, 256, document.shape, generator=generator)
    other = torch.where(document == which, torch.randint(0, 256, document.shape, generator=generator), tokens)
    kept = (document != which)[0]

    rows = [d[None] for d in tokens[0].split(lengths)]
    given = {
        other: torch.cat([more(name, model, d, i)[other] for i, d in enumerate(rows)], 1)
        for other in INPUTS.get(name, {})
    }

    def run(ids):
        model.zero_grad(set_to_none=True)
        logits = model(ids, document=document, **given)
        (logits[0, kept] ** 2).sum().backward()
        return logits[0, kept].detach(), [
            p.grad.clone()
            for n, p in model.named_parameters()
            if not n.startswith(("embedding", "word")) and p.grad is not None
        ]

    first, second = run(tokens), run(other)
    if any(isinstance(m, torch.nn.ModuleList) and n.endswith("expert") for n, m in model.named_modules()):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))


@pytest.mark.parametrize("name", TWINS)
def test_state_bytes_are_what_is_allocated_whatever_the_width(name):
    from heddle.lowering.passes.stream import state_bytes

    model = twin(name)
    a, b = model.stream(1, 40), model.stream(1, 40)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    model.prefill(tokens, a, **more(name, model, tokens))
    model.prefill(tokens[:, :1], b, **between(name, model, tokens, 0, 1))
    assert a.bytes() == b.bytes() if callable(a.bytes) else a.bytes == b.bytes
    assert state_bytes(lower(program(name)), 40) > 0


def test_decoding_state_grows_with_the_window_not_the_text():
    """A sliding window keeps its span; full attention keeps every key."""
    from heddle.lowering.passes.stream import state_bytes

    windowed, full = lower(program("mistral/tiny")), lower(program("llama/tiny"))
    assert state_bytes(windowed, 100) == state_bytes(windowed, 1000)
    assert state_bytes(full, 1000) == 10 * state_bytes(full, 100)
