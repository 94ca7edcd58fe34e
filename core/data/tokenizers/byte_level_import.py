"""Reading byte-level BPE tokenizers of other projects.

Only the vocabulary, the merges and the way text is cut are taken over. Normalizers (NFC in Qwen's
files) and an added space in front are left out, because text would not come back as it was. Added
tokens become symbols that text can never become, whether or not their file calls them special.
Nothing in a file is run.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.data.tokenizers.base import CHAT_SYMBOLS, bad_tokenizer
from core.data.tokenizers.byte_level import (
    BYTE_CHARACTERS,
    EOS_NAMES,
    ByteLevelSpec,
    check_cutting,
    checked_spec,
    cutting_steps,
    first_eos,
    ids_of,
    is_list_of_str,
    read_bounded,
    spelled,
)
from core.data.tokenizers.byte_level_patterns import CL100K, O200K, R50K

RANK_SUFFIX = ".tiktoken"
WORD_FILES = ("vocab.bpe", "encoder.json", "merges.txt", "vocab.json")
_PARTNERS = {
    "vocab.bpe": ("vocab.bpe", "encoder.json"),
    "encoder.json": ("vocab.bpe", "encoder.json"),
    "merges.txt": ("merges.txt", "vocab.json"),
    "vocab.json": ("merges.txt", "vocab.json"),
}

_END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_CL100K_SYMBOLS = {_END: 100_257, **{s: 100_258 + i for i, s in enumerate(_FIM)}}
_CL100K_SYMBOLS["<|endofprompt|>"] = 100_276
# Name of a rank file -> pattern, number of ranks when it is the published one, its symbols.
_RANK_FILES: dict[str, tuple[str, int, dict[str, int]]] = {
    "gpt2": (R50K, 50_256, {_END: 50_256}),
    "r50k_base": (R50K, 50_256, {_END: 50_256}),
    "p50k_base": (R50K, 50_280, {_END: 50_256}),
    "cl100k_base": (CL100K, 100_256, _CL100K_SYMBOLS),
    "o200k_base": (O200K, 199_998, {_END: 199_999, "<|endofprompt|>": 200_018}),
}


def split_step(pattern: str) -> dict[str, Any]:
    """Cutting by a regular expression, then bytes, as Hugging Face writes it."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, byte_level(False)]}


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The step that spells bytes; with GPT-2's own regular expression or without."""
    rest = {"add_prefix_space": False, "trim_offsets": False}
    return {"type": "ByteLevel", **rest, "use_regex": use_regex}


def from_tokenizer_json(data: Mapping[str, Any], name: str, folder: Path | None) -> ByteLevelSpec:
    """Read a `tokenizer.json` of Hugging Face.

    Args:
        data: Its content.
        name: For messages.
        folder: Where `tokenizer_config.json` may lie, which names the end-of-document symbol.

    Raises:
        PippinError: P301 where it is no byte-level BPE or would lose text.
    """
    model = data["model"]
    if model.get("type") != "BPE":
        raise bad_tokenizer(f"{name} is a {model.get('type')!r} tokenizer; byte-level BPE is read")
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback")
    for key in odd:
        if model.get(key):
            raise bad_tokenizer(f"{name} sets {key}={model[key]!r}, which is not read")
    vocab, merges = ids_of(model.get("vocab"), f"{name}: vocab"), _merges(model.get("merges"), name)
    return _spec(
        name,
        vocab=vocab,
        merges=merges,
        pre_tokenizer=_without_prefix(data.get("pre_tokenizer"), name),
        ignore_merges=model.get("ignore_merges") is True,
        added=_added(data.get("added_tokens"), name),
        eos=_configured_eos(folder),
    )


def switched_off(data: Mapping[str, Any]) -> tuple[str, ...]:
    """What a `tokenizer.json` that was read does to text and is not taken over, in words."""
    normalizer = data.get("normalizer")
    steps = cutting_steps(data.get("pre_tokenizer"))
    found = []
    if isinstance(normalizer, dict):
        found.append(f"normalizer {normalizer.get('type')} off")
    if any(s["type"] == "ByteLevel" and s.get("add_prefix_space", True) for s in steps):
        found.append("add_prefix_space off")
    return tuple(found)


def from_word_files(path: Path) -> ByteLevelSpec:
    """Read GPT-2's `vocab.bpe` and `encoder.json`, also under the names `merges.txt`, `vocab.json`.

    Args:
        path: One of the two; the other one lies beside it.

    Raises:
        PippinError: P301.
    """
    merges_path, vocab_path = (path.parent / name for name in _PARTNERS[path.name])
    for needed in (merges_path, vocab_path):
        if not needed.is_file():
            raise bad_tokenizer(f"{path.name} needs {needed.name} beside it, in {path.parent}")
    lines = _text(merges_path).split("\n")
    merges = [
        line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")
    ]
    vocab = ids_of(_json(vocab_path), str(vocab_path))
    return _spec(
        str(path),
        vocab=vocab,
        merges=_merges(merges, str(merges_path)),
        pre_tokenizer=byte_level(True),
        ignore_merges=False,
        added={},
        eos=_configured_eos(path.parent),
    )


