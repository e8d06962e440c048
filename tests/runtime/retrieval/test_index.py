"""Indexes: chunks cut documents, search is exact and leaves the own document out, builds resume, damage is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.runtime.data import Corpus, open_tokenizer
from heddle.runtime.errors import UserError
from heddle.runtime.retrieval import Index, build_index
from heddle.runtime.retrieval import index as module
from heddle.runtime.retrieval.embedders import open_embedder
from heddle.runtime.retrieval.index import chunks_of, hashes_of

pytest.importorskip("faiss")
TEXTS = (
    "the warp is held on the loom, and the weft is drawn through it over and under. ",
    "a heddle lifts the threads of the warp, so that the shuttle can pass between them. ",
    "numbers of threads and of picks say how dense a cloth is; wool is thicker than silk. ",
)


def written(folder: Path, texts=TEXTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text * (i + 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    work = tmp_path_factory.mktemp("index")
    return Index(build_index([written(work / "texts")], work / "index", chunk=16))


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), length=st.integers(1, 17))
def test_chunks_partition_documents(sizes, length):
    ends = np.cumsum(sizes)
    chunks = chunks_of(ends, length)
    covered = np.concatenate([np.arange(s, e) for _, s, e in chunks])
    assert np.array_equal(covered, np.arange(ends[-1]))
    assert all(0 < e - s <= length for _, s, e in chunks)
    for document, start, end in chunks:
        assert document == np.searchsorted(ends, start, side="right")
        assert end == ends[document] or end - start == length


@settings(max_examples=20, deadline=None)
@given(words=st.lists(st.integers(0, 255), min_size=1, max_size=16), k=st.integers(1, 12), without=st.integers(0, 3))
def test_search_is_that_of_all_vectors(index, words, k, without):
    """Against numpy; documents that are left out are never found, and there are -1 only where nothing is left."""
    tokenizer = open_tokenizer("bytes")
    query = index.embed(np.array([words], np.int32), tokenizer)
    stored = np.concatenate([np.load(p) for p in sorted((index.folder / "vectors").glob("*.npy"))])
    left_out = frozenset(int(h) for h in index.hashes[:without])
    ids, scores = index.search(query, k, [left_out])
    allowed = ~np.isin(index.hashes[index.chunks[:, 0]], np.array(sorted(left_out), np.uint64))
    cosines = np.sort((stored @ query[0])[allowed])[::-1][:k]
    real = ids[0] >= 0
    assert real.sum() == min(k, allowed.sum()) and allowed[ids[0][real]].all()
    assert len(set(ids[0][real].tolist())) == real.sum()
    np.testing.assert_allclose(scores[0][real], cosines, atol=1e-5)


def test_a_chunk_finds_itself_and_its_continuation_is_of_its_document(index):
    tokenizer = open_tokenizer("bytes")
    _, start, end = (int(x) for x in index.chunks[3])
    chunk = np.asarray(index.tokens[start:end])[None]
    ids, scores = index.search(index.embed(chunk, tokenizer), 1)
    found = np.asarray(index.tokens[index.chunks[ids[0, 0], 1] :][:16])
    assert np.array_equal(found, chunk[0]) and scores[0, 0] == pytest.approx(1, abs=1e-5)
    for number, (document, start, _) in enumerate(np.asarray(index.chunks)):
        text = index.text(np.array([number]), 32)[0]
        size = min(32, int(index.ends[document]) - start)
        assert np.array_equal(text[:size], np.asarray(index.tokens[start : start + size])) and not text[size:].any()
    assert not index.text(np.array([-1]), 32).any()


@settings(max_examples=30)
@given(data=st.data())
def test_vectors_do_not_depend_on_what_is_embedded_with_them(data):
    """Nor on padding: -1 behind a chunk is nothing."""
    embed = open_embedder("tfidf:1-3", open_tokenizer("bytes"))
    rows = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=2, max_size=5))
    chunks = np.array(rows, np.int32)
    learnt = embed.learn(iter([chunks]))
    whole = embed.embed(chunks, learnt)
    for row, vector in zip(chunks, whole, strict=True):
        np.testing.assert_array_equal(embed.embed(row[None], learnt)[0], vector)
        padded = np.concatenate([row, np.full(3, -1, np.int32)])[None]
        np.testing.assert_allclose(embed.embed(padded, learnt)[0], vector, atol=1e-6)
    lengths = np.linalg.norm(whole, axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))


def test_rare_words_weigh_more():
    embed = open_embedder("tfidf:1", open_tokenizer("bytes"))
    chunks = np.array([[1, 2], [1, 3], [1, 4], [1, 5]], np.int32)
    learnt = embed.learn(iter([chunks]))
    vectors = embed.embed(np.array([[1, 2], [1, 9], [7, 2]], np.int32), learnt)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, monkeypatch, after):
    monkeypatch.setattr(module, "SHARD", 8)
    texts = written(tmp_path / "texts")
    build_index([texts], tmp_path / "whole", chunk=16)

    def stop(done, shards):
        assert shards > 2
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index([texts], tmp_path / "cut", chunk=16, on_shard=stop)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(UserError) as caught:
        Index(tmp_path / "cut")
    assert caught.value.code == "no-such-file" and "interrupted" in (caught.value.help or "")
    first = tmp_path / "cut.building/vectors/00000.npy"
    before = os.stat(first).st_mtime_ns
    with pytest.raises(UserError) as caught:
        build_index([texts], tmp_path / "cut", chunk=8)
    assert caught.value.code == "other-run"
    build_index([texts], tmp_path / "cut", chunk=16)
    assert os.stat(tmp_path / "cut/vectors/00000.npy").st_mtime_ns == before
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    with pytest.raises(UserError) as caught:
        build_index([texts], tmp_path / "cut", chunk=16)
    assert caught.value.code == "already-there"


class Killed(BaseException):
    """Nothing may catch it, and nothing runs behind it."""


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_build_that_is_killed_anywhere_goes_on_to_the_same_bytes(tmp_path, monkeypatch, before):
    """Killed before, or just behind, each of its steps on the disk in turn, and every build behind that again later."""
    monkeypatch.setattr(module, "SHARD", 8)
    texts = written(tmp_path / "texts")
    build_index([texts], tmp_path / "whole", chunk=16)
    left = [0]

    def killing(real):
        def step(*args, **kwargs):
            left[0] -= 1
            if before and left[0] < 0:
                raise Killed
            made = real(*args, **kwargs)
            if left[0] < 0:
                raise Killed
            return made

        return step

    for owner, name in ((os, "replace"), (Path, "mkdir"), (np, "save"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))
    deaths = 0
    while not (tmp_path / "cut").exists():
        left[0] = deaths
        try:
            build_index([texts], tmp_path / "cut", chunk=16)
        except Killed:
            deaths += 1
    assert deaths > 15 and not (tmp_path / "cut.building").exists()
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_a_folder_that_is_no_build_is_left_alone(tmp_path):
    texts = written(tmp_path / "texts")
    (tmp_path / "index.building").mkdir()
    (tmp_path / "index.building/mine").write_text("mine")
    with pytest.raises(UserError) as caught:
        build_index([texts], tmp_path / "index", chunk=16)
    assert caught.value.code == "other-run" and bytes_of(tmp_path / "index.building") == {"mine": b"mine"}


@pytest.mark.parametrize(
    "name", ["tokens.npy", "ends.npy", "chunks.npy", "hashes.npy", "faiss.index", "vectors/00000.npy", "learnt.npy"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_named(index, tmp_path, name, how):
    folder = shutil.copytree(index.folder, tmp_path / "copy")
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(content if how == "flipped" else content[:-1])
    with pytest.raises(UserError) as caught:
        Index(folder)
    assert caught.value.code == "bad-index" and name in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other", "files": {}}', '{"files": 3}'])
def test_a_damaged_manifest_is_named(index, tmp_path, text):
    folder = shutil.copytree(index.folder, tmp_path / "copy")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError) as caught:
        Index(folder)
    assert caught.value.code == "bad-index" and "manifest.json" in caught.value.message


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_bit_of_the_manifest_is_named(index, tmp_path_factory, at, bit):
    """Also where what is left is good JSON: a chunk of 17 tokens, another embedder."""
    folder = shutil.copytree(index.folder, tmp_path_factory.mktemp("flipped") / "copy")
    content = bytearray((folder / "manifest.json").read_bytes())
    before = json.loads(content)
    content[at % len(content)] ^= 1 << bit
    (folder / "manifest.json").write_bytes(content)
    try:
        same = json.loads(content) == before  # a space became another
    except ValueError:
        same = False
    if not same:
        with pytest.raises(UserError) as caught:
            Index(folder)
        assert caught.value.code == "bad-index" and "manifest.json" in caught.value.message


def test_another_tokenizer_is_refused(index, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    index.check_tokenizer("bytes")
    with pytest.raises(UserError) as caught:
        index.check_tokenizer(str(tmp_path / "tokenizer.json"))
    assert caught.value.code == "bad-tokenizer" and "bytes" in caught.value.message


@pytest.mark.parametrize(
    "setting", [{"embedder": "tfidf:3-2"}, {"embedder": "nothing"}, {"factory": "Flatt"}, {"factory": "Flat,PQ7"}]
)
def test_settings_that_are_none_leave_nothing_behind(tmp_path, setting):
    with pytest.raises(UserError) as caught:
        build_index([written(tmp_path / "texts")], tmp_path / "index", chunk=16, **setting)
    assert caught.value.code == "unknown-setting" and [p.name for p in tmp_path.iterdir()] == ["texts"]


def test_a_build_goes_on_with_another_factory(tmp_path):
    """Where an index is too large for the chunks that there are, only the index is built again."""
    texts = written(tmp_path / "texts")
    with pytest.raises(UserError) as caught:
        build_index([texts], tmp_path / "index", chunk=16, factory="IVF4096,Flat")
    assert caught.value.code == "unknown-setting" and "another factory" in (caught.value.help or "")
    before = os.stat(tmp_path / "index.building/vectors/00000.npy").st_mtime_ns
    build_index([texts], tmp_path / "index", chunk=16)
    assert os.stat(tmp_path / "index/vectors/00000.npy").st_mtime_ns == before
    assert bytes_of(tmp_path / "index") == bytes_of(build_index([texts], tmp_path / "whole", chunk=16))


@pytest.mark.parametrize("chunks", [1, module.EXACT, module.EXACT + 1])
@pytest.mark.parametrize("width", [1, 48, 300, 1021])
def test_the_kind_of_index_fits_any_width(chunks, width):
    name = module._factory(chunks, width)
    assert (name == "Flat") == (chunks <= module.EXACT)
    module._empty(width, name)


def test_a_coarse_index_finds_what_is_there(tmp_path, monkeypatch):
    """IVF with product quantisation, as above the size of exact search: candidates are compared by their own vectors,
    so that scores are cosines and what is near comes first; the own document is never found."""
    monkeypatch.setattr(module, "SHARD", 100)
    source = np.random.Generator(np.random.Philox(3))
    texts = [" ".join(f"w{n}" for n in source.integers(0, 4000, 600)) for _ in range(12)]
    texts = written(tmp_path / "texts", texts)
    exact = Index(build_index([texts], tmp_path / "exact", chunk=32))
    index = Index(build_index([texts], tmp_path / "index", chunk=32, factory="IVF32,PQ4"))
    some = np.arange(5, 400, 7)
    vectors = np.concatenate([np.load(p) for p in sorted((index.folder / "vectors").glob("*.npy"))])
    own = [frozenset([int(index.hashes[index.chunks[i, 0]])]) for i in some]
    ids, scores = index.search(vectors[some], 4)
    assert np.mean(scores[:, 0] > 1 - 1e-5) > 0.9  # itself, or its like
    _, wanted = exact.search(vectors[some], 4, own)
    ids, scores = index.search(vectors[some], 4, own)
    assert np.mean(scores > wanted[:, 3:] - 1e-5) > 0.6  # among the exact four, or as near
    np.testing.assert_allclose(scores, np.einsum("nkd,nd->nk", vectors[ids], vectors[some]), atol=1e-5)
    assert (np.diff(scores) <= 0).all()
    assert not any(int(index.hashes[index.chunks[i, 0]]) in o for row, o in zip(ids, own, strict=True) for i in row)


def test_an_encoder_of_a_folder_embeds(tmp_path):
    """Any encoder: here a small one with random weights; the mean of its states over the tokens that there are."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted({w for t in TEXTS for w in t.split()})])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    index = Index(build_index([written(tmp_path / "texts")], tmp_path / "index", chunk=32, embedder=str(folder)))
    tokenizer = open_tokenizer("bytes")
    chunk = np.asarray(index.tokens[:32])
    with torch.no_grad():
        given = fast(tokenizer.decode(chunk.tolist()), return_tensors="pt")
        mean = model(**given).last_hidden_state[0].mean(0)
    wanted = (mean / mean.norm()).numpy()
    np.testing.assert_allclose(index.embed(chunk[None], tokenizer)[0], wanted, atol=1e-5)
    long = np.full((1, 4000), ord("a"), np.int32)  # more than the encoder has places for is cut
    long[:, ::2] = ord(" ")
    assert np.isfinite(index.embed(long, tokenizer)).all()
    with torch.no_grad():
        model.pooler.dense.weight.add_(1)
    model.save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        Index(index.folder).embed(chunk[None], tokenizer)
    assert caught.value.code == "bad-index"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = shutil.copytree(folder, tmp_path / f"without {name}")
        (broken / name).write_text("rubbish")
        with pytest.raises(UserError) as caught:
            build_index([tmp_path / "texts"], tmp_path / "other", chunk=32, embedder=str(broken))
        assert caught.value.code == "no-such-file" and broken.name in caught.value.message
    shutil.rmtree(folder)
    with pytest.raises(UserError) as caught:
        Index(index.folder).embed(chunk[None], tokenizer)
    assert caught.value.code == "no-such-file" and "encoder" in caught.value.message


