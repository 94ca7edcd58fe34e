"""`--manual-config`: nothing is decided, so what has no value is listed, with what each is for.

Not listed is what follows by a fixed rule from values that are given, or from the text alone: the
rules are those of core.machine.resolvers, and no machine, speed or time enters them.
"""

import shlex
from collections.abc import Sequence

from core.config.draft import Draft
from core.config.schema import SECTIONS
from core.errors import PippinError

SHAPE = ("model.d_model",)
# Each key with the keys that its rule needs.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "model.vocab_size": (),  # the tokenizer's
    "model.n_heads": SHAPE,
    "model.n_kv_heads": ("model.n_heads",),
    "model.head_dim": ("model.d_model", "model.n_heads"),
    "model.d_ff": SHAPE,
    "model.max_seq_len": ("data.seq_len",),
    "model.embed_init_std": (),
    "model.zero_init_outputs": (),
    "data.sampling": ("data.seq_len",),
    "train.ns_dtype": (),
    "train.lr_matrix": SHAPE,
    "train.lr_embed": SHAPE,
    "train.lr_head": SHAPE,
    "train.lr_vector": SHAPE,
    "train.lr_router": SHAPE,
    "train.min_lr": (),
    "train.warmup_steps": ("train.total_steps",),
    "train.ckpt_interval": ("train.total_steps",),
    "train.eval_interval": ("train.total_steps", "train.micro_batch_size"),
    "train.save_dir": (),
}
RESOLVED = "all.json"


def open_keys(draft: Draft) -> list[str]:
    """Keys without a value that need a decision."""

    def decided(key: str) -> bool:
        if not draft.is_auto(key):
            return True
        if key in FOLLOWS:
            return all(map(decided, FOLLOWS[key]))
        values = draft.values
        if key == "train.compile":  # only a Metal GPU has both
            return not draft.is_auto("train.backend") and values["train.backend"] != "mlx"
        if key == "train.precision":  # that bfloat16 is not faster on mps is known of every Mac
            return bool(values["train.backend"] == "mps")
        if key == "data.corpus_bytes":  # of no use beside a text
            return values["data.input_file"] is not None or values["data.mixture"] is not None
        return False

    return [key for key in draft.values if not decided(key)]


def require_complete(draft: Draft, argv: Sequence[str]) -> None:
    """Refuse a configuration that leaves a decision open.

    Args:
        draft: The configuration, before anything is resolved.
        argv: The command line, for the command that writes out every value; empty if not known.

    Raises:
        PippinError: P010 with every key that needs a value.
    """
    left = open_keys(draft)
    if not left:
        return
    width = max(map(len, left))
    looks = ("--dry-run", "--print-config")
    spelled = [a.replace("_", "-") for a in argv]
    rest = [a for a, s in zip(argv, spelled) if s not in ("--manual-config", "--json", *looks)]
    write = shlex.join(["python", "train.py", *rest, "--print-config", "--json"])
    again = ["python", "train.py", "--manual-config", "--config", RESOLVED]
    again += [s for s in spelled if s in looks]
    raise PippinError(
        "P010",
        "--manual-config decides nothing, and "
        + ("this key has no value:" if len(left) == 1 else "these keys have no value:"),
        found="\n".join(f"{key:<{width}}  {_meaning(key)}" for key in left),
        remedy=f"{write} > {RESOLVED} && {shlex.join(again)}"
        "   (every value as it would be decided here), or give each one"
        if argv
        else "give each a value in the file, or leave out --manual-config",
        kept="nothing was started.",
    )


def _meaning(key: str) -> str:
    section, _, name = key.partition(".")
    return SECTIONS[section].model_fields[name].description or ""
