"""One HTML file that carries everything inside: the builders return escaped HTML, write_report puts it in order."""

import base64
import html
import io
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np

import common
from evidence import metric_names, splitting

STYLE = Path(__file__).with_name("report.css")
CASE_SIDE = 256  # pixels of a thumbnail; this and the next keep a page under 5 MB
MOST_CURVES = 12  # plots of learning curves
SCREEN_WIDTH = 800  # pixels; plots of more than two panels are wider
NUMBER = re.compile(r"[-+]?(\.?\d|inf)|&ndash;|$")  # how the text of a number begins, or is missing
EXPLANATIONS = {  # of a section's words, under its head
    "Leakage": "What stands on both sides of the split: a model that knows it already looks better than it is.",
    "Noise ceiling": "The R2 that a perfect model would reach, given how far the raters disagree; a row of one rater "
                     "or without an sd counts with the noise of the others' single ratings.",
    "Without a pixel": "What columns of the table predict without looking at the input. A model must do better.",
    "Calibration": "Whether a confidence of 80 % is right in 80 % of the rows. ECE: the mean gap, "
                   "in shares of 1; NLL and Brier: error of the probabilities, smaller is better.",
    "Best and worst cases": "By the error of the prediction.",
}
_LEVELS = {  # word and outline: shape and word tell the levels apart without colour
    "good": (
        "good",
        '<circle cx="12" cy="12" r="11"/><path d="M6.8 12.4l3.6 3.7 6.9-7.6"/>',
    ),
    "caution": (
        "caution",
        '<path class="f" d="M12 1.8L23.3 21.6H.7z"/><path d="M12 9v6M12 18.1v.4"/>',
    ),
    "poor": (
        "alarm",
        '<path class="f" d="M7.6 1.5h8.8l6.1 6.1v8.8l-6.1 6.1H7.6l-6.1-6.1V7.6z"/>'
        '<path d="M8.3 8.3l7.4 7.4M15.7 8.3l-7.4 7.4"/>',
    ),
}


def _note(body, level, kind="note"):
    """A box with the mark of the level beside its HTML; kind: its classes in report.css."""
    word, outline = _LEVELS[level]
    mark = f'<svg viewBox="0 0 24 24" role="img" aria-label="{word}">{outline}</svg>'
    return f'<div class="{kind} {level}">{mark}<div>{body}</div></div>'


def html_text(text, level=None):
    """A paragraph; a level: a marked note."""
    body = f"<p>{html.escape(' '.join(text.split()))}</p>"
    return _note(body, level) if level else body


def html_list(lines):
    """A list with a point before each line; "" without lines."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def html_code(text):
    """Preformatted text such as a command; long lines wrap."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def _cell_text(value, digits):
    """Escaped text of a table cell; a missing value is a dash."""
    if value is None or value != value:
        return "&ndash;"
    if not isinstance(value, (float, np.floating)):
        return html.escape(str(value))
    text = format(value, digits)
    return format(value, ".1g") if abs(value) > 1e-9 and not float(text) else text  # no error of .000


def html_table(rows, columns=None, digits=".3f", caption=""):
    """Table that scrolls sideways on a narrow screen, numbers right aligned; "" without rows.

    rows: dicts; columns: {key: heading}, left out where no row has them (default: all that the rows
    have); digits: format of the numbers that are not whole.
    """
    if not rows:
        return ""
    known = {key: key.replace("_", " ") for row in rows for key in row}
    columns = {key: heading for key, heading in (columns or known).items() if key in known}
    cells = [[_cell_text(row.get(key), digits) for key in columns] for row in rows]
    align = [' class="num"' if all(map(NUMBER.match, column)) else "" for column in zip(*cells)]
    align[0] = ""  # what a row is called
    head = "".join(
        f'<th scope="col"{mark}>{html.escape(name)}</th>'
        for mark, name in zip(align, columns.values())
    )
    body = []
    for first, *others in cells:
        data = "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(align[1:], others))
        body.append(f'<tr><th scope="row">{first}</th>{data}</tr>')
    title = f'<p class="small">{html.escape(caption)}</p>' if caption else ""
    body = "\n".join(body)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'{title}<div class="scroll" tabindex="0">{table}</div>'


