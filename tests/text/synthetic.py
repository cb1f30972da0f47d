"""Vocabularies made by rule, to compare every pre-tokenizer and the SentencePiece kind with llama.cpp.

No real vocabulary could be shipped for each of them. These are small but show where words are cut: nearly any
two neighbouring bytes (or characters) merge, so a cut in the wrong place changes the ids.
"""

from __future__ import annotations

import random
import string
import unicodedata

SPECIAL = ("<|a|>", "<|a|>b", "<|end|>", "<user>", "<user", "</s>", "<s>", "<unk>", "  <u>")
_TYPES = {"<user>": 4, "<user": 4, "  <u>": 4, "<unk>": 2}

# One name of each distinct entry in the table of pre-tokenizers.
PRE_NAMES = (
    "default", "gpt-2", "smollm", "llama-bpe", "dbrx", "glm4", "minicpm5", "jais-2", "qwen2", "laguna",
    "ufakzeka", "qwen35", "bailingmoe", "seed-coder", "exaone-moe", "tekken", "gpt-4o", "falcon",
    "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "bloom", "viking", "chameleon",
)  # fmt: skip


def comparable(name: str, text: str) -> bool:
    """Whether llama.cpp runs the pre-tokenizer `name` as written on this text.

    It tells upper from lower case in ASCII only (tekken, gpt-4o), sees no white space in ranges of code
    points (deepseek-llm, deepseek-coder), and its tables of symbols may be of another Unicode version.
    """
    beyond = [character for character in text if ord(character) > 127]
    if name in ("tekken", "gpt-4o"):
        return not any(unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lm", "Mn", "Mc", "Me") for c in beyond)
    if name in ("deepseek-llm", "deepseek-coder"):
        return not any(c.isspace() for c in beyond)
    if name in ("deepseek-v3", "spark2_5"):
        return not any(unicodedata.category(c) == "Cn" for c in beyond)
    return True


def bpe_metadata(pre: str) -> dict[str, object]:
    """A byte-level BPE vocabulary: bytes, pairs in ASCII, pairs within UTF-8 sequences, special tokens."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    letter = {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ascii_bytes = [ord(c) for c in string.ascii_letters + string.digits + " \n\t\r.,'-_</>|:"]
    tails = range(0x80, 0xC0)
    pairs = [(a, b) for a in ascii_bytes for b in ascii_bytes]
    pairs += [(head, tail) for head in range(0xC2, 0xF5) for tail in tails] + [
        (a, b) for a in tails for b in tails
    ]
    random.Random(5).shuffle(pairs)
    tokens = [*letter.values(), *(letter[a] + letter[b] for a, b in pairs)]
    merges = [f"{letter[a]} {letter[b]}" for a, b in pairs]
    return _metadata("gpt2", tokens) | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def spm_metadata(*, across: bool, space_prefix: bool) -> dict[str, object]:
    """A scored vocabulary of byte tokens, characters and random joins; `across`: some go on over a space."""
    random_ = random.Random(7)
    characters = [*"▁" + string.ascii_lowercase + string.digits + "éñ日本語かな.,'-<>|/", "▁▁"]
    joins = dict.fromkeys(f"▁{c}" for c in characters)
    while len(joins) < 3000:
        made = random_.choice([*characters, *list(joins)[-400:]]) + random_.choice(characters)
        if len(made) <= 8 and (across or "▁" not in made.lstrip("▁")):
            joins[made] = None
    names = dict.fromkeys([*characters, *joins])
    metadata = _metadata("llama", [f"<0x{byte:02X}>" for byte in range(256)] + list(names))
    scores = [0.0] * (256 + len(SPECIAL)) + [-float(random_.randint(1, 900)) for _ in names]
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    types[len(SPECIAL) : len(SPECIAL) + 256] = [6] * 256
    return metadata | {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": space_prefix}


def _metadata(model: str, tokens: list[str]) -> dict[str, object]:
    names = [*SPECIAL, *tokens]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [_TYPES.get(name, 3) for name in SPECIAL] + [1] * len(tokens),
        "tokenizer.ggml.bos_token_id": names.index("<s>"),
        "tokenizer.ggml.eos_token_id": names.index("</s>"),
        "tokenizer.ggml.unknown_token_id": names.index("<unk>"),
    }
