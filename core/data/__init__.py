"""Pippin's core.data."""
