"""DeBERTa v1, v2 and v3 as modules: configuration, embeddings, encoder, heads."""
