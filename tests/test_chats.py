"""Reading conversations: the files and the shapes of rows that people have, and what is said of those that fail."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from peagle_hf.data import sources
from peagle_hf.data.chats import Unlearnable, count_answers, read_chat
from peagle_hf.data.sources import data_sha256, is_local_file, open_source
from peagle_hf.errors import PeagleError

HELLO, WELL = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well"}
SYSTEM = {"role": "system", "content": "Be kind."}
ROWS = [{"messages": [HELLO, WELL], "id": number} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def read(tmp_path):
    """Read all rows of a source, with their places."""

    def rows(data) -> list[tuple[str, dict]]:
        folder = tmp_path / f"copy {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        source = open_source(str(data), folder)
        return [source.read(index) for index in range(len(source))]

    return rows


FILES = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "A.JSONL.GZ": gzip.compress(LINES, mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "a.json": json.dumps(ROWS).encode(),
    "A.Json.gz": gzip.compress(json.dumps(ROWS, indent=2).encode(), mtime=0),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "commas.json": ",\n".join(json.dumps(row) for row in ROWS).encode(),
    "none.dat": LINES,
}


@pytest.mark.parametrize("name", [*FILES, "a.jsonl.zst"])
def test_files_of_every_kind_hold_the_same_rows(read, tmp_path, name):
    content = zst_frame(tmp_path) if name.endswith(".zst") else FILES[name]
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read(tmp_path / name)] == ROWS


def zst_frame(folder: Path) -> bytes:
    path = folder / "frame"
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(LINES)
    return path.read_bytes()


@pytest.mark.parametrize("form", ["numpy", "torch", "columns"])
def test_a_saved_dataset_is_read_without_the_format_it_was_saved_with(read, tmp_path, form):
    rows = Dataset.from_list(ROWS)
    rows = rows.with_format("numpy", columns=["id"]) if form == "columns" else rows.with_format(form)
    rows.save_to_disk(tmp_path / "saved")
    assert [row for _, row in read(tmp_path / "saved")] == ROWS


def test_a_column_that_comes_twice_is_refused(read, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,prompt,completion\nHello,Bye,Well\n")
    with pytest.raises(PeagleError, match=r"a\.csv: its header has the column 'prompt' more than once"):
        read(tmp_path / "a.csv")


def test_text_in_bytes_is_text_and_other_bytes_are_none(read, tmp_path):
    rows = {"prompt": [b"Hello", "H\u00e9".encode()], "completion": [b"Well", b"\xff\xfe"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    (_, first), (_, second) = read(tmp_path / "rows.parquet")
    assert exchange(first) == PAIR
    with pytest.raises(PeagleError, match="completion has no content"):
        exchange(second)


def test_pictures_and_sounds_are_not_decoded(tmp_path):
    content = {"bytes": b"none", "path": None}
    rows = [{**ROWS[0], "audio": content, "images": [content]}, {**ROWS[1], "audio": None, "images": []}]
    data = Dataset.from_list(rows).cast_column("audio", datasets.Audio())
    data = data.cast_column("images", datasets.List(datasets.Image()))
    source = open_source(data.with_format("torch"), tmp_path)
    with pytest.raises(Unlearnable, match="the row has images"):
        read_chat(*reversed(source.read(0)))
    assert read_chat(*reversed(source.read(1))).messages == ROWS[1]["messages"]


def test_a_transform_is_refused_as_it_would_not_be_applied(tmp_path):
    rows = Dataset.from_list(ROWS).with_transform(lambda batch: batch)
    with pytest.raises(PeagleError, match=r"has a transform.*Dataset\.map first"):
        open_source(rows, tmp_path)


def test_places_name_the_line_where_an_object_begins(read, tmp_path):
    path = tmp_path / "objects.json"
    path.write_text("\n".join(json.dumps({"messages": [], "id": number}, indent=1) for number in range(3)))
    assert [place for place, _ in read(path)] == [f"{path}, line {line}" for line in (1, 5, 9)]


def test_parquet_and_csv(read, tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [
        (f"{tmp_path / 'rows.parquet'}, row {number}", row) for number, row in enumerate(ROWS)
    ]
    text = 'prompt,completion,system\n"Hel\nlo",Well,\nHow?,"Fine, ""so""",Be kind.\n'
    (tmp_path / "rows.CSV").write_text(text)
    (tmp_path / "rows.tsv").write_text("prompt\tcompletion\nHello\tWell\n")
    (place, first), (_, second) = read(tmp_path / "rows.CSV")
    assert (place, first) == (f"{tmp_path / 'rows.CSV'}, line 3", {"prompt": "Hel\nlo", "completion": "Well"})
    assert second == {"prompt": "How?", "completion": 'Fine, "so"', "system": "Be kind."}
    assert read(tmp_path / "rows.tsv")[0][1] == {"prompt": "Hello", "completion": "Well"}


