"""The style sheet of the report: a column of text, quiet tables, figures as wide as the column."""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d8dde3; }
p { max-width: 46rem; margin: .6rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e4e8ec; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead th { border-bottom: 2px solid #1f2328; text-align: right; vertical-align: bottom; }
thead th:first-child, tbody th { text-align: left; }
tbody th { font-weight: 600; }
td { text-align: right; white-space: nowrap; }
.text td, .text thead th { text-align: left; white-space: normal; }
.text td { overflow-wrap: anywhere; min-width: 5rem; }
tbody tr:hover { background: #f5f8fa; }
figure { margin: 1.25rem 0 1.75rem; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .88rem; max-width: 46rem; margin-top: .4rem; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid; } }
"""
