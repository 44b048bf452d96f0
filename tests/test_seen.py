"""Rows that were seen are never called unseen: what a checkpoint keeps of them, and what every judge makes of it.

    python -m pytest tests/test_seen.py
"""
import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import common
from conftest import only_run, run_here, run_script, small_run
from evidence import judging, prediction_tables, row_warnings, seen_rows
from readers import pixel_cache


def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as handle:
        return list(csv.DictReader(handle))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def seen_in(path):
    return {row["seen"] for row in read_csv(path)}


# --- what a checkpoint keeps ------------------------------------------------------------------

def test_a_row_is_seen_where_one_of_its_hashes_is():
    """Hashes are whole numbers of 64 bits, of which a float would keep the first 53."""
    one, two, three, four, five, nine = 2 ** 60 + np.arange(6)
    seen = seen_rows.SeenRows([one, four], [two])
    hashes = np.array([[one, nine], [nine, four], [two, nine], [four, two], [nine, three], [nine, five]])
    assert seen.words(hashes).tolist() == ["train", "train", "chose", "train", "new", "new"]
    both = [seen.plus(seen_rows.SeenRows([three], [])), seen_rows.SeenRows([], [three]).plus(seen)]
    assert both[0].words(hashes).tolist() == ["train", "train", "chose", "train", "train", "new"]
    assert both[1].words(hashes).tolist() == ["train", "train", "chose", "train", "chose", "new"]


def test_the_worst_word_counts():
    words = [["new", "chose", "new"], ["new", "train", "not known"]]
    assert seen_rows.worst_of_each(words).tolist() == ["new", "train", "not known"]
    assert seen_rows.worst(np.array(words[0])) == "chose"


def test_a_checkpoint_gives_back_what_it_has_seen(tmp_path):
    seen = seen_rows.SeenRows(np.array([3, 5]), np.array([4]))
    content = {"seen": {"fitted": seen.fitted, "chose": seen.chose}}
    common.save_checkpoint(tmp_path / "c.pth", common.to_plain_types(content))
    found = seen_rows.of_checkpoint(common.read_checkpoint(tmp_path / "c.pth"))
    assert found.fitted.tolist() == [3, 5] and found.chose.tolist() == [4]


def test_validation_rows_chose_unless_the_last_epoch_counts_and_a_start_brings_its_own_rows(tmp_path):
    hashes = np.arange(10).reshape(5, 2)
    split = {"train": [0, 1], "val": [2]}
    ours = {"format": common.FORMAT, "seen": {"fitted": np.array([6]), "chose": np.array([9])}}
    common.save_checkpoint(tmp_path / "ours.pth", common.to_plain_types(ours))
    common.save_checkpoint(tmp_path / "other.pth", {"weight": 1.0, "seen": {"fitted": [9], "chose": []}})

    def words(select, init_from=None, weights=None):
        args = SimpleNamespace(select=select, init_from=init_from, weights=weights)
        return seen_rows.of_run(args, hashes, split).words(hashes).tolist()
    assert words("r2") == ["train", "train", "chose", "new", "new"]
    assert words("last") == words("val_last", weights=tmp_path / "other.pth") == ["train", "train", "new", "new", "new"]
    for start in ("init_from", "weights"):
        assert words("last", **{start: tmp_path / "ours.pth"}) == ["train", "train", "new", "train", "chose"]


def test_hashes_of_the_same_content_are_the_same():
    hashes = pixel_cache.content_hashes(["a", "b", "c"], ["d", "a", "e"])
    assert hashes.shape == (3, 2) and hashes[0, 0] == hashes[1, 1] and len(np.unique(hashes)) == 5
    assert pixel_cache.content_hashes([], []).shape == (0, 2)


# --- what a judge makes of it -----------------------------------------------------------------

@pytest.mark.parametrize("seen, held_out", [
    (["new", "new"], True), (["new", "chose"], False), (["train", "new"], False), (["new", "not known"], None),
    (["not known"], None)])
def test_held_out_means_that_every_row_is_new(seen, held_out):
    assert judging.Setting(seen=seen).held_out is held_out


def test_every_word_but_new_has_its_sentence():
    found = seen_rows.sentences(["train", "new", "chose", "train", "not known"])
    assert list(found) == ["train", "chose", "not known"] and found["train"].startswith("2 of 5 rows trained the model")
    assert seen_rows.sentences(["new"]) == {}
    said = []
    seen_rows.say_notes(["train", "new", "chose", "train", "not known"], said.append)
    assert said == [f"note: {sentence}" for sentence in found.values()]
    assert "where they chose the epoch alone, a fixed number" in found["chose"], "it fits no threshold less"


