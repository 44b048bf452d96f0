"""One HTML file that carries everything inside: the builders return escaped HTML, write_report puts it in order.
"""
import base64
import html
import io
import math
import re

import numpy as np

import common
from evidence import splitting
from readers import picture_files

REPORT_MAX_BYTES = 5_000_000
_LEVELS = {  # word and outline: shape and word tell the levels apart without colour
    "good": ("Holds", '<circle cx="12" cy="12" r="11"/><path d="M6.8 12.4l3.6 3.7 6.9-7.6"/>'),
    "caution": ("With caution", '<path class="f" d="M12 1.8L23.3 21.6H.7z"/><path d="M12 9v6M12 18.1v.4"/>'),
    "poor": ("Does not hold", '<path class="f" d="M7.6 1.5h8.8l6.1 6.1v8.8l-6.1 6.1H7.6l-6.1-6.1V7.6z"/>'
                              '<path d="M8.3 8.3l7.4 7.4M15.7 8.3l-7.4 7.4"/>')}
_REPORT_CSS = """
:root{--ground:#f4f6f8;--paper:#fff;--ink:#1b2128;--soft:#57626d;--line:#dde2e7;--good:#00684e;--good-bg:#e5f4ee;
  --caution:#855000;--caution-bg:#fdf2dd;--poor:#a5301a;--poor-bg:#fcebe6}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--ground:#12161b;--paper:#1a2027;--ink:#e6eaee;
  --soft:#9aa6b2;--line:#313a44;--good:#4fd0a5;--good-bg:#12302a;--caution:#f0b54e;--caution-bg:#33280f;--poor:#ff9c82;
  --poor-bg:#3a1d17} img{filter:brightness(.93)}}
*{box-sizing:border-box;print-color-adjust:exact} p,ul{margin:0 0 .8rem;max-width:46rem} ul{padding-left:1.2rem}
body{margin:0;background:var(--ground);color:var(--ink);overflow-wrap:anywhere;font:16px/1.55 system-ui,sans-serif}
.page{max-width:74rem;margin:auto;padding:2.2rem 1.5rem;display:grid;gap:0 2.5rem;
  grid-template-columns:12rem minmax(0,1fr)} .page>:not(nav,main){grid-column:1/-1}
main,nav ol{counter-reset:n;padding:0;margin:0;list-style:none} h2{font-size:1.2rem;margin:0 0 .9rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 1rem} nav{position:sticky;top:1rem;align-self:start;font-size:.9rem}
h2:before,nav a:before{counter-increment:n;content:counter(n);color:var(--soft);font-weight:400;margin-right:.7em}
nav a{display:block;padding:.3rem 0;text-decoration:none;color:var(--soft);border-bottom:1px solid var(--line)}
svg{flex:none;width:1.5em;height:1.5em;fill:currentColor;stroke:var(--paper);stroke-width:2.6;stroke-linecap:round;
  stroke-linejoin:round} svg circle,svg .f{stroke:none} .good{color:var(--good);background:var(--good-bg)}
.caution{color:var(--caution);background:var(--caution-bg)} .poor{color:var(--poor);background:var(--poor-bg)}
.note{display:flex;gap:.7rem;align-items:center;border-radius:.6rem;padding:.6rem .9rem;margin:0 0 1rem;max-width:46rem}
.note p{margin:0;max-width:none;color:var(--ink)} .verdict{max-width:none;padding:1.2rem;gap:1.1rem;font-size:1.25rem}
.verdict svg{width:3.4rem;height:3.4rem} .word{font-size:.8rem;font-weight:700;text-transform:uppercase}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.8rem;margin:0 0 2rem}
.figures div,section{background:var(--paper);border:1px solid var(--line);border-radius:.8rem;padding:.8rem 1rem}
dt,.small,figcaption,footer{color:var(--soft);font-size:.85rem;line-height:1.45}
dd{margin:0} .big{font-size:1.7rem;font-weight:600} section{padding:1.4rem 1.5rem .8rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;margin:0 0 1rem} table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{padding:.38rem .8rem;overflow-wrap:normal;text-align:left;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-size:.8rem;border-bottom-width:2px} tbody tr:last-child>*{border:0}
tbody th{font-weight:500;position:sticky;left:0;background:var(--paper)} th:first-child{padding-left:0}
.num,.big,.cases span{font-variant-numeric:tabular-nums} th.num,.num{text-align:right;white-space:nowrap}
figure{margin:0 0 1.2rem} img{display:block;max-width:100%;height:auto;background:#fff;border-radius:.5rem}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:1rem;margin:0 0 1rem}
.cases figure{margin:0} .cases img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--ground)}
.cases b,.cases span{display:block} .cases b{color:var(--ink);margin-top:.4rem}
pre{background:var(--ground);border-radius:.5rem;padding:.7rem .9rem;white-space:pre-wrap;font:.85rem/1.5 monospace}
@media screen and (max-width:52rem){.page{display:block;padding:1rem .9rem} h1{font-size:1.4rem} .big{font-size:1.35rem}
  .verdict{padding:1rem;font-size:1.05rem} .verdict svg{width:2.4rem;height:2.4rem} section{padding:1.1rem 1rem .4rem}
  .figures{grid-template-columns:1fr 1fr;gap:.6rem;margin-bottom:1.1rem} nav{position:static;margin:0 0 1.2rem}
  nav ol{display:flex;flex-wrap:wrap;gap:.45rem} nav a:before{content:none} .plot img{max-width:none;width:44rem}
  nav a{border:1px solid var(--line);border-radius:1rem;padding:.25rem .7rem;background:var(--paper)}}
@media print{:root{--ground:#fff} body{font-size:10pt} .page{display:block;padding:0} nav{display:none}
  section{border:0;padding:.4rem 0} .note{border:1.5pt solid} .scroll{overflow:visible} table{font-size:8.5pt}
  figure,tr,pre,.figures div{break-inside:avoid} h2{break-after:avoid} img{max-height:125mm}}
"""


