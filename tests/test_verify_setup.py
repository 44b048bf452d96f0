"""verify_setup.py: each check against a machine or data with that fault, the table, the exit code, the whole run.

    python -m pytest tests/test_verify_setup.py
"""
import ast
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

import verify_setup
from conftest import run_script

REPO = Path(verify_setup.__file__).parent
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def verify(*flags, cwd, python_path=None, **environment):
    """CompletedProcess of verify_setup.py in a folder; python_path stands before the installed packages."""
    environment = {**os.environ, **NO_NETWORK, "OMP_NUM_THREADS": "1", **environment}
    if python_path:
        environment["PYTHONPATH"] = str(python_path)
    return subprocess.run([sys.executable, str(REPO / "verify_setup.py"), *map(str, flags)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=900)


def install_fake(folder, package, version):
    """Metadata of an installed package, as pip leaves them."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def assessor_args(images_dir, ratings_file, *flags):
    """Command line of the check of these data."""
    data = ["--images_dir", str(images_dir), "--ratings_file", str(ratings_file)]
    return verify_setup.parse_args(["--task", "assessor", *data, *flags])[0]


def audit(images_dir, ratings_file, **flags):
    """{name: Check} of the assessor's data."""
    args = assessor_args(images_dir, ratings_file)
    vars(args).update(flags)
    return {check.name: check for check in verify_setup.check_assessor(args)}


# --- packages --------------------------------------------------------------------

@pytest.mark.parametrize("older, newer", [("2.9.1", "2.10"), ("2.10", "2.10.1"), ("0.25.0", "1"), ("9.0", "10.0"),
                                          ("2.14.1+cu130", "2.15")])
def test_version_numbers_order_as_packaging_does(older, newer):
    assert Version(older) < Version(newer)
    assert verify_setup.version_numbers(older) < verify_setup.version_numbers(newer)


def test_requirements_files_can_be_read():
    required = verify_setup.read_requirements(REPO / "requirements.txt")
    assert required["torch"] == "2.10" and "opencv-python" in required
    assert "pytest" in verify_setup.read_requirements(REPO / "tests" / "requirements.txt")


def test_other_requirement_lines_are_not_passed_over(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("torch >= 2.10  # why\n\n# alone\nnumpy\n")
    assert verify_setup.read_requirements(path) == {"torch": "2.10", "numpy": ""}
    path.write_text("torch<3\n")
    assert verify_setup.unmet_requirements([path]) == ["torch<3 is missing"]


def test_unmet_requirements_name_old_and_missing(tmp_path, monkeypatch):
    for package, version in (("torch", "2.9.1+cpu"), ("numpy", "2.4.0"), ("opencv-python-headless", "4.10.0.84")):
        install_fake(tmp_path, package, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    path = tmp_path / "requirements.txt"
    path.write_text("torch>=2.10\nnumpy>=2.4.0\nopencv-python>=4.8\ntqdm>=4\n")
    assert verify_setup.unmet_requirements([path]) == ["torch 2.9.1+cpu (needs 2.10 or newer)", "tqdm is missing"]


def test_old_torch_fails_before_anything_is_imported(tmp_path):
    install_fake(tmp_path / "site", "torch", "2.9.1")
    (tmp_path / "site" / "torch.py").write_text("raise SystemError('imported')")
    result = verify(cwd=tmp_path, python_path=tmp_path / "site")
    assert result.returncode == 1, result.stdout
    assert "torch 2.9.1 (needs 2.10 or newer)" in result.stdout and "pip install -r" in result.stdout
    assert "imported" not in result.stderr


def test_cv2_without_system_libraries_names_the_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    assert verify_setup.main([]) == 1
    printed = capsys.readouterr().out
    for words in ("FAIL  import cv2", "libGL.so.1", "libgl1 libglib2.0-0", "opencv-python-headless"):
        assert words in printed, f"{words} not in {printed}"


def test_installation_is_complete_here():
    assert [check.status for check in verify_setup.check_installation()] == ["OK", "OK", "OK"]


def test_an_unmet_requirement_fails_before_any_import(monkeypatch):
    monkeypatch.setattr(verify_setup, "unmet_requirements", lambda files: ["tqdm is missing"])
    monkeypatch.setattr(verify_setup, "check_imports", lambda modules: pytest.fail("a package was imported"))
    _, fault = verify_setup.check_installation()
    assert (fault.status, fault.name, fault.found) == ("FAIL", "packages", "tqdm is missing")
    assert "pip install -r" in fault.remedy and "requirements.txt" in fault.remedy


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    first = next(verify_setup.check_installation())
    assert (first.status, first.name) == ("FAIL", "Python") and "3.10" in first.remedy


def test_every_file_can_be_read_by_the_oldest_python():
    """3.10 knows no * in an index without brackets, and stops there before any message of ours."""
    for path in [*REPO.glob("*.py"), *REPO.glob("readers/*.py"), *REPO.glob("evidence/*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text, feature_version=(3, 10))):
            if isinstance(node, ast.Subscript) and any(isinstance(item, ast.Starred) for item in ast.iter_child_nodes(node.slice)):
                assert ast.get_source_segment(text, node.slice).startswith("("), f"{path.name}, line {node.lineno}"


# --- the machine -----------------------------------------------------------------

@pytest.mark.parametrize("computes, status, words", [(False, "WARN", "--upgrade"), (True, "OK", "")])
def test_gpu_that_torch_does_not_serve_is_a_warning(monkeypatch, computes, status, words):
    def ones(*shape, device):
        if not computes:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
        return torch.zeros(shape)
    facts = SimpleNamespace(name="Test GPU", total_memory=24 << 30, major=6, minor=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch, "ones", ones)
    [check] = verify_setup.check_gpu()
    assert check.status == status and words in check.remedy
    assert "Test GPU, 24 GiB" in check.found and "capability 6.1" in check.found
    assert computes or ("no kernel image" in check.found and "cu126" in check.remedy)


def test_driver_without_a_usable_gpu_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [check] = verify_setup.check_gpu()
    assert check.status == "WARN" and "sees no GPU" in check.found and "--gres" in check.remedy
    (tmp_path / "nvidia-smi").unlink()
    [check] = verify_setup.check_gpu()
    assert check.status == "OK" and "runs on the CPU" in check.found


def test_space_warns_and_fails(tmp_path, monkeypatch):
    for free, status in ((10, "OK"), (5, "WARN"), (1, "WARN"), (0.5, "FAIL")):
        monkeypatch.setattr(verify_setup.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * 2 ** 30))
        checks = {check.name: check for check in verify_setup.check_space(tmp_path / "not" / "there" / "yet")}
        assert checks["disk"].status == status and bool(checks["disk"].remedy) == (status != "OK")
    assert "/dev/shm" not in checks or checks["/dev/shm"].status == "WARN", "few processes may have enough of it"


def test_open_files_limit(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource")
    for soft, status in ((256, "WARN"), (4096, "OK"), (resource.RLIM_INFINITY, "OK")):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))
        found = [check.status for check in verify_setup.check_space(tmp_path) if check.name == "open files"]
        assert found == [status], soft


# --- weights ---------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty weights cache and a network that refuses."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name, address in NO_NETWORK.items():
        monkeypatch.setenv(name, address)
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_missing_weights_are_one_warning_row(hub):
    torch.save({"weight": torch.ones(1)}, hub / "resnet18-f37072fd.pth")
    rows = list(verify_setup.check_model(["assessor"]))
    assert [row.status for row in rows] == ["OK", "WARN"]
    assert "resnet50" in rows[1].found and "resnet18" not in rows[1].found and "--download_weights" in rows[1].remedy


def test_download_reads_the_cached_and_explains_the_unreachable(hub, capsys):
    torch.save({"weight": torch.ones(1)}, hub / "resnet18-f37072fd.pth")
    cached, absent = verify_setup.download_weights(["resnet18", "resnet34"])
    assert cached.status == "OK" and str(hub) in cached.found
    assert absent.status == "FAIL" and "https://download.pytorch.org/models/resnet34" in absent.remedy
    assert "downloading https://" in capsys.readouterr().out
    assert [path.name for path in hub.iterdir()] == ["resnet18-f37072fd.pth"], "a torn download was left"


def test_letters_that_another_program_or_the_terminal_lacks(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "J\u00fcrgen"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    [check] = verify_setup.download_weights(["resnet34"])
    assert check.status == "FAIL"
    (tmp_path / "fail.py").write_text("import sys\nsys.stderr.buffer.write(b'n\\xf6.csv')\nsys.exit(2)")
    monkeypatch.setattr(verify_setup, "HERE", tmp_path)
    with pytest.raises(Exception, match=r"exit code 2: n\\xf6.csv"):
        verify_setup.run_script("fail.py")


def test_damaged_cached_weights_say_remove(hub):
    (hub / "resnet18-f37072fd.pth").write_text("<html>login</html>")
    [check] = verify_setup.download_weights(["resnet18"])
    assert check.status == "FAIL" and check.remedy.startswith("remove "), check


def test_unknown_model_and_exit_code(hub, capsys):
    assert verify_setup.main(["--download-weights", "resnet19"]) == 1
    printed = capsys.readouterr().out
    assert "torchvision has no model resnet19" in printed
    assert "processor" not in printed, "only the weights are asked for"


@pytest.mark.parametrize("names, expected", [([], ["r3d_18", "resnet18"]), (["resnet50"], ["resnet50"])])
def test_weights_without_a_name_are_all_of_the_task(monkeypatch, names, expected):
    asked = []
    monkeypatch.setattr(verify_setup, "download_weights", lambda names: asked.extend(names) or [])
    assert verify_setup.main(["--task", "video", "--download_weights", *names]) == 0 and asked == expected


# --- the data --------------------------------------------------------------------

@pytest.fixture
def study(tmp_path):
    """Twelve pictures of different noise, and a table that fits them."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        noise = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(images / f"{number}.png")
    (tmp_path / "ratings").mkdir()
    rows = [f"{number}.png,{number},{number % 5}" for number in range(12)]
    return SimpleNamespace(folder=tmp_path, images=images, table=tmp_path / "ratings" / "mine.csv", rows=rows)


def write_rows(study):
    study.table.write_text("\n".join(["image,warm_mean,cold_mean", *study.rows]) + "\n")


def test_a_clean_study_has_no_warning(study):
    write_rows(study)
    checks = audit(study.images, study.table)
    assert {check.status for check in checks.values()} == {"OK"}, checks
    assert "12 images; 2 ratings" in checks["ratings"].found and "warm, cold" in checks["ratings"].found


def test_every_fault_has_its_row(study):
    study.rows[1] = "1.png,,4"
    study.rows.append("gone.png,1,2")
    write_rows(study)
    (study.images / "2.png").write_bytes((study.images / "2.png").read_bytes()[:200])
    Image.new("RGB", (9, 9)).save(study.images / "unrated.png")
    checks = audit(study.images, study.table)
    expected = {"missing cells": ("WARN", "warm lacks 1 of 13"), "rows without image": ("WARN", "gone.png"),
                "images without row": ("WARN", "unrated.png"),
                "unreadable images": ("FAIL", "2.png: ")}
    for name, (status, words) in expected.items():
        assert checks[name].status == status and words in checks[name].found, checks[name]
        assert checks[name].remedy, f"{name} does not say what to do"
    assert checks["unreadable images"].found.startswith("1:\n")


def test_repeated_rows_fail_unless_averaged(study, capsys):
    study.rows.append("3.png,9,9")
    write_rows(study)
    data = ["--images_dir", str(study.images), "--ratings_file", str(study.table)]
    assert verify_setup.main(["--task", "assessor", *data]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  data of assessor" in printed and "3.png" in printed and "--duplicates mean" in printed, printed
    assert {check.status for check in audit(study.images, study.table, duplicates="mean").values()} == {"OK"}


@pytest.mark.parametrize("header, words", [("wert,warm_mean", "--image_column"),
                                           ("image,text_mean", "expected numbers")])
def test_unreadable_table_is_a_fail_row_and_exit_code_1(study, capsys, header, words):
    study.table.write_text(header + "\n0.png,a\n1.png,3\n")
    data = ["--images_dir", str(study.images), "--ratings_file", str(study.table)]
    assert verify_setup.main(["--task", "assessor", *data]) == 1
    printed = capsys.readouterr().out
    assert words in printed and "FAIL  data of assessor" in printed, printed


def test_no_image_of_the_table_is_there(study, capsys, monkeypatch):
    study.rows = [f"other{row}" for row in study.rows]
    write_rows(study)
    monkeypatch.chdir(study.folder)
    assert verify_setup.main(["--task", "assessor"]) == 1
    assert "no row of ratings/mine.csv has an image in images" in capsys.readouterr().out


def test_notes_on_the_table_are_said_even_where_no_picture_is_there(study, capsys):
    study.table.write_text("\n".join(["Ratings of 2024", "image,warm_mean,cold_mean", *study.rows]) + "\n")
    for path in study.images.iterdir():
        path.unlink()
    data = ["--images_dir", str(study.images), "--ratings_file", str(study.table)]
    assert verify_setup.main(["--task", "assessor", *data]) == 1
    printed = capsys.readouterr().out
    assert "expected images" in printed and "note                 1 line(s) above the header were skipped" in printed


def test_data_are_looked_for_in_the_stated_order(study, monkeypatch):
    monkeypatch.chdir(study.folder)
    args = SimpleNamespace(images_dir=None, ratings_file=None)
    assert verify_setup.find_assessor_data(args) is None, "no table yet"
    write_rows(study)
    assert verify_setup.find_assessor_data(args) == (Path("images"), Path("ratings/mine.csv"))
    (study.table.parent / "second.csv").write_text("")
    with pytest.raises(Exception, match="2 tables in ./ratings.*--ratings_file"):
        verify_setup.find_assessor_data(args)
    (study.table.parent / verify_setup.PUBLISHED_TABLE).write_text("")
    assert verify_setup.find_assessor_data(args)[1].name == verify_setup.PUBLISHED_TABLE
    args.images_dir = Path("elsewhere")
    with pytest.raises(Exception, match="elsewhere alone"):
        verify_setup.find_assessor_data(args)


# --- videos ----------------------------------------------------------------------

def audit_video(temporary, **flags):
    """{name: Check} of a manifest of events."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    _, audit_flags = verify_setup.parse_args(["--task", "video", *words])
    with mock.patch.object(verify_setup, "run_script", run_script):  # without the imports of another process
        return {check.name: check for check in verify_setup.check_by_script("video", audit_flags, temporary)}


@pytest.fixture
def clips(tmp_path):
    """Six .npy clips of 2 s at 12 frames a second, and a manifest that fits them."""
    for number in range(6):
        noise = torch.randint(0, 256, (24, 16, 20, 3), generator=torch.Generator().manual_seed(number))
        np.save(tmp_path / f"{number}.npy", noise.to(torch.uint8).numpy())
    rows = [f"{number}.npy,{'ab'[number % 2]},{number},0.2,1.5" for number in range(6)]
    return SimpleNamespace(folder=tmp_path, manifest=tmp_path / "m.csv", rows=rows)


def test_clean_videos_have_no_warning(clips):
    clips.manifest.write_text("\n".join(["path,label,group,start_sec,end_sec", *clips.rows]) + "\n")
    checks = audit_video(clips.folder, manifest=clips.manifest)
    assert {check.status for check in checks.values()} == {"OK"}, checks
    assert "6 clips (0 rows more repeat them), 6 events" in checks["data"].found and "a 3, b 3" in checks["data"].found
    assert str(clips.folder / "audit_video") not in checks["data"].found, "it names a file that is removed"


def test_every_fault_of_videos_has_its_row(clips):
    clips.rows += ["0.npy,a,0,0.7,1.9", "copy.npy,b,7,0.2,1.5", "1.npy,b,1,50,51", "2.npy,,2,0.2,1.5",
                   "broken.npy,a,8,0,1"]
    (clips.folder / "copy.npy").write_bytes((clips.folder / "3.npy").read_bytes())
    (clips.folder / "broken.npy").write_text("nothing")
    clips.manifest.write_text("\n".join(["path,label,group,start_sec,end_sec", *clips.rows]) + "\n")
    checks = audit_video(clips.folder, manifest=clips.manifest, video_root=clips.folder)
    expected = {"unreadable": ("FAIL", "broken.npy"), "left out": ("WARN", "no label"),
                "data": ("WARN", "1.npy@50-51", "1 exact duplicate", "0.npy@0.2-1.5 = 0.npy@0.7-1.9")}
    for name, (status, *words) in expected.items():
        assert checks[name].status == status and all(word in checks[name].found for word in words), checks[name]
        assert checks[name].remedy, f"{name} does not say what to do"


def test_what_two_manifests_share_is_a_warning(clips):
    """The rows of train and val in files of their own; one event of val is in train too."""
    header = "path,label,group,start_sec,end_sec"
    parts = {"train_manifest": clips.rows[:4], "val_manifest": clips.rows[4:]}
    for share, status in (([], "OK"), (clips.rows[4:5], "WARN")):
        parts["train_manifest"] += share
        for name, rows in parts.items():
            (clips.folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
        checks = audit_video(clips.folder, **{name: clips.folder / f"{name}.csv" for name in parts},
                             video_root=clips.folder)
        assert checks["data"].status == status and "leakage train-val: " in checks["data"].found, checks["data"]


def test_a_column_that_tells_the_label_is_a_warning(clips):
    """Not the order of the rows: a file may be sorted by class."""
    rows = [f"{row},camera {'ab'[number % 2]}" for number, row in enumerate(clips.rows)]
    clips.manifest.write_text("\n".join(["path,label,group,start_sec,end_sec,camera", *rows]) + "\n")
    checks = audit_video(clips.folder, manifest=clips.manifest)
    assert checks["data"].status == "WARN" and "marked WARNING" in checks["data"].remedy, checks
    lines = [line for line in checks["data"].found.splitlines() if "WARNING" in line]
    assert lines and all("prior on camera" in line and "AUC of a 1.000" in line and "without a look" in line for line in lines)


def test_near_windows_alone_are_no_warning():
    assert not verify_setup.counts_anything({"within": {"all": {"near_windows": {"count": 9}, "copies": {"count": 0}}}})


def test_a_manifest_that_cannot_be_read_is_a_fail_row(clips, capsys):
    clips.manifest.write_text("clip_number,what\n1,a\n")
    assert verify_setup.main(["--task", "video", "--manifest", str(clips.manifest)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  data of video" in printed and "column of paths: none" in printed, printed


# --- the table -------------------------------------------------------------------

def test_dashes_are_accepted_within_flags_only():
    args, _ = verify_setup.parse_args(["--images-dir", "my-pictures", "--ratings-file=a-b.csv", "--download-weights"])
    assert (str(args.images_dir), str(args.ratings_file), args.download_weights) == ("my-pictures", "a-b.csv", [])


def test_further_flags_go_to_the_audit_of_the_task_that_is_named(capsys):
    words = ["--label-map", "a.json", "--full", "--fps=6", "--output-dir", "o"]
    args, audit_flags = verify_setup.parse_args(["--task", "video", *words])
    assert audit_flags == ["--label_map", "a.json", "--fps=6"] and args.full and str(args.output_dir) == "o"
    for words in (["--label_map", "a.json"], ["--task", "assessor", "--image_dir", "here"]):
        with pytest.raises(SystemExit) as stopped:
            verify_setup.parse_args(words)
        assert stopped.value.code == 2 and words[-2] in capsys.readouterr().err
    flags = ["--images_dir", "i", "--ratings_file=t.csv"]
    assert verify_setup.parse_args(["--task", "detector", *flags])[1] == flags, "to be refused by its audit"


def test_flags_of_the_assessor_check_no_other_task(study, capsys, monkeypatch):
    """Without --task all are checked, but these data are those of one."""
    write_rows(study)
    monkeypatch.setattr(verify_setup, "run_script", lambda *_, **__: pytest.fail("another audit was started"))
    assert verify_setup.main(["--images_dir", str(study.images), "--ratings_file", str(study.table)]) == 0
    assert "12 images; 2 ratings" in capsys.readouterr().out


def test_output_is_ascii_with_the_remedy_under_it(capsys):
    verify_setup.show(verify_setup.Check("WARN", "data", "B\u00e4r.png", "do this"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("WARN  data") and first.isascii() and second.strip() == "-> do this"


def test_the_whole_table_of_one_task_on_few_made_data(tmp_path, capsys, monkeypatch):
    """No data here: sample data are made, and the dry run of the train script succeeds."""
    def make_few(script, *flags, folder=None):
        few = ["--n_samples", 48] if script == "make_sample_data.py" else []
        return run_script(script, *flags, *few, folder=folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify_setup, "run_script", make_few)
    code = verify_setup.main(["--full", "--task", "dreamer"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for words in ("weights not cached", "OK    dry run dreamer"):
        assert words in printed, printed
    assert list(tmp_path.iterdir()) == [], "something was written where it was called"


@pytest.mark.parametrize("task", verify_setup.TASKS)
def test_flags_of_dry_runs_are_known_to_the_train_scripts(task, monkeypatch):
    parse = importlib.import_module(f"train_{task}").parse_args
    monkeypatch.chdir(REPO)
    parse(["--dry_run", "--no_pretrained", *verify_setup.DRY_RUN_FLAGS[task].split()])


@pytest.mark.long
def test_the_whole_table_on_made_data(tmp_path):
    """All tasks, by processes of their own, as a user starts it."""
    result = verify("--full", cwd=tmp_path, TORCH_HOME=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"OK    dry run {task}" in result.stdout for task in verify_setup.TASKS), result.stdout
    assert "weights not cached" in result.stdout
    assert list(tmp_path.iterdir()) == [], "something was written where it was called"


def test_without_full_nothing_is_made_or_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify_setup, "run_script", lambda *_, **__: pytest.fail("a script was started"))
    assert verify_setup.main([]) == 0
    printed = capsys.readouterr().out
    assert "OK    processor" in printed and "OK    model" in printed and "data" not in printed.split("--full")[0]
    assert printed.splitlines()[-1].startswith("--full also tries every train script on sample data")


def test_of_many_pictures_the_first_are_decoded(study, monkeypatch):
    write_rows(study)
    monkeypatch.setattr(verify_setup, "FIRST_PICTURES", 5)
    checks = audit(study.images, study.table)
    assert checks["loading"].found.startswith("5 of 12 pictures to")
    assert checks["unreadable images"].found == "none of the 5 looked at"


def test_what_the_matcher_guesses_is_a_row(study):
    study.rows = [f"C:\\mine\\0{row.split('.')[0]}.jpg,{row.split(',', 1)[1]}" for row in study.rows]
    write_rows(study)
    args = assessor_args(study.images, study.table)
    study.rows += ["gone.png,1,2", "lost.png,2,1"]
    write_rows(study)
    guessed, missing = [check for check in verify_setup.check_assessor(args) if check.name == "note"]
    assert guessed.status == "OK" and "12" in guessed.found and "--exact_names" in guessed.found
    assert missing.status == "WARN" and missing.found.startswith("WARNING: 2 of 14 names fit no picture")
    with pytest.raises(Exception, match="no row of"):
        list(verify_setup.check_assessor(assessor_args(study.images, study.table, "--exact-names")))


def test_a_table_is_read_with_the_flags_that_train_it(study):
    study.table.write_text("\n".join(["image,who,word,age,answer", *(
        f"{i}.png,{rater},{word},{20 + rater},{99 if (i, rater) == (0, 1) else (i + rater) % 7}"
        for i in range(12) for rater in range(3) for word in ("warm", "cold"))]) + "\n")
    flags = ["--rater_column", "who", "--attribute-column", "word", "--rating_column", "answer", "--missing_codes", "99"]
    checks = {check.name: check for check in verify_setup.check_assessor(assessor_args(study.images, study.table, *flags))}
    assert "12 images; 2 ratings with sd and n" in checks["ratings"].found and "warm, cold" in checks["ratings"].found
    flags = ["--duplicates", "ratings", "--target_columns", "answer", "--missing_codes"]
    checks = {check.name: check for check in verify_setup.check_assessor(assessor_args(study.images, study.table, *flags))}
    assert checks["ratings"].found.startswith("12 images; 1 ratings with sd and n")
