"""Whether the vocabulary that a configuration states and the one that the text gives fit."""

from core.config.draft import Draft
from core.errors import PippinError
from core.training.console import Console

# Share of unused rows that is worth a warning; a few come from rounding up.
UNUSED_SHARE = 0.1


def check_vocabulary(draft: Draft, pieces: int, console: Console) -> None:
    """Refuse an embedding with too few rows, and tell of one with many that no text reaches.

    Args:
        draft: Its `model.vocab_size` is "auto" or stated.
        pieces: Ids of the tokenizer.
        console: Where to warn.

    Raises:
        PippinError: P010 where the tokenizer has more ids than the model has rows.
    """
    if draft.is_auto("model.vocab_size") or draft.sources["model.vocab_size"].kind == "auto":
        return
    rows = int(draft.values["model.vocab_size"])
    if rows < pieces:
        raise PippinError(
            "P010",
            f"model.vocab_size = {rows:,} is below the {pieces:,} ids of the tokenizer.",
            remedy="model.vocab_size=auto",
            kept="nothing was started.",
        )
    unused = rows - pieces
    if unused > UNUSED_SHARE * rows:
        console.warn(
            f"the tokenizer has {pieces:,} ids and model.vocab_size is {rows:,}: {unused:,} rows of the "
            "embedding are never used; model.vocab_size=auto leaves them out"
        )
