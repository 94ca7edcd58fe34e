"""Mixtures: a run on several folders of shards, each with a weight.

The weights are shares of the rows of a run (`order.MixtureOrder`): each text is read in its
own order, so that each of its tokens is a target once in each of its own epochs, however often
the others are read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.sampling.parts import TrainParts
from core.data.sampling.windows import make_windows
from core.data.shards.manifest import Manifest, load_manifest, open_shards
from core.data.shards.stream import TokenStream
from core.data.split import Split
from core.errors import PippinError

__all__ = ["Mixture", "MixtureItem", "open_mixture", "parse_mixture"]


@dataclass(frozen=True)
class MixtureItem:
    """One text of a mixture.

    Attributes:
        path: A folder of shards.
        weight: Its share of the rows; only the ratios matter.
    """

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several folders of shards of one tokenizer.

    Attributes:
        items: As they were asked for.
        folders: Where they lie.
        manifests: What they hold.
    """

    items: tuple[MixtureItem, ...]
    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of the rows of each, which sum to 1."""
        total = sum(item.weight for item in self.items)
        return tuple(item.weight / total for item in self.items)

    @property
    def main(self) -> Path:
        """The folder with the most validation: what is shown of a text is shown of this one."""
        sizes = [_tokens(manifest, "val") for manifest in self.manifests]
        return self.folders[sizes.index(max(sizes))]

    @property
    def train_tokens(self) -> int:
        """Tokens of all training splits."""
        return sum(manifest.splits["train"].tokens for manifest in self.manifests)

    @property
    def content_sha256(self) -> str:
        """Identifies the mixture in a checkpoint: each text's identity and weight, in hex."""
        if len(self.items) == 1:
            return self.manifests[0].content_sha256()
        lines = [f"{m.content_sha256()} {w!r}" for m, w in zip(self.manifests, self.weights)]
        return hashlib.sha256("\n".join(["mixture 1", *lines]).encode()).hexdigest()

    def train_parts(self, sampling: str, seq_len: int, seed: int) -> TrainParts:
        """The training splits, cut into windows.

        Raises:
            PippinError: P201 where one is shorter than a window, P203 for damaged shards.
        """
        streams = tuple(self._open(i, "train", seq_len) for i in range(len(self.items)))
        windows = tuple(make_windows(stream, sampling, seq_len, seed) for stream in streams)
        return TrainParts(streams, windows, self.weights)

    def eval_parts(self, sampling: str, seq_len: int, seed: int) -> TrainParts:
        """The validation splits that hold a window, cut.

        Raises:
            PippinError: P201 where none does, P203 for damaged shards.
        """
        usable = [i for i, m in enumerate(self.manifests) if _tokens(m, "val") >= seq_len + 1]
        if not usable:
            longest = max(_tokens(manifest, "val") for manifest in self.manifests)
            raise PippinError(
                "P201",
                "no text of the mixture has a validation split of a window",
                found=f"the longest has {longest:,} tokens; a window of data.seq_len={seq_len:,} "
                f"needs {seq_len + 1:,}",
                remedy=self._what_helps(),
            )
        streams = tuple(self._open(i, "val", seq_len) for i in usable)
        windows = tuple(make_windows(stream, sampling, seq_len, seed) for stream in streams)
        return TrainParts(streams, windows, tuple(self.weights[i] for i in usable))

    def _what_helps(self) -> str:
        """Windows that fit every training split and the longest validation split."""
        trains = [_tokens(manifest, "train") for manifest in self.manifests]
        fits = min(*trains, max(_tokens(manifest, "val") for manifest in self.manifests)) - 1
        return f"data.seq_len={fits}" if fits >= 2 else "shards of more text"

    def _open(self, index: int, split: Split, seq_len: int) -> TokenStream:
        folder, found = self.folders[index], _tokens(self.manifests[index], split)
        if found < seq_len + 1:
            raise PippinError(
                "P201",
                f"the {split} split of {folder} is too short",
                found=f"{found:,} tokens; a window of data.seq_len={seq_len:,} needs {seq_len + 1:,}",
                remedy=f"{self._what_helps()}, or leave it out of data.mixture",
            )
        return open_shards(folder, split)


