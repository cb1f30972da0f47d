"""Strings that are hard on a tokenizer, made by rule: the same for every run, no text of anybody's."""

from __future__ import annotations

import random

_WORDS = (
    "the", "quick", "Brown", "fox's", "jumps", "can't", "WE'LL", "I'm", "they'Ve", "naïve", "Zürich", "señor",
    "Straße", "ПРИВЕТ", "мир", "Ελλάδα", "ǅungla", "İstanbul", "ŉ", "ﬁne", "日本語", "漢字", "かな", "カナ",
    "한국어", "ไทย", "हिन्दी", "বাংলা", "العربية", "עברית", "فارسی", "ქართული", "ᏣᎳᎩ", "ꙮ", "𐐀𐐨", "𝒳𝓎",
    "Å", "e\u0301", "n\u0303", "\u212b",
)  # fmt: skip
_EMOJI = (
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇯🇵🇩🇪", "❤️", "🤷🏾‍♀️", "1️⃣", "☃", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🫠", "©", "‼️",
)  # fmt: skip
_SPACES = (
    " ", "  ", "   ", " " * 7, "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\t\t", "\u00a0", "\u3000", "\u2003",
    "\u200b", "\u2028", "\x85", "\x0b", "\x0c", "\r", "\ufeff", "\x1c", "\u180e", "\u1680",
)  # fmt: skip
_NUMBERS = (
    "0", "7", "42", "123", "2024", "1234567890", "3.14159", "1,000,000", "1e-9", "0xFF", "٣٤٥", "½", "Ⅷ", "²",
    "१२३", "𝟘𝟙",
)  # fmt: skip
_PUNCTUATION = (
    "!", "...", "?!", "--", "—", "…", "(", ")", "[]", "{}", '"', "'", "''", "`", "```", "«»", "、。", "！？",
    "#", "@", "$", "€", "%", "^&*", "~", "|", "||", "<", ">", "</", "/>", "\\", "//", ":=", "=>", "¿", "₿",
    "≤", "→",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x ** 2  # square\n",
    "if (a && b) { c = d->e[0]; }",
    "for(int i=0;i<n;++i){\n\tsum+=v[i];\n}",
    "SELECT * FROM t WHERE a='b';",
    '<div class="x">y</div>',
    '{"k": [1, 2.5, null]}',
    "x = {\n\t'a': 1,\n}\n",
    "$ ls -la | grep '^d'",
    "https://example.org/a?b=c&d=%20#e",
    "#include <stdio.h>\n",
    "\\frac{a}{b} \\le \\sum_{i=1}^n x_i",
    "C:\\dir\\file.txt",
    "snake_case camelCase PascalCase kebab-case",
    "@@ -1,3 +1,4 @@\n-old\n+new\n",
)
_CONTROL = tuple(
    map(chr, (0, 1, 2, 7, 8, 0x1B, 0x1F, 0x7F, 0x80, 0x9F, 0xAD, 0x200D, 0x202E, 0xFFFD, 0xFFFE, 0xE000))
)
_BROKEN = (
    b"\xff", b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3(", b"\xe2(\xa1", b"\xf0\x28\x8c\xbc",
    b"\xfe\xff", b"a\xccb",
)  # fmt: skip
_RANGES = (  # of assigned and some unassigned code points
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x20CF),
    (0x2100, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFDFF),
    (0xFF00, 0xFFEF),
    (0x10000, 0x1018F), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
)  # fmt: skip


def _characters(random_: random.Random, count: int) -> str:
    out: list[str] = []
    while len(out) < count:
        low, high = random_.choice(_RANGES)
        out.append(chr(random_.randint(low, high)))
        if random_.random() < 0.3:
            out.append(random_.choice(_SPACES))
    return "".join(out)


def fixed_strings() -> list[bytes]:
    """Every building block alone, and the small combinations at which words are cut."""
    blocks = (*_WORDS, *_EMOJI, *_SPACES, *_NUMBERS, *_PUNCTUATION, *_CODE, *_CONTROL)
    out = [block.encode() for block in blocks]
    neighbours = (("a", "b"), ("", "x"), ("x", ""), ("1", "2"), (".", ","), ("\n", "y"), ("it's", "'s"))
    out += [f"{left}{space}{right}".encode() for space in _SPACES for left, right in neighbours]
    out += [f"{space}{space}x{space * 3}7{space}".encode() for space in _SPACES]
    out += [b"", *_BROKEN, *(b"x " + broken + b" y" for broken in _BROKEN)]
    counts = (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 129)
    out += [(character * count).encode() for character in " \n\ta1.-=é日😀\u0301" for count in counts]
    return out


def random_strings(count: int, seed: int, special: tuple[str, ...] = ()) -> list[bytes]:
    """`count` mixtures; names in `special` (special tokens, whole, cut or run together) are strewn in."""
    random_ = random.Random(seed)
    kinds = [_WORDS, _WORDS, _WORDS, _EMOJI, _SPACES, _SPACES, _NUMBERS, _PUNCTUATION, _CODE, _CONTROL]
    out = []
    for _ in range(count):
        parts: list[bytes] = []
        for _ in range(random_.randint(1, 10)):
            roll = random_.random()
            if roll < 0.08:
                parts.append(_characters(random_, random_.randint(1, 5)).encode())
            elif roll < 0.10:
                parts.append(random_.choice(_BROKEN))
            elif special and roll < 0.22:
                name = random_.choice(special)
                forms = (name, name, name[1:], name[:-1], name * 2, f"<{name}>", name.upper())
                parts.append(random_.choice(forms).encode())
            else:
                parts.append(random_.choice(random_.choice(kinds)).encode())
            if random_.random() < 0.5:
                parts.append(b" ")
        out.append(b"".join(parts))
    return out
