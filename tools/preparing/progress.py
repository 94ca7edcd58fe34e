"""The progress bar of a preparation: megabytes and tokens a second, and the time left."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from core.data.preparing.building import Amount
from core.data.reading.sources import Source

_LINE_S = 5.0


class _Facts(ProgressColumn):
    """What is known of the encoding; before that, how much has been read, looked up when drawn."""

    def __init__(self, source: Source) -> None:
        super().__init__(Column(no_wrap=True))  # the bar gives way first
        self._source = source
        # Not looked up by the thread that draws: for a dataset of the Hub that takes long.
        self._whole = f" of {source.num_bytes / 1e6:,.0f}" if source.num_bytes else ""

    def render(self, task: Task) -> Text:
        """The facts of a task, "25 of 80 MB" where there are none."""
        facts = str(task.fields["facts"])
        if not facts:
            facts = f"{self._source.bytes_read / 1e6:,.0f}{self._whole} MB"
        return Text(facts, no_wrap=True)


class Bar:
    """How far a preparation is; a line every few seconds where the output is no terminal.

    A text is read to be counted, and for a tokenizer, before any of it is encoded: until then a pulse
    and the bytes read are shown.

    The share that is done is that of the text where it has been counted. Of a stream it is that of the
    bytes that were read: packed, or with fields that are not used, the text is another amount.
    """

    def __init__(self, console: Console, source: Source, max_tokens: int | None) -> None:
        """Show nothing yet.

        Args:
            console: Where to draw.
            source: What is read; it says how much of its bytes the current pass has read.
            max_tokens: Tokens after which the preparation stops, if it does.
        """
        self._source, self._max_tokens = source, max_tokens
        self._text_bytes = 0
        self._progress = Progress(
            TextColumn(" {task.description:<10}"),
            BarColumn(),
            _Facts(source),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._console = console
        self._task = self._progress.add_task("read", total=None, facts="")
        self._started = self._told = time.monotonic()
        self._first: Amount | None = None

    def __enter__(self) -> "Bar":
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self._progress.stop()

    def expect(self, num_bytes: int) -> None:
        """Count on so many bytes of text."""
        self._text_bytes = num_bytes

    def update(self, amount: Amount) -> None:
        """Show how far it is."""
        now = time.monotonic()
        facts = f"{amount.text_bytes / 1e6:,.0f} MB  {amount.tokens / 1e6:,.1f}M tokens"
        if self._first is None:
            # An interrupted build goes on: only from here on is it known how fast this part is.
            self._first, self._started = amount, now
        else:
            seconds = max(now - self._started, 1e-3)
            mb = (amount.text_bytes - self._first.text_bytes) / 1e6
            tokens = amount.tokens - self._first.tokens
            facts += f"  {mb / seconds:.1f} MB/s  {tokens / seconds / 1e6:.2f}M tok/s"
        done, total = self._share(amount)
        self._progress.update(
            self._task, description="encode", completed=done, total=total, facts=facts
        )
        if not self._console.is_terminal and now - self._told > _LINE_S:
            self._told = now
            percent = f"{100 * done / total:3.0f} %  " if total else ""
            self._console.print(f" encode     {percent}{facts}")

    def _share(self, amount: Amount) -> tuple[float, float | None]:
        """How much is done, and of how much; None where that is not known.

        Of a limit and the end of the text that which is nearer.
        """
        done: float = self._source.bytes_read
        total: float | None = self._source.num_bytes or None
        if self._text_bytes:
            done, total = amount.text_bytes, self._text_bytes
        if self._max_tokens is None:
            return done, total
        if total is not None and done / total > amount.tokens / self._max_tokens:
            return done, total
        return amount.tokens, self._max_tokens
