"""Configuration: YAML numbers, every key, all problems at once, provenance.

Run: python -m pytest tests/unit/test_config.py
"""

import shlex

import pytest
import yaml

from core.config.load import (
    AUTO,
    build,
    defaults,
    from_resolved,
    load,
    parse_override,
    parse_yaml,
    unresolved,
)
from core.config.schema import SECTIONS, key_names
from core.errors import PippinError
from core.paths import CONFIGS_DIR
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("1E+3", 1e3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("010", 10),
        ("0x10", 16),
        ("-7", -7),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"),
        ("'3e-4'", "3e-4"),
    ],
)
def test_yaml_scalars_follow_yaml_1_2(text, value):
    got = parse_yaml(f"a: {text}")["a"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "a: !!python/object/apply:os.system [echo]", "a: !x 1", "1: 2", "a: [1"],
)
def test_repeated_keys_tags_and_broken_yaml_are_refused(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def problems_of(**kwargs):
    with pytest.raises(PippinError) as info:
        load(**kwargs)
    assert info.value.code == "P010" and info.value.exit_code == 2
    return info.value.render()


def test_all_problems_are_reported_at_once_with_file_line_and_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "model:\n  d_modle: 3\n  n_heads: 3\n  d_model: 64\n"
        "train:\n  total_steps: 1e3\n  warmup_steps: 2000\n  compile: yes\nmodle: {}\n",
    )
    text = problems_of(config=path, overrides=["model.dropot=0.1", "train.seed=-1"])
    assert "c.yaml:2: unknown key model.d_modle; did you mean model.d_model?" in text
    assert "c.yaml:3: model.n_heads = 3 does not divide model.d_model = 64" in text
    assert "c.yaml:7: train.warmup_steps = 2000 is not below train.total_steps = 1000" in text
    assert 'c.yaml:8: train.compile = "yes"' in text and "true or false" in text
    assert "c.yaml:9: unknown section modle; did you mean model" in text
    assert "did you mean model.dropout?" in text
    assert "train.seed = -1" in text


@pytest.mark.parametrize("name", key_names())
def test_every_key_misspelt_is_refused_and_the_right_one_named(name):
    assert f"did you mean {name}" in problems_of(overrides=[f"{name}q=1"])
    section, _, key = name.partition(".")
    assert "did you mean" in problems_of(overrides=[f"{section}.{key[1:]}=1"])


@pytest.mark.parametrize("name", key_names())
def test_every_key_refuses_a_value_of_another_type(name):
    text = problems_of(overrides=[f"{name}=[1, {{a: 2}}]"])
    assert f"{name} = " in text and "expected" in text


@pytest.mark.parametrize("text", ["train.lr=3e-4", "train.lr='3e-4'", "train.lr=0.0003"])
def test_a_number_is_a_number_quoted_or_not(text):
    assert load(overrides=[text]).values["train.lr"] == 3e-4


def test_whole_numbers_may_be_written_as_floats_and_fractions_not():
    assert load(overrides=["train.total_steps=1e3"]).values["train.total_steps"] == 1000
    assert "whole number" in problems_of(overrides=["train.total_steps=1.5"])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "nan", "inf"])
def test_a_rate_that_is_not_finite_is_refused(value):
    assert "train.lr" in problems_of(overrides=[f"train.lr={value}"])


def test_sources_are_kept_and_the_last_override_wins(tmp_path):
    path = write(tmp_path, "train:\n  lr: 1e-3\n  seed: 5\n")
    draft = load(config=path, overrides=["train.lr=1", "train.lr=2"], flags={"train.seed": 9})
    assert draft.values["train.lr"] == 2.0 and draft.sources["train.lr"].kind == "flag"
    assert draft.values["train.seed"] == 9
    assert draft.sources["model.dropout"].kind == "default"
    assert load(config=path).sources["train.lr"].where.endswith("c.yaml:2")


