"""Many starts in one second make as many folders; a folder that is being written has one writer.

    python -m pytest tests/torture/test_concurrency.py [--all_cases]
"""
import datetime
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

import common

GROUP = "concurrency: starts in one second, a second writer"


def make_folder(parent, barrier, found):
    """One start: waits for the others, then makes its run folder."""
    barrier.wait()
    found.put(str(common.new_folder(parent)))


def test_starts_in_one_second(tmp_path, cases, monkeypatch):
    """The clock stands still for all of them, so that all want the same name."""
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, 12, 0, 0)
    monkeypatch.setattr(common.datetime, "datetime", Clock)
    context, n = multiprocessing.get_context("fork"), cases.number(16, 64)
    barrier, found = context.Barrier(n), context.Queue()
    starts = [context.Process(target=make_folder, args=(tmp_path, barrier, found)) for _ in range(n)]
    for start in starts:
        start.start()
    folders = [found.get(timeout=60) for _ in starts]
    for start in starts:
        start.join(60)
    for folder in folders:
        with cases.case(GROUP):
            assert folders.count(folder) == 1 and os.path.isdir(folder)
    assert len(list(tmp_path.iterdir())) == n


@pytest.mark.parametrize("who", ["holds it", "has ended"])
def test_second_writer(tmp_path, cases, who):
    """Refused while another process writes, and taken up once that one is gone."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        handle = common.lock_folder(tmp_path)
        os.write(writer, b"locked")
        if who == "holds it":
            time.sleep(60)
        handle.close()
        os._exit(0)
    assert os.read(reader, 6) == b"locked"
    compute = common.choose_compute("cpu", "off")
    with cases.case(GROUP):
        if who == "holds it":
            with pytest.raises(common.UserError, match="being written by another process"):
                common.Run(tmp_path, SimpleNamespace(), compute, None, resumed=True)
            assert common.is_being_written(tmp_path)
        os.kill(child, 9)
        os.waitpid(child, 0)
        assert not common.is_being_written(tmp_path)
        with common.Run(tmp_path, SimpleNamespace(), compute, None, resumed=True) as run:
            assert run.path("log.txt").exists()
