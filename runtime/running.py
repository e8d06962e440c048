"""`heddle train` and `heddle generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ..dsl.load import load
from ..lowering.passes.stream import require_causal
from ..lowering.pipeline import lower
from .check import program_of
from .compile import build, instantiate
from .data import Packed, open_corpus, open_tokenizer, split
from .errors import UserError
from .folder import load as load_folder
from .folder import read_spec, write_spec
from .paths import split_entry
from .train import Report, TrainConfig, train
from .train.checkpoint import latest


def train_model(
    spec: str, overrides: dict[str, Any], data: list[Path], out: Path, tokenizer: str, held_out: float, resume: bool,
    **settings: Any,
) -> Report:  # fmt: skip
    """Compile a model, train it on text, and leave in `out` all that `heddle generate` and `--resume` need."""
    path, name = split_entry(spec)
    file = load(path)
    program = program_of(file, name, overrides)
    if not program.objectives:
        raise UserError(
            "no-objective", f"`{program.name}` has no `tokens` and `logits`, so next tokens cannot train it"
        )
    config = TrainConfig(**settings)
    words = open_tokenizer(tokenizer)
    corpus = open_corpus(data, words, vocab=_vocab(program))
    kept, held = split(corpus, held_out) if held_out > 0 else (corpus, None)
    model = instantiate(build(program), seed=config.seed)
    rows = Packed(kept, config.seq, config.seed)
    others = Packed(held, config.seq) if held is not None and len(held.tokens) >= config.seq else None
    # A run that is there keeps its spec, also where `train` refuses to go on with it.
    if latest(out / "checkpoints") is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_spec(out, file, program.name, overrides)
            (out / "tokenizer.txt").write_text(tokenizer + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError("cannot-write", f"cannot write to `{out}`: {error.strerror}") from None
    return train(model, rows, config, out, others, resume)


def _vocab(program: Any) -> int | None:
    value = program.arguments.get("vocab")
    return value if isinstance(value, int) else None


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder: the one it was trained with, its tokenizer.json, else bytes."""
    if (folder / "tokenizer.txt").is_file():
        return open_tokenizer((folder / "tokenizer.txt").read_text(encoding="utf-8").strip())
    if (folder / "tokenizer.json").is_file():
        return open_tokenizer(folder / "tokenizer.json")
    return open_tokenizer("bytes")


def generate_text(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int | None,
) -> str:  # fmt: skip
    """Continue a prompt, printing as it goes; gives the whole text. Raises `SpecError`
    `not-causal`, UserError `bad-prompt`."""
    model = load_folder(folder)
    if model.late:
        require_causal(lower(program_of(*read_spec(folder))))
    words = tokenizer_of(folder)
    ids = torch.from_numpy(words.encode(prompt).astype("int64"))[None]
    shown = _Printer(words, ids[0].tolist())
    try:
        made = model.generate(ids, max_new_tokens, temperature, top_k, top_p, seed, on_token=shown)
    except ValueError as error:
        raise UserError("bad-prompt", str(error)) from None
    shown.finish()
    return words.decode(made[0].tolist())


class _Printer:
    """Prints text as tokens come; characters that are not whole yet wait for their rest."""

    def __init__(self, tokenizer: Any, ids: list[int]):
        self.tokenizer, self.ids, self.done = tokenizer, list(ids), ""
        self._print()

    def __call__(self, new: torch.Tensor) -> None:
        self.ids.append(int(new[0]))
        self._print()

    def _print(self, last: bool = False) -> None:
        text = self.tokenizer.decode(self.ids)
        whole = text if last else text.rstrip("\ufffd")
        if whole.startswith(self.done):
            sys.stdout.write(whole[len(self.done) :])
            sys.stdout.flush()
            self.done = whole

    def finish(self) -> None:
        self._print(last=True)
        sys.stdout.write("\n")
