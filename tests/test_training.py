"""The parts of the training loop that are easy to get wrong: batches, seeds, schedule, early stopping, run folder.

    python -m pytest tests/test_training.py
"""
import concurrent.futures
import contextlib
import errno
import importlib
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from conftest import ROOT
from readers import backbones, pixel_cache


# --- batches ------------------------------------------------------------------

def batches(n, size, seed=0, train=True, epoch=0, start=0):
    sampler = common.EpochBatches(n, size, seed, train)
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


@pytest.mark.parametrize("n, size", [(10, 3), (9, 3), (10, 4), (1, 4), (7, 1), (33, 32), (5, 2)])
def test_every_sample_once_and_none_alone(n, size):
    made = batches(n, size)
    assert sorted(index for batch in made for _, index in batch) == list(range(n))
    assert all(len(batch) > 1 for batch in made) or n == 1 or size == 1  # BatchNorm cannot take a single sample
    assert len(made) == len(common.EpochBatches(n, size, 0, True))


def test_order_depends_on_seed_and_epoch_alone():
    assert batches(50, 8) == batches(50, 8)
    assert batches(50, 8, epoch=1) != batches(50, 8) and batches(50, 8, seed=1) != batches(50, 8)
    assert [i for b in batches(50, 8, train=False) for _, i in b] == list(range(50))


def test_a_resumed_epoch_is_the_rest_of_the_same_epoch():
    assert batches(50, 8, epoch=3, start=4) == batches(50, 8, epoch=3)[4:]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_step_spans_cover_the_epoch(accumulate):
    sampler = common.EpochBatches(29, 4, 0, True)
    spans = list(dict.fromkeys(sampler.step_span(batch, accumulate) for batch in range(len(sampler))))
    assert spans[0].start == 0 and spans[-1].stop == 29 and all(a.stop == b.start for a, b in zip(spans, spans[1:]))


def test_a_weighted_sampler_draws_in_proportion():
    """Classes of 900, 90 and 10 rows with balancing weights: each a third of the draws, the same after a resume."""
    label = np.repeat([0, 1, 2], [900, 90, 10])
    sampler = common.EpochBatches(1000, 50, 0, True, weights=1 / np.bincount(label)[label])
    epochs = []
    for epoch in range(20):
        sampler.epoch, sampler.start = epoch, 0
        epochs.append(list(sampler))
    drawn = label[[index for batches_of in epochs for batch in batches_of for _, index in batch]]
    assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.02)
    sampler.epoch, sampler.start = 7, 12
    assert list(sampler) == epochs[7][12:] and epochs[7] != epochs[8]


def test_mixed_seeds_do_not_collide():
    """Neighbouring (seed, epoch, sample) share nothing; seed + epoch would give 300 values of 10,000."""
    seeds = [common.hash_seed(seed, epoch, sample) for seed in range(5) for epoch in range(20) for sample in range(100)]
    assert len(set(seeds)) == 10_000 and all(0 <= seed < 2 ** 63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert (abs(bits.mean(0) - 0.5) < 0.025).all()  # five standard errors of a fair coin
    published = 6457827717110365317  # the first number of splitmix64 for this seed
    assert common.hash_seed(1234567) == published >> 1


# --- schedule and early stopping ----------------------------------------------------

def test_cosine_equals_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    judge = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for epoch in range(10):
        assert common.schedule_factor("cosine", epoch, 10, 0) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        judge.step()


def test_sgd_after_a_first_step_that_was_not_taken():
    """fp16 often leaves out the first steps, until the loss scale fits."""
    model = torch.nn.Linear(2, 1)
    args = SimpleNamespace(optimizer="sgd", lr=0.1, weight_decay=0.0)
    torch.use_deterministic_algorithms(True)  # fills memory without values with NaN
    try:
        optimizer = common.build_optimizer(model, args)
        before = model.weight.detach().clone()
        for found_inf in (1.0, 0.0):
            model.weight.grad = torch.ones(1, 2)
            model.bias.grad = torch.ones(1)
            optimizer.found_inf = torch.tensor(found_inf)
            optimizer.step()
            assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.state.values())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.allclose(model.weight, before - 0.1)


@pytest.mark.parametrize("name, kind", [
    ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_what_an_optimizer_decays_and_how_fast_it_trains_the_backbone(name, kind):
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)), torch.nn.Linear(3, 1))
    model[0][1].bias.requires_grad = False
    args = SimpleNamespace(optimizer=name, lr=0.1, weight_decay=0.5, backbone_lr_mult=0.01)
    for backbone, rate in ((None, 0.1), (model[0], 0.001)):
        optimizer = common.build_optimizer(model, args, backbone)
        settings = {parameter: (group["lr"], group["weight_decay"], group["factor"] * args.lr)
                    for group in optimizer.param_groups for parameter in group["params"]}
        assert type(optimizer) is kind
        assert {name: settings[parameter] for name, parameter in model.named_parameters() if parameter in settings} == {
            "0.0.weight": (rate, 0.5, rate), "0.0.bias": (rate, 0, rate), "0.1.weight": (rate, 0, rate),
            "1.weight": (0.1, 0.5, 0.1), "1.bias": (0.1, 0, 0.1)}


