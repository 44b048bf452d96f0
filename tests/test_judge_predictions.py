"""judge_predictions.py: tables that any program wrote, judged by the code that closes a run.

    python -m pytest tests/test_judge_predictions.py
"""
import csv
import html
import json
import re
import shutil

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

import common
import judge_predictions
from conftest import only_run, run_here, run_script, small_run
from evidence import class_judging, judging, prediction_tables, reporting, score_judging, table_judging, verdicts


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
    log = (run / "log.txt").read_text()
    assert sample in page and f"effective sample: {sample}" in log and "rows have a true value" not in log


@pytest.mark.parametrize("kind", ["scores", "classes"])
def test_models_of_folds_that_have_learnt_nothing_are_said_on_the_page_of_all_folds(tmp_path, kind):
    """Each gives nearly the mean, or the share, of its own train rows."""
    rows = scores() if kind == "scores" else classes()
    for i, row in enumerate(rows):
        row["fold"] = i % 3
        for name in {"Valence_predicted", "score"} & row.keys():
            row[name] = 0.5 + 0.2 * (i % 3 - 1) + 1e-3 * row[name]
    common.write_table(tmp_path / "p.csv", rows)
    metrics = json.loads((judge(tmp_path, "--predictions", tmp_path / "p.csv") / "metrics.json").read_text())
    [alarm] = [alarm for alarm in metrics["alarms"] if "constant output" in alarm]
    named = {"scores": "(sd under 5 % of the labels', of all or in each fold): Valence. ",
             "classes": "(sd of the probability under 5 % of the labels', of all or in each fold): no, yes. "}
    assert named[kind] in alarm


@pytest.mark.parametrize("n_subjects, shown", [(4, True), (5, False)])
def test_too_few_subjects_for_an_interval_are_shown_one_by_one(tmp_path, n_subjects, shown):
    """Of scores each subject's n and R2, of classes its AUC."""
    score_rows = [{**row, "group": f"s{i % n_subjects}"} for i, row in enumerate(scores(rows=40))]
    class_rows = [{**row, "group": f"s{i % n_subjects}"} for i, row in enumerate(classes(rows=40))]
    own = [row for row in score_rows if row["group"] == "s2"]
    r2 = [r2_score([row[f"{name}_true"] for row in own], [row[f"{name}_predicted"] for row in own])
          for name in ("Valence", "Arousal")]
    own = [row for row in class_rows if row["group"] == "s2"]
    auc = roc_auc_score([row["label"] == "yes" for row in own], [row["score"] for row in own])
    for kind, rows, value in (("scores", score_rows, np.mean(r2)), ("classes", class_rows, auc)):
        common.write_table(tmp_path / f"{kind}.csv", rows)
        page = judge(tmp_path / kind, "--predictions", tmp_path / f"{kind}.csv") / "report.html"
        assert (f'<th scope="row">s2</th><td class="num">{len(own)}</td>' in page.read_text()) == shown
        if shown:
            line = page.read_text().split('<th scope="row">s2</th>')[1].split("</tr>")[0]
            assert f'<td class="num">{value:.3f}</td>' in line


def test_captions_say_which_scores_are_drawn(tmp_path):
    draw = np.random.default_rng(0)
    values = draw.normal(size=(12, 41, 2))
    common.write_table(tmp_path / "p.csv", [
        {"image": i, **{f"q{j}_{kind}": row[j, k] for j in range(41) for k, kind in enumerate(("true", "predicted"))}}
        for i, row in enumerate(values)])
    page = (judge(tmp_path, "--predictions", tmp_path / "p.csv") / "report.html").read_text(encoding="utf-8")
    assert page.count("the first 40 of 41 scores</figcaption>") == 2


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


def test_models_of_classes_are_compared_each_by_its_own_threshold(tmp_path):
    """Independent judge: scikit-learn, on tables whose rows stand in other orders."""
    label = np.arange(90) % 2
    models = {"a": (1.5, 0.3), "b": (0.4, 0.6)}
    written, expected = {}, {}
    for name, (strength, threshold) in models.items():
        draw = np.random.default_rng(len(written))
        score = 1 / (1 + np.exp(-(strength * (2 * label - 1) + draw.normal(size=90))))
        written[name] = [
            {"clip_id": f"c{i}", "animal": f"g{i % 15}", "label": ("no", "yes")[label[i]], "prob_no": 1 - score[i],
             "prob_yes": score[i], "threshold": threshold} for i in range(90)]
        expected[name] = roc_auc_score(label, score), balanced_accuracy_score(label, score >= threshold)
    common.write_table(tmp_path / "a.csv", written["a"])
    common.write_table(tmp_path / "b.csv", written["b"][::-1])
    run = judge(tmp_path, "--predictions", tmp_path / "a.csv", tmp_path / "b.csv", "--group_column", "animal",
                "--positive_class", "yes")
    [row] = read(run / "comparison.csv")
    assert float(row["value_of_first"]) == pytest.approx(expected["a"][0])
    assert float(row["value_of_second"]) == pytest.approx(expected["b"][0])
    assert float(row["difference"]) == pytest.approx(expected["a"][0] - expected["b"][0])
    assert float(row["low"]) > 0 and row["better"] == "1_a"
    tables = [prediction_tables.read_predictions(tmp_path / f"{name}.csv", "animal", positive_class="yes") for name in "ab"]
    first, second = table_judging.same_rows(tables, ["a.csv", "b.csv"])
    overall = first.against(second, "b").compare().overall
    assert overall.model["balanced_accuracy"].value == pytest.approx(expected["a"][1])
    assert overall.baseline["balanced_accuracy"].value == pytest.approx(expected["b"][1])


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
            ([tmp_path / "unlabelled.csv"], "unlabelled.csv: the true label has no two"),
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
    (["A_true", "A_predicted"], lambda i: [3, i], ["A_true has no two different values"]),
    (["A_true", "A_predicted"], lambda i: ["", i], ["A_true has no two different values"]),
    (["A_true", "A_predicted", "B_True", "B_predicted"], lambda i: [i, i + 1, i, i + 1],
     ["no column B_true beside B_predicted"]),
    (["true_label", "prob_a", "prob_b"], lambda i: ["a", 0.3, 0.7], ["the true label has no two different values"]),
    (["label", "score"], lambda i: ["yes" if i % 2 else "no", "" if i == 4 else i / 20], ["1 of 20 rows"]),
    (["label", "score"], lambda i: ["abc"[i % 3], i / 20], ["two classes in label, found a, b, c", "prob_CLASS"]),
    (["label", "prob_a", "prob_b"], lambda i: ["ab"[i % 2], *([0.3, 0.7] if i else ["", ""])], ["1 of 20 rows", "rows 1"]),
    (["label", "prob_a", "prob_b", "threshold"], lambda i: ["ab"[i % 2], 0.3, 0.7, "" if i == 4 else 0.5],
     ["column threshold is blank in line 6"]),
    (["label", "prob_-", "prob_NA", "prob_+"], lambda i: ["-+"[i % 2], 0.3, 0.2, 0.5], ["no class can be called '-', 'NA'"])])
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


