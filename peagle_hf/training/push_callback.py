"""`PushToHubCallback`: upload the best checkpoint while a drafter is trained."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import PeagleError
from ..hub.push import PushArguments, hub_api, hub_errors, open_repo, push
from ..model.config import PeagleConfig
from ..verifier.loading import hub_verifier
from .checkpoints import BEST, checkpoints_by_step

logger = logging.getLogger(__name__)


class PushToHubCallback(TrainerCallback):
    """Upload `checkpoint_best` whenever it is another one, and at the end; put it after `VllmExportCallback`.

    `PeagleTrainer` adds it by itself with `push_to_hub`. A hub that can't be used stops the run before its first step;
    later a refused upload is an error in the log, with the command that makes up for it, and training goes on. Training
    waits for an upload. With `hub_strategy` end nothing is uploaded before the end; with checkpoint or all_checkpoints
    each checkpoint goes too, optimizer states and all.

    Args:
        repo_id: where the drafter goes, as org/name.
        verifier_name: the verifier's name on the hub; default: the one in the drafter's configuration.
        private: make the repository private; default: as the organization has it.
        revision: branch to upload to; default: main.
        token: default: that of `hf auth login` or HF_TOKEN.
    """

    def __init__(
        self,
        repo_id: str,
        verifier_name: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        self.repo_id, self.verifier_name, self.private = repo_id, verifier_name, private
        self.revision, self.token = revision, token
        self._uploaded: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._uploaded = None  # another training may reuse the folders' names
        if state.is_world_process_zero:
            config: PeagleConfig = kwargs["model"].config
            verifier = hub_verifier(config.verifier_name_or_path, self.verifier_name)
            self.repo_id = open_repo(self.repo_id, verifier, self.private, self.token)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.hub_strategy != HubStrategy.END:
            self._push(args, state)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) and state.is_world_process_zero:
            saved = checkpoints_by_step(args.output_dir or ".")
            self._push_checkpoint(saved[state.global_step], args.hub_strategy)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._push(args, state)

    def _push(self, args: TrainingArguments, state: TrainerState) -> None:
        best = Path(args.output_dir or ".") / BEST
        if not state.is_world_process_zero or not best.exists() or best.resolve() == self._uploaded:
            return
        arguments = PushArguments(
            model=str(best),
            repo_id=self.repo_id,
            verifier_name=self.verifier_name,
            private=bool(self.private),
            revision=self.revision,
        )
        try:
            push(arguments, self.token, message=f"Upload the drafter of step {state.global_step}")
            self._uploaded = best.resolve()
        except PeagleError as error:
            logger.error("%s", error)

    def _push_checkpoint(self, folder: Path, strategy: HubStrategy | str) -> None:
        """Upload a whole checkpoint, from which training can be resumed."""
        try:
            with hub_errors(f"Training goes on, and the checkpoint is whole in {folder}."):
                api = hub_api()
                if self.revision:
                    api.create_branch(self.repo_id, branch=self.revision, token=self.token, exist_ok=True)
                api.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    path_in_repo="last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name,
                    commit_message=f"Upload {folder.name}",
                    token=self.token,
                    revision=self.revision,
                )
        except PeagleError as error:
            logger.error("%s", error)
