"""The prepared text as a run sees it: name, prompts, floor and exam."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.data import corpus
from core.data.prepare import Prepared
from core.data.shards import TokenStream, open_shards
from core.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextData:
    """Prepared shards and what is known about their text.

    Attributes:
        prepared: The shards, their manifest and tokenizer.
        name: Stem of run names: "stories", or the input file's.
        is_stories: Whether the text is the project's own corpus, which has a floor and an exam.
    """

    prepared: Prepared
    name: str
    is_stories: bool

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the shards."""
        return self.prepared.tokenizer

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self.prepared.folder

    @property
    def manifest_sha256(self) -> str:
        """Identifies the data in a checkpoint."""
        return self.prepared.manifest_sha256

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return self.prepared.train_tokens

    @property
    def floor_bits_per_byte(self) -> float | None:
        """Entropy of generated text, which no model can beat; None for other text."""
        return self.prepared.manifest.splits["val"].entropy_bits_per_byte

    @property
    def floor_nats_per_token(self) -> float | None:
        """The floor in the loss's unit, by the validation split's own bytes a token."""
        return self.prepared.floor_nats_per_token

    def open(self, split: str) -> TokenStream:
        """Tokens of a split, verified."""
        return open_shards(
            self.prepared.folder,
            "train" if split == "train" else "val",
            tokenizer=self.tokenizer.fingerprint,
        )

    def prompts(self) -> tuple[str, ...]:
        """Beginnings for samples: the corpus's own, or those of validation documents."""
        return tuple(corpus.PROMPTS) if self.is_stories else self.prepared.prompts

    def probes(self, count: int, seed: int) -> "Sequence[corpus.Probe]":
        """Questions about unseen stories; none for other text."""
        return corpus.probes(count, seed) if self.is_stories else ()

    def chances(self) -> Mapping[str, float]:
        """Share of right answers by guessing, for each skill."""
        return {skill: corpus.chance(skill) for skill in corpus.SKILLS} if self.is_stories else {}


def text_data(prepared: Prepared, input_file: str | None) -> TextData:
    """Name the prepared text."""
    return TextData(prepared, prepared.name, input_file is None)
