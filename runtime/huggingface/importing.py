"""From a Hugging Face folder to a model folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...dsl.checkpoint import CallValue, Entry, TensorMap, read_config
from ...dsl.load import File, load, shipped_folder
from ..check import program_of
from ..errors import UserError
from .maps import for_architecture, map_of
from .moving import fits, take_apart
from .tensors import Tensors, writing

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def import_folder(source: str | Path, out: str | Path) -> Path:
    """Write `out/model.spec`, `out/model.safetensors` and `out/config.json` (kept for the way back) from a folder with
    config.json and safetensors; gives `out`.

    Everything is checked before a byte is written, and `out` appears whole or not at all.
    Raises `SpecError` (the map does not hold), UserError: broken-config, unknown-architecture, missing-tensor,
    extra-tensor, misshapen-tensor, damaged-weights, cannot-write, already-there.
    """
    source, out = Path(source), Path(out)
    config = read_config_file(source / "config.json")
    file, checkpoint = for_architecture(_architecture(config, source))
    parameters = tuple(p.name for p in file.declared[checkpoint.model.id].parameters)  # type: ignore[union-attr]
    arguments = read_config(checkpoint, config, parameters)
    if out.exists():
        raise UserError("already-there", f"`{out}` exists already", help="choose another folder with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        raise UserError("cannot-write", f"cannot write to `{out.parent}`: {error.strerror}") from None
    try:
        _write_spec(partial / "model.spec", file, checkpoint.model.id, arguments)
        spec = load(partial / "model.spec", root=partial)
        program = program_of(spec)
        mapped = map_of(checkpoint, program, arguments)
        tensors = Tensors(weight_files(source))
        check_tensors(mapped, tensors)
        _write_weights(partial / "model.safetensors", mapped, tensors)
        shutil.copyfile(source / "config.json", partial / "config.json")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.chmod(0o755)
        partial.rename(out)
    except OSError as error:
        raise UserError("cannot-write", f"cannot write `{out}`: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def read_config_file(path: Path) -> dict[str, Any]:
    """config.json as data. Raises UserError `broken-config` with line and column."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no-such-file", f"there is no `{path}`", help="a Hugging Face folder has a config.json") from None
    except OSError as error:
        raise UserError("no-such-file", f"`{path}` cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError("broken-config", f"`{path}`:{error.lineno}:{error.colno}: {error.msg.lower()}") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError("broken-config", f"`{path}` is no JSON text") from None
    if not isinstance(config, dict):
        raise UserError("broken-config", f"`{path}` is not an object of fields")
    return config


def _architecture(config: dict[str, Any], source: Path) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise UserError("broken-config", f"`{source / 'config.json'}` names no architecture",
                        help='it should say "architectures": ["..."]')
    return named[0]


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those of its index. Raises UserError."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError("broken-config", f"`{index}` is no index of weights") from None
        return [source / name for name in names]
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    pickled = sorted(p.name for p in source.glob("*.bin"))
    help = "convert it with transformers: model.save_pretrained(folder)" if pickled else None
    what = f" (`{pickled[0]}` is a pickle, which could run code and is not read)" if pickled else ""
    raise UserError("no-weights", f"`{source}` has no safetensors file{what}", help=help)


def check_tensors(mapped: TensorMap, tensors: Tensors) -> None:
    """Every tensor that the map wants is there and fits; none is left over. Raises UserError with all that is wrong."""
    wanted = {e.theirs: e for e in mapped.entries}
    missing = [n for n in wanted if n not in tensors]
    extra = [n for n in tensors.names() if n not in wanted and not mapped.is_ignored(n)]
    wrong = [n for n in wanted if n in tensors and not fits(wanted[n], tensors.shape(n))]
    problems = [f"missing: `{n}` {list(wanted[n].shape)}" for n in missing]
    problems += [f"extra: `{n}` {list(tensors.shape(n))}" for n in extra]
    problems += [f"misshapen: `{n}` is {list(tensors.shape(n))}, the spec says {list(wanted[n].shape)}" for n in wrong]
    if problems:
        code = "missing-tensor" if missing else "extra-tensor" if extra else "misshapen-tensor"
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(code, "the weights do not fit the spec\n  " + "\n  ".join(problems[:12]) + more)


def _write_weights(path: Path, mapped: TensorMap, tensors: Tensors) -> None:
    about = {p.name: (tensors.dtype(e.theirs), p.shape) for e in mapped.entries for p in e.pieces}
    with writing(path, about) as put:
        for entry in mapped.entries:
            for name, tensor in take_apart(entry, tensors.get(entry.theirs)).items():
                put(name, tensor)


def _write_spec(path: Path, file: File, model: str, arguments: dict[str, Any]) -> None:
    used = file.path.relative_to(shipped_folder()).as_posix()
    lines = [f"    {name} = {_text(value)}," for name, value in arguments.items()]
    lines[-1] = lines[-1].rstrip(",") + ")"
    text = f'use {model} from "{used}"\n\nmodel imported = {model}(\n' + "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")


def _text(value: Any) -> str:
    """A value as the language writes it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, CallValue):
        given = ", ".join(_text(v) if n is None else f"{n} = {_text(v)}" for n, v in value.arguments)
        return f"{value.name}({given})" if value.arguments else value.name
    return repr(value)


__all__ = ["Entry", "import_folder"]
