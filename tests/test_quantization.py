"""Verifiers with quantised weights give the states of those weights, or are refused in words before they are loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from peagle_hf import (
    ExtractArguments,
    PeagleError,
    PrepareArguments,
    RegenerateArguments,
    VerifierHead,
    extract,
    prepare,
    regenerate,
)
from peagle_hf.cpu import pack_linear_layers
from peagle_hf.data.chat_models import LocalChatModel, Sampling
from peagle_hf.data.extract_in_process import load_for_extraction
from peagle_hf.evaluation.plan import PlanArguments, plan
from peagle_hf.verifier.head import load_embedding, warn_if_untrainable
from peagle_hf.verifier.loading import inference_memory, load_verifier
from peagle_hf.verifier.parts import residual_streams, verifier_parts
from peagle_hf.verifier.quantization import METHODS

TOKENS = torch.arange(5, 25)[None]
SCHEMES = {
    "w4a16": (4, "pack-quantized", None),
    "w8a16": (8, "pack-quantized", None),
    "int8": (8, "int-quantized", None),
    "w8a8": (8, "int-quantized", 8),
}


def quantise(folder: Path, weight: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, M] as integers, the scale of each row, and the values that both stand for."""
    scale = weight.float().abs().amax(1, keepdim=True) / (2 ** (num_bits - 1) - 1)
    integers = (weight / scale).round().to(torch.int8)
    return integers, scale, integers.float() * scale


