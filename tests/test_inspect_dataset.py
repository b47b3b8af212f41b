"""`data inspect`: numbers that are counted again here, and a page that is read back."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

import html5lib
import numpy as np
import pytest
from conftest import write_prepared
from datasets import load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peagle_hf import PeagleError, PrepareArguments, cli, prepare
from peagle_hf.data.inspect_dataset import DataArguments, DataReport, _pieces, inspect_data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = ["A fox & <b>bold</b> text.", "Two\n\nparagraphs <script>alert(1)</script>", "An 😀 and é", "Yes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tokenizer of bytes, so that 😀 is four tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["a fox and the text"], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=specials)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML).save_pretrained(
        folder
    )
    return folder


def write_chats(path: Path, count: int, question: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[number % 4]}]}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Two sources; the longest rows of the second are cut."""
    root = tmp_path_factory.mktemp("data")
    data = [write_chats(root / "short.jsonl", 20, "Why?"), write_chats(root / "long.jsonl", 12, "Why " * 5)]
    return prepare(PrepareArguments(str(model), data, str(root / "prepared"), seq_length=70))


@pytest.fixture
def inspected(folder, tmp_path) -> tuple[DataReport, str]:
    page = tmp_path / "page.html"
    flags = {"output": str(page), "draft_vocab_sizes": [5, 20, 258], "rows": [*range(10)]}
    report = inspect_data(DataArguments("inspect", str(folder), **flags))
    return report, page.read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_rows(inspected, folder, tmp_path):
    report, _ = inspected
    rows = list(load_from_disk(folder).with_format(None))
    lengths = [len(row["input_ids"]) for row in rows]
    learnt = [sum(row["loss_mask"]) for row in rows]
    assert (report.num_rows, report.num_conversations) == (len(rows), len({row["conversation_id"] for row in rows}))
    assert (report.num_tokens, report.num_learnt_tokens) == (sum(lengths), sum(learnt))
    assert report.learnt_share == sum(learnt) / sum(lengths)
    assert (report.row_tokens["min"], report.row_tokens["max"]) == (min(lengths), max(lengths))
    assert report.row_learnt_tokens["median"] == np.median(learnt)
    truncated = lengths.count(70)
    assert 0 < truncated == report.num_truncated_rows
    assert report.truncated_share == truncated / len(rows)
    assert [source["rows"] for source in report.sources] == [
        sum((row["conversation_id"] >= 20) == is_long for row in rows) for is_long in (False, True)
    ]
    assert json.loads((tmp_path / "page.json").read_text()) == json.loads(json.dumps(asdict(report)))


def test_coverage_is_the_share_of_the_most_frequent_tokens(inspected, folder):
    report, _ = inspected
    rows = list(load_from_disk(folder).with_format(None))

    def count(rows: list[dict]) -> Counter:
        pairs = [pair for row in rows for pair in zip(row["input_ids"], row["loss_mask"], strict=True)]
        return Counter(token_id for token_id, is_learnt in pairs if is_learnt)

    def share(chosen_by: Counter, counts: Counter, size: int) -> float:
        chosen = sorted(range(report.vocab_size), key=lambda token_id: (-chosen_by[token_id], token_id))[:size]
        return sum(counts[token_id] for token_id in chosen) / counts.total()

    counts, held_out = count(rows), -(-len(rows) // 10)
    assert report.coverage == {size: pytest.approx(share(counts, counts, size)) for size in (5, 20, 258)}
    assert report.unseen_coverage == {
        size: pytest.approx(share(count(rows[:-held_out]), count(rows[-held_out:]), size)) for size in (5, 20, 258)
    }
    assert report.num_distinct_learnt == len(counts)
    first = report.most_frequent[0]
    assert (first["count"], first["share"]) == (max(counts.values()), max(counts.values()) / counts.total())
    for wanted, size in report.tokens_for_share.items():
        assert share(counts, counts, size - 1) < wanted <= share(counts, counts, size) + 1e-12


class Page(HTMLParser):
    """The examples of a page as (text, is learnt) runs, every tag, and every address."""

    def __init__(self, text: str):
        super().__init__()
        self.examples: list[list[list]] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.is_example = self.is_learnt = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] += 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "pre":
            self.examples.append([])
            self.is_example = True
        self.is_learnt = self.is_learnt or tag == "b"

    def handle_endtag(self, tag: str) -> None:
        self.is_example = self.is_example and tag != "pre"
        self.is_learnt = self.is_learnt and tag != "b"

    def handle_data(self, data: str) -> None:
        if self.is_example:
            self.examples[-1].append([data, int(self.is_learnt)])


