"""The schema of an experiment: every key, its type, range and default.

A `RunConfig` is *resolved*: every value is concrete, nothing is "auto". It is the experiment: the same
`RunConfig` gives the same initial weights, batches, schedule and arithmetic on every backend. Keys that
accept "auto" in a file or flag are marked with `auto(...)`; `core.machine` resolves them once, and
the resolved value is what is saved and stands on resume.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Common rules: strict types, unknown keys refused, immutable."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def auto(description: str, **limits: Any) -> Any:
    """A key that a file may leave to the machine by "auto"; required once resolved."""
    return Field(description=description, json_schema_extra={"auto": True}, **limits)


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key with a stated default."""
    return Field(default, description=description, **limits)


class ModelConfig(Section):
    """The architecture. With `qk_norm` it is Qwen3's, without it Llama's."""

    vocab_size: int = auto("rows of the embedding; the tokenizer's size", ge=2, le=1_000_000)
    n_layers: int = auto("decoder blocks", ge=1, le=512)
    d_model: int = auto("width of the residual stream", ge=8, le=65_536)
    n_heads: int = auto("query heads", ge=1, le=1024)
    n_kv_heads: int = auto("key and value heads; divides n_heads", ge=1, le=1024)
    head_dim: int = auto("width of one head, even", ge=2, le=1024)
    d_ff: int = auto("width of the gated MLP; wins over mlp_multiple", ge=1, le=1_000_000)
    n_experts: int = key(0, "experts of each block, d_ff wide; 0 is one dense MLP", ge=0, le=1024)
    top_k: int = key(2, "experts that each token goes to, where n_experts is not 0", ge=1, le=1024)
    mlp_multiple: float = key(4.0, "d_ff as a multiple of d_model where d_ff is auto", gt=0, le=64)
    dropout: float = key(0.0, "dropout on attention and MLP outputs", ge=0, lt=1)
    max_seq_len: int = auto("longest context the model is meant for", ge=2, le=1_048_576)
    rope_theta: float = key(10_000.0, "base of the rotary frequencies", gt=1)
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", gt=0, le=0.1)
    ffn_activation: Literal["silu", "gelu"] = key("silu", "activation of the MLP's gate")
    tie_embeddings: bool = key(True, "one matrix for embedding and head")
    qk_norm: bool = key(True, "RMSNorm on each query and key head (Qwen3)")
    init_std: float = key(0.02, "standard deviation of initial matrices", gt=0, le=10)
    embed_init_std: float = auto("standard deviation of the initial embedding; 0.02", gt=0, le=10)
    zero_init_outputs: bool = auto(
        "o_proj, down_proj and an untied head start at zero: false tied, true untied"
    )


class DataConfig(Section):
    """The text, the tokenizer and the windows."""

    input_file: str | None = key(
        None, "a file, folder, glob, hf:NAME or folder of shards; null is the story corpus"
    )
    mixture: dict[str, float] | None = key(
        None, "prepared folders to train on together, each with its share of the rows"
    )
    text_field: str = key("text", "field of a .jsonl record that holds the text", min_length=1)
    on_bad_line: Literal["error", "skip"] = key(
        "error", "text or records that cannot be read stop the run, or are left out and counted"
    )
    shards_dir: str = key("shards", "folder where prepared shards are kept")
    tokenizer: str = auto(
        "bpe, unigram, char, byte, or the path of a tokenizer (also a tokenizer.json of another project)",
        min_length=1,
    )
    seq_len: int = auto("tokens of a training window", ge=2, le=1_048_576)
    sampling: Literal["contiguous", "random_chunk", "document", "packed"] = auto(
        "what a window holds: the text cut anywhere, the same with new cuts each epoch, one document, "
        "or whole documents that do not see each other"
    )
    val_fraction: float = key(0.02, "share of the documents kept for validation", gt=0, lt=0.5)
    test_fraction: float = key(0.02, "share of the documents kept for a final test", ge=0, lt=0.5)
    seed: int = key(1, "seed of the split and of the stories", ge=0, le=2**31 - 1)
    corpus_bytes: int = auto(
        "bytes of stories to write where input_file is null", ge=100_000, le=100_000_000_000
    )
    prefetch: int = key(4, "steps that the loading thread may be ahead", ge=1, le=64)


