"""`peagle-hf extract`: the verifier's hidden states of prepared samples, from this process or vLLM servers, cached.

Shape letters: T tokens, A auxiliary layers, H the verifier's hidden size.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments import Arguments, check_ranges, config_path, write_config
from ..console import progress_bar
from ..errors import PeagleError
from ..files import ANOTHER_OUTPUT, check_writable, locked_folder, remove_leftovers
from ..model.slots import target_tokens
from ..processes import gather, on_first, together
from ..verifier.head import check_logits, check_trainable
from ..verifier.loading import check_layer_ids, load_verifier_config, usable_device
from .cache_manifest import Manifest, check_folder, origin_of
from .cache_storage import (
    FP8_STORAGES,
    LEARNT_STORAGES,
    CachedStates,
    Storage,
    cache_folder,
    cached_rows,
    check_file,
    row_path,
    save_states,
)
from .disk_space import check_disk, plan, warn_of_other_shares
from .endpoint import (
    MAX_RETRIES,
    MAX_RETRIES_HELP,
    REQUEST_TIMEOUT,
    REQUEST_TIMEOUT_HELP,
    check_length,
    check_requests,
    endpoint_urls,
    served_model,
)
from .endpoint_folder import check_layers, remove_unfetched, require_layers
from .endpoint_states import Endpoint
from .extract_from_servers import extract_from_servers
from .extract_in_process import computing_dtype, extract_in_process, load_for_extraction, use_device
from .extract_share import Share, device_of, share_of, whole_shares
from .prepared_dataset import check_skip_rows, load_prepared, read_prepare_record, rows_fingerprint

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclass
class ExtractArguments(Arguments):
    """Arguments of `peagle-hf extract`."""

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
        default=None, metadata={"help": "Extract only this many samples, the first ones (default: all)."}
    )
    skip_rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Samples to leave out, by their row in the prepared dataset, such as those that a server fails "
            "every time. Training takes the same flag."
        },
    )
    validate_outputs: bool = field(
        default=False,
        metadata={
            "help": "Read the cached files in full, and extract samples again whose file has wrong tokens or values."
        },
    )
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={
            "help": "The auxiliary layers, by number of layers passed (0 = embeddings); the last layer's states are "
            "always added (default: those of the server, else 2, n/2 and n-3 of n layers)."
        },
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "Which share of the samples to extract, from 0 on, of --world-size (default: that of torchrun or "
            "accelerate launch, else 0)."
        },
    )
    world_size: int | None = field(
        default=None,
        metadata={
            "help": "Into how many shares the samples are split, each extracted by a process of its own (default: the "
            "processes of torchrun or accelerate launch, else 1)."
        },
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
    request_timeout: float = field(default=REQUEST_TIMEOUT, metadata={"help": REQUEST_TIMEOUT_HELP})
    max_retries: int = field(default=MAX_RETRIES, metadata={"help": MAX_RETRIES_HELP})
    fail_on_error: bool = field(
        default=False,
        metadata={"help": "End with the first sample that the servers fail, instead of going on without it."},
    )
    max_consecutive_errors: int | None = field(
        default=None,
        metadata={"help": "End when this many consecutive samples have failed (default: as many as --concurrency)."},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16",
        metadata={"help": "dtype of the states when they are read, and when they are stored, unless that is in fp8."},
    )
    storage: Storage = field(
        default="plain",
        metadata={
            "help": "What is stored: plain; fp8, which takes half the space; learnt, the last layer's states only "
            "for the tokens that are trained on; fp8-learnt. Speculators reads the first two."
        },
    )
    verifier_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "What the verifier computes in; auto: float32 on a CPU, else bfloat16."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch in this process; a longer sample is a batch of its own (default: 2048 on a CPU, "
            "8192 on a GPU; two and four batches are computed at the same time)."
        },
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "Where the verifier runs (default: a GPU if there is one, of several processes each its own)."
        },
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
        num_rows: samples that the arguments select; all are cached now.
        num_kept: those of them that were cached before.
        made_again: rows of the samples whose file could not be used, and why.
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
    """Cache the verifier's hidden states of the prepared samples, one `hs_<row>.safetensors` each, and a manifest.

    Samples whose file is complete are kept: by default the header of each file is checked, with `validate_outputs` its
    tokens and values too. Others are extracted again, each with the reason in the log. The stored states depend on
    batch and order only as far as the verifier's arithmetic does: with float32 the difference is below the rounding of
    bfloat16.

    With an `endpoint` a sample that the servers fail is left out, and the others are extracted; the failed ones are
    listed with the reason in `failed.json` in the output folder (`failed_<rank>.json` with several ranks).

    Started by torchrun or accelerate, the processes share the samples, each on the GPU of its local rank, and each
    returns the report of all. If samples of one share fail, the other shares are still extracted before all raise.

    Raises:
        PeagleError: verifier or data can't be read or don't fit each other, the folder holds states of another kind,
            they would not fit on the disk, the verifier's states aren't finite, its logits don't follow from them, or
            the servers failed a sample; or another process has ended.
    """
    _check_arguments(arguments)
    share = share_of(arguments)
    if arguments.device is not None:
        with together():
            usable_device("--device", device_of(arguments.device, share))
    with share.one_voice():
        return _extract_share(arguments, share)


def _extract_share(arguments: ExtractArguments, share: Share) -> ExtractReport:
    """What `extract` does in one of its processes."""
    output = cache_folder(arguments.preprocessed_data, arguments.output)
    urls = endpoint_urls(arguments.endpoint) if arguments.endpoint else ()
    arguments = replace(arguments, model=_verifier_name(arguments, urls))
    server_folder = Path(arguments.server_hidden_states_path or output)
    manifest = _manifest(arguments, server_folder if urls else None)
    data = load_prepared(arguments.preprocessed_data).with_format(None)
    selected = _selected_samples(arguments, data)
    lengths = share.of(selected)
    present = cached_rows(output)
    check_folder(output, manifest, present)
    if arguments.dry_run:
        lengths = selected if share.is_launched else lengths
        missing = {row: length for row, length in lengths.items() if row not in present}
        if share.is_first or not share.is_launched:
            print(plan(output, manifest, data, missing))
        return ExtractReport(output, manifest, len(lengths), len(lengths) - len(missing), {}, 0, 0.0)
    if not lengths.keys() <= present:  # nothing is written where every sample is cached
        check_writable(output)
    if share.size > 1 and not share.is_launched:
        warn_of_other_shares(output, manifest, data, {row: selected[row] for row in selected if row not in present})
    part = "extract" if share.size == 1 else f"extract-{share.rank}-of-{share.size}"
    with locked_folder(output, ANOTHER_OUTPUT, part):
        for folder in {output, server_folder}:
            remove_unfetched(folder, arguments.request_timeout)
        if share.size == 1:
            remove_leftovers(output, r"manifest\.json|(config|extract)\.yaml|failed\.json")
        report = _extract_missing(arguments, share, manifest, output, data, lengths, server_folder, urls)
        if share.is_launched:
            report, lengths = _of_all_processes(report), selected
        are_all_compared = cached_rows(output) & set(range(len(data))) <= lengths.keys()
        existing = Manifest.read(output)
        if are_all_compared and existing is not None and existing.rows != manifest.rows:
            replace(existing, rows=manifest.rows).write(output)
    return report


def _of_all_processes(report: ExtractReport) -> ExtractReport:
    """The reports of all processes as one; the first process logs their number and speed."""
    reports: list[ExtractReport] = [one for _, one in gather(report)]
    num_tokens, seconds = sum(one.num_tokens for one in reports), max(one.seconds for one in reports)
    if num_tokens:
        logger.info(
            "All %d processes: %d tokens in %.1f s: %.0f tokens/s.",
            len(reports),
            num_tokens,
            seconds,
            num_tokens / max(seconds, 1e-9),
        )
    return replace(
        report,
        num_rows=sum(one.num_rows for one in reports),
        num_kept=sum(one.num_kept for one in reports),
        made_again={row: reason for one in reports for row, reason in one.made_again.items()},
        num_tokens=num_tokens,
        seconds=seconds,
    )


def _verifier_name(arguments: ExtractArguments, urls: tuple[str, ...]) -> str:
    """The verifier's hub name or folder: `--model`, else what the servers run, else that of `peagle-hf prepare`."""
    model = served_model(urls, arguments.model, arguments.request_timeout) if urls else arguments.model
    model = model or read_prepare_record(arguments.preprocessed_data).get("model")
    if model is None:
        # If the folder holds no prepared dataset, this raises an error that names it.
        load_prepared(arguments.preprocessed_data)
        raise PeagleError("No verifier is named. Pass --model with a hub name or a folder, or an --endpoint.")
    return model


