"""Where two answers differ, word by word: for the terminal and for the report."""

import re
from difflib import SequenceMatcher

# A character of a script without spaces, a word or a sign, each with the spaces after it.
_HAN_KANA = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"(?:[{_HAN_KANA}]|[^\W{_HAN_KANA}]+|[^\w\s])\s*|\s+")

Parts = list[tuple[str, bool]]


def differences(a: str, b: str) -> tuple[Parts, Parts]:
    """The two texts in parts, each with whether the other text has something else, or nothing, in its place.

    Spaces alone make no difference.
    """
    words = WORD.findall(a), WORD.findall(b)
    a_bare, b_bare = ([word.strip() for word in side] for side in words)
    parts: tuple[Parts, Parts] = [], []
    for tag, *spans in SequenceMatcher(None, a_bare, b_bare, autojunk=False).get_opcodes():
        for part, side, start, stop in zip(parts, words, spans[::2], spans[1::2], strict=True):
            text = "".join(side[start:stop])
            if tag == "equal":
                part.append((text, False))
            elif text:
                part.append((text.rstrip(), True))
                part.append((text[len(text.rstrip()) :], False))  # the space after it
    return parts
