"""The packed decoder and its families, and the models around it.

`Embedder` and `Reranker` are loaded from and saved to model folders.
"""
