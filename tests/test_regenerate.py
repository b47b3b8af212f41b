"""`regenerate`: chats that a tiny target with a real byte-level tokenizer answers itself, and the bundled ones."""

import errno
import itertools
import json
import logging
import math
import random
import shlex
import shutil
import string
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import filelock
import pytest
import torch
from conftest import VllmServer
from datasets import load_from_disk
from fake_vllm import FakeWritingVllm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from peagle_hf.data import chat_models, dialogues
from peagle_hf.data import prompts as prompts_module
from peagle_hf.data import regenerate as module
from peagle_hf.data.answer_journal import Journal
from peagle_hf.data.chat_models import LocalChatModel, Sampling
from peagle_hf.data.prepare import PrepareArguments, prepare
from peagle_hf.data.prompts import Prompt
from peagle_hf.data.regenerate import RegenerateArguments, answer_spans, regenerate, repetition
from peagle_hf.errors import PeagleError
from peagle_hf.serving.environment import vllm_environment

BUNDLE = Path(__file__).parent.parent / "examples" / "data"
WORDS = 160
END, START = WORDS, WORDS + 1
BELL = "\u0007"  # the one token that is not text
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPTS = [
    {"question_id": 7, "category": "qa", "turns": ["Why is the grass green?"]},
    {"question_id": 8, "category": "writing", "turns": ["Write a long letter to the owner of the house by the lake."]},
    {"question_id": 9, "category": "multi_turn", "turns": ["Name a river.", "Where does it end?", "And where begin?"]},
    {"question_id": 10, "category": "qa", "turns": ["Who sings?"]},
    {"question_id": 11, "category": "multi_turn", "turns": ["Count the apples in the basket.", "Now the pears."]},
]


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> Path:
    """A random Llama, chaotic enough not to loop, whose end token comes every now and then."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [turn for prompt in PROMPTS for turn in prompt["turns"]] + [string.printable, "user\nassistant\nsystem\n"]
    tokenizer.train_from_iterator([*text, BELL], trainers.BpeTrainer(vocab_size=WORDS))
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    set_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=32,  # vLLM has kernels for it
            max_position_embeddings=512,
            bos_token_id=START,
            eos_token_id=END,
            initializer_range=1.0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[END] *= 1.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(target: Path, output: Path, **arguments) -> list[dict]:
    arguments = {"max_new_tokens": 16, "batch_size": 2} | arguments
    return read_jsonl(regenerate(RegenerateArguments(model=str(target), output=str(output), **arguments)))


def report_of(output: Path) -> dict:
    return json.loads(output.with_suffix(".report.json").read_text())


def reasons_of(output: Path) -> dict[str, str]:
    return {drop["id"]: drop["reason"] for drop in report_of(output)["dropped"]}


# What is answered


def test_greedy_answers_are_the_targets_own_token_by_token(target, prompts, tmp_path):
    """Every learnt span is what `generate` makes of all that stands before it, one chat at a time."""
    rows = run(target, tmp_path / "chats.jsonl", prompts=str(prompts))
    assert [row["id"] for row in rows] == ["7", "8", "9", "10", "11"]
    model = AutoModelForCausalLM.from_pretrained(target)
    ends = Counter()
    for row, prompt in zip(rows, PROMPTS, strict=True):
        spans = answer_spans(row)
        assert len(spans) == len(prompt["turns"])
        starts = [i for i, mask in enumerate(row["loss_mask"]) if mask and not row["loss_mask"][i - 1]]
        for start, span in zip(starts, spans, strict=True):
            alone = model.generate(torch.tensor([row["input_ids"][:start]]), max_new_tokens=16, do_sample=False)
            assert alone[0, start:].tolist() == span
            ends[span[-1] == END] += 1
        assert row["finish_reason"] == ("stop" if spans[-1][-1] == END else "length")
        assert row["model"] == target.name
    assert ends[True], "no answer ended by itself"
    assert ends[False], "no answer was cut off"


def test_ids_between_the_answers_are_the_chat_templates(target, prompts, tmp_path):
    rows = run(target, tmp_path / "chats.jsonl", prompts=str(prompts))
    tokenizer = AutoTokenizer.from_pretrained(target)
    row = next(row for row in rows if row["id"] == "9")
    expected = []
    for number, (turn, span) in enumerate(zip(PROMPTS[2]["turns"], answer_spans(row), strict=True)):
        end_is_missing = number and expected[-1] != END
        between = ("<|end|>" if end_is_missing else "") + ("\n" if number else "")
        expected += tokenizer.encode(f"{between}<|start|>user\n{turn}<|end|>\n<|start|>assistant\n") + span
    assert row["input_ids"] == expected
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 3
    last = [token_id for token_id in answer_spans(row)[-1] if token_id != END]
    assert row["messages"][-1]["content"] == tokenizer.decode(last, skip_special_tokens=True).strip()


def test_chats_in_any_shape_keep_what_the_user_says(target, prompts, tmp_path):
    """Answers of messages and of ShareGPT form are replaced; a system message stays."""
    turns = run(target, tmp_path / "turns.jsonl", prompts=str(prompts))
    as_messages = [
        {"messages": [{"role": role, "content": text} for turn in row["turns"] for role, text in chat_of(turn)]}
        for row in PROMPTS
    ]
    names = {"user": "human", "assistant": "gpt"}
    as_conversations = [
        {
            "conversations": [
                {"from": names[message["role"]], "value": message["content"]} for message in row["messages"]
            ]
        }
        for row in as_messages
    ]
    for name, rows in (("messages", as_messages), ("conversations", as_conversations)):
        source = write_jsonl(tmp_path / f"as_{name}.jsonl", rows)
        chats = run(target, tmp_path / f"{name}.jsonl", prompts=str(source))
        assert [row["input_ids"] for row in chats] == [row["input_ids"] for row in turns]
        assert [row["id"] for row in chats] == ["0", "1", "2", "3", "4"]

    system = {"role": "system", "content": "Be brief."}
    source = write_jsonl(tmp_path / "system.jsonl", [{"messages": [system, {"role": "user", "content": "Who sings?"}]}])
    (row,) = run(target, tmp_path / "with_system.jsonl", prompts=str(source))
    text = AutoTokenizer.from_pretrained(target).decode(row["input_ids"])
    assert text.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nWho sings?<|end|>\n<|start|>assistant\n")


def chat_of(turn: str) -> list[tuple[str, str]]:
    return [("user", turn), ("assistant", "an answer of someone else")]


def test_a_template_that_rewrites_earlier_answers_gives_a_row_a_turn(target, prompts, tmp_path):
    """As Qwen3 does, which strips earlier reasoning: the model then reads another history than it wrote."""
    folder = tmp_path / "forgetful"
    shutil.copytree(target, folder)
    forgetful = TEMPLATE.replace(
        "{{ message['content'] }}", "{{ 'hm' if message['role'] == 'assistant' else message['content'] }}"
    )
    (folder / "chat_template.jinja").write_text(forgetful)
    everything = run(folder, tmp_path / "chats.jsonl", prompts=str(prompts))
    rows = [row for row in everything if row["id"] == "9"]
    assert [len(row["messages"]) for row in rows] == [2, 4, 6]
    conversations = {
        row["id"]: {other["conversation"] for other in everything if other["id"] == row["id"]} for row in everything
    }
    assert all(len(one) == 1 for one in conversations.values())
    assert len(set.union(*conversations.values())) == len(PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        (span,) = answer_spans(row)
        assert row["input_ids"] == tokenizer.encode(prompt) + span


def test_the_checkpoints_sampling_advice_does_not_change_the_text(target, prompts, tmp_path):
    folder = tmp_path / target.name
    shutil.copytree(target, folder)
    GenerationConfig(
        eos_token_id=END, do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1
    ).save_pretrained(folder)
    assert run(folder, tmp_path / "a.jsonl", prompts=str(prompts)) == run(
        target, tmp_path / "b.jsonl", prompts=str(prompts)
    )


def test_sampling_depends_on_the_seed_alone(target, prompts, tmp_path):
    def sampled(name: str, seed: int) -> list:
        return run(target, tmp_path / name, prompts=str(prompts), temperature=1.0, seed=seed)

    torch.manual_seed(5)
    first = sampled("a.jsonl", seed=1)
    state = torch.random.get_rng_state()
    assert sampled("b.jsonl", seed=1) == first
    assert torch.equal(torch.random.get_rng_state(), state), "global random state was touched"
    assert sampled("c.jsonl", seed=2) != first


def test_whom_a_prompt_is_answered_with_changes_nothing(target, prompts, tmp_path):
    flags = {"prompts": str(prompts), "temperature": 1.0, "top_p": 0.9}
    one, two, five = (run(target, tmp_path / f"{size}.jsonl", batch_size=size, **flags) for size in (1, 2, 5))
    assert one == two == five
    alone = write_jsonl(tmp_path / "alone.jsonl", PROMPTS[2:3])
    assert run(target, tmp_path / "chat.jsonl", **flags | {"prompts": str(alone)}) == one[2:3]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.4, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # 4 / 9 + 3 / 9 of what min_p leaves are 0.78
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(changes, expected):
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    draw = chat_models._Draw(Sampling(**{"temperature": 1.0} | changes), list(range(4000)), torch.device("cpu"))
    drawn = draw(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares.tolist() == pytest.approx(expected, abs=0.03)
    assert all(share == 0 for share, wanted in zip(shares, expected, strict=True) if wanted == 0)


# What is invented


def test_invented_prompts_follow_the_users_tag(target, tmp_path):
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, invent=40, batch_size=8, max_new_tokens=24)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert rows
    for row in rows:
        assert row["category"] == "invented"
        user, answer = row["messages"]
        text = f"<|start|>user\n{user['content']}<|end|>\n<|start|>assistant\n"
        (span,) = answer_spans(row)
        assert row["input_ids"] == tokenizer.encode(text) + span
        assert user["content"].replace("\n", "").replace("\t", "").isprintable()
        assert "\ufffd" not in user["content"]
        assert answer["content"]
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    reasons = Counter(reasons_of(output).values())
    assert len(rows) + reasons.total() == 40, "every invented prompt is kept or accounted for"
    assert {"the invented prompt did not end", "the invented prompt is not text"} <= reasons.keys()


def test_an_unusable_invention_is_named(target, tmp_path, monkeypatch):
    """The sampled ids are put in by hand; everything after them is real."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    inventions = [
        [*tokenizer.encode("Why is the grass green?"), END],
        [*tokenizer.encode("Why is the grass green?"), END],
        [*tokenizer.encode("Name."), END],
        tokenizer.encode("Name a river that never"),
        [*tokenizer.encode(f"Name the{BELL} long river"), END],
        [*tokenizer.encode("Name the <|start|> long river"), END],
    ]
    answer = LocalChatModel.complete
    monkeypatch.setattr(
        LocalChatModel,
        "complete",
        lambda self, prompts, *rest: inventions if len(prompts) == 6 else answer(self, prompts, *rest),
    )
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, invent=6, batch_size=6)
    assert [row["id"] for row in rows] == ["invented-0"]
    assert reasons_of(output) == {
        "invented-1": "resembles an earlier prompt",
        "invented-2": "the invented prompt is too short",
        "invented-3": "the invented prompt did not end",
        "invented-4": "the invented prompt is not text",
        "invented-5": "the invented prompt holds a special token",
    }


