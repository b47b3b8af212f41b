"""Step 1: what is learnt, token by token, under several chat templates; what is refused; what is written."""

import copy
import errno
import json
import logging
import math
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

from peagle_hf.data import sources
from peagle_hf.data.chats import Chat, Unlearnable, read_chat
from peagle_hf.data.inspect_dataset import DataArguments, inspect_data
from peagle_hf.data.loss_mask import ChatTokenizer
from peagle_hf.data.prepare import PrepareArguments, prepare
from peagle_hf.data.prompts import read_prompts
from peagle_hf.data.tokenizer import tokenizer_fingerprint
from peagle_hf.errors import PeagleError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<s>{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|eom|>' if m.tool_calls else '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Closes a finished chat with one more token, which generation never reaches.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
# Shows reasoning only after the last question, and an empty thought in a last answer that has none.
QWEN = (
    "{% set ns = namespace(question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.question and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' }}{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought, which a recorded answer does not show.
R1 = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

SPECIAL_TOKENS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>", "<|eom|>"),
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>"),
]
SENTENCES = [
    "Hello there, how are you today?\n\nI am well, thank you; and you?\n",
    "The quick brown fox jumps over the lazy dog. The dog does not mind, and the fox is gone.",
    "user assistant system tool think role content name arguments the weather in Paris is fine, isn't it?",
    "Paragraphs.\n\n\nFar apart.\n\n\nEach alone.",
]
HELLO = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Well, hello there."},
    {"role": "user", "content": "Who is lazy?"},
    {"role": "assistant", "content": "The dog\n"},
]
WEATHER = {"name": "weather", "arguments": {"city": "Paris"}}
REPO = Path(__file__).parents[1]


def make_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(BASE_TOKENIZER)
    tokenizer.chat_template = chat_template
    return tokenizer


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    )
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>", "<tool_call>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BASE_TOKENIZER = train_tokenizer()


def runs(tokenizer: PreTrainedTokenizerFast, input_ids, loss_mask) -> list[tuple[str, int]]:
    """The row as text, cut where the loss mask changes."""
    pairs = zip(loss_mask.tolist(), input_ids.tolist(), strict=True)
    return [(tokenizer.decode([i for _, i in run]), mask) for mask, run in groupby(pairs, key=lambda pair: pair[0])]


def tokenized(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> list[tuple]:
    """Ids and loss mask of each row of a chat of which no answer is left out."""
    (masked,) = ChatTokenizer(tokenizer).mask([chat])
    if masked.left_out:
        raise Unlearnable(masked.left_out[0].reason)
    return [(row.input_ids, row.loss_mask) for row in masked.samples]


def tokenized_runs(chat_template: str, messages: list[dict], tools=None) -> list[list[tuple[str, int]]]:
    tokenizer = make_tokenizer(chat_template)
    chat = read_chat({"messages": messages, "tools": tools}, "here")
    return [runs(tokenizer, *row) for row in tokenized(tokenizer, chat)]


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (
            CHATML,
            [
                ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 0),
                ("Well, hello there.<|im_end|>", 1),
                ("\n<|im_start|>user\nWho is lazy?<|im_end|>\n<|im_start|>assistant\n", 0),
                ("The dog\n<|im_end|>", 1),
                ("\n", 0),
            ],
        ),
        (
            MARKED,
            [
                ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 0),
                ("Well, hello there.<|im_end|>", 1),
                ("\n<|im_start|>user\nWho is lazy?<|im_end|>\n<|im_start|>assistant\n", 0),
                ("The dog\n<|im_end|>", 1),
                ("\n", 0),
            ],
        ),
        (
            LLAMA,
            [
                (
                    "<s><|start_header|>user<|end_header|>\n\nHello<|eot|><|start_header|>assistant<|end_header|>\n\n",
                    0,
                ),
                ("Well, hello there.<|eot|>", 1),
                (
                    "<|start_header|>user<|end_header|>\n\nWho is lazy?<|eot|>"
                    "<|start_header|>assistant<|end_header|>\n\n",
                    0,
                ),
                ("The dog<|eot|>", 1),
            ],
        ),
        (
            MISTRAL,
            [
                ("<s>[INST] Hello [/INST]", 0),
                (" Well, hello there.</s>", 1),
                ("[INST] Who is lazy? [/INST]", 0),
                (" The dog\n</s>", 1),
            ],
        ),
        (
            PHI,
            [
                ("<|user|>\nHello<|end|>\n<|assistant|>\n", 0),
                ("Well, hello there.<|end|>", 1),
                ("\n<|user|>\nWho is lazy?<|end|>\n<|assistant|>\n", 0),
                ("The dog\n<|end|>", 1),
                ("\n</s>", 0),
            ],
        ),
        (
            R1,
            [
                ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 0),
                ("Well, hello there.<|im_end|>", 1),
                ("\n<|im_start|>user\nWho is lazy?<|im_end|>\n<|im_start|>assistant\n", 0),
                ("The dog\n<|im_end|>", 1),
                ("\n", 0),
            ],
        ),
    ],
    ids=["chatml", "marked", "llama", "mistral", "phi", "r1"],
)
def test_every_answer_of_a_chat_is_learnt_and_nothing_else(chat_template, expected):
    assert tokenized_runs(chat_template, HELLO) == [expected]


def test_a_row_holds_the_tokens_of_the_whole_rendering():
    tokenizer = make_tokenizer(CHATML)
    ((input_ids, loss_mask),) = tokenized(tokenizer, Chat(HELLO, None))
    assert input_ids.tolist() == tokenizer.apply_chat_template(HELLO)["input_ids"]
    assert (input_ids.dtype, loss_mask.dtype, len(loss_mask)) == ("int32", "int8", len(input_ids))


def test_marks_of_the_template_agree_with_transformers():
    tokenizer = make_tokenizer(MARKED)
    ((_, loss_mask),) = tokenized(tokenizer, Chat(HELLO, None))
    encoding = tokenizer.apply_chat_template(HELLO, return_dict=True, return_assistant_tokens_mask=True)
    assert loss_mask.tolist() == encoding["assistant_masks"]


