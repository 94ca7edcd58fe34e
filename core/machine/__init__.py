"""Pippin's core.machine."""
