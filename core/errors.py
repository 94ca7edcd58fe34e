"""Errors a user can act on: a stable code, what happened, what to do.

Every error that reaches a user is a `PippinError`. Its `render()` is the whole message: what is wrong
and where, what was found and needed, what is available, one command that mends it, and what was
kept. `CODES` lists every code with its long explanation; `pippin explain P301` prints it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.environment import as_typed

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class PippinError(Exception):
    """One problem, in the words a user needs.

    Attributes:
        code: Stable code, a key of `CODES`.
        what: What is wrong and where, with values, in one sentence.
        found: What was found and what is needed (may be several lines).
        choices: What is available instead, nearest first.
        remedy: One command or key that mends it.
        kept: What was kept, or that nothing was started.
        exit_code: Process exit code: 2 for a user's input, 1 for a fault.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        found: str = "",
        choices: Sequence[str] = (),
        remedy: str = "",
        kept: str = "",
        exit_code: int = EXIT_USER,
    ) -> None:
        if code not in CODES:
            raise KeyError(f"unknown error code {code}: add it to core.errors.CODES")
        super().__init__(what)
        self.code = code
        self.what = what
        self.found = found
        self.choices = tuple(choices)
        self.remedy = remedy
        self.kept = kept
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive a pipe between processes."""
        keys = ("found", "choices", "remedy", "kept", "exit_code")
        return _rebuild, (self.code, self.what, {key: getattr(self, key) for key in keys})

    def render(self) -> str:
        """The message as printed on stderr, without a traceback."""
        lines = [f"{self.code} {self.what}"]
        lines += [f"  {line}" for line in self.found.splitlines()]
        if self.choices:
            lines.append("  available: " + ", ".join(self.choices))
        if self.remedy:
            lines.append(f"  try: {self.remedy}")
        if self.kept:
            lines.append(f"  {self.kept}")
        return as_typed("\n".join(lines))

    def __str__(self) -> str:
        return self.render()


# code -> (title, explanation). docs/troubleshooting.md has an entry for each; a test compares.
CODES: dict[str, tuple[str, str]] = {
    "P001": (
        "internal fault",
        "Pippin met a state that it believed impossible. The traceback is in pippin-error.log, in the "
        "folder where the command was typed, and shown with --debug or PIPPIN_DEBUG=1. Please report "
        "it with that text.",
    ),
    "P010": (
        "configuration",
        "One or more keys of the configuration are unknown, have the wrong type or contradict each "
        "other. All problems are listed at once, each with the file and line it came from. "
        "`python train.py --print-config` lists every key, its value and where it came from.",
    ),
    "P011": (
        "configuration file",
        "The configuration file cannot be read: it is missing, is not YAML or JSON, is larger than "
        "1 MB, repeats a key, or uses YAML tags or aliases, which are refused. A file written for "
        "another project is translated, but one that two projects would read in two ways is refused "
        "with both readings.",
    ),
    "P012": (
        "command line",
        "The command line has an unknown flag, an override that is not of the form section.key="
        "value, or a flag that could have no effect, as --minutes on a run that goes on, or two flags "
        "that say two things, as --model-name and another --save-dir.",
    ),
    "P101": (
        "memory",
        "The predicted memory of the step does not fit the share of the device's memory that "
        "training may use. Smaller micro-batches give the same result more slowly; gradient "
        "checkpointing trades time for memory. Where memory runs out in a step, the run halves its "
        "micro-batch by itself and goes on; this error ends it where a micro-batch is one row.",
    ),
    "P201": (
        "no text found",
        "The input holds no text that can be trained on: it is missing, empty, or shorter than one "
        "training window. The message gives both numbers.",
    ),
    "P202": (
        "undecodable text",
        "A text is not valid UTF-8, or a JSON line is broken or lacks the text field. The "
        "message names the file and the line. Convert the file (for example with iconv) or remove "
        "the line.",
    ),
    "P203": (
        "damaged shards",
        "A shard differs from its manifest in size or sha256, so it is not read. Delete the shard "
        "folder: it is rebuilt from the text at the next start.",
    ),
    "P204": (
        "token id out of range",
        "A token id in the data is not below the model's vocabulary size. On a GPU such an id would "
        "be silent garbage, so each batch is checked on the host.",
    ),
    "P301": (
        "tokenizer and data or checkpoint differ",
        "Shards and checkpoints carry the fingerprint of the tokenizer they were made with. It must "
        "be the same tokenizer, byte for byte.",
    ),
    "P302": (
        "cannot resume",
        "The checkpoint's architecture stands on resume. A configuration that asks for another one, "
        "a weights-only file, a missing run, or one that is finished cannot be resumed.",
    ),
    "P303": (
        "damaged checkpoint",
        "The file is truncated, or a tensor fails its checksum, or the meta fails its digest. The "
        "newest intact checkpoint is used when none was named.",
    ),
    "P304": (
        "checkpoint of another model",
        "Names, shapes or dtypes in the checkpoint differ from the parameter table of the model. "
        "Every difference is listed.",
    ),
    "P305": (
        "checkpoint of a newer format",
        "The file was written by a newer version of Pippin. Update, or convert it there.",
    ),
    "P306": (
        "not a checkpoint",
        "The file is no Pippin checkpoint: another kind of file, a pickle that would run code, an "
        "npz with object arrays or with headers that do not fit the file. Nothing in it was run.",
    ),
    "P307": (
        "checkpoint could not be written",
        "Writing failed, usually because the disk is full or the folder is read-only. The previous "
        "checkpoint is untouched and the temporary file was removed.",
    ),
    "P310": (
        "run folder in use",
        "Another process trains in this run folder. The message names its process id.",
    ),
    "P311": (
        "run folder holds a run",
        "A folder that holds a checkpoint is never written without --resume or --overwrite, and "
        "--overwrite removes only what a run wrote: a folder whose files are of other origin is "
        "refused. The same holds for a folder of shards: another text or other options need "
        "--overwrite or another --out.",
    ),
    "P312": (
        "run folder not writable",
        "The run folder cannot be created or written, or its disk is full or has no room for the "
        "checkpoints or the stories of the run. This is checked before the first step; where the disk "
        "fills up later, the step is saved first if it can be.",
    ),
    "P401": (
        "not finite",
        "Several steps in a row had a loss or gradient that was not finite. They were skipped, so the "
        "weights are those of the last good step, and they were saved. A lower learning rate, "
        "bfloat16 instead of float16 or a smaller max_grad_norm usually helps.",
    ),
    "P402": (
        "preflight failed",
        "Before the first step Pippin checks that a token cannot see later ones and that the first "
        "loss is what it must be. One check failed on this machine, so the run did not start: "
        "training would look fine and be wrong.",
    ),
    "P501": (
        "backend not available",
        "The backend that was asked for cannot run here: its package is not installed or the device "
        "is missing. The message gives the install line.",
    ),
    "P502": (
        "wrong Python or package version",
        "The Python build or a package version is known to be wrong for this machine, for example an "
        "Intel Python on Apple silicon, or torch below 2.12 on MPS; or a script was started by a "
        "Python without the packages, and there is no .venv to go on with: ./setup.sh makes it.",
    ),
    "P503": (
        "backend and parameter table differ",
        "The model that the backend built does not have exactly the parameters of the table. This is "
        "a fault in the backend.",
    ),
    "P504": (
        "operator missing on MPS",
        "The installed torch has no MPS kernel for an operator that the model needs; the message names "
        "it. Nothing is moved to the CPU silently: --allow-cpu-fallback asks for that.",
    ),
    "P601": (
        "generation",
        "The prompt or a sampling setting cannot be used: the context is full, a temperature is "
        "negative, a probability is outside its range.",
    ),
}


def all_problems(
    code: str, problems: Sequence[str], *, what: str, remedy: str = "", kept: str = ""
) -> PippinError:
    """One error that lists several problems, each on its own line."""
    return PippinError(code, what, found="\n".join(problems), remedy=remedy, kept=kept)


def _rebuild(code: str, what: str, rest: Mapping[str, Any]) -> PippinError:
    return PippinError(code, what, **rest)
