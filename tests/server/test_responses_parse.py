"""What a client may get wrong in a body of /v1/responses, and how its items become messages."""

from __future__ import annotations

import re

import httpx
import pytest

from hayai.server.responses_items import read_items, to_messages

URL = "/v1/responses"

BAD = [
    ("input", None, "must be a string or a list"),
    ("input", [], "an empty list"),
    ("input", [5], "must be an object"),
    ("input", [{"role": "robot", "content": "x"}], "must be one of system"),
    ("input", [{"role": "user"}], "null or absent"),
    ("input", [{"role": "user", "content": [{"type": "input_image"}]}], "only text is supported"),
    ("input", [{"type": "item_reference", "id": "x"}], "must be one of message"),
    ("input", [{"type": "function_call", "name": "f", "arguments": "{}"}], "call_id must be a string"),
    ("input", [{"type": "function_call_output", "call_id": "x", "output": "y"}], "no function call has"),
    ("input", [{"role": "user", "content": "x", "id": 5}], "id must be a string"),
    ("previous_response_id", "resp_nothing", "no stored response"),
    ("max_output_tokens", 0, "greater than or equal to 1"),
    ("temperature", 3, "from 0 to 2"),
    ("top_p", 0, "above 0"),
    ("top_logprobs", 2, "needs include"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("include", ["file_search_call.results"], "must be one of"),
    ("metadata", {"a": 1}, "strings up to 512"),
    ("metadata", {str(i): "" for i in range(17)}, "at most 16"),
    ("tools", [{"type": "web_search"}], "only 'function'"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "unknown field"),
    ("tool_choice", "required", "needs tools"),
    ("text", {"format": {"type": "xml"}}, "must be text, json_object or json_schema"),
    ("text", {"format": {"type": "json_schema", "schema": {}}}, "letters, digits"),
    ("text", {"colour": "red"}, "unknown field"),
    ("reasoning", {"effort": "high"}, "no levels of reasoning"),
    ("reasoning", {"effort": "huge"}, "must be one of"),
    ("background", True, "while its client waits"),
    ("conversation", "conv_1", "previous_response_id"),
    ("truncation", "auto", "no input is cut"),
    ("prompt", {"id": "x"}, "not stored"),
    ("messages", [], "unknown field"),
    ("stream_options", {"include_obfuscation": False}, "needs stream"),
]


@pytest.mark.parametrize(("field", "value", "text"), BAD)
def test_bad_field_is_named(http: httpx.Client, field: str, value: object, text: str) -> None:
    reply = http.post(URL, json={"input": "hi", "max_output_tokens": 1, field: value})
    assert reply.status_code == (404 if field == "previous_response_id" else 400), reply.text
    error = reply.json()["error"]
    assert text in error["message"] and re.split(r"[.\[]", error["param"])[0] == field and error["code"]


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=msg_x", "after")],
)
def test_bad_pages_are_named(http: httpx.Client, query: str, param: str) -> None:
    made = http.post(URL, json={"input": "hi", "max_output_tokens": 1}).json()
    reply = http.get(f"{URL}/{made['id']}/input_items?{query}")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert http.get(f"{URL}/{made['id']}?stream=true").status_code == 400


def test_what_has_no_effect_is_told(http: httpx.Client) -> None:
    body = {"input": "hi", "max_output_tokens": 1, "text": {"verbosity": "low"}, "max_tool_calls": 3}
    body |= {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "user": "me"}
    told = http.post(URL, json=body).headers.get_list("x-hayai-warning")
    assert sorted(re.split(r"[.:]", value)[0] for value in told) == [
        "include",
        "max_tool_calls",
        "reasoning",
        "text",
        "user",
    ]


def test_neighbouring_items_of_the_assistant_are_one_message() -> None:
    items = read_items(
        [
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "Yes"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "b", "output": "2"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        ],
        100,
    )  # fmt: skip
    system, user, assistant, *results = to_messages(items)
    assert system == {"role": "system", "content": "Be kind."} and user == {"role": "user", "content": "Hi"}
    assert assistant["content"] == "Yes" and assistant["reasoning_content"] == "hm"
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["f", "g"]
    assert [(r["tool_call_id"], r["content"]) for r in results] == [("b", "2"), ("a", "1")]
    assert [item["id"][:3] for item in items] == ["msg", "msg", "rs_", "msg", "fc_", "fc_", "fco", "fco"]
    assert items[2]["id"] == "rs_1" and len({item["id"] for item in items}) == len(items)
