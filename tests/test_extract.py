"""The hidden-state cache and its embedded backend, on tiny verifiers that go through save_pretrained."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_verifier
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from peagle_hf.data import cache_storage, disk_space, extract, extract_in_process
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import cached_rows, check_file, read_states, row_path, write_states
from peagle_hf.data.errors import RowError
from peagle_hf.data.extract import ExtractArguments
from peagle_hf.data.extract_in_process import batches_at_once, plan_batches
from peagle_hf.data.extract_in_process import extract_in_process as run_in_process
from peagle_hf.data.prepared_dataset import load_prepared, rows_fingerprint
from peagle_hf.errors import PeagleError
from peagle_hf.fingerprint import weights_of
from peagle_hf.verifier.parts import residual_streams

VOCAB, HIDDEN, LAYERS = 61, 16, 4
LENGTHS = (9, 30, 20, 29, 12, 19)


def tiny(model_type: str, **fields: object) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.CONFIG_MAPPING[model_type](**(sizes | fields))


def save_prepared(folder: Path, lengths: tuple[int, ...] = LENGTHS, vocab_size: int = VOCAB) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(vocab_size - 1, (length,), generator=generator) for length in lengths]
    columns = {
        "input_ids": [row.tolist() for row in rows],
        "loss_mask": [[1] * len(row) for row in rows],
        "seq_len": list(lengths),
        "conversation_id": list(range(len(rows))),
    }
    Dataset.from_dict(columns).with_format("torch").save_to_disk(folder)
    (folder / "prepare.json").write_text('{"tokenizer_fingerprint": "abc", "chat_template_kwargs": {"think": false}}')
    return rows


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifier")
    save_verifier(folder, tiny("llama"))
    return folder


@pytest.fixture
def arguments(llama: Path, tmp_path: Path) -> ExtractArguments:
    save_prepared(tmp_path / "data")
    return ExtractArguments(model=str(llama), preprocessed_data=str(tmp_path / "data"), max_batch_tokens=64)


def own_states(model: PreTrainedModel, token_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """The verifier's own per-layer outputs [T, H] and logits [T, V] of one document."""
    with torch.no_grad():
        output = model(input_ids=token_ids[None], output_hidden_states=True)
    return [states[0] for states in output.hidden_states], output.logits[0]


