"""The report's page: style and script. No address in it leads anywhere, and its policy forbids fetching."""

from __future__ import annotations

from typing import Final

# Belt and braces: even a bug could not make the page fetch anything.
POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --muted: #5b6672; --line: #dde2e8;
  --c1: #0b6bb5; --c2: #c2510a; --c3: #0a8a68; --c4: #8a5fb0; --band: #dfe8f1; --low: #f1f5f9; --high: #0b4f8a;
  --good: #0a6b50; --goodback: #dcf3ea; --warn: #8a4b00; --warnback: #fdeed9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13171c; --card: #1b2129; --ink: #e8ecf1; --muted: #9aa7b4; --line: #313a45;
    --c1: #5cb3f0; --c2: #f0a052; --c3: #4fd1a5; --c4: #c39be0; --band: #2b3644; --low: #202833; --high: #8fd0ff;
    --good: #7fe0be; --goodback: #16382e; --warn: #ffc98a; --warnback: #3d2c14;
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
  var names = ['c1', 'c2', 'c3', 'c4', 'muted', 'band'];
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