def test_documents_are_known_by_their_tokens():
    a, b = np.arange(5), np.arange(5, 9)
    hashes = hashes_of(Corpus.of([a, b, a.astype(np.int32)]))
    assert hashes[0] == hashes[2] != hashes[1]


def test_on_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from heddle.runtime.cli import app

    monkeypatch.chdir(tmp_path)
    written(tmp_path / "texts")
    run = CliRunner()
    told = run.invoke(app, ["index", "build", "texts", "-o", "index", "--chunk", "16"])
    assert told.exit_code == 0, told.output
    told = run.invoke(app, ["index", "query", "index", "the shuttle can", "-k", "3", "--json"])
    rows = json.loads(told.stdout)
    assert len(rows) == 3 and rows[0]["document"] == 1 and rows[0]["score"] >= rows[1]["score"]
    whole = TEXTS[1] * 2
    assert rows[0]["text"] == whole[rows[0]["start"] : rows[0]["end"]]
    assert rows[0]["next"] == whole[rows[0]["end"] : rows[0]["end"] + 16]
    assert "shuttle" in run.invoke(app, ["index", "query", "index", "the shuttle can"]).stdout
    for command in (["query", "nowhere", "x"], ["build", "texts", "-o", "index"], ["build", "none", "-o", "other"]):
        told = run.invoke(app, ["index", *command])
        assert told.exit_code == 2 and "error[" in told.output
    assert not (tmp_path / "other").exists()
