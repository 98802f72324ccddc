"""The packed decoder and its families, and the models around it.

Embedder and Reranker are read from folders and written to them.
"""
