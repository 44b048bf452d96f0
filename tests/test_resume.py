"""What a run continues from, and what it refuses; kills and signals by the hundred are in tests/torture.

    python -m pytest tests/test_resume.py
"""
import hashlib
import json
import os
import re
import shutil
import signal
import time

import pandas as pd
import pytest
import torch

import common
import train_dreamer
import train_video
from conftest import fork_server, only_run, run_here, run_script, small_run


def is_over(folder):
    """True where last.pth is of the last epoch that was asked for."""
    epochs = json.loads((folder / "args.json").read_text())["flags"]["epochs"]
    return common.read_checkpoint(folder / "last.pth")["progress"]["epoch"] == epochs


def fingerprint(folder):
    """SHA-256 over weights, optimiser and progress of last.pth, the weights of best_model.pth, and the history file."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in value:
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    last = common.read_checkpoint(folder / "last.pth")
    assert is_over(folder)
    for part in ("model", "optimizer", "progress"):
        add(last[part])
    add(common.read_checkpoint(folder / "best_model.pth"))
    digest.update((folder / "training_history.csv").read_bytes())
    return digest.hexdigest()


def flags(sample, folder, *more):
    return small_run(sample, folder, "--scheduler", "plateau", "--accumulate", 2, "--save_every", 2, *more)


@pytest.fixture(scope="module")
def whole(sample, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("whole")
    run_script("train_assessor.py", *flags(sample, folder))
    return only_run(folder)


@pytest.fixture(scope="module")
def undisturbed(whole):
    return fingerprint(whole)


@pytest.fixture(scope="module")
def stopped(sample, tmp_path_factory):
    """The folder of a run that a signal has stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    assert start_and_signal(flags(sample, folder), folder / "said", signal.SIGTERM, 0) == 75
    return only_run(folder)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


def test_any_number_of_workers_gives_the_same_bits(sample, tmp_path, undisturbed):
    run_script("train_assessor.py", *flags(sample, tmp_path, "--num_workers", 2))
    assert fingerprint(only_run(tmp_path)) == undisturbed


def start_and_signal(flags, log, signal_number, wait):
    """Start the script, wait until it trains and `wait` seconds longer, then signal its group; returns its exit code."""
    trial = fork_server().start("train_assessor.py", flags, log)
    while not re.search("^epoch ", trial.text(), re.MULTILINE):
        assert trial.wait(0) is None, trial.text()
        time.sleep(0.01)
    time.sleep(wait)
    trial.signal(signal_number)
    return trial.finish(120)


def test_a_signal_saves_and_the_run_can_be_named(sample, tmp_path, undisturbed):
    """The whole process group is signalled, loader workers too, as a scheduler does."""
    command = flags(sample, tmp_path, "--num_workers", 2)
    assert start_and_signal(command, tmp_path / "said", signal.SIGUSR2, 0.1) == 75
    folder = only_run(tmp_path)
    assert not is_over(folder)
    assert "SIGUSR2 received: saved" in (folder / "log.txt").read_text()
    run_script("train_assessor.py", "--resume", folder)
    assert fingerprint(folder) == undisturbed


def test_a_reader_that_leaves_does_not_end_the_run(sample, tmp_path, undisturbed):
    """python train_assessor.py ... | head -1"""
    os.mkfifo(tmp_path / "pipe")
    trial = fork_server().start("train_assessor.py", flags(sample, tmp_path), tmp_path / "pipe",
                                errors=tmp_path / "errors")
    with open(tmp_path / "pipe") as pipe:
        assert pipe.readline().startswith("run folder: ")
    code = trial.wait(300)
    said = (tmp_path / "errors").read_text()
    assert code == 0, said
    assert "Error" not in said and fingerprint(only_run(tmp_path)) == undisturbed
    assert "open next" in (only_run(tmp_path) / "log.txt").read_text()


def test_resume_from_an_older_checkpoint(whole, tmp_path, undisturbed):
    folder = copy_of(whole, tmp_path)
    (folder / "metrics.json").unlink()
    run_script("train_assessor.py", "--resume", folder / "checkpoint_epoch_2.pth")
    assert fingerprint(folder) == undisturbed


def test_a_finished_run_says_so(whole):
    assert "is finished" in run_here("train_assessor.py", "--resume", whole).text
    assert len(list(whole.parent.glob("run_*"))) == 1


