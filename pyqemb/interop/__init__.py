"""pyqemb inside other people's tools: the attention of transformers, an encoder of mteb."""
