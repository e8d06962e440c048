"""Decoding under a CUDA graph: a step of one token is captured once, and replayed for each token after it.

What a step does on the device may follow from where it is in the stream only through numbers that are on the device,
too. What the host does follows from how many groups come with the token (`Clock`): shapes do. So steps are of one kind
where as many groups of each clock come with them, and each kind has a graph of its own.

Whether a kind can be captured is found by looking on, not known of ops: its first step loads kernels and makes
constants; the next two are watched. Where both asked torch for the very same, on the device alone, and left the
stream's buffers in their places, the next one is captured. Else its steps run op by op, and `Steps.why` says what for.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import kernels
from .rows import At

if TYPE_CHECKING:
    from .model import Model
    from .stream import Stream

WATCHED = 2
"""Steps of a kind that must be the same before one is captured."""
_SPEC_LINE = re.compile(r"\s*# (\S+\.spec:\d+  .*)")


class Captured(NamedTuple):
    """A step that was captured: what runs it again, and where it leaves its logits."""

    replay: Callable[[], None]
    logits: Tensor


Capture = Callable[[Callable[[], Tensor]], Captured]


def cuda_graphs(device: torch.device) -> Capture:
    """Captures whose graphs share their memory: no two of them run at a time."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(run: Callable[[], Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        try:
            how: dict[str, Any] = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.device(device), torch.cuda.graph(graph, **how):
                logits = run()
        except RuntimeError as error:
            error.add_note("a step was being captured in a CUDA graph; `graph=False`, `--no-graph`: decode op by op")
            raise
        return Captured(graph.replay, logits)

    return capture


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": cuda_graphs}
"""How steps are captured, by the type of device."""


class Steps:
    """Takes steps of a stream as `Model.decode` does, and replays those of one token that it can. The logits are those
    of a graph: a later call writes over them. Weights stay where they are.

    capture None: it captures nothing.
    """

    def __init__(self, model: Model, stream: Stream, capture: Capture | None) -> None:
        self.model, self.stream, self.capture = model, stream, capture
        self._kinds: dict[Any, _Kind] = {}
        self._buffers: list[Tensor] = []

    @property
    def why(self) -> str | None:
        """Why steps of some kind are not captured, with the line of the spec where it is one's."""
        if self.capture is not None and self.stream.uniform is None:
            return "rows of the stream differ in length, or may be taken back"
        return next((kind.why for kind in self._kinds.values() if kind.why), None)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, **more: Tensor) -> Tensor:
        """Feed tokens int64[batch, seq], and what comes with them; -> logits [batch, seq, vocab]."""
        stream = self.stream
        # A stream's first step has nothing before it, and asks for its clocks.
        if self.capture is None or not stream.uniform or tokens.shape[1:] != (1,):
            return self.model.decode(tokens, stream, **more)
        at, rest = self.model.begin(tokens, stream, **more)
        logits = self._kind((tokens, *rest)).take(at, (tokens, *rest))
        stream.commit(at)
        self._buffers = buffers_of(stream)
        return logits

    def _kind(self, given: Sequence[Tensor]) -> _Kind:
        if not _are(buffers_of(self.stream), self._buffers):  # restored, or rows chosen: graphs write elsewhere
            self._kinds = {}
        come = tuple((clock, self.stream.coming(clock, 1)) for clock in self.stream.clocks)
        key = come, tuple((x.shape, x.dtype) for x in given)
        if key not in self._kinds:
            assert self.capture is not None
            self._kinds[key] = _Kind(self.model, self.stream, self.capture, given)
        return self._kinds[key]


