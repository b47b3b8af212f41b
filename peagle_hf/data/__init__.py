"""From chats to batches: prepare, regenerate, extract, cache, dataset, collator."""