def test_a_set_key_is_not_resolved_and_an_auto_key_is():
    draft = load(overrides=["model.d_model=96", "model.n_heads=auto"])
    draft.resolve("model.d_model", 64, "no")
    draft.resolve("model.n_heads", 4, "yes")
    assert draft.values["model.d_model"] == 96
    assert draft.values["model.n_heads"] == 4 and draft.sources["model.n_heads"].reason == "yes"


def test_what_is_left_automatic_is_named():
    with pytest.raises(PippinError) as info:
        build(defaults())
    for name in unresolved(defaults()):
        assert name in info.value.render()
    assert "model.d_model" in unresolved(defaults()) and AUTO == "auto"


def test_a_resolved_configuration_comes_back_unchanged():
    config = tiny_config()
    again = build(from_resolved(config.model_dump(mode="json"), "there"))
    assert again == config


def test_a_configuration_from_before_there_were_experts_is_a_dense_one():
    saved = tiny_config().model_dump(mode="json")
    for section, keys in (
        ("model", ("n_experts", "top_k")),
        ("train", ("lr_router", "router_aux_loss_coef")),
    ):
        for key in keys:
            del saved[section][key]
    found = build(from_resolved(saved, "there"))
    assert found.model.n_experts == 0
    assert found.model == tiny_config().model


@pytest.mark.parametrize("path", sorted(CONFIGS_DIR.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_loads(path):
    assert load(config=path.stem).values["model.d_model"] is not None


def test_an_unknown_preset_lists_those_that_exist():
    with pytest.raises(PippinError) as info:
        load(config="quickstrat")
    assert info.value.code == "P011" and info.value.choices[0] == "quickstart"


CONTRADICTIONS = [
    (["model.d_model=64", "model.n_heads=5"], "does not divide", "model.n_heads=4"),
    (["model.d_model=63"], "model.d_model = 63 is odd", "model.d_model=64"),
    (["model.d_model=65", "model.n_heads=4"], "model.d_model = 65 is odd", "model.d_model=64"),
    (["model.d_model=9", "model.n_heads=3"], "model.d_model = 9 is odd", "model.d_model=12"),
    (["model.n_heads=4", "model.n_kv_heads=3"], "n_kv_heads = 3", "model.n_kv_heads=4"),
    (["model.d_model=12", "model.n_heads=4"], "even width", "model.n_heads=3"),
    (["model.head_dim=7"], "even width", "model.head_dim=8"),
    (["data.seq_len=64", "model.max_seq_len=32"], "longer than", "data.seq_len=32"),
    (["train.total_steps=10", "train.warmup_steps=10"], "it is warm", "train.warmup_steps=0"),
    (["train.min_lr=1", "train.lr=0.1"], "above train.lr", "train.min_lr=0.01"),
    (["train.momentum_start=0.99"], "above train.momentum", "train.momentum_start=0.95"),
    (
        ["data.val_fraction=0.45", "data.test_fraction=0.46"],
        "leaves under",
        "data.val_fraction=0.02 data.test_fraction=0.02",
    ),
    (
        ["train.precision=float32", "train.ns_dtype=bfloat16"],
        "exact throughout",
        "train.ns_dtype=float32",
    ),
    (["model.n_experts=1"], "a dense model with a router", "model.n_experts=0"),
    (["model.n_experts=4", "model.top_k=5"], "at most 4 experts", "model.top_k=4"),
]


@pytest.mark.parametrize(("overrides", "word", "fix"), CONTRADICTIONS)
def test_contradictions_end_with_the_override_that_corrects_them(overrides, word, fix):
    text = problems_of(overrides=overrides)
    assert word in text and f"  try: {fix}\n  nothing was started." in text
    assert text.startswith("P010 the configuration has a problem:\n")
    load(overrides=[*overrides, *fix.split()])


def test_a_width_that_heads_may_not_have_is_allowed_where_theirs_is_given():
    draft = load(overrides=["model.d_model=63", "model.head_dim=16"])
    assert draft.values["model.d_model"] == 63


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.n_layers=0", "model.n_layers=1"),
        ("model.n_layers=9999", "model.n_layers=512"),
        ("train.compile=yes", "train.compile=true"),
        ("train.schedule=cosin", "train.schedule=cosine"),
        ("model.n_layer=3", "model.n_layers=3"),
        ("train.total_steps=1_000", "train.total_steps=1000"),
        ("train.lr=1_000", None),  # above its range in any spelling
        ("train.backend=tpu", None),  # near to none
        ("model.dropout=1", None),  # below 1 there is no nearest
        ("train.lr=abc", None),
    ],
)
def test_a_wrong_value_ends_with_the_nearest_that_is_allowed(override, fix):
    remedy = problems_of(overrides=[override]).partition("  try: ")[2].splitlines()[0]
    if fix is None:
        assert remedy.startswith("correct what is listed") and "schema.json" in remedy
    else:
        assert remedy == fix
        load(overrides=[override, fix] if "n_layer=" not in override else [fix])


