"""The draft vocabulary: the verifier's tokens that a drafter predicts, chosen by how often they are trained on.

Shape letters: V verifier vocabulary, Vd draft vocabulary.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import PeagleError


def load_token_freq(path: str | os.PathLike[str]) -> Tensor | dict[int, int]:
    """Read `token_freq.pt`: how often each token id is trained on, as a tensor indexed by id or a dict.

    Raises:
        PeagleError: there is no such file, or it holds something else.
    """
    if not os.path.exists(path):
        raise PeagleError(
            f"{path} is not there. peagle-hf prepare writes the token counts into the folder of the prepared data, as "
            "token_freq.pt; --token-freq-path of train names another file."
        )
    try:
        token_freq = torch.load(path, weights_only=True) if zipfile.is_zipfile(path) else None
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise PeagleError(f"The token counts {path} can't be read: {error} Run peagle-hf prepare again.") from error
    if isinstance(token_freq, Tensor) and token_freq.ndim == 1:
        return token_freq
    if isinstance(token_freq, dict) and all(type(id_) is type(n) is int and id_ >= 0 for id_, n in token_freq.items()):
        return token_freq
    raise PeagleError(f"{path} is no file of token counts, or a damaged one. Run peagle-hf prepare again.")


def draft_vocabulary(token_freq: Tensor | Mapping[int, int], size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Choose the `size` most frequent tokens, among equally frequent ones the lower ids, and map them.

    If fewer tokens have a count, the lowest of the other ids are added.

    Returns:
        d2t int64 [Vd], the verifier's id of draft token i minus i, ids ascending; t2d bool [V], the drafted ids.

    Raises:
        PeagleError: `size` is not in 1 .. `vocab_size`, or a counted id is outside the vocabulary.
    """
    if not 1 <= size <= vocab_size:
        raise PeagleError(
            f"draft_vocab_size is {size}, but the verifier's vocabulary has {vocab_size} tokens. "
            f"Choose a size in 1 .. {vocab_size}, or leave it out to draft the whole vocabulary."
        )
    pairs = enumerate(token_freq.tolist()) if isinstance(token_freq, Tensor) else token_freq.items()
    seen = {token_id: count for token_id, count in pairs if count}
    outside = [token_id for token_id in seen if not 0 <= token_id < vocab_size]
    if outside:
        raise PeagleError(
            f"The token counts name token id {outside[0]}, but the verifier's vocabulary has {vocab_size} tokens: they "
            "belong to another tokenizer. Run peagle-hf prepare with this verifier."
        )
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    counts[list(seen)] = torch.tensor(list(seen.values()), dtype=torch.int64)
    token_ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[token_ids] = True
    return token_ids - torch.arange(size), t2d