def test_other_schedules():
    assert [common.schedule_factor("step", epoch, 9, 0) for epoch in (0, 2.9, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    assert common.schedule_factor("step", 1, 2, 0) == 0.1, "every epoch of a run of two"
    assert common.schedule_factor("none", 7, 9, 0) == common.schedule_factor("none", 9, 9, 9) == 1
    warm = [common.schedule_factor("cosine", progress, 10, 2) for progress in (0, 0.5, 1, 2)]
    assert 0 < warm[0] < 0.01 and warm[1:] == pytest.approx([0.25, 0.5, 1.0])


def stop_epoch(scores, **settings):
    """Number of the epoch after which early stopping says stop, or None."""
    stopping = common.EarlyStopping(**{"patience": 2, "min_epochs": 0, "min_delta": 0.0, **settings})
    return next((epoch for epoch, score in enumerate(scores, 1) if stopping.update(score, epoch)), None)


def test_early_stopping():
    assert stop_epoch([1, 2, 2, 2]) == 4
    assert stop_epoch([1, 2, 2, 2, 2, 2], min_epochs=6) == 6
    assert stop_epoch([1, 1.05, 1.08, 1.09], min_delta=0.1) == 3
    assert stop_epoch([1] * 50, patience=0) is None
    assert stop_epoch([math.nan] * 3) == 2
    assert stop_epoch([3, 2, 4, 3, 5, 4, 6]) is None


# --- samples without loader workers -----------------------------------------------------

class Squares(common.Samples):
    """Sample (epoch, index) is epoch * 100 + index squared; index 13 is bad."""

    def __init__(self):
        self.makers = set()

    def __getitem__(self, key):
        self.makers.add(threading.get_ident())
        if key[1] == 13:
            raise pixel_cache.BadImage("13")
        time.sleep(0.001 * (key[1] % 3))  # so that threads overtake one another
        return key[0] * 100 + key[1] ** 2


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_a_batch_made_by_threads_is_the_batch(monkeypatch, cores):
    monkeypatch.setattr(common, "cores_of_process", lambda: cores)
    samples = Squares()
    for n in (2, 12, 1, 3, 7):
        assert samples.__getitems__([(2, i) for i in range(n)]) == [200 + i * i for i in range(n)]
    assert min(cores, 2) <= len(samples.makers) <= cores
    for n in (14, 20):  # in the last thread's part, and in another's
        with pytest.raises(pixel_cache.BadImage, match="13"):
            samples.__getitems__([(2, i) for i in range(n)])


@pytest.mark.parametrize("script, more", [
    ("train_assessor", {}), ("train_video", {"objective": None}), ("train_detector", {"state_weight": 1.0}),
    ("train_dreamer", {"loss_function": None})])
def test_an_epoch_trains_in_training_mode_whatever_the_evaluation_before_it_left(script, more):
    training = SimpleNamespace(args=None, batches=lambda loader: [], epoch_means=dict)
    model = torch.nn.Linear(1, 1).eval()
    importlib.import_module(script).train_one_epoch(model, [], training=training, compute=None, **more)
    assert model.training


# --- the run folder -------------------------------------------------------------------

def run_arguments(folder, **more):
    defaults = dict(output_dir=folder, dry_run=False, device="cpu", use_amp="off", deterministic=False, resume=None,
                    config=None, tensorboard=False, wandb=False, given=set())
    return SimpleNamespace(**{**defaults, **more})


class FakeWandb:
    """As much of wandb as a run uses; fails where it is told to."""

    def __init__(self, fails=()):
        self.fails, self.inits, self.logged, self.run = fails, [], [], None

    def init(self, **settings):
        if "init" in self.fails:
            raise RuntimeError("No API key configured")
        self.inits.append(settings)
        self.run = self
        return self

    def finish(self):
        self.run = None

    def log(self, numbers, step):
        if "log" in self.fails:
            raise RuntimeError("network is down")
        self.logged.append(step)


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    """make(fails) -> (FakeWandb, function that opens the run folder and logs an epoch)."""
    def make(fails=()):
        fake = FakeWandb(fails)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        compute = common.choose_compute("cpu", "off")

        def epoch(step):
            (tmp_path / "run").mkdir(exist_ok=True)
            args = run_arguments(tmp_path, wandb=True)
            with common.Run(tmp_path / "run", args, compute, None) as run:
                run.watch({"epoch": step, "val_loss": 1.0})
        return fake, epoch
    return make


def test_a_resumed_run_continues_the_same_wandb_run(wandb_run):
    fake, epoch = wandb_run()
    epoch(1)
    epoch(2)
    assert fake.logged == [1, 2] and len(fake.inits) == 2 and fake.inits[0]["resume"] == "allow"
    path = fake.inits[0]["name"]
    assert fake.inits[0]["id"] == uuid.uuid5(uuid.NAMESPACE_URL, f"file://{path}").hex, "as in runs of before"
    assert fake.inits[0]["id"] == fake.inits[1]["id"] and "reinit" not in fake.inits[0]
    assert fake.inits[0]["config"]["device"] == "cpu" and "given" not in fake.inits[0]["config"]


@pytest.mark.parametrize("place", ["init", "log"])
def test_wandb_that_fails_is_a_warning_and_the_run_goes_on(wandb_run, capsys, place):
    fake, epoch = wandb_run([place])
    epoch(1)
    said = capsys.readouterr().out
    assert said.count("WARNING: the run goes on without Weights & Biases") == 1 and "wandb login" in said


def test_a_process_alone_says_for_whom_it_waits_and_obeys_signals(tmp_path):
    """What `srun -n 4 --pty bash` and then python gives: three sisters that never come."""
    code = "import common, torch; common.StopSignals();" \
           "common.Processes(0, 4, 0, 4).join(torch.device('cpu'))"
    for number in (signal.SIGTERM, signal.SIGINT):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        line = started.stdout.readline()
        assert f"process 0 of 4 waits for the others at 127.0.0.1:{port}" in line and "srun -n 1" in line
        started.send_signal(number)
        assert started.wait(30) == -number


def test_batchnorm_with_one_value_is_one_line(capsys):
    def fail():
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))
    with pytest.raises(SystemExit) as caught:
        common.run_main(fail)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: BatchNorm") and "--batch_size" in message
    assert message.count("\n") == 1


