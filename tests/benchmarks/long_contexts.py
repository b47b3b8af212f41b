"""Acceptance by position in the context, of drafters trained with different sliding windows on the same long chats.

    python tests/benchmarks/long_contexts.py VERIFIER CHATS.jsonl --windows 0 1024 --seq-length 8192 --output OUT

VERIFIER is a folder or hub name. CHATS has `messages` or `conversations` in each line. 0 is full attention.
--join-characters N makes long chats of short ones: lines are joined, one after another, up to so many characters (about
four times the tokens), so later answers stand far into a context of other chats. Each window is trained with each seed;
acceptance is measured offline on the samples that the training kept back. A finished training is not repeated. The
output folder is for one set of options; windows and seeds can be added.
"""

import argparse
import json
import sys
from pathlib import Path

from peagle_hf import (
    AcceptanceArguments,
    ExtractArguments,
    PeagleTrainingArguments,
    PrepareArguments,
    acceptance,
    extract,
    prepare,
    train,
)
from peagle_hf.data.contexts import CONTEXTS

RATIO = 0.9
"""Share of the samples that is trained on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier")
    parser.add_argument("chats", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 1024], help="tokens; 0 is full attention")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--join-characters", type=int, default=0)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-depths", type=int, default=4)
    parser.add_argument("--draft-vocab-size", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    keep_options(options)
    data = options.output / "data"
    if not (data / "prepare.json").exists():
        data.mkdir(parents=True, exist_ok=True)
        chats = options.chats
        if options.join_characters:
            chats = joined(options.chats, options.join_characters, options.output / "joined.jsonl")
        prepare(PrepareArguments(options.verifier, [str(chats)], str(data), seq_length=options.seq_length))
    extract(ExtractArguments(options.verifier, str(data)))  # samples that are cached already are kept
    for window in options.windows:
        for seed in options.seeds:
            report = measured(options, data, window, seed)
            lengths = [report["by_context"][name] for name in CONTEXTS]
            cells = [f"{row['acceptance_length']:.3f} in {row['num_drafts']}" for row in lengths]
            print(f"window {window or 'none':>5}, seed {seed}: {report['acceptance_length']:.3f}", *cells, sep=" | ")


def keep_options(options: argparse.Namespace) -> None:
    """Write the options beside the results, which are read again by window and seed alone; end if they were others."""
    kept = {name: str(value) for name, value in vars(options).items() if name not in ("output", "windows", "seeds")}
    path = options.output / "options.json"
    if not path.exists():
        if options.output.exists() and any(options.output.iterdir()):
            sys.exit(
                f"{options.output} has results, but not the options that they were made with. Name another --output."
            )
        options.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))
    earlier = json.loads(path.read_text())
    changes = [
        f"{name} is {kept.get(name)} and was {earlier.get(name)}"
        for name in earlier | kept
        if kept.get(name) != earlier.get(name)
    ]
    if changes:
        sys.exit(f"{options.output} has results of other options: {'; '.join(changes)}. Name another --output.")


def measured(options: argparse.Namespace, data: Path, window: int, seed: int) -> dict:
    folder = options.output / f"window_{window}_seed_{seed}"
    result = folder / "acceptance.json"
    if not result.exists():
        train(
            PeagleTrainingArguments(
                verifier_name_or_path=options.verifier,
                data_path=str(data),
                output_dir=str(folder),
                num_layers=options.num_layers,
                num_depths=options.num_depths,
                draft_vocab_size=options.draft_vocab_size,
                sliding_window=window or None,
                total_seq_len=options.seq_length,
                num_train_epochs=options.epochs,
                learning_rate=2e-3,
                train_data_ratio=RATIO,
                seed=seed,
            )
        )
        best = str(folder / "checkpoint_best")
        acceptance(
            AcceptanceArguments(best, str(data), str(result), train_data_ratio=RATIO, total_seq_len=options.seq_length)
        )
    return json.loads(result.read_text())


def joined(source: Path, most: int, path: Path) -> Path:
    """Join chats, one after another, as long as they have at most so many characters; system messages are left out."""
    chats, messages, size = [], [], 0
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [turn for turn in row.get("messages") or row["conversations"] if turn.get("role") != "system"]
        length = len(json.dumps(turns))
        if messages and size + length > most:
            chats.append(messages)
            messages, size = [], 0
        messages, size = messages + turns, size + length
    chats.append(messages)
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