def test_only_what_the_template_marks_is_learnt():
    without_end = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    (row,) = tokenized_runs(without_end, HELLO)
    assert [text for text, learnt in row if learnt] == ["Well, hello there.", "The dog\n"]
    with pytest.raises(Unlearnable, match="no answer"):
        tokenized_runs(MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'"), HELLO)


def test_an_answer_whose_reasoning_is_stripped_later_has_a_row_of_its_own():
    messages = [dict(message) for message in HELLO]
    messages[1]["reasoning_content"] = "A greeting."
    messages[3]["reasoning"] = "There is a fox, too."  # the other name of the field
    assert tokenized_runs(QWEN, [*messages, {"role": "user", "content": "Why?"}]) == [
        [
            ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 0),
            ("<think>\nA greeting.\n</think>\n\nWell, hello there.<|im_end|>", 1),
            ("\n", 0),
        ],
        [
            (
                "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nWell, hello there.<|im_end|>\n"
                "<|im_start|>user\nWho is lazy?<|im_end|>\n<|im_start|>assistant\n",
                0,
            ),
            ("<think>\nThere is a fox, too.\n</think>\n\nThe dog\n<|im_end|>", 1),
            ("\n", 0),
        ],
    ]


def test_marks_of_an_answer_with_a_row_of_its_own_are_not_learnt_again():
    thinking = "<think>{{ m.reasoning }}</think>"
    marked = CHATML.replace("{{ m.content }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}")
    marked = marked.replace(
        "{% generation %}", "{% if loop.last and m.reasoning %}" + thinking + "{% endif %}{% generation %}"
    )
    messages = [dict(message, reasoning="Hm.") if message["role"] == "assistant" else message for message in HELLO]
    rows = tokenized_runs(marked, messages)
    assert [[text for text, learnt in row if learnt] for row in rows] == [
        ["Well, hello there.<|im_end|>"],
        ["The dog\n<|im_end|>"],
    ]


def test_what_the_template_adds_to_an_answer_is_learnt_with_it():
    rows = tokenized_runs(QWEN, HELLO)
    assert [[text for text, learnt in row if learnt] for row in rows] == [
        ["<think>\n\n</think>\n\nWell, hello there.<|im_end|>"],
        ["<think>\n\n</think>\n\nThe dog\n<|im_end|>"],
    ]


def test_answers_with_the_same_rendering_stay_together_and_tool_results_are_not_learnt():
    messages = [
        {"role": "user", "content": "How is the weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I must look.",
            "tool_calls": [{"type": "function", "function": {**WEATHER, "arguments": '{"city": "Paris"}'}}],
        },
        {"role": "tool", "content": "fine"},
        {"role": "assistant", "reasoning_content": "It is fine.", "content": "It is fine in Paris."},
        {"role": "user", "content": "Thank you"},
        {"role": "assistant", "reasoning_content": "Thanks.", "content": "You are well!"},
    ]
    call = f"<tool_call>\n{json.dumps(WEATHER)}\n</tool_call>"
    first, second = tokenized_runs(QWEN, messages)
    assert first == [
        ("<|im_start|>user\nHow is the weather?<|im_end|>\n<|im_start|>assistant\n", 0),
        (f"<think>\nI must look.\n</think>\n\n\n{call}<|im_end|>", 1),
        ("\n<|im_start|>user\nfine<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\nIt is fine.\n</think>\n\nIt is fine in Paris.<|im_end|>", 1),
        ("\n", 0),
    ]
    assert [text for text, learnt in second if learnt] == ["<think>\nThanks.\n</think>\n\nYou are well!<|im_end|>"]


def test_an_answer_may_end_with_another_token_than_plain_ones():
    messages = [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [{"function": WEATHER}]}]
    (row,) = tokenized_runs(LLAMA, messages)
    assert row[-1] == (f"{json.dumps(WEATHER)}<|eom|>", 1)


def test_an_answer_may_begin_like_the_thought_that_the_prompt_opens():
    (row,) = tokenized_runs(R1, [HELLO[0], {"role": "assistant", "content": "<thing>"}])
    assert row[1] == ("<thing><|im_end|>", 1)


def test_without_an_end_of_turn_token_the_content_is_learnt():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (row,) = tokenized_runs(template, HELLO)
    # The newline after "The dog" makes one token with the template's own.
    assert [text for text, learnt in row if learnt] == [" Well, hello there.", " The dog"]


def test_a_token_across_the_border_of_header_and_answer_is_not_learnt():
    # Two newlines are one token: here the header's own and the answer's first.
    assert BASE_TOKENIZER.convert_tokens_to_ids("ĊĊ") is not None
    (row,) = tokenized_runs(CHATML, [HELLO[0], {"role": "assistant", "content": "\n\nHello"}])
    assert row == [
        ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n\n", 0),
        ("\nHello<|im_end|>", 1),
        ("\n", 0),
    ]


@pytest.mark.parametrize("marks", [("{% generation %}", "{% endgeneration %}"), ("", "")], ids=["marked", "plain"])
def test_spaces_that_a_tokenizer_trims_from_offsets(marks):
    opening, closing = marks
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST] {% else %}"
        + opening + "{{ m.content }}</s>" + closing + "{% endif %}{% endfor %}"
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ((input_ids, loss_mask),) = tokenized(tokenizer, Chat([HELLO[0], {"role": "assistant", "content": " fox"}], None))
    assert runs(tokenizer, input_ids, loss_mask) == [("[INST]Hello[/INST] ", 0), (" fox</s>", 1)]


