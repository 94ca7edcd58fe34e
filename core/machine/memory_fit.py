"""The settings nearest to a configuration that does not fit into memory, each checked by the forecast."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from core.config.schema import RunConfig
from core.machine.memory import predict_training_memory
from core.params import num_parameters, param_specs

LEAST_SEQ_LEN = 32
LEAST_HEAD_DIM = 16
# Of the schema.
MOST_ACCUMULATION = 65_536


@dataclass(frozen=True)
class Fitting:
    """A change that fits.

    Attributes:
        changes: Dotted keys and values, as they are typed.
        total_bytes: Its forecast.
        note: What it costs.
    """

    changes: Mapping[str, int | bool]
    total_bytes: int
    note: str

    @property
    def typed(self) -> str:
        """What to add to the command line."""
        values = {k: str(v).lower() for k, v in self.changes.items()}
        return " ".join(f"{k}={v}" for k, v in values.items())


def with_changes(config: RunConfig, changes: Mapping[str, int | bool]) -> RunConfig:
    """The configuration with some keys changed."""
    sections: dict[str, dict[str, int | bool]] = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    updated = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return config.model_copy(update=updated)


def nearest_fits(config: RunConfig, budget_bytes: int) -> tuple[Fitting, ...]:
    """What fits, nearest first: micro-batches, checkpointing, both, a shorter window, a smaller model.

    Only what is needed is changed: a shorter window is tried with one row and checkpointing, and a
    smaller model with those too. The rows of a step stay as they are, by accumulation.

    Args:
        config: A resolved configuration whose forecast is above the budget.
        budget_bytes: What the run may use.
    """

    def fits(changes: Mapping[str, int | bool], note: str) -> Fitting | None:
        trial = with_changes(config, changes)
        total = predict_training_memory(trial, param_specs(trial.model)).total
        return Fitting(changes, total, note) if total <= budget_bytes else None

    saving = {} if config.train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    same = "the same result"
    slower = "the same result, about a quarter slower"
    found = [_first(fits, _splits(config), same)]
    if saving:
        found.append(fits(saving, slower))
        if not any(found):
            found.append(_first(fits, ({**s, **saving} for s in _splits(config)), slower))
    if any(found):
        return tuple(f for f in found if f is not None)
    least = {**_least_split(config), **saving}
    for candidates, note in (
        (_shorter(config), "shorter texts are seen at once"),
        (_smaller(config), "a smaller model"),
    ):
        for changes in candidates:
            fit = fits(changes, note) or fits({**changes, **least}, note)
            if fit is not None:
                found.append(fit)
                break
    return tuple(f for f in found if f is not None)


def _first(
    fits: Callable[[Mapping[str, int | bool], str], Fitting | None],
    candidates: Iterator[dict[str, int | bool]],
    note: str,
) -> Fitting | None:
    return next((f for f in (fits(c, note) for c in candidates) if f is not None), None)


def _splits(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """Smaller micro-batches that divide the present one, largest first; the step keeps its rows."""
    t = config.train
    for rows in range(t.micro_batch_size - 1, 0, -1):
        parts, rest = divmod(t.micro_batch_size, rows)
        if not rest and parts * t.grad_accum_steps <= MOST_ACCUMULATION:
            yield {
                "train.micro_batch_size": rows,
                "train.grad_accum_steps": parts * t.grad_accum_steps,
            }


def _least_split(config: RunConfig) -> dict[str, int | bool]:
    return list(_splits(config))[-1] if config.train.micro_batch_size > 1 else {}


def _shorter(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """Windows of half the length and so on; the model's context stays."""
    length = config.data.seq_len // 2
    while length >= LEAST_SEQ_LEN:
        yield {"data.seq_len": length}
        length //= 2


def _smaller(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """Models of about half the parameters and so on: fewer blocks and narrower ones, heads as wide."""
    m = config.model
    depths = [max(m.n_layers * k // 8, 1) for k in (6, 4, 3, 2, 1)]
    candidates = []
    for layers in dict.fromkeys(depths):
        for heads in range(m.n_heads, 0, -1):
            rest = m.n_heads % heads or m.n_kv_heads * heads % m.n_heads
            if rest or m.d_model * heads % m.n_heads:
                continue
            changes: dict[str, int | bool] = {"model.n_layers": layers}
            if heads < m.n_heads:
                changes |= {
                    "model.d_model": m.d_model * heads // m.n_heads,
                    "model.n_heads": heads,
                    "model.n_kv_heads": m.n_kv_heads * heads // m.n_heads,
                    "model.d_ff": max(8 * round(m.d_ff * heads / m.n_heads / 8), 8),
                }
            size = num_parameters(param_specs(with_changes(config, changes).model))
            candidates.append((size, changes))
    yield from (changes for _, changes in sorted(candidates, key=lambda c: -c[0]))