def _note(body, level, kind="note"):
    assert level in _LEVELS, f"level {level!r} is none of {', '.join(_LEVELS)}"
    mark = f'<svg viewBox="0 0 24 24" role="img" aria-label="{_LEVELS[level][0]}">{_LEVELS[level][1]}</svg>'
    return f'<div class="{kind} {level}">{mark}<div>{body}</div></div>'


def html_text(text, level=None):
    """Paragraphs, split at blank lines; lines that begin with "- " make a list; with a level: a marked note."""
    blocks = []
    for part in re.split(r"\n\s*\n", str(text).strip()):
        lines = [html.escape(line.strip()) for line in part.splitlines()]
        is_list = all(line.startswith("- ") for line in lines)
        items = "".join(f"<li>{line[2:]}</li>" for line in lines)
        blocks.append(f"<ul>{items}</ul>" if is_list else f"<p>{' '.join(lines)}</p>")
    return _note("\n".join(blocks), level) if level else "\n".join(blocks)


def html_code(text):
    """Preformatted text such as a command; long lines wrap."""
    return f"<pre><code>{html.escape(str(text))}</code></pre>"


def _cell_text(value, spec):
    """Escaped text of a table cell; a missing value is a dash, `spec` formats numbers only."""
    if value is None or value != value:
        return "&ndash;"
    spec = spec or (".4g" if isinstance(value, (float, np.floating)) else "")
    return html.escape(value if isinstance(value, str) else format(value, spec))


def html_table(rows, columns=None, formats=None, caption="", max_rows=300):
    """Table that scrolls sideways on a narrow screen, numbers right aligned; rows beyond max_rows are only counted.

    rows: dicts; columns: {key: heading} or keys (default: those of the first row); formats: {key: spec such as ".3f"}.
    """
    columns = columns or list(rows[0] if rows else ["empty"])
    columns = columns if isinstance(columns, dict) else {key: str(key).replace("_", " ") for key in columns}
    cells = [[_cell_text(row.get(key), (formats or {}).get(key)) for key in columns] for row in rows[:max_rows]]
    if len(rows) > max_rows:
        cells.append([f"and {len(rows) - max_rows:,} more rows"] + [""] * (len(columns) - 1))
    numeric = [all(re.match(r"[-+]?(\.?\d|inf)|&ndash;|$", cell) for cell in column) for column in zip(*cells)]
    align = [' class="num"' if j and numeric and numeric[j] else "" for j in range(len(columns))]
    head = "".join(f'<th scope="col"{a}>{html.escape(str(name))}</th>' for a, name in zip(align, columns.values()))
    others = ["".join(f"<td{a}>{cell}</td>" for a, cell in zip(align[1:], row[1:])) for row in cells]
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>{other}</tr>' for row, other in zip(cells, others))
    title = f'<p class="small">{html.escape(caption)}</p>' if caption else ""
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'{title}<div class="scroll" tabindex="0">{table}</div>'