@pytest.mark.parametrize(
    ("chat_template", "messages", "reason"),
    [
        (CHATML, HELLO[:1], "no answer"),
        (CHATML, HELLO[1:3], "no answer"),
        (CHATML, [], "no answer"),
        (MISTRAL, [HELLO[0], *HELLO], "roles must alternate"),
        (CHATML, [HELLO[0], {**HELLO[1], "tool_calls": [WEATHER]}], "does not show tool calls"),
        (CHATML, [HELLO[0], {**HELLO[1], "reasoning": "Hm."}], "does not show reasoning"),
        (CHATML, [HELLO[0], {"role": "assistant", "content": "half \ud83d"}], "surrogate"),
        (CHATML, [{"role": "user", "content": [{"type": "image", "url": "fox.png"}]}, HELLO[1]], "other than text"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for", 1), HELLO, "changes the conversation"),
    ],
    ids=["question", "answer first", "empty", "refused", "tool call", "reasoning", "surrogate", "image", "unstable"],
)
def test_a_chat_that_cannot_be_learnt_from_says_why(chat_template, messages, reason):
    with pytest.raises(Unlearnable, match=reason):
        tokenized_runs(chat_template, messages)


# Answers begin with a letter: a space or newline could merge with the header, as tested above.
words = st.text(st.characters(codec="utf-8", exclude_characters="<>[]\ue000"), max_size=20)
answers = st.builds("{}{}".format, st.sampled_from("aTé界😀"), words)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([CHATML, MARKED, PHI, MISTRAL, R1]), st.lists(st.tuples(words, answers), min_size=1, max_size=4))
def test_learnt_text_is_exactly_the_answers(chat_template, exchanges):
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]
    (row,) = tokenized_runs(chat_template, messages)
    before, end = {PHI: ("", "<|end|>"), MISTRAL: (" ", "</s>")}.get(chat_template, ("", "<|im_end|>"))
    assert [text for text, learnt in row if learnt] == [f"{before}{answer}{end}" for _, answer in exchanges]


def test_share_gpt_and_messages_read_alike():
    share_gpt = {
        "id": "x",
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hello", "markdown": None},
            {"from": "gpt", "value": "Well"},
            {"from": "function_response", "value": None, "tool_calls": []},
            {"from": "chatgpt", "value": "Hello"},
        ],
    }
    names = ["system", "user", "assistant", "tool", "assistant"]
    contents = ["Be kind.", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], "Well", "", "Hello"]
    messages = [{"role": name, "content": content} for name, content in zip(names, contents, strict=True)]
    assert read_chat(share_gpt, "a") == read_chat({"messages": messages, "conversations": None, "tools": "[]"}, "b")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "Hello"}, "the fields are text"),
        ({"messages": "Hello"}, "messages must be a list of messages, but is str"),
        ({"messages": ["Hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [HELLO[0], {"role": "narrator", "content": "x"}]}, r"messages\[1\] has the role 'narrator'"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\] has the role None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content must be text"),
        ({"messages": [{**HELLO[1], "reasoning": 3}]}, r"messages\[0\].reasoning must be text"),
        ({"messages": [{**HELLO[1], "tool_calls": "x"}]}, r"messages\[0\].tool_calls must be a list"),
        ({"messages": [{**HELLO[1], "tool_calls": [{}]}]}, r"tool_calls\[0\].function must be an object with a name"),
        ({"messages": HELLO, "tools": "{"}, "tools is not valid JSON"),
        ({"messages": HELLO, "tools": ["x"]}, "tools must be a list of JSON objects"),
    ],
)
def test_a_malformed_row_stops_with_its_place_and_field(row, problem):
    with pytest.raises(PeagleError, match=problem) as caught:
        read_chat(row, "chats.jsonl, line 7")
    assert str(caught.value).startswith("chats.jsonl, line 7: ")


# From here on: the command, with files.


