"""Time and memory of one training step, beside those of the peers that can be imported: one table, one command.

    python tests/benchmarks/training_step.py
    python tests/benchmarks/training_step.py --default-optimizers

On a GPU: a drafter for Qwen3-8B (hidden size 4,096, 151,936 tokens, 4 layers) with 60 % of the tokens learnt, bf16
autocast over float32 weights, fused AdamW and clipping. On a CPU: SmolLM2-135M's sizes in float32. Every
implementation runs its cases in a child process of its own, one after another; where one fails, the table has its
error, and the others go on. `--output` is written anew after each. The peers are speculators 0.9.0 and, on a GPU, NeMo
AutoModel 0.7.0, which trains bfloat16 weights (see `nemo_step`). With `--default-optimizers` each takes the optimizer
that it takes by default: ours and speculators' Muon with AdamW, NeMo's AdamW. `--small` shrinks everything for a test
of the benchmark itself; its times mean nothing.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from nemo_step import make_nemo

MASK_TOKEN, DEPTH_RATIO, DEPTH_RATIO_MIN = 3, 0.7, 0.2
PEERS = (("speculators", "speculators"), ("nemo", "nemo_automodel"))
"""Their names in the table, and the packages to import."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16, from the vendor's data sheets (SXM)."""


@dataclass(frozen=True)
class Sizes:
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    layers: int


