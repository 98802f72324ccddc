"""Text pairs in, packed token batches out: example -> tokenizer -> batch -> loader."""
