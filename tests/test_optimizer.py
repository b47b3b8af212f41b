"""Muon and AdamW as one optimizer: each does what it does alone, and together they can be saved and scheduled."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_modeling import make_config
from torch import nn

from peagle_hf import PeagleError, PeagleForSpeculation, PeagleTrainingArguments
from peagle_hf.training.muon import Muon
from peagle_hf.training.optimizer import MuonWithAdamW, describe_optimizer, make_muon


def make_drafter() -> PeagleForSpeculation:
    torch.manual_seed(0)
    return PeagleForSpeculation(make_config())


def set_gradients(drafter: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in drafter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(drafter: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in drafter.named_parameters()}


def test_matrices_take_muons_step_and_the_rest_adamws() -> None:
    together, alone = make_drafter(), make_drafter()
    options = {"betas": (0.5, 0.6), "eps": 1e-2}
    optimizer = MuonWithAdamW(together.named_parameters(), lr=1e-2, weight_decay=0.1, momentum=0.8, **options)
    is_matrix = {
        name: parameter.ndim == 2 and name not in ("embed_tokens.weight", "lm_head.weight")
        for name, parameter in alone.named_parameters()
    }
    assert is_matrix["fc.weight"]
    assert not is_matrix["norm.weight"]
    named = dict(alone.named_parameters())
    others = [
        torch.optim.Muon(
            [named[name] for name in named if is_matrix[name]],
            lr=1e-2,
            weight_decay=0.1,
            momentum=0.8,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [named[name] for name in named if named[name].ndim != 2], lr=1e-2, weight_decay=0.0, **options
        ),
        torch.optim.AdamW(
            [named["embed_tokens.weight"], named["lm_head.weight"]], lr=1e-2, weight_decay=0.0, **options
        ),
    ]
    for step in range(3):
        for drafter in (together, alone):
            set_gradients(drafter, step)
        optimizer.step()
        for other in others:
            other.step()
    torch.testing.assert_close(weights(together), weights(alone))


def test_tables_that_peft_trains_whole_stay_adamws() -> None:
    adapted = get_peft_model(
        make_drafter(), LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens", "fc"])
    )
    optimizer = MuonWithAdamW(adapted.named_parameters(), lr=1e-2)
    named = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    matrices, *others = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    trained = {name: parameter for name, parameter in named.items() if "modules_to_save" in name}
    assert len(trained) == 2
    for name, parameter in trained.items():
        assert id(parameter) in (set.union(*others) if "embed_tokens" in name else matrices)


def test_it_goes_on_from_its_state_dict_with_the_scheduled_rate() -> None:
    whole = make_drafter()
    optimizer = MuonWithAdamW(whole.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for step in range(2):
        set_gradients(whole, step)
        optimizer.step()
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-3}
    resumed = copy.deepcopy(whole)
    again = MuonWithAdamW(resumed.named_parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for drafter, each in ((whole, optimizer), (resumed, again)):
        set_gradients(drafter, 2)
        each.step()
    assert all(torch.equal(one, weights(resumed)[name]) for name, one in weights(whole).items())
    assert len(again.state) == len(list(resumed.parameters()))


def test_the_arguments_name_it_and_deepspeed_cant_have_it(tmp_path, monkeypatch) -> None:
    assert PeagleTrainingArguments(tmp_path).optim == "muon"
    assert PeagleTrainingArguments(tmp_path, lora_r=4, from_pretrained="drafter").optim == "adamw_torch_fused"
    assert PeagleTrainingArguments(tmp_path, optim="sgd").optim == "sgd"
    assert PeagleTrainingArguments(tmp_path).weight_decay == 1
    assert PeagleTrainingArguments(tmp_path, optim="muon", lora_r=4, from_pretrained="drafter").weight_decay == 0
    with pytest.raises(PeagleError, match="optim is 'muonn'; it must be one of muon, adamw_torch"):
        PeagleTrainingArguments(tmp_path, optim="muonn")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert PeagleTrainingArguments(tmp_path).optim == "adamw_torch_fused"
    with pytest.raises(PeagleError, match="DeepSpeed cuts up the matrices"):
        PeagleTrainingArguments(tmp_path, optim="muon")


def test_training_says_what_muon_trains() -> None:
    optimizer = MuonWithAdamW(make_drafter().named_parameters(), lr=1e-2)
    said = describe_optimizer(optimizer, num_processes=2, is_replaced=False)
    assert said is not None
    number = len(optimizer.param_groups[0]["params"])
    assert said.startswith(f"Muon trains {number} matrices of 0.")
    assert "orthogonalised" not in said  # on a CPU it is PyTorch's own
    assert describe_optimizer(torch.optim.SGD(make_drafter().parameters()), 1, is_replaced=False) is None
    assert "DeepSpeed cuts up the matrices" in str(describe_optimizer(None, 2, is_replaced=True))


def test_muon_is_chosen_by_the_device_of_training(tmp_path, monkeypatch) -> None:
    """With FSDP the optimizer is made before the weights leave the CPU."""
    args = PeagleTrainingArguments(tmp_path, use_cpu=True)
    assert type(make_muon(make_drafter(), args)._parts[0]) is torch.optim.Muon
    monkeypatch.setattr(PeagleTrainingArguments, "device", torch.device("cuda"))
    assert type(make_muon(make_drafter(), args)._parts[0]) is Muon


def test_without_a_matrix_adamw_is_left_alone() -> None:
    drafter = make_drafter()
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(parameter.ndim != 2 or name == "embed_tokens.weight")
    before = weights(drafter)
    optimizer = MuonWithAdamW(drafter.named_parameters(), lr=1e-2)
    assert len(optimizer.param_groups[0]["params"]) == 1
    set_gradients(drafter, 0)
    optimizer.step()
    changed = {name for name, weight in weights(drafter).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, parameter in drafter.named_parameters() if parameter.requires_grad}


def test_schedules_that_ask_the_optimizer_for_its_rate_work_with_muon():
    from transformers import get_scheduler

    optimizer = MuonWithAdamW(torch.nn.Linear(4, 4).named_parameters(), lr=1e-3)
    assert get_scheduler("polynomial", optimizer, 1, 10).base_lrs == [1e-3] * len(optimizer.param_groups)
