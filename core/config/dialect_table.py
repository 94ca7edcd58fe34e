"""The names of other projects, and what each means here: data, and a few rules for what is computed.

The names are those of the guides: MyPT (flat JSON), the nanoGPT plan (`training:` and `device:`
sections), Blueberry (flat names), AnarchoBot (flat snippets, and keys of its sections that are not
Pippin's). `core.config.dialects` reads files by them, `core.config.dialect_flags` flags.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from core.config.schema import SECTIONS
from core.errors import PippinError

# Three matrices of 8/3 x d_model hold as many parameters as two of 4 x d_model.
GATED_MULTIPLE = 8 / 3
# Bytes of a story and of a token of the story corpus, with its vocabulary of 4,096 pieces (2 MB of
# it, counted); and its smallest size.
STORY_UNITS = {"num_documents": 640, "max_tokens": 4.44}
MIN_STORY_BYTES = 100_000
Values = dict[str, Any]
Make = Callable[[Any, Mapping[str, Any]], tuple[Values, str]]


@dataclass(frozen=True)
class Term:
    """What one foreign name means.

    Attributes:
        to: Keys that take its value as it is.
        make: Where that is not all: keys and values from its value and its neighbours, and a remark.
        why: Remark that is printed with it.
        architecture: Whether it belongs to the model's definition, as MyPT divides its flags.
    """

    to: tuple[str, ...] = ()
    make: Make | None = None
    why: str = ""
    architecture: bool = False

    def read(self, value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
        """Keys with values, and the remark; null is as if the name were not there."""
        if value is None:
            return {}, "nothing is given"
        if self.make is not None:
            return self.make(value, near)
        return dict.fromkeys(self.to, value), self.why


@dataclass(frozen=True)
class Dialect:
    """The names of one project. `terms` is keyed as its files are: dotted where they have sections."""

    name: str
    terms: Mapping[str, Term]
    adds: Callable[[Mapping[str, Any]], tuple[Values, str]] = lambda near: ({}, "")


def _to(*keys: str, why: str = "", architecture: bool = False) -> Term:
    return Term(keys, why=why, architecture=architecture)


def _nothing(why: str) -> Term:
    return Term(why=why)


def whole(value: Any) -> int | None:
    """A whole number however it is written, or None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else None


