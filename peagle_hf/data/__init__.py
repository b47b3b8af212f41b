"""From conversations to batches: prepare, regenerate, extract, cache, dataset, collator.

Conversations (`sources`, `chats`) become samples with a loss mask (`samples`, `loss_mask`, `prepare`), the verifier's
hidden states of samples are cached (`extract`, `cache_storage`), and both are packed into batches (`dataset`,
`collator`). vLLM servers are asked by `endpoint`.
"""
