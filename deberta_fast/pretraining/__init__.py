"""Pretraining: masked language models and replaced-token detection, from text to a checkpoint."""
