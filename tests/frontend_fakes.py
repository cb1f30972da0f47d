"""A small vocabulary, and models that say what a test tells them to say."""

from __future__ import annotations

from collections.abc import Callable

from engine_fakes import FakeRunner, Reply
from hayai.frontend import Frontend, Prompt
from hayai.text.tokenizer import Tokenizer

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "ab c", "E N", "EN D", "S T", "O P", "ST OP", "l l", "h e", "he ll", "hell o"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's spelling of the 256 bytes (Radford et al. 2019, encoder.py): printable ones as themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _metadata() -> dict[str, object]:
    tokens = CONTROL + byte_letters() + [merge.replace(" ", "") for merge in MERGES]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


TOKENIZER = Tokenizer.from_metadata(_metadata())
assert TOKENIZER is not None

START = Prompt(token_ids=(20, 1))
"""What `says` continues."""


def ids(*pieces: str | bytes | int) -> list[int]:
    """Token ids: a string that is one token, single bytes, or ids as they are."""
    assert TOKENIZER is not None
    found: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            found.append(piece)
        elif isinstance(piece, bytes):
            found += [3 + byte for byte in piece]
        elif piece in TOKENIZER.vocabulary.ids:
            found.append(TOKENIZER.vocabulary.ids[piece])
        else:
            found += [3 + byte for byte in piece.encode()]
    return found


def says(*pieces: str | bytes | int) -> Reply:
    """A model that answers START with these tokens, and then with the end token for ever."""
    answer = ids(*pieces)
    return lambda past: answer[len(past) - 2] if len(past) - 2 < len(answer) else 2


MakeFrontend = Callable[..., tuple[Frontend, FakeRunner]]
"""Type of the fixture `make_frontend`."""