def test_no_comparison_says_nan(tmp_path):
    """Two runs may share rows of one class alone, as --runs compares them: then there is no AUC."""
    common.write_table(tmp_path / "p.csv", [
        {"clip_id": k, "true_label": "a", "prob_a": 0.5 + k / 20, "prob_b": 0.5 - k / 20} for k in range(9)])
    table = prediction_tables.read_predictions(tmp_path / "p.csv")
    [row] = table_judging.compare_tables([table, table], ["one", "two"])
    sentence = judging.comparison_sentence(row)
    assert "AUC undefined and undefined, difference undefined [no interval" in sentence and "nan" not in sentence


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
    assert folders[1].name in text and f"<td>{tmp_path.name}/0.csv</td>" in text, "the flag --predictions differs"
    assert str(tmp_path) not in text, "no private path"
    assert "no finished run" in run_here("judge_predictions.py", "--runs", tmp_path / "none", code=2).text
    assert "either --predictions or --runs" in run_here("judge_predictions.py", code=2).text
    judged = [common.read_json(folder / "args.json")["data"] for folder in (*folders, page)]
    assert judged == [{"predictions": [f"{tmp_path}/{number}.csv"]} for number in (0, 1)] + [{"runs": f"{tmp_path}/out"}]


def test_a_flag_that_one_run_alone_has_differs(tmp_path):
    flags = [{"device": "cpu", "weights": None, "seed": 1, "folds": 5},
             {"device": "cpu", "weights": "/secret/place/w/a.pth", "seed": 1}]
    folders = [tmp_path / f"run_{number}" for number in range(2)]
    for folder, given in zip(folders, flags):
        folder.mkdir()
        common.write_json(folder / "args.json", {"flags": given})
    page = reporting.html_table(table_judging.flags_that_differ(folders))
    rows = [re.findall("<t[hd][^>]*>([^<]*)<", row) for row in page.split("<tr>")[1:]]
    assert rows == [["folder", "weights", "folds"], ["run_0", "&ndash;", "5"], ["run_1", "w/a.pth", "&ndash;"]]


# --- what a table of another program may be read as ---------------------------------------------------

def table_of(tmp_path, rows, **flags):
    """The rows written and read as a predictions table."""
    common.write_table(tmp_path / "t.csv", rows)
    return prediction_tables.read_predictions(tmp_path / "t.csv", **flags)


def test_a_column_that_predicts_nothing_is_no_baseline(tmp_path):
    """R2 -3 beats a column of counts, and is worse than the mean of the rows all the same."""
    draw = np.random.default_rng(0)
    true = draw.normal(3, 1, 60)
    rows = [{"v_true": value, "v_predicted": value + 1.7, "v_n": 20 + k % 7 if k else "", "v_note": "blurred",
             "v_old": value + k % 3 / 3} for k, value in enumerate(true)]
    found = table_of(tmp_path, rows)
    assert list(found.baselines) == ["old", "mean_of_these_rows"] and found.best_baseline == "old"
    bounds = [{**row, "v_low": row["v_true"] - 0.1, "v_high": row["v_true"] + 0.1, "v_sd": row["v_true"]} for row in rows]
    assert list(table_of(tmp_path, bounds).baselines) == list(found.baselines), "of predict_assessor.py --interval"
    several = [{**row, **{name.replace("v_", "w_"): cell for name, cell in row.items()}} for row in bounds]
    assert list(table_of(tmp_path, several, baseline="low").baselines) == ["low"], "whoever names it, gets it"
    found = table_of(tmp_path, rows)
    for row in rows:
        del row["v_old"]
    run = judge(tmp_path, "--predictions", tmp_path / "t.csv", "--held_out")
    assert "note: baselines: old, mean_of_these_rows" in (run / "log.txt").read_text()
    weak = table_of(tmp_path, rows)
    assert list(weak.baselines) == ["mean_of_these_rows"] and weak.compare().gain("r2").high < 0
    assert list(table_of(tmp_path, rows, baseline="n").baselines) == ["n"], "whoever names it, gets it"
    known = [{**row, "v_human_predicted": row["v_predicted"] - 1, "ridge_predicted": row["v_predicted"]} for row in rows]
    assert list(table_of(tmp_path, known, baseline="ridge_predicted").baselines) == ["ridge_predicted"]
    for row in known:
        del row["ridge_predicted"]
    assert "human_predicted" in table_of(tmp_path, known).baselines
    for row in rows:
        row |= {"v_true": "", "v_predicted": "1.2"}
    assert np.isnan(table_of(tmp_path, rows).truth).all()


