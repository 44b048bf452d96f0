"""Tables, COCO files and configs that Hypothesis writes and spoils: exact values, or one line with file and place.

    python -m pytest tests/torture/test_fuzz_inputs.py [--all_cases]
"""
import csv
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import StopTest, UnsatisfiedAssumption

import common
from readers import csv_tables, part_boxes, rating_tables
import train_assessor

GROUP = "tables, COCO, JSON, configs: 6 properties by Hypothesis"
NAMES = ("Calm", "Joy", "Trust")
numbers = st.one_of(st.none(), st.floats(-1e6, 1e6).map(float), st.integers(-999, 999).map(float))


@pytest.fixture
def examine(cases):
    """examine(check): call check(data, folder) on many drawn examples, each of them a case. The short part repeats."""
    def run(check):
        @settings(max_examples=cases.number(200, 5000), derandomize=not cases.all_cases, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))
        @given(st.data())
        def examples(data):
            failed = None
            with tempfile.TemporaryDirectory() as folder:
                try:
                    check(data, Path(folder))
                except (StopTest, UnsatisfiedAssumption):
                    raise  # a drawing that came to nothing is no case
                except BaseException as error:
                    failed = error
            with cases.case(GROUP):
                if failed:
                    raise failed
        examples()
    return run


def refusal(path, function, *args):
    """The message of the UserError that the call must raise: one line that names the file."""
    with pytest.raises(common.UserError) as caught:
        function(*args)
    assert path.name in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


# --- tables ---

def draw_ratings(data):
    """[[id, cell, cell, cell], ...] of text: a number or a blank a cell, no row empty, the last column not constant."""
    rows = data.draw(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
    return [[f"{i:03d}", *("" if value is None else repr(value) for value in row), repr(i + .5)]
            for i, row in enumerate(rows)]


def as_csv(rows, delimiter=",", end="\n", quoting=csv.QUOTE_MINIMAL):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return buffer.getvalue()


def keep_all_numbers(path):
    """The ratings of a table in which no number stands for a missing answer."""
    return rating_tables.read_ratings(path, missing_codes=[])


def test_ratings_are_read_exactly(examine):
    def check(data, folder):
        delimiter, path = data.draw(st.sampled_from(",;\t")), folder / "ratings.csv"
        rows, comma = draw_ratings(data), delimiter != "," and data.draw(st.booleans())
        encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]))
        cells = [[row[0], *(cell.replace(".", ",") if comma else cell for cell in row[1:])] for row in rows]
        text = as_csv([["image", *NAMES], *cells], delimiter, data.draw(st.sampled_from(["\n", "\r\n"])),
                      data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
        path.write_bytes(text.encode(encoding))
        expected = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows])
        spread = [len(set(column[np.isfinite(column)])) for column in expected.T]
        if 1 in spread:
            assert "constant" in refusal(path, keep_all_numbers, path)
            return
        kept = [k for k, n in enumerate(spread) if n]
        ratings = keep_all_numbers(path)
        assert ratings.images == [row[0] for row in rows] and ratings.names == [NAMES[k] for k in kept]
        np.testing.assert_array_equal(ratings.mean, expected[:, kept])
    examine(check)


def test_one_fault_in_one_row_is_named_with_its_line(examine):
    faults = {"a field more": lambda row, k: row[:k] + ["9"] + row[k:], "no name": lambda row, _: ["", *row[1:]]}
    faults |= {f"the cell {cell}": lambda row, k, cell=cell: row[:k] + [cell] + row[k + 1:]
               for cell in ("seven", "inf", "1.234.5", "1_0", "0x1F", "5 $")}

    def check(data, folder):
        path, n = folder / "ratings.csv", data.draw(st.integers(3, 8))
        rows = [[f"{i:03d}", *(repr(data.draw(st.integers(0, 99)) + 100 * i + k) for k in range(3))] for i in range(n)]
        where, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(1, 3))
        fault = data.draw(st.sampled_from(sorted(faults)))
        rows[where] = faults[fault](rows[where], column)
        path.write_text(as_csv([["image", *NAMES], *rows]))
        said = refusal(path, keep_all_numbers, path)
        assert f"line {where + 2}" in said, f"{fault}: {said}"
        assert len(rows[where]) != 4 or fault == "no name" or f"column {NAMES[column - 1]}" in said, f"{fault}: {said}"
    examine(check)


def test_damage_within_a_line_changes_no_other_line(examine):
    def check(data, folder):
        path = folder / "table.csv"
        rows = [[f"p{i}", *data.draw(st.tuples(*[st.sampled_from(["1", "2.5", "left", ""])] * 2))] for i in range(6)]
        lines = as_csv([["image", "a", "b"], *rows]).encode().splitlines(keepends=True)
        where = data.draw(st.integers(1, 6))
        at, cut = data.draw(st.integers(0, len(lines[where]) - 1)), data.draw(st.integers(0, 3))
        put = data.draw(st.binary(max_size=4))
        lines[where] = lines[where][:at] + put + lines[where][at + cut:]
        path.write_bytes(b"".join(lines))
        try:
            table = csv_tables.read_table(path)
        except common.UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
            return
        assert list(table.columns) == ["image", "a", "b"]
        if set(put) & set(b'"\r\n') or cut and at + cut >= len(lines[where]) - len(put):
            return  # it may have joined or parted lines: then only a clean reading or a clear word is asked for
        found = dict(zip(table.index, table.to_numpy().tolist()))  # line number -> cells
        assert all(found[line] == row for line, row in enumerate(rows, 2) if line != where + 1)
    examine(check)


# --- COCO ---

