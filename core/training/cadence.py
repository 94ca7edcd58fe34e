"""When a run shows something, so that a run of any length fits on a page."""

import math

NUM_ROWS = 40  # rows of a whole run in the terminal
EARLY_ROWS = (1, 2, 5, 10, 20, 50, 100)
MOST_VALIDATION_ROWS = 20


def shown_steps(total_steps: int, log_interval: int, eval_interval: int) -> set[int]:
    """Steps at which the terminal shows a row, about 45 for a run of any length.

    Some early ones, then at most 40 at equal distances, multiples of `log_interval`, and the last.
    Validations have rows of their own where they are few.
    """
    shown = {s for s in EARLY_ROWS if s <= total_steps}
    stride = max(log_interval * math.ceil(total_steps / NUM_ROWS / log_interval), 1)
    if total_steps <= MOST_VALIDATION_ROWS * eval_interval:
        shown |= set(range(eval_interval, total_steps + 1, eval_interval))
    return shown | set(range(stride, total_steps + 1, stride)) | {total_steps}


def sample_steps(total_steps: int, count: int) -> set[int]:
    """Log-spaced steps at which samples are shown, the last step among them."""
    if count <= 0:
        return set()
    if count == 1:
        return {total_steps}
    first = min(max(total_steps // 50, 1), total_steps)
    ratio = (total_steps / first) ** (1 / (count - 1))
    return {round(first * ratio**i) for i in range(count)}
