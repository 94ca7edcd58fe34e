"""How a run that cannot go on tells it: what happened, what to change, what was kept."""

import shlex

from core.backend import OutOfMemory
from core.errors import EXIT_FAULT, PippinError
from core.training.run import Outcome, Run


def not_finite_error(run: Run, outcome: Outcome) -> PippinError:
    """The error of a run that was stopped by steps that were not finite."""
    train = run.config.train
    tries = []
    if train.precision == "float16":
        tries.append("train.precision=bfloat16")
    tries.append(f"train.lr={train.lr / 2:g}")
    if train.max_grad_norm == 0 or train.max_grad_norm > 0.5:
        tries.append("train.max_grad_norm=0.5")
    kept = f"last good state: {outcome.checkpoint}" if outcome.checkpoint else "nothing was saved."
    return PippinError(
        "P401",
        f"{train.max_skipped_steps} steps in a row were not finite after step "
        f"{outcome.state.step}; stopped.",
        found=f"precision {train.precision}, rate of the matrices {train.lr_matrix:g}",
        choices=tries,
        remedy=f"python train.py --resume {shlex.quote(str(run.folder))} {tries[0]}",
        kept=kept,
        exit_code=EXIT_FAULT,
    )


def no_memory_error(run: Run, failure: OutOfMemory) -> PippinError:
    """The error of a run whose memory does not suffice for a micro-batch of one row."""
    train = run.config.train
    again = f"python train.py --resume {shlex.quote(str(run.folder))}"
    tries = []
    if not train.gradient_checkpointing:
        tries.append(f"{again} train.gradient_checkpointing=true")
    if train.precision == "float32":
        tries.append("train.precision=bfloat16 in a new run")
    tries += ["a shorter data.seq_len or a smaller model in a new run", "closing other programs"]
    saved = run.checkpoint
    where = f"after step {run.state.step:,}" if run.state.step else "before step 1"
    return PippinError(
        "P101",
        f"{where}: {failure.what}",
        found="\n".join(
            line
            for line in (
                failure.found,
                f"train.micro_batch_size is {train.micro_batch_size}: it cannot be halved",
            )
            if line
        ),
        choices=tries[1:],
        remedy=tries[0],
        kept=f"saved: {saved}; {again} goes on" if saved is not None else "nothing was saved.",
        exit_code=EXIT_FAULT,
    )
