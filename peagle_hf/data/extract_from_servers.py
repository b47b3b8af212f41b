"""Ask vLLM servers for the hidden states of prepared samples: `peagle-hf extract --endpoint`.

Shape letters: T tokens, A auxiliary layers, H the verifier's hidden size.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..console import number_of, progress_bar
from ..errors import PeagleError
from ..files import write_json
from .cache_storage import CachedStates
from .dataset import MAX_NAMED
from .endpoint import concurrently
from .endpoint_states import Endpoint
from .errors import EndpointError, RowError, WrongServerEndpointError

if TYPE_CHECKING:
    import datasets

    from .extract import ExtractArguments

logger = logging.getLogger(__name__)


def extract_from_servers(
    arguments: "ExtractArguments",
    failed_record: Path,
    data: "datasets.Dataset",
    lengths: dict[int, int],
    endpoint: Endpoint,
    write: Callable[[int, CachedStates], None],
) -> float:
    """Ask vLLM servers for the states of samples, several at a time and the longest first, and hand them to `write`.

    Args:
        failed_record: the file that lists the samples that failed.
        lengths: tokens of each sample to extract, by its row in `data`.
        write: called from several threads with a sample's row and its plain states.

    Returns:
        Seconds that this took.

    Raises:
        PeagleError: a sample failed; those that didn't are cached.
    """
    dtype, num_tokens = getattr(torch, arguments.dtype), 0
    failed_record.unlink(missing_ok=True)
    limit = 1 if arguments.fail_on_error else arguments.max_consecutive_errors or arguments.concurrency
    failed: dict[int, str] = {}
    num_consecutive = 0

    def extract_sample(row: int) -> None:
        token_ids = data[row]["input_ids"]
        write(row, CachedStates(torch.tensor(token_ids), endpoint.fetch(token_ids, dtype)))

    start = time.perf_counter()
    longest_first = sorted(lengths, key=lambda row: (-lengths[row], row))
    with (
        _one_core_a_thread(),
        progress_bar(total=sum(lengths.values()), desc="Extracting", unit="tok", unit_scale=True) as progress,
    ):
        for row, result in concurrently(extract_sample, longest_first, arguments.concurrency):
            if isinstance(result, WrongServerEndpointError):
                raise RowError.of(row, Path(arguments.preprocessed_data), result) from result
            if isinstance(result, EndpointError):
                logger.warning("Row %d failed: %s.", row, result)
                failed[row] = str(result)
                num_consecutive += 1
                progress.set_postfix(failed=len(failed))
                if num_consecutive >= limit:
                    break
            elif isinstance(result, BaseException):
                raise result
            else:
                num_consecutive = 0
                num_tokens += lengths[row]
                progress.update(lengths[row])
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.1f s: %.0f tokens/s.", num_tokens, seconds, num_tokens / seconds)
    if failed:
        write_json(failed_record, {str(row): failed[row] for row in sorted(failed)})
        ended = f"{num_consecutive} consecutive samples failed, so no more were tried. "
        raise _failed_samples(failed, len(lengths), failed_record, ended if num_consecutive >= limit else "")
    return seconds


@contextmanager
def _one_core_a_thread() -> Iterator[None]:
    """Let each thread that is started in the block convert states on one core, as there are many such threads."""
    num_cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_cores)


def _failed_samples(failed: dict[int, str], num_samples: int, record: Path, ended: str) -> PeagleError:
    """The error raised at the end of an extraction in which servers failed some samples.

    Args:
        failed: rows of the samples in the order in which they failed, and why.
        num_samples: that were to be extracted.
        record: the file that lists all of them.
        ended: why no more were tried, as a sentence and a space; empty if all were.
    """
    row, reason = next(reversed(failed.items()))
    return PeagleError(
        f"{ended}{len(failed)} of {number_of(num_samples, 'sample')} failed, row {row} with: {reason}. All are listed "
        f"with their reason in {record}. Run the same command again, which extracts only what is missing; leave out "
        f"what fails every time with --skip-rows {' '.join(map(str, sorted(failed)[:MAX_NAMED]))}"
        f"{' ...' if len(failed) > MAX_NAMED else ''}."
    )
