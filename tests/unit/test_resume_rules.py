"""What stands on resume, what follows a key that is given, and when the curve is the same.

Run: python -m pytest tests/unit/test_resume_rules.py
"""

from dataclasses import replace
from pathlib import Path

import pytest

from core.backend import Availability
from core.checkpoint import initial_checkpoint
from core.config.load import build, from_resolved, load
from core.config.schema import RunConfig
from core.params import param_specs
from core.training import resume
from core.training.console import Console
from core.training.options import Options
from core.training.session import Session
from tests.helpers import ArrayCheckpoint, random_params, tiny_config

RATES = ("lr_matrix", "lr_embed", "lr_head", "lr_vector", "min_lr")


def point(config, *, backend="mlx", version="1.0"):
    meta = initial_checkpoint(config, param_specs(config.model)).meta
    meta = replace(meta, step=5, backend={"name": backend, "framework": "x", "version": version})
    return resume.ResumePoint(Path("r/step_000005.npz"), Path("r"), meta)


def resumed(config, *overrides):
    """The values of a resume of `config` with these overrides."""
    asked = load(overrides=overrides)
    draft = from_resolved(config.model_dump(mode="json"), "r")
    for name, source in asked.sources.items():
        if source.kind == "flag":
            draft.set(name, asked.values[name], source)
    given = {n for n, s in asked.sources.items() if s.kind != "default"}
    resume.follow(draft, given, config.model_dump(mode="json"))
    return draft


def test_half_the_rate_is_half_of_every_rate():
    config = tiny_config()
    draft = resumed(config, f"train.lr={config.train.lr / 2}")
    for name in RATES:
        assert draft.values[f"train.{name}"] == pytest.approx(getattr(config.train, name) / 2)
    stays = resumed(config, f"train.lr={config.train.lr / 2}", "train.lr_head=0.5")
    assert stays.values["train.lr_head"] == 0.5


def test_precision_stands_whatever_the_backend_and_compilation_is_decided_again():
    config = tiny_config(train__backend="mlx", train__precision="bfloat16", train__compile=True)
    draft = resumed(config, "train.backend=cpu")
    assert draft.values["train.precision"] == "bfloat16"
    assert draft.is_auto("train.compile")


class NoMlx:
    """A machine without the backend of the run."""

    def available(self):
        return {
            "mlx": Availability("mlx", False, "it is not a Mac"),
            "cpu": Availability("cpu", True),
        }


def test_where_the_runs_backend_is_missing_the_same_rule_holds():
    config = tiny_config(train__backend="mlx", train__precision="bfloat16", train__compile=True)
    session = Session(Options(), NoMlx(), Console(quiet=True))  # type: ignore[arg-type]
    draft = session._draft(point(config))
    session._device(draft)
    assert draft.values["train.precision"] == "bfloat16"
    assert draft.is_auto("train.compile") and draft.is_auto("train.backend")


def changed(config, **keys):
    dump = config.model_dump()
    for name, value in keys.items():
        section, _, key = name.partition("__")
        dump[section][key] = value
    return RunConfig.model_validate(dump)


def test_the_same_curve_is_promised_only_where_it_is_true():
    config = tiny_config(train__backend="mlx")
    start = point(config)
    assert resume.same_curve(start, config, "1.0") == "same data order, same curve"
    quiet = changed(config, train__log_interval=3, train__save_dir="other", train__samples=0)
    assert resume.same_curve(start, quiet, "1.0") == "same data order, same curve"
    for other in (
        {"train__lr": 0.5},
        {"train__precision": "bfloat16"},
        {"train__total_steps": 40},
    ):
        said = resume.same_curve(start, changed(config, **other), "1.0")
        assert "same curve" not in said and next(iter(other)).replace("__", ".") in said
    assert "to rounding" in resume.same_curve(start, changed(config, train__backend="cpu"), "1.0")
    assert "to rounding" in resume.same_curve(start, config, "1.1")


def test_a_resumed_checkpoint_counts_skipped_steps_anew_and_is_the_same_otherwise():
    config = tiny_config()
    tensors = random_params(param_specs(config.model))
    state = {"loss_scale": 8.0, "skipped_total": 4.0, "skipped_in_a_row": 3.0}
    ckpt = ArrayCheckpoint(config, tensors, step=5, backend_state=state)
    again = resume.Continued(ckpt)
    assert again.meta.backend_state == {**state, "skipped_in_a_row": 0.0}
    assert again.names == ckpt.names and (again.meta.step, again.meta.kind) == (5, "full")
    name = ckpt.names[0]
    assert (again.read(name) == ckpt.read(name)).all() and again.shape(name) == ckpt.shape(name)


def test_a_checkpoint_from_before_a_key_was_there_goes_on_as_it_was():
    config = tiny_config(data__sampling="contiguous")
    start = point(config, backend=config.train.backend)
    del start.meta.config["data"]["sampling"]
    assert resume.same_curve(start, config, "1.0") == "same data order, same curve"
    assert build(from_resolved(start.meta.config, "r")) == config