def _manifest(arguments: ExtractArguments, server_folder: Path | None) -> Manifest:
    """Describe the states that are to be extracted; the layers are the servers' own if none are named.

    Args:
        server_folder: that of the vLLM servers; None without an endpoint.
    """
    assert arguments.model is not None
    config = check_trainable(arguments.model, arguments.revision, arguments.trust_remote_code)
    layer_ids = arguments.target_layer_ids
    if server_folder is not None and layer_ids is None:
        layer_ids = require_layers(server_folder)[:-1]
    record = read_prepare_record(arguments.preprocessed_data)
    return Manifest.of(
        arguments.model,
        config,
        check_layer_ids(layer_ids, config),
        revision=arguments.revision,
        dtype=arguments.dtype,
        storage=arguments.storage,
        prepared=record | {"rows_fingerprint": rows_fingerprint(arguments.preprocessed_data)},
        verifier_dtype=None if arguments.verifier_dtype == "auto" else arguments.verifier_dtype,
    )


def _selected_samples(arguments: ExtractArguments, data: "datasets.Dataset") -> dict[int, int]:
    """Tokens of each sample that is to be extracted in all shares, by row: see --max-samples and --skip-rows."""
    lengths = dict(enumerate(data["seq_len"][: arguments.max_samples]))
    if skipped := check_skip_rows(arguments.skip_rows, len(data), arguments.preprocessed_data):
        logger.info("Left out by --skip-rows: %s. Train with the same flag.", ", ".join(map(str, sorted(skipped))))
        lengths = {row: length for row, length in lengths.items() if row not in skipped}
    if (beyond := len(data) - (arguments.max_samples or len(data))) > 0:
        logger.info("--max-samples %d leaves out the last %d of %d samples.", arguments.max_samples, beyond, len(data))
    return lengths