class TrainConfig(Section):
    """The optimization, the schedule, what is written and when. Steps are optimizer steps."""

    backend: Literal["mlx", "mps", "cuda", "cpu"] = auto("where the run computes")
    precision: Precision = auto("dtype of matmuls and attention; masters and state are float32")
    compile: bool = auto("compile the whole step (mlx) or the model (torch)")
    tf32: bool = key(False, "allow reduced-precision float32 matmuls where the device has them")
    gradient_checkpointing: bool = key(False, "recompute each block in the backward pass")
    seed: int = key(1, "seed of initial values, data order and dropout", ge=0, le=2**31 - 1)

    total_steps: int = auto("length of the run and of its schedule", ge=1, le=1_000_000_000)
    minutes: float = key(5.0, "time to train where total_steps is auto", gt=0, le=100_000)
    micro_batch_size: int = auto("rows of one forward pass", ge=1, le=65_536)
    grad_accum_steps: int = key(1, "forward passes of one step", ge=1, le=65_536)

    optimizer: Literal["muon", "adamw"] = key("muon", "muon for matrices and adamw for the rest")
    lr: float = key(2e-3, "peak learning rate", gt=0, le=10)
    min_lr: float = auto("learning rate at the end of the schedule; 0.1 x lr", ge=0, le=10)
    lr_matrix: float = auto("rate of the matrices; lr", ge=0, le=10)
    lr_embed: float = auto("rate of the embedding", ge=0, le=10)
    lr_head: float = auto("rate of an untied head", ge=0, le=10)
    lr_vector: float = auto("rate of the norms' gains", ge=0, le=10)
    lr_router: float = auto("rate of the routers of a mixture of experts", ge=0, le=10)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = key("wsd", "shape after warm-up")
    warmup_steps: int = auto("steps of linear warm-up; less than total_steps", ge=0)
    decay_fraction: float = key(0.5, "share of the run in which wsd decays", gt=0, le=1)
    weight_decay: float = key(0.1, "decoupled weight decay of all but the norms' gains", ge=0)
    router_aux_loss_coef: float = key(
        0.01, "weight of the loss that spreads tokens over experts; 0 is off", ge=0, le=100
    )
    max_grad_norm: float = key(1.0, "clip of the global gradient norm; 0 is off", ge=0)
    momentum: float = key(0.95, "momentum of muon", ge=0, lt=1)
    momentum_start: float = key(0.85, "momentum of muon at step 1", ge=0, lt=1)
    momentum_warmup_steps: int = key(300, "steps from momentum_start to momentum", ge=0)
    ns_steps: int = key(5, "Newton-Schulz steps of muon", ge=1, le=20)
    ns_dtype: Literal["float32", "bfloat16"] = auto("dtype of Newton-Schulz; float32 on float32")
    muon_scale: Literal["rms", "spectral"] = key("rms", "rms: 0.2 sqrt(max(out, in)), as AdamW")
    beta1: float = key(0.9, "first moment of adamw", ge=0, lt=1)
    beta2: float = key(0.95, "second moment of adamw", ge=0, lt=1)
    adam_eps: float = key(1e-8, "epsilon of adamw", gt=0, le=1)
    max_skipped_steps: int = key(5, "steps in a row that may be not finite", ge=1, le=1000)

    log_interval: int = key(10, "steps between rows of metrics.jsonl", ge=1)
    eval_interval: int = auto("steps between validations", ge=1)
    eval_tokens: int = key(32_768, "validation tokens of one validation, at most", ge=1)
    samples: int = key(
        8, "samples shown during the run, at log-spaced steps; 0 is off", ge=0, le=100
    )
    sample_tokens: int = key(80, "tokens of one sample", ge=1, le=10_000)
    ckpt_interval: int = auto("steps between checkpoints", ge=1)
    ckpt_keep: int = key(3, "newest checkpoints to keep, besides the best", ge=1, le=1000)
    save_dir: str = auto("run folder", min_length=1)
    preflight: bool = key(True, "check causality and the first loss before step 1")
    memory_fraction: float = key(0.8, "share of the device's budget a run may use", gt=0, le=1)


class RunConfig(Section):
    """The whole experiment."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
}


def key_names() -> tuple[str, ...]:
    """Every dotted key, in the order of the schema."""
    return tuple(f"{s}.{name}" for s, cls in SECTIONS.items() for name in cls.model_fields)


def is_auto_key(dotted: str) -> bool:
    """Whether the key accepts "auto"."""
    section, _, name = dotted.partition(".")
    extra = SECTIONS[section].model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("auto"))
