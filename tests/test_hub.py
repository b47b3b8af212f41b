"""The hub: what is uploaded, what the card says, what is refused when. All against a real local HTTP server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from fake_hub import READ_TOKEN, TOKEN, fake_hub
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save, save_file
from test_distributed import torchrun
from test_evaluation import serve_by_itself
from test_trainer import StopAt, run
from transformers import AutoModel

from peagle_hf import (
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    PushArguments,
    PushToHubCallback,
    build_datasets,
    build_drafter,
    cli,
    push,
)
from peagle_hf.cli.parsing import flags
from peagle_hf.console import number_of
from peagle_hf.fingerprint import weights_of
from peagle_hf.hub.card import model_card
from peagle_hf.hub.evaluation_json import read_evaluation
from peagle_hf.hub.training_json import read_record
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.serving.launch import ServeArguments, drafting_command
from peagle_hf.verifier.head import check_trainable

VERIFIER = "some-lab/tiny-chat"
SERVED = {"config.json", "model.safetensors", "README.md"}
TEMPLATE = "{{ messages[0].content }}"
CHAT_FILES = {"chat_template.jinja": TEMPLATE.encode(), "chat_template_kwargs.json": b'{\n  "word": "it\'s"\n}\n'}


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_verifier):
    """A hub with the verifier on it, which this process takes for the hub, logged in."""
    with fake_hub() as hub:
        hub.add(VERIFIER, {path.name: path.read_bytes() for path in tiny_verifier.iterdir()})
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)  # newer than 1.5
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def hub_flags(train_flags):
    return {**train_flags, "push_to_hub": True, "hub_model_id": "my-lab/drafter", "verifier_name": VERIFIER}


@pytest.fixture(scope="module")
def trained(tiny_verifier, tiny_data, tmp_path_factory):
    """The folder of an ended run of one epoch on data with a prepare.json and a chosen chat template."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    shutil.copytree(tiny_data, data)
    counts = {"rows": 20, "tokens": 430, "learnt_tokens": 290}
    origin = {"data": ["sharegpt", "/home/me/secret/chats.jsonl", "a-lab/chats:test"], "counts": counts}
    origin["chat_template_kwargs"] = {"word": "it's"}
    (data / "chat_template.jinja").write_text(TEMPLATE)
    (data / "prepare.json").write_text(json.dumps(origin))
    flags = {"verifier_name_or_path": str(tiny_verifier), "data_path": str(data), "output_dir": str(folder / "run")}
    settings = {"num_layers": 2, "num_depths": 3, "draft_vocab_size": 64, "total_seq_len": 64, "train_data_ratio": 0.8}
    quiet = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
    run({**flags, **settings, **quiet}, num_train_epochs=1, gradient_accumulation_steps=2, loss_fn="tv")
    return folder / "run" / "checkpoint_best"


@pytest.fixture
def evaluation(trained, tmp_path):
    """A report in the shape of `peagle-hf evaluate`, with figures that occur nowhere else."""
    report = {
        "drafter": str(trained),
        "drafter_weights": weights_of(trained),
        "verifier": VERIFIER,
        "num_speculative_tokens": 3,
        "prompts": "/home/me/secret/questions.jsonl, a-lab/questions",
        "num_prompts": 17,
        "acceptance_length": 1.4375,
        "acceptance_rate": 0.1458,
        "per_position_acceptance": [0.3125, 0.1031, 0.0217],
        "tokens_per_second": 123.4,
        "tokens_per_second_without": 98.7,
        "intervals": {"acceptance_length": [1.4014, 1.4741]},
        "interval_method": {"confidence": 0.95, "name": "jackknife"},
        "text_identical": False,
        "num_identical": 16,
        "by_category": {
            "maths": {"num_prompts": 9, "acceptance_length": 1.521, "acceptance_rate": 0.1737},
            "a | b\nc <i> [d](e)": {"num_prompts": 8, "acceptance_length": 1.312, "acceptance_rate": 0.1111},
        },
        "max_tokens": 77,
        "temperature": 0.0,
        "concurrency": 5,
        "dtype": "float32",
        "device": "CPU, 2 threads",
        "versions": {"peagle_hf": "9.8.7", "vllm": "0.32.0"},
    }
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(report))
    return path


def metadata(hub, repo_id, revision="main"):
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode()).data


