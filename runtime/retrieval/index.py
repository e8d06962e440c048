"""An index of documents: their chunks as tokens in memory-mapped files, and a Faiss index of the chunks' vectors.

On disk a folder: `manifest.json` (what it was made of and the checksum of each file), `tokens.npy` and `ends.npy` (the
documents), `chunks.npy` (document, start, end of each chunk), `hashes.npy` (of each document), `vectors/*.npy`,
`learnt.npy` (of the embedder) and `faiss.index`. It is built beside its place and moved there whole; what an
interrupted build has embedded is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Corpus, Tokenizer, open_corpus, open_tokenizer
from ..errors import UserError
from .embedders import open_embedder

FORMAT = "heddle-index-2"
EXACT = 200_000
"""Up to so many chunks every vector is compared."""
SHARD = 1 << 14
"""Chunks of one file of vectors."""
SAMPLE = 1 << 18
"""Vectors that a coarse index is trained on, at most."""
ASKED = 200
"""Candidates of a coarse index, at least, whose vectors are then compared (Borgeaud et al. 2022 query as many)."""
_PARTIAL = ".building"
_MANIFEST = "manifest.json"


def faiss_module() -> Any:
    """Faiss, which is an extra. Raises UserError `unknown-setting`."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "unknown-setting", "retrieval needs the package `faiss-cpu`", help="pip install 'heddle-lang[retrieval]'"
        ) from None
    return faiss


