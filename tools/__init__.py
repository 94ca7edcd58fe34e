"""One file per job; each runs by itself, `python tools/NAME.py`, from any folder."""
