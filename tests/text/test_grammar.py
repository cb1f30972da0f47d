"""Masks keep to their grammar: bit for bit against a parser that takes one token after the other."""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from hayai.config import read_environment
from hayai.errors import RequestError
from hayai.text import grammar as grammars
from hayai.text.grammar import Grammar, GrammarCompiler, GrammarMask
from hayai.text.tokenizer import Tokenizer
from hayai.weights.gguf import GgufFile

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PADDING = 45


def _compiler(metadata: dict[str, object]) -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer is not None
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, tokenizer.end_ids)


KINDS = {
    "bpe": _compiler(synthetic.bpe_metadata("smollm")),
    "spm": _compiler(synthetic.spm_metadata(across=True, space_prefix=False)),
}


def accepts(kind: str, grammar: Grammar, text: str) -> bool:
    tokenizer, compiler = KINDS[kind]
    return follow(compiler.mask(grammar), tokenizer.encode(text, special=False, bos=False))


def follow(mask: GrammarMask, ids: list[int]) -> bool:
    try:
        for token in ids:
            mask.accept(token)
    except ValueError:
        return False
    return mask.complete


def allowed(mask: GrammarMask, num_tokens: int) -> set[int]:
    words = np.full(-(-num_tokens // 32), 0xDEADBEEF, np.uint32)
    mask.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def schema(value: object) -> Grammar:
    return grammars.schema_grammar(value, "response_format")


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            grammars.json_grammar("p"),
            ['{"a": [1, {"b": null}]}', "{}", '{\n  "é": "x"\n}'],
            ["[1]", "3", '{"a": }', "{'a': 1}", " {}", "{} "],
        ),
        (
            schema(PERSON),
            ['{"name": "Ann", "age": 3}', '{"name":"","age":-1}', '{\n    "name": "a",\n    "age": 0\n}'],
            ['{"name": "Ann"}', '{"name": 3, "age": 3}', '{"name": "a", "age": 3, "b": 1}'],
        ),
        (
            grammars.regex_grammar("[0-9]{3}-[a-z]+/x", "p"),
            ["555-ab/x"],
            ["55-ab/x", "555-ab/x1", "x555-a/x"],
        ),
        (
            grammars.lark_grammar('start: "(" start ")" | DIGITS\nDIGITS: /[0-9]+/', "p"),
            ["((12))", "0"],
            ["((1)", "()", "1)"],
        ),
        (
            grammars.lark_grammar('root ::= "[" item ("," item)* "]"\nitem ::= [a-z]+ | [0-9]', "p"),
            ["[ab,3]", "[x]"],
            ["[]", "[ab,33]", "[ab,]"],
        ),
        (
            grammars.choice_grammar(["yes", "yesterday", 'é"\\\n'], "p"),
            ["yes", "yesterday", 'é"\\\n'],
            ["yester", "no", "Yes"],
        ),
    ],
    ids=["json", "schema", "regex", "lark", "gbnf", "choice"],
)  # fmt: skip
def test_every_kind_of_grammar(kind: str, grammar: Grammar, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(kind, grammar, text)] == []
    assert [text for text in bad if accepts(kind, grammar, text)] == []


@pytest.mark.parametrize("text", ["{" + " " * 2 + "}", "{\n\n}", '{"a":' + "\n" * 3 + "1}", '{"a" :  1}'])
def test_white_space_ends(text: str) -> None:
    assert not accepts("bpe", grammars.json_grammar("p"), text)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_has_the_tokens_that_can_be_accepted_and_no_other(kind: str) -> None:
    tokenizer, compiler = KINDS[kind]
    size = tokenizer.vocab_size + PADDING
    mask = compiler.mask(schema(PERSON))
    free = 0
    for token in tokenizer.encode('{"name": "b c", "age": 12}', special=False, bos=False):
        bits = allowed(mask, size)
        fitting = {candidate for candidate in range(size) if _takes(mask, candidate)}
        # Where the text is forced, only the token that the tokenizer would write for it is left.
        assert bits == fitting or (len(bits) == 1 and bits < fitting)
        free += bits == fitting
        mask.accept(token)
    assert free > 4
    assert allowed(mask, size) == set(tokenizer.end_ids)
    mask.accept(min(tokenizer.end_ids))
    with pytest.raises(ValueError):
        mask.accept(tokenizer.encode("a", special=False, bos=False)[0])


