"""Folders on disk: what a Hugging Face folder holds, and new folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tensors import Tensors

BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What lies beside the weights and goes along unchanged: the tokenizer, and how to sample."""


def open_folder(source: str | Path) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors of a folder with config.json and safetensors, whole or in shards; no weight is read.

    Raises UserError: no-such-file, broken-config, no-weights, damaged-weights.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError("no-such-file", f"there is no folder `{source}`")
    config = read_config_file(source / "config.json")
    return config, Tensors(weight_files(source))


def read_config_file(path: Path) -> dict[str, Any]:
    """config.json as data. Raises UserError `broken-config` with line and column, `no-such-file`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "no-such-file", f"there is no `{path}`", help="a Hugging Face folder has a config.json"
        ) from None
    except OSError as error:
        raise UserError("no-such-file", f"`{path}` cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError("broken-config", f"`{path}`:{error.lineno}:{error.colno}: {_lower(error.msg)}") from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise UserError("broken-config", f"`{path}` is no JSON text") from None
    if not isinstance(config, dict):
        raise UserError("broken-config", f"`{path}` is not an object of fields")
    return config


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def architecture(config: dict[str, Any], source: Path) -> str:
    """The class that a config names. Raises UserError `broken-config`."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise UserError(
            "broken-config",
            f"`{source / 'config.json'}` names no architecture",
            help='it should say "architectures": ["..."]',
        )
    return named[0]


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those of its index. Raises UserError `no-weights`, `broken-config`."""
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    index = source / "model.safetensors.index.json"
    if index.is_file():
        return [source / name for name in _shards(index)]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in source.glob(pattern))
    help = "convert it with transformers: model.save_pretrained(folder)" if pickled else None
    what = f" (`{pickled[0]}` is a pickle, which could run code and is not read)" if pickled else ""
    raise UserError("no-weights", f"`{source}` has no safetensors file{what}", help=help)


def _shards(index: Path) -> list[str]:
    """The files that an index names; they lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError("broken-config", f"`{index}` is no index of weights") from None
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UserError("broken-config", f"`{index}` names {name!r}, which is no safetensors file beside it")
    return names


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all went well; else nothing is left.

    Raises UserError: already-there, cannot-write.
    """
    if out.exists() or out.is_symlink():
        raise UserError("already-there", f"`{out}` exists already", help="choose another folder with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{out.parent}`: {error.strerror}") from None
    try:
        yield partial
        _keep(partial)
        partial.chmod(0o777 & ~_umask())
        partial.rename(out)
        _keep(out.parent)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write `{out}`: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _keep(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def copy_beside(source: Path, out: Path) -> None:
    """Take the tokenizer and its like along."""
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
