"""`--depth` and `--time-budget` in a session: applied to the draft, and told with what they came to.

What the command line says twice is refused here too, and what it leaves half said is told.
"""

from core.config.draft import Draft
from core.config.load import load, parse_override
from core.errors import PippinError
from core.machine.depth import TOKENS_PER_PARAMETER, Dial, apply_depth, is_given, is_stated
from core.machine.timebudget import apply_time_budget
from core.params import ParamSpec, num_parameters
from core.training import format as fmt
from core.training.console import Console
from core.training.options import Options
from core.training.resume import ResumePoint


def apply_dial(
    draft: Draft, options: Options, start: ResumePoint | None, console: Console
) -> Dial | None:
    """Apply `--time-budget` and `--depth`; refuse and tell what does not go together.

    Raises:
        PippinError: P302 on resume, P012 beside --manual-config, out of range, or where the command
            line gives two rates or two lengths.
    """
    _refuse_two_rates(options, draft)
    if options.time_budget is not None:
        _refuse_manual(options, f"--time-budget {options.time_budget}", "the length")
        for note in apply_time_budget(draft, options.time_budget):
            console.warn(note)
    dial = _apply_depth(draft, options, start, console)
    if start is None:
        for note in (*_unused_minutes(draft, options), *_kept_shape(draft, options)):
            console.warn(note)
    return dial


def _apply_depth(
    draft: Draft, options: Options, start: ResumePoint | None, console: Console
) -> Dial | None:
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
    _refuse_manual(options, f"--depth {options.depth}", "sizes")
    dial = apply_depth(draft, options.depth)
    for note in dial.notes:
        console.warn(note)
    return dial


def _refuse_manual(options: Options, flag: str, what: str) -> None:
    if options.manual_config:
        raise PippinError(
            "P012",
            f"{flag} decides {what}, and --manual-config decides nothing.",
            remedy=f"leave one out: python train.py {flag}",
            kept="nothing was started.",
        )


def _refuse_two_rates(options: Options, draft: Draft) -> None:
    """An override wins over a flag, and a rate that is not used must not be typed."""
    overrides = [text for text in options.overrides if parse_override(text)[0] == "train.lr"]
    if not options.lr or not overrides:
        return
    rate = load(overrides=[f"train.lr={options.lr[-1]}"]).values["train.lr"]
    if rate != draft.values["train.lr"]:
        raise PippinError(
            "P012",
            f"--lr {options.lr[-1]} and {overrides[-1]} are two rates.",
            remedy="leave out one of them",
            kept="nothing was started.",
        )


def _unused_minutes(draft: Draft, options: Options) -> list[str]:
    """`--minutes` is for runs without a length; say so where the file gives one."""
    if options.minutes is None or options.time_budget is not None:
        return []
    if draft.is_auto("train.total_steps"):
        return []
    steps = f"train.total_steps = {draft.values['train.total_steps']:,}"
    where = draft.sources["train.total_steps"].where
    minutes = f"{options.minutes:g}"
    return [
        f"--minutes {minutes} has no effect: {steps} is given ({where}); "
        f"--time-budget {minutes}m is stronger than a file"
    ]


def _kept_shape(draft: Draft, options: Options) -> list[str]:
    """A width that is given alone leaves the file's other sizes as they were made for its own."""
    if options.config is None or not is_given(draft, "model.d_model"):
        return []
    stated = load(config=options.config).values["model.d_model"]
    if stated == draft.values["model.d_model"] or not isinstance(stated, int):
        return []
    names = ("model.n_heads", "model.n_kv_heads", "model.head_dim", "model.d_ff")
    kept = [name for name in names if is_stated(draft, name)]
    if not kept:
        return []
    values = ", ".join(f"{name} = {draft.values[name]}" for name in kept)
    anew = " ".join(f"{name}=auto" for name in kept)
    return [
        f"model.d_model is {draft.values['model.d_model']}, and the file's other sizes were made for "
        f"{stated} and stay: {values}; sized anew with {anew}"
    ]


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
