"""Ranges of positions in the context, by which acceptance is reported: a draft's position is the number of tokens
before its first one, prompt included."""

from bisect import bisect_right
from typing import Any

BOUNDS = (1024, 4096, 16384, 32768)
"""The least position of each range but the first."""
CONTEXTS = ("0-1K", "1K-4K", "4K-16K", "16K-32K", "32K-")
"""Names of the ranges, in which K stands for 1,024 tokens."""


def context_number(position: int) -> int:
    """The place in `CONTEXTS` of the range that holds a position."""
    return bisect_right(BOUNDS, position)


def drafted_contexts(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ranges that are worth showing of an entry of a report; empty unless several have drafts."""
    drafted = {name: figures for name, figures in (entry.get("by_context") or {}).items() if figures["num_drafts"]}
    return drafted if len(drafted) > 1 else {}