def _data_uri(picture, max_side, kind="JPEG"):
    """Data URI of a PIL picture, its longer side cut down to max_side; JPEG for photographs, PNG for plots."""
    picture, buffer = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((max_side, max_side))
    (picture.quantize(64) if kind == "PNG" else picture).save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def html_image(path, caption, max_side=1600):
    """Figure with the plot or picture at `path` inside; the caption is also its text alternative."""
    from PIL import Image
    with Image.open(path) as picture:
        uri = _data_uri(picture, max_side, "PNG" if picture.format == "PNG" else "JPEG")
    text = html.escape(caption)
    image = f'<div class="scroll"><img src="{uri}" alt="{text}"></div>'
    return f'<figure class="plot">{image}<figcaption>{text}</figcaption></figure>'


def html_cases(cases, max_side=256):
    """Grid of thumbnails with a title and lines of text below each, for the best and the worst cases.

    cases: dicts with image (uint8 (H, W, 3) or (H, W), or the path of a picture), title, and lines (list of text).
    """
    from PIL import Image
    figures = []
    for case in cases:
        pixels = case["image"] if isinstance(case["image"], np.ndarray) else picture_files.load_image(case["image"])
        title = html.escape(str(case["title"]))
        lines = "".join(f"<span>{html.escape(str(line))}</span>" for line in case.get("lines", ()))
        figures.append(f'<figure><img src="{_data_uri(Image.fromarray(pixels), max_side)}" alt="{title}">'
                       f"<figcaption><b>{title}</b>{lines}</figcaption></figure>")
    return '<div class="cases">' + "\n".join(figures) + "</div>"


def key_figure(label, estimate, remark):
    """(label, value, remark) texts of an Estimate for the top of the report; its interval stands for the remark."""
    interval = f"95 % interval {estimate.low:.3f} to {estimate.high:.3f}"
    return label, f"{estimate.value:.3f}", remark if math.isnan(estimate.low) else interval


def leakage_blocks(run):
    """The section on leakage, from leakage_report.json."""
    lines = splitting.leakage_text(common.read_json(run.path("leakage_report.json"))).splitlines()
    return [html_text("\n".join(f"- {line}" for line in lines))]


def history_blocks(run):
    """The section on learning curves: those of the run, or of its first fold."""
    curves = sorted(run.folder.glob("**/training_history.png"))
    return [html_image(path, f"Learning curves, {path.parent.name}") for path in curves[:1]]


def command_blocks():
    """The section that repeats the run: the command with public paths, and the versions of the packages."""
    versions = [{"package": name, "version": version} for name, version in common.package_versions().items()]
    return [html_code(common.public_command()), html_table(versions)]


def _fit_pictures(document, max_bytes):
    """Shrink every picture that takes more than an equal share of the room, when the page is over max_bytes."""
    from PIL import Image
    pattern = re.compile(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)")
    text_bytes, n_pictures = len(pattern.sub("", document)), len(pattern.findall(document))

    def shrink(match):
        uri, picture = match[0], Image.open(io.BytesIO(base64.b64decode(match[1])))
        side = max(picture.size)
        while len(uri) * n_pictures > max_bytes - text_bytes and side > 16:
            side = side * 3 // 4
            uri = _data_uri(picture, side)
        return uri

    return pattern.sub(shrink, document) if len(document) > max_bytes else document


def write_report(path, title, verdict, sections, foot="", figures=()):
    """Write one self-contained HTML page: ASCII, no script, no network, under 5 MB, light and dark, phone and print.

    verdict: (level good, caution or poor, sentence); figures: the key figures as (label, value, remark) texts;
    sections: (heading, blocks from the html_ builders), without blocks left out. The order of every train script: Data
    and split, Leakage, Metrics, Calibration, Learning curves, Best and worst cases, Limits, Command and versions.
    """
    title, foot, sentence = map(html.escape, (title, foot, verdict[1]))
    sections = [(html.escape(heading), "\n".join(blocks)) for heading, blocks in sections if blocks]
    links = "".join(f'<li><a href="#s{i}">{heading}</a></li>' for i, (heading, _) in enumerate(sections))
    tile = '<div><dt>{}</dt><dd class="big">{}</dd><dd class="small">{}</dd></div>'
    tiles = "".join(tile.format(*map(html.escape, figure)) for figure in figures)
    main = "\n".join(f'<section id="s{i}"><h2>{h}</h2>\n{body}\n</section>' for i, (h, body) in enumerate(sections))
    banner = _note(f'<div class="word">{_LEVELS[verdict[0]][0]}</div><p>{sentence}</p>', verdict[0], "note verdict")
    document = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_REPORT_CSS}</style></head><body><div class="page">
<header><h1>{title}</h1></header>
{banner}
<dl class="figures">{tiles}</dl>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
{main}
</main>
<footer>{foot}</footer></div></body></html>
""".encode("ascii", "xmlcharrefreplace").decode()
    common.write_whole(path, _fit_pictures(document, REPORT_MAX_BYTES - 1).encode())
