"""Uploads of `PeagleTrainer` to the hub: the drafter as vLLM serves it, and its card."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard

from ..errors import PeagleError
from ..hub.card import model_card
from ..hub.push import PushArguments, open_repo, push
from ..hub.training_json import read_record
from ..processes import on_first
from ..verifier.loading import hub_verifier
from .arguments import PeagleTrainingArguments
from .checkpoints import BEST
from .saving import written_to

if TYPE_CHECKING:
    from .trainer import PeagleTrainer

CARD = "README.md"


def make_repo(
    args: PeagleTrainingArguments, verifier: str | None, token: str | None = None, private: bool | None = None
) -> str:
    """Make the repository that the arguments name, if it isn't there, and give its full name.

    Args:
        verifier: of the drafter, which the arguments may name otherwise.

    Raises:
        PeagleError: the verifier is a local path, or the hub can't be used.
    """
    return open_repo(
        args.hub_model_id or Path(args.output_dir).absolute().name,
        hub_verifier(verifier, args.verifier_name),
        args.hub_private_repo if private is None else private,
        token or args.hub_token,
    )


def write_card(
    trainer: "PeagleTrainer",
    finetuned_from: str | None,
    tags: str | list[str] | None,
    dataset: str | list[str] | None,
    **details: Any,
) -> None:
    """Write the drafter's card as `README.md` into the output folder: see `PeagleTrainer.create_model_card`."""
    output, config = Path(trainer.args.output_dir), trainer.config
    verifier: str | None
    try:
        verifier = hub_verifier(config.verifier_name_or_path, finetuned_from or trainer.args.verifier_name)
    except PeagleError:
        verifier = None
    record = read_record(output / BEST) or trainer.record()
    repo_id = trainer.hub_model_id or output.absolute().name
    details["tags"], details["datasets"] = ([one] if isinstance(one, str) else one or [] for one in (tags, dataset))
    model_card(config, repo_id, verifier, record, **details).save(output / CARD)


def upload(
    trainer: "PeagleTrainer",
    message: str,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    **details: Any,
) -> Any:
    """Upload the drafter with its card, from the first process: see `PeagleTrainer.push_to_hub`.

    Args:
        details: for `PeagleTrainer.create_model_card`.
    """
    args = trainer.args
    token = token or args.hub_token
    is_first = trainer.is_world_process_zero()
    if trainer.hub_model_id is None and is_first:
        trainer.hub_model_id = make_repo(args, trainer.config.verifier_name_or_path, token, private)
    folder = _servable_folder(trainer)
    if not is_first:
        return None
    assert trainer.hub_model_id is not None
    trainer.create_model_card(**details)
    arguments = PushArguments(
        model=str(folder),
        repo_id=trainer.hub_model_id,
        verifier_name=args.verifier_name,
        private=bool(args.hub_private_repo if private is None else private),
        revision=revision or args.hub_revision,
    )
    work = partial(push, arguments, token, message, ModelCard.load(Path(args.output_dir) / CARD))
    return work() if blocking else HfApi().run_as_future(work)


def _servable_folder(trainer: "PeagleTrainer") -> Path:
    """On all processes: `checkpoint_best`, or the model as it is now, exported."""
    output = Path(trainer.args.output_dir)
    if on_first((output / BEST).exists):
        return output / BEST
    with written_to(trainer, output / "exported"):
        return output / "exported"
