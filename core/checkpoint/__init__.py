"""Checkpoint v1: one file, the same content as `.npz` and `.pt`. See docs/checkpoint-format.md.

A published file is complete or absent; any one-bit damage is found before it is used; nothing that
is read can run code. `.npz` is read and written here with numpy alone; `.pt` shares all of it but
the envelope, which is `backends.torch_common.checkpoint`.
"""

from core.checkpoint.archive import Envelope, open_archive, write_archive
from core.checkpoint.content import check_checkpoint, initial_checkpoint, verify
from core.checkpoint.folder import (
    clean_temporaries,
    is_intact,
    link_best,
    list_checkpoints,
    newest_valid,
    prune,
    step_of,
    with_intact,
)
from core.checkpoint.meta import (
    DTYPES,
    Checkpoint,
    Meta,
    OpenCheckpoint,
    is_parameter,
    meta_summary,
)
from core.checkpoint.npz import open_npz, write_npz

__all__ = [
    "DTYPES",
    "Checkpoint",
    "Envelope",
    "Meta",
    "OpenCheckpoint",
    "check_checkpoint",
    "clean_temporaries",
    "initial_checkpoint",
    "is_intact",
    "is_parameter",
    "link_best",
    "list_checkpoints",
    "meta_summary",
    "newest_valid",
    "open_archive",
    "open_npz",
    "prune",
    "step_of",
    "verify",
    "with_intact",
    "write_archive",
    "write_npz",
]
