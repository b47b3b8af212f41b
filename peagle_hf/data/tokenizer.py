"""The verifier's tokenizer, its fingerprints, and the chat template and variables that the user may choose."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import PeagleError
from ..verifier.loading import load_verifier_tokenizer

CHAT_TEMPLATE_HELP = (
    "Chat template to use instead of the tokenizer's default: a name among the tokenizer's own, or a Jinja file."
)
CHAT_TEMPLATE_KWARGS_HELP = (
    "Variables for the chat template, as a JSON object, for example '{\"enable_thinking\": false}'. Use the same ones "
    "in every command, and in serving."
)
CHAT_TEMPLATE_OF_DRAFTER_HELP = (
    "Chat template: a name among the verifier's own, or a Jinja file. Default: the one that the drafter was trained "
    "with."
)
CHAT_KWARGS_OF_DRAFTER_HELP = (
    "Variables for the chat template, as a JSON object, for example '{\"enable_thinking\": false}'. Default: those "
    "that the drafter was trained with; '{}' is none."
)


_PROBE = (
    "It's 2,048 tokens\n\n\tdef area(r): return 3.14159 * r**2  # naïve, “quoted” \u2014 100%\r\n"
    "Größe, señor, привет, 你好世界, こんにちは, مرحبا, 🙂👍🏽 <b>&amp;</b> snake_case CamelCase 1234567   end "
)
"""Text of many kinds, by whose token ids tokenizers are told apart."""


@dataclass(frozen=True)
class ChatOptions:
    """Chat template and its variables, which must be the same in preparing data, training, measuring and serving.

    Args:
        template: text of the chat template that was chosen; None is the tokenizer's own.
        kwargs: the template's variables.
    """

    template: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def chosen(
        cls,
        model: str,
        trust_remote_code: bool,
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any] | str | None,
        default: "ChatOptions | None" = None,
    ) -> "ChatOptions":
        """The options that `--chat-template` and `--chat-template-kwargs` name; one that isn't given is the default's.

        Args:
            model: among whose named templates the template may be.

        Raises:
            PeagleError: there is no such template, or the variables are no JSON object.
        """
        default = default or cls()
        template, kwargs = default.template, default.kwargs
        if chat_template is not None:
            template = load_tokenizer(model, trust_remote_code, chat_template).chat_template
        if chat_template_kwargs is not None:
            kwargs = read_template_kwargs(chat_template_kwargs)
        return cls(template, kwargs)

    def description(self) -> dict[str, Any]:
        """The options for a report, the template by a fingerprint; what isn't chosen is None."""
        template = None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()[:16]
        return {"chat_template": template and f"sha256 {template}", "chat_template_kwargs": self.kwargs or None}

    def fingerprint(self) -> str:
        """The description as one line of JSON, for each row that `regenerate` writes."""
        return json.dumps(self.description(), sort_keys=True)


def load_tokenizer(model: str, trust_remote_code: bool, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or a folder, and replace its chat template if one is given.

    Raises:
        PeagleError: that is not possible.
    """
    tokenizer = load_verifier_tokenizer(model, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(tokenizer, chat_template)
    return tokenizer


def read_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_file: str) -> str:
    """The text of a chat template: one of the tokenizer's own by its name, or a file.

    Raises:
        PeagleError: there is neither such a template nor such a file, or the file is JSON.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {"default": own}
    if name_or_file in named:
        return str(named[name_or_file])
    path = Path(name_or_file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PeagleError(
            f"--chat-template {name_or_file} is neither a template of {tokenizer.name_or_path} (it has "
            f"{', '.join(named) or 'none'}) nor a file that can be read ({error}). Name one of these, or a Jinja file."
        ) from error
    try:
        json.loads(text)
    except ValueError:
        return text
    raise PeagleError(
        f"--chat-template {name_or_file} is a JSON file, not a Jinja template. Write the text that is its "
        "chat_template into a file of its own, without the quotes and with its escapes resolved, and name that file."
    )


def no_default_template(tokenizer: PreTrainedTokenizerBase) -> PeagleError:
    """The error about a tokenizer that has no chat template, or several named ones of which none is the default."""
    if tokenizer.chat_template is None:
        return PeagleError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so it is unknown how a chat is written "
            "for this model. Name a chat model, or a template with --chat-template."
        )
    return PeagleError(
        f"The tokenizer of {tokenizer.name_or_path} has several chat templates and none of them is the default: "
        f"{', '.join(tokenizer.chat_template)}. Name one with --chat-template."
    )


def read_template_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The variables for a chat template, from a YAML mapping or JSON text.

    Raises:
        PeagleError: the value is no JSON object, or sets a variable that the chat template is given anyway.
    """
    try:
        kwargs = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise PeagleError(
            f"--chat-template-kwargs {value} is not valid JSON ({error}). Write for example "
            "'{\"enable_thinking\": false}', in quotes."
        ) from error
    if not isinstance(kwargs, dict):
        raise PeagleError(
            f"--chat-template-kwargs {value} must be a JSON object, such as '{{\"enable_thinking\": false}}'."
        )
    if taken := kwargs.keys() & {"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"}:
        raise PeagleError(
            f"--chat-template-kwargs can't set {', '.join(sorted(taken))}, which comes from the data. Take it out."
        )
    return kwargs


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, the special tokens and the chat template."""
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [sorted(tokenizer.get_vocab().items()), special_tokens, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenization_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits of SHA-256 of how text becomes tokens: the merges, and the token ids of a text of many kinds.

    Two tokenizers may have the same vocabulary and cut text differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if backend is not None else []
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]
    content = [merges, tokenizer(_PROBE, add_special_tokens=True)["input_ids"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits of SHA-256 of the vocabulary with its added tokens, which says what token ids mean."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of SHA-256 of the chat template by which this tokenizer turns chats into text."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()[:16]
