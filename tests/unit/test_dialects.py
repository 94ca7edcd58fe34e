"""Other projects' files and flags, translated: their guides' own examples, and what must be refused.

Run: python -m pytest tests/unit/test_dialects.py
"""

import json

import pytest

import train
from core.config.dialect_flags import FLAGS
from core.config.load import load
from core.errors import PippinError
from core.machine.autoconfig import DeviceFacts
from tools.showing.describing import count, resolved

CPU = DeviceFacts("cpu", "", is_gpu=False, native_bf16=False, budget_bytes=64 * 2**30)
MYPT_150M = {
    "name": "GPT-150M",
    "description": "150 million parameter GPT model",
    "batch_size": 32,
    "block_size": 256,
    "vocab_size": 50304,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 16,
    "dropout": 0.2,
    "bias": False,
}
NANOGPT = """\
model:
  n_layer: 6
  n_head: 6
  n_embd: 384
  dropout: 0.2
  block_size: 256

training:
  batch_size: 12
  learning_rate: 3e-4
  max_iters: 5000
  warmup_iters: 100
  eval_interval: 500
  gradient_accumulation: 4

device:
  type: mps
  mixed_precision: false
  compile: false
"""
SNIPPET = """\
# Minimal memory usage
micro_batch_size: 1
grad_accum_steps: 1
seq_len: 1024
gradient_checkpointing: true
precision: "float16"
"""
ANARCHOBOT = """\
model:
  vocab_size: 32000
  n_layers: 12
  d_model: 768
  n_heads: 12
  mlp_multiple: 4.0
  max_seq_len: 4096
  ffn_activation: "silu"
  norm_eps: 1e-5
data:
  dataset: "allenai/c4"
  config: "en"
  text_field: "text"
  seq_len: 2048
  shuffle_buffer: 1000
  num_workers: 2
  cache_dir: null
  streaming: true
train:
  total_steps: 50000
  micro_batch_size: 1
  grad_accum_steps: 4
  lr: "3e-4"
  min_lr: 3e-5
  log_path: null
  save_dir: "checkpoints/pretrain"
  tokenizer_path: "data/tokenizer.model"
  checkpoint_path: old/last.pt
"""
BLUEBERRY = {
    "d_model": 384,
    "n_heads": 8,
    "n_layers": 6,
    "d_ff": 1536,
    "batch_size": 24,
    "max_steps": 1000,
    "gradient_accumulation_steps": 4,
    "muon_lr": 0.01,
    "max_seq_len": 512,
    "eval_every": 500,
    "eval_steps": 100,
    "num_experts": 8,
    "expert_top_k": 2,
    "grad_clip": 1.0,
    "use_amp": "False",
}


def read(tmp_path, text, name="c.yaml"):
    """The values that are not defaults, and what was told."""
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text, indent=2))
    told: list[str] = []
    draft = load(config=str(path), note=told.append)
    given = {k: v for k, v in draft.values.items() if draft.sources[k].kind != "default"}
    return given, told, draft


def test_mypt_s_json_is_its_model(tmp_path):
    given, told, draft = read(tmp_path, MYPT_150M, "150M.json")
    assert given == {
        "train.micro_batch_size": 32,
        "data.seq_len": 256,
        "model.max_seq_len": 256,
        "model.vocab_size": 50304,
        "model.d_model": 768,
        "model.n_heads": 12,
        "model.n_layers": 16,
        "model.dropout": 0.2,
        "model.mlp_multiple": pytest.approx(8 / 3),
    }
    assert "MyPT" in told[0] and "n_embd 768 -> model.d_model = 768" in told
    assert all(any(line.startswith(key) for line in told) for key in MYPT_150M)
    assert draft.sources["model.d_model"].where.endswith("150M.json:7")
    assert count(resolved(draft, CPU).model).total == 151_907_072  # as the preset of that name


