"""The prepared text as a run sees it: name, prompts, floor and exam."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.draft import Draft
from core.data import corpus
from core.data.preparing.prepare import Prepared, wanted_source
from core.data.preparing.request import resolve_tokenizer
from core.data.preparing.reuse import find_folder
from core.data.reading.sources import StorySource
from core.data.sampling.mixture import Mixture
from core.data.sampling.parts import TrainParts
from core.data.sampling.windows import make_windows
from core.data.shards.manifest import open_shards
from core.data.tokenizers.tokenizer import Tokenizer
from core.errors import PippinError
from core.machine.scaling import MIN_CORPUS_BYTES, STORY_BYTES_PER_TOKEN
from core.training import format as fmt
from core.training.disk import free_bytes

# An id of two bytes; more only for vocabularies above 65,536.
ID_BYTES = 2
# From here on writing stories takes minutes, and a word beforehand is due.
MANY_STORIES_BYTES = 50_000_000


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


def corpus_disk_bytes(corpus_bytes: float, tokenizer: str) -> float:
    """Bytes that the shards of stories take, at least; the text itself is not kept.

    Args:
        corpus_bytes: Bytes of stories.
        tokenizer: A kind, or the path of a tokenizer, which is taken for one of words.
    """
    per_token = 1.0 if tokenizer in ("byte", "char") else STORY_BYTES_PER_TOKEN
    return ID_BYTES * corpus_bytes / per_token


def refuse_full_disk(draft: Draft, tokenizer: str) -> None:
    """Refuse stories that the disk has no room for, unless they are there already.

    Args:
        draft: Its `data.corpus_bytes` is resolved.
        tokenizer: As `prepare` gets it.

    Raises:
        PippinError: P312, with a size that fits.
    """
    values = draft.values
    size, shards_dir = int(values["data.corpus_bytes"]), Path(values["data.shards_dir"])
    needed, free = corpus_disk_bytes(size, tokenizer), free_bytes(shards_dir)
    if free is None or needed <= free or _is_prepared(values, size, tokenizer):
        return
    # Two digits of nine tenths of what would fill the disk.
    room = 0.9 * free / corpus_disk_bytes(1, tokenizer)
    fits = int(float(f"{room:.1e}"))
    remedy = f"data.corpus_bytes={fits}"
    if fits < MIN_CORPUS_BYTES:
        remedy = "data.shards_dir=FOLDER   (on another disk), or free some space"
    raise PippinError(
        "P312",
        f"{fmt.gigabytes(size)} of stories take {fmt.gigabytes(needed)} as shards, and the disk of "
        f"{shards_dir} has {fmt.gigabytes(free)} free.",
        choices=("--force   (tries it all the same)",),
        remedy=remedy,
        kept="nothing was written.",
    )


def tell_many_stories(draft: Draft, tokenizer: str, tell: Callable[[str, str], None]) -> None:
    """Say beforehand how many stories are written, where they take a while and are not there yet.

    Args:
        draft: Its `data.corpus_bytes` is resolved.
        tokenizer: As `prepare` gets it.
        tell: Told a name and what there is to know.
    """
    size = int(draft.values["data.corpus_bytes"])
    if size >= MANY_STORIES_BYTES and not _is_prepared(draft.values, size, tokenizer):
        disk = fmt.gigabytes(corpus_disk_bytes(size, tokenizer))
        tell("data", f"writing {fmt.gigabytes(size)} of stories first, once ({disk} of disk)")


def _is_prepared(values: Mapping[str, Any], size: int, tokenizer: str) -> bool:
    split = (values["data.val_fraction"], values["data.test_fraction"])
    source = StorySource(size, values["data.seed"], *split)
    vocab = values["model.vocab_size"]
    request = resolve_tokenizer(source, tokenizer, None if vocab == "auto" else vocab)
    wanted = wanted_source(source, seed=source.seed, val_fraction=split[0], test_fraction=split[1])
    shards_dir = Path(values["data.shards_dir"])
    return find_folder(shards_dir, wanted, request, lambda *told: None) is not None


def readable(error: PippinError, resumed: Path | None = None) -> PippinError:
    """An error of preparing a text, with what to type and what was kept where it says neither.

    Args:
        error: The error, changed in place.
        resumed: The checkpoint that a run goes on from, which needs its own text and no other.
    """
    if error.code == "P201" and resumed is not None:
        again = f"python train.py --resume {shlex.quote(str(resumed))}"
        error.remedy = f"{again} --input_file PATH   (where the run's text lies now)"
        error.choices = ()
    if error.code == "P201" and not error.remedy:
        near = next((c for c in error.choices if Path(c).exists()), None)
        given = "FILE   (with text in it)" if near is None else shlex.quote(near)
        error.remedy = f"python train.py --input_file {given}"
    error.kept = error.kept or "nothing was started."
    return error