class _Kind:
    """Steps that differ in the numbers that they are given, and in nothing else that the host knows."""

    def __init__(self, model: Model, stream: Stream, capture: Capture, given: Sequence[Tensor]) -> None:
        self.model, self.stream, self.capture = model, stream, capture
        self.place = torch.zeros(1, dtype=torch.int64, device=stream.device)
        self.inputs = [torch.empty_like(x, device=stream.device) for x in given]
        self.is_warm = False
        self.watched: list[Watch] = []
        self.captured: Captured | None = None
        self.why: str | None = None

    def take(self, at: At, given: Sequence[Tensor]) -> Tensor:
        """One step, whose coordinates are `at` where it runs op by op."""
        if self.why is not None:
            return self.model.run(*given, at, self.stream.state)
        assert isinstance(at.step.uniform, int)
        self.place.fill_(at.step.uniform)
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new)
        if self.captured is None and len(self.watched) == WATCHED:
            self.captured = self.capture(self.run)
        if self.captured is not None:
            self.captured.replay()
            return self.captured.logits
        if not self.is_warm:
            self.is_warm = True
            return self.run()
        return self._watch()

    def run(self) -> Tensor:
        """The step, from the memory that it is always given."""
        return self.model.run(*self.inputs, self.stream.begin_anywhere(self.place), self.stream.state)

    def _watch(self) -> Tensor:
        before = buffers_of(self.stream)
        with Watch(self.stream.device) as watch:
            logits = self.run()
        if watch.why is None and not _are(buffers_of(self.stream), before):
            watch.why = "a buffer of the stream is made anew, not written in place"
        self.watched.append(watch)
        self.why = watch.why or watch.differs(self.watched[0])
        return logits


def buffers_of(stream: Stream) -> list[Tensor]:
    """All that a stream's layers keep."""
    return [x for buffer in stream.buffers for x in buffer.rows.values()]


def _are(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class Watch(TorchDispatchMode):
    """Looks on at a step: what it asks torch for, and why a graph could not do it.

    calls: each op with all that it is given, tensors as (shape, strides, dtype), and the launches of a kernel's op.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: list[tuple[Any, Any]] = []
        self.lines: list[str] = []
        self.why: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Inference mode gives ops that are made of others as they are, and would hide these.
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        with kernels.launches() as launched:
            made = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        line = _spec_line(sys._getframe(1))
        self.calls.append((func, (_plain(given), [(x.kernel, x.grid, _plain((x.args, x.how))) for x in launched])))
        self.lines.append(line)
        if self.why is None and (said := self._reason(func, given, made)):
            self.why = f"{line}`{func.name()}` {said}"
        return made

    def _reason(self, func: Any, given: list[Any], made: Any) -> str | None:
        """Why a graph cannot hold this call."""
        if torch.Tag.data_dependent_output in func.tags:
            return "reads a number of the device on the host"
        # Picked by numbers, and not by a mask, there are as many as numbers.
        by_number = func is torch.ops.aten.index.Tensor and not any(x.dtype == torch.bool for x in _tensors(given[1:]))
        if torch.Tag.dynamic_output_shape in func.tags and not by_number:
            return "gives a tensor whose shape only the device knows"
        if func is torch.ops.aten.lift_fresh.default:
            return "makes a tensor of numbers of the host"
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        for x in _tensors((given, made if copies else ())):
            # A number may be on the host: it is an argument of a launch, the same in each step.
            if x.device.type != self.device.type and (x.dim() or copies):
                return f"goes between {self.device.type} and {x.device.type}"
        return None

    def differs(self, first: Watch) -> str | None:
        """What this step did otherwise than the first that was watched, None where it did the same."""
        for i, (one, other) in enumerate(zip(first.calls, self.calls, strict=False)):
            if one != other:
                return f"{self.lines[i]}`{other[0].name()}` is not given the same by the host in each step"
        return None if len(first.calls) == len(self.calls) else "the host does not do the same in each step"


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _plain(given: Any) -> list[Any]:
    """What the host gives: of tensors what they are like, all else as it is."""
    return [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(given)]


def _spec_line(frame: FrameType | None) -> str:
    """`model.spec:18  x = x + layer(rms_norm(x)): ` of the generated code that is running, the innermost."""
    while frame is not None:
        if "Model" in frame.f_globals and frame.f_code.co_filename.endswith("model.py") and "lib" in frame.f_globals:
            for number in range(frame.f_lineno, 0, -1):
                text = linecache.getline(frame.f_code.co_filename, number, frame.f_globals)
                if found := _SPEC_LINE.match(text):
                    return f"{found.group(1)}: "
        frame = frame.f_back
    return ""
