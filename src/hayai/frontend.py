"""The one path above the engine, for `LLM`, `hayai run`, `hayai chat` and the server.

A prompt is made into token ids, submitted, and its tokens come back as text. Asynchronous callers share the
engine's own thread; synchronous ones run the steps themselves until that thread is started (see
engine/service.py). Both read the same TextAssembler.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from hayai.engine.request import EngineRequest, Logprob, RequestTiming, SamplingParams, TokenEvent
from hayai.engine.service import EngineError, EngineService
from hayai.errors import RequestError
from hayai.frontend_text import TextAssembler, TextChunk, Usage, join_chunks
from hayai.load import LoadedModel
from hayai.text.chat import encode_chat
from hayai.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from hayai.frontend_async import LoopMailbox

__all__ = ["Completion", "EngineError", "Frontend", "Prompt", "TextChunk", "Usage"]

LONG_TEXT = 16_384
"""Characters from which `stream` tokenises on another thread, so that the event loop keeps answering."""


@dataclass(frozen=True)
class Prompt:
    """What to continue; exactly one of the three.

    messages: a conversation for the model's chat template ({"role": ..., "content": ...}).
    text: raw text, no template; control tokens written in it are control tokens (the caller owns the whole
    prompt, as in llama.cpp and vLLM).
    token_ids: used as they are.
    template_args: variables for the chat template, `tools` among them.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("messages", "text", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"a prompt is one of messages, text and token_ids; given: {', '.join(given) or 'none'}",
                param="prompt",
            )