def test_train_push_and_load_are_a_round_trip(hub, hub_flags, tmp_path):
    """By the command line in a process of its own, where HF_ENDPOINT counts as it does for a user."""
    words = flags({**hub_flags, "hub_revision": "candidate"})
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "peagle_hf", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert hub.files("my-lab/drafter", "candidate").keys() == SERVED
    assert hub.files("my-lab/drafter", "main") == {}
    assert TOKEN not in str(hub.files("my-lab/drafter", "candidate"))

    best = Path(hub_flags["output_dir"]) / "checkpoint_best"
    expected = load_file(best / "model.safetensors")
    config = PeagleConfig.from_pretrained("my-lab/drafter", revision="candidate")
    assert config.verifier_name_or_path == VERIFIER
    for load_drafter in (PeagleForSpeculation.from_pretrained, AutoModel.from_pretrained):
        loaded = load_drafter("my-lab/drafter", revision="candidate")
        assert isinstance(loaded, PeagleForSpeculation)
        found = loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(PeagleError, match="lacks"):
        PeagleForSpeculation.from_pretrained("my-lab/drafter", revision="main")

    data = metadata(hub, "my-lab/drafter", "candidate")
    assert (data.base_model, data.library_name, data.pipeline_tag) == (VERIFIER, "speculators", "text-generation")
    assert {"speculative-decoding", "speculators", "eagle3", "p-eagle"} <= set(data.tags)
    assert data.license is None
    assert data.eval_results is None


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_trainer_uploads_what_its_strategy_says(hub, hub_flags, strategy):
    """Never what nobody asked for: no optimizer states, no pickled arguments, no path of this machine."""
    hub_flags |= {"metric_for_best_model": "loss"}  # the loss falls, so the second epoch is the best one
    trainer = run(hub_flags, hub_strategy=strategy, learning_rate=1e-3, hub_private_repo=True, hub_token=TOKEN)
    commits = hub.repos["my-lab/drafter"]["main"]
    files = commits[-1]
    checkpoints = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"0", "1"}}
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    folders = checkpoints.get(strategy, set())
    assert {path.split("/")[0] for path in files} == SERVED | folders
    assert steps == [5, 10]
    assert hub.private["my-lab/drafter"]
    uploads = [commit for commit, before in zip(commits, [{}, *commits], strict=False) if changed(commit, before)]
    assert len(uploads) == (1 if strategy == "end" else 2)
    for folder in folders:
        assert f"{folder}/optimizer_state_dict.pt" in files
        assert f"{folder}/training_args.bin" not in files
    assert not [path for path, content in files.items() if TOKEN.encode() in content]
    assert hub_flags["verifier_name_or_path"].encode() not in files["config.json"] + files["README.md"]
    assert trainer.hub_model_id == "my-lab/drafter"


def changed(commit, before):
    return commit.get("model.safetensors") != before.get("model.safetensors")


def test_the_model_as_it_is_goes_where_no_folder_of_an_epoch_is_kept(hub, train_flags):
    args = PeagleTrainingArguments(
        **{**train_flags, "verifier_name": VERIFIER, "max_steps": 2, "train_data_ratio": 1.0, "save_strategy": "no"}
    )
    train_dataset, _ = build_datasets(args)
    trainer = PeagleTrainer(model=build_drafter(args), args=args, train_dataset=train_dataset)
    trainer.train()
    trainer.push_to_hub(private=True, license="mit", tags="mine", dataset="a-lab/chats", language="en")
    assert hub.private["tester/checkpoints"]
    files = hub.files("tester/checkpoints")
    assert files.keys() == SERVED
    weights = trainer.model.state_dict()
    found = load(files["model.safetensors"])
    assert found["fc.weight"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], weights[name].to(found[name].dtype)) for name in found)
    data = metadata(hub, "tester/checkpoints")
    assert (data.license, data.language, data.datasets, "mine" in data.tags) == ("mit", "en", ["a-lab/chats"], True)
    assert "| epochs, steps | " in files["README.md"].decode()
    assert ", 2 |" in files["README.md"].decode()


def test_an_adapter_goes_as_the_merged_drafter(hub, hub_flags, trained):
    run(hub_flags, from_pretrained=str(trained), lora_r=2, num_train_epochs=1)
    files = hub.files("my-lab/drafter")
    assert files.keys() == SERVED
    assert load(files["model.safetensors"]).keys() == load_file(trained / "model.safetensors").keys()


