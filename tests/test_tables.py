"""Ratings tables as they are found in the wild, and the images that their rows mean.

    python -m pytest tests/test_tables.py
"""
import csv
import gzip
import io
import math
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from evidence import rater_agreement
from readers import csv_tables, file_names, rating_tables

pytestmark = pytest.mark.fault("tables, COCO, JSON: quirks and mistakes")

OMI = Path(__file__).resolve().parents[2] / "shared" / "data" / "ratings" / "omi"
needs_omi = pytest.mark.skipif(not OMI.is_dir(), reason="the OMI ratings are not beside the repository")


def written(folder, text, name="ratings.csv", encoding="utf-8"):
    path = Path(folder) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def fails(function, *args, **kwargs):
    """The one-line message of the UserError that the call must raise."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    return str(caught.value)


# read_table: the layouts of a file

def test_ids_stay_text_and_missing_cells_are_empty(tmp_path):
    table = csv_tables.read_table(written(tmp_path, "id, score ,note\n007,1.50,NA\n010,NaN,none\n"))
    assert list(table.columns) == ["id", "score", "note"]
    assert table["id"].tolist() == ["007", "010"] and table["score"].tolist() == ["1.50", ""]
    assert table["note"].tolist() == ["", "none"], "'none' is a word, not a missing cell"
    assert table.index.tolist() == [2, 3]


def test_header_quoted_as_one_field(tmp_path):
    header = '"image,""Approach_mean"",""Approach_sd"",""Valence_mean"",""Valence_sd"""'
    path = written(tmp_path, f"{header}\r\nstimuli/image_001.jpg,6.97,2.79,5,1\r\nstimuli/image_002.jpg,1,2,3,4\r\n")
    ratings = rating_tables.read_ratings(path)
    assert ratings.names == ["Approach", "Valence"] and ratings.images[0] == "stimuli/image_001.jpg"
    assert ratings.mean.tolist() == [[6.97, 5], [1, 3]] and ratings.sd.tolist() == [[2.79, 1], [2, 4]]
    assert ratings.n is None and any("header" in note for note in ratings.notes)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_delimiters_and_encodings(tmp_path, delimiter, encoding):
    text = "image;grün\r\nMäh.jpg;1\r\n\r\nb.jpg;2\r\n".replace(";", delimiter)
    table = csv_tables.read_table(written(tmp_path, text, encoding=encoding))
    assert list(table.columns) == ["image", "grün"]
    assert table["image"].tolist() == ["Mäh.jpg", "b.jpg"] and table.index.tolist() == [2, 4]


def test_gz_is_known_by_content_not_by_name(tmp_path):
    path = written(tmp_path, gzip.compress(b"image,x\na.jpg,1\n"))
    assert csv_tables.read_table(path)["x"].tolist() == ["1"]
    assert "damaged" in fails(csv_tables.read_table, written(tmp_path, gzip.compress(b"image,x\na.jpg,1\n")[:-9]))


def test_header_with_commas_in_a_semicolon_file(tmp_path):
    table = csv_tables.read_table(written(tmp_path, "image;Calm, mean;Happy (M, SD)\na.jpg;1,5;2\n"))
    assert list(table.columns) == ["image", "Calm, mean", "Happy (M, SD)"]


def test_a_delimiter_that_needs_no_title_above_the_header_wins(tmp_path):
    table = csv_tables.read_table(written(tmp_path, "image,x\na;b,5\nc;d,6\n"))
    assert list(table.columns) == ["image", "x"] and table["x"].tolist() == ["5", "6"]


def test_lines_in_which_qualtrics_describes_the_columns(tmp_path):
    text = ('image,Q1\nWhich face?,"How calm is ""she""?\n- 1 to 7"\n'
            '"{""ImportId"":""image""}","{""ImportId"":""QID1_1""}"\na.png,3\nb.png,4\n')
    table = csv_tables.read_table(written(tmp_path, text))
    assert table["Q1"].tolist() == ["3", "4"] and table.index.tolist() == [5, 6]
    assert any("Qualtrics" in note for note in table.attrs["notes"])
    with pytest.raises(common.UserError, match="expected a header and rows"):
        csv_tables.read_table(written(tmp_path, text.split("a.png")[0]))


def test_single_column_and_quoted_line_break(tmp_path):
    assert csv_tables.read_table(written(tmp_path, "image\na.jpg\n"))["image"].tolist() == ["a.jpg"]
    table = csv_tables.read_table(written(tmp_path, 'image,note\na.jpg,"two\nlines, here"\nb.jpg,x\n'))
    assert table["note"].tolist() == ["two\nlines, here", "x"]


@pytest.mark.parametrize("text, words", [
    ("image,x\na.jpg,1\nb.jpg,2,3\nc.jpg\n", ["2 fields", "line 3 has 3"]),
    ("image,x\n" + "a.jpg,1,5\n" * 9, ["2 fields", "line 2 has 3", "4 more"]),
    ("image\na.jpg,1\n", ["1 fields", "line 2 has 2"]),
    ("image,x,x\na.jpg,1,2\n", ["column names", "x"]),
    ("", ["header", "0 line"]), ("\n\n", ["0 line"]), ("image,x\n", ["1 line"]),
    ('image,x\n"a.jpg,1\nb.jpg,2\n', ["line 3", "quotes"]),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["binary"]), (b"PK\x03\x04\x14\0\x06\0", ["binary"]),
    ("0,30,0\n1,31,1\n", ["twice: 0", "header line"]), (b"MATLAB 5.0 MAT-file\0", ["binary", "writetable"])])
def test_faulty_files_say_what_and_where(tmp_path, text, words):
    message = fails(csv_tables.read_table, written(tmp_path, text))
    assert "ratings.csv" in message and all(word in message for word in words), message


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in fails(csv_tables.read_table, tmp_path / "none.csv")
    assert "found a folder; join its tables in one." in fails(csv_tables.read_table, tmp_path)


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8)
cells = words.map(str.strip).filter(lambda cell: cell.lower() not in csv_tables.MISSING_CELLS and "\ufeff" not in cell)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), delimiter=st.sampled_from(",;\t"), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
       end=st.sampled_from(["\n", "\r\n"]), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_round_trip_of_any_table(data, delimiter, encoding, end, quoting):
    names = data.draw(st.lists(st.text("abcxyz_ ", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=5,
                               unique=True))
    rows = data.draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), min_size=1, max_size=6))
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([names, *rows])
    with tempfile.TemporaryDirectory() as folder:
        table = csv_tables.read_table(written(folder, buffer.getvalue(), encoding=encoding))
    assert list(table.columns) == names and table.to_numpy().tolist() == rows


# to_numbers

@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=20),
       delimiter=st.sampled_from(";\t"))
def test_decimal_comma_round_trip(values, delimiter):
    cells = ["" if value is None else str(value).replace(".", ",") for value in values]
    text = delimiter.join(["image", "x"]) + "\n" + "".join(f"{i}{delimiter}{cell}\n" for i, cell in enumerate(cells))
    with tempfile.TemporaryDirectory() as folder:
        table = csv_tables.read_table(written(folder, text))
    expected = [math.nan if value is None else value for value in values]
    np.testing.assert_array_equal(csv_tables.to_numbers(table["x"], "x"), expected)


