"""Random configurations, valid and broken: values come back, and every problem is told at its line.

Run: python -m pytest tests/unit/test_config_fuzz.py
"""

import json
import math
import tempfile
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.config.dialect_table import ANARCHOBOT_KEYS, FLAT, NANOGPT
from core.config.load import load
from core.config.nearest import nearest_names, typing_errors
from core.config.schema import SECTIONS, is_auto_key, key_names
from core.errors import PippinError

MODERATE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
# Keys that no rule ties to others, so that any values of theirs fit together.
FREE = tuple(
    k
    for k in key_names()
    if k
    not in (
        *(
            "model.d_model",
            "model.n_heads",
            "model.n_kv_heads",
            "model.head_dim",
            "model.n_experts",
        ),
        *("model.top_k", "model.max_seq_len", "data.seq_len", "train.total_steps", "data.mixture"),
        *("train.warmup_steps", "data.val_fraction", "data.test_fraction", "train.momentum"),
        *("train.momentum_start", "train.lr", "train.min_lr", "train.precision", "train.ns_dtype"),
    )
)


def field_of(key):
    section, _, name = key.partition(".")
    return SECTIONS[section].model_fields[name]


def limits_of(key):
    out = {}
    for limit in field_of(key).metadata:
        for name in ("ge", "gt", "le", "lt"):
            if (value := getattr(limit, name, None)) is not None:
                out[name] = value
    return out


def values_of(key):
    """Valid values of a key, from its type and limits."""
    annotation, limits = field_of(key).annotation, limits_of(key)
    if annotation is bool:
        made = st.booleans()
    elif annotation is int:
        made = st.integers(int(limits.get("ge", 0)), int(limits.get("le", 10**9)))
    elif annotation is float:
        low, high = limits.get("ge", limits.get("gt", 0.0)), limits.get("le", limits.get("lt", 1e6))
        made = st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    elif typing.get_origin(annotation) is typing.Literal:
        made = st.sampled_from(typing.get_args(annotation))
    else:
        made = st.text("abcxyz/._", min_size=1, max_size=12).filter(lambda t: t not in (".", "~"))
    return st.one_of(made, st.just("auto")) if is_auto_key(key) else made


def wrong_values_of(key):
    """Values that a key must refuse: of other types, and beyond its limits."""
    annotation, limits = field_of(key).annotation, limits_of(key)
    made = [[1, 2], {"a": 1}]
    if annotation is str:
        made += [7, True]
    elif annotation is bool:
        made += ["perhaps", 3]
    elif annotation in (int, float):
        made += ["many", True, math.nan, math.inf]
        made += [limits["ge"] - 1] if "ge" in limits else []
        made += [limits["gt"]] if "gt" in limits else []
        made += [limits["le"] + 1] if "le" in limits else []
        made += [1.5] if annotation is int else []
    elif typing.get_origin(annotation) is typing.Literal:
        made += ["perhaps", 3]
    return made


def as_yaml(value):
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf"
        return repr(value)
    return json.dumps(value)


def forms(value):
    """Ways to write a number that all mean it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return [as_yaml(value)]
    text = repr(value)
    made = [text, f"'{text}'", f'"{text}"']
    if isinstance(value, int):
        made += [f"{value}.0", f"{value}e0", f"0{value}" if value else "00"]
    else:
        made += [f"{value:.17e}", f"{value:.17E}"]
    return made


def write(folder, items):
    """A file of (key, text) pairs; returns it and each key's line."""
    lines, where = [], {}
    for section in SECTIONS:
        mine = [(k, t) for k, t in items if k.startswith(section + ".")]
        if mine:
            lines.append(f"{section}:")
        for key, text in mine:
            lines.append(f"  {key.partition('.')[2]}: {text}")
            where[key] = len(lines)
    path = Path(folder) / "c.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path), where


@MODERATE
@given(st.data())
def test_any_valid_file_comes_back_in_any_number_form(data):
    keys = data.draw(st.lists(st.sampled_from(FREE), min_size=1, max_size=12, unique=True))
    chosen = {key: data.draw(values_of(key), label=key) for key in keys}
    items = [(k, data.draw(st.sampled_from(forms(v)))) for k, v in chosen.items()]
    with tempfile.TemporaryDirectory() as folder:
        draft = load(config=write(folder, items)[0])
    for key, value in chosen.items():
        assert draft.values[key] == value and type(draft.values[key]) is type(value)


@MODERATE
@given(st.data())
def test_every_problem_of_a_broken_file_is_told_at_its_line(data):
    keys = data.draw(st.lists(st.sampled_from(FREE), min_size=2, max_size=12, unique=True))
    broken = data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
    items = []
    for key in keys:
        made = st.sampled_from(wrong_values_of(key)) if key in broken else values_of(key)
        items.append((key, as_yaml(data.draw(made, label=key))))
    with tempfile.TemporaryDirectory() as folder:
        path, where = write(folder, items)
        with pytest.raises(PippinError) as info:
            load(config=path)
    assert info.value.code == "P010" and info.value.exit_code == 2
    lines = info.value.found.splitlines()
    for key in keys:
        told = [line for line in lines if line.startswith(f"{path}:{where[key]}: {key} = ")]
        assert bool(told) == (key in broken), (key, lines)


