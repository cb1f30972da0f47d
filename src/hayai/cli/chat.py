"""`hayai chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import Any

import click

from hayai.cli.console import note, print_error, speed_line
from hayai.cli.options import engine_options, load, sampling_options
from hayai.engine.request import SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Frontend, Prompt

HELP = """\
/help            this list
/reset           forget the conversation (the system message stays)
/system TEXT     set the system message and start anew; without TEXT: remove it
/exit            leave (so does Ctrl-D)
Ctrl-C           stop the answer; at an empty prompt: leave
A line that ends with \\ goes on in the next one."""


class Conversation:
    """Messages so far, and how the next answer is sampled."""

    def __init__(self, frontend: Frontend, params: SamplingParams, system: str | None) -> None:
        self.frontend = frontend
        self.params = params
        self.system = system
        self.turns: list[dict[str, str]] = []

    def messages(self) -> tuple[dict[str, str], ...]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return tuple(head + self.turns)

    def ask(self, text: str) -> None:
        """Send a message and print the answer. An answer that was stopped stays in the conversation;
        a question that could not be asked does not."""
        self.turns.append({"role": "user", "content": text})
        answer: list[str] = []
        timing = None
        stopped = False
        try:
            with closing(self.frontend.iterate(Prompt(messages=self.messages()), self.params)) as chunks:
                for chunk in chunks:
                    answer.append(chunk.text)
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
                    timing = chunk.timing or timing
        except RequestError as error:
            self.turns.pop()
            hint = "/reset starts a new conversation" if error.code == "context_length_exceeded" else None
            print_error(str(error), hint)
            return
        except KeyboardInterrupt:
            stopped = True
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.turns.append({"role": "assistant", "content": "".join(answer)})
        if stopped:
            note("[stopped]")
        elif timing is not None:
            note(f"[{speed_line(timing)}]")

    def run_command(self, line: str) -> bool:
        """Do what a /command says; False: leave."""
        verb, _, rest = line.partition(" ")
        if verb in ("/exit", "/quit"):
            return False
        if verb == "/help":
            note(HELP)
        elif verb == "/reset":
            self.turns.clear()
            note("[new conversation]")
        elif verb == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
            note("[system message set; new conversation]" if self.system else "[no system message]")
        else:
            note(f"unknown command: {verb}; /help shows what there is")
        return True


@click.command()
@click.option("--system", help="A system message before the conversation.")
@sampling_options
@engine_options
def command(
    system: str | None,
    sampling: dict[str, Any],
    **engine: Any,
) -> None:
    """Talk to a model. /help inside shows the commands; Ctrl-C stops an answer.

    Nothing is cut in silence: a conversation that no longer fits the context is an error.
    """
    params = SamplingParams(**sampling)
    with closing(Frontend(load(**engine, max_sequences=1))) as frontend:
        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  (line editing and history; not on every system)
            note(f"{frontend.model_name}, context of {frontend.context_length} tokens; /help for commands")
        talk(Conversation(frontend, params, system), interactive)


def talk(conversation: Conversation, interactive: bool) -> None:
    """Read, answer, repeat, until /exit or the end of the input."""
    prompt = "> " if interactive else ""
    while True:
        try:
            line = read_message(prompt)
        except (EOFError, KeyboardInterrupt):
            if interactive:
                note("")
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            if not conversation.run_command(line.strip()):
                return
        else:
            conversation.ask(line)


def read_message(prompt: str) -> str:
    """One message: a line, and the next ones as long as each ends with a backslash."""
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  " if prompt else ""))
    return "\n".join(lines)
