"""Presets: they load, they build, and they have the size that they say.

Run: python -m pytest tests/unit/test_presets.py
"""

import json
import math

import pytest

from core.config.json_schema import SCHEMA_NAME, schema_text
from core.config.load import load
from core.config.presets import find_config, preset_head, preset_names
from core.config.schema import SECTIONS, RunConfig, is_auto_key, key_names
from core.errors import PippinError
from core.machine.autoconfig import DeviceFacts
from core.machine.memory import predict_training_memory
from core.machine.system import recommended_working_set_bytes
from core.params import param_specs
from core.paths import CONFIGS_DIR, PROJECT_ROOT
from tools.showing.describing import count, resolved

GIB = 2**30
CPU = DeviceFacts("cpu", "", is_gpu=False, native_bf16=False, budget_bytes=64 * GIB)

PROMISED = (
    *("tiny", "small", "150M", "200M", "250M", "code", "shakespeare"),
    *("deep_narrow", "shallow_wide", "balanced"),
    *("anarchobot_tiny", "anarchobot_small", "anarchobot_medium", "anarchobot_large"),
    *("minimal", "full", "memory_constrained"),
    *("tiny_shakespeare", "5M", "50M", "125M", "large_model"),
    *("dev", "moe", "rtx5090", "rtx4090", "production"),
    *("mac-8gb", "mac-16gb", "mac-24gb", "mac-32gb", "mac-64gb", "mac-128gb"),
)

# Computed once from the guides' own tables, by hand or from the other projects' built models: layers,
# width, and parameters, in millions unless whole. 003 is exact: the same architecture.
RECORDED = {
    "tiny": (4, 192, 11.43),
    "small": (6, 384, 29.93),
    "150M": (16, 768, 151.88),
    "200M": (16, 896, 199.21),
    "250M": (16, 1024, 252.84),
    "anarchobot_tiny": (6, 256, 14_486_784),
    "anarchobot_small": (8, 512, 49_947_136),
    "anarchobot_medium": (12, 768, 137_841_408),
    "anarchobot_large": (24, 1024, 435_471_360),
    "minimal": (6, 512, 41.56),
    "tiny_shakespeare": (6, 384, 10.65),
    "moe": (6, 384, 79.06),
    "dev": (4, 256, 30.42),
    "rtx5090": (8, 512, 302.06),
    "rtx4090": (12, 768, 972.20),
    "production": (12, 768, 122.70),
}
ACTIVE = {"moe": 36.59, "dev": 17.84, "rtx5090": 67.18, "rtx4090": 179.47}


def config_of(name: str, device: DeviceFacts = CPU) -> RunConfig:
    return resolved(load(config=name), device)


def by_formula(m) -> int:
    """Parameters of the architecture, written down a second time."""
    d, f, width = m.d_model, m.d_ff, m.n_heads * m.head_dim
    kv = m.n_kv_heads * m.head_dim
    mlp = 3 * d * f
    if m.n_experts:
        mlp = m.n_experts * (mlp + d)
    block = 2 * d * width + 2 * d * kv + mlp + 2 * d + (2 * m.head_dim if m.qk_norm else 0)
    heads = 1 if m.tie_embeddings else 2
    return heads * m.vocab_size * d + m.n_layers * block + d


