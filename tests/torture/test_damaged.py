"""Damaged checkpoints: cut, flipped, zeroed, or mixed from two files, they are refused, or hold what they held.

    python -m pytest tests/torture/test_damaged.py
"""
import io
import random
import zipfile

import pytest
import torch

import common

GROUP = "damaged checkpoint: cuts, bit flips, zeroed pages, swapped files"
PAGE = 4096


def content(value):
    """Weights, optimiser state and history, as in last.pth."""
    generator = torch.Generator().manual_seed(value)
    state = {f"layer_{k}.weight": torch.randn(32, 64, generator=generator) for k in range(6)}
    moments = {str(k): {"step": torch.tensor(float(value)), "exp_avg": torch.randn(32, 64, generator=generator)}
               for k in range(6)}
    return {"format": common.FORMAT, "script": "train_x.py", "epoch": value, "model": state, "seen": None,
            "optimizer": {"state": moments}, "history": [{"epoch": 1, "val_loss": 0.25 * value}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of two checkpoints of the same shape."""
    folder, made = tmp_path_factory.mktemp("files"), []
    for value in (1, 2):
        common.save_checkpoint(folder / "last.pth", content(value))
        made.append((folder / "last.pth").read_bytes())
    return made


def same(one, other):
    """True where two nests of plain data hold the same."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def refused_or_same(path, damaged, expected):
    """True where the file is refused in one sentence; False where it loads as what it was. Anything else fails."""
    path.write_bytes(damaged)
    try:
        loaded = common.read_checkpoint(path)
    except common.CheckpointError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return True
    assert same(loaded, expected), "a damaged file was loaded as something else"
    return False


def cut(draws, whole, _):
    return whole[:draws.randrange(len(whole))]


def flip(draws, whole, _):
    damaged = bytearray(whole)
    damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
    return bytes(damaged)


def zero_page(draws, whole, _):
    start = draws.randrange(0, len(whole), PAGE)
    return whole[:start] + bytes(len(whole[start:start + PAGE])) + whole[start + PAGE:]


def swap_pages(draws, whole, other):
    """A page of the other checkpoint in the same place, as after a disk fault between two saves."""
    start = draws.randrange(0, len(whole) - PAGE, PAGE)
    return whole[:start] + other[start:start + PAGE] + whole[start + PAGE:]


def swap_entry(draws, whole, other):
    """A tensor of the other checkpoint under the checksum of this one."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(io.BytesIO(other)) as second:
        entry = draws.choice([each for each in archive.infolist() if archive.read(each) != second.read(each.filename)])
        start = whole.index(archive.read(entry))
        replaced = second.read(entry.filename)
    assert len(replaced) == entry.file_size
    return whole[:start] + replaced + whole[start + len(replaced):]


DAMAGES = {cut: 272, flip: 272, zero_page: 60, swap_pages: 39, swap_entry: 39}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(tmp_path, files, cases, damage):
    draws, refused, n = random.Random(damage.__name__), 0, DAMAGES[damage]
    for _ in range(n):
        with cases.case(GROUP):
            refused += refused_or_same(tmp_path / "bad.pth", damage(draws, *files), content(1))
    assert refused >= 0.8 * n, "damage that changes nothing tests nothing"


def test_torch_alone_would_load_most_flipped_bits(tmp_path, files):
    """Why every byte is checked first: without the checksums a flipped bit becomes a wrong weight."""
    draws, loaded = random.Random(0), 0
    for _ in range(20):
        (tmp_path / "bad.pth").write_bytes(flip(draws, *files))
        try:
            loaded += not same(torch.load(tmp_path / "bad.pth", weights_only=True), content(1))
        except Exception:
            continue
    assert loaded >= 5
