r"""What sampling would accept of drafts at the positions of a cached text: expectations, not counts.

At a temperature T the distributions of verifier and drafter are \(p\) and \(q\), the softmaxes of their logits / T. A
token drawn from \(q\) is accepted with the chance \(\sum_v \min(p_v, q_v)\), the drafter's most likely token with
\(p_{\arg\max q}\) (arXiv 2211.17192). Where decoding would start its drafts is summed over all ways in which the drafts
before may have been accepted.

Shape letters: N trained slots, M anchors, U target positions, K depths, H hidden size, Vd draft vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from ..training.losses import chunks
from ..training.objective import Objective

METHODS = ("probabilistic", "greedy")
"""vLLM's values of `draft_sample_method`, in the order in which chances are stored."""


class SamplingObjective(Objective):
    """An objective that also keeps the chances of acceptance of the last batch.

    Args:
        temperature: above 0.

    Attributes:
        chances: float32 [2, N], by `METHODS`.
    """

    def __init__(self, *arguments: Any, temperature: float):
        super().__init__(*arguments)
        self.temperature = temperature
        self.chances = torch.zeros(2, 0)

    @torch.no_grad()
    def _compare(
        self, batch: Mapping[str, Any], is_training: bool, states: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        compared = super()._compare(batch, is_training, states, weight)
        head, index = self.verifier_head.to(states.device), batch["target_index"][0]
        teacher_UH = head.normalize(batch["target_states"][0])
        self.chances = states.new_zeros(2, len(states), dtype=torch.float32)
        for targets, slots in chunks(index, len(teacher_UH), self.drafter.config.vocab_size):
            p_uV = (head.logits(teacher_UH[targets]).float() / self.temperature).softmax(-1)
            p_nV = (p_uV if self.draft_token_ids is None else p_uV[:, self.draft_token_ids])[
                index[slots] - targets.start
            ]
            q_nV = (linear(states[slots], weight).float() / self.temperature).softmax(-1)
            greedy = p_nV.gather(1, q_nV.argmax(-1, keepdim=True)).squeeze(1)
            self.chances[:, slots] = torch.stack([torch.minimum(p_nV, q_nV).sum(-1), greedy])
        return compared

    def by_anchor(self, batch: Mapping[str, Any], num_depths: int) -> tuple[Tensor, Tensor]:
        """The last batch's anchors that are trained on: document and place [2, M], and chances [2, M, K].

        Where a depth isn't trained on, as behind the end of the text, the chance is NaN.
        """
        trained = batch["trained_slots"][0]
        anchors, depths = batch["anchors"][0, trained], batch["depths"][0, trained]
        num_positions = batch["document_ids"].numel()
        table = self.chances.new_full((2, num_positions, num_depths), torch.nan)
        table[:, anchors, depths] = self.chances
        places = torch.stack([batch["document_ids"][0], batch["position_ids"][0, :num_positions]])
        is_learnt = ~table[0, :, 0].isnan()
        return places[:, is_learnt], table[:, is_learnt]


def expected_drafts(places_2M: Tensor, chances_MK: Tensor) -> NDArray[np.float64]:
    """How often sampling would draft each position of the drafts, and have it accepted.

    Args:
        places_2M: document and place of each anchor, in order, with nothing dropped.
        chances_MK: of acceptance if all positions before are accepted; NaN where the text has ended.

    Returns:
        [2, K]: reached and accepted, as sums of probabilities.
    """
    places = places_2M.cpu().numpy()
    chances = chances_MK.double().cpu().numpy()
    survival = np.nan_to_num(chances).cumprod(1)
    reached = np.concatenate([np.ones((len(chances), 1)), survival[:, :-1]], 1)
    ends = np.concatenate([reached - survival, survival[:, -1:]], 1)  # chance to end after 0 .. K tokens
    num_depths = chances.shape[1]
    is_first = np.ones(len(chances), bool)
    is_first[1:] = (np.diff(places[0]) != 0) | (np.diff(places[1]) != 1)
    # The chance that a draft begins at each anchor.
    starts = np.concatenate([is_first.astype(np.float64), np.zeros(num_depths + 1)])
    for number in range(len(chances)):
        if is_first[number]:
            starts[number : number + num_depths + 1] = 0  # an answer's drafts don't reach into the next answer
            starts[number] = 1
        starts[number + 1 : number + num_depths + 2] += starts[number] * ends[number]
    weights = starts[: len(chances), None]
    return np.stack([(weights * reached * ~np.isnan(chances)).sum(0), (weights * survival).sum(0)])
