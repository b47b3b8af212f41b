"""Offline acceptance: against a loop over every anchor, and against generation on the same text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_answers
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM

from peagle_hf import (
    AcceptanceArguments,
    HiddenStatesDataset,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainingArguments,
    acceptance,
    cli,
    draft_and_verify,
    train,
)
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.prepared_dataset import split_rows
from peagle_hf.evaluation.acceptance import _kept_back
from peagle_hf.hub.training_json import read_record
from peagle_hf.training.metrics import summarize

DEPTHS, NEW_TOKENS, ANSWERS = 3, 70, 4


@pytest.fixture(scope="module", params=[None, 50], ids=["whole", "reduced"])
def trained(request, tmp_path_factory, tiny_verifier):
    """A drafter that is right at times, and the folder of answers that it was trained on."""
    folder = tmp_path_factory.mktemp("acceptance")
    # In bfloat16 two tokens that are nearly equally likely for the verifier may change places.
    answers = write_answers(folder, tiny_verifier, NEW_TOKENS, torch.float32)
    options = {"num_train_epochs": 1, "draft_vocab_size": request.param, "num_depths": DEPTHS}
    train(PeagleTrainingArguments(**answers, **options))
    return folder / "checkpoints" / "checkpoint_best", folder


@torch.no_grad()
def draft_at_every_anchor(drafter, verifier, document, num_depths):
    """By anchor, for as many depths as are learnt: whether drafter and verifier, and text and verifier, agree."""
    tokens, mask = document["input_ids"], document["loss_mask"]
    chosen = verifier(tokens[None]).logits[0].argmax(-1)
    outcomes = {}
    for anchor in range(len(tokens) - 2):
        if mask[anchor + 1] and mask[anchor + 2]:
            ids, states = tokens[1 : anchor + 2], document["hidden_states"][: anchor + 1]
            real = torch.ones(1, anchor + 1, dtype=torch.bool)
            proposed = drafter.draft(ids[None], states[None], real, num_depths, DynamicCache())[0].argmax(-1)
            proposed = proposed if drafter.draft_token_ids is None else drafter.draft_token_ids[proposed]
            targets = chosen[anchor + 1 : anchor + 1 + num_depths][: len(tokens) - anchor - 2]
            outcomes[anchor] = [
                (bool(proposed[depth] == target), bool(tokens[anchor + 2 + depth] == target))
                for depth, target in enumerate(targets)
            ]
    return outcomes


@pytest.mark.parametrize("num_depths", [DEPTHS, 6])
def test_every_anchor_is_counted_by_the_definition(trained, tiny_verifier, tmp_path, num_depths, monkeypatch):
    checkpoint, folder = trained
    monkeypatch.setattr("peagle_hf.data.partition.SLOTS_PER_POSITION", 2)  # so that rows are partitioned
    report_path = tmp_path / "acceptance.json"
    flags = {"model": checkpoint, "data-path": folder, "output": report_path, "num-speculative-tokens": num_depths}
    cli.main(["acceptance", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    report = json.loads(report_path.read_text())
    assert (report["drafter"], report["drafter_link"]) == (str(checkpoint.resolve()), str(checkpoint))

    drafter = PeagleForSpeculation.from_pretrained(checkpoint).eval()
    verifier = LlamaForCausalLM.from_pretrained(tiny_verifier).eval()
    dataset = HiddenStatesDataset(folder)
    expected = {name: [0] * num_depths for name in ("learnt", "correct", "reached", "accepted")}
    for row in range(ANSWERS):
        for outcome in draft_at_every_anchor(drafter, verifier, dataset._load_sample(row), num_depths).values():
            reached = True
            for depth, (is_correct, follows) in enumerate(outcome):
                expected["learnt"][depth] += 1
                expected["correct"][depth] += is_correct
                expected["reached"][depth] += reached
                expected["accepted"][depth] += reached and is_correct
                reached = reached and is_correct and follows
    copies = report["num_rows"] // ANSWERS
    everywhere = report["every_anchor"]
    assert everywhere["reached"] == [copies * count for count in expected["reached"]]
    assert everywhere["accepted"] == [copies * count for count in expected["accepted"]]
    pairs = zip(expected["correct"], expected["learnt"], strict=True)
    assert everywhere["accuracy"] == pytest.approx([correct / learnt for correct, learnt in pairs])
    assert 0 < expected["accepted"][1] < expected["reached"][1] < expected["reached"][0]
    summary = summarize(torch.tensor(list(expected.values())))
    assert everywhere["acceptance_length"] == pytest.approx(summary["acceptance_length"])
    assert report["acceptance_length"] == pytest.approx(1 + sum(report["per_position_acceptance"]))


@pytest.mark.parametrize("num_depths", [DEPTHS, 5])
def test_sampled_acceptance_is_expected_by_the_definition(trained, tiny_verifier, tmp_path, num_depths):
    """Chances from both models' distributions at every anchor; a draft starts where the one before may have ended."""
    checkpoint, folder = trained
    arguments = AcceptanceArguments(str(checkpoint), str(folder), str(tmp_path / "a.json"), temperature=0.7)
    report = acceptance(replace(arguments, num_speculative_tokens=num_depths))["sampled"]
    drafter = PeagleForSpeculation.from_pretrained(checkpoint).eval()
    verifier = LlamaForCausalLM.from_pretrained(tiny_verifier).eval()
    dataset = HiddenStatesDataset(folder)
    counts = {method: torch.zeros(2, num_depths, dtype=torch.double) for method in ("probabilistic", "greedy")}
    for row in range(ANSWERS):
        document = dataset._load_sample(row)
        for method, chances in chances_at_every_anchor(drafter, verifier, document, num_depths, 0.7).items():
            visits = dict.fromkeys(chances, 0.0) | {min(chances): 1.0}
            for anchor, by_depth in chances.items():
                survives = 1.0
                for depth in range(num_depths + 1):
                    chance = by_depth[depth] if depth < len(by_depth) else 0.0
                    if depth < len(by_depth):
                        counts[method][:, depth] += visits[anchor] * survives * torch.tensor([1, chance])
                    if anchor + depth + 1 in visits:
                        visits[anchor + depth + 1] += visits[anchor] * survives * (1 - chance)
                    survives *= chance
    for method, (reached, accepted) in counts.items():
        assert report[method]["conditional_acceptance"] == pytest.approx((accepted / reached).tolist(), abs=1e-4)
    assert report["probabilistic"]["acceptance_length"] > report["greedy"]["acceptance_length"] > 1