# What is dropped


def test_words_are_letters_where_none_are_written_between_spaces():
    assert prompts_module.words("Why IS it, 2026?") == ["why", "is", "it", "2026"]
    assert prompts_module.words("为什么天空是蓝色的,GPU版") == [*"为什么天空是蓝色的", "gpu", "版"]
    assert prompts_module.words("なぜ空") == ["な", "ぜ", "空"]


def test_near_duplicates_and_excluded_prompts_are_dropped_and_named(target, tmp_path):
    long = "write a long letter to the owner of the house by the lake"
    rows = [
        {"question_id": 1, "category": "writing", "turns": [long]},
        {
            "question_id": 2,
            "category": "writing",
            "turns": ["WRITE a long letter: to the owner of the house by the lake!"],
        },
        {"question_id": 3, "category": "writing", "turns": [long + " and the hill"]},
        {"question_id": 4, "category": "writing", "turns": ["paint the letter box of the owner by the lake red"]},
        {"question_id": 5, "category": "qa", "turns": ["Who sings?"]},
    ]
    excluded = write_jsonl(tmp_path / "evaluation.jsonl", [{"turns": ["who sings"]}])
    output = tmp_path / "chats.jsonl"
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)
    kept = run(target, output, prompts=str(source), exclude=[str(excluded)])
    assert [row["id"] for row in kept] == ["1", "4"]
    assert reasons_of(output) == {
        "2": "resembles an earlier prompt",
        "3": "resembles an earlier prompt",
        "5": "resembles an excluded prompt",
    }
    assert report_of(output)["dropped_by_category"] == {"qa": 1, "writing": 2}
    assert report_of(output)["rows_by_category"] == {"writing": 2}


def test_the_border_of_a_near_duplicate(target, tmp_path):
    """Two prompts of 7 words have 3 grams of 5 each: 2 in common are 2 / 4, not above a half; 9 words share 4 of 6."""
    rows = [
        {"question_id": 1, "turns": ["a b c d e f g"]},
        {"question_id": 2, "turns": ["b c d e f g h"]},
        {"question_id": 3, "turns": ["k l m n o p q r s"]},
        {"question_id": 4, "turns": ["l m n o p q r s t"]},
    ]
    output = tmp_path / "chats.jsonl"
    run(target, output, prompts=str(write_jsonl(tmp_path / "prompts.jsonl", rows)))
    assert reasons_of(output) == {"4": "resembles an earlier prompt"}


def by_definition(prompts: list[Prompt], excluded: list[Prompt]) -> dict[str, str]:
    """Why prompts are dropped, by comparing each with all others."""

    def grams(*turns: str) -> set[tuple[str, ...]]:
        return set(prompts_module.grams(prompts_module.words(" ".join(turns)), 5))

    def alike(one: set, other: set) -> bool:
        return len(one & other) / len(one | other) > 0.5

    known = [grams(*turns) for prompt in excluded for turns in (prompt.turns, prompt.turns[:1])]
    kept, reasons = [], {}
    for prompt in prompts:
        own = [grams(*prompt.turns), *(grams(turn) for turn in prompt.turns)]
        if any(alike(one, other) for one in own for other in known):
            reasons[prompt.id] = "resembles an excluded prompt"
        elif any(alike(own[0], other) for other in kept):
            reasons[prompt.id] = "resembles an earlier prompt"
        else:
            kept.append(own[0])
    return reasons


