"""WikiText as lm-evaluation-harness scores it: its detokenizer and its count of words.

The task ``wikitext`` (version 2.0) scores each detokenized page and divides by the words and bytes
of the page as it was. Its definition is followed here, with its quirks.
"""

import re

_FIXED = (  # in this order
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETS = tuple(
    (re.compile(rf"{left}\s*([^{right}]*?)\s*{right}"), rf"{plain[0]}\1{plain[-1]}")
    for left, right, plain in (
        (r"\(", r"\)", "()"),
        (r"\[", r"\]", "[]"),
        ("{", "}", "{}"),
        ('"', '"', '""'),
        ("'", "'", "''"),
    )
)
_DEGREE = chr(176)
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (f" {_DEGREE} ", _DEGREE),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """Undo WikiText's tokenization: spaces before punctuation, ``@-@``, padded brackets."""
    for old, new in _FIXED:
        page = page.replace(old, new)
    for pattern, new in _BRACKETS:
        page = pattern.sub(new, page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def count_words(page: str) -> int:
    """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
    return len(re.split(r"\s+", page))
