"""Graphs in the spec's own notation, and back: `from_syntax(to_syntax(graph)) == graph`.

A dump is a file of blocks. Dims stand first, with their sizes; then inputs, weights, the blocks inside, and one typed
line a node:

    block attention(of = "attention"):
        hidden = dim(64)
        x[batch, seq, hidden]: real
        q.weight = weight([heads, head_dim, hidden], free, "linear")
        q: real[batch, seq, heads, head_dim] = linear(x, q.weight, none, map = hidden -> [heads, head_dim])
        return q
"""

from __future__ import annotations

from typing import Any

from ..dsl import syntax as sx
from ..dsl.diagnostics import InternalError
from ..dsl.format import print_module
from ..dsl.parse import parse
from ..dsl.program import Body, Clock, Dim, Init, Instance, Node, Rule, Type, Value, Weight
from ..dsl.selectors import read, written
from ..dsl.source import Source
from .graph import STRUCTURE, Graph, GraphProgram
from .ops import table


def print_graphs(program: GraphProgram) -> str:
    """All graphs of a program, callees first."""
    return print_module(sx.Module((), tuple(to_syntax(g) for g in program.callees_first())))


def parse_graphs(text: str, name: str = "<dump>") -> dict[str, Graph]:
    """The graphs of a dump, by name. Raises `SpecError` for text that is no spec, `ValueError` with the line for a spec
    that is no dump."""
    graphs: dict[str, Graph] = {}
    for block in parse(Source(name, text)).declarations:
        if not isinstance(block, sx.Function) or block.keyword != "block" or block.name in graphs:
            raise ValueError(f"{block.span}: a dump is a file of blocks, each with a name of its own")
        graphs[block.name] = from_syntax(block)
    return graphs


# --- to syntax -----------------------------------------------------------------------------------


def to_syntax(graph: Graph) -> sx.Function:
    """A graph as a block of the language."""
    body = graph.body
    statements: list[sx.Statement] = [_assign(d.name, _dim_call(d)) for d in body.dims]
    statements += [sx.Input(v.name, _shape(v.type.dims), sx.Name(v.type.kind)) for v in body.inputs]
    statements += [_weight_line(w) for w in body.weights]
    statements += [_assign(i.name, _instance_call(i)) for i in body.instances]
    statements += [sx.InitRule(tuple(written(s) for s in r.selectors), _init_call(r.init)) for r in body.rules]
    statements += [_node_line(n) for n in body.nodes]
    statements += [sx.Emit(keyword, label, _ref(value)) for keyword, label, value in body.emits]
    if body.outputs:
        statements.append(sx.Return(tuple(_ref(o) for o in body.outputs)))
    parameters = [sx.Parameter("of", sx.String(body.block))]
    if body.asked:
        parameters.append(sx.Parameter("asked", _number(body.asked)))
    return sx.Function("block", body.name, tuple(parameters), tuple(statements))


def _assign(name: str, value: sx.Expr) -> sx.Assign:
    return sx.Assign((name,), (value,))


def _call(name: str, *positional: sx.Expr, **named: sx.Expr) -> sx.Call:
    arguments = [sx.Argument(p) for p in positional] + [sx.Argument(v, k) for k, v in named.items()]
    return sx.Call(sx.Name(name), tuple(arguments))


def _ref(name: str | None) -> sx.Expr:
    if name is None:
        return sx.Constant(None)
    first, *rest = name.split(".")
    expr: sx.Expr = sx.Name(first)
    for part in rest:
        expr = sx.Member(expr, part)
    return expr


def _list(items: Any) -> sx.ListOf:
    return sx.ListOf(tuple(sx.Argument(i) for i in items))


def _names(dims: tuple[str, ...]) -> sx.ListOf:
    return _list(sx.Name(d) for d in dims)


def _shape(dims: tuple[str, ...]) -> tuple[sx.DimItem, ...]:
    return tuple(sx.DimItem(d) for d in dims)


def _number(value: int | float) -> sx.Expr:
    return sx.Unary("-", _number(-value)) if value < 0 else sx.Number(value, repr(value))


