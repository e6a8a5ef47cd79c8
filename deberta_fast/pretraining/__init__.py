"""Pretraining of DeBERTa models."""
