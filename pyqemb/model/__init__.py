"""The packed Qwen3, the embedder around it, and the folders that both are read from and written to."""