def test_comma_in_a_comma_file_is_decimal_only_where_it_cannot_be_thousands(tmp_path):
    table = csv_tables.read_table(written(tmp_path, 'image,x,y,z\na,"1,25","1,234","1,5"\nb,"7,5","2,345",1.5\n'))
    assert csv_tables.to_numbers(table["x"], "x").tolist() == [1.25, 7.5]
    assert "'1,234' in line 2, '2,345' in line 3" in fails(csv_tables.to_numbers, table["y"], "ratings.csv, column y")
    assert "'1,5' in line 2" in fails(csv_tables.to_numbers, table["z"], "z")


@pytest.mark.parametrize("cell", ["abc", "inf", "1e999", "1_000", "5 %", "0x10", "--1", "1.2.3"])
def test_cells_that_are_no_numbers(tmp_path, cell):
    table = csv_tables.read_table(written(tmp_path, f"image,x\na,1\nb,{cell}\nc,2\n"))
    message = fails(csv_tables.to_numbers, table["x"], "ratings.csv, column x")
    assert message.startswith("ratings.csv, column x") and f"'{cell}' in line 3" in message


def test_numbers_of_a_list():
    numbers = csv_tables.to_numbers(["1", " 2.5e1 ", "NA", math.nan], "x")
    np.testing.assert_array_equal(numbers, [1, 25, math.nan, math.nan])


# read_ratings: layouts, columns, faults

def test_wide_integer_ids_and_excluded_columns(tmp_path):
    text = "stimulus,trustworthy,trustworthy_sd,trustworthy_n,subject_id,ID,camera,attractive\n" \
           "1,5,1.5,30,7,1,left,\n2,6,1.0,29,8,2,right,3\n3,4,.5,28,9,3,left,4\n"
    ratings = rating_tables.read_ratings(written(tmp_path, text))
    assert ratings.names == ["trustworthy", "attractive"] and ratings.images == ["1", "2", "3"]
    np.testing.assert_array_equal(ratings.mean, [[5, math.nan], [6, 3], [4, 4]])
    np.testing.assert_array_equal(ratings.sd[:, 0], [1.5, 1, .5])
    assert np.isnan(ratings.sd[:, 1]).all() and ratings.n[:, 0].tolist() == [30, 29, 28]
    assert list(ratings.extra.columns) == ["subject_id", "ID", "camera"]


def test_group_column_is_no_target_and_names_know_no_case(tmp_path):
    path = written(tmp_path, "FileName,session,Joy_Mean,joy_SD,Calm_mean\na,1,2,1,3\nb,2,3,1,4\n")
    ratings = rating_tables.read_ratings(path, group_column="session")
    assert ratings.names == ["Joy", "Calm"] and ratings.extra["session"].tolist() == ["1", "2"]
    assert rating_tables.read_ratings(path, target_columns=["calm"]).names == ["Calm"]
    wide = written(tmp_path, "image,session,joy\na,1,2\nb,2,3\n")
    assert rating_tables.read_ratings(wide).names == ["session", "joy"]
    ratings = rating_tables.read_ratings(wide, group_column="Session")
    assert ratings.names == ["joy"] and ratings.extra["Session"].tolist() == ["1", "2"]
    long = written(tmp_path, "rating,attribute,image,day\n1,x,a,1\n2,x,a,2\n3,x,b,1\n")
    assert "vary within an image" in fails(rating_tables.read_ratings, long, group_column="day")
    assert "--group_column" in fails(rating_tables.read_ratings, wide, group_column="image")


def test_long_table_against_pandas(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"rating": rng.integers(1, 10, 400), "attribute": rng.choice(["calm", "sad", "new"], 400),
                          "stimulus": rng.integers(1, 12, 400), "rater": rng.integers(0, 20, 400)})
    frame["family"] = "f" + (frame["stimulus"] % 3).astype(str)
    frame.to_csv(tmp_path / "long.csv", index=False)
    ratings = rating_tables.read_ratings(tmp_path / "long.csv")
    of_raters = frame.groupby(["stimulus", "attribute", "rater"])["rating"].mean().reset_index()
    assert len(of_raters) < 400, "some answer twice"
    wide = of_raters.pivot_table(
        index="stimulus", columns="attribute", values="rating", aggfunc=["mean", "std", "count"])
    wide = wide.loc[[int(name) for name in ratings.images]]
    for mine, what in ((ratings.mean, "mean"), (ratings.sd, "std"), (ratings.n, "count")):
        np.testing.assert_allclose(mine, wide[what][ratings.names].to_numpy(), rtol=1e-12)
    for r, name in enumerate(ratings.names):
        assert [len(a) for a in ratings.single_ratings[name]] == ratings.n[:, r].tolist()
        np.testing.assert_allclose([a.mean() for a in ratings.single_ratings[name]], ratings.mean[:, r])
    assert list(ratings.extra.columns) == ["family"] and any("rater" in note for note in ratings.notes)
    assert ratings.extra["family"].tolist() == ["f" + str(int(name) % 3) for name in ratings.images]
    assert rating_tables.read_ratings(tmp_path / "long.csv", target_columns=["sad"]).names == ["sad"]


@pytest.mark.parametrize("head", ["image,rater,calm", "image,rater,calm,seen", "stimulus,rater,rating,attribute"])
def test_a_rater_who_answers_twice_counts_once(tmp_path, head):
    """Two sessions of two raters: the raters differ by 4, each from himself by 2."""
    rows = ["a,A,1", "a,A,3", "a,B,5", "a,B,7", "b,A,2", "b,,3", "b,,4"]
    ends = {"attribute": ",calm", "seen": ",first"}
    end = ends.get(head.split(",")[-1], "")
    path = written(tmp_path, f"{head}\n" + "".join(f"{row}{end}\n" for row in rows))
    ratings = rating_tables.read_ratings(path)
    assert ratings.names == ["calm"] and ratings.n.tolist() == [[2], [3]], "blank names are nobody's"
    assert [each.tolist() for each in ratings.single_ratings["calm"]] == [[2, 6], [2, 3, 4]]
    assert ratings.mean.tolist() == [[4], [3]]
    np.testing.assert_allclose(ratings.sd, [[math.sqrt(8)], [1]])
    note = next(note for note in ratings.notes if "their mean counts once" in note)
    assert note.startswith("2 single ratings are further ones of the same rater") and "--attribute_column" in note


def test_numbers_of_raters_that_two_laboratories_share_are_noticed(tmp_path):
    """Two people who are both rater 1 count as one; which column tells them apart is named."""
    path = written(tmp_path, "image,lab,rater,calm\na,1,1,3\na,2,1,5\nb,1,2,4\nb,2,1,8\nb,2,2,6\n")
    ratings = rating_tables.read_ratings(path, target_columns=["calm"])
    assert ratings.n.tolist() == [[1], [2]]
    assert "They differ in lab, calm." in ratings.notes[-1] and "several people have one number" in ratings.notes[-1]


def test_single_ratings_that_stand_there_twice_differ_in_nothing(tmp_path):
    """The note named no column where a file was exported twice: They differ in ."""
    rows = "a,1,3\na,2,5\nb,1,4\nb,2,8\n"
    ratings = rating_tables.read_ratings(written(tmp_path, f"image,rater,calm\n{rows}{rows}"))
    assert "their mean counts once. They differ in nothing. Does" in ratings.notes[-1]


