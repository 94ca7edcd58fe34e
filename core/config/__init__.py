"""Pippin's core.config."""
