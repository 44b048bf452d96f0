"""TERM, USR1 and INT to the whole process group: saved, the right exit code, nothing left running, the same end.

    python -m pytest tests/torture/test_signals.py [--all_cases]
"""
import itertools
import random
import signal
import time

import pytest

import common
from conftest import SCRIPTS, fork_server, only_run
from test_resume import fingerprint, is_over

GROUP = "TERM, USR1, INT to the process group"
IN_SHORT = [("train_assessor.py", 0), ("train_dreamer.py", 2)]
SCRIPTS_AND_WORKERS = [pytest.param(*each, marks=() if each in IN_SHORT else pytest.mark.long)
                       for each in itertools.product(SCRIPTS, (0, 2))]
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
        trial.wait_for("epoch 1")
        time.sleep(wait)
        trial.signal(number)
        return trial, trial.finish()


def stop_and_continue(run, number, wait, expected):
    """One case; False where the run had passed its last batch before the signal came, and so ended by itself."""
    trial, code = run.train_and_signal(number, wait)
    folder = only_run(run.out)
    if (folder / "metrics.json").exists() or is_over(folder):
        return False
    assert code == CODES[number], trial.text()[-2000:]
    assert f"{number.name} received: saved" in (folder / "log.txt").read_text()
    assert not trial.left_over(), "a process of the run outlived it"
    last = run.start()
    assert last.finish() == 0, last.text()[-2000:]
    assert fingerprint(folder) == expected
    return True


@pytest.mark.parametrize("workers, number", [
    (0, signal.SIGTERM), pytest.param(2, signal.SIGTERM, marks=pytest.mark.long),
    pytest.param(0, signal.SIGUSR1, marks=pytest.mark.long), (2, signal.SIGUSR1)])
def test_signals_that_come_again_until_the_end(workers, number, server, tiny_flags, quick_folder, cases):
    """srun sends TERM to the tasks of a step that are still on their way out: the exit code must not change."""
    flags = [*tiny_flags["train_assessor.py"], "--num_workers", workers, "--epochs", 60]
    for attempt in range(cases.number(1, 5)):
        run = Run(server, "train_assessor.py", flags, quick_folder / str(attempt))
        with cases.case(GROUP):
            trial = run.start()
            trial.wait_for("epoch 1")
            while (code := trial.wait(0)) is None:
                trial.signal(number)
                time.sleep(0.002)
            assert code == 75, f"{code}: {trial.text()[-2000:]}"
            assert not is_over(only_run(run.out))


@pytest.mark.timeout(3600)  # fifteen stops, with --all_cases
@pytest.mark.parametrize("script, workers", SCRIPTS_AND_WORKERS)
def test_signals(script, workers, server, tiny_flags, quick_folder, cases):
    """Compared with a run of another hash seed. A signal that came too late is sent again, earlier, to a new run."""
    flags = [*tiny_flags[script], "--num_workers", workers, "--epochs", cases.number(4, 6)]
    whole = Run(fork_server(), script, flags, quick_folder / "whole")
    trial = whole.start()
    assert trial.finish() == 0, trial.text()[-2000:]
    expected, moments = fingerprint(only_run(whole.out)), random.Random(f"{script} {workers}")
    first = SCRIPTS.index(script)  # the short part has one signal a run, each another
    signals = itertools.islice(itertools.cycle(CODES), first, first + cases.number(1, 15))
    for turn, number in enumerate(signals):
        wait = moments.uniform(0, 0.4)
        with cases.case(GROUP):
            for attempt in range(4):
                run = Run(server, script, flags, quick_folder / f"{turn}_{attempt}")
                if stop_and_continue(run, number, wait / 2 ** attempt, expected):
                    break
            else:
                raise AssertionError("the run was always over before the signal came")
