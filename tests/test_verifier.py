"""What is read of a verifier: configuration, head, embeddings, draft vocabulary."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_templates import CHATML, make_tokenizer
from conftest import VISION, save_verifier
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import (
    CLIPConfig,
    FalconMambaConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MoshiConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peagle_hf.errors import PeagleError
from peagle_hf.model.config import PeagleConfig
from peagle_hf.verifier.draft_vocabulary import draft_vocabulary, load_token_freq
from peagle_hf.verifier.head import VerifierHead, check_trainable, load_embedding
from peagle_hf.verifier.loading import (
    default_aux_layer_ids,
    load_verifier,
    load_verifier_config,
    load_verifier_tokenizer,
)
from peagle_hf.verifier.parts import verifier_embeddings, verifier_parts

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    return tmp_path / "llama", save_verifier(tmp_path / "llama", LlamaConfig(**SIZES))


def check_head(folder: Path, model: PreTrainedModel) -> VerifierHead:
    """The head must give the model's logits from what enters the model's final norm."""
    entering: list[Tensor] = []
    verifier_parts(model).final_norm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12)[None]).logits
    head = VerifierHead.from_pretrained(folder)
    torch.testing.assert_close(head.logits(head.normalize(entering[0])), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(load_embedding(folder), model.get_input_embeddings().weight)
    return head


@pytest.fixture
def divided(request, llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process of `accelerate launch` with ZeRO-3, or in the second one of a machine with FSDP."""
    if request.param == "zero3":
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
        yield
        assert is_deepspeed_zero3_enabled()
        del config
        unset_hf_deepspeed_config()
        return
    for name, value in {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    distributed.destroy_process_group()


@pytest.mark.parametrize("divided", ["zero3", "fsdp"], indirect=True)
def test_a_verifier_is_whole_where_the_drafter_is_divided(divided, llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    loaded = load_verifier(folder, torch.float32, "cpu")
    assert all(torch.equal(one, loaded.get_parameter(name)) for name, one in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_head_and_embeddings_are_read_by_key(tied: bool, shard_size: str, tmp_path: Path) -> None:
    model = save_verifier(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=tied), max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "2KB")
    check_head(tmp_path, model)


def test_only_the_needed_shards_are_opened(tmp_path: Path) -> None:
    model = save_verifier(tmp_path, LlamaConfig(**SIZES), max_shard_size="2KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {weight_map[key] for key in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight")}
    others = set(weight_map.values()) - needed
    assert others
    for name in others:
        (tmp_path / name).unlink()
    check_head(tmp_path, model)


def test_nothing_of_the_head_enters_a_state_dict_and_all_of_it_moves(llama: tuple[Path, PreTrainedModel]) -> None:
    head = VerifierHead.from_pretrained(llama[0])
    assert head.state_dict() == {}
    assert list(head.parameters()) == []
    assert {tensor.dtype for tensor in head.to(torch.float64).buffers()} == {torch.float64}
    assert head.normalize(torch.randn(2, 16)).dtype == torch.float64
    assert VerifierHead.from_pretrained(llama[0], dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_restricted_head_gives_the_chosen_tokens_logits(tmp_path: Path) -> None:
    model = save_verifier(tmp_path, Gemma3TextConfig(**SIZES, final_logit_softcapping=2.0))
    head = check_head(tmp_path, model)
    assert head.softcap == 2.0
    normed, token_ids = torch.randn(5, 16), torch.tensor([3, 17, 39])
    assert head.logits(normed).abs().max() < 2.0
    torch.testing.assert_close(head.restrict(token_ids).logits(normed), head.logits(normed)[:, token_ids])


def test_wrappers_may_be_named_otherwise_in_the_file(tmp_path: Path) -> None:
    config = Gemma3Config(
        text_config=SIZES | {"tie_word_embeddings": False}, vision_config=VISION, tie_word_embeddings=False
    )
    model = save_verifier(tmp_path, config)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    assert {"language_model.model.norm.weight", "language_model.lm_head.weight"} <= set(tensors)
    check_head(tmp_path, model)
    for prefix in ("model.language_model.", "model.", "language_model."):
        renamed = {
            name.replace("language_model.model.", prefix).replace("language_model.lm_head", "lm_head"): tensor
            for name, tensor in tensors.items()
        }
        assert {f"{prefix}norm.weight", "lm_head.weight"} <= set(renamed)
        save_file(renamed, file)
        check_head(tmp_path, model)


def test_a_missing_or_misshapen_tensor_is_named(llama: tuple[Path, PreTrainedModel]) -> None:
    file = llama[0] / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors | {"model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(PeagleError, match=r"model\.norm\.weight of .* has the shape \(7,\).*\(16,\)"):
        VerifierHead.from_pretrained(llama[0])
    head = tensors.pop("lm_head.weight")
    save_file(tensors | {"mtp.lm_head.weight": head}, file)
    with pytest.raises(PeagleError, match=r"no tensor that is clearly lm_head\.weight"):
        VerifierHead.from_pretrained(llama[0])


def test_a_verifier_needs_safetensors(llama: tuple[Path, PreTrainedModel]) -> None:
    file = llama[0] / "model.safetensors"
    torch.save(dict(load_file(file)), llama[0] / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(PeagleError, match="safetensors"):
        VerifierHead.from_pretrained(llama[0])
    with pytest.raises(PeagleError, match="safetensors"):
        load_verifier(llama[0], torch.float32, "cpu")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(PeagleError, match="can't be read"):
        VerifierHead.from_pretrained(llama[0])


def test_the_configuration_is_the_text_part(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    assert load_verifier_config(llama[0]).num_hidden_layers == 3
    Gemma3Config(text_config=SIZES, vision_config=VISION).save_pretrained(tmp_path / "gemma")
    assert load_verifier_config(tmp_path / "gemma").model_type == "gemma3_text"


def test_what_is_no_verifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeagleError, match="nowhere can't be read"):
        load_verifier_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(PeagleError, match=r"can't be read.*no such model"):
        load_verifier_config(tmp_path)
    FalconMambaConfig().save_pretrained(tmp_path / "mamba")
    with pytest.raises(PeagleError, match=r"falcon_mamba\) has no num_attention_heads, max_position_embeddings"):
        load_verifier_config(tmp_path / "mamba")
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(PeagleError, match="clip"):
        VerifierHead.from_pretrained(tmp_path)
    save_verifier(tmp_path / "gpt2", GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(PeagleError, match=r"GPT2LMHeadModel is not supported.*register_verifier\('gpt2'"):
        VerifierHead.from_pretrained(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MoshiConfig(**SIZES, ffn_dim=16, audio_vocab_size=8), r"have the shape \(41, 16\)"),
        (OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=4), r"have the shape \(40, 4\)"),
    ],
)
def test_embeddings_of_another_shape_are_refused(config: PreTrainedConfig, found: str, tmp_path: Path) -> None:
    save_verifier(tmp_path, config)
    for read in (check_trainable, load_embedding, VerifierHead.from_pretrained):
        with pytest.raises(PeagleError, match=f"can't be a verifier: its token embeddings {found}"):
            read(tmp_path)


def test_a_model_without_a_head_or_embeddings_is_refused(llama: tuple[Path, PreTrainedModel]) -> None:
    model = llama[1]
    model.lm_head = None
    with pytest.raises(PeagleError, match="can't be a verifier: it has no output head with a weight"):
        VerifierHead.of(model)
    model.model.embed_tokens = None
    with pytest.raises(PeagleError, match="can't be a verifier: its token embeddings aren't found"):
        verifier_embeddings(model)


def test_the_loaded_verifier_is_ready_to_run(llama: tuple[Path, PreTrainedModel]) -> None:
    model = load_verifier(llama[0], torch.bfloat16, "cpu")
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    torch.testing.assert_close(model.lm_head.weight, llama[1].lm_head.weight.bfloat16())


def test_auxiliary_layers() -> None:
    assert default_aux_layer_ids(36) == [2, 18, 33]
    assert default_aux_layer_ids(30) == [2, 15, 27]
    assert default_aux_layer_ids(7) == [2, 3, 4]
    for num_layers in range(2, 40):
        layer_ids = default_aux_layer_ids(num_layers)
        assert len(set(layer_ids)) == 3
        assert layer_ids == sorted(layer_ids)
        assert (1 if num_layers > 2 else 0) <= layer_ids[0] <= layer_ids[-1] <= num_layers
    assert default_aux_layer_ids(1) == [0, 1]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_draft_vocabulary_holds_the_most_frequent_tokens(as_tensor: bool) -> None:
    counts = {9: 5, 2: 1, 7: 5, 4: 1, 8: 1}
    token_freq = torch.tensor([counts.get(token_id, 0) for token_id in range(10)]) if as_tensor else counts
    for size, token_ids in {
        1: [7],
        2: [7, 9],
        4: [2, 4, 7, 9],
        7: [0, 1, 2, 4, 7, 8, 9],
        12: list(range(12)),
    }.items():
        d2t, t2d = draft_vocabulary(token_freq, size, vocab_size=12)
        assert (torch.arange(size) + d2t).tolist() == token_ids
        assert t2d.nonzero().flatten().tolist() == token_ids
        assert (d2t.dtype, t2d.dtype, t2d.shape) == (torch.int64, torch.bool, (12,))


def test_equal_counts_keep_the_lowest_ids_in_a_large_vocabulary() -> None:
    d2t, _ = draft_vocabulary(torch.ones(150_000, dtype=torch.int64), 32_000, 151_936)
    assert torch.equal(d2t, torch.zeros_like(d2t))


def test_impossible_draft_vocabularies_are_refused() -> None:
    for size in (0, 13):
        with pytest.raises(PeagleError, match=f"draft_vocab_size is {size}.* 12 tokens"):
            draft_vocabulary({1: 1}, size, 12)
    for token_freq in ({12: 1}, {-1: 1}, torch.ones(13)):
        with pytest.raises(PeagleError, match="belong to another tokenizer"):
            draft_vocabulary(token_freq, 4, 12)


def test_token_counts_are_read_without_running_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "token_freq.pt"
    for content in ({3: 4}, torch.arange(3)):
        torch.save(content, path)
        assert str(load_token_freq(path)) == str(content)
    for content in (Harmful(), [1, 2]):
        torch.save(content, path)
        with pytest.raises(PeagleError, match=r"token_freq\.pt"):
            load_token_freq(path)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"torn")
    with pytest.raises(PeagleError, match=r"token_freq\.pt is no file of token counts"):
        load_token_freq(path)
    with pytest.raises(PeagleError, match=r"nowhere is not there\. peagle-hf prepare writes"):
        load_token_freq(tmp_path / "nowhere")


def test_a_checkpoint_that_lacks_weights_is_refused(llama, tmp_path):
    folder = tmp_path / "incomplete"
    shutil.copytree(llama[0], folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.1.mlp")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeagleError, match=r"incomplete lacks 3 of the weights .*model\.layers\.1\.mlp\.down_proj"):
        load_verifier(folder, torch.float32, "cpu")


@pytest.mark.fault(
    "A verifier's shard is missing, cut or empty, its index is damaged, or a weight has another shape",
    "Every command refuses it and names the file or the weight; nothing is filled with random numbers.",
)
@pytest.mark.parametrize("fault", ["missing shard", "cut shard", "empty shard", "no map", "index cut", "shape"])
def test_a_checkpoint_that_does_not_load_completely_is_refused(llama, tmp_path, fault):
    folder = tmp_path / "sharded"
    llama[1].save_pretrained(folder, max_shard_size="2KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = {content["weight_map"][key] for key in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight")}
    words = "can't be read"
    for name in files:
        path = folder / name
        if fault == "missing shard":
            path.unlink()
            words = f"can't be read.*{name.split('-')[0]}"
        elif fault == "cut shard":
            path.write_bytes(path.read_bytes()[:-10])
        elif fault == "empty shard":
            save_file({}, path, {"format": "pt"})
            words = "can't be read|lacks|no tensor that is clearly"
        elif fault == "shape":
            tensors = {key: tensor[:-1].contiguous() for key, tensor in load_file(path).items()}
            save_file(tensors, path, {"format": "pt"})
            words = r"has the shape \(\d+,.*\), but by its config\.json"
    if fault == "no map":
        index.write_text("{}")
    elif fault == "index cut":
        index.write_text(index.read_text()[:-10])
    for load in (
        lambda: load_verifier(folder, torch.float32, "cpu"),
        lambda: VerifierHead.from_pretrained(folder),
        lambda: load_embedding(folder),
    ):
        with pytest.raises(PeagleError, match=words):
            load()


def test_a_tokenizer_file_of_mistral_changes_nothing(llama):
    """transformers takes another class for such models where mistral-common is installed."""
    folder, _ = llama
    make_tokenizer(CHATML).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    (folder / "tekken.json").write_text("{}")
    tokenizer = load_verifier_tokenizer(str(folder))
    assert tokenizer.is_fast
    assert tokenizer.chat_template == CHATML


def test_the_chat_template_of_a_processor_is_the_tokenizers(llama):
    folder, _ = llama
    make_tokenizer(CHATML).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    assert load_verifier_tokenizer(str(folder)).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load_verifier_tokenizer(str(folder)).chat_template == CHATML
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert load_verifier_tokenizer(str(folder)).chat_template == "{{ 1 }}"


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", "{}", "KeyError: 'added_tokens'"),
        ("tokenizer.json", None, "Couldn't instantiate the backend tokenizer"),
        ("tokenizer_config.json", "[1]", "(AttributeError: 'list'|TypeError: list)"),
        ("chat_template.json", "{}", "KeyError: 'chat_template'"),
    ],
)
def test_a_damaged_tokenizer_is_named(llama, file, content, problem):
    folder, _ = llama
    tokenizer = make_tokenizer(CHATML)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    message = rf"The tokenizer of {folder} can't be loaded: {problem}.*Check the name"
    with pytest.raises(PeagleError, match=f"(?s){message}"):
        PeagleConfig.from_verifier(str(folder), num_layers=1)
