"""Acceptance by segment: the markers that chat templates write, the segments of answers, and the counts of drafts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, END, PATTERNS, make_tokenizer
from fake_vllm import FakeDraftingVllm

from peagle_hf import EvaluateArguments, PeagleError, evaluate
from peagle_hf.data.answer_markers import AnswerMarkers, Marker, find_answer_markers
from peagle_hf.data.tokenizer import ChatOptions
from peagle_hf.evaluation.answer_parts import Contexts, counts_by_part
from peagle_hf.evaluation.figures import part_figures
from peagle_hf.evaluation.intervals import MIN_PROMPTS
from peagle_hf.evaluation.report import text
from peagle_hf.evaluation.runs import Run
from peagle_hf.evaluation.segments import Segmenter
from peagle_hf.hub.card import model_card
from peagle_hf.hub.evaluation_json import read_evaluation
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.serving.client import Answer

THINK, CALL, NOTHING = ("<think>", "</think>"), ("<call>", "</call>"), None

# As Qwen3's: an answer without reasoning gets an empty thought, and earlier thoughts are taken out.
EMPTY_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ (m.reasoning_content or '').strip() }}\n</think>\n\n"
    "{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% elif opens %}<think>\n{% endif %}{% endif %}"
)
# As DeepSeek-R1's: the prompt opens the thought, thoughts are cut out of earlier answers, and calls are nested.
NESTED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}<|calls_begin|>{% for c in m.tool_calls %}"
    "<|call_begin|>function<|sep|>{{ c.function.name }}\n```json\n{{ c.function.arguments }}\n```<|call_end|>"
    "{% endfor %}<|calls_end|><|end|>{% else %}{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# As Mistral's: thoughts are parts of the content, and a call ends with the turn.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}{{ c.function | tojson }}{% endfor %}]</s>"
    "{% else %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}</s>"
    "{% endif %}{% endfor %}"
)
WITH_IDS = BRACKETS.replace("{{ c.function | tojson }}", '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}')
# As Command R7B's: there is reasoning before calls only, in a field of its own.
PLANS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}<|start|>{{ m.tool_plan }}<|end|><CALLS>"
    "{{ m.tool_calls[0].function | tojson }}</CALLS>{% else %}<|reply|>{{ m.content }}<|/reply|>{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Nemotron's: it only takes reasoning away, from the last answer too.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
# As gpt-oss's: the field is called thinking, and a call names its recipient in the header.
RECIPIENTS = (
    PATTERNS["channels"]
    .template.replace("reasoning_content", "thinking")
    .replace(
        "<|channel|>call<|message|>{{ m.tool_calls[0].function | tojson }}",
        " to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}",
    )
)
# As Command R's: a call is announced in words.
IN_WORDS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.tool_calls %}Action: ```json\n[\n  {{ m.tool_calls[0].function | tojson }}\n]```{% else %}{{ m.content }}"
    "{% endif %}",
)
BARE_JSON = CHATML.replace(
    "{{ m.content }}",
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}",
)
SMOLLM3 = CHATML.replace("{{ m.content }}", "{{ m.content if thinks else '<think>\n\n</think>\n' + m.content }}")


@pytest.mark.parametrize(
    ("template", "kwargs", "reasoning", "tool_call", "begins_in"),
    [
        (EMPTY_THOUGHTS, {}, THINK, ("<tool_call>", "</tool_call>"), "text"),
        (EMPTY_THOUGHTS, {"enable_thinking": False}, THINK, ("<tool_call>", "</tool_call>"), "text"),
        (EMPTY_THOUGHTS, {"opens": True}, THINK, ("<tool_call>", "</tool_call>"), "reasoning"),
        (NESTED, {}, THINK, ("<|calls_begin|>", "<|calls_end|>"), "reasoning"),
        (BRACKETS, {}, ("[THINK]", "[/THINK]"), ("[TOOL_CALLS]", None), "text"),
        (WITH_IDS, {}, ("[THINK]", "[/THINK]"), ("[TOOL_CALLS]", None), "text"),
        (PLANS, {}, ("<|start|>", "<|end|>"), ("<CALLS>", "</CALLS>"), "text"),
        (FORGETFUL, {}, THINK, NOTHING, "text"),
        (RECIPIENTS, {}, ("<|channel|>analysis", "<|end|>"), ("to=functions.", "<|call|>"), "text"),
        (IN_WORDS, {}, NOTHING, ("Action: ```json", "```"), "text"),
        (BARE_JSON, {}, NOTHING, NOTHING, "text"),
        (SMOLLM3, {"thinks": True}, THINK, NOTHING, "text"),
    ],
)
def test_markers_are_those_that_the_template_writes(template, kwargs, reasoning, tool_call, begins_in):
    found = find_answer_markers(make_tokenizer(template, eos="<|im_end|>" if END in template else "</s>"), kwargs)
    wanted = {"reasoning": reasoning, "tool_call": tool_call}
    assert found.by_segment == {name: Marker(*marker) for name, marker in wanted.items() if marker}
    assert found.begins_in == begins_in


OF_PATTERNS = {
    "plain": (NOTHING, NOTHING),
    "reasoning": (THINK, CALL),
    "reasoning of earlier turns is taken out": (THINK, CALL),
    "the prompt opens a thought": (THINK, NOTHING),
    "the prompt closes an empty thought": (THINK, NOTHING),
    "the prompt thinks, an answer closes the thought at once": (("[T]", "[/T]"), NOTHING),
    "the end of turn is the next turn's first token": (NOTHING, CALL),
    "a tool call has its own end": (NOTHING, CALL),
    "channels": (("<|channel|>analysis", "<|end|>"), ("<|channel|>call", "<|call|>")),
    "content that is null is printed as None": (NOTHING, CALL),
    "arguments are wanted as text": (NOTHING, CALL),
    "tool calls are not shown": (NOTHING, NOTHING),
    "a special token shares its first letter with the prompt": (NOTHING, ("<CALLS>", "</CALLS>")),
    "content is wanted in parts": (NOTHING, NOTHING),
    "the name of the recipient begins an answer": (NOTHING, NOTHING),
    "nothing of a template is special": (NOTHING, NOTHING),
}


@pytest.mark.parametrize("name", OF_PATTERNS)
def test_markers_of_the_patterns_of_real_templates(name):
    pattern, (reasoning, tool_call) = PATTERNS[name], OF_PATTERNS[name]
    found = find_answer_markers(make_tokenizer(pattern.template, pattern.strip, pattern.eos))
    wanted = {"reasoning": reasoning, "tool_call": tool_call}
    assert found.by_segment == {name: Marker(*marker) for name, marker in wanted.items() if marker}
    assert found.begins_in == ("reasoning" if name.startswith(("the prompt opens", "the prompt thinks,")) else "text")


def test_a_tokenizer_without_a_usable_template_has_no_segments(chain, tmp_path, caplog):
    assert Segmenter.of(str(chain), False, ChatOptions()) is None
    assert caplog.text == ""
    assert Segmenter.of(str(chain), False, ChatOptions("{% if %}")) is None
    assert "Acceptance is not reported by segment" in caplog.text
    assert "no valid Jinja" in caplog.text
    assert Segmenter.of(str(tmp_path), False, ChatOptions()) is None
    tokenizer = make_tokenizer(CHATML)
    tokenizer.chat_template = None
    assert find_answer_markers(tokenizer) == AnswerMarkers({})


MARKED = {
    "thought, call and text": (
        EMPTY_THOUGHTS,
        {},
        [
            ("reasoning", "<think>\nHm. A call?\n</think>"),
            ("text", "\n\nWell, look: \n"),
            ("tool_call", '<tool_call>\n{"name": "weather"}\n</tool_call>'),
            ("text", "\n"),
            ("tool_call", '<tool_call>\n{"name": "<think>"}\n</tool_call>'),
            ("text", "<|im_end|>"),
        ],
    ),
    "the answer begins in a thought": (
        EMPTY_THOUGHTS,
        {"opens": True},
        [("reasoning", "Hm. <tool_call> or not?\n</think>"), ("text", "\n\nFine.<|im_end|>")],
    ),
    "the thought is cut off": (EMPTY_THOUGHTS, {}, [("text", "\n"), ("reasoning", "<think>\nHm. And then")]),
    "no segment but text": (EMPTY_THOUGHTS, {}, [("text", "Sunny, 20° ☀ </think> </tool_call><|im_end|>")]),
    "a call to the end": (BRACKETS, {}, [("text", "Look "), ("tool_call", '[TOOL_CALLS] [{"name": "a"}] </s>')]),
    "nested calls": (
        NESTED,
        {},
        [
            ("reasoning", "Hm.</think>"),
            ("text", "\n\n"),
            ("tool_call", "<|calls_begin|><|call_begin|>function<|sep|>a\n```json\n{}\n```<|call_end|><|calls_end|>"),
            ("text", "<|end|>"),
        ],
    ),
    "channels": (
        RECIPIENTS,
        {},
        [
            ("reasoning", "<|channel|>analysis<|message|>Hm.<|end|>"),
            ("text", "<|start|>assistant "),
            ("tool_call", "to=functions.weather<|channel|>commentary json<|message|>{}<|call|>"),
        ],
    ),
    "a call in words": (
        IN_WORDS,
        {},
        [("text", "Let me. "), ("tool_call", "Action:```json\n[{}]\n```"), ("text", " Done: ```x```<|im_end|>")],
    ),
}
"""Answers whose segments are marked by hand."""


def segmenter_of(template: str, kwargs: dict) -> tuple[Segmenter, object]:
    tokenizer = make_tokenizer(template, eos="<|im_end|>" if END in template else "</s>")
    return Segmenter(lambda token: tokenizer.decode([token]), find_answer_markers(tokenizer, kwargs)), tokenizer


@pytest.mark.parametrize("name", MARKED)
def test_tokens_lie_in_the_segments_that_are_marked_by_hand(name):
    template, kwargs, parts = MARKED[name]
    segmenter, tokenizer = segmenter_of(template, kwargs)
    text = "".join(part for _, part in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    by_character = [segment for segment, part in parts for _ in part]
    wanted = [by_character[start] for start, _ in encoded["offset_mapping"]]
    assert segmenter.segments(encoded["input_ids"]) == wanted
    assert set(wanted) == {segment for segment, _ in parts}


WORDS = dict(enumerate(["zero", "<think>", "hm", "</think>", "well", "<call>", "f", "</call>"]))
MARKERS = AnswerMarkers({"reasoning": Marker(*THINK), "tool_call": Marker(*CALL)})
SEGMENTER = Segmenter(WORDS.__getitem__, MARKERS)


def answer_of(token_ids: list[int], accepted: list[int], depth: int = 2) -> Answer:
    """An answer whose drafts have two tokens each."""
    by_position = [sum(count > position for count in accepted) for position in range(depth)]
    drafting = [len(accepted), depth * len(accepted), sum(accepted), *by_position]
    return Answer(token_ids=token_ids, drafting=drafting, drafts=[[count, depth] for count in accepted], seconds=1.0)


#            0   1        2    3      4      5        6      7      8      9
# tokens     hm  <think>  hm   hm     hm   </think>  well  <call>   f   </call>
# accepted       0        2                 1              0        1
BY_HAND = answer_of([2, 1, 2, 2, 2, 3, 4, 5, 6, 7], [0, 2, 1, 0, 1])


def counts_of(run: Run) -> dict[str, np.ndarray]:
    return counts_by_part(run, SEGMENTER)


def test_drafts_count_where_their_first_token_lies():
    counts = counts_of(Run(1, [[BY_HAND]], 1.0))
    assert {name: rows.tolist() for name, rows in counts.items()} == {
        "reasoning": [[3, 6, 3, 2, 1]],
        "tool_call": [[2, 4, 1, 1, 0]],
        "text": [[0, 0, 0, 0, 0]],
    }


def test_a_draft_behind_the_end_belongs_to_the_last_segment():
    """vLLM counts tokens that it accepts behind the last one, and where a step had no draft the place is not exact."""
    answer = answer_of([4, 1, 2], [2, 2, 0])
    counts = counts_of(Run(1, [[answer]], 1.0))
    assert counts["reasoning"].tolist() == [[3, 6, 4, 2, 2]]
    assert counts_of(Run(1, [[Answer(token_ids=[4], drafting=[0, 0, 0, 0, 0], drafts=[])]], 1.0)) is not None


def test_an_answer_with_many_tokens_without_drafts_has_no_known_places():
    """As under a load at which a server drafts nothing: vLLM counts the steps with drafts only. Two may be without."""
    assert counts_of(Run(1, [[answer_of([4] * 6, [1, 0])]], 1.0)) is not None
    undrafted = answer_of([4] * 7, [1, 0])
    assert counts_of(Run(1, [[undrafted]], 1.0)) is None
    assert part_figures([Run(1, [[undrafted, BY_HAND]], 1.0)], SEGMENTER, True) is None


def random_run(generator: np.random.Generator, num_prompts: int) -> Run:
    """Two turns to each prompt, tokens and accepted numbers by chance."""

    def answer() -> Answer:
        token_ids, accepted, place = generator.integers(0, len(WORDS), 30).tolist(), [], 1
        while place < len(token_ids):
            accepted.append(int(generator.integers(0, 3)))
            place += accepted[-1] + 1
        return answer_of(token_ids, accepted)

    return Run(2, [[answer(), answer()] for _ in range(num_prompts)], 1.0)


def test_the_counts_of_all_segments_sum_to_the_whole():
    """In each prompt, and in the figures, in which sampled rounds are added and of greedy ones the first counts."""
    generator = np.random.default_rng(0)
    runs = [random_run(generator, 12), random_run(generator, 12)]
    counts = counts_of(runs[0])
    assert sum(counts.values()).tolist() == runs[0].drafting
    for is_greedy, counted in ((True, runs[:1]), (False, runs)):
        by_segment = part_figures(runs, SEGMENTER, is_greedy)
        assert by_segment.keys() == {"reasoning", "tool_call", "text"}
        whole = np.sum([run.drafting for run in counted], axis=(0, 1)).tolist()
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        assert [sum(row[name] for row in by_segment.values()) for name in names] == whole[:3]
        for position, accepted in enumerate(whole[3:]):
            by_name = [row["per_position_acceptance"][position] * row["num_drafts"] for row in by_segment.values()]
            assert sum(by_name) == pytest.approx(accepted)


def test_a_draft_counts_in_the_range_of_the_tokens_before_it():
    """Prompt and answer: the drafts begin after 1,022 + 1, 1,024, 1,027, 1,029 and 1,030 tokens."""
    whole = part_figures([Run(1, [[replace(BY_HAND, num_prompt_tokens=1022)]], 1.0)], Contexts(), True)
    drafts = {"0-1K": 1, "1K-4K": 4, "4K-16K": 0, "16K-32K": 0, "32K-": 0}
    assert {name: row["num_drafts"] for name, row in whole.items()} == drafts
    generator = np.random.default_rng(1)
    run = random_run(generator, 12)
    assert part_figures([run], Contexts(), True) is None  # this server doesn't say how long prompts are
    for chat in run.chats:
        for answer in chat:
            answer.num_prompt_tokens = int(generator.choice([5, 1010, 4090, 16380, 32760, 99999]))
    counts = counts_by_part(run, Contexts())
    assert all(rows.any() for rows in counts.values())
    assert sum(counts.values()).tolist() == run.drafting


def test_intervals_are_over_the_prompts_that_draft_in_the_segment():
    thinking, plain = answer_of([1, 2, 2, 2, 3], [0, 1, 0]), answer_of([4, 4, 4, 4], [1, 0])
    run = Run(1, [[thinking]] * MIN_PROMPTS + [[plain]] * (MIN_PROMPTS - 1), 1.0)
    by_segment = part_figures([run], SEGMENTER, True)
    assert {name: row["num_prompts"] for name, row in by_segment.items()} == {
        "reasoning": MIN_PROMPTS,
        "tool_call": 0,
        "text": MIN_PROMPTS - 1,
    }
    low, high = by_segment["reasoning"]["intervals"]["acceptance_length"]
    assert by_segment["reasoning"]["acceptance_length"] == pytest.approx(4 / 3)
    assert low < 4 / 3 < high
    assert by_segment["text"]["intervals"] == by_segment["tool_call"]["intervals"] == {}
    assert (by_segment["tool_call"]["num_drafts"], by_segment["text"]["acceptance_length"]) == (0, 1.5)
    run.chats[0][0].drafts = None
    assert part_figures([run], SEGMENTER, True) is None


# Reports

REASONS = (
    "{% for m in messages %}{{ 'w5 ' + m.reasoning_content + ' w6 ' if m.reasoning_content else '' }}"
    "{{ m.content }} {% endfor %}"
)
"""A template for conftest's `chain`, whose words are w4 to w95."""


