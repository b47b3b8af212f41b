"""Steps 2-3: run the verifier over the prepared rows, in this process or in a vLLM server, and cache its hidden states.

Shape letters: B rows of a batch, T tokens, A auxiliary layers, H the verifier's hidden size.
"""

import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments import Arguments, check_ranges, config_path, write_config
from ..console import progress_bar
from ..cpu import keep_freed_memory, pack_linear_layers
from ..errors import PeagleError
from ..files import check_writable, locked_folder, remove_leftovers, write_json
from ..model.slots import target_tokens
from ..verifier.head import check_logits
from ..verifier.loading import check_layer_ids, load_verifier, load_verifier_config
from ..verifier.parts import residual_streams, verifier_parts
from .cache_manifest import Manifest, check_folder, origin_of
from .cache_storage import (
    FP8_STORAGES,
    LEARNT_STORAGES,
    Storage,
    cache_folder,
    cached_rows,
    check_row,
    row_path,
    write_row,
)
from .dataset import MAX_NAMED, check_skip_rows
from .endpoint import (
    MAX_RETRIES,
    REQUEST_TIMEOUT,
    check_length,
    check_requests,
    concurrently,
    endpoint_urls,
    served_model,
)
from .endpoint_folder import check_layers, remove_unfetched, require_layers
from .endpoint_states import Endpoint
from .errors import EndpointError, RowError, WrongServerEndpointError
from .prepared_dataset import load_prepared, read_prepare_record, rows_fingerprint

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MAX_PADDING = 0.05
"""At most this share of a batch is padding."""
HEADER_BYTES = 512
"""At most so many come before the tensors of a file."""
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
CPU_BATCHES, GPU_BATCHES = 2, 4
"""So many are computed at once: one goes on while another has a pause, or is written."""

Extracted = tuple[int, Tensor, Tensor]
"""What a backend yields: a row, its states [T, A+1, H] and the token ids [T] that they belong to."""