def test_a_folder_of_files_and_its_splits(read, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    (folder / "more").mkdir(parents=True)
    (folder / "a-train.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    (folder / "more" / "b.json").write_text(json.dumps(ROWS[:1]))
    (folder / "test.jsonl").write_bytes(LINES)
    (folder / "README.md").write_text("no data")
    (folder / ".hidden.jsonl").write_bytes(LINES)
    for name in ("dataset_infos.json", "more/b.report.json"):  # of `datasets`, and of `regenerate`
        (folder / name).write_text("{}")
    assert [row for _, row in read("org/name")] == [*ROWS, ROWS[0]]
    read_files = "2 files are read (a-train.jsonl.gz, more/b.json). Not read: the split test."
    assert caplog.messages == [f"org/name, split train: {read_files}"]
    assert [place for place, _ in read("org/name:test")] == [f"org/name/test.jsonl, line {n}" for n in (1, 2, 3)]
    with pytest.raises(PeagleError, match="has no files of the split validation, only of train, test"):
        read("org/name:validation")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PeagleError, match="holds no data file"):
        read("nothing")


CARD = """---
configs:
- config_name: all
  data_files: [{split: train, path: all/*}, {split: held_out, path: other/rows-1.jsonl}]
- config_name: rest
  data_files: [{split: train_sft, path: other/*}]
---
"""


def test_a_downloaded_hub_dataset_has_the_splits_of_its_card_or_of_its_files_names(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data/org")
    names = ["all/test-1.jsonl", "other/rows-1.jsonl", "other/rows-2.jsonl", "train_sft-00000-of-00001.jsonl"]
    for name in (*names, "data/chats-00000-of-00001.jsonl", "part-00000-of-00001.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(ROWS[0]))
    (folder / "train_gen-00000-of-00001-a3ecf925.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))

    def files(data: str) -> list[str]:
        return [place.rpartition(",")[0] for place, _ in read(data)]

    assert files("data/org:train_sft") == ["data/org/train_sft-00000-of-00001.jsonl"]
    assert len(files("data/org:train_gen")) == 3
    assert files("data/org:chats") == ["data/org/data/chats-00000-of-00001.jsonl"]
    others = ["other/rows-1.jsonl", "other/rows-2.jsonl", "part-00000-of-00001.jsonl"]
    assert files("data/org") == [f"data/org/{name}" for name in others]
    (folder / "README.md").write_text(CARD)
    assert files("data/org:all:train") == ["data/org/all/test-1.jsonl"]
    assert files("data/org:all:held_out") == ["data/org/other/rows-1.jsonl"]
    assert files(f"{folder.resolve()}:rest:train_sft") == [f"{folder.resolve()}/other/rows-{n}.jsonl" for n in (1, 2)]
    Path("linked").symlink_to(folder)
    assert files("linked:all:held_out") == ["linked/other/rows-1.jsonl"]
    assert is_local_file("data/org:all:held_out")
    with pytest.raises(
        PeagleError, match=r"data/org can't be read as its README.md says: .*\['all', 'rest'\].* Name data"
    ):
        read("data/org")
    with pytest.raises(PeagleError, match="no files of the split train, only of train_sft"):
        read("data/org:rest:train")
    (folder / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(PeagleError, match=r"data/org can't be read as its README.md says: .*files themselves"):
        read("data/org")


def test_a_folder_that_datasets_saved(read, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert len(read(tmp_path / "one")) == len(read(tmp_path / "two")) == 3
    assert read(f"{tmp_path / 'two'}:test")[0][1] == ROWS[0]
    with pytest.raises(PeagleError, match="has no split dev, only train, test"):
        read(f"{tmp_path / 'two'}:dev")


@pytest.mark.parametrize("damage", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "missing"])
def test_a_damaged_folder_that_datasets_saved_is_named(read, tmp_path, damage):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    if damage == "missing":
        (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    else:
        (tmp_path / "one" / damage).write_bytes((tmp_path / "one" / damage).read_bytes()[:100])
    with pytest.raises(PeagleError, match=r"one can't be read as what Dataset.save_to_disk wrote .*copy it again"):
        read(tmp_path / "one")
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(PeagleError, match="holds no data file"):
        read(tmp_path / "one")


def test_what_exists_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    for name in ("org/rows", "sharegpt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(LINES)
        assert is_local_file(name)
        assert len(read(name)) == 3
    assert not is_local_file("ultrachat")
    assert not is_local_file("org/other:test")
    for name in ("./gone", "gone.parquet", "gone.jsonl.zst", "~/gone/x", "/gone"):
        assert is_local_file(name)
        with pytest.raises(PeagleError, match="can't be read: "):
            data_sha256(name)
        with pytest.raises(PeagleError, match="there is no such file or folder"):
            read(name)


def test_a_changed_file_of_a_folder_is_noticed(tmp_path):
    assert data_sha256("org/name") is None
    (tmp_path / "a.jsonl").write_bytes(LINES)
    seen = [data_sha256(str(tmp_path))]
    (tmp_path / "a.jsonl").write_bytes(LINES + LINES)
    seen.append(data_sha256(str(tmp_path)))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    seen += [data_sha256(f"{tmp_path}{split}") for split in ("", ":train", ":test", ":a:test")]
    assert len(set(seen)) == 5
    assert seen[2] == seen[3]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", json.dumps(ROWS) + "\n{}", r"the array ends, but something follows it: '\{\}'"),
        ("a.json", "[{}]" + " " * 40 + "]", "something follows it"),
        ("a.json", '[{"a": 1}, {"a": 2', "item 2: this is not valid JSON"),
        ("a.json", '[{"a": 1} ', "item 2: .*the array has no end"),
        ("a.json", '\n\n{\n"a": 1,\n"b": }\n', "line 3: this is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": [1}\n{"a": 2}\n', "line 2: this is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": [1\n{"a": 2}\n', "line 2: this is not valid JSON"),
        ("a.jsonl", '{"a": "x\n{"a": 2}\n', "line 1: this is not valid JSON"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is text in UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "is text in UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "can't be read to its end"),
        ("a.jsonl.gz", LINES, "can't be read to its end"),
        ("a.jsonl.zst", LINES, "can't be read to its end"),
        ("a.jsonl.xz", LINES, "can't be read to its end"),
        ("a.parquet", LINES, "can't be read as a Parquet file"),
        ("a.csv", "a,b\n1\n", "line 2: this row has fewer cells than the header, which has 2"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: this row has more cells"),
        ("a.csv", 'a,b\n"1,2\n', "no valid CSV"),
        ("a.csv", b"a,b\n\xff,2\n", "no valid CSV in UTF-8"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "line 2: the row must be a JSON object, but is list"),
        ("a.jsonl", '{"a": 1}\n' + "[" * 10_000 + "]" * 10_000, "line 2: this is not valid JSON"),
        ("a.json", "[" * 10_000 + "]" * 10_000, "item 1: this is not valid JSON"),
        ("a.zip", b"PK\3\4", r"is no JSON, and its ending is none of \.jsonl, .*Rename, unpack or convert it"),
    ],
)
def test_a_damaged_file_is_named(read, tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PeagleError, match=problem) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_a_broken_array_is_reported_before_it_is_read_whole(tmp_path, monkeypatch, read):
    monkeypatch.setattr(sources, "_CHUNK_CHARACTERS", 1 << 10)
    monkeypatch.setattr(sources, "_MOST_CHARACTERS", 1 << 14)
    read_characters = 0
    streamed = sources._streamed_items

    class Counting:
        def __init__(self, file):
            self.file = file

        def read(self, size):
            nonlocal read_characters
            read_characters += size
            return self.file.read(size)

    monkeypatch.setattr(sources, "_streamed_items", lambda path, file, *rest: streamed(path, Counting(file), *rest))
    for broken in ('{"a": ', '{"a": "', '{"a": ['):
        read_characters = 0
        (tmp_path / "a.json").write_text('[{"a": 1}, ' + broken + '{"b": "c"}, ' * 100_000)
        with pytest.raises(PeagleError, match="item 2: this is not valid JSON"):
            read(tmp_path / "a.json")
        assert read_characters < 1 << 16


def test_fillers_of_arrow_are_not_there(read, tmp_path):
    calls = [
        [{"function": {"name": "f", "arguments": {"city": "Paris"}}}],
        [{"function": {"name": "f", "arguments": {"zone": 1}}}],
    ]
    tools = [
        {"function": {"name": "f", "parameters": {"city": {"type": "string"}}}},
        {"function": {"name": "g", "parameters": {"zone": {"type": "int"}}}},
    ]
    rows = [
        {"messages": [HELLO, {"role": "assistant", "content": None, "tool_calls": call}], "tools": tools}
        for call in calls
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    Dataset.from_list([{"functions": row["tools"], **row} for row in rows]).to_parquet(tmp_path / "b.parquet")
    for data in ("a.parquet", "saved", "b.parquet"):
        (_, first), (_, second) = read(tmp_path / data)
        assert [
            read_chat(row, "x").messages[1]["tool_calls"][0]["function"]["arguments"] for row in (first, second)
        ] == [
            {"city": "Paris"},
            {"zone": 1},
        ]
        assert read_chat(first, "x").tools == tools == first.get("functions", tools)
        assert read_chat(first, "x").messages[1]["content"] is None
    # In JSON a null is what somebody wrote.
    call = {"name": "f", "arguments": '{"zone": null}'}
    chat = read_chat({"messages": [HELLO, {"role": "assistant", "tool_calls": [call]}]}, "x")
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"zone": None}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no type for mixed fields")
def test_fields_that_datasets_writes_as_json_are_decoded(read, tmp_path):
    parts = [{"type": "text", "text": "Hello"}]
    rows = [{"messages": [{"role": "user", "content": content}, WELL]} for content in ("Hello", parts, None)]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "mixed.parquet")
    features = {"messages": [{"role": datasets.Value("string"), "content": datasets.Json()}]}
    Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "typed.parquet")
    for name in ("mixed.parquet", "typed.parquet"):
        assert [row for _, row in read(tmp_path / name)] == rows


def exchange(row: dict, **options) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read_chat(row, "here", **options).messages]


PAIR = [("user", "Hello"), ("assistant", "Well")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hello", "completion": "Well"}, PAIR),
        ({"prompt": "Hello", "response": "Well"}, PAIR),
        ({"question": "Hello", "answer": "Well", "id": 3}, PAIR),
        ({"query": "Hello", "response": "Well"}, PAIR),
        ({"input": [HELLO], "output": "Well"}, PAIR),
        ({"query": "Hello", "answers": {"text": ["Well"]}}, PAIR[:1]),
        ({"prompt": [HELLO], "completion": [WELL]}, PAIR),
        ({"prompt": "unused", "messages": [HELLO, WELL]}, PAIR),
        ({"prompt": "Hello"}, PAIR[:1]),
        ({"instruction": "Hello", "input": "", "output": "Well"}, PAIR),
        ({"instruction": "Say", "input": "it", "output": "Well"}, [("user", "Say\nit"), PAIR[1]]),
        ({"instruction": "", "input": "Hello", "output": "Well"}, PAIR),
        ({"instruction": "Say", "context": "it", "response": "Well"}, [("user", "Say\nit"), PAIR[1]]),
        ({"question": "Say", "context": "it", "answer": "Well"}, [("user", "Say\nit"), PAIR[1]]),
        ({"question": "Hello", "context": {"id": 3}, "answer": "Well"}, PAIR),
        ({"question": "Say", "context": ["it", "", "now"], "answer": "Well"}, [("user", "Say\nit\nnow"), PAIR[1]]),
        (
            {"instruction": "Say", "output": "Well", "system": "Be kind.", "history": [["Hello", "Well"]]},
            [("system", "Be kind."), *PAIR, ("user", "Say"), PAIR[1]],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hello"}], "system": "Be kind."},
            [("system", "Be kind."), PAIR[0]],
        ),
        ({"messages": [SYSTEM, HELLO], "system": "Be kind."}, [("system", "Be kind."), PAIR[0]]),
        ({"messages": [SYSTEM, HELLO], "system": " "}, [("system", "Be kind."), PAIR[0]]),
        ({"conversation": [{"human": "Hello", "assistant": "Well"}]}, PAIR),
        (
            {"conversation": [{"system": "Be kind.", "input": "Hello", "output": "Well"}]},
            [("system", "Be kind."), *PAIR],
        ),
        ({"messages": json.dumps([HELLO, WELL])}, PAIR),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "value": "Hel"}, {"type": "input_text", "text": "lo"}],
                    }
                ]
            },
            PAIR[:1],
        ),
    ],
)
def test_shapes_of_rows(row, expected):
    assert exchange(row) == expected


