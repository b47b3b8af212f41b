"""`peagle-hf data template`: every kind of chat on every pattern of template, in the terminal and as a page."""

import re
from html.parser import HTMLParser

import html5lib
import pytest
from chat_templates import CHATML, MARKED, PATTERNS, TOOL_CHATML, make_tokenizer

from peagle_hf.cli import main
from peagle_hf.data.inspect_template import EXACT, KINDS, LEFT_OUT, check_template
from peagle_hf.data.inspect_template import MARKED as BY_MARKS
from peagle_hf.errors import PeagleError


@pytest.mark.parametrize("name", PATTERNS)
def test_on_every_pattern_each_answer_is_shown_or_named(name):
    pattern = PATTERNS[name]
    results = check_template(make_tokenizer(pattern.template, pattern.strip))
    assert [result.kind for result in results] == list(KINDS)
    for result in results:
        assert (result.status == LEFT_OUT) == bool(result.left_out)
        assert all(reason for _, reason in result.left_out)
        num_trained_on = sum(is_trained_on for row in result.samples for _, is_trained_on in row)
        # Marks may cut an answer in two; answers without a header between them are one piece.
        assert bool(num_trained_on) == (len(result.left_out) < result.num_answers)


def test_what_a_template_does_kind_by_kind():
    results = {result.kind: result for result in check_template(make_tokenizer(TOOL_CHATML))}
    assert results["two questions"].status == EXACT
    assert [text for text, is_trained_on in results["two questions"].samples[0] if is_trained_on] == [
        "I am a helpful voice.<|im_end|>",
        "One, two, three.<|im_end|>",
    ]
    assert results["an empty answer"].left_out == [("messages[1]", "the answer is empty")]
    assert results["reasoning"].left_out == [("messages[1]", "the chat template does not show reasoning")]
    assert results["two tool calls at once"].status == EXACT
    marked = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert check_template(make_tokenizer(marked))[0].status == BY_MARKS


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_command_and_its_page(tmp_path, capsys):
    make_tokenizer({"plain": CHATML, "tools": TOOL_CHATML}).save_pretrained(tmp_path / "model")
    page = tmp_path / "pages" / "a.html"
    command = ["data", "template", "--model", str(tmp_path / "model")]
    with pytest.raises(SystemExit):
        main(command)
    assert "several chat templates and none of them is the default: plain, tools" in capsys.readouterr().err
    main([*command, "--chat-template", "tools", "--html", str(page)])
    printed = capsys.readouterr().out
    assert "two tool calls at once: exact\n" in printed
    assert "reasoning: left out, 1 of 1 answers\n    messages[1]: the chat template does not show reasoning" in printed
    assert "⟦I am a helpful voice.<|im_end|>⟧" in printed
    text = page.read_text(encoding="utf-8")
    shown = "".join(Page(text).texts)
    assert "Use <b> & \"quotes\", 'these' too:" in shown
    assert "<b>I am a helpful voice.&lt;|im_end|&gt;</b>" in text
    assert "<script" not in text
    html5lib.HTMLParser(strict=True).parse(text)
    (tmp_path / "own.jinja").write_text(CHATML.replace("{{ m.content }}", "{{ greeting }}{{ m.content }}"))
    main([*command, "--chat-template", str(tmp_path / "own.jinja"), "--chat-template-kwargs", '{"greeting": "Hey! "}'])
    assert "⟦Hey! I am a helpful voice.<|im_end|>⟧" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "needs --model"),
        (["--chat-template", "tool"], "is neither a template of .* \\(it has default\\) nor a file"),
        (["--chat-template", "{folder}/model/tokenizer_config.json"], "is a JSON file, not a Jinja template"),
        (["--chat-template-kwargs", "{"], "chat-template-kwargs is not valid JSON"),
        (["--chat-template-kwargs", "[1]"], "must be a JSON object"),
        (["--chat-template-kwargs", '{"messages": 1}'], "can't set messages"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, flags, problem):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    given = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit):
        main(["data", "template", *(["--model", str(tmp_path / "model")] if flags else []), *given])
    error = capsys.readouterr().err
    assert re.search(problem, error.replace("\n", " ")), error


def test_a_template_that_is_no_jinja():
    with pytest.raises(PeagleError, match=r"is no valid Jinja: .*line 2"):
        check_template(make_tokenizer("\n{% for m in messages %}"))
