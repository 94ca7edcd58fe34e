"""Presets: files of `configs/` by name, in the spellings that the guides of other projects use."""

import re
from dataclasses import dataclass
from pathlib import Path

from core.config.nearest import nearest_names
from core.errors import PippinError
from core.paths import CONFIGS_DIR

# Names that a guide uses for what another preset is.
ALIASES = {
    "small_model": "50M",
    "medium_model": "125M",
    "rtx_5090": "rtx5090",
    "rtx_4090": "rtx4090",
}
TRAIN_COMMAND = "python train.py --config"
# Letters that a name shares with one that is suggested: "nope" is no "moe".
_SHARE = 0.7
_IN_CONFIGS = re.compile(r"(?:(?:\./)?configs/)?([^/]+?)(?:\.(?:json|ya?ml))?\Z")
_COUNT = re.compile(r"^# Parameters: ([\d,]+) \(tied, vocabulary ([\d,]+)\)")


@dataclass(frozen=True)
class PresetHead:
    """What the comment of a preset says.

    Attributes:
        name: Its name.
        title: What it is for, in a few words.
        about: Where its numbers come from, one line.
        parameters: Parameters that it states, None where the machine decides them.
        vocab_size: The vocabulary they are counted with.
    """

    name: str
    title: str
    about: str
    parameters: int | None
    vocab_size: int | None


def preset_names() -> list[str]:
    """Every preset, sorted."""
    return sorted(p.stem for p in CONFIGS_DIR.glob("*.yaml"))


def find_config(name_or_path: str, *, command: str = TRAIN_COMMAND) -> Path:
    """A preset by name, or a file by path.

    `mac_8gb`, `configs/150M.json` and `small_model` are found too, as the guides write them.

    Args:
        name_or_path: As it was typed.
        command: What stood before it, for the remedy.

    Raises:
        PippinError: P011 if there is neither; lists the presets, nearest first.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    presets = preset_names()
    match = _IN_CONFIGS.match(name_or_path)
    name = match.group(1) if match else name_or_path
    name = ALIASES.get(name, name)
    plain = {_plain(p): p for p in presets}
    if (found := plain.get(_plain(name))) is not None:
        return CONFIGS_DIR / f"{found}.yaml"
    nearest = [plain[n] for n in nearest_names(_plain(name), plain, share=_SHARE)]
    raise PippinError(
        "P011",
        f"no file and no preset is called {name_or_path!r}.",
        choices=nearest + [p for p in presets if p not in nearest],
        remedy=f"{command} {nearest[0]}"
        if nearest
        else "python tools/show_configs.py   (what each preset is for)",
    )


def _plain(name: str) -> str:
    return name.replace("-", "_").casefold()


def preset_head(path: Path) -> PresetHead:
    """The comment of a preset: `# name: title.`, then where it comes from, then its size."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "yaml-language-server" not in line:
            lines.append(line)
    counts = next((m for line in lines if (m := _COUNT.match(line))), None)
    text = " ".join(line.lstrip("# ") for line in lines if not _COUNT.match(line))
    first, _, rest = text.partition(". ")
    name, colon, title = first.partition(": ")
    if not colon or name != path.stem:
        title, rest = first, rest
    return PresetHead(
        name=path.stem,
        title=title.rstrip("."),
        about=rest,
        parameters=int(counts.group(1).replace(",", "")) if counts else None,
        vocab_size=int(counts.group(2).replace(",", "")) if counts else None,
    )
