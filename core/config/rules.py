"""What must fit together: rules over several keys, applied to whatever is known so far."""

from collections.abc import Mapping
from typing import Any


def contradictions(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every contradiction as (key it is reported at, message).

    Args:
        known: Dotted keys with values of the right type; keys that are still "auto" or wrong are
            left out, and rules that need them are not applied.
    """
    found: list[tuple[str, str]] = []
    for rule in (
        _heads,
        _experts,
        _head_dim,
        _lengths,
        _steps,
        _splits,
        _momentum,
        _rates,
        _newton_schulz,
    ):
        found += rule(known)
    return found


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def _heads(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = []
    d, h, kv = k.get("model.d_model"), k.get("model.n_heads"), k.get("model.n_kv_heads")
    if d and h and k.get("model.head_dim") is None and d % h:
        out.append(
            (
                "model.n_heads",
                f"model.n_heads = {h} does not divide model.d_model = {d}; use one of "
                f"{_divisors(d)}, or give model.head_dim.",
            )
        )
    if h and kv and h % kv:
        out.append(
            (
                "model.n_kv_heads",
                f"model.n_kv_heads = {kv} does not divide model.n_heads = {h}; use one of "
                f"{_divisors(h)}.",
            )
        )
    return out


def _experts(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    experts, top_k = k.get("model.n_experts"), k.get("model.top_k")
    if experts == 1:
        return [
            (
                "model.n_experts",
                "model.n_experts = 1 is a dense model with a router that chooses nothing; use 0 "
                "for a dense model, or at least 2.",
            )
        ]
    if experts and top_k and top_k > experts:
        return [
            (
                "model.top_k",
                f"model.top_k = {top_k} is more than model.n_experts = {experts}; a token goes to "
                f"at most {experts} experts.",
            )
        ]
    return []


def _head_dim(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    dh = k.get("model.head_dim")
    d, h = k.get("model.d_model"), k.get("model.n_heads")
    if dh is None and d and h and d % h == 0:
        dh = d // h
    if dh and dh % 2:
        return [
            (
                "model.n_heads",
                f"a head is {dh} wide, and rotary positions need an even width; change "
                "model.n_heads, model.d_model or model.head_dim.",
            )
        ]
    return []


def _lengths(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    t, limit = k.get("data.seq_len"), k.get("model.max_seq_len")
    if t and limit and t > limit:
        return [
            (
                "data.seq_len",
                f"data.seq_len = {t} is longer than model.max_seq_len = {limit}; lower the one or "
                "raise the other.",
            )
        ]
    return []


def _steps(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = []
    total, warmup = k.get("train.total_steps"), k.get("train.warmup_steps")
    if total is not None and warmup is not None and warmup >= total:
        out.append(
            (
                "train.warmup_steps",
                f"train.warmup_steps = {warmup} is not below train.total_steps = {total}; the run "
                f"would end before it is warm. Try {max(total // 20, 0)}.",
            )
        )
    return out


def _splits(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    val, test = k.get("data.val_fraction"), k.get("data.test_fraction")
    if val is not None and test is not None and val + test >= 0.9:
        return [
            (
                "data.val_fraction",
                f"data.val_fraction + data.test_fraction = {val + test:g} leaves under 10 % of the "
                "text to train on.",
            )
        ]
    return []


def _momentum(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    start, end = k.get("train.momentum_start"), k.get("train.momentum")
    if (
        start is not None
        and end is not None
        and start > end
        and k.get("train.momentum_warmup_steps")
    ):
        return [
            (
                "train.momentum_start",
                f"train.momentum_start = {start:g} is above train.momentum = {end:g}.",
            )
        ]
    return []


def _rates(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    lr, low = k.get("train.lr"), k.get("train.min_lr")
    if lr is not None and low is not None and low > lr:
        return [("train.min_lr", f"train.min_lr = {low:g} is above train.lr = {lr:g}.")]
    return []


def _newton_schulz(k: Mapping[str, Any]) -> list[tuple[str, str]]:
    if k.get("train.precision") == "float32" and k.get("train.ns_dtype") == "bfloat16":
        return [
            (
                "train.ns_dtype",
                "train.ns_dtype = bfloat16 does not fit train.precision = float32, which is exact "
                "throughout; use train.ns_dtype = float32, or train.precision = bfloat16.",
            )
        ]
    return []
