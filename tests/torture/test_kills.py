"""kill -9 of the whole process group at random moments, again and again: the run ends with the bits of one left alone.

    python -m pytest tests/torture/test_kills.py [--all_cases]
"""
import random
import signal
import time

import pytest

from conftest import SCRIPTS, SCRIPTS_AND_WORKERS, fork_server
from test_ranks import rank_environments
from test_resume import fingerprint

GROUP = "kill -9 at random moments, 4 scripts, workers 0 and 2"
QUICK = "kill -9 at random moments, epochs that are quicker than their saves"
PAIRS = "two processes of one run, both or one of them killed"
# Logs of processes that went on waiting for a killed one: Gloo (torch 2.14) forgets the error of a message that was
# partly sent.
LEFT_WAITING = []


def final_bits(output_dir):
    """Fingerprint and predictions of the one run there; a kill before it recorded its flags leaves a bare folder."""
    runs = [folder for folder in output_dir.glob("run_*") if (folder / "args.json").exists()]
    assert len(runs) == 1, f"expected one run, found {runs}"
    assert (runs[0] / "metrics.json").exists() and (runs[0] / "report.html").exists()
    predictions = [runs[0] / name for name in ("predictions_val.csv", "detections_val.csv")]
    return fingerprint(runs[0]), [path.read_bytes() for path in predictions if path.exists()]


class Killer:
    """Runs a script with a save after every step, kills it at random moments and starts it again with --resume auto."""

    def __init__(self, server, script, flags, folder, seed):
        self.server, self.script, self.folder = server, script, folder
        self.flags = ["--save_minutes", 1e-9, *flags, "--resume", "auto", "--output_dir", folder / "out"]
        self.moments, self.log = random.Random(seed), folder / "log"
        folder.mkdir()

    def start(self):
        return self.server.start(self.script, self.flags, self.log)

    def kill(self, longest):
        """Start, and kill after at most `longest` seconds; False where the run had ended by itself before."""
        trial = self.start()
        code = trial.wait(self.moments.uniform(0, longest))
        if code is not None:
            assert code == 0, trial.text()[-2000:]
            return False
        trial.signal(signal.SIGKILL)
        code = trial.finish(20)
        assert code in (-signal.SIGKILL, 0), trial.text()[-2000:]  # 0: it came to its end in that moment
        return code == -signal.SIGKILL

    def kills_of_one_run(self, at_most, longest):
        """Number of kills that one run took, after which it was left alone to its end."""
        kills = 0
        while kills < at_most and not self.is_finished() and self.kill(longest):
            kills += 1
        if not self.is_finished():  # else a kill came after all was written, and another start would be a new run
            last = self.start()
            assert last.finish() == 0, last.text()[-2000:]
        return kills

    def is_finished(self):
        """True once the run has written its metrics, the last of its files."""
        return any((self.folder / "out").glob("run_*/metrics.json"))


class Pair:
    """Two processes of one run with the methods of one Trial; a signal reaches those of `targets`."""

    def __init__(self, trials, targets):
        self.trials, self.targets = trials, targets

    def wait(self, seconds):
        """Exit code of the run, None while its first process lives."""
        return None if self.trials[0].wait(seconds) is None else self.finish()

    def signal(self, number):
        for rank in self.targets:
            self.trials[rank].signal(number)

    def finish(self, seconds=600):
        """SIGKILL where one was killed; the other then ends by itself with 1 and a word, unless it was done."""
        end, killed_at = time.monotonic() + seconds, None
        while None in (codes := [trial.wait(0) for trial in self.trials]):
            if -signal.SIGKILL in codes:
                killed_at = killed_at or time.monotonic()
                has_met = "processes: 2" in self.text()  # then it ends at its next exchange, a step later
                end = killed_at + (120 if has_met else 20)
            if time.monotonic() > end:
                for trial in self.trials:  # as torchrun and srun --kill-on-bad-exit do
                    trial.signal(signal.SIGKILL)
                assert -signal.SIGKILL in codes, f"hangs:\n{self.text()[-2000:]}"
                if has_met:
                    LEFT_WAITING.append(self.text()[-2000:])
                    assert len(LEFT_WAITING) <= 2, "more than rarely:\n" + "\n".join(LEFT_WAITING)
                return self.finish()
            time.sleep(0.01)
        if -signal.SIGKILL not in codes:
            return max(codes)
        said = {1: "another process of this run has ended", 2: "did not meet the others"}
        for trial, code in zip(self.trials, codes):
            assert code in (-signal.SIGKILL, 0) or said[code] in self.text(), f"{codes}: {self.text()[-2000:]}"
            assert not trial.left_over()
        return -signal.SIGKILL

    def text(self):
        return self.trials[0].text()


