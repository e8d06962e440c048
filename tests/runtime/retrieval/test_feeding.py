"""Models get the neighbours of their own chunks: ahead of training, packed, and while they generate."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.dsl.load import load, shipped_folder
from heddle.runtime.check import program_of
from heddle.runtime.compile import build, instantiate
from heddle.runtime.data import Packed, open_corpus, open_tokenizer
from heddle.runtime.errors import UserError
from heddle.runtime.lib.clocks import on
from heddle.runtime.lib.rows import At
from heddle.runtime.retrieval import Asked, Feed, Index, Looked, build_index
from heddle.runtime.retrieval.index import hashes_of

from .test_index import TEXTS, written

pytest.importorskip("faiss")
WORDS = open_tokenizer("bytes")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("feeding")
    texts = written(work / "texts", [t * 3 for t in TEXTS])
    build_index([texts], work / "index", chunk=4)
    return work


@pytest.fixture(scope="module")
def model():
    program = program_of(load(shipped_folder() / "retro/tiny.spec"))
    return instantiate(build(program), seed=1).cast(torch.float64).eval()


@settings(max_examples=10, deadline=None)
@given(seq=st.integers(5, 60), pick=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_rows_get_the_neighbours_of_their_own_chunks(work, model, tmp_path_factory, seq, pick):
    """Each group of a packed row: the index asked for its chunk by hand, documents of the row left out."""
    index = Index(work / "index")
    feed = Feed(model, "neighbors", index, "bytes", WORDS)
    data = Packed(open_corpus([work / "texts"], WORDS), seq)
    looked = Looked(feed, data, tmp_path_factory.mktemp("looked"))
    batch = data.rows([p % data.num_rows for p in pick])
    found = looked(batch)
    groups = on(At(batch.tokens.shape, batch.tokens.device, None, batch.document), feed.clock)
    assert found.shape == (len(pick), groups.seq, 2, 8)
    hashes = hashes_of(data.corpus)
    for b, row in enumerate(batch.rows):
        whole = np.searchsorted(data.corpus.ends, [row * seq, (row + 1) * seq - 1], side="right")
        own = frozenset(int(h) for h in hashes[whole[0] : whole[1] + 1])
        place = 0
        for document in batch.document[b].unique():
            tokens = batch.tokens[b][batch.document[b] == document].numpy()
            for u in range(len(tokens) // 4):
                chunk = tokens[None, 4 * u : 4 * u + 4].astype(np.int32)
                ids, _ = index.search(index.embed(chunk, WORDS), 2, [own])
                assert np.array_equal(found[b, place].numpy(), index.text(ids[0], 8))
                assert int(groups.position[b if len(groups.position) > 1 else 0, place]) == u
                place += 1
        assert not found[b, place:].any()
    again = Looked(feed, data, tmp_path_factory.mktemp("other"))
    assert again.identity == looked.identity and torch.equal(again(batch), found)


def test_what_was_looked_up_is_used_again_and_other_data_is_not(work, model, tmp_path):
    feed = Feed(model, "neighbors", Index(work / "index"), "bytes", WORDS)
    data = Packed(open_corpus([work / "texts"], WORDS), 20)
    first = Looked(feed, data, tmp_path)
    before = (tmp_path / "ids.npy").stat().st_mtime_ns
    assert Looked(feed, data, tmp_path).identity == first.identity
    assert (tmp_path / "ids.npy").stat().st_mtime_ns == before
    other = Looked(feed, Packed(data.corpus, 24), tmp_path)
    assert other.identity != first.identity and (tmp_path / "ids.npy").stat().st_mtime_ns != before


@pytest.mark.parametrize("name", ["ids.npy", "starts.npy", "of.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damaged_rows_are_looked_up_again(work, model, tmp_path, name, how):
    feed = Feed(model, "neighbors", Index(work / "index"), "bytes", WORDS)
    data = Packed(open_corpus([work / "texts"], WORDS), 20)
    whole = Looked(feed, data, tmp_path)(data.rows([0, 1]))
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).unlink() if how == "gone" else (tmp_path / name).write_bytes(
        content if how == "flipped" else content[:-9]
    )
    assert torch.equal(Looked(feed, data, tmp_path)(data.rows([0, 1])), whole)


def test_a_look_up_that_is_killed_is_not_taken_for_another(work, model, tmp_path, monkeypatch):
    """Rows of other data begin to overwrite what is there: the first data's rows are looked up again."""
    feed = Feed(model, "neighbors", Index(work / "index"), "bytes", WORDS)
    data = Packed(open_corpus([work / "texts"], WORDS), 20)
    whole = Looked(feed, data, tmp_path)(data.rows([0, 1]))
    real, left = os.replace, [1]

    def replace(*names):
        real(*names)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        Looked(feed, Packed(data.corpus, 24), tmp_path)
    assert torch.equal(Looked(feed, data, tmp_path)(data.rows([0, 1])), whole)


