"""A connector by which vLLM writes hidden states on a CPU; vLLM's own needs CUDA streams and pinned memory.

vLLM imports it as a top-level module: the folder is on the server's PYTHONPATH (see `peagle_hf.serving.launch`).
"""

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Like vLLM's own connector, but states are copied out of the cache immediately, and its threads write them."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        block_ids = torch.tensor(pending.block_ids, dtype=torch.long)
        offsets = torch.arange(self._block_size)
        slots = (block_ids[:, None] * self._block_size + offsets).flatten()
        num_tokens = pending.token_ids.shape[0]
        tensors = {
            "hidden_states": extract_from_kv_cache(self._kv_cache, slots[:num_tokens], num_tokens),
            "token_ids": pending.token_ids,
        }
        done = _Done()
        lock = self._lock_fds.pop(pending.req_id, None)
        future = self._executor.submit(self._write_tensors, tensors, done, pending.filename, lock)
        self._req_copy_events[pending.req_id] = done
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda future: self._on_write_done(pending.req_id, future))


class _Done:
    """Replaces the CUDA event of a finished copy."""

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True
