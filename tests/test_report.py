"""The plots and the HTML report of common.py: well-formed, self-contained, escaped, under its size, readable plots.

    python -m pytest tests/test_report.py
"""
import base64
import html.parser
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import common
from evidence import plotting, prediction_tables, reporting
from evidence.verdicts import Verdict

VOID = {"meta", "img", "br", "hr", "link"}
EVIL = '<script>alert("x")</script> & \'quoted\' "name"'


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and asserts that every tag is closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(Path(path).read_text(encoding="ascii"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)

    def values(self, key):
        return [value for _, name, value in self.attributes if name == key]


def noise_picture(rng, height=300, width=400):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def report(tmp_path):
    """A report that uses every builder, with hostile text in each place that takes text."""
    rng = np.random.default_rng(0)
    Image.fromarray(noise_picture(rng)).save(tmp_path / "plot.png")
    rows = [{"target": EVIL, "r": 0.51234, "note": EVIL}, {"target": "b", "r": float("nan"), "note": None}]
    table = reporting.html_table(rows, {"target": "Target", "r": EVIL, "note": "note"}, caption=EVIL)
    case = {"image": noise_picture(rng), "title": EVIL, "lines": [EVIL, "true 5.1"]}
    texts = [reporting.html_text(f"one {EVIL}"), reporting.html_list(["a", EVIL]), reporting.html_text(EVIL, "caution")]
    sections = [(EVIL, texts),
                ("Empty", []),
                ("Metrics", [table, reporting.html_image(tmp_path / "plot.png", EVIL)]),
                ("Cases", [reporting.html_cases([case]), reporting.html_code(EVIL)])]
    path = tmp_path / "report.html"
    reporting.write_report(path, EVIL, Verdict("good", EVIL, EVIL), sections, EVIL, [(EVIL, EVIL, EVIL)])
    return path


def test_report_is_well_formed_and_self_contained(report):
    page, source = Page(report), report.read_text()
    assert source.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]+", "", source))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for value in page.values("src")) and len(page.values("src")) == 2
    assert all(page.values("alt")), "each picture has a text alternative"


def test_report_escapes_all_text(report):
    page = Page(report)
    assert "<script" not in report.read_text()
    # title, h1, word and sentence of the verdict, 3 in the key figure, contents, h2, list item, note, caption, column, 2 cells, figcaption, case
    # title and line, code, footer; the first paragraph holds it after a word
    assert sum(EVIL in data for data in page.text) == 21
    assert page.values("alt").count(EVIL) == 2


def test_report_contents_and_headings(report):
    page = Page(report)
    targets = [value[1:] for value in page.values("href")]
    assert targets == [value for value in page.values("id")] and len(targets) == len(set(targets)) == 3
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == 3, "the section without blocks is left out"
    assert "viewport" in page.values("name") and page.values("lang") == ["en"]
    order = [page.tags.index(tag) for tag in ("h1", "svg", "nav", "main", "footer")]
    assert order == sorted(order), "verdict before contents before sections"
    css = report.read_text()
    assert "prefers-color-scheme:dark" in css and "@media print" in css and "overflow-x:auto" in css


def test_long_names_and_headings_wrap_where_a_page_cannot_scroll(report):
    """On a phone a name of 45 letters lay on the numbers beside it; on paper the last columns were cut off."""
    screen, _, rest = report.read_text().partition("@media screen and (max-width:52rem)")
    phone, _, paper = rest.partition("@media print")
    assert "td.num{white-space:nowrap}" in screen and "th.num,.num{text-align:right}" in screen, "a heading may wrap"
    assert "td,th{max-width:16rem;overflow-wrap:break-word} tbody th{max-width:9rem}" in phone
    assert "td.num{white-space:normal}" in paper and "tbody th{max-width:11rem;overflow-wrap:break-word}" in paper
    assert "img{max-height:230mm}" in paper, "small letters of a tall plot are read"
    assert ".scroll{overflow:visible;background:none}" in paper, "no shade where nothing scrolls"


@pytest.mark.parametrize("level, mark", [("good", "good"), ("caution", "caution"), ("poor", "alarm")])
def test_verdict_is_told_by_word_and_shape(tmp_path, level, mark):
    reporting.write_report(tmp_path / "r.html", "t", Verdict(level, "a word", "a sentence"), [])
    page = Page(tmp_path / "r.html")
    assert page.values("aria-label")[0] == mark and "a word" in page.text and "a sentence" in page.text
    shapes = {value[1] for value in reporting._LEVELS.values()}
    assert len(shapes) == 3, "the three marks differ in outline"


