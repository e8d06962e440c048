"""What generated code may use: torch and the standard library, nothing of the compiler."""

from .attend import Source, attend
from .buffers import STATELESS, Slots
from .clocks import Clock, on, summarise
from .conv import Conv, ParallelConv, causal_conv
from .experts import route, top_k
from .filled import Beside
from .gathered import Gathered
from .initial import initialise
from .linear import Embed, Linear, Parallel, Weights, embed, empty, named_logical_parameters
from .loss import cross_entropy, known
from .model import Model
from .norm import LayerNorm, RmsNorm, layer_norm, rms_norm
from .pointwise import relu2, rotate, silu_mul
from .rows import At, Coordinates, Mask, count_rows, next_token, reduce_rows, take_row
from .ssd import ssd
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
    "Model",
    "Parallel",
    "ParallelConv",
    "RmsNorm",
    "Slots",
    "Source",
    "Stream",
    "Weights",
    "attend",
    "causal_conv",
    "count_rows",
    "cross_entropy",
    "embed",
    "empty",
    "initialise",
    "known",
    "layer_norm",
    "named_logical_parameters",
    "next_token",
    "on",
    "reduce_rows",
    "relu2",
    "rms_norm",
    "rotate",
    "route",
    "silu_mul",
    "ssd",
    "summarise",
    "take_row",
    "top_k",
]
