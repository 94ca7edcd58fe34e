"""Inference on any backend: sampling, generation, evaluation."""