def test_rows_are_ranked_by_the_scores_that_vary(tmp_path):
    """Too low by k, which is more than the 9 - k of a score that never varies."""
    rows = [{"A_true": k, "A_predicted": 0, "B_true": 0, "B_predicted": 9 - k} for k in range(8)]
    order, lines = table_of(tmp_path, rows).rank_rows()
    assert order.tolist() == list(range(8)) and "largest in A: true 7.00, predicted 0.00" in lines[7]


def test_rows_of_classes_are_ranked_by_the_probability_of_the_true_one(tmp_path):
    shares = [("a", 0.6), ("b", 0.3), ("a", 0.1), ("b", 0.8)]
    rows = [{"true_label": label, "prob_a": p, "prob_b": 1 - p} for label, p in shares]
    order, lines = table_of(tmp_path, rows).rank_rows()
    assert order.tolist() == [1, 0, 3, 2]
    assert lines == [["true a, predicted a", "p of the true class 0.60"], ["true b, predicted b", "p of the true class 0.70"],
                     ["true a, predicted b", "p of the true class 0.10"], ["true b, predicted a", "p of the true class 0.20"]]


def test_a_baseline_that_lacks_a_class_is_not_found(tmp_path):
    rows = [{"true_label": "ab"[k % 2], "prob_a": 0.4, "prob_b": 0.6, "ridge_prob_a": 0.5} for k in range(20)]
    assert list(table_of(tmp_path, rows).baselines) == ["shares_of_these_rows"]
    with pytest.raises(common.UserError, match="found no ridge .found: none"):
        table_of(tmp_path, rows, baseline="ridge")


def test_the_score_of_two_classes_is_of_a_class_that_is_named_or_plain(tmp_path):
    """0/1, no/yes, false/true and negative/positive say it, in any case; of damaged and intact either may be meant."""
    def rows(names):
        return [{"label": names[k % 2], "score": 0.3 + 0.4 * (k % 2) + 0.01 * k} for k in range(20)]
    for names in (("0", "1"), ("No", "yes"), ("FALSE", "true"), ("negative", "Positive"), ("0.0", "1.0")):
        found = table_of(tmp_path, rows(names))
        assert found.names == list(names)
        assert np.allclose(found.probability[:, 1], [row["score"] for row in rows(names)])
    damaged = rows(("intact", "damaged"))
    with pytest.raises(common.UserError, match="--positive_class.*damaged, intact"):
        table_of(tmp_path, damaged)
    other = [{**row, "old": k % 5 / 5} for k, row in enumerate(damaged)]
    baseline = table_of(tmp_path, other, positive_class="damaged", baseline="OLD").baselines["old"]
    assert baseline[:, 1] == pytest.approx([row["old"] for row in other])
    found = table_of(tmp_path, damaged, positive_class="damaged")
    assert found.quality(found.probability) == roc_auc_score(
        [row["label"] == "damaged" for row in damaged], [row["score"] for row in damaged]) > 0.9


def test_a_threshold_is_of_the_class_that_its_table_names(tmp_path):
    """The positive class of training need not be the rarest of these rows; of another class no threshold is known."""
    p = np.linspace(0.05, 0.95, 10)
    written = prediction_tables.ClassTable(
        keys={"clip_id": np.arange(10).astype(str)}, names=["a", "b"], positive=1, truth=np.repeat([0, 1], [3, 7]),
        probability=np.stack([1 - p, p], 1), threshold=np.full(10, 0.3),
        baselines={"old": np.full((10, 2), 0.5)}, baseline_thresholds={"old": np.full(10, 0.3)})
    written.write(tmp_path / "t.csv")
    again = prediction_tables.read_predictions(tmp_path / "t.csv")
    assert again.positive == 1 and (again.chosen == written.chosen).all() and again.chosen[:3].tolist() == [0, 0, 0]
    other = prediction_tables.read_predictions(tmp_path / "t.csv", positive_class="A")
    assert other.positive == 0 and other.threshold is None and other.baseline_thresholds == {}
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace(",b\n", ",B\n").replace(",B\n", ",\n", 1))  # another program's
    again = prediction_tables.read_predictions(tmp_path / "t.csv")
    assert again.positive == 1 and (again.chosen == written.chosen).all()
    (tmp_path / "t.csv").write_text(text.replace(",b\n", ",B\n", 1))
    assert prediction_tables.read_predictions(tmp_path / "t.csv").positive == 1, "one class, spelled in two ways"
    (tmp_path / "t.csv").write_text(text.replace(",b\n", ",a\n", 1))
    with pytest.raises(common.UserError, match="positive_class names a, b; expected one class"):
        prediction_tables.read_predictions(tmp_path / "t.csv")


@pytest.mark.parametrize("unit, offset", [(1, 0), (20, -2000), (0.1, 0)])
def test_the_auc_of_a_sum_score_is_that_of_the_score(tmp_path, unit, offset):
    """0 to 100, as points of a questionnaire, far below 0, and 0 to 10. Judge: scikit-learn."""
    draw = np.random.default_rng(1)
    label = draw.integers(0, 2, 700)
    score = unit * (50 + 15 * label + draw.normal(0, 12, 700)).clip(0, 100).round() + offset
    rows = [{"id": k, "label": own, "score": value} for k, (own, value) in enumerate(zip(label, score))]
    with np.errstate(all="raise"):
        found = table_of(tmp_path, rows)
    assert found.quality(found.probability) == pytest.approx(roc_auc_score(label, score))
    run = judge(tmp_path, "--predictions", tmp_path / "t.csv")
    assert json.loads((run / "metrics.json").read_text())["alarms"] == []
    assert all("so its rank stands for it" in (run / name).read_text() for name in ("report.html", "log.txt"))


