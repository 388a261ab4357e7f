"""The training line: loss, seconds per step, tokens per second, GPU memory, ETA."""

from types import TracebackType

import torch
from rich.progress import TextColumn

from mochi_lora.console import progress_bar


class TrainingLine:
    """A progress bar whose figures are refreshed at each logging step."""

    def __init__(self, steps: int, start: int) -> None:
        self._bar = progress_bar(TextColumn("{task.fields[figures]}"))
        self._task = self._bar.add_task("training", total=steps, completed=start, figures="")

    def __enter__(self) -> "TrainingLine":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, done: int) -> None:
        """Show `done` completed steps."""
        self._bar.update(self._task, completed=done)

    def show(self, loss: float, seconds_per_step: float, tokens_per_second: float) -> None:
        """New figures, with the GPU's peak memory where there is a GPU."""
        figures = f"loss {loss:.4f} {seconds_per_step:.2f} s/step {tokens_per_second:,.0f} tok/s"
        if torch.cuda.is_available():
            figures += f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        self._bar.update(self._task, figures=figures)
