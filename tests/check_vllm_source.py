"""Look for every name of vLLM that this project uses in vLLM's source, which is neither imported nor run.

    python tests/check_vllm_source.py                            # the vLLM that is installed here
    pip download --no-deps --dest /tmp 'vllm==0.33.*'
    python tests/check_vllm_source.py /tmp/vllm-0.33.0-*.whl     # one that can't run here

It finds what a release has renamed or removed. It can't find a name that means something else now.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]

MODULES = ["vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"]
"""Modules that are run."""

MEMBERS = {
    # peagle_hf.evaluation.benchmark and peagle_hf.evaluation.vllm_process
    "LLM": "collective_rpc generate get_metrics llm_engine renderer",
    "SamplingParams": "detokenize ignore_eos max_tokens output_kind temperature",
    "RequestOutputKind": "FINAL_ONLY",
    "LLMEngine": "add_request model_config step vllm_config",
    "VllmConfig": "use_v2_model_runner",
    "ModelConfig": "dtype max_model_len",
    "BaseRenderer": "render_cmpl",
    "RequestOutput": "metrics outputs prompt_token_ids request_id",
    "RejectionSampler": "synthetic_conditional_rates",
    "RequestStateStats": "first_token_latency",
    "CompletionOutput": "finish_reason spec_decode_metrics text token_ids",
    "RequestSpecDecodeMetrics": "histogram num_draft_tokens per_step_accepted per_step_drafted",
    "Metric": "name",
    "Counter": "value",
    "Vector": "values",
    # peagle_hf.serving.launch, peagle_hf.model.served_checkpoint, and the flags that the documentation names
    "EngineArgs": "add_cli_args data_parallel_size disable_log_stats dtype enable_prefix_caching enforce_eager "
    "kv_transfer_config load_format max_model_len max_num_batched_tokens max_num_seqs model "
    "per_request_spec_decode_metrics seed served_model_name skip_tokenizer_init speculative_config "
    "tensor_parallel_size trust_remote_code",
    "FrontendArgs": "api_key host port",
    "SpeculativeConfig": "draft_model_config draft_sample_method method model num_speculative_tokens "
    "num_speculative_tokens_per_batch_size parallel_drafting rejection_sample_method synthetic_acceptance_length",
    "KVTransferConfig": "kv_connector kv_connector_extra_config kv_connector_module_path kv_role",
    # peagle_hf.serving.vllm_plugin
    "ExampleHiddenStatesConnector": "_block_size _executor _is_tp_rank_zero _kv_cache _lock_fds _on_write_done "
    "_req_copy_events _req_futures _submit_async_write _write_tensors",
    "PendingSave": "block_ids filename req_id token_ids",
    # peagle_hf.data.endpoint and peagle_hf.serving.client
    "ModelCard": "id max_model_len root",
    "CompletionRequest": "ignore_eos max_tokens min_p model prompt repetition_penalty return_token_ids seed "
    "stop_token_ids temperature top_k top_p",
    "CompletionResponse": "choices kv_transfer_params",
    "CompletionResponseChoice": "token_ids",
    "ChatCompletionRequest": "cache_salt max_tokens messages min_p model repetition_penalty return_token_ids stream "
    "stream_options temperature top_k top_p",
    "StreamOptions": "include_usage",
    "ChatCompletionStreamResponse": "choices metrics",
    "ChatCompletionResponseStreamChoice": "delta finish_reason token_ids",
    "DeltaMessage": "content reasoning",
    "PerRequestMetrics": "speculative_decoding",
    "SpeculativeDecodingMetrics": "acceptance_histogram num_draft_tokens per_step_accepted per_step_drafted",
}
"""Fields, methods and attributes by class, whichever file a release keeps it in."""

PARAMETERS = {
    "LLM.generate": "prompts sampling_params use_tqdm",
    "LLM.collective_rpc": "method args",
    "rejection_sample": "draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens draft_probs target_logits "
    "bonus_token_ids sampling_metadata synthetic_conditional_rates",
    "LLMEngine.add_request": "request_id prompt params",
    "BaseRenderer.render_cmpl": "prompts",
    "ExampleHiddenStatesConnector._submit_async_write": "pending",
    "ExampleHiddenStatesConnector._write_tensors": "tensors event filename lock_fd",
    "ExampleHiddenStatesConnector._on_write_done": "req_id future",
    "extract_from_kv_cache": "kv_cache slot_mapping num_tokens",
}
"""The first parameters in their order, or such as are passed by name."""

STRINGS = """
    /metrics /v1/models /version
    vllm:generation_tokens vllm:spec_decode_num_drafts vllm:spec_decode_num_draft_tokens
    vllm:spec_decode_num_accepted_tokens vllm:spec_decode_num_accepted_tokens_per_pos
    VLLM_API_KEY VLLM_CPU_KVCACHE_SPACE VLLM_ENABLE_V1_MULTIPROCESSING VLLM_NO_USAGE_STATS VLLM_TARGET_DEVICE
    VLLM_USE_V2_MODEL_RUNNER probabilistic
    ExampleHiddenStatesConnector hidden_states_path kv_producer shared_storage_path token_ids
    detailed eagle3 extract_hidden_states peagle
    PeagleLlamaForCausalLM PeagleQwen3ForCausalLM
    draft_vocab_size eagle_aux_hidden_state_layer_ids fc_norm mask_token_id norm_before_fc norm_before_residual
    num_aux_hidden_states speculative_tokens speculators_model_type
    d2t mask_hidden t2d