def _extract_missing(
    arguments: ExtractArguments,
    share: Share,
    manifest: Manifest,
    output: Path,
    data: "datasets.Dataset",
    lengths: dict[int, int],
    server_folder: Path,
    urls: tuple[str, ...],
) -> ExtractReport:
    """Extract the samples of `lengths` whose file isn't there or can't be used."""
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
    num_kept, seconds = len(lengths) - len(missing), 0.0
    to_write = _missing_of_all(share, lengths, missing)
    if urls:
        endpoint = Endpoint(
            urls,
            server_folder,
            (*manifest.aux_layer_ids, manifest.num_layers),
            manifest.hidden_size,
            arguments.request_timeout,
            arguments.max_retries,
        )
        check_layers(server_folder, endpoint.layer_ids)
        check_length(urls, max(missing.values(), default=0), arguments.request_timeout)
        on_first(lambda: check_disk(output, manifest, data, to_write))
        write = _begin(arguments, share, output, manifest, data)
        failed_record = output / f"failed{share.suffix}.json"
        with whole_shares():
            seconds = extract_from_servers(arguments, failed_record, data, missing, endpoint, write)
            remove_unfetched(server_folder, arguments.request_timeout)
    elif to_write:
        assert arguments.model is not None
        config = load_verifier_config(arguments.model, arguments.revision, arguments.trust_remote_code)
        _check_context(config, max(to_write.values()), arguments.model)
        on_first(lambda: check_disk(output, manifest, data, to_write))
        with together():
            model = _load_model(arguments, share) if missing else None
        write = _begin(arguments, share, output, manifest, data)
        with whole_shares():
            if model is not None:
                seconds = extract_in_process(arguments, model, manifest.aux_layer_ids, data, missing, write)
    return ExtractReport(output, manifest, len(lengths), num_kept, made_again, sum(missing.values()), seconds)


def _load_model(arguments: ExtractArguments, share: Share) -> PreTrainedModel:
    """The verifier of this process on its device, with logits that follow from its last states."""
    assert arguments.model is not None
    use_device(device := device_of(arguments.device, share))
    trusts_code = arguments.trust_remote_code
    model = load_for_extraction(arguments.model, device, arguments.verifier_dtype, arguments.revision, trusts_code)
    check_logits(model)
    return model


