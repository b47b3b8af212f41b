"""Remove secrets (API keys, tokens, passwords) from URLs and command lines before they are printed or recorded.

This module imports nothing heavy, so that every command can use it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
_WORD = r"(?:token|password|passwd|passphrase|pwd|secret|credentials?|(?:api|access|auth|secret|private)[-_]?key)"
_NAME = re.compile(rf"(?:^|[-_.]){_WORD}$", re.I)
_USER_INFO = re.compile(r"(?<=://)[^\s\"']*@")
_QUERY = re.compile(rf"([?&][\w.-]*{_WORD}=)[^&#\s\"']+", re.I)
_JSON = re.compile(rf"(\"[\w.-]*{_WORD}\"\s*:\s*)\"(?:[^\"\\]|\\.)*\"", re.I)


def is_secret(name: str) -> bool:
    """Whether a field or flag of this name, such as `hub_token`, holds a secret."""
    return bool(_NAME.search(name))


def public_url(url: str) -> str:
    """An endpoint, `URL[,URL...]`, without user names, passwords and secret query values; otherwise unchanged.

    Everything between `://` and the last `@` of a URL is removed, since a user name may be a token.
    """
    parts = re.split(r"(,\s*(?=\w+://))", url)
    return "".join(_QUERY.sub(rf"\g<1>{MASK}", _USER_INFO.sub("", part)) for part in parts)


def public_command(words: Sequence[str]) -> list[str]:
    """A command line with masked secrets, for printing and for records; it keeps its number of words.

    Masked are the values of flags and variables whose name ends with a word such as key, token or password
    (`--api-key VALUE`, `--hf-token=VALUE`, `HF_TOKEN=VALUE`; several values too), the same names in JSON values and in
    a URL's query, and a URL's user name and password.
    """
    shown: list[str] = []
    follows_secret_flag = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = len(word) > 1 and word.startswith("-")
        has_secret = is_secret(name) and (is_flag or name.isidentifier())
        if follows_secret_flag and not is_flag:
            shown.append(MASK)
            continue
        shown.append(f"{name}={MASK}" if has_secret and equals else _public_word(word))
        follows_secret_flag = has_secret and is_flag and not equals
    return shown


def public_settings(settings: Any, name: str = "") -> Any:
    """A nested mapping of settings with its secrets masked as in `public_command`."""
    if isinstance(settings, Mapping):
        return {key: public_settings(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        if not is_secret(name) and all(isinstance(value, str) for value in settings):
            return public_command(settings)
        return [public_settings(value, name) for value in settings]
    if not isinstance(settings, str):
        return settings
    return MASK if settings and is_secret(name) else _public_word(settings)


def _public_word(word: str) -> str:
    return _JSON.sub(rf'\g<1>"{MASK}"', _QUERY.sub(rf"\g<1>{MASK}", _USER_INFO.sub("", word)))
