"""What `generate.py` prints: the text on stdout, facts on stderr, or JSON lines.

The text is streamed as it is written where one text is asked for. Nothing a model writes reaches a
terminal as a control code; a pipe and JSON get the text as it is.
"""

import json
import sys
from dataclasses import dataclass
from typing import TextIO

from core.inference.generate import Generation, generate
from core.inference.model import Model
from core.inference.sampling import Sampling
from core.inference.text import StreamDecoder, printable


@dataclass(frozen=True)
class Request:
    """What to write and how to show it.

    Attributes:
        prompt: Text to continue.
        num_samples: Texts to write from it; each has a row number, so each is another text.
        max_new_tokens: The most tokens of each.
        sampling: How tokens are chosen.
        as_json: One JSON object a line on stdout instead of the text.
        quiet: No facts on stderr.
    """

    prompt: str
    num_samples: int
    max_new_tokens: int
    sampling: Sampling
    as_json: bool = False
    quiet: bool = False


def write_texts(
    model: Model, request: Request, *, out: TextIO | None = None, err: TextIO | None = None
) -> list[Generation]:
    """Generate and print; returns what was written."""
    out = sys.stdout if out is None else out
    err = sys.stderr if err is None else err
    streamed = request.num_samples == 1 and not request.as_json
    stream = _Stream(model, request.prompt, out)
    try:
        texts = generate(
            model.backend,
            model.tokenizer,
            [request.prompt] * request.num_samples,
            max_seq_len=model.config.model.max_seq_len,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            on_token=stream.token if streamed else None,
        )
    except KeyboardInterrupt:  # what was written stays readable
        stream.end()
        raise
    if streamed:
        stream.begin()
        stream.end()
    for number, text in enumerate(texts):
        if request.as_json:
            print(json.dumps(as_object(model, request, text), ensure_ascii=False), file=out)
        elif not streamed:
            stream.write(f"--- {number + 1} of {len(texts)}\n{request.prompt}{text.text}\n")
    if not request.quiet:
        print(_facts(model, texts), file=err)
    return texts


def as_object(model: Model, request: Request, text: Generation) -> dict[str, object]:
    """The JSON object of one text. `tokens_per_second` is absent where nothing was written."""
    speed = {} if not text.tokens else {"tokens_per_second": len(text.tokens) / text.seconds}
    return {
        "prompt": request.prompt,
        "prompt_tokens": list(text.prompt_tokens),
        "tokens": list(text.tokens),
        "text": text.text,
        "stop_reason": text.stop_reason,
        "seconds": text.seconds,
        **speed,
        "checkpoint": str(model.checkpoint),
        "step": model.step,
        "backend": model.backend.name,
    }


class _Stream:
    """Writes text as it comes; controls are neutralised where a person reads it.

    The prompt comes with the first token, so that an error before it leaves stdout empty.
    """

    def __init__(self, model: Model, prompt: str, out: TextIO) -> None:
        self._prompt = prompt
        self._out = out
        self._is_terminal = out.isatty()
        self._decoder = StreamDecoder(model.tokenizer)
        self._begun = False

    def write(self, text: str) -> None:
        self._out.write(printable(text) if self._is_terminal else text)
        self._out.flush()

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.write(self._prompt)

    def token(self, _row: int, token: int) -> None:
        self.begin()
        self.write(self._decoder.feed(token))

    def end(self) -> None:
        if self._begun:
            self.write(self._decoder.flush() + "\n")


_REASONS = {
    "stop": "the model ended the text",
    "length": "--max-new-tokens",
    "context": "the model's context is full",
}


def _facts(model: Model, texts: list[Generation]) -> str:
    tokens = sum(len(t.tokens) for t in texts)
    seconds = max((t.seconds for t in texts), default=0.0)
    speed = f", {tokens / seconds:,.0f} tok/s" if tokens and seconds else ""
    reasons = "; ".join(dict.fromkeys(_REASONS[t.stop_reason] for t in texts))
    where = f"{model.checkpoint} (step {model.step:,}, {model.backend.name})"
    return f"[{tokens:,} tokens{speed}; stopped: {reasons}; {where}]"
