"""Token files of other programs, read and imported."""
