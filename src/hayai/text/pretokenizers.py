r"""Pre-tokenizers of byte-level BPE vocabularies: how text is cut into words before merges are applied.

A file names its own in `tokenizer.ggml.pre`. Each entry is a sequence of regular expressions (Oniguruma
syntax); every expression cuts the pieces that the one before left; matches and the text between them are
pieces. Names and expressions are those of llama.cpp (`llm_tokenizer_bpe` in llama-vocab.cpp), except for
TEKKEN and GPT4O: there llama.cpp approximates `\p{Lu}` and `\p{Ll}` by ASCII ranges, and the expressions here
are the ones that the models' own tokenizer.json has.

Left out, because they need more than a sequence of expressions that run in linear time, or because the file's
vocabulary is not byte-level: afmoe, cohere2moe, gemma4, granite-embed-*, kimi-k2, sarvam-moe, superbpe,
tiny_aya, whitespace, youtu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT = r"\p{N}"
DIGITS_3 = r"\p{N}{1,3}"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CASELESS}|{_WORD}|{DIGITS_3}|{_MARKS}|{_SPACES}"
QWEN2 = rf"{_CASELESS}|{_WORD}|{DIGIT}|{_MARKS}|{_SPACES}"
QWEN35 = (
    rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{DIGIT}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Words of one case shape: a capitalised or lower-case word, or capitals.
_HIGH = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOW = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHAPES = (rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*")
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{_SHAPES[0]}|{_SHAPES[1]}|{DIGIT}|{_MARKS_SLASH}|{_SPACES}"
GPT4O = rf"{_SHAPES[0]}{_CASELESS}?|{_SHAPES[1]}{_CASELESS}?|{DIGITS_3}|{_MARKS_SLASH}|{_SPACES}"
JAIS2 = rf"{_CASELESS}|{_WORD}|{DIGITS_3}|{_MARKS}|\s*[\r\n]+|" + "".join(
    rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")
) + r"\s{1}"  # fmt: skip
BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|{DIGIT}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
SEED = rf"{_CASELESS}|{_WORD}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
EXAONE_MOE = (
    rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{DIGIT}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_HAN_KANA = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK3 = rf"{_DEEPSEEK}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
SPARK = rf"{_DEEPSEEK}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_CASED_LETTERS = (  # the cased scripts that DeepSeek LLM lists one by one
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """`splits` in order; `ignore_merges`: a word that is a token is taken whole; `add_bos`: the default."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _named(
    names: str, *splits: str, ignore_merges: bool = False, add_bos: bool = False
) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(splits, ignore_merges, add_bos))


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **_named("default", r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **_named(
        "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat"
        " a.x-4.0 mellum modern-bert mpt olmo jais exaone4 trillion granite-docling",
        GPT2,
    ),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", DIGIT, GPT2),
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        LLAMA3,
        ignore_merges=True,
        add_bos=True,
    ),
    **_named("dbrx smaug-bpe chatglm-bpe", LLAMA3),
    **_named("glm4 glm5", LLAMA3, ignore_merges=True),
    **_named("minicpm5", DIGITS_3, LLAMA3.replace("{1,3}", "+"), ignore_merges=True),
    **_named("jais-2", JAIS2),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", QWEN2),
    **_named("laguna", r"[^\n]+|[\n]+", QWEN2),
    **_named("ufakzeka", QWEN2.removeprefix(f"{_CASELESS}|")),
    **_named("qwen35", QWEN35),
    **_named("bailingmoe bailingmoe2 llada-moe", BAILING),
    **_named("seed-coder", SEED),
    **_named("exaone-moe", EXAONE_MOE),
    **_named("tekken", TEKKEN, ignore_merges=True, add_bos=True),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", GPT4O),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    **_named(
        "deepseek-llm",
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, DIGIT),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", DIGITS_3, _HAN_KANA, DEEPSEEK3),
    **_named("spark2_5", DIGITS_3, _HAN_KANA, SPARK, DIGIT),
    **_named("poro-chat bloom gpt3-finnish", _BLOOM),
    **_named("viking", _BLOOM, DIGIT),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGIT,
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
        add_bos=True,
    ),
}
