"""Decoding in any order of events gives what a whole-document forward pass gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .tiny import HEADS, KINDS, STATE, VOCAB, WIDTH, Tiny, reference

MODEL = Tiny().double().initialise(5)
WEIGHTS = MODEL.state_dict()
law = settings(deadline=None, max_examples=25)


class Feed:
    """What one batch row has been given: documents as lists of tokens."""

    def __init__(self):
        self.documents = []

    def copy(self):
        other = Feed()
        other.documents = [list(d) for d in self.documents]
        return other

    def push(self, token, start):
        if start or not self.documents:
            self.documents.append([])
        self.documents[-1].append(token)

    def expect(self):
        """Logits of the newest token."""
        return reference(WEIGHTS, torch.tensor(self.documents[-1]))[-1]


def step(stream, feeds, width, counts, tokens, starts):
    """Feed a step and check every valid row's logits."""
    start = torch.tensor(starts)[:, :width]
    logits = MODEL.decode(torch.tensor(tokens)[:, :width], stream, torch.tensor(counts), start)
    for row, feed in enumerate(feeds):
        for j in range(counts[row]):
            feed.push(tokens[row][j], starts[row][j])
            assert (logits[row, j] - feed.expect()).abs().max() < 1e-10


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.sampled_from([0, 1, 3]))
def test_any_order_of_events_is_the_whole_document(data, batch, slack):
    """Packing, ragged counts, changing widths, wrong tokens taken back, one row restored, rows permuted."""
    draw = data.draw
    stream = MODEL.stream(batch, 60, slack)
    size = stream.bytes()
    feeds = [Feed() for _ in range(batch)]
    snapshot = (stream.snapshot(), [f.copy() for f in feeds])

    def some(width):
        counts = [draw(st.integers(0, width)) for _ in feeds]
        tokens = [[draw(st.integers(0, VOCAB - 1)) for _ in range(width)] for _ in feeds]
        starts = [[draw(st.integers(0, 5)) == 0 for _ in range(width)] for _ in feeds]
        return width, counts, tokens, starts

    for _ in range(draw(st.integers(1, 4))):
        event = draw(st.sampled_from(["nothing", "restore", "select", "snapshot"]))
        if event == "snapshot":
            snapshot = (stream.snapshot(), [f.copy() for f in feeds])
        elif event == "restore":
            row = draw(st.integers(0, batch - 1))
            stream.restore(snapshot[0], [row])
            feeds[row] = snapshot[1][row].copy()
        elif event == "select":
            order = [draw(st.integers(0, batch - 1)) for _ in feeds]
            stream.select(order)
            feeds = [feeds[i].copy() for i in order]
        if wrong := draw(st.integers(0, slack)):
            fed = some(wrong)
            step(stream, [f.copy() for f in feeds], *fed)
            stream.rollback(torch.tensor(fed[1]))
        step(stream, feeds, *some(draw(st.sampled_from([1, 2, 5, 9]))))
        assert stream.bytes() == size


def test_rows_taken_back_are_not_seen_by_a_document_of_the_same_number():
    """Fed and taken back: a token, and one that starts a document; then a token that starts that document."""
    stream = MODEL.stream(1, 9, 2)
    MODEL.decode(torch.tensor([[1]]), stream)
    MODEL.decode(torch.tensor([[2, 3]]), stream, None, torch.tensor([[False, True]]))
    stream.rollback(2)
    logits = MODEL.decode(torch.tensor([[4]]), stream, None, torch.tensor([[True]]))
    assert (logits[0, 0] - reference(WEIGHTS, torch.tensor([4]))[0]).abs().max() < 1e-10


def test_a_document_that_was_started_by_mistake_goes_on():
    """A start that may still be taken back is not folded into the state of a scan."""
    stream, tokens = MODEL.stream(1, 20, 2), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    MODEL.decode(tokens[:, :6], stream)
    MODEL.decode(torch.tensor([[9]]), stream, None, torch.tensor([[True]]))
    stream.rollback(1)
    logits = MODEL.decode(tokens[:, 6:], stream)
    assert (logits[0, 0] - reference(WEIGHTS, tokens[0])[-1]).abs().max() < 1e-10


@law
@given(st.lists(st.sampled_from([1, 2, 5, 9]), min_size=1, max_size=5), st.integers(1, 2), st.integers(0, 99))
def test_uniform_steps_stay_uniform_and_agree(widths, batch, seed):
    """The form that greedy decoding uses."""
    tokens = torch.randint(0, VOCAB, (batch, sum(widths)), generator=torch.Generator().manual_seed(seed))
    stream = MODEL.stream(batch, sum(widths))
    logits = torch.cat([MODEL.decode(piece, stream) for piece in tokens.split(widths, 1)], 1)
    assert stream.uniform == sum(widths)
    for row in range(batch):
        assert (logits[row] - reference(WEIGHTS, tokens[row])).abs().max() < 1e-10


