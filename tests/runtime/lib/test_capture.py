"""Decoding under a captured step: the tokens of decoding op by op, for every model; and what is found where it cannot be.

A recorder stands for CUDA graphs: it runs the calls of one step again, on the memory that they had.
"""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.load import load_text, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.lib import buffers, capture
from heddle.runtime.lib.buffers import Cache, Tail
from heddle.runtime.lib.capture import Steps, Watch
from heddle.runtime.lib.model import NotCaptured
from heddle.runtime.lib.stream import Stream
from tests.kernels.hybrid import hybrid
from tests.lowering.test_masks import attending, everyday
from tests.runtime.lib.recorder import Recorder
from tests.specs.published import TWINS
from tests.specs.test_specs import between, more, twin

PROMPT = 5
DRAWS = [(1, {}), (3, {"temperature": 1.0, "top_k": 40, "seed": 3})]
ROUTED = "nemotron_h/tiny_moe"
"""Which experts run is asked of the device, so it is not captured."""


def drawn(rows, length):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(rows))


@functools.cache
def model(name):
    return twin(name)


def kinds(made, first, last):
    """What kinds of steps there are between, from the clocks of the model alone."""
    stream = made.stream(1, last)
    given = {n: torch.zeros(1, 0, 2, 8, dtype=torch.int64, device=made.device) for n in made.inputs[1:]}
    made.prefill(drawn(1, 1).to(made.device), stream, **given)  # asks for its clocks
    groups = [tuple(clock.groups(n) for clock in stream.clocks) for n in range(first, last + 1)]
    return {tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(groups)}


def generated(name, made, rows, new, **how):
    """Tokens, and what was warned of."""

    def rows_of(n, tokens, groups):
        return more(name, made, tokens)[n][:, groups.start : groups.stop].to(tokens.device)

    given = {n: functools.partial(rows_of, n) for n in made.inputs[1:]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tokens = made.generate((drawn(rows, PROMPT) % made.vocab).to(made.device), new, given=given, **how)
    return tokens, [str(w.message) for w in told if w.category is NotCaptured]


def alike(name, made, rows, sampling, patch):
    """Tokens op by op and captured, by whatever captures on the device of the model; how often."""
    make = capture.CAPTURES[made.device.type]
    count = []

    def counted(device):
        plain = make(device)
        return lambda run: count.append(1) or plain(run)

    patch.setitem(capture.CAPTURES, made.device.type, counted)
    expected = kinds(made, PROMPT, PROMPT + 21)
    new = 22 if len(expected) > 1 else 8  # each kind three times op by op, then captured, then replayed
    wanted, _ = generated(name, made, rows, new, graph=False, **sampling)
    found, told = generated(name, made, rows, new, **sampling)
    assert torch.equal(found, wanted)
    if name == ROUTED:
        assert not count and "moe.spec:28  some = route(" in told[0] and "shape only the device" in told[0]
    else:
        assert not told and len(count) == len(expected)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("rows", "sampling"), DRAWS)
def test_tokens_of_decoding_op_by_op(name, rows, sampling, monkeypatch):
    """Greedy and drawn, also where groups of tokens end: each kind of step is captured once."""
    monkeypatch.setitem(capture.CAPTURES, "cpu", lambda device: Recorder())
    alike(name, model(name), rows, sampling, monkeypatch)


def test_tokens_of_decoding_op_by_op_with_kernels(monkeypatch):
    """A hybrid in Triton's interpreter: states are moved on in place by the kernels themselves."""
    made, recorder = instantiate(hybrid(), seed=3), Recorder()
    wanted, _ = generated("", made, 1, 6, graph=False)
    monkeypatch.setitem(capture.CAPTURES, "cpu", lambda device: recorder)
    found, told = generated("", made, 1, 6)
    assert torch.equal(found, wanted) and recorder.count == 1 and not told
    kernels = {func.name().split("::")[1] for func in recorder.ops if "aten" not in func.name()}
    assert len(kernels) > 4 and {"attend_forward"} < kernels, kernels


def logits(name, made, step, tokens, first, last):
    steps = ((tokens[:, i : i + 1], between(name, made, tokens, i, i + 1)) for i in range(first, last))
    return torch.cat([step(token, **given).clone() for token, given in steps], 1)


def both(name, change=lambda stream, made: None, half=16, rows=2):
    """Logits op by op and captured, of streams that are changed half-way; the steps that were taken."""
    made, tokens = model(name), drawn(rows, 40)
    found, steps = [], None
    for captured in (False, True):
        stream = made.stream(rows, 40)
        with torch.no_grad():
            made.prefill(tokens[:, :4], stream, **between(name, made, tokens, 0, 4))
            steps = Steps(made, stream, Recorder() if captured else None)
            one = logits(name, made, steps, tokens, 4, 4 + half)
            change(stream, made)
            found.append(torch.cat((one, logits(name, made, steps, tokens, 4 + half, 4 + 2 * half)), 1))
    return *found, steps


def close(a, b):
    """fp64: sums over keys that are not seen, whose weights are 0, in another order."""
    return torch.allclose(a, b, rtol=0, atol=1e-10)


@settings(max_examples=6)
@given(mask=everyday, seed=st.integers(0, 99))
def test_any_causal_mask(mask, seed):
    """What a full run gives, also of masks that are no interval and of queries that see nothing."""
    text = attending(f"causal and ({mask[0]})")
    made = instantiate(build(program_of(load_text(text, folder=shipped_folder()))), seed=seed, dtype=torch.float64)
    tokens = torch.randint(0, 16, (2, 13), generator=torch.Generator().manual_seed(seed))
    stream = made.stream(2, 13)
    steps = Steps(made, stream, Recorder())
    with torch.no_grad():
        rows = [made.prefill(tokens[:, :4], stream), logits("", made, steps, tokens, 4, 13)]
        assert close(torch.cat(rows, 1), made(tokens))
    assert steps.capture.count == 1 and steps.why is None