def test_the_ceiling_is_not_raised_by_raters_who_answer_twice(tmp_path):
    """Classical test theory: pictures, raters of pictures and answers of one rater vary by 1, 1 and .01."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=(400, 1)) + rng.normal(size=(400, 3))
    frame = pd.DataFrame(
        [(f"{i}.png", f"p{p}", own[i, p] + .1 * rng.normal()) for i in range(400) for p in range(3) for _ in "12"],
        columns=["image", "rater", "calm"])
    frame.to_csv(tmp_path / "twice.csv", index=False)
    ratings = rating_tables.read_ratings(tmp_path / "twice.csv")
    ceiling = rater_agreement.measure_ceiling(ratings.names, ratings.mean, single_ratings=ratings.single_ratings)
    assert abs(ceiling.r2[0] - 1 / (1 + 1 / 3)) < .05


def test_long_table_with_gaps(tmp_path):
    text = "rating,attribute,stimulus\n1,calm,a\n3,calm,a\n,calm,b\n5,sad,b\n4,calm,c\n4,sad,c\n"
    ratings = rating_tables.read_ratings(written(tmp_path, text))
    np.testing.assert_array_equal(ratings.mean, [[2, math.nan], [math.nan, 5], [4, 4]])
    np.testing.assert_array_equal(ratings.n, [[2, 0], [0, 1], [1, 1]])
    np.testing.assert_allclose(ratings.sd[0, 0], math.sqrt(2))
    assert np.isnan(ratings.sd[2, 0]) and "1 blank" in ratings.notes[0]
    assert [a.tolist() for a in ratings.single_ratings["calm"]] == [[1, 3], [], [4]]
    blank = written(tmp_path, "rating,attribute,stimulus\n,calm,a\n,sad,b\n")
    assert "all ratings are missing for a, b" in fails(rating_tables.read_ratings, blank)


def test_duplicates(tmp_path):
    path = written(tmp_path, "image,x_mean,x_sd,x_n,who\ns/a.jpg,1,1,10,p\nb.jpg,5,1,10,q\ns\\a.jpg,3,3,,r\n")
    message = fails(rating_tables.read_ratings, path)
    assert "1 images stand in 2 rows: s/a.jpg (lines 2, 4)" in message and "--duplicates mean" in message
    assert "single ratings?" not in message and "(sds of means are then not used)" in message
    ratings = rating_tables.read_ratings(path, duplicates="mean")
    assert ratings.images == ["s/a.jpg", "b.jpg"] and ratings.mean[:, 0].tolist() == [2, 5]
    assert ratings.sd[:, 0].tolist() == [2, 1] and ratings.n[:, 0].tolist() == [10, 10]
    assert "who" not in ratings.extra and "1 images" in ratings.notes[-1]
    assert "vary within an image" in fails(rating_tables.read_ratings, path, duplicates="mean", group_column="who")
    assert "what was asked, name it: --rater_column, --attribute_column" in message, "or means of several attributes"
    path = written(tmp_path, "image,x_mean,x_sd,rater\na.jpg,1,1,men\nb.jpg,5,1,men\na.jpg,3,2,women\n")
    assert "1 images stand in 2 rows" in fails(rating_tables.read_ratings, path), "each mean has raters of its own"
    path = written(tmp_path, "image,a,b_sd,b_n\na.jpg,1,1,5\nb.jpg,5,2,5\na.jpg,3,3,6\n")
    assert any("number of raters: b_sd, b_n" in note
               for note in rating_tables.read_ratings(path, duplicates="mean").notes)
    path = written(tmp_path, "image,x\na.jpg,1\nb.jpg,5\na.jpg,3\n")
    assert "if each row is a single rating, say --duplicates ratings" in fails(rating_tables.read_ratings, path)
    assert rating_tables.read_ratings(path, duplicates="mean").mean[:, 0].tolist() == [2, 5]


def test_two_spellings_of_one_picture_are_one_image(tmp_path):
    path = written(tmp_path, "image,rater,x\nb.jpg,p,1\ns/b.jpg,p,5\ns\\b.jpg,q,7\n")
    ratings = rating_tables.read_ratings(path)
    assert ratings.images == ["b.jpg", "s/b.jpg"] and ratings.mean[:, 0].tolist() == [1, 6]
    path = written(tmp_path, "image,rater,x\n1,p,1\n1.jpg,q,3\n")
    assert rating_tables.read_ratings(path).images == ["1", "1.jpg"], "it may be another file, as 1.png"


@pytest.mark.parametrize("text, options, words", [
    ("stimulus_no,Valence\n1,2\n", {}, ["has no image column (found: stimulus_no, Valence)", "--image_column",
                                            "rater and picture"]),
    ("image,Valence\na,2\nb,3\n", {"image_column": "imagee"}, ["--image_column", "did you mean image?"]),
    ("image,Valence\na,2\nb,3\n", {"target_columns": ["valense", "q"]}, ["did you mean Valence?", "q"]),
    ("image,Valence\na,2\nb,3\n", {"group_column": "subject"}, ["--group_column subject", "Valence"]),
    ("image,x,y\na,1,2\nb,,\nc,NA,nan\nd,2,3\n", {}, ["all ratings are missing for b, c"]),
    ("image,x,y\na,1,2\nb,1,3\n", {}, ["constant", "x", "--target_columns y"]),
    ("image,x,y\na,1,2\n", {}, ["constant", "x, y"]),
    ("image,seen_mean,y_mean\na,1,2\nb,2,3\n", {}, ["called seen", "columns of predictions", "Rename"]),
    ("file,image,y\na,1,2\nb,2,3\n", {"image_column": "file", "target_columns": ["image", "y"]}, ["called image"]),
    ("image,y,y_low,y_high\na,1,2,3\nb,2,3,4\n", {}, ["called y_high, y_low,", "Rename"]),
    ("image,y,y_sd\na,1,2\nb,2,3\n", {"target_columns": ["y", "y_sd"]}, ["called y_sd,", "Rename"]),
    ("image,x\na,1\n,3\n", {}, ["column image is blank in line 3"]),
    ("image,x\na,1\nb,tow\nc,3\n", {}, ["column x", "'tow' in line 3"]),
    ("image,x,x_sd,x_n\na,1,-.5,4\nb,2,0,4\nc,3,-3,-1\n", {},
     ["below 0", "x_sd in line 2, 4. Correct"]),
    ("image,x,y,n\na,1,2,4\nb,2,1,-3\n", {}, ["cannot be below 0", "n in line 3. Correct"]),
    ("image,place\na,left\nb,right\n", {}, ["numeric", "place"]),
    ("image,x_mean,X_mean \na,1,2\nb,2,3\n", {"target_columns": ["x_mean", "X_mean"]}, []),
    ("rating,attribute,image\n1,,a\n2,calm,b\n", {}, ["column attribute is blank in line 2"])])
def test_mistakes_in_a_ratings_table(tmp_path, text, options, words):
    path = written(tmp_path, text)
    if not words:
        assert rating_tables.read_ratings(path, **options).names == ["x", "X"]
        return
    message = fails(rating_tables.read_ratings, path, **options)
    assert "--ratings_file" in message and all(word in message for word in words), message
    assert not message.rstrip().endswith("--target_columns"), "a flag without a value"


def test_declared_codes_stand_for_unknown_numbers_of_raters_too(tmp_path):
    path = written(tmp_path, "image,x_mean,x_sd,x_n,y_mean\na,1,.5,4,1\nb,-99,-99,-99,2\nc,3,.5,4,3\n")
    table = rating_tables.read_ratings(path, missing_codes=[-99])
    assert all(np.isnan(values[:, 0]).tolist() == [False, True, False] for values in (table.mean, table.sd, table.n))


def test_a_code_of_ratings_is_no_code_of_numbers_of_raters_and_its_cells_are_counted(tmp_path):
    path = written(tmp_path, "image,x_mean,x_sd,x_n,y_mean\na,1,.5,99,1\nb,99,99,99,2\nc,3,.5,99,99\n")
    table = rating_tables.read_ratings(path, missing_codes=[99])
    assert (table.n[:, 0] == 99).all() and np.isnan(table.mean).sum() == 2 and np.isnan(table.sd[:, 0]).sum() == 1
    assert "cells taken for missing: x_mean 1, y_mean 1" in table.notes
    path = written(tmp_path, "image,O,N\na,1,2\nb,2,99\nc,4,4\n")  # N: a rating, such as of neuroticism
    assert np.isnan(rating_tables.read_ratings(path, target_columns=["O", "N"], missing_codes=[99]).mean[1, 1])
    assert "N is 99" in fails(rating_tables.read_ratings, path, target_columns=["O", "N"])
    path = written(tmp_path, "image,rater,x\na,p,1\na,q,99\nb,p,2\nb,q,4\n")
    assert "cells taken for missing: x 1" in rating_tables.read_ratings(path, missing_codes=[99]).notes


def test_image_column_by_name(tmp_path):
    path = written(tmp_path, "stimulus_no,Valence\n1,2\n2,3\n")
    ratings = rating_tables.read_ratings(path, image_column="stimulus_no")
    assert ratings.images == ["1", "2"] and ratings.names == ["Valence"]
    path = written(tmp_path, "filename,image,Valence\na.jpg,1,2\nb.jpg,2,3\n")
    ratings = rating_tables.read_ratings(path, image_column="filename")
    assert ratings.names == ["Valence"] and "columns that are no ratings: image" in ratings.notes


def test_ratings_with_blanks_in_their_names_are_quoted_in_what_to_type(tmp_path):
    path = written(tmp_path, "image,Ear position,pain,flat\na,1,2,3\nb,2,3,3\n")
    assert "Leave them out: --target_columns 'Ear position' pain" in fails(rating_tables.read_ratings, path)
    path = written(tmp_path, "image,pain,flat\na,3,3\nb,3,3\n")
    assert fails(rating_tables.read_ratings, path).endswith("(nothing to learn): pain, flat.")


def test_the_rating_column_of_a_table_with_one_row_an_image(tmp_path):
    path = written(tmp_path, "image,age,rating\na,20,1\nb,30,2\n")
    assert rating_tables.read_ratings(path, rating_column="rating").names == ["rating"]
    path = written(tmp_path, "image,user_rating,age\na,1,20\nb,2,30\n")
    assert rating_tables.read_ratings(path).names == ["user_rating", "age"], "what a user answered is a rating"


def test_order_is_a_rating_where_rows_are_no_trials(tmp_path):
    path = written(tmp_path, "stimulus,beauty,order,Social order\na,1,2,3\nb,2,3,5\n")
    assert rating_tables.read_ratings(path).names == ["beauty", "order", "Social order"]


# single ratings: one row per rater

def rated_by(columns, n_images=6, n_raters=4):
    """A table of single ratings as pandas makes it, in random order; each column is (name, function of i, rater)."""
    rows = [{"image": f"{i}.png", **{name: make(i, p) for name, make in columns.items()}}
            for i in range(n_images) for p in range(n_raters)]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def spread(i, p):
    return (3 * i + 2 * p + i * p) % 7 + 1


@pytest.mark.parametrize("rater", ["participant", "Rater ID", "subject_nr", "workerId"])
def test_one_row_per_rater_gives_mean_sd_n_and_the_ratings(tmp_path, rater):
    frame = rated_by({rater: lambda i, p: p + 1, "age": lambda i, p: 20 + p, "gender": lambda i, p: "fm"[p % 2],
                      "smart": spread, "calm": lambda i, p: spread(i + 1, p), "trial": lambda i, p: i,
                      "stimulusnumber1": lambda i, p: i, "trialnum": spread, "blocknum": spread, "Order": spread})
    frame.to_csv(tmp_path / "raw.csv", index=False)
    ratings = rating_tables.read_ratings(tmp_path / "raw.csv")
    assert ratings.names == ["smart", "calm"], "age and gender describe the rater, others the picture or its place"
    expected = frame.groupby("image")[ratings.names].agg(["mean", "std", "count"]).loc[ratings.images]
    for mine, what in ((ratings.mean, "mean"), (ratings.sd, "std"), (ratings.n, "count")):
        np.testing.assert_allclose(mine, expected.xs(what, axis=1, level=1).to_numpy(), rtol=1e-12)
    assert [len(each) for each in ratings.single_ratings["calm"]] == [4] * 6
    assert "columns that are no ratings: trial, stimulusnumber1" in ratings.notes
    assert any(f"--rater_column {rater}" in note for note in ratings.notes)


PSYCHOPY = ["thisRow.t", "face.started", "slider_calm.rt", "slider_calm.started", "slider_calm.stopped", "mouse.x",
            "mouse.leftButton"]
GORILLA = ["UTC Timestamp", "Spreadsheet Row", "Trial Number", "Screen Number", "Reaction Time", "X Coordinate"]
OTHERS = ["time_elapsed", "Duration (in seconds)", "Slide.OnsetTime"]  # jsPsych, Qualtrics, E-Prime


@pytest.mark.parametrize("others, answer", [
    (PSYCHOPY, "slider_calm.response"), (GORILLA, "Response"), (OTHERS, "Q5_1")])
def test_times_and_places_of_an_experiment_are_no_ratings(tmp_path, others, answer):
    makes = {name: lambda i, p, k=k: round(spread(i + k, p) * 1.37, 3) for k, name in enumerate(others)}
    frame = rated_by({"Participant ID": lambda i, p: f"p{p}", **makes, answer: spread})
    frame.to_csv(tmp_path / "raw.csv", index=False)
    assert rating_tables.read_ratings(tmp_path / "raw.csv").names == [answer]
    wanted = rating_tables.read_ratings(tmp_path / "raw.csv", target_columns=[others[0]])
    assert wanted.names == [others[0]]


@pytest.mark.parametrize("further", [{}, {"rating_column": "y"}])
def test_what_was_asked_is_told_apart_beside_times_and_a_named_rating(tmp_path, further):
    frames = [rated_by({"participant": lambda i, p: f"p{p}", "Reaction Time": spread, "Screen Name":
                        lambda i, p, name=name: name, "y": lambda i, p, k=k: 10 * k + spread(i, p),
                        **({"x": spread} if further else {})}) for k, name in enumerate(["smart", "calm"])]
    pd.concat(frames).to_csv(tmp_path / "raw.csv", index=False)
    ratings = rating_tables.read_ratings(tmp_path / "raw.csv", **further)
    assert ratings.names == ["smart", "calm"] and (ratings.n == 4).all()
    np.testing.assert_allclose(ratings.mean[:, 1] - ratings.mean[:, 0], 10)


@pytest.mark.parametrize("names, is_said", [(["rater1", "rater2", "Rater3"], True), (["P1", "P2", "P3"], True),
                                            (["Ears_Obs1", "Ears_Obs2", "EyesObs 3"], True),
                                            (["warm1", "warm2", "rater1"], False)])
def test_a_column_for_each_rater_is_said_to_be_learnt_as_a_rating(tmp_path, names, is_said):
    frame = pd.DataFrame({"image": [f"{i}.png" for i in range(9)], **{name: np.arange(9.0) for name in names}})
    frame.to_csv(tmp_path / "wide.csv", index=False)
    ratings = rating_tables.read_ratings(tmp_path / "wide.csv")
    said = [note for note in ratings.notes if "learnt as 3 ratings" in note]
    assert ratings.names == names and len(said) == is_said
    assert all("image, rater, rating" in note and names[1] in note for note in said)


@pytest.mark.parametrize("attribute", ["trait", "Question", "shown_word"])
def test_a_text_that_varies_within_an_image_is_the_attribute_and_never_averaged_over(tmp_path, attribute):
    frames = [rated_by({"participant": lambda i, p: f"p{p}", attribute: lambda i, p, name=name: name, "gender":
                        lambda i, p: "fm"[p % 2], "answer": lambda i, p, k=k: 10 * k + spread(i, p),
                        "trialnum": spread})
              for k, name in enumerate(["smart", "calm"])]
    pd.concat(frames).to_csv(tmp_path / "long.csv", index=False)
    for duplicates in ("error", "mean"):
        ratings = rating_tables.read_ratings(tmp_path / "long.csv", duplicates=duplicates)
        assert ratings.names == ["smart", "calm"] and (ratings.n == 4).all()
        np.testing.assert_allclose(ratings.mean[:, 1] - ratings.mean[:, 0], 10)


def test_flags_name_what_would_be_a_guess(tmp_path):
    frame = rated_by({"who": lambda i, p: f"p{p}", "word": lambda i, p: "ab"[p % 2], "x": spread, "y": spread})
    frame.to_csv(tmp_path / "raw.csv", index=False)
    read = rating_tables.read_ratings
    frame.rename(columns={"word": "trait"}).assign(scale=frame["word"] * 2).to_csv(tmp_path / "two.csv", index=False)
    assert "trait, scale vary within an image" in fails(read, tmp_path / "two.csv", duplicates="ratings")
    ratings = read(tmp_path / "two.csv", attribute_column="scale", rating_column="y")
    assert sorted(ratings.names) == ["aa", "bb"]
    message = fails(read, tmp_path / "raw.csv")
    assert "6 images stand in 24 rows" in message and len(message) < 700 and "--rater_column" in message
    assert message.count("(lines ") == 6, "up to ten are listed"
    assert read(tmp_path / "raw.csv", rater_column="who").names == ["x", "y"]
    assert (read(tmp_path / "raw.csv", duplicates="ratings").n == 4).all()
    assert "--rating_column" in fails(read, tmp_path / "raw.csv", attribute_column="word")
    ratings = read(tmp_path / "raw.csv", attribute_column="word", rating_column="y")
    assert sorted(ratings.names) == ["a", "b"] and (ratings.n == 2).all()
    assert read(tmp_path / "raw.csv", rater_column="who", target_columns=["y"]).names == ["y"]


@pytest.mark.parametrize("flag", ["attribute_column", "rater_column", "rating_column", "group_column"])
def test_a_flag_that_names_an_unfit_column_is_one_line(tmp_path, flag):
    path = written(tmp_path, "image,x,y,trait\na,1,2,kind\nb,2,4,calm\nc,3,5,kind\n")
    assert "--rating_column" in fails(rating_tables.read_ratings, path, attribute_column="trait")
    assert f"--{flag}" in fails(rating_tables.read_ratings, path, **{flag: "image"})


@pytest.mark.parametrize("flag", [{"rater_column": "who"}, {"duplicates": "ratings"}])
def test_rows_that_a_flag_calls_single_ratings_are_so_beside_a_column_of_sds(tmp_path, flag):
    """As in tables of PsychoPy, which has rt_mean and rt_std of each participant and picture."""
    text = "image,who,Valence,rt_mean,rt_std\na,r,1,2,0\na,s,3,4,0\nb,r,4,1,0\nb,s,8,2,0\n"
    ratings = rating_tables.read_ratings(written(tmp_path, text), **flag)
    assert ratings.names == ["Valence"] and ratings.mean[:, 0].tolist() == [2, 6]
    assert ratings.n[:, 0].tolist() == [2, 2] and ratings.single_ratings["Valence"][1].tolist() == [4, 8]


def test_an_attribute_by_flag_needs_no_repeated_image(tmp_path):
    path = written(tmp_path, "image,x,trait\na,1,kind\nb,2,calm\nc,3,kind\nd,4,calm\n")
    ratings = rating_tables.read_ratings(path, attribute_column="trait")
    assert ratings.names == ["kind", "calm"] and ratings.images == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(ratings.n, [[1, 0], [0, 1], [1, 0], [0, 1]])


def test_a_column_called_attribute_asks_nothing_where_none_is_called_rating(tmp_path):
    path = written(tmp_path, "image,attribute,Valence,Arousal\na,indoor,1,7\nb,outdoor,2,5\nc,indoor,4,6\n")
    ratings = rating_tables.read_ratings(path)
    assert ratings.names == ["Valence", "Arousal"] and ratings.mean.tolist() == [[1, 7], [2, 5], [4, 6]]
    assert list(ratings.extra["attribute"]) == ["indoor", "outdoor", "indoor"]


# missing codes

@pytest.mark.parametrize("code, scale", [(-9, 7), (-99, 100), (99, 9), (999, 100), (9999, 100), (88, 7), (-7, 5),
                                         (9, 2), (8, 2), (7, 2)])
def test_codes_for_missing_answers_stop_the_run_or_are_missing(tmp_path, code, scale):
    values = [1 + (scale - 1) * i / 9 for i in range(10)]
    values[3] = values[7] = code
    path = written(tmp_path, "image,x\n" + "".join(f"{i},{value:.3f}\n" for i, value in enumerate(values)))
    message = fails(rating_tables.read_ratings, path)
    assert f"x is {code} in 2 cells (line 5, 9)" in message and "--missing_codes" in message
    assert rating_tables.read_ratings(path, missing_codes=[]).mean.tolist() == [[round(value, 3)] for value in values]
    with pytest.raises(common.UserError, match="all ratings are missing for 3, 7"):
        rating_tables.read_ratings(path, missing_codes=[code])
    assert f"x is {code} in 2 cells" in fails(rating_tables.read_ratings, path, missing_codes=[-98])


def test_high_ratings_are_no_codes(tmp_path):
    for values in ([0, 50, 77, 88, 99, 100], [1, 5, 9, 8, 7], [-40, -9, 3, 80], [300, 999, 700, 880],
                   [0, 1, 2, 9], [1, 7, 7, 1], [0, 1, 4, 9, 9]):
        text = "image,x,n\n" + "".join(f"{i},{value},{99 if i else 3}\n" for i, value in enumerate(values))
        assert rating_tables.read_ratings(written(tmp_path, text)).mean[:, 0].tolist() == values


def test_codes_of_single_ratings_leave_the_image(tmp_path):
    frame = rated_by({"rater": lambda i, p: p, "x": lambda i, p: 999 if (i + p) % 4 == 0 else spread(i, p)})
    frame.to_csv(tmp_path / "raw.csv", index=False)
    assert "x is 999 in 6 cells" in fails(rating_tables.read_ratings, tmp_path / "raw.csv")
    assert (rating_tables.read_ratings(tmp_path / "raw.csv", missing_codes=[999]).n == 3).all()


# which columns are ratings

@pytest.mark.parametrize("head, names", [
    ("mean_valence,sd_valence,n_valence", ["valence"]), ("Valence Mean,Valence SD,Valence N", ["Valence"]),
    ("Valence.Mean,Valence.SD,Valence.N", ["Valence"]), ("valence_mean,valence_std,valence_count", ["valence"]),
    ("valence,valenceSD,valence count", ["valence"]), ("ValenceMean,ValenceSD,ValenceN", ["Valence"]),
    ("X,XSD,n", ["X"]), ("val,valsd,n", ["val"]), ("V.Mean.Sum,V.SD.Sum,V.N.Sum", ["V.Sum"]), ("Valence_M,Valence_SD,Valence_N", ["Valence"]),
    ("V_mean_men,V_SD_men,V_N_men,V_mean_women,V_SD_women,V_N_women", ["V_men", "V_women"]),
    ("V_mean_m,V_sd_m,V_n_m,V_mean_f,V_sd_f,V_n_f", ["V_m", "V_f"]),
    ("V_mean,V_sd,n_raters", ["V"])])
def test_mean_sd_and_n_are_words_of_a_name_in_any_place(tmp_path, head, names):
    rows = "".join(f"{i}.png,{','.join([f'{i},1.{i},2{i}'] * len(names))}\n" for i in range(1, 9))
    ratings = rating_tables.read_ratings(written(tmp_path, f"image,{head}\n{rows}"))
    assert ratings.names == names and ratings.mean[:, 0].tolist() == list(range(1, 9))
    assert ratings.sd[:, -1].tolist() == [1 + i / 10 for i in range(1, 9)]
    assert ratings.n[:, 0].tolist() == list(range(21, 29))


def test_traits_are_no_words_of_that_kind_and_what_is_not_used_is_named(tmp_path):
    text = "image,kind,mean,smart,n_children,calm_SE\n" + "".join(f"{i},{i},{9 - i},{i},2,1.{i}\n" for i in range(4))
    ratings = rating_tables.read_ratings(written(tmp_path, text))
    assert ratings.names == ["kind", "mean", "smart"]
    assert "n_children, calm_SE" in ratings.notes[-1]
    path = written(tmp_path, "image,V_mean,A_mean,A_sd\na,1,2,1\nb,2,3,1\n")
    assert rating_tables.read_ratings(path, target_columns=["V"]).notes[-1].endswith("a number of raters: A_sd")


def test_an_sd_that_is_to_be_learnt_is_not_its_own_sd(tmp_path):
    """How far raters disagree may be what is asked: the noise ceiling and --loss weighted would read it as noise."""
    path = written(tmp_path, "image,x_mean,x_sd,x_n\na,1,1,20\nb,2,3,20\n")
    ratings = rating_tables.read_ratings(path, target_columns=["x_sd"])
    assert ratings.names == ["x_sd"] and ratings.mean[:, 0].tolist() == [1, 3]
    assert ratings.sd is None and ratings.n is None


@pytest.mark.parametrize("column", ["num_raters", "Number of raters", "participants", "valsd"])
def test_what_is_known_of_the_raters_is_no_rating(tmp_path, column):
    path = written(tmp_path, f"image,valmn,{column}\na,1,20\nb,2,25\nc,4,21\n")
    assert rating_tables.read_ratings(path).names == ["valmn"]


@pytest.mark.parametrize("column", ["ptsd", "price_usd"])
def test_a_word_that_ends_in_sd_is_no_sd(tmp_path, column):
    path = written(tmp_path, f"image,fear,{column}\na,1,20\nb,2,25\nc,4,21\n")
    assert rating_tables.read_ratings(path).names == ["fear", column]


@pytest.mark.parametrize("column", ["participant_age", "rater_sex"])
def test_what_describes_a_rater_does_not_tell_raters_apart(tmp_path, column):
    """Answers of all raters of one age were averaged, as those of one person."""
    rows = [(image, (20, 30)[rater % 2], f"r{rater}", score + rater)
            for image, score in (("a", 1), ("b", 3)) for rater in range(4)]
    text = f"image,{column},user_id,rating\n" + "".join(f"{a},{b},{c},{d}\n" for a, b, c, d in rows)
    ratings = rating_tables.read_ratings(written(tmp_path, text))
    assert ratings.names == ["rating"] and ratings.n.tolist() == [[4], [4]]
    assert "--rater_column user_id" in ratings.notes[-1]
    text = f"image,{column},rating\n" + "".join(f"{a},{'old' * (b == 30) or 'young'},{d}\n" for a, b, _, d in rows)
    assert "a column says who rated" in fails(rating_tables.read_ratings, written(tmp_path, text))
    assert rating_tables.read_ratings(tmp_path / "ratings.csv", duplicates="ratings").n.tolist() == [[4], [4]]


def test_the_mouse_of_a_grimace_scale_and_the_right_side_are_ratings(tmp_path):
    text = "image,observer,mouse_pain,ear_r,eye_r,mouse.x\na,p,1,1,2,7\na,q,2,1,1,8\nb,p,2,2,1,9\nb,q,3,3,1,6\n"
    assert rating_tables.read_ratings(written(tmp_path, text)).names == ["mouse_pain", "ear_r", "eye_r"]
    ratings = rating_tables.read_ratings(written(tmp_path, "image,ear_r,eye_r\na,1,2\nb,2,4\n"))
    assert not ratings.notes, "no note that r may be a rater"


@pytest.mark.parametrize("column", ["num_raters", "n_raters", "participants"])
def test_a_number_of_raters_that_varies_within_an_image_says_not_who_rated(tmp_path, column):
    """Else means would be read as single ratings, and have a noise ceiling made of nothing."""
    text = f"image,trait,score,{column}\na,kind,1,20\na,calm,2,21\nb,kind,3,22\nb,calm,5,19\n"
    ratings = rating_tables.read_ratings(written(tmp_path, text))
    assert ratings.names == ["kind", "calm"] and ratings.mean.tolist() == [[1, 2], [3, 5]]
    text = f"image,score,{column}\na,1,20\na,2,21\nb,3,22\nb,5,19\n"
    ratings = rating_tables.read_ratings(written(tmp_path, text), duplicates="mean")
    assert ratings.names == ["score"] and ratings.mean.tolist() == [[1.5], [4]] and not ratings.single_ratings


def test_damaged_cells_are_missing_percent_or_an_error(tmp_path):
    path = written(tmp_path, "image,x,y\na,.,12%\nb,NULL,13%\nc,-,n.a.\nd,4,#N/A\ne,5,1\n")
    ratings = rating_tables.read_ratings(written(tmp_path, path.read_text().replace("c,-,n.a.", "c,-,3%")))
    np.testing.assert_array_equal(ratings.mean, [[math.nan, 12], [math.nan, 13], [math.nan, 3], [4, math.nan], [5, 1]])
    path = written(tmp_path, "image,x,y\na,4 !,1\nb,5 ?,2\nc,6,3\nd,ok,4\n")
    assert "'4 !' in line 2, '5 ?' in line 3, 'ok' in line 5" in fails(rating_tables.read_ratings, path)


# what Excel and R write

TWENTY = [(f"face{i:02d}.png", 2 + i / 4, 8 - i / 5) for i in range(20)]
WRITTEN = {
    "sep line": ["sep=;", "image;x;y", *(f"{n};" + f"{a};{b}".replace(".", ",") for n, a, b in TWENTY)],
    "rows quoted": ['"""image"",""x"",""y"""', *(f'"""{n}"",{a},{b}"' for n, a, b in TWENTY)],
    "title": ["Table 1. Mean ratings", "", "image,x,y", *(f"{n},{a},{b}" for n, a, b in TWENTY)],
    "title with blank cells": ["Mean ratings,,", "image,x,y", *(f"{n},{a},{b}" for n, a, b in TWENTY)],
    "comments": ["# Ratings of 2024", "# scale, 1 to 9", "image,x,y", *(f"{n},{a},{b}" for n, a, b in TWENTY)],
    "row names": ['"image" "x" "y"', *(f'"{i}" "{n}" {a} {b}' for i, (n, a, b) in enumerate(TWENTY))],
    "columns of blanks": ["image          x     y", *(f"{n}   {a}  {b}" for n, a, b in TWENTY)],
    "no header": [f"{n},{a},{b}" for n, a, b in TWENTY],
    "no header, blanks": [f"{n} {a} {b}" for n, a, b in TWENTY],
    "short and long rows": ["image,x,y,note", *(f"{n},{a},{b}" + "," * (i % 4) for i, (n, a, b) in enumerate(TWENTY))],
}


