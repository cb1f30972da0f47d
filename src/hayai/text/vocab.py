"""The vocabulary as a model file gives it: read, checked and frozen, before any tokenizer is built from it.

The keys are GGUF's (`tokenizer.ggml.*`); values may be lists, tuples or numpy arrays. Everything here is
untrusted: a value of the wrong type or out of range is a ModelError. The rules for special tokens follow
llama.cpp (`llama_vocab::impl::load`), because that is what the files are made for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isnan
from typing import AnyStr, Generic

from hayai.errors import ModelError

# Token types of the GGUF format (tokenizer.ggml.token_type).
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 0, 1, 2, 3, 4, 5, 6

# A token with one of these texts ends a turn and is a control token, whatever type the file gives it.
END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
# The same for fill-in-the-middle padding, repository and file separators: a text never goes on after them.
FIM_END_TEXTS = frozenset({
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "fim_pre": "fim_pre_token_id",
    "fim_suf": "fim_suf_token_id",
    "fim_mid": "fim_mid_token_id",
    "fim_pad": "fim_pad_token_id",
    "fim_rep": "fim_rep_token_id",
    "fim_sep": "fim_sep_token_id",
}
# Tokens around the two halves of a text with a gap, by name; a file may also give them by id.
INFILL_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)
INFILL_ROLES = ("fim_pre", "fim_suf", "fim_mid")
PREFIX = "tokenizer.ggml."


class Joined(Generic[AnyStr]):
    """Many short strings in one, and where each ends: read-only, indexed from 0. As objects of their own the
    tokens of a vocabulary would take some ten times the memory."""

    def __init__(self, parts: Sequence[AnyStr], empty: AnyStr) -> None:
        self._whole: AnyStr = empty.join(parts)
        self._ends = array("I", accumulate(map(len, parts)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> AnyStr:
        """IndexError outside 0 to len - 1."""
        if index < 0:
            raise IndexError(f"index {index} is negative")
        end = self._ends[index]
        return self._whole[self._ends[index - 1] if index else 0 : end]

    def __iter__(self) -> Iterator[AnyStr]:
        whole, start = self._whole, 0
        for end in self._ends:
            yield whole[start:end]
            start = end


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model. `tokens[i]` is the text in the file's own spelling (byte-level letters, '▁')."""

    tokens: Joined[str]
    types: bytes
    scores: tuple[float, ...] | None
    special: Mapping[str, int]  # role (bos, eos, ...) -> id; absent where the file has none
    end_ids: frozenset[int]

    @property
    def ids(self) -> dict[str, int]:
        """The inverse of `tokens`, made anew at each call."""
        return {token: i for i, token in enumerate(self.tokens)}

    def ids_of_type(self, *types: int) -> list[int]:
        """Ids of all tokens of these types, in order."""
        wanted = frozenset(types)
        return [i for i, kind in enumerate(self.types) if kind in wanted]


def sequence(metadata: Mapping[str, object], key: str) -> Sequence[object] | None:
    """The value of `key` as a list; None when it is absent; ModelError when it is not a sequence."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    tolist = getattr(value, "tolist", None)  # a numpy array, without importing numpy
    if tolist is not None:
        value = tolist()
    if not isinstance(value, (list, tuple)):
        raise ModelError(f"{PREFIX}{key} must be an array; found {type(value).__name__}")
    return value


def text(metadata: Mapping[str, object], key: str) -> str | None:
    """The value of `key` as a string, None when absent."""
    value = metadata.get(PREFIX + key)
    if value is None or isinstance(value, str):
        return value
    raise ModelError(f"{PREFIX}{key} must be a string; found {type(value).__name__}")


def flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    """The value of `key` as a boolean."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return default
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ModelError(f"{PREFIX}{key} must be a boolean; found {type(value).__name__}")


def strings(metadata: Mapping[str, object], key: str) -> list[str] | None:
    """The value of `key` as a list of valid Unicode strings (bytes are decoded), None when absent."""
    values = sequence(metadata, key)
    if values is None:
        return None
    kinds = set(map(type, values))
    if kinds == {str}:
        result: list[str] = list(values)  # type: ignore[arg-type]
    else:
        result = [_string(key, i, value) for i, value in enumerate(values)]
    try:
        "".join(result).encode()
    except UnicodeEncodeError:
        for i, value in enumerate(result):
            _string(key, i, value.encode("utf-8", "surrogatepass"))
        raise ModelError(f"{PREFIX}{key} holds text that is not UTF-8") from None
    return result


