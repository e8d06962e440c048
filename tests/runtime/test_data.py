"""Text to rows: sources, tokenizers, Megatron's index, packing, the split."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heddle.runtime.data import Corpus, Cursor, Packed, open_corpus, open_tokenizer, split
from heddle.runtime.data.indexed import MAGIC, read_index, write_index
from heddle.runtime.errors import UserError

BYTES = open_tokenizer("bytes")


def texts(corpus):
    starts = [0, *corpus.ends[:-1]]
    return [BYTES.decode(corpus.tokens[a:b].tolist()) for a, b in zip(starts, corpus.ends, strict=True)]


def refused(code, function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert caught.value.code == code
    return caught.value.message


# --- tokenizers ----------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    ids = BYTES.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert BYTES.decode(ids.tolist()) == text


def test_a_cut_character_is_shown_as_one_and_not_an_error():
    assert BYTES.decode([104, 0xC3]) == "h\ufffd"


def test_tokenizer_files(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"red": 0, "wool": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    words = open_tokenizer(tmp_path / "tokenizer.json")
    assert words.vocab == 3
    assert words.encode("wool red loom").tolist() == [1, 0, 2]
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json" in refused("bad-tokenizer", open_tokenizer, tmp_path / "bad.json")
    refused("no-such-file", open_tokenizer, tmp_path / "none.json")


# --- text ----------------------------------------------------------------------------------------


def test_folders_are_walked_in_order_of_names(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "d.bin.png", ".hidden/e.txt", "a/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"in {name}")
    (tmp_path / "empty.txt").write_text("")
    assert texts(open_corpus([tmp_path], BYTES)) == ["in a/z.txt", "in a.md", "in b.txt", "in sub/c.txt"]
    given = [tmp_path / "sub", tmp_path / "b.txt"]
    assert texts(open_corpus(given, BYTES)) == ["in sub/c.txt", "in b.txt"]


def test_a_folder_may_be_named_by_a_path_with_dots(tmp_path, monkeypatch):
    """Only what is hidden inside the folder is left out, not a folder that is reached through `..` or `.cache`."""
    (tmp_path / ".cache/texts").mkdir(parents=True)
    (tmp_path / ".cache/texts/a.txt").write_text("wool")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert texts(open_corpus([Path("../.cache/texts")], BYTES)) == ["wool"]


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "", "body": "x"}\n{"text": "zwei\u2028drei \x85"}\n', encoding="utf-8")
    assert texts(open_corpus([file], BYTES)) == ["one", "zwei\u2028drei \x85"]
    assert "a.jsonl`:1: " in refused("bad-line", open_corpus, [file], BYTES, field="body")


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('{"text": "x", }', ":2:"),
        ('{"text" "x"}', ":2:9"),
        ('{"other": "x"}', ":2:"),
        ('{"text": 3}', ":2:"),
        ('["text"]', ":2:"),
        ('{"text": "\\ud800"}', ":2:"),
        ("[" * 100_000, ":2:"),
    ],
    ids=["comma", "colon", "missing-field", "number", "list", "surrogate", "nested"],
)
def test_a_bad_line_is_named(tmp_path, line, place):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    message = refused("bad-line", open_corpus, [tmp_path / "a.jsonl"], BYTES)
    assert f"a.jsonl`{place}" in message


def test_what_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"wool \xff")
    assert "byte 5" in refused("not-text", open_corpus, [tmp_path], BYTES)
    (tmp_path / "a.txt").write_bytes(b"")
    refused("no-data", open_corpus, [tmp_path], BYTES)
    (tmp_path / "a.txt").unlink()
    refused("no-data", open_corpus, [tmp_path], BYTES)
    refused("no-such-file", open_corpus, [tmp_path / "none"], BYTES)
    (tmp_path / "b.txt").write_text("z")
    assert "122" in refused("token-out-of-range", open_corpus, [tmp_path], BYTES, vocab=122)
    open_corpus([tmp_path], BYTES, vocab=123)


# --- Megatron's index ----------------------------------------------------------------------------

documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9).map(lambda d: np.array(d, np.int32)), max_size=6)


@given(documents)
def test_index_round_trip(docs):
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder) / "d", docs)
        found = list(read_index(Path(folder) / "d.bin"))
    assert [d.tolist() for d in found] == [d.tolist() for d in docs]


@pytest.mark.parametrize(("code", "kind"), [(1, np.uint8), (3, np.int16), (5, np.int64), (8, np.uint16)])
def test_other_dtypes_and_documents_of_several_sequences(tmp_path, code, kind):
    np.arange(10, dtype=kind).tofile(tmp_path / "d.bin")
    size = np.dtype(kind).itemsize
    raw = MAGIC + struct.pack("<QBQQ", 1, code, 3, 3)
    raw += (
        np.array([4, 1, 5], np.int32).tobytes() + (np.array([0, 4, 5]) * size).tobytes() + np.array([0, 2, 3]).tobytes()
    )
    (tmp_path / "d.idx").write_bytes(raw)
    corpus = open_corpus([tmp_path / "d"], BYTES)
    assert corpus.tokens.tolist() == list(range(10))
    assert corpus.ends.tolist() == [5, 10]


@given(docs=documents.filter(len), data=st.data())
def test_a_cut_index_or_file_is_refused(docs, data):
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "d"
        write_index(at, docs)
        suffix = ".idx" if not sum(map(len, docs)) else data.draw(st.sampled_from([".bin", ".idx"]))
        raw = at.with_suffix(suffix).read_bytes()
        at.with_suffix(suffix).write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        refused("bad-index", lambda: list(read_index(at)))


@given(docs=documents.filter(len), data=st.data())
def test_a_garbled_index_never_breaks_the_reader(docs, data):
    """A flipped byte gives other documents or a named error, never another exception and never tokens from nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "d"
        write_index(at, docs)
        raw = bytearray(at.with_suffix(".idx").read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        at.with_suffix(".idx").write_bytes(raw)
        try:
            list(read_index(at))
        except UserError as error:
            assert error.code == "bad-index"


@pytest.mark.parametrize(
    ("lengths", "pointers", "bounds"),
    [([-1], [0], [0, 1]), ([2], [-8], [0, 1]), ([2], [1], [0, 1]), ([2], [0], [0, 2]), ([2, 2], [0, 8], [0, 2, 1]),
     ([9, 2], [0, 8], [0, 1, 2]), ([2], [0], [-1, 1])],
    ids=["length", "pointer", "between-tokens", "beyond", "backwards", "middle-too-long", "negative"],
)  # fmt: skip
def test_an_index_that_points_nowhere_is_refused(tmp_path, lengths, pointers, bounds):
    np.arange(4, dtype=np.int32).tofile(tmp_path / "d.bin")
    raw = MAGIC + struct.pack("<QBQQ", 1, 4, len(lengths), len(bounds)) + np.array(lengths, np.int32).tobytes()
    (tmp_path / "d.idx").write_bytes(
        raw + np.array(pointers, np.int64).tobytes() + np.array(bounds, np.int64).tobytes()
    )
    refused("bad-index", lambda: list(read_index(tmp_path / "d")))


def test_half_a_pair_is_named(tmp_path):
    write_index(tmp_path / "d", [np.arange(3)])
    (tmp_path / "d.idx").unlink()
    assert "d.idx" in refused("no-such-file", open_corpus, [tmp_path / "d.bin"], BYTES)


# --- packing -------------------------------------------------------------------------------------


def numbered(lengths):
    """Documents whose tokens name the document and the place in it."""
    return Corpus.of([np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)])


