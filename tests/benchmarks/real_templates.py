"""Try the kinds of chats of `peagle-hf data template` on many chat templates, and check the masks in another way.

    python tests/benchmarks/real_templates.py FOLDER

FOLDER holds one chat template a file, `NAME.jinja`. Their tokenizers are not needed: a small one is made for each,
whose special tokens are those that the template writes. The check knows nothing of how masks are found. It decodes a
row up to where an answer begins to be trained on, and compares that with the template's own text of the chat before the
answer, with the generation prompt; what is trained on must then be what the template writes next.
"""

import copy
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from peagle_hf.data.chats import read_chat
from peagle_hf.data.inspect_template import KINDS, TOOLS, check_template
from peagle_hf.data.loss_mask import ChatTokenizer

TEXT = ["Hello there, user and assistant. What is the weather? Think, then call a tool.\n\n"]
BAR = chr(0xFF5C)
"""The wide bar in DeepSeek's special tokens."""
SPECIAL = re.compile(
    rf"<{BAR}[^<>\s{{}}']{{1,40}}{BAR}>|"
    r"<\|[^|<>\s{}']{1,40}\|?>|</?s>|\[/?[A-Z_]{3,30}\]|\[\|[a-z]+\|\]|<[a-z]+_of_[a-z_]+>"
    r"|</?[A-Z][A-Z_]{3,30}>|<SPECIAL_\d+>|<extra_id_\d>|<seed:[a-z]+>"
)
ENDS = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|END_OF_TURN_TOKEN|>",
        f"<{BAR}end▁of▁sentence{BAR}>",
        "<|return|>",
    ),
    *("[|endofturn|]", "<|endofassistant|>", "<turn|>", "<|eot|>", "</s>"),
)


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that knows the template's special tokens, as far as they look like such."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    special = sorted({*SPECIAL.findall(template), "<s>", "</s>"})
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    end = next(token for token in ENDS if token in template or token == "</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    return tokenizer


def judge(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any, row: Any) -> Counter[str]:
    """Count the answers of a row by verdict: the better one with null and with empty content beside tool calls."""
    filled = [message | {"content": message.get("content") or ""} for message in messages]
    return max((judge_as(tokenizer, form, tools, row) for form in (messages, filled)), key=lambda found: found["right"])


def judge_as(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any, row: Any) -> Counter[str]:
    """Count the answers of a row that are right, wrong, or that the template alone gives no text to compare with."""
    verdicts: Counter[str] = Counter()
    begin = 0
    for index, end in zip(row.messages, row.ends, strict=True):
        trained = [place for place in range(begin, end) if row.loss_mask[place]]
        before, answer, open_answer = (
            decoded(tokenizer, row.input_ids[places]) for places in (slice(trained[0]), trained, trained[:-1])
        )
        begin = end
        prompt = rendered(tokenizer, messages[:index], tools, True)
        whole = rendered(tokenizer, messages[: index + 1], tools, False)
        if prompt is None or whole is None or before != prompt or not whole.startswith(prompt):
            verdicts["not comparable"] += 1
            continue
        written = whole[len(prompt) :]
        content = messages[index].get("content") or ""
        if "</think>" in content and "</think>" not in written:  # the template takes out what the verifier writes
            written = written.replace(content.rpartition("</think>")[2].strip(), content.strip(), 1)
        # Without the last token where the end of the turn is the next turn's first token.
        if written.startswith(answer.rstrip()) or written.rstrip() == open_answer.rstrip() or index in row.marked:
            verdicts["right"] += 1
        else:
            verdicts["wrong"] += 1
            print(f"   perhaps wrong: after {before[-60:]!r} {answer!r} is trained on; the template writes {written!r}")
    return verdicts


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: Any, prompt: bool) -> str | None:
    try:
        text = tokenizer.apply_chat_template(
            copy.deepcopy(messages), tools=copy.deepcopy(tools), add_generation_prompt=prompt, tokenize=False
        )
    except Exception:  # whatever a template raises
        return None
    return str(text)


def main(folder: str) -> None:
    logging.set_verbosity_error()
    statuses: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    lost = 0
    files = sorted(Path(folder).glob("*.jinja"))
    for path in files:
        tokenizer = make_tokenizer(path.read_text(encoding="utf-8"))
        results = check_template(tokenizer)
        of_this = Counter(result.status for result in results)
        statuses += of_this
        chats = [
            read_chat({"messages": messages, "tools": TOOLS if has_tools else None}, kind)
            for kind, (messages, has_tools) in KINDS.items()
        ]
        for chat, masked in zip(chats, ChatTokenizer(tokenizer).mask(chats), strict=True):
            answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
            found = [index for row in masked.samples for index in row.messages]
            found += [entry.message for entry in masked.left_out if entry.message is not None]
            lost += len(answers) - len(set(found)) + len(found) - len(set(found))
            for row in masked.samples:
                verdicts += judge(tokenizer, chat.messages, chat.tools, row)
        print(path.stem, dict(of_this), flush=True)
    print(f"{len(files)} templates, {len(KINDS)} kinds of chats: {dict(statuses)}")
    print(f"answers trained on: {dict(verdicts)}; answers in no place or in two: {lost}")


if __name__ == "__main__":
    main(sys.argv[1])