def _data_uri(packed, kind):
    """Data URI of the bytes of a picture file; kind: PNG or JPEG."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(packed).decode()}"


def html_image(path, caption):
    """Figure with the plot or picture at `path` inside; the caption is also its text alternative."""
    from PIL import Image

    with Image.open(path) as picture:
        uri = _data_uri(path.read_bytes(), picture.format)
        kind = "scroll wide" if picture.width > SCREEN_WIDTH else "scroll"  # on a phone the others are made to fit
    text = html.escape(caption)
    image = f'<div class="{kind}"><img src="{uri}" alt="{text}"></div>'
    return f'<figure class="plot">{image}<figcaption>{text}</figcaption></figure>'


def html_cases(cases):
    """Grid of thumbnails with a title and lines of text below each, for the best and the worst cases.

    cases: dicts with image (uint8 (H, W, 3) or (H, W)), title, and lines (list of text); one that
    is wide, such as frames side by side, takes the whole width.
    """
    from PIL import Image

    figures = []
    for case in cases:
        height, width = case["image"].shape[:2]
        is_wide = width > 2.5 * height
        side = 3 * CASE_SIDE if is_wide else CASE_SIDE
        thumbnail = Image.fromarray(case["image"]).convert("RGB")
        thumbnail.thumbnail((side, side))
        packed = io.BytesIO()
        thumbnail.save(packed, "JPEG", quality=80, optimize=True)
        uri = _data_uri(packed.getvalue(), "JPEG")
        title = html.escape(case["title"])
        lines = "".join(f"<span>{html.escape(line)}</span>" for line in case.get("lines", ()))
        caption = f"<figcaption><b>{title}</b>{lines}</figcaption>"
        kind = ' class="wide"' if is_wide else ""
        figures.append(f'<figure{kind}><img src="{uri}" alt="{title}">{caption}</figure>')
    return '<div class="cases">' + "\n".join(figures) + "</div>"


def key_figures(estimates, result):
    """{label: Estimate} of a Result -> [(label, value, remark)] texts for the top of the report."""
    figures = []
    for label, found in estimates.items():
        if not result.has_intervals:
            remark = result.method
        elif math.isnan(found.low):
            remark = f"no interval: it rests on too few of the {result.subjects} {result.unit}, or is too uncertain"
        else:
            remark = f"95 % interval {found.low:.3f} to {found.high:.3f}"
        figures.append((label, metric_names.number_text(found.value), remark))
    return figures


def leakage_blocks(run):
    """The section on leakage, from leakage_report.json where there is one: what the parts share, or do not."""
    path = run.path("leakage_report.json")
    if not path.exists():
        return []
    report = common.read_json(path)
    compared = dict.fromkeys(kind.replace("_", " ") for pair in report["between"].values() for kind in pair)
    text = f"The parts of the split share none of: {', '.join(compared)}."
    if "groups" not in compared:
        text += " Groups were not compared: none were named, or the split divides them on purpose."
    block = html_text(text, "good")
    leaks = splitting.found_leakage("leakage", report["between"])
    if leaks:
        block = _note(html_list(leaks), "caution")
    notes = splitting.found_leakage("inside", report["within"])  # repeats inside a part are no leaks
    return [block, html_list(notes + report.get("notes", []))]


def history_blocks(run):
    """The section on learning curves: those of the run, and of each of its folds; one epoch makes none."""
    by_folder = sorted(run.folder.glob("**/training_history.png"),
                       key=lambda path: (len(str(path)), path))  # fold_10 after fold_2, baseline last
    curves = [path for path in by_folder if path.with_suffix(".csv").read_bytes().count(b"\n") > 2]
    blocks = [html_image(path, f"Learning curves, {path.parent.name}") for path in curves[:MOST_CURVES]]
    if curves[MOST_CURVES:]:
        blocks.append(html_text(f"{len(curves) - MOST_CURVES} more: training_history.png in the other folders."))
    batches = sorted(run.folder.glob("**/training_batch.jpg"))[:1]
    caption = "Some of what the model was trained on, augmented, with its labels"
    return blocks + [html_image(path, caption) for path in batches]


def command_blocks(args=None):
    """The section that repeats the run: the command with public paths, all flags in force, and package versions."""
    command = shlex.join(["python", *map(public_word, sys.argv)])
    versions = [" ".join(each) for each in common.package_versions().items()]
    blocks = [html_code(command)]
    if args:
        flags = [f"--{name} {public_text(value)}" for name, value in common.flags_of(args).items() if value is not None]
        blocks += [html_text("All settings, as in args.json:"), html_code(" ".join(flags))]
    return [*blocks, html_list(versions)]


def public_text(value):
    """The value of a flag, or its values, with public paths."""
    return " ".join(public_word(str(each)) for each in np.atleast_1d(value))


def public_word(word):
    """A path, also behind --flag= or NAME=, cut to what follows the current folder or to its last two parts."""
    start = "" if Path(word).is_absolute() else word[:word.find("=") + 1]
    path = Path(word.removeprefix(start))
    if not path.is_absolute():
        return word
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    else:
        path = Path(*path.parts[1:][-2:])
    return start + path.as_posix()


def write_report(path, title, verdict, sections, foot="", figures=()):
    """Write one self-contained HTML page: ASCII, no script, no network, under 5 MB, light and dark, phone and print.

    verdict: a verdicts.Verdict; figures: the key figures as (label, value, remark) texts; sections:
    (heading, blocks from the html_ builders), left out where all blocks are empty. The order of
    every train script: Data and split, Leakage, Metrics, Calibration, Learning curves, Best and
    worst cases, Limits, Command and versions.
    """
    title = html.escape(title)
    links = []
    bodies = []
    for heading, blocks in sections:
        blocks = list(filter(None, blocks))
        if not blocks:
            continue
        name = f"s{len(links)}"
        heading = html.escape(heading)
        if heading in EXPLANATIONS:
            blocks = [f'<p class="small">{html.escape(EXPLANATIONS[heading])}</p>', *blocks]
        body = "\n".join(blocks)
        links.append(f'<li><a href="#{name}">{heading}</a></li>')
        bodies.append(f'<section id="{name}"><h2>{heading}</h2>\n{body}\n</section>')
    tile = '<div><dt>{}</dt><dd class="big">{}</dd><dd class="small">{}</dd></div>'
    tiles = "".join(tile.format(*map(html.escape, figure)) for figure in figures)
    body = f'<div class="word">{html.escape(verdict.word)}</div><p>{html.escape(verdict.sentence)}</p>'
    banner = _note(body, verdict.level, "note verdict")
    links = "".join(links)
    main = "\n".join(bodies)
    document = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{STYLE.read_text()}</style></head><body><div class="page">
<header><h1>{title}</h1></header>
{banner}
<dl class="figures">{tiles}</dl>
<nav aria-label="Contents"><ol>{links}</ol></nav>
<main>
{main}
</main>
<footer>{html.escape(foot)}</footer></div></body></html>
"""
    common.write_whole(path, document.encode("ascii", "xmlcharrefreplace"))