@pytest.fixture
def server(chain):
    with FakeDraftingVllm(str(chain), first=4) as server:
        yield server


@pytest.fixture
def arguments(drafter, tmp_path, server):
    (tmp_path / "template.jinja").write_text(REASONS)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"turns": ["a b c d e f g", "a b c"], "question_id": 1}, {"turns": ["a b c"], "question_id": 2}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "suite": [str(prompts)],
        "output": str(tmp_path / "out"),
        "chat_template": str(tmp_path / "template.jinja"),
    }
    return EvaluateArguments(model=str(drafter), endpoint=server.url, **files)


def test_the_report_has_the_figures_of_each_segment(arguments, drafter, capsys):
    """An answer of eight tokens is w4 w5 … w11; its drafts begin at w5 and w6, in the thought, then at w8 and w11."""
    report = evaluate(arguments)
    segments = report["by_segment"]
    counted = {
        name: [row[count] for count in ("num_prompts", "num_drafts", "num_accepted_tokens")]
        for name, row in segments.items()
    }
    assert counted == {"reasoning": [2, 2 + 2 + 2, 1 + 1 + 1], "text": [1, 2, 2]}
    assert sum(row["num_drafts"] for row in segments.values()) == report["num_drafts"]
    assert segments["text"]["per_position_acceptance"] == [0.5, 0.5, 0]
    assert (report["segment_markers"], report["answers_begin_in"]) == ({"reasoning": ["w5", "w6"]}, "text")
    contexts = report["by_context"]
    assert contexts["0-1K"]["num_accepted_tokens"] == report["num_accepted_tokens"]
    assert sum(row["num_drafts"] for row in contexts.values()) == report["num_drafts"]
    printed, page = capsys.readouterr().out, Path(arguments.output, "evaluation.html").read_text()
    for shown in (printed, page):
        assert "By position in the context" not in shown  # all drafts lie in one range of positions
        assert "By segment of the answers" in shown
        assert "reasoning from w5 to w6" in shown
    assert ["reasoning", "2", "6", "1.500", "16.7%"] in [line.split() for line in printed.splitlines()]
    evaluation = read_evaluation(Path(arguments.output) / "evaluation.json", drafter)
    card = model_card(check_checkpoint(drafter), "my-lab/d", None, None, evaluation).text
    assert "| drafts that begin in | number of prompts |" in card
    assert "| reasoning | 2 | 1.500 | 16.7% |" in card
    assert "| tokens before the draft |" not in card
    sampled = evaluation | {"temperature": 1.0, "draft_sample_method": "probabilistic"}
    card = model_card(check_checkpoint(drafter), "my-lab/d", None, None, sampled).text
    assert "temperature 1.0 with probabilistic drafts, " in card
    evaluation["by_context"]["32K-"] = contexts["0-1K"]
    card = model_card(check_checkpoint(drafter), "my-lab/d", None, None, evaluation).text
    assert "| tokens before the draft | number of prompts |" in card
    assert "By position in the context" in text(evaluation)