def test_a_delimiter_at_the_end_of_each_row_is_no_cell(tmp_path):
    """R's names of rows are one cell more too; where a last cell is filled it is one."""
    table = csv_tables.read_table(written(tmp_path, "stimulus,trust,calm\n1,4,6,\n2,7,4,\n"))
    assert list(table.columns) == ["stimulus", "trust", "calm"] and table["stimulus"].tolist() == ["1", "2"]
    for note in ("blurred", ""):
        table = csv_tables.read_table(written(tmp_path, f"image,x,note\n1,a.jpg,4,\n2,b.jpg,7,{note}\n"))
        assert table["image"].tolist() == ["a.jpg", "b.jpg"] and table["note"].tolist() == ["", note]


@pytest.mark.parametrize("layout", WRITTEN)
def test_tables_as_excel_and_r_write_them(tmp_path, layout):
    ratings = rating_tables.read_ratings(written(tmp_path, "\r\n".join(WRITTEN[layout]) + "\r\n"))
    assert ratings.images == [n for n, _, _ in TWENTY] and len(ratings.names) == 2
    np.testing.assert_allclose(ratings.mean, [[a, b] for _, a, b in TWENTY])
    assert ratings.notes or layout in ("sep line", "columns of blanks")


# find_images, match_images

def match_images(names, folder, **options):
    """file_names.match_images, the paths in the order of the names."""
    found, unmatched, notes = file_names.match_images(names, folder, **options)
    return [found[name] for name in names], unmatched, notes