def compress(source: Path, folder: Path, scheme: str, also: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Write a verifier quantised with compressed-tensors, and one of the same values without quantisation.

    Args:
        also: names of further weights to quantise, beside the linear layers of its decoder.
    """
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    num_bits, kind, num_input_bits = SCHEMES[scheme]
    quantised, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight") and name not in also:
            quantised[name] = dense[name] = tensor
            continue
        integers, scale, dense[name] = quantise(folder, tensor, num_bits)
        module = name.removesuffix(".weight")
        quantised[f"{module}.weight_scale"] = scale
        if kind == "pack-quantized":
            quantised[f"{module}.weight_packed"] = pack(integers, num_bits)
            quantised[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        else:
            quantised[f"{module}.weight"] = integers
    weights = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = num_input_bits and {**weights, "num_bits": num_input_bits, "strategy": "token", "dynamic": True}
    modules = ["Linear", *(name.removesuffix(".weight") for name in also)]
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": [] if "lm_head.weight" in also else ["lm_head"],
        "config_groups": {
            "group_0": {"targets": modules, "weights": weights, "input_activations": inputs, "format": kind}
        },
    }
    return write(source, folder / "quantised", quantised, settings), write(source, folder / "dense", dense, None)


def write(source: Path, folder: Path, tensors: dict[str, Tensor], settings: dict | None) -> Path:
    shutil.copytree(source, folder)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))
    return folder


def streams(folder: Path, packed: bool) -> Tensor:
    """The states that extraction stores, of a verifier that is loaded as extraction loads it."""
    model = load_for_extraction(str(folder), "cpu") if packed else load_verifier(folder, torch.float32, "cpu")
    with torch.inference_mode():
        return residual_streams(model, [0, 2, LAYERS - 1], TOKENS, torch.float32)


def check_states(source: Path, folder: Path, quantised: dict[str, Tensor], settings: dict, dense: dict[str, Tensor]):
    """A copy of a verifier with quantised weights gives the states of one with the dense values."""
    folders = [
        write(source, folder / "quantised", quantised, settings),
        write(source, folder / "dense", dense, None),
    ]
    found, wanted = (streams(folder, packed=True) for folder in folders)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "int8"])
def test_weights_of_compressed_tensors_give_the_states_of_their_values(tiny_verifier, tmp_path, scheme):
    quantised, dense = compress(tiny_verifier, tmp_path, scheme)
    torch.testing.assert_close(streams(quantised, packed=True), streams(dense, packed=True), rtol=1e-4, atol=1e-4)
    model = load_verifier(quantised, torch.float32, "cpu")
    pack_linear_layers(verifier_parts(model).decoder)
    assert not any(type(layer) is torch.nn.Linear for layer in verifier_parts(model).layers.modules()), "all are packed"


def test_inputs_that_a_scheme_rounds_are_still_rounded(tiny_verifier, tmp_path):
    quantised, dense = compress(tiny_verifier, tmp_path, "w8a8")
    found, wanted = streams(quantised, packed=True), streams(dense, packed=True)
    own = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32)(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(found[:, :, 1], own.hidden_states[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, :, 1], wanted[:, :, 1], rtol=1e-4, atol=1e-4)


def test_a_quantised_model_answers(chain, tmp_path):
    quantised, dense = compress(chain, tmp_path, "w4a16")
    answers = [
        LocalChatModel(str(folder), 6, False, 2).complete([[5, 6], [20]], {2}, Sampling(0.0), [0, 0])
        for folder in (quantised, dense)
    ]
    assert answers[0] == answers[1] == [[7, 5, 6, 7, 5, 6], [21, 22, 2]]


@pytest.mark.parametrize("scheme", ["w4a16", "int8"])
def test_a_quantised_head_and_embedding_are_read_as_their_values(tiny_verifier, tmp_path, scheme):
    also = ("lm_head.weight", "model.embed_tokens.weight")
    quantised, dense = compress(tiny_verifier, tmp_path, scheme, also)
    values = load_file(dense / "model.safetensors")
    torch.testing.assert_close(VerifierHead.from_pretrained(quantised).weight.float(), values["lm_head.weight"])
    torch.testing.assert_close(load_embedding(quantised).float(), values["model.embed_tokens.weight"])


@pytest.mark.fault(
    "The verifier's head is quantised with another method than compressed-tensors",
    "Training refuses it by name, instead of taking the numbers without their scale.",
)
def test_a_head_that_cannot_be_made_dense_is_refused_by_name(tiny_verifier, tmp_path):
    tensors = load_file(tiny_verifier / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    fp8 = {"lm_head.weight": head.to(torch.float8_e4m3fn), "lm_head.weight_scale_inv": torch.ones(1, 1)}
    for number, (settings, kept) in enumerate(
        [
            ({"quant_method": "fp8"}, fp8),
            (None, fp8),
            ({"quant_method": "gptq"}, {"lm_head.qweight": torch.ones(4, VOCAB, dtype=torch.int32)}),
        ]
    ):
        folder = write(tiny_verifier, tmp_path / str(number), tensors | kept, settings)
        with pytest.raises(PeagleError, match=r"lm_head of the verifier .* is quantised \((fp8|gptq|by an unknown)"):
            VerifierHead.from_pretrained(folder)
        assert load_embedding(folder).shape == (VOCAB, HIDDEN), "the rest can be read"


@pytest.fixture(params=["gptq", "bitsandbytes"])
def untrainable(request, chain, tmp_path) -> Path:
    """A verifier whose output head training can't read."""
    tensors = load_file(chain / "model.safetensors")
    head = tensors.pop("lm_head.weight").to(torch.uint8)
    names = {"gptq": ["lm_head.qweight"], "bitsandbytes": ["lm_head.weight", "lm_head.weight.absmax"]}[request.param]
    tensors |= {name: head.clone() for name in names}
    return write(chain, tmp_path / "quantised", tensors, {"quant_method": request.param})


@pytest.mark.fault(
    "The verifier's head is quantised so that training can't read it, and an earlier step is begun",
    "extract refuses the verifier before its hours of work; regenerate, prepare and plan warn.",
)
def test_each_earlier_step_says_that_training_will_refuse_the_head(untrainable, tiny_data, tmp_path, caplog):
    words = "lm_head of the verifier .* is quantised"
    for dry_run in (True, False):
        with pytest.raises(PeagleError, match=words):
            extract(ExtractArguments(model=str(untrainable), preprocessed_data=str(tiny_data), dry_run=dry_run))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "w5"}]}))
    model = str(untrainable)
    for step in (
        lambda: prepare(PrepareArguments(model=model, data=[str(chats)], output=str(tmp_path / "out"))),
        lambda: plan(PlanArguments(model=model, output=str(tmp_path / "plan"), max_tokens=100_000)),
        lambda: regenerate(RegenerateArguments(model=model, prompts=str(chats), output=str(tmp_path / "r.jsonl"))),
    ):
        caplog.clear()
        with pytest.raises(PeagleError):  # for other reasons: no answer, no room, no package for the method
            step()
        assert re.search(f"extract and train will refuse this verifier. {words}", caplog.text)