@pytest.fixture
def model(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def arguments(tmp_path, model):
    """Arguments for six chats, the last of which has no answer."""
    rows = [{"messages": [*hello(i), {"role": "user", "content": "And you?"}]} for i in range(5)]
    data = write_lines(tmp_path / "chats.jsonl", [*rows, {"messages": HELLO[:1]}])
    return PrepareArguments(model=model, data=[data], output=str(tmp_path / "prepared"))


def hello(number: int) -> list[dict]:
    """A chat unlike those of other numbers."""
    return [{"role": "user", "content": f"Hello, I am {number}"}, *HELLO[1:]]


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(folder: Path) -> dict[str, list]:
    return load_from_disk(folder).with_format(None)[:]


def changed(arguments: PrepareArguments, **changes) -> PrepareArguments:
    return PrepareArguments(**(vars(arguments) | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_in_memory_is_prepared_as_a_file_is(arguments, tmp_path):
    rows = [json.loads(line) for line in Path(arguments.data[0]).read_text().splitlines()]
    from_file = prepared(prepare(arguments))
    in_memory = replace(arguments, data=Dataset.from_list(rows), output=str(tmp_path / "memory"))
    assert prepared(prepare(in_memory)) == from_file
    assert prepared(prepare(in_memory)) == from_file  # the dataset is kept as it is
    with pytest.raises(PeagleError, match="overwrite"):
        prepare(replace(in_memory, data=[Dataset.from_list(rows[1:])]))
    assert "Dataset in memory" in (tmp_path / "memory" / "config.yaml").read_text()
    turns = [prompt.turns for prompt in read_prompts(in_memory.data[0], [])]
    assert turns == [prompt.turns for prompt in read_prompts(arguments.data[0], [])]
    for other in (DatasetDict(train=in_memory.data[0]), rows):
        with pytest.raises(PeagleError, match=f"one is a {type(other).__name__}"):
            prepare(replace(in_memory, data=[other]))


def test_paths_and_a_single_source_are_taken_from_python(arguments, tmp_path):
    given = replace(arguments, model=Path(arguments.model), data=Path(arguments.data[0]), output=tmp_path / "out")
    assert prepared(prepare(given)) == prepared(prepare(arguments))
    assert vars(given) == vars(arguments) | {"output": str(tmp_path / "out")}
    with pytest.raises(PeagleError, match="--preference is 'both' but must be one of chosen, rejected"):
        replace(arguments, preference="both")


def test_a_prepared_dataset_is_no_data(arguments, tmp_path):
    prepare(arguments)
    with pytest.raises(PeagleError, match="prepared is a prepared dataset already"):
        prepare(changed(arguments, data=[arguments.output], output=str(tmp_path / "again")))


def test_the_folder_that_prepare_writes(arguments, caplog):
    caplog.set_level(logging.INFO)
    folder = prepare(arguments)
    assert sorted(contents(folder)) == [
        *(
            "config.yaml",
            "data-00000-of-00001.arrow",
            "dataset_info.json",
            "prepare.json",
            "skipped.json",
            "state.json",
        ),
        "token_freq.pt",
    ]
    dataset = load_from_disk(folder)
    assert {name: str(feature) for name, feature in dataset.features.items()} == {
        "input_ids": "List(Value('int32'))",
        "loss_mask": "List(Value('int8'))",
        "seq_len": "Value('int64')",
        "conversation_id": "Value('int64')",
    }
    assert all(isinstance(value, torch.Tensor) for value in dataset[0].values())
    assert sorted(prepared(folder)["conversation_id"]) == [0, 1, 2, 3, 4]
    assert all(len(row["input_ids"]) == len(row["loss_mask"]) == row["seq_len"] for row in dataset)

    learnt = Counter(
        i for row in dataset for i, m in zip(row["input_ids"].tolist(), row["loss_mask"].tolist(), strict=True) if m
    )
    assert torch.load(folder / "token_freq.pt", weights_only=True) == learnt
    where = f"{arguments.data[0]}, line 6"
    skipped = [{"conversation_id": 5, "row": where, "reason": "no answer of the assistant"}]
    assert json.loads((folder / "skipped.json").read_text()) == skipped
    record = json.loads((folder / "prepare.json").read_text())
    assert record["model"] == arguments.model
    assert record["tokenizer_fingerprint"] == tokenizer_fingerprint(AutoTokenizer.from_pretrained(arguments.model))
    counts = {
        "conversations_in_data": 6,
        "conversations_read": 6,
        "rows": 5,
        "tokens": sum(prepared(folder)["seq_len"]),
        "learnt_tokens": learnt.total(),
        "truncated_rows": 0,
        "cut_tokens": 0,
    }
    assert record["counts"] == counts | {
        "copied_conversations": 0,
        "skipped": {"no answer of the assistant": 1},
        "sources": [{"data": arguments.data[0], **counts}],
    }
    assert f"no answer of the assistant: 1 ({where})" in caplog.text


def test_the_command_line_of_the_tutorial():
    line = "--model Qwen/Qwen3-8B --data sharegpt --output ./out --max-samples 5000 --seq-length 4096"
    aliases = "--num-preprocessing-workers 8 --minimum-valid-tokens 2"
    (arguments,) = HfArgumentParser(PrepareArguments).parse_args_into_dataclasses(f"{line} {aliases}".split())
    assert arguments == PrepareArguments(
        *("Qwen/Qwen3-8B", ["sharegpt"], "./out"), max_samples=5000, seq_length=4096, num_workers=8, min_learnt_tokens=2
    )


@pytest.mark.slow
def test_a_real_model(smollm2, tmp_path):
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": HELLO}])
    (row,) = load_from_disk(prepare(PrepareArguments(str(smollm2), [data], str(tmp_path / "out"))))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert row["input_ids"].tolist() == tokenizer.apply_chat_template(HELLO)["input_ids"]
    learnt = [text for text, learnt in runs(tokenizer, row["input_ids"], row["loss_mask"]) if learnt]
    assert learnt == ["Well, hello there.<|im_end|>", "The dog\n<|im_end|>"]


def test_rows_of_one_conversation_share_its_id(arguments, model):
    make_tokenizer(QWEN).save_pretrained(model)
    ids = prepared(prepare(arguments))["conversation_id"]
    assert sorted(ids) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert ids[::2] == ids[1::2]


def test_the_number_of_workers_changes_nothing(arguments, tmp_path):
    one, two = (prepare(changed(arguments, output=str(tmp_path / str(n)), num_workers=n)) for n in (1, 2))
    assert prepared(one) == prepared(two)
    assert contents(one)["skipped.json"] == contents(two)["skipped.json"]


def test_max_samples_takes_the_first_of_a_seeded_order(arguments, tmp_path):
    rows = [{"messages": hello(10 + number)} for number in range(40)]
    data = [write_lines(tmp_path / "many.jsonl", rows), *arguments.data]

    def ids(seed: int, max_samples: int | None) -> list[int]:
        output = str(tmp_path / f"{seed}-{max_samples}")
        folder = prepare(changed(arguments, data=data, output=output, seed=seed, max_samples=max_samples))
        return prepared(folder)["conversation_id"]

    everything = ids(0, None)
    assert sorted(everything) == list(range(45))
    some = ids(0, 20)
    assert len(some) == 20
    assert some == everything[: len(some)]
    assert some != ids(1, 20)


def test_max_samples_counts_rows(arguments, model, tmp_path, caplog, monkeypatch):
    """Each chat has two rows; the fifth row is the first of the third chat, whose second is left out and counted."""
    make_tokenizer(QWEN).save_pretrained(model)
    everything = prepared(prepare(arguments))
    assert len(everything["seq_len"]) == 10
    caplog.set_level(logging.INFO)
    five = changed(arguments, output=str(tmp_path / "five"), max_samples=5)
    folder = prepare(five)
    assert prepared(folder) == {name: values[:5] for name, values in everything.items()}
    counts = json.loads((folder / "prepare.json").read_text())["counts"]
    beyond = "beyond the 5 samples of --max-samples"
    assert counts["rows"] == 5
    assert counts["skipped"][beyond] == 1
    assert counts["conversations_read"] - sum(counts["skipped"].values()) == 2
    assert f"{beyond}: 1 ({arguments.data[0]}, line " in caplog.text
    assert "answers 5 are trained on whole, 0 cut, 1 beyond --max-samples and 0 left out." in caplog.text
    with pytest.raises(PeagleError, match="max_samples was 5, is 6"):
        prepare(changed(five, max_samples=6))

    monkeypatch.setattr("peagle_hf.data.samples.LEAST_READ", 1)  # how many are read at a time changes nothing
    in_pieces = prepare(changed(five, output=str(tmp_path / "in_pieces")))
    assert prepared(in_pieces) == prepared(folder)
    assert json.loads((in_pieces / "prepare.json").read_text())["counts"] == counts
    assert contents(in_pieces)["skipped.json"] == contents(folder)["skipped.json"]
    more = prepare(changed(five, output=str(tmp_path / "more"), max_samples=100))
    assert prepared(more) == everything


def test_rows_with_the_same_conversation_stay_together(arguments, tmp_path):
    """Also where they are not adjacent; never across sources, nor text with numbers."""
    names = ["a", None, "b", "a", 1, "1", None, "a"]
    rows = [
        {"messages": hello(number)} | ({} if name is None else {"conversation": name})
        for number, name in enumerate(names)
    ]
    data = [write_lines(tmp_path / f"{number}.jsonl", [*rows, {"messages": hello(99 + number)}]) for number in range(2)]
    folder = prepare(changed(arguments, data=data))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    numbers_of = {}
    for row in load_from_disk(folder).with_format(None):
        number = int(tokenizer.decode(row["input_ids"]).split("I am ")[1].split("<")[0])
        numbers_of.setdefault(row["conversation_id"], []).append(number)
    # The rows of the second source are copies of those of the first, so they share its conversations.
    assert numbers_of[0] == [0, 3, 7] * 2
    assert sorted(sorted(set(numbers)) for numbers in numbers_of.values()) == [
        *([0, 3, 7], [1], [2], [4], [5], [6], [99], [100])
    ]
    record = json.loads((folder / "prepare.json").read_text())["counts"]
    assert record["conversations_in_data"] == 14
    assert [source["conversations_in_data"] for source in record["sources"]] == [7, 7]
    assert record["copied_conversations"] == 6

    ids = prepared(prepare(changed(arguments, data=data[:1], output=str(tmp_path / "one"))))["conversation_id"]
    assert len(set(ids)) == 7
    assert all(ids[place : place + 3] == [0] * 3 for place in [ids.index(0)])  # the tokens stand side by side
    cut = prepare(changed(arguments, data=data[:1], output=str(tmp_path / "cut"), max_samples=ids.index(0) + 2))
    assert prepared(cut)["conversation_id"] == ids[: ids.index(0) + 2]
    assert json.loads((cut / "skipped.json").read_text())[-1]["reason"].startswith("beyond the")


def test_a_hub_dataset_names_conversations_too(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    rows = [{"messages": hello(number), "conversation": number % 2} for number in range(4)]
    Dataset.from_list(rows).to_parquet("org/name/train.parquet")
    assert sorted(prepared(prepare(changed(arguments, data=["org/name"])))["conversation_id"]) == [0, 0, 1, 1]


@pytest.mark.parametrize("value", [1.5, True, {}])
def test_a_conversation_is_named_by_text_or_an_integer(arguments, value):
    write_lines(Path(arguments.data[0]), [{"messages": HELLO}, {"messages": HELLO, "conversation": value}])
    with pytest.raises(PeagleError, match=r"line 2: conversation must be text or an integer"):
        prepare(arguments)


def test_copies_of_a_chat_are_one_conversation(arguments, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"messages": hello(number % 3)} for number in range(9)]
    write_lines(Path(arguments.data[0]), rows)
    folder = prepare(arguments)
    assert sorted(prepared(folder)["conversation_id"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "6 conversations are copies of others" in caplog.text


HALF = "cut \ud83d"
WITH_HALVES = {
    "question": [{"role": "user", "content": HALF}, HELLO[1]],
    "answer": [HELLO[0], {"role": "assistant", "content": HALF}],
    "system": [{"role": "system", "content": HALF}, *HELLO],
    "part": [{"role": "user", "content": [{"type": "text", "text": HALF}]}, HELLO[1]],
    "reasoning": [HELLO[0], HELLO[1] | {"reasoning_content": HALF}],
    "argument": [HELLO[0], HELLO[1] | {"tool_calls": [{"function": WEATHER | {"arguments": {"city": HALF}}}]}],
    "encoded": [HELLO[0], HELLO[1] | {"tool_calls": [{"function": WEATHER | {"arguments": json.dumps({"c": HALF})}}]}],
    "call": [HELLO[0], HELLO[1] | {"tool_calls": [{"function": WEATHER | {"name": HALF}}]}],
    "name": [HELLO[0] | {"name": HALF}, HELLO[1]],
    "refused": [*HELLO[:2], {"role": "assistant", "content": HALF}],
}
SHOWING_ALL = (
    "{{ tools | tojson }}"
    + QWEN.replace("{{ m.content }}", "{{ m.name }}{{ m.content }}")
    + "{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}"
    "{{ raise_exception(m.content) }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_half_a_surrogate_pair_anywhere_leaves_out_the_answers_after_it(arguments, model, num_workers):
    make_tokenizer(SHOWING_ALL).save_pretrained(model)
    tools = [{"name": "weather", "description": HALF}]
    rows = [*({"messages": messages} for messages in WITH_HALVES.values()), {"messages": HELLO, "tools": tools}]
    write_lines(Path(arguments.data[0]), [{"messages": hello(1)}, *rows])
    folder = prepare(changed(arguments, num_workers=num_workers))
    skipped = json.loads((folder / "skipped.json").read_text())
    lines = {entry["row"].partition(", messages")[0]: entry["reason"] for entry in skipped}
    assert [*sorted(lines)] == sorted(f"{arguments.data[0]}, line {2 + line}" for line in range(len(rows)))
    refused = f"{arguments.data[0]}, line {2 + [*WITH_HALVES].index('refused')}"
    assert lines.pop(refused) == "the chat template refuses it (cut \\ud83d)"
    assert set(lines.values()) == {"it holds half a surrogate pair, which is no text"}
    # The first of its two answers is there before the half.
    assert set(prepared(folder)["conversation_id"]) == {0, 1 + [*WITH_HALVES].index("refused")}


@pytest.fixture
def three_sources(arguments, tmp_path) -> PrepareArguments:
    """400, 300 and 300 conversations, told apart by how often their answer says fox."""
    data = []
    for number, size in enumerate((400, 300, 300)):
        answer = {"role": "assistant", "content": " ".join(["fox"] * (number + 1))}
        rows = [{"messages": [{"role": "user", "content": f"No {row}"}, answer]} for row in range(size)]
        data.append(write_lines(tmp_path / f"source_{number}.jsonl", rows))
    return changed(arguments, data=data)


def sources_of(folder: Path) -> list[dict]:
    return json.loads((folder / "prepare.json").read_text())["counts"]["sources"]


def test_sources_are_mixed_by_weight(three_sources, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    arguments = changed(three_sources, weights=[5, 3, 2], max_samples=400)
    folder = prepare(arguments)
    rows = prepared(folder)
    assert len(rows["conversation_id"]) == len(set(rows["conversation_id"])) == 400
    found = Counter(int(id_ >= 400) + int(id_ >= 700) for id_ in rows["conversation_id"])
    sources = sources_of(folder)
    for number, (weight, source) in enumerate(zip([0.5, 0.3, 0.2], sources, strict=True)):
        assert source["data"] == arguments.data[number]
        assert source["conversations_read"] == source["rows"] == found[number] == pytest.approx(400 * weight, abs=40)
        assert f"{arguments.data[number]}: {found[number] / 400:.1%} of the conversations ({weight:.1%} wanted)" in (
            caplog.text
        )
    answers = Counter(sum(mask) for mask in rows["loss_mask"])
    assert [answers[length] for length in sorted(answers)] == [found[number] for number in range(3)]
    assert sum(source["tokens"] for source in sources) == sum(rows["seq_len"])
    assert "has run out" not in caplog.text
    early = Counter(int(id_ >= 400) + int(id_ >= 700) for id_ in rows["conversation_id"][:100])
    assert early[0] == pytest.approx(50, abs=20), "the sources are spread over the whole dataset"

    again = prepared(prepare(changed(arguments, output=str(tmp_path / "again"), num_workers=2)))
    assert again == rows
    other = prepared(prepare(changed(arguments, output=str(tmp_path / "other"), seed=1)))
    assert other["conversation_id"] != rows["conversation_id"]
    scaled = prepared(prepare(changed(arguments, output=str(tmp_path / "scaled"), weights=[0.5, 0.3, 0.2])))
    assert scaled["conversation_id"] == rows["conversation_id"]
    with pytest.raises(PeagleError, match=r"weights was \[5, 3, 2\], is \[1, 1, 1\]"):
        prepare(changed(arguments, weights=[1, 1, 1]))


def test_a_mixture_ends_where_a_source_runs_out(three_sources, caplog):
    arguments = changed(three_sources, weights=[0.1, 0.1, 0.8], max_samples=900)
    folder = prepare(arguments)
    read = [source["conversations_read"] for source in sources_of(folder)]
    assert read[2] == 300
    assert sum(read) == len(prepared(folder)["conversation_id"]) == pytest.approx(375, abs=30)
    ends = f"{arguments.data[2]} has run out after 300 conversations, so the mixture ends with {sum(read)}"
    assert ends in caplog.text
    assert "source_0.jsonl has run out" not in caplog.text


def test_long_rows_are_cut_and_counted(arguments, caplog):
    caplog.set_level(logging.INFO)
    full_length = prepared(prepare(arguments))["seq_len"][0]
    folder = prepare(changed(arguments, seq_length=full_length - 3, overwrite=True))
    assert set(prepared(folder)["seq_len"]) == {full_length - 3}
    counts = json.loads((folder / "prepare.json").read_text())["counts"]
    assert (counts["truncated_rows"], counts["cut_tokens"]) == (5, 5 * 3)
    assert f"5 samples cut after {full_length - 3} tokens" in caplog.text


def test_rows_with_too_little_to_learn_are_reported(arguments):
    data = write_lines(
        Path(arguments.data[0]),
        [
            {"messages": HELLO[:2]},
            {"messages": [{"role": "user", "content": "fox " * 50}, HELLO[1]]},
            {"messages": [HELLO[0], {"role": "assistant", "content": ""}]},
        ],
    )
    folder = prepare(changed(arguments, seq_length=40, min_learnt_tokens=2))
    assert prepared(folder)["conversation_id"] == [0]
    reason = "fewer than 2 tokens to train on within the first 40"
    skipped = json.loads((folder / "skipped.json").read_text())
    assert sorted((entry["row"], entry["reason"]) for entry in skipped) == [
        (f"{data}, line 2", reason),
        (f"{data}, line 3, messages[1]", "the answer is empty"),
    ]


def test_rows_that_are_tokens_already_are_used_as_they_are(arguments, tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 0], "messages": HELLO}
    write_lines(Path(arguments.data[0]), [row])
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    folder = prepare(changed(arguments, model=str(tmp_path / "base")))
    row = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 0], "seq_len": 4, "conversation_id": 0}
    assert prepared(folder) == {name: [value] for name, value in row.items()}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, 2], "loss_mask": [1]}, "line 1: there are 2 input_ids but 1 values in loss_mask"),
        ({"input_ids": [1, len(BASE_TOKENIZER)], "loss_mask": [0, 1]}, "line 1: input_ids must be a list of integers"),
        ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "input_ids must be"),
        ({"input_ids": [1, 1.0], "loss_mask": [0, 1]}, "input_ids must be"),
        ({"input_ids": "12", "loss_mask": [0, 1]}, "input_ids must be"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "line 1: loss_mask must be"),
        ({"input_ids": [1, 2]}, "there is neither"),
        ([1], r"line 1: the row must be a JSON object, but is list"),
    ],
)
def test_bad_rows_stop_the_command(arguments, row, problem):
    write_lines(Path(arguments.data[0]), [row])
    with pytest.raises(PeagleError, match=problem.replace("[", r"\[") if isinstance(row, dict) else None):
        prepare(arguments)
    assert contents(Path(arguments.output)) == {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unknown_role_stops_the_command_from_any_process(arguments, num_workers):
    with open(arguments.data[0], "a", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": [{"from": "narrator", "value": "Once"}]}))
    with pytest.raises(PeagleError, match=r"chats.jsonl, line 7: conversations\[0\] has the role 'narrator'"):
        prepare(changed(arguments, num_workers=num_workers))


@pytest.mark.parametrize("seed", range(4))
def test_the_first_wrong_row_is_named_whatever_the_order_and_the_others_are_counted(arguments, seed):
    path = Path(arguments.data[0])
    wrong = "".join(json.dumps({"conversations": [{"from": name, "value": "Once"}]}) + "\n" for name in "abc")
    path.write_text(path.read_text() + wrong + path.read_text() + wrong)
    problem = r"chats\.jsonl, line 7: conversations\[0\] has the role 'a', .* 5 other rows can't be read either\.$"
    with pytest.raises(PeagleError, match=problem):
        prepare(changed(arguments, seed=seed, num_workers=1 + seed % 2))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"messages": []}\n\n{"messages": [}\n', "line 3: this is not valid JSON"),
        (b'\n{\n "data": []\n}\n', "line 2: there is neither `messages`"),
        (b'{"messages": []}\n{"messages": ["\xff"]}\n', "line 2: this is not valid JSON"),
        (b'[{"messages": []}, {"messages": [}]', "item 2: this is not valid JSON"),
        (b'[{"messages": []}', "item 2: this is not valid JSON"),
        (b'[{"messages": ["\xff"]}]', "item 1: this is not valid JSON"),
        (b"[3]", "item 1: the row must be a JSON object, but is int"),
        (b"", "is empty: it holds no conversation"),
        (b"\n \n", "is empty: it holds no conversation"),
        (b"[]", "is empty: it holds no conversation"),
        (b'{"messages": []}', "Nothing in .* can be trained on.*no answer of the assistant: 1"),
    ],
)
def test_bad_files_stop_the_command(arguments, content, problem):
    Path(arguments.data[0]).write_bytes(content)
    with pytest.raises(PeagleError, match=problem) as caught:
        prepare(arguments)
    assert arguments.data[0] in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data": ["gone.jsonl"]}, "gone.jsonl can't be read"),
        ({"data": ["shargpt"]}, "neither a built-in dataset"),
        ({"data": ["./no_such_folder/x"]}, "./no_such_folder/x can't be read: there is no such file or folder"),
        ({"data": ["a/b:c:d:e"]}, "org/name:configuration:split"),
        ({"model": "./no_such_model"}, "The tokenizer of ./no_such_model can't be loaded"),
        ({"seq_length": 0}, "--seq-length is 0"),
        ({"max_samples": 0}, "--max-samples is 0"),
        ({"weights": [0.7, 0.3]}, r"--weights 0\.7 0\.3 must be finite numbers above 0, one for each of the 1 --d"),
        ({"weights": [0.0]}, "must be finite numbers above 0"),
        ({"weights": [math.nan]}, "must be finite numbers above 0"),
        ({"weights": [math.inf]}, "must be finite numbers above 0"),
        ({"data": []}, "--data names nothing"),
    ],
)
def test_bad_arguments(arguments, changes, problem):
    with pytest.raises(PeagleError, match=problem):
        prepare(changed(arguments, **changes))


