"""Acceptance as a metric of Hugging Face's `evaluate`: `evaluate.load(acceptance_metric.__file__)`."""

from typing import Any

import datasets
import evaluate

from peagle_hf.errors import PeagleError
from peagle_hf.serving.client import summarize

_DESCRIPTION = "Acceptance of speculative decoding, computed from the number of accepted tokens of each draft."

_INPUTS = """
Args:
    predictions: accepted tokens of each draft, without the verifier's own token.
    references: drafted tokens of each draft.
Returns:
    what `peagle_hf.serving.client.summarize` gives: `acceptance_length` (1 + accepted tokens / drafts),
    `acceptance_rate` (accepted / drafted tokens), `per_position_acceptance` (drafts accepted up to there / all drafts),
    and the counts.
Examples:
    >>> acceptance = evaluate.load(acceptance_metric.__file__)
    >>> acceptance.compute(predictions=[2, 0, 1], references=[2, 2, 2])["acceptance_length"]
    2.0
"""


class Acceptance(evaluate.Metric):
    """The metric; `evaluate.load` makes it."""

    def _info(self) -> evaluate.MetricInfo:
        counts = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(counts)
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        for draft, (accepted, drafted) in enumerate(zip(predictions, references, strict=True)):
            if not 0 <= accepted <= drafted:
                raise PeagleError(
                    f"Draft {draft} has {accepted} accepted of {drafted} drafted tokens. Give the accepted drafted "
                    "tokens as predictions, without the verifier's own token, and the drafted ones as references."
                )
        by_position = [sum(accepted > place for accepted in predictions) for place in range(max(references, default=0))]
        return summarize([[len(predictions), sum(references), sum(predictions), *by_position]])
