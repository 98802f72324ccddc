"""Data loading: from text pairs to packed token batches."""
