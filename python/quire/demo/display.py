"""Shows generated text as it comes: on a terminal above a live status line, elsewhere as plain text.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import Any, TextIO

from quire.demo.engine import EngineStats

DIM, RESET = "\x1b[2m", "\x1b[0m"
REPLACEMENT = "\ufffd"  # what a tokenizer decodes half a character to
CONTEXT = 6  # prompt tokens decoded along: some tokenizers drop a text's first space


class Detokenizer:
    """Turns one request's tokens into text, a piece at a time, and never shows half a character."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        """Starts after the prompt."""
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT:])
        self._start, self._shown = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        self._ids.append(token_id)
        before: str = self._tokenizer.decode(self._ids[self._start : self._shown])
        after: str = self._tokenizer.decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


class Rate:
    """Tokens per second over about the last second, and over all."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._start = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque([(self._start, 0)])

    def update(self, num_tokens: int) -> float:
        """Takes the count of tokens so far and returns the current rate."""
        now = time.monotonic()
        self._samples.append((now, num_tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > 1.0:
            self._samples.popleft()
        first_time, first_count = self._samples[0]
        return (num_tokens - first_count) / max(now - first_time, 1e-9)

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start


def status_text(stats: EngineStats, tokens_per_second: float) -> str:
    """The live line."""
    hits = 100 * stats.num_hit_tokens / max(stats.num_prompt_tokens, 1)
    return (
        f"{tokens_per_second:,.0f} tokens/s | {stats.num_running} running, {stats.num_waiting} waiting | "
        f"blocks {stats.num_live_blocks} live / {stats.num_cached_blocks} cached / "
        f"{stats.num_free_blocks} free | prefix-cache hits {hits:.0f} % | {stats.num_preemptions} preempted"
    )


class Display:
    """Writes text to `out`, and the status below it (a terminal) or to `log` every `interval` seconds.

    On a terminal the last, unfinished line of text and the status line are drawn again each time; the cursor
    rests at the start of the former. Text is wrapped here, so that this line never spans two rows.
    """

    def __init__(self, out: TextIO, log: TextIO, *, live: bool, interval: float = 2.0) -> None:
        """Starts with an empty screen; `live` says that `out` is a terminal."""
        self._out, self._log, self._live, self._interval = out, log, live, interval
        self._line, self._last_log = "", time.monotonic()
        self.last_status = ""
        self._width = max(20, shutil.get_terminal_size().columns - 1)

    def write(self, text: str) -> None:
        """Adds text at the end."""
        if not self._live:
            self._out.write(text)
            self._out.flush()
            return
        *complete, rest = (self._line + text).split("\n")
        rows = [row for line in complete for row in self._wrap(line)]
        *more, self._line = self._wrap(rest)
        for row in rows + more:
            self._out.write(f"\r\x1b[K{row}\n")
        self._draw()

    def status(self, text: str) -> None:
        """Shows a new status; off a terminal, only every `interval` seconds."""
        self.last_status = text
        if self._live:
            self._draw()
        elif self._interval and time.monotonic() - self._last_log >= self._interval:
            self._last_log = time.monotonic()
            print(text, file=self._log, flush=True)

    def close(self) -> None:
        """Ends the last line of text and leaves the status behind."""
        if self._live:
            self._draw()
            self._out.write("\n\n" if self.last_status else "\n")
            self._out.flush()

    def _wrap(self, line: str) -> list[str]:
        """Breaks a line at spaces into rows of at most the terminal's width; there is always one."""
        rows = []
        while len(line) > self._width:
            cut = line.rfind(" ", 1, self._width + 1)
            cut = self._width if cut < 1 else cut
            rows.append(line[:cut])
            line = line[cut:].removeprefix(" ")
        return [*rows, line]

    def _draw(self) -> None:
        status = f"{DIM}{self.last_status[: self._width]}{RESET}"
        self._out.write(f"\r\x1b[K{self._line}\n\r\x1b[K{status}\x1b[1A\r")
        self._out.flush()