def test_a_finished_run_keeps_what_more_epochs_need(whole, sample, tmp_path):
    """plateau can go on; cosine is made for its number of epochs, and says what to do without last.pth."""
    assert (whole / "last.pth").exists() and not (whole / "last.pth.prev").exists()
    run_script("train_assessor.py", *small_run(sample, tmp_path / "a", "--epochs", 2))
    folder = only_run(tmp_path / "a")
    assert not list(folder.glob("last.pth*")) and (folder / "best_model.pth").exists()
    assert "is finished" in run_here("train_assessor.py", "--resume", folder / "last.pth").text
    text = run_here("train_assessor.py", "--resume", folder, "--epochs", 3, "--scheduler", "none", code=2).stderr
    assert "--init_from" in text and "made for 2 epochs" in text and (folder / "metrics.json").exists()
    run_script("train_assessor.py", *small_run(sample, tmp_path / "b", "--epochs", 2, "--keep_last"))
    assert len(list(only_run(tmp_path / "b").glob("last.pth*"))) == 2


def test_a_finished_run_goes_on_for_more_epochs(sample, tmp_path, undisturbed):
    """Where the schedule does not depend on their number: 2 epochs and one more are 3 epochs, bit by bit."""
    run_script("train_assessor.py", *flags(sample, tmp_path, "--epochs", 2))
    folder = only_run(tmp_path)
    run_script("train_assessor.py", "--resume", folder, "--epochs", 3)
    assert fingerprint(folder) == undisturbed and (folder / "metrics.json").exists()
    record = common.read_json(folder / "args.json")
    assert record["flags"]["epochs"] == 3
    common.write_json(folder / "args.json", record | {"flags": record["flags"] | {"scheduler": "cosine"}})
    text = run_here("train_assessor.py", "--resume", folder, "--epochs", 4, code=2).stderr
    assert "--init_from" in text and "made for 3 epochs" in text


def test_damaged_checkpoints(stopped, tmp_path):
    """A damaged last.pth: the one before, loudly. Both damaged: exit 3, never a silent fresh start."""
    folder = copy_of(stopped, tmp_path)
    last, previous = folder / "last.pth", folder / "last.pth.prev"
    previous.write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:5000])
    text = run_script("train_assessor.py", "--resume", folder).text
    assert "WARNING" in text and "continuing from last.pth.prev" in text
    (folder / "metrics.json").unlink()
    for path in (last, previous):
        path.write_bytes(b"nothing")
    text = run_here("train_assessor.py", "--resume", folder, code=3).stderr
    assert text.startswith("error: ") and "no usable checkpoint" in text


def test_other_flags_are_refused_with_both_values(stopped):
    split = (stopped / "splits.json").read_bytes()
    text = run_here("train_assessor.py", "--resume", stopped, "--lr", "0.5", "--seed", "7", code=2).stderr
    for word in ("--lr", "0.0001", "0.5", "--seed", "42", "7"):
        assert word in text
    assert (stopped / "last.pth").exists() and (stopped / "splits.json").read_bytes() == split


def cut(table):
    return table[:-1]


def with_wider_sds(table):
    """--loss weighted goes by them."""
    return table.assign(Valence_sd=3 * table.Valence_sd)


def with_a_subject_a_row(table):
    return table.assign(subject=table.index)


@pytest.mark.parametrize("change", [cut, with_wider_sds, with_a_subject_a_row])
def test_other_data_are_refused(sample, stopped, tmp_path, change):
    changed = tmp_path / "changed.csv"
    change(pd.read_csv(sample.ratings)).to_csv(changed, index=False)
    text = run_here("train_assessor.py", "--resume", stopped, "--ratings_file", changed, code=2).stderr
    assert "fingerprint" in text and not (stopped / "skipped.csv").exists()


def test_files_of_the_data_may_have_moved():
    """What they say is in the fingerprint of the data or of their split."""
    found = train_video.parse_args(["--manifest", "a.csv"]).data_paths
    assert found >= {"manifest", "video_root", "label_map", "cv_file", "split_file"}
    assert train_dreamer.parse_args([]).data_paths >= {"data_dir", "patient_map", "split_file"}


def test_resume_of_something_else(stopped, tmp_path):
    assert "no run folder" in run_here("train_assessor.py", "--resume", tmp_path / "none", code=2).stderr
    folder = copy_of(stopped, tmp_path)
    text = run_here("train_assessor.py", "--resume", folder / "lost.pth", code=2).stderr
    assert f"no such file in that run; --resume {folder}" in text
    record = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**record, "script": "train_video.py"}))
    assert "train_video.py" in run_here("train_assessor.py", "--resume", folder, code=2).stderr


def test_a_named_checkpoint_that_cannot_be_continued_is_refused_before_pictures_are_decoded(stopped, tmp_path):
    folder = copy_of(stopped, tmp_path)
    content = common.read_checkpoint(folder / "last.pth")
    common.save_checkpoint(folder / "last.pth", content | {"script": "train_video.py"})
    for name, code, word in (("last.pth", 2, "train_video.py"), ("best_model.pth", 3, "last.pth for --resume")):
        found = run_here("train_assessor.py", "--resume", folder / name, code=code)
        assert word in found.stderr and "decoding" not in found.text
