"""judge_predictions.py: tables that any program wrote, judged by the code that closes a run.

    python -m pytest tests/test_judge_predictions.py
"""
import csv
import json
import re
import shutil

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

import common
from conftest import only_run, run_here, run_script, small_run
from evidence import prediction_tables, table_judging


def scores(rows=60, noise=0.5, seed=0):
    """A table of two scores of 12 subjects: the columns of a program that knows nothing of this one."""
    draw = np.random.default_rng(seed)
    true = draw.normal(size=(rows, 2))
    predicted = true + noise * draw.normal(size=(rows, 2))
    return [{"stimulus": f"p{i}", "image": f"p{i}.jpg", "subject": f"s{i % 12}", "Valence_true": true[i, 0],
             "Valence_predicted": predicted[i, 0], "Arousal_true": true[i, 1], "Arousal_predicted": predicted[i, 1]}
            for i in range(rows)]


def classes(rows=80, strength=1.5, seed=0):
    """A table of two classes with one score, as scikit-learn users write it."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 2, rows)
    score = 1 / (1 + np.exp(-(strength * (2 * label - 1) + draw.normal(size=rows))))
    return [{"clip_id": f"c{i}", "animal": f"a{i % 20}", "label": ("no", "yes")[label[i]], "score": score[i]}
            for i in range(rows)]


def judge(tmp_path, *flags, code=0):
    """Run the script here; the run folder, and what it said."""
    said = run_here("judge_predictions.py", *flags, "--output_dir", tmp_path / "out", code=code)
    return said.text if code else only_run(tmp_path / "out")


def read(path):
    """The rows of a CSV."""
    with open(path, encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def test_scores_of_another_program(tmp_path):
    rows = scores()
    common.write_table(tmp_path / "p.csv", rows)
    run = judge(tmp_path, "--predictions", tmp_path / "p.csv", "--group_column", "subject", "--criteria", "r2>0.2")
    metrics = json.loads((run / "metrics.json").read_text())
    for target in metrics["per_target"]:
        true, predicted = ([row[f"{target['name']}_{kind}"] for row in rows] for kind in ("true", "predicted"))
        assert target["model"]["r2"]["value"] == pytest.approx(r2_score(true, predicted))
    assert metrics["subjects"] == 12 and metrics["baseline_name"] == "mean_of_these_rows"
    assert metrics["held_out"] is None and "not known" in metrics["verdict"]
    assert metrics["criteria"][0]["verdict"] == "PASS"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Valence" in page and "Learning curves" not in page and "Leakage" not in page
    sample = "60 rows scored, 60 different sets of labels, 12 groups."
    assert sample in page and f"effective sample: {sample}" in (run / "log.txt").read_text()


def test_a_named_baseline_is_the_one_to_beat(tmp_path):
    rows = [{**row, **{f"{name}_old": row[f"{name}_true"] + 0.01 for name in ("Valence", "Arousal")},
             **{f"{name}_zero": 0.0 for name in ("Valence", "Arousal")}} for row in scores()]
    common.write_table(tmp_path / "p.csv", rows)
    metrics = json.loads((judge(tmp_path, "--predictions", tmp_path / "p.csv") / "metrics.json").read_text())
    assert metrics["baseline_name"] == "old" and metrics["difference"]["r2"]["value"] < 0
    only = prediction_tables.read_predictions(tmp_path / "p.csv", baseline="zero")
    assert list(only.baselines) == ["zero"]


def test_classes_by_one_score(tmp_path):
    rows = classes()
    common.write_table(tmp_path / "p.csv", rows)
    run = judge(tmp_path, "--predictions", tmp_path / "p.csv", "--group_column", "animal", "--positive_class", "YES",
                "--held_out")
    metrics = json.loads((run / "metrics.json").read_text())
    auc = roc_auc_score([row["label"] == "yes" for row in rows], [row["score"] for row in rows])
    assert metrics["model"]["roc_auc"]["value"] == pytest.approx(auc) and metrics["positive_class"] == "yes"
    assert metrics["held_out"] is True and metrics["subjects"] == 20
    assert all((run / name).exists() for name in ("report.html", "confusion.png", "reliability.png", "args.json"))


def test_two_tables_of_the_same_rows_are_compared_in_pairs(tmp_path):
    """The rows of the second stand in another order; the better one is better beyond its interval, a copy is not."""
    better, worse = scores(noise=0.3), scores(noise=1.5)
    for row, other in zip(worse, better):
        row |= {name: other[name] for name in row if name.endswith("_true")}
    for name, rows in (("better", better), ("worse", worse[::-1]), ("copy", better)):
        common.write_table(tmp_path / f"{name}.csv", rows)
    paths = [tmp_path / f"{name}.csv" for name in ("better", "worse", "copy")]
    run = judge(tmp_path, "--predictions", *paths, "--group_column", "subject")
    found = {(row["first"], row["second"]): row["better"] for row in read(run / "comparison.csv")}
    assert found == {("1_better", "2_worse"): "1_better", ("1_better", "3_copy"): "not resolvable",
                     ("2_worse", "3_copy"): "3_copy"}
    assert all((run / name / "report.html").exists() for name in ("1_better", "2_worse", "3_copy"))
    assert "1_better is better" in (run / "report.html").read_text(encoding="utf-8")


def test_the_paired_interval_is_narrower_than_that_of_either_model(tmp_path):
    """Both models make nearly the same errors: that is what pairing is for."""
    first = scores(rows=200, noise=1.0)
    second = [{**row, "Valence_predicted": row["Valence_predicted"] + 0.05 * (row["Valence_true"] - row["Valence_predicted"])}
              for row in first]
    for name, rows in (("a", first), ("b", second)):
        common.write_table(tmp_path / f"{name}.csv", rows)
    tables = [prediction_tables.read_predictions(tmp_path / f"{name}.csv") for name in "ab"]
    [row] = table_judging.compare_tables(tables, ["a", "b"])
    assert row["better"] == "b" and row["high"] - row["low"] < 0.1


def test_mistakes_are_one_line(tmp_path):
    common.write_table(tmp_path / "p.csv", scores())
    common.write_table(tmp_path / "few.csv", scores()[:50])
    other = [{**row, "Valence_true": row["Valence_true"] + 1} for row in scores()]
    common.write_table(tmp_path / "other.csv", other)
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    (tmp_path / "unlabelled.csv").write_text("id,true_label,prob_a,prob_b\n1,,0.5,0.5\n")
    path = tmp_path / "p.csv"
    for flags, words in (
            ([path, "--group_column", "subjct"], "did you mean subject"),
            ([path, "--baseline", "ridge"], "found no ridge"),
            ([tmp_path / "odd.csv"], "NAME_predicted"),
            ([tmp_path / "unlabelled.csv"], "no row has a true label"),
            ([path, tmp_path / "few.csv"], "10 rows of the first are missing"),
            ([path, tmp_path / "other.csv"], "other true values"),
            ([path, "--criteria", "r3>1"], "r3")):
        said = judge(tmp_path, "--predictions", *flags, code=2)
        assert words in said and [line for line in said.splitlines() if line.startswith("error: ")] != [], said


def test_a_run_judges_itself_and_is_judged_alike(sample, tmp_path):
    """The predictions of a trained model give the same numbers in the run folder and by judge_predictions.py."""
    run_script("train_assessor.py", *small_run(sample, tmp_path / "run", "--epochs", 1))
    trained = only_run(tmp_path / "run")
    again = judge(tmp_path, "--predictions", trained / "predictions_val.csv")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (trained, again))
    for name in ("model", "baseline", "difference", "per_target", "baseline_name", "method"):
        assert first[name] == second[name], name


@pytest.mark.parametrize("head, cells, words", [
    (["A_true", "A_predicted"], lambda i: [i, "" if i == 4 else i + 1], ["1 of 20 rows", "rows 5"]),
    (["A_true", "A_predicted"], lambda i: [3, i], ["A_true has the same value"]),
    (["A_true", "A_predicted"], lambda i: ["", i], ["A_true has the same value"]),
    (["true_label", "prob_a", "prob_b"], lambda i: ["a", 0.3, 0.7], ["the true label has the same value"]),
    (["label", "score"], lambda i: ["ear" if i % 2 else "tail", "" if i == 4 else i / 20], ["1 of 20 rows"])])
def test_tables_that_nothing_can_be_said_of_are_one_sentence(tmp_path, head, cells, words):
    common.write_table(tmp_path / "p.csv", [dict(zip(head, cells(i))) for i in range(20)])
    text = run_here("judge_predictions.py", "--predictions", tmp_path / "p.csv", "--output_dir", tmp_path / "o", code=2)
    assert text.stderr.startswith("error: ") and text.stderr.count("\n") == 1
    assert all(word in text.stderr for word in words), text.stderr


def test_no_page_says_nan(tmp_path):
    common.write_table(tmp_path / "p.csv", [{"true_label": "ab"[i % 2], "prob_a": 0.5, "prob_b": 0.5} for i in range(20)])
    common.write_table(tmp_path / "q.csv", [{"A_true": i, "A_predicted": 2} for i in range(20)])
    for name in ("p", "q"):
        page = (judge(tmp_path / name, "--predictions", tmp_path / f"{name}.csv") / "report.html").read_text()
        assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]+", "", page))


def test_all_runs_at_a_glance(tmp_path):
    """runs.csv has a row for each finished run; --runs compares them on the rows that both predicted. Judge: scikit-learn."""
    tables = [scores(noise=0.3), scores(noise=1.2)[:40]]
    for number, rows in enumerate(tables):
        common.write_table(tmp_path / f"{number}.csv", rows)
        run_here("judge_predictions.py", "--predictions", tmp_path / f"{number}.csv", "--output_dir", tmp_path / "out")
    folders = sorted((tmp_path / "out").glob("run_*"))
    for folder, number in zip(folders, (0, 1)):
        shutil.copy(tmp_path / f"{number}.csv", folder / "predictions_val.csv")  # as a train script leaves it
    (tmp_path / "out" / "run_broken").mkdir()
    (tmp_path / "out" / "run_broken" / "metrics.json").write_text("[1, 2")
    run_here("judge_predictions.py", "--runs", tmp_path / "out", "--output_dir", tmp_path / "page")
    listed = read(tmp_path / "out" / "runs.csv")
    assert [row["folder"] for row in listed] == [folder.name for folder in folders]
    for row, folder in zip(listed, folders):
        headline = json.loads((folder / "metrics.json").read_text())["headline"]
        assert float(row["value"]) == headline["value"] and row["verdict"] == headline["verdict"]
        assert [float(row["low"]), float(row["high"])] == headline["interval"] and row["script"] == "judge_predictions.py"
    page = only_run(tmp_path / "page")
    [pair] = read(page / "comparison.csv")
    r2 = [np.mean([r2_score([row[f"{name}_true"] for row in rows[:40]], [row[f"{name}_predicted"] for row in rows[:40]])
                   for name in ("Valence", "Arousal")]) for rows in tables]
    assert float(pair["difference"]) == pytest.approx(r2[0] - r2[1]) and pair["better"] == folders[0].name
    text = (page / "report.html").read_text(encoding="utf-8")
    assert folders[1].name in text and "0.csv" in text, "the flag --predictions differs"
    assert "no finished run" in run_here("judge_predictions.py", "--runs", tmp_path / "none", code=2).text
    assert "either --predictions or --runs" in run_here("judge_predictions.py", code=2).text