def _takes(mask: GrammarMask, token: int) -> bool:
    try:
        mask.accept(token)
    except ValueError:
        return False
    mask.rollback(1)
    return True


def test_control_tokens_and_padding_are_never_allowed() -> None:
    tokenizer, compiler = KINDS["bpe"]
    bits = allowed(compiler.mask(grammars.regex_grammar(r"(.|\n)+", "p")), tokenizer.vocab_size + PADDING)
    assert bits.isdisjoint(tokenizer.special_ids) and max(bits) < tokenizer.vocab_size
    assert len(bits) > 200


def test_a_longer_row_is_closed_at_its_end() -> None:
    tokenizer, compiler = KINDS["bpe"]
    mask = compiler.mask(grammars.regex_grammar(r"(.|\n)+", "p"))
    size = tokenizer.vocab_size + PADDING
    assert allowed(mask, size + 320) == allowed(mask, size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 2**32))
def test_rollback_is_as_if_it_had_not_been(moves: list[int], seed: int) -> None:
    tokenizer, compiler = KINDS["bpe"]
    size = tokenizer.vocab_size + PADDING
    mask, past = compiler.mask(grammars.json_grammar("p")), []
    random = np.random.default_rng(seed)
    for move in moves:
        if move == 0 and past:
            count = int(random.integers(1, len(past) + 1))
            mask.rollback(count)
            del past[-count:]
        elif not past or past[-1] not in tokenizer.end_ids:
            past.append(int(random.choice(sorted(allowed(mask, size)))))
            mask.accept(past[-1])
    fresh = compiler.mask(grammars.json_grammar("p"))
    for token in past:
        allowed(fresh, size)
        fresh.accept(token)
    assert allowed(mask, size) == allowed(fresh, size)


def test_requests_share_the_compilation_and_nothing_else() -> None:
    tokenizer, compiler = KINDS["bpe"]
    first, second = compiler.mask(schema(PERSON)), compiler.mask(schema(PERSON))
    first.accept(tokenizer.encode("{", special=False, bos=False)[0])
    size = tokenizer.vocab_size + PADDING
    assert allowed(first, size) != allowed(second, size)
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(20):
                mask = compiler.mask(schema(PERSON))
                assert follow(mask, tokenizer.encode('{"name":"a","age":1}', special=False, bos=False))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_the_cache_is_bounded() -> None:
    _, compiler = _compiler(synthetic.bpe_metadata("smollm"))
    for number in range(grammars.CACHED_GRAMMARS + 5):
        compiler.mask(grammars.choice_grammar([f"c{number}"], "p"))
    assert len(compiler._compiled) == grammars.CACHED_GRAMMARS


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schema({"not": {"type": "string"}}), ['"not"', "JSON schema"]),
        (lambda: schema({"type": "array", "uniqueItems": True}), ["uniqueItems"]),
        (lambda: schema({"type": "dict"}), ["dict"]),
        (lambda: schema({"$ref": "http://example.com/a"}), ["example.com"]),
        (lambda: schema({"$ref": "#"}), ["no text at all", "back to itself"]),
        (lambda: schema({"allOf": [{"$ref": "#"}]}), ["back to itself"]),
        (
            lambda: schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
            ["a $ref or a rule leads only back to itself"],
        ),
        (lambda: grammars.lark_grammar('start: start "a"', "p"), ["back to itself"]),
        (lambda: schema({"type": "string", "format": "moon"}), ["moon"]),
        (lambda: schema(False), ["false"]),
        (lambda: schema([]), ["list"]),
        (lambda: schema({"enum": ["x" * 300_000]}), ["bytes", str(grammars.LIMITS.max_schema_bytes)]),
        (lambda: schema({"const": {1, 2}}), ["not JSON"]),
        (lambda: schema(_deep(100)), ["deeper", "32"]),
        (lambda: grammars.regex_grammar("(a", "p"), ["unclosed"]),
        (lambda: grammars.regex_grammar("(?=a)b", "p"), ["look-around"]),
        (lambda: grammars.regex_grammar("", "p"), ["empty"]),
        (lambda: grammars.regex_grammar(3, "p"), ["string"]),
        (lambda: grammars.regex_grammar("é" * 9000, "p"), ["18000", "16384"]),
        (lambda: grammars.lark_grammar("start: foo", "p"), ["foo"]),
        (lambda: grammars.lark_grammar("(((", "p"), ["1(1)"]),
        (lambda: grammars.lark_grammar("root ::= (((", "p"), ["GBNF", "Expected"]),
        (lambda: grammars.lark_grammar("root ::= " + "(" * 5000, "p"), ["GBNF"]),
        (lambda: grammars.lark_grammar(" ", "p"), ["empty"]),
        (lambda: grammars.lark_grammar("#" * 70_000, "p"), ["70000"]),
        (lambda: grammars.choice_grammar([], "p"), ["at least one"]),
        (lambda: grammars.choice_grammar("ab", "p"), ["list"]),
        (lambda: grammars.choice_grammar(["a", ""], "p"), ["not empty"]),
        (lambda: grammars.choice_grammar(["a"] * 2000, "p"), ["2000", "1024"]),
    ],
)
def test_what_can_not_be_enforced_is_said(make: Any, words: list[str]) -> None:
    with pytest.raises(RequestError) as info:
        KINDS["bpe"][1].mask(make())
    assert info.value.code == "invalid_grammar" and info.value.param in ("p", "response_format")
    assert all(word in str(info.value) for word in words), str(info.value)
    assert str(info.value).startswith(info.value.param)