"""
"""Names that are strings in vLLM too: pages, counters, variables, methods, and what a drafter's files hold."""


class Source:
    """vLLM's Python files, from a wheel or from a folder that holds the package `vllm`."""

    def __init__(self, path: Path):
        if path.is_dir():
            self.files = {file.relative_to(path).as_posix(): file.read_text("utf-8") for file in path.rglob("*.py")}
        else:
            with ZipFile(path) as wheel:
                self.files = {
                    name.removeprefix("vllm/"): wheel.read(name).decode("utf-8")
                    for name in wheel.namelist()
                    if name.startswith("vllm/") and name.endswith(".py")
                }

    @cached_property
    def text(self) -> str:
        return "\n".join(self.files.values())

    @cached_property
    def _texts_by_definition(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for text in self.files.values():
            for name in set(re.findall(r"^(?:class|def) (\w+)", text, re.M)):
                found[name].append(text)
        return found

    def definitions(self, name: str) -> Iterator[ast.ClassDef | ast.FunctionDef]:
        """All classes and functions of this name at the top of a file."""
        for text in self._texts_by_definition.get(name, []):
            for node in _parse(text).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                    yield node

    def members(self, name: str) -> dict[str, ast.AST]:
        """Fields, methods and what `self` is given, of a class (of all of that name) and of those it is made from."""
        found: dict[str, ast.AST] = {}
        for definition in self.definitions(name):
            if not isinstance(definition, ast.ClassDef):
                continue
            for base in definition.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(base, ast.Name) and base.id != name:
                    found |= self.members(base.id)
            for node in ast.walk(definition):
                match node:
                    case ast.AnnAssign(target=ast.Name(id=member)) | ast.FunctionDef(name=member):
                        found[member] = node
                    case ast.Assign(targets=[ast.Name(id=member)]):
                        found[member] = node
                    case ast.Attribute(value=ast.Name(id="self"), attr=member, ctx=ast.Store()):
                        found.setdefault(member, node)
        return found

    def parameters(self, name: str) -> list[str]:
        """Of `function` or `Class.method`, without `self`."""
        owner, _, method = name.rpartition(".")
        node = self.members(owner).get(method) if owner else next(self.definitions(name), None)
        if not isinstance(node, ast.FunctionDef):
            return []
        arguments = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
        return [argument for argument in arguments if argument not in ("self", "cls")]

    def provides(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something."""
        path = module.removeprefix("vllm").strip(".").replace(".", "/")
        if f"{path}/{name}.py".removeprefix("/") in self.files:
            return True
        text = self.files.get(f"{path}.py") or self.files.get(f"{path}/__init__.py".removeprefix("/"))
        return text is not None and re.search(rf"\b{name}\b", text) is not None


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def imported_names() -> set[tuple[str, str]]:
    """What our own files import from vLLM, and what they use of `vllm` itself."""
    found = set()
    for file in (ROOT / "peagle_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] == "vllm":
                    found |= {(module, alias.name) for alias in node.names}
                case ast.Attribute(value=ast.Name(id="vllm"), attr=name):
                    found.add(("vllm", name))
    return found


def missing(source: Source) -> tuple[int, list[str]]:
    """How many names were looked for, and which weren't found."""
    wanted = {f"import of {name} from {module}": source.provides(module, name) for module, name in imported_names()}
    for module in MODULES:
        wanted[f"module {module}"] = f"{module.removeprefix('vllm.').replace('.', '/')}.py" in source.files
    for name, members in MEMBERS.items():
        found = source.members(name)
        wanted |= {f"{name}.{member}": member in found for member in members.split()}
    for name, parameters in PARAMETERS.items():
        accepted = source.parameters(name)
        wanted |= {f"{name}({parameter})": parameter in accepted for parameter in parameters.split()}
    for string in STRINGS.split():
        wanted[f"the string {string}"] = f'"{string}"' in source.text
    return len(wanted), [what for what, is_there in wanted.items() if not is_there]


def main() -> None:
    spec = find_spec("vllm")
    installed = [Path(spec.origin).parent] if spec and spec.origin else []
    paths = [Path(path) for path in sys.argv[1:]] or installed
    if not paths:
        sys.exit("No vLLM is installed here. Name a wheel of it, or a folder that holds its Python files.")
    faults = []
    for path in paths:
        count, absent = missing(Source(path))
        faults += absent
        print(f"{path}: {count - len(absent)} of {count} names are there")
        print("".join(f"  missing: {what}\n" for what in absent), end="")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
