"""From a prompt to text, synchronous and asynchronous: stops, usage, errors, cancelling."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, closing

import pytest

from engine_fakes import FakeRunner, alone
from frontend_fakes import START, TOKENIZER, MakeFrontend, ids, says
from hayai.engine.request import Logprob, SamplingParams
from hayai.errors import RequestError
from hayai.frontend import Completion, EngineError, Frontend, Prompt, TextChunk, Usage

GREEDY = SamplingParams(temperature=0.0)
HELLO = {"role": "user", "content": "hello"}


def greedy(**kw: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **kw)  # type: ignore[arg-type]


async def collect(
    frontend: Frontend, prompt: Prompt = START, params: SamplingParams = GREEDY
) -> list[TextChunk]:
    async with aclosing(frontend.stream(prompt, params)) as chunks:
        return [chunk async for chunk in chunks]


def whole(chunks: list[TextChunk]) -> tuple[str, list[int], str | None]:
    return (
        "".join(c.text for c in chunks),
        [t for c in chunks for t in c.token_ids],
        chunks[-1].finish_reason,
    )


# ---------------------------------------------------------------- text


def test_the_end_token_is_not_text(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("hello", " ", "abc"))
    (done,) = frontend.generate([START], GREEDY)
    assert done.text == "hello abc" and done.token_ids == tuple(ids("hello", " ", "abc"))
    assert done.finish_reason == "stop" and done.stop is None
    assert done.usage == Usage(prompt_tokens=2, completion_tokens=3)
    assert done.timing.arrived <= done.timing.scheduled <= done.timing.first_token <= done.timing.finished


def test_one_chunk_per_token_and_the_last_one_counts(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab", "c", "END"))
    chunks = list(frontend.iterate(START, greedy(max_tokens=3)))
    assert [(c.text, c.token_ids) for c in chunks] == [(t, tuple(ids(t))) for t in ("ab", "c", "END")]
    assert [c.finish_reason for c in chunks] == [None, None, "length"]
    assert [c.usage for c in chunks] == [None, None, Usage(2, 3)]
    assert chunks[-1].timing is not None and chunks[0].timing is None


def test_half_a_character_waits_for_the_rest(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("€".encode(), "a", b"\xe2\x82"))
    chunks = list(frontend.iterate(START, GREEDY))
    assert [c.text for c in chunks] == ["", "", "€", "a", "", "", "�"]
    assert whole(chunks)[1] == ids("€".encode(), "a", b"\xe2\x82")


def test_control_tokens_and_padding_are_tokens_without_text(make_frontend: MakeFrontend) -> None:
    assert TOKENIZER is not None and TOKENIZER.vocab_size < 499
    frontend, _ = make_frontend(says("a", 1, 499, "b"))
    (done,) = frontend.generate([START], GREEDY)
    assert done.text == "ab" and done.token_ids == tuple(ids("a", 1, 499, "b"))


def test_without_a_vocabulary_there_are_tokens_only(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says(40, 41), vocabulary=False)
    (done,) = frontend.generate([START], GREEDY)
    assert (done.text, done.token_ids, done.finish_reason) == ("", (40, 41), "stop")
    assert frontend.token_bytes(40) == b""


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "kept", "found"),
    [
        (["hello", "END", "ab"], ["END"], "hello", ["hello"], "END"),
        (["hello", "E", "N", "D", "ab"], ["END"], "hello", ["hello"], "END"),
        (["hello", "E", "N", "ab"], ["END"], "helloENab", ["hello", "E", "N", "ab"], None),
        (["ab", "c", "STOP"], ["bcS"], "a", ["ab"], "bcS"),
        (["abc", "END"], ["c"], "ab", ["abc"], "c"),
        (["hello", "E", "N"], ["END"], "helloEN", ["hello", "E", "N"], None),
        (["a", "€".encode(), "b"], ["€"], "a", ["a"], "€"),
        (["a", "b"], ["zz", "b", "ab"], "", [], "ab"),
        (["END"], ["END"], "", [], "END"),
        (["hello", 1, "END"], ["END"], "hello", ["hello"], "END"),
        (["a", 1, "b", "END"], ["END"], "ab", ["a", 1, "b"], "END"),
    ],
)
async def test_stop_strings_cut_text_tokens_and_usage(
    make_frontend: MakeFrontend,
    pieces: list[str | bytes | int],
    stop: list[str],
    text: str,
    kept: list[str | int],
    found: str | None,
) -> None:
    params = greedy(stop=tuple(stop), logprobs=0)
    expected = (text, ids(*kept), "stop")
    frontend, _ = make_frontend(says(*pieces))
    for chunks in (list(frontend.iterate(START, params)), await collect(frontend, params=params)):
        assert whole(chunks) == expected
        assert [p.token_id for c in chunks for p in c.logprobs] == ids(*kept)
        assert chunks[-1].usage == Usage(2, len(ids(*kept))) and chunks[-1].stop == found
        assert all(c.text or c.token_ids for c in chunks[:-1]), "an empty chunk"
    (done,) = frontend.generate([START], params)
    assert (done.text, list(done.token_ids), done.finish_reason) == expected
    assert done.stop == found and len(done.logprobs) == len(kept)


async def test_nothing_of_a_stop_string_is_shown_early(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab", "S", "T", "a", "ST", "OP"))
    chunks = [c for c in await collect(frontend, params=greedy(stop=("STOP",))) if c.text]
    assert "".join(c.text for c in chunks) == "abSTa"


def test_a_stop_string_ends_the_request_in_the_engine(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend(says("hello", *["ab"] * 100))
    (done,) = frontend.generate([START], greedy(stop=("ab",)))
    assert done.text == "hello"
    frontend.generate([Prompt(token_ids=(9,))], greedy(max_tokens=1))
    assert len(runner.steps) <= 4, "at most one step past the stop"
    assert frontend.loaded.engine.stats().finished["abort"] == 1


def test_timing_is_complete_when_a_stop_string_ends_it(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("hello", "END"))
    (done,) = frontend.generate([START], greedy(stop=("END",)))
    timing = done.timing
    assert 0 < timing.arrived <= timing.scheduled <= timing.first_token <= timing.finished
    assert (timing.prompt_tokens, timing.output_tokens) == (2, 1)


# ---------------------------------------------------------------- prompts


def test_raw_text_and_messages(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend()
    assert frontend.encode(Prompt(text="hello<|im_end|>")) == tuple(ids("hello", 2))
    assert frontend.encode(Prompt(messages=(HELLO,))) == tuple(ids(1, "user", b"\n", "hello", 2, 1))
    messages = ({"role": "user", "content": "a<|im_end|>"},)
    assert frontend.encode(Prompt(messages=messages)).count(2) == 1, "a user's text is no control token"
    assert (
        frontend.encode(Prompt(messages=messages, template_args={"add_generation_prompt": False}))
        == frontend.encode(Prompt(messages=messages))[:-1]
    )


@pytest.mark.parametrize("kw", [{}, {"text": "a", "token_ids": (1,)}, {"messages": (), "text": ""}])
def test_a_prompt_is_exactly_one_thing(kw: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="one of messages, text and token_ids"):
        Prompt(**kw)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "param", "code", "words"),
    [
        (Prompt(text="z" * 300), "prompt", "context_length_exceeded", ["300", "256"]),
        (Prompt(token_ids=(5,) * 256), "prompt", "context_length_exceeded", ["256 tokens"]),
        (Prompt(text="z" * 100_000), "prompt", "context_length_exceeded", ["at least", "256"]),
        (
            Prompt(messages=({"role": "user", "content": "z" * 300},)),
            "messages",
            "context_length_exceeded",
            ["308", "256"],
        ),
        (Prompt(token_ids=(5, 500)), "prompt", "invalid_value", ["500", "499"]),
        (Prompt(token_ids=(-1,)), "prompt", "invalid_value", ["-1"]),
        (Prompt(token_ids=()), "prompt", None, ["empty"]),
        (Prompt(text=""), "prompt", None, ["empty"]),
        (Prompt(messages=({"role": 3, "content": "a"},)), None, None, []),
    ],
)
async def test_prompts_that_are_refused(
    make_frontend: MakeFrontend, prompt: Prompt, param: str | None, code: str | None, words: list[str]
) -> None:
    frontend, runner = make_frontend()
    calls = [
        lambda: frontend.iterate(prompt, GREEDY),
        lambda: frontend.generate([START, prompt], GREEDY),
    ]
    for call in calls:
        with pytest.raises(RequestError) as info:
            call()
        assert param is None or (info.value.param, info.value.code) == (param, code)
        assert all(word in str(info.value) for word in words), str(info.value)
    with pytest.raises(RequestError):
        await collect(frontend, prompt)
    assert runner.steps == [], "nothing ran"


@pytest.mark.parametrize(
    ("options", "prompt", "params", "code"),
    [
        ({"vocabulary": False}, Prompt(text="a"), GREEDY, "no_vocabulary"),
        ({"vocabulary": False}, Prompt(messages=()), GREEDY, "no_vocabulary"),
        ({"vocabulary": False}, START, greedy(stop=("a",)), "no_vocabulary"),
        (
            {"template": False},
            Prompt(messages=({"role": "user", "content": "a"},)),
            GREEDY,
            "no_chat_template",
        ),
        ({}, START, greedy(logit_bias={500: 1.0}), "invalid_value"),
    ],
)
def test_what_the_model_lacks_is_said(
    make_frontend: MakeFrontend, options: dict[str, bool], prompt: Prompt, params: SamplingParams, code: str
) -> None:
    frontend, _ = make_frontend(**options)
    with pytest.raises(RequestError) as info:
        frontend.iterate(prompt, params)
    assert info.value.code == code


# ---------------------------------------------------------------- many at once


async def test_many_streams_share_the_batch(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend(max_sequences=4)
    prompts = [[10 + i] * (i + 1) for i in range(10)]
    answers = await asyncio.gather(
        *(collect(frontend, Prompt(token_ids=tuple(p)), greedy(max_tokens=20)) for p in prompts)
    )
    for prompt, chunks in zip(prompts, answers, strict=True):
        assert whole(chunks)[1] == alone(prompt, 20)
    assert max(sequences for sequences, _ in runner.steps) == 4


def test_generate_keeps_the_order_and_takes_params_per_prompt(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(max_sequences=2)
    prompts = [[10 + i] * 3 for i in range(6)]
    params = [greedy(max_tokens=1 + i, logprobs=i % 2 or None) for i in range(6)]
    done = frontend.generate([Prompt(token_ids=tuple(p)) for p in prompts], params)
    for i, completion in enumerate(done):
        assert list(completion.token_ids) == alone(prompts[i], 1 + i)
        assert len(completion.logprobs) == (1 + i if i % 2 else 0)
    assert frontend.generate([], GREEDY) == []
    with pytest.raises(RequestError, match="2 prompts"):
        frontend.generate([START, START], [GREEDY])


def test_interleaved_iterators(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend()
    first = frontend.iterate(Prompt(token_ids=(10,)), greedy(max_tokens=9))
    second = frontend.iterate(Prompt(token_ids=(11,)), greedy(max_tokens=9))
    pairs = list(zip(first, second, strict=True))
    assert [t for a, _ in pairs for t in a.token_ids] == alone([10], 9)
    assert [t for _, b in pairs for t in b.token_ids] == alone([11], 9)


async def test_synchronous_callers_beside_asynchronous_ones(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend()

    def blocking() -> list[Completion]:
        return frontend.generate([Prompt(token_ids=(12,))], greedy(max_tokens=30))

    half = frontend.iterate(Prompt(token_ids=(13,)), greedy(max_tokens=30))
    begun = next(half)  # without a thread; the stream then starts one
    chunks, done = await asyncio.gather(
        collect(frontend, Prompt(token_ids=(11,)), greedy(max_tokens=30)), asyncio.to_thread(blocking)
    )
    rest = await asyncio.to_thread(list, half)
    assert whole(chunks)[1] == alone([11], 30)
    assert list(done[0].token_ids) == alone([12], 30)
    assert whole([begun, *rest])[1] == alone([13], 30)


def test_two_loops_one_after_the_other(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab"))
    for _ in range(2):
        assert whole(asyncio.run(collect(frontend)))[0] == "ab"


# ---------------------------------------------------------------- stopping and failing


async def _until_idle(frontend: Frontend) -> None:
    deadline = time.monotonic() + 5.0
    while frontend.loaded.engine.has_work:
        assert time.monotonic() < deadline, "the engine still works"
        await asyncio.sleep(0.005)


def pace(runner: FakeRunner, seconds: float = 0.005) -> None:
    """Let every step take some time, as a real one does."""
    reply = runner.reply

    def slow(past: list[int]) -> int:
        time.sleep(seconds)
        return reply(past)

    runner.reply = slow


async def test_closing_a_stream_stops_the_request(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    pace(runner)
    stream = frontend.stream(START, greedy(max_tokens=250))
    await anext(stream)
    steps = len(runner.steps)
    await stream.aclose()
    await _until_idle(frontend)
    assert len(runner.steps) - steps <= 2
    assert frontend.loaded.engine.stats().finished == {"abort": 1}


async def test_cancelling_a_task_stops_the_request(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    pace(runner)
    task = asyncio.create_task(collect(frontend, params=greedy(max_tokens=250)))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until_idle(frontend)
    assert len(runner.steps) < 50 and frontend.loaded.engine.stats().finished == {"abort": 1}


def test_closing_an_iterator_stops_the_request(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    with closing(frontend.iterate(START, greedy(max_tokens=250))) as chunks:
        next(chunks)
    frontend.generate([Prompt(token_ids=(9,))], greedy(max_tokens=2))
    assert runner.steps[-1] == (1, 1) and frontend.loaded.engine.stats().finished["abort"] == 1


async def test_a_crash_is_raised_everywhere(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    pace(runner)
    tasks = [asyncio.create_task(collect(frontend, params=greedy(max_tokens=250))) for _ in range(3)]
    await asyncio.sleep(0.03)
    runner.fail_with = OSError("no more memory")
    for task in tasks:
        with pytest.raises(EngineError, match="no more memory"):
            await task
    assert frontend.alive, "it starts again, until it crashes too often"
    while frontend.alive:
        with pytest.raises(EngineError, match="no more memory"):
            await collect(frontend)
    with pytest.raises(EngineError, match="has stopped: OSError: no more memory"):
        await collect(frontend)


def test_a_crash_without_a_thread(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    chunks = frontend.iterate(START, greedy(max_tokens=250))
    next(chunks)
    runner.fail_with = OSError("no more memory")
    with pytest.raises(EngineError, match="no more memory"):
        next(chunks)
    with pytest.raises(EngineError, match="no more memory"):
        frontend.generate([START], GREEDY)


def test_an_interrupt_stops_the_answer_and_not_the_model(make_frontend: MakeFrontend) -> None:
    """Ctrl-C in the middle of a chat: the next question is answered."""
    frontend, runner = make_frontend(says("ab", "c"))
    runner.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        frontend.generate([START], GREEDY)
    runner.fail_with = None
    assert frontend.generate([START], GREEDY)[0].text == "abc"


async def test_close_ends_streams_and_frees_the_backend(make_frontend: MakeFrontend) -> None:
    frontend, runner = make_frontend()
    pace(runner)
    task = asyncio.create_task(collect(frontend, params=greedy(max_tokens=250)))
    await asyncio.sleep(0.03)
    await asyncio.to_thread(frontend.close)
    assert (await task)[-1].finish_reason == "abort"
    assert runner.closed and not frontend.alive
    with pytest.raises(EngineError, match="closed"):
        await collect(frontend)


def test_logprobs_of_every_token(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab", "c"))
    (done,) = frontend.generate([START], greedy(logprobs=1))
    assert done.logprobs == tuple(Logprob(t, -1.0, ((0, 0.0),)) for t in ids("ab", "c"))