def test_every_answer_is_counted_once(arguments, caplog):
    caplog.set_level(logging.INFO)
    empty, thinking = {"role": "assistant", "content": None}, {**HELLO[1], "reasoning": "Hm."}
    rows = [
        {"messages": [*HELLO, HELLO[0], empty, HELLO[0], thinking]},
        {"messages": [HELLO[1], *HELLO[:2]]},
        {"messages": [*HELLO[:2], HELLO[0], {"role": "assistant", "content": "fox " * 60}]},
        {"messages": [*HELLO[:2], {"role": "user", "content": "fox " * 60}, HELLO[3]], "system": "Be kind."},
        {"messages": HELLO, "images": ["a.png"]},
        {"messages": HELLO, "train": False},
        {"prompt": "Hello", "completion": "fox"},
    ]
    data = write_lines(Path(arguments.data[0]), rows)
    folder = prepare(changed(arguments, seq_length=60))
    record = json.loads((folder / "prepare.json").read_text())
    assert [*record["answers"]] == ["all", "learnt", "cut", "left_out", "beyond_max_samples", "marked"]
    assert [*record["answers"].values()] == [15, 6, 2, 7, 0, 0]
    skipped = {entry["row"]: entry["reason"] for entry in json.loads((folder / "skipped.json").read_text())}
    assert skipped == {
        f"{data}, line 1, messages[5]": "the answer is empty",
        f"{data}, line 1, messages[7]": "the chat template does not show reasoning",
        f"{data}, line 2, messages[0]": "no answer: the assistant speaks first, and nothing asks for it",
        f"{data}, line 5, images": "the row has images, and only text can be trained on",
        f"{data}, line 6, messages[1]": "the data says not to train on it (train: false)",
        f"{data}, line 6, messages[3]": "the data says not to train on it (train: false)",
    }
    assert "Of 15 answers 6 are trained on whole, 2 cut and 7 left out." in caplog.text