QWEN3_8B = Sizes(4096, 12288, 32, 8, 128, 151936, 4)
SMOLLM2 = Sizes(576, 1536, 9, 3, 64, 49152, 2)
SMALL = Sizes(64, 128, 4, 2, 16, 512, 2)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        length: positions of the row.
        document: positions of each document in it.
        anchors: positions of the row where rollouts start; the peer's cap is for the row, ours for a document.
    """

    length: int
    document: int
    depths: int
    draft_vocab: int
    window: int | None = None
    anchors: int | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"
    partitions: int = 1

    @property
    def label(self) -> str:
        parts = [f"{self.length:,}", f"K {self.depths}", f"Vd {self.draft_vocab:,}"]
        parts += [f"window {self.window}, {self.anchors} anchors"] if self.window else []
        parts += ["checkpointed"] * self.checkpointing + [self.optimizer] * (self.optimizer != "adamw")
        return ", ".join(parts + [f"{self.partitions} partitions"] * (self.partitions > 1))


def document_of(length: int) -> int:
    return 1024 if length <= 8192 else length


def gpu_cases() -> list[Case]:
    vocab = QWEN3_8B.vocab
    plain = [Case(length, document_of(length), 8, vocab) for length in (4096, 8192, 16384, 32768)]
    return [
        *plain,
        Case(4096, 1024, 4, vocab),
        Case(4096, 1024, 8, vocab, checkpointing=True),
        Case(4096, 1024, 8, vocab, window=2048, anchors=512),
        Case(4096, 1024, 4, vocab, window=2048, anchors=512),
        Case(4096, 1024, 8, 32000),
        Case(4096, 1024, 4, 32000),
    ]


def long_cases() -> list[Case]:
    vocab = QWEN3_8B.vocab
    return [
        Case(4096, 1024, 8, vocab, checkpointing=True, optimizer="adamw_bnb_8bit"),
        *(Case(length, length, 8, vocab, checkpointing=True) for length in (32768, 131072, 262144)),
    ]


def loss_mask(length: int, document: int) -> torch.Tensor:
    """60 % of each 1,024 positions (or of a shorter document) are learnt."""
    period = min(document, 1024)
    return torch.arange(length) % document % period >= 0.4 * period


def random_states(shape: tuple[int, ...], device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16 if device == "cuda" else None)


def make_ours(sizes: Sizes, case: Case, device: str):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from peagle_hf import CODDataCollator, PeagleConfig, PeagleForSpeculation
    from peagle_hf.data.partition import partition
    from peagle_hf.training.objective import Objective
    from peagle_hf.verifier.head import VerifierHead

    if device == "cpu":
        from peagle_hf.cpu import keep_freed_memory

        keep_freed_memory()
    config = PeagleConfig(
        transformer_layer_config=LlamaConfig(**layer_fields(sizes, case)),
        speculators_config={},
        mask_token_id=MASK_TOKEN,
        eagle_aux_hidden_state_layer_ids=[2, 18, 33],
        norm_before_residual=False,
        draft_vocab_size=case.draft_vocab,
        num_depths=case.depths,
    )
    with torch.device(device):
        drafter = PeagleForSpeculation(config)
        if drafter.d2t is not None:
            drafter.set_draft_vocabulary(
                torch.zeros(case.draft_vocab, dtype=torch.long), torch.arange(sizes.vocab) < case.draft_vocab
            )
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        head = torch.empty(sizes.vocab, sizes.hidden, dtype=dtype).normal_(std=0.02)
        with torch.no_grad():
            drafter.lm_head.weight.copy_(head[: case.draft_vocab])
        # A draft vocabulary leaves the whole head where it is, as training does.
        drafter.set_trained(False, dtype)
        objective = Objective(drafter, VerifierHead(LlamaRMSNorm(sizes.hidden, 1e-6), head))
        if drafter.d2t is not None:
            objective.verifier_head.to("cpu")
        del head
    if device == "cuda":
        drafter.set_attn_implementation("flex_attention")
    drafter.train()

    def make_step(case: Case):
        if case.checkpointing:
            drafter.gradient_checkpointing_enable()
        else:
            drafter.gradient_checkpointing_disable()
        count = case.length // case.document
        mask = loss_mask(case.length, case.document).view(count, case.document)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        documents = [
            {
                "sample_id": index,
                "input_ids": torch.randint(0, sizes.vocab, (case.document + 2,)),
                "loss_mask": torch.nn.functional.pad(mask[index], (1, 0)),
                "hidden_states": random_states((case.document + 2, 3 * sizes.hidden), device, index).cpu(),
                "target_states": random_states(
                    (int((mask[index, :-1] & mask[index, 1:]).sum()), sizes.hidden), device, index + 99
                ).cpu(),
            }
            for index in range(count)
        ]
        anchors = case.anchors and case.anchors // count
        collator = CODDataCollator(case.depths, DEPTH_RATIO, DEPTH_RATIO_MIN, anchors)
        batch = collator([{"epoch": 0, "documents": documents}])
        parts = [
            {name: value.to(device) if torch.is_tensor(value) else value for name, value in part.items()}
            for part in partition(batch, case.partitions)
        ]
        learnt = int((batch["labels"] != -100).sum())

        def forward_and_backward() -> float:
            loss = torch.zeros((), device=device)
            for part in parts:
                with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                    part_loss = objective(drafter, part, learnt).loss
                part_loss.backward()
                loss += part_loss.detach()
            return loss

        rows = {"rows": batch["anchors"].numel(), "learnt": learnt, "flops": flops(sizes, case, batch)}
        return forward_and_backward, rows

    return drafter, make_step


def make_peer_compile() -> None:
    """Let torch.compile through speculators' P-EAGLE model, in minutes less and with the same numbers."""
    from speculators.models.peagle import core
    from torch._inductor.lowering import fallback_handler, lowerings

    # The compiler of torch 2.11 can't trace the tuning of its fused loss.
    core.compute_metrics = torch.compiler.disable(core.compute_metrics)
    # Inductor takes minutes to build a kernel for the sort in its block mask; PyTorch's own gives the same order.
    sort = torch.ops.aten.sort.stable
    lowerings[sort] = fallback_handler(sort, add_to_fallback_set=False)


