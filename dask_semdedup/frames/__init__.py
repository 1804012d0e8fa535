"""Frames of pandas or cuDF, and what their columns hold: ids and embeddings."""
