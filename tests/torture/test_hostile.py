"""Hostile checkpoints, given to a script that predicts: exit code 3, nothing executed, within 1 GB and seconds.

    python -m pytest tests/torture/test_hostile.py
"""
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from conftest import only_run

GROUP = "hostile checkpoint: pickles, zip bomb, 2^36 storage, nesting, NaN, HTML page, FIFO, ..."
GIB = 1 << 30


class Bomb:
    """Unpickled, it makes the folder named by BOMB."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


class Import:
    """Unpickled, it asks for a function that runs commands."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


def zip_bomb(path, _):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(2048):
                entry.write(bytes(1 << 20))


def claims_too_much(path, _):
    """A tensor of 2^36 numbers over a storage of four."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"K\x04", b"\x8a\x05" + (2 ** 36).to_bytes(5, "little"))
            archive.writestr(entry.filename, data)


def nested(path, good):
    """Lists within lists, deeper than the stack."""
    content = pickle.dumps([])
    deep = content[:-1].replace(b"]", b"](" * 100_000) + b"e" * 100_000 + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", deep)
        archive.writestr("x/version", "3\n")


def changed(**fields):
    """The good file with other fields."""
    return lambda path, good: torch.save({**good, **fields}, path)


def weights(change):
    """The good file with its first matrix changed."""
    def write(path, good):
        model = dict(good["model"])
        name = next(name for name, value in model.items() if value.ndim > 1)
        torch.save({**good, "model": {**model, name: change(model[name])}}, path)
    return write


def exported(path, _):
    """A program in the format of torch.export, whose own loader runs pickles (CVE-2026-4538)."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


HOSTILE = {
    "a pickle": lambda path, _: path.write_bytes(pickle.dumps(Bomb())),
    "a pickle in a torch zip": lambda path, good: torch.save({**good, "scaler": Bomb()}, path),
    "a command in a torch zip": lambda path, good: torch.save({**good, "names": Import()}, path),
    "a whole module": lambda path, _: torch.save(torch.nn.Linear(2, 2), path),
    "a TorchScript program": lambda path, _: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "an exported program": exported, "a zip bomb": zip_bomb, "a storage of 2^36 numbers": claims_too_much,
    "lists 100,000 deep": nested,
    "a sparse tensor": weights(lambda w: w.to_sparse()),
    "an expanded tensor": weights(lambda w: torch.as_strided(torch.zeros(4), (2 ** 20, 2 ** 20), (0, 0))),
    "NaN": weights(lambda w: w * float("nan")), "another shape": weights(lambda w: w[:1]),
    "an object of numpy": changed(epoch=np.float64(3)), "no weights": changed(model={}),
    "settings of another kind": changed(backbone=7),
    "no dict": lambda path, _: torch.save([torch.zeros(3)], path),
    "a web page": lambda path, _: path.write_text("<!DOCTYPE html><title>404</title>"),
    "a git LFS pointer": lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "an empty file": lambda path, _: path.write_bytes(b""), "a FIFO": lambda path, _: os.mkfifo(path),
    "an endless device": lambda path, _: path.symlink_to("/dev/zero"),
}


@pytest.fixture(scope="module")
def good(server, tiny_flags, tmp_path_factory):
    """best_model.pth of a trained run."""
    folder = tmp_path_factory.mktemp("good")
    flags = [*tiny_flags["train_assessor.py"], "--epochs", 1, "--output_dir", folder / "out"]
    trial = server.start("train_assessor.py", flags, folder / "log")
    assert trial.finish() == 0, trial.text()
    return only_run(folder / "out") / "best_model.pth"


def predict(server, sample, checkpoint, folder):
    """Exit code and output of a prediction that may take 60 CPU seconds, and 1 GB more than it has after its imports.
    """
    flags = ["--checkpoint", checkpoint, "--image_dir", sample.images, "--output", folder / "predictions.csv",
             "--num_workers", 0]
    trial = server.start("predict_assessor.py", flags, folder / "log",
                         env={"BOMB": str(folder / "executed"), "ADDRESS_SPACE_LEFT": str(GIB), "CPU_SECONDS": "60"})
    return trial.finish(), trial.text()


def test_the_good_file_predicts_within_the_limits(server, sample, good, tmp_path):
    code, text = predict(server, sample, good, tmp_path)
    assert code == 0, text


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(server, sample, good, tmp_path, monkeypatch, cases, kind):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    path = tmp_path / "bad.pth"
    HOSTILE[kind](path, common.read_checkpoint(good))
    with cases.case(GROUP):
        code, text = predict(server, sample, path, tmp_path)
        assert not (tmp_path / "executed").exists()
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 3 and len(said) == 1 and "bad.pth" in said[0] and "Traceback" not in text, f"{code}: {text}"
        assert "weights_only" not in said[0], "torch's advice is to load it all the same"
        assert not Path(tmp_path / "predictions.csv").exists()