def test_unknown_level_is_a_programming_mistake(tmp_path):
    with pytest.raises(KeyError, match="great"):
        reporting.html_text("a", "great")


def test_leakage_says_what_was_compared_and_is_green_where_nothing_leaks(tmp_path):
    run = SimpleNamespace(path=lambda name: tmp_path / name)
    nothing, copies = {"count": 0, "examples": []}, {"count": 2, "examples": ["a = b"]}

    def block(between, within):
        found = {"between": {"train-val": between}, "within": {"train": within}}
        common.write_json(tmp_path / "leakage_report.json", found)
        return "".join(reporting.leakage_blocks(run))
    clean = block({"groups": nothing, "near_duplicates": nothing}, {})
    assert "note good" in clean and "none of: groups, near duplicates." in clean and "not compared" not in clean
    assert "Groups were not compared" in block({"near_duplicates": nothing}, {}), "as of blocks of time"
    repeats = block({"groups": nothing}, {"near_duplicates": copies})
    assert "note good" in repeats and "inside train" in repeats, "repeats inside a part are no leak"
    leak = block({"groups": nothing, "near_duplicates": copies}, {})
    assert "note caution" in leak and "2 near duplicates (a = b)" in leak


def test_report_stays_under_its_size_with_many_pictures(tmp_path):
    """Noise is what a JPEG or PNG packs worst."""
    rng = np.random.default_rng(1)
    Image.fromarray(noise_picture(rng, 900, 1000)).save(tmp_path / "big.jpg", quality=85)
    cases = [{"image": noise_picture(rng, 256, 256), "title": f"case {i}", "lines": []} for i in range(40)]
    sections = [("A", [reporting.html_image(tmp_path / "big.jpg", "big")]), ("B", [reporting.html_cases(cases)])]
    reporting.write_report(tmp_path / "r.html", "t", Verdict("poor", "w", "s"), sections)
    assert (tmp_path / "r.html").stat().st_size < 5_000_000
    sources = Page(tmp_path / "r.html").values("src")
    assert len(sources) == 41


def test_table_formats_alignment_and_missing_cells():
    rows = [{"name": "a", "r": 0.51239, "n": 7, "text": "x", "ci": "0.41 to 0.60", "v": np.float32(0.25)},
            {"name": "007", "r": None, "n": np.int64(12000), "text": "7 of 9 x", "v": float("-inf")}]
    table = reporting.html_table(rows, digits=".2f")
    cells = re.findall(r"<td( class=\"num\")?>([^<]*)</td>", table)
    assert [text for _, text in cells[:5]] == ["0.51", "7", "x", "0.41 to 0.60", "0.25"]
    assert [text for _, text in cells[5:]] == ["&ndash;", "12000", "7 of 9 x", "&ndash;", "-inf"]
    assert [bool(numeric) for numeric, _ in cells[:5]] == [True, True, False, True, True]
    assert '<th scope="row">007</th>' in table and '<th scope="col">name</th>' in table


def test_a_small_error_is_not_written_as_none():
    """MAE of 8e-7 in its unit; what rounding alone makes of 0 stays 0."""
    rows = [{"score": "a", "mae": value} for value in (8.1e-7, -0.0004, 1.3e-17, 0.0, 0.0312, float("inf"))]
    cells = re.findall("<td class=\"num\">([^<]*)</td>", reporting.html_table(rows))
    assert cells == ["8e-07", "-0.0004", "0.000", "0.000", "0.031", "inf"]


def test_a_table_without_rows_is_empty():
    assert reporting.html_table([]) == ""


def test_text_paragraphs_and_lists():
    assert reporting.html_text("a\nb  c") == "<p>a b c</p>"
    assert reporting.html_list(["a", "b"]) == "<ul><li>a</li><li>b</li></ul>" and reporting.html_list([]) == ""


def test_non_ascii_names_survive_in_an_ascii_file(tmp_path):
    reporting.write_report(tmp_path / "r.html", "H\u00c4NDE gr\u00fcn", Verdict("good", "w", "\u732b"), [])
    assert "H\u00c4NDE gr\u00fcn" in Page(tmp_path / "r.html").text


