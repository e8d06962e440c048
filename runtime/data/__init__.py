"""Text to rows of tokens: sources, tokenizers, packing."""

from .packing import Batch, Cursor, Packed
from .sources import Corpus, open_corpus, split
from .tokenizers import Tokenizer, open_tokenizer

__all__ = ["Batch", "Corpus", "Cursor", "Packed", "Tokenizer", "open_corpus", "open_tokenizer", "split"]
