"""The story corpus: short English stories with a known truth, made on the fly.

Guarantees: story ``index`` of ``seed`` is the same text on every machine; its entropy is
counted draw by draw, so ``Summary.entropy_bits_per_byte`` is a floor no model can pass by
more than the little that two draws giving the same text would save; the exam asks only
what the story so far determines. It downloads nothing and needs no numpy.
"""

from __future__ import annotations

from core.data.corpus.probes import SKILLS, Probe, chance, probes
from core.data.corpus.story import (
    SPLITS,
    VERSION,
    Story,
    Summary,
    split_of,
    stories,
    story,
    summary,
)

__all__ = [
    "PROMPTS",
    "SKILLS",
    "SPLITS",
    "VERSION",
    "Probe",
    "Story",
    "Summary",
    "chance",
    "probes",
    "split_of",
    "stories",
    "story",
    "summary",
]

PROMPTS = (
    "One day Mia had a red kite",
    "Long ago Tom had a small green drum",
    "Once Lucy, a shy girl, had an old yellow hat",
)
"""Openings for live samples: a hero with a coloured thing, as the corpus opens."""
