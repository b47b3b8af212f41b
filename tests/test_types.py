"""What a type checker says of a user's script, which sees the package's own annotations (`py.typed`)."""

import subprocess
import sys
from pathlib import Path

import pytest

import peagle_hf

ROOT = Path(__file__).parents[1]

SCRIPT = """
class Doubled(PeagleTrainer):
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        return 2 * super().compute_loss(model, inputs, False, num_items_in_batch)


args = PeagleTrainingArguments(verifier_name_or_path="Qwen/Qwen3-8B", data_path="out", num_depths=4)
drafter = build_drafter(args).to(args.device)
train_dataset, eval_dataset = build_datasets(args)
start_linearly(drafter, train_dataset)
callbacks = [VllmExportCallback()]
trainer = Doubled(drafter, args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks)
trainer.train(resume_from_checkpoint=True)
print(trainer.evaluate()["eval_loss"], PeagleForSpeculation.from_pretrained("out").to("cpu").config.num_depths + 1)
PeagleConfig(num_depths="4")
"""


@pytest.mark.slow
def test_a_script_passes_the_strict_checks_of_mypy_but_for_its_wrong_last_line(tmp_path):
    names = "".join(f"    {name},\n" for name in peagle_hf.__all__)
    script = f"from typing import Any\n\nimport torch\n\nfrom peagle_hf import (\n{names})\n\n{SCRIPT}"
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "peagle_hf").symlink_to(ROOT / "peagle_hf")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    checked = subprocess.run([*command, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert 'error: Argument "num_depths" to "PeagleConfig" has incompatible type "str"' in checked.stdout
    assert "Found 1 error in 1 file" in checked.stdout, checked.stdout