def test_64_starts_in_one_second_give_64_folders(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: common.new_folder(tmp_path / "not" / "there"), range(64)))
    assert len(set(folders)) == 64 and all(folder.is_dir() for folder in folders)


def test_the_folder_of_a_slurm_job_holds_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert common.new_folder(tmp_path).name.endswith("_job77")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "80")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert common.new_folder(tmp_path).name.endswith("_job80_3")


def test_auto_continues_the_folder_of_its_own_job_before_a_newer_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    own = make_run(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    newer = make_run(tmp_path)
    os.utime(own / "args.json", (1, 1))
    assert make_run(tmp_path, "--resume", "auto") == newer
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert make_run(tmp_path, "--resume", "auto") == own


def test_auto_takes_the_newest_of_runs_that_were_started_in_one_second(tmp_path):
    """By name the ninth comes after the eleventh."""
    folders = [make_run(tmp_path) for _ in range(11)]
    for k, folder in enumerate(folders):
        os.utime(folder / "args.json", (k, k))
    assert make_run(tmp_path, "--resume", "auto") == folders[-1]


def parsed(folder, *words):
    """The flags of a script that reads a table."""
    parser = common.Parser()
    common.add_shared_arguments(parser, output_dir=folder, device="cpu", use_amp="off", scheduler="plateau")
    parser.group("data")("--ratings_file", type=Path, may_change=True)
    return common.parse_arguments(parser, list(map(str, words)))


def make_run(folder, *words, folds=(), pooled=None, data="same"):
    """Path of the run folder of a start with these flags; the folds, and with `pooled` all of them, are finished."""
    with common.start_run(parsed(folder, *words)) as run:
        run.write_args(fingerprint=data)
        if "--folds" in words:
            common.write_json(run.path("splits.json"), {"fold_0": [], "fold_1": [], "test": []})
        for k in folds:
            with run.child(f"fold_{k}") as child:
                child.write_args(fingerprint=data)
                common.write_json(child.path("metrics.json"), {"rows": 1})
        if pooled is not None:
            common.write_json(run.path("metrics.json"), {"folds": [{"fold": k} for k in pooled]})
    return run.folder


def test_a_part_of_a_run_is_known_by_its_record_and_not_by_its_place(tmp_path):
    outer = make_run(tmp_path, "--folds", 2, folds=[0])
    inner = make_run(outer)
    assert common.run_folder_of(outer / "fold_0") == outer
    assert common.run_folder_of(inner) == inner


def test_the_list_of_what_is_skipped_is_that_of_the_data_as_they_are(tmp_path):
    lists = []
    for skipped in [{"image": "a.png", "reason": "no such picture"}], []:
        study = SimpleNamespace(data_record=lambda split: {"fingerprint": "same"}, skipped=skipped)
        with common.start_run(parsed(tmp_path, "--resume")) as run:
            run.write_record(study, {})
        lists.append([path.read_text() for path in tmp_path.glob("run_*/skipped.csv")])
    assert lists == [["image,reason\na.png,no such picture\n"], []]


def test_what_a_script_adds_to_the_record_must_be_the_same_on_resume(tmp_path):
    """As the detector's --val_batch_size, on which its validation loss depends."""
    study = SimpleNamespace(data_record=lambda split: {"fingerprint": "same"}, skipped=[])
    with common.start_run(parsed(tmp_path)) as run:
        run.write_record(study, {}, val_batch_size=4)
    with common.start_run(parsed(tmp_path, "--resume")) as run:
        run.write_record(study, {}, val_batch_size=4)
        with pytest.raises(common.UserError, match=r"these differ \(then, now\).*\n  val_batch_size +4 +8"):
            run.write_record(study, {}, val_batch_size=8)


def test_after_the_run_inside_a_run_nothing_more_is_trained(tmp_path):
    """The time that an epoch of the baseline says to be left is its own."""
    with common.start_run(parsed(tmp_path)) as run:
        run.folds_after = 1
        assert run.child("baseline").folds_after == 0


def test_folds_that_are_done_one_by_one_can_be_pooled(tmp_path):
    """--folds 2 --fold 0, then --resume RUN --fold 1: nothing pools both before --fold all. Also with --cv_file."""
    folder = make_run(tmp_path, "--folds", "2", "--fold", 0, folds=[0, 1], pooled=[1])
    found = {fold: common.is_finished(folder, SimpleNamespace(fold=fold, epochs=50)) for fold in (0, 1, "all")}
    assert found == {0: False, 1: True, "all": False}
    with common.start_run(parsed(tmp_path, "--resume", folder, "--fold", "all")) as run:
        run.write_args(fingerprint="same")
        assert run.folder == folder and list(run.each_fold([None, None], None)) == [0, 1]
    common.write_json(folder / "metrics.json", {"folds": [{"fold": 0}, {"fold": 1}]})
    assert all(common.is_finished(folder, SimpleNamespace(fold=fold, epochs=50)) for fold in (0, 1, "all"))
    for damage in (lambda path: path.write_text("{"), Path.unlink):  # how many folds there are is not known
        damage(folder / "splits.json")
        assert not common.is_finished(folder, SimpleNamespace(fold="all", epochs=50))
        assert common.is_finished(folder, SimpleNamespace(fold=0, epochs=50))
    (folder / "metrics.json").unlink()
    assert not common.is_finished(folder, SimpleNamespace(fold=0, epochs=50))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_files_that_cannot_be_read_do_not_block_resume_auto(tmp_path, capsys, content):
    """A foreign args.json, and the damaged metrics of a run, which is then unfinished."""
    folder = make_run(tmp_path)
    (folder / "metrics.json").write_text(content)
    (tmp_path / "run_of_another").mkdir()
    (tmp_path / "run_of_another" / "args.json").write_text(content)
    with common.start_run(parsed(tmp_path, "--resume")) as run:
        assert run.folder == folder
    assert capsys.readouterr().out.count("WARNING") >= (2 if content == "{" else 0)


def test_a_comparison_of_backbones_is_finished_with_its_folds(tmp_path):
    """Its networks have the folds; a run of one split has none."""
    top = make_run(tmp_path, pooled=[])
    args = SimpleNamespace(fold="all", epochs=50)
    assert common.is_finished(top, args)
    inner = make_run(top, "--folds", 2, folds=[0, 1], pooled=[0])
    assert not common.is_finished(top, args)
    common.write_json(inner / "metrics.json", {"folds": [{"fold": 0}, {"fold": 1}]})
    assert common.is_finished(top, args)


class Kill(Exception):
    pass


def go_on(folder, *words, data="same"):
    """What a resume does before it trains: the folds that are not finished get their args.json."""
    opened = []

    def run_split(child, _):
        child.write_args(fingerprint=data)
        opened.append(child.folder.name)
        assert child.folds_after == (child.folder.name == "fold_0" and "--fold" not in words)
    with common.start_run(parsed(folder.parent, "--resume", folder, *words)) as run:
        run.write_args(fingerprint=data)
        run.each_fold([None, None], run_split)
    return opened


@pytest.mark.parametrize("killed_at", [None, 0, 1, 2])
def test_folds_go_on_for_more_epochs(tmp_path, monkeypatch, killed_at):
    """Their records agree with the one above them; after a kill between two of them the same command does the rest."""
    folder = make_run(tmp_path, "--folds", 2, "--epochs", 2, folds=[0, 1], pooled=[0, 1])
    more = ["--epochs", 3]
    if killed_at is not None:
        write = iter([common.write_json] * killed_at)

        def killed(*content):
            next(write, kill)(*content)
        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(common, "write_json", killed)
            go_on(folder, *more)
    assert set(go_on(folder, *more)) >= {"fold_0", "fold_1"}
    assert not list(folder.glob("**/metrics.json"))
    assert {common.read_json(path)["flags"]["epochs"] for path in folder.glob("**/args.json")} == {3}
    assert parsed(tmp_path, "--resume", folder).epochs == 3


def test_one_fold_goes_on_for_more_epochs_and_the_others_when_they_are_asked_for(tmp_path):
    folder = make_run(tmp_path, "--folds", 2, "--epochs", 2, folds=[0, 1], pooled=[0, 1])
    assert go_on(folder, "--epochs", 3, "--fold", 0) == ["fold_0"]
    assert [path.parent.name for path in folder.glob("**/metrics.json")] == ["fold_1"]
    common.write_json(folder / "fold_0" / "metrics.json", {"rows": 1})
    assert go_on(folder) == ["fold_1"]  # metrics of 2 and of 3 epochs are not pooled


def test_folds_that_were_all_asked_for_once_go_on_together(tmp_path):
    """--fold 1, then --resume RUN --fold all: more epochs of fold 1 alone would take the place of the pooled result."""
    folder = make_run(tmp_path, "--folds", 2, "--epochs", 2, "--fold", 1, folds=[0, 1], pooled=[1])
    assert parsed(tmp_path, "--resume", folder).fold == 1
    assert go_on(folder, "--fold", "all") == []
    assert go_on(folder, "--fold", 0) == []
    assert go_on(folder, "--epochs", 3) == ["fold_0", "fold_1"]


@pytest.mark.parametrize("words, data", [(["--clip_grad", 9], "same"), ([], "changed")], ids=["flags", "data"])
def test_more_epochs_that_are_refused_leave_a_finished_run_as_it_was(tmp_path, words, data):
    folder = make_run(tmp_path, "--folds", 2, "--epochs", 2, folds=[0, 1], pooled=[0, 1])
    before = {path: path.read_bytes() for path in folder.glob("**/*.json")}
    with pytest.raises(common.UserError, match="cannot be continued exactly"):
        go_on(folder, "--fold", 0, "--epochs", 3, *words, data=data)
    assert {path: path.read_bytes() for path in folder.glob("**/*.json")} == before


def test_more_epochs_of_a_run_without_its_checkpoint_leave_it_as_it_was(tmp_path):
    folder = make_run(tmp_path, "--epochs", 2)
    common.write_json(folder / "metrics.json", {"rows": 1})
    (folder / "training_history.csv").write_text("epoch\n1\n2\n")  # last.pth is lost
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    with pytest.raises(common.CheckpointError, match="last.pth is lost"):
        with common.start_run(parsed(tmp_path, "--resume", folder, "--epochs", 3)) as run:
            run.write_args(fingerprint="same")
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before


def test_more_epochs_of_folds_of_which_one_lost_its_checkpoint_leave_them_as_they_were(tmp_path):
    folder = make_run(tmp_path, "--folds", 2, "--epochs", 2, folds=[0, 1], pooled=[0, 1])
    (folder / "fold_1" / "training_history.csv").write_text("epoch\n1\n2\n")
    before = {path: path.read_bytes() for path in folder.glob("**/*.json")}
    with pytest.raises(common.CheckpointError, match="fold_1 cannot be continued: .*last.pth is lost"):
        go_on(folder, "--epochs", 3)
    assert {path: path.read_bytes() for path in folder.glob("**/*.json")} == before


def test_a_flag_that_is_no_more_does_not_hide_an_unfinished_run(tmp_path):
    folder = make_run(tmp_path, "--epochs", 2)
    record = common.read_json(folder / "args.json")
    record["flags"]["once_a_flag"] = None
    common.write_json(folder / "args.json", record)
    (tmp_path / "run_x").mkdir()
    (tmp_path / "run_x" / "args.json").write_text('{"flags": ["of", "another", "program"]}')
    assert common._newest_folder(parsed(tmp_path, "--resume", "auto", "--epochs", 2)) == folder


def kill(*_):
    raise Kill


def test_more_epochs_wait_for_the_process_that_writes(tmp_path, monkeypatch):
    folder = make_run(tmp_path, "--epochs", 2)

    def is_locked(_):
        raise common.UserError("being written by another process")
    monkeypatch.setattr(common, "lock_folder", is_locked)
    with pytest.raises(common.UserError, match="another process"):
        common.start_run(parsed(tmp_path, "--resume", folder, "--epochs", 3))
    assert common.read_json(folder / "args.json")["flags"]["epochs"] == 2


def test_auto_passes_over_the_runs_of_other_data(tmp_path, monkeypatch):
    """A crashed job of table a must not stop that of table b; who has moved a table can name the run."""
    a = make_run(tmp_path, "--ratings_file", "a.csv")
    b = make_run(tmp_path, "--resume", "auto", "--ratings_file", "b.csv")
    assert a != b
    assert make_run(tmp_path, "--resume", "auto", "--ratings_file", "a.csv") == a
    assert make_run(tmp_path, "--resume", "auto", "--ratings_file", "b.csv") == b
    assert make_run(tmp_path, "--resume", a, "--ratings_file", "moved/a.csv") == a
    assert make_run(tmp_path, "--resume", "auto", "--ratings_file", "a.csv", "--lr", 1) not in (a, b)
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # one job, two commands
    c = make_run(tmp_path, "--resume", "auto", "--ratings_file", "c.csv", pooled=[])
    assert make_run(tmp_path, "--resume", "auto", "--ratings_file", "d.csv") != c


def test_auto_passes_over_the_run_of_another_user(tmp_path):
    """In a folder for all, where its lock cannot be opened."""
    folder = make_run(tmp_path)
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    assert common.is_being_written(folder)
    assert make_run(tmp_path, "--resume", "auto") != folder


def test_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="--output_dir"):
        common.start_run(run_arguments(tmp_path / "file" / "out"))


