"""Each train script by two processes: one folder, one log, every row predicted once; stopped, and continued by one.

    python -m pytest tests/torture/test_ranks_scripts.py
"""
import csv
import json
import re
import signal
from types import SimpleNamespace

import pytest

from conftest import SCRIPTS, only_run, run_script
from test_ranks import start_ranks


def ends(members):
    """The exit code and the text of each process, without what older versions of torch say of the connection."""
    codes = [member.finish() for member in members]
    texts = [re.sub(r"^\[Gloo\].*\n", "", member.text(), flags=re.MULTILINE) for member in members]
    return [SimpleNamespace(code=code, text=text) for code, text in zip(codes, texts)]


def predicted_rows(run, script):
    """Names of the validation rows in the run's prediction file, in order."""
    if script == "train_detector.py":
        return sorted({each["image_id"] for each in json.loads((run / "detections_val.json").read_text())})
    with open(run / "predictions_val.csv", newline="", encoding="utf-8") as handle:
        return [next(iter(row.values())) for row in csv.DictReader(handle)]


@pytest.mark.parametrize("script", [pytest.param(script, marks=pytest.mark.long if script in SCRIPTS[1:] else ())
                                    for script in SCRIPTS])
def test_a_run_of_two_processes_is_stopped_and_continued_by_one(server, tiny_flags, tmp_path, cases, script):
    members = start_ranks(server, script, [*tiny_flags[script], "--output_dir", tmp_path], 2, tmp_path)
    members[0].wait_for("epoch 1")
    members[1].signal(signal.SIGTERM)  # the scheduler may reach one node first
    first, second = ends(members)
    with cases.case("1, 2 and 3 processes: odd sizes, elastic resume, stops, NaN"):
        assert (first.code, second.code) == (75, 75), first.text + second.text
        assert "SIGTERM received: saved" in first.text and "epoch" not in second.text
        run = only_run(tmp_path)
        run_script(script, "--resume", run)
        splits = json.loads((run / "splits.json").read_text())
        rows = predicted_rows(run, script)
        assert len(rows) == len(set(rows)) and (script == "train_detector.py" or len(rows) == len(splits["val"]))
        with open(run / "training_history.csv", newline="") as handle:
            assert [row["epoch"] for row in csv.DictReader(handle)] == ["1", "2", "3"]
        assert (run / "report.html").exists() and (run / "metrics.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_to_the_end(server, tiny_flags, tmp_path, cases, script):
    """One run folder with everything in it, said and written once; nothing on the other process's output."""
    flags = [*tiny_flags[script], "--output_dir", tmp_path, "--epochs", 1]
    first, second = ends(start_ranks(server, script, flags, 2, tmp_path))
    with cases.case("1, 2 and 3 processes: odd sizes, elastic resume, stops, NaN"):
        assert first.code == second.code == 0, first.text + second.text
        run = only_run(tmp_path)
        assert first.text.count("open next") == 1 and "processes: 2" in first.text and second.text == ""
        assert (run / "log.txt").read_text().count("open next") == 1
        assert not list(run.glob("**/*.tmp")) and (run / "report.html").exists()


def test_folds_by_two_processes(server, tiny_flags, tmp_path):
    """The first process writes the leakage report of each fold, which the other would read too early."""
    flags = [*tiny_flags["train_assessor.py"], "--output_dir", tmp_path, "--epochs", 1, "--folds", 2]
    first, second = ends(start_ranks(server, "train_assessor.py", flags, 2, tmp_path))
    assert first.code == second.code == 0, first.text + second.text
    assert len(json.loads((only_run(tmp_path) / "metrics.json").read_text())["folds"]) == 2


def test_a_process_may_have_no_picture_to_score(server, tiny_flags, tmp_path):
    """Two processes, one validation picture."""
    flags = list(tiny_flags["train_detector.py"])
    place = flags.index("--val_json") + 1
    content = json.loads(flags[place].read_text())
    content["images"] = content["images"][:1]
    [image] = content["images"]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] == image["id"]]
    flags[place] = tmp_path / "val.json"
    flags[place].write_text(json.dumps(content))
    members = start_ranks(server, "train_detector.py", [*flags, "--output_dir", tmp_path, "--epochs", 1], 2, tmp_path)
    assert [member.code for member in ends(members)] == [0, 0]
    assert (only_run(tmp_path) / "report.html").exists()


def test_a_mistake_is_said_by_each_and_leaves_nothing(server, tmp_path):
    flags = ["--images_dir", tmp_path, "--ratings_file", tmp_path / "none.csv", "--output_dir", tmp_path / "out"]
    first, second = ends(start_ranks(server, "train_assessor.py", flags, 2, tmp_path))
    assert first.code == second.code == 2
    assert first.text.splitlines()[-1].startswith("error: ") and second.text.startswith("[process 1] error: ")
    assert not list((tmp_path / "out").glob("*"))


def test_commands_for_one_process_say_so(server, sample, tmp_path):
    flags = ["--checkpoint", tmp_path, "--image_dir", sample.images, "--output", tmp_path / "p.csv"]
    first, second = ends(start_ranks(server, "predict_assessor.py", flags, 2, tmp_path))
    assert first.code == second.code == 2 and "works in one process" in first.text
