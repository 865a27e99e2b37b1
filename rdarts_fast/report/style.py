"""How the page looks."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #5b636d; --line: #e1e4e8;
  --ground: #f7f8fa; --card: #ffffff; --blue: #0072b2; --orange: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a2abb6; --line: #363c44;
  --ground: #14171b; --card: #1c2026; --blue: #6cb8ea; --orange: #f0a060; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 56px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 17px; margin: 28px 0 4px; }
p, ul { margin: 8px 0; max-width: 76ch; }
ul { padding-left: 20px; }
a { color: var(--blue); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; margin: 8px 0; padding: 12px 14px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
.soft, figcaption, .file { color: var(--soft); }
.lead { font-size: 17px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 28px; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.35; width: 100%;
  font-variant-numeric: tabular-nums; background: var(--card); }
th, td { padding: 6px 10px; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom;
  white-space: normal; min-width: 62px; line-height: 1.25; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); max-width: 340px;
  white-space: normal; overflow-wrap: break-word; min-width: 290px; }
.plain tbody th { min-width: 0; white-space: nowrap; }
.n { text-align: right; }
tr.sub th { padding-left: 26px; font-weight: 400; color: var(--soft); }
tr.sub td { color: var(--soft); } tr.chosen th, tr.chosen td { font-weight: 600; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
.runs, .plain { border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  margin: 16px 0; background: var(--card); }
.plain table { width: auto; min-width: 50%; }
.state.going, .state.unfinished { display: inline-block; padding: 0 8px; border-radius: 9px;
  font-size: 12.5px; border: 1px solid var(--blue); color: var(--blue); }
.state.unfinished { border-color: var(--orange); color: var(--orange); }
.note { border-left: 3px solid var(--orange); padding: 2px 0 2px 14px; margin: 16px 0; }
.spark { display: block; }
.cards { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px;
  margin: 16px 0; }
.card { margin: 0; min-width: 0; background: #ffffff; color: #1f2328;
  border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px 12px; }
.card.wide { grid-column: 1 / -1; }
.card svg { display: block; width: 100%; height: auto;
  font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: #5b636d; font-size: 14px; line-height: 1.45; margin-top: 8px; }
.card .file { color: #7a828c; } .card .file a { color: inherit; font-size: 12px; }
details { margin: 8px 0; } summary { cursor: pointer; }
details.run { background: none; border-top: 1px solid var(--line); margin: 0; padding: 12px 0; }
details.run > summary { font-size: 17px; font-weight: 600; }
details.run > summary .soft { font-weight: 400; font-size: 14px; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); font-size: 14px;
  color: var(--soft); }
@media (max-width: 760px) { main { padding: 24px 14px 48px; } h1 { font-size: 25px; }
  .cards { grid-template-columns: minmax(0, 1fr); }
  tbody th { max-width: 150px; min-width: 130px; } }
@media print { .box { overflow: visible; } body { background: #ffffff; } }
"""
