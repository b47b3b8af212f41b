"""A drafter's files as vLLM serves them: where they are, whether vLLM loads them rightly, and what it must be told."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..errors import PeagleError
from ..files import read_json
from ..fingerprint import has_weights
from ..verifier.loading import load_verifier_config
from .config import NOT_OF_A_DRAFTER, VLLM_AUX_HIDDEN_STATES, PeagleConfig
from .drafter import PeagleForSpeculation

logger = logging.getLogger(__name__)

CHECKPOINT_FILES = ("config.json", "model.safetensors")
DRAFTER_HELP = "The drafter: a checkpoint folder, such as checkpoints/checkpoint_best, or a hub name."
VERIFIER_HELP = "Folder or hub name of the verifier; default: the one in the checkpoint."
DRAFT_SAMPLE_METHOD_HELP = (
    "How tokens are drafted for requests with a temperature above 0: drawn from the drafter's distribution "
    "(probabilistic, the default), or the drafter's most likely ones (greedy), which are accepted less often, but need "
    "no more GPU memory and keep the seeds of requests. The text is distributed alike with both."
)
RUN_RECORD = "run.json"
"""File of a checkpoint with the record of its training (see `training.record`)."""
OPTIONAL_TENSORS = {"embed_tokens.weight"}
"""What vLLM takes from the verifier where a checkpoint doesn't have it."""


