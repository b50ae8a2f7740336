"""Texts that tokenizers are known to alter."""

from collections.abc import Iterable

_SPACES = (
    " ",
    "  ",
    " a",
    "  a",
    "a ",
    "a  ",
    "a b",
    "a  b",
    " a\n b ",
    "\n",
    "\r\n",
    "\t",
    "\t a",
)
_MARKS = ("\u2581", "a\u2581b", " \u2581 ", "\u2581a", "##a", "<0x0A>", "\u0120", "@@ ", "</w>")
_FORMS = (
    "Ab",  # case folding
    "e\u0301",  # a letter and its accent: NFC joins them
    "\u00e9",  # the letter with its accent: NFD parts them
    "\u1e9b\u0323",  # differs under NFC, NFD, NFKC and NFKD
    "\ufb01 \uff21 \u2460 \u00bd",  # compatibility forms: NFKC unfolds them
    "\uf900",  # a compatibility ideograph: even NFC replaces it
    "\u00df\u0130\u0131",
    "\u200b\u200d\ufeff\u00ad",  # characters without width
    "\u00a0\u2003\u3000\u2028\u0085",  # spaces and line ends that some take for a blank
    "``quoted''",
    "\u201cquoted\u201d\u2026",
    "don't n't do not",  # clean-up of English spacing on decoding
    "a , b . c !",
)
_EMOJI = ("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1ef\U0001f1f5")


def probes(special_tokens: Iterable[str]) -> list[str]:
    """Returns short difficult texts, and one of every hundredth character of Unicode.

    Args:
      special_tokens: texts of special tokens; inside a text they are to be plain text.
    """
    ascii_text = "".join(map(chr, range(128)))
    points = [*range(0x80, 0xD800, 101), *range(0xE000, 0x110000, 4099)]
    sampled = ["".join(map(chr, points[k : k + 64])) for k in range(0, len(points), 64)]
    named = [f"a{text}b" for text in list(special_tokens)[:16]]
    alone = list(special_tokens)[:16]
    return ["", ascii_text, *_SPACES, *_MARKS, *_FORMS, *_EMOJI, *named, *alone, *sampled]
