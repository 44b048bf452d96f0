"""The disk is full, read-only or gone while a run writes: exit code 1, one sentence, and the run goes on afterwards.

    python -m pytest tests/torture/test_lost_disk.py
"""
import contextlib
import os
import shutil
import subprocess
import time

import pytest

import common
from conftest import SCRIPTS

GROUP = "full disk, read-only, folder removed mid-run"
SAID = {"full": "no space to write", "read-only": "Read-only file system", "removed": "No such file or directory"}


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of its own; the test is skipped by name where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk needs the right to mount one ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "--recursive", folder], check=True)


def strike(fault, disk, run):
    """What happens to the disk; returns what ends it."""
    if fault == "full":
        filler = disk / "filler"
        with open(filler, "wb") as handle:
            for size in (1 << 24, 1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(handle.fileno(), os.fstat(handle.fileno()).st_size, size)
        return filler.unlink
    if fault == "read-only":
        subprocess.run(["mount", "--bind", run, run], check=True)
        for _ in range(200):  # it is refused while the run has a file open for writing
            done = subprocess.run(["mount", "-o", "remount,ro,bind", run, run], capture_output=True)
            if done.returncode == 0:
                break
            time.sleep(0.01)
        done.check_returncode()
        return lambda: subprocess.run(["umount", run], check=True)
    shutil.rmtree(run.rename(run.with_name("gone")))  # at once: the run goes on writing
    return lambda: None


@pytest.mark.parametrize("script, fault", [
    pytest.param(script, fault, marks=() if list(SAID)[k % 3] == fault else pytest.mark.long)
    for k, script in enumerate(SCRIPTS) for fault in SAID])  # in the short part one fault a script
def test_lost_disk(script, fault, server, tiny_flags, small_disk, tmp_path, cases):
    flags = [*tiny_flags[script], "--epochs", cases.number(5, 8), "--patience", 0, "--save_minutes", 1e-9,
             "--resume", "auto", "--output_dir", small_disk / "out"]
    trial = server.start(script, flags, tmp_path / "log")
    trial.wait_for("\nepoch 1")
    run, = (small_disk / "out").glob("run_*")
    mend = strike(fault, small_disk, run)
    with cases.case(GROUP):
        code = trial.finish()
        said = [line for line in trial.text().splitlines() if line.startswith("error: ")]
        mend()
        assert code == 1 and len(said) == 1 and "Traceback" not in trial.text(), f"{code}: {trial.text()[-2000:]}"
        assert SAID[fault] in said[0] and str(run) in said[0]
        if fault == "removed":
            assert not run.exists()
            return
        progress = common.read_checkpoint(run / "last.pth")["progress"]
        assert (progress["epoch"], progress["batch"]) > (0, 0), "saves within an epoch count, an epoch may share one"
        left = list(run.glob(".*.tmp"))
        assert not left or fault == "read-only", f"{left} take space on a full disk"
        again = server.start(script, flags, tmp_path / "again")
        assert again.finish() == 0, again.text()[-2000:]
        assert "(continued)" in again.text() and list((small_disk / "out").glob("run_*")) == [run]
        assert not list(run.glob(".*.tmp"))