def test_embeddings_and_last_layer_are_valid_layer_ids(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    token_ids = torch.arange(7)
    layers, _ = own_states(model, token_ids)
    streams = residual_streams(model, [LAYERS, 0], token_ids[None], torch.float32)[0]
    torch.testing.assert_close(streams[:, 1], layers[0])
    assert torch.equal(streams[:, 0], streams[:, 2])
    torch.testing.assert_close(model.model.norm(streams[:, 0]), layers[-1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_replica_has_hooks_of_its_own_and_no_weights_of_its_own(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    copy = extract_in_process.replica(model)
    model.model.norm.register_forward_pre_hook(lambda module, args: None)
    assert not copy.model.norm._forward_pre_hooks
    tensors = [[*each.parameters(), *each.buffers()] for each in (model, copy)]
    assert all(one is other for one, other in zip(*tensors, strict=True))


def test_the_number_of_threads_is_as_before(arguments: ExtractArguments) -> None:
    before = torch.get_num_threads()
    extract.extract(arguments)
    assert torch.get_num_threads() == before


def test_batches_overlap_on_a_gpu_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for each of several processes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [batches_at_once(torch.device(name)) for name in ("cpu", "cuda:1")] == [1, 4]


@pytest.mark.parametrize("storage", ["fp8", "fp8-learnt"])
def test_states_are_converted_to_float8_where_they_are_computed(
    arguments: ExtractArguments, llama: Path, storage: str
) -> None:
    """Then a GPU converts them, and half as many bytes are copied; the CPU would take one thread for it."""
    data, written = load_prepared(arguments.preprocessed_data).with_format(None), {}
    arguments = replace(arguments, storage=storage)
    model = AutoModelForCausalLM.from_pretrained(llama)
    run_in_process(arguments, model, [1, 2, 3], data, dict(enumerate(LENGTHS)), written.__setitem__)
    assert {row: (cached.storage, cached.states.dtype, len(cached.states)) for row, cached in written.items()} == {
        row: ("fp8", torch.float8_e4m3fn, length) for row, length in enumerate(LENGTHS)
    }


def test_a_verifier_with_new_weights_is_another_one(llama: Path, arguments: ExtractArguments, tmp_path: Path) -> None:
    mine = shutil.copytree(llama, tmp_path / "verifier")
    arguments = replace(arguments, model=str(mine))
    extract.extract(replace(arguments, max_samples=1))
    save_verifier(mine, tiny("llama", rope_theta=5e5))
    with pytest.raises(PeagleError, match=r"revision is 'config \w+ .*', wanted is 'config \w+ .*'.*another config"):
        extract.extract(arguments)


def test_rows_longer_than_the_verifiers_context_are_refused(arguments: ExtractArguments, tmp_path: Path) -> None:
    short = tmp_path / "short"
    save_verifier(short, tiny("llama", max_position_embeddings=16))
    with pytest.raises(PeagleError, match=r"longest sample has 30 tokens, but .*short takes 16 .*--seq-length 16"):
        extract.extract(replace(arguments, model=str(short)))


def test_files_are_bfloat16_and_trainable_by_others(arguments: ExtractArguments) -> None:
    report = extract.extract(arguments)
    tensors = load_file(row_path(report.output, 1))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "hidden_states": (torch.bfloat16, (30, 4, HIDDEN)),
        "token_ids": (torch.int64, (30,)),
    }
    manifest = report.output / "manifest.json"
    assert row_path(report.output, 1).stat().st_mode == manifest.stat().st_mode  # so others may read both
    assert json.loads(manifest.read_text()) == {
        "verifier": arguments.model,
        "revision": weights_of(arguments.model),
        "architecture": "LlamaForCausalLM",
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "aux_layer_ids": [1, 2, 3],
        "dtype": "bfloat16",
        "tokenizer_fingerprint": "abc",
        "storage": "plain",
        "format_version": 3,
        "chat_template_kwargs": {"think": False},
        "rows": rows_fingerprint(arguments.preprocessed_data),
        "verifier_dtype": "float32",
        "verifier_from_here": os.path.relpath(arguments.model, report.output),
    }


def test_batching_and_order_change_nothing_beyond_rounding(arguments: ExtractArguments, tmp_path: Path) -> None:
    together = extract.extract(replace(arguments, dtype="float32", output=str(tmp_path / "together")))
    alone = extract.extract(replace(arguments, dtype="float32", output=str(tmp_path / "alone"), max_batch_tokens=1))
    for row in range(len(LENGTHS)):
        first, second = (load_file(row_path(report.output, row))["hidden_states"] for report in (together, alone))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_batches_hold_every_row_once_within_the_budget_with_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = dict(enumerate(torch.randint(20, 900, (500,), generator=generator).tolist())) | {500: 5000}
    batches = plan_batches(lengths, 2048)
    assert sorted(row for rows in batches for row in rows) == list(range(501))
    assert batches[0] == [500]
    sizes = [[lengths[row] for row in rows] for rows in batches]
    assert all(max(batch) * len(batch) <= 2048 for batch in sizes[1:])
    assert all(min(batch) >= 0.95 * max(batch) for batch in sizes)
    assert max(map(len, batches)) > 5


def test_a_rerun_makes_only_what_is_missing(arguments: ExtractArguments) -> None:
    first = extract.extract(replace(arguments, max_samples=2))
    assert cached_rows(first.output) == {0, 1}
    before = {row: row_path(first.output, row).stat().st_mtime_ns for row in (0, 1)}
    second = extract.extract(arguments)
    assert (second.num_rows, second.num_kept, second.num_tokens) == (6, 2, sum(LENGTHS[2:]))
    assert before == {row: row_path(first.output, row).stat().st_mtime_ns for row in (0, 1)}
    assert cached_rows(first.output) == set(range(6))
    assert extract.extract(arguments).num_tokens == 0


def load(path: Path) -> dict[str, Tensor]:
    """A copy of a file's tensors, which stays as it is when the file is overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def damage(path: Path, kind: str) -> None:
    tensors = load(path)
    states, token_ids = tensors["hidden_states"], tensors["token_ids"]
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        return
    if kind == "layers":
        states = states[:, :3]
    if kind == "tokens":
        token_ids = token_ids.flip(0)
    if kind == "length":
        states, token_ids = states[:-1], token_ids[:-1]
    if kind == "nan":
        states[3, 1, 2] = float("nan")
    if kind == "integers":
        states = states.to(torch.int16)
    kept = {"token_ids": token_ids} if kind == "no states" else {"hidden_states": states, "token_ids": token_ids}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, path)


HEADER = {
    "truncated": "can't be opened",
    "layers": "hidden_states is [30, 3, 16] instead of [30, 4, 16]",
    "length": "hidden_states is [29, 4, 16]",
    "integers": "dtype I16",
    "no states": "no hidden_states",
    "tokens": "other tokens",
}
CONTENT = {"nan": "not finite"}


@pytest.mark.parametrize("kind", HEADER | CONTENT)
def test_unusable_files_are_made_again_and_reported(
    arguments: ExtractArguments, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    output = extract.extract(arguments).output
    whole = load(row_path(output, 1))
    damage(row_path(output, 1), kind)
    if kind in CONTENT:
        assert extract.extract(arguments).made_again == {}, "the header alone can't show it"
    report = extract.extract(replace(arguments, validate_outputs=kind in CONTENT))
    assert list(report.made_again) == [1]
    assert (HEADER | CONTENT)[kind] in report.made_again[1]
    assert f"Row 1 is extracted again: {row_path(output, 1)}" in caplog.text
    again = load_file(row_path(output, 1))
    torch.testing.assert_close(again["hidden_states"], whole["hidden_states"])
    assert torch.equal(again["token_ids"], whole["token_ids"])
    assert extract.extract(replace(arguments, validate_outputs=True)).made_again == {}


def test_states_of_another_verifier_or_other_layers_are_not_mixed(arguments: ExtractArguments, tmp_path: Path) -> None:
    output = extract.extract(replace(arguments, max_samples=1)).output
    save_verifier(tmp_path / "other", tiny("llama"), seed=1)
    with pytest.raises(PeagleError) as error:
        extract.extract(replace(arguments, model=str(tmp_path / "other")))
    assert arguments.model in str(error.value)
    assert str(tmp_path / "other") in str(error.value)
    with pytest.raises(PeagleError, match=r"aux_layer_ids is \[1, 2, 3\], wanted is \[0, 2, 3\]"):
        extract.extract(replace(arguments, target_layer_ids=[0, 2, 3]))
    with pytest.raises(PeagleError, match="dtype is 'bfloat16', wanted is 'float32'"):
        extract.extract(replace(arguments, dtype="float32"))
    prepared = Path(arguments.preprocessed_data, "prepare.json")
    prepared.write_text('{"tokenizer_fingerprint": "abc", "chat_template_kwargs": {}}')
    with pytest.raises(PeagleError, match=r"chat_template_kwargs is \{'think': False\}, wanted is \{\}"):
        extract.extract(arguments)
    prepared.write_text('{"tokenizer_fingerprint": "xyz"}')
    with pytest.raises(PeagleError, match="tokenizer_fingerprint is 'abc', wanted is 'xyz'"):
        extract.extract(arguments)
    assert cached_rows(output) == {0}


def test_two_spellings_of_a_folder_are_one_verifier(
    arguments: ExtractArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract.extract(replace(arguments, max_samples=1))
    monkeypatch.chdir(Path(arguments.model).parent)
    assert extract.extract(replace(arguments, model=f"./{Path(arguments.model).name}/")).num_kept == 1


def test_states_of_another_precision_of_the_verifier_are_not_taken(arguments: ExtractArguments) -> None:
    """Without a `--verifier-dtype` those of the folder will do."""
    output = extract.extract(replace(arguments, max_samples=1)).output
    with pytest.raises(PeagleError, match="verifier_dtype is 'float32', wanted is 'bfloat16'"):
        extract.extract(replace(arguments, verifier_dtype="bfloat16"))
    assert extract.extract(replace(arguments, verifier_dtype="float32", max_samples=2)).num_kept == 1
    assert extract.extract(replace(arguments, max_samples=2)).num_kept == 2
    manifest = Manifest.read(output)
    assert manifest is not None
    assert manifest.verifier_dtype == "float32"


def test_nothing_is_added_to_states_of_unknown_origin(arguments: ExtractArguments) -> None:
    output = extract.extract(replace(arguments, max_samples=1)).output
    (output / "manifest.json").unlink()
    with pytest.raises(PeagleError, match="without a manifest"):
        extract.extract(arguments)
    assert Manifest.read(output) is None
    assert read_states(output, 0).hidden_states.shape == (9, 3 * HIDDEN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "holds no JSON object"),
        ('{"verifier": "x"}', "is not a manifest"),
        ('{"format_version": 3}', "newer"),
        (
            '{"verifier": "x", "revision": null, "architecture": "x", "num_layers": "4", "hidden_size": 16, '
            '"aux_layer_ids": [1], "format_version": 2}',
            "wrong kind",
        ),
        (
            '{"verifier": null, "revision": null, "architecture": "x", "num_layers": 4, "hidden_size": 16, '
            '"aux_layer_ids": [1], "format_version": 2}',
            "wrong kind",
        ),
        (
            '{"verifier": "x", "revision": 5, "architecture": "x", "num_layers": 4, "hidden_size": 16, '
            '"aux_layer_ids": [1], "format_version": 2}',
            "wrong kind",
        ),
    ],
)
def test_a_damaged_or_newer_manifest_is_named(
    arguments: ExtractArguments, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(PeagleError, match=message) as error:
        extract.extract(replace(arguments, output=str(tmp_path)))
    assert str(tmp_path / "manifest.json") in str(error.value)


def test_values_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    model = save_verifier(tmp_path / "verifier", tiny("llama"))
    save_prepared(tmp_path / "data")
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB - 1] = float("nan")
    model.save_pretrained(tmp_path / "verifier")
    data = Dataset.load_from_disk(tmp_path / "data").with_format(None).to_dict()
    data["input_ids"][3][5] = VOCAB - 1
    Dataset.from_dict(data).save_to_disk(tmp_path / "bad")
    arguments = ExtractArguments(model=str(tmp_path / "verifier"), preprocessed_data=str(tmp_path / "bad"))
    with pytest.raises(RowError, match=r"row 3 of .*are not finite.*leave it out with --skip-rows 3\.") as error:
        extract.extract(arguments)
    assert error.value.row == 3
    assert 3 not in cached_rows(tmp_path / "bad" / "hidden_states")
    extract.extract(replace(arguments, skip_rows=[3]))
    assert cached_rows(tmp_path / "bad" / "hidden_states") == set(range(len(data["input_ids"]))) - {3}


def test_token_ids_outside_the_vocabulary_are_refused(llama: Path, tmp_path: Path) -> None:
    save_prepared(tmp_path, vocab_size=VOCAB + 40)
    with pytest.raises(PeagleError, match=r"Row \d+ has token ids .* vocabulary has 61 tokens"):
        extract.extract(ExtractArguments(model=str(llama), preprocessed_data=str(tmp_path)))


@pytest.mark.parametrize("layer_ids", [[], [1, 1], [5], [-1]])
def test_impossible_layer_ids_are_refused(arguments: ExtractArguments, layer_ids: list[int]) -> None:
    with pytest.raises(PeagleError, match=r"--target-layer-ids .* in 0 \.\. 4"):
        extract.extract(replace(arguments, target_layer_ids=layer_ids))


def test_impossible_arguments_are_refused(arguments: ExtractArguments, tmp_path: Path) -> None:
    with pytest.raises(PeagleError, match="--max-samples is 0"):
        extract.extract(replace(arguments, max_samples=0))
    with pytest.raises(PeagleError, match="is not a prepared dataset"):
        extract.extract(replace(arguments, preprocessed_data=str(tmp_path / "nowhere")))


def test_what_cannot_fit_on_the_disk_is_not_begun(
    arguments: ExtractArguments, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    usage = shutil.disk_usage(arguments.preprocessed_data)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PeagleError, match=r"GiB are free\. .* or fp8-learnt \(0\.\d KiB a token, 0\.0000\d\d GiB\)"):
        extract.extract(arguments)
    with pytest.raises(PeagleError, match=r"--storage fp8 \("):  # the advice doesn't name plain, which is in use
        extract.extract(replace(arguments, dtype="float32"))
    output = Path(arguments.preprocessed_data) / "hidden_states"
    assert not output.exists()
    assert f"{sum(LENGTHS)} tokens need" in caplog.text
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage._replace(free=12200))
    with pytest.raises(PeagleError, match=r"fp8 \(.*, which fits\)"):
        extract.extract(arguments)
    extract.extract(replace(arguments, rank=0, world_size=2))
    assert re.search(r"All shares together need 0\.0000\d\d GiB, but .* has 0\.0000\d\d GiB free", caplog.text)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage._replace(free=disk_space.HEADER_BYTES))
    manifest, data = Manifest.read(output), load_prepared(arguments.preprocessed_data)
    assert manifest is not None
    disk_space.check_disk(output, manifest, data, {0: LENGTHS[0]})  # the file of this row will be replaced
    with pytest.raises(PeagleError, match="GiB are free"):
        disk_space.check_disk(output, manifest, data, {1: LENGTHS[1]})


@pytest.mark.fault(
    "The disk fills up while hidden states are extracted", "Whole files stay, and a rerun makes the missing ones."
)
def test_a_disk_that_fills_up_leaves_whole_files_and_a_rerun_goes_on(
    arguments: ExtractArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(arguments.preprocessed_data) / "hidden_states"

    def save_until_full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        save_file(tensors, path)
        if len(cached_rows(output)) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache_storage, "save_file", save_until_full)
        with pytest.raises(PeagleError, match="No space is left"):
            extract.extract(arguments)
    assert len(os.listdir(output)) == 4, "two rows, the manifest, the arguments, nothing half written"
    report = extract.extract(replace(arguments, validate_outputs=True))
    assert (report.num_kept, report.made_again) == (2, {})


def test_the_disk_needed_is_what_is_used(arguments: ExtractArguments, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    output = extract.extract(arguments).output
    used = sum(row_path(output, row).stat().st_size for row in range(len(LENGTHS)))
    promised = sum(LENGTHS) * (4 * HIDDEN * 2 + 8) + len(LENGTHS) * 256
    assert used <= promised <= 1.1 * used


def test_a_row_reads_its_first_tokens_only(tmp_path: Path) -> None:
    states, token_ids = torch.randn(10, 4, 6), torch.arange(10)
    write_states(tmp_path, 7, states, token_ids)
    row = read_states(tmp_path, 7, length=4)
    assert torch.equal(row.token_ids, token_ids[:4])
    assert torch.equal(row.hidden_states, states[:4, :3].flatten(1))
    assert torch.equal(row.last_hidden_states, states[:4, 3])


def test_fp8_folders_of_speculators_are_read(tmp_path: Path) -> None:
    states = torch.randn(10, 4, 6) * torch.logspace(-2, 3, 10)[:, None, None]
    scales = states.abs().amax(dim=(1, 2), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    tensors = {
        "hidden_states": (states / scales).to(torch.float8_e4m3fn),
        "hidden_states_scales": scales,
        "token_ids": torch.arange(10),
    }
    save_file(tensors, tmp_path / "hs_3.safetensors")
    assert Manifest.read(tmp_path) is None
    assert cached_rows(tmp_path) == {3}
    assert check_file(row_path(tmp_path, 3), (10, 4, 6), torch.arange(10)) is None
    row = read_states(tmp_path, 3, length=8)
    read = torch.cat([row.hidden_states, row.last_hidden_states], dim=1).view(8, 4, 6)
    assert row.hidden_states.dtype == torch.bfloat16
    exact = tensors["hidden_states"].float() * scales
    assert torch.equal(read, exact[:8].bfloat16())
    error = (read.float() - states[:8]).abs().amax(dim=(1, 2)) / states[:8].abs().amax(dim=(1, 2))
    assert error.max() < 2**-4

    tensors["hidden_states_scales"][2] = float("inf")
    save_file(tensors, tmp_path / "hs_3.safetensors")
    assert "not finite" in str(check_file(row_path(tmp_path, 3), (10, 4, 6), torch.arange(10), read_values=True))
    del tensors["hidden_states_scales"]
    save_file(tensors, tmp_path / "hs_3.safetensors")
    assert "no hidden_states_scales" in str(check_file(row_path(tmp_path, 3), (10, 4, 6)))
    with pytest.raises(PeagleError, match=r"hs_3\.safetensors can't be read"):
        read_states(tmp_path, 3)


def test_unreadable_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(PeagleError, match=r"hs_0\.safetensors can't be read.*extract"):
        read_states(tmp_path, 0)
    row_path(tmp_path, 0).write_bytes(b"no safetensors")
    with pytest.raises(PeagleError, match=r"hs_0\.safetensors can't be read.*extract"):
        read_states(tmp_path, 0)


def test_only_files_of_rows_are_listed(tmp_path: Path) -> None:
    for name in ("hs_12.safetensors", ".hs_3.safetensors.99.tmp", "hs_x.safetensors", "hs_4.safetensors.lock", "notes"):
        (tmp_path / name).touch()
    assert cached_rows(tmp_path) == {12}
    assert cached_rows(tmp_path / "nowhere") == set()
