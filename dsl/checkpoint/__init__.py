"""Checkpoint maps: equations between our weights and theirs, read in both directions and proved before any byte moves."""

from .config import CallValue, read_config, write_config
from .tensors import Entry, Piece, TensorMap, tensor_map

__all__ = ["CallValue", "Entry", "Piece", "TensorMap", "read_config", "tensor_map", "write_config"]
