"""What a vLLM takes: its version and the names of its arguments, read from its source files.

Nothing of vLLM is imported: that takes many seconds, and it may be installed for another Python.
"""

import ast
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import PeagleError

logger = logging.getLogger(__name__)

OLDEST = "0.26"
"""The oldest vLLM that serves P-EAGLE drafters here."""
REQUEST_COUNTS = "per_request_spec_decode_metrics"
"""vLLM's argument by which it counts the drafts of each request; from 0.29 on."""
OPTIONAL = {
    REQUEST_COUNTS: "drafts are counted in total, not for each request",
    "draft_sample_method": "drafts are greedy at any temperature",
    "num_speculative_tokens_per_batch_size": "as many tokens are drafted under any load",
}
"""Arguments that a vLLM may lack, and what follows from that."""
MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable that chooses the model runner. Only the first one drafts for P-EAGLE (0.26 to 0.33)."""
_SOURCES = {"engine/arg_utils.py": "EngineArgs", "config/speculative.py": "SpeculativeConfig"}
_CPU_KERNELS, _EXPAND = "utils/cpu_triton_utils.py", "_expand_kernel_impl"
"""The file and function by which vLLM on a CPU gives each drafted token the temperature of its request."""


@dataclass(frozen=True)
class InstalledVllm:
    """A vLLM's version and the names of what it takes.

    Args:
        version: "" if it isn't known.
        arguments: of the engine and of the server, with underscores; empty if they aren't known.
        drafting: the fields of `--speculative-config`; empty if they aren't known.
        samples_wrongly_on_cpu: whether on a CPU drafts are verified at a temperature from memory that was never
            written, since the function that copies it fills a copy instead
            (https://github.com/vllm-project/vllm/issues/55005).
    """

    version: str = ""
    arguments: frozenset[str] = frozenset()
    drafting: frozenset[str] = frozenset()
    samples_wrongly_on_cpu: bool = False

    @classmethod
    def at(cls, folder: Path | None) -> "InstalledVllm":
        """The vLLM whose package is this folder; without a folder, or with files of another kind, all is unknown."""
        if folder is None:
            return cls()
        engine, drafting = (_fields(folder / path, name) for path, name in _SOURCES.items())
        server = [_fields(path) for path in (folder / "entrypoints").rglob("cli_args.py")]
        is_known = engine and any(server)
        arguments = engine.union(*server) if is_known else frozenset()
        return cls(_version(folder), arguments, drafting, _fills_a_copy(folder / _CPU_KERNELS))

    @property
    def sampling_fault(self) -> str:
        """A sentence for users of a CPU whose requests have a temperature above 0; empty if nothing is wrong there."""
        if not self.samples_wrongly_on_cpu:
            return ""
        return (
            f"On a CPU vLLM {self.version} doesn't verify drafts at the temperature that was asked for if it is above "
            "0 (https://github.com/vllm-project/vllm/issues/55005), so the text is not distributed as the verifier's."
        )

    def takes(self, name: str) -> bool:
        """Whether this vLLM has an argument, or a field of `--speculative-config`; True if that isn't known."""
        return any(not names or name in names for names in (self.arguments, self.drafting))

    def known(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without the optional ones that it lacks; a warning says what follows.

        Args:
            given: values by name, with underscores; `speculative_config` as a mapping, whose fields are checked too.

        Raises:
            PeagleError: this vLLM lacks an argument that isn't optional.
        """
        kept = self._known(given, self.arguments, "argument")
        if isinstance(kept.get("speculative_config"), Mapping):
            fields = self._known(kept["speculative_config"], self.drafting, "field of --speculative-config")
            kept["speculative_config"] = fields
        return kept

    def _known(self, given: Mapping[str, Any], names: frozenset[str], what: str) -> dict[str, Any]:
        lacking = [name for name in given if names and name not in names]
        for name in lacking:
            if name not in OPTIONAL:
                raise PeagleError(
                    f"vLLM {self.version} has no {what} {name}, which is needed here. Install vLLM {OLDEST} or newer."
                )
            _warn_once(f"vLLM {self.version} has no {what} {name}, so {OPTIONAL[name]}.")
        return {name: value for name, value in given.items() if name not in lacking}


def drafting_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a vLLM that drafts: it must use its first model runner.

    Raises:
        PeagleError: the environment asks for the second one.
    """
    chosen = environment.get(MODEL_RUNNER, "0").strip().lower()
    if chosen not in ("", "0", "false", "no"):
        raise PeagleError(
            f"{MODEL_RUNNER} is {environment[MODEL_RUNNER]}, but vLLM drafts for P-EAGLE in its first model runner "
            f"only. Unset it, or set {MODEL_RUNNER}=0."
        )
    return {**environment, MODEL_RUNNER: "0"}


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _fills_a_copy(path: Path) -> bool:
    """Whether `_EXPAND` hands a copy of its output to the kernel and doesn't copy the result back."""
    for node in _body(path):
        if isinstance(node, ast.FunctionDef) and node.name == _EXPAND:
            code = ast.unparse(node)
            return "_ensure_int64(output)" in code and "output.copy_(" not in code
    return False


def _version(folder: Path) -> str:
    for node in _body(folder / "_version.py"):
        match node:
            case ast.Assign(targets=targets, value=ast.Constant(value=str(version))):
                if any(isinstance(target, ast.Name) and target.id == "__version__" for target in targets):
                    return version
    return ""


def _fields(path: Path, name: str | None = None) -> frozenset[str]:
    """The annotated fields of a class in a file, or of all its classes; empty if there are none."""
    return frozenset(
        field.target.id
        for node in _body(path)
        if isinstance(node, ast.ClassDef) and name in (None, node.name)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _body(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return []
