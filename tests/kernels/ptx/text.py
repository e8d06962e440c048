"""PTX text to instructions: labels and registers of inner braces get names of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """`guard`: a predicate's name and whether it is negated. Operands as text, those in braces as a tuple."""

    op: str
    operands: tuple[str | tuple[str, ...], ...]
    guard: tuple[str, bool] | None
    line: str

    @property
    def words(self) -> list[str]:
        return self.op.split(".")


@dataclass
class Program:
    """One kernel: instructions, labels by name, bits of registers by prefix or name, parameters, threads of a CTA."""

    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    threads: int = 0


_WIDTH = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u32": 32, "s32": 32, "u64": 64}


def parse(text: str) -> Program:
    """The only kernel of a module's text."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text[: text.index("\n{")], text[text.index("\n{") + 2 : text.rindex("}")]
    program = Program(threads=int(re.search(r"\.reqntid (\d+)", head)[1]))  # type: ignore[index]
    found = re.findall(r"\.param[^,\n]*?\s(\w+_param_\d+)(?:\[(\d+)\])?", head)
    program.params = {name: i for i, (name, _) in enumerate(found)}
    program.sizes = [int(size or 4) for _, size in found]
    scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
    count, at = 0, 0
    while at < len(body):
        if body[at].isspace():
            at += 1
        elif body[at] == "{":
            count += 1
            inner = body[at + 1 : _closing(body, at)]
            own = re.findall(r"^\s*(\w+):", inner, re.M) + [n for d in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", inner) for n in re.findall(r"[%\w]+", d)]
            scopes.append((count, {name: f"{name}~{count}" for name in own}))
            at += 1
        elif body[at] == "}":
            scopes.pop()
            at += 1
        elif label := re.compile(r"([$\w]+):").match(body, at):
            program.labels[_renamed(label[1], scopes)] = len(program.code)
            at = label.end()
        else:
            end = body.index(";", at)
            _statement(" ".join(body[at:end].split()), program, scopes)
            at = end + 1
    return program


def _closing(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError("a brace is not closed")


def _renamed(name: str, scopes: list[tuple[int, dict[str, str]]]) -> str:
    return next((own[name] for _, own in reversed(scopes) if name in own), name)


def _statement(line: str, program: Program, scopes: list[tuple[int, dict[str, str]]]) -> None:
    if line.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", line).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            name = re.sub(r"<\d+>", "", name.strip())
            program.widths[_renamed(name, scopes)] = _WIDTH[kind]
        return
    if line.startswith("."):
        return
    guard = None
    if line.startswith("@"):
        first, line = line.split(None, 1)
        guard = (_renamed(first.lstrip("@!"), scopes), "!" in first)
    op, _, rest = line.partition(" ")
    if "[" in op:  # a space is missing before an address
        op, rest = op[: op.index("[")], op[op.index("[") :] + " " + rest
    operands = []
    for word in _split(rest):
        if word.startswith("{"):
            operands.append(tuple(_renamed(w, scopes) for w in _split(word[1:-1])))
        else:
            operands.append(re.sub(r"[%$\w]+", lambda m: _renamed(m[0], scopes), word))
    program.code.append(Instruction(op, tuple(operands), guard, line))


def _split(text: str) -> list[str]:
    """At commas outside of brackets, and at the bar between two results."""
    found, depth, begin = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(c, 0)
        if c in ",|" and not depth:
            found.append(text[begin:i].strip())
            begin = i + 1
    return [w for w in found if w]