def touch(folder, *names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def matched(names, folder):
    paths, unmatched, _ = match_images(names, folder)
    return [path and path.relative_to(folder).as_posix() for path in paths], unmatched


def test_find_images_order_and_what_is_ignored(tmp_path):
    touch(tmp_path, "10.jpg", "2.JPG", "1.Png", "sub/3.webp", "._1.jpg", ".hidden/4.jpg", "notes.txt", "Ä 5.tif")
    found = [path.relative_to(tmp_path).as_posix() for path in file_names.find_images(tmp_path)]
    assert found == ["1.Png", "2.JPG", "10.jpg", "sub/3.webp", "Ä 5.tif"]
    assert "no such folder" in fails(file_names.find_images, tmp_path / "none")


def test_find_images_follows_linked_folders_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "back").symlink_to(tmp_path / "images")
    found = [path.relative_to(tmp_path / "images").as_posix() for path in file_names.find_images(tmp_path / "images")]
    assert found == ["linked/1.png"]


@pytest.mark.parametrize("name, file", [
    ("1", "1.jpg"), ("1.jpg", "1.jpg"), ("1.JPG", "1.jpg"), ("1.png", "1.jpg"), ("stimuli/1.jpg", "1.jpg"),
    ("stimuli\\set a\\1.jpg", "1.jpg"), ("./1.jpg", "1.jpg"), ("B", "sub/b.PNG"), ("sub/b.png", "sub/b.PNG"),
    ("01.jpg", "1.jpg"), ("two%20words", "two words.jpg"), ("x/sub/b", "sub/b.PNG"), ("other/b.png", "sub/b.PNG"),
    ("v1.2", "v1.2.jpg"), ("11", None), ("two words.jpg",) * 2,
    (unicodedata.normalize("NFD", "grün.jpg"), "grün.jpg")])