def test_the_nanogpt_plan_s_yaml(tmp_path):
    given, told, _ = read(tmp_path, NANOGPT)
    assert given == {
        "model.n_layers": 6,
        "model.n_heads": 6,
        "model.d_model": 384,
        "model.dropout": 0.2,
        "model.max_seq_len": 256,
        "model.mlp_multiple": pytest.approx(8 / 3),
        "data.seq_len": 256,
        "train.micro_batch_size": 12,
        "train.lr": 3e-4,
        "train.total_steps": 5000,
        "train.warmup_steps": 100,
        "train.eval_interval": 500,
        "train.grad_accum_steps": 4,
        "train.precision": "float32",
        "train.compile": False,
    }
    assert len(told) == 1 + 14 + 1
    assert "device.type mps: auto picks the backend here; --backend mps insists" in told


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cuda", "auto"), ("cuda:1", "auto"), ("mps", "auto"), ("auto", "auto"), ("cpu", "cpu")],
)
def test_a_device_of_another_machine_is_left_to_this_one(tmp_path, device, backend):
    """A file comes from elsewhere; what was typed here is meant (the flag is in the next tests)."""
    _, told, draft = read(tmp_path, MYPT_150M | {"device": device})
    assert draft.values["train.backend"] == backend
    assert sum(line.startswith(f"device {device}") for line in told) == 1
    path = tmp_path / "c.yaml"
    draft = load(config=str(path), flags={"train.backend": "cuda"})
    assert draft.values["train.backend"] == "cuda"


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_a_device_on_the_command_line_insists(device):
    assert from_flags("--device", device)[0]["train.backend"] == device


def test_an_unknown_device_of_a_file_is_an_error_with_its_line(tmp_path):
    with pytest.raises(PippinError) as info:
        read(tmp_path, MYPT_150M | {"device": "tpu"})
    assert info.value.code == "P010" and "c.yaml:12: train.backend" in info.value.found


def test_flat_snippets_of_anarchobot(tmp_path):
    given, told, _ = read(tmp_path, SNIPPET)
    assert given == {
        "train.micro_batch_size": 1,
        "train.grad_accum_steps": 1,
        "data.seq_len": 1024,
        "train.gradient_checkpointing": True,
        "train.precision": "float16",
    }
    assert "AnarchoBot" in told[0]


def test_anarchobot_s_sections(tmp_path):
    given, told, _ = read(tmp_path, ANARCHOBOT)
    assert given["data.input_file"] == "hf:allenai/c4" and given["train.lr"] == 3e-4
    assert given["data.tokenizer"] == "data/tokenizer.model"
    assert given["model.norm_eps"] == 1e-5 and given["train.save_dir"] == "checkpoints/pretrain"
    text = "\n".join(told)
    for key in ("config", "shuffle_buffer", "num_workers", "cache_dir", "streaming"):
        assert f"data.{key}" in text
    assert "config en" in text and "--resume PATH" in text


def test_null_is_as_if_it_were_not_there(tmp_path):
    text = "data:\n  dataset: null\n  seq_len: 8\ntrain:\n  tokenizer_path: null\n"
    given, told, _ = read(tmp_path, text)
    assert given == {"data.seq_len": 8} and len(told) == 2


def test_blueberry_counts_forward_passes(tmp_path):
    given, told, _ = read(tmp_path, BLUEBERRY)
    assert given["train.total_steps"] == 250 and given["train.eval_interval"] == 125
    assert any("forward passes" in line and "4 of them" in line for line in told)
    assert given["model.d_ff"] == 1024 and given["model.n_experts"] == 8
    assert given["train.lr_matrix"] == 0.01 and given["train.lr_embed"] == 0.001
    assert given["train.muon_scale"] == "spectral" and given["train.precision"] == "float32"
    assert given["train.eval_tokens"] == 100 * 24 * 512
    assert given["data.seq_len"] == given["model.max_seq_len"] == 512


@pytest.mark.parametrize(
    ("flat", "both"),
    [
        ({"max_seq_len": 4096}, ("Blueberry", "AnarchoBot")),
        ({"grad_accum_steps": 2, "n_layers": 4, "n_layer": 4}, ("n_layer", "")),
        (
            {"use_amp": True, "weight_decay": 0.1, "d_model": 64, "n_embd": 64},
            ("MyPT", "Blueberry"),
        ),
    ],
)
def test_what_fits_two_projects_shows_both_readings(tmp_path, flat, both):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(flat))
    with pytest.raises(PippinError) as info:
        load(config=str(path))
    text = info.value.render()
    assert info.value.code in ("P011", "P010") and all(name in text for name in both)


def test_what_fits_two_projects_and_means_the_same_is_read(tmp_path):
    given, _, _ = read(tmp_path, {"batch_size": 8, "dropout": 0.1})
    assert given == {"train.micro_batch_size": 8, "model.dropout": 0.1}


