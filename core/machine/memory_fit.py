"""The settings nearest to a configuration that does not fit into memory, each checked by the forecast."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from core.config.schema import RunConfig
from core.machine.depth import dialled_shape
from core.machine.memory import predict_training_memory
from core.params import num_parameters, param_specs

LEAST_SEQ_LEN = 32
LEAST_EXPERTS = 2
# So many times the parameters are worth changing several keys.
WORTH_MORE_KEYS = 1.25
_BESIDE_FLAGS = ("train.gradient_checkpointing",)
# Of the schema.
MOST_ACCUMULATION = 65_536


@dataclass(frozen=True)
class Fitting:
    """A change that fits.

    Attributes:
        changes: Dotted keys and values, as they are typed.
        total_bytes: Its forecast.
        note: What it costs.
        flags: What is typed instead of the model's sizes and the micro-batch, which follow from it.
    """

    changes: Mapping[str, int | bool]
    total_bytes: int
    note: str
    flags: str = ""

    @property
    def typed(self) -> str:
        """What to add to the command line."""
        values = {k: str(v).lower() for k, v in self.changes.items()}
        if self.flags:
            values = {k: v for k, v in values.items() if k in _BESIDE_FLAGS}
        return " ".join([*filter(None, [self.flags]), *(f"{k}={v}" for k, v in values.items())])


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


def nearest_fits(
    config: RunConfig, budget_bytes: int, *, depth: int | None = None
) -> tuple[Fitting, ...]:
    """What fits, nearest first: micro-batches, checkpointing, both, a shorter window, a smaller model.

    Only what is needed is changed: a shorter window or a smaller model is tried as it is, then with
    smaller micro-batches, then with checkpointing too. The rows of a step stay, by accumulation.

    Args:
        config: A resolved configuration whose forecast is above the budget.
        budget_bytes: What the run may use.
        depth: Of `--depth`, where it set the sizes: a smaller model is then a smaller depth.
    """
    saving = {} if config.train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    fits = _Fits(config, budget_bytes)
    same = "the same result"
    slower = "the same result, about a quarter slower"
    found = [_first(fits, _splits(config), same)]
    if saving:
        found.append(fits(saving, slower))
        if not any(found):
            found.append(_first(fits, ({**s, **saving} for s in _splits(config)), slower))
    if any(found):
        return tuple(f for f in found if f is not None)
    found.append(_first(fits, _helped(config, _shorter(config)), "shorter texts are seen at once"))
    if depth is None:
        models = _smaller(config, fits)
    else:
        models = _shallower_dials(config, depth, fits)
    for changes, flags in models:
        found.append(_first(fits, _helped(config, iter([changes])), "a smaller model", flags=flags))
    return tuple(f for f in found if f is not None)


@dataclass(frozen=True)
class _Fits:
    """Whether a change fits, by the forecast."""

    config: RunConfig
    budget_bytes: int

    def __call__(
        self, changes: Mapping[str, int | bool], note: str, *, flags: str = ""
    ) -> Fitting | None:
        trial = with_changes(self.config, changes)
        total = predict_training_memory(trial, param_specs(trial.model)).total
        return Fitting(changes, total, note, flags) if total <= self.budget_bytes else None

    def at_least(self, changes: Mapping[str, int | bool]) -> bool:
        """Whether it fits with one row at a time and checkpointing."""
        least = {**_least_split(self.config), "train.gradient_checkpointing": True}
        return self({**changes, **least}, "") is not None


def _first(
    fits: _Fits, candidates: Iterator[dict[str, int | bool]], note: str, *, flags: str = ""
) -> Fitting | None:
    return next(
        (f for f in (fits(c, note, flags=flags) for c in candidates) if f is not None), None
    )


def _helped(
    config: RunConfig, candidates: Iterator[dict[str, int | bool]]
) -> Iterator[dict[str, int | bool]]:
    """Each as it is, then with what costs nothing but time, the least of it first."""
    saving: dict[str, int | bool] = {}
    if not config.train.gradient_checkpointing:
        saving["train.gradient_checkpointing"] = True
    for changes in candidates:
        yield changes
        yield from ({**changes, **split} for split in _splits(config))
        if saving:
            yield {**changes, **saving}
            yield from ({**changes, **split, **saving} for split in _splits(config))


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


def _smaller(config: RunConfig, fits: _Fits) -> Iterator[tuple[dict[str, int | bool], str]]:
    """Smaller models that fit: the most blocks, and the most experts.

    Where neither keeps nearly as many parameters as fewer of both and of heads, as wide, that too.
    """
    m = config.model
    one_key = [
        _most("model.n_layers", {}, m.n_layers - 1, fits),
        _most("model.n_experts", {}, m.n_experts - 1, fits, least=max(m.top_k, LEAST_EXPERTS)),
    ]
    mixed = []
    for narrow in _narrower(config):
        for few in _fewer_experts(config):
            changes = _most("model.n_layers", {**narrow, **few}, m.n_layers, fits)
            if changes is not None:
                mixed.append(changes)
                break  # fewer experts are only worse
    found = [changes for changes in one_key if changes is not None]
    yield from ((changes, "") for changes in found)
    best = max(mixed, key=lambda changes: _size(config, changes), default=None)
    if best is not None:
        most = max((_size(config, changes) for changes in found), default=0)
        if _size(config, best) > WORTH_MORE_KEYS * most:
            yield best, ""


def _size(config: RunConfig, changes: Mapping[str, int | bool]) -> int:
    return num_parameters(param_specs(with_changes(config, changes).model))


def _most(
    key: str, changes: Mapping[str, int | bool], most: int, fits: _Fits, *, least: int = 1
) -> dict[str, int | bool] | None:
    """`changes` with the largest value of `key` that fits, by halving; None where none does."""
    if most < least or not fits.at_least({**changes, key: least}):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits.at_least({**changes, key: middle}):
            low = middle
        else:
            high = middle - 1
    return {**changes, key: low}


def _narrower(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """The width as it is and with fewer heads, widest first."""
    m = config.model
    for heads in range(m.n_heads, 0, -1):
        rest = m.n_heads % heads or m.n_kv_heads * heads % m.n_heads
        if rest or m.d_model * heads % m.n_heads:
            continue
        yield (
            {}
            if heads == m.n_heads
            else {
                "model.d_model": m.d_model * heads // m.n_heads,
                "model.n_heads": heads,
                "model.n_kv_heads": m.n_kv_heads * heads // m.n_heads,
                "model.d_ff": max(8 * round(m.d_ff * heads / m.n_heads / 8), 8),
            }
        )


def _fewer_experts(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """As many experts, half of them, and so on."""
    m = config.model
    yield {}
    experts = m.n_experts // 2
    while experts >= max(m.top_k, LEAST_EXPERTS):
        yield {"model.n_experts": experts}
        experts //= 2


def _shallower_dials(
    config: RunConfig, depth: int, fits: _Fits
) -> Iterator[tuple[dict[str, int | bool], str]]:
    """The largest `--depth` that fits; its batch is taken to be as large, though it is smaller."""
    for lower in range(depth - 1, 0, -1):
        changes = dialled_shape(config.model, depth, lower)
        if fits.at_least(changes):
            yield changes, f"--depth {lower}"
            return