def test_warnings_of_several_models_are_what_all_find_and_what_one_was_trained_on():
    draws = np.random.default_rng(0)
    train, held_out = draws.normal(size=(2, 50, 4))
    known = row_warnings.known_data(train, held_out, target=np.array([[1.0, 5], [3, 9]]))
    content = common.to_plain_types({"known_data": known, "names": ["calm", "bold"]})
    said = []
    features = np.array([[0.0] * 4, [99.0] * 4, [np.nan] * 4])
    one = content, features, np.array([[2.0, 11], [2, 6], [np.nan, np.nan]])
    other = content, features[[1, 1, 1]], np.array([[0.0, 8], [2, 6], [2, 6]])  # the mean of the first row is 1 and 9.5
    seen = np.array(["new", "train", "new"])
    assert row_warnings.texts([one, other], seen, "clips", said.append).tolist() == [
        "bold outside the training labels", "trained on; unlike the training clips", ""]
    assert said[0] == "warning: 1 of 3 clips: trained on" and len(said) == 3
    assert row_warnings.texts([({}, features)], np.array(["new"] * 3), "clips", said.append).tolist() == ["", "", ""]
    assert "does not say" in said[-1]


def test_a_warning_begins_beyond_the_farthest_held_out_row_and_beyond_the_labels():
    """Train rows of variances 1 and 4, to which a hundredth of their mean is added; their means are far from 0."""
    mean = np.array([50.0, -30])
    known = row_warnings.known_data(
        mean + [[-1, -2], [1, 2]], mean + [[3, 8]], target=np.array([[1.0], [np.nan], [3]]))
    assert known["farthest"] == pytest.approx(((9 / 1.025 + 64 / 4.025) / 2) ** 0.5)
    features = mean + np.array([[3.0, 8]] * 4) * [[1.009], [1.011], [0], [0]]
    found = row_warnings.find("clips", print, {"known_data": known, "names": ["calm"]}, features,
                              np.array([[1.0], [3], [0.99], [3.01]]))
    assert {what: is_so.tolist() for what, is_so in found.items()} == {
        "unlike the training clips": [False, True, False, False],
        "calm outside the training labels": [False, False, True, True]}
    of_classes = row_warnings.known_data(mean + [[-1, -2], [1, 2]], mean + [[3, 8]])
    assert list(of_classes) == ["mean", "sd", "farthest"]
    assert list(row_warnings.find("clips", print, {"known_data": of_classes}, features)) == ["unlike the training clips"]


# --- the scripts ------------------------------------------------------------------------------

def assert_not_held_out(folder):
    metrics = read_json(folder / "metrics.json")
    assert metrics["held_out"] is False
    assert any("trained the model, or one that it started from" in alarm for alarm in metrics["alarms"])
    assert "note verdict good" not in (folder / "report.html").read_text(encoding="utf-8")


def test_folds_of_random_ratings_after_a_run_on_all_of_them(sample, tmp_path):
    """The first run has seen every picture of the folds; --select last alone would call them held out."""
    rows = read_csv(sample.ratings)
    draw = random.Random(0)
    for row in rows:
        row["Valence_mean"] = draw.uniform(0, 100)
    common.write_table(tmp_path / "random.csv", rows)
    flags = small_run(sample, tmp_path / "first", "--ratings_file", tmp_path / "random.csv", "--target_columns",
                      "Valence_mean", "--select", "last", "--epochs", 1, "--save_every", 0)
    run_script("train_assessor.py", *flags, "--train_ratio", 0.9, "--val_ratio", 0.1)
    first = only_run(tmp_path / "first")
    assert seen_in(first / "predictions_val.csv") == {"new"}, "nothing was chosen, so validation rows are held out"
    run_script("train_assessor.py", *flags, "--folds", 2, "--init_from", first / "best_model.pth", "--output_dir",
               tmp_path / "folds", "--criteria", "mae_Valence<1000")
    folder = only_run(tmp_path / "folds")
    assert_not_held_out(folder)
    assert read_json(folder / "metrics.json")["criteria"][0]["verdict"] == "PASS on train rows"
    assert seen_in(folder / "predictions_folds.csv") == {"train", "new"}
    assert_not_held_out(folder / "fold_0")
    # carried on from the first ancestor, and said by prediction
    run_script("predict_assessor.py", "--checkpoint", folder / "fold_0", "--image_dir", sample.images, "--output",
               tmp_path / "p.csv")
    trained = {Path(name).name for run in (first, folder / "fold_0") for name in read_json(run / "splits.json")["train"]}
    found = {row["image"] for row in read_csv(tmp_path / "p.csv") if row["seen"] == "train"}
    assert found == trained and len(trained) > 40


