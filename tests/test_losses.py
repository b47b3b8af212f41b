"""The chunked losses against the plain formulas with whole logits."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from code_blocks import blocks
from test_modeling import make_batch, make_config, make_pair
from torch.nn import functional as F

from peagle_hf import PeagleError, register_loss
from peagle_hf.training import losses
from peagle_hf.training.objective import FOR_THE_LOSS

N, U, H, V = 37, 11, 8, 23


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, head = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    teacher, teacher_head = torch.randn(U, H, generator=generator), torch.randn(V, H, generator=generator)
    target = torch.randint(0, U, (N,), generator=generator).sort().values
    student, head = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return student, head, teacher.to(dtype), lambda states: F.linear(states, teacher_head.to(dtype)), target


def overlap(p, q):
    return torch.minimum(p, q).sum(-1)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def lk_hybrid(p, q):
    weight = torch.exp(-3 * overlap(p, q).detach())
    return weight * kl(p, q) + (1 - weight) * (1 - overlap(p, q))


FORMULAS = {
    "kl_div": kl,
    "rkl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "ce": lambda p, q: -q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1).log(),
    "tv": lambda p, q: 1 - overlap(p, q),
    "nla": lambda p, q: -overlap(p, q).log(),
    "lk_hybrid": lk_hybrid,
}


def plain(name, student, head, teacher, teacher_logits, target):
    precision = torch.promote_types(student.dtype, torch.float32)
    p = F.softmax(teacher_logits(teacher).to(precision), -1)[target]
    return FORMULAS[name](p, F.softmax(F.linear(student, head).to(precision), -1)).sum()


def test_every_divergence_has_a_formula_here():
    assert FORMULAS.keys() == losses.DIVERGENCES.keys()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 1 << 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, name, chunk_elements, dtype, tolerance):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk_elements)
    student, head, *rest = inputs(dtype)
    expected = plain(name, student, head, *rest)
    expected_grads = torch.autograd.grad(expected * 0.3, [student, head])
    loss, student_top, teacher_top = losses.distillation_loss(student, head, *rest, {name: 1.0})
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(torch.autograd.grad(loss * 0.3, [student, head]), expected_grads, strict=True):
        assert ((grad - expected_grad).float().norm() / expected_grad.float().norm()).item() < tolerance
    assert torch.equal(student_top, F.linear(student, head).argmax(-1))
    assert torch.equal(teacher_top, rest[1](rest[0]).argmax(-1))


@pytest.mark.parametrize(
    "name", [name for name in FORMULAS if name != "lk_hybrid"]
)  # autograd takes this weight for a constant
def test_gradcheck(monkeypatch, name):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 5 * V)
    student, head, *rest = inputs(torch.float64, seed=1)
    torch.autograd.gradcheck(
        lambda student, head: losses.distillation_loss(student, head, *rest, {name: 1.0})[0], (student, head)
    )


def test_a_weighted_sum_of_losses():
    student, head, *rest = inputs(torch.float64)
    weights = losses.parse_loss('{"kl_div": 0.25, "tv": 2}')
    loss, _, _ = losses.distillation_loss(student, head, *rest, weights)
    expected = 0.25 * plain("kl_div", student, head, *rest) + 2 * plain("tv", student, head, *rest)
    torch.testing.assert_close(loss, expected)
    grads, expected_grads = (torch.autograd.grad(value, [student, head]) for value in (loss, expected))
    torch.testing.assert_close(grads, expected_grads)


def looped_weights(chances, num_depths, alpha):
    """The weights of slots by (anchor, depth), by loops over their probabilities; where there is no slot that is 1."""
    survival = {place: (1 - alpha) * chance + alpha for place, chance in chances.items()}

    def weight(anchor, depth):
        lasts = [last for last in range(depth, num_depths) if (anchor, last) in survival]
        return sum(math.prod(survival.get((anchor, before), 1.0) for before in range(last + 1)) for last in lasts)

    return {place: weight(*place) for place in chances}


def squared_chance(chance):
    return chance.square() + 0.1


@pytest.mark.parametrize("chunk_elements", [5 * V, 1 << 20])
@pytest.mark.parametrize("head_is_trained", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 2e-2)])
def test_slot_weights_follow_the_drafter_and_are_constants_to_the_gradient(
    monkeypatch, chunk_elements, head_is_trained, dtype, tolerance
):
    """Weights of the drafter's probability of the verifier's token, against whole softmaxes and autograd."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk_elements)
    student, head, teacher, teacher_logits, target = inputs(dtype)
    head.requires_grad_(head_is_trained)
    wanted = [student, head] if head_is_trained else [student]
    precision = torch.promote_types(dtype, torch.float32)
    p = F.softmax(teacher_logits(teacher).to(precision), -1)[target]
    q = F.softmax(F.linear(student, head).to(precision), -1)
    chance = q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1).detach()
    expected = (squared_chance(chance) * kl(p, q)).sum()
    given = []

    def slot_weights(chances):
        given.append(chances)
        return squared_chance(chances)

    arguments = (student, head, teacher, teacher_logits, target, {"kl_div": 1.0})
    loss = losses.distillation_loss(*arguments, slot_weights)[0]
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for chances in given:
        torch.testing.assert_close(chances, chance, rtol=tolerance, atol=tolerance)
    expected_grads = torch.autograd.grad(expected * 0.3, wanted)
    for grad, expected_grad in zip(torch.autograd.grad(loss * 0.3, wanted), expected_grads, strict=True):
        assert ((grad - expected_grad).float().norm() / expected_grad.float().norm()).item() < tolerance
    known = losses.distillation_loss(*arguments, squared_chance(chance))[0]
    torch.testing.assert_close(known, expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(torch.autograd.grad(known * 0.3, wanted), expected_grads, strict=True):
        assert ((grad - expected_grad).float().norm() / expected_grad.float().norm()).item() < tolerance
    same = losses.distillation_loss(*arguments, torch.ones_like)
    unweighted = losses.distillation_loss(*arguments)
    for one, other in zip(same, unweighted, strict=True):
        assert torch.equal(one, other)


def test_weights_that_need_no_probabilities_cost_no_pass_for_them(monkeypatch):
    student, head, *rest = inputs(torch.float32)
    monkeypatch.setattr(losses, "verifier_token_chances", None)
    weights = torch.rand(student.shape[0])
    losses.distillation_loss(student, head, *rest, {"kl_div": 1.0}, weights)[0].backward()
    assert head.grad is not None


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("draft_vocab_size", [40, 96])
def test_the_objective_is_the_weighted_sum_over_rollouts(train_head, draft_vocab_size):
    """Loss and gradients in float64, against whole softmaxes, autograd and a loop over the slots."""
    config, alpha, decay = make_config(draft_vocab_size=draft_vocab_size, num_depths=5), 0.3, 0.9
    drafter, objective = make_pair(config, dpace_alpha=alpha)
    objective.configure("kl_div", decay, alpha)
    drafter.double().train().lm_head.weight.requires_grad_(train_head)
    objective.verifier_head.double()
    objective.draft_head.double()
    batch = make_batch(config, (37, 12, 58))
    loss = objective(drafter, batch, 10).loss
    wanted = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, wanted)

    inputs_of_drafter = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
    logits = drafter(**inputs_of_drafter, head_function=F.linear)
    own_head = objective.draft_head
    teacher = own_head.logits(own_head.normalize(batch["target_states"][0].double()))[batch["target_index"][0]]
    p, q = F.softmax(teacher.double(), -1), F.softmax(logits, -1)
    chance = q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1).tolist()
    trained = batch["trained_slots"][0]
    places = list(zip(batch["anchors"][0, trained].tolist(), batch["depths"][0, trained].tolist(), strict=True))
    looped = looped_weights(dict(zip(places, chance, strict=True)), config.num_depths, alpha)
    weights = torch.tensor([decay**depth * looped[anchor, depth] for anchor, depth in places], dtype=torch.float64)
    expected = (weights * kl(p, q)).sum() / 10
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_survival_weights_are_the_formula(alpha):
    """In float64 against loops, with rollouts cut at any depth, none, and one whose first row isn't learnt."""
    generator = torch.Generator().manual_seed(0)
    num_positions, num_depths = 40, 6
    rows = []
    for anchor in range(0, num_positions, 2):
        length = int(torch.randint(0, num_depths + 1, (1,), generator=generator))
        rows += [(anchor, depth) for depth in range(anchor == 20, length)]
    rows = [rows[index] for index in torch.randperm(len(rows), generator=generator)]
    chance = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    anchors, depths = torch.tensor(rows).T

    weights = looped_weights(dict(zip(rows, chance.tolist(), strict=True)), num_depths, alpha)
    found = losses.survival_weights(chance, anchors, depths, num_positions, num_depths, alpha)
    expected = torch.tensor([weights[row] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_fn", ["kl", "{}", "[1]", '{"kl_div": "much"}', '{"kl": 1}', "{"])
def test_an_unknown_loss_is_refused(loss_fn):
    with pytest.raises(PeagleError, match="kl_div, rkl, jsd, ce, tv, nla, lk_hybrid"):
        losses.parse_loss(loss_fn)


@pytest.mark.parametrize(
    "weights", ['{"kl_div": -1}', '{"kl_div": 0}', '{"tv": 1, "ce": NaN}', '{"tv": 1, "ce": Infinity}']
)
def test_weights_that_a_loss_can_not_be_lowered_by_are_refused(weights):
    with pytest.raises(PeagleError, match="must be 0 or above"):
        losses.parse_loss(weights)
    assert losses.parse_loss('{"tv": 1, "ce": 0}') == {"tv": 1.0, "ce": 0.0}


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 4 * V)
    largest = 0

    def watch(student_nV, *rest):
        nonlocal largest
        largest = max(largest, student_nV.shape[0])
        return divergence(student_nV, *rest)

    divergence = losses._divergence
    monkeypatch.setattr(losses, "_divergence", watch)
    student, head, *rest = inputs(torch.float32)
    losses.distillation_loss(student, head, *rest, {"kl_div": 1.0})
    assert 0 < largest <= max(4, rest[-1].bincount().max().item())


def test_a_frozen_head_gets_no_gradient():
    student, head, *rest = inputs(torch.float32)
    head = head.detach()
    loss, _, _ = losses.distillation_loss(student, head, *rest, {"kl_div": 1.0})
    loss.backward()
    assert head.grad is None
    assert student.grad is not None


def test_without_gradients_nothing_is_formed():
    student, head, *rest = inputs(torch.float32)
    with torch.no_grad():
        loss, _, _ = losses.distillation_loss(student, head, *rest, {"kl_div": 1.0})
    torch.testing.assert_close(loss, plain("kl_div", student, head, *rest).detach(), rtol=1e-5, atol=1e-5)
    assert not loss.requires_grad


def test_no_row_to_learn_gives_zero():
    student, head, teacher, teacher_logits, target = inputs(torch.float32)
    loss, _, _ = losses.distillation_loss(student[:0], head, teacher[:0], teacher_logits, target[:0], {"kl_div": 1.0})
    assert loss.item() == 0


@pytest.mark.parametrize("divisor", [3, 300])
def test_16_bit_gradients_are_scaled_without_rounding_the_scale(divisor):
    """1/300 in bfloat16 is 0.2 % too small, for every element alike; single elements are rounded either way."""
    student, head, *rest = inputs(torch.bfloat16)
    whole, scaled = (
        torch.autograd.grad(losses.distillation_loss(student, head, *rest, {"kl_div": 1.0})[0] / by, (student, head))
        for by in (1, divisor)
    )
    for one, part in zip(whole, scaled, strict=True):
        ratio = (part.double() * divisor * one.double()).sum() / one.double().square().sum()
        assert ratio == pytest.approx(1, abs=5e-4)


@pytest.fixture
def own_losses(monkeypatch):
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(losses, "DIVERGENCES", dict(losses.DIVERGENCES))


def test_a_loss_from_outside_the_package_trains(own_losses, monkeypatch, tmp_path, tiny_verifier, tiny_data):
    """The script of docs/training.md: at most 15 lines, whose gradient is that of its distance."""
    page = Path(__file__).parents[1] / "docs" / "training.md"
    [script] = [block.code for block in blocks(page.read_text()) if "register_loss(" in block.code]
    assert len([line for line in script.splitlines() if line]) <= 15
    (tmp_path / "own_loss.py").write_text(script)
    flags = (
        f"--loss-fn hellinger --verifier-name-or-path {tiny_verifier} --data-path {tiny_data} --num-depths 3 "
        f"--save-path {tmp_path} --num-layers 2 --total-seq-len 64 --epochs 4 --logging-steps 1 --use-cpu"
    )
    monkeypatch.setattr(sys, "argv", ["own_loss.py", *flags.split(), "--draft-vocab-size", "64"])
    runpy.run_path(str(tmp_path / "own_loss.py"))
    state = json.loads(max(tmp_path.glob("[0-9]/trainer_state.json")).read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert 0 < logged[-1] < logged[0] < 1  # the largest value of the squared distance

    student, head, *rest = inputs(torch.float64)
    torch.autograd.gradcheck(
        lambda student, head: losses.distillation_loss(student, head, *rest, {"hellinger": 1.0})[0], (student, head)
    )
    assert losses.parse_loss('{"hellinger": 1, "tv": 0.5}') == {"hellinger": 1.0, "tv": 0.5}


@pytest.mark.parametrize(
    ("name", "message"), [("my loss", "can't name a loss"), ("", "can't name a loss"), ("tv", "comes with peagle_hf")]
)
def test_names_that_no_loss_may_have(own_losses, name, message):
    with pytest.raises(PeagleError, match=message):
        register_loss(name, losses.DIVERGENCES["tv"])