def test_the_examples_are_the_rows_with_what_is_learnt_marked(inspected, folder, model):
    page = Page(inspected[1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(page.examples) == 10
    learnt_text = ""
    for example, row in zip(page.examples, load_from_disk(folder).with_format(None), strict=False):
        shown = [("".join(text for text, _ in run), mask) for mask, run in groupby(example, key=lambda item: item[1])]
        pairs = groupby(zip(row["loss_mask"], row["input_ids"], strict=True), key=lambda pair: pair[0])
        assert shown == [
            (tokenizer.decode([token_id for _, token_id in run]).replace("\n", "↵\n"), mask) for mask, run in pairs
        ]
        learnt_text += "".join(text for text, mask in shown if mask)
    assert "<script>alert(1)" in learnt_text
    assert "😀" in learnt_text


def test_the_page_needs_nothing_but_itself(inspected):
    html5lib.HTMLParser(strict=True).parse(inspected[1])
    page = Page(inspected[1])
    assert page.tags["script"] == page.tags["link"] == 0
    assert len(page.addresses) == page.tags["img"] == page.tags["source"] == 3
    for address in page.addresses:
        kind, content = address.split(";base64,")
        assert kind == "data:image/svg+xml"
        assert xml.etree.ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]+", "", inspected[1]))


def test_the_same_data_gives_the_same_page(inspected, folder, tmp_path):
    again = tmp_path / "again.html"
    flags = {"output": str(again), "draft_vocab_sizes": [5, 20, 258], "rows": [*range(10)]}
    inspect_data(DataArguments("inspect", str(folder), **flags))
    assert again.read_text(encoding="utf-8") == inspected[1]


def test_spaces_stay_where_a_tokenizer_takes_them_from_the_first_word():
    """As tokenizers of SentencePiece do, to which a word's space belongs."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁fox": 1, "es": 2, "▁": 3}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    pieces = list(_pieces(fast, [0], [1, 2, 1, 0]))
    assert pieces == [([1], " fox"), ([2], "es"), ([1], " fox"), ([0], " a")]


def test_the_command_and_its_place_in_the_prepared_folder(model, tmp_path, capsys):
    """Two words and a folder; the page goes when the dataset is replaced, and the model may be moved."""
    model = shutil.copytree(model, tmp_path / "model")
    arguments = PrepareArguments(
        str(model), [write_chats(tmp_path / "chats.jsonl", 12, "Why?")], str(tmp_path / "data")
    )
    folder = prepare(arguments)
    cli.main(["data", "inspect", str(folder)])
    assert "Covered" in capsys.readouterr().out
    report = json.loads((folder / "inspect.json").read_text())
    assert report["coverage"] == {}, "all default sizes are larger than this vocabulary"
    assert len(Page((folder / "inspect.html").read_text()).examples) == 8
    arguments.seq_length, arguments.overwrite = 30, True
    prepare(arguments)
    assert not list(folder.glob("inspect.*"))
    model.rename(tmp_path / "moved")
    with pytest.raises(PeagleError, match=r"prepare\.json names it; if it is somewhere else now, name it with --model"):
        inspect_data(DataArguments("inspect", str(folder)))
    inspect_data(DataArguments("inspect", str(folder), model=str(tmp_path / "moved")))


def test_a_dataset_without_a_record_says_what_is_not_known(tmp_path, tiny_verifier):
    """As one is that speculators prepared."""
    folder = write_prepared(tmp_path / "prepared", [12, 20, 31])
    with pytest.raises(PeagleError, match=r"has no prepare\.json, so the tokenizer isn't known"):
        inspect_data(DataArguments("inspect", str(folder)))
    report = inspect_data(DataArguments("inspect", str(folder), model=str(tiny_verifier)))
    assert report.truncated_share is report.sources is report.skipped is None
    assert report.num_tokens == 63
    assert "not known" in (folder / "inspect.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rows": [3, 32]}, r"There is no row 32 in .*: name rows from 0 to 31"),
        ({"output": "page.pdf"}, r"--output page\.pdf must end in \.html, as it names the page: take page\.html, for"),
        ({"output": "/tmp"}, r"--output /tmp must end in \.html, as it names the page: take /tmp/inspect\.html, for"),
        ({"draft_vocab_sizes": [1 << 20]}, "draft_vocab_size is 1048576"),
        ({"model": "./no/such-model"}, "The tokenizer of ./no/such-model can't be loaded"),
        ({"folder": "nowhere"}, "nowhere is not a prepared dataset"),
    ],
)
def test_what_can_not_be_inspected_is_named(folder, tmp_path, flags, words):
    fields = {"action": "inspect", "folder": str(folder), "output": str(tmp_path / "page.html")} | flags
    with pytest.raises(PeagleError, match=words):
        inspect_data(DataArguments(**fields))
    assert not (tmp_path / "page.html").exists()


def test_another_tokenizer_is_refused(folder, tiny_verifier):
    with pytest.raises(PeagleError, match="was prepared with another tokenizer"):
        inspect_data(DataArguments("inspect", str(folder), model=str(tiny_verifier)))
