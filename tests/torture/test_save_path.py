"""A fault or a kill at every file operation of a save: the old state or the new one, never neither, and no litter.

    python -m pytest tests/torture/test_save_path.py
"""
import builtins
import errno
import os

import pytest
import torch

import common

GROUP = "save path: kill, ENOSPC, EIO, EACCES, EROFS at every file operation"
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "EROFS": errno.EROFS}
KILLS = ("killed before", "killed after")
OPERATIONS = ("open", "link", "replace", "unlink", "fsync", "close", "stat")  # of the module os


class Operations:
    """Counts the file operations below common and lets one of them, `at`, fail or be the last of the process."""

    def __init__(self, monkeypatch, at=None, fault=None):
        self.at, self.fault, self.names = at, fault, []
        for name in OPERATIONS[:-1]:
            monkeypatch.setattr(os, name, self._watched(f"os.{name}", getattr(os, name)))
        self._open = builtins.open
        monkeypatch.setattr(builtins, "open", self._watched("open", self._opened))

    def _opened(self, *args, **options):
        """builtins.open whose handle's write and flush are operations too."""
        handle = self._open(*args, **options)
        return SimpleFile(handle, self) if "w" in (args[1] if len(args) > 1 else "r") else handle

    def _watched(self, name, function):
        def operation(*args, **options):
            return self.run(name, lambda: function(*args, **options))
        return operation

    def run(self, name, function):
        """One operation."""
        self.names.append(name)
        is_it = len(self.names) - 1 == self.at
        if is_it and self.fault == "killed before":
            os._exit(137)
        if is_it and self.fault in FAULTS:
            raise OSError(FAULTS[self.fault], os.strerror(FAULTS[self.fault]))
        try:
            return function()
        finally:
            if is_it and self.fault == "killed after":
                os._exit(137)


class SimpleFile:
    """A file handle whose writes go half way before they fail, as on a full disk."""

    def __init__(self, handle, operations):
        self.handle, self.operations = handle, operations

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()

    def write(self, content):
        """Half of it first: a fault leaves that."""
        half = len(content) // 2
        self.handle.write(content[:half])
        self.handle.flush()
        return self.operations.run("write", lambda: self.handle.write(content[half:]))

    def flush(self):
        return self.operations.run("flush", self.handle.flush)

    def fileno(self):
        return self.handle.fileno()

    def close(self):
        self.handle.close()


def content(value):
    model = {"w": torch.full((64, 64), float(value))}
    return {"format": common.FORMAT, "script": "train_x.py", "model": model, "seen": None}


def value_of(path):
    """The number that a checkpoint holds throughout."""
    weights = common.read_checkpoint(path)["model"]["w"]
    assert (weights == weights[0, 0]).all()
    return weights[0, 0].item()


def save_first(folder):
    common.save_checkpoint(folder / "last.pth", content(2), keep_previous=True)


def save_again(folder):
    common.save_checkpoint(folder / "last.pth", content(2), keep_previous=True)


def save_best(folder):
    common.save_checkpoint(folder / "last.pth", content(2))


def save_table(folder):
    common.write_table(folder / "training_history.csv", [{"epoch": 2}])


def check_checkpoint(folder):
    """last.pth or the one before it loads, as the old state or the new one; where there was none, there may be none."""
    found = [value_of(path) for path in (folder / "last.pth", folder / "last.pth.prev") if path.exists()]
    assert found and set(found) <= {0.0, 1.0, 2.0} and found[0] in (1.0, 2.0)


def check_first(folder):
    assert not (folder / "last.pth").exists() or value_of(folder / "last.pth") == 2


def check_table(folder):
    assert (folder / "training_history.csv").read_text() in ("epoch\n1\n", "epoch\n2\n")


SAVES = {"the first save": (save_first, check_first), "over an older one": (save_again, check_checkpoint),
         "over the best model": (save_best, check_checkpoint), "of a table": (save_table, check_table)}


def prepare(folder, name):
    """What was there before the save."""
    folder.mkdir()
    common.write_table(folder / "training_history.csv", [{"epoch": 1}])
    if name != "the first save":
        for value in (0, 1):
            common.save_checkpoint(folder / "last.pth", content(value), keep_previous=True)


def count_operations(folder, name, monkeypatch):
    prepare(folder, name)
    with monkeypatch.context() as patch:
        operations = Operations(patch)
        SAVES[name][0](folder)
    return operations.names


@pytest.mark.parametrize("fault", [*FAULTS, *KILLS])
@pytest.mark.parametrize("name", SAVES)
def test_fault_at_every_operation(tmp_path, monkeypatch, cases, name, fault):
    names = count_operations(tmp_path / "count", name, monkeypatch)
    for at, operation in enumerate(names):
        folder = tmp_path / f"{at}"
        prepare(folder, name)
        with cases.case(GROUP):
            run = in_a_child if fault in KILLS else here
            run(folder, name, monkeypatch, at, fault)
            SAVES[name][1](folder)
            litter = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
            if fault in FAULTS and operation != "os.unlink":
                assert not litter, f"{operation}: {litter}"
            SAVES[name][0](folder)  # and the next save is whole, and takes the place of what a kill left behind
            assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def here(folder, name, monkeypatch, at, fault):
    """The save with a fault: one sentence, code 1; a folder that may not be synchronised is no fault, nor a link."""
    with monkeypatch.context() as patch:
        operations = Operations(patch, at, fault)
        try:
            SAVES[name][0](folder)
        except common.CannotSave as error:
            text = str(error)
            assert error.code == common.EXIT_CRASH and "\n" not in text and str(folder) in text
            assert ("bytes needed" in text and "free" in text) == (fault == "ENOSPC"), text
            return
    operation = operations.names[at]
    is_no_fault = operation == "os.link" or (operation == "os.open" and fault == "EACCES")
    assert is_no_fault, f"{operation} failed and nothing was said"


def in_a_child(folder, name, monkeypatch, at, fault):
    """The save in a forked process that ends in that operation."""
    child = os.fork()
    if not child:
        try:
            Operations(monkeypatch, at, fault)
            SAVES[name][0](folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
