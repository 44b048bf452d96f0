"""Several processes give the result of one, from one to three of them, through stops, odd sizes and bad samples.

    python -m pytest tests/torture/test_ranks.py
"""
import argparse
import dataclasses
import datetime
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import train_detector
from readers import backbones, picture_files, pixel_cache, video_files

GROUP = "1, 2 and 3 processes: odd sizes, elastic resume, stops, NaN"


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environments(size):
    """The environment variables of each of `size` processes, as torchrun sets them."""
    port = str(free_port())
    return [{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(size)]


def start_ranks(server, script, flags, size, folder):
    """Fork `size` processes of one run of the script, each with a log of its own in the folder."""
    return [server.start(script, flags, folder / f"log_{rank}", env=env)
            for rank, env in enumerate(rank_environments(size))]


def run_group(server, size, listed, folder):
    """Run the cases in a group of processes; returns their outcomes."""
    file = folder / f"cases_{size}_{len(list(folder.glob('cases_*')))}.json"
    file.write_text(json.dumps(listed))
    for member in start_ranks(server, "tests/torture/rank_worker.py", [file], size, folder):
        assert member.finish() == 0, member.text()[-2000:]
    return [json.loads((Path(case["folder"]) / "outcome.json").read_text()) for case in listed]


def distance(one, other):
    """Largest difference of weights, evaluation and history between two outcomes of the same shape."""
    assert [[*row] for row in one["history"]] == [[*row] for row in other["history"]]
    pairs = [*zip(one["weights"], other["weights"], strict=True), *zip(one["outputs"], other["outputs"], strict=True)]
    pairs += [(row[name], same[name]) for row, same in zip(one["history"], other["history"], strict=True)
              for name in row]
    return max(abs(a - b) for a, b in pairs)


def test_any_number_of_processes_trains_the_same_model(server, tmp_path, cases):
    """Float64, so that a sample counted twice, or not, or with a wrong weight cannot hide in the rounding."""
    grid = list(itertools.product((5, 7, 16, 23), (1, 3, 8), (1, 3)))

    def listed(size):
        return [{"folder": str(tmp_path / f"{size}_{n}_{batch}_{accumulate}"), "n": n, "batch_size": batch,
                 "accumulate": accumulate} for n, batch, accumulate in grid]
    alone = run_group(server, 1, listed(1), tmp_path)
    for size in (2, 3):
        for setting, one, several in zip(grid, alone, run_group(server, size, listed(size), tmp_path)):
            with cases.case(GROUP):
                assert distance(one, several) < 1e-11, setting


def test_resume_with_another_number_of_processes(server, tmp_path, cases):
    """Stopped in the middle by a signal that reaches one process alone, and continued by 2, then 1, then 3."""
    setting = {"n": 11, "batch_size": 4, "accumulate": 1}  # 3 batches an epoch
    whole, = run_group(server, 1, [{**setting, "folder": str(tmp_path / "whole")}], tmp_path)
    stops = list(itertools.product(range(1, 4), range(1, 3)))
    listed = [{**setting, "folder": str(tmp_path / f"stopped_{first}_{second}"), "stop": first, "second": second}
              for first, second in stops]
    for outcome in run_group(server, 2, listed, tmp_path):
        with cases.case(GROUP):
            assert outcome["error"] == "75" and outcome["of_others"] == [{"error": "75", "kind": "SystemExit"}]
    for outcome in run_group(server, 1, [{**case, "stop": case["second"]} for case in listed], tmp_path):
        with cases.case(GROUP):
            assert outcome["error"] == "75"
    for outcome in run_group(server, 3, [{**case, "stop": None} for case in listed], tmp_path):
        with cases.case(GROUP):
            assert distance(whole, outcome) < 1e-11


def test_a_group_that_is_stopped_repeats_its_own_bits(server, tmp_path, cases):
    setting = {"n": 13, "batch_size": 4, "accumulate": 2}
    whole, *stopped = run_group(server, 2, [{**setting, "folder": str(tmp_path / str(stop)), "stop": stop}
                                    for stop in (None, 2, 4)], tmp_path)
    assert all(outcome["error"] == "75" for outcome in stopped)
    again = [{**setting, "folder": str(tmp_path / str(stop))} for stop in (2, 4)]
    for outcome in run_group(server, 2, again, tmp_path):
        with cases.case(GROUP):
            assert distance(whole, outcome) == 0.0


@pytest.mark.parametrize("size", [2, 3])
def test_a_bad_sample_of_one_process_stops_all_before_the_step(server, tmp_path, cases, size):
    case = {"n": 12, "batch_size": 6, "accumulate": 1, "bad": 7, "folder": str(tmp_path / "run")}
    outcome, = run_group(server, size, [case], tmp_path)
    with cases.case(GROUP):
        assert outcome["kind"] == "NotFinite" and "the loss is nan" in outcome["error"]
        assert "7" in outcome["error"].split("samples:")[1].split(")")[0]
        assert outcome["of_others"] == [{"error": outcome["error"], "kind": "NotFinite"}] * (size - 1)
        assert not (tmp_path / "run" / "best_model.pth").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_gradient_names_all_samples_of_its_step(server, tmp_path, cases, size):
    """Whichever process and batch they were in; the fault may be of any of them."""
    case = {"n": 12, "batch_size": 4, "accumulate": 2, "steep": "10", "folder": str(tmp_path / "run")}
    outcome, = run_group(server, size, [case], tmp_path)
    step = {str(key) for batch in list(common.EpochBatches(12, 4, 1, True))[:2] for _, key in batch}
    with cases.case(GROUP):
        assert "10" in step and "the gradient is nan in epoch 1, batch 1, 2 (" in outcome["error"]
        assert set(outcome["error"].split("samples: ")[1].split(")")[0].split(", ")) == step


END = """
import atexit, os, sys, pathlib, torch, common

def running():
    return {path.name for path in pathlib.Path("/proc/self/task").iterdir()}

before = running()

def count():
    print("threads of the group:", len(running() - before))

def main():
    atexit.register(count)
    common.launched_processes().join(torch.device("cpu"))
    weight = torch.ones(1, requires_grad=True)
    torch.optim.AdamW([weight])
    torch.distributed.all_reduce(weight.detach())
    count()
    sys.exit(CODE) if CODE else None

common.run_main(main)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc, which only Linux has")
@pytest.mark.parametrize("code", [pytest.param(0, marks=pytest.mark.long), 75])
def test_no_thread_of_the_group_is_left_at_the_end(code):
    """One that lets go of a tensor while the interpreter ends aborts the process, on a busy machine 1 in 100."""
    members = [subprocess.Popen([sys.executable, "-c", END.replace("CODE", str(code))], stdout=subprocess.PIPE,
                                text=True, stderr=subprocess.STDOUT, env={**os.environ, **env},
                                cwd=Path(common.__file__).parent) for env in rank_environments(2)]
    for member in members:
        text, _ = member.communicate(timeout=120)
        counts = [int(line.split(":")[1]) for line in text.splitlines() if line.startswith("threads")]
        assert counts[0] > 0 and counts[1:] == [0] and member.returncode == code, text


LEAVE = """
import sys, time, torch, common

def stop():
    time.sleep(1)
    sys.exit(75)

def main():
    processes = common.launched_processes()
    processes.join(torch.device("cpu"))
    processes.largest([0])  # on a busy machine one may leave before the other one has joined
    time.sleep(0.2)
    processes.on_first(stop) if processes.is_first else sys.exit(75)

common.run_main(main)
"""


AFTER = """
import os, signal, threading, time, types, torch, common

class Workers:
    def __del__(self):
        time.sleep(2)

def main():
    processes = common.launched_processes()
    processes.join(torch.device("cpu"))
    training = common.Training.__new__(common.Training)
    training.processes = processes
    training.progress = types.SimpleNamespace(epoch=3, batch=0)
    training.stopping = common.EarlyStopping(0)
    training.args = types.SimpleNamespace(save_minutes=0, given=[], epochs=3)
    training.saved_at = 0
    training.run = types.SimpleNamespace(signals=common.StopSignals(), say=print, folder="run")
    training.stream = Workers() if processes.is_first else None
    training.save = training._check_queued = lambda: None
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    list(training.epochs())

common.run_main(main)
"""


ALONE = AFTER.replace("time.sleep(2)", "signal.raise_signal(signal.SIGTERM)").replace(
    "    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n", "").replace(
    "Workers() if processes.is_first else None", "None if processes.is_first else Workers()")


@pytest.mark.parametrize("script", [LEAVE, AFTER, ALONE], ids=["report", "workers", "alone"])
def test_a_signal_to_all_ends_all_alike(cases, script):
    """It reaches the first process in the report or while its workers end, and another one that waits for it; or, while
    its workers end, that other one alone."""
    members = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                                stderr=subprocess.STDOUT, env={**os.environ, **env},
                                cwd=Path(common.__file__).parent) for env in rank_environments(2)]
    with cases.case(GROUP):
        texts = [member.communicate(timeout=120)[0] for member in members]
        assert [member.returncode for member in members] == [75, 75], texts


@pytest.mark.parametrize("n, batch_size, size", [
    (23, 4, 3), (9, 8, 2), (7, 2, 4), (5, 1, 2), (17, 6, 2), (4, 8, 3), (1, 4, 2), (11, 8, 4)])
def test_slices_of_a_batch(n, batch_size, size):
    """In training the slices make up each batch, none of a single sample where BatchNorm could not take it."""
    samplers = [common.EpochBatches(n, batch_size, 3, True, None, rank, size) for rank in range(size)]
    alone = common.EpochBatches(n, batch_size, 3, True)
    for sampler in (*samplers, alone):
        sampler.epoch = 2
    shares = [list(sampler) for sampler in samplers]
    for b, whole in enumerate(alone):
        widths = [len(sampler.own_span(b)) for sampler in samplers]
        own = [share[b][:width] for share, width in zip(shares, widths)]
        assert [pair for slice_ in own for pair in slice_] == whole
        assert all(share[b] for share in shares), "every process takes every step"
        if batch_size >= 2 * size and len(whole) > 1:
            assert 1 not in widths
    rows = [pair[1] for rank in range(size)
            for batch in common.EpochBatches(n, batch_size, 3, False, None, rank, size) for pair in batch]
    assert rows == list(range(n)), "an evaluation takes every row once, in order"


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("env, expected", [
    ({}, (0, 1, 0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2, 1, 2)),
    (STEP, (3, 4, 1, 2)),
    ({"RANK": "3"}, (0, 1, 0, 1)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0, 1)),  # the batch script of a job is no step
    ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1))])  # torchrun within a step
def test_rank_from_the_environment(env, expected):
    assert dataclasses.astuple(common.launched_processes(env)) == expected


@pytest.mark.parametrize("rank, n_lines", [("0", 6), ("1", 0)])
def test_bad_files_are_listed_by_the_first_process_alone(monkeypatch, capsys, tmp_path, rank, n_lines):
    """Of two processes each listed every picture and video that it left out, as if there were twice as many."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(pixel_cache, "LARGE", 0)
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    picture_files.ImageStore([path], 8, cache="none")
    bad = picture_files.ImageAudit("b.png", "empty file, 0 bytes")
    assert picture_files.check_bad_files([picture_files.ImageAudit("a.png"), bad], "skip") == [0]
    video_files.name_losses("1 videos cannot be read", {"c.mp4": "damaged"}, 0.05, is_too_much=False)
    backbones._say_once(f"note: {path}: 2 layers were loaded")
    assert not train_detector.settle_split(common.Parser(), argparse.Namespace(
        folds=0, split_file=None, split_ratio=None, train_ratio=None, test_ratio=0.2, val_json=Path("v.json"),
        test_json=None, given=set())).test_ratio
    assert len(capsys.readouterr().out.splitlines()) == n_lines


@pytest.mark.parametrize("env, expected", [
    ({}, 8),
    ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 2),
    ({"RANK": "1", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "9"}, 1),
    (STEP, 4),  # two tasks on this node, and not said how many cores each has
    ({**STEP, "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound to its own
    ({**STEP, "SLURM_CPUS_PER_TASK": "3"}, 3),  # not bound
    ({**STEP, "SLURM_CPUS_PER_TASK": "8", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
     2),
    ({"SLURM_CPUS_PER_TASK": "2"}, 2)])  # in the script of a job, which asked for so many
def test_cores_of_a_process(monkeypatch, env, expected):
    monkeypatch.setattr(common, "count_cores", lambda: 8)
    assert common.cores_of_process(env) == expected


@pytest.mark.parametrize("name, processes, expected", [
    ("auto", common.Processes(), "cuda"), ("cuda:1", common.Processes(), "cuda:1"), ("cpu", common.Processes(), "cpu"),
    ("cuda:0", common.Processes(3, 4, 3, 4), "cuda:1"), ("auto", common.Processes(2, 4, 0, 2), "cuda:0"),
    ("cuda", common.Processes(1, 2, 1, 2), "cuda:1"),
    ("cpu", common.Processes(1, 2, 1, 2), "cpu"),
    *((name, common.Processes(1, 2, 1, 2), None) for name in ("cuda:x", "cuda:-1", "cudas", "mps")),
    ("cuda:2", common.Processes(), None)])
def test_device_of_a_process_on_two_gpus(monkeypatch, name, processes, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    if expected:
        assert common._choose_device(name, processes) == torch.device(expected)
        # torch.cuda.synchronize() and current_stream() are of the current GPU: a checkpoint or a step's numbers
        # from another one would be read before they are copied
        assert current == [expected] * (":" in expected)
    else:
        with pytest.raises(common.UserError, match=f"--device {name}: expected"):
            common._choose_device(name, processes)


def test_gpus_that_the_driver_counts_and_torch_cannot_use(monkeypatch):
    """As under a driver that is too old for this torch, or a container without its libcuda."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common._choose_device("auto", common.Processes()) == torch.device("cpu")
    with pytest.raises(common.UserError, match="sees 0 CUDA GPUs.*verify_setup.py"):
        common._choose_device("cuda:0", common.Processes())


@pytest.mark.parametrize("env", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_rank_that_is_none(env):
    with pytest.raises(common.UserError, match="RANK=. and WORLD_SIZE=2 are no rank"):
        common.launched_processes(env)


@pytest.mark.parametrize("tasks_per_node", ["2", "1(x2)"])
def test_where_the_processes_of_a_step_meet(monkeypatch, tasks_per_node):
    """On one machine they find each other, and so the other one is missed there; on two they must be told where."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(common, "PROCESS_TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setenv("SLURM_JOB_ID", str(free_port() - 20000))
    processes = common.launched_processes(
        {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": tasks_per_node})
    expected = "did not meet the others at 127.0.0.1:" if tasks_per_node == "2" else "set MASTER_ADDR to the first"
    with pytest.raises(common.UserError, match=expected):
        processes.join(torch.device("cpu"))
