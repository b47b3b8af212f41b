"""Counts of drafts by part of the answers: by segment (see `segments`), or by position in the context.

A draft belongs to the part in which its first token lies, so the counts of all parts sum to those of the whole.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.contexts import CONTEXTS, context_number
from ..serving.client import Answer
from .runs import Run


class Division(Protocol):
    """A way to divide answers into parts."""

    @property
    def names(self) -> Sequence[str]:
        """Of all parts."""

    def parts(self, answer: Answer) -> Sequence[str] | None:
        """The part of each token of an answer; None if it isn't known."""


class Contexts:
    """Divides answers by the number of tokens before each, those of the prompt included."""

    names: Sequence[str] = CONTEXTS

    def parts(self, answer: Answer) -> Sequence[str] | None:
        if answer.num_prompt_tokens is None:
            return None
        before = range(answer.num_prompt_tokens, answer.num_prompt_tokens + len(answer.token_ids))
        return [CONTEXTS[context_number(position)] for position in before]


def counts_by_part(run: Run, division: Division) -> dict[str, NDArray[np.int64]] | None:
    """For each part the counters [P, 3 + K] of each prompt, all turns together (see `Counters.drafting`).

    None if vLLM doesn't count per draft, if parts aren't known, or if more tokens than a draft has came without drafts,
    so that the places of the drafts aren't known.
    """
    by_prompt = []
    for chat in run.chats:
        counts = [count for answer in chat if (count := _count(answer, division)) is not None]
        if len(counts) < len(chat):
            return None
        by_prompt.append(np.sum(counts, axis=0))
    return {name: np.array(by_prompt)[:, place] for place, name in enumerate(division.names)}


def _count(answer: Answer, division: Division) -> NDArray[np.int64] | None:
    """The counters of an answer by part, int64 [len(names), 3 + K]; None if they aren't known."""
    if answer.drafting is None or answer.drafts is None or (parts := division.parts(answer)) is None:
        return None
    most = len(answer.drafting) - 3
    if 1 + sum(accepted + 1 for accepted, _ in answer.drafts) < len(answer.token_ids) - most:
        # vLLM doesn't count steps in which it drafted nothing, such as those with K 0 under load, so places aren't
        # known.
        return None
    positions = np.arange(most)
    counts = np.zeros((len(division.names), len(answer.drafting)), np.int64)
    place = 1  # the forward pass over the prompt gives the first token
    for accepted, drafted in answer.drafts:
        row = counts[division.names.index(parts[min(place, len(parts) - 1)])]
        row[:3] += (1, drafted, accepted)
        row[3:] += positions < accepted
        place += accepted + 1
    return counts
