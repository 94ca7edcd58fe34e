"""Parts of tools/show_configs.py."""
