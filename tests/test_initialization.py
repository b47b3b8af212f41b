import pytest
import torch
import transformers
from peft import LoraConfig
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from peagle_hf import (
    CODDataCollator,
    HiddenStatesDataset,
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainingArguments,
    add_adapter,
    build_datasets,
    build_drafter,
    start_linearly,
    train,
)
from peagle_hf.training import initialization
from peagle_hf.training.initialization import RIDGE, factors, mean_square, ridge_regression
from peagle_hf.training.objective import Objective, load_head


def new_drafter(tiny_verifier, **options):
    torch.manual_seed(0)
    drafter = PeagleForSpeculation(PeagleConfig.from_verifier(str(tiny_verifier), num_layers=2, **options))
    drafter.load_verifier(str(tiny_verifier))
    return drafter


def features_and_targets(drafter, dataset):
    """What start_linearly regresses, one position after another, from the documents themselves."""
    features, targets, head = [], [], load_head(drafter)
    for number in range(len(dataset)):
        for document in dataset[number]["documents"]:
            tokens, mask = document["input_ids"], document["loss_mask"]
            places = [place for place in range(len(tokens) - 2) if mask[place + 1] and mask[place + 2]]
            for place, last in zip(places, document["target_states"], strict=True):
                states = document["hidden_states"][place].float().flatten()
                if drafter.config.norm_before_fc:
                    states = drafter.input_norm(states)
                if drafter.config.has_fc_norm:
                    states = drafter.fc_norm(states)
                embedding = drafter.layers[0].input_layernorm(drafter.embed_tokens.weight[tokens[place + 1]])
                features.append(torch.cat([states, embedding]).detach())
                targets.append(head.normalize(last))
    return torch.stack(features).double(), torch.stack(targets).double()


def ridge(features, targets):
    """Least squares with one more row for each feature, which pulls its weight to zero."""
    scale = features.pow(2).mean(0).sqrt()
    pull = torch.diag(scale * (RIDGE * len(features)) ** 0.5)
    rows = torch.cat([features, pull])
    return torch.linalg.lstsq(rows, F.pad(targets, (0, 0, 0, len(pull)))).solution


@pytest.mark.parametrize("options", [{}, {"norm_before_fc": True}, {"fc_norm": True}, {"norm_before_residual": False}])
def test_the_first_layer_is_the_ridge_regression_of_the_next_state(tiny_verifier, tiny_data, options):
    drafter, dataset = new_drafter(tiny_verifier, **options), HiddenStatesDataset(tiny_data, total_seq_len=64)
    attention, before = drafter.layers[0].self_attn, new_drafter(tiny_verifier, **options).layers[0].self_attn
    start_linearly(drafter, dataset)
    features, targets = features_and_targets(drafter, dataset)
    size = drafter.config.hidden_size
    states, embedding = ridge(features, targets).split([features.shape[1] - size, size])
    torch.testing.assert_close(drafter.fc.weight.T.double(), states, rtol=1e-3, atol=1e-4)
    if drafter.config.norm_before_residual:
        embedding = embedding / (features[:, : len(states)] @ states).pow(2).mean().sqrt()
    value = (attention.v_proj.weight - before.v_proj.weight)[:, :size]
    output = attention.o_proj.weight - before.o_proj.weight
    heads = attention.q_proj.out_features // attention.v_proj.out_features
    spread = value.unflatten(0, (-1, attention.head_dim)).repeat_interleave(heads, dim=0).flatten(0, 1)
    left, singular, right = torch.linalg.svd(embedding.T)
    rank = attention.v_proj.out_features
    closest = left[:, :rank] * singular[:rank] @ right[:rank]
    torch.testing.assert_close((output @ spread).double(), closest, rtol=1e-3, atol=1e-4)


def test_a_start_from_the_rows_is_nearer_to_the_verifier_than_noise(tiny_verifier, tiny_data):
    dataset, losses = HiddenStatesDataset(tiny_data, total_seq_len=64), []
    for fitted in (False, True):
        drafter = new_drafter(tiny_verifier)
        if fitted:
            start_linearly(drafter, dataset)
        batches = [CODDataCollator(num_depths=1)([dataset[number]]) for number in range(len(dataset))]
        with torch.no_grad():
            objective = Objective(drafter, load_head(drafter))
            losses.append(sum(objective(drafter, batch).loss.item() for batch in batches))
    assert losses[1] < 0.9 * losses[0]


