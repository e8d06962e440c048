"""`heddle index build` and `heddle index query`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from .asked import reported

app = typer.Typer(help="Indexes of text, for models that retrieve.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def build(
    data: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="text files or folders, .jsonl, .bin/.idx")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the index's folder")],
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or a tokenizer.json")] = "bytes",
    chunk: Annotated[int, typer.Option(min=1, help="tokens of a chunk")] = 64,
    embedder: Annotated[str, typer.Option(help="`tfidf`, or a folder with an encoder of Hugging Face")] = "tfidf",
    factory: Annotated[str | None, typer.Option(help="Faiss's word for the index; exact below 200,000 chunks")] = None,
) -> None:
    """Cut documents into chunks, embed them and index the vectors; an interrupted build goes on."""
    from .retrieval import build_index

    def shown(done: int, shards: int) -> None:
        typer.echo(f"embedded {done} of {shards} shards", err=True)

    with reported():
        build_index(data, out, tokenizer, chunk, embedder, factory, shown)
        typer.echo(str(out))


@app.command()
def query(
    index: Annotated[Path, typer.Argument(help="the index's folder")],
    text: Annotated[str, typer.Argument(help="what to look for")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many chunks")] = 2,
    tokenizer: Annotated[str, typer.Option(help="the tokenizer that the index was built with")] = "bytes",
    json: Annotated[bool, typer.Option("--json", help="plain data for tools")] = False,
) -> None:
    """The chunks that are nearest to a text, with what follows them."""
    import numpy as np

    from .data import open_tokenizer
    from .retrieval import Index

    with reported():
        opened, words = Index(index), open_tokenizer(tokenizer)
        opened.check_tokenizer(tokenizer)
        chunk = words.encode(text)[None].astype(np.int32)
        ids, scores = opened.search(opened.embed(chunk, words), min(k, len(opened.chunks)))
        rows = []
        for found in opened.found(ids[0], scores[0]):
            tokens = opened.text(np.array([found.chunk]), 2 * opened.chunk)[0]
            begun = int(opened.ends[found.document - 1]) if found.document else 0
            size = min(2 * opened.chunk, int(opened.ends[found.document]) - begun - found.start)
            own = found.end - found.start
            rows.append({
                "score": round(found.score, 4), "document": found.document, "start": found.start, "end": found.end,
                "text": words.decode(tokens[:own].tolist()), "next": words.decode(tokens[own:size].tolist()),
            })  # fmt: skip
        if json:
            typer.echo(json_format.dumps(rows, indent=1))
            return
        for row in rows:
            typer.echo(f"{row['score']:.4f}  document {row['document']}, tokens {row['start']} to {row['end']}")
            typer.echo(f"{row['text']!r}\n  followed by {row['next']!r}")
