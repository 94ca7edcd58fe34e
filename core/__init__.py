"""Backend-neutral core of Pippin. Nothing here imports torch or mlx, not even inside a function."""

__version__ = "0.1.0"
