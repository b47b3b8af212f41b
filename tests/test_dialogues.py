"""`regenerate`, and the evaluation in this process, with templates and answers of other kinds than the demo's."""

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_templates import CHATML, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peagle_hf.data.prompts import Prompt
from peagle_hf.data.regenerate import RegenerateArguments, regenerate
from peagle_hf.data.tokenizer import ChatOptions, load_tokenizer
from peagle_hf.errors import PeagleError
from peagle_hf.evaluation.vllm_process import Job, _Conversations

PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
# As gpt-oss's and Cohere's: the verifier writes a header before its text, and its reasoning before that.
HEADED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|><|reply|>{{ m.content }}<|/reply|></s>"
    "{% else %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
SPECIAL = [
    "<|user|>",
    "<|end|>",
    "<|bot|>",
    "<|think|>",
    "<|/think|>",
    "<|reply|>",
    "<|/reply|>",
    "<|act|>",
    "<|/act|>",
]
ANSWER = ["<|think|>", "hm", "<|/think|>", "<|reply|>", "well", "<|/reply|>", "</s>"]
CALL = ["<|act|>", "look", "<|/act|>", "</s>"]


def save_chain(folder: Path, tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> Path:
    """Save a model whose next token depends on the last one alone: of these tokens, the next one."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token, follower in pairwise(tokenizer.convert_tokens_to_ids(tokens)):
            model.lm_head.weight[follower, token] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_headed(folder: Path, answer: list[str]) -> Path:
    """Save a model that always gives this answer."""
    words = ["<unk>", "</s>", *SPECIAL, "hm", "well", "look", "one", "two"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("</s>", *SPECIAL)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = HEADED
    return save_chain(folder, fast, ["<|bot|>", *answer])


def asked(folder: Path, tmp_path: Path, *chats: list[str], **arguments) -> tuple[list[dict], dict[str, str]]:
    """The rows that `regenerate` writes of chats, given as their user turns, and the reasons of the dropped ones."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in chats))
    output = tmp_path / "chats.jsonl"
    common = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 8, "max_repetition": 1.0}
    regenerate(RegenerateArguments(model=str(folder), output=str(output), **common | arguments))
    dropped = json.loads(output.with_suffix(".report.json").read_text())["dropped"]
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return rows, {entry["id"]: entry["reason"] for entry in dropped}


def test_a_template_that_wants_parts_shows_what_is_said(tmp_path):
    folder = save_chain(tmp_path / "model", make_tokenizer(PARTS, eos="<|im_end|>"), ["\u010a", "W", "<|im_end|>"])
    (row,), _ = asked(folder, tmp_path, ["Hello", "How are you?"])
    tokenizer = load_tokenizer(str(folder), False)
    first = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["input_ids"]) == f"{first}W<|im_end|>\n{second}W<|im_end|>"
    assert [message["content"] for message in row["messages"]] == ["Hello", "W", "How are you?", "W"]
    assert conversations(folder, ["Hello"]).inputs(0)["prompt_token_ids"] == tokenizer.encode(first)
    with pytest.raises(PeagleError, match="the invented prompt is too short"):
        asked(folder, tmp_path / "invented", invent=2, prompts=None)


def conversations(folder: Path, turns: list[str], **options) -> _Conversations:
    """The chats of an evaluation in this process, before vLLM is asked."""
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=999))
    llm = SimpleNamespace(llm_engine=engine, renderer=None)
    job = Job([Prompt("1", "chat", [], turns)], [], 8, options=ChatOptions(**options))
    return _Conversations(llm, load_tokenizer(str(folder), False), job, 0.0, None)


def test_the_end_of_an_answer_takes_in_the_white_space_after_it(tmp_path):
    """As when a server encodes the whole chat: Phi's <|end|> swallows the line break before the next header."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer(template, strip="r", eos="<|end|>")
    folder = save_chain(tmp_path / "model", tokenizer, ["<|assistant|>", "W", "<|end|>"])
    (row,), _ = asked(folder, tmp_path, ["Hello", "How?"])
    text = "<|user|>Hello<|end|>\n<|assistant|>W<|end|>\n<|user|>How?<|end|>\n<|assistant|>W<|end|>"
    assert row["input_ids"] == tokenizer.encode(text)
    assert "\n" not in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize(
    "before", ["", "{{ '<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '' }}"]
)
def test_the_marks_of_reasoning_stay_in_the_text_where_they_are_special_tokens(tmp_path, before):
    """By them the template takes the reasoning out of earlier answers; an empty thought is no header of the answer."""
    template = CHATML.replace("{{ m.content }}", before + "{{ m.content.split('</think>')[-1] }}")
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    answer = ["<think>", "H", "<|sep|>", "</think>", "W", "<|im_end|>"]
    folder = save_chain(tmp_path / "model", tokenizer, ["\u010a", *answer])
    rows, _ = asked(folder, tmp_path, ["Hello", "How?"])
    assert rows[-1]["messages"][1]["content"] == "<think>H</think>W"
    text = tokenizer.decode(rows[-1]["input_ids"])
    assert text.startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nW<|im_end|>\n")
    assert text.endswith("".join(answer))


def test_a_later_turn_follows_the_text_behind_the_reasoning(tmp_path):
    folder = save_headed(tmp_path / "model", ANSWER)
    rows, dropped = asked(folder, tmp_path, ["one", "two"])
    tokenizer = load_tokenizer(str(folder), False)
    assert not dropped
    first, second = (re.sub(r"\s", "", tokenizer.decode(row["input_ids"])) for row in rows)
    answer = "".join(ANSWER)
    assert first == f"<|user|>one<|end|><|bot|>{answer}"
    assert second == f"<|user|>one<|end|><|bot|><|reply|>well<|/reply|></s><|user|>two<|end|><|bot|>{answer}"
    assert [message["content"] for message in rows[-1]["messages"]] == ["one", "well", "two", "well"]


def test_no_turn_follows_an_answer_that_has_no_text(tmp_path):
    folder = save_headed(tmp_path / "model", CALL)
    rows, dropped = asked(folder, tmp_path, ["one"], ["one two", "two"])
    assert [row["messages"][-1]["content"] for row in rows] == ["<|act|> look <|/act|>"]
    assert dropped == {"1": "an answer has no text, only reasoning or a tool call, so no user turn can follow it"}


def test_an_evaluation_in_this_process_goes_on_with_the_text_that_a_server_gives(tmp_path):
    folder = save_headed(tmp_path / "model", ANSWER)
    chats, tokenizer = conversations(folder, ["one", "two"]), load_tokenizer(str(folder), False)

    def take(*words: str, reason: str = "length") -> str:
        ids = tokenizer.convert_tokens_to_ids(words)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answer = SimpleNamespace(text=text, token_ids=ids, finish_reason=reason)
        metrics = SimpleNamespace(first_token_latency=0.0)
        chats._take(0, SimpleNamespace(outputs=[answer], prompt_token_ids=[1], metrics=metrics), 1.0)
        return chats.chats[0].pop().text

    assert take(*ANSWER, reason="stop") == "well"
    assert take(*ANSWER[:5]) == "well"
    assert take(*ANSWER[:2]) == ""
    chats.job = Job([], [], 8, token_ids=[[1]])
    assert take(*ANSWER) == "hm well"


def test_a_model_without_an_end_of_answer_is_refused(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = None
    folder = save_chain(tmp_path / "model", tokenizer, [])
    with pytest.raises(PeagleError, match=r"names a token that ends an answer.*Add eos_token_id"):
        asked(folder, tmp_path, ["Hello"])
