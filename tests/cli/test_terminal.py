"""`hayai chat` and progress on a terminal (a pseudo-terminal of ours)."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hayai_process import COMMAND

ANSWER_TOKENS = 440  # what fits the model's context


class Terminal:
    """A process on a pseudo-terminal, and what it has shown."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Read until `text` was shown after everything that was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.shown!r}"
            try:
                self.shown += os.read(self.master, 65536).decode("utf-8", "replace")
            except OSError:  # the process has gone
                assert text in self.shown, f"{text!r} was not shown: {self.shown!r}"
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def chat(chat_model: Path) -> Iterator[Terminal]:
    terminal = Terminal(
        *COMMAND, "chat", "-m", str(chat_model), "--backend", "reference", "-n", str(ANSWER_TOKENS)
    )
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Terminal) -> None:
    chat.wait_for("/help for commands")
    chat.wait_for("> ")
    chat.type("Hello\r")
    chat.wait_for("Hello")  # the echo of what was typed
    chat.wait_for(" ")  # the answer has begun; the rest of it takes some tenths of a second
    chat.process.send_signal(signal.SIGINT)
    chat.wait_for("[stopped]")
    chat.wait_for("> ")
    chat.type("/reset\r")
    chat.wait_for("[new conversation]")
    chat.type("Again\r")
    chat.wait_for("Again")
    chat.wait_for(f"answer {ANSWER_TOKENS} tokens")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.process.wait(20) == 0


def test_long_work_shows_a_bar_and_quick_work_does_not() -> None:
    code = (
        "import sys, time\n"
        "from hayai.cli.console import Progress\n"
        "with Progress() as p:\n"
        "    for i in range(int(sys.argv[1]) + 1):\n"
        "        p('packing weights', i, int(sys.argv[1])); time.sleep(0.1)\n"
        "print('end')\n"
    )
    for steps, bar in (("2", False), ("12", True)):
        terminal = Terminal(sys.executable, "-W", "error", "-c", code, steps)
        terminal.wait_for("end") if not bar else terminal.wait_for("packing weights")
        if bar:
            terminal.wait_for("%")
            terminal.wait_for("end")
        else:
            assert "packing" not in terminal.shown
        assert terminal.process.wait(10) == 0
        terminal.close()