def test_sections_of_two_projects_in_one_file_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(NANOGPT + "train:\n  lr: 1e-3\n")
    with pytest.raises(PippinError) as info:
        load(config=str(path))
    assert info.value.code == "P011" and "two ways" in info.value.what
    assert "section train is Pippin's" in info.value.found


def test_one_foreign_name_in_pippin_s_form_is_a_typing_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  n_layer: 4\n  d_model: 64\ntrain:\n  learning_rate: 1\n")
    with pytest.raises(PippinError) as info:
        load(config=str(path))
    assert "c.yaml:2: unknown key model.n_layer; did you mean model.n_layers?" in info.value.found
    assert "c.yaml:5: unknown key train.learning_rate; did you mean train.lr?" in info.value.found


def test_every_problem_of_a_foreign_file_has_its_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({**MYPT_150M, "n_embd": 700, "n_heed": 3, "dropout": "much"}, indent=1)
    )
    with pytest.raises(PippinError) as info:
        load(config=str(path))
    text = info.value.render()
    assert "c.json:12: unknown key n_heed of MyPT; did you mean n_head?" in text
    assert 'model.dropout = "much"' in text and "c.json:10" in text
    assert "model.n_heads = 12 does not divide model.d_model = 700" in text


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("'False'", False), ('"true"', True)]
)
def test_a_truth_value_may_be_a_text(text, value):
    assert load(overrides=[f"train.compile={text}"]).values["train.compile"] is value


@pytest.mark.parametrize("text", ["maybe", "1", "yes"])
def test_other_words_are_no_truth_value(text):
    with pytest.raises(PippinError):
        load(overrides=[f"train.compile={text}"])


@pytest.mark.parametrize(("warmup", "steps"), [(0.05, 250), (100, 100), ("1e2", 100)])
def test_a_warm_up_may_be_a_share(tmp_path, warmup, steps):
    given, _, _ = read(tmp_path, {**MYPT_150M, "warmup_iters": warmup, "max_iters": 5000})
    assert given["train.warmup_steps"] == steps


# Flags


def from_flags(*args, config=None, locked=False):
    options, _ = train.parse_args(list(args))
    told, warned = [], []
    draft = load(
        config=config,
        overrides=options.overrides,
        flags=options.flags(),
        foreign=options.foreign,
        locked=locked,
        note=told.append,
        warn=warned.append,
    )
    return draft.values, told, warned


def test_next_to_config_file_flags_of_the_model_are_ignored_with_a_warning():
    flags = ("--n_layer", "8", "--max_iters", "5000", "--learning_rate", "1e-4", "--batch_size=4")
    values, told, warned = from_flags(*flags, config="150M", locked=True)
    assert values["model.n_layers"] == 16 and values["train.micro_batch_size"] == 8
    assert values["train.total_steps"] == 5000 and values["train.lr"] == 1e-4
    assert len(warned) == 2 and len(told) == 2
    assert "--n_layer 8 is ignored" in warned[0] + warned[1]
    assert "model.n_layers = 16" in warned[0] + warned[1]


def test_next_to_config_they_win():
    values, _, warned = from_flags(
        "--d-model",
        "768",
        "--n-layers",
        "12",
        "--n_heads",
        "12",
        "--batch-size",
        "32",
        config="dev",
    )
    assert (values["model.d_model"], values["model.n_layers"]) == (768, 12)
    assert values["train.micro_batch_size"] == 32 and not warned


def test_the_kind_of_model_by_flags():
    assert from_flags("--model-type", "standard", config="dev")[0]["model.n_experts"] == 0
    assert from_flags("--model-type", "moe")[0]["model.n_experts"] == 8
    assert from_flags("--model-type", "moe", "--num-experts", "16")[0]["model.n_experts"] == 16
    values, told, _ = from_flags("--model-type", "standard", "--num-experts", "4")
    assert values["model.n_experts"] == 0 and any("left out" in line for line in told)
    with pytest.raises(PippinError) as info:
        from_flags("--model-type", "rnn")
    assert info.value.code == "P012" and info.value.choices == ("standard", "moe")