def test_a_chosen_chat_template_and_its_variables(arguments, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("{{ m.content }}", "{{ greeting }}{{ m.content }}"))
    chosen = changed(
        arguments, chat_template=str(tmp_path / "own.jinja"), chat_template_kwargs='{"greeting": "Hello there, "}'
    )
    folder = prepare(chosen)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {tokenizer.decode(ids) for ids in prepared(folder)["input_ids"]}
    assert all("assistant\nHello there, Well, hello there.<|im_end|>" in text for text in texts)
    assert (folder / "chat_template.jinja").read_text() == (tmp_path / "own.jinja").read_text()
    record = json.loads((folder / "prepare.json").read_text())
    assert record["chat_template"] == chosen.chat_template
    assert record["chat_template_kwargs"] == {"greeting": "Hello there, "}
    inspect_data(DataArguments("inspect", str(folder)))
    with pytest.raises(PeagleError, match=r"made with other settings: .*chat_template_kwargs was"):
        prepare(changed(chosen, chat_template_kwargs={"greeting": "Hi"}))
    with pytest.raises(PeagleError, match="made with other settings: tokenizer_fingerprint was"):
        prepare(arguments)


def test_answers_that_are_marked_in_part_are_counted_and_named(arguments, caplog):
    marked = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    make_tokenizer(marked).save_pretrained(arguments.model)
    record = json.loads((prepare(arguments) / "prepare.json").read_text())
    assert (record["answers"]["all"], record["answers"]["learnt"], record["answers"]["marked"]) == (10, 10, 10)
    assert "Of 10 answers only a part is trained on, that which the chat template marks" in caplog.text


