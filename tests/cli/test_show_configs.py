"""tools/show_configs.py: true counts, predicted memory, times that say what they are.

Run: python -m pytest tests/cli/test_show_configs.py
"""

import json
import subprocess
import sys
from functools import partial

import pytest

from core.config.presets import preset_names
from core.machine.autoconfig import DeviceFacts
from core.machine.rate import CPU_UTILISATION, UTILISATION, Rate, matmul_flops, rate_of
from core.paths import PROJECT_ROOT
from tests.helpers import tiny_config
from tools import show_configs
from tools.showing.describing import count, describe

CPU = DeviceFacts("cpu", "", is_gpu=False, native_bf16=False, budget_bytes=16 * 2**30)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("core.machine.rate.matmul_flops", lambda seconds=0.3: 1e11)


def constant(flops, how="given"):
    """The same rate in every precision."""
    return lambda precision, *, tf32=False: Rate(flops, how)


def run(capsys, *args):
    code = show_configs.main(list(args))
    return code, *capsys.readouterr()


def test_the_table_has_every_preset_and_its_true_size(capsys):
    code, out, _ = run(capsys, "--backend", "cpu")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0 and set(preset_names()) <= set(lines)
    assert lines["150M"].split()[1:5] == ["152M", "16", "12", "768"]
    assert lines["quickstart"].split()[1:5] == ["auto"] * 4
    assert lines["mac-8gb"].split()[8:10] == ["12", "h"]
    assert "predicted: 65% of 100 GFLOP/s" in out


def test_the_table_fits_a_terminal_of_80_columns():
    device, how = CPU, "predicted: " + "word " * 20
    shown = [
        describe(show_configs.find_config(n), device, constant(1e11, how)) for n in preset_names()
    ]
    narrow = show_configs.table(shown, "a machine", device, how, width=80).splitlines()
    assert max(map(len, narrow)) <= 80 and not any("…" in line for line in narrow)
    at = next(i for i, line in enumerate(narrow) if line.startswith("----"))
    starts = [i for i, c in enumerate(narrow[at]) if c == " "]
    for line in narrow[at + 1 : at + 1 + len(shown)]:
        assert len(line.split()) >= 8 and all(line[i] == " " for i in starts[:7]), line
    assert "Best for" in show_configs.table(shown, "a machine", device, how)


def test_the_page_of_one_in_the_guide_s_form(capsys):
    for typed in (["150M"], ["--config_file", "configs/150M.json"]):
        code, out, _ = run(capsys, "--backend", "cpu", *typed)
        assert code == 0
        for line in (
            "Config: 150M",
            "  Layers        : 16",
            "  Embedding     : 768",
            "  Total         : 151,907,072 (151.91M)",
            "  Untied        : 190,540,544",
            "  No embedding  : 113,273,600",
            "  Tokens        : 81,920,000",
        ):
            assert line in out, line


def test_json_has_the_same_numbers_and_null_where_nothing_is_known(capsys):
    _, out, _ = run(capsys, "--backend", "cpu", "--json")
    by_name = {item["name"]: item for item in json.loads(out)}
    assert by_name["dev"]["parameters"]["active"] < by_name["dev"]["parameters"]["total"]
    assert by_name["150M"]["parameters"]["total"] == 151_907_072
    assert by_name["quickstart"]["parameters"] is None
    assert by_name["quickstart"]["predicted_memory_bytes"] is None
    assert by_name["mac-8gb"]["seconds"] == 12 * 3600
    assert by_name["mac-8gb"]["time_is"] == "asked for"


def test_a_file_of_another_project_is_shown(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 100}'
    )
    code, out, _ = run(capsys, str(path), "--backend", "cpu")
    # 100 x 64, then per block 4 x 64^2 + 3 x 64 x 168 + 2 x 64 + 2 x 32, then 64.
    assert code == 0 and f"{100 * 64 + 2 * (4 * 4096 + 3 * 64 * 168 + 128 + 64) + 64:,}" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["150"], "P011", "available: 150M"),
        (["150M", "--config_file", "tiny"], "P012", "more than one"),
        (["--config", "150M", "--config", "tiny"], "P012", "more than one"),
        (["nope"], "P011", "try: python tools/show_configs.py "),
        (["--config", "quickstrat"], "P011", "try: python tools/show_configs.py quickstart"),
        (["--measure"], "P012", "none is given"),
        (["tiny", "--markdown"], "P012", "try: python tools/show_configs.py --markdown"),
        (["tiny", "--write-schema"], "P012", "try: python tools/show_configs.py --write-schema"),
        (["--jsn"], "P012", "--help"),
    ],
)
def test_wrong_calls_are_one_clear_message(capsys, args, code, words):
    exit_code, _, err = run(capsys, *args)
    assert exit_code == 2 and err.startswith(code) and words in err