@pytest.mark.parametrize("seed", range(20))
def test_near_duplicates_are_those_of_the_definition(seed):
    """Prompts of all lengths with much in common: the index finds exactly what comparing all pairs finds."""
    chooser = random.Random(seed)
    phrases = [[chooser.choice("abcdefgh") for _ in range(chooser.randint(1, 12))] for _ in range(12)]

    def prompt(number: int) -> Prompt:
        turns = [
            " ".join(itertools.chain(*chooser.sample(phrases, chooser.randint(0, 4))))
            for _ in range(chooser.choice([1, 1, 3]))
        ]
        return Prompt(str(number), "", [], turns)

    prompts, excluded = ([prompt(number) for number in range(count)] for count in (120, seed % 3 * 4))
    dropped: list[dict[str, str]] = []
    kept = prompts_module.distinct(prompts, excluded, dropped)
    reasons = by_definition(prompts, excluded)
    assert {drop["id"]: drop["reason"] for drop in dropped} == reasons
    assert kept == [prompt for prompt in prompts if prompt.id not in reasons]
    assert len(kept) > 10
    assert len(reasons) > 10


def test_what_many_prompts_share_costs_no_comparisons(monkeypatch):
    """An instruction that takes up to 60 % of every prompt: pairs are not compared, or 2,000 would take 2 million."""
    instruction = " ".join(f"i{number}" for number in range(60))
    prompts = [
        Prompt(str(n), "", [], [f"{instruction} {' '.join(f'w{n}-{m}' for m in range(40 + n % 30))}"])
        for n in range(2000)
    ]
    comparisons = []
    compare = prompts_module.np.intersect1d
    monkeypatch.setattr(
        prompts_module.np, "intersect1d", lambda *sets, **flags: comparisons.append(1) or compare(*sets, **flags)
    )
    assert prompts_module.distinct(prompts, [], []) == prompts
    assert len(comparisons) < 100


def test_no_excluded_prompt_gets_into_the_output(target, tmp_path):
    """In whichever file it is, in another order, case, spacing or Unicode form, alone or as a turn of a longer chat."""
    evaluation = [
        {"turns": ["Why is the caf\u00e9 on the hill closed on Mondays?"]},
        {"turns": ["Name a river.", "Where does it end?"]},
        {"turns": ["Count the apples in the basket."]},
    ]
    one = write_jsonl(tmp_path / "one.jsonl", evaluation[1:])
    two = write_jsonl(tmp_path / "two.jsonl", evaluation[:1])
    rows = [
        {"id": "a", "turns": ["WHY is the CAFE\u0301  on the\thill closed\non mondays"]},
        {"id": "b", "turns": ["Who sings?", "count the apples, in the basket", "Thanks."]},
        {"id": "c", "turns": ["name a river"]},
        {"id": "d", "turns": ["\uff37\uff48\uff59 is the caf\u00e9 on the hill closed on Mondays??"]},
        {"id": "e", "messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Name a  river."}]},
        {"id": "f", "turns": ["Who sings?", "Where does it end?"]},
    ]
    for number, files in enumerate(([one, two], [two, one])):
        output = tmp_path / f"{number}.jsonl"
        source = write_jsonl(tmp_path / "prompts.jsonl", rows[:: 1 - 2 * number])
        kept = run(target, output, prompts=str(source), exclude=list(map(str, files)))
        assert [row["id"] for row in kept] == ["f"]
        assert reasons_of(output) == dict.fromkeys("abcde", "resembles an excluded prompt")


def test_repetition_counts_repeated_4_grams():
    assert repetition([]) == repetition([5]) == repetition(range(50)) == 0
    assert repetition([1, 2, 3, 4] * 5) == 1 - 4 / 17
    assert repetition([1] * 13) == 1 - 1 / 10


@pytest.mark.parametrize(("end", "reason"), [(0, "an empty answer"), (END, "a looping answer")])
def test_empty_and_looping_answers_are_dropped(target, prompts, tmp_path, end, reason):
    """A model of zeros writes token 0 for ever: either its end token, or the same letter again and again."""
    folder = shutil.copytree(target, tmp_path / "zeros")
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    with pytest.raises(PeagleError, match=rf"No chat is left .*5 were dropped \({reason}: 5\)"):
        run(folder, tmp_path / "chats.jsonl", prompts=str(prompts))
    if end != 0:
        assert len(run(folder, tmp_path / "loops.jsonl", prompts=str(prompts), max_repetition=1)) == 5


def test_short_cut_and_repetitive_answers_are_dropped_as_they_are_told(target, prompts, tmp_path):
    rows = run(target, tmp_path / "all.jsonl", prompts=str(prompts))
    answers = {row["id"]: answer_spans(row) for row in rows}
    shortest = {id_: min(len(ids) - (ids[-1] == END) for ids in spans) for id_, spans in answers.items()}
    cut = {id_ for id_, spans in answers.items() if any(ids[-1] != END for ids in spans)}
    assert 0 < len(cut) < len(rows)
    limit = sorted(shortest.values())[1] + 1
    short = {id_ for id_, length in shortest.items() if length < limit}
    cases = [
        ({"min_answer_tokens": limit}, short, f"an answer of fewer than {limit} tokens"),
        ({"drop_cut_answers": True}, cut, "an answer cut off after 16 tokens"),
    ]
    for number, (flags, gone, reason) in enumerate(cases):
        output = tmp_path / f"{number}.jsonl"
        assert run(target, output, prompts=str(prompts), **flags) == [row for row in rows if row["id"] not in gone]
        assert reasons_of(output) == dict.fromkeys(gone, reason)
        assert report_of(output)["dropped_by_reason"] == {reason: len(gone)}


def test_unusable_rows_are_skipped_and_named(target, tmp_path):
    rows = [
        {"id": "a", "messages": [{"role": "assistant", "content": "I begin."}]},
        {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]},
        {"id": "c", "messages": [{"role": "user", "content": "Who sings? " * 200}]},
        {"id": "d", "messages": [{"role": "user", "content": "Who sings?"}]},
    ]
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)
    output = tmp_path / "chats.jsonl"
    assert [row["id"] for row in run(target, output, prompts=str(source))] == ["d"]
    assert [(drop["id"], drop["place"], drop["reason"]) for drop in report_of(output)["dropped"]] == [
        ("a", "prompts.jsonl, line 1", "no user turn"),
        ("b", "prompts.jsonl, line 2", "a message holds something other than text (image)"),
        ("c", "prompts.jsonl, line 3", "longer than the model's context with its answers"),
    ]


def test_text_that_no_tokenizer_takes_is_a_named_row(target, prompts, tmp_path):
    """Half a surrogate pair, as a cut emoji leaves it; in an id or a category it is written as an escape."""
    half = "\ud83d"
    tool = {"type": "function", "function": {"name": "look", "description": half, "parameters": {}}}
    user = {"role": "user", "content": "Who sings?"}
    rows = [
        {"id": "a", "turns": [f"Who sings? {half}"]},
        {"id": "b", "messages": [{"role": "system", "content": half}, user]},
        {"id": "c", "messages": [user], "tools": [tool]},
        {"id": half, "category": half, "messages": [{"role": "user", "content": "Why is the grass green?"}]},
        {"id": "e", "turns": ["Name a river.", f"Where{half}?"]},
    ]
    source = write_jsonl(tmp_path / "broken.jsonl", rows)
    output = tmp_path / "chats.jsonl"
    (row,) = run(target, output, prompts=str(source))
    assert (row["id"], row["category"]) == ("\\ud83d", "\\ud83d")
    assert reasons_of(output) == dict.fromkeys("abce", "it holds half a surrogate pair, which is no text")
    assert {drop["place"] for drop in report_of(output)["dropped"]} == {f"broken.jsonl, line {n}" for n in (1, 2, 3, 5)}

    # As an evaluation prompt such a row still keeps others out.
    excluded = write_jsonl(tmp_path / "evaluation.jsonl", [{"turns": [f"Why is the grass green? {half}"]}])
    output = tmp_path / "more.jsonl"
    assert "7" not in [row["id"] for row in run(target, output, prompts=str(prompts), exclude=[str(excluded)])]
    assert reasons_of(output) == {"7": "resembles an excluded prompt"}


