"""What every backend refuses before it computes, in numpy and numbers alone."""

from collections.abc import Mapping, Sequence

from core.backend import Int32
from core.errors import PippinError, all_problems
from core.params import ParamSpec


def check_table(
    built: Mapping[str, tuple[int, ...]], specs: Sequence[ParamSpec], framework: str
) -> None:
    """Refuse a model whose parameters are not those of the table.

    Args:
        built: Shape of every parameter of the model, by canonical name.
        specs: The parameter table.
        framework: "torch" or "mlx".

    Raises:
        PippinError: P503 with every name that differs.
    """
    table = {s.name: s.shape for s in specs}
    problems = [
        f"{name}: model {built.get(name, 'has none')}, table {table.get(name, 'has none')}"
        for name in sorted(built.keys() | table.keys())
        if built.get(name) != table.get(name)
    ]
    if problems:
        what = f"the {framework} model and the parameter table differ."
        raise all_problems("P503", problems, what=what)


def check_tokens(vocab_size: int, *arrays: Int32) -> None:
    """Refuse ids outside the vocabulary: a device would read beyond the embedding.

    Args:
        vocab_size: Ids are below this.
        arrays: int32, any shape.

    Raises:
        PippinError: P204 for a token id out of range.
    """
    for ids in arrays:
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise PippinError(
                "P204",
                f"a token id is outside the vocabulary of {vocab_size}.",
                found=f"ids from {ids.min()} to {ids.max()}",
                remedy="prepare the data again with the tokenizer of this model",
            )
