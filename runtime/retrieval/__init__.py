"""Retrieval: an index of text in chunks, and what of it a model is given beside its tokens."""

from .asking import Asked
from .feeding import Feed, Looked
from .index import Index, build_index

__all__ = ["Asked", "Feed", "Index", "Looked", "build_index"]