def test_a_tokenizer_alone_is_prepared_with_without_a_warning(tiny_verifier, tmp_path, caplog):
    for path in tiny_verifier.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, tmp_path)
    warn_if_untrainable(str(tmp_path))
    shutil.copy(tiny_verifier / "config.json", tmp_path)
    warn_if_untrainable(str(tmp_path))
    warn_if_untrainable(str(tiny_verifier))
    assert not caplog.text


def test_block_wise_fp8_gives_the_states_of_its_values(tiny_verifier, tmp_path):
    quantised, dense = {}, {}
    for name, tensor in load_file(tiny_verifier / "model.safetensors").items():
        quantised[name] = dense[name] = tensor
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax().reshape(1, 1) / 448
            quantised[name] = (tensor / scale).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scale
            dense[name] = quantised[name].float() * scale
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    check_states(tiny_verifier, tmp_path, quantised, settings, dense)


@pytest.mark.fault(
    "The quantization_config of a quantised verifier is missing from its config.json",
    "Every command refuses it, instead of taking the numbers without their scales.",
)
@pytest.mark.parametrize("scheme", ["w4a16", "int8"])
def test_quantised_weights_without_their_configuration_are_refused(tiny_verifier, tmp_path, scheme):
    quantised, _ = compress(tiny_verifier, tmp_path, scheme)
    shutil.copy(tiny_verifier / "config.json", quantised)
    with pytest.raises(PeagleError, match=r"no quantization_config|lacks 49 of the weights"):
        load_verifier(quantised, torch.float32, "cpu")


def test_expert_weights_in_mxfp4_give_the_states_of_their_values(tmp_path):
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    quantised, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            quantised[name] = dense[name] = tensor
            continue
        experts, num_in, num_out = tensor.shape
        blocks = torch.randint(0, 256, (experts, num_out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.full((experts, num_out, num_in // 32), 127 - 4, dtype=torch.uint8)
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    check_states(source, tmp_path, quantised, settings, dense)


@pytest.mark.fault(
    "A verifier is quantised with a method that can't be run in this process: each that transformers knows",
    "It is refused before it is loaded, with the method's name, what to install, and vLLM's servers as the way out.",
)
@pytest.mark.parametrize("method", [*AUTO_QUANTIZER_MAPPING, "modelopt"])
def test_each_method_of_transformers_works_or_is_refused_before_loading(tiny_verifier, tmp_path, method, monkeypatch):
    """Of those in METHODS the others of this file show that they work, or a package of theirs is missing here."""
    settings = {"quant_method": method}
    if method.startswith("bitsandbytes"):
        settings = {"quant_method": "bitsandbytes", f"load_in_{method[-4]}bit": True}
    config = json.loads((tiny_verifier / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    monkeypatch.setattr("peagle_hf.verifier.quantization.find_spec", lambda name: None)
    name = settings["quant_method"]
    if METHODS.get(name) == ():
        words = "can't be read"  # the folder has no weights
    elif name in METHODS:
        package = METHODS[name][0]
        words = rf"{name}, for which transformers needs {package}.*pip install {package.replace('_', '-')}.*--endpoint"
    else:
        words = rf"is quantised with {name}, which can't be run in this process.*extract with --endpoint"
    with pytest.raises(PeagleError, match=words):
        load_verifier(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_the_memory_of_quantised_experts_is_that_of_the_modules_that_transformers_makes(method, tmp_path):
    """Experts are no linear layers but three-dimensional weights, and most of such a model."""
    sizes = {"hidden_size": 128, "vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    sizes |= {"intermediate_size": 256, "num_hidden_layers": 2}
    if method == "fp8":
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=2)
    else:
        config = GptOssConfig(**sizes, num_local_experts=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kept = [name for name, _ in model.named_modules() if name.endswith(("lm_head", "mlp.gate"))]
    if method == "fp8":
        replace_with_fp8_linear(model, kept, FineGrainedFP8Config())
    else:
        for layer in model.model.layers:
            layer.mlp.experts = Mxfp4GptOssExperts(config).to("meta")
    del model.lm_head
    wanted = sum(tensor.nbytes for tensor in model.state_dict().values())
    config.quantization_config = {"quant_method": method}
    config.save_pretrained(tmp_path)
    assert inference_memory(tmp_path, 3)[0] == pytest.approx(wanted, rel=0.1)