def _missing_of_all(share: Share, lengths: dict[int, int], missing: dict[int, int]) -> dict[int, int]:
    """What all connected processes are to extract, or else this one, which the log says; all by row."""
    by_whom = ""
    if share.is_launched:
        parts = [part for _, part in gather((lengths, missing))]
        lengths, missing = ({row: n for one in parts for row, n in one[place].items()} for place in range(2))
        by_whom = f" by {share.size} processes; the progress is that of the first"
    num_kept = len(lengths) - len(missing)
    logger.info("%d of %d samples are cached; %d are to be extracted%s.", num_kept, len(lengths), len(missing), by_whom)
    return missing


def _unusable(
    arguments: ExtractArguments, output: Path, manifest: Manifest, data: "datasets.Dataset", present: set[int]
) -> dict[int, str]:
    """Cached rows whose file is of other tokens, of another verifier or not complete, and why; each is logged."""
    origin = origin_of(Manifest.read(output))
    unusable = {}
    for row in progress_bar(sorted(present), desc="Checking", unit="row", disable=not present):
        sample = data[row]
        reason = check_file(
            row_path(output, row),
            (len(sample["input_ids"]), len(manifest.aux_layer_ids) + 1, manifest.hidden_size),
            torch.tensor(sample["input_ids"]),
            _targets(data, row, arguments.storage),
            origin,
            read_values=arguments.validate_outputs,
        )
        if reason is not None:
            logger.warning("Row %d is extracted again: %s can't be used, %s.", row, row_path(output, row), reason)
            unusable[row] = reason
    return unusable


def _targets(data: "datasets.Dataset", row: int, storage: Storage | None) -> Tensor | None:
    """Tokens whose last layer's states are stored, bool [T]; None for the storage kinds that keep all of them."""
    return target_tokens(torch.tensor(data[row]["loss_mask"]).bool()) if storage in LEARNT_STORAGES else None


def _begin(
    arguments: ExtractArguments, share: Share, output: Path, manifest: Manifest, data: "datasets.Dataset"
) -> Callable[[int, CachedStates], None]:
    """Write the arguments and the manifest into the cache folder; returns what writes the states of a row into it."""
    if share.is_first:
        write_config(arguments, config_path(output, "extract"), "extract")
    existing = Manifest.read(output)
    if existing is None:
        device = None if arguments.endpoint else device_of(arguments.device, share)
        replace(manifest, verifier_dtype=computing_dtype(device, arguments.verifier_dtype)).write(output)
    origin = origin_of(existing or manifest)

    def write(row: int, states: CachedStates) -> None:
        stored = states.stored_as(arguments.storage, _targets(data, row, arguments.storage))
        save_states(row_path(output, row), replace(stored, origin=origin))

    return write


def _check_arguments(arguments: ExtractArguments) -> None:
    """Make sure that the arguments are in range and fit together."""
    at_least_1 = ("max_samples", "max_batch_tokens", "concurrency", "max_consecutive_errors", "world_size")
    check_ranges(arguments, dict.fromkeys(at_least_1, (1, math.inf)))
    check_requests(arguments.request_timeout, arguments.max_retries)
    if arguments.storage in FP8_STORAGES and arguments.dtype != "bfloat16":
        raise PeagleError(
            f"--storage {arguments.storage} is read as bfloat16; leave out --dtype {arguments.dtype}, or store plain "
            "or learnt."
        )
    if arguments.endpoint and (arguments.device or arguments.max_batch_tokens or arguments.verifier_dtype != "auto"):
        raise PeagleError(
            "--device, --verifier-dtype and --max-batch-tokens are for a verifier in this process. With --endpoint "
            "tell the server: peagle-hf launch-vllm MODEL ... -- --dtype float32 --max-num-batched-tokens 8192."
        )


def _check_context(config: PreTrainedConfig, longest: int, model: str) -> None:
    """Refuse samples that are longer than the verifier's context, as a vLLM server would."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise PeagleError(
            f"The longest sample has {longest} tokens, but {model} takes {limit} (max_position_embeddings of its "
            f"config.json). Cut the samples with peagle-hf prepare --seq-length {limit}."
        )
