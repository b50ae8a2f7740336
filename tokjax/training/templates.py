"""The look of a report: one page that needs no network, no script, and follows light or dark."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1f2a37;
  --soft: #667085; --line: #e2e5ea; --warn: #fff4e0; --warn-line: #e8a33d; --good: #2a9d76; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --text: #e4e7ec;
  --soft: #98a2b3; --line: #323843; --warn: #33291a; --warn-line: #b57d2a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; color: var(--soft); font-weight: 600; }
.soft { color: var(--soft); } .state { border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 10px; font-size: 13px; margin-left: 8px; vertical-align: middle; font-weight: 400; }
code, pre { font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
.cards { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(47%, 190px), 1fr)); }
.card, .figure, .box { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 14px; }
.card .value { font-size: 25px; font-weight: 650; line-height: 1.25; }
.card .label { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 12px; } .wide { grid-column: 1 / -1; }
.figure { padding: 8px; } .figure svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; } .box { overflow-x: auto; margin: 8px 0; }
th, td { text-align: left; padding: 4px 14px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; }
th { overflow-wrap: normal; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0;
  padding-left: 14px; } td.number { white-space: nowrap; }
.facts td:first-child, .facts th:first-child { width: 32%; }
.samples td:first-child, .samples th:first-child { width: 84px; white-space: nowrap; }
.warnings { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 10px;
  padding: 10px 14px; margin: 16px 0; } .warnings ul { margin: 4px 0 0; padding-left: 20px; }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; margin: 6px 0 10px; }
.bar span { display: block; min-width: 1px; } .dot { display: inline-block; width: 11px;
  height: 11px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
.sample { white-space: pre-wrap; } .sample .prompt { color: var(--soft); }
summary { cursor: pointer; font-size: 18px; font-weight: 650; margin: 30px 0 8px; }
footer { margin-top: 40px; font-size: 13px; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
