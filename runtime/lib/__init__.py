"""What generated code may use: torch and the standard library, nothing of the compiler."""

from . import spmd
from .attend import attend
from .buffers import STATELESS, Slots
from .clocks import Clock, on, summarise
from .conv import Conv, ParallelConv, causal_conv, conv_behind, rows_before
from .dropping import drawn, drop, dropout
from .experts import route, top_k
from .filled import Beside
from .gathered import Gathered
from .initial import initialise
from .linear import Embed, Linear, Parallel, Weights, embed, embed_part, empty, linear, named_logical_parameters
from .linear_loss import linear_cross_entropy
from .loss import cross_entropy, known, nll, picked, sum_exp
from .mesh import Mesh
from .model import Model
from .norm import (
    LayerNorm,
    RmsNorm,
    centred_rows,
    centred_squares,
    group_squares,
    layer_norm,
    rms_norm,
    row_sums,
    scaled_rows,
)
from .pipeline import Pipe
from .pointwise import relu2, rotate, silu_mul
from .recompute import recompute
from .ring import attend_ring
from .rows import At, Coordinates, Mask, count_rows, next_token, reduce_rows, take_row
from .slopes import slopes
from .sources import Source
from .ssd import ssd, ssd_before, ssd_behind, ssd_leave
from .stream import Stream

__all__ = [
    "STATELESS",
    "At",
    "Beside",
    "Clock",
    "Conv",
    "Coordinates",
    "Embed",
    "Gathered",
    "LayerNorm",
    "Linear",
    "Mask",
    "Mesh",
    "Model",
    "Parallel",
    "ParallelConv",
    "Pipe",
    "RmsNorm",
    "Slots",
    "Source",
    "Stream",
    "Weights",
    "attend",
    "attend_ring",
    "causal_conv",
    "centred_rows",
    "centred_squares",
    "conv_behind",
    "count_rows",
    "cross_entropy",
    "drawn",
    "drop",
    "dropout",
    "embed",
    "embed_part",
    "empty",
    "group_squares",
    "initialise",
    "known",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "named_logical_parameters",
    "next_token",
    "nll",
    "on",
    "picked",
    "recompute",
    "reduce_rows",
    "relu2",
    "rms_norm",
    "rotate",
    "route",
    "row_sums",
    "rows_before",
    "scaled_rows",
    "silu_mul",
    "slopes",
    "spmd",
    "ssd",
    "ssd_before",
    "ssd_behind",
    "ssd_leave",
    "sum_exp",
    "summarise",
    "take_row",
    "top_k",
]