@torch.no_grad()
def chances_at_every_anchor(drafter, verifier, document, num_depths, temperature):
    """By method and anchor, for as many depths as are learnt: the chance of acceptance."""
    tokens, mask = document["input_ids"], document["loss_mask"]
    p = (verifier(tokens[None]).logits[0] / temperature).softmax(-1)
    found = {"probabilistic": {}, "greedy": {}}
    for anchor in range(len(tokens) - 2):
        if mask[anchor + 1] and mask[anchor + 2]:
            ids, states = tokens[1 : anchor + 2], document["hidden_states"][: anchor + 1]
            real = torch.ones(1, anchor + 1, dtype=torch.bool)
            scores = drafter.draft(ids[None], states[None], real, num_depths, DynamicCache())[0]
            q = torch.zeros(num_depths, p.shape[1])
            q[:, slice(None) if drafter.draft_token_ids is None else drafter.draft_token_ids] = (
                scores / temperature
            ).softmax(-1)
            p_here = p[anchor + 1 : len(tokens) - 1][:num_depths]
            q = q[: len(p_here)]
            found["probabilistic"][anchor] = torch.minimum(p_here, q).sum(-1).tolist()
            found["greedy"][anchor] = p_here.gather(1, q.argmax(-1, keepdim=True)).squeeze(1).tolist()
    return found


def test_the_rows_kept_back_are_those_of_the_drafters_own_training(trained, tmp_path):
    checkpoint, folder = trained
    arguments = AcceptanceArguments(str(checkpoint), str(folder), str(tmp_path / "a.json"), train_data_ratio=0.5)
    seed = read_record(checkpoint)["seed"]
    assert _kept_back(arguments, checkpoint) == split_rows(folder, 0.5, seed)[1]
    splits = [split_rows(folder, 0.5, other)[1] for other in range(99)]
    arguments.seed = next(other for other, split in enumerate(splits) if split != splits[seed])
    assert _kept_back(arguments, checkpoint) == splits[arguments.seed]
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    with pytest.raises(PeagleError, match=r"unknown has no training\.json.*Pass --seed"):
        _kept_back(AcceptanceArguments(str(unknown), str(folder), "a.json", train_data_ratio=0.5), unknown)