def restored(stream, made):
    stream.restore(stream.snapshot())


def swapped(stream, made):
    stream.select([1, 0])


def ragged(stream, made):
    """From here on rows differ, and their places are numbers of the device already: nothing is captured."""
    made.prefill(drawn(2, 2), stream, count=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("name", "change", "captures"),
    [("transformer_ls/tiny", restored, 2), ("nemotron_h/tiny", swapped, 2), ("nemotron_h/tiny", ragged, 1)],
)
def test_a_stream_that_is_changed_is_captured_anew(name, change, captures):
    plain, found, steps = both(name, change)
    assert close(found, plain)
    assert steps.why == ("rows of the stream differ in length, or may be taken back" if change is ragged else None)
    assert steps.capture.count == captures * len(kinds(steps.model, 4, 20))


def test_a_full_stream_is_refused_as_ever():
    made, tokens = model("llama/tiny"), drawn(1, 9)
    stream = made.stream(1, 8)
    made.prefill(tokens[:, :1], stream)
    steps = Steps(made, stream, Recorder())
    logits("llama/tiny", made, steps, tokens, 1, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit in max_length = 8"):
        steps(tokens[:, 8:])
    assert steps.capture.count == 1


# --- planted faults -----------------------------------------------------------------------------------


def everywhere_by_number(patch):
    """The place of a step is the number that the host has."""
    patch.setattr(Stream, "begin_anywhere", lambda self, place: self.again(1))


def stored_by_number(patch):
    """Keys go where the host says."""
    plain = Cache.store

    def store(self, k, v, at):
        if not isinstance(at.step.uniform, torch.Tensor):
            return plain(self, k, v, at)
        tick = self.stream.uniform
        self.rows["k"][:, :, tick : tick + 1] = k.transpose(1, 2)
        self.rows["v"][:, :, tick : tick + 1] = v.transpose(1, 2)
        return self.rows["k"][:, :, :-1], self.rows["v"][:, :, :-1]

    patch.setattr(Cache, "store", store)


def seen_by_number(patch):
    """How many keys are seen is a number of the host."""
    plain = Stream.keys

    def keys(self, at, keep, count, clock=None, times=1):
        found = plain(self, at, keep, count, clock, times)
        if isinstance(at.step.uniform, torch.Tensor) and keep is None:
            return found._replace(valid=found.position <= self.uniform)
        return found

    patch.setattr(Stream, "keys", keys)


def asked_of_the_device(patch):
    """The place is read back from the device."""
    plain = Stream.begin_anywhere
    patch.setattr(Stream, "begin_anywhere", lambda self, place: plain(self, place) if int(place) else None)


def a_state_made_anew(patch):
    """Rows that are kept are bound, not written."""

    def join(self, at, **new):
        joined = {name: torch.cat((self.rows[name], x.to(self.rows[name].dtype)), -2) for name, x in new.items()}
        for name, both in joined.items():
            self.rows[name] = both[..., both.shape[-2] - self.capacity :, :].clone()
        return joined

    patch.setattr(Tail, "join", join)
    patch.setattr(buffers.Window, "moved_by", lambda self, x, at: None)


FAULTS = {
    "llama/tiny": [everywhere_by_number, stored_by_number, seen_by_number, asked_of_the_device],
    "nemotron_h/tiny": [a_state_made_anew],
    "mistral/tiny": [a_state_made_anew, everywhere_by_number],
    "transformer_ls/tiny": [a_state_made_anew],
}


@pytest.mark.parametrize(("name", "fault"), [(n, f) for n, faults in FAULTS.items() for f in faults])
def test_a_step_that_cannot_be_captured_is_found(name, fault, monkeypatch):
    """It goes on op by op with the right numbers, and says why."""
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "again", lambda self, seq: _uniform(self, seq), raising=False)
        fault(patch)
        plain, found, steps = both(name, half=7)
        assert steps.why and steps.capture.count == 0 and close(found, plain)
        # Nobody looks on: then the recorder ends, or its numbers are wrong.
        patch.setattr(capture, "WATCHED", 0)
        try:
            plain, found, steps = both(name, half=7)
        except RuntimeError as error:
            assert "cannot be captured" in str(error)
        else:
            assert steps.capture.count and not close(found, plain)


def _uniform(stream, seq):
    stream.running = False
    return stream.begin(seq)


def test_kinds_are_told_apart_by_what_comes(monkeypatch):
    """A step at whose end a group is made is not replayed where none is: the fault is that clocks are forgotten."""
    plain = Stream.coming

    def coming(self, clock, seq):
        self.clocks.pop(clock, None)
        found = plain(self, clock, seq)
        self.clocks.clear()
        return found

    monkeypatch.setattr(Stream, "coming", coming)
    op_by_op, found, steps = both("transformer_ls/tiny")
    assert steps.why or not close(found, op_by_op)


def test_what_goes_between_devices_is_found():
    with Watch(torch.device("meta")) as watch:
        torch.zeros(2, device="meta").copy_(torch.zeros(2))
    assert watch.why == "`aten::copy_` goes between meta and cpu"
    with Watch(torch.device("cpu")) as watch:
        torch.tensor([1.0]) + 1
    assert watch.why == "`aten::lift_fresh` makes a tensor of numbers of the host"
    with Watch(torch.device("cpu")) as watch:
        x = torch.arange(4.0)
        torch.where(x[x.long()] > 1, x, 0).sum()
    assert watch.why is None
