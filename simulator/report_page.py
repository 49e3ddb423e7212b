"""The report's page: style, script, and the pieces of HTML. No address leads anywhere; its policy forbids fetching."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

# Belt and braces: even a bug could not make the page fetch anything.
POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --muted: #5b6672; --line: #dde2e8;
  --c1: #0b6bb5; --c2: #c2510a; --c3: #0a8a68; --c4: #8a5fb0; --c5: #b3123f;
  --band: #dfe8f1; --low: #f1f5f9; --high: #0b4f8a;
  --good: #0a6b50; --goodback: #dcf3ea; --warn: #8a4b00; --warnback: #fdeed9; --bad: #a1123a; --badback: #fde4e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13171c; --card: #1b2129; --ink: #e8ecf1; --muted: #9aa7b4; --line: #313a45;
    --c1: #5cb3f0; --c2: #f0a052; --c3: #4fd1a5; --c4: #c39be0; --c5: #ff8fa3;
    --band: #2b3644; --low: #202833; --high: #8fd0ff;
    --good: #7fe0be; --goodback: #16382e; --warn: #ffc98a; --warnback: #3d2c14; --bad: #ffb0bd; --badback: #451a25;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.65rem; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; }
p.lead { color: var(--muted); margin: 0 0 18px; }
.status { display: inline-block; padding: 2px 10px; border-radius: 999px; font-size: .85rem; font-weight: 600;
  vertical-align: middle; margin-left: 8px; }
.completed { color: var(--good); background: var(--goodback); }
.interrupted { color: var(--warn); background: var(--warnback); }
.halted { color: var(--bad); background: var(--badback); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card dt { color: var(--muted); font-size: .82rem; }
.card dd { margin: 0; font-size: 1.5rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.card.main dd { color: var(--c1); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
figure { margin: 10px 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; min-width: 0; }
figure h3 { font-size: 1rem; margin: 0; }
figcaption { color: var(--muted); font-size: .88rem; }
.plot { height: 340px; } .plot.low { height: 260px; } .plot.high { height: 460px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
td.n, th.n { text-align: right; }
.scroll { overflow-x: auto; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px;
  margin-top: 10px; }
.alert { border-left: 5px solid var(--warn); }
.alert.bad { border-left-color: var(--bad); }
.alert strong { display: block; }
.alert code { white-space: nowrap; }
.row > figure:last-child:nth-child(odd):not(:first-child) { grid-column: 1 / -1; }
caption { text-align: left; font-weight: 600; padding: 4px 10px; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
td code { overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
"""

SCRIPT: Final = """
(function () {
  'use strict';
  var figures = JSON.parse(document.getElementById('figures').textContent);
  var dark = window.matchMedia('(prefers-color-scheme: dark)');
  function css(name) { return getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim(); }
  var names = ['c1', 'c2', 'c3', 'c4', 'c5', 'muted', 'band'];
  function coloured(value) {
    if (Array.isArray(value)) { return value.map(coloured); }
    if (value && typeof value === 'object') {
      var copy = {};
      Object.keys(value).forEach(function (key) {
        var inner = value[key];
        if (key === 'color' && names.indexOf(inner) >= 0) { copy[key] = css(inner); }
        else if (key === 'colorscale') { copy[key] = [[0, css('low')], [1, css('high')]]; }
        else { copy[key] = coloured(inner); }
      });
      return copy;
    }
    return value;
  }
  function axis(given) {
    return Object.assign({ gridcolor: css('line'), linecolor: css('line'), zerolinecolor: css('line'),
      tickcolor: css('line'), automargin: true }, given);
  }
  function draw() {
    Object.keys(figures).forEach(function (id) {
      var figure = coloured(figures[id]);
      var layout = Object.assign({
        paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', margin: { l: 56, r: 16, t: 34, b: 46 },
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css('ink') },
        hoverlabel: { bgcolor: css('card'), bordercolor: css('line'), font: { color: css('ink') } }
      }, figure.layout);
      layout.legend = Object.assign({ orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom' }, layout.legend);
      Object.keys(layout).forEach(function (key) {
        if (/^[xy]axis/.test(key)) { layout[key] = axis(layout[key]); }
      });
      Plotly.react(id, figure.data, layout,
        { responsive: true, displayModeBar: false });
    });
  }
  draw();
  dark.addEventListener('change', draw);
})();
"""


class Page:
    """Collects HTML and figures."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._figures: dict[str, Any] = {}

    def add(self, html: str) -> None:
        """HTML as it is."""
        self._parts.append(html)

    def cards(self, cards: Iterable[tuple[str, str, str, str]]) -> None:
        """Headline figures: name, value, note, and a class for the one that matters most."""
        shown = "".join(
            f'<div class="card {kind}"><dt>{escape(name)}</dt>'
            f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note, kind in cards
        )
        self.add(f'<dl class="cards">{shown}</dl>')

    def alert(self, title: str, words: str, *, bad: bool = False) -> None:
        """A box that nobody overlooks.

        Args:
            title: In bold.
            words: HTML.
            bad: Whether the run came to harm.
        """
        self.add(
            f'<div class="box alert{" bad" if bad else ""}" role="note"><strong>{escape(title)}</strong>{words}</div>'
        )

    def section(self, title: str) -> None:
        """A heading."""
        self.add(f"<h2>{escape(title)}</h2>")

    def figure(self, name: str, title: str, figure: Mapping[str, Any], words: str, height: str = "") -> str:
        """A plot with its title and the words that say the same."""
        self._figures[name] = figure
        return (
            f'<figure aria-labelledby="{name}-title"><h3 id="{name}-title">{escape(title)}</h3>'
            f'<div class="plot {height}" id="{name}" role="img" aria-label="{escape(title)}. {escape(words)}"></div>'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )

    def row(self, *figures: str) -> None:
        """Figures beside each other, where there is room."""
        self.add(f'<div class="row">{"".join(figures)}</div>')

    def boxes(self, *contents: str) -> None:
        """Boxes of HTML beside each other, where there is room."""
        self.row(*(f'<div class="box">{content}</div>' for content in contents))

    def render(self, title: str, plotly_js: str) -> str:
        """The whole page."""
        # "</" inside a script element would end it, whatever the quotes around it.
        data = json.dumps(self._figures, separators=(",", ":")).replace("</", "<\\/")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(self._parts)
            + f'\n</main>\n<script type="application/json" id="figures">{data}</script>\n'
            f"<script>{plotly_js}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
        )


def pairs(values: Mapping[str, object], caption: str = "") -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th scope='row'>{escape(str(k))}</th><td>{_cell(v)}</td></tr>" for k, v in values.items())
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{head}{rows}</table>"


def columns(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of numbers under headings."""
    head = "".join(f'<th scope="col" class="n">{escape(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{escape(str(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if value is None:
        return "default"
    text = escape(f"{value:g}" if isinstance(value, float) else str(value))
    return f"<code>{text}</code>" if len(text) == 64 else text