def test_a_number_with_underscores_is_told_how_to_write_it(tmp_path):
    path = write(tmp_path, "train:\n  total_steps: 10_000\n  lr: 0.1\n")
    text = problems_of(config=path)
    assert "Write 10000, without underscores." in text
    assert f"try: set train.total_steps to 10000 in {path}:2" in text
    assert "underscores" not in problems_of(overrides=["train.total_steps=a_b"])


def test_what_a_file_misspells_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "train:\n  log_intervl: 4\n")
    assert f"try: write log_interval instead of log_intervl in {path}:2" in problems_of(config=path)
    path = write(tmp_path, "modle:\n  n_layers: 4\n")
    assert f"try: write model instead of modle in {path}:1" in problems_of(config=path)


@pytest.mark.parametrize("given", [{"overrides": ["train.backend=cpu"]}, {}])
def test_an_invalid_value_of_a_file_is_told_where_the_command_line_hides_it(tmp_path, given):
    path = write(tmp_path, "train:\n  seed: 3\n  backend: tpu\n")
    given = given or {"flags": {"train.backend": "cpu"}}
    text = problems_of(config=path, **given)
    assert f'{path}:3: train.backend = "tpu"' in text and text.count("tpu") == 1


def test_values_of_a_file_that_only_go_badly_together_may_be_overridden(tmp_path):
    path = write(tmp_path, "model:\n  d_model: 63\n")
    assert load(config=path, overrides=["model.d_model=64"]).values["model.d_model"] == 64


def test_words_that_are_no_overrides_are_told_with_all_other_problems(tmp_path):
    path = write(tmp_path, "train:\n  seed: -1\n")
    text = problems_of(config=path, overrides=["train.lr=abc", "foo", "bar"])
    for part in (f"{path}:2: train.seed", 'train.lr = "abc"', "'foo' is neither", "'bar' is"):
        assert part in text
    with pytest.raises(PippinError) as info:
        load(overrides=["foo"])
    assert info.value.code == "P012" and info.value.remedy and info.value.kept
    with pytest.raises(PippinError) as info:
        load(overrides=["foo", "train.lr=[1"])
    assert info.value.code == "P012" and "'foo'" in info.value.found
    assert "train.lr" in info.value.found


def test_a_second_document_is_refused_in_a_sentence(tmp_path):
    path = write(tmp_path, "train: {lr: 0.1}\n---\ntrain: {}\n")
    with pytest.raises(PippinError) as info:
        load(config=path)
    assert info.value.code == "P011" and info.value.what == (
        f"{path}:2: another document begins here, and a configuration is one."
    )