def test_saving_before_there_is_a_best_is_no_error(hub, hub_flags, caplog):
    run(hub_flags, save_strategy="steps", save_steps=1, num_train_epochs=1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_the_callback_alone_pushes(hub, train_flags):
    callback = PushToHubCallback("mine", verifier_name=VERIFIER, revision="v1")
    run(train_flags, callbacks=[callback], num_train_epochs=1)
    assert hub.files("tester/mine", "v1").keys() == SERVED


def test_a_second_training_of_the_same_trainer_is_pushed_too(hub, hub_flags):
    trainer = run(hub_flags, num_train_epochs=1)
    first = hub.files("my-lab/drafter")["model.safetensors"]
    trainer.args.resume, trainer.args.learning_rate = False, 5e-3
    trainer.train()
    second = hub.files("my-lab/drafter")["model.safetensors"]
    assert second != first
    assert second == (Path(hub_flags["output_dir"]) / "checkpoint_best/model.safetensors").read_bytes()


def test_push_to_hub_of_the_model_gives_a_repository_that_vllm_serves(hub, trained, tmp_path):
    model = PeagleForSpeculation.from_pretrained(trained)
    with pytest.raises(PeagleError, match="--verifier-name"):
        model.push_to_hub("my-lab/plain")
    assert "my-lab/plain" not in hub.repos
    model.config.speculators_config["verifier"]["name_or_path"] = VERIFIER
    model.push_to_hub("my-lab/plain", revision="v2")
    files = hub.files("my-lab/plain", "v2")
    assert files.keys() == SERVED
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert check_checkpoint(tmp_path).verifier_name_or_path == VERIFIER
    assert "speculators" in metadata(hub, "my-lab/plain", "v2").tags


def test_the_command_uploads_with_the_measurement(hub, trained, evaluation, monkeypatch):
    flags = ["--model", str(trained), "--repo-id", "my-lab/measured", "--evaluation", str(evaluation)]
    cli.main(["push", *flags, "--verifier-name", VERIFIER, "--private", "--license", "apache-2.0"])
    files = hub.files("my-lab/measured")
    assert files.keys() == SERVED | CHAT_FILES.keys()
    assert files.items() >= CHAT_FILES.items()
    assert hub.private["my-lab/measured"]
    data = metadata(hub, "my-lab/measured")
    assert data.license == "apache-2.0"
    results = {result.metric_type: (result.metric_value, result.dataset_name) for result in data.eval_results}
    assert results == {
        "acceptance_length": (1.4375, "questions.jsonl, a-lab/questions"),
        "acceptance_rate": (0.1458, "questions.jsonl, a-lab/questions"),
    }
    assert data.datasets == ["Aeala/ShareGPT_Vicuna_unfiltered", "a-lab/chats"]


def test_the_card_says_what_was_measured(trained, evaluation):
    config, record = PeagleConfig.from_pretrained(trained), read_record(trained)
    card = model_card(config, "my-lab/d", VERIFIER, record, read_evaluation(evaluation, trained)).text
    flags_of_chat = "--chat-template chat_template.jinja --default-chat-template-kwargs '" + (
        '{"word": "it\'"\'"\'s"}' + "'"
    )
    for words in (
        "| accepted, of all drafts | 31.2% | 10.3% | 2.2% |",
        "| acceptance length | 1.438 (1.401 to 1.474) |",
        "| acceptance rate | 14.6% |",
        "| tokens per second with the drafter | 123.4 |",
        "| tokens per second without | 98.7 |",
        "| texts that are the same with and without | 16/17 |",
        "| maths | 9 | 1.521 | 17.4% |",
        "| a \\| b c &lt;i&gt; \\[d\\](e) | 8 | 1.312 | 11.1% |",
        "17 prompts of questions.jsonl, a-lab/questions, at most 77 tokens each, greedy, 3 tokens at a time",
        "float32 on CPU, 2 threads; peagle_hf 9.8.7, vllm 0.32.0",
        "| data | Aeala/ShareGPT_Vicuna_unfiltered:train, chats.jsonl, a-lab/chats:test, 20 rows, 430 tokens",
        "| COD sampling | K 3, r 0.7, r_min 0.2, anchors all |",
        "| loss | tv |",
        f"| epochs, steps | 1, {record['steps']} |",
        "| packed sequences per step, positions in each | 2, 64 |",
        "cosine from 0.001 |",
        "| precision, seed | float32, 42 |",
        f"| hardware | 1 x CPU, {number_of(torch.get_num_threads(), 'thread')} |",
        f"| minutes, with validation and saving | {record['seconds'] / 60:.1f} |",
        f"transformers {transformers.__version__}, torch {torch.__version__} |",
        f"| acceptance length | {record['validation']['acceptance_length']:.4f} |",
        f"| accuracy 2 | {record['validation']['accuracy_2']:.4f} |",
        "| decoder layers | 2, qwen3, hidden size 32 |",
        "| vocabulary | 64 of the verifier's 96 tokens |",
        "after layers | 2, 3, 4 |",
        "`hf download my-lab/d chat_template.jinja --local-dir .`",
        f"vllm serve my-lab/d {flags_of_chat}\n",
        f'vllm serve {VERIFIER} {flags_of_chat} --speculative-config \'{{"model": "my-lab/d", "method": "eagle3", '
        '"parallel_drafting": true, "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}\'',
    ):
        assert words in card, words
    assert "secret" not in card
    assert card.lstrip().startswith("# d\n\n## Serve\n")
    assert card.endswith("}\n```\n")
    assert "arXiv:2602.01469" in card
    assert str(config.verifier_name_or_path) not in card


def test_the_card_says_what_was_not_measured(trained):
    card = model_card(PeagleConfig.from_pretrained(trained), "my-lab/d", VERIFIER)
    assert "```bash\nvllm serve my-lab/d\n```" in card.text
    assert "chat template" not in card.text
    for title, words in {"Acceptance in vLLM": "Not measured.", "Training": "Not recorded."}.items():
        assert f"## {title}\n\n{words}\n" in card.text
    assert "## Validation\n\nNot measured.\n" in card.text
    assert card.data.eval_results is None
    assert card.data.datasets is None


def test_minutes_count_over_a_resumed_run(train_flags):
    with pytest.raises(KeyboardInterrupt):
        run(train_flags, callbacks=[StopAt(6)])
    first = Path(train_flags["output_dir"]) / "0" / "training.json"
    record = json.loads(first.read_text())
    assert 0 < record["seconds"] < 60
    first.write_text(json.dumps({**record, "seconds": 6000.0}))
    run(train_flags, resume=str(first.parent))
    whole = read_record(Path(train_flags["output_dir"]) / "1")
    assert 6000 < whole["seconds"] < 6060
    assert (whole["steps"], whole["epochs"]) == (10, 2.0)


@pytest.mark.fault(
    "The hub refuses the token, or the name of the repository is wrong",
    "Training does not start, and the message says why.",
)
@pytest.mark.parametrize(
    ("change", "token", "words"),
    [
        ({"verifier_name": None}, TOKEN, "--verifier-name"),
        ({"verifier_name": "some-lab/typo"}, TOKEN, "no model some-lab/typo"),
        ({"verifier_name": "/data/verifier"}, TOKEN, "is no name on the hub"),
        ({}, None, "hf auth login"),
        ({}, "hf_wrong", "Invalid user token"),
        ({}, READ_TOKEN, "may only read, not write"),
        ({"hub_model_id": "a/b/c"}, TOKEN, "Repo id must"),
    ],
)
def test_a_hub_that_can_not_be_used_is_found_before_training(hub, hub_flags, monkeypatch, change, token, words):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PeagleError, match=words) as refused:
        run(hub_flags, **change)
    assert "hf_wrong" not in str(refused.value)
    assert "my-lab/drafter" not in hub.repos
    assert not list(Path(hub_flags["output_dir"]).glob("checkpoint*"))