def drafter_folder(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a drafter: the one that is named, or where the files of a hub's repository are kept.

    Links are followed, so that a caller goes on with one checkpoint when training lets `checkpoint_best` name another.

    Raises:
        PeagleError: there is no such folder, and the hub gives no such repository.
    """
    if Path(name_or_path).is_dir():
        return Path(os.path.realpath(name_or_path))
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[*CHECKPOINT_FILES, "chat_template*"]))
    except (OSError, ValueError) as error:
        raise PeagleError(
            f"There is no folder {name_or_path}, and no drafter of that name came from the hub: "
            f"{' '.join(str(error).split())} Name a folder that training wrote, such as checkpoints/checkpoint_best, "
            "or a repository that this machine can reach or has in its cache."
        ) from error


def drafter_name(name_or_path: str | os.PathLike[str], folder: Path) -> tuple[str, str | None]:
    """What reports call a drafter, and the link by which it was named.

    Args:
        folder: what `drafter_folder` gave for the name.

    Returns:
        The folder that the name leads to, relative if the name is, and the name itself if that is or contains a link;
        else the name and None. A name on the hub stays as it is.
    """
    given = str(name_or_path)
    if not os.path.isdir(given) or os.path.abspath(given) == str(folder):
        return given, None
    return (str(folder) if os.path.isabs(given) else os.path.relpath(folder)), given


def check_checkpoint(folder: str | os.PathLike[str]) -> PeagleConfig:
    """Make sure that vLLM would load a checkpoint, and would load it rightly: vLLM itself is silent about much.

    Args:
        folder: holds `config.json` and `model.safetensors`.

    Returns:
        The drafter's configuration.

    Raises:
        PeagleError: a file, field or tensor is missing, superfluous or wrong; the message names it.
    """
    folder = Path(folder)
    for name in CHECKPOINT_FILES:
        if not (folder / name).is_file():
            best = folder / "checkpoint_best"
            advice = (
                f"Name {best}"
                if best.exists()
                else "Name a folder that training wrote, such as checkpoints/checkpoint_best"
            )
            raise PeagleError(f"{folder} holds no {name}, so it is no drafter checkpoint. {advice}.")
    config = _check_config(folder / "config.json")
    _check_tensors(folder / "model.safetensors", config)
    return config


def verifier_of(folder: str | os.PathLike[str], config: PeagleConfig, given: str | None) -> str:
    """The verifier of a drafter: the one that is given, otherwise the one that its configuration names.

    Raises:
        PeagleError: the configuration names a folder that isn't there.
    """
    if given is not None:
        return given
    name = str(config.verifier_name_or_path)
    try:
        if not os.path.isdir(name):
            validate_repo_id(name)
    except HFValidationError as error:
        raise PeagleError(
            f"The drafter {folder} was trained with the verifier in {name}, but there is no such folder. If it is "
            "somewhere else now, name it with --verifier."
        ) from error
    return name


def speculative_config(
    folder: str | os.PathLike[str],
    config: PeagleConfig,
    num_speculative_tokens: int | None = None,
    draft_sample_method: str | None = None,
) -> dict[str, Any]:
    """What vLLM's `--speculative-config` (`speculative_config=` of `vllm.LLM`) must say about this drafter.

    Args:
        config: the drafter's.
        num_speculative_tokens: tokens to propose at a time; default: as many as it was trained for.
        draft_sample_method: how tokens are drafted for requests with a temperature above 0. `probabilistic`, the
            default here, draws them from the drafter's distribution; `greedy`, vLLM's own default, takes its most
            likely tokens.
    """
    tokens = num_speculative_tokens or config.num_depths
    if tokens > config.num_depths:
        logger.warning(
            "%s was trained to draft %d tokens at a time and never learnt the further ones up to %d, which cost time.",
            folder,
            config.num_depths,
            tokens,
        )
    return {
        "model": str(folder),
        "method": "eagle3",  # without it vLLM runs the drafter as a language model
        "parallel_drafting": True,  # without it vLLM drafts token by token and accepts fewer
        "num_speculative_tokens": tokens,
        "draft_sample_method": draft_sample_method or "probabilistic",
    }


def _check_config(path: Path) -> PeagleConfig:
    fields = read_json(path, "Export the checkpoint again.")
    if "speculators_model_type" not in fields and "speculators_config" not in fields:
        raise PeagleError(f"{path}: {NOT_OF_A_DRAFTER.format(fields.get('model_type'))}")
    try:
        wrong = _wrong_fields(fields)
        if not wrong:
            return PeagleConfig.from_dict(fields)
    except (PeagleError, StrictDataclassError, TypeError, AttributeError, LookupError, ValueError) as error:
        raise PeagleError(f"{path}: {' '.join(str(error).split())}") from error
    raise PeagleError(f"vLLM would not serve this drafter as trained: in {path}, {'; '.join(wrong)}. Correct it.")


def _wrong_fields(fields: dict[str, Any]) -> list[str]:
    """What vLLM would refuse or misunderstand in a configuration, as clauses."""
    speculators_config = fields.get("speculators_config") or {}
    methods = speculators_config.get("proposal_methods") or [{}]
    layer_ids = fields.get("eagle_aux_hidden_state_layer_ids") or []
    layer_config = fields.get("transformer_layer_config") or {}
    wrong = []
    if fields.get("model_type", "speculators") != "speculators":
        wrong.append("model_type must be 'speculators' or absent: vLLM refuses any other")
    if fields.get("speculators_model_type") != "peagle":
        wrong.append("speculators_model_type must be 'peagle'")
    if not layer_ids:
        wrong.append("eagle_aux_hidden_state_layer_ids is missing")
    if "norm_before_residual" not in fields:
        wrong.append("norm_before_residual is missing, and vLLM would take it as false")
    if methods[0].get("speculative_tokens") is None:
        wrong.append("speculators_config.proposal_methods[0].speculative_tokens is missing")
    if not (speculators_config.get("verifier") or {}).get("name_or_path"):
        wrong.append("speculators_config.verifier.name_or_path is missing")
    if len(layer_ids) not in (0, layer_config.get("num_aux_hidden_states", VLLM_AUX_HIDDEN_STATES)):
        wrong.append(
            f"transformer_layer_config.num_aux_hidden_states must be {len(layer_ids)}, the number of auxiliary layers"
        )
    return wrong


def _check_tensors(path: Path, config: PeagleConfig) -> None:
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in PeagleForSpeculation(config).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            d2t = file.get_tensor("d2t") if "d2t" in found else None
    # safetensors reports a file that it may not read as missing.
    except (SafetensorError, OSError) as error:
        raise PeagleError(
            f"{path} can't be read: {error}. Check its permissions, or export the checkpoint again."
        ) from error

    problems = [f"{name} is missing" for name in expected if name not in found and name not in OPTIONAL_TENSORS]
    problems += [f"{name} is superfluous" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name]}, the configuration says {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if not problems and d2t is not None:
        token_ids = d2t + torch.arange(d2t.numel())
        if token_ids[0] < 0 or token_ids[-1] >= config.vocab_size or not (token_ids.diff() > 0).all():
            problems.append("d2t doesn't map the draft tokens to ascending ids of the verifier's vocabulary")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PeagleError(
            f"vLLM would not load {path} rightly: {'; '.join(problems[:3])}{more}. Export the checkpoint again with "
            "PeagleForSpeculation.save_pretrained."
        )


def check_verifier(
    folder: str | os.PathLike[str], config: PeagleConfig, verifier: str, trust_remote_code: bool
) -> None:
    """Make sure that a drafter was made for a model like this one; warn of other weights than in its training.

    Args:
        folder: of the drafter, for the message.
        config: of the drafter.
        verifier: hub name or folder of the model.
        trust_remote_code: let the verifier's configuration run code from its repository.

    Raises:
        PeagleError: the model's configuration can't be read, or it has other sizes or too few layers.
    """
    try:
        target = load_verifier_config(verifier, trust_remote_code=trust_remote_code)
    except PeagleError as error:
        if verifier != config.verifier_name_or_path:
            raise
        raise PeagleError(
            f"{error} The drafter {folder} names its verifier so; if it is somewhere else now, name it with --verifier."
        ) from error
    layer_ids = config.eagle_aux_hidden_state_layer_ids
    same_sizes = (target.hidden_size, target.vocab_size) == (config.hidden_size, config.vocab_size)
    if not same_sizes or max(layer_ids) > target.num_hidden_layers:
        raise PeagleError(
            f"The drafter {folder} was made for {config.verifier_name_or_path} (hidden size {config.hidden_size}, "
            f"vocabulary {config.vocab_size}, states after layers {layer_ids}), but {verifier} has hidden size "
            f"{target.hidden_size}, vocabulary {target.vocab_size} and {target.num_hidden_layers} layers. Name the "
            "verifier that it was trained with."
        )
    recorded = None
    with suppress(OSError, ValueError, AttributeError):  # a drafter of the hub or of speculators has no such file
        recorded = json.loads((Path(folder) / RUN_RECORD).read_bytes()).get("verifier")
    if has_weights(recorded, verifier, made_by=config.verifier_name_or_path) is False:
        logger.warning(
            "%s has other weights than the verifier that the drafter %s was trained with, so fewer drafts may be "
            "accepted. If that isn't a version of it that you mean to use, such as a quantised one, name the right one "
            "with --verifier.",
            verifier,
            folder,
        )