def _deep(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


def test_a_schema_may_refer_to_itself_where_there_is_an_end() -> None:
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    assert accepts("bpe", schema(tree), '{"a":{"a":{}}}') and not accepts("bpe", schema(tree), '{"a":1}')


def test_a_schema_can_not_change_our_options() -> None:
    own = {"type": "object", "x-guidance": {"lenient": True, "whitespace_pattern": "[ ]*"}, "not": {}}
    with pytest.raises(RequestError, match='"not"'):
        KINDS["bpe"][1].mask(schema(own))


def test_a_model_without_an_end_token() -> None:
    tokenizer, _ = KINDS["bpe"]
    with pytest.raises(RequestError, match="no end token"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, ()).mask(grammars.json_grammar("p"))


def test_a_grammar_that_explodes_ends_its_own_request_only() -> None:
    tokenizer, compiler = KINDS["bpe"]
    greedy = grammars.lark_grammar('start: start start | "a" | ""', "p")
    mask = compiler.mask(greedy)
    token = tokenizer.encode("a", special=False, bos=False)[0]
    words = np.zeros(-(-(tokenizer.vocab_size + PADDING) // 32), np.uint32)
    with pytest.raises((RuntimeError, ValueError)):
        for _ in range(3000):
            mask.fill(words)
            mask.accept(token)
    other = compiler.mask(schema(PERSON))
    assert follow(other, tokenizer.encode('{"name":"a","age":1}', special=False, bos=False))


# ---------------------------------------------------------------- real schemas


@pytest.mark.model
def test_json_schema_bench(default_model: Path) -> None:
    """MaskBench (JSONSchemaBench, Geng et al. 2025): what is valid passes, what is not does not."""
    data = read_environment().data
    path = None if data is None else data / "json_schema_bench" / "maskbench_sample.jsonl.gz"
    if path is None or not path.exists():
        pytest.skip("needs json_schema_bench below HAYAI_DATA")
    with GgufFile(default_model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)
    count: Counter[str] = Counter()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            try:
                grammar = schema(row["schema"])
                compiler.mask(grammar)
            except RequestError:
                count["refused"] += 1
                continue
            count["compiled"] += 1
            for case in row.get("tests") or ():
                text = json.dumps(case["data"], ensure_ascii=False)
                passed = follow(compiler.mask(grammar), tokenizer.encode(text, special=False, bos=False))
                count[f"{'valid' if case['valid'] else 'invalid'} {'passed' if passed else 'stopped'}"] += 1
    with pytest.raises(RequestError, match="too many"):
        compiler.mask(grammars.regex_grammar("(.{1,1000}){1,1000}", "p"))
    assert count["invalid passed"] == 0, count
    # An object's properties come in the schema's order; a few instances have them otherwise.
    assert count["valid stopped"] <= 0.01 * count["valid passed"], count
    assert count["compiled"] > 3 * count["refused"], count