def test_null_ids_and_categories_are_as_good_as_none(target, tmp_path):
    rows = [
        {"question_id": None, "id": None, "category": None, "turns": ["Why is the grass green?"]},
        {"question_id": None, "id": 0, "category": "qa", "turns": ["Who sings?"]},
    ]
    chats = run(target, tmp_path / "chats.jsonl", prompts=str(write_jsonl(tmp_path / "prompts.jsonl", rows)))
    assert [(row["id"], row["category"]) for row in chats] == [("0", "chat"), ("0", "qa")]


def test_prompts_come_in_every_shape_that_prepare_reads(tmp_path):
    rows = [
        {"prompt": "Who sings?", "chosen": "A bird.", "rejected": "Nobody."},
        {"instruction": "Why is the grass green?", "output": "It is."},
        {"question": "Who plays?", "answer": "You."},
        {"prompt": ["Name a river.", "Where does it end?"], "reference": []},
    ]
    prompts = prompts_module.read_prompts(str(write_jsonl(tmp_path / "prompts.jsonl", rows)), [])
    assert [prompt.turns[0] for prompt in prompts] == [
        *("Who sings?", "Why is the grass green?", "Who plays?", "Name a river.")
    ]
    assert prompts[-1].turns[1:] == ["Where does it end?"]


def test_turns_keep_the_rows_system_message_and_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "weather"}}
    row = {"turns": ["Will it rain?"], "system": "You are brief.", "tools": [tool]}
    (prompt,) = prompts_module.read_prompts(str(write_jsonl(tmp_path / "prompts.jsonl", [row])), [])
    assert prompt.system == [{"role": "system", "content": "You are brief."}]
    assert (prompt.turns, prompt.tools) == (["Will it rain?"], [tool])


def test_a_file_with_a_byte_order_mark_and_windows_lines(target, prompts, tmp_path):
    source = tmp_path / "windows.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n"))
    assert run(target, tmp_path / "a.jsonl", prompts=str(source)) == run(
        target, tmp_path / "b.jsonl", prompts=str(prompts)
    )
    source.write_bytes(b"")
    with pytest.raises(PeagleError, match=r"windows\.jsonl is empty"):
        run(target, tmp_path / "c.jsonl", prompts=str(source))


