"""Writes what llama.cpp makes of the strings in corpus.py, for test_against_llamacpp.py.

Run by hand, in this folder, with `llama-cpp-python` and `gguf` installed: `python make_expected.py MODEL`
* expected_smollm.json.gz: ids with the default model's vocabulary, special tokens in the text off and on;
* expected_synthetic.json.gz: checksums of the ids with the vocabularies of synthetic.py.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import gguf
import llama_cpp
from corpus import fixed_strings, random_strings
from synthetic import PRE_NAMES, SPECIAL, bpe_metadata, comparable, spm_metadata

SMOLLM_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<empty_output>",
    "<issue_start>",
)


class Vocabulary:
    """llama.cpp's tokenizer of a file."""

    def __init__(self, path: str) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        assert self.model, path
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: bytes, *, special: bool) -> list[int]:
        room = len(text) + 16
        ids = (llama_cpp.llama_token * room)()
        return list(ids[: llama_cpp.llama_tokenize(self.vocab, text, len(text), ids, room, False, special)])

    def piece(self, token_id: int) -> bytes:
        room = ctypes.create_string_buffer(1024)
        size = llama_cpp.llama_token_to_piece(self.vocab, token_id, room, 1024, 0, True)
        return room.raw[:size]

    def ends(self) -> list[int]:
        return [i for i in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, i)]


def write_gguf(metadata: dict[str, object], path: str) -> None:
    """A file with nothing but a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def checksums(metadata: dict[str, object], strings: Iterable[bytes]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vocabulary.gguf"
        write_gguf(metadata, path)
        vocabulary = Vocabulary(path)
        pairs = [[vocabulary.encode(s, special=False), vocabulary.encode(s, special=True)] for s in strings]
    return [zlib.crc32(json.dumps(pair).encode()) for pair in pairs]


def smollm(model: str) -> dict[str, object]:
    vocabulary = Vocabulary(model)
    cases = []
    for string in dict.fromkeys([*fixed_strings(), *random_strings(3000, 1, SMOLLM_SPECIAL)]):
        plain = vocabulary.encode(string, special=False)
        special = vocabulary.encode(string, special=True)
        cases.append([string.decode("utf-8", "surrogateescape"), plain, *([special] * (special != plain))])
    pieces = [vocabulary.piece(i).decode("latin-1") for i in range(0, vocabulary.size, 29)]
    return {"end_ids": vocabulary.ends(), "every_29th_piece": pieces, "cases": cases}


def synthetic() -> dict[str, object]:
    strings = list(dict.fromkeys([*fixed_strings(), *random_strings(300, 3, SPECIAL)]))
    texts = [string.decode("utf-8", "surrogateescape") for string in strings]
    bpe = {}
    for name in PRE_NAMES:
        wanted = [i for i, text in enumerate(texts) if comparable(name, text)]
        sums = checksums(bpe_metadata(name), (strings[i] for i in wanted))
        bpe[name] = list(zip(wanted, sums, strict=True))
    valid = [
        i for i, text in enumerate(texts) if text.isascii() or text.encode(errors="replace") == strings[i]
    ]
    spm = {}
    for across in (False, True):
        for prefix in (False, True):
            sums = checksums(spm_metadata(across=across, space_prefix=prefix), (strings[i] for i in valid))
            spm[f"{int(across)}{int(prefix)}"] = list(zip(valid, sums, strict=True))
    return {"texts": texts, "bpe": bpe, "spm": spm}


def main(model: str) -> None:
    for name, expected in (("smollm", smollm(model)), ("synthetic", synthetic())):
        target = Path(__file__).with_name(f"expected_{name}.json.gz")
        data = json.dumps({"llama_cpp": llama_cpp.__version__, **expected}, separators=(",", ":")).encode()
        target.write_bytes(gzip.compress(data, 9, mtime=0))
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
