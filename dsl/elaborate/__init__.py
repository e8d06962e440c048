"""From checked syntax to an elaborated program: names get values, dims unify, sizes are computed, loops unroll."""

from .entry import DEFAULT, Lent, elaborate, entries, is_complete

__all__ = ["DEFAULT", "Lent", "elaborate", "entries", "is_complete"]
