"""Samples while a run goes on: the same prompts and the same seed, so that one sees growth.

A sample is for people: one that fails is left out with a warning, and never ends a run.
"""

import json
from pathlib import Path

from core.backend import Backend
from core.config.schema import RunConfig
from core.errors import PippinError
from core.inference.generate import TextCodec, generate
from core.inference.sampling import Sampling
from core.training.console import Console
from core.training.format import one_line
from core.training.textdata import TextData

TEMPERATURE = 0.8


def fitting(tokenizer: TextCodec, prompt: str, max_seq_len: int) -> str:
    """The prompt, or its beginning where it would take more than half of the context."""
    while len(prompt) > 1 and len(tokenizer.encode(prompt)) > max(max_seq_len // 2, 1):
        prompt = prompt[:-1]
    return prompt


class Sampler:
    """Writes samples to the terminal and to `samples/samples.jsonl`; called with the step."""

    def __init__(
        self,
        backend: Backend,
        prepared: TextData,
        config: RunConfig,
        console: Console,
        folder: Path,
    ) -> None:
        self._backend = backend
        self._tokenizer = prepared.tokenizer
        limit = config.model.max_seq_len
        self._prompts = [fitting(self._tokenizer, p, limit) for p in prepared.prompts()]
        self._config = config
        self._console = console
        self._path = folder / "samples" / "samples.jsonl"

    def __call__(self, step: int) -> None:
        """Continue each prompt; the first one is shown. A failure is a warning."""
        try:
            self._write(step)
        except (PippinError, OSError, RuntimeError) as error:  # RuntimeError: the device's memory
            reason = error.what if isinstance(error, PippinError) else str(error)
            self._console.warn(f"step {step}: the samples were left out: {one_line(reason)}")

    def _write(self, step: int) -> None:
        prompts = self._prompts
        sampling = Sampling(temperature=TEMPERATURE, seed=self._config.train.seed)
        results = generate(
            self._backend,
            self._tokenizer,
            prompts,
            max_seq_len=self._config.model.max_seq_len,
            max_new_tokens=self._config.train.sample_tokens,
            sampling=sampling,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as handle:
            for prompt, result in zip(prompts, results):
                row = {"step": step, "prompt": prompt, "text": result.text}
                handle.write(json.dumps({**row, "temperature": TEMPERATURE}) + "\n")
        self._console.sample(prompts[0], results[0].text)
        self._console.emit("sample", {"step": step, "prompt": prompts[0], "text": results[0].text})
