"""Offsets beyond 2^31 elements: programs at the far end of tensors that no memory is given for, in Triton's interpreter.

What is launched for billions of elements is told with shapes only. Then the last program of each launch runs with loads
that give nothing and stores that go nowhere, and no whole number of 32 bits may leave its range on the way.
"""

from __future__ import annotations

import inspect
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from heddle import __version__
from heddle.codegen.emit import emit_block
from heddle.dsl.load import load_text
from heddle.lowering import alone as parts
from heddle.lowering.pipeline import lower
from heddle.lowering.target import TARGETS
from heddle.runtime.check import program_of
from heddle.runtime.verify import block_of, launched

SPEC = """
model wide(vocab = 5000, hidden = 2048):
    tokens[batch, seq]: token
    x = embed(tokens, vocab -> hidden)
    y = rms_norm(x)
    x = x + mamba2(y, heads = 32, head_dim = 64, state = 128, groups = 8)
    q = linear(x, hidden -> [heads = 32, head_dim = 64])
    x = x + linear(attend(q, (q, q, window(5))), [heads, head_dim] -> hidden)
    final = rms_norm(x)
    logits = linear(final, hidden -> vocab)
    return logits
"""
SHAPES = (3, 2**20), (2**12, 2**9)
"""Rows and tokens: a row has 2^31 elements of `hidden`; so many short rows have more."""


class Overflow(Exception):
    """A whole number of 32 bits left its range."""


@contextmanager
def no_memory(ids, grid, high):
    """Inside, kernels load and store nothing, are the program `ids` of `grid`, and overflow is an error. `high`: the
    addresses of whole numbers that say where something ends, with what they say; all others are 0."""
    builder = interpreter.InterpreterBuilder

    def checked(name, of):
        plain = getattr(builder, name)

        def run(self, lhs, rhs):
            made = plain(self, lhs, rhs)
            if str(made.dtype.scalar) == "int32":
                exact = of(np.asarray(lhs.data, np.int64), np.asarray(rhs.data, np.int64))
                if (exact != np.asarray(made.data, np.int64)).any():
                    raise Overflow(f"{exact.max():,} is no int32")
            return made

        return run

    def load(self, ptrs, *_):
        kind = ptrs.get_element_ty()
        value = high.get(int(np.asarray(ptrs.data).flat[0]), 0) if kind.is_int() else 0
        return interpreter.TensorHandle(np.full_like(ptrs.data, value, interpreter._get_np_dtype(kind)), kind)

    own = {
        "create_mul": checked("create_mul", np.multiply), "create_add": checked("create_add", np.add),
        "create_sub": checked("create_sub", np.subtract),
        "create_load": load, "create_masked_load": load,
        "create_store": lambda self, *_: None, "create_masked_store": lambda self, *_: None,
        "create_get_program_id": lambda self, axis: interpreter.TensorHandle(np.array([ids[axis]], np.int32), interpreter.tl.int32),
        "create_get_num_programs": lambda self, axis: interpreter.TensorHandle(np.array([grid[axis]], np.int32), interpreter.tl.int32),
        "create_addptr": lambda self, ptr, offset: interpreter.TensorHandle(
            ptr.data + np.zeros_like(offset.data, np.uint64), ptr.dtype),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, function in own.items():
            patch.setattr(builder, name, function)
        yield


def ends(*bounds):
    """The first and the last step of a loop."""
    whole = range(*(int(b) for b in bounds))
    return [whole[i] for i in sorted({0, len(whole) - 1}) if whole]


def far(launch, seq):
    """Run the last program of a launch, where its tensors have shapes only. Raises Overflow."""
    grid = (*launch.grid, 1, 1)[:3]
    names, high, args = list(inspect.signature(launch.kernel.fn).parameters), {}, []
    for name, given in zip(names, launch.args):
        if isinstance(given, torch.Tensor):
            small = torch.zeros(1, dtype=given.dtype)
            if re.match("(high|last)", name):
                high[small.data_ptr()] = seq
            given = small
        args.append(given)
    with no_memory([n - 1 for n in grid], grid, high):
        try:
            launch.kernel[(1, 1, 1)](*args, **launch.how)
        except interpreter.InterpreterError as error:
            raise (Overflow(str(error)) if "Overflow" in str(error) else error) from None


def overflows(name, old=None, new=""):
    """The kernels of a block that leave 32 bits, where `old` is `new` in its file."""
    one = next(a for a in parts.kernels(lower(program_of(load_text(SPEC)), target=TARGETS["triton"])) if a.nodes[-1].op == name)
    files = emit_block(one.name, one.program, __version__)
    texts = {n: t if old is None else t.replace(old, new) for n, t in files.kernels.items()}
    assert old is None or texts != files.kernels
    kind = block_of(one.name, replace(files, kernels=texts))
    found = []
    for shape in SHAPES:
        for launch in launched(one, kind, torch.bfloat16, shape):
            with pytest.MonkeyPatch.context() as patch:  # the file's module stays loaded
                patch.setitem(launch.kernel.fn.__globals__, "range", ends)
                try:
                    far(launch, shape[1])
                except Overflow:
                    found.append(launch.kernel.fn.__name__)
    return found


@pytest.mark.parametrize("name", ["rms_norm", "attend", "ssd", "parallel_conv", "embed", "cross_entropy"])
def test_the_far_end_of_large_tensors_is_reached_in_64_bits(name):
    assert overflows(name) == []


@pytest.mark.parametrize("name", ["rms_norm", "attend", "ssd", "parallel_conv"])
def test_without_64_bits_it_would_not_be(name):
    assert overflows(name, ".to(tl.int64)")