def test_tools_are_on_offer_and_their_results_are_not_made_up(target, tmp_path):
    folder = shutil.copytree(target, tmp_path / "with-tools")
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}<|start|>tools\n{{ tools[0].function.name }}<|end|>\n{% endif %}" + TEMPLATE
    )
    function = {"name": "look", "description": "Look it up.", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    user, call = {"role": "user", "content": "Who sings?"}, {"role": "assistant", "content": "look()", "thinking": "Hm"}
    result = {"role": "tool", "content": "Nobody."}
    rows = [
        {"id": "a", "messages": [user, call, result, {"role": "assistant", "content": "Nobody."}], "tools": tools},
        {"id": "b", "messages": [user, call, result, {"role": "user", "content": "And who plays?"}], "tools": tools},
    ]
    output = tmp_path / "chats.jsonl"
    (row,) = run(folder, output, prompts=str(write_jsonl(tmp_path / "prompts.jsonl", rows)))
    assert row["tools"] == tools
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    text = AutoTokenizer.from_pretrained(folder).decode(row["input_ids"])
    assert text.startswith("<|start|>tools\nlook<|end|>\n<|start|>user\nWho sings?<|end|>")
    assert reasons_of(output) == {"b": "a user turn follows a tool result, which can't be regenerated"}


def test_no_path_of_this_machine_is_written(target, prompts, tmp_path):
    excluded = write_jsonl(tmp_path / "evaluation.jsonl", [{"turns": ["who sings"]}, {"messages": []}])
    source = write_jsonl(tmp_path / "more.jsonl", [*PROMPTS, {"messages": []}])
    output = tmp_path / "chats.jsonl"
    run(target, output, prompts=str(source), exclude=[str(excluded)])
    assert {"evaluation.jsonl, line 2", "more.jsonl, line 6", "more.jsonl, line 4"} == {
        drop["place"] for drop in report_of(output)["dropped"]
    }
    for path in tmp_path.glob("*chats*"):
        assert str(tmp_path.parent) not in path.read_text(), path


def test_prepare_refuses_the_token_ids_of_another_vocabulary(target, prompts, tmp_path):
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, prompts=str(prompts))
    make = partial(PrepareArguments, data=[str(output)], output=str(tmp_path / "data"))
    prepared = load_from_disk(prepare(make(model=str(target))))
    assert sorted(ids.tolist() for ids in prepared["input_ids"][:]) == sorted(row["input_ids"] for row in rows)

    other = shutil.copytree(target, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    words = rf"chats\.jsonl, line \d: the input_ids are of another tokenizer, that of {target.name}\. Name that model"
    with pytest.raises(PeagleError, match=words):
        prepare(make(model=str(other), overwrite=True))

    # Rows of earlier versions don't say which tokenizer made them.
    write_jsonl(output, [{**row, "tokenizer": None} for row in rows])
    prepare(make(model=str(other), overwrite=True))


@pytest.mark.fault("The verifier's own chat template changes after its answers", "prepare refuses their token ids")
def test_prepare_refuses_the_token_ids_of_an_older_chat_template(target, prompts, tmp_path):
    """The drafter would be served with the template as it is now."""
    output, same = tmp_path / "chats.jsonl", shutil.copytree(target, tmp_path / "same")
    rows = run(same, output, prompts=str(prompts))
    (same / "chat_template.jinja").write_text("{{ messages }}")
    make = partial(PrepareArguments, str(same), [str(output)], str(tmp_path / "data"))
    with pytest.raises(
        PeagleError, match=r"chats\.jsonl, line \d: the input_ids were written with another chat template"
    ):
        prepare(make())
    # Rows of earlier versions don't say which template made them.
    write_jsonl(output, [{name: row[name] for name in row if name != "template_fingerprint"} for row in rows])
    prepare(make())


def test_a_chosen_chat_template_and_its_variables_are_answered_and_remembered(
    target, prompts, tmp_path, server, caplog
):
    """Two templates by name and one of a file; a server gets the ids of the same text, and prepare wants the same."""
    named = shutil.copytree(target, tmp_path / "named")
    (named / "chat_template.jinja").unlink()
    (named / "additional_chat_templates").mkdir()
    thinking = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n{{ '' if think else 'no ' }}{% endif %}")
    (named / "additional_chat_templates" / "thinking.jinja").write_text(thinking)
    (named / "additional_chat_templates" / "plain.jinja").write_text(TEMPLATE)
    (tmp_path / "own.jinja").write_text(thinking)
    with pytest.raises(PeagleError, match=r"none of them is the default: .*Name one with --chat-template"):
        run(named, tmp_path / "no.jsonl", prompts=str(prompts))

    output = tmp_path / "chats.jsonl"
    chosen = {"prompts": str(prompts), "chat_template": "thinking", "chat_template_kwargs": '{"think": false}'}
    rows = run(named, output, **chosen)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert all("assistant\nno " in tokenizer.decode(row["input_ids"]) for row in rows)
    settings = report_of(output)["settings"]
    assert settings["chat_template"].startswith("sha256 ")
    assert settings["chat_template_kwargs"] == {"think": False}
    assert json.loads(rows[0]["chat_options"]) == {name: settings[name] for name in json.loads(rows[0]["chat_options"])}
    assert run(named, output, **chosen) == rows
    file = {**chosen, "chat_template": str(tmp_path / "own.jinja"), "chat_template_kwargs": {"think": False}}
    assert run(named, output, **file) == rows, "it is the same template"
    there = run(target, tmp_path / "there.jsonl", endpoint=server.url, **file)
    assert [row["input_ids"] for row in there] == [row["input_ids"] for row in rows]
    assert str(tmp_path) not in (tmp_path / "there.report.json").read_text()

    with pytest.raises(PeagleError, match=r"chat_template_kwargs: \{'think': False\} there, \{'think': True\} now"):
        run(named, output, **{**chosen, "chat_template_kwargs": {"think": True}})
    output.unlink()
    caplog.clear()
    plain = run(named, output, **{**chosen, "chat_template": "plain", "chat_template_kwargs": None})
    assert "chat_template_kwargs: {'think': False} there, None now" in caplog.text
    assert plain[0]["input_ids"] != rows[0]["input_ids"]

    write_jsonl(output, rows)
    make = partial(PrepareArguments, str(target), [str(output)], str(tmp_path / "data"))
    with pytest.raises(PeagleError, match=r"chats\.jsonl, line \d: the input_ids were written with other chat options"):
        prepare(make())
    prepare(make(chat_template=str(tmp_path / "own.jinja"), chat_template_kwargs={"think": False}))


# What an interruption leaves


@pytest.fixture
def asked(monkeypatch) -> list[list[list[int]]]:
    """The token ids that the model was asked to continue, by call."""
    calls: list[list[list[int]]] = []
    complete = LocalChatModel.complete

    def counting(self, prompts, *rest):
        calls.append(prompts)
        return complete(self, prompts, *rest)

    monkeypatch.setattr(LocalChatModel, "complete", counting)
    return calls


FLAGS = {"temperature": 1.0, "invent": 3, "max_new_tokens": 24}


def test_an_interrupted_run_continues_to_the_same_file(target, prompts, tmp_path, monkeypatch, asked):
    whole = tmp_path / "whole.jsonl"
    run(target, whole, prompts=str(prompts), **FLAGS)
    needed = len(asked)
    assert needed >= 6
    counting = LocalChatModel.complete
    for calls in range(needed):
        asked.clear()

        def interrupted(self, *rest, calls=calls):
            if len(asked) == calls:
                raise KeyboardInterrupt
            return counting(self, *rest)

        parts = tmp_path / f"parts-{calls}.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr(LocalChatModel, "complete", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(target, parts, prompts=str(prompts), **FLAGS)
        assert not parts.exists()
        run(target, parts, prompts=str(prompts), **FLAGS)
        assert parts.read_bytes() == whole.read_bytes()
        assert report_of(parts) == report_of(whole)
        assert len(asked) == needed, "something was asked twice"


def test_a_process_may_be_killed_at_any_byte(target, prompts, tmp_path, asked):
    """Of what the journal had at that moment nothing is asked again, and batches stay the same."""
    output = tmp_path / "chats.jsonl"
    run(target, output, prompts=str(prompts), **FLAGS)
    whole, report, needed = output.read_bytes(), report_of(output), list(asked)
    journal = output.with_suffix(".journal")
    content = journal.read_bytes()
    finished = {len(content): len(needed)}  # calls whose answers are complete when the journal is so long
    end = calls = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        if b'"left":0' in line:
            calls += 1
            finished[end] = calls
    for length in (0, 7, *range(41, len(content), len(content) // 12), len(content) - 1, len(content)):
        journal.write_bytes(content[:length])
        output.unlink()
        asked.clear()
        run(target, output, prompts=str(prompts), **FLAGS)
        assert output.read_bytes() == whole
        assert report_of(output) == report
        assert journal.read_bytes() == content
        assert asked == needed[max([calls for end, calls in finished.items() if end <= length], default=0) :]


def test_answers_stay_valid_when_other_prompts_change(target, prompts, tmp_path, asked):
    """Prompts are removed, added and moved; sampled answers depend on none of that."""
    output = tmp_path / "chats.jsonl"
    flags = {"prompts": str(prompts), "temperature": 1.0}
    before = {row["id"]: row for row in run(target, output, **flags)}
    new = {"question_id": 12, "category": "qa", "turns": ["Write down who owns the house."]}
    write_jsonl(prompts, [PROMPTS[4], new, *PROMPTS[2:0:-1]])
    output.unlink()
    asked.clear()
    after = run(target, output, **flags)
    assert [row["id"] for row in after] == ["11", "12", "9", "8"]
    assert all(row == before[row["id"]] for row in after if row["id"] != "12")
    assert sum(map(len, asked)) == 1

    # In a fresh run the order makes no difference either, nor what a prompt is called or what stands beside it.
    write_jsonl(prompts, [{**row, "question_id": row["question_id"] + 100} for row in PROMPTS[::-1]])
    others = run(target, tmp_path / "others.jsonl", **flags)
    assert [{**row, "id": None} for row in others[::-1]] == [{**row, "id": None} for row in before.values()]


def test_what_is_kept_when_an_argument_changes(target, prompts, tmp_path, asked, caplog):
    caplog.set_level(logging.INFO, "peagle_hf")
    output = tmp_path / "chats.jsonl"
    excluded = write_jsonl(tmp_path / "evaluation.jsonl", PROMPTS[:1])
    rows = run(target, output, prompts=str(prompts))
    for changes, num_asked, kept in (
        ({"exclude": [str(excluded)]}, 0, rows[1:]),
        ({"seed": 7, "top_k": 5, "max_repetition": 1, "batch_size": 5}, 0, rows),  # greedy answers draw nothing
        ({"max_new_tokens": 15}, 8, None),
        ({}, 0, rows),
    ):
        asked.clear()
        caplog.clear()
        output.unlink()
        found = run(target, output, prompts=str(prompts), **changes)
        assert sum(map(len, asked)) == num_asked
        assert kept is None or found == kept
        assert ("has answers to" in caplog.text) == (num_asked == 0)
        changed = "max_new_tokens: 16 there, 15 now" if num_asked else "max_new_tokens: 15 there, 16 now"
        assert (changed in caplog.text) == (changes in ({"max_new_tokens": 15}, {}))


def test_two_processes_never_write_one_output(target, prompts, tmp_path):
    output = tmp_path / "chats.jsonl"
    with (
        filelock.FileLock(tmp_path / ".chats.jsonl.lock"),
        pytest.raises(PeagleError, match=r"chats\.jsonl is being written by another process\. Wait"),
    ):
        run(target, output, prompts=str(prompts))
    run(target, output, prompts=str(prompts))


def test_a_finished_file_is_left_as_it_is(target, prompts, tmp_path, monkeypatch):
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, prompts=str(prompts))
    before = output.stat().st_mtime_ns
    monkeypatch.setattr(module, "LocalChatModel", None)
    assert run(target, output, prompts=str(prompts)) == rows
    assert output.stat().st_mtime_ns == before


def test_another_model_of_the_same_name_is_refused(target, prompts, tmp_path):
    first, second = (Path(shutil.copytree(target, tmp_path / parent / "final")) for parent in "ab")
    run(first, tmp_path / "chats.jsonl", prompts=str(prompts))
    model = LlamaForCausalLM.from_pretrained(second)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(second)
    with pytest.raises(PeagleError, match=r"other arguments \(weights: config "):
        run(second, tmp_path / "chats.jsonl", prompts=str(prompts))


def test_other_arguments_are_refused(target, prompts, tmp_path):
    output = tmp_path / "chats.jsonl"
    run(target, output, prompts=str(prompts))
    with pytest.raises(
        PeagleError, match=r"chats\.jsonl belongs to .* \(temperature: 0\.0 there, 0\.5 now\)"
    ) as refused:
        run(target, output, prompts=str(prompts), temperature=0.5)
    assert f"remove {output} to regenerate it. Answers in" in str(refused.value)

    other = shutil.copytree(target, tmp_path / "other-model")
    with pytest.raises(PeagleError, match=f"model: {target.name} there, other-model now"):
        run(other, output, prompts=str(prompts))
    write_jsonl(prompts, PROMPTS[1:])
    with pytest.raises(PeagleError, match=r"prompts: 5, sha256 .* there, 4, sha256"):
        run(target, output, prompts=str(prompts))


def test_an_output_of_another_template_of_the_model_itself_is_not_kept(target, prompts, tmp_path):
    model, output = shutil.copytree(target, tmp_path / "model"), tmp_path / "chats.jsonl"
    run(model, output, prompts=str(prompts))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# the same text, but that isn't known #}")
    with pytest.raises(
        PeagleError, match=r"tokenizer: with its chat template sha256 \w+ there, with its chat template"
    ):
        run(model, output, prompts=str(prompts))


def test_damaged_files_are_named(target, prompts, tmp_path):
    output = tmp_path / "chats.jsonl"
    run(target, output, prompts=str(prompts))
    report, journal = output.with_suffix(".report.json"), output.with_suffix(".journal")
    for text in ("", "[]", '{"rows": 1}', '{"settings": 3}', '{"settings": {"mod'):
        report.write_text(text)
        with pytest.raises(PeagleError, match=r"its report .*chats\.report\.json is damaged .* remove"):
            run(target, output, prompts=str(prompts))
    report.unlink()
    with pytest.raises(PeagleError, match="there is no report"):
        run(target, output, prompts=str(prompts))

    output.unlink()
    lines = journal.read_bytes().splitlines(keepends=True)
    for number, bad in (
        (1, b'{"model": "m", "seed": 0}\n'),  # the first line of an older version
        (2, b'{"key":"a","ids":[1,"2"],"left":0}\n'),
        (3, b"\0" * 40 + b"\n"),
        (3, b"[]\n"),
        (len(lines) + 1, b"my notes, which are no journal"),
    ):
        content = b"".join([*lines[: number - 1], bad, *lines[number:]])
        journal.write_bytes(content)
        with pytest.raises(PeagleError, match=rf"chats\.journal, line {number} is damaged, .* Remove the line"):
            run(target, output, prompts=str(prompts))
        assert journal.read_bytes() == content


@pytest.mark.fault("The disk fills up while answers are written", "Whole lines stay, and a rerun goes on from them.")
def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "a.journal")
    journal.add({"one": [1, 2], "two": [3]})
    before = journal.path.read_bytes()

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            if len(content) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content[:11])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_writer", Full(journal._writer))
        with pytest.raises(PeagleError, match="No space is left on the disk of"):
            journal.add({"three": [4]})
    assert journal.path.read_bytes() == before
    journal.add({"two": [9], "three": [5]})
    journal.close()
    with Journal(tmp_path / "a.journal") as journal:
        assert [journal.get(key) for key in ("one", "two", "three")] == [[1, 2], [3], [5]]
        assert "four" not in journal