def from_rank_file(path: Path) -> ByteLevelSpec:
    """Read a `.tiktoken` file; its name says how text is cut, its content does not.

    Raises:
        PippinError: P301.
    """
    key = next((key for key in _RANK_FILES if path.name.startswith(key)), None)
    if key is None:
        raise bad_tokenizer(
            f"the name of {path} does not say how it cuts text",
            found="a rank file holds no regular expression; it is chosen by the file's name",
            choices=[f"{key}{RANK_SUFFIX}" for key in _RANK_FILES],
        )
    pattern, count, symbols = _RANK_FILES[key]
    vocab: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9+/]+=*) ([0-9]{1,9})", line)
        try:
            piece = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            piece = b""
        if not match or not piece:
            raise bad_tokenizer(f"{path}:{number} is no base64 token and rank: {line[:40]!r}")
        if vocab.setdefault(spelled(piece), int(match[2])) != int(match[2]):
            raise bad_tokenizer(f"{path}:{number} gives a second rank to a token")
    if not vocab:
        raise bad_tokenizer(f"{path} is empty")
    controls = symbols if len(vocab) == count else {_END: max(vocab.values()) + 1}
    spec = ByteLevelSpec(vocab, None, split_step(pattern), False, controls, _END)
    return checked_spec(spec, str(path))


def _spec(
    name: str,
    *,
    vocab: dict[str, int],
    merges: tuple[str, ...],
    pre_tokenizer: Mapping[str, Any],
    ignore_merges: bool,
    added: dict[str, int],
    eos: str | None,
) -> ByteLevelSpec:
    """Tell pieces of text from symbols: a symbol is an added token, or named like one, or the end."""
    made = {merge.replace(" ", "") for merge in merges} | set(BYTE_CHARACTERS)
    symbols = {n: i for n, i in added.items() if not (n in made and vocab.get(n) == i)}
    for known in (*EOS_NAMES, *CHAT_SYMBOLS, *((eos,) if eos else ())):
        if known in vocab and known not in made:
            symbols.setdefault(known, vocab[known])
    chosen = eos or first_eos(list(symbols))
    if chosen is None:
        raise bad_tokenizer(
            f"{name} has no symbol for the end of a document",
            found=f"looked in tokenizer_config.json and for {', '.join(EOS_NAMES)}",
        )
    taken = set(symbols.values())
    text = {p: i for p, i in vocab.items() if p in made or (p not in symbols and i not in taken)}
    spec = ByteLevelSpec(text, merges, pre_tokenizer, ignore_merges, symbols, chosen)
    return checked_spec(spec, name)


def _merges(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, list) and all(is_list_of_str(m) and len(m) == 2 for m in value):
        value = [" ".join(pair) for pair in value]
    if not is_list_of_str(value) or not all(re.fullmatch(r"[^ ]+ [^ ]+", m) for m in value):
        raise bad_tokenizer(f"{name}: merges are no list of pairs")
    return tuple(value)


def _added(value: Any, name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for token in value or ():
        if not isinstance(token, dict) or type(token.get("id")) is not int:
            raise bad_tokenizer(f"{name}: an added token has no id: {str(token)[:80]}")
        if not isinstance(token.get("content"), str) or not token["content"]:
            raise bad_tokenizer(f"{name}: the added token {token['id']} has no content")
        found[token["content"]] = token["id"]
    return found


def _without_prefix(pre_tokenizer: Any, name: str) -> Mapping[str, Any]:
    """The steps, without the space that some tokenizers put before a text."""
    check_cutting(pre_tokenizer, name)
    steps = [
        byte_level(step.get("use_regex") is not False) if step["type"] == "ByteLevel" else step
        for step in cutting_steps(pre_tokenizer)
    ]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _configured_eos(folder: Path | None) -> str | None:
    """The end-of-document symbol that `tokenizer_config.json` names."""
    path = None if folder is None else folder / "tokenizer_config.json"
    if path is None or not path.is_file():
        return None
    config = _json(path)
    eos = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(eos, dict):
        eos = eos.get("content")
    return eos if isinstance(eos, str) and eos else None


def _text(path: Path) -> str:
    try:
        return read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_tokenizer(f"{path} is not UTF-8: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise bad_tokenizer(f"{path} is not readable: {error}") from error