@law
@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 99))
def test_what_is_past_the_count_has_no_influence(first, second, seed):
    """Rubbish in rows that are not valid changes no bit of what is valid, now or later."""
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=make)
    count = torch.tensor([first, second + 1])

    def run(rubbish):
        stream = MODEL.stream(2, 20, 2)
        fed = tokens[:, :4].clone()
        fed[torch.arange(4) >= count[:, None]] = rubbish
        start = torch.zeros(2, 4, dtype=torch.bool)
        start[torch.arange(4) >= count[:, None]] = rubbish == 3
        a = MODEL.decode(fed, stream, count, start)
        b = MODEL.decode(tokens[:, 4:], stream)
        return torch.where((torch.arange(4) < count[:, None])[..., None], a, 0), b

    for x, y in zip(run(1), run(3), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("slack", [0, 2])
def test_nan_past_the_count_reaches_no_state(slack):
    """Values, not tokens: the embedding of what is past the count is NaN."""
    model = Tiny().double().initialise(5)
    tokens = torch.randint(0, VOCAB - 1, (2, 6), generator=torch.Generator().manual_seed(0))
    count = torch.tensor([2, 4])

    def run():
        stream = model.stream(2, 20, slack)
        at = stream.begin(6, count)
        x = torch.where((torch.arange(6) < count[:, None]), tokens, VOCAB - 1)
        with torch.inference_mode():
            a = model.run(x, at, stream.state)
        stream.commit(at)
        kept = [x for b in stream.buffers for x in b.rows.values() if x.is_floating_point()]
        assert all(bool(x.isfinite().all()) for x in kept)
        return a[0, :2], a[1, :4], model.decode(tokens[:, :1], stream)

    clean = run()
    with torch.no_grad():
        model.embedding.weight[VOCAB - 1] = float("nan")
    for x, y in zip(clean, run(), strict=True):
        assert torch.equal(x, y)


def test_rollback_is_refused_below_the_horizon():
    stream = MODEL.stream(1, 30, 3)
    for _ in range(3):
        MODEL.decode(torch.ones(1, 2, dtype=torch.long), stream)
    with pytest.raises(ValueError, match=r"cannot roll back \[4\].*rows keep \[3\]"):
        stream.rollback(4)
    stream.rollback(2)
    # The high-water mark is 6: of the 4 rows left one more can go, even after another token.
    with pytest.raises(ValueError, match=r"rows keep \[1\]"):
        stream.rollback(2)
    MODEL.decode(torch.ones(1, 1, dtype=torch.long), stream)
    with pytest.raises(ValueError, match=r"rows keep \[2\]"):
        stream.rollback(3)
    with pytest.raises(ValueError, match="at least 0"):
        stream.rollback(-1)
    plain = MODEL.stream(1, 30)
    MODEL.decode(torch.ones(1, 2, dtype=torch.long), plain)
    with pytest.raises(ValueError, match=r"rows keep \[0\]"):
        plain.rollback(1)


def test_max_length_is_kept_and_a_refused_step_changes_nothing():
    for slack in (0, 2):
        stream = MODEL.stream(1, 4, slack)
        MODEL.decode(torch.tensor([[1, 2, 3]]), stream)
        with pytest.raises(ValueError, match="5 tokens do not fit in max_length = 4"):
            MODEL.decode(torch.tensor([[4, 5]]), stream)
        logits = MODEL.decode(torch.tensor([[4]]), stream)
        assert (logits[0, 0] - reference(WEIGHTS, torch.tensor([1, 2, 3, 4]))[-1]).abs().max() < 1e-10


def test_bytes_are_what_the_shapes_say():
    """Rows kept: attention all or w - 1 (+ slack), conv taps - 1 (+ slack), scan a state (+ slack inputs)."""
    for slack in (0, 2):
        mamba = (3 + slack) * 32 + HEADS * WIDTH * STATE
        mamba += slack * (HEADS * WIDTH + 10 + HEADS)
        per_row = 2 * 2 * WIDTH
        attention = {"causal": 21 * per_row, "window": (2 + slack) * per_row, "piece": (2 + slack) * per_row, "mlp": 0}
        numbers = sum(mamba if kind == "mamba" else attention[kind] for kind in KINDS)
        numbers += 2 * 21 + 2
        flags = slack * KINDS.count("mamba")
        assert MODEL.stream(3, 20, slack).bytes() == 3 * (numbers * 8 + flags)


def test_a_restored_stream_goes_on_as_before():
    stream = MODEL.stream(2, 20)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    MODEL.decode(tokens[:, :5], stream)
    saved = stream.snapshot()
    first = MODEL.decode(tokens[:, 5:6], stream)
    MODEL.decode(tokens[:, 6:], stream)
    stream.restore(saved)
    assert torch.equal(MODEL.decode(tokens[:, 5:6], stream), first)


def test_a_step_that_failed_half_way_must_be_restored(monkeypatch):
    stream = MODEL.stream(1, 9)
    saved = stream.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(MODEL, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            MODEL.decode(torch.tensor([[1]]), stream)
    with pytest.raises(RuntimeError, match="half-way"):
        MODEL.decode(torch.tensor([[1]]), stream)
    stream.restore(saved)
    MODEL.decode(torch.tensor([[1]]), stream)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: MODEL.decode(torch.ones(1, 2, dtype=torch.long), s), r"tokens are \[1, 2\], must be \[2"),
        (lambda s: MODEL.decode(torch.ones(2, 2, dtype=torch.long), s, torch.tensor([3, 0])), "count is"),
        (lambda s: MODEL.decode(torch.ones(2, 2, dtype=torch.long), s, None, torch.ones(2, 2)), "start is"),
        (lambda s: s.select([2]), "from 0 to 1"),
        (lambda s: MODEL.stream(0, 3), "batch is 0"),
        (lambda s: MODEL.stream(1, 3, -1), "rollback is -1"),
    ],
)
def test_misuse_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(MODEL.stream(2, 9))