class PairKiller(Killer):
    """Killer of runs that two processes share: both of them, the first and the second in turn."""

    def start(self):
        n_starts = len(list(self.folder.glob("log_*")))
        log = self.folder / f"log_{n_starts}"
        trials = [self.server.start(self.script, self.flags, log, env=env) for env in rank_environments(2)]
        return Pair(trials, [(0, 1), (0,), (1,)][n_starts % 3])


def hold_through_kills(cases, group, make_killer, wanted, at_most):
    """Kill runs until so many kills are done, `at_most` of them in one; each run ends with the bits of one left alone.

    make_killer(server, name) gives the killer of a new run. The one left alone has another hash seed.
    """
    start, done = time.monotonic(), 0
    whole = make_killer(fork_server(), "whole")
    undisturbed = whole.start()
    assert undisturbed.finish() == 0, undisturbed.text()[-2000:]
    longest, expected = 0.6 * (time.monotonic() - start), final_bits(whole.folder / "out")
    for number in range(100):
        killer = make_killer(None, str(number))
        kills = killer.kills_of_one_run(min(at_most, wanted - done), longest)
        found = final_bits(killer.folder / "out")
        for _ in range(kills):
            with cases.case(group):
                assert found == expected, f"run {number} after {kills} kills"
        done += kills
        if done == wanted:
            return
    raise AssertionError(f"{done} kills of {wanted} in {number + 1} runs")


@pytest.mark.timeout(3600)  # a hundred kills, with --all_cases
@pytest.mark.parametrize("script, workers", SCRIPTS_AND_WORKERS)
def test_kills(script, workers, server, tiny_flags, quick_folder, cases):
    flags = [*tiny_flags[script], "--num_workers", workers]

    def make_killer(other, name):
        return Killer(other or server, script, flags, quick_folder / name, f"{script} {workers} {name}")
    hold_through_kills(cases, GROUP, make_killer, cases.number(1, 100), 12)


@pytest.mark.timeout(3600)
def test_kills_of_quick_epochs(server, tiny_flags, quick_folder, cases):
    flags = [*tiny_flags["train_assessor.py"], "--freeze_backbone", "--epochs", cases.number(30, 60), "--patience", 0,
             "--save_every", 0, "--save_minutes", 0]

    def make_killer(other, name):
        return Killer(other or server, "train_assessor.py", flags, quick_folder / name, f"quick epochs {name}")
    hold_through_kills(cases, QUICK, make_killer, cases.number(3, 100), 12)


@pytest.mark.parametrize("script", [pytest.param(script, marks=pytest.mark.long if script in SCRIPTS[1:] else ())
                                    for script in SCRIPTS])
def test_kills_of_two_processes(script, server, tiny_flags, quick_folder, cases):
    flags = [*tiny_flags[script], "--num_workers", 0]

    def make_killer(other, name):
        return PairKiller(other or server, script, flags, quick_folder / name, f"{script} {name}")
    hold_through_kills(cases, PAIRS, make_killer, cases.number(2, 10), 5)
