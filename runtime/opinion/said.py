"""What was said of a module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """What a trusted use is given, or how a loss ends, is not what was declared."""


@dataclass
class Opinion:
    """What was said. `accepted` is None where the module did not run to its end, `why` says what was wrong.

    `read` are the uses of ops, by op, that spmd_types worked out itself, `trusted` those that it was told of, `why_not`
    for each of their ops why. `conversions` are those that it took.
    """

    accepted: bool | None = None
    why: str = ""
    cause: BaseException | None = None
    conversions: int = 0
    read: Counter[str] = field(default_factory=Counter)
    trusted: Counter[str] = field(default_factory=Counter)
    why_not: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "accepted": self.accepted, "why": self.why, "conversions": self.conversions,
            "read": dict(sorted(self.read.items())), "trusted": dict(sorted(self.trusted.items())),
            "why not": dict(sorted(self.why_not.items())),
        }  # fmt: skip


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).strip().split("\n")[0]
