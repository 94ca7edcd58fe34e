"""The peak of training as predicted, and as measured in a process of its own.

The grid varies every term of the prediction: width, depth, heads, vocabulary, window, rows, accumulation,
checkpointing, tied and untied heads, both optimizers, both precisions, experts. Settings that are drawn
at random, by a fixed seed, stand beside it: nobody looked at them while the formula was made.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.config.schema import RunConfig
from core.errors import PippinError
from core.machine.memory import MemoryForecast, predict_training_memory
from core.params import param_specs
from tools.benchmarks.report import Measured
from tools.benchmarks.training import resolve_config

# The promise: not further than this from the measured peak, and hardly ever below it.
MOST_OVER, MOST_UNDER = 0.10, 0.05
GRID_BACKENDS = ("cpu", "mlx")
HELD_OUT, HELD_OUT_SEED = 8, 20_261_122
# Of so many settings one is also measured with the allocator that a run has.
ORDINARY_EVERY = 4
TIMEOUT_SECONDS = 900
_BASE: dict[str, object] = {
    "model.d_model": 128,
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.n_kv_heads": 4,
    "model.vocab_size": 1024,
    "data.seq_len": 256,
    "data.sampling": "contiguous",
    "train.micro_batch_size": 8,
    "train.grad_accum_steps": 1,
    "train.precision": "float32",
    "train.gradient_checkpointing": "false",
    "train.optimizer": "muon",
    "model.tie_embeddings": "false",
    "model.mlp_multiple": 2,
}
_LONG: dict[str, object] = {"data.seq_len": 512, "train.micro_batch_size": 4}
_CHECK: dict[str, object] = {"train.gradient_checkpointing": "true"}
_ADAMW: dict[str, object] = {"train.optimizer": "adamw"}
_TIED: dict[str, object] = {"model.tie_embeddings": "true"}
_HALF: dict[str, object] = {"train.precision": "bfloat16"}
_WIDE_HEADS: dict[str, object] = {
    "model.d_model": 64,
    "model.n_heads": 8,
    "model.n_kv_heads": 8,
    "model.vocab_size": 512,
    "data.seq_len": 1024,
    "train.micro_batch_size": 4,
}
_FEW_HEADS: dict[str, object] = {
    "model.d_model": 64,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "data.seq_len": 1024,
    "train.micro_batch_size": 4,
}
# What each setting changes of `_BASE`.
GRID: tuple[dict[str, object], ...] = (
    {"model.d_model": 64, "model.n_layers": 2, "train.micro_batch_size": 2},  # small
    {},
    _CHECK,
    _TIED | _ADAMW,
    _HALF,
    _HALF | _CHECK | _ADAMW,
    {"model.n_layers": 12},
    _CHECK | {"model.n_layers": 12},
    {"train.micro_batch_size": 32},
    _TIED | {"train.micro_batch_size": 32, "model.n_layers": 8},
    _CHECK | _HALF | {"train.micro_batch_size": 16},
    {"train.grad_accum_steps": 2},
    _ADAMW | {"train.grad_accum_steps": 3, "model.d_model": 256, "train.micro_batch_size": 2},
    {"model.n_kv_heads": 1},
    {"model.n_heads": 8, "model.n_kv_heads": 2, "model.d_model": 256},
    _LONG,
    _LONG | {"model.n_layers": 8} | _CHECK,
    {"data.seq_len": 1024, "train.micro_batch_size": 2},
    {"model.mlp_multiple": 4},
    {"model.mlp_multiple": 1, "model.n_layers": 6},
    {"model.vocab_size": 16_384},
    _ADAMW | {"model.vocab_size": 32_000, "model.n_layers": 2, "train.micro_batch_size": 2},
    _TIED | {"model.vocab_size": 32_000, "model.n_layers": 2, "train.micro_batch_size": 2},
    {"model.vocab_size": 8192, "model.d_model": 512, "train.micro_batch_size": 1},
    {"model.d_model": 512, "model.n_layers": 6, "train.micro_batch_size": 1},
    _ADAMW | {"model.d_model": 512, "model.n_layers": 6, "train.micro_batch_size": 1},
    {"model.qk_norm": "false", "model.n_heads": 2, "model.n_kv_heads": 2},
    {"model.dropout": 0.1},
    {"model.d_model": 256, "model.n_layers": 8, "train.micro_batch_size": 16},
    # Heads wider than the model together, and narrower; experts and accumulation.
    _CHECK | _WIDE_HEADS | {"model.head_dim": 64, "model.n_layers": 2},
    _WIDE_HEADS | {"model.head_dim": 32, "data.seq_len": 256, "model.n_layers": 3},
    _CHECK | _FEW_HEADS | {"model.n_layers": 2, "model.vocab_size": 512},
    _CHECK | {"model.d_model": 64, "model.n_experts": 4, "train.grad_accum_steps": 2},
)


@dataclass(frozen=True)
class Compared:
    """One setting.

    Attributes:
        backend: Where.
        settings: What the command line would say.
        held_out: Whether it was drawn at random.
        predicted_bytes: By the formula, of what the counter sees.
        measured_bytes: The peak of steps 2 and 3.
        counter: What was read.
        moment: What is being done at the predicted peak.
        ordinary_bytes: Measured with the allocator of a run; None where it was not.
    """

    backend: str
    settings: tuple[str, ...]
    held_out: bool
    predicted_bytes: int
    measured_bytes: int
    counter: str
    moment: str
    ordinary_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_bytes / self.measured_bytes

    @property
    def ok(self) -> bool:
        """Whether the promise holds."""
        return 1 - MOST_UNDER <= self.ratio <= 1 + MOST_OVER


def countable(forecast: MemoryForecast, backend: str) -> int:
    """What the measurement sees: on a CPU the process without its allocator, else the tensors."""
    return forecast.total - forecast.allocator if backend == "cpu" else forecast.tensors


def settings_of(changes: dict[str, object]) -> tuple[str, ...]:
    """The arguments of one setting of the grid."""
    return tuple(f"{k}={v}" for k, v in (_BASE | changes).items())


def held_out(count: int = HELD_OUT, seed: int = HELD_OUT_SEED) -> list[tuple[str, ...]]:
    """Random settings, the same for a seed."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        heads, head_dim = rng.choice((2, 4, 6)), rng.choice((16, 32, 48))
        length = rng.choice((64, 96, 192, 320))
        changes: dict[str, object] = {
            "model.d_model": heads * head_dim,
            "model.n_heads": heads,
            "model.n_kv_heads": rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
            "model.n_layers": rng.randint(1, 5),
            "model.vocab_size": rng.choice((300, 2000, 6000, 12_000, 24_000)),
            "model.mlp_multiple": rng.choice((1.5, 2.67, 4)),
            "data.seq_len": length,
            "train.micro_batch_size": max(rng.choice((320, 700, 1400)) // length, 1),
            "train.grad_accum_steps": rng.choice((1, 1, 2)),
            "train.gradient_checkpointing": rng.choice(("true", "false", "false")),
            "train.optimizer": rng.choice(("muon", "adamw")),
            "train.precision": rng.choice(("float32",) * 7 + ("bfloat16",)),
            "model.tie_embeddings": rng.choice(("true", "false")),
            "model.n_experts": rng.choice((0, 0, 4)),
        }
        out.append(settings_of(changes))
    return out


def measure_child(config: RunConfig, kind: str = "fixed") -> dict[str, Any]:
    """The peak of this configuration, of a process of its own.

    Args:
        config: Resolved.
        kind: "fixed" or "ordinary", the allocator.

    Raises:
        PippinError: P101 where the process did not finish.
    """
    command = [sys.executable, "-m", "tools.benchmarks.memory_step", kind]
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            command,
            input=config.model_dump_json(),
            capture_output=True,
            text=True,
            cwd=root,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _unfinished(f"no result in {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise _unfinished(lines[-1] if lines else f"exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _unfinished(found: str) -> PippinError:
    return PippinError(
        "P101",
        "the steps to measure did not finish.",
        found=found,
        remedy="a smaller train.micro_batch_size, or close other programs",
    )


def compare(
    backend: str,
    settings: Sequence[str],
    *,
    config: str | None = None,
    is_held_out: bool = False,
    ordinary: bool = False,
) -> Compared:
    """Predict and measure one setting."""
    resolved = resolve_config(backend, config, settings)
    forecast = predict_training_memory(resolved, param_specs(resolved.model))
    found = measure_child(resolved)
    kept = measure_child(resolved, "ordinary") if ordinary else None
    return Compared(
        backend=backend,
        settings=tuple(settings),
        held_out=is_held_out,
        predicted_bytes=countable(forecast, backend),
        measured_bytes=int(found["measured_bytes"]),
        counter=str(found["counter"]),
        moment=forecast.moment,
        ordinary_bytes=None if kept is None else int(kept["measured_bytes"]),
    )


def run_grid(
    names: Iterable[str], tell: Callable[[Compared], None], *, limit: int | None = None
) -> list[Compared]:
    """Every setting on every backend of `names`, each told as it is done."""
    found = []
    for name in names:
        settings = [(settings_of(changes), False) for changes in GRID]
        settings += [(drawn, True) for drawn in held_out()]
        for index, (arguments, drawn) in enumerate(settings[:limit]):
            ordinary = name == "cpu" and index % ORDINARY_EVERY == 1
            found.append(compare(name, arguments, is_held_out=drawn, ordinary=ordinary))
            tell(found[-1])
    return found


def changes_of(settings: Sequence[str]) -> str:
    """A setting of the grid in short: what it changes of the base."""
    base = settings_of({})
    return " ".join(s.partition(".")[2] for s in settings if s not in base) or "(base)"


def summary(found: Sequence[Compared]) -> list[Measured]:
    """The figures that the promise is about, by backend."""
    rows = []
    for name in dict.fromkeys(c.backend for c in found):
        for drawn in (False, True):
            ratios = [c.ratio for c in found if c.backend == name and c.held_out is drawn]
            if not ratios:
                continue
            kind = "held out" if drawn else "grid"
            over, under = 100 * (max(ratios) - 1), 100 * (1 - min(ratios))
            note = f"{len(ratios)} settings"
            rows.append(Measured(f"{name}, {kind}: most above", over, "%", 100 * MOST_OVER, note))
            rows.append(Measured(f"{name}, {kind}: most below", under, "%", 100 * MOST_UNDER, note))
        kept = [
            c.ordinary_bytes / c.measured_bytes - 1
            for c in found
            if c.backend == name and c.ordinary_bytes is not None
        ]
        if kept:
            rows.append(
                Measured(
                    f"{name}: a run's allocator adds",
                    100 * sum(kept) / len(kept),
                    "%",
                    note=f"mean of {len(kept)}; at most {100 * max(kept):.0f} %",
                )
            )
    return rows


def as_rows(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """For docs/memory.json."""
    return [asdict(c) | {"ratio": round(c.ratio, 4), "ok": c.ok} for c in found]


def from_rows(rows: Sequence[dict[str, Any]]) -> list[Compared]:
    """What `as_rows` wrote."""
    out = []
    for row in rows:
        fields = {k: v for k, v in row.items() if k not in ("ratio", "ok")}
        out.append(Compared(**{**fields, "settings": tuple(fields["settings"])}))
    return out


def predicted_again(found: Sequence[Compared]) -> list[Compared]:
    """The same measurements beside what the formula says now."""
    out = []
    for row in found:
        config = resolve_config(row.backend, None, row.settings)
        forecast = predict_training_memory(config, param_specs(config.model))
        size = countable(forecast, row.backend)
        out.append(replace(row, predicted_bytes=size, moment=forecast.moment))
    return out


def plot(found: Sequence[Compared], path: Path) -> None:
    """Predicted against measured, with the band of the promise."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    sizes = [c.measured_bytes / 1e9 for c in found]
    ends = [0.8 * min(sizes), 1.25 * max(sizes)]
    lower, upper = ([(1 + s) * e for e in ends] for s in (-MOST_UNDER, MOST_OVER))
    axes.fill_between(ends, lower, upper, color="0.88", label="-5 % to +10 %")
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    names = list(dict.fromkeys(c.backend for c in found))
    for colour, name in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), names):
        for drawn in (False, True):
            points = [c for c in found if c.backend == name and c.held_out is drawn]
            if not points:
                continue
            axes.scatter(
                [c.measured_bytes / 1e9 for c in points],
                [c.predicted_bytes / 1e9 for c in points],
                s=28,
                marker="x" if drawn else "o",
                color=colour,
                alpha=0.9,
                linewidths=1.4 if drawn else 0.4,
                edgecolors=None if drawn else "white",
                label=f"{name}, {'held out' if drawn else 'grid'}: {len(points)}",
            )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("measured peak of steps 2 and 3, GB")
    axes.set_ylabel("predicted, GB")
    axes.set_title("Memory of a training step: predicted and measured", loc="left")
    axes.legend(frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