# Servers


class FakeRefusingVllm(FakeWritingVllm):
    """A fault may be any HTTP status."""

    def _fails(self, handler, fault: str | None) -> bool:
        if fault is None or not fault.isdigit():
            return super()._fails(handler, fault)
        handler.send({"error": {"message": WORDS_OF.get(fault, "no"), "type": "Error", "code": int(fault)}}, int(fault))
        return True


WORDS_OF = {"500": "the engine is gone", "400": "the prompt is too long", "404": "The model `x` does not exist."}


@pytest.fixture
def server(target) -> Iterator[FakeWritingVllm]:
    """It writes what the target writes."""
    model = LocalChatModel(str(target), max_new_tokens=16, trust_remote_code=False, batch_size=1)

    def write(token_ids: list[int], end_ids: set[int], max_tokens: int) -> list[int]:
        assert max_tokens == model.max_new_tokens
        (written,) = model.complete([token_ids], end_ids, Sampling(0), [0])
        return written

    with FakeRefusingVllm(str(target), write) as server:
        yield server


def test_a_server_is_asked_as_this_process_is(target, prompts, tmp_path, server):
    output = tmp_path / "there.jsonl"
    flags = {"prompts": str(prompts), "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1}
    there = run(target, output, endpoint=server.url, **flags)
    assert there == run(target, tmp_path / "here.jsonl", prompts=str(prompts)), "the fake is greedy"
    turns = sum(len(prompt["turns"]) for prompt in PROMPTS)
    assert len({request["seed"] for request in server.requests}) == len(server.requests) == turns
    fields = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1, "max_tokens": 16}
    assert all(request.items() >= fields.items() for request in server.requests)
    assert all(request["stop_token_ids"] == [END] for request in server.requests)
    settings = report_of(output)["settings"]
    assert settings["backend"] == "vLLM"
    assert "127.0.0.1" not in json.dumps(settings)


FAULTS = {
    "dead": "Connection error",
    "500": "the engine is gone",
    "429": "Error code: 429",
    "no token ids": "no token ids",
    "cut": "cut the answer after 15 of 16 tokens",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_fails_is_asked_again_by_the_next_run(target, prompts, tmp_path, server, fault):
    whole = run(target, tmp_path / "whole.jsonl", prompts=str(prompts), endpoint=server.url)
    asked = len(server.requests)
    tokenizer = AutoTokenizer.from_pretrained(target)
    server.fault = lambda token_ids: fault if "And where begin?" in tokenizer.decode(token_ids) else None
    output = tmp_path / "chats.jsonl"
    arguments = {"prompts": str(prompts), "endpoint": server.url, "max_retries": 0}
    place = r"prompt 9 \(prompts\.jsonl, line 3\)"
    with pytest.raises(PeagleError, match=rf"1 of 5 requests .* {place}: .*{FAULTS[fault]}.* asks for the"):
        run(target, output, **arguments)
    assert not output.exists()
    server.fault = lambda token_ids: None
    server.requests.clear()
    assert run(target, output, **arguments, concurrency=2) == whole
    assert len(server.requests) == 1, f"of {asked}, the turn that failed"


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_prompt_that_the_server_refuses_is_dropped_and_named(target, prompts, tmp_path, server, status):
    whole = run(target, tmp_path / "whole.jsonl", prompts=str(prompts), endpoint=server.url)
    tokenizer = AutoTokenizer.from_pretrained(target)
    server.fault = lambda token_ids: status if "And where begin?" in tokenizer.decode(token_ids) else None
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, prompts=str(prompts), endpoint=server.url, concurrency=1)
    assert rows == [row for row in whole if row["id"] != "9"]
    (drop,) = report_of(output)["dropped"]
    assert (drop["id"], drop["place"]) == ("9", "prompts.jsonl, line 3")
    assert drop["reason"].startswith(f"the server refuses it: Error code: {status}")
    assert "127.0.0.1" not in drop["reason"]

    # Without this row in the file, the answers of the others stay.
    write_jsonl(prompts, [row for row in PROMPTS if row["question_id"] != 9])
    output.unlink()
    server.requests.clear()
    assert run(target, output, prompts=str(prompts), endpoint=server.url) == rows
    assert server.requests == []


