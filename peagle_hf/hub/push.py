"""`peagle-hf push`: upload a drafter's weights, configuration and model card to the Hugging Face hub."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard

from ..arguments import Arguments, command_text
from ..errors import PeagleError
from ..model.served_checkpoint import check_checkpoint
from ..verifier.loading import hub_verifier
from .card import model_card
from .evaluation_json import damage_named, read_evaluation
from .training_json import chat_option_files, read_record, recorded_chat_options

logger = logging.getLogger(__name__)


@dataclass
class PushArguments(Arguments):
    """Arguments of `peagle-hf push`. The token is that of `hf auth login` or of HF_TOKEN."""

    model: str = field(
        metadata={
            "aliases": ["--drafter"],
            "help": "The drafter: a checkpoint folder, such as checkpoints/checkpoint_best.",
        }
    )
    repo_id: str = field(metadata={"help": "Repository on the hub, as org/name; created if it doesn't exist."})
    evaluation: str | None = field(
        default=None, metadata={"help": "evaluation.json of peagle-hf evaluate, for the card. Default: not measured."}
    )
    verifier_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--verifier"],
            "help": "The verifier's name on the hub. Default: the one in the checkpoint.",
        },
    )
    private: bool = field(
        default=False, metadata={"help": "Create a private repository. Default: the organization's setting."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch to upload to, created if it doesn't exist. Default: main."}
    )
    license: str | None = field(default=None, metadata={"help": "The drafter's license, for the card."})

    GROUPS: ClassVar = {
        "Upload": ("model", "repo_id", "revision", "private"),
        "Model card": ("evaluation", "verifier_name", "license"),
    }


def push(
    arguments: PushArguments,
    token: str | None = None,
    message: str = "Upload the drafter",
    card: ModelCard | None = None,
) -> CommitInfo:
    """Upload `config.json`, `model.safetensors` and the card `README.md` in one commit.

    A chat template and its variables are uploaded too, if the training data was prepared with chosen ones.

    Args:
        token: default: that of `hf auth login` or HF_TOKEN.
        message: commit message.
        card: default: see `card.model_card`.

    Returns:
        The commit, with its `commit_url`.

    Raises:
        PeagleError: the folder is no drafter that vLLM serves, its verifier is a local path, the evaluation is about
            another drafter, or the upload fails; the message has the command to repeat it.
    """
    folder = Path(arguments.model).resolve()  # checkpoint_best may lead elsewhere before the upload
    config = check_checkpoint(folder)
    verifier = hub_verifier(config.verifier_name_or_path, arguments.verifier_name)
    evaluation = read_evaluation(arguments.evaluation, folder) if arguments.evaluation else None
    chat_options = recorded_chat_options(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields["speculators_config"]["verifier"]["name_or_path"] = verifier
    later = f"upload it later with: {command_text(arguments, 'push')}"
    with hub_errors(f"The checkpoint is complete in {arguments.model}; {later}"):
        repo_id = open_repo(arguments.repo_id, verifier, arguments.private or None, token)
        with damage_named(arguments.evaluation) if arguments.evaluation else nullcontext():
            card = card or model_card(
                config,
                repo_id,
                verifier,
                read_record(folder),
                evaluation,
                chat_options=chat_options,
                license=arguments.license,
            )
        files: dict[str, bytes | str] = {
            "config.json": (json.dumps(fields, indent=2) + "\n").encode(),
            "model.safetensors": str(folder / "model.safetensors"),
            "README.md": str(card).encode(),
            **chat_option_files(chat_options),
        }
        api = hub_api()
        if arguments.revision:
            api.create_branch(repo_id, branch=arguments.revision, token=token, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=message,
            token=token,
            revision=arguments.revision,
        )
    logger.info("Uploaded to %s.", commit.commit_url)
    return commit


def open_repo(repo_id: str, verifier: str, private: bool | None = None, token: str | None = None) -> str:
    """Create the repository if it doesn't exist, after checking the token and the verifier's name.

    Returns:
        The full name of the repository, with the user if none was named.

    Raises:
        PeagleError: there is no token, it is refused or may only read, the hub has no such verifier, or the hub can't
            be reached.
    """
    with hub_errors(
        token_remedy="Log in with `hf auth login`, or set HF_TOKEN to a token that may write to it, and run the same "
        "command again."
    ):
        api = hub_api()
        access = api.whoami(token=token).get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise PeagleError(f"The hub token {access.get('displayName')} may only read, not write to {repo_id}.")
        if not api.repo_exists(verifier, token=token):
            raise PeagleError(f"The hub has no model {verifier}, the drafter's verifier. Correct --verifier-name.")
        return api.create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id


def hub_api() -> HfApi:
    return HfApi(library_name="peagle_hf")


@contextmanager
def hub_errors(remedy: str = "", token_remedy: str = "") -> Iterator[None]:
    """Turn errors of the hub, the network or the token into a `PeagleError` that says what to do.

    Args:
        remedy: end of every message.
        token_remedy: end of the message if the hub has answered, so that the token may be the cause.
    """
    try:
        yield
    except PeagleError as error:
        raise PeagleError(f"{error} {remedy}") from error
    except Exception as error:
        said = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        what, then = f"The upload to the hub failed: {said}.", token_remedy
        # The error is recognised by its name, because huggingface_hub 1 raises the TransportError of httpx and
        # huggingface_hub 2 that of httpx2.
        if not {"TransportError", "ConnectionError"}.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            what = f"The hub can't be reached: {said}."
            then = "Check the network, and the address in HF_ENDPOINT if that is set, and run the same command again."
        raise PeagleError(" ".join(filter(None, (what, then, remedy)))) from error