@settings(max_examples=8, deadline=None)
@given(prompt=st.integers(1, 14), new=st.integers(1, 10), batch=st.integers(1, 2), seed=st.integers(0, 99))
def test_retrieval_on_the_fly_is_a_full_pass(work, model, prompt, new, batch, seed):
    """Each chunk is looked up when it is whole; the same neighbours in one pass give the same tokens."""
    feed = Feed(model, "neighbors", Index(work / "index"), "bytes", WORDS)
    tokens = torch.randint(97, 122, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    made = model.generate(tokens, new, given={"neighbors": feed})
    seen = made[:, :-1]
    with torch.no_grad():
        logits = model(seen, neighbors=feed(seen, range(seen.shape[1] // 4)))
    assert torch.equal(logits[:, prompt - 1 :].argmax(-1), made[:, prompt:])
    for piece in (1, 3, seen.shape[1]):  # token by token, in pieces, at once
        stream, found = model.stream(batch, seen.shape[1]), []
        for start in range(0, seen.shape[1], piece):
            end = min(start + piece, seen.shape[1])
            rows = feed(seen[:, :end], range(start // 4, end // 4))
            found.append(model.prefill(seen[:, start:end], stream, neighbors=rows))
        torch.testing.assert_close(torch.cat(found, 1), logits, rtol=0, atol=1e-12)


def test_training_reads_it_and_resumes(work, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from heddle.runtime.cli import app

    monkeypatch.chdir(tmp_path)
    spec = str(shipped_folder() / "retro/tiny.spec")
    common = ["train", spec, "--data", str(work / "texts"), "--seq", "20", "--batch", "2", "--held-out", "0"]
    fed = [*common, "--give", f"neighbors={work / 'index'}"]

    def run(*more, options=fed):
        return CliRunner().invoke(app, [*options, *more])

    assert run("--steps", "4", "-o", "whole").exit_code == 0
    assert run("--steps", "2", "-o", "cut").exit_code == 0
    told = run("--steps", "4", "-o", "cut", "--resume")
    assert told.exit_code == 0, told.output
    whole, cut = (
        {r["step"]: r["loss"] for r in map(json.loads, (tmp_path / n / "log.jsonl").read_text().splitlines())}
        for n in ("whole", "cut")
    )
    assert sorted(whole) == [1, 2, 3, 4] and {s: whole[s] for s in (3, 4)} == {s: cut[s] for s in (3, 4)}
    made = CliRunner().invoke(app, ["generate", "cut", "--prompt", "the w", "--max-new-tokens", "6", *fed[-2:]])
    assert made.exit_code == 0 and made.output.startswith("the w")
    for wrong, code in (
        (common, "no-data"),
        ([*common, "--give", "neighbors"], "bad-override"),
        ([*common, "--give", f"neighbor={work / 'index'}"], "unknown-setting"),
        ([*common, "--give", f"neighbors={work / 'nothing'}"], "no-such-file"),
        ([*fed, "--set", "chunk=8"], "out-of-range"),
    ):
        told = run("--steps", "2", "-o", "other", options=wrong)
        assert told.exit_code == 2 and f"error[{code}]" in told.output, told.output
        assert not (tmp_path / "other").exists()
    alone = run("--steps", "1", "-o", "alone", "--set", "neighbors=none", options=common)
    assert alone.exit_code == 0, alone.output


@settings(max_examples=12, deadline=None)
@given(question=st.text("abdehlnoprtw ", min_size=1, max_size=11), passages=st.integers(0, 3))
def test_asked_with_passages_the_answer_follows_on_whole_chunks(work, model, question, passages):
    """The nearest passages stand before the question, the next are the neighbours of every chunk; the padding is on the
    left. Generating is a full pass with these neighbours."""
    index = Index(work / "index")
    feed = Feed(model, "neighbors", index, "bytes", WORDS)
    ids = WORDS.encode(question)
    asked = Asked(feed, ids, passages)
    found, _ = index.search(index.embed(ids[None], WORDS), passages + 2)
    text = b""
    for chunk in found[0, :passages]:
        document, start, _ = index.chunks[chunk]
        text += bytes(np.asarray(index.tokens[start : min(start + 8, index.ends[document])]).tolist()) + b"\n"
    whole = bytes(asked.prompt[0].tolist())
    assert whole == b"\0" * asked.padding + text + question.encode() and len(whole) % 4 == 0 and asked.padding < 4
    made = model.generate(asked.prompt, 6, given={"neighbors": asked})
    seen = made[:, :-1]
    near = index.text(found[:, passages:], 8)
    rows = torch.from_numpy(near)[:, None].expand(1, seen.shape[1] // 4, 2, 8)
    with torch.no_grad():
        logits = model(seen, neighbors=rows)
    assert torch.equal(logits[:, len(whole) - 1 :].argmax(-1), made[:, len(whole) :])


def test_the_decoder_alone_of_a_checkpoint(work, tmp_path, monkeypatch):
    """A run with neighbours generates and goes on without them, with the weights that are left: gate 0 says the same."""
    from typer.testing import CliRunner

    from heddle.runtime.cli import app

    monkeypatch.chdir(tmp_path)
    spec, data = str(shipped_folder() / "retro/tiny.spec"), ["--data", str(work / "texts"), "--seq", "20"]
    fed = ["--give", f"neighbors={work / 'index'}"]

    def run(*words):
        return CliRunner().invoke(app, list(words))

    assert run("train", spec, *data, "--batch", "2", "--steps", "2", "-o", "whole", *fed).exit_code == 0
    ask = ["generate", "whole", "--prompt", "the warp and", "--max-new-tokens", "9"]
    alone = run(*ask, "--set", "neighbors=none")
    assert alone.exit_code == 0, alone.output
    assert alone.output == run(*ask, *fed, "--set", "gate=0").output
    more = ["train", spec, *data, "--batch", "2", "--steps", "1", "--set", "neighbors=none"]
    assert run(*more, "--start", "whole", "-o", "alone").exit_code == 0
    assert run(*ask[:1], "alone", *ask[2:]).exit_code == 0
    assert run(*more, "--start", "whole", "--set", "ffn=8", "-o", "other").exit_code == 2
    back = run("train", spec, *data, *fed, "--steps", "1", "--start", "alone", "-o", "other")
    assert back.exit_code == 2 and "weights-do-not-fit" in back.output
    passages = run(*ask, *fed, "--passages", "1")
    assert passages.exit_code == 0 and "the warp and" in passages.output and "\0" not in passages.output
    refused = run(*ask, "--set", "neighbors=none", "--passages", "1")
    assert refused.exit_code == 2 and "error[unknown-setting]" in refused.output


def test_an_index_of_another_tokenizer_is_refused(work, model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        Feed(model, "neighbors", Index(work / "index"), str(tmp_path / "tokenizer.json"), WORDS)
    assert caught.value.code == "bad-tokenizer"


def test_rows_of_the_wrong_shape_are_refused(model):
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    for rows in (1, 3):
        with pytest.raises(ValueError, match="2"):
            model(tokens, neighbors=torch.zeros(1, rows, 2, 8, dtype=torch.int64))
