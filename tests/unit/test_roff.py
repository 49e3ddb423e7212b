"""Manual pages become plain text: the words stay, what a formatter is told goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.roff import plain_text

PAGE = r"""
.\" Copyright: somebody
'\" t
.TH UTF\-8 7 "10. Februar 2023" "Linux"
.SH BESCHREIBUNG
Der \fIZeichensatz\fP ist durch 16\-Bit\-W\[:o]rter definiert
(siehe
.BR utf\-8 (7)).
.B Achtung: "kein Zweifel"
.PP
Ein Absatz \(em mit \e0 und 2\[ha]31, \[u20AC]\ 5.\" Randbemerkung
.TP 0.2i
\(bu
Ein Punkt.
.IP "erste Wahl" 4
danach
.TS
l l.
a	b
.TE
.nf
int main(void);
.fi
.de XX
Makro
..
.if n \{\
.nr x 1
nie
.\}
.el und nie
Schluss\&.
"""


def test_a_page_becomes_its_words():
    assert plain_text(PAGE) == (
        "BESCHREIBUNG\n"
        "Der Zeichensatz ist durch 16-Bit-Wörter definiert (siehe utf-8(7)). Achtung: kein Zweifel\n"
        "Ein Absatz — mit \\0 und 2^31, € 5.\n"
        "• Ein Punkt.\n"
        "erste Wahl danach Schluss."
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"a\f(CWb\f[R]c\f[]d", "abcd"),
        (r"\s-1small\s0 \s+2large\s[10]", "small large"),
        (r"\m[red]red\m[] \h'2n'moved \w'x'\|.", "red moved ."),
        (r"\*(lqquoted\*(rq \*[x]", "quoted"),
        (r"\(lqquoted\(rq", "“quoted”"),
        (r"back\\slash \e", r"back\slash \ "[:-1]),
        (r"one\~two\0three\ four", "one two three four"),
        (r"ends with \c", "ends with"),
        ("ends with \\", "ends with"),
        (r"\[nothing known]x\(zzy", "xy"),
        (r"\[uD800]lone\[u110000] \[u0041]", "lone A"),
        ("  blanks\t are   single ", "blanks are single"),
        ('.BI in\\ one " two " three', "in one two three"),
        ('.B "say ""yes"""', 'say "yes"'),
        ('.B "unfinished', "unfinished"),
        ("一行\n二行", "一行 二行"),
        (".unknown macro", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_escapes_and_arguments(source, text):
    assert plain_text(source) == text


def test_pages_of_another_language_and_references_are_left_out():
    assert plain_text(".Dd May 1, 2020\n.Dt LS 1\n.Sh NAME\n") is None
    assert plain_text('.\\" comment\n.so man7/utf-8.7\n') is None


@given(st.text(alphabet=st.sampled_from("ab .'\"\\{}[](u0fs-\nTSdeif"), max_size=200) | st.text(max_size=200))
def test_any_text_has_plain_text_without_empty_lines_or_double_blanks(source):
    text = plain_text(source)
    if text is not None:
        assert all(line == " ".join(line.split()) and line for line in text.split("\n") if text)
        text.encode()
