"""A small corpus in three languages, made of word lists: what tests use in place of the downloaded pages."""

from __future__ import annotations

import numpy as np

from simulator.languages import SIDES, Corpus

SENTENCES = {
    "en": (
        "the file is read by this command and the output goes to a terminal when there is no other option given with "
        "its name so that every line of text has been written before the program ends"
    ),
    "de": (
        "die Datei wird von diesem Befehl gelesen und ihre Ausgabe geht über das Gerät wenn keine weitere Möglichkeit "
        "größer ist als der Schlüssel für jede Zeile damit ein Prozess noch rückwärts läuft"
    ),
    "zh": "这个命令读取文件并把结果写到终端如果没有给出其他选项那么每一行文字都会在程序结束之前显示出来",
}
WORDS = {language: list(s) if language == "zh" else s.split(" ") for language, s in SENTENCES.items()}
BLANKS = {"en": " ", "de": " ", "zh": ""}
STOPS = {"en": ". ", "de": ". ", "zh": "。"}


def text(language: str, size: int, rng: np.random.Generator) -> str:
    """Sentences of the language's words, about ``size`` UTF-8 bytes."""
    sentences: list[str] = []
    length = 0
    while length < size:
        words = rng.choice(WORDS[language], int(rng.integers(5, 12)))
        sentences.append(BLANKS[language].join(words.tolist()) + STOPS[language])
        length += len(sentences[-1].encode())
    return "".join(sentences)


def small_corpus(page_bytes: int = 3000, pages: int = 4, seed: int = 0) -> Corpus:
    """As many pages of each language for training, and one each for validation and test."""
    rng = np.random.default_rng(seed)
    counts = dict(zip(SIDES, (pages, 1, 1), strict=True))
    return Corpus(
        {
            language: {side: [text(language, page_bytes, rng) for _ in range(n)] for side, n in counts.items()}
            for language in WORDS
        }
    )
