"""Plain text of manual pages: their man macros and escapes taken off, the words kept.

No formatter: what a reader would call the text of a page, one paragraph a line. Tables, equations and preformatted
examples go, which are alike in all languages. Pages in the mdoc macros, which are another language, are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

# Macros whose arguments are text: in one font with blanks between them, in two fonts alternating without.
_SPACED: Final = frozenset({"B", "I", "SM", "SB", "SH", "SS"})
_ALTERNATING: Final = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})
_PARAGRAPHS: Final = frozenset({"PP", "P", "LP", "TP", "TQ", "HP", "IP", "SH", "SS", "sp", "RS", "RE"})
# What ends a block that is left out whole.
_BLOCKS: Final = {"TS": "TE", "EQ": "EN", "nf": "fi", "EX": "EE", "de": ".", "de1": ".", "am": ".", "ig": "."}
_CONDITIONS: Final = frozenset({"if", "ie", "el", "while"})

_CHARACTERS: Final = {
    "aq": "'", "dq": '"', "lq": "\u201c", "rq": "\u201d", "oq": "\u2018", "cq": "\u2019", "Fo": "\u00ab",
    "Fc": "\u00bb", "em": "\u2014", "en": "\u2013", "hy": "-", "bu": "\u2022", "co": "\u00a9", "rg": "\u00ae",
    "tm": "\u2122", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "at": "@", "sh": "#", "Do": "$", "ul": "_",
    "lB": "[", "rB": "]", "lC": "{", "rC": "}", "or": "|", "ba": "|", "mu": "\u00d7", "+-": "\u00b1", "<=": "\u2264",
    ">=": "\u2265", "!=": "\u2260", "->": "\u2192", "<-": "\u2190", "de": "\u00b0", "sc": "\u00a7", "ss": "\u00df",
    ":a": "\u00e4", ":o": "\u00f6", ":u": "\u00fc", ":A": "\u00c4", ":O": "\u00d6", ":U": "\u00dc", "'e": "\u00e9",
    "`e": "\u00e8", "^e": "\u00ea", "'a": "\u00e1", "`a": "\u00e0", "'o": "\u00f3", "'i": "\u00ed", "'u": "\u00fa",
    "~n": "\u00f1", ",c": "\u00e7",
}  # fmt: skip
"""groff's special characters, those that prose has."""

_ESCAPE: Final = re.compile(
    r"""\\(?:
        ["\#].*                                            # a comment up to the end of the line
      | \[u(?P<code>[0-9A-Fa-f]{4,6})\]                    # a character by its code point
      | \[(?P<long>[^\]]*)\] | \((?P<short>..)             # a special character
      | [fFgkmMnVY*](?:\[[^\]]*\]|\(..|[+-]?.)             # fonts, colours, registers, strings
      | s(?:\[[^\]]*\]|\(..|[+-]?'[^']*'|[+-]?\d{1,2})     # sizes
      | [bCDhHlLNoRSvwxXZ](?:'[^']*'|.)                    # motions and drawings
      | (?P<blank>[ ~0|^t])                                # blanks
      | (?P<other>.?)                                      # one character, or the end of the line
    )""",
    re.VERBOSE,
)
_KEPT: Final = {"-": "-", "e": "\\", "\\": "\\", ".": ".", "'": "\u00b4", "`": "`", "_": "_"}
_ARGUMENT: Final = re.compile(r'\s*(?:"((?:[^"]|"")*)"?|(\S+))')


def plain_text(page: str) -> str | None:
    """The words of a manual page.

    Args:
        page: Source in the man macros.

    Returns:
        One paragraph or heading a line, blanks single, no line empty; or None for a page in mdoc, and for one that
        only refers to another (``.so``).
    """
    if re.search(r"^\.\s*Dd\b", page, re.MULTILINE) or re.search(r"\A(?:[.'].*\n)*\.so ", page):
        return None
    paragraphs = (" ".join(" ".join(lines).split()) for lines in _paragraphs(page))
    return "\n".join(p for p in paragraphs if p)


def _paragraphs(page: str) -> Iterator[list[str]]:
    lines: list[str] = []
    until: str | None = None
    depth = 0
    for line in page.splitlines():
        macro, arguments = _request(line)
        if until is not None or depth:
            depth += _braces(line) if depth else 0
            until = None if macro == until or (until == "." and line.startswith("..")) else until
            continue
        if macro is None:
            if line.strip():
                lines.append(_characters(line))
                continue
            macro = "PP"
        if macro in _CONDITIONS:
            depth = max(0, _braces(line))
        elif macro in _BLOCKS:
            until = _BLOCKS[macro]
        if macro in _PARAGRAPHS:
            yield lines
            lines = []
        lines += _words(macro, arguments)
        if macro in {"SH", "SS"} and arguments:
            yield lines
            lines = []
    yield lines


def _words(macro: str, arguments: str) -> list[str]:
    """The text among a macro's arguments."""
    if macro in _SPACED:
        return [" ".join(_split(arguments))]
    if macro in _ALTERNATING:
        return ["".join(_split(arguments))]
    return _split(arguments)[:1] if macro in {"IP", "TQ"} else []


def _request(line: str) -> tuple[str | None, str]:
    """Name and arguments of a control line; no name where the line is text."""
    match = re.match(r"[.']\s*(\S*)\s*(.*)", line)
    if match is None or line.startswith("'''"):
        return ('\\"', "") if line.startswith("'''") else (None, "")
    return match[1], match[2]


def _braces(line: str) -> int:
    """By how many conditional blocks a line opens more than it closes."""
    return line.count("\\{") - line.count("\\}")


def _split(arguments: str) -> list[str]:
    """Arguments of a macro, quotes and escapes taken off."""
    # An escaped blank is part of an argument: a character that no page has stands in for it.
    text = re.sub(r"\\\".*", "", arguments).replace("\\ ", "\x00")
    found = [m[1].replace('""', '"') if m[1] is not None else m[2] for m in _ARGUMENT.finditer(text)]
    return [_characters(argument).replace("\x00", " ") for argument in found]


def _characters(text: str) -> str:
    """Text with its escapes resolved."""

    def resolved(match: re.Match[str]) -> str:
        if match["code"]:
            code = int(match["code"], 16)
            return chr(code) if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF else ""
        name = match["long"] or match["short"]
        if name:
            return _CHARACTERS.get(name, "")
        if match["blank"]:
            # The narrow ones are for the eye.
            return "" if match["blank"] in "|^" else " "
        return _KEPT.get(match["other"] or "", "")

    return _ESCAPE.sub(resolved, text)