def test_a_layer_without_a_gradient_counts_as_one_of_zeros():
    """As of two processes, though here is one: a sum over them is what this one has.

    What is frozen is not exchanged, and after close(), as in the epochs to come, nothing is.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 1) for name in ("used", "unused", "frozen")})
        model["frozen"].requires_grad_(False)
        exchange = common.GradientExchange(SimpleNamespace(size=2), model)
        exchange.is_open = True
        for step in (1, 2):
            model.zero_grad()
            model["used"](torch.tensor([[3.0, 4.0]])).sum().backward()
            exchange.finish(torch.zeros(1))
            assert model["used"].weight.grad.tolist() == [[3, 4]] and model["unused"].weight.grad.tolist() == [[0, 0]]
            assert model["frozen"].weight.grad is None and len(exchange.waiting) == 1
        exchange.close()
        sum(each(torch.ones(1, 2)).sum() for each in model.values()).backward()
        assert exchange.sent == [] and len(exchange.waiting) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_the_others_do_not_go_on_where_the_first_process_is_lost(monkeypatch):
    """Nor with the message of a lost connection where the first one has its own error to tell."""
    def lost(processes, parts):
        raise RuntimeError("Connection closed by peer")

    def refuse():
        raise common.UserError("no such table")
    monkeypatch.setattr(common.Processes, "gather", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        common.Processes(1, 2).on_first(lambda: 3)
    with pytest.raises(common.UserError, match="no such table") as caught:
        common.Processes(0, 2).on_first(refuse)
    assert caught.value.said_by_first is False
    monkeypatch.setattr(common.Processes, "gather", lambda processes, parts: [(None, common.UserError("no such table"))])
    with pytest.raises(common.UserError) as caught:
        common.Processes(1, 2).on_first(refuse)
    assert caught.value.said_by_first is True, "so that it is printed once"


@torch.no_grad()
def test_weights_in_any_layout_are_those_of_the_first_process(monkeypatch):
    """Those in channels_last are sent as a copy."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda whole, source: whole.fill_(7 + source))
    common.Processes(1, 2).spread(model)
    assert not model[0].weight.is_contiguous() and all((each == 7).all() for each in model.state_dict().values())


