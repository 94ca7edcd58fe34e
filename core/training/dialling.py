"""`--depth` and `--time-budget` in a session: applied to the draft, and told with what they came to."""

from core.config.draft import Draft, Source
from core.errors import PippinError
from core.machine.depth import TOKENS_PER_PARAMETER, Dial, apply_depth
from core.params import ParamSpec, num_parameters
from core.training import format as fmt
from core.training.console import Console
from core.training.options import Options
from core.training.resume import ResumePoint


def apply_dial(
    draft: Draft, options: Options, start: ResumePoint | None, console: Console
) -> Dial | None:
    """Apply `--depth`, and name `--time-budget` as the source of its minutes.

    Raises:
        PippinError: P302 on resume, P012 beside --manual-config or out of range.
    """
    if options.time_budget is not None and draft.sources["train.minutes"].where == "--minutes":
        source = Source("flag", f"--time-budget {options.time_budget}")
        draft.set("train.minutes", draft.values["train.minutes"], source)
    if options.depth is None:
        return None
    if start is not None:
        raise PippinError(
            "P302",
            f"--depth {options.depth} asks for another model than the run's.",
            found=f"the checkpoint has {start.meta.model.get('n_layers')} layers of width "
            f"{start.meta.model.get('d_model')}",
            remedy="leave --depth out, or start a new run without --resume",
            kept="nothing was changed.",
        )
    if options.manual_config:
        raise PippinError(
            "P012",
            f"--depth {options.depth} decides sizes, and --manual-config decides nothing.",
            remedy=f"leave one out: python train.py --depth {options.depth}",
            kept="nothing was started.",
        )
    dial = apply_depth(draft, options.depth)
    for note in dial.notes:
        console.warn(note)
    return dial


def tell_dial(
    draft: Draft, dial: Dial | None, specs: tuple[ParamSpec, ...], fill: float, console: Console
) -> None:
    """What the dial came to; a warning where the run is not compute-optimal.

    Args:
        draft: Resolved.
        dial: None where there is none to tell of.
        specs: The parameter table.
        fill: Share of a window's positions that are trained on.
        console: Where to tell it.
    """
    if dial is None:
        return
    values, size = draft.values, num_parameters(specs)
    rows = int(values["train.micro_batch_size"]) * int(values["train.grad_accum_steps"])
    step = rows * int(values["data.seq_len"]) * fill
    tokens = step * int(values["train.total_steps"])
    ratio = tokens / size
    console.fact(
        "depth",
        f"{dial.depth}: {fmt.si(size)} parameters · {fmt.si(tokens)} tokens, {ratio:.3g} a "
        f"parameter · {fmt.si(step)} tokens a step",
    )
    if not 0.9 * TOKENS_PER_PARAMETER <= ratio <= 1.1 * TOKENS_PER_PARAMETER:
        source = draft.sources["train.total_steps"]
        console.warn(
            f"{dial.flag} would read {TOKENS_PER_PARAMETER} tokens a parameter; this run reads "
            f"{ratio:.3g} ({source.reason or source.where})"
        )