@pytest.mark.parametrize("flag", ["--config", "--config_file", "--config-file"])
def test_a_configuration_is_given_as_the_other_tools_take_it(capsys, flag):
    assert run(capsys, flag, "minimal", "--json")[:2] == run(capsys, "minimal", "--json")[:2]


def test_the_markdown_is_the_same_on_every_machine(capsys, monkeypatch):
    first = run(capsys, "--markdown")[1]
    monkeypatch.setattr(show_configs, "_here", lambda backend: pytest.fail("asked the machine"))
    assert run(capsys, "--markdown")[1] == first
    assert first.startswith(show_configs.BEGIN) and first.rstrip().endswith(show_configs.END)
    assert all(f"| `{name}` |" in first for name in preset_names())


def test_counts_by_hand():
    model = tiny_config().model  # V 61, 2 layers of 24, 4 heads of 6, 2 key heads, MLP 40
    block = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24 + 2 * 6
    counts = count(model)
    assert counts.total == counts.tied == 61 * 24 + 2 * block + 24
    assert counts.untied == counts.tied + 61 * 24
    assert counts.non_embedding == 2 * block + 24 and counts.active == counts.total


def test_time_by_hand():
    shown = describe(show_configs.find_config("minimal"), CPU, constant(1e12))
    matrices = 6 * (4 * 512**2 + 3 * 512 * 2048) + 32000 * 512
    flops = 6 * matrices + 12 * 6 * 512 * 1024
    assert shown.tokens == 100 * 1024
    assert shown.seconds == pytest.approx(flops * 100 * 1024 / 1e12)


def test_a_rate_says_how_it_is_known():
    gpu = DeviceFacts("mps", "", is_gpu=True, native_bf16=True, budget_bytes=1)
    known = rate_of(gpu, "Apple M4", "float32")
    assert known.flops == pytest.approx(UTILISATION * 2.98e12) and "predicted" in known.how
    unknown = rate_of(gpu, "Apple M9", "float32")
    assert unknown.flops is None and "unknown" in unknown.how and "M9" in unknown.how
    assert rate_of(CPU, None, "float32").flops == pytest.approx(CPU_UTILISATION * 1e11)


@pytest.mark.parametrize(
    ("chip", "native", "precision", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", True, "bfloat16", False, 265.0),
        ("NVIDIA A100-SXM4-80GB", True, "float32", False, 19.0),
        ("NVIDIA A100-SXM4-80GB", True, "float32", True, 132.5),
        ("Tesla T4", False, "float32", False, 4.0),
        ("Tesla T4", False, "float16", False, 42.0),
        # It has neither: both are computed in float32.
        ("Tesla T4", False, "bfloat16", False, 4.0),
        ("Tesla T4", False, "float32", True, 4.0),
    ],
)
def test_the_rate_is_that_of_the_precision(chip, native, precision, tf32, tflops):
    card = DeviceFacts("cuda", "", is_gpu=True, native_bf16=native, budget_bytes=1)
    rate = rate_of(card, chip, precision, tf32=tf32)
    assert rate.flops == pytest.approx(UTILISATION * tflops * 1e12)


def test_the_time_of_a_file_is_at_the_rate_of_its_own_precision(tmp_path):
    card = DeviceFacts("cuda", "", is_gpu=True, native_bf16=True, budget_bytes=80 * 10**9)
    rates = partial(rate_of, card, "NVIDIA A100-SXM4-80GB")
    seconds = {}
    for precision in ("bfloat16", "float32"):
        path = tmp_path / f"{precision}.yaml"
        path.write_text(
            "model: {vocab_size: 64, d_model: 16, n_layers: 1, n_heads: 2}\n"
            f"train: {{total_steps: 10, precision: {precision}}}\n"
        )
        seconds[precision] = describe(path, card, rates).seconds
    assert seconds["float32"] / seconds["bfloat16"] == pytest.approx(265 / 19)


def test_a_measured_matmul_is_a_rate():
    assert 1e7 < matmul_flops(0.001) < 1e15


def test_measuring_trains_for_a_moment(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(show_configs, "PROBE_SECONDS", 0.01)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {vocab_size: 64, d_model: 16, n_layers: 1, n_heads: 2, d_ff: 16, max_seq_len: 16}\n"
        "data: {seq_len: 16, tokenizer: byte}\n"
        "train: {total_steps: 10, micro_batch_size: 2}\n"
    )
    code, out, _ = run(capsys, str(path), "--backend", "cpu", "--measure", "--json")
    item = json.loads(out)
    assert code == 0 and item["time_is"].startswith("measured: ") and item["seconds"] > 0


def test_the_table_imports_no_framework():
    code = (
        "import sys; from tools import show_configs; show_configs.main(['--markdown']); "
        "bad = {'torch', 'mlx.core'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
