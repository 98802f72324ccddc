"""Adapters for other libraries: an attention implementation for transformers, encoders for mteb and others."""