def test_cases_take_colours_and_grey():
    cases = [{"image": np.zeros((40, 20, 3), np.uint8), "title": "t"}, {"image": np.zeros((10, 30), np.uint8), "title": "g"}]
    uris = re.findall(r'src="([^"]+)"', reporting.html_cases(cases))
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size for uri in uris]
    assert sizes == [(20, 40), (30, 10)]


@pytest.mark.parametrize("word, expected", [
    ("{here}/outputs/run_1/best.pth", "outputs/run_1/best.pth"), ("--weights={here}/a.pth", "--weights=a.pth"),
    ("/secret/place/deep/x/001.jpg", "x/001.jpg"), ("--images=/secret/place/x/1.jpg", "--images=x/1.jpg"),
    ("/x.jpg", "x.jpg"), ("/secret/place/subject=01/x.csv", "subject=01/x.csv"),
    ("resnet50=/secret/place/x/a.pth", "resnet50=x/a.pth"), ("--criteria", "--criteria"), ("r2>0.15", "r2>0.15"), ("images/a.jpg", "images/a.jpg")])
def test_words_of_the_command_as_they_are_published(tmp_path, monkeypatch, word, expected):
    monkeypatch.chdir(tmp_path)
    assert reporting.public_word(word.format(here=tmp_path)) == expected


def test_flags_that_are_lists_have_public_paths():
    args = SimpleNamespace(predictions=[Path("/secret/place/runs/a.csv"), Path("/secret/place/runs/b.csv")], name=None, seed=0)
    blocks = reporting.command_blocks(args)
    assert "--predictions runs/a.csv runs/b.csv --seed 0<" in blocks[2], "what is not set is not shown"


def history(n_epochs):
    rng = np.random.default_rng(3)
    return [{"epoch": e, "learning_rate": 1e-4 / e, "train_loss": 1 / e, "val_loss": 1.2 / e, "val_mae": None,
             "val_r2": None if e == 2 else rng.random(), "val_mae_left": 1.0} for e in range(1, n_epochs + 1)]


def test_train_and_val_share_a_panel():
    assert plotting._history_panels(pd.DataFrame(history(2))) == {
        "loss": ["train_loss", "val_loss"], "r2": ["val_r2"], "mae_left": ["val_mae_left"],
        "learning_rate": ["learning_rate"]}, "val_mae holds no number"


def check_png(path, min_width=400):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width >= min_width
        assert len(np.unique(np.asarray(picture.convert("L")))) > 5, "something is drawn"
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("n_epochs, best", [(1, 1), (30, 12)])
def test_plot_history(tmp_path, n_epochs, best):
    plotting.plot_history(history(n_epochs), tmp_path / "h.png", best)
    check_png(tmp_path / "h.png")


def test_facts_have_a_panel_of_their_own(figures):
    plotting.plot_history(history(3), None, 2, ["val, 9 rows", "R2: 0.5"])
    *curves, last = figures[0].axes
    assert len(curves) == 4 and last.texts[0].get_text() == "val, 9 rows\nR2: 0.5"


@pytest.mark.parametrize("n_epochs", [1, 2, 3, 30])
def test_epochs_are_counted_in_whole_numbers(figures, n_epochs):
    plotting.plot_history(history(n_epochs), None, 1)
    for axis in figures[0].axes:
        ticks = axis.get_xticks()
        assert (ticks == ticks.round()).all() and len(ticks) > 1


def target_rows(n):
    rng = np.random.default_rng(4)
    return [{"target": f"rating {i}", "pearson_r": rng.random(), "r2": rng.random() - 0.3, "r2_low": -3.0,
             "r2_high": 0.9, "baseline_r2": 0.1, "ceiling_r2": None, "mae": 1.0} for i in range(n)]


@pytest.mark.parametrize("n", [1, 14, 40])
def test_plot_per_target(tmp_path, n):
    rows = target_rows(n)
    rows[0] |= {"pearson_r": float("nan"), "target": r"a $\no math$ name"}
    plotting.plot_per_target(rows, tmp_path / "p.png")
    check_png(tmp_path / "p.png")