def test_the_same_rows_give_the_same_start_whichever_process_reads_them(tiny_verifier, tiny_data):
    starts = []
    for num_workers in (0, 0, 2):
        drafter = new_drafter(tiny_verifier)
        start_linearly(drafter, HiddenStatesDataset(tiny_data, total_seq_len=64), num_workers=num_workers)
        starts.append(drafter.state_dict())
    for other in starts[1:]:
        assert all(torch.equal(starts[0][name], other[name]) for name in starts[0])


def test_processes_that_read_are_started_as_the_arguments_say(tiny_verifier, tiny_data, monkeypatch):
    contexts = []
    monkeypatch.setattr(
        initialization, "DataLoader", lambda *args, **options: contexts.append(options) or DataLoader(*args, **options)
    )
    dataset, drafter = HiddenStatesDataset(tiny_data, total_seq_len=64), new_drafter(tiny_verifier)
    start_linearly(drafter, dataset, num_workers=1, multiprocessing_context="forkserver")
    start_linearly(drafter, dataset, multiprocessing_context="forkserver")  # the linear start starts no process here
    assert [one.get("multiprocessing_context") for one in contexts] == ["forkserver", None]


def test_a_drafter_without_its_verifiers_embeddings_or_with_an_adapter_is_refused(tiny_verifier, tiny_data):
    dataset, drafter = HiddenStatesDataset(tiny_data, total_seq_len=64), new_drafter(tiny_verifier)
    adapted = add_adapter(drafter, LoraConfig(target_modules="all-linear"))
    for other in (PeagleForSpeculation(drafter.config), adapted):
        with pytest.raises(PeagleError, match="load_verifier before"):
            start_linearly(other, dataset)


def test_collinear_and_constant_features_have_a_finite_map():
    features = torch.randn(50, 3, dtype=torch.float64)
    features = torch.cat([features, features[:, :1], torch.zeros(50, 1)], dim=1)
    second, solved = features.T @ features / 50, torch.randn(2, 50, dtype=torch.float64).mm(features).T / 50
    ridge_regression(second, solved)
    assert solved.isfinite().all()
    assert not solved[-1].any()


def test_the_regression_solves_in_place_as_a_general_solver_does():
    features = torch.randn(90, 40, dtype=torch.float64) * torch.logspace(-3, 3, 40, dtype=torch.float64)
    second, cross = features.T @ features / 90, torch.randn(8, 90, dtype=torch.float64).mm(features).T / 90
    deviation = second.diagonal().sqrt()
    scaled = second / deviation[:, None] / deviation + RIDGE * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.solve(scaled, cross / deviation[:, None]) / deviation[:, None]
    square = ((second[:30, :30] @ expected[:30]) * expected[:30]).sum() / 8
    places = second.data_ptr(), cross.data_ptr()
    found_deviation = ridge_regression(second, cross)
    assert (second.data_ptr(), cross.data_ptr()) == places
    torch.testing.assert_close(cross, expected, rtol=1e-10, atol=0)
    assert mean_square(second, cross[:30], found_deviation) == pytest.approx(float(square), rel=1e-10)


@pytest.mark.fault("a hidden state is NaN", "The linear start ends with the advice to verify the cache.")
def test_moments_that_are_no_numbers_are_refused():
    second = torch.eye(3, dtype=torch.float64)
    second[1, 1] = torch.nan
    with pytest.raises(PeagleError, match="cache verify"):
        ridge_regression(second, torch.ones(2, 3, dtype=torch.float64).T)