def test_spellings_of_one_image(tmp_path, name, file):
    touch(tmp_path, "1.jpg", "sub/b.PNG", "v1.2.jpg", "two words.jpg", "grün.jpg")
    paths, unmatched = matched([name], tmp_path)
    assert paths == [file] and len(unmatched) == 5 - (file is not None) and file not in unmatched


def test_names_as_a_browser_writes_them(tmp_path):
    """As annotation tools export them; a file of the very name goes before, and --exact_names guesses nothing."""
    touch(tmp_path, "day 1/a.jpg", "day 2/a.jpg", "50%25.jpg", "50%.jpg")
    names = ["day%201/a.jpg", "x/day%202/a.jpg", "50%25.jpg", "%2e%2e/etc/passwd"]
    paths, _, notes = match_images(names, tmp_path)
    found = [path and path.relative_to(tmp_path).as_posix() for path in paths]
    assert found == ["day 1/a.jpg", "day 2/a.jpg", "50%25.jpg", None]
    assert "2 of 4 names are of another folder or spelling" in notes[0] and "day%201/a.jpg -> day 1/a.jpg" in notes[0]
    assert match_images(names, tmp_path, exact=True)[0] == [None, None, tmp_path / "50%25.jpg", None]
    touch(tmp_path, "sub/c%20d.jpg")
    assert match_images(["other/c%20d.jpg"], tmp_path)[0] == [tmp_path / "sub" / "c%20d.jpg"]