def misspellings(name):
    made = {name[:i] + name[i + 1 :] for i in range(len(name))}
    made |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    return sorted(m for m in made if m and m != name)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_letter_left_out_or_swapped_is_refused_and_the_right_key_named(section, tmp_path):
    """Each key of the section once, a different misspelling of each in one file after another."""
    keys = [k for k in key_names() if k.startswith(section + ".")]
    rounds = max(len(misspellings(k.partition(".")[2])) for k in keys)
    step = max(rounds // 12, 1)
    for turn in range(0, rounds, step):
        items, wanted = [], {}
        for key in keys:
            options = misspellings(key.partition(".")[2])
            wrong = f"{section}.{options[turn % len(options)]}"
            if wrong not in {*key_names(), *ANARCHOBOT_KEYS, *wanted}:
                items.append((wrong, "1"))
                wanted[wrong] = key
        path, where = write(tmp_path, items)
        with pytest.raises(PippinError) as info:
            load(config=path)
        told = dict(
            line.removeprefix(path + ":").split(":", 1) for line in info.value.found.splitlines()
        )
        for wrong, key in wanted.items():
            line = told[str(where[wrong])]
            assert f"unknown key {wrong}; did you mean" in line and key in line


PIECES = st.sampled_from(
    [
        *(
            "model:",
            "train:",
            "data:",
            "device:",
            "training:",
            "n_layer: 3",
            "n_embd: 2",
            "lr: 3e-4",
        ),
        *("  d_model: 64", "  lr: [1, 2]", "  lr: {a: b}", "max_steps: x", "batch_size: -1", "- 1"),
        *(
            "  n_layers: 1e400",
            "  seed: 0x1F",
            "\tx: 1",
            "a: &b 1",
            "c: *b",
            "!!x 1",
            "? x",
            "{",
            "}",
        ),
        *("model: 3", "train: null", "data: [1]", "model: {n_layer: 1, n_embd: 2}", "dataset: x"),
        *(
            "  dataset: 3",
            "  adam_lr_multiplier: q",
            "bias: maybe",
            "eval_iters: 3",
            "warmup_iters: x",
        ),
        *(
            "muon_lr: .nan",
            "d_ff: 1e308",
            "max_iters: '5'",
            "\u00e9: \ud7ff",
            "%YAML 9",
            "---",
            "...",
        ),
    ]
)


@MODERATE
@given(st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=12))
def test_a_random_file_is_read_or_refused_in_our_words(pieces):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes("\n".join(pieces).encode("utf-8", "surrogatepass"))
        try:
            load(config=str(path))
        except PippinError as error:
            assert error.code in ("P010", "P011") and "c.yaml" in error.render()


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(["False", "3e-4", "auto", "gpt2", "mps", "", "1e999", "-3", "0.5"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)


@MODERATE
@given(st.sampled_from([*FLAT, NANOGPT]), st.data())
def test_a_foreign_file_with_any_values_is_read_or_refused_in_our_words(dialect, data):
    names = data.draw(st.lists(st.sampled_from(sorted(dialect.terms)), min_size=1, max_size=8))
    content = {}
    for name in names:
        section, dot, key = name.rpartition(".")
        into = content.setdefault(section, {}) if dot else content
        into[key] = data.draw(JSON_VALUES, label=name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        told = []
        try:
            load(config=str(path), note=told.append)
        except PippinError as error:
            assert error.code in ("P010", "P011") and "c.json" in error.render()
        else:
            assert told and all("\n" not in line for line in told)


@MODERATE
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused_in_our_words(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_bytes(content)
        try:
            load(config=str(path))
        except PippinError as error:
            assert error.code in ("P010", "P011")


@MODERATE
@given(
    st.lists(
        st.one_of(st.text(max_size=30), st.sampled_from(key_names()).map(lambda k: k + "=")),
        max_size=4,
    )
)
def test_random_overrides_are_read_or_refused_in_our_words(overrides):
    try:
        load(overrides=overrides)
    except PippinError as error:
        assert error.code in ("P010", "P012")


@pytest.mark.parametrize(
    ("a", "b", "errors"),
    [
        ("", "abc", 3),
        ("lr", "lr", 0),
        ("sede", "seed", 1),
        ("kitten", "sitting", 3),
        ("ca", "abc", 3),
    ],
)
def test_typing_errors_are_counted(a, b, errors):
    assert typing_errors(a, b) == typing_errors(b, a) == errors
    assert (
        typing_errors(a, b, limit=1) == errors if errors <= 1 else typing_errors(a, b, limit=1) > 1
    )


def test_equally_near_names_are_all_given():
    assert nearest_names("train.beta", ("train.beta1", "train.beta2", "train.lr")) == [
        "train.beta1",
        "train.beta2",
    ]
    assert nearest_names("x" * 500, key_names()) == []