def test_a_server_that_counts_by_request_only_is_named_with_the_remedy(arguments, server, drafter, capsys):
    server.by_draft = False
    report = evaluate(arguments)
    assert report["by_segment"] is None
    assert report["num_drafts"] == 8
    printed = capsys.readouterr().out
    assert "Acceptance isn't known by segment or by position in the context, because the server counts per" in printed
    assert "--per-request-spec-decode-metrics detailed" in printed
    evaluation = read_evaluation(Path(arguments.output) / "evaluation.json", drafter)
    assert "drafts that begin in" not in model_card(check_checkpoint(drafter), "a/b", None, None, evaluation).text


def test_a_server_that_drafts_at_times_only_has_no_figures_by_segment(arguments, server, capsys):
    """As one of `serve --num-speculative-tokens auto`, whose drafts began after the sixth token, when the load fell."""
    server.chat_fault = lambda message: "late drafts"
    report = evaluate(arguments)
    assert report["by_segment"] is report["by_context"] is None
    assert report["num_drafts"] == 2
    assert "because vLLM generated tokens without drafts, as with K 0 under load" in capsys.readouterr().out


def test_finished_runs_without_counts_per_draft_are_not_mixed_with_others(arguments, server, caplog):
    server.by_draft = False
    arguments.rounds = 2
    server.chat_fault = lambda message: "400" if len(server.requests) > 6 else None
    with pytest.raises(PeagleError, match="the prompt is too long"):
        evaluate(arguments)
    server.by_draft, server.chat_fault = True, lambda message: None
    assert evaluate(arguments)["by_segment"]["text"]["num_drafts"] == 2
    assert "counts is by draft and was by request" in caplog.text


def test_a_template_without_markers_has_no_segments(arguments, capsys):
    arguments.chat_template = None
    report = evaluate(arguments)
    assert not {"by_segment", "segment_markers", "answers_begin_in"} & report.keys()
    assert "egment" not in capsys.readouterr().out