def test_decomposed_names_on_disk(tmp_path):
    touch(tmp_path, unicodedata.normalize("NFD", "grün.jpg"))
    assert match_images(["grün.jpg"], tmp_path)[0][0].is_file()


def test_exact_names_win_over_near_ones(tmp_path):
    touch(tmp_path, "1.jpg", "1.png", "a/1.jpg", "b/2.jpg", "c/2.jpg", "K.jpg", "k.jpg", "3.JPG", "3.png")
    assert matched(["1.png", "a/1.jpg", "1.jpg", "c/2", "K", "k.jpg", "3.jpg"], tmp_path)[0] == [
        "1.png", "a/1.jpg", "1.jpg", "c/2.jpg", "K.jpg", "k.jpg", "3.JPG"]
    message = fails(file_names.match_images, ["1", "2.jpg"], tmp_path)
    assert "1 -> 1.jpg, 1.png" in message and "2.jpg -> b/2.jpg, c/2.jpg" in message


def test_two_names_for_one_file(tmp_path):
    touch(tmp_path, "1.jpg")
    assert "1, 1.jpg -> 1.jpg" in fails(file_names.match_images, ["1", "1.jpg"], tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "../../etc/passwd", "/etc/passwd", "C:\\faces\\1.jpg",
                                  "a/../../1.jpg", "..\\secret.jpg", "\\\\server\\share\\1.jpg", "e:1.jpg"])