def _string(key: str, index: int, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise ModelError(f"{PREFIX}{key}[{index}] is not UTF-8: {bytes(value[:40])!r}") from None
    raise ModelError(f"{PREFIX}{key}[{index}] must be a string; found {type(value).__name__}")


def read_vocabulary(
    metadata: Mapping[str, object], tokens: list[str], defaults: Mapping[str, int] | None = None
) -> tuple[Vocabulary, dict[str, int]]:
    """Check tokens, types, scores and special ids; `defaults` are the special ids a tokenizer kind implies.

    With it the ids by token, to build an encoder from: they take 8 MB of 49,152 tokens, and are let go then.

    Raises ModelError for duplicate tokens, wrong lengths or types, and special ids outside the vocabulary.
    """
    if "" in tokens:  # the spelling that llama.cpp gives to an empty token
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise ModelError(
            f"{PREFIX}tokens holds {tokens[twice][:40]!r} twice: as {twice} and {ids[tokens[twice]]}"
        )
    types = _types(metadata, len(tokens))
    special = _special_ids(metadata, len(tokens), defaults or {})
    if not all(role in special for role in INFILL_ROLES):
        for names in INFILL_NAMES:
            if all(name in ids for name in names):
                special |= {role: ids[name] for role, name in zip(INFILL_ROLES, names, strict=True)}
                break
    ends = _mark_ends(metadata, ids, types, special)
    scores = _scores(metadata, len(tokens))
    return Vocabulary(Joined(tokens, ""), bytes(types), scores, special, ends), ids


def _types(metadata: Mapping[str, object], count: int) -> list[int]:
    values = sequence(metadata, "token_type")
    if values is None:
        return [NORMAL] * count
    if len(values) < count:
        raise ModelError(f"{PREFIX}token_type has {len(values)} entries for {count} tokens")
    if set(map(type, values)) - {int}:
        raise ModelError(f"{PREFIX}token_type must hold integers only")
    types: list[int] = list(values[:count])  # type: ignore[arg-type]
    if types and not (min(types) >= 0 and max(types) <= BYTE):
        # a type of which we know nothing: llama.cpp takes such tokens as they are
        types = [kind if 0 <= kind <= BYTE else UNDEFINED for kind in types]
    return types


def _scores(metadata: Mapping[str, object], count: int) -> tuple[float, ...] | None:
    values = sequence(metadata, "scores")
    if values is None:
        return None
    if len(values) < count:
        raise ModelError(f"{PREFIX}scores has {len(values)} entries for {count} tokens")
    if set(map(type, values)) - {int, float} or any(map(isnan, values)):  # type: ignore[arg-type]
        raise ModelError(f"{PREFIX}scores must hold numbers only")
    return tuple(values[:count])  # type: ignore[arg-type]


def _special_ids(metadata: Mapping[str, object], count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    found = {role: default for role, default in defaults.items() if default < count}
    for role, key in SPECIAL_KEYS.items():
        value = metadata.get(PREFIX + key)
        if value is None:
            continue
        item = getattr(value, "item", None)  # a numpy scalar
        value = item() if item is not None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise ModelError(f"{PREFIX}{key} must be an integer; found {type(value).__name__}")
        if not 0 <= value < count:
            raise ModelError(f"{PREFIX}{key} is {value}, outside the vocabulary of {count} tokens")
        found[role] = value
    return found


def _mark_ends(
    metadata: Mapping[str, object], ids: Mapping[str, int], types: list[int], special: Mapping[str, int]
) -> frozenset[int]:
    """Ids that end a turn; turns the type of those known by their text into CONTROL (`types` is changed).

    Unlike llama.cpp, leaves out ordinary tokens that merges make: Qwen's "</s>" is a bit of markup that any
    text can hold, and must neither end a turn nor be a control token that a user can write.
    """
    names = {name for name in END_TEXTS | FIM_END_TEXTS if name in ids}
    if any(types[ids[name]] == NORMAL for name in names):
        merges = frozenset(strings(metadata, "merges") or ())
        names = {name for name in names if types[ids[name]] != NORMAL or not _is_merged(name, merges)}
    named = {ids[name] for name in names}
    for token_id in named:
        types[token_id] = CONTROL
    ends = named | {special[role] for role in END_KEYS if role in special}
    harmony = all(name in ids for name in ("<|return|>", "<|call|>"))
    solar = all(name in ids for name in ("<|calls|>", "<|flush|>"))
    if "<|end|>" in ids and (harmony or solar):  # there it only closes a part of a turn
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = USER_DEFINED
    if "</s>" in ids and ("<|tool_response>" in ids or special.get("eos") == ids.get("<|plamo:eos|>", -1)):
        ends.discard(ids["</s>"])  # an ordinary markup token in these vocabularies
        types[ids["</s>"]] = NORMAL
    return frozenset(ends)


def _is_merged(name: str, merges: frozenset[str]) -> bool:
    return any(f"{name[:cut]} {name[cut:]}" in merges for cut in range(1, len(name)))