def test_a_busy_server_is_asked_again(target, prompts, tmp_path, server):
    statuses = ["429", "408"]
    server.fault = lambda token_ids: statuses.pop() if statuses else None
    rows = run(target, tmp_path / "there.jsonl", prompts=str(prompts), endpoint=server.url, concurrency=1)
    assert rows == run(target, tmp_path / "here.jsonl", prompts=str(prompts))
    assert statuses == []


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_every_request_would_get_ends_the_run(target, prompts, tmp_path, server, status):
    server.fault = lambda token_ids: status
    with pytest.raises(PeagleError, match=rf"Error code: {status}.*VLLM_API_KEY is their key") as refused:
        run(target, tmp_path / "chats.jsonl", prompts=str(prompts), endpoint=server.url, concurrency=1)
    assert f"run {target}" in str(refused.value)
    assert len(server.requests) <= 2  # a second may be under way before the first has failed


def test_a_server_that_refuses_all_prompts_is_not_asked_for_ever(target, prompts, tmp_path, server, monkeypatch):
    server.fault = lambda token_ids: "400"
    arguments = {"prompts": str(prompts), "endpoint": server.url, "concurrency": 1}
    with pytest.raises(PeagleError, match=r"No chat is left .* 5 were dropped \(the server refuses it: .*too long"):
        run(target, tmp_path / "chats.jsonl", **arguments)
    monkeypatch.setattr(dialogues, "_MAX_REFUSED_AT_FIRST", 3)
    server.requests.clear()
    with pytest.raises(PeagleError, match=r"refused the first 3 prompts, the latest with: .*too long"):
        run(target, tmp_path / "chats.jsonl", **arguments)
    assert 3 <= len(server.requests) <= 4  # a fourth may be under way before the third has failed


def test_a_server_that_dies_ends_the_run_and_another_takes_over(target, prompts, tmp_path, server):
    asked = []

    def fault(token_ids: list[int]) -> str | None:
        asked.append(token_ids)
        return "dead" if len(asked) > 3 else None

    server.fault = fault
    arguments = {"prompts": str(prompts), "endpoint": server.url, "max_retries": 0, "concurrency": 1}
    output = tmp_path / "chats.jsonl"
    with pytest.raises(PeagleError, match="1 of 5 requests to the servers failed"):
        run(target, output, **arguments)
    assert len(asked) == 4, "as many failures in turn as there are requests at a time end it"
    with FakeWritingVllm(str(target), server.write) as other:
        rows = run(target, output, **arguments | {"endpoint": f"{server.url},{other.url}"})
    assert rows == run(target, tmp_path / "here.jsonl", prompts=str(prompts))


def test_servers_that_are_not_there_or_for_something_else_are_refused(target, prompts, tmp_path, server):
    arguments = {"prompts": str(prompts), "request_timeout": 5}
    with pytest.raises(PeagleError, match=r"127\.0\.0\.1:9/v1 can't be asked for its model"):
        run(target, tmp_path / "chats.jsonl", endpoint="http://127.0.0.1:9", **arguments)
    server.fault = lambda token_ids: "extracts"
    with pytest.raises(PeagleError, match="writes the hidden states of every prompt to its disk"):
        run(target, tmp_path / "chats.jsonl", endpoint=server.url, **arguments)
    server.requests.clear()
    server.model = str(tmp_path)
    with pytest.raises(PeagleError, match=f"runs {tmp_path}, wanted is {target}"):
        run(target, tmp_path / "chats.jsonl", endpoint=server.url, **arguments)
    assert server.requests == []


def test_what_does_not_fit_the_server_is_dropped_before_it_is_asked(target, prompts, tmp_path, server):
    server.max_model_len = 80
    output = tmp_path / "chats.jsonl"
    rows = run(target, output, prompts=str(prompts), endpoint=server.url)
    reasons = reasons_of(output)
    assert reasons["9"] == "longer than the model's context with its answers"
    assert {row["id"] for row in rows} | reasons.keys() == {str(prompt["question_id"]) for prompt in PROMPTS}


def test_a_client_that_is_killed_goes_on(target, prompts, tmp_path, server):
    output = tmp_path / "chats.jsonl"
    fourth = threading.Event()

    def fault(token_ids: list[int]) -> str | None:
        if len(server.requests) < 4:
            return None
        fourth.set()
        return "hang"

    server.fault = fault
    flags = f"--model {target} --prompts {prompts} --output {output} --endpoint {server.url} --max-new-tokens 16"
    command = [sys.executable, "-m", "peagle_hf", "regenerate", *flags.split(), "--concurrency", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert fourth.wait(120)
    process.kill()
    process.wait()
    assert not output.exists()
    server.fault = lambda token_ids: None
    server.requests.clear()
    rows = run(target, output, prompts=str(prompts), endpoint=server.url, concurrency=4)
    assert rows == run(target, tmp_path / "here.jsonl", prompts=str(prompts))
    turns = sum(len(prompt["turns"]) for prompt in PROMPTS)
    assert len(server.requests) == turns - 3


@pytest.fixture(scope="module")
def served(target, tmp_path_factory) -> Iterator[VllmServer]:
    """The target in plain vLLM."""
    command = ["vllm.entrypoints.openai.api_server", "--model", str(target), "--enforce-eager"]
    flags = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "512"]
    flags += ["--no-enable-chunked-prefill"]
    log = tmp_path_factory.mktemp("served") / "vllm.log"
    with VllmServer(command, flags, log, vllm_environment()) as served:
        yield served


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_gives_the_rows_of_this_process(served, target, prompts, tmp_path):
    here = run(target, tmp_path / "here.jsonl", prompts=str(prompts))
    there = run(target, tmp_path / "there.jsonl", prompts=str(prompts), endpoint=served.url, concurrency=3)
    assert there == here
    assert {**report_of(tmp_path / "there.jsonl"), "settings": None} == {
        **report_of(tmp_path / "here.jsonl"),
        "settings": None,
    }


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_samples_by_the_seed_alone(served, target, prompts, tmp_path):
    def sampled(name: str, **changes) -> list[dict]:
        flags = {"prompts": str(prompts), "invent": 40, "temperature": 1.0, "max_new_tokens": 24} | changes
        return run(target, tmp_path / name, endpoint=served.url, **flags)

    alone = sampled("alone.jsonl", concurrency=1)
    assert sampled("together.jsonl", concurrency=8) == alone
    assert {row["category"] for row in alone} >= {"qa", "invented"}
    assert sampled("other.jsonl", seed=1) != alone
    likeliest = sampled("likeliest.jsonl", top_k=1, invent=0)
    assert likeliest == sampled("greedy.jsonl", temperature=0, invent=0)


# What can't be used


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["Who', "prompts.jsonl, line 2: this is not valid JSON"),
        ('{"question_id": 3}', "prompts.jsonl, line 2: there is neither `messages`"),
        ('{"messages": null, "conversations": null}', "prompts.jsonl, line 2: there is neither `messages`"),
        ('{"turns": "Who sings?"}', "prompts.jsonl, line 2: `turns` must be a list"),
        ('{"turns": []}', "prompts.jsonl, line 2: `turns` must be a list"),
        ('{"turns": ["Who?", " "]}', "prompts.jsonl, line 2: `turns` must be a list"),
        ('{"messages": [{"role": "bishop", "content": "Hm"}]}', "line 2: .* 'bishop'"),
        ('["Who sings?"]', "prompts.jsonl, line 2: the row must be a JSON object"),
    ],
)
@pytest.mark.parametrize("role", ["prompts", "exclude"])
def test_a_malformed_line_is_named(target, prompts, tmp_path, role, line, message):
    broken = tmp_path / "broken" / "prompts.jsonl"
    broken.parent.mkdir()
    broken.write_text('{"turns": ["Who sings?"]}\n' + line + "\n")
    files = {"prompts": str(prompts), "exclude": [str(prompts)]} | {
        role: str(broken) if role == "prompts" else [str(broken)]
    }
    with pytest.raises(PeagleError, match=message):
        run(target, tmp_path / "chats.jsonl", **files)


