"""The optimizer of docs/numerics.md section 4 in float64 numpy: clip, decay, AdamW, Muon."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from core.backend import StepHyper
from core.config.schema import TrainConfig
from core.params import ParamSpec, uses_muon

Array = NDArray[np.float64]
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(u: Array, steps: int) -> Array:
    """Five times towards the nearest orthogonal matrix, of one matrix `[out, in]`."""
    a, b, c = NS_COEFFICIENTS
    x = u / (np.sqrt((u * u).sum()) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Optimizer:
    """Parameters and state in float64; `step` is one update."""

    def __init__(
        self, params: Mapping[str, NDArray[np.float32]], specs: Sequence[ParamSpec], c: TrainConfig
    ) -> None:
        self.specs, self.config = specs, c
        self.params = {s.name: params[s.name].astype(np.float64) for s in specs}
        self.state: dict[str, Array] = {}

    def step(self, grads: Mapping[str, Array], hyper: StepHyper) -> float:
        """Update all parameters and return the norm of the gradients before the clip."""
        norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))
        clip = min(1.0, hyper.max_grad_norm / (norm + 1e-6)) if hyper.max_grad_norm > 0 else 1.0
        for spec in self.specs:
            g = grads[spec.name].astype(np.float64) * clip
            lr = hyper.lr[spec.group]
            decayed = self.params[spec.name] * (1 - lr * hyper.weight_decay[spec.group])
            rule = self._muon if uses_muon(spec, self.config.optimizer) else self._adamw
            self.params[spec.name] = decayed - lr * rule(spec.name, g, hyper)
        return norm

    def _slot(self, slot: str, name: str, like: Array) -> Array:
        return self.state.get(f"optim/{slot}/{name}", np.zeros_like(like))

    def _adamw(self, name: str, g: Array, hyper: StepHyper) -> Array:
        b1, b2, t = self.config.beta1, self.config.beta2, hyper.step
        m = b1 * self._slot("exp_avg", name, g) + (1 - b1) * g
        v = b2 * self._slot("exp_avg_sq", name, g) + (1 - b2) * g * g
        self.state[f"optim/exp_avg/{name}"], self.state[f"optim/exp_avg_sq/{name}"] = m, v
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + self.config.adam_eps)

    def _muon(self, name: str, g: Array, hyper: StepHyper) -> Array:
        b = hyper.momentum
        buf = b * self._slot("momentum", name, g) + (1 - b) * g
        self.state[f"optim/momentum/{name}"] = buf
        rows, cols = g.shape[-2:]
        rms = 0.2 * np.sqrt(max(rows, cols))
        scale = rms if self.config.muon_scale == "rms" else np.sqrt(max(1.0, rows / cols))
        nesterov = (1 - b) * g + b * buf
        matrices = nesterov.reshape(-1, rows, cols)  # one, or those of all experts
        done = [newton_schulz(m, self.config.ns_steps) for m in matrices]
        return scale * np.stack(done).reshape(g.shape)