def test_every_preset_that_was_promised_is_there():
    assert set(PROMISED) <= set(preset_names())
    assert {"quickstart", "tiny_shakespeare_cpu"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_builds_and_needs_no_network(name):
    config = config_of(name)
    assert config.data.input_file is None and config.data.mixture is None
    assert config.data.tokenizer in ("bpe", "char", "byte", "unigram")
    assert load(config=name).sources["train.backend"].kind == "default"
    assert config.model.d_model % config.model.n_heads == 0


@pytest.mark.parametrize("name", PROMISED)
def test_a_preset_has_the_parameters_that_its_file_states(name):
    config, head = config_of(name), preset_head(CONFIGS_DIR / f"{name}.yaml")
    assert config.model.tie_embeddings and config.model.vocab_size == head.vocab_size
    assert count(config.model).total == head.parameters == by_formula(config.model)
    assert head.title and head.about


@pytest.mark.parametrize("name", RECORDED)
def test_a_preset_is_the_guide_s_model(name):
    layers, width, size = RECORDED[name]
    model = config_of(name).model
    assert (model.n_layers, model.d_model) == (layers, width)
    if isinstance(size, int):
        assert count(model).total == size
    else:
        assert count(model).total / 1e6 == pytest.approx(size, rel=0.005)
    if name in ACTIVE:
        assert count(model).active / 1e6 == pytest.approx(ACTIVE[name], rel=0.005)


@pytest.mark.parametrize("name", ["150M", "200M", "250M", "5M", "50M", "125M"])
def test_a_size_in_the_name_is_the_size(name):
    counts = count(config_of(name).model)
    assert counts.total == counts.tied == pytest.approx(1e6 * int(name[:-1]), rel=0.02)
    model = config_of(name).model
    assert counts.untied == counts.tied + model.vocab_size * model.d_model
    assert counts.non_embedding == counts.tied - model.vocab_size * model.d_model


def test_the_three_shapes_have_equal_blocks():
    sizes = [
        count(config_of(n).model).non_embedding for n in ("deep_narrow", "balanced", "shallow_wide")
    ]
    assert max(sizes) / min(sizes) < 1.01


MACS = [(f"mac-{gb}gb", gb) for gb in (8, 16, 24, 32, 64, 128)] + [("large_model", 24)]


@pytest.mark.parametrize("backend", ["mlx", "mps"])
@pytest.mark.parametrize(("name", "gb"), MACS)
def test_a_mac_s_preset_fits_that_mac(name, gb, backend):
    budget = recommended_working_set_bytes(gb * GIB)
    for native in (False, True):
        device = DeviceFacts(backend, "", is_gpu=True, native_bf16=native, budget_bytes=budget)
        config = config_of(name, device)
        needed = predict_training_memory(config, param_specs(config.model)).total
        assert needed <= config.train.memory_fraction * budget, f"{needed / 1e9:.1f} GB"


def test_the_largest_for_24_gb_is_the_largest():
    budget = recommended_working_set_bytes(24 * GIB)
    device = DeviceFacts("mlx", "", is_gpu=True, native_bf16=True, budget_bytes=budget)
    longer = resolved(load(config="large_model", overrides=["model.n_layers=32"]), device)
    needed = predict_training_memory(longer, param_specs(longer.model)).total
    assert needed > longer.train.memory_fraction * budget


@pytest.mark.parametrize(("name", "gib"), [("rtx4090", 24), ("rtx5090", 32)])
def test_a_card_s_preset_fits_that_card(name, gib):
    config = config_of(name, DeviceFacts("cuda", "", True, True, gib * GIB))
    needed = predict_training_memory(config, param_specs(config.model)).total
    assert needed <= config.train.memory_fraction * gib * GIB, f"{needed / 1e9:.1f} GB"


@pytest.mark.parametrize("name", preset_names())
def test_editors_find_the_schema(name):
    first = (CONFIGS_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA_NAME}"


def test_the_written_schema_is_current():
    written = (CONFIGS_DIR / SCHEMA_NAME).read_text(encoding="utf-8")
    assert written == schema_text(), "python tools/show_configs.py --write-schema"


def test_the_schema_allows_auto_where_the_machine_may_decide_and_nowhere_else():
    schema = json.loads(schema_text())
    for key in key_names():
        section, _, name = key.partition(".")
        info = schema["properties"][section]["properties"][name]
        assert accepts(info, "auto") == (is_auto_key(key) or free_text(key)), key
        assert info["description"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_by_the_schema_and_a_misspelt_key_is_not(name):
    schema = json.loads(schema_text())
    for key, source in load(config=name).sources.items():
        section, _, field = key.partition(".")
        info = schema["properties"][section]["properties"][field]
        if source.kind == "preset":
            assert accepts(info, load(config=name).values[key]), key
    assert "n_layer" not in schema["properties"]["model"]["properties"]
    assert all(s["additionalProperties"] is False for s in schema["properties"].values())


def free_text(key: str) -> bool:
    section, _, name = key.partition(".")
    annotation = SECTIONS[section].model_fields[name].annotation
    return annotation is str or annotation == str | None


def accepts(info: dict, value: object) -> bool:
    """The part of JSON Schema that ours uses."""
    if "anyOf" in info:
        return any(accepts(one, value) for one in info["anyOf"])
    if "const" in info:
        return value == info["const"]
    if "enum" in info and value not in info["enum"]:
        return False
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds = {
        "integer": number and value == math.floor(value) if number else False,
        "number": number,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "null": value is None,
        "object": isinstance(value, dict),
        "array": isinstance(value, (list, tuple)),
    }
    if not kinds[info["type"]]:
        return False
    low, high = info.get("minimum", -math.inf), info.get("maximum", math.inf)
    above, below = info.get("exclusiveMinimum", -math.inf), info.get("exclusiveMaximum", math.inf)
    return not number or (low <= value <= high and above < value < below)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("configs/150M.json", "150M"),
        ("configs/tiny.yaml", "tiny"),
        ("./configs/small_model.yaml", "50M"),
        ("medium_model", "125M"),
        ("mac_8gb", "mac-8gb"),
        ("memory-constrained", "memory_constrained"),
        ("RTX5090", "rtx5090"),
    ],
)
def test_presets_are_found_as_the_guides_write_them(typed, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(typed) == CONFIGS_DIR / f"{name}.yaml"
    told = []
    load(config=typed, note=told.append)
    assert any(f"is the preset {name}" in line for line in told)


def test_a_file_of_the_user_s_comes_before_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("model:\n  n_layers: 3\n")
    assert load(config="tiny").values["model.n_layers"] == 3


@pytest.mark.parametrize(
    ("typed", "near"), [("150", "150M"), ("rtx509", "rtx5090"), ("mac8gb", "mac-8gb")]
)
def test_a_wrong_name_lists_near_ones_first(typed, near):
    with pytest.raises(PippinError) as info:
        find_config(typed)
    assert info.value.code == "P011" and info.value.choices[0] == near
    assert set(info.value.choices) == set(preset_names())


@pytest.mark.parametrize("typed", ["nope", "x", "no-such-preset", "q" * 200])
def test_a_name_that_is_near_to_none_suggests_none(typed):
    with pytest.raises(PippinError) as info:
        find_config(typed)
    assert info.value.remedy.startswith("python tools/show_configs.py ")


def test_the_remedy_for_a_wrong_name_is_of_the_program_that_was_called():
    for command in ("python tools/show_configs.py", "python train.py --validate-setup --config"):
        with pytest.raises(PippinError) as info:
            find_config("quickstrat", command=command)
        assert info.value.remedy == f"{command} quickstart"
    with pytest.raises(PippinError) as info:
        load(config="quickstrat", command="python tools/x.py --config")
    assert info.value.remedy == "python tools/x.py --config quickstart"


def test_the_readme_s_table_is_the_tool_s():
    from tools.show_configs import BEGIN, END, markdown

    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert BEGIN in readme and END in readme, "paste: python tools/show_configs.py --markdown"
    table = readme[readme.index(BEGIN) : readme.index(END) + len(END)]
    assert table == markdown()
