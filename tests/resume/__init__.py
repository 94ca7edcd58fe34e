"""Tests; see each file for what it protects."""
