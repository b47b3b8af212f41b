"""The model card of a drafter on the hub, from the records of its training and the report of its evaluation."""

import json
import logging
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..console import estimate, number_of
from ..data.answer_markers import drafted_segments
from ..data.contexts import drafted_contexts
from ..data.prepared_dataset import CHAT_TEMPLATE_FILE
from ..data.sources import BUILT_IN_DATASETS, is_local_file
from ..data.tokenizer import ChatOptions
from ..model.config import PeagleConfig
from ..model.drafter import HUB_TAGS
from ..model.served_checkpoint import speculative_config
from ..pages.tables import Table, escape_markdown
from .training_json import chat_options_of

logger = logging.getLogger(__name__)

_CITATION = """```bibtex
@article{hui2026peagle,
  title={P-EAGLE: Parallel-Drafting EAGLE with Scalable Training},
  author={Hui, Mude and Huang, Xin and Salas, Jaime Campos and Sun, Yue and Pemberton, Nathan and Song, Xiang and
          Khetan, Ashish and Karypis, George},
  journal={arXiv preprint arXiv:2602.01469},
  year={2026}
}
```"""


def model_card(
    config: PeagleConfig,
    repo_id: str,
    verifier: str | None,
    record: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    *,
    chat_options: ChatOptions | None = None,
    name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Iterable[str] = (),
    datasets: Iterable[str] = (),
) -> ModelCard:
    """Write the model card; it says what was not recorded or not measured.

    Args:
        config: the drafter's.
        repo_id: the repository of the card.
        verifier: the verifier's name on the hub; None if it isn't there.
        record: of the training, see `read_record`.
        evaluation: the report of `peagle-hf evaluate`.
        chat_options: chat template and variables of the training; default: those of the record.
        name: the title; default: that of the repository.
        license: of the drafter, if known.
        language: of the data, if known.
        tags: in addition to those of every drafter.
        datasets: in addition to the hub's data sets that the record names.
    """
    data = ((record or {}).get("data") or {}).get("data", [])
    data_names = list(map(_data_name, data))
    hub_datasets = [_data_name(name).split(":")[0] for name in data if not is_local_file(name)]
    metadata = ModelCardData(
        base_model=verifier,
        datasets=list(dict.fromkeys([*hub_datasets, *datasets])) or None,
        language=language,
        library_name="speculators",
        license=license,
        pipeline_tag="text-generation",
        tags=[*HUB_TAGS, *tags],
        model_name=None if evaluation is None else repo_id,
        eval_results=_results(evaluation) or None,
    )
    sections = [
        f"# {escape_markdown(name or repo_id.split('/')[-1])}",
        "## Serve",
        _serve(config, repo_id, verifier, chat_options or chat_options_of(record or {}) or ChatOptions()),
        "## What it is",
        _about(config, verifier),
        "## Acceptance in vLLM",
        "Not measured." if evaluation is None else _acceptance(evaluation),
        "## Training",
        "Not recorded." if record is None else _training(config, record, data_names),
        "## Validation",
        _validation(record),
        "## Drafter",
        _drafter(config),
        f"## Citation\n\n{_CITATION}",
    ]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _data_name(data: str) -> str:
    """A data set of the hub as `org/name:split`; a local file by its name, without its folder."""
    return Path(data).name if is_local_file(data) else BUILT_IN_DATASETS.get(data, data)


def _suites(evaluation: dict[str, Any]) -> str:
    return ", ".join(map(_data_name, evaluation["prompts"].split(", ")))


def _results(evaluation: dict[str, Any] | None) -> list[EvalResult]:
    if evaluation is None:
        return []
    prompts = _suites(evaluation)
    values = {"acceptance_length": "Acceptance length", "acceptance_rate": "Acceptance rate"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=prompts,
            dataset_name=prompts,
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation[metric],
        )
        for metric, name in values.items()
    ]


def _serve(config: PeagleConfig, repo_id: str, verifier: str | None, options: ChatOptions) -> str:
    named = shlex.quote(json.dumps(speculative_config(repo_id, config)))
    flags = said = ""
    if options.template is not None:
        flags += f" --chat-template {CHAT_TEMPLATE_FILE}"
        said += (
            f"The drafter was trained with another chat template than the verifier's own: `{CHAT_TEMPLATE_FILE}` in "
            f"this repository, which `hf download {repo_id} {CHAT_TEMPLATE_FILE} --local-dir .` fetches. "
        )
    if options.kwargs:
        flags += f" --default-chat-template-kwargs {shlex.quote(json.dumps(options.kwargs))}"
        said += "It was trained with the variables of the chat template that the command sets. "
    if said:
        said += "With others it sees text of a kind that it wasn't trained on, so expect fewer accepted tokens.\n\n"
    return (
        f"{said}```bash\nvllm serve {repo_id}{flags}\n```\n\n"
        "finds the verifier in `config.json`. This command names the verifier; lower `num_speculative_tokens` in it to "
        "draft fewer tokens at a time:\n\n"
        f"```bash\nvllm serve {verifier or 'VERIFIER'}{flags} --speculative-config {named}\n```"
    )


def _about(config: PeagleConfig, verifier: str | None) -> str:
    return (
        f"A P-EAGLE drafter ([arXiv 2602.01469](https://arxiv.org/abs/2602.01469)) for {_link(verifier)}, trained with "
        f"`peagle_hf`. It proposes {number_of(config.num_depths, 'token')} in one forward pass; the verifier checks "
        "them in one of its own, so the text stays the verifier's."
    )