def _dim_call(dim: Dim) -> sx.Call:
    named: dict[str, sx.Expr] = {}
    if dim.sequence:
        named["sequence"] = sx.Constant(True)
    if dim.lead:
        named["lead"] = _names(dim.lead)
    if dim.factors:
        named["factors"] = _names(dim.factors)
    if dim.clock:
        named["clock"] = _clock(dim.clock)
    return _call("dim", sx.Constant(None) if dim.size is None else _number(dim.size), **named)


def _clock(clock: Clock) -> sx.Call:
    flags = {} if clock.begins else {"ends": sx.Constant(True)}
    return _call("clock", sx.String(clock.name), clock.value, _number(clock.times), **flags)


def _weight_line(weight: Weight) -> sx.Statement:
    layout = _list(_names(axis) for axis in weight.layout)
    flags = {"keep": sx.Constant(True)} if weight.keep else {}
    if not weight.trained:
        flags["trained"] = sx.Constant(False)
    call = _call("weight", _names(weight.dims), _init_call(weight.init), sx.String(weight.op), layout=layout, **flags)
    owner, _, part = weight.name.rpartition(".")
    return sx.Coordinate(owner, part, call) if owner else _assign(weight.name, call)


def _init_call(init: Init) -> sx.Expr:
    return _call(init.kind, *(_number(v) for v in init.values)) if init.values else sx.Name(init.kind)


def _instance_call(instance: Instance) -> sx.Call:
    named: dict[str, sx.Expr] = {}
    if instance.schedule is not None:
        named["schedule"] = _list(_number(i) for i in instance.schedule)
    if not instance.owned:
        named["owned"] = sx.Constant(False)
    if instance.lends:
        named["lends"] = _names(instance.lends)
    return _call("instance", _names(instance.bodies), **named)


def _node_line(node: Node) -> sx.Typed:
    kinds = tuple(r.type.kind for r in node.results)
    shapes = tuple(_shape(r.type.dims) for r in node.results)
    names = tuple(r.name for r in node.results)
    return sx.Typed(names, kinds, shapes, _structure(node) if node.op in STRUCTURE else _op_call(node))


def _structure(node: Node) -> sx.Call:
    pairs = [
        sx.Name(theirs)
        if (theirs,) == ours
        else sx.TupleOf((sx.Argument(sx.Name(theirs)), sx.Argument(sx.Name(ours[0]))))
        for theirs, ours in node.bindings
    ]
    named: dict[str, sx.Expr] = {"dims": _list(pairs)} if pairs else {}
    if node.attr("over"):
        named["over"] = _names(node.attr("over"))
    if node.attr("part"):
        named["part"] = _list(_number(i) for i in node.attr("part"))
    return _call(node.op, sx.Name(node.attr("instance")), *(_ref(o) for o in node.operands), **named)


def _op_call(node: Node) -> sx.Call:
    op = table()[node.op]
    named = {}
    for name, value in node.attrs:
        setting = op.setting(name)
        named[name] = _attr(value, setting.kind if setting else "number")
    return _call(node.op, *(_ref(o) for o in node.operands), **named)


def _attr(value: Any, kind: str) -> sx.Expr:
    if kind in ("map", "split", "join"):
        return sx.Arrow(*(sx.Name(side[0]) if len(side) == 1 else _names(side) for side in value))
    if kind == "coordinate":
        return _list((sx.Name(value[0]), _clock(value[1])))
    if kind == "dims":
        return _names(value)
    if kind == "mask":
        return _list(value)
    return _plain(value)


def _plain(value: Any) -> sx.Expr:
    if isinstance(value, tuple):
        return _list(_plain(v) for v in value)
    if value is None or isinstance(value, bool):
        return sx.Constant(value)
    return sx.String(value) if isinstance(value, str) else _number(value)


# --- from syntax ---------------------------------------------------------------------------------


def from_syntax(function: sx.Function) -> Graph:
    """The graph of a dumped block. Raises `ValueError`, with the line, where it is none."""
    at: sx.Syntax = function
    try:
        read = _Reader(function)
        for at in function.body:
            read.statement(at)
        at = function
        graph = Graph(read.body())
        graph.verify()
    except Exception as error:  # what is read here trusts the printer: a hand may have written anything
        reason = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{at.span}: not as a graph is printed ({reason})") from error
    return graph


