"""The regular expressions by which known byte-level tokenizers cut text before looking for pieces."""

import re
from collections.abc import Mapping
from typing import Any

from core.data.tokenizers.byte_level import cutting_steps
from core.data.tokenizers.unit_cache import END

_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# As in tiktoken_ext/openai_public.py of tiktoken 0.14; the first one is said there to be equal to
# that of GPT-2 and faster.
R50K = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_ENDINGS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_ENDINGS})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
)


def _words(digits: str) -> str:
    """The expression of Llama 3 and Qwen in their `tokenizer.json`."""
    letters = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"(?i:{_ENDINGS})|{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"


def _words_fast(digits: str) -> str:
    """The same matches without needless backtracking."""
    return (
        rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}++|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|{_SPACE}"
    )


LLAMA3 = _words(r"\p{N}{1,3}")
QWEN = _words(r"\p{N}")
# As it stands in a file -> as it is given to tiktoken.
_KNOWN = {
    LLAMA3: _words_fast(r"\p{N}{1,3}+"),
    QWEN: _words_fast(r"\p{N}"),
    **{pattern: pattern for pattern in (R50K, CL100K, O200K)},
}


def known_pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """The expression for tiktoken that cuts as a pre-tokenizer does; None where none is known."""
    steps = cutting_steps(pre_tokenizer)
    if len(steps) == 1:
        return R50K if steps[0].get("use_regex", True) is True else None
    if len(steps) != 2 or steps[1].get("use_regex", True) is not False:
        return None
    split = steps[0]
    plain = split.get("behavior") == "Isolated" and split.get("invert") in (False, None)
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    return _KNOWN.get(regex) if plain and isinstance(regex, str) else None


_ASCII = (
    # Nothing follows these that could match what they give back, so they need not be possessive,
    # which Python's expressions are only since 3.11.
    ("++", "+"),
    ("*+", "*"),
    ("?+", "?"),
    ("3}+", "3}"),
    # White space as Unicode has it: Python's own holds four separators more.
    (r"\s+$", rf"[\t-\r ]+(?={END})"),
    (r"(?!\S)", rf"(?![^\t-\r {END}])"),
    (r"[^\s", rf"[^{END}\t-\r "),
    (r"[^\r\n", rf"[^{END}\r\n"),
    (r"\s", r"[\t-\r ]"),
    (_UPPER, "A-Z"),
    (_LOWER, "a-z"),
    (r"\p{L}\p{N}", "A-Za-z0-9"),
    (r"\p{L}", "[A-Za-z]"),
    (r"\p{N}", "[0-9]"),
)


def ascii_words(pattern: str) -> re.Pattern[str]:
    """What cuts ASCII as an expression for tiktoken does, of several texts with `END` after each."""
    for theirs, ours in _ASCII:
        pattern = pattern.replace(theirs, ours)
    return re.compile(f"{pattern}|{END}")
