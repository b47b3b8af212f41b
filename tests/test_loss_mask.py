"""The loss mask on a template for each pattern that real ones have: each answer is learnt whole or left out by name."""

from itertools import groupby

import pytest
from chat_templates import ONE, PATTERNS, make_tokenizer

from peagle_hf.data import loss_mask
from peagle_hf.data.chats import read_chat
from peagle_hf.data.loss_mask import ChatTokenizer, MaskedChat


def trained_on(tokenizer, masked: MaskedChat) -> list[list[str]]:
    """The runs of tokens that are trained on, as text, row by row."""
    rows = []
    for row in masked.samples:
        pairs = zip(row.loss_mask.tolist(), row.input_ids.tolist(), strict=True)
        runs = groupby(pairs, key=lambda pair: pair[0])
        rows.append([tokenizer.decode([id_ for _, id_ in run]) for mask, run in runs if mask])
    return rows


CASES = [
    pytest.param(pattern, case, id=f"{name} {number}")
    for name, pattern in PATTERNS.items()
    for number, case in enumerate(pattern.cases)
]


@pytest.mark.parametrize(("pattern", "case"), CASES)
def test_every_answer_is_learnt_whole_or_left_out_with_its_reason(pattern, case):
    tokenizer = make_tokenizer(pattern.template, pattern.strip, pattern.eos)
    chat = read_chat({"messages": case.messages, "tools": case.tools}, "here")
    (masked,) = ChatTokenizer(tokenizer, case.kwargs).mask([chat])
    assert trained_on(tokenizer, masked) == case.rows
    assert {entry.message: entry.reason for entry in masked.left_out}.keys() == case.left_out.keys()
    for entry in masked.left_out:
        assert case.left_out[entry.message] in entry.reason
    turns = [index for index, message in enumerate(case.messages) if message["role"] == "assistant"]
    assert sorted([*(i for row in masked.samples for i in row.messages), *case.left_out]) == turns


def test_a_chats_own_variables_come_before_the_given_ones(monkeypatch):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{{ how }}{{ sign }}{% endfor %}")
    monkeypatch.setattr(loss_mask, "_MOST_VARIANTS", 2)
    given = [{"how": "a", "sign": None}, '{"how": "b", "sign": "?"}', None, {"how": "c"}, {"how": "a"}, {}]
    chats = [read_chat({"messages": ONE, "chat_template_kwargs": kwargs}, "here") for kwargs in given]
    masked = ChatTokenizer(tokenizer, {"how": "!", "sign": "."}).mask(chats)
    texts = [tokenizer.decode(sample.input_ids).removeprefix("Hello") for one in masked for sample in one.samples]
    assert texts == ["a.Wella.", "b?Wellb?", "!.Well!.", "c.Wellc.", "a.Wella.", "!.Well!."]