class _Reader:
    """Reads one dumped block, statement by statement."""

    def __init__(self, function: sx.Function):
        self.name = function.name
        given = {p.name: _value(p.default) for p in function.parameters if p.default is not None}
        self.block, self.asked = given["of"], given.get("asked", 0)
        self.dims: list[Dim] = []
        self.inputs: list[Value] = []
        self.weights: list[Weight] = []
        self.instances: list[Instance] = []
        self.rules: list[Rule] = []
        self.nodes: list[Node] = []
        self.emits: list[tuple[str, str, str]] = []
        self.outputs: tuple[str, ...] = ()

    def statement(self, statement: sx.Statement) -> None:
        match statement:
            case sx.Assign(names=(name,), values=(sx.Call(function=sx.Name(id="dim")) as call,)):
                self.dims.append(_dim_of(name, call))
            case sx.Assign(names=(name,), values=(sx.Call(function=sx.Name(id="instance")) as call,)):
                self.instances.append(_instance_of(name, call))
            case sx.Assign(names=(name,), values=(sx.Call(function=sx.Name(id="weight")) as call,)):
                self.weights.append(_weight_of(name, call))
            case sx.Coordinate(dim=owner, name=part, value=sx.Call() as call):
                self.weights.append(_weight_of(f"{owner}.{part}", call))
            case sx.Input(name=name, shape=shape, kind=sx.Name(id=kind)):
                self.inputs.append(Value(name, Type(kind, tuple(i.name or "" for i in shape or ()))))
            case sx.InitRule(selectors=selectors, value=value):
                self.rules.append(Rule(tuple(read(s, _whole_numbers) for s in selectors), _init_of(value)))
            case sx.Typed():
                self.nodes.append(self._node(statement))
            case sx.Emit(keyword=keyword, name=name, value=value):
                self.emits.append((keyword, name, _dotted(value)))
            case sx.Return(values=values):
                self.outputs = tuple(_dotted(v) for v in values)
            case _:
                raise ValueError(f"a dump has no statement like this: {statement}")

    def body(self, nodes: tuple[Node, ...] | None = None) -> Body:
        return Body(
            self.name, self.block, tuple(self.dims), tuple(self.inputs), tuple(self.weights), tuple(self.instances),
            tuple(self.nodes) if nodes is None else nodes, self.outputs, tuple(self.emits), tuple(self.rules),
            self.asked,
        )  # fmt: skip

    def _node(self, line: sx.Typed) -> Node:
        assert isinstance(line.value, sx.Call) and isinstance(line.value.function, sx.Name)
        results = tuple(
            Value(n, Type(k, tuple(i.name or "" for i in s)))
            for n, k, s in zip(line.names, line.kinds, line.shapes, strict=True)
        )
        op = line.value.function.id
        positional = [a.value for a in line.value.arguments if a.name is None]
        named = {a.name: a.value for a in line.value.arguments if a.name}
        if op in STRUCTURE:
            bindings = tuple(_binding(value) for value in _values(named.get("dims")))
            operands = tuple(_operand(p) for p in positional[1:])
            attrs: tuple[tuple[str, Any], ...] = (("instance", _dotted(positional[0])),)
            if "over" in named:
                attrs += (("over", tuple(_dotted(v) for v in _values(named["over"]))),)
            if "part" in named:
                attrs += (("part", _value(named["part"])),)
            return Node(results, op, operands, attrs, bindings)
        settings = tuple((k, _attr_of(v, op, k)) for k, v in named.items())
        node = Node(results, op, tuple(_operand(p) for p in positional), settings)
        return self._with_bindings(node)

    def _with_bindings(self, node: Node) -> Node:
        """What the formals stand for follows from the signature."""
        from .passes.infer_types import graph_dims, infer  # the pass reads graphs, this makes them

        dims = graph_dims(self.dims)
        typing = infer(node, Graph(self.body((*self.nodes, node))), dims)
        bindings = tuple((f, tuple(d.name for d in ds)) for f, ds in typing.bindings.items())
        return Node(node.results, node.op, node.operands, node.attrs, bindings)


