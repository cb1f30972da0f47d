"""What a request may carry beside prompt and sampling, on its way to the engine and back."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from frontend_fakes import START, MakeFrontend, ids, says
from hayai.engine.request import EngineRequest, Logprob, SamplingParams, TokenEvent
from hayai.errors import RequestError
from hayai.frontend import Prompt, Usage
from hayai.frontend_answer import RichAssembler
from hayai.frontend_request import RequestOptions, Tool
from hayai.frontend_text import TextChunk, join_chunks

GREEDY = SamplingParams(temperature=0.0)


async def test_every_option_reaches_the_engine(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab"))
    seen: list[EngineRequest] = []
    submit = frontend.service.submit

    def watch(request: EngineRequest, *rest: object) -> None:
        seen.append(request)
        submit(request, *rest)  # type: ignore[arg-type]

    frontend.service.submit = watch  # type: ignore[method-assign, assignment]
    options = RequestOptions(priority=10, tenant="a", cache_salt="s", deadline=1e12)
    async with aclosing(frontend.stream(START, GREEDY, options=options)) as chunks:
        assert "".join([chunk.text async for chunk in chunks]) == "ab"
    list(frontend.iterate(START, GREEDY, options))
    frontend.generate([START], GREEDY, options)
    frontend.generate([START], GREEDY)
    assert [(r.priority, r.tenant, r.cache_salt, r.deadline) for r in seen] == [(10, "a", "s", 1e12)] * 3 + [
        (0, "", "", None)
    ]


async def test_only_scoring_the_prompt_gives_one_chunk_without_text(make_frontend: MakeFrontend) -> None:
    for answer in (says("ab", "c"), says()):
        frontend, runner = make_frontend(answer)
        options = RequestOptions(generate=False)
        async with aclosing(frontend.stream(START, GREEDY, options=options)) as stream:
            (chunk,) = [chunk async for chunk in stream]
        assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("", (), "length")
        assert chunk.usage == Usage(2, 0) and len(runner.steps) == 1


def test_prompt_logprobs_come_with_the_first_chunk() -> None:
    scores = (None, Logprob(5, -0.5))
    first = TokenEvent("r", ids("ab")[0], prompt_logprobs=scores)
    last = TokenEvent("r", ids("c")[0], "length")
    assembler = RichAssembler(None, GREEDY, 2, 0.0)
    chunks = [chunk for event in (first, last) if (chunk := assembler.push(event)) is not None]
    assert [chunk.prompt_logprobs for chunk in chunks] == [scores, None]
    assert join_chunks(chunks).prompt_logprobs == scores
    scored = RichAssembler(None, GREEDY, 2, 0.0, generate=False).push(first._replace(finish_reason="stop"))
    assert scored is not None and scored.prompt_logprobs == scores and scored.finish_reason == "length"
    assert scored.token_ids == () and scored.logprobs == ()


def test_a_deadline_ends_the_answer_where_it_is() -> None:
    assembler = RichAssembler(None, GREEDY, 2, 0.0)
    assembler.push(TokenEvent("r", 40))
    last = assembler.push(TokenEvent("r", -1, "timeout"))
    assert last == TextChunk("", finish_reason="timeout", usage=Usage(2, 1), timing=last and last.timing)
    assert assembler.finished and assembler.engine_finished


def test_text_of_tokens_and_back(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend()
    text = "<|im_start|>hello é"
    assert frontend.decode(frontend.encode(Prompt(text=text))) == text
    assert frontend.count(Prompt(text=text)) == len(frontend.encode(Prompt(text=text)))
    with pytest.raises(RequestError, match="token id 999 is not in the vocabulary") as info:
        frontend.decode([999])
    assert info.value.param == "tokens"
    bare, _ = make_frontend(vocabulary=False)
    with pytest.raises(RequestError, match="no vocabulary"):
        bare.decode([5])


def test_what_it_says_of_itself(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend(says("ab"))
    frontend.generate([START], GREEDY)
    assert frontend.stats().finished == {"stop": 1}
    assert frontend.describe()["model"] == "fake"


@pytest.mark.parametrize(
    ("kw", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"tools": (Tool("f"), Tool("f"))}, "tools"),
        ({"tools": (Tool("f"),), "forced_tool": "g"}, "tool_choice"),
        ({"forced_tool": "g"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_options_that_make_no_sense(kw: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as info:
        RequestOptions(**kw)  # type: ignore[arg-type]
    assert info.value.param == param


def test_infill_needs_tokens_for_it(make_frontend: MakeFrontend) -> None:
    frontend, _ = make_frontend()
    with pytest.raises(RequestError, match="fill in the middle") as info:
        frontend.infill("a", "b")
    assert (info.value.param, info.value.code) == ("suffix", "unsupported_parameter")


def test_the_size_of_a_prompt_counts_every_text() -> None:
    parts = [{"type": "text", "text": "abc"}, {"type": "text", "text": "de"}, "x", 3]
    messages = ({"role": "user", "content": parts}, {"role": "user", "content": "fg"}, {"role": "assistant"})
    assert Prompt(messages=messages).num_characters == 8
    assert Prompt(text="abc").num_characters == 3 and Prompt(token_ids=(1,)).num_characters == 0
