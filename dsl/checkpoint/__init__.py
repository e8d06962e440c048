"""Checkpoint maps: equations between ours and theirs, read in both directions, proved before any byte moves."""

from .reading import read_config
from .static import CallValue, evaluate
from .tensors import Entry, Piece, TensorMap, tensor_map
from .writing import write_config

__all__ = ["CallValue", "Entry", "Piece", "TensorMap", "evaluate", "read_config", "tensor_map", "write_config"]