def chunks_of(ends: np.ndarray, length: int) -> np.ndarray:
    """int64 [chunks, 3]: document, start and end of each; a document's last chunk may be shorter."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    counts = -(-(ends - starts) // length)
    document = np.repeat(np.arange(len(ends)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = starts[document] + within * length
    return np.stack([document, start, np.minimum(start + length, ends[document])], 1).astype(np.int64)


def hashes_of(corpus: Corpus) -> np.ndarray:
    """uint64 [documents]: what a document is known by, wherever it lies."""
    starts = np.concatenate([[0], corpus.ends[:-1]])
    pieces = [corpus.tokens[s:e].astype(np.int64).tobytes() for s, e in zip(starts, corpus.ends, strict=True)]
    return np.array([int.from_bytes(hashlib.sha256(p).digest()[:8], "little") for p in pieces], np.uint64)


def rows_of(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """int32 [n, length] of tokens[start:end], -1 behind the end."""
    at = starts[:, None] + np.arange(length)
    return np.where(at < ends[:, None], tokens[np.minimum(at, len(tokens) - 1)], -1).astype(np.int32)


def build_index(
    data: Sequence[Path], out: Path, tokenizer: str = "bytes", chunk: int = 64, embedder: str = "tfidf",
    factory: str | None = None, on_shard: Callable[[int, int], None] | None = None,
) -> Path:  # fmt: skip
    """Index the documents of some data. `factory` is Faiss's word for the kind of index: exact up to `EXACT` chunks,
    IVF with product quantisation above. `on_shard` hears how many shards of how many are embedded.

    A build that was interrupted goes on, if need be with another `factory`. Raises UserError: already-there, other-run,
    cannot-write, unknown-setting, and what reading the data raises.
    """
    if out.exists():
        raise UserError("already-there", f"`{out}` is there already", help="another folder, or remove it")
    words = open_tokenizer(tokenizer)
    embed = open_embedder(embedder, words)
    corpus = open_corpus(data, words)
    chunks = chunks_of(corpus.ends, chunk)
    plan = {
        "format": FORMAT, "tokenizer": tokenizer_identity(tokenizer), "vocab": words.vocab, "chunk": chunk,
        "embedder": embed.name, "embedder_identity": embed.identity,
        "factory": factory or _factory(len(chunks), embed.width),
        "documents": corpus.num_documents, "chunks": len(chunks),
        "text": hashlib.sha256(corpus.tokens.tobytes() + corpus.ends.tobytes()).hexdigest(),
    }  # fmt: skip
    made = _empty(embed.width, str(plan["factory"]))
    partial = out.with_name(out.name + _PARTIAL)
    try:
        _take_up(partial, plan)
        _write(partial / "tokens.npy", corpus.tokens.astype(np.int32))
        _write(partial / "ends.npy", corpus.ends.astype(np.int64))
        _write(partial / "chunks.npy", chunks)
        _write(partial / "hashes.npy", hashes_of(corpus))
        shards = [chunks[i : i + SHARD] for i in range(0, len(chunks), SHARD)]
        blocks = (rows_of(corpus.tokens, s[:, 1], s[:, 2], chunk) for s in shards)
        if not (partial / "learnt.npy").is_file():
            learnt = embed.learn(blocks)
            if learnt is not None:
                _write(partial / "learnt.npy", learnt)
        learnt = np.load(partial / "learnt.npy") if (partial / "learnt.npy").is_file() else None
        vectors = []
        for i, shard in enumerate(shards):
            path = partial / "vectors" / f"{i:05}.npy"
            if not path.is_file():
                _write(path, embed.embed(rows_of(corpus.tokens, shard[:, 1], shard[:, 2], chunk), learnt))
            vectors.append(np.load(path))
            if on_shard is not None:
                on_shard(i + 1, len(shards))
        _fill(made, np.concatenate(vectors), str(plan["factory"]))
        faiss_module().write_index(made, str(partial / "faiss.index.part"))
        os.replace(partial / "faiss.index.part", partial / "faiss.index")
        files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != _MANIFEST)
        _note(partial, {**plan, "files": {p.relative_to(partial).as_posix(): checksum(p) for p in files}})
        os.replace(partial, out)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{partial}`: {error.strerror}") from None
    return out


def tokenizer_identity(name: str) -> str:
    """`bytes`, or the checksum of the file."""
    return name if name == "bytes" else f"sha256:{checksum(Path(name))}"


def _factory(chunks: int, width: int) -> str:
    """Exact, or inverted lists of codes of at most 32 bytes: as many as divide the width."""
    codes = next(m for m in range(min(32, width), 0, -1) if width % m == 0)
    return "Flat" if chunks <= EXACT else f"IVF{2 ** round(np.log2(4 * chunks**0.5))},PQ{codes}"


def _take_up(partial: Path, plan: dict[str, Any]) -> None:
    """Begin a build, or go on with the one that is there: its manifest says no files yet, or was just to be moved.
    Raises UserError `other-run`."""
    if partial.exists():
        try:
            known = json.loads((partial / _MANIFEST).read_text(encoding="utf-8"))
            same = all(known[key] == value for key, value in plan.items() if key != "factory")
        except FileNotFoundError:  # killed between the folder and its manifest
            same = partial.is_dir() and all(p.name == f"{_MANIFEST}.part" for p in partial.iterdir())
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                "other-run",
                f"`{partial}` holds a build of other data or settings",
                help="remove it, or build elsewhere",
            )
    partial.mkdir(parents=True, exist_ok=True)
    _note(partial, plan)
    (partial / "vectors").mkdir(exist_ok=True)


def _note(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with a checksum of its own; whole or not at all."""
    part = folder / f"{_MANIFEST}.part"
    part.write_text(json.dumps({**manifest, "self": _sum(manifest)}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / _MANIFEST)


def _sum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, array: np.ndarray) -> None:
    """A file that is whole or not there."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, path)


def _empty(width: int, factory: str) -> Any:
    """Raises UserError `unknown-setting` for a factory that Faiss does not have for vectors of this width."""
    faiss = faiss_module()
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise UserError(
            "unknown-setting",
            f"Faiss has no index `{factory}` of vectors of {width} numbers",
            help=f"for example Flat, or {_factory(EXACT + 1, width)}",
        ) from None


def _fill(made: Any, vectors: np.ndarray, factory: str) -> None:
    """Train the index where it must be, and add all vectors."""
    if not made.is_trained:
        order = np.random.Generator(np.random.Philox(0)).permutation(len(vectors))[:SAMPLE]
        try:
            made.train(vectors[np.sort(order)])
        except RuntimeError as error:
            reason = str(error).split(": ")[-1]
            raise UserError(
                "unknown-setting",
                f"`{factory}` cannot be trained on {len(order)} chunks: {reason}",
                help="what is embedded is kept: the same build goes on with another factory, for example Flat",
            ) from None
        if hasattr(made, "nprobe"):
            made.nprobe = max(16, made.nlist // 8)
    made.add(vectors)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Found:
    """A chunk that was found: its number, how near it is (the cosine), the text's document and where it lies there."""

    chunk: int
    score: float
    document: int
    start: int
    end: int