def _dotted(expr: sx.Expr) -> str:
    if isinstance(expr, sx.Member):
        return f"{_dotted(expr.value)}.{expr.name}"
    assert isinstance(expr, sx.Name), expr
    return expr.id


def _operand(expr: sx.Expr) -> str | None:
    return None if isinstance(expr, sx.Constant) else _dotted(expr)


def _values(expr: sx.Expr | None) -> tuple[sx.Expr, ...]:
    return tuple(a.value for a in expr.items) if isinstance(expr, sx.ListOf) else ()


def _arguments(call: sx.Call) -> tuple[list[sx.Expr], dict[str, sx.Expr]]:
    return [a.value for a in call.arguments if a.name is None], {a.name: a.value for a in call.arguments if a.name}


def _dim_of(name: str, call: sx.Call) -> Dim:
    (size,), named = _arguments(call)
    lead = tuple(_dotted(v) for v in _values(named.get("lead")))
    factors = tuple(_dotted(v) for v in _values(named.get("factors")))
    clock = _clock_of(named["clock"]) if "clock" in named else None
    return Dim(name, _value(size), "sequence" in named, lead, factors, clock)


def _clock_of(expr: sx.Expr) -> Clock:
    assert isinstance(expr, sx.Call)
    (name, value, times), named = _arguments(expr)
    return Clock(_value(name), value, _value(times), "ends" not in named)


def _instance_of(name: str, call: sx.Call) -> Instance:
    (bodies,), named = _arguments(call)
    schedule = tuple(_value(v) for v in _values(named["schedule"])) if "schedule" in named else None
    lends = tuple(_dotted(v) for v in _values(named.get("lends")))
    return Instance(name, tuple(_dotted(v) for v in _values(bodies)), schedule, "owned" not in named, lends)


def _weight_of(name: str, call: sx.Call) -> Weight:
    (dims, init, op), named = _arguments(call)
    return Weight(
        name,
        tuple(_dotted(v) for v in _values(dims)),
        _init_of(init),
        _value(op),
        "keep" in named,
        tuple(tuple(_dotted(v) for v in _values(axis)) for axis in _values(named["layout"])),
        "trained" not in named,
    )


def _init_of(expr: sx.Expr) -> Init:
    if isinstance(expr, sx.Call):
        return Init(_dotted(expr.function), tuple(_value(a.value) for a in expr.arguments))
    return Init(_dotted(expr))


def _binding(expr: sx.Expr) -> tuple[str, tuple[str, ...]]:
    if isinstance(expr, sx.TupleOf):
        theirs, ours = (_dotted(a.value) for a in expr.items)
        return theirs, (ours,)
    return _dotted(expr), (_dotted(expr),)


def _attr_of(expr: sx.Expr, op: str, name: str) -> Any:
    setting = table()[op].setting(name)
    kind = setting.kind if setting else "number"
    if kind == "coordinate":
        dim, clock = _values(expr)
        return _dotted(dim), _clock_of(clock)
    if kind in ("map", "split", "join"):
        assert isinstance(expr, sx.Arrow)
        return tuple(tuple(_dotted(v) for v in (_values(s) or (s,))) for s in (expr.source, expr.target))
    if kind == "dims":
        return tuple(_dotted(v) for v in _values(expr))
    if kind == "mask":
        return _values(expr)
    return _value(expr)


def _whole_numbers(expr: sx.Expr) -> list[int]:
    value = _value(expr)
    return list(value) if isinstance(value, tuple) else [value]


def _value(expr: sx.Expr) -> Any:
    match expr:
        case sx.Number(value=value) | sx.String(value=value) | sx.Constant(value=value):
            return value
        case sx.Unary(operator="-", value=inner):
            return -_value(inner)
        case sx.ListOf():
            return tuple(_value(v) for v in _values(expr))
    raise ValueError(f"no value of a dump: {expr}")