@pytest.mark.parametrize("main, expected", [(lambda: None, ["barrier", "destroy"]), (lambda: sys.exit(75), ["destroy"])])
def test_processes_part_once_all_are_done_and_on_a_stop_at_once(monkeypatch, main, expected):
    """One that left early would end the connection of those that still write; the others of a stopped run are gone."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroy"))
    with contextlib.suppress(SystemExit):
        common.run_main(main)
    assert calls == expected


def test_a_resumed_run_has_the_threads_of_its_first_start(tmp_path):
    folder = make_run(tmp_path)
    record = common.read_json(folder / "args.json")
    before = torch.get_num_threads()
    common.write_json(folder / "args.json", record | {"device": record["device"] | {"threads": before + 1}})
    try:
        with common.start_run(parsed(tmp_path, "--resume", folder)):
            assert torch.get_num_threads() == before + 1, "their number decides the last bits of every sum"
    finally:
        torch.set_num_threads(before)


def test_a_deterministic_run_asks_torch_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        with common.start_run(run_arguments(tmp_path, deterministic=True)) as run:
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            common.write_json(run.path("metrics.json"), {})
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_a_copy_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common._git_commit() is None


def test_args_json_holds_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "do-not-write-me")
    with common.start_run(run_arguments(tmp_path)) as run:
        run.write_args(fingerprint="f")
        text = run.path("args.json").read_text()
    assert "do-not-write-me" not in text
    assert {"flags", "command", "versions", "git", "data", "device", "slurm"} <= set(json.loads(text))


@pytest.mark.parametrize("error", [common.UserError("no such column"), SystemExit(common.EXIT_SAVED), KeyboardInterrupt()])
def test_what_stops_before_there_is_anything_to_continue_leaves_no_folder(tmp_path, error):
    for has_args in (False, True):
        with pytest.raises(type(error)), common.start_run(run_arguments(tmp_path)) as run:
            if has_args:
                run.write_args(fingerprint="f")
            raise error
        assert run.folder.exists() == has_args
    last_line = run.path("log.txt").read_text().splitlines()[-1]
    if isinstance(error, SystemExit):
        assert last_line.startswith("device: cpu")
    else:
        assert last_line == f"{type(error).__name__}: {error}"


def test_a_drive_that_goes_away_keeps_the_run_and_its_error(tmp_path, monkeypatch):
    def gone(*args, **options):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    with pytest.raises(common.CannotSave, match="last.pth"), common.start_run(run_arguments(tmp_path)) as run:
        run.write_args(fingerprint="f")
        monkeypatch.setattr(os, "stat", gone)
        monkeypatch.setattr(os, "listdir", gone)
        raise common.CannotSave("cannot write last.pth")
    monkeypatch.undo()
    assert run.path("args.json").exists()


def test_a_drive_that_does_not_answer_is_told_in_a_line():
    code, message = common._explain(OSError(errno.ESTALE, "Stale file handle"))
    assert code == 1 and "Stale file handle" in message and "--resume auto" in message and "\n" not in message
    assert common._explain(FileNotFoundError(errno.ENOENT, "No such file or directory")) == (None, None)


def test_the_log_is_ascii_and_the_terminal_shows_a_path_that_can_be_pasted(tmp_path, capsys):
    with common.start_run(run_arguments(tmp_path)) as run:
        run.say("Gesicht gr\u00fcn")
    assert "Gesicht gr\u00fcn" in capsys.readouterr().out
    assert b"Gesicht gr\\xfcn" in run.path("log.txt").read_bytes()


def test_a_terminal_without_the_letter_shows_its_code(tmp_path):
    code = "import common; common.run_main(lambda: print('gr\u00fcn'))"
    printed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "ascii"},
                             cwd=Path(common.__file__).parent, capture_output=True, check=True)
    assert printed.stdout == b"gr\\xfcn\n"


def test_a_closed_stderr_is_no_fault():
    """As of pythonw on Windows, or 2>&-: progress bars and messages go there."""
    code = "import common; common.run_main(lambda: print(*common.with_progress('look', [1, 2], 2)))"
    command = f"exec '{sys.executable}' -c \"{code}\" 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=Path(common.__file__).parent, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"1 2\n")


def test_json_is_strict_and_tables_keep_every_digit(tmp_path):
    common.write_json(
        tmp_path / "x.json", {"a": math.nan, "b": np.float32(0.5), "c": tmp_path, "d": np.arange(2), "e": {3, 1}}
    )
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": None,
        "b": 0.5,
        "c": str(tmp_path),
        "d": [0, 1],
        "e": [1, 3],
    }
    common.write_table(tmp_path / "t.csv", [{"a": 1 / 3, "b": "x,y"}, {"b": None, "c": math.nan, "a": np.float64(0.1)}])
    assert (tmp_path / "t.csv").read_text() == 'a,b,c\n0.3333333333333333,"x,y",\n0.1,,\n'
    common.write_table(tmp_path / "u.csv", [{"Größe": 1}])
    assert (tmp_path / "u.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "or a spreadsheet shows GrÃ¶ÃŸe"


def test_json_of_other_programs_may_have_control_characters_in_texts(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"note": "ear\tback"}')
    assert common.read_json(tmp_path / "x.json") == {"note": "ear\tback"}


def test_names_of_files_that_are_no_unicode_can_be_written(tmp_path):
    """Names from an archive made on Windows reach Python with lone surrogates."""
    name = "h\udcfchner.jpg"
    run = common.start_run(run_arguments(tmp_path))
    with pytest.raises(common.UserError, match="jpg"), run:
        common.write_json(run.path("args.json"), [name])
        common.write_table(run.path("t.csv"), [{"image": name}])
        run.say(name)
        assert common.data_fingerprint([name]) != common.data_fingerprint(["huhner.jpg"])
        raise common.UserError(name)
    assert run.path("t.csv").read_bytes().splitlines()[1] == b"h\\udcfchner.jpg"


@pytest.mark.parametrize("words, expected", [
    ("--batch_size 32 --lr 1e-4", "--lr 1e-4 --batch_size 16 --accumulate 2"),
    ("--batch-size=33 --images_dir 'my faces' --accumulate_grad_batches 2", "--images_dir 'my faces' --batch_size 16 --accumulate 4"),
    ("--batch_size 8 --resume 'my runs/run_1' --epochs 9", "--epochs 9 --batch_size 4 --accumulate 2"),
    ("--batch_size 8 --resume auto", "--resume auto --batch_size 4 --accumulate 2"),
    ("--batch_size 8 --resume --epochs 9", "--resume --epochs 9 --batch_size 4 --accumulate 2"),
    ("--names A B --accumulate=3 --batch_size 4 --dry_run", "--names A B --dry_run --batch_size 2 --accumulate 6")])
def test_out_of_memory_prints_the_command_with_half_the_batch(monkeypatch, words, expected):
    monkeypatch.setattr("sys.argv", ["train_x.py", *shlex.split(words)])
    code, message = common._explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert code == 1 and message.endswith(f"\ntry: python train_x.py {expected}\n(or, if it was in evaluation, with a smaller --val_batch_size)")


def test_memory_that_runs_out_is_known_by_its_class_or_text():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10 ** 15)
    in_opencv = RuntimeError("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes")
    in_cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (caught.value, in_opencv, in_cublas, torch.OutOfMemoryError("in any words"), MemoryError()):
        code, message = common._explain(error)
        assert code == 1 and message.startswith("error: out of memory")


@pytest.mark.parametrize("error", [
    RuntimeError("unable to allocate shared memory(shm) for file </torch_26001_24_0>: No space left on device (28)"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n"
                 "RuntimeError: unable to write to file </torch_26001_1_0>: No space left on device (28)"),
    OSError(errno.ENOSPC, "No space left on device")], ids=["shared", "in a worker", "semaphore"])
def test_full_shared_memory_says_what_to_try(error):
    code, message = common._explain(error)
    assert code == 1 and "/dev/shm" in message and "--num_workers 0" in message


@pytest.mark.parametrize("words", [["--predict_batch_size", "8"], ["--batch_size", "1"]])
def test_out_of_memory_without_a_batch_to_halve(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["predict_assessor.py", *words])
    _, message = common._explain(MemoryError())
    assert "--predict_batch_size" in message and "try: python" not in message


def test_what_nccl_complains_of_is_told(monkeypatch):
    """As where two processes are started on a machine with one GPU."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, message = common._explain(torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, invalid usage (run with "
        "NCCL_DEBUG=WARN for details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL "
        "library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"))
    assert code == 1
    assert message.endswith("(Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000)")
    _, message = common._explain(torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:317, remote process exited\nncclRemoteError: A call failed.\nLast error:\n"))
    assert "ncclRemoteError: A call failed." in message, "NCCL may have no last error"


def test_a_gpu_that_this_torch_has_no_kernels_for():
    """As one of compute capability 7.0 or less, and the builds for CUDA 13 that pip installs."""
    code, message = common._explain(torch.AcceleratorError(
        "CUDA error: no kernel image is available for execution on the device\nSearch for "
        "`cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for "
        "more information.\nCUDA kernel errors might be asynchronously reported at some other API call", 209))
    assert code == 2 and "verify_setup.py" in message and "--device cpu" in message and "\n" not in message


def test_an_operation_that_deterministic_refuses_is_named():
    """CPUs refuse few; on GPUs it is the backward pass of a VGG's pooling, in the same words."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert common._explain(caught.value) == (
        2, "error: put_ does not have a deterministic implementation: leave --deterministic out, or take another network")


def test_programming_mistakes_keep_their_traceback():
    def fail():
        return {}["nothing"]
    with pytest.raises(KeyError):
        common.run_main(fail)


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_optional_packages_are_named_where_they_are_missing(tmp_path, monkeypatch, flag):
    def missing(name):
        raise ImportError(f"No module named {name!r}")
    monkeypatch.setattr(common.importlib, "import_module", missing)
    with pytest.raises(common.UserError, match=f"pip install {flag}"):
        common.start_run(run_arguments(tmp_path, **{flag: True}))
    assert not list(tmp_path.iterdir())


def test_a_run_has_one_tensorboard_writer(tmp_path, monkeypatch):
    class Writer(list):
        def __init__(self, folder):
            opened.append(folder)

        def add_scalar(self, *scalar):
            self.append(scalar)

        def flush(self):
            pass
    opened = []
    monkeypatch.setattr(common, "optional_package", lambda *names: SimpleNamespace(SummaryWriter=Writer))
    with common.start_run(run_arguments(tmp_path, tensorboard=True)) as run:
        for epoch in (1, 2):
            run.watch({"epoch": epoch, "val_loss": 0.5 / epoch})
        assert opened == [run.folder] and run.tensorboard == [("val_loss", 0.5, 1), ("val_loss", 0.25, 2)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_validation_and_prediction_have_a_bar_on_a_terminal_alone(monkeypatch, capsys, is_terminal):
    args = SimpleNamespace(batch_size=4, val_batch_size=None, num_workers=0, seed=0)
    compute = common.choose_compute("cpu", "off")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    ten = {(0, k): torch.tensor(k) for k in range(10)}
    batches = list(common.make_loader(ten, args, compute, train=False))
    assert torch.cat(batches).tolist() == list(range(10))
    assert ("looking at 10" in capsys.readouterr().err) is is_terminal


@pytest.mark.parametrize("train, val_batch_size, dry_run, sizes", [
    (True, 5, False, [4, 4, 4]), (True, None, True, [4, 4]),
    (False, 5, True, [5, 5, 2]), (False, None, False, [4, 4, 4])])
def test_batches_of_training_and_of_evaluation(train, val_batch_size, dry_run, sizes):
    args = SimpleNamespace(batch_size=4, val_batch_size=val_batch_size, num_workers=0, seed=0, dry_run=dry_run)
    twelve = {(0, k): torch.tensor(k) for k in range(12)}
    assert list(map(len, common.make_loader(twelve, args, common.choose_compute("cpu", "off"), train))) == sizes


@pytest.mark.parametrize("asked, cached, cores, can_fork, expected", [
    ("auto", False, 2, True, 2), ("auto", True, 2, True, 0), ("auto", True, 3, True, 3), ("auto", False, 16, True, 8),
    ("auto", False, 16, False, 0), (3, True, 2, True, 3), (3, False, 2, False, 3)])
def test_number_of_workers(monkeypatch, asked, cached, cores, can_fork, expected):
    monkeypatch.setattr(common, "cores_of_process", lambda: cores)
    monkeypatch.setattr(common, "CAN_FORK", can_fork)
    assert common.resolve_workers(asked, cached) == expected


class Failing(torch.utils.data.Dataset):
    """Its one sample raises an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, _):
        if self.error is None:
            os._exit(1)
        raise self.error