def test_answers_that_are_json_text_are_tool_calls():
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    chat = read_chat({"query": "Hello", "answers": json.dumps(calls), "tools": json.dumps([{"name": "f"}])}, "x")
    assert [call["function"] for call in chat.messages[1]["tool_calls"]] == calls
    assert (chat.messages[1]["content"], chat.field_of(1)) == (None, "answers")


def test_preference_rows_need_a_choice():
    row = {"prompt": "Hello", "chosen": "Well", "rejected": "No"}
    with pytest.raises(PeagleError, match=r"here: this is a preference row.* --preference chosen"):
        exchange(row)
    assert exchange(row, preference="chosen") == PAIR
    assert exchange(row, preference="rejected") == [PAIR[0], ("assistant", "No")]
    whole = {"chosen": [HELLO, WELL], "rejected": [HELLO]}
    assert exchange(whole, preference="chosen") == PAIR
    assert exchange({"prompt": [HELLO], "chosen": [WELL], "rejected": []}, preference="chosen") == PAIR
    assert exchange({"prompt": "Hello", "chosen": [HELLO, WELL], "rejected": []}, preference="chosen") == PAIR
    with pytest.raises(PeagleError, match="without the question"):
        exchange({"chosen": [WELL], "rejected": [WELL]}, preference="chosen")


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({"messages": [HELLO, WELL], "images": ["a.png"]}, "the row has images", "images"),
        ({"messages": [HELLO, WELL], "audios": ["a.wav"]}, "the row has audios", "audios"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"other than text \(image_url\)",
            "messages[0].content[0]",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "weather(Paris)"}]},
            "not valid JSON",
            "conversations[0].value",
        ),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "no JSON object", "conversations[0].value"),
        (
            {"messages": [{**WELL, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "not valid JSON",
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{**WELL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "no JSON object",
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [HELLO, {**WELL, "reasoning": "Hm.", "thinking": "So."}]},
            "different reasoning in reasoning and thinking",
            "messages[1]",
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": "<think>So.</think>Well", "reasoning": "Hm."}]},
            "different reasoning in content and reasoning",
            "messages[1]",
        ),
        (
            {"messages": [HELLO, {**WELL, "channel": "analysis"}, {**WELL, "channel": "final"}]},
            "in the channel analysis; reasoning belongs to `reasoning`",
            "messages[1].channel",
        ),
        ({"messages": [SYSTEM, HELLO], "system": "Be rude."}, "two system prompts", "system"),
    ],
)
def test_a_chat_that_is_left_out_says_which_field(row, reason, field):
    with pytest.raises(Unlearnable, match=reason) as caught:
        read_chat(row, "here")
    assert caught.value.field == field


def test_function_calls_in_the_names_of_others():
    weather = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    share_gpt = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "No."},
    ]
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    chat = read_chat({"conversations": share_gpt, "tools": "[]"}, "here")
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1] == {"role": "assistant", "content": None, "tool_calls": [weather]}
    assert read_chat({"messages": [HELLO, old]}, "here").messages[1]["tool_calls"] == [weather]
    assert count_answers({"conversations": share_gpt}) == 2