@dataclass
class ExtractArguments(Arguments):
    """What `peagle-hf extract` is told."""

    model: str | None = field(
        default=None,
        metadata={
            "aliases": ["--verifier"],
            "help": "The verifier, a hub name or a folder (default: what the endpoint runs, else the model that the "
            "data were prepared for).",
        },
    )
    preprocessed_data: str = field(
        default="./output", metadata={"aliases": ["--data-path"], "help": "Folder of `peagle-hf prepare`."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the hidden states (default: hidden_states in the preprocessed data)."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Extract the first so many rows only (all of them if not given)."}
    )
    skip_rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Rows of the prepared dataset to leave out, by number, such as those that a server fails every "
            "time. Training takes the same flag."
        },
    )
    validate_outputs: bool = field(
        default=False,
        metadata={"help": "Read what is already there in full and make again what has wrong tokens or values."},
    )
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "The auxiliary layers, by number of layers passed (0 = embeddings); the last layer's states are "
            "always added (default: those of the server, else 2, n/2 and n-3 of n layers)."
        },
    )
    rank: int = field(default=0, metadata={"help": "Which share of the rows to make, from 0 on, of --world-size."})
    world_size: int = field(
        default=1, metadata={"help": "Into how many shares the rows are split, each made by a command of its own."}
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "vLLM servers that run the verifier, URL[,URL...], started by `peagle-hf launch-vllm` "
            "(default: run it in this process)."
        },
    )
    server_hidden_states_path: str | None = field(
        default=None,
        metadata={"help": "The folder that the servers write to, as it is seen here (default: the output folder)."},
    )
    concurrency: int = field(default=32, metadata={"help": "Requests to the servers at a time."})
    request_timeout: float = field(
        default=REQUEST_TIMEOUT, metadata={"help": "Seconds to wait for a server's answer, each time it is tried."}
    )
    max_retries: int = field(
        default=MAX_RETRIES, metadata={"help": "How often a request is repeated that a server fails."}
    )
    fail_on_error: bool = field(
        default=False, metadata={"help": "End with the first row that the servers fail, instead of going on without."}
    )
    max_consecutive_errors: int | None = field(
        default=None,
        metadata={"help": "End when so many rows in turn have failed (default: as many as --concurrency)."},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "What the states are read as; also how they are stored, fp8 apart."}
    )
    storage: Storage = field(
        default="plain",
        metadata={
            "help": "What is stored: plain; fp8, which takes half the space; learnt, the last layer's states only "
            "where something is learnt; fp8-learnt. Speculators reads the first two."
        },
    )
    verifier_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "What the verifier computes in; auto: float32 on a CPU, else bfloat16."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch in this process; a longer row is one of its own (default: 2048 on a CPU, 8192 "
            "on a GPU, where two and four are computed at once)."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Where the verifier runs (default: a GPU if there is one)."}
    )
    revision: str | None = field(default=None, metadata={"help": "The verifier's revision on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the verifier run code from its repository."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would be run and written, and stop."})

    GROUPS: ClassVar = {
        "Input and output": (
            "model",
            "preprocessed_data",
            "output",
            "max_samples",
            "skip_rows",
            "validate_outputs",
            "revision",
            "dry_run",
            "trust_remote_code",
        ),
        "Hidden states": ("target_layer_ids", "storage", "dtype"),
        "vLLM servers": (
            "endpoint",
            "server_hidden_states_path",
            "concurrency",
            "request_timeout",
            "max_retries",
            "fail_on_error",
            "max_consecutive_errors",
        ),
        "This process": ("device", "verifier_dtype", "max_batch_tokens", "rank", "world_size"),
    }


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` did.

    Args:
        output: the cache folder.
        manifest: what is in it.
        num_rows: rows asked for, all of which are there now.
        num_kept: rows that were there already.
        made_again: rows whose file could not be used, and why.
        num_tokens: tokens that went through the verifier.
        seconds: that this took, without loading the verifier.
    """

    output: Path
    manifest: Manifest
    num_rows: int
    num_kept: int
    made_again: dict[int, str]
    num_tokens: int
    seconds: float


def extract(arguments: ExtractArguments) -> ExtractReport:
    """Cache the verifier's hidden states of the prepared rows, one `hs_<row>.safetensors` each, and a manifest.

    Rows that are complete are kept: by default the header of each file is looked at, with `validate_outputs` its
    tokens and values too. Others are made again, each with the reason in the log. What is stored of a row depends on
    batch and order only as far as the verifier's arithmetic does: with float32 the difference is below the rounding of
    bfloat16.

    With an `endpoint` a row that the servers fail is left out, and the others are made; what failed is listed with the
    reason in `failed.json` in the output folder (`failed_<rank>.json` with several ranks).

    Raises:
        PeagleError: verifier or data can't be read or don't fit each other, the folder holds states of another kind,
            they would not fit on the disk, the verifier's states aren't finite, its logits don't follow from them, or
            the servers failed a row.
    """
    _check_arguments(arguments)
    output = cache_folder(arguments.preprocessed_data, arguments.output)
    urls = endpoint_urls(arguments.endpoint) if arguments.endpoint else ()
    model = served_model(urls, arguments.model, arguments.request_timeout) if urls else arguments.model
    record = read_prepare_record(arguments.preprocessed_data)
    model = model or record.get("model")
    if model is None:
        load_prepared(arguments.preprocessed_data)  # names the folder, if that isn't a prepared dataset
        raise PeagleError("No verifier is named. Pass --model with a hub name or a folder, or an --endpoint.")
    arguments = replace(arguments, model=model)
    config = load_verifier_config(model, arguments.revision, arguments.trust_remote_code)
    server_folder = Path(arguments.server_hidden_states_path or output)
    wanted = arguments.target_layer_ids
    if urls and wanted is None:
        wanted = require_layers(server_folder)[:-1]
    manifest = Manifest.of(
        model,
        config,
        check_layer_ids(wanted, config),
        revision=arguments.revision,
        dtype=arguments.dtype,
        storage=arguments.storage,
        prepared=record | {"rows_fingerprint": rows_fingerprint(arguments.preprocessed_data)},
    )
    data = load_prepared(arguments.preprocessed_data).with_format(None)
    rows = enumerate(data["seq_len"][: arguments.max_samples])
    lengths = {row: length for row, length in rows if row % arguments.world_size == arguments.rank}
    if skipped := check_skip_rows(arguments.skip_rows, len(data), arguments.preprocessed_data):
        logger.info("Left out by --skip-rows: %s. Train with the same flag.", ", ".join(map(str, sorted(skipped))))
        lengths = {row: length for row, length in lengths.items() if row not in skipped}
    if (beyond := len(data) - (arguments.max_samples or len(data))) > 0:
        logger.info("--max-samples %d leaves out the last %d of %d rows.", arguments.max_samples, beyond, len(data))
    present = cached_rows(output)
    check_folder(output, manifest, present)
    if arguments.dry_run:
        missing = {row: length for row, length in lengths.items() if row not in present}
        print(_plan(output, manifest, data, missing))
        return ExtractReport(output, manifest, len(lengths), len(lengths) - len(missing), {}, 0, 0.0)
    check_writable(output)
    share = "extract" if arguments.world_size == 1 else f"extract-{arguments.rank}-of-{arguments.world_size}"
    with locked_folder(output, "Wait until it has ended, or name another --output.", share):
        for folder in {output, server_folder}:
            remove_unfetched(folder, arguments.request_timeout)
        if arguments.world_size == 1:
            remove_leftovers(output, r"manifest\.json|(config|extract)\.yaml|failed\.json")
        report = _fill(arguments, manifest, output, data, lengths, server_folder, urls)
        compared = cached_rows(output) & set(range(len(data))) <= lengths.keys()
        existing = Manifest.read(output)
        if compared and existing is not None and existing.rows != manifest.rows:
            replace(existing, rows=manifest.rows).write(output)
    return report


def _fill(
    arguments: ExtractArguments,
    manifest: Manifest,
    output: Path,
    data: "datasets.Dataset",
    lengths: dict[int, int],
    server_folder: Path,
    urls: tuple[str, ...],
) -> ExtractReport:
    """Make the rows of `lengths` that aren't there or can't be used."""
    present = cached_rows(output)
    if surplus := sorted(row for row in present if row >= len(data)):
        logger.warning(
            "%s has files of rows that %s doesn't have, such as hs_%d.safetensors: %d of them, which nothing reads.",
            output,
            arguments.preprocessed_data,
            surplus[0],
            len(surplus),
        )
    made_again = _unusable(arguments, output, manifest, data, present & lengths.keys())
    missing = {row: length for row, length in lengths.items() if row not in present or row in made_again}
    num_kept = len(lengths) - len(missing)
    logger.info("%d of %d rows are there; %d are to be made.", num_kept, len(lengths), len(missing))
    seconds = 0.0
    if urls:
        endpoint = Endpoint(
            urls,
            server_folder,
            (*manifest.aux_layer_ids, manifest.num_layers),
            manifest.hidden_size,
            arguments.request_timeout,
            arguments.max_retries,
        )
        check_layers(server_folder, endpoint.slots)
        check_length(urls, max(missing.values(), default=0), arguments.request_timeout)
        seconds = _make_by_server(arguments, manifest, output, data, missing, endpoint)
        remove_unfetched(server_folder, arguments.request_timeout)
    elif missing:
        assert arguments.model is not None
        config = load_verifier_config(arguments.model, arguments.revision, arguments.trust_remote_code)
        _check_context(config, max(missing.values()), arguments.model)
        seconds = _make(arguments, manifest, output, data, missing)
    return ExtractReport(output, manifest, len(lengths), num_kept, made_again, sum(missing.values()), seconds)


def _unusable(
    arguments: ExtractArguments, output: Path, manifest: Manifest, data: "datasets.Dataset", present: set[int]
) -> dict[int, str]:
    """The rows whose file isn't that of the prepared row, of the verifier or complete, and why; all of it is logged."""
    origin = origin_of(Manifest.read(output))
    unusable = {}
    for row in progress_bar(sorted(present), desc="Checking", unit="row", disable=not present):
        sample = data[row]
        reason = check_row(
            row_path(output, row),
            (len(sample["input_ids"]), len(manifest.aux_layer_ids) + 1, manifest.hidden_size),
            torch.tensor(sample["input_ids"]),
            _targets(data, row, arguments.storage),
            origin,
            read_values=arguments.validate_outputs,
        )
        if reason is not None:
            logger.warning("Row %d is made again: %s is unusable, %s.", row, row_path(output, row), reason)
            unusable[row] = reason
    return unusable


def plan_batches(lengths: dict[int, int], max_tokens: int) -> list[list[int]]:
    """Group rows of like length, longest first, into batches of `max_tokens` tokens with their padding.

    The longest come first so that a lack of memory shows at once. A row longer than `max_tokens` stands alone.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        fits = batches and (len(batches[-1]) + 1) * longest <= max_tokens
        if fits and lengths[row] >= (1 - MAX_PADDING) * longest:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


@torch.inference_mode()
def run_verifier(
    model: PreTrainedModel,
    layer_ids: Sequence[int],
    data: "datasets.Dataset",
    rows: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[Extracted]:
    """The embedded backend: run transformers' decoder, without its head, on one batch and yield its rows.

    Raises:
        PeagleError: a row has ids outside the verifier's vocabulary, or the architecture isn't known.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    documents = [torch.tensor(token_ids) for token_ids in data.select(rows)["input_ids"]]
    for row, token_ids in zip(rows, documents, strict=True):
        if not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
            raise PeagleError(
                f"Row {row} has token ids {int(token_ids.min())} to {int(token_ids.max())}, but the verifier's "
                f"vocabulary has {vocab_size} tokens: the data was prepared with another tokenizer. Run peagle-hf "
                "prepare with this verifier."
            )
    # The padding is on the right, where a causal model can't see it: no attention mask is needed.
    states_BTAH = residual_streams(model, layer_ids, pad_sequence(documents, batch_first=True), dtype)
    for row, token_ids, states_TAH in zip(rows, documents, states_BTAH.cpu(), strict=True):
        yield row, states_TAH[: len(token_ids)], token_ids


def replica(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with modules of its own around the same weights, for another thread: hooks belong to modules."""
    return deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _make(
    arguments: ExtractArguments, manifest: Manifest, output: Path, data: "datasets.Dataset", lengths: dict[int, int]
) -> float:
    """Run the verifier over the rows of `lengths` and write what it gives; returns the seconds that this took."""
    dtype, num_tokens = getattr(torch, arguments.dtype), sum(lengths.values())
    _check_disk(output, num_tokens, _bytes_needed(manifest, data, lengths))
    model = _load(arguments)
    check_logits(model)
    origin = _begin(arguments, output, manifest)
    on_cpu = model.device.type == "cpu"
    batches = plan_batches(lengths, arguments.max_batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS))
    num_cores = torch.get_num_threads()
    at_once = min(CPU_BATCHES if on_cpu else GPU_BATCHES, num_cores)
    own = threading.local()

    def begin() -> None:
        torch.set_num_threads(num_cores // at_once)
        own.model = replica(model)

    def make(rows: Sequence[int]) -> int:
        for row, states, token_ids in run_verifier(own.model, manifest.aux_layer_ids, data, rows, dtype):
            if not states.isfinite().all():
                raise RowError(
                    row,
                    arguments.preprocessed_data,
                    reason=f"the verifier's hidden states are not finite as {arguments.dtype}; nothing of the row was "
                    "written, the rows before it are kept",
                    advice="try --verifier-dtype float32 or --dtype bfloat16, look at the row's text, or leave it out "
                    f"with --skip-rows {row}",
                )
            is_target = _targets(data, row, arguments.storage)
            write_row(output, row, states, token_ids, arguments.storage, is_target, origin)
        return sum(lengths[row] for row in rows)

    start = time.perf_counter()
    try:
        with (
            progress_bar(total=num_tokens, desc="Extracting", unit="tok", unit_scale=True) as progress,
            ThreadPoolExecutor(at_once, initializer=begin) as pool,
        ):
            for num_made in pool.map(make, batches):
                progress.update(num_made)
    finally:
        torch.set_num_threads(num_cores)
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.1f s: %.0f tokens/s.", num_tokens, seconds, num_tokens / seconds)
    return seconds


def _make_by_server(
    arguments: ExtractArguments,
    manifest: Manifest,
    output: Path,
    data: "datasets.Dataset",
    lengths: dict[int, int],
    endpoint: Endpoint,
) -> float:
    """As `_make`, with the rows' states from a vLLM server.

    Raises:
        PeagleError: a row failed; all that didn't are there.
    """
    dtype, num_tokens = getattr(torch, arguments.dtype), 0
    _check_disk(output, sum(lengths.values()), _bytes_needed(manifest, data, lengths))
    origin = _begin(arguments, output, manifest)
    record = output / ("failed.json" if arguments.world_size == 1 else f"failed_{arguments.rank}.json")
    record.unlink(missing_ok=True)
    limit = 1 if arguments.fail_on_error else arguments.max_consecutive_errors or arguments.concurrency
    failed: dict[int, str] = {}
    in_turn = 0

    def make(row: int) -> None:
        token_ids = data[row]["input_ids"]
        states = endpoint.fetch(token_ids, dtype)
        is_target = _targets(data, row, arguments.storage)
        write_row(output, row, states, torch.tensor(token_ids), arguments.storage, is_target, origin)

    start = time.perf_counter()
    longest_first = sorted(lengths, key=lambda row: (-lengths[row], row))
    with progress_bar(total=sum(lengths.values()), desc="Extracting", unit="tok", unit_scale=True) as progress:
        for row, result in concurrently(make, longest_first, arguments.concurrency):
            if isinstance(result, WrongServerEndpointError):
                raise RowError.of(row, Path(arguments.preprocessed_data), result) from result
            if isinstance(result, EndpointError):
                logger.warning("Row %d failed: %s.", row, result)
                failed[row] = str(result)
                in_turn += 1
                progress.set_postfix(failed=len(failed))
                if in_turn >= limit:
                    break
            elif isinstance(result, BaseException):
                raise result
            else:
                in_turn = 0
                num_tokens += lengths[row]
                progress.update(lengths[row])
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.1f s: %.0f tokens/s.", num_tokens, seconds, num_tokens / seconds)
    if failed:
        write_json(record, {str(row): failed[row] for row in sorted(failed)})
        row, reason = next(reversed(failed.items()))
        ended = f"The last {in_turn} rows in turn failed, so no more were tried. " if in_turn >= limit else ""
        raise PeagleError(
            f"{ended}{len(failed)} of {len(lengths)} rows failed, row {row} with: {reason}. All are listed with their "
            f"reason in {record}. Run the same command again, which makes just what is missing; leave out what fails "
            f"every time with --skip-rows {' '.join(map(str, sorted(failed)[:MAX_NAMED]))}"
            f"{' ...' if len(failed) > MAX_NAMED else ''}."
        )
    return seconds


def _targets(data: "datasets.Dataset", row: int, storage: Storage | None) -> Tensor | None:
    """The tokens whose last layer's states are kept; None for the kinds that keep all."""
    return target_tokens(torch.tensor(data[row]["loss_mask"]).bool()) if storage in LEARNT_STORAGES else None


def _begin(arguments: ExtractArguments, output: Path, manifest: Manifest) -> str | None:
    """Say in the folder what its files are; gives what each of them is to say of its origin."""
    if arguments.rank == 0:
        write_config(arguments, config_path(output, "extract"), "extract")
    existing = Manifest.read(output)
    if existing is None:
        manifest.write(output)
    return origin_of(existing or manifest)


def _bytes_needed(manifest: Manifest, data: "datasets.Dataset", lengths: dict[int, int]) -> int:
    """What the files of these rows take on the disk."""
    num_tokens = num_last = sum(lengths.values())
    if manifest.storage in LEARNT_STORAGES:
        masks = (data[row]["loss_mask"] for row in lengths)
        num_last = sum(int(target_tokens(torch.tensor(mask).bool()).sum()) for mask in masks)
    return manifest.bytes_of(num_tokens, num_last) + len(lengths) * HEADER_BYTES


def _plan(output: Path, manifest: Manifest, data: "datasets.Dataset", missing: dict[int, int]) -> str:
    """What `extract` would do, for `--dry-run`."""
    free, needed = _free_bytes(output), _bytes_needed(manifest, data, missing)
    return "\n".join(
        [
            f"would run {manifest.verifier} ({manifest.architecture}, {manifest.num_layers} layers) and store layers "
            f"{', '.join(map(str, manifest.aux_layer_ids))} and the last one, as {manifest.storage} {manifest.dtype}",
            f"would make {len(missing)} of {len(data)} samples, {sum(missing.values())} tokens",
            f"would write {needed / 2**30:.3f} GiB into {output}, where {free / 2**30:.1f} GiB are free",
        ]
    )


def _check_arguments(arguments: ExtractArguments) -> None:
    at_least_1 = ("max_samples", "max_batch_tokens", "concurrency", "max_consecutive_errors", "world_size")
    check_ranges(arguments, dict.fromkeys(at_least_1, (1, math.inf)))
    check_requests(arguments.request_timeout, arguments.max_retries)
    if not 0 <= arguments.rank < arguments.world_size:
        raise PeagleError(f"--rank is {arguments.rank} but must be in 0 .. {arguments.world_size - 1} (--world-size).")
    if arguments.storage in FP8_STORAGES and arguments.dtype != "bfloat16":
        raise PeagleError(
            f"--storage {arguments.storage} is read as bfloat16; leave out --dtype {arguments.dtype}, or store plain "
            "or learnt."
        )
    if arguments.device is not None:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise PeagleError(
                f"--device {arguments.device} can't be used: {str(error).splitlines()[0].rstrip('.')}. Name a device "
                "that PyTorch has here, such as cpu or cuda:0, or leave the flag out."
            ) from error
    if arguments.endpoint and (arguments.device or arguments.max_batch_tokens or arguments.verifier_dtype != "auto"):
        raise PeagleError(
            "--device, --verifier-dtype and --max-batch-tokens are for a verifier in this process. With --endpoint "
            "tell the server: peagle-hf launch-vllm MODEL ... -- --dtype float32 --max-num-batched-tokens 8192."
        )


def _check_context(config: PreTrainedConfig, longest: int, model: str) -> None:
    """Refuse rows for which the verifier has no positions, as a vLLM server would."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise PeagleError(
            f"The longest row has {longest} tokens, but {model} takes {limit} (max_position_embeddings of its "
            f"config.json). Cut the rows with peagle-hf prepare --seq-length {limit}."
        )


def _check_disk(output: Path, num_tokens: int, needed: int) -> None:
    """Say how many bytes the states need on the disk, and refuse to begin what can't fit."""
    check_writable(output)
    free = _free_bytes(output)
    logger.info("%d tokens need %.2f GiB in %s; %.2f GiB are free.", num_tokens, needed / 2**30, output, free / 2**30)
    if needed > free:
        raise PeagleError(
            f"The hidden states of {num_tokens} tokens need {needed / 2**30:.2f} GiB in {output}, but only "
            f"{free / 2**30:.2f} GiB are free. Free some space, name an --output on another disk, or take fewer rows "
            "with --max-samples."
        )


def _free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not exist yet."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(existing).free


def _load(arguments: ExtractArguments) -> PreTrainedModel:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = torch.device(device).type == "cpu"
    name = arguments.verifier_dtype
    dtype = getattr(torch, ("float32" if on_cpu else "bfloat16") if name == "auto" else name)
    assert arguments.model is not None
    model = load_verifier(arguments.model, dtype, device, arguments.revision, arguments.trust_remote_code)
    if on_cpu:
        keep_freed_memory()
        pack_linear_layers(verifier_parts(model).decoder)
    return model