def test_names_that_leave_the_folder_mean_a_file_inside_or_none(tmp_path, name):
    touch(tmp_path, "secret.jpg", "images/1.jpg")
    paths, unmatched, notes = match_images([name], tmp_path / "images")
    is_one = name.endswith("1.jpg")
    assert paths == [tmp_path / "images" / "1.jpg" if is_one else None] and len(unmatched) == 1 - is_one
    assert len(notes) == 1 and ("-> 1.jpg" in notes[0] if is_one else "fit no picture" in notes[0])


def test_a_base_name_counts_only_where_it_is_unique_on_both_sides(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "s1/c.jpg", "s1/000.jpg", "s2/d.jpg", "s3/d.jpg", "8.jpg", "008.jpg")
    names = [" images\\1/a.jpg", "images/1/b.jpg", "images/2/b.jpg", " s1/c.jpg ", "s2/c.jpg", "0", "x/d.jpg", "08", "00a", ".."]
    paths, unmatched, notes = match_images(names, tmp_path)
    found = [path and path.relative_to(tmp_path).as_posix() for path in paths]
    assert found == ["images/a.jpg", None, None, "s1/c.jpg", None, "s1/000.jpg", None, None, None, None]
    assert "2 of 10 names" in notes[0] and "7 of 10 names fit no picture" in notes[1] and "--exact_names" in notes[0]
    paths, _, notes = match_images(names, tmp_path, exact=True)
    assert [name for name, path in zip(names, paths) if path] == [" s1/c.jpg "] and "9 of 10 names fit no" in notes[0]


def test_names_that_fit_nothing_are_loud_with_the_likely_reasons(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(20)))
    _, _, notes = match_images([*map(str, range(18)), "x", "y"], tmp_path)
    assert notes == []
    _, _, notes = match_images([*map(str, range(17)), "x", "y", "z"], tmp_path)
    assert "3 of 20" in notes[0] and "3 files have no row" in notes[0]
    assert "UTF-8" in match_images(["1", "gr\u201en.jpg"], tmp_path)[2][0]


def test_absolute_names_inside_and_links(tmp_path, monkeypatch):
    touch(tmp_path, "images/1.jpg", "elsewhere/2.jpg")
    os.symlink(tmp_path / "elsewhere" / "2.jpg", tmp_path / "images" / "2.jpg")
    names = [str(tmp_path / "images" / "1.jpg"), "2.jpg"]
    assert matched(names, tmp_path / "images") == (["1.jpg", "2.jpg"], [])
    monkeypatch.chdir(tmp_path)
    assert match_images(names, Path("images"), exact=True) == ([Path("images/1.jpg"), Path("images/2.jpg")], [], []), "no guess"


def test_many_files_of_one_name_in_different_folders(tmp_path):
    names = [f"subject_{i:03d}/1.jpg" for i in range(300)]
    touch(tmp_path, *names)
    assert matched([f"study\\{name}" for name in names], tmp_path) == (names, [])


def test_folder_without_images(tmp_path):
    assert "found none" in fails(file_names.match_images, ["1"], tmp_path)


@settings(max_examples=50, deadline=None)
@given(name=st.text(st.sampled_from("ab./\\:~ \u0301é1"), max_size=14))
def test_no_name_ever_resolves_outside(name):
    with tempfile.TemporaryDirectory() as folder:
        touch(folder, "out/a.jpg", "in/b.jpg", "in/a/1.jpg")
        try:
            path = match_images([name], Path(folder, "in"))[0][0]
        except common.UserError:
            return
        assert path is None or Path(folder, "in").resolve() in path.resolve().parents


def test_fingerprint_knows_order_type_and_borders():
    items = ["a", b"a", "ab", np.arange(3), np.arange(3.0), 1]
    prints = [common.data_fingerprint([item]) for item in items]
    prints += [common.data_fingerprint(pair) for pair in (["a", "b"], ["b", "a"], ["ab", ""], ["", "ab"])]
    assert len(set(prints)) == len(prints) and all(len(text) == 64 for text in prints)
    assert common.data_fingerprint(items) == common.data_fingerprint(list(items))


@pytest.mark.long
@needs_omi
def test_omi_files_agree_with_each_other(tmp_path):
    fourteen = rating_tables.read_ratings(OMI / "ratings_14.csv")
    every = rating_tables.read_ratings(OMI / "attribute_means.csv")
    quoted = rating_tables.read_ratings(OMI / "quoted_header_mean_sd.csv")
    raw = rating_tables.read_ratings(OMI / "raw_ratings_14.csv.gz")
    assert (len(every.names), len(fourteen.names), len(raw.names)) == (34, 14, 14) and raw.n.sum() == 458_634
    assert quoted.names == [name.capitalize() for name in fourteen.names] and quoted.sd.shape == (804, 14)
    np.testing.assert_array_equal(every.mean[:, [every.names.index(name) for name in fourteen.names]], fourteen.mean)
    for ratings in (every, fourteen, quoted, raw):
        paths, unmatched, notes = match_images(ratings.images, OMI / "images")
        assert unmatched == notes == []
        assert [path.stem for path in paths] == [Path(name).stem for name in ratings.images]
    with gzip.open(OMI / "raw_ratings_14.csv.gz", "rt") as source:
        first_time = [line for line in source if line.split(",")[2] in ("rating_type", "normal")]
    normal = rating_tables.read_ratings(written(tmp_path, "".join(first_time)))
    rows = [normal.images.index(Path(name).stem) for name in quoted.images]
    columns = [normal.names.index(name.lower()) for name in quoted.names]
    np.testing.assert_allclose(normal.mean[rows][:, columns] / 10, quoted.mean, rtol=1e-12)
    np.testing.assert_allclose(normal.sd[rows][:, columns] / 10, quoted.sd, rtol=1e-12)
