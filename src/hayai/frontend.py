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
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

from hayai.config import LimitsConfig
from hayai.engine.request import EngineRequest, Logprob, RequestTiming, SamplingParams, TokenEvent
from hayai.engine.service import EngineError, EngineService
from hayai.errors import RequestError
from hayai.frontend_prompt import Prompt, PromptEncoder
from hayai.frontend_request import PLAIN, RequestOptions, ToolCall, thinking_tags
from hayai.frontend_text import TextAssembler, TextChunk, Usage, join_calls, join_chunks
from hayai.load import LoadedModel
from hayai.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from hayai.engine.engine import EngineStats
    from hayai.frontend_answer import AnswerForm, AnswerForms
    from hayai.frontend_async import DirectSink, EventBox, LoopMailbox

__all__ = ["Completion", "EngineError", "Frontend", "Prompt", "TextChunk", "Usage"]

LONG_TEXT = 16_384
"""Characters from which `stream` tokenises on another thread, so that the event loop keeps answering."""


@dataclass(frozen=True)
class Completion:
    """A finished answer. finish_reason: 'stop', 'length', 'tool_calls', 'timeout' or 'abort'; `stop`: the
    stop string found, if any.

    logprobs: one entry per token where they were asked for, else empty. prompt_logprobs: one per token of the
    prompt, None for the first; None where they were not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timing: RequestTiming
    logprobs: tuple[Logprob, ...] = ()
    stop: str | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Frontend:
    """Serves one loaded model. Thread-safe; close it (or use `with`) to stop the engine and free memory.

    limits: of schemas, regular expressions and grammars.
    """

    def __init__(self, loaded: LoadedModel, limits: LimitsConfig | None = None) -> None:
        self._limits = LimitsConfig() if limits is None else limits
        self.loaded = loaded
        self.model_name = loaded.name
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.service = EngineService(loaded.engine)
        self._mailbox: LoopMailbox | None = None
        self._diverted: EventBox | None = None
        # Also at the end of the process, and when a Frontend is dropped: the engine's thread must not outlive
        # the interpreter, nor the weights their last user. Nothing here may refer to `self`.
        self._close = weakref.finalize(self, _shut_down, self.service)
        self._encoder = PromptEncoder(loaded)
        self._forms: AnswerForms | None = None
        template = loaded.chat_template
        self._thinks = template is not None and thinking_tags(template.source) is not None

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.loaded.engine.max_length

    @property
    def alive(self) -> bool:
        """Whether requests are served: the engine has neither failed nor been closed."""
        return self.service.alive

    def describe(self) -> Mapping[str, object]:
        """Everything that was resolved when the model was loaded: precision, instruction set, threads ..."""
        return self.loaded.describe()

    def stats(self) -> EngineStats:
        """The engine's counters and its state of now; may be asked from any thread."""
        return self.loaded.engine.stats()

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

    def encode(
        self, prompt: Prompt, options: RequestOptions = PLAIN, warnings: list[str] | None = None
    ) -> tuple[int, ...]:
        """Token ids of a prompt, with the tools of `options` in its template.

        warnings: gets a sentence for each thing that was done otherwise than asked.
        RequestError: the model has no vocabulary or no chat template, the template refuses the messages, or
        the text can't fit the context (code 'context_length_exceeded', with both numbers).
        """
        return self._encoder.encode(prompt, options, warnings)

    def count(self, prompt: Prompt, options: RequestOptions = PLAIN) -> int:
        """Tokens of a prompt, as `encode` makes them. Errors as `encode`."""
        return len(self.encode(prompt, options))

    def infill(self, prefix: str, suffix: str) -> Prompt:
        """A prompt that asks for the text between `prefix` and `suffix`.

        RequestError (param 'suffix'): the vocabulary has no tokens for it.
        """
        return self._encoder.infill(prefix, suffix)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens by name, bytes that are not UTF-8 replaced.

        RequestError: no vocabulary, or an id outside it.
        """
        return self._encoder.decode(ids)

    def _request(
        self,
        ids: tuple[int, ...],
        params: SamplingParams,
        options: RequestOptions = PLAIN,
        request_id: str | None = None,
        form: AnswerForm | None = None,
    ) -> EngineRequest:
        if params.stop:
            self._encoder.vocabulary("stop", "stop strings can't be found in its text")
        if options is PLAIN:
            request = EngineRequest(request_id or os.urandom(12).hex(), ids, params)
        else:
            request = EngineRequest(
                request_id or os.urandom(12).hex(),
                ids,
                params if options.generate else replace(params, max_tokens=1, stop=()),
                priority=options.priority,
                tenant=options.tenant,
                cache_salt=options.cache_salt,
                mask=None if form is None else form.mask,
                prompt_logprobs=options.prompt_logprobs,
                deadline=options.deadline,
            )
        self.loaded.engine.check(request)
        return request

    def _form(
        self, prompt: Prompt, ids: tuple[int, ...], options: RequestOptions, warnings: list[str] | None
    ) -> AnswerForm | None:
        """The form of the answer; None where it is just text with nothing beside it."""
        plain = options.constraint is None and not options.active_tools
        thinks = self._thinks and options.reasoning and prompt.is_chat
        if options.generate and options.prompt_logprobs is None and plain and not thinks:
            return None
        # Imported for those who need it: grammars and tool formats take 10 ms of everybody else's start.
        from hayai.frontend_answer import NO_FORM, AnswerForms

        if not options.generate:
            return NO_FORM
        if self._forms is None:
            self._forms = AnswerForms(self.loaded, self._limits)
        return self._forms.form(prompt, ids, options, warnings)

    def _assembler(
        self, request: EngineRequest, options: RequestOptions, form: AnswerForm | None, arrived: float
    ) -> TextAssembler:
        num_tokens = len(request.prompt_ids)
        if form is None:
            return TextAssembler(self.tokenizer, request.params, num_tokens, arrived)
        from hayai.frontend_answer import RichAssembler  # as above

        return RichAssembler(self.tokenizer, request.params, num_tokens, arrived, options.generate, form)

    # ------------------------------------------------------------------ asynchronous

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        arrived: float | None = None,
        options: RequestOptions = PLAIN,
        warnings: list[str] | None = None,
    ) -> AsyncGenerator[TextChunk, None]:
        """The answer in chunks, from the engine's own thread (started by the first call). Tokens that are
        ready together come as one chunk.

        arrived: monotonic seconds when the request came in, if that was before now (for its timing).
        warnings: has everything that was done otherwise than asked when the first chunk comes.
        Closing the iterator or cancelling the task stops the request before the next step.
        RequestError before the first chunk; EngineError when the engine fails.
        """
        async with aclosing(
            self.stream_tokens(prompt, params, request_id, arrived, options, warnings)
        ) as parts:
            async for chunks in parts:
                yield join_chunks(chunks)

    async def stream_tokens(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        arrived: float | None = None,
        options: RequestOptions = PLAIN,
        warnings: list[str] | None = None,
        direct: DirectSink | None = None,
    ) -> AsyncGenerator[list[TextChunk], None]:
        """As `stream`, but a chunk per token: what is ready together comes as one list.

        direct: takes chunks on the engine's thread while it can, for one stream at a time; the iterator gives
        the first, the last, and those that it did not take.
        """
        import asyncio  # 20 ms that only asynchronous callers should pay, and they have it already

        from hayai.frontend_async import EventBox, forwarder

        arrived = time.monotonic() if arrived is None else arrived
        if prompt.num_characters < LONG_TEXT:
            ids = self.encode(prompt, options, warnings)
        else:
            ids = await asyncio.to_thread(self.encode, prompt, options, warnings)
        if options.needs_grammar:  # which may take some milliseconds, the first one a tenth of a second
            form = await asyncio.to_thread(self._form, prompt, ids, options, warnings)
        else:
            form = self._form(prompt, ids, options, warnings)
        request = self._request(ids, params, options, request_id, form)
        assembler = self._assembler(request, options, form, arrived)
        box = EventBox(self._loop_mailbox(asyncio.get_running_loop()))
        self.service.start()
        self.service.submit(request, box.post, arrived)
        try:
            while not assembler.finished:
                chunks = _push_all(assembler, await box.take())
                if chunks:
                    yield chunks
                if direct is not None and self._may_divert(box, assembler) and await direct.open():
                    box.divert(forwarder(assembler, direct))
        finally:
            if self._diverted is box:
                box.undivert()
                self._diverted = None
            if not assembler.engine_finished:
                self.service.abort(request.request_id)

    def _may_divert(self, box: EventBox, assembler: TextAssembler) -> bool:
        """Whether the engine's thread may write this stream: one at a time, for several the loop, beside it,
        is cheaper. An answer that its text may end is for the loop to see."""
        if not assembler.plain or assembler.finished or self._diverted not in (None, box):
            return False
        self._diverted = box
        return True

    def _loop_mailbox(self, loop: AbstractEventLoop) -> LoopMailbox:
        from hayai.frontend_async import LoopMailbox  # as above

        mailbox = self._mailbox
        if mailbox is None or mailbox.loop is not loop:
            mailbox = self._mailbox = LoopMailbox(loop)
        return mailbox

    # ------------------------------------------------------------------ synchronous

    def iterate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        options: RequestOptions = PLAIN,
        warnings: list[str] | None = None,
    ) -> Generator[TextChunk, None, None]:
        """The answer in chunks. Errors in the prompt are raised here, not at the first chunk.

        Closing the iterator stops the request.
        """
        arrived = time.monotonic()
        ids = self.encode(prompt, options, warnings)
        form = self._form(prompt, ids, options, warnings)
        request = self._request(ids, params, options, form=form)
        return self._iterate(request, self._assembler(request, options, form, arrived), arrived)

    def _iterate(
        self, request: EngineRequest, assembler: TextAssembler, arrived: float
    ) -> Generator[TextChunk, None, None]:
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
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        options: RequestOptions = PLAIN,
        warnings: list[str] | None = None,
    ) -> list[Completion]:
        """Answers to all prompts, run together; in the order of the prompts.

        params: for all prompts, or one per prompt. All prompts are checked before the first one runs.
        """
        arrived = time.monotonic()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} sampling parameters", param="params")
        requests = []
        forms: dict[str, AnswerForm | None] = {}
        for prompt, own in zip(prompts, each, strict=True):
            ids = self.encode(prompt, options, warnings)
            form = self._form(prompt, ids, options, warnings)
            requests.append(self._request(ids, own, options, form=form))
            forms[requests[-1].request_id] = form
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        running: dict[str, TextAssembler] = {}
        chunks: dict[str, list[TextChunk]] = {request.request_id: [] for request in requests}
        try:
            for request in requests:
                self.service.submit(request, events.put, arrived)
                running[request.request_id] = self._assembler(
                    request, options, forms[request.request_id], arrived
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
        whole.prompt_logprobs,
        whole.reasoning,
        join_calls(whole.tool_calls),
    )
