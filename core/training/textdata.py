"""The prepared text as a run sees it: name, prompts, floor and exam."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.data import corpus
from core.data.preparing.prepare import Prepared
from core.data.sampling.mixture import Mixture
from core.data.sampling.parts import TrainParts
from core.data.sampling.windows import make_windows
from core.data.shards.manifest import open_shards
from core.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextData:
    """Prepared shards and what is known about their text.

    Attributes:
        prepared: The shards, their manifest and tokenizer.
        name: Stem of run names: "stories", or the input file's.
        is_stories: Whether the text is the project's own corpus, which has a floor and an exam.
        mixture: Several folders of shards that are trained on together; `prepared` is one of them.
    """

    prepared: Prepared
    name: str
    is_stories: bool
    mixture: Mixture | None = None

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
        return self.mixture.content_sha256 if self.mixture else self.prepared.manifest_sha256

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return self.mixture.train_tokens if self.mixture else self.prepared.train_tokens

    @property
    def floor_bits_per_byte(self) -> float | None:
        """Entropy of generated text, which no model can beat; None for other text."""
        if self.mixture is not None:
            return None
        return self.prepared.manifest.splits["val"].entropy_bits_per_byte

    @property
    def floor_nats_per_token(self) -> float | None:
        """The floor in the loss's unit, by the validation split's own bytes a token."""
        return None if self.mixture is not None else self.prepared.floor_nats_per_token

    def parts(self, split: str, sampling: str, seq_len: int, seed: int) -> TrainParts:
        """Tokens of a split, verified and cut into windows."""
        if self.mixture is not None:
            cut = self.mixture.train_parts if split == "train" else self.mixture.eval_parts
            return cut(sampling, seq_len, seed)
        stream = open_shards(
            self.prepared.folder,
            "train" if split == "train" else "val",
            tokenizer=self.tokenizer.fingerprint,
        )
        return TrainParts((stream,), (make_windows(stream, sampling, seq_len, seed),), (1.0,))

    def prompts(self) -> tuple[str, ...]:
        """Beginnings for samples: the corpus's own, or those of validation documents."""
        return tuple(corpus.PROMPTS) if self.is_stories else self.prepared.prompts

    def probes(self, count: int, seed: int) -> "Sequence[corpus.Probe]":
        """Questions about unseen stories; none for other text."""
        return corpus.probes(count, seed) if self.is_stories else ()

    def chances(self) -> Mapping[str, float]:
        """Share of right answers by guessing, for each skill."""
        return {skill: corpus.chance(skill) for skill in corpus.SKILLS} if self.is_stories else {}


def text_data(
    prepared: Prepared, input_file: str | None, mixture: Mixture | None = None
) -> TextData:
    """Name the prepared text."""
    name = prepared.name if mixture is None else "mixture"
    return TextData(prepared, name, input_file is None, mixture)
