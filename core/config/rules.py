"""What must fit together: rules over several keys, applied to whatever is known so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contradiction:
    """Values that do not go together.

    Attributes:
        key: The key it is reported at.
        text: What is wrong.
        fix: The override that corrects it, empty where there is more than one way.
    """

    key: str
    text: str
    fix: str = ""


def contradictions(known: Mapping[str, Any]) -> list[Contradiction]:
    """Every contradiction.

    Args:
        known: Dotted keys with values of the right type; keys that are still "auto" or wrong are
            left out, and rules that need them are not applied.
    """
    rules = (
        _heads,
        _kv_heads,
        _experts,
        _head_dim,
        _lengths,
        _steps,
        _splits,
        _momentum,
        _rates,
        _newton_schulz,
    )
    return [found for rule in rules if (found := rule(known)) is not None]


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _nearest(value: int, choices: Sequence[int]) -> int:
    """The choice that is least away; of two, the larger."""
    return min(choices, key=lambda n: (abs(n - value), -n))


def _heads(k: Mapping[str, Any]) -> Contradiction | None:
    """Heads of `d_model / n_heads`, where no width of theirs is given: whole and even."""
    d, h = k.get("model.d_model"), k.get("model.n_heads")
    if not d or k.get("model.head_dim") is not None:
        return None
    even = "rotary positions need heads of an even width"
    if d % 2:
        # With no number of heads is the width of each of them even.
        step = 2 * (h or 1)
        near = _nearest(d, [n for n in (d // step * step, (d // step + 1) * step) if n >= 8])
        text = f"model.d_model = {d} is odd, and {even}; use {near}, or give model.head_dim."
        return Contradiction("model.d_model", text, f"model.d_model={near}")
    if not h or (d % h == 0 and d // h % 2 == 0):
        return None
    choices = [n for n in _divisors(d) if d // n % 2 == 0]
    use = f"use one of {', '.join(map(str, choices))}, or give model.head_dim."
    fix = f"model.n_heads={_nearest(h, choices)}"
    if d % h:
        text = f"model.n_heads = {h} does not divide model.d_model = {d}; {use}"
    else:
        text = f"model.n_heads = {h} makes heads {d // h} wide, and {even}; {use}"
    return Contradiction("model.n_heads", text, fix)


def _kv_heads(k: Mapping[str, Any]) -> Contradiction | None:
    h, kv = k.get("model.n_heads"), k.get("model.n_kv_heads")
    if not h or not kv or h % kv == 0:
        return None
    choices = _divisors(h)
    text = (
        f"model.n_kv_heads = {kv} does not divide model.n_heads = {h}; use one of "
        f"{', '.join(map(str, choices))}."
    )
    return Contradiction("model.n_kv_heads", text, f"model.n_kv_heads={_nearest(kv, choices)}")


def _head_dim(k: Mapping[str, Any]) -> Contradiction | None:
    width = k.get("model.head_dim")
    if not width or width % 2 == 0:
        return None
    text = f"model.head_dim = {width} is odd, and rotary positions need an even width."
    return Contradiction("model.head_dim", text, f"model.head_dim={width + 1}")


def _experts(k: Mapping[str, Any]) -> Contradiction | None:
    experts, top_k = k.get("model.n_experts"), k.get("model.top_k")
    if experts == 1:
        text = (
            "model.n_experts = 1 is a dense model with a router that chooses nothing; use 0 "
            "for a dense model, or at least 2."
        )
        return Contradiction("model.n_experts", text, "model.n_experts=0")
    if experts and top_k and top_k > experts:
        text = (
            f"model.top_k = {top_k} is more than model.n_experts = {experts}; a token goes to "
            f"at most {experts} experts."
        )
        return Contradiction("model.top_k", text, f"model.top_k={experts}")
    return None


def _lengths(k: Mapping[str, Any]) -> Contradiction | None:
    t, limit = k.get("data.seq_len"), k.get("model.max_seq_len")
    if not t or not limit or t <= limit:
        return None
    text = (
        f"data.seq_len = {t} is longer than model.max_seq_len = {limit}; lower the one or "
        "raise the other."
    )
    return Contradiction("data.seq_len", text, f"data.seq_len={limit}")


def _steps(k: Mapping[str, Any]) -> Contradiction | None:
    total, warmup = k.get("train.total_steps"), k.get("train.warmup_steps")
    if total is None or warmup is None or warmup < total:
        return None
    better = total // 20
    text = (
        f"train.warmup_steps = {warmup} is not below train.total_steps = {total}; the run "
        f"would end before it is warm. Try {better}."
    )
    return Contradiction("train.warmup_steps", text, f"train.warmup_steps={better}")


def _splits(k: Mapping[str, Any]) -> Contradiction | None:
    val, test = k.get("data.val_fraction"), k.get("data.test_fraction")
    if val is None or test is None or val + test < 0.9:
        return None
    text = (
        f"data.val_fraction + data.test_fraction = {val + test:g} leaves under 10 % of the "
        "text to train on."
    )
    fix = "data.val_fraction=0.02 data.test_fraction=0.02"
    return Contradiction("data.val_fraction", text, fix)


def _momentum(k: Mapping[str, Any]) -> Contradiction | None:
    start, end = k.get("train.momentum_start"), k.get("train.momentum")
    if start is None or end is None or start <= end or not k.get("train.momentum_warmup_steps"):
        return None
    text = f"train.momentum_start = {start:g} is above train.momentum = {end:g}."
    return Contradiction("train.momentum_start", text, f"train.momentum_start={end:.12g}")


def _rates(k: Mapping[str, Any]) -> Contradiction | None:
    lr, low = k.get("train.lr"), k.get("train.min_lr")
    if lr is None or low is None or low <= lr:
        return None
    text = f"train.min_lr = {low:g} is above train.lr = {lr:g}."
    return Contradiction("train.min_lr", text, f"train.min_lr={lr / 10:.6g}")


def _newton_schulz(k: Mapping[str, Any]) -> Contradiction | None:
    if k.get("train.precision") != "float32" or k.get("train.ns_dtype") != "bfloat16":
        return None
    text = (
        "train.ns_dtype = bfloat16 does not fit train.precision = float32, which is exact "
        "throughout; use train.ns_dtype = float32, or train.precision = bfloat16."
    )
    return Contradiction("train.ns_dtype", text, "train.ns_dtype=float32")
