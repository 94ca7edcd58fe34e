"""What a run will take, in words, and the refusal of what does not fit into memory."""

from core.backend import DeviceInfo
from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.memory import (
    MemoryForecast,
    kv_cache_bytes,
    predict_inference_memory,
    predict_training_memory,
)
from core.machine.memory_fit import nearest_fits
from core.params import ParamSpec
from core.training import format as fmt

# Smaller parts are not worth a word: below 0.1 MB.
SHOWN_BYTES = 100_000


def memory_lines(config: RunConfig, specs: tuple[ParamSpec, ...]) -> list[str]:
    """The forecast by parts, largest first, and what samples take at another moment."""
    forecast = predict_training_memory(config, specs)
    gone = [name for name, n in forecast.parts().items() if n < SHOWN_BYTES and name != "KV cache"]
    lines = [_parts(forecast), f"the most is held at: {forecast.moment}"]
    if gone:
        lines[-1] += f" ({', '.join(gone)}: none at that moment)"
    if config.train.samples:
        length = sample_length(config)
        cache = kv_cache_bytes(config, 1, length)
        whole = predict_inference_memory(config, specs, 1, length)
        work = whole.workspace + whole.logits
        lines.append(
            f"samples, between steps: KV cache {fmt.gigabytes(cache)} for {length} tokens, "
            f"workspace {fmt.gigabytes(work)}"
        )
    return lines


def _parts(forecast: MemoryForecast) -> str:
    parts = forecast.parts().items()
    return " · ".join(f"{name} {fmt.gigabytes(n)}" for name, n in parts if n >= SHOWN_BYTES)


def sample_length(config: RunConfig) -> int:
    """Tokens of a sample's context, at most."""
    return min(config.model.max_seq_len, config.data.seq_len + config.train.sample_tokens)


def refuse_too_large(
    config: RunConfig, specs: tuple[ParamSpec, ...], budget_bytes: int, *, whose: str = ""
) -> MemoryForecast:
    """The forecast, where it fits.

    Args:
        config: The run.
        specs: Its parameter table.
        budget_bytes: What it may use.
        whose: Where the budget is from, where that is news.

    Raises:
        PippinError: P101 where it does not, with the nearest settings that do.
    """
    forecast = predict_training_memory(config, specs)
    if forecast.total <= budget_bytes:
        return forecast
    found = nearest_fits(config, budget_bytes)
    choices = [f"{f.typed}   ({fmt.gigabytes(f.total_bytes)}; {f.note})" for f in found]
    raise PippinError(
        "P101",
        f"a step needs about {fmt.gigabytes(forecast.total)}, and this run may use "
        f"{fmt.gigabytes(budget_bytes)}{whose}.",
        found=f"at its most ({forecast.moment}): {_parts(forecast)}",
        choices=(*choices, "--force   (tries it all the same)"),
        remedy="" if choices else "no smaller setting of this model fits; close other programs",
        kept="nothing was started.",
    )


def check_device(
    config: RunConfig, specs: tuple[ParamSpec, ...], info: DeviceInfo, *, force: bool
) -> None:
    """The same once the framework is there, by the device's own figure of its memory.

    Raises:
        PippinError: P101.
    """
    if info.budget_bytes is None or force:
        return
    budget = int(info.budget_bytes * config.train.memory_fraction)
    refuse_too_large(config, specs, budget, whose=f", by {info.device}'s own figure")