def parse_mixture(value: Mapping[str, Any] | Sequence[Any]) -> tuple[MixtureItem, ...]:
    """Read the key `data.mixture`.

    Args:
        value: A mapping from path to weight, or a list of `{path: ..., weight: ...}`, in which a
            missing weight is 1 and a path alone will do.

    Raises:
        PippinError: P010 with everything that is wrong.
    """
    pairs: list[tuple[Any, Any]] = []
    problems = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str):
        problems.append(f"{value!r} is no list")
    else:
        for i, entry in enumerate(value):
            if isinstance(entry, str):
                pairs.append((entry, 1.0))
            elif isinstance(entry, Mapping) and "path" in entry and {*entry} <= {"path", "weight"}:
                pairs.append((entry["path"], entry.get("weight", 1.0)))
            else:
                problems.append(f"entry {i + 1}: {entry!r} is not {{path: ..., weight: ...}}")
    if not pairs and not problems:
        problems.append("it is empty")
    items = []
    for path, weight in pairs:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(path, str) or not path:
            problems.append(f"{path!r} is no path")
        elif not number or not 0 < weight < float("inf"):
            problems.append(f"{path}: its weight is {weight!r}; needed: a number above 0")
        else:
            items.append(MixtureItem(path, float(weight)))
    if problems:
        raise PippinError("P010", "data.mixture cannot be used", found="\n".join(problems))
    return tuple(items)


def open_mixture(items: Sequence[MixtureItem], shards_dir: Path | None = None) -> Mixture:
    """Find and check the folders of a mixture.

    Args:
        items: At least one.
        shards_dir: Where a path that is no folder is looked for too.

    Raises:
        PippinError: P010 for weights that are not above 0, a folder twice, or kinds of content that
            cannot be mixed; P203 for damaged shards; P301 for shards of different tokenizers.
    """
    wrong = [f"{i.path}: {i.weight!r}" for i in items if not 0 < i.weight < float("inf")]
    if wrong or not items:
        raise PippinError(
            "P010",
            "the weights of data.mixture must be above 0",
            found="\n".join(wrong) or "it is empty",
        )
    folders = tuple(_folder(item.path, shards_dir) for item in items)
    seen: dict[Path, str] = {}
    for item, folder in zip(items, folders):
        if folder.resolve() in seen:
            raise PippinError(
                "P010",
                f"data.mixture has {folder} twice",
                found=f"{seen[folder.resolve()]}\n{item.path}",
                remedy="name it once, with the sum of the weights",
            )
        seen[folder.resolve()] = item.path
    manifests = tuple(load_manifest(folder) for folder in folders)
    for folder, manifest in zip(folders[1:], manifests[1:]):
        _check_alike(folders[0], manifests[0], folder, manifest)
    return Mixture(tuple(items), folders, manifests)


def _tokens(manifest: Manifest, split: Split) -> int:
    info = manifest.splits.get(split)
    return 0 if info is None else info.tokens


def _folder(path: str, shards_dir: Path | None) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir() and shards_dir is not None and (shards_dir / path).is_dir():
        return shards_dir / path
    if not folder.is_dir():
        below = sorted(shards_dir.glob("*/manifest.json")) if shards_dir is not None else []
        raise PippinError(
            "P201",
            f"data.mixture: there is no folder {path}",
            choices=tuple(str(found.parent) for found in below[:5]),
        )
    return folder


def _check_alike(first: Path, a: Manifest, other: Path, b: Manifest) -> None:
    if a.tokenizer.fingerprint != b.tokenizer.fingerprint:
        raise PippinError(
            "P301",
            "the shards of a mixture were made with different tokenizers",
            found="\n".join(
                f"{folder}: sha {m.tokenizer.fingerprint[:8]} ({m.tokenizer.kind}, "
                f"{m.tokenizer.vocab_size:,} ids)"
                for folder, m in ((first, a), (other, b))
            ),
            remedy=f"prepare the second one again with data.tokenizer={first}",
        )
    if (a.content == "preference") != (b.content == "preference"):
        raise PippinError(
            "P010",
            "preferences and other text cannot be mixed",
            found=f"{first}: {a.content}\n{other}: {b.content}",
        )
