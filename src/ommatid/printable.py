"""Text from outside (labels of servers, names of files, cells of answers), made safe to print on a terminal."""

import unicodedata

JOINERS = "\u200c\u200d"
"""Between the letters of some scripts and the parts of some emoji; they steer nothing."""


def printable(text: str, kept: str = "\n\t") -> str:
    r"""`text` with what could steer a terminal or turn its reading direction written as an escape, such as \x1b.

    These are control characters (C0 and C1, such as ESC and CSI), marks of direction and other invisible ones, separators of lines and
    halves of surrogate pairs.

    Args:
        text: Any.
        kept: Control characters that stay.
    """
    if text.isprintable():
        return text
    return text.translate(_Escapes(kept + JOINERS))


class _Escapes(dict[int, str]):
    """What stands for each character, as str.translate asks for it."""

    def __init__(self, kept: str) -> None:
        super().__init__((ord(c), c) for c in kept)

    def __missing__(self, code: int) -> str:
        c = chr(code)
        steers = unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        self[code] = c.encode("unicode_escape").decode() if steers else c
        return self[code]