def test_thoughts_among_the_parts_are_reasoning():
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Well"}]
    message = read_chat({"messages": [HELLO, {"role": "assistant", "content": parts}]}, "here").messages[1]
    assert (message["content"], message["reasoning_content"]) == ("Well", "Hm.")


def test_reasoning_that_is_given_twice_is_read_once():
    fields = {"reasoning_content": "Hm.", "reasoning": "Hm.\n"}
    message = read_chat({"messages": [HELLO, WELL | fields]}, "here").messages[1]
    assert [message[name] for name in ("reasoning_content", "reasoning", "thinking")] == ["Hm."] * 3
    content = "<think>\nHm.\n</think>\n\nWell"
    message = read_chat({"messages": [HELLO, {"role": "assistant", "content": content, **fields}]}, "here").messages[1]
    assert message == {"role": "assistant", "content": content}


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_have_the_form_that_servers_take(name):
    function = {"name": "f", "parameters": {}}
    tool = {"type": "function", "function": function}
    other = {"type": "web_search"}
    for given in ([function, other], [tool, other], [{"type": "function", **function}, other]):
        assert read_chat({"messages": [HELLO, WELL], name: given}, "here").tools == [tool, other]
    assert read_chat({"messages": [HELLO, WELL], name: []}, "here").tools is None
    with pytest.raises(PeagleError, match=f"here: {name} must be a list of JSON objects"):
        read_chat({"messages": [HELLO, WELL], name: ["f"]}, "here")