def draw_coco(data):
    """A COCO file with one picture or more, ids with gaps, boxes within their picture."""
    number = st.one_of(st.integers(1, 200), st.floats(1, 200).map(lambda x: round(x, 3)))
    ids = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
    annotations = [{"id": k, "image_id": data.draw(st.sampled_from(ids)),
                    "category_id": data.draw(st.sampled_from([3, 7])),
                    "bbox": data.draw(st.lists(number, min_size=4, max_size=4)),
                    "state": data.draw(st.sampled_from([*part_boxes.STATES[:2], 0, 1]))}
                   for k in range(data.draw(st.integers(1, 5)))]
    return {"images": [{"id": own, "file_name": f"{own}.jpg", "width": 600, "height": 400} for own in ids],
            "categories": [{"id": 3, "name": "wheel"}, {"id": 7, "name": "bell"}], "annotations": annotations}


def test_coco_files_are_read_exactly_and_a_spoiled_field_is_named(examine):
    wrong = {"image_id": [-1, "x", 1.5, []], "category_id": [8, {}], "state": ["brokn", 77, [1], True],
             "bbox": [[1, 2, 3], [1, 2, 3, math.nan], [1, 2, 3, 1e12], "1 2 3 4"],
             "trust": ["much", math.inf]}

    def check(data, folder):
        content, path = draw_coco(data), folder / "parts.json"
        field = data.draw(st.sampled_from([None, *sorted(wrong)]))
        if field:
            spoiled = data.draw(st.sampled_from(content["annotations"]))
            spoiled[field] = data.draw(st.sampled_from(wrong[field]))
        path.write_text(json.dumps(content))
        if field:
            assert f"annotation {spoiled['id']}" in refusal(path, part_boxes.read_annotations, path)
            return
        found = part_boxes.read_annotations(path)
        names = {3: "wheel", 7: "bell"}
        assert [image.name for image in found.images] == [image["file_name"] for image in content["images"]]
        for image in found.images:
            annotations = [own for own in content["annotations"] if own["image_id"] == image.id]
            for each, own in zip(image.objects, annotations, strict=True):
                left, top, width, height = own["bbox"]
                assert each.box == [left, top, left + width, top + height] and each.part == names[own["category_id"]]
                state = own["state"]
                assert part_boxes.STATES[each.state] == (state if isinstance(state, str) else part_boxes.STATES[state])
    examine(check)


def test_damaged_json_is_refused_or_means_what_it_says(examine):
    """Of a file that is still JSON the reading equals that of the same content written anew."""
    def check(data, folder):
        path, anew = folder / "parts.json", folder / "anew.json"
        text = bytearray(json.dumps(draw_coco(data)).encode())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(text) - 1))
            text[at:at + data.draw(st.integers(0, 9))] = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from(
                [b"1", b"0", b"-", b".", b"e9", b'"', b"{", b"]", b",", b"null", b"NaN", b"true"])))
        path.write_bytes(bytes(text))
        try:
            found = part_boxes.read_annotations(path)
        except common.UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
            return
        anew.write_text(json.dumps(json.loads(bytes(text), strict=False)))
        again = part_boxes.read_annotations(anew)
        assert (found.images, found.category_ids) == (again.images, again.category_ids)
    examine(check)


# --- configs ---

def a_name(letters):
    return st.text(letters, min_size=1).map(str.strip).filter(bool)


FLAGS = {
    "epochs": st.integers(1, 10 ** 6), "batch_size": st.integers(1, 512), "seed": st.integers(0, 2 ** 31),
    "lr": st.floats(1e-8, 10), "weight_decay": st.floats(0, 1),
    "scheduler": st.sampled_from(["cosine", "step", "none"]),
    "deterministic": st.booleans(), "pretrained": st.booleans(), "use_amp": st.sampled_from(["on", "off", "auto"]),
    "num_workers": st.one_of(st.just("auto"), st.integers(0, 9)), "group_column": a_name("abcNOon_ é"),
    "output_dir": a_name("abc/. é")}
NEEDED = ["--images_dir", "a", "--ratings_file", "b"]


def test_a_config_means_the_same_as_the_command_line(examine):
    mistakes = {"epochs": ["ten", 0, 1.5, [3], True], "lr": ["fast", -1, True, {}], "deterministic": ["maybe", 3],
                "scheduler": ["cosin", 7], "num_workers": [-1, "some"], "epoch": [3], "learn_rate": [.1]}

    def check(data, folder):
        names = data.draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=5, unique=True))
        values = {name: data.draw(FLAGS[name]) for name in names}
        is_json = data.draw(st.booleans())
        path = folder / ("config.json" if is_json else "config.yaml")
        mistake = data.draw(st.sampled_from([None, None, *sorted(mistakes)]))
        written = values | ({mistake: data.draw(st.sampled_from(mistakes[mistake]))} if mistake else {})
        section = {"training": written} if data.draw(st.booleans()) else written
        path.write_text((json.dumps if is_json else yaml.safe_dump)(section), encoding="utf-8")
        command = [*NEEDED, "--config", str(path)]
        if mistake and not isinstance(written[mistake], dict):
            assert mistake in refusal(path, train_assessor.parse_args, command)
            return
        if mistake:
            return  # an empty section of that name
        switches = {"deterministic": {True: "--deterministic"}, "pretrained": {False: "--no_pretrained"}}
        typed = [switches[name].get(value) if name in switches else f"--{name}={value}"
                 for name, value in values.items()]
        typed = list(filter(None, typed))
        both = [vars(train_assessor.parse_args(argv)) for argv in (command, [*NEEDED, *typed])]
        one, other = [{name: value for name, value in each.items() if name not in ("config", "given")} for each in both]
        assert one == other
    examine(check)
