"""From checked syntax to an elaborated program: names get values, dims unify, sizes are computed, loops unroll."""

from .entry import Lent, elaborate, entries

__all__ = ["Lent", "elaborate", "entries"]
