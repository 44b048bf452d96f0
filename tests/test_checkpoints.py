"""Checkpoints: written whole or not at all, and refused in one sentence when damaged, hostile or another script's.

    python -m pytest tests/test_checkpoints.py
"""
import errno
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import common


def content(value=1.0):
    return {"format": common.FORMAT, "script": "train_x.py", "model": {"w": torch.full((64, 64), value)}, "epoch": 3, "list": [1, "a", None]}


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


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("operation", ["open", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch, operation, fault):
    path = tmp_path / "last.pth"
    common.save_checkpoint(path, content(1.0), keep_previous=True)

    def fail(*_, **__):
        raise OSError(fault, os.strerror(fault))
    if operation == "open":
        monkeypatch.setattr("builtins.open", fail)
    else:
        monkeypatch.setattr(common.os, operation.removeprefix("os."), fail)
    with pytest.raises(common.CannotSave) as caught:
        common.save_checkpoint(path, content(2.0), keep_previous=True)
    monkeypatch.undo()
    assert caught.value.code == 1 and str(tmp_path) in str(caught.value)
    good = [p for p in (path, tmp_path / "last.pth.prev") if p.exists()]
    assert common.read_checkpoint(good[0])["model"]["w"][0, 0] == 1
    assert not list(tmp_path.glob(".*.tmp")) or operation == "open"


def test_a_full_disk_names_file_and_bytes(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common.os, "fsync", fail)
    with pytest.raises(common.CannotSave, match=r"no space to write .*x\.json: 3 bytes needed, \d+ free"):
        common.write_whole(tmp_path / "x.json", b"abc")


WRITER = textwrap.dedent("""
    import sys; sys.path.insert(0, sys.argv[2])
    import torch, common
    value = 0.0
    while True:
        value += 1
        common.save_checkpoint(sys.argv[1], {"w": torch.full((200_000,), value)}, keep_previous=True)
        print(value, flush=True)
""")


def test_kill_9_while_writing_leaves_a_whole_file(tmp_path):
    """20 kills at random moments: the newest file, or the one before it, always loads and holds one value throughout."""
    path, root = tmp_path / "last.pth", str(Path(common.__file__).parent)
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), root], stdout=subprocess.PIPE)
        process.stdout.readline()
        for _ in range(5):
            try:
                process.wait(moments.uniform(0.005, 0.05))
            except subprocess.TimeoutExpired:
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        weights = common.read_checkpoint(path)["w"]
        assert (weights == weights[0]).all()


def saved(tmp_path):
    path = tmp_path / "good.pth"
    common.save_checkpoint(path, content())
    return path.read_bytes()


def test_every_cut_is_refused(tmp_path):
    whole, path = saved(tmp_path), tmp_path / "cut.pth"
    cuts = [0, 1, 100, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 30)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(common.CheckpointError, match="cut.pth"):
            common.read_checkpoint(path)


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    """torch.load alone would accept most of these: it does not check the CRC."""
    whole, path, refused = saved(tmp_path), tmp_path / "flipped.pth", 0
    draws = random.Random(2)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = common.read_checkpoint(path)
            assert torch.equal(loaded["model"]["w"], content()["model"]["w"]) and loaded["epoch"] == 3
        except common.CheckpointError:
            refused += 1
    assert refused > 50


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


def torch_zip(path, value):
    torch.save(value, path)


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 50_000_000)


def claims_too_much(path):
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as source:
        entries = [(entry, source.read(entry)) for entry in source.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry.filename, pickle_with_size(2 ** 36) if entry.filename.endswith("data.pkl") else data)


def pickle_with_size(count):
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return data.replace(b"K\x04", b"\x8a\x05" + count.to_bytes(5, "little"))


HOSTILE = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "pickle in a torch zip": lambda path: torch_zip(path, {"model": Bomb()}),
    "zip bomb": zip_bomb,
    "storage of 2^36 numbers": claims_too_much,
    "sparse tensor": lambda path: torch_zip(path, {"w": torch.eye(3).to_sparse()}),
    "expanded tensor": lambda path: torch_zip(path, {"w": torch.as_strided(torch.zeros(4), (2 ** 20, 2 ** 20), (0, 0))}),
    "not a dict": lambda path: torch_zip(path, [torch.zeros(3)]),
    "whole module": lambda path: torch_zip(path, torch.nn.Linear(2, 2)),
    "web page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "git lfs pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "missing": lambda path: None,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    path = tmp_path / "bad.pth"
    HOSTILE[kind](path)
    with pytest.raises(common.CheckpointError) as caught:
        common.read_checkpoint(path)
    assert caught.value.code == 3 and "bad.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_other_scripts_and_other_shapes(tmp_path):
    path = tmp_path / "best_model.pth"
    common.save_checkpoint(path, content())
    with pytest.raises(common.UserError, match="train_x.py, expected one of train_y.py"):
        common.load_model_file(path, "train_y.py")
    model = torch.nn.Linear(64, 3)
    with pytest.raises(common.CheckpointError, match="does not fit this model"):
        common.load_state(model, common.read_checkpoint(path)["model"], path)
    with pytest.raises(common.CheckpointError, match="not finite"):
        common.load_state(model, {"weight": torch.full((3, 64), float("nan")), "bias": torch.zeros(3)}, path)


def test_weights_files_in_their_known_forms(tmp_path):
    import torchvision
    model = torchvision.models.resnet18()
    state = model.state_dict()
    forms = {"bare": state, "nested": {"state_dict": state, "epoch": 3},
             "parallel": {f"module.{name}": value for name, value in state.items()},
             "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()}}
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pth")
        backbone, width = common.build_backbone("resnet18", weights=tmp_path / f"{name}.pth")
        difference = (backbone.conv1.weight - model.conv1.weight).abs().max()
        assert width == 512 and difference < (1e-3 if name == "half" else 1e-12)
    with pytest.raises(common.UserError, match="not the weights of this backbone"):
        common.build_backbone("resnet50", weights=tmp_path / "bare.pth")


def test_weights_that_cannot_be_had_name_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(common.UserError) as caught:
        common.build_backbone("resnet18")
    assert "--weights FILE" in str(caught.value) and "verify_setup.py --download_weights resnet18" in str(caught.value)


@pytest.mark.parametrize("name, width", [
    ("resnet18", 512), ("resnet50", 2048), ("efficientnet_b0", 1280), ("vit_b_16", 768), ("mobilenet_v3_small", 1024),
    ("densenet121", 1024), ("convnext_tiny", 768), ("googlenet", 1024)])
def test_backbones_give_their_feature_width(name, width):
    backbone, n_features = common.build_backbone(name, pretrained=False)
    assert n_features == width
    with torch.inference_mode():
        assert backbone.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, width)


def test_unknown_backbones_are_named(tmp_path):
    with pytest.raises(common.UserError, match="resnet50"):
        common.build_backbone("resnet5O", pretrained=False)
    with pytest.raises(common.UserError, match="linear layer"):
        common.build_backbone("squeezenet1_0", pretrained=False)


def test_folded_batchnorm_gives_the_same_outputs():
    torch.manual_seed(0)
    backbone, _ = common.build_backbone("resnet18", pretrained=False)
    backbone.train()(torch.randn(4, 3, 64, 64))  # running statistics that are not the identity
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        plain, folded = backbone.eval()(images), common.fold_batchnorm(backbone)(images)
    assert torch.allclose(plain, folded, atol=1e-4 * plain.abs().max().item())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in common.fold_batchnorm(backbone).modules())