@pytest.mark.parametrize("text", ["train.lr", "lr", "train.lr=[1"])
def test_a_broken_override_is_refused(text):
    with pytest.raises(PippinError) as info:
        parse_override(text)
    assert info.value.code == "P012"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.text_field", "a: b: ["),
        ("data.tokenizer", "[x"),
        ("train.lr", "[1"),
        ("train.total_steps", "{"),
        ("train.compile", "[yes"),
    ],
)
def test_the_remedy_of_a_broken_override_can_be_read(name, value):
    with pytest.raises(PippinError) as info:
        load(overrides=[f"{name}={value}"])
    (override,) = shlex.split(info.value.remedy)
    assert info.value.code == "P012" and override.startswith(f"{name}=")
    draft = load(overrides=[override])
    if isinstance(draft.values[name], str) and draft.values[name] != AUTO:
        assert draft.values[name] == value


def test_every_key_has_a_description():
    for section in SECTIONS.values():
        for name, info in section.model_fields.items():
            assert info.description, name


def test_aliases_are_refused_before_they_are_written_out(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]" for i in range(1, 12)]
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("\n".join([*lines, "train:", "  lr: *a11", ""]))
    with pytest.raises(PippinError) as info:
        load(config=str(bomb))
    assert info.value.code == "P011" and "bomb.yaml:2" in info.value.what
    assert "alias" in info.value.what


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "&a [*a]", "'" + "9" * 5000 + "'"])
def test_odd_values_are_refused_in_one_short_message(value):
    with pytest.raises(PippinError) as info:
        load(overrides=[f"train.total_steps={value}"])
    assert info.value.code in ("P010", "P012") and "train.total_steps" in info.value.render()


GROUPS = ("train.lr_matrix", "train.lr_embed", "train.lr_head")


@pytest.fixture
def with_rates(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("train:\n  lr_matrix: 0.012\n  lr_embed: 0.1\n  lr_head: 0.05\n")
    return str(path)


def test_a_given_rate_scales_the_rates_of_the_preset(with_rates):
    preset = load(config=with_rates)
    draft = load(config=with_rates, overrides=["train.lr=1e-4"])
    factor = 1e-4 / preset.values["train.lr"]
    for name in GROUPS:
        assert draft.values[name] == pytest.approx(preset.values[name] * factor)
        source = draft.sources[name]
        assert source.kind == "flag" and "with train.lr" in source.reason
    assert draft.is_auto("train.lr_vector") and draft.is_auto("train.min_lr")


def test_a_group_rate_that_is_given_too_stays(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 1e-2\n  lr_matrix: 4e-2\n  lr_head: 2e-2\n")
    draft = load(config=str(path), overrides=["train.lr=5e-3", "train.lr_head=0.3"])
    assert draft.values["train.lr_matrix"] == pytest.approx(2e-2)
    assert draft.values["train.lr_head"] == 0.3
    alone = load(config=str(path))
    assert alone.values["train.lr_matrix"] == 4e-2


def test_a_scaled_rate_out_of_range_names_the_flag(with_rates):
    with pytest.raises(PippinError) as info:
        load(config=with_rates, overrides=["train.lr=9"])
    assert info.value.code == "P010" and "train.lr=9" in info.value.render()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.learning_rat=1", "did you mean train.lr?"),
        ("train.learning_rate=1", "did you mean train.lr?"),
        ("data.block_siz=3", "did you mean data.seq_len?"),
        ("train.min_lrr=1", "did you mean train.min_lr?"),
        ("model=3", "model is a section, not a key"),
    ],
)
def test_names_of_other_projects_are_near_too_and_a_section_is_no_key(text, words):
    with pytest.raises(PippinError) as caught:
        load(overrides=[text])
    assert words in caught.value.found and caught.value.kept == "nothing was started."


def test_a_file_that_cannot_be_read_ends_with_a_remedy(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("train: {lr: [}\n")
    with pytest.raises(PippinError) as caught:
        load(config=str(path))
    assert caught.value.code == "P011" and str(path) in caught.value.remedy and caught.value.kept