def test_a_folder_whose_files_changed_is_another_dataset(arguments, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"messages": HELLO}])
    prepare(changed(arguments, data=[str(folder)]))
    write_lines(folder / "b.jsonl", [{"messages": HELLO}])
    with pytest.raises(PeagleError, match=r"made with other settings: the content of .*chats has changed"):
        prepare(changed(arguments, data=[str(folder)]))


def test_chats_need_a_chat_template(arguments, tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(PeagleError, match="has no chat template"):
        prepare(changed(arguments, model=str(tmp_path / "base")))


def test_an_array_is_read_item_by_item(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_CHARACTERS", 7)
    rows = [{"messages": [{"role": "user", "content": "é" * i + "]"}]} for i in range(9)]
    path = tmp_path / "array.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "copy").mkdir()
    source = sources.open_source(str(path), tmp_path / "copy")
    assert [source.read(index) for index in range(len(source))] == [
        (f"{path}, item {number}", row) for number, row in enumerate(rows, 1)
    ]


def test_a_dataset_that_is_no_json_file(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    # Arrow gives every message every field: the tool calls of the first are null.
    messages = [HELLO[0], {**HELLO[1], "tool_calls": [{"function": WEATHER}]}, HELLO[2]]
    Dataset.from_list([{"messages": HELLO}, {"messages": messages}]).to_parquet("org/name/train.parquet")
    Dataset.from_list([{"messages": hello(1)}]).to_parquet("org/name/test.parquet")
    make_tokenizer(LLAMA).save_pretrained(arguments.model)
    folder = prepare(changed(arguments, data=["org/name", "org/name:test"]))
    assert sorted(prepared(folder)["conversation_id"]) == [0, 1, 2]


def test_another_split_of_the_same_folder_is_another_dataset(arguments, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        write_lines(tmp_path / "data" / f"{name}.jsonl", [{"messages": HELLO}])
    of_train = changed(arguments, data=[f"{tmp_path / 'data'}:train"])
    assert prepare(of_train) == prepare(of_train)
    with pytest.raises(PeagleError, match=r"data was .*data:train, is .*data:test\. Pass --overwrite"):
        prepare(changed(arguments, data=[f"{tmp_path / 'data'}:test"]))


def test_a_dataset_inside_the_folder_of_its_data_is_none_of_the_data(arguments, tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    Path(arguments.data[0]).rename(folder / "chats.jsonl")
    inside = changed(arguments, data=[str(folder)], output=str(folder / "out"))
    prepare(inside)
    before = contents(folder / "out")
    (folder / "out" / "chats.jsonl").write_text("[")
    caplog.set_level("INFO")
    prepare(inside)
    assert f"{folder / 'out'} already holds this dataset; it is kept as it is." in caplog.messages
    (folder / "out" / "chats.jsonl").unlink()
    assert contents(folder / "out") == before
    prepare(changed(inside, output=str(folder / "again")))


def test_the_same_command_again_does_nothing(arguments, caplog):
    before = contents(prepare(arguments))
    caplog.set_level(logging.INFO)
    (Path(arguments.output) / "hidden_states").mkdir()
    times = {path: path.stat().st_mtime_ns for path in Path(arguments.output).iterdir()}
    folder = prepare(changed(arguments, num_workers=2))
    assert contents(folder) == before
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "it is kept as it is" in caplog.text


@pytest.mark.parametrize("change", ["seq_length", "the content of .* has changed", "tokenizer"])
def test_another_dataset_is_replaced_only_when_asked(arguments, change):
    folder = prepare(arguments)
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    if change == "seq_length":
        arguments = changed(arguments, seq_length=20)
    elif change.startswith("the content"):
        write_lines(Path(arguments.data[0]), [{"messages": HELLO}])
    else:
        make_tokenizer(MARKED).save_pretrained(arguments.model)
    with pytest.raises(PeagleError, match=rf"made with other settings: {change}.* Pass --overwrite"):
        prepare(arguments)
    assert contents(folder) == before | {"notes.txt": b"mine"}

    prepare(changed(arguments, overwrite=True))
    after = contents(folder)
    assert after.pop("notes.txt") == b"mine"
    assert after.keys() == before.keys()
    assert after["prepare.json"] != before["prepare.json"]


def test_nothing_is_overwritten_under_hidden_states(arguments):
    folder = prepare(arguments)
    (folder / "hidden_states").mkdir()
    (folder / "hidden_states" / "hs_0.safetensors").touch()
    before = contents(folder)
    prepare(changed(arguments, overwrite=True))  # the cached states fit, since it is the same dataset
    with pytest.raises(PeagleError, match=r"hidden_states holds hidden states .* \(seed was 0, is 1\)"):
        prepare(changed(arguments, overwrite=True, seed=1))
    assert contents(folder) == before


def test_a_dataset_of_another_program_is_left_alone(arguments):
    folder = prepare(arguments)
    (folder / "prepare.json").unlink()
    before = contents(folder)
    with pytest.raises(PeagleError, match=r"without prepare\.json"):
        prepare(arguments)
    assert contents(folder) == before


@pytest.mark.fault(
    "A row of the data is malformed when a dataset is prepared anew",
    "An error names the line, and the older dataset stays as it was.",
)
def test_a_failure_leaves_the_older_dataset(arguments):
    folder = prepare(arguments)
    before = contents(folder)
    write_lines(Path(arguments.data[0]), [{"messages": HELLO}, {"messages": 3}])
    with pytest.raises(PeagleError, match="line 2"):
        prepare(changed(arguments, overwrite=True))
    assert contents(folder) == before


@pytest.mark.fault(
    "The disk fills up while a dataset is prepared", "An error names the folder, and nothing half written stays."
)
def test_a_full_disk_leaves_nothing_behind(arguments, monkeypatch):
    def save(content, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(PeagleError, match="No space is left"):
        prepare(arguments)
    assert not Path(arguments.output).exists()


def test_the_output_must_be_a_folder(arguments):
    with pytest.raises(PeagleError, match="is a file"):
        prepare(changed(arguments, output=arguments.data[0]))


def test_token_counts_can_have_a_second_place(arguments, tmp_path):
    second = tmp_path / "elsewhere" / "counts.pt"
    for _ in range(2):  # the second time the dataset is already there
        folder = prepare(changed(arguments, token_freq_path=str(second)))
        assert second.read_bytes() == (folder / "token_freq.pt").read_bytes()
        second.unlink()


def test_token_counts_have_no_place_that_is_a_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        with pytest.raises(PeagleError, match=f"{tmp_path} can't be written: Is a directory"):
            prepare(changed(arguments, token_freq_path=folder))


def test_the_fingerprint_tells_tokenizers_apart():
    tokenizers = [make_tokenizer(CHATML) for _ in range(4)]
    tokenizers[1].chat_template = MARKED
    tokenizers[2].eos_token = "<|im_end|>"
    tokenizers[3].add_tokens(["fox"])
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 4
    assert tokenizer_fingerprint(make_tokenizer(CHATML)) == tokenizer_fingerprint(tokenizers[0])
