"""How the page looks: one style sheet, for light and dark, for a wide window and a telephone."""

COLOURS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f5f6f8; --ink: #1b1f24; --muted: #59626d; --grid: #e1e4e8; --line: #d3d8de;
  --link: #0b57c2; --good: #0a6b4f; --bad: #b3321b; --band: #e3e9f2;
  --series-1: #0072b2; --series-2: #b45f00; --series-3: #00795c; --series-4: #9a4f83; --series-5: #5d6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --raised: #1d2127; --ink: #e8eaed; --muted: #a3acb8; --grid: #2c323a; --line: #3a414b;
    --link: #84b8ff; --good: #45c79a; --bad: #ff8f75; --band: #29323f;
    --series-1: #56b4e9; --series-2: #e69f00; --series-3: #2fc19a; --series-4: #d48fc0; --series-5: #a7b0bd;
  }
}
"""

STYLE = (
    COLOURS
    + """* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
p { margin: .5rem 0; }
ul { padding-left: 1.2rem; margin: .4rem 0; }
li { margin: .25rem 0; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .92rem; }
code, pre { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .86em; }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .8rem;
  overflow-x: auto; }
.short { background: var(--raised); border: 1px solid var(--line); border-left: 4px solid var(--series-1);
  border-radius: 6px; padding: .7rem 1rem; margin: 1rem 0; }
.short p { margin: .45rem 0; }
.muted { color: var(--muted); }
.small { font-size: .88rem; }
.scroll { overflow-x: auto; margin: .7rem 0; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
svg.chart { display: block; width: 100%; height: auto; }
svg.chart * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; color: var(--muted); }
th, td { padding: .36rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
th[scope=row] { font-weight: 500; white-space: nowrap; position: sticky; left: 0; background: var(--paper); }
td.n, th.n { text-align: right; white-space: nowrap; }
.nowrap { white-space: nowrap; }
.flag { color: var(--bad); }
.ok, .good { color: var(--good); font-weight: 600; }
.broken, .bad { color: var(--bad); font-weight: 600; }
td small, th small { display: block; color: var(--muted); font-size: .92em; font-weight: 400; }
td small { min-width: 8rem; max-width: 15rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: 0 .8rem; }
details > summary { cursor: pointer; padding: .5rem 0; }
details[open] > summary { border-bottom: 1px solid var(--line); margin-bottom: .6rem; }
details details { margin-left: 0; }
dl.facts { display: grid; grid-template-columns: minmax(5.5rem, max-content) minmax(0, 1fr); gap: .2rem 1rem;
  margin: .6rem 0; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.advice { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .6rem;
  margin: .8rem 0; }
.advice > div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; background: var(--raised); }
.advice b { display: block; font-size: 1.05rem; }
footer { margin-top: 3rem; color: var(--muted); font-size: .88rem; }
@media (max-width: 40rem) {
  th[scope=row] { white-space: normal; max-width: 7.5rem; min-width: 6.3rem; }
  details { padding: 0 .6rem; }
  dl.facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.facts dd { margin-bottom: .4rem; }
}
@media print { details > *:not(summary) { display: block; } }
"""
)