sizes = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@given(lengths=sizes, seq=st.integers(2, 9))
def test_a_token_belongs_to_the_document_that_its_id_says(lengths, seq):
    corpus = numbered(lengths)
    if len(corpus.tokens) < seq:
        refused("no-data", Packed, corpus, seq)
        return
    packed = Packed(corpus, seq)
    found = packed.rows(list(range(packed.num_rows)))
    assert found.tokens.shape == found.document.shape == (len(corpus.tokens) // seq, seq)
    assert found.tokens.dtype == found.document.dtype == torch.int64
    true = found.tokens // 1000
    assert torch.equal(found.document, true - true[:, :1])
    assert found.tokens.flatten().tolist() == corpus.tokens[: packed.num_rows * seq].tolist()


@given(lengths=sizes, seed=st.integers(0, 9), rows=st.integers(1, 5), epochs=st.integers(1, 3))
def test_each_epoch_is_a_permutation_of_all_rows(lengths, seed, rows, epochs):
    packed = Packed(numbered([*lengths, 2]), 2, seed)
    cursor, seen = Cursor(), []
    while cursor.row < epochs * packed.num_rows:
        batch, cursor = packed.batch(cursor, rows)
        assert len(batch.tokens) == rows
        seen += batch.tokens.tolist()
    everything = sorted(packed.rows(list(range(packed.num_rows))).tokens.tolist())
    for epoch in range(epochs):
        assert sorted(seen[epoch * packed.num_rows : (epoch + 1) * packed.num_rows]) == everything


@given(lengths=sizes, place=st.integers(0, 60), rows=st.integers(1, 4))
def test_a_cursor_needs_no_history(lengths, place, rows):
    corpus = numbered([*lengths, 2])
    walked, fresh = Packed(corpus, 2, 7), Packed(corpus, 2, 7)
    cursor = Cursor()
    for _ in range(place):
        _, cursor = walked.batch(cursor, 1)
    assert cursor == Cursor(place)
    a, b = walked.batch(cursor, rows), fresh.batch(Cursor(place), rows)
    assert torch.equal(a[0].tokens, b[0].tokens)
    assert torch.equal(a[0].document, b[0].document)
    assert a[1] == b[1] == Cursor(place + rows)


def test_seeds_and_epochs_have_their_own_orders():
    corpus = numbered([200])

    def order(seed, epoch):
        return Packed(corpus, 2, seed).batch(Cursor(100 * epoch), 100)[0].tokens.tolist()

    orders = [order(s, e) for s in (0, 1) for e in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=4, max_size=30, unique=True), st.randoms())