def test_a_blank_cell_does_not_make_a_probability_a_rank(tmp_path):
    """A row without a label, and not yet scored, stands beside scored ones."""
    rows = [{"id": k, "label": k % 2, "score": 0.3 + 0.4 * (k % 2) + 0.01 * k} for k in range(20)]
    found = table_of(tmp_path, [*rows, {"id": 20, "label": "", "score": ""}])
    assert found.notes == [] and found.score is None
    assert found.probability[:20, 1] == pytest.approx([row["score"] for row in rows])


def test_no_bar_is_met_by_a_number_that_means_nothing(tmp_path):
    """Of points, of which only the order counts, an accuracy of .8 was called PASS."""
    rows = [{"id": k, "label": k % 2, "score": 10 * (k % 2) + k} for k in range(20)]
    common.write_table(tmp_path / "t.csv", rows)
    for bar in ("accuracy>0.5", "ece<0.2", "recall_1>0.1"):
        said = judge(tmp_path, "--predictions", tmp_path / "t.csv", "--criteria", f"auc>0.5,{bar}", code=2)
        assert f"error: --criteria {bar[:3]}" in said and "only AUC and average precision" in said
    run = judge(tmp_path, "--predictions", tmp_path / "t.csv", "--criteria", "auc>0.5,ap_1>0.5")
    criteria = json.loads((run / "metrics.json").read_text())["criteria"]
    assert [bar["name"] for bar in criteria] == ["auc", "ap_1"]


def test_a_table_and_its_captions_are_called_what_they_are(tmp_path):
    """Of ungrouped rows of one model accuracy, recall and precision have the interval of Wilson."""
    common.write_table(tmp_path / "p.csv", classes())
    page = (judge(tmp_path, "--predictions", tmp_path / "p.csv") / "report.html").read_text()
    assert "On the rows of the table; baseline" in page
    method = "95% t-interval over 80 rows; accuracy, recall and precision: Wilson"
    assert f"Each class against the rest; {method}." in page and page.count(method) == 2
    grouped = judge(tmp_path / "g", "--predictions", tmp_path / "p.csv", "--group_column", "animal") / "report.html"
    assert "Wilson" not in grouped.read_text()
    common.write_table(tmp_path / "s.csv", scores())
    page = judge(tmp_path / "s", "--predictions", tmp_path / "s.csv") / "report.html"
    assert "Each score on the rows of the table, in its unit" in page.read_text()


def test_a_column_that_repeats_as_subjects_do_is_an_alarm_unless_groups_keep_it_whole(tmp_path):
    """Rows of one subject are alike: taken as independent they make noise green in one table of eight."""
    rows = [row | {"family": f"f{i % 12 // 2}", "site": "ab"[i % 2]} for i, row in enumerate(scores())]
    path = tmp_path / "p.csv"
    common.write_table(path, rows)
    subject, family = (
        f"the column {name} repeats ({count} values in 60 rows), and {count} of its values stand in several rows that "
        f"count as independent. If it says who or what was recorded: --group_column {name}"
        for name, count in (("subject", 12), ("family", 6)))
    metrics = json.loads((judge(tmp_path, "--predictions", path, "--held_out") / "metrics.json").read_text())
    assert metrics["alarms"] == [subject, family]
    both = judge(tmp_path / "two", "--predictions", path, path) / "report.html"
    assert f"<li>{subject}</li>" in html.unescape(both.read_text())
    alarms = {group: prediction_tables.read_predictions(path, group).alarms for group in ("subject", "family", "site")}
    assert alarms == {"subject": [], "family": [], "site": [family]}, "a family is in both sites, a subject in one"


def test_rows_without_a_truth_repeat_no_subject(tmp_path):
    """Sixty subjects, rated once; four further pictures of each are only predicted."""
    rows = [row | {"subject": f"s{i % 60}"} for i, row in enumerate(scores(300))]
    for row in rows[60:]:
        row |= {"Valence_true": "", "Arousal_true": ""}
    common.write_table(tmp_path / "p.csv", rows)
    assert prediction_tables.read_predictions(tmp_path / "p.csv").alarms == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_table_that_lacks_the_subjects_does_not_silence_the_alarm_on_another(tmp_path, first):
    """Compared are rows that count as independent, whichever table is named first; a column group in one ends that."""
    rows = scores()
    tables = {
        "with": rows,
        "without": [{name: row[name] for name in row if name != "subject"} for row in rows],
        "grouped": [{name.replace("subject", "group"): value for name, value in row.items()} for row in rows],
    }
    for name, own in tables.items():
        common.write_table(tmp_path / f"{name}.csv", own)
    for others, is_alarm in ((("with", "without"), True), (("with", "grouped"), False)):
        paths = [tmp_path / f"{name}.csv" for name in (others[first], others[1 - first])]
        folder = judge(tmp_path / "-".join(others), "--predictions", *paths)
        assert ("the column subject repeats" in (folder / "report.html").read_text()) == is_alarm


def test_groups_of_one_table_count_in_every_pair(tmp_path):
    rows = scores()
    common.write_table(tmp_path / "a.csv", [row | {"group": row["subject"]} for row in rows])
    for name, seed in (("b", 1), ("c", 2)):
        common.write_table(tmp_path / f"{name}.csv", [row | {"Valence_true": own["Valence_true"],
                           "Arousal_true": own["Arousal_true"]} for row, own in zip(scores(seed=seed), rows)])
    folder = judge(tmp_path / "out", "--predictions", *(tmp_path / f"{name}.csv" for name in "abc"))
    pairs = common.read_json(folder / "metrics.json")["comparisons"]
    assert ["12 subjects" in pair["method"] for pair in pairs] == [True] * 3


