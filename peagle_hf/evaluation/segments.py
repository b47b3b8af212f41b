"""Acceptance by segment of an answer: within its reasoning, within its tool calls, and in the rest of its text.

A draft belongs to the segment in which its first token lies, so the counts of all segments sum to those of the whole.
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ..data.answer_markers import TEXT, AnswerMarkers, find_answer_markers
from ..data.tokenizer import ChatOptions, load_tokenizer
from ..errors import PeagleError
from ..serving.client import Answer

logger = logging.getLogger(__name__)


class Segmenter:
    """Finds the segments of answers, and counts the drafts of each.

    Args:
        decode: gives the text of one token, special tokens included.
        markers: of the chat template; at least one segment.
    """

    def __init__(self, decode: Callable[[int], str], markers: AnswerMarkers):
        self.markers = markers
        self.names = [*markers.by_segment, TEXT]
        self._decode, self._texts = decode, dict[int, str]()
        by_segment = markers.by_segment.items()
        self._opening = re.compile("|".join(f"(?P<{name}>{_spaced(marker.opening)})" for name, marker in by_segment))
        self._closing = {
            name: re.compile(_spaced(marker.closing)) for name, marker in by_segment if marker.closing is not None
        }

    @classmethod
    def of(cls, verifier: str, trust_remote_code: bool, options: ChatOptions) -> "Segmenter | None":
        """The segmenter for a verifier's answers; None if its chat template marks no segments.

        If the tokenizer can't be loaded or has no usable template, a warning says so, since the rest of an evaluation
        of servers doesn't need it.
        """
        try:
            tokenizer = load_tokenizer(verifier, trust_remote_code)
            if options.template is not None:
                tokenizer.chat_template = options.template
            markers = find_answer_markers(tokenizer, options.kwargs)
        except PeagleError as error:
            logger.warning("Acceptance is not reported by segment of the answers: %s", error)
            return None

        def decode(token_id: int) -> str:
            return str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return cls(decode, markers) if markers.by_segment else None

    def description(self) -> dict[str, Any]:
        """The markers for the report: opening and closing by segment, and the segment in which answers begin."""
        markers = {name: [marker.opening, marker.closing] for name, marker in self.markers.by_segment.items()}
        return {"segment_markers": markers, "answers_begin_in": self.markers.begins_in}

    def segments(self, token_ids: Sequence[int]) -> list[str]:
        """The segment of each token of an answer, by the token's first character; markers belong to their segment."""
        for token_id in {*token_ids} - self._texts.keys():
            self._texts[token_id] = self._decode(token_id)
        texts = [self._texts[token_id] for token_id in token_ids]
        starts, names = zip(*self._parts("".join(texts)), strict=True)
        places = accumulate(map(len, texts[:-1]), initial=0)
        return [names[bisect_right(starts, place) - 1] for place in places]

    def _parts(self, text: str) -> list[tuple[int, str]]:
        """The beginning of each part of an answer, in characters, and the part's segment."""
        place, name = 0, self.markers.begins_in
        parts = [(place, name)]
        while True:
            pattern = self._opening if name == TEXT else self._closing.get(name)
            found = pattern and pattern.search(text, place)
            if not found:
                return parts
            place = found.end()
            if name == TEXT:
                name = str(found.lastgroup)
                parts.append((found.start(), name))
            else:
                name = TEXT
                parts.append((place, name))

    def parts(self, answer: Answer) -> list[str]:
        """The segment of each token of an answer."""
        return self.segments(answer.token_ids)


def _spaced(marker: str) -> str:
    """A regular expression for a marker in which white space doesn't matter."""
    return r"\s*".join(map(re.escape, "".join(marker.split())))