def test_the_split_follows_from_a_document_alone(contents, random):
    def sides(chosen):
        corpus = Corpus.of([np.frombuffer(c, np.uint8).astype(np.int32) for c in chosen])
        try:
            return [documents_of(c) for c in split(corpus, 0.3)]
        except UserError as error:
            assert error.code == "no-data"
            return set(), documents_of(corpus)

    kept, held = sides(contents)
    assert not kept & held
    assert kept | held == set(contents)
    kept_again, held_again = sides(random.sample(contents, len(contents) // 2))
    assert kept_again <= kept
    assert held_again <= held


def documents_of(corpus):
    starts = [0, *corpus.ends][: len(corpus.ends)]
    return {bytes(corpus.tokens[a:b].tolist()) for a, b in zip(starts, corpus.ends, strict=True)}


def test_the_share_that_is_held_out():
    corpus = Corpus.of([np.array([i, i + 1], np.int32) for i in range(2000)])
    kept, held = split(corpus, 0.1)
    assert kept.num_documents + held.num_documents == 2000
    assert 150 < held.num_documents < 250
    refused("no-data", split, corpus.select([0]), 1.0)


def test_json_of_a_line_may_hold_any_text(tmp_path):
    strange = ["a\nb", "\u2029", "\x1c", "é\r\nü"]
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps({"text": s}, ensure_ascii=False) + "\r\n" for s in strange).encode()
    )
    assert texts(open_corpus([tmp_path], BYTES)) == strange
