"""Checkpoints: written whole or not at all, and refused in one sentence when damaged, hostile or another script's.

    python -m pytest tests/test_checkpoints.py
"""
import errno
import math
import operator
import re
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common


def content(value=1.0):
    return {
        "format": common.FORMAT,
        "script": "train_x.py",
        "model": {"w": torch.full((64, 64), value)},
        "epoch": 3,
        "list": [1, "a", None],
        "seen": None,
    }


def test_round_trip(tmp_path):
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, content())
    assert torch.equal(common.read_checkpoint(path)["model"]["w"], content()["model"]["w"])
    assert common.read_checkpoint(path)["list"] == [1, "a", None]


def test_previous_is_kept(tmp_path):
    path = tmp_path / "last.pth"
    for value in (1.0, 2.0, 3.0):
        common.save_checkpoint(path, content(value), keep_previous=True)
    assert common.read_checkpoint(path)["model"]["w"][0, 0] == 3
    assert common.read_checkpoint(tmp_path / "last.pth.prev")["model"]["w"][0, 0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "last.pth.prev"]


def test_there_is_a_last_checkpoint_at_every_moment(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    replace = os.replace

    def watched(*names):
        assert path.exists() or names[1] == path
        replace(*names)
        assert path.exists()
    for value in (0.0, 1.0):  # so that there is one before the last, which must make room
        common.save_checkpoint(path, content(value), keep_previous=True)
    monkeypatch.setattr(common.os, "replace", watched)
    common.save_checkpoint(path, content(2.0), keep_previous=True)


def test_previous_is_kept_where_the_drive_knows_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(common.os, "link", refuse)
    test_previous_is_kept(tmp_path)


def test_a_full_disk_names_file_and_bytes(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common.os, "fsync", fail)
    with pytest.raises(common.CannotSave, match=r"no space to write .*x\.json: 3 bytes needed, \d+ free"):
        common.write_whole(tmp_path / "x.json", b"abc")


def test_a_drive_may_not_know_how_to_sync_a_folder(tmp_path, monkeypatch):
    """VirtualBox's shared folders answer EINVAL; the file itself is synced."""
    synced = []

    def sync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        synced.append("folder" if is_folder else "file")
        if is_folder:
            raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(common.os, "fsync", sync)
    common.write_whole(tmp_path / "x.json", b"abc")
    assert synced == ["file", "folder"] and (tmp_path / "x.json").read_bytes() == b"abc"


def test_a_full_disk_leaves_the_last_checkpoint_and_the_one_before_it(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for value in (1.0, 2.0):
        common.save_checkpoint(tmp_path / "last.pth", content(value), keep_previous=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(common.os, "fsync", fail)
    with pytest.raises(common.CannotSave):
        common.save_checkpoint(tmp_path / "last.pth", content(3.0), keep_previous=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def make_training(folder, resumed, select="val_loss", precision="fp32", **flags):
    """A Training of a linear model on 6 numbers in batches of 2, and its loader."""
    compute = common.Compute(torch.device("cpu"), precision, False, "cpu", common.Processes())
    defaults = dict(
        seed=1, epochs=2, lr=0.1, weight_decay=0.0, optimizer="adamw", scheduler="step", warmup_epochs=0.5,
        plateau_patience=5, min_lr=0.0, accumulate=1, clip_grad=1.0, patience=0, min_epochs=0, min_delta=0.0,
        dry_run=False, save_minutes=0,
        save_every=0, save_top_k=0, num_workers=0, resume="auto", tensorboard=False, wandb=False,
        compile=False, fold="all", given=set())
    args = SimpleNamespace(**{**defaults, **flags})
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    signals = SimpleNamespace(received=0, armed=False, leave=lambda: None, disarm=lambda: None)
    common.write_json(folder / "args.json", {})  # as of every run that trains
    run = common.Run(folder, args, compute, signals, resumed)
    training = common.Training(run, model, common.build_optimizer(model, args), args, select, {}, False)
    return training, common.make_loader(Numbers(), args, compute, train=True, batch_size=2)


class Numbers(torch.utils.data.Dataset):
    def __init__(self, n=6):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return {"x": torch.tensor([float(key[1])])}


def squared_error(output):
    return (output - 3).pow(2).mean()


def train(training, loader, stop_after=None, val_loss=lambda epoch: 0.5, loss=squared_error):
    """Run to the end, or signal before step number `stop_after`."""
    steps = 0
    with training.run:
        for epoch in training.epochs():
            for batch in training.batches(loader):
                steps += 1
                training.run.signals.received = signal.SIGTERM if steps == stop_after else 0
                training.step(loss(training.model(batch["x"])))
            training.end_epoch({**training.epoch_means(), "val_loss": val_loss(epoch)})
    return training


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
def test_compiled_training_has_the_same_losses_and_names(tmp_path):
    trained = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        trained[compiled] = train(*make_training(folder, False, compile=compiled))
    losses = [[row["train_loss"] for row in training.progress.history] for training in trained.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list(common.read_checkpoint(tmp_path / "True" / "best_model.pth")["model"]) == ["weight", "bias"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_compiled_where_it_is_asked_for(tmp_path, monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: asked.append(model))
    training, _ = make_training(tmp_path, False, compile=compiled)
    assert asked == [training.model] * compiled


@pytest.mark.parametrize("stop_after", range(1, 7))
def test_a_stop_after_any_batch_continues_exactly(tmp_path, capsys, stop_after):
    """Also after the last batch of an epoch, when nothing but its evaluation is left."""
    def with_dropout(output):
        return squared_error(torch.dropout(output, 0.5, True))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train(*make_training(tmp_path / "whole", False), loss=with_dropout)
    with pytest.raises(SystemExit) as caught:
        train(*make_training(tmp_path / "cut", False), stop_after=stop_after, loss=with_dropout)
    assert caught.value.code == 75
    again = train(*make_training(tmp_path / "cut", True), loss=with_dropout)
    assert again.progress.history == whole.progress.history and torch.equal(again.model.weight, whole.model.weight)
    csv = [(tmp_path / name / "training_history.csv").read_bytes() for name in ("whole", "cut")]
    assert csv[0] == csv[1] and len(whole.progress.history) == 2
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_two_epochs_are_those_of_a_plain_loop(tmp_path, clip_grad):
    """7 numbers in batches of 2, 2 and 3, two to an optimiser step: every sample of a step counts the same."""
    training, _ = make_training(tmp_path, False, accumulate=2, optimizer="sgd", scheduler="cosine", clip_grad=clip_grad)
    loader = common.make_loader(Numbers(7), training.args, training.run.compute, train=True, batch_size=2)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    judge = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    means, rates = [], []
    for epoch in range(2):
        order = [index for batch in common.EpochBatches(7, 2, 1, True, epoch=epoch) for _, index in batch]
        losses = []
        for first, last in ((0, 4), (4, 7)):
            passed = epoch + first / 7
            rates.append(0.1 * (max(passed / 0.5, 1e-3) if passed < 0.5 else
                                (1 + math.cos(math.pi * (passed - 0.5) / 1.5)) / 2))
            judge.param_groups[0]["lr"] = rates[-1]
            error = (model(torch.tensor(order[first:last], dtype=torch.float)[:, None]) - 3).square().flatten()
            judge.zero_grad()
            error.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
            judge.step()
            losses += error.tolist()
        means.append(sum(losses) / 7)
    history = train(training, loader).progress.history
    assert [row["train_loss"] for row in history] == pytest.approx(means, rel=1e-5)
    assert [row["learning_rate"] for row in history] == pytest.approx(rates[1::2], rel=1e-12)
    for ours, expected in zip(training.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, expected)


def test_training_stops_early_as_its_flags_say(tmp_path):
    """Gains of 0.05 are none; the first epoch is the last with a gain, and the fourth the first that may be the end."""
    training, loader = make_training(tmp_path, False, epochs=9, patience=2, min_delta=0.1, min_epochs=4)
    assert train(training, loader, val_loss=lambda epoch: 1 - 0.05 * epoch / 4).progress.epoch == 4


def test_the_learning_rate_of_other_schedules_does_not_wait_for_a_gain(tmp_path):
    training, loader = make_training(
        tmp_path, False, epochs=4, scheduler="none", plateau_patience=0, warmup_epochs=0, min_lr=0.01)
    training.optimizer.param_groups[0]["factor"] = 0.25  # as that of a backbone
    assert [row["learning_rate"] for row in train(training, loader).progress.history] == [0.1] * 4
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.025, 0.1]


@pytest.mark.parametrize("minutes, age, is_saved", [(0.5, 29.9, False), (0.5, 30.1, True), (0.0, 1e9, False)])
def test_a_step_is_saved_after_so_many_minutes(tmp_path, monkeypatch, minutes, age, is_saved):
    training, loader = make_training(tmp_path, False, save_minutes=minutes)
    monkeypatch.setattr(common.Training, "_seconds_since_save", lambda _: age)
    batch = next(training.batches(loader))
    training.step(squared_error(training.model(batch["x"])))
    assert (tmp_path / "last.pth").exists() is is_saved


def test_the_first_of_several_processes_decides_alone_when_a_step_is_saved(tmp_path, monkeypatch):
    """The others never save, so by the time since their last save they would ask for one after every step."""
    training, _ = make_training(tmp_path, False, save_minutes=0.5)
    asked = []
    monkeypatch.setattr(common.Training, "_seconds_since_save", lambda _: 1e9)
    monkeypatch.setattr(common.Processes, "largest", lambda processes, numbers: asked.append(numbers) or [0, 0])
    for rank in (0, 1):
        training.processes = common.Processes(rank, 2)
        training._save_or_stop()
    assert asked == [[0, True], [0, False]]


def test_each_process_and_batch_has_dropout_of_its_own(tmp_path):
    training, _ = make_training(tmp_path, False)

    def seed(rank, size, batch):
        training.processes = common.Processes(rank, size)
        training.progress.batch = batch
        training._seed_dropout()
        return torch.initial_seed()
    assert len({seed(rank, 3, batch) for rank in range(3) for batch in range(2)}) == 6
    assert seed(0, 3, 1) == seed(0, 1, 1) and seed(2, 3, 1) == seed(2, 3, 1)


def test_age_and_duration_of_a_save(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(common, "save_checkpoint", lambda *_, **__: setattr(clock, "now", clock.now + 5))
    training, _ = make_training(tmp_path, False)
    clock.now = 130.0
    assert training._seconds_since_save() == 30
    training.save()
    assert (training._seconds_since_save(), training.saving_seconds) == (0, 5)


@pytest.mark.parametrize("age, is_saved", [(9.0, False), (11.0, True)])
def test_an_epoch_is_saved_where_that_takes_a_tenth_of_the_time_or_less(tmp_path, monkeypatch, age, is_saved):
    training, _ = make_training(tmp_path, False, epochs=9, select="last")
    training.saving_seconds = 1.0
    monkeypatch.setattr(training, "_seconds_since_save", lambda: age)
    training.end_epoch({"train_loss": 0.5})
    assert (tmp_path / "last.pth").exists() is is_saved


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_counts_as_torch_does(tmp_path, patience):
    losses = [5, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2.5, 2.6, 2.6, 2.6, 2.6, 2.6]
    training, loader = make_training(
        tmp_path, False, epochs=len(losses), scheduler="plateau", plateau_patience=patience, warmup_epochs=0)
    train(training, loader, val_loss=lambda epoch: losses[epoch - 1])
    judge = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(judge, factor=0.5, patience=patience, threshold=0)
    rates = []
    for loss in losses:
        rates.append(judge.param_groups[0]["lr"])
        schedule.step(loss)
    assert [row["learning_rate"] for row in training.progress.history] == pytest.approx(rates)
    again, _ = make_training(tmp_path, True, epochs=20, scheduler="plateau", plateau_patience=patience)
    for counted in ("plateau_factor", "plateau", "stopping"):
        assert getattr(again, counted) == getattr(training, counted), "counted again from the history"


def test_plateau_without_a_chosen_epoch_follows_the_training_loss(tmp_path):
    losses = [5.0, 4.0, 4.0, 4.0, 3.0, 3.0]
    training, loader = make_training(
        tmp_path, False, epochs=6, scheduler="plateau", plateau_patience=0, warmup_epochs=0, select="last")
    for epoch in training.epochs():
        for batch in training.batches(loader):
            training.step(squared_error(training.model(batch["x"])))
        training.end_epoch({"train_loss": losses[epoch - 1]})
    assert [row["learning_rate"] for row in training.progress.history] == [0.1, 0.1, 0.1, 0.05, 0.025, 0.025]
    assert training.progress.best_epoch == 6


def best_and_last(folder):
    return [common.read_checkpoint(folder / name) for name in ("best_model.pth", "last.pth")]


def same_files(one, other):
    """True where two folders hold the same best model, last weights, progress and history."""
    best, last = zip(best_and_last(one), best_and_last(other))
    return (best[0]["epoch"] == best[1]["epoch"] and last[0]["progress"] == last[1]["progress"]
            and all(torch.equal(first["model"]["weight"], second["model"]["weight"]) for first, second in (best, last))
            and (one / "training_history.csv").read_bytes() == (other / "training_history.csv").read_bytes())


def best_is_second(epoch):
    return abs(epoch - 2.0)


@pytest.fixture
def whole(tmp_path):
    """Folder of six epochs left alone, best the second."""
    (tmp_path / "whole").mkdir()
    train(*make_training(tmp_path / "whole", False, epochs=6), val_loss=best_is_second)
    return tmp_path / "whole"


@pytest.fixture
def written(monkeypatch):
    """Names of the checkpoints written, where there is never time for another save after the first."""
    names, write = [], common.save_checkpoint

    def watched(path, *rest, **flags):
        names.append(path.name)
        write(path, *rest, **flags)
    monkeypatch.setattr(common, "SAVING_TIME", 0.0)
    monkeypatch.setattr(common, "save_checkpoint", watched)
    return names


SAVE = ["best_model.pth", "last.pth"]


@pytest.mark.parametrize("stop_after", [None, 4, 8, 9, 12])
def test_epochs_without_time_for_a_save_lose_nothing(tmp_path, whole, written, stop_after):
    """The first epoch, a stop and the last epoch are written, with the best model of the time."""
    folder = tmp_path / "cut"
    folder.mkdir()
    if stop_after:
        with pytest.raises(SystemExit) as caught:
            train(*make_training(folder, False, epochs=6), stop_after, best_is_second)
        best, last = best_and_last(folder)
        assert caught.value.code == 75 and written == SAVE + (SAVE if stop_after > 6 else ["last.pth"])
        assert best["epoch"] == min(2, (stop_after - 1) // 3)
        assert last["progress"]["epoch"] * 3 + last["progress"]["batch"] == stop_after
    train(*make_training(folder, stop_after is not None, epochs=6), val_loss=best_is_second)
    assert same_files(whole, folder) and written[-1] == "last.pth" and len(written) <= 7


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_after", range(1, 6))
def test_a_kill_repeats_the_epochs_that_were_not_written(tmp_path, whole, written, kill_after):
    """Before, the files on disk belong together; in the end all is as if nothing had happened."""
    folder = tmp_path / "cut"
    folder.mkdir()

    def scored(epoch):
        if epoch > kill_after:
            raise Killed
        return best_is_second(epoch)
    with pytest.raises(Killed):
        train(*make_training(folder, False, epochs=6), val_loss=scored)
    best, last = best_and_last(folder)
    assert written == SAVE and best["epoch"] == last["progress"]["best_epoch"] == last["progress"]["epoch"] == 1
    train(*make_training(folder, True, epochs=6), val_loss=best_is_second)
    assert same_files(whole, folder)


@pytest.mark.parametrize("flags, expected", [
    ({"save_every": 3}, ["checkpoint_epoch_3.pth", *SAVE, "checkpoint_epoch_6.pth", "last.pth"]),
    ({"save_top_k": 1}, ["top_epoch_2_val_loss_0.pth", *SAVE, *["last.pth"] * 4])], ids=["save_every", "save_top_k"])
def test_what_is_asked_for_is_always_written(tmp_path, written, flags, expected):
    train(*make_training(tmp_path, False, epochs=6, **flags), val_loss=best_is_second)
    first = SAVE if "save_every" in flags else ["top_epoch_1_val_loss_1.pth", *SAVE]
    assert written == first + expected


def test_a_stop_between_two_epochs_saves_the_last_one(tmp_path, written):
    training, loader = make_training(tmp_path, False, epochs=6)
    with pytest.raises(SystemExit), training.run:
        for epoch in training.epochs():
            for batch in training.batches(loader):
                training.step(training.model(batch["x"]).pow(2).mean())
            training.end_epoch({"val_loss": float(epoch)})
            training.run.signals.received = signal.SIGTERM if epoch == 3 else 0
    best, last = best_and_last(tmp_path)
    assert best["epoch"] == 1 and (last["progress"]["epoch"], last["progress"]["batch"]) == (3, 0)


def test_a_stop_after_the_last_epoch_is_obeyed(tmp_path):
    """When nobody has looked since; while loader workers end, what a signal raises would be ignored."""
    class Late(common.StopSignals):
        received = 0

        def __init__(self):
            self.leave = lambda: None

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "armed" and not value:
                assert training.stream is None
                self.received = signal.SIGTERM
    training, loader = make_training(tmp_path, False)
    training.run.signals = Late()
    with pytest.raises(SystemExit) as left:
        for _ in training.epochs():
            for batch in training.batches(loader):
                training.step(training.model(batch["x"]).pow(2).mean())
            training.end_epoch({"val_loss": 0.5})
    assert left.value.code == 75 and make_training(tmp_path, True)[0].is_done


def test_a_lost_history_file_is_written_again(tmp_path):
    train(*make_training(tmp_path, False))
    written = (tmp_path / "training_history.csv").read_bytes()
    (tmp_path / "training_history.csv").unlink()
    assert make_training(tmp_path, True)[0].is_done
    assert (tmp_path / "training_history.csv").read_bytes() == written


def test_more_epochs_of_what_early_stopping_has_ended_say_what_to_do(tmp_path, capsys):
    assert train(*make_training(tmp_path, False, epochs=9, patience=1)).progress.epoch == 2
    assert capsys.readouterr().out.count("stopped early") == 1, "not after the first epoch"
    assert make_training(tmp_path, True, epochs=12, patience=1)[0].is_done
    said = capsys.readouterr().out
    assert re.search(r"continuing.*\nstopped early after epoch 2.*--init_from \S*best_model.pth", said)


def test_a_run_that_took_all_its_epochs_did_not_stop_early(tmp_path, capsys):
    """Neither at its end nor where it is resumed, even if its patience has run out in the last one."""
    assert train(*make_training(tmp_path, False, epochs=2, patience=1)).stopping.bad_epochs == 1
    assert make_training(tmp_path, True, epochs=2, patience=1)[0].is_done
    said = capsys.readouterr().out
    assert "continuing after epoch 2" in said and "stopped early" not in said


def test_scores_that_are_never_numbers_end_in_a_sentence(tmp_path, capsys):
    training = train(*make_training(tmp_path, False, save_top_k=1), val_loss=lambda epoch: math.nan)
    assert training.progress.best_epoch is None and not list(tmp_path.glob("*best*")) + list(tmp_path.glob("top*"))
    assert "*" not in capsys.readouterr().out
    for each in (training, make_training(tmp_path, True)[0]):
        with pytest.raises(common.NotFinite, match="val_loss is a number after none of the 2 epochs.*--select last"):
            each.load_best()


def test_a_dry_run_needs_no_score(tmp_path):
    """Its few rows may have none."""
    training = train(*make_training(tmp_path, False, epochs=1, dry_run=True), val_loss=lambda epoch: math.nan)
    assert training.load_best()["epoch"] == 1


def test_lost_checkpoints_are_no_fresh_start(tmp_path, capsys):
    """A WARNING for the one before; without it the newest of the older ones is named, or a new run."""
    train(*make_training(tmp_path, False, epochs=11, save_every=1))
    (tmp_path / "last.pth").unlink()
    assert make_training(tmp_path, True, epochs=11)[0].progress.epoch == 10
    assert "WARNING: continuing from last.pth.prev" in capsys.readouterr().out
    (tmp_path / "last.pth.prev").unlink()
    with pytest.raises(common.CheckpointError, match=r"last.pth is lost\); --resume \S*checkpoint_epoch_11.pth"):
        make_training(tmp_path, True)
    (tmp_path / "training_history.csv").unlink()
    with pytest.raises(common.CheckpointError, match=r"checkpoint_epoch_11.pth"):
        make_training(tmp_path, True)
    for path in set(tmp_path.glob("checkpoint_epoch_*")) - {tmp_path / "checkpoint_epoch_1.pth"}:
        path.unlink()
    assert make_training(tmp_path, True)[0].progress.epoch == 0  # killed before the first last.pth
    (tmp_path / "checkpoint_epoch_1.pth").unlink()
    (tmp_path / "training_history.csv").write_text("epoch")
    with pytest.raises(common.CheckpointError, match=r"last.pth is lost\); start a new run"):
        make_training(tmp_path, True)


@pytest.mark.parametrize("content", [None, b"cut"])
def test_a_lost_best_model_is_noticed_before_more_is_trained(tmp_path, content):
    train(*make_training(tmp_path, False))
    (tmp_path / "best_model.pth").unlink()
    if content:
        (tmp_path / "best_model.pth").write_bytes(content)
    with pytest.raises(common.CheckpointError, match="best_model.pth.*: put back a copy, or start a new run"):
        make_training(tmp_path, True, epochs=9)


def test_a_class_may_have_a_slash_in_its_name(tmp_path):
    training, loader = make_training(tmp_path, False, select="val_ear/tail_f1", epochs=1, save_top_k=1)
    for batch in training.batches(loader):
        training.step(training.model(batch["x"]).pow(2).mean())
    training.end_epoch({"val_ear/tail_f1": 0.5})
    assert [path.name for path in tmp_path.glob("top_epoch_*")] == ["top_epoch_1_val_ear_tail_f1_0.5.pth"]


def test_a_stop_names_the_fold_that_was_typed(tmp_path, capsys):
    """args.json says another one where a run was resumed for it."""
    with pytest.raises(SystemExit):
        train(*make_training(tmp_path, False, fold="all", given={"fold"}), stop_after=1)
    assert f"continue with --resume {tmp_path} --fold all\n" in capsys.readouterr().out


def test_not_a_number_is_never_best(tmp_path):
    training, loader = make_training(tmp_path, False, epochs=3, save_top_k=1)
    for val_loss in (0.5, math.nan, 0.4):
        for batch in training.batches(loader):
            training.step(training.model(batch["x"]).pow(2).mean())
        training.end_epoch({"val_loss": val_loss})
        assert training.progress.best_epoch == (3 if val_loss == 0.4 else 1)
    assert [path.name for path in tmp_path.glob("top_epoch_*")] == ["top_epoch_3_val_loss_0.4.pth"]
    assert common.read_checkpoint(tmp_path / "best_model.pth")["epoch"] == 3


def test_a_best_model_from_before_a_resume_is_not_taken_for_the_best(tmp_path):
    """On a GPU an older checkpoint may go on in another way, so that the best epoch of before never comes."""
    training = train(*make_training(tmp_path, False))
    best = training.load_best()
    assert best["epoch"] == training.progress.best_epoch == 1
    common.save_checkpoint(tmp_path / "best_model.pth", common.to_plain_types(best | {"history": {"epoch": 2}}))
    with pytest.raises(common.CheckpointError, match="best epoch is 1, but best_model.pth is of epoch 2"):
        training.load_best()


def test_the_line_of_an_epoch_shows_the_same_numbers_in_every_epoch(tmp_path, capsys):
    training, loader = make_training(tmp_path, False, epochs=2)
    for val_loss in (0.5, 0.12345678):
        for batch in training.batches(loader):
            training.step(training.model(batch["x"]).pow(2).mean())
        others = {f"val_of_something_{number}": val_loss / 3 for number in range(9)}
        training.end_epoch({"val_r2": val_loss, **others, "val_loss": val_loss})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [re.findall(r"  (\w+) [\d.]+", line) for line in lines] == [["val_loss", "val_r2", "val_of_something_0"]] * 2
    assert all("samples/s" in line and line.endswith("*") for line in lines)


def test_the_time_left_is_that_of_the_epochs_to_come_in_this_and_later_folds(tmp_path, monkeypatch, capsys):
    training, loader = make_training(tmp_path, False, epochs=5)
    training.run.folds_after = 2
    for batch in training.batches(loader):
        training.step(training.model(batch["x"]).pow(2).mean())
    monkeypatch.setattr(common.time, "perf_counter", lambda: training.started + 120)
    training.end_epoch({"val_loss": 0.5})
    assert re.search(r"\(120.00 s, 0.1 samples/s, peak [\d.]+ GB, 28 min left\)", capsys.readouterr().out)


def test_where_the_system_does_not_tell_the_memory_no_epoch_claims_any(tmp_path, monkeypatch, capsys):
    training, loader = make_training(tmp_path, False, epochs=5)
    for batch in training.batches(loader):
        training.step(training.model(batch["x"]).pow(2).mean())
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setattr(common.time, "perf_counter", lambda: training.started + 120)
    training.end_epoch({"val_loss": 0.5})
    assert "(120.00 s, 0.1 samples/s, 8 min left)" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [operator.mul, operator.add], ids=["nan_gradient", "finite_gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, spoil):
    training, loader = make_training(tmp_path, False)
    before = training.model.weight.clone()
    with pytest.raises(common.NotFinite, match="loss is nan in epoch 1, batch 1"):
        for batch in training.batches(loader):
            training.step(spoil(training.model(batch["x"]).mean(), math.nan))
    assert torch.equal(training.model.weight, before)


def test_of_several_batches_in_a_step_those_whose_loss_is_not_finite_are_named(tmp_path):
    training, loader = make_training(tmp_path, False, accumulate=3)
    factors = iter([1, math.inf, 1])
    with pytest.raises(common.NotFinite, match=r"loss is inf in epoch 1, batch 2 \("):
        for batch in training.batches(loader):
            training.step(squared_error(training.model(batch["x"])) * next(factors))


def test_fp16_leaves_out_steps_that_overflow_and_continues_exactly(tmp_path):
    """As on GPUs of compute capability 7; the stop is between two steps that are left out."""
    def through_fp16(output):
        return squared_error(output.half().float())
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    settings = {"precision": "fp16", "epochs": 4}
    whole = train(*make_training(tmp_path / "whole", False, **settings), loss=through_fp16)
    assert 1 < whole.scaler.get_scale() < 2 ** 16
    assert whole.progress.history[3]["train_loss"] < whole.progress.history[0]["train_loss"]
    with pytest.raises(SystemExit):
        train(*make_training(tmp_path / "cut", False, **settings), stop_after=2, loss=through_fp16)
    again = train(*make_training(tmp_path / "cut", True, **settings), loss=through_fp16)
    assert again.scaler.state_dict() == whole.scaler.state_dict()
    assert again.progress.history == whole.progress.history and torch.equal(again.model.weight, whole.model.weight)


def test_losses_are_scaled_in_fp16_alone(tmp_path):
    """Of a loss of 1e35 in fp32 the scaled one would be infinite, and its step left out."""
    enabled = [make_training(tmp_path, False, precision=name)[0].scaler.is_enabled() for name in ("fp32", "bf16", "fp16")]
    assert enabled == [False, False, True]


def test_what_is_watched_is_the_row_of_the_epoch_that_has_ended(tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(common.Run, "watch", lambda run, row: watched.append(dict(row)))
    training = train(*make_training(tmp_path, False, epochs=3), val_loss=lambda epoch: 1 / epoch)
    assert watched == training.progress.history and [row["epoch"] for row in watched] == [1, 2, 3]


def test_a_gradient_that_no_scale_makes_finite_stops_fp16_too(tmp_path):
    """GradScaler alone leaves out step after step and halves its scale without end, and nothing is learnt."""
    def gradient_is_nan(output):
        return squared_error(output) + (0 * output).sqrt().sum()
    with pytest.raises(common.NotFinite, match="the gradient is nan in epoch 6, batch 1"):
        train(*make_training(tmp_path, False, precision="fp16", epochs=9), loss=gradient_is_nan)


def test_the_lock_dies_with_its_process_and_not_with_the_workers(tmp_path):
    """A worker that outlives a killed run must not keep the folder closed."""
    code = ("import os, sys, time; sys.path.insert(0, sys.argv[2]); import common; from pathlib import Path\n"
            "lock = common.lock_folder(Path(sys.argv[1]))\n"
            "if os.fork() == 0: time.sleep(60)\n"
            "print('locked', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(Path(common.__file__).parent)],
                               stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.readline()
        with pytest.raises(common.UserError, match="another process"):
            common.lock_folder(tmp_path)
        process.kill()
        process.wait()
        common.lock_folder(tmp_path).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_on_a_drive_without_locks_can_be_written(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    common.lock_folder(tmp_path).close()


def test_a_full_disk_under_the_log_is_one_sentence(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(common.CannotSave, match="no space to write .*log.txt"):
        with common.Run(tmp_path, None, common.choose_compute("cpu", "off"), None, resumed=True) as run:
            run.say("a line")


def test_other_scripts_and_other_shapes(tmp_path):
    path = tmp_path / "best_model.pth"
    common.save_checkpoint(path, content())
    with pytest.raises(common.UserError, match="train_x.py, expected train_y.py"):
        common.load_model_file(path, "train_y.py")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(common.CheckpointError, match="other.pth is no checkpoint of this project .format None."):
        common.load_model_file(tmp_path / "other.pth")
    model = torch.nn.Linear(64, 3)
    with pytest.raises(common.CheckpointError, match="does not fit this model"):
        common.load_state(model, common.read_checkpoint(path)["model"], path)
    with pytest.raises(common.CheckpointError, match="not finite"):
        common.load_state(model, {"weight": torch.full((3, 64), float("nan")), "bias": torch.zeros(3)}, path)


def test_a_checkpoint_of_an_older_version_is_called_so(tmp_path):
    """Whatever it lacks; its script may look at nothing else before pictures or videos are decoded."""
    older = content()
    del older["seen"]
    common.save_checkpoint(tmp_path / "best_model.pth", older)
    with pytest.raises(common.CheckpointError, match="best_model.pth was written by an older version of train_x.py"):
        common.load_model_file(tmp_path / "best_model.pth", "train_x.py")


def test_the_checkpoint_of_a_run_folder_is_its_best_model(tmp_path, capsys):
    """Of a run of folds none is guessed."""
    parser = common.Parser()
    parser.add_argument("--init_from", type=common.best_model_of)
    for fold in ("fold_0", "fold_1"):
        (tmp_path / fold).mkdir()
        (tmp_path / fold / "best_model.pth").touch()
        with pytest.raises(SystemExit):
            parser.parse_args(["--init_from", str(tmp_path)])
        message = capsys.readouterr().err
        assert message.startswith("error: argument --init_from: ") and f"name one, as {tmp_path}/fold_0" in message
    assert common.best_model_of(str(tmp_path / "fold_1")) == tmp_path / "fold_1" / "best_model.pth"
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match="--checkpoint .*empty holds no best_model.pth and no fold_K/best_model.pth"):
        common.checkpoint_files([tmp_path, tmp_path / "empty"])


def test_a_checkpoint_holds_plain_values_alone_each_as_often_as_it_likes(tmp_path):
    shared = [1.0, 2.0]
    torch.save({**content(), "a": shared, "b": shared}, tmp_path / "shared.pth")
    assert common.read_checkpoint(tmp_path / "shared.pth")["b"] == shared
    torch.save({**content(), "a": torch.float16}, tmp_path / "odd.pth")
    with pytest.raises(common.CheckpointError, match="holds a dtype"):
        common.read_checkpoint(tmp_path / "odd.pth")


def test_sizes_that_no_network_can_have_are_a_fault_of_the_checkpoint():
    """But a full memory is none."""
    with pytest.raises(common.CheckpointError, match="x.pth lacks what this version of the script stores"):
        with common.checkpoint_fields("x.pth"):
            torch.nn.Linear(-4, 2)
    with pytest.raises(torch.OutOfMemoryError):
        with common.checkpoint_fields("x.pth"):
            raise torch.OutOfMemoryError("in any words")