@pytest.mark.fault(
    "The hub refuses an upload in the middle of training", "Training goes on, and the log says how to upload later."
)
@pytest.mark.parametrize(("strategy", "refusals"), [("end", 1), ("checkpoint", 5)])
def test_a_refused_upload_loses_nothing_and_says_what_to_do(hub, hub_flags, caplog, strategy, refusals):
    hub.refuse_commits = True
    trainer = run(hub_flags, hub_strategy=strategy)
    assert trainer.state.global_step == 10
    best = Path(hub_flags["output_dir"]) / "checkpoint_best"
    check_checkpoint(best)
    messages = [record.getMessage() for record in caplog.records if "upload to the hub failed" in record.getMessage()]
    assert len(messages) == refusals
    [message] = {message for message in messages if "peagle-hf push" in message}
    command = message.split("upload it later with: ")[1].split()
    assert command[:4] == ["peagle-hf", "push", "--model", str(best)]
    with pytest.raises(PeagleError, match="peagle-hf push"):
        trainer.push_to_hub()
    hub.refuse_commits = False
    cli.main(command[1:])
    assert hub.files("my-lab/drafter").keys() == SERVED


@pytest.mark.fault("The hub can not be reached when a drafter is pushed", "One paragraph says so.")
def test_a_hub_that_is_gone_is_no_traceback(hub, trained, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PeagleError, match="upload it later with: peagle-hf push --model") as gone:
        push(PushArguments(str(trained), "my-lab/d", verifier_name=VERIFIER))
    assert "The hub can't be reached: " in str(gone.value)
    assert "HF_ENDPOINT" in str(gone.value)
    assert "hf auth login" not in str(gone.value)