def _acceptance(report: dict[str, Any]) -> str:
    rates = report["per_position_acceptance"]
    sampling = "greedy"
    if report["temperature"] > 0:
        drafts = report.get("draft_sample_method")
        sampling = f"temperature {report['temperature']}{f' with {drafts} drafts' if drafts else ''}"
    method = report.get("interval_method")
    intervals = f" In brackets: {method['confidence']:.0%} intervals ({method['name']})." if method else ""
    measured = (
        f"Measured with `peagle-hf evaluate`: {number_of(report['num_prompts'], 'prompt')} of "
        f"{escape_markdown(_suites(report))}, at most {number_of(report['max_tokens'], 'token')} each, {sampling}, "
        f"{number_of(report['num_speculative_tokens'], 'token')} at a time, "
        f"{number_of(report['concurrency'], 'request')} at a time, {report['dtype']} on "
        f"{escape_markdown(report['device'])}; {_versions(report['versions'])}.{intervals}"
    )
    by_position = _table(
        ["position", *map(str, range(1, len(rates) + 1))], [["accepted, of all drafts", *map(_percent, rates)]]
    )
    figures = [
        ("acceptance length", _estimate(report, "acceptance_length", ".3f")),
        ("acceptance rate", _estimate(report, "acceptance_rate", ".1%")),
        ("tokens per second with the drafter", _estimate(report, "tokens_per_second", ".1f")),
    ]
    if report["tokens_per_second_without"] is not None:
        figures.append(("tokens per second without", _estimate(report, "tokens_per_second_without", ".1f")))
    if report.get("break_even_length") is not None:
        figures.append(("pays from acceptance length", _estimate(report, "break_even_length", ".2f")))
    if report["num_identical"] is not None:
        figures.append(
            ("texts that are the same with and without", f"{report['num_identical']}/{report['num_prompts']}")
        )
    sections = [measured, by_position, _table(["", ""], figures), _parts("prompts", report["by_category"])]
    if segments := drafted_segments(report):
        sections.append(_parts("drafts that begin in", segments))
    if contexts := drafted_contexts(report):
        sections.append(_parts("tokens before the draft", contexts))
    return "\n\n".join(sections)


def _parts(what: str, rows: dict[str, dict[str, Any]]) -> str:
    """A table of the acceptance of each category, segment or range of positions."""
    return _table(
        [what, "number of prompts", "acceptance length", "acceptance rate"],
        [
            [
                name,
                row["num_prompts"],
                _estimate(row, "acceptance_length", ".3f"),
                _estimate(row, "acceptance_rate", ".1%"),
            ]
            for name, row in rows.items()
        ],
    )


def _estimate(figures: dict[str, Any], name: str, form: str) -> str:
    """A figure and, where the report has it, its interval."""
    return estimate(figures[name], figures.get("intervals", {}).get(name), form)


def _training(config: PeagleConfig, record: dict[str, Any], data_names: Sequence[str]) -> str:
    counts = (record["data"] or {}).get("counts", {})
    left_out = record.get("skipped_rows")
    numbers = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in ("rows", "tokens", "learnt_tokens") if counts]
    return _table(
        ["", ""],
        [
            ("data", ", ".join([*data_names, *numbers]) or "not recorded"),
            *([("samples left out", ", ".join(map(str, left_out)))] if left_out else []),
            ("COD sampling", _sampling(config)),
            ("loss", record["loss"]),
            ("epochs, steps", f"{record['epochs']:g}, {record['steps']:,}"),
            (
                "packed sequences per step, positions in each",
                f"{record['rows_per_step']}, {record['total_seq_len'] or 'not recorded'}",
            ),
            ("optimizer", record["optimizer"]),
            ("precision, seed", f"{record['precision']}, {record['seed']}"),
            ("hardware", f"{record['processes']} x {record['device']}"),
            ("minutes, with validation and saving", f"{record['seconds'] / 60:.1f}"),
            ("versions", _versions(record["versions"])),
        ],
    )


def _validation(record: dict[str, Any] | None) -> str:
    metrics = (record or {}).get("validation")
    if not metrics:
        return "Not measured."
    rows = [(name.replace("_", " "), f"{value:.4f}") for name, value in metrics.items()]
    return (
        "On samples that were not trained on, by the Trainer and not in vLLM; depth 0 is the first token.\n\n"
        + _table(["", ""], rows)
    )


def _drafter(config: PeagleConfig) -> str:
    layers = config.transformer_layer_config
    return _table(
        ["", ""],
        [
            ("decoder layers", f"{layers.num_hidden_layers}, {layers.model_type}, hidden size {layers.hidden_size}"),
            ("vocabulary", f"{config.draft_vocab_size:,} of the verifier's {config.vocab_size:,} tokens"),
            ("reads the verifier's states after layers", ", ".join(map(str, config.eagle_aux_hidden_state_layer_ids))),
        ],
    )


def _sampling(config: PeagleConfig) -> str:
    anchors = "all" if config.max_anchors is None else f"at most {config.max_anchors} per sample"
    ratios = f"r {config.down_sample_ratio:g}, r_min {config.down_sample_ratio_min:g}"
    return f"K {config.num_depths}, {ratios}, anchors {anchors}"


def _link(verifier: str | None) -> str:
    return (
        "a model that is not on the hub"
        if verifier is None
        else f"[{escape_markdown(verifier)}](https://huggingface.co/{verifier})"
    )


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose cells are shown as they are, whatever they hold."""
    return Table("", head, [[escape_markdown(cell) for cell in row] for row in rows]).markdown()
