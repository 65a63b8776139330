"""What pages of reports look like: one style sheet, light or dark as the reader's system is."""

PALETTE = ["#5b84b9", "#c9605c", "#6f9f78", "#b08a3e", "#8569a8", "#4c9fae", "#c47fa6", "#777777"]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --quiet: #666; --line: #e4e4e4; --strong: #999; --better: #2f6f5e;
  --worse: #a3341f; --raised: #f6f6f4; }
@media (prefers-color-scheme: dark) { :root { --paper: #191b1a; --ink: #e2e4e2; --quiet: #9aa19d; --line: #343836;
  --strong: #6b716e; --better: #7cc4ab; --worse: #f0917d; --raised: #222524; } }
body { margin: 2.5rem auto; max-width: 68rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink); line-height: 1.45;
  font-family: "Helvetica Neue", Arial, "Noto Sans CJK SC", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0 0 .3rem; }
h2, summary { font-size: 1.1rem; font-weight: 600; margin: 2rem 0 .6rem; }
summary { cursor: pointer; }
[lang="zh"] { color: var(--quiet); font-weight: normal; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem 1.4rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--strong); overflow-wrap: anywhere; min-width: 8rem; }
tbody th { font-weight: normal; min-width: 14rem; }
.key tbody th { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .82rem; }
.note { display: block; color: var(--quiet); font-size: .8rem; font-weight: normal; }
.color { display: inline-block; width: 1.1em; height: .3em; border-radius: .15em; margin-right: .5em; vertical-align: middle; }
img { width: 100%; height: auto; margin-top: .5rem; }
@media (max-width: 40rem) { body { margin: 1.2rem auto; padding: 0 .9rem; }
  th, td { padding-right: .7rem; } thead th, tbody th { min-width: 5rem; } }
@media print { body { margin: 0; max-width: none; } table, img { break-inside: avoid; } }
"""