@pytest.mark.fault("A checkpoint that vLLM could not serve is pushed", "It is refused before anything is uploaded.")
def test_what_vllm_would_not_serve_is_not_pushed(hub, trained, evaluation, tmp_path):
    with pytest.raises(PeagleError, match="--verifier-name"):
        push(PushArguments(str(trained), "my-lab/d"))
    with pytest.raises(PeagleError, match="no drafter checkpoint"):
        push(PushArguments(str(tmp_path), "my-lab/d"))
    other = shutil.copytree(trained, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"norm.weight": -weights["norm.weight"]}, other / "model.safetensors")
    with pytest.raises(PeagleError, match="evaluates a different checkpoint"):
        push(PushArguments(str(other), "my-lab/d", str(evaluation), VERIFIER))
    report = json.loads(evaluation.read_text())
    evaluation.write_text("{}")
    with pytest.raises(PeagleError, match=r"not a report of peagle-hf evaluate"):
        push(PushArguments(str(trained), "my-lab/d", str(evaluation), VERIFIER))
    assert "my-lab/d" not in hub.repos
    evaluation.write_text(json.dumps(report | {"versions": None}))
    with pytest.raises(PeagleError, match=rf"{evaluation} is not a report .* or is damaged"):
        push(PushArguments(str(trained), "my-lab/d", str(evaluation), VERIFIER))


@pytest.mark.vllm
def test_vllm_serves_from_the_hub_by_nothing_but_the_name(hub, chain, drafter, tmp_path):
    hub.add("some-lab/chain", {path.name: path.read_bytes() for path in chain.iterdir()})
    push(PushArguments(str(drafter), "my-lab/chain-drafter", verifier_name="some-lab/chain"))
    serve_by_itself("my-lab/chain-drafter", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path / "home"))


@pytest.mark.slow
def test_of_two_processes_one_uploads(hub, hub_flags, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    torchrun(["-m", "peagle_hf"], "train", *flags({**hub_flags, "hub_strategy": "end"}), environment=environment)
    assert hub.files("my-lab/drafter").keys() == SERVED
    assert [path for _, path in hub.requests].count("/api/models/my-lab/drafter/commit/main") == 1


def test_a_drafter_of_the_hub_is_served_from_its_files(hub, drafter):
    files = {name: (drafter / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.add("my-lab/drafter", {**files, **CHAT_FILES, "optimizer.pt": b"not wanted"})
    command = drafting_command(ServeArguments("my-lab/drafter"), on_cpu=True)
    folder = Path(json.loads(command[command.index("--speculative-config") + 1])["model"])
    assert {path.name for path in folder.iterdir()} == files.keys() | CHAT_FILES.keys()
    assert command[command.index("--default-chat-template-kwargs") + 1] == '{"word": "it\'s"}'
    assert Path(command[command.index("--chat-template") + 1]).read_text() == TEMPLATE
    with pytest.raises(PeagleError, match=r"no drafter of that name came from the hub: .*Repository"):
        drafting_command(ServeArguments("my-lab/nothing"), on_cpu=True)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_head_that_cannot_be_read_is_known_before_any_weights_are_downloaded(
    hub, tiny_verifier, tmp_path, is_sharded
):
    weights = load_file(tiny_verifier / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight").int()
    config = json.loads((tiny_verifier / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(weights)}
    if is_sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        files["model-1.safetensors"] = files.pop("model.safetensors")
    hub.add("a-lab/quantised", files)
    with pytest.raises(PeagleError, match="lm_head of the verifier a-lab/quantised is quantised"):
        check_trainable("a-lab/quantised")
    check_trainable(VERIFIER)
    assert not list((tmp_path / "hf_cache").rglob("*.safetensors"))