def test_a_call_without_arguments_has_empty_ones():
    for call in ({"name": "f"}, {"name": "f", "arguments": None}, {"name": "f", "arguments": ""}):
        chat = read_chat({"messages": [HELLO, {"role": "assistant", "tool_calls": [call]}]}, "here")
        assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"content": "<think>\nHm, so"}, "cut off within its reasoning"),
        ({"content": "<think>Hm.</think>Well"}, None),
        ({"content": "The tag <think> opens it."}, None),
        ({"weight": 0}, "not to train on it (weight: 0)"),
        ({"train": False}, "not to train on it (train: false)"),
        ({"loss": False}, "not to train on it (loss: false)"),
        ({"content": None, "refusal": "I can't."}, "the answer is a `refusal`"),
        ({"weight": "0"}, "not to train on it (weight: 0)"),
        ({"train": "False"}, "not to train on it (train: false)"),
        ({"weight": "1", "loss": "true"}, None),
        ({"weight": 1}, None),
        ({"weight": 0.5, "train": True}, None),
        ({"refusal": None}, None),
    ],
)
def test_what_the_data_says_not_to_train_on_is_excluded(change, reason):
    chat = read_chat({"messages": [HELLO, WELL, HELLO, {**WELL, **change}]}, "here")
    assert chat.excluded.keys() == ({3} if reason else set())
    assert reason is None or reason in chat.excluded[3]
    assert not chat.messages[3].keys() & {"weight", "train", "loss"}
    row = {name: value for name, value in change.items() if name in ("weight", "train", "loss")}
    if row:
        assert read_chat({"messages": [HELLO, WELL], **row}, "here").excluded.keys() == ({1} if reason else set())
    assert read_chat({"prompt": "Hello", "completion": "Well", "label": False}, "here").excluded.keys() == {1}
    assert not read_chat({"prompt": "Hello", "completion": "Well", "label": 0}, "here").excluded