def explained(error):
    """What run_main says of the error that a loader with a worker raises."""
    loader = torch.utils.data.DataLoader(Failing(error), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(Exception) as caught:
        list(loader)
    return common._explain(caught.value)


def test_a_package_that_does_not_load_is_told_in_a_line():
    """As OpenCV on a bare server, which lacks system libraries."""
    code, message = common._explain(ImportError("libxcb.so.1: cannot open shared object file"))
    assert code == 1 and "libxcb.so.1" in message and "python verify_setup.py" in message and "\n" not in message


@pytest.mark.skipif(not common.CAN_FORK, reason="no fork here")
def test_an_error_in_a_loader_worker_is_told_as_it_is():
    code, message = explained(None)
    assert code == 1 and "died or hangs" in message and "/dev/shm" in message and "--num_workers 0" in message
    code, message = common._explain(RuntimeError("DataLoader timed out after 600 seconds"))
    assert code == 1 and "died or hangs" in message
    assert explained(KeyError("a mistake of ours")) == (None, None)
    told = "error: my faces/a: 1.jpg: no such file"
    assert explained(pixel_cache.BadImage("my faces/a: 1.jpg: no such file")) == (2, told)
    for error in (ImportError("libxcb.so.1: no such file"), RuntimeError("Insufficient memory for 9 bytes")):
        assert f"({error})" in explained(error)[1]


# --- precision --------------------------------------------------------------------------

@pytest.mark.parametrize("use_amp", ["auto", "on"])
def test_a_model_that_computes_in_fp32_on_cpus_is_recorded_so(monkeypatch, use_amp):
    monkeypatch.setattr(common, "fast_precision", lambda device: "bf16")
    compute = common.choose_compute("cpu", use_amp, fp32_on_cpu=True)
    assert compute.precision == "fp32" and "fp32" in compute.text and "bf16" not in compute.text


def test_bf16_with_channels_last_agrees_with_fp32():
    """The fast path of the forward pass: the same ranking of outputs within the rounding of bf16."""
    torch.manual_seed(0)
    backbone, _ = backbones.build_backbone("resnet18", pretrained=False)
    images = torch.randint(0, 256, (8, 96, 96, 3), dtype=torch.uint8)
    outputs = []
    for use_amp in ("off", "on"):
        compute = common.choose_compute("cpu", use_amp)
        model = compute.place(backbone).eval()
        with torch.inference_mode(), compute.autocast():
            outputs.append(model(common.to_input(images, compute)).float().flatten())
    assert torch.corrcoef(torch.stack(outputs))[0, 1] > 0.9995
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].abs().max()


@pytest.mark.parametrize("precision, dtype", [
    ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_forward_pass_has_the_precision_that_is_recorded(precision, dtype):
    with common.Compute(torch.device("cpu"), precision, False, "cpu", common.Processes()).autocast():
        assert torch.nn.Linear(1, 1)(torch.zeros(1, 1)).dtype == dtype


@pytest.mark.parametrize("capability, expected", [((9, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")])
def test_auto_precision_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.fast_precision(torch.device("cuda")) == expected


def test_auto_precision_follows_the_processor(monkeypatch):
    for flags, expected in (("fma avx512_bf16", "bf16"), ("fma avx2", "fp32")):
        monkeypatch.setattr(common, "_cpuinfo", lambda field, flags=flags: flags)
        assert common.choose_compute("cpu", "auto").precision == expected
        assert (
            common.choose_compute("cpu", "off").precision == "fp32"
            and common.choose_compute("cpu", "on").precision == "bf16"
        )
