"""TERM, USR1 and INT to the whole process group: saved, the right exit code, nothing left running, the same end.

    python -m pytest tests/torture/test_signals.py [--all_cases]
"""
import concurrent.futures
import random
import signal
import threading
import time

import pytest

import common
from conftest import SCRIPTS, only_run
from test_resume import fingerprint

GROUP = "TERM, USR1, INT to the process group"
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


class Run:
    """One folder and the command that fills it; started as often as it takes."""

    def __init__(self, server, script, flags, folder):
        folder.mkdir()
        self.server, self.script, self.out, self.log = server, script, folder / "out", folder / "log"
        self.flags = [*flags, "--resume", "auto", "--output_dir", self.out]

    def start(self):
        return self.server.start(self.script, self.flags, self.log)

    def train_and_signal(self, number, wait):
        """Start, wait until it trains and `wait` seconds more, signal the group; returns the ended trial and its code.
        """
        trial = self.start()
        end = time.monotonic() + 60
        while "epoch 1" not in trial.text() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(wait)
        trial.signal(number)
        return trial, trial.finish()


def stop_and_continue(run, number, wait, expected):
    """One case; False where the run had passed its last batch before the signal came, and so ended by itself."""
    trial, code = run.train_and_signal(number, wait)
    folder = only_run(run.out)
    if (folder / "metrics.json").exists() or common.read_checkpoint(folder / "last.pth")["progress"]["done"]:
        return False
    assert code == CODES[number], trial.text()[-2000:]
    assert f"{number.name} received: saved" in (folder / "log.txt").read_text()
    assert not trial.left_over(), "a process of the run outlived it"
    last = run.start()
    assert last.finish() == 0, last.text()[-2000:]
    assert fingerprint(folder) == expected
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [0, 2])
def test_signals_that_come_again_until_the_end(workers, number, servers, tiny_flags, quick_folder, cases):
    """srun sends TERM to the tasks of a step that are still on their way out: the exit code must not change."""
    flags = [*tiny_flags["train_assessor.py"], "--num_workers", workers, "--epochs", 60]
    for attempt in range(cases.number(2, 5)):
        run = Run(servers[0], "train_assessor.py", flags, quick_folder / str(attempt))
        with cases.case(GROUP):
            trial = run.start()
            while "epoch 1" not in trial.text():
                assert trial.wait(0.01) is None, trial.text()[-2000:]
            while (code := trial.wait(0)) is None:
                trial.signal(number)
                time.sleep(0.002)
            assert code == 75, f"{code}: {trial.text()[-2000:]}"
            assert not common.read_checkpoint(only_run(run.out) / "last.pth")["progress"]["done"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals(script, workers, servers, tiny_flags, quick_folder, cases):
    flags = [*tiny_flags[script], "--num_workers", workers, "--epochs", 6]
    whole = Run(servers[0], script, flags, quick_folder / "whole")
    trial = whole.start()
    assert trial.finish() == 0, trial.text()[-2000:]
    expected, moments, lock = fingerprint(only_run(whole.out)), random.Random(f"{script} {workers}"), threading.Lock()
    to_do = [number for number in CODES for _ in range(cases.number(1, 5))]

    def lane(server):
        """Take cases until none is left; a signal that came too late is sent again, earlier, to a new run."""
        while True:
            with lock:
                if not to_do:
                    return
                number, wait = to_do.pop(), moments.uniform(0, 0.4)
                name = f"{len(to_do)}"
            with cases.case(GROUP):
                for attempt in range(4):
                    run = Run(server, script, flags, quick_folder / f"{name}_{attempt}")
                    if stop_and_continue(run, number, wait / 2 ** attempt, expected):
                        break
                else:
                    raise AssertionError("the run was always over before the signal came")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(lane, server) for server in servers]:
            each.result()
