"""What the verbs share on the terminal: errors, progress, the speed line. Data go to stdout, the rest to
stderr; nothing needs colour to be read."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hayai.engine.request import RequestTiming

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PATIENCE_SECONDS = 0.5
"""How long a task may take before it shows a bar."""


def print_error(message: str, hint: str | None = None) -> None:
    """`error: ...`, and `hint: ...` on its own line. A message may carry its hint after a line break."""
    first, _, rest = message.partition("\nhint: ")
    print(f"error: {first}", file=sys.stderr)
    if hint or rest:
        print(f"hint: {hint or rest}", file=sys.stderr)


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Bars on stderr for work that takes long; silent for quick work and where stderr is no terminal.

    Call it with (label, done, total), in any unit; total 0 = not known.
    """

    def __init__(self) -> None:
        self._enabled = sys.stderr.isatty()
        self._began = time.monotonic()
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._bars is None:
            if time.monotonic() - self._began < PATIENCE_SECONDS or (total and done >= total):
                return
            self._bars = _rich_progress()
            self._bars.start()
        task = self._tasks.get(label)
        if task is None:
            task = self._tasks[label] = self._bars.add_task(label, total=total or None)
        self._bars.update(task, completed=done, total=total or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


def _rich_progress() -> RichProgress:
    # slow to import, and most runs end before a bar is due
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def speed_line(timing: RequestTiming) -> str:
    """One line of the engine's own clock: prompt, first token, decode speed.

    Decode speed is (n - 1) / (last token - first token): the first token belongs to the prompt.
    """
    prefill = timing.first_token - timing.scheduled
    fresh = timing.prompt_tokens - timing.cached_tokens
    parts = [f"prompt {timing.prompt_tokens} tokens"]
    if timing.cached_tokens:
        parts[0] += f" ({timing.cached_tokens} cached)"
    if prefill > 0:
        parts.append(f"{fresh / prefill:,.0f} tokens/s")
    parts.append(f"first token {1e3 * (timing.first_token - timing.arrived):,.0f} ms")
    decode = timing.finished - timing.first_token
    parts.append(f"answer {timing.output_tokens} tokens")
    if timing.output_tokens > 1 and decode > 0:
        parts.append(f"{(timing.output_tokens - 1) / decode:,.1f} tokens/s")
    return " · ".join(parts)


def human_bytes(count: float) -> str:
    """A size as people read it: 91.7 MB (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