def test_columns_of_predictions_are_no_subjects(tmp_path):
    """A score called person and a class called scene, in few different numbers."""
    draw = np.random.default_rng(4)
    votes = draw.integers(0, 9, 60) / 8
    common.write_table(tmp_path / "c.csv", [
        {"label": ("scene", "other")[k % 2], "prob_scene": p, "prob_other": 1 - p} for k, p in enumerate(votes)])
    common.write_table(tmp_path / "s.csv", [
        {"video": f"v{k % 10}", "person_true": k % 7, "person_predicted": p} for k, p in enumerate(votes)])
    for name in ("c", "s"):
        assert prediction_tables.read_predictions(tmp_path / f"{name}.csv").alarms == []


def test_two_constants_are_exactly_as_good(tmp_path):
    common.write_table(tmp_path / "p.csv", [{"id": k, "label": int(k % 3 == 0), "score": 0.5} for k in range(60)])
    metrics = json.loads((judge(tmp_path, "--predictions", tmp_path / "p.csv") / "metrics.json").read_text())
    assert metrics["verdict"].startswith("The model does exactly as well as the baseline (shares of these rows): AUC")


def test_to_beat_a_baseline_that_is_worse_than_guessing_is_no_result(tmp_path):
    """Every subject left out in turn: the mean of the others is low where the subject is high."""
    draw = np.random.default_rng(8)
    owner = np.repeat(np.arange(14), 10)
    true = draw.normal(0, 2, 14)[owner] + draw.normal(size=140)
    mean = np.array([true[owner != own].mean() for own in owner])
    common.write_table(tmp_path / "p.csv", [
        {"image": k, "group": f"s{owner[k]}", "fold": owner[k], "seen": "new", "v_true": true[k], "v_train_mean": mean[k],
         "v_predicted": true.mean() + draw.normal(0, 0.2), "v_ridge": mean[k] + draw.normal()} for k in range(140)])
    metrics = json.loads((judge(tmp_path, "--predictions", tmp_path / "p.csv") / "metrics.json").read_text())
    assert metrics["headline"]["verdict"] == "better" and metrics["headline"]["level"] == "caution"
    assert metrics["alarms"] == [] and metrics["doubts"][0].startswith("The model's own R2 is not above 0 for certain, which guessing reaches")