def test_a_model_that_cannot_chat_is_refused(target, prompts, tmp_path):
    with pytest.raises(PeagleError, match="no-such-model can't be loaded"):
        run(tmp_path / "no-such-model", tmp_path / "chats.jsonl", prompts=str(prompts))

    mute = shutil.copytree(target, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(PeagleError, match="mute has no chat template"):
        run(mute, tmp_path / "more_chats.jsonl", prompts=str(prompts))

    strict = shutil.copytree(target, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(PeagleError, match=r"No chat is left .* refuses it \(no users here\): 5"):
        run(strict, tmp_path / "no_chats.jsonl", prompts=str(prompts))
    with pytest.raises(PeagleError, match="so no prompt can be invented"):
        run(strict, tmp_path / "no_chats.jsonl", invent=3)


def test_a_chat_that_the_template_refuses_is_dropped_and_named(target, prompts, tmp_path):
    """Before any answer, or because of what an answer holds."""
    folder = shutil.copytree(target, tmp_path / "particular")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    refusal += "{% if messages | length == 5 and messages[1]['content'] != '.' %}{{ raise_exception('hm') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + TEMPLATE)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who sings and who plays?"}]
    write_jsonl(prompts, [*PROMPTS, {"id": "s", "messages": system}])
    output = tmp_path / "chats.jsonl"
    reasons = {"s": "the chat template refuses it (no system here)", "9": "the chat template refuses it (hm)"}
    assert [row["id"] for row in run(folder, output, prompts=str(prompts))] == ["7", "8", "10", "11"]
    assert reasons_of(output) == reasons
    output.unlink()
    assert [row["id"] for row in run(folder, output, prompts=str(prompts))] == ["7", "8", "10", "11"]
    assert reasons_of(output) == reasons


def test_nothing_to_answer_is_refused(target, tmp_path):
    with pytest.raises(PeagleError, match="name a file with --prompts, or give --invent a number"):
        RegenerateArguments(model=str(target), output="chats.jsonl")
    for flags, words in (
        ({"endpoint": "http://localhost:8000", "dtype": "bfloat16"}, "--dtype is for a verifier in this process"),
        ({"output": "chats.json"}, r"--output chats.json must end in \.jsonl"),
        ({"prompts": "./chats.jsonl"}, r"--output chats\.jsonl is a file that is read here"),
        ({"exclude": ["chats.jsonl"]}, r"--output chats\.jsonl is a file that is read here"),
        ({"min_answer_tokens": 300}, "--min-answer-tokens 300 is more than --max-new-tokens 256"),
    ):
        with pytest.raises(PeagleError, match=words):
            RegenerateArguments(**{"model": str(target), "output": "chats.jsonl", "invent": 3} | flags)
    values = [-1.5, -1, 0, 0.5, 1, 1.5, math.nan]
    allowed = {
        **dict.fromkeys(("max_samples", "max_new_tokens", "concurrency", "batch_size"), (1,)),
        **dict.fromkeys(("invent", "top_k", "min_answer_tokens", "max_retries"), (0, 1)),
        "temperature": (0, 0.5, 1, 1.5),
        **dict.fromkeys(("invent_temperature", "request_timeout"), (0.5, 1, 1.5)),
        **dict.fromkeys(("min_p", "max_repetition"), (0, 0.5, 1)),
        "top_p": (0.5, 1),
    }
    finite = ("temperature", "invent_temperature", "request_timeout", *("min_p", "max_repetition", "top_p"))
    for name, kept in allowed.items():
        for value in [*values, *([math.inf] if name in finite else [])]:
            make = partial(RegenerateArguments, model="m", output="chats.jsonl", prompts="p.jsonl", **{name: value})
            if value in kept:
                make()
            else:
                with pytest.raises(PeagleError, match=f"--{name.replace('_', '-')} is {value} but must be "):
                    make()
    with pytest.raises(PeagleError, match=r"missing\.jsonl can't be read: there is no such file"):
        run(target, tmp_path / "chats.jsonl", prompts=str(tmp_path / "missing.jsonl"))


def test_the_command_line_makes_the_arguments():
    flags = "--model m --output o.jsonl --invent 3 --exclude a.jsonl b.jsonl --top-p 0.9 --dtype bfloat16"
    (arguments,) = HfArgumentParser(RegenerateArguments).parse_args_into_dataclasses(shlex.split(flags))
    assert arguments == RegenerateArguments(
        "m", "o.jsonl", invent=3, exclude=["a.jsonl", "b.jsonl"], top_p=0.9, dtype="bfloat16"
    )


# The bundle


@pytest.fixture(scope="module")
def bundle() -> dict[str, list[dict]]:
    return {path.stem: read_jsonl(path) for path in BUNDLE.glob("*.jsonl")}


def test_bundled_prompts_are_of_many_kinds(bundle):
    kinds = Counter(row["category"] for row in bundle["eval_prompts"])
    assert len(bundle["eval_prompts"]) == 80
    assert set(kinds.values()) == {10}
    assert Counter(row["category"] for row in bundle["test_prompts"]) == dict.fromkeys(kinds, 20)
    training = Counter(row["category"] for row in bundle["train_prompts"])
    assert len(training) == 10
    assert min(training.values()) >= 33
    assert kinds.keys() <= training.keys()
    everything = bundle["train_prompts"] + bundle["eval_prompts"] + bundle["test_prompts"]
    assert len({row["question_id"] for row in everything}) == len(everything)
    for row in everything:
        assert len(row["turns"]) in ((2, 3) if row["category"] == "multi_turn" else (1,))


def test_bundled_prompts_do_not_resemble_each_other(bundle):
    """Compared pair by pair, without the index that the command uses."""

    def words(row: dict) -> set[tuple[str, ...]]:
        turns = row.get("turns") or [m["content"] for m in row["messages"] if m["role"] == "user"]
        words = "".join(c if c.isalnum() or c == "_" else " " for c in " ".join(turns).lower()).split()
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    names = ("train_prompts", "eval_prompts", "test_prompts")
    grams = [words(row) for name in names for row in bundle[name]]
    for one, other in itertools.combinations(grams, 2):
        if shared := len(one & other):
            assert shared / (len(one) + len(other) - shared) <= 0.5


def test_bundled_chats_are_the_answers_to_the_prompts(bundle):
    turns = {str(row["question_id"]): row["turns"] for row in bundle["train_prompts"]}
    chats = bundle["train_chats"]
    assert len(chats) >= 240
    assert len({row["category"] for row in chats}) >= 8
    for row in chats:
        assert [m["content"] for m in row["messages"] if m["role"] == "user"] == turns[row["id"]]


def test_bundled_chats_are_sound(bundle):
    for row in bundle["train_chats"]:
        assert len(row["input_ids"]) == len(row["loss_mask"])
        assert set(row["loss_mask"]) == {0, 1}
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert all(answers)
        spans = answer_spans(row)
        assert len(spans) == len(answers)
        for span in spans:
            grams = [tuple(span[i : i + 4]) for i in range(len(span) - 3)]
            assert len(grams) - len(set(grams)) <= 0.3 * len(grams)
        assert row["finish_reason"] == ("stop" if spans[-1][-1] == 2 else "length")
        assert row["model"] == "SmolLM2-135M-Instruct"


def test_the_bundle_is_small():
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) < 6e6