@pytest.mark.parametrize("script", ["train_video.py", "train_detector.py", "train_dreamer.py"])
def test_a_start_from_weights_that_saw_the_validation_rows(script, tiny_flags, tmp_path):
    """The parts of the first run change places in the second one."""
    flags = [*tiny_flags[script], "--dry_run"]
    if script == "train_dreamer.py":
        owners = read_json(flags[flags.index("--patient_map") + 1])
        one, two, *_ = sorted(set(owners.values()))
        flags += ["--manual_splits", "--train_patients", one, "--val_patients", two]
        swapped = {"--train_patients": two, "--val_patients": one}
    else:
        kind = "manifest" if script == "train_video.py" else "json"
        paths = [flags[flags.index(f"--{part}_{kind}") + 1] for part in ("val", "train")]
        flags += ["--batch_size", 2] if kind == "json" else []
        swapped = {f"--train_{kind}": paths[0], f"--val_{kind}": paths[1]}
    run_script(script, *flags, "--output_dir", tmp_path / "first")
    first = only_run(tmp_path / "first")
    assert read_json(first / "metrics.json")["held_out"] is False, "selected on these rows"
    turned = [item for pair in swapped.items() for item in pair]
    run_script(script, *flags, *turned, "--init_from", first / "best_model.pth", "--output_dir", tmp_path / "second")
    assert_not_held_out(only_run(tmp_path / "second"))


# --- tables of predictions --------------------------------------------------------------------

def table(tmp_path, words):
    """30 good predictions beside a weaker model's; the column `seen` repeats these words, None = no such column."""
    draw = np.random.default_rng(0)
    rows = []
    for i, value in enumerate(draw.normal(size=30)):
        row = {"image": f"{i}.jpg", "Valence_true": value, "Valence_predicted": value + 0.1 * draw.normal(),
               "Valence_ridge": value + draw.normal()}
        rows.append(row | ({"seen": words[i % len(words)]} if words else {}))
    common.write_table(tmp_path / "p.csv", rows)
    return tmp_path / "p.csv"


@pytest.mark.parametrize("words, flags, held_out, passed", [
    (["new"], [], True, "PASS"), (["new", "chose"], [], False, "PASS on validation"),
    (["new", "train"], ["--held_out"], False, "PASS on train rows"), (None, [], None, "PASS"),
    (None, ["--held_out"], True, "PASS"), (["new", "not known"], [], None, "PASS")])
def test_a_table_says_which_rows_were_seen(tmp_path, words, flags, held_out, passed):
    """Green, and a PASS without further words, need rows that are new."""
    path = table(tmp_path, words)
    run_here("judge_predictions.py", "--predictions", path, "--output_dir", tmp_path / "out", "--criteria",
             "r2>0.2,r2<0.1", *flags)
    folder = only_run(tmp_path / "out")
    metrics = read_json(folder / "metrics.json")
    assert metrics["held_out"] is held_out
    assert [bar["verdict"] for bar in metrics["criteria"]] == [passed, "FAIL"]
    assert any("15 of 30 rows trained" in alarm for alarm in metrics["alarms"]) == ("train" in (words or []))
    is_green = "note verdict good" in (folder / "report.html").read_text(encoding="utf-8")
    assert is_green == (held_out is True)


def test_a_model_that_is_its_baseline_is_called_so(tmp_path):
    rows = read_csv(table(tmp_path, ["new"]))
    for row, shift in zip(rows, np.linspace(-1e-5, 1e-5, 30)):
        row["Valence_ridge"] = float(row["Valence_predicted"]) + shift
    common.write_table(tmp_path / "same.csv", rows)
    run_here("judge_predictions.py", "--predictions", tmp_path / "same.csv", "--output_dir", tmp_path / "out")
    verdict = read_json(only_run(tmp_path / "out") / "metrics.json")["verdict"]
    assert verdict.startswith("The model is the same predictor as the baseline (ridge regression): ")


def test_another_meaning_of_the_column_says_nothing(tmp_path):
    found = prediction_tables.read_predictions(table(tmp_path, ["yes", "new"]))
    assert set(found.seen[::2]) == {"not known"} and set(found.seen[1::2]) == {"new"}
