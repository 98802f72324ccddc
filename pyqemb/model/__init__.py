"""The packed decoder and its families, Embedder and Reranker around it, and the folders that they are read from and written to."""