def make_peer(sizes: Sizes, case: Case, device: str):
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.peagle import core
    from speculators.models.peagle.config import PEagleSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    make_peer_compile()
    layer_config = LlamaConfig(**layer_fields(sizes, case))
    layer_config._attn_implementation = "simple_flex_attention" if device == "cuda" else "sdpa"
    config = PEagleSpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=case.draft_vocab,
        norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=[2, 18, 33],
        mask_token_id=MASK_TOKEN,
        speculators_config=SpeculatorsConfig(
            algorithm="peagle",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=case.depths)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="x", architectures=["LlamaForCausalLM"]),
        ),
    )
    with torch.device(device):
        model = core.PEagleDraftModel(config)
    if case.draft_vocab != sizes.vocab:
        model.load_vocab_mappings(
            torch.arange(sizes.vocab) < case.draft_vocab, torch.zeros(case.draft_vocab, dtype=torch.long)
        )
    for weight in (model.embed_tokens.weight, model.lm_head.weight, model.verifier_lm_head.weight):
        torch.nn.init.normal_(weight, std=0.02)
    model.to(device).train()

    def make_step(case: Case):
        positions = torch.arange(case.length)
        states = random_states((1, case.length, 4 * sizes.hidden), device, 0)
        batch = {
            "hidden_states": states[..., : 3 * sizes.hidden].contiguous(),
            "verifier_last_hidden_states": states[..., 3 * sizes.hidden :].contiguous(),
            "input_ids": torch.randint(0, sizes.vocab, (1, case.length), device=device),
            "document_ids": (positions // case.document)[None].to(device),
            "loss_mask": loss_mask(case.length, case.document).float()[None].to(device),
        }
        options, _ = core.PEagleDraftModel.get_trainer_kwargs(
            loss_fn="kl_div",
            loss_implementation="fused" if device == "cuda" else "eager",
            num_depths=case.depths,
            max_anchors=case.anchors,
        )

        def forward_and_backward() -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                _, loss, _ = model(**batch, **options)
            loss.backward()
            return loss.detach()

        return forward_and_backward, {}

    return model, make_step


def layer_fields(sizes: Sizes, case: Case) -> dict:
    fields = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 1 << 19,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    if case.window:
        fields |= {"sliding_window": case.window, "layer_types": ["sliding_attention"] * sizes.layers}
    return fields


def flops(sizes: Sizes, case: Case, batch: dict[str, torch.Tensor]) -> float:
    """Floating-point operations that one step can't do without: matrix products and attention's visible pairs."""
    rows, learnt = batch["anchors"].numel(), batch["trained_slots"].numel()
    targets, positions = batch["target_states"].shape[1], batch["input_ids"].numel() + 1
    query, key, size = sizes.heads * sizes.head_dim, sizes.key_heads * sizes.head_dim, sizes.hidden
    products = positions * 2 * size * (query + 2 * key) + (sizes.layers - 1) * rows * size * 2 * key
    products += ((sizes.layers - 2) * rows + learnt) * size * query
    products += ((sizes.layers - 1) * rows + learnt) * (query * size + 3 * size * sizes.mlp)
    seen = batch["position_ids"] + 1
    if case.window:
        seen = seen.clamp(max=case.window)
    pairs = (sizes.layers - 1) * int(seen.sum()) + int(seen[0, batch["trained_slots"][0]].sum())
    head = (2 * learnt + targets) * size * case.draft_vocab
    return 2 * (3 * products + 2 * positions * 3 * size * size + head) + 3.5 * 4 * query * pairs


def make_optimizers(implementation: str, case: Case, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.optimizer == "default":
        return default_optimizers(implementation, model)
    if case.optimizer == "adamw_bnb_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(parameters, lr=1e-4)]
    return [torch.optim.AdamW(parameters, lr=1e-4, fused=True)]


def default_optimizers(implementation: str, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    if implementation == "nemo":
        from nemo_step import nemo_optimizer

        return [nemo_optimizer(model)]
    if implementation == "speculators":
        from speculators.train.optimizers import build_optimizers

        settings = {"lr": 1e-3, "muon_lr": 1e-3, "weight_decay": 0.01, "muon_weight_decay": 0.1, "muon_momentum": 0.95}
        settings |= {"optimizer": "muon", "muon_ns_steps": 5, "muon_adjust_lr_fn": "match_rms_adamw"}
        return build_optimizers(model, SimpleNamespace(**settings))
    from peagle_hf.training.optimizer import MuonWithAdamW

    return [MuonWithAdamW(model.named_parameters(), lr=1e-3)]


def measure(implementation: str, sizes: Sizes, cases: list[Case], device: str, steps: int, profile: bool) -> None:
    """Run the cases, which share a draft vocabulary, window and optimizer, and print a line of JSON for each."""
    torch.manual_seed(0)
    started = time.perf_counter()
    makers = {"ours": make_ours, "speculators": make_peer, "nemo": make_nemo}
    model, make_step = makers[implementation](sizes, cases[0], device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(implementation, cases[0], model)
    built = time.perf_counter() - started

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(forward_and_backward: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = forward_and_backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        return loss

    for case in cases:
        result = {"implementation": implementation, "case": case.label, "build_s": round(built, 1)}
        try:
            forward_and_backward, facts = make_step(case)
            result |= facts
            gc.collect()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # Some of the first steps compile; a step over a very long row is long enough to be its own warm-up.
            for index in range(1 if case.length > 1 << 16 else 4):
                start = wait()
                loss = step(forward_and_backward)
                seconds = wait() - start
                print(f"{implementation}, {case.label}, warm-up {index}: {seconds:.3f} s", file=sys.stderr, flush=True)
                result.setdefault("first_step_s", round(seconds, 2))
            count = max(1, min(steps, int(25 / seconds)))
            # Steps run back to back, as in training, so the GPU doesn't wait while the CPU prepares the next step.
            start = wait()
            for _ in range(count):
                loss = step(forward_and_backward)
            seconds = (wait() - start) / count
            result |= {
                "step_ms": round(seconds * 1e3, 1),
                "tokens_per_s": round(case.length / seconds),
                "loss": round(float(loss), 4),
            }
            if seconds < 5:
                passes = []
                for _ in range(3):
                    start = wait()
                    forward_and_backward()
                    passes.append(wait() - start)
                    model.zero_grad()
                result["forward_backward_ms"] = round(sorted(passes)[1] * 1e3, 1)
            if device == "cuda":
                result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                name = torch.cuda.get_device_name()
                peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
                if peak and "flops" in result:
                    result["mfu"] = round(result["flops"] / seconds / peak, 3)
            if profile:
                print_profile(partial(step, forward_and_backward))
        except torch.OutOfMemoryError:
            result["failed"] = "out of memory"
        loss = forward_and_backward = None
        model.zero_grad()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print("RESULT " + json.dumps(result), flush=True)


def print_profile(step: Callable[[], object]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90), flush=True)


def run_child(implementation: str, cases: list[Case], options: argparse.Namespace) -> list[dict]:
    command = [sys.executable, __file__, "--child", implementation, "--cases-json", json.dumps([*map(asdict, cases)])]
    command += ["--steps", str(options.steps)] + ["--small"] * options.small + ["--profile"] * options.profile
    results, reason = [], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("RESULT "):
                line = line.removeprefix("RESULT ")
                results.append(json.loads(line))
            elif line.startswith("FAILED "):
                reason = line.removeprefix("FAILED ").strip()
            print(line, end="", flush=True)
    if process.returncode:
        failed = {"implementation": implementation, "failed": f"failed: {reason or process.returncode}"}
        results += [failed | {"case": case.label} for case in cases[len(results) :]]
    return results


def print_table(results: list[dict], device_name: str) -> None:
    import transformers

    print(f"\n{device_name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| case | | step ms | ours to it | forward+backward ms | peak GiB | tokens/s | MFU | first step s |")
    print("|---|---|---|---|---|---|---|---|---|")
    ours = {result["case"]: result.get("step_ms") for result in results if result["implementation"] == "ours"}
    for result in results:
        own = ours.get(result["case"]) if result["implementation"] != "ours" else None
        ratio = f"{own / result['step_ms']:.2f}" if own and "step_ms" in result else ""
        cells = [result["case"], result["implementation"], result.get("step_ms", result.get("failed")), ratio]
        cells += [result.get(name, "") for name in ("forward_backward_ms", "peak_gib", "tokens_per_s", "mfu")]
        print("| " + " | ".join(str(cell) for cell in [*cells, result.get("first_step_s", "")]) + " |")


def medians(results: list[dict]) -> list[dict]:
    """Of several rounds the one with the median step, by implementation and case."""
    found: dict[tuple, list[dict]] = {}
    for result in results:
        found.setdefault((result["implementation"], result["case"]), []).append(result)
    return [sorted(each, key=lambda one: one.get("step_ms", 0))[len(each) // 2] for each in found.values()]


def groups(cases: list[Case]) -> list[list[Case]]:
    """Cases that one process can run: the model and its optimizer are the same."""
    found: dict[tuple, list[Case]] = {}
    for case in cases:
        found.setdefault((case.draft_vocab, case.window, case.optimizer), []).append(case)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--long", action="store_true", help="also the cases that only run checkpointed, ours alone")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--default-optimizers", action="store_true", help="of each implementation, not AdamW for all")
    parser.add_argument("--lengths", type=int, nargs="*", help="only cases of these lengths")
    parser.add_argument("--only", help="only cases whose label this regular expression finds")
    parser.add_argument("--steps", type=int, default=6, help="steps that count, after those that warm up")
    parser.add_argument("--rounds", type=int, default=1, help="repeat everything in turn and report the median")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--output", type=Path, help="also write the results as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cases-json", help=argparse.SUPPRESS)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() and not options.small else "cpu"
    sizes = SMALL if options.small else QWEN3_8B if device == "cuda" else SMOLLM2
    if options.child:
        cases = [Case(**fields) for fields in json.loads(options.cases_json)]
        try:
            measure(options.child, sizes, cases, device, options.steps, options.profile)
        except Exception as error:
            lines = traceback.format_exception_only(error)[-1].replace("|", "/").split("\n")
            print("FAILED " + lines[0], flush=True)
            raise
        return
    if options.small:
        cases, long = [Case(128, 64, 4, 512), Case(128, 128, 3, 100)], [Case(128, 128, 4, 512, checkpointing=True)]
    elif device == "cpu":
        cases, long = [Case(1024, 256, 4, 8192)], []
    else:
        cases, long = gpu_cases(), long_cases()
    cases, long = (
        [
            case
            for case in group
            if (not options.lengths or case.length in options.lengths) and re.search(options.only or "", case.label)
        ]
        for group in (cases, long if options.long else [])
    )
    if options.default_optimizers:
        cases = [replace(case, optimizer="default") for case in cases]
    wanted = [] if options.ours_only else PEERS[: 2 if device == "cuda" else 1]  # FlexAttention trains on GPUs only
    peers = [name for name, package in wanted if find_spec(package) is not None]
    for name, package in wanted:
        if name not in peers:
            print(f"{package} can't be imported here, so {name} isn't measured.")
    results: list[dict] = []

    def run(implementation: str, taken: list[Case]) -> None:
        if taken:
            results.extend(run_child(implementation, taken, options))
        if options.output:
            options.output.write_text(json.dumps(medians(results), indent=1) + "\n")

    for group in groups(cases):
        for _ in range(options.rounds):
            for peer in peers:
                run(peer, [case for case in group if not (case.checkpointing or (peer == "nemo" and case.window))])
            run("ours", group)
    for group in groups(long):
        run("ours", group)
    print_table(medians(results), torch.cuda.get_device_name() if device == "cuda" else "CPU")


if __name__ == "__main__":
    main()
