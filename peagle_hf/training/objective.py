"""The objective of training: the drafter learns the verifier's distributions, and its would-be acceptance is counted.

Shape letters: L positions, R slots, N trained slots, U target positions, K depths, H hidden size, V verifier
vocabulary, Vd draft vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PeagleError
from ..model.drafter import PeagleForSpeculation
from ..verifier.head import VerifierHead
from .losses import CHUNK_ELEMENTS, SlotWeights, distillation_loss, parse_loss, survival_weights
from .metrics import count_by_depth, outcomes_by_anchor, reached_slots

FOR_THE_LOSS = ("labels", "target_states", "target_index")
"""What the objective takes of a batch; the drafter takes the rest."""


class ObjectiveOutput(NamedTuple):
    """Loss and counts of one batch.

    Attributes:
        loss: float32 scalar: the sum over trained slots divided by `num_items_in_batch`.
        counters: int64 [4, K], see `metrics.count_by_depth`.
        outcomes: int64 [4, trained anchors], None in training, see `metrics.outcomes_by_anchor`.
    """

    loss: Tensor
    counters: Tensor
    outcomes: Tensor | None


def load_head(
    drafter: PeagleForSpeculation,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VerifierHead:
    """Read the final norm and head of the verifier that a drafter's configuration names, and no other weight of it.

    Args:
        dtype: of the head if the drafter's own head is trained (default: as saved); a frozen one says it itself.

    Raises:
        PeagleError: the verifier can't be read.
    """
    own = drafter.lm_head.weight
    name = drafter.config.verifier_name_or_path
    if name is None:
        raise PeagleError("The drafter's configuration names no verifier, whose head gives the targets.")
    return VerifierHead.from_pretrained(name, dtype if own.requires_grad else own.dtype, revision, trust_remote_code)


class Objective:
    """Distillation of the verifier's next-token distributions into a drafter.

    It owns the verifier's head, which gives the targets and is never part of a checkpoint. A frozen head of the drafter
    that equals the verifier's shares its memory.

    Args:
        drafter: to be trained or measured, before it is wrapped or sharded. Its mode, training or evaluation, decides
            whether slots are weighted and over which vocabulary the verifier's token is taken.
        head: the verifier's final norm and head.
        loss_fn: see `losses.parse_loss`.
        depth_loss_decay: in training the loss of a slot at depth d is multiplied by this to the power d.
        dpace_alpha: in training a slot counts as much as `losses.survival_weights` says; None: all alike.

    Raises:
        PeagleError: the head's sizes are not those of this drafter's verifier, or there is no such loss.
    """

    def __init__(
        self,
        drafter: PeagleForSpeculation,
        head: VerifierHead,
        loss_fn: str = "kl_div",
        depth_loss_decay: float = 1.0,
        dpace_alpha: float | None = None,
    ):
        drafter.check_head(head)
        self.drafter = drafter
        self.draft_token_ids = drafter.draft_token_ids
        self.verifier_head, self.draft_head = head, drafter.restricted(head)
        own = drafter.lm_head.weight
        self._heads_are_equal = not own.requires_grad and torch.equal(self.draft_head.weight.to(own), own)
        self.configure(loss_fn, depth_loss_decay, dpace_alpha)

    def configure(self, loss_fn: str, depth_loss_decay: float, dpace_alpha: float | None) -> None:
        """Set the loss, as the arguments of the class do."""
        self.loss_weights = parse_loss(loss_fn)
        self.depth_loss_decay, self.dpace_alpha = depth_loss_decay, dpace_alpha

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> ObjectiveOutput:
        """Run the drafter over a batch and give its loss and its counts.

        Args:
            model: the drafter, or what it has been wrapped into.
            batch: of `CODDataCollator`: the arguments of `PeagleForSpeculation.forward`, and
                labels: int64 [1, R], the token that a slot is to predict, -100 where it isn't trained on;
                target_states: [1, U, H], the verifier's last states, before its final norm, of the target positions;
                target_index: int64 [1, N], which target position each of `trained_slots` has, ascending.
            num_items_in_batch: what the summed loss is divided by; default: N.
        """
        inputs = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
        is_training = self.drafter.training  # the mode of a wrapper, such as DeepSpeed's, may differ
        compare = partial(self._compare, batch, is_training)
        loss, student_N, teacher_N = model(**inputs, head_function=compare)
        divisor = torch.as_tensor(student_N.numel() if num_items_in_batch is None else num_items_in_batch)
        counters, outcomes = self._count(batch, is_training, student_N, teacher_N)
        return ObjectiveOutput(loss / divisor.clamp(min=1), counters, outcomes)

    def _compare(
        self, batch: Mapping[str, Any], is_training: bool, states: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, and the most likely token of the drafter [N] and of the verifier [N].

        In training the verifier's token is the most likely one of the draft vocabulary, in evaluation of the whole: one
        that the drafter doesn't have is one that it can't match.

        Args:
            states: [N, H], the drafter's.
            weight: [Vd, H], of its head.
        """
        head = self.draft_head
        if self._heads_are_equal and not weight.requires_grad:
            # A sharded forward pass has gathered this weight, so the head needs no copy of its own.
            head.weight = weight.detach()
        head.to(states.device)
        index = batch["target_index"][0]
        with torch.no_grad():
            teacher = head.normalize(batch["target_states"][0])
        slot_weights = self._slot_weights(batch, states) if is_training else None
        loss, student_N, teacher_U = distillation_loss(
            states, weight, teacher, head.logits, index, self.loss_weights, slot_weights
        )
        if self.draft_token_ids is not None:
            token_ids = self.draft_token_ids = self.draft_token_ids.to(states.device)
            student_N = token_ids[student_N]
            teacher_U = token_ids[teacher_U] if is_training else self._tokens_of_verifier(teacher)
        return loss, student_N, teacher_U[index]

    @torch.no_grad()
    def _tokens_of_verifier(self, teacher_UH: Tensor) -> Tensor:
        """The verifier's most likely token of its whole vocabulary, int64 [U], in chunks of logits."""
        head = self.verifier_head.to(teacher_UH.device)
        chunks = teacher_UH.split(max(1, CHUNK_ELEMENTS[teacher_UH.device.type] // self.drafter.config.vocab_size))
        return torch.cat([head.logits(chunk).argmax(-1) for chunk in chunks])

    def _slot_weights(self, batch: Mapping[str, Any], states: Tensor) -> SlotWeights | Tensor | None:
        """How much each trained slot counts, as `distillation_loss` takes it."""
        if self.depth_loss_decay == 1 and self.dpace_alpha is None:
            return None
        trained = batch["trained_slots"][0]
        anchors_N, depths_N = batch["anchors"][0, trained], batch["depths"][0, trained]
        decayed_N = self.depth_loss_decay ** depths_N.to(torch.promote_types(states.dtype, torch.float32))
        if self.dpace_alpha is None:
            return decayed_N
        sizes, alpha = (batch["document_ids"].numel(), self.drafter.config.num_depths), self.dpace_alpha
        return lambda chance_N: decayed_N * survival_weights(chance_N, anchors_N, depths_N, *sizes, alpha)

    def _count(
        self, batch: Mapping[str, Any], is_training: bool, student_N: Tensor, teacher_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The counters and the outcomes of `ObjectiveOutput`."""
        labels, trained = batch["labels"][0], batch["trained_slots"][0]
        anchors, depths = batch["anchors"][0], batch["depths"][0]
        trained_R = labels != -100
        correct_R, follows_R = torch.zeros_like(trained_R), torch.zeros_like(trained_R)
        correct_R[trained] = student_N == teacher_N
        follows_R[trained] = labels[trained] == teacher_N
        reached_R = reached_slots(correct_R, follows_R, trained_R, anchors, depths, self.drafter.config.num_depths)
        counters = count_by_depth(correct_R, trained_R, reached_R, depths, self.drafter.config.num_depths)
        if is_training:
            return counters, None
        outcomes = outcomes_by_anchor(correct_R, reached_R, anchors, batch["document_ids"][0], batch["position_ids"][0])
        return counters, outcomes