def test_the_size_of_the_stories_by_flags():
    values, _, _ = from_flags("--num-documents", "500", "--max-tokens", "100000")
    assert values["data.corpus_bytes"] == 500 * 640
    values, _, _ = from_flags("--num_documents", "50000", "--max_tokens", "1e5")
    assert values["data.corpus_bytes"] == 444_000
    with pytest.raises(PippinError) as info:
        from_flags("--max-tokens", "1000", "--input_file", "a.txt")
    assert info.value.code == "P012" and "prepare_data" in info.value.remedy


def test_the_size_of_the_stories_in_a_file_is_that_of_the_flags(tmp_path):
    """The guide's 25,000 documents of 640 bytes; of two limits the smaller holds."""
    given, told, _ = read(tmp_path, {**BLUEBERRY, "num_documents": 25_000})
    assert given["data.corpus_bytes"] == 25_000 * 640 and any("num_documents" in t for t in told)
    both = {**BLUEBERRY, "num_documents": 25_000, "max_tokens": 500_000}
    given, _, _ = read(tmp_path, both)
    assert given["data.corpus_bytes"] == 500_000 * 4.44
    path = str(tmp_path / "c.yaml")
    assert from_flags("--num-documents", "1000", config=path)[0]["data.corpus_bytes"] == 640_000
    with pytest.raises(PippinError, match="num_documents is 'many'"):
        read(tmp_path, {**BLUEBERRY, "num_documents": "many"})


def test_a_warm_up_as_a_share_is_of_the_steps_wherever_they_are_given(tmp_path):
    own, nanogpt = tmp_path / "own.yaml", tmp_path / "nanogpt.yaml"
    own.write_text("train: {total_steps: 10}\n")
    nanogpt.write_text("model: {n_layer: 2, n_embd: 32}\ntraining: {max_iters: 50}\n")
    for path, more, steps in (
        (own, (), 2),
        (nanogpt, (), 10),
        (own, ("--max_iters", "30"), 6),
        (own, ("train.total_steps=100",), 20),
    ):
        values, _, _ = from_flags("--warmup_iters", "0.2", *more, config=str(path))
        assert values["train.warmup_steps"] == steps
    values, told, _ = from_flags("--warmup_iters", "0.2")
    assert values["train.warmup_steps"] == "auto" and "none is given" in told[-1]


def test_switches_and_rates_by_flags():
    values, told, _ = from_flags(
        "--no-fp8", "--no-amp", "--eval_iters", "20", "--max-seq-len", "64"
    )
    assert values["train.precision"] == "float32" and any("FP8" in line for line in told)
    assert values["data.seq_len"] == values["model.max_seq_len"] == 64
    assert any("eval_iters" in line and "left out" in line for line in told)
    assert from_flags("--lr", "0.02")[0]["train.lr"] == 0.02


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_takes_dashes_or_underscores(name):
    value = [] if FLAGS[name].switch else ["3"]
    for typed in (f"--{name}", "--" + name.replace("_", "-")):
        assert name in train.parse_args([typed, *value])[0].foreign


@pytest.mark.parametrize("name", [n for n in FLAGS if not FLAGS[n].switch])
@pytest.mark.parametrize("text", ["[1", "{a: 1}", "x y", "-1", "1e999", ".nan", "9" * 5000])
def test_odd_values_of_flags_are_errors_of_ours_or_read(name, text):
    try:
        from_flags(f"--{name}={text}")
    except PippinError as error:
        assert error.code in ("P010", "P012") and len(error.render()) < 2000


@pytest.mark.parametrize(
    "args",
    [
        ("--n_layer", "8", "--n_layers", "12"),
        ("--block_size", "64", "--max-seq-len", "32"),
        ("--micro-batch-size", "8", "--batch_size", "4"),
        ("--lr", "0.1", "--learning_rate", "0.2"),
        ("--backend", "cpu", "--device", "cuda"),
    ],
)
def test_two_flags_that_say_two_things_are_refused(args):
    with pytest.raises(PippinError) as info:
        from_flags(*args)
    assert info.value.code == "P012" and "both give" in info.value.what


def test_an_ignored_flag_plays_no_part_in_others():
    flags = ("--batch_size", "4", "--eval_iters", "20")
    values, _, warned = from_flags(*flags, config="150M", locked=True)
    assert values["train.eval_tokens"] == 20 * 8 * 256 and len(warned) == 1


def test_a_file_by_its_path_is_not_called_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model:\n  n_layers: 3\n")
    told = []
    load(config="./mine.yaml", note=told.append)
    assert told == []