def peak_of(run):
    """The most bytes that tensors on the CPU took at once within `run`, beside those that were there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def widen(monkeypatch, wide):
    """Let collated states be wide enough for the moments to be most of what a linear start needs."""
    collate = CODDataCollator.__call__

    def widened(self, features):
        batch = collate(self, features)
        return {**batch, "hidden_states": batch["hidden_states"].float() @ wide}

    monkeypatch.setattr(CODDataCollator, "__call__", widened)


@pytest.mark.parametrize("options", [{}, {"norm_before_fc": True}, {"fc_norm": True}])
def test_a_linear_start_needs_little_more_than_its_matrix(tiny_verifier, tiny_data, monkeypatch, options):
    drafter, dataset = new_drafter(tiny_verifier, **options), HiddenStatesDataset(tiny_data, total_seq_len=600)
    size, width = drafter.config.hidden_size, 3 * 683
    drafter.fc = torch.nn.Linear(width, size, bias=False)
    widen(monkeypatch, torch.randn(3 * size, width))
    matrix = 8 * (width + size) * (width + 2 * size)
    head = load_head(drafter)
    assert matrix < peak_of(lambda: start_linearly(drafter, dataset, head)) < 1.2 * matrix


@pytest.mark.fault("the device has no memory left in the linear start", "It ends with what it needs and what to do.")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_linear_start_without_the_memory_says_what_it_needs(tiny_verifier, tiny_data, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(PeagleError, match=r"needs 0.0 GiB of cpu .*--no-linear-start"):
        start_linearly(new_drafter(tiny_verifier), HiddenStatesDataset(tiny_data, total_seq_len=64))


@pytest.mark.parametrize("rank", [2, 6, 9])
def test_factors_give_the_closest_map_of_their_rank(rank):
    matrix = torch.randn(6, 6)
    value, output = factors(matrix, rank)
    assert value.shape == (rank, 6)
    assert output.shape == (6, rank)
    error = torch.linalg.matrix_norm(matrix - output @ value)
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_a_start_for_no_verifier_is_refused(tiny_verifier, tiny_data):
    config = PeagleConfig.from_verifier(str(tiny_verifier))
    config.speculators_config["verifier"]["name_or_path"] = None
    drafter = PeagleForSpeculation(config)
    drafter.set_trained(False, torch.float32)  # the user's own embeddings must stay
    with pytest.raises(PeagleError, match="names no verifier"):
        start_linearly(drafter, HiddenStatesDataset(tiny_data, total_seq_len=64))


class AtTheStart(TrainerCallback):
    """Keeps `fc` as training begins with it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        AtTheStart.fc = model.fc.weight.detach().clone()


def test_training_starts_linearly_unless_told_otherwise(train_flags, tiny_verifier, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [AtTheStart])

    def start(**changes):
        trainer = train(PeagleTrainingArguments(**train_flags | {"max_steps": 2} | changes))
        return AtTheStart.fc, trainer.model.fc.weight.detach()

    fitted, trained = start()
    drafter = build_drafter(PeagleTrainingArguments(**train_flags))
    random = drafter.fc.weight.detach().clone()
    start_linearly(drafter, build_datasets(PeagleTrainingArguments(**train_flags))[0])
    assert torch.equal(fitted, drafter.fc.weight)
    resumed, _ = start(max_steps=3)
    assert not torch.equal(resumed, fitted)
    torch.testing.assert_close(resumed, trained)
    assert torch.equal(start(linear_start=False, resume=False)[0], random)


def test_queries_of_a_new_drafter_are_the_keys_of_their_position(tiny_verifier, tmp_path):
    drafter = new_drafter(tiny_verifier)
    config = drafter.config.transformer_layer_config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in drafter.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        assert torch.equal(query.unflatten(0, (-1, config.head_dim))[::group].flatten(0, 1), key)
        inputs = F.rms_norm(torch.randn(2000, key.shape[1]), (key.shape[1],))
        score = ((inputs @ key.T).unflatten(1, (-1, config.head_dim)).pow(2).sum(-1) / config.head_dim**0.5).mean()
        assert 6 < score < 10
    torch.nn.init.normal_(drafter.layers[0].self_attn.q_proj.weight)
    drafter.save_pretrained(tmp_path)
    loaded = PeagleForSpeculation.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].self_attn.q_proj.weight, drafter.layers[0].self_attn.q_proj.weight)
