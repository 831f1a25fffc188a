"""Files -> examples (readers, named) -> token ids (tokenized) -> task data (dataset) -> padded batches (batching)."""