def as_bool(value: Any) -> bool | None:
    """A truth value however it is written ("False", no quotes, 0), or None."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    return words.get(str(value).strip().casefold())


def _accum(near: Mapping[str, Any]) -> int:
    for name in ("gradient_accumulation_steps", "grad_accum_steps", "train.grad_accum_steps"):
        count = whole(near.get(name))
        if count is not None and count > 0:
            return count
    return 1


def _micro_steps(key: str) -> Make:
    """Blueberry counts forward passes where Pippin counts the optimizer's steps."""

    def make(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
        steps, accum = whole(value), _accum(near)
        if steps is None:
            return {key: value}, ""
        why = f"it counts forward passes, and {accum} of them are one step" if accum > 1 else ""
        return {key: max(math.ceil(steps / accum), 1)}, why

    return make


def _eval_batches(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    """A number of validation batches, as tokens."""
    names = (
        ("batch_size", "train.micro_batch_size"),
        ("block_size", "max_seq_len", "data.seq_len"),
    )
    sizes = [
        next((s for n in group if (s := whole(near.get(n))) is not None), None) for group in names
    ]
    count, (rows, length) = whole(value), sizes
    if count is None:
        return {"train.eval_tokens": value}, ""
    if rows is None or length is None:
        return {}, "left out: as tokens it needs batch and context, and they are not given"
    return {"train.eval_tokens": count * rows * length}, f"{count} batches of {rows} x {length}"


def _warmup(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    """A count, or below 1 a share of the run."""
    names = ("max_iters", "training.max_iters", "train.total_steps")
    total = next((n for name in names if (n := whole(near.get(name))) is not None), None)
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 1.0
    if 0 < share < 1:
        if total is None:
            return {}, "left out: a share needs the number of steps, and none is given"
        return {"train.warmup_steps": round(share * total)}, f"{share:g} of {total}"
    return {"train.warmup_steps": value}, ""


def _device(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    """The device of a file, which was written for another machine: only the CPU is in all of them."""
    name = str(value).split(":")[0]
    if name in ("cuda", "mps"):
        return {}, f"auto picks the backend here; --backend {name} insists"
    return typed_device(value, near)


def typed_device(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    """The device of a command line, as --backend."""
    name = str(value).split(":")[0]
    return ({}, "the machine decides") if name == "auto" else ({"train.backend": name}, "")


def _mixed(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    on = as_bool(value)
    if on is None:
        return {"train.precision": value}, ""
    if on:
        return {}, "the machine decides between bfloat16 and float32"
    return {"train.precision": "float32"}, ""


def _bias(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    if as_bool(value):
        return {}, "left out: no layer has a bias here, so this is another model"
    return {}, "no layer has a bias here"


def _tokenization(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    if str(value) == "gpt2":
        return {}, "left out: GPT-2's tokenizer is a file; give its path as data.tokenizer"
    return {"data.tokenizer": value}, ""


def _vocab(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    return {"model.vocab_size": value}, "word pieces of your text; those of GPT-2 are a file"


def _muon_lr(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        return {"train.lr": value}, ""
    tenth = float(f"{rate / 10:.6g}")
    rates: Values = {"train.lr": rate, "train.lr_matrix": rate, "train.muon_scale": "spectral"}
    rates |= dict.fromkeys(("train.lr_embed", "train.lr_head", "train.lr_vector"), tenth)
    return rates, "a tenth of it for all but the matrices"


def _d_ff(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    width = whole(value)
    if width is None:
        return {"model.d_ff": value}, ""
    gated = max(8 * round(width / 12), 1)
    return {
        "model.d_ff": gated
    }, f"three matrices of {gated} have as many parameters as two of {width}"


def _experts(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    return {"model.n_experts": value}, ""


def _no_fp8(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    return {}, "left out: FP8 is not built" if as_bool(value) else "nothing here is in FP8"


def _stories(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    """A number of documents or of tokens as the size of the story corpus; of two, the smaller."""
    if any(near.get(name) is not None for name in ("data.input_file", "data.mixture")):
        raise PippinError(
            "P012",
            "--num-documents and --max-tokens set the size of the story corpus, and another text "
            "is given.",
            remedy=f"python tools/prepare_data.py text {near.get('data.input_file')} --num-documents "
            "N, then tokens with --max-tokens N, and give the folder as --input_file",
            kept="nothing was started.",
        )
    sizes = {}
    for name, per_unit in STORY_UNITS.items():
        if near.get(name) is None:
            continue
        count = whole(near[name])
        if count is None or count < 1:
            raise PippinError(
                "P012",
                f"{name} is {near[name]!r}, which is not a whole number from 1.",
                found=f"for example {name} 20000",
                kept="nothing was started.",
            )
        sizes[name] = max(round(count * per_unit), MIN_STORY_BYTES)
    name = min(sizes, key=lambda n: sizes[n])
    least = " at least" if sizes[name] == MIN_STORY_BYTES else ""
    why = (
        f"stories by {name}, {STORY_UNITS[name]:g} bytes each{least}; another text has its own size"
    )
    return {"data.corpus_bytes": sizes[name]}, why


def _dataset(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    extra = [f"{k} {near[f'data.{k}']}" for k in ("config", "split") if near.get(f"data.{k}")]
    why = "read from the network"
    if extra:
        why += f"; {' and '.join(extra)}: python tools/prepare_data.py takes them as flags"
    return {"data.input_file": f"hf:{value}"}, why


def _adam_multiplier(value: Any, near: Mapping[str, Any]) -> tuple[Values, str]:
    try:
        lr = float(near["train.lr"])
        rate = float(f"{lr * float(value):.6g}")
    except (KeyError, TypeError, ValueError):
        return {}, "left out: it needs train.lr as a number"
    return {"train.lr_embed": rate, "train.lr_head": rate, "train.lr_vector": rate}, f"{value} x lr"


def _gated(width: str, what: str) -> Callable[[Mapping[str, Any]], tuple[Values, str]]:
    def adds(near: Mapping[str, Any]) -> tuple[Values, str]:
        if width not in near:
            return {}, ""
        return {"model.mlp_multiple": GATED_MULTIPLE}, what

    return adds


_TWO = "its MLP of two matrices of 4 x n_embd has as many parameters as three of 8/3"
_CONTEXT = ("data.seq_len", "model.max_seq_len")

_SHARED_SHAPE: Mapping[str, Term] = {
    "n_layer": _to("model.n_layers", architecture=True),
    "n_head": _to("model.n_heads", architecture=True),
    "n_embd": _to("model.d_model", architecture=True),
    "block_size": _to(*_CONTEXT, architecture=True),
    "dropout": _to("model.dropout", architecture=True),
}

MYPT = Dialect(
    "MyPT",
    MappingProxyType(
        {
            **_SHARED_SHAPE,
            "name": _nothing("a title"),
            "description": _nothing("a title"),
            "batch_size": _to("train.micro_batch_size", architecture=True),
            "vocab_size": Term(make=_vocab, architecture=True),
            "bias": Term(make=_bias, architecture=True),
            "device": Term(make=_device),
            "tokenization": Term(make=_tokenization),
            "max_iters": _to("train.total_steps"),
            "learning_rate": _to("train.lr"),
            "eval_interval": _to("train.eval_interval"),
            "eval_iters": Term(make=_eval_batches),
            "warmup_iters": Term(make=_warmup),
            "grad_accum_steps": _to("train.grad_accum_steps"),
            "grad_clip": _to("train.max_grad_norm"),
            "weight_decay": _to("train.weight_decay"),
            "use_amp": Term(make=_mixed),
        }
    ),
    adds=_gated("n_embd", _TWO),
)

BLUEBERRY = Dialect(
    "Blueberry",
    MappingProxyType(
        {
            "d_model": _to("model.d_model", architecture=True),
            "n_layers": _to("model.n_layers", architecture=True),
            "n_heads": _to("model.n_heads", architecture=True),
            "d_ff": Term(make=_d_ff, architecture=True),
            "num_experts": Term(make=_experts, architecture=True),
            "expert_top_k": _to("model.top_k", architecture=True),
            "load_balancing_weight": _to("train.router_aux_loss_coef"),
            "max_seq_len": _to(*_CONTEXT, architecture=True),
            "vocab_size": _to("model.vocab_size", architecture=True),
            "dropout": _to("model.dropout", architecture=True),
            "batch_size": _to("train.micro_batch_size", architecture=True),
            "gradient_accumulation_steps": _to("train.grad_accum_steps"),
            "max_steps": Term(make=_micro_steps("train.total_steps")),
            "muon_lr": Term(make=_muon_lr),
            "num_documents": Term(make=_stories),
            "max_tokens": Term(make=_stories),
            "weight_decay": _to("train.weight_decay"),
            "grad_clip": _to("train.max_grad_norm"),
            "eval_every": Term(make=_micro_steps("train.eval_interval")),
            "eval_steps": Term(make=_eval_batches),
            "use_amp": Term(make=_mixed),
            "use_fp8": Term(make=lambda v, near: _no_fp8(v, near)),
        }
    ),
)

_SNIPPET = (
    *(("model", n) for n in SECTIONS["model"].model_fields),
    *(("data", n) for n in ("seq_len", "text_field")),
    *(
        ("train", n)
        for n in SECTIONS["train"].model_fields
        if n not in ("backend", "compile", "seed", "minutes", "samples")
    ),
)
ANARCHOBOT = Dialect(
    "AnarchoBot",
    MappingProxyType({name: _to(f"{section}.{name}") for section, name in _SNIPPET}),
)

NANOGPT = Dialect(
    "the nanoGPT plan",
    MappingProxyType(
        {
            **{f"model.{name}": term for name, term in _SHARED_SHAPE.items()},
            "model.vocab_size": Term(make=_vocab, architecture=True),
            "model.bias": Term(make=_bias, architecture=True),
            "training.batch_size": _to("train.micro_batch_size"),
            "training.learning_rate": _to("train.lr"),
            "training.max_iters": _to("train.total_steps"),
            "training.warmup_iters": Term(make=_warmup),
            "training.eval_interval": _to("train.eval_interval"),
            "training.gradient_accumulation": _to("train.grad_accum_steps"),
            "training.weight_decay": _to("train.weight_decay"),
            "training.grad_clip": _to("train.max_grad_norm"),
            "device.type": Term(make=_device),
            "device.mixed_precision": Term(make=_mixed),
            "device.compile": _to("train.compile"),
        }
    ),
    adds=_gated("model.n_embd", _TWO),
)

# Keys of AnarchoBot's sections that are not Pippin's; the rest of its file is Pippin's own form.
ANARCHOBOT_KEYS: Mapping[str, Term] = MappingProxyType(
    {
        "data.dataset": Term(make=_dataset),
        "data.config": _nothing("see data.dataset"),
        "data.split": _nothing("train, validation and test are cut from the text here"),
        "data.shuffle_buffer": _nothing("every epoch is shuffled as a whole here"),
        "data.num_workers": _nothing("text is prepared once, before the run"),
        "data.cache_dir": _nothing("prepared text lies in data.shards_dir"),
        "data.streaming": _nothing("text is prepared once, before the run"),
        "data.shard_dir": _to("data.input_file"),
        "data.format": _nothing("the files tell it"),
        "train.log_path": _nothing("logs lie in the run folder"),
        "train.tokenizer_path": _to("data.tokenizer"),
        "train.checkpoint_path": _nothing("left out: give it as --resume PATH"),
        "train.adam_lr_multiplier": Term(make=_adam_multiplier),
    }
)

FLAT = (MYPT, BLUEBERRY, ANARCHOBOT)


def told(name: str, value: Any, values: Mapping[str, Any], why: str) -> str:
    """One line that says how a name was read."""
    shown = short(value) if len(short(value)) <= 40 else short(value)[:37] + "..."
    name = f"{name} {shown}".rstrip()
    if not values:
        return f"{name}: {why}"
    made = ", ".join(f"{key} = {short(new)[:60]}" for key, new in values.items())
    return f"{name} -> {made}" + (f" ({why})" if why else "")


def one_line(text: str) -> str:
    """The text without breaks."""
    return " ".join(text.split())


def short(value: Any) -> str:
    """A value as a file would have it, on one line: floats without tails."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else one_line(str(value))