class Index:
    """An index that is there. Raises UserError `no-such-file`, `bad-index`."""

    def __init__(self, folder: Path):
        if not (folder / _MANIFEST).is_file():
            building = folder.with_name(folder.name + _PARTIAL).is_dir()
            raise UserError(
                "no-such-file",
                f"there is no index `{folder}`",
                help="its build was interrupted: the same `heddle index build` goes on with it" if building else
                "`heddle index build TEXT... -o FOLDER` makes one",
            )  # fmt: skip
        self.folder = folder
        self.manifest = self._read()
        arrays = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("tokens", "ends", "chunks", "hashes")]
        self.tokens, self.ends, self.chunks, self.hashes = arrays
        self.chunk = int(self.manifest["chunk"])
        self._faiss = faiss_module().read_index(str(folder / "faiss.index"))
        self._vectors = None if self.manifest["factory"] == "Flat" else self._stored()
        self._learnt = np.load(folder / "learnt.npy") if (folder / "learnt.npy").is_file() else None
        self._embedder: Any = None

    def _read(self) -> dict[str, Any]:
        path = self.folder / _MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            form, own = manifest.get("format"), manifest.pop("self", None)
        except (ValueError, AttributeError) as error:
            raise UserError("bad-index", f"`{path}` is damaged: {error}", help="build the index again") from None
        if form != FORMAT:
            raise UserError(
                "bad-index", f"`{path}` is of the format {form}, this reads {FORMAT}", help="build the index again"
            )
        if own != _sum(manifest):
            raise UserError(
                "bad-index", f"`{path}` has another content than when it was built", help="build the index again"
            )
        for name, wanted in manifest["files"].items():
            file = self.folder / name
            if not file.is_file() or checksum(file) != wanted:
                what = "has another content than when it was built" if file.is_file() else "is missing"
                raise UserError("bad-index", f"`{file}` {what}", help="build the index again")
        return manifest

    def check_tokenizer(self, name: str) -> None:
        """Raises UserError `bad-tokenizer` for another tokenizer than the index's."""
        mine, theirs = self.manifest["tokenizer"], tokenizer_identity(name)
        if mine != theirs:
            raise UserError(
                "bad-tokenizer",
                f"`{self.folder}` was built with the tokenizer {mine}, this is {theirs}",
                help="build an index with this tokenizer",
            )

    def embed(self, chunks: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """Vectors of chunks int32 [n, length]. Raises UserError `bad-index` where the encoder has changed."""
        if self._embedder is None:
            name = self.manifest["embedder"]
            if not name.startswith("tfidf") and not Path(name).is_dir():
                raise UserError("no-such-file", f"the encoder of `{self.folder}`, `{name}`, is not there")
            self._embedder = open_embedder(name, tokenizer)
            if self._embedder.identity != self.manifest["embedder_identity"]:
                raise UserError("bad-index", f"the encoder of `{self.folder}` is not the one that it was built with")
        made: np.ndarray = self._embedder.embed(chunks, self._learnt)
        return made

    def search(
        self, vectors: np.ndarray, k: int, without: Sequence[frozenset[int]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chunks int64 [n, k] and cosines float32 [n, k], nearest first; -1 where there are no more.

        without: for each vector the hashes of documents that must not be found.
        """
        count, total, coarse = len(vectors), len(self.chunks), self._vectors is not None
        ids, scores = np.full((count, k), -1, np.int64), np.zeros((count, k), np.float32)
        waiting = np.arange(count)
        ask = max(k, ASKED) if coarse else k
        while len(waiting):
            ask = min(ask * 4 if without is not None else ask, total)
            near, found = self._faiss.search(np.ascontiguousarray(vectors[waiting]), ask)
            if coarse:
                near, found = self._exactly(vectors[waiting], found)
            left = []
            for row, (i, these, cosines) in enumerate(zip(waiting.tolist(), found, near, strict=True)):
                kept = these >= 0
                if without is not None and without[i]:
                    hashes = self.hashes[self.chunks[np.maximum(these, 0), 0]]
                    kept &= ~np.isin(hashes, np.array(sorted(without[i]), np.uint64))
                places = np.flatnonzero(kept)[:k]
                if len(places) < k and ask < total:
                    left.append(row)
                ids[i], scores[i] = -1, 0
                ids[i, : len(places)], scores[i, : len(places)] = these[places], cosines[places]
            waiting = waiting[left]
        return ids, scores

    def _stored(self) -> list[np.ndarray]:
        """The vectors of all chunks, in files of `SHARD`, memory-mapped."""
        paths = sorted((self.folder / "vectors").glob("*.npy"))
        return [np.load(path, mmap_mode="r") for path in paths]

    def _exactly(self, vectors: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates int64 [n, ask] by the cosines of their vectors, not of their codes; -1 goes last."""
        assert self._vectors is not None
        near = np.full(found.shape, -np.inf, np.float32)
        starts = np.cumsum([0, *(len(v) for v in self._vectors)])
        for start, shard in zip(starts, self._vectors, strict=False):
            row, place = np.nonzero((found >= start) & (found < start + len(shard)))
            near[row, place] = np.einsum("nd,nd->n", shard[found[row, place] - start], vectors[row])
        order = np.argsort(-near, axis=1, kind="stable")
        return np.take_along_axis(near, order, 1), np.take_along_axis(found, order, 1)

    def text(self, ids: np.ndarray, length: int) -> np.ndarray:
        """int64 [*, length]: of each chunk its tokens and what follows in its document; 0 behind the document's end,
        and for -1."""
        flat = np.maximum(ids.ravel(), 0)
        rows = self.chunks[flat]
        found = rows_of(self.tokens, np.asarray(rows[:, 1]), np.asarray(self.ends[rows[:, 0]]), length)
        found = np.where((ids.ravel() >= 0)[:, None] & (found >= 0), found, 0)
        return found.reshape(*ids.shape, length).astype(np.int64)

    def found(self, ids: np.ndarray, scores: np.ndarray) -> Iterator[Found]:
        """What ids [k] are."""
        for chunk, score in zip(ids, scores, strict=True):
            if chunk >= 0:
                document, start, end = (int(x) for x in self.chunks[chunk])
                begun = int(self.ends[document - 1]) if document else 0
                yield Found(int(chunk), float(score), document, start - begun, end - begun)