def test_the_legend_names_what_a_later_panel_alone_shows(figures):
    row = {"target": "x", "pearson_r": 0.5, "r2": 0.2, "r2_low": 0.1, "r2_high": 0.3}
    plotting.plot_per_target([row], None)
    [legend] = figures[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {"model", "baseline", "interval"}


def test_no_target_at_all_is_drawn_too(tmp_path):
    """Of test pictures without any box."""
    plotting.plot_per_target([], tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_the_baseline_stays_on_the_axis():
    """Of an error of .5 mm beside a baseline's of 1.8 mm."""
    figure, [axis] = plotting.new_figure(1, 1, (4, 2))
    plotting._draw_target_bars(axis, pd.DataFrame([{"target": "x", "mae_x": 0.5, "baseline_mae_x": 1.8}]), "mae_x")
    assert axis.get_xlim()[1] > 1.8


@pytest.mark.parametrize("metric", ["r2", "mae_x_mm"])
def test_a_baseline_of_0_stands_beside_the_axis(metric):
    """As the mean's R2; on the axis it was hidden."""
    figure, [axis] = plotting.new_figure(1, 1, (4, 2))
    plotting._draw_target_bars(axis, pd.DataFrame([{"target": "x", metric: 0.5, f"baseline_{metric}": 0.0}]), metric)
    figure.draw_without_rendering()
    [mark] = [line for line in axis.lines if line.get_label() == "baseline"]
    assert axis.transData.transform((0, 0))[0] - axis.bbox.x0 > mark.get_markeredgewidth() / 2


@pytest.mark.parametrize("n_targets", [1, 60])
def test_plot_scatter(tmp_path, n_targets):
    rng = np.random.default_rng(5)
    target = rng.normal(size=(60, n_targets))
    target[:, 0], target[3, -1] = np.nan, np.nan
    predicted = target + rng.normal(size=target.shape)
    predicted[3, -1] = np.nan  # where there is a true value, refuse_useless refuses it
    names = [f"$rating^ {i}$" for i in range(n_targets)]
    table = prediction_tables.ScoreTable(keys={}, names=names, baselines={}, truth=target, predicted=predicted)
    plotting.plot_scatter(table, tmp_path / "s.png")
    check_png(tmp_path / "s.png", 200)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.height < 8 * 300, "the first 40 alone are drawn, six in a row"
    assert plotting.note_if_cut(n_targets, "scores") == (": the first 40 of 60 scores" if n_targets > 40 else "")


def test_names_of_a_dataset_are_no_formulas(tmp_path):
    groups = np.array([r"a$\x$", "b$c$"])
    plotting.plot_dataset({"train": [0, 1]}, groups, [r"scale $\x$"], [], tmp_path / "d.png")
    check_png(tmp_path / "d.png")


@pytest.fixture
def figures(monkeypatch):
    """The figures that the plots would have written."""
    kept = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: kept.append(figure))
    return kept


def check_texts(figure, texts):
    """Every one of the texts lies inside the figure, and none on another one."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().padded(-0.5) for text in texts if text.get_text()]
    assert len(boxes) > 1
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


ITEMS = [f"expressed_valence_of_the_stimulus_in_the_left_field_{k}" for k in range(25)]


def test_the_items_of_a_scale_are_told_apart_in_every_plot(figures):
    """Names that differ in their last letters alone."""
    rng = np.random.default_rng(0)
    plotting.plot_per_target([{"target": name, "r2": 0.5} for name in ITEMS], None, ["r2"])
    values = rng.normal(size=(9, 25))
    table = prediction_tables.ScoreTable(keys={}, names=ITEMS, baselines={}, truth=values, predicted=values)
    plotting.plot_scatter(table, None)
    plotting.plot_confusion(np.eye(25, dtype=int), ITEMS, None)
    bars, scatter, confusion = figures
    shown = [
        [label.get_text() for label in bars.axes[0].get_yticklabels()],
        [axis.get_title(loc="left") for axis in scatter.axes],
        [label.get_text() for label in confusion.axes[0].get_xticklabels()]]
    for names in shown:
        assert len(set(names)) == 25 and max(map(len, names)) <= 28
        assert all(name.startswith("expres") and name.endswith(f"_{k}") for k, name in enumerate(names))
    assert plotting.shorten_name("a" * 20, 20) == "a" * 20 and plotting.shorten_name("0123456789", 9) == "01...6789"


@pytest.mark.parametrize("n_folds, n_patients, n_named", [(10, 10, 20), (30, 30, 30), (3, 200, 20)])
def test_names_of_folds_and_patients_stand_apart(figures, n_folds, n_patients, n_named):
    """Of more than 18 each second, third ... is named."""
    split = {f"fold_{k}": rows for k, rows in enumerate(np.array_split(np.arange(600), n_folds))}
    plotting.plot_dataset(split, np.repeat([f"{k:03d}" for k in range(n_patients)], 600 // n_patients), [], [], None)
    [figure] = figures
    labels = [label for axis in figure.axes[:2] for label in axis.get_yticklabels()]
    check_texts(figure, labels)
    assert min(label.get_size() for label in labels) == 7
    assert labels[0].get_text() == "fold_0" and len(labels) == n_named


def test_long_facts_leave_the_other_panels_their_place(figures):
    names = [f"patient_of_the_university_hospital_of_the_city_{k}" for k in range(2)]
    facts = [f"in two parts: {', '.join(names)} and 3 more", "rows skipped: 0"]
    plotting.plot_dataset({"train": np.arange(2)}, np.array(names), facts, [(names[0], np.zeros((9, 9)))] * 4, None)
    [figure] = figures
    parts, by_group, text, *samples = figure.axes
    check_texts(figure, [*by_group.get_yticklabels(), *text.texts, *(axis._left_title for axis in samples)])
    assert "".join(text.texts[0].get_text().split()) == "".join("".join(facts).split()), "all is there"
    assert parts.get_position().width > 0.15
    assert (parts.get_xticks() % 1 == 0).all(), "transitions are whole"


@pytest.mark.parametrize("scale", [1e5, 1e-6])
def test_long_numbers_below_a_small_panel_stand_apart(figures, scale):
    target = np.linspace(-4.2 * scale, 2.2 * scale, 12).repeat(6).reshape(12, 6)
    table = prediction_tables.ScoreTable(keys={}, names=list("abcdef"), baselines={}, truth=target, predicted=target)
    plotting.plot_scatter(table, None)
    [figure] = figures
    figure.draw_without_rendering()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        check_texts(figure, [tick.label1 for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high])


def test_the_curves_of_25_classes_have_each_a_look_and_a_name(figures):
    rng = np.random.default_rng(0)
    label = np.arange(500) % 25
    probability = rng.dirichlet(np.ones(25), 500)
    plotting.plot_precision_recall(probability, label, ITEMS, None, range(25))
    [figure] = figures
    [legend] = figure.legends
    assert len(legend.get_texts()) == 25
    check_texts(figure, [*legend.get_texts(), *(axis.xaxis.label for axis in figure.axes)])
    for axis in figure.axes:
        curves = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 24


def test_titles_of_learning_curves_stand_alone(figures):
    """Of a metric with a long name, and beside the power of ten of its axis."""
    history = [{"epoch": e, "learning_rate": 1e-4 / e, "val_loss": 1e7 / e, f"val_{ITEMS[0]}": 1e-6 / e} for e in (1, 2)]
    plotting.plot_history(history, None, 1)
    [figure] = figures
    titles = [axis._left_title for axis in figure.axes]
    powers = [axis.yaxis.offsetText for axis in figure.axes]
    check_texts(figure, titles + powers + [axis._right_title for axis in figure.axes])
    assert [text.get_text() for text in powers] == ["1e7", "1e\N{MINUS SIGN}6", ""]
    ticks = figure.axes[2].yaxis.get_minorticklabels()
    assert {tick.get_size() for tick in ticks} == {8}, "as large as the others"


def test_the_curve_of_a_model_without_errors_lies_above_the_axis(figures):
    plotting.plot_risk_coverage(np.linspace(0.5, 1, 9), np.ones(9, bool), None)
    assert figures[0].axes[0].get_ylim() == (-0.002, 0.1)


def test_bars_of_small_errors_are_seen():
    figure, [axis] = plotting.new_figure(1, 1, (4, 2))
    rows = pd.DataFrame([{"target": "x", "mae_x_mm": 0.004123, "baseline_mae_x_mm": 0.005}])
    plotting._draw_target_bars(axis, rows, "mae_x_mm")
    assert axis.get_xlim()[1] < 0.006 and axis.texts[0].get_text() == "0.00412"


def test_plots_are_repeatable(tmp_path):
    for name in ("a.png", "b.png"):
        plotting.plot_per_target(target_rows(5), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_rare_colour_is_kept(tmp_path):
    """One small green bar beside hundreds of blue and orange ones, in the file and in the report."""
    figure, [axis] = plotting.new_figure(1, 1, (9, 9))
    for place, colour in enumerate((plotting.BLUE, plotting.ORANGE)):
        axis.broken_barh([(k, 0.5) for k in range(300)], (2 * place, 1), color=colour, alpha=0.6, linewidth=0)
    axis.plot(np.arange(300), np.arange(300) % 7 / 2, color=plotting.INK, linewidth=0.7)
    axis.broken_barh([(150, 2)], (3.5, 0.3), color=plotting.GREEN, linewidth=0)
    plotting.save_figure(figure, tmp_path / "bars.png")
    check_png(tmp_path / "bars.png")
    packed = re.search("base64,([^\"]+)", reporting.html_image(tmp_path / "bars.png", "bars"))[1]
    for source in (tmp_path / "bars.png", io.BytesIO(base64.b64decode(packed))):
        pixels = np.asarray(Image.open(source).convert("RGB")).astype(int)
        assert (np.abs(pixels - (0, 158, 115)).max(2) < 20).sum() > 100


@pytest.mark.parametrize("families, expected", [
    (["sans-serif"], "DejaVu Sans"), (["DejaVu Sans", "STIXGeneral"], "STIXGeneral")])
def test_text_on_pictures_has_the_font_that_matplotlibrc_names_last(families, expected):
    with matplotlib.rc_context({"font.family": families}):
        font = plotting.picture_font(20)
    assert font.getname()[0] == expected and font.size == 20
    assert font.getmask("\xfc").getbbox() != font.getmask("u").getbbox(), "it has accents"


def test_plots_leave_pyplot_alone(tmp_path):
    program = f"""import sys
from pathlib import Path
from evidence import plotting
assert "matplotlib" not in sys.modules, "plotting imports matplotlib only when it draws"
plotting.plot_history([{{"epoch": 1, "val_loss": 1.0}}], Path({str(tmp_path / 'h.png')!r}), 1)
assert "matplotlib.pyplot" not in sys.modules, "no pyplot, no global state"
"""
    folder = Path(common.__file__).parent
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def test_one_epoch_makes_no_learning_curve(tmp_path):
    history = [{"epoch": epoch, "val_loss": 1 / epoch, "learning_rate": 1e-3} for epoch in (1, 2)]
    for n_rows, n_shown in ((1, 0), (2, 1)):
        common.write_table(tmp_path / "training_history.csv", history[:n_rows])
        plotting.plot_history(history[:n_rows], tmp_path / "training_history.png", 1)
        assert len(reporting.history_blocks(SimpleNamespace(folder=tmp_path))) == n_shown


def test_a_page_shows_the_curves_of_twelve_folds(tmp_path):
    for k in range(14):
        (tmp_path / f"fold_{k}").mkdir()
        common.write_table(tmp_path / f"fold_{k}" / "training_history.csv", history(2))
        Image.new("L", (9, 9)).save(tmp_path / f"fold_{k}" / "training_history.png")
    *shown, last = reporting.history_blocks(SimpleNamespace(folder=tmp_path))
    assert len(shown) == 12 and "<p>2 more: training_history.png" in last


@pytest.mark.parametrize("shape", [(40, 40, 3), (6, 30, 30, 3), (7,)])
def test_a_training_batch_is_drawn_with_its_labels(tmp_path, shape, monkeypatch):
    """Pictures, strips of five frames of clips, nothing of features; the report shows the first fold's.

    Of five samples each is drawn once.
    """
    rng = np.random.default_rng(0)
    kind = np.float32 if len(shape) == 1 else np.uint8
    samples = {(0, i): {"input": torch.from_numpy(rng.integers(0, 256, shape).astype(kind))} for i in range(20)}

    class Dataset:
        def __len__(self):
            return n_samples

        def __getitem__(self, key):
            return samples[key]
    panels, new_figure = [], plotting.new_figure
    monkeypatch.setattr(plotting, "new_figure", lambda n, *others: panels.append(n) or new_figure(n, *others))
    processes = SimpleNamespace(on_first=lambda function: function())
    run = SimpleNamespace(compute=SimpleNamespace(processes=processes), folder=tmp_path / "run", path=(tmp_path / "fold_0").joinpath)
    (tmp_path / "fold_0").mkdir()
    for n_samples in (5, 20):
        plotting.plot_batch(run, Dataset(), [f"{i}.png\nwarm {i}" for i in range(20)])
    assert panels == ([5, 12] if kind == np.uint8 else [])
    drawn = tmp_path / "fold_0" / "training_batch.jpg"
    assert drawn.exists() == (kind == np.uint8)
    blocks = reporting.history_blocks(SimpleNamespace(folder=tmp_path))
    assert len(blocks) == drawn.exists()
    if blocks:
        assert "augmented" in blocks[0] and min(Image.open(drawn).size) > 300