def test_every_alarm_and_doubt_stands_on_the_page_and_in_the_log(tmp_path):
    common.write_table(tmp_path / "p.csv", [{"label": "ab"[k % 2], "prob_a": 0.3, "prob_b": 0.7} for k in range(20)])
    run = judge(tmp_path, "--predictions", tmp_path / "p.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    page, log = html.unescape((run / "report.html").read_text()), (run / "log.txt").read_text()
    assert len(metrics["alarms"]) == 3 and len(metrics["doubts"]) == 2
    assert all(f"ALARM: {alarm}" in text for alarm in metrics["alarms"] for text in (page, log))
    assert all(doubt in page and f"doubt: {doubt}" in log for doubt in metrics["doubts"])


@pytest.mark.parametrize("kind, train, others, number", [("below", 0.2, 0.9, 3), ("below", 0.2, 0.9, 2), ("above", 0.95, 0.3, 3)])
def test_train_far_from_validation_in_most_folds_is_said_above_them(tmp_path, kind, train, others, number):
    common.write_table(tmp_path / "p.csv", scores())
    table = prediction_tables.read_predictions(tmp_path / "p.csv", "subject").labelled()
    folds = [{"fold": k, "rows": 15, "best_epoch": 3, "r2": 0.25 + k} for k in (0, 1, 3, 10)]
    setting = judging.Setting(part="folds", seen=np.full(60, "new"), folds=folds)
    args = judge_predictions.parse_args(
        ["--predictions", str(tmp_path / "p.csv"), "--output_dir", str(tmp_path / "out")])
    with common.start_run(args) as run:
        for place, fold in enumerate(folds):
            gap = verdicts.split_gap_alarms({"pearson_r": train}, {"pearson_r": others}, "more rows")
            run.path(f"fold_{fold['fold']}").mkdir()
            common.write_json(run.path(f"fold_{fold['fold']}/metrics.json"), {"alarms": ["a", *gap * (place < number), "b"]})
        metrics = score_judging.judge_scores(run, table, setting)
    said = f"train far {kind} validation in 3 of 4 folds. The pages in their folders say how far, and what helps"
    assert metrics["alarms"] == ([said] if number == 3 else []), "of half of the folds it may be chance"
    assert metrics["headline"]["level"] != "good"


def test_what_a_run_knows_beside_its_table_joins_its_metrics_and_its_page(tmp_path):
    common.write_table(tmp_path / "p.csv", scores())
    table = prediction_tables.read_predictions(tmp_path / "p.csv", "subject").labelled()
    folds = [{"fold": k, "rows": 30, "best_epoch": 3 + k, "r2": 0.25} for k in range(2)]
    setting = judging.Setting(part="folds", seen=np.full(60, "new"), alarms=("found before training",), folds=folds)
    args = judge_predictions.parse_args(
        ["--predictions", str(tmp_path / "p.csv"), "--output_dir", str(tmp_path / "out")])
    with common.start_run(args) as run:
        for k in range(2):
            run.path(f"fold_{k}").mkdir()
            common.write_json(run.path(f"fold_{k}/metrics.json"), {"alarms": []})
        metrics = score_judging.judge_scores(run, table, setting)
    before, equal = metrics["alarms"]
    assert before == "found before training" and equal.startswith("folds 0 and 1 have identical results")
    page = (run.folder / "report.html").read_text()
    assert f"ALARM: {before}" in page and "the folds rows" in page and "before their calibration" not in page
    different = [folds[0], {"fold": 1, "rows": 30, "best_epoch": 9, "r2": 0.55}]
    mean, sd = judging.fold_table(different)[2:]
    assert mean == {"fold": "mean", "r2": pytest.approx(0.4)} and sd == {"fold": "SD", "r2": pytest.approx(0.3 / 2 ** 0.5)}
    assert judging.identical_fold_alarms(different) == []


def judge_similar(tmp_path, rows, similar, kind=score_judging.judge_scores):
    """metrics.json, log and page of a run that judges these rows, of which `similar` look like one in another part of the split."""
    setting = judging.Setting(part="val", seen=np.full(len(rows), "new"), is_similar=np.isin(np.arange(len(rows)), similar))
    table = table_of(tmp_path, rows)
    args = judge_predictions.parse_args(["--predictions", "unused.csv", "--output_dir", str(tmp_path / "out")])
    with common.start_run(args) as run:
        metrics = kind(run, table, setting)
    page = html.unescape((run.folder / "report.html").read_text())
    shutil.rmtree(tmp_path / "out")
    return metrics, page, run


def rows_with_ridge(n, noise):
    """n rows of one score: noise: (n,) how wrong the model is; the baseline is as wrong as an sd."""
    draw = np.random.default_rng(4)
    true, wrong, other = draw.normal(size=(3, n))
    return [{"image": f"{k}.jpg", "v_true": true[k], "v_predicted": true[k] + noise[k] * wrong[k],
             "v_ridge": true[k] + other[k]} for k in range(n)]


def test_a_result_that_hangs_on_rows_that_look_like_others_is_in_doubt(tmp_path):
    """The model knows the first 60 of 100 rows and no other: without them nothing is left; with them R2 is .6."""
    rows = rows_with_ridge(100, np.repeat([0.1, 1.0], [60, 40]))
    known = np.arange(60)
    metrics, page, _ = judge_similar(tmp_path, rows, [])
    assert metrics["doubts"] == [] and "Holds" in page and "look like one in another part of the split" not in page
    metrics, page, _ = judge_similar(tmp_path, rows, known)
    rest = table_of(tmp_path, rows).take(np.arange(60, 100)).compare().overall
    (doubt,) = metrics["doubts"]
    assert doubt.startswith("60 of 100 rows look like one in another part of the split. Without them: Not resolvable whether")
    assert f"{rest.model['r2'].value:.3f} against {rest.baseline['r2'].value:.3f}" in doubt
    assert doubt.endswith("keep them together: --group_column") and "Better, with doubts" in page
    metrics, *_ = judge_similar(tmp_path, rows, np.arange(100))
    assert metrics["doubts"][0].startswith("100 of 100 rows look like one in another part of the split. If they")
    metrics, *_ = judge_similar(tmp_path, rows, np.arange(99))
    assert "Without them: Not resolvable" in metrics["doubts"][0] and "mean R2 undefined" in metrics["doubts"][0]
    # it never was better than its baseline, yet its R2 was high
    for row in rows:
        row["v_ridge"] = row["v_predicted"] + 0.01
    for similar in (known, np.arange(99)):
        metrics, *_ = judge_similar(tmp_path, rows, similar)
        assert metrics["headline"]["verdict"] != "better" and f"{len(similar)} of 100 rows" in metrics["doubts"][0]


def test_a_result_that_holds_without_rows_that_look_like_others_stays_green(tmp_path, capsys):
    rows = rows_with_ridge(100, np.full(100, 0.3))
    metrics, page, run = judge_similar(tmp_path, rows, np.arange(20))
    sentence = "20 of 100 rows look like one in another part of the split. Without them: The model beats the baseline"
    assert metrics["doubts"] == [] and "Holds" in page and page.count(sentence) == 1
    assert f"note: {sentence}" in capsys.readouterr().out
    never_varies = {"w_true": 1, "w_predicted": 1, "w_ridge": 1}
    metrics, page, _ = judge_similar(tmp_path, [row | never_varies for row in rows], np.arange(20))
    assert metrics["doubts"] == [] and sentence in page and "This says nothing of" not in page, "nor did all rows of w"


def test_classes_without_the_rows_that_look_like_others(tmp_path):
    """All that are right are similar; of the rest, of one class, no AUC can be had."""
    draw = np.random.default_rng(5)
    rows = [{"image": f"{k}.jpg", "label": "ab"[k % 2], "prob_a": 0.8 - 0.6 * (k % 2) + 0.1 * draw.random()} for k in range(60)]
    for row in rows:
        row |= {"prob_b": 1 - row["prob_a"], "ridge_prob_a": draw.random()}
        row["ridge_prob_b"] = 1 - row["ridge_prob_a"]
    metrics, *_ = judge_similar(tmp_path, rows, range(8), class_judging.judge_classes)
    assert metrics["doubts"] == []
    metrics, *_ = judge_similar(tmp_path, rows, [k for k in range(60) if k % 2], class_judging.judge_classes)
    assert metrics["doubts"][0].startswith("30 of 60 rows look like one in another part of the split. Without them: Not resolvable")


def test_a_score_of_which_nothing_is_left_without_the_look_alikes_is_named(tmp_path):
    """All rows with a value of w look like others: the mean R2 of the rest was that of v alone, and the page green."""
    rows = rows_with_ridge(100, np.full(100, 0.3))
    for k, row in enumerate(rows):
        row |= {"w_true": row["v_true"] if k < 20 else "", "w_predicted": row["v_predicted"], "w_ridge": row["v_ridge"]}
    metrics, *_ = judge_similar(tmp_path, rows, np.arange(10))
    assert metrics["doubts"] == []
    metrics, *_ = judge_similar(tmp_path, rows, np.arange(20))
    assert "Without them: The model beats the baseline" in metrics["doubts"][0]
    assert "This says nothing of w. If they show" in metrics["doubts"][0]


def test_rows_of_one_name_are_one_group(tmp_path):
    """Ten times five folds predict every picture ten times: as much evidence as of one time."""
    draw = np.random.default_rng(8)
    true = draw.normal(size=40)
    error = draw.normal(size=40)
    rows = [{"image": f"{k}.jpg", "fold": 5 * again + k % 5, "v_true": true[k],
             "v_predicted": 0.45 * true[k] + 0.75 * error[k] + draw.normal(0, 0.1)} for again in range(10) for k in range(40)]
    found = table_of(tmp_path, rows)
    result = found.compare()
    assert result.subjects == 40 and result.gain("r2").low < 0 and "40 values in 400 rows" in found.notes[0]
    once = table_of(tmp_path, rows[:40])
    assert once.groups is None and once.notes == [] and once.compare().unit == "rows"
    named = table_of(tmp_path, [{**row, "group": row["fold"]} for row in rows])
    assert len(set(named.groups)) == 50 and named.notes == []
    folds = table_of(tmp_path, [{"Fold" if name == "fold" else name: cell for name, cell in row.items()} for row in rows])
    assert folds.n_folds == found.n_folds == 50, "of any case"
    assert table_of(tmp_path, [{"Fold": 1, "FOLD": 2, **row} for row in without(rows, "fold")]).n_folds == 1
    assert table_of(tmp_path, without(rows, "image")).groups is None, "nothing says which row is which"
    assert table_of(tmp_path, [{**row, "image": "all"} for row in rows]).groups is None


def test_blank_cells_that_would_change_what_is_compared(tmp_path):
    rows = [{"v_true": k, "v_predicted": k + 1, "v_ridge": "" if k == 7 else k + 2, "group": "" if k in (2, 5) else "s"}
            for k in range(20)]
    with pytest.raises(common.UserError, match="1 of 20 rows .* no prediction of ridge .rows 8."):
        prediction_tables.refuse_useless(table_of(tmp_path, rows), "t.csv")
    rows[7]["v_ridge"] = 9
    with pytest.raises(common.UserError, match="2 blank"):
        prediction_tables.refuse_useless(table_of(tmp_path, rows), "t.csv")


def test_unlabelled_rows_are_not_counted(tmp_path):
    rows = scores()
    for row in rows[:3]:
        row |= {"Valence_true": "", "Arousal_true": "", "group": "", "Valence_predicted": ""}
    for row in rows[3:]:
        row["group"] = row["subject"]
    blank = [{"label": "ab"[k % 2], "prob_a": 0.3, "prob_b": 0.7} for k in range(20)] + [{"label": ""}]
    prediction_tables.refuse_useless(table_of(tmp_path, blank), "t.csv")
    common.write_table(tmp_path / "p.csv", rows)
    run = judge(tmp_path, "--predictions", tmp_path / "p.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["sample"]["rows"] == 57 and "57 of 57 rows may have been seen" in metrics["doubts"][-1]
    said = (run / "log.txt").read_text()
    assert f"doubt: {metrics['doubts'][-1]}" in said and "note: only 57 of 60 rows have a true value" in said
    run = judge(tmp_path / "classes", "--predictions", tmp_path / "t.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["sample"]["rows"] == np.sum(metrics["confusion"]) == 20


# --- two tables held against each other ----------------------------------------------------------------

def two_tables(tmp_path, first, second):
    """compare_tables of two lists of rows, in this order and turned round."""
    tables = [table_of(tmp_path, rows) for rows in (first, second)]
    [straight] = table_judging.compare_tables(table_judging.same_rows(tables, "ab"), "ab")
    [turned] = table_judging.compare_tables(table_judging.same_rows(tables[::-1], "ba"), "ba")
    return straight, turned


def without(rows, *columns):
    """The rows without these columns."""
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def test_rows_that_cannot_be_told_apart_are_not_compared(tmp_path):
    """Two raters of one picture: which row belongs to which is not in the column image."""
    rows = without(scores(), "stimulus")
    for row in rows[1::2]:
        row["image"] = rows[rows.index(row) - 1]["image"]
    with pytest.raises(common.UserError, match="column image .* 30 values in 60 rows"):
        two_tables(tmp_path, rows, rows)


def test_truths_of_fewer_digits_are_the_same_truth(tmp_path):
    rows = scores()
    rounded = [{**row, "Valence_true": round(row["Valence_true"], 4)} for row in rows]
    assert two_tables(tmp_path, rows, rounded)[0]["better"] == "not resolvable"
    labels = [{"clip_id": row["image"], "label": "ab"[k % 2], "prob_a": 0.5, "prob_b": 0.5} for k, row in enumerate(rows)]
    other = [*labels[:-1], {**labels[-1], "label": "a"}]
    with pytest.raises(common.UserError, match="other true values"):
        two_tables(tmp_path, labels, other)


def test_a_pair_does_not_depend_on_the_order(tmp_path):
    """Subjects and folds count where one of the two tables knows them."""
    plain = scores(noise=0.6)
    known = scores(noise=0.5)
    for k, row in enumerate(known):
        row |= {name: plain[k][name] for name in row if name.endswith("_true")} | {"group": k % 12, "fold": k % 5}
    straight, turned = two_tables(tmp_path, plain, known)
    assert straight["low"] == pytest.approx(-turned["high"]) and straight["method"] == turned["method"]
    assert "12 subjects" in straight["method"] and "5 folds" in straight["method"]


@pytest.mark.parametrize("seen, better, words", [
    (("train", "new"), "not comparable", "a (rows: train) against b (rows: new)"), (("new", "new"), "a", "]."),
    (("chose", "new"), "a", "a (rows: chose) against b (rows: new)"), (("chose", "chose"), "a", "optimistic"),
    (("train", "train"), "not comparable", "was trained on rows")])
def test_a_comparison_says_what_the_models_had_seen(tmp_path, seen, better, words):
    first, second = ([{**row, "seen": word} for row in scores(noise=noise)] for word, noise in zip(seen, (0.1, 0.5)))
    for row, other in zip(second, first):
        row |= {name: other[name] for name in row if name.endswith("_true")}
    straight, turned = two_tables(tmp_path, first, second)
    assert straight["better"] == turned["better"] == better
    assert [straight["seen_first"], straight["seen_second"]] == list(seen)
    sentence = judging.comparison_sentence(straight)
    assert sentence.endswith(".") and words in sentence and ("is better" in sentence) == (better == "a")
    few = judging.comparison_sentence({**straight, "low": np.nan, "high": np.nan, "method": "no interval under 5 subjects, here 3"})
    assert "[no interval under 5 subjects, here 3]" in few


def test_runs_that_cannot_be_compared_are_a_note(tmp_path):
    """The ratings were corrected between two runs: the third is compared with the second all the same."""
    said = []
    for name, shift in (("run_1", 1), ("run_2", 0), ("run_3", 0)):
        (tmp_path / name).mkdir()
        rows = [{**row, "Valence_true": row["Valence_true"] + shift} for row in scores()]
        common.write_table(tmp_path / name / "predictions_val.csv", rows)
    rows = table_judging.compare_runs([tmp_path / f"run_{k}" for k in (1, 2, 3)], said.append)
    assert [(row["first"], row["second"]) for row in rows] == [("run_2", "run_3")]
    assert len(said) == 2 and all(text.startswith("note: ") and "other true values" in text for text in said)


def test_runs_with_little_to_compare_are_a_note(tmp_path):
    said = []
    folders = [tmp_path / f"run_{k}" for k in (1, 2, 3)]
    for folder, rows in zip(folders, (scores()[:4], scores(), [])):
        folder.mkdir()
        if rows:
            common.write_table(folder / "predictions_val.csv", rows)
    assert table_judging.compare_runs(folders, said.append) == table_judging.compare_runs(folders[:1], said.append) == []
    for text, words in zip(said, ("run_3 is not compared: it holds none of predictions_folds.csv",
                                  "run_1 and run_2 are not compared: they share 4 rows, expected 5",
                                  "run_1 is the only run"), strict=True):
        assert text.startswith("note: ") and words in text


# --- what is refused before anything is written ---------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--runs", "out", "--truth", "x.json"], ["--truth", "--runs"]),
    (["--runs", "out", "--criteria", "r2>0"], ["--criteria", "--runs"]),
    (["--runs", "out", "--held_out"], ["--held_out", "--runs"]),
    (["--predictions", "p.csv", "--box_format", "xyxy"], ["--box_format", "--predictions alone"]),
    (["--predictions", "p.json", "--truth", "x.json", "--positive_class", "ear"], ["--positive_class", "--truth"]),
    (["--predictions", "p.json"], ["expected a CSV", "--truth"]),
    (["--predictions", "p.json", "q.json", "--truth", "x.json"], ["one file to --predictions", "--baseline"])])
def test_flags_that_would_do_nothing_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as left:
        judge_predictions.parse_args(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and all(word in said for word in words), said


def test_nothing_is_written_where_a_flag_or_a_row_is_wrong(tmp_path):
    common.write_table(tmp_path / "p.csv", scores())
    common.write_table(tmp_path / "few.csv", scores()[:50])
    common.write_table(tmp_path / "c.csv", classes())
    for flags, words in (
            (["p.csv", "--criteria", "r3>1"], "r3"), (["c.csv", "--criteria", "r2>1"], "r2"),
            (["p.csv", "few.csv"], "10 rows of the first are missing"),
            (["p.csv", "--positive_class", "ear"], "--positive_class")):
        files = [tmp_path / word if word.endswith(".csv") else word for word in flags]
        said = judge(tmp_path, "--predictions", *files, code=2)
        assert words in said and not (tmp_path / "out").exists()


def test_what_one_of_several_tables_lacks_they_all_lack():
    """A model without a threshold."""
    tables = []
    for score, threshold in ((0.2, 0.3), (0.6, 0.5)):
        probability = np.array([[1 - score, score]] * 3)
        tables.append(prediction_tables.ClassTable(
            keys={"id": np.array(["a", "b", "c"]), "start_sec": np.full(3, 0.1)}, names=["no", "yes"], positive=1,
            truth=np.array([0, 1, 1]), probability=probability, baselines={"train_prior": probability},
            seen=np.full(3, "new"), threshold=np.full(3, threshold)))
    mean = prediction_tables.mean(tables)
    assert mean.threshold == pytest.approx([0.4] * 3) and mean.probability[:, 1] == pytest.approx([0.4] * 3)
    assert mean.baselines["train_prior"] == pytest.approx(mean.probability) and mean.truth.tolist() == [0, 1, 1]
    assert prediction_tables.mean(tables[:1] * 3).keys["start_sec"].tolist() == [0.1] * 3, "a mean of .1 is rounded"
    tables[1].threshold = None
    assert prediction_tables.mean(tables).threshold is None
    joined = prediction_tables.join(tables, [0, 1])
    assert joined.threshold is None and joined.keys["fold"].tolist() == [0, 0, 0, 1, 1, 1]
