"""CPU code of pointwise chains: one expression, with a fused function of the library where there is one."""

from __future__ import annotations

from typing import Any

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "pow": "**", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "eq": "==", "ne": "!=", "logical_and": "&", "logical_or": "|",
}  # fmt: skip
CALLS = {
    "exp": "torch.exp", "log": "torch.log", "sqrt": "torch.sqrt", "abs": "torch.abs", "sigmoid": "torch.sigmoid",
    "silu": "F.silu", "relu": "F.relu", "relu2": "lib.relu2", "tanh": "torch.tanh", "softplus": "F.softplus",
    "sign": "torch.sign", "log_sigmoid": "F.logsigmoid", "sin": "torch.sin", "cos": "torch.cos", "gelu": "F.gelu",
}  # fmt: skip


def emit(use: Any) -> str:
    """The expression."""
    name, args = use.op, use.aligned
    if name == "where":
        x, y = (a if a is not None else use.literal(n) for n, a in zip("xy", args[1:], strict=True))
        return f"torch.where({args[0]}, {x}, {y})"
    if use.node.results[0].type.kind == "real":
        args = [_real(use, i, a) for i, a in enumerate(args)]
    scalars = [use.literal(n) for n in ("x", "y")]
    args = [a if a is not None else scalars[i] for i, a in enumerate(args)]
    if name == "outer":
        return f"{use.wrap(args[0])}[{', '.join(['...'] + ['None'] * use.result_width('B'))}] * {use.wrap(args[1])}"
    if name == "constant":
        return f"{use.wrap(args[0])}.detach()"
    if name == "logical_not":
        return f"~{use.wrap(args[0])}"
    if name == "neg":
        return f"-{use.wrap(args[0])}"
    if name == "gelu_tanh":
        return f'F.gelu({args[0]}, approximate="tanh")'
    if name == "clip":
        return f"{use.wrap(args[0])}.clamp({use.attr('low')}, {use.attr('high')})"
    if name in ("max", "min"):
        return _extreme(use, args, scalars)
    if name == "mul" and "silu" in (use.producer(0), use.producer(1)):
        gate = 0 if use.producer(0) == "silu" else 1
        return f"lib.silu_mul({args[1 - gate]}, {use.inner(gate)})"
    if name in INFIX:
        return f"{use.wrap(args[0])} {INFIX[name]} {use.wrap(args[1])}"
    return f"{CALLS[name]}({args[0]})"


def _real(use: Any, place: int, text: str | None) -> str | None:
    """An operand of whole numbers as real ones."""
    name = use.operands[place]
    return text if name is None or use.graph.values[name].type.kind == "real" else f"{use.wrap(text)}.float()"


def _extreme(use: Any, args: list[str], scalars: list[str | None]) -> str:
    name = use.op
    bound = next((s for s in scalars if s is not None), None)
    if bound is None:
        return f"torch.{'maximum' if name == 'max' else 'minimum'}({args[0]}, {args[1]})"
    tensor = next(a for a, s in zip(args, scalars, strict=True) if s is None)
    return f"{use.wrap(tensor)}.clamp({'min' if name == 'max' else 'max'}={bound})"