@dataclass(frozen=True)
class Completion:
    """A finished answer. finish_reason: 'stop', 'length' or 'abort'; `stop`: the stop string found, if any.

    logprobs: one entry per token where they were asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timing: RequestTiming
    logprobs: tuple[Logprob, ...] = ()
    stop: str | None = None


class Frontend:
    """Serves one loaded model. Thread-safe; close it (or use `with`) to stop the engine and free memory."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model_name = loaded.name
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.service = EngineService(loaded.engine)
        self._mailbox: LoopMailbox | None = None
        # Also at the end of the process, and when a Frontend is dropped: the engine's thread must not outlive
        # the interpreter, nor the weights their last user. Nothing here may refer to `self`.
        self._close = weakref.finalize(self, _shut_down, self.service)
        pieces = () if loaded.tokenizer is None else loaded.tokenizer.pieces
        self._longest_token = max(map(len, pieces), default=1)

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.loaded.engine.max_length

    @property
    def alive(self) -> bool:
        """Whether requests are served: the engine has neither failed nor been closed."""
        return self.service.alive

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none without a vocabulary or outside it."""
        tokenizer = self.tokenizer
        if tokenizer is None or not 0 <= token_id < tokenizer.vocab_size:
            return b""
        return tokenizer.token_bytes(token_id)

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop running requests ('abort'), the engine's thread, and the backend. Again: nothing."""
        self._close()

    # ------------------------------------------------------------------ prompts

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        RequestError: the model has no vocabulary or no chat template, the template refuses the messages, or
        the text can't fit the context (code 'context_length_exceeded', with both numbers).
        """
        ids = self._encode(prompt)
        if len(ids) + 1 > self.context_length:
            raise _too_long(str(len(ids)), self.context_length, prompt)
        return ids

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self.tokenizer is None:
            raise RequestError(
                f"model {self.model_name} has no vocabulary: give token ids",
                param=_field(prompt),
                code="no_vocabulary",
            )
        # No token is longer than the longest: text that can't fit is refused before it costs anything.
        least = _num_characters(prompt) // self._longest_token
        if least >= self.context_length:
            raise _too_long(f"at least {least}", self.context_length, prompt)
        if prompt.text is not None:
            return tuple(self.tokenizer.encode(prompt.text, special=True))
        template = self.loaded.chat_template
        if template is None:
            raise RequestError(
                f"model {self.model_name} has no chat template: give a text prompt",
                param="messages",
                code="no_chat_template",
            )
        return tuple(
            encode_chat(template, self.tokenizer, list(prompt.messages or ()), **prompt.template_args)
        )

    def _request(
        self, ids: tuple[int, ...], params: SamplingParams, request_id: str | None = None
    ) -> EngineRequest:
        if params.stop and self.tokenizer is None:
            raise RequestError(
                f"model {self.model_name} has no vocabulary, so stop strings can't be found in its text",
                param="stop",
                code="no_vocabulary",
            )
        request = EngineRequest(request_id or os.urandom(12).hex(), ids, params)
        self.loaded.engine.check(request)
        return request

    # ------------------------------------------------------------------ asynchronous

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        arrived: float | None = None,
    ) -> AsyncGenerator[TextChunk, None]:
        """The answer in chunks, from the engine's own thread (started by the first call). Tokens that are
        ready together come as one chunk.

        arrived: monotonic seconds when the request came in, if that was before now (for its timing).
        Closing the iterator or cancelling the task stops the request before the next step.
        RequestError before the first chunk; EngineError when the engine fails.
        """
        async with aclosing(self.stream_tokens(prompt, params, request_id, arrived)) as parts:
            async for chunks in parts:
                yield join_chunks(chunks)

    async def stream_tokens(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        arrived: float | None = None,
    ) -> AsyncGenerator[list[TextChunk], None]:
        """As `stream`, but a chunk per token: what is ready together comes as one list."""
        import asyncio  # 20 ms that only asynchronous callers should pay, and they have it already

        from hayai.frontend_async import EventBox

        arrived = time.monotonic() if arrived is None else arrived
        if _num_characters(prompt) < LONG_TEXT:
            ids = self.encode(prompt)
        else:
            ids = await asyncio.to_thread(self.encode, prompt)
        request = self._request(ids, params, request_id)
        assembler = TextAssembler(self.tokenizer, params, len(ids), arrived)
        box = EventBox(self._loop_mailbox(asyncio.get_running_loop()))
        self.service.start()
        self.service.submit(request, box.post, arrived)
        try:
            while not assembler.finished:
                chunks = _push_all(assembler, await box.take())
                if chunks:
                    yield chunks
        finally:
            if not assembler.engine_finished:
                self.service.abort(request.request_id)

    def _loop_mailbox(self, loop: AbstractEventLoop) -> LoopMailbox:
        from hayai.frontend_async import LoopMailbox  # as above

        mailbox = self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = LoopMailbox(loop)
        return mailbox

    # ------------------------------------------------------------------ synchronous

    def iterate(self, prompt: Prompt, params: SamplingParams) -> Generator[TextChunk, None, None]:
        """The answer in chunks. Errors in the prompt are raised here, not at the first chunk.

        Closing the iterator stops the request.
        """
        arrived = time.monotonic()
        request = self._request(self.encode(prompt), params)
        return self._iterate(request, arrived)

    def _iterate(self, request: EngineRequest, arrived: float) -> Generator[TextChunk, None, None]:
        assembler = TextAssembler(self.tokenizer, request.params, len(request.prompt_ids), arrived)
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        self.service.submit(request, events.put, arrived)
        try:
            while not assembler.finished:
                chunk = assembler.push(self._next(events))
                if chunk is not None:
                    yield chunk
        finally:
            if not assembler.engine_finished:
                self.service.abort(request.request_id)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answers to all prompts, run together; in the order of the prompts.

        params: for all prompts, or one per prompt. All prompts are checked before the first one runs.
        """
        arrived = time.monotonic()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} sampling parameters", param="params")
        requests = [self._request(self.encode(p), q) for p, q in zip(prompts, each, strict=True)]
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        running: dict[str, TextAssembler] = {}
        chunks: dict[str, list[TextChunk]] = {request.request_id: [] for request in requests}
        try:
            for request in requests:
                self.service.submit(request, events.put, arrived)
                running[request.request_id] = TextAssembler(
                    self.tokenizer, request.params, len(request.prompt_ids), arrived
                )
            while running:
                event = self._next(events)
                assembler = running.get(event.request_id)
                if assembler is None:
                    continue  # cut at a stop string: the engine went one token further
                chunk = assembler.push(event)
                if chunk is not None:
                    chunks[event.request_id].append(chunk)
                if assembler.finished:
                    del running[event.request_id]
                    if not assembler.engine_finished:
                        self.service.abort(event.request_id)
        finally:
            for request_id in running:
                self.service.abort(request_id)
        return [_completion(join_chunks(chunks[request.request_id])) for request in requests]

    def _next(self, events: SimpleQueue[TokenEvent]) -> TokenEvent:
        """The next event; without an engine thread, by running steps here until there is one."""
        while True:
            if not events.empty():
                return events.get()  # this caller is the only one that takes from it
            if self.service.threaded:
                return events.get()
            self.service.pump()


def _shut_down(service: EngineService) -> None:
    if service.close():
        service.engine.close()


def _push_all(assembler: TextAssembler, events: list[TokenEvent]) -> list[TextChunk]:
    chunks = []
    for event in events:
        chunk = assembler.push(event)
        if chunk is not None:
            chunks.append(chunk)
        if assembler.finished:
            break
    return chunks


def _completion(whole: TextChunk) -> Completion:
    assert whole.finish_reason is not None and whole.usage is not None and whole.timing is not None
    return Completion(
        whole.text,
        whole.token_ids,
        whole.finish_reason,
        whole.usage,
        whole.timing,
        whole.logprobs,
        whole.stop,
    )


def _field(prompt: Prompt) -> str:
    return "messages" if prompt.messages is not None else "prompt"


def _num_characters(prompt: Prompt) -> int:
    """Size of the text to tokenise, which is at most its number of bytes."""
    if prompt.text is not None:
        return len(prompt.text)
    contents = (m.get("content") for m in prompt.messages or ())
    return sum(len(c) for c in contents if isinstance(c, str))


def _too_long(tokens: str, context_length: int, prompt: Prompt) -> RequestError:
    return RequestError(
        f"the prompt has {tokens} tokens, and with at least one to generate it must fit the context of "
        f"{context_length} tokens",
        param=_field(prompt),
        code="context_length_exceeded",
    )
