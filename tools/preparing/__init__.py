"""The verbs of tools/prepare_data.py."""