def test_a_cache_of_other_layers_is_refused(trained, tmp_path):
    checkpoint, folder = trained
    states = Path(shutil.copytree(folder / "hidden_states", tmp_path / "states"))
    manifest = replace(Manifest.read(states), aux_layer_ids=[1, 2, 3])
    manifest.write(states)
    with pytest.raises(PeagleError, match=r"aux_layer_ids is \[1, 2, 3\]"):
        acceptance(AcceptanceArguments(str(checkpoint), str(folder), str(tmp_path / "a.json"), str(states)))


@pytest.mark.fault("A row's hidden states can't be had", "`--skip-rows` leaves it out of the measurement by name.")
def test_rows_are_left_out_by_number(trained, tmp_path):
    checkpoint, folder = trained
    states = Path(shutil.copytree(folder / "hidden_states", tmp_path / "states"))
    (states / "hs_1.safetensors").unlink()
    arguments = AcceptanceArguments(str(checkpoint), str(folder), str(tmp_path / "a.json"), str(states))
    with pytest.raises(PeagleError, match="1 of"):
        acceptance(arguments)
    rows = len(HiddenStatesDataset(folder).data)
    report = acceptance(replace(arguments, skip_rows=[1, 1]))
    assert (report["num_rows"], report["skipped_rows"]) == (rows - 1, [1])


def test_generation_drafts_and_accepts_what_the_cached_states_say(
    trained, tiny_verifier, tmp_path, monkeypatch, capsys
):
    """The answers' cached states give the very counts of generating them, up to the last draft of each."""
    monkeypatch.setattr("peagle_hf.data.partition.SLOTS_PER_POSITION", 1)
    checkpoint, folder = trained
    data = HiddenStatesDataset(folder)
    documents = [data._load_sample(row) for row in range(ANSWERS)]
    prompts = [document["input_ids"][~document["loss_mask"]] for document in documents]
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0), value=3) for prompt in prompts])
    generated = LlamaForCausalLM.from_pretrained(tiny_verifier).generate(
        ids,
        attention_mask=(ids != 3).long(),
        custom_generate=draft_and_verify,
        drafter=PeagleForSpeculation.from_pretrained(checkpoint).eval(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    shortest = min(map(len, prompts))
    monkeypatch.setattr("peagle_hf.data.contexts.BOUNDS", (shortest + 1, shortest + 2, 10**6))
    report = acceptance(AcceptanceArguments(str(checkpoint), str(folder), str(tmp_path / "acceptance.json")))
    assert "Acceptance length" in capsys.readouterr().out  # also with --quiet, as it is what was asked for
    copies = report["num_rows"] // ANSWERS
    assert report["num_drafts"] == copies * generated.num_drafts
    # The first draft of an answer begins with its second token. Before it stand the prompt and one token.
    first = sum(len(prompt) == shortest for prompt in prompts) * copies
    by_context = list(report["by_context"].values())
    assert [row["num_drafts"] for row in by_context] == [0, first, report["num_drafts"] - first, 0, 0]
    for name in ("reached", "accepted"):
        assert np.sum([row[name] for row in by_context], axis=0).tolist() == report[name]
    cut = [
        ours - count / copies for ours, count in zip(generated.accepted_by_position, report["accepted"], strict=True)
    ]
    assert all(0 <= count <= ANSWERS for count in cut)  # the last draft of each goes on behind the end of the text
    assert abs(report["acceptance_length"] - generated.acceptance_length) < 0.1
    assert report["every_anchor"]["acceptance_length"] > report["acceptance_length"] + 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_speculative_tokens": 0}, "--num-speculative-tokens is 0"),
        ({"total_seq_len": 0}, "--total-seq-len is 0"),
        ({"train_data_ratio": 1.0}, "--train-data-ratio is 1.0 but must be .* below 1"),
        ({"train_data_ratio": 0.0}, "--train-data-ratio is 0.0"),
        ({"temperature": 0.0}, "--temperature is 0.0 but must be above 0"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"dtype": "int8"}, "--dtype is 'int8' but must be float32"),
    ],
)
def test_impossible_values_are_refused_by_their_flag(change, words):
    with pytest.raises(PeagleError, match=words):
        AcceptanceArguments("m", "d", "a.json", **change)
