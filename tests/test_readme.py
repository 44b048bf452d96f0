"""Every command of the README and of docs/ runs as it is written, in a folder that holds ./images and ./ratings.

Of the commands that train with one configuration the first with folds and the first without run, the others only by
tests/run.sh --all; the flags of all of them are read.

    python -m pytest tests/test_readme.py
"""
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, only_run, run_here, run_script, small_run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def commands_of(block):
    """The commands of a bash block, in order."""
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


BLOCKS = [commands_of(block) for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)]
COMMANDS = list(dict.fromkeys(itertools.chain(*BLOCKS)))  # what trains comes before what takes the run up again
ELSEWHERE = {
    "./run_local.sh": "run by tests/test_shell.py",
    "tests/run.sh": "this very run",
    "tests/benchmarks": "takes hours",
    "sbatch": "needs a SLURM cluster",
    "python tests/benchmarks": "takes minutes",
    "python verify_setup.py": "run by test_verify_setup.py",
    "python predict_assessor.py --checkpoint outputs/run_YYYYMMDD_HHMMSS --image_dir ./images --export": "run by "
    "test_assessor.py",
    "python train_dreamer.py --config configs/dreamer_production.yaml": "the production size wants a GPU",
}
SMALL = {  # added to the commands that train or make data, so that each takes seconds
    "make_sample_data.py": ["--n_samples", "40"],
    "train_assessor.py": [
        "--backbone", "shufflenet_v2_x0_5", "--no_pretrained", "--image_size", "64", "--dry_run",
        "--target_columns", "Valence_mean", "Anger_mean",
    ],
    "train_video.py": [
        "--no_pretrained", "--image_size", "32", "--n_frames", "4", "--num_workers", "0", "--dry_run",
    ],
    "train_detector.py": [
        "--no_pretrained", "--min_size", "64", "--max_size", "96", "--batch_size", "2", "--num_workers", "0", "--dry_run",
    ],
    "train_dreamer.py": [
        "--no_pretrained", "--image_size", "32", "--n_layers", "1", "--num_workers", "0", "--dry_run",
    ],
}


@pytest.fixture(scope="module")
def folder(sample, tmp_path_factory):
    """A user's folder: ./images, ./ratings, ./configs, and outputs/run_YYYYMMDD_HHMMSS from a small run.

    Also other_program.csv, predictions of another program for the rows of that run.
    """
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(sample.images, folder / "images")
    (folder / "ratings").mkdir()
    shutil.copy(sample.ratings, folder / "ratings")
    shutil.copytree(ROOT / "configs", folder / "configs")
    flags = small_run(sample, folder / "made", "--epochs", 1)
    run_script("train_assessor.py", *flags)
    shutil.copytree(only_run(folder / "made"), folder / "outputs" / "run_YYYYMMDD_HHMMSS")
    shutil.copy(only_run(folder / "made") / "predictions_val.csv", folder / "other_program.csv")
    return folder


def run_command(folder, command):
    """One README command in the user's folder; commands that train get the flags of SMALL and a folder of their own."""
    program, *words = shlex.split(command)
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", *words[:2]]}[program]
    script, *flags = words[2:] if launcher else words
    training = training_of(command)
    if script == "make_sample_data.py":
        flags += [] if "video" in flags else SMALL[script]  # a command names the folder of the last video
    elif training:
        flags += [*SMALL[script], "--output_dir", output_of(training)]
        flags += ["--folds", "2"] if "--folds" in flags else []
    else:
        flags = [flag.replace("outputs/run_YYYYMMDD_HHMMSS", run_before(folder, command)) for flag in flags]
    if launcher:
        done = subprocess.run(
            [sys.executable, *launcher, ROOT / script, *flags], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        run_script(script, *flags, folder=folder)


def output_of(training):
    """Where runs of a script lie, those with folds apart; training: of training_of."""
    script, _, has_folds = training[0]
    return f"outputs/{script}{'_folds' if has_folds else ''}"


def run_before(folder, command):
    """A run of the kind that the last training before a command of the same block makes; else the assessor's."""
    block = next(block for block in BLOCKS if command in block)
    trainings = list(filter(None, map(training_of, block[:block.index(command)])))
    if not trainings:
        return "outputs/run_YYYYMMDD_HHMMSS"
    run = sorted((folder / output_of(trainings[-1])).glob("run_*"))[0]
    return run.relative_to(folder).as_posix()


def test_the_readme_is_a_front_page():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_the_pages_have_commands():
    assert len(COMMANDS) >= 8 and any(command.startswith("python predict_assessor.py") for command in COMMANDS)


def training_of(command):
    """(script, configuration, whether it has folds) of a command that trains, and its flags; None of others."""
    found = re.match(r"(?:python|torchrun --nproc_per_node 2) (train_\w+)\.py (.*)", command)
    if not found or "--mode" in command or "production" in command:
        return None
    script, flags = found[1], shlex.split(found[2])
    config = flags[flags.index("--config") + 1] if "--config" in flags else None
    return (script, config, "--folds" in flags), flags


def repeats_a_training(k):
    """Whether a command before number k trains with the same script and configuration, with folds or without."""
    trainings = [training_of(command) for command in COMMANDS[:k + 1]]
    known = [training[0] for training in trainings[:-1] if training]
    return trainings[-1] is not None and trainings[-1][0] in known


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=pytest.mark.long if repeats_a_training(k) else ())
    for k, command in enumerate(COMMANDS)])
def test_command(folder, command):
    for start, reason in ELSEWHERE.items():
        if command.startswith(start):
            pytest.skip(f"{command}: {reason}")
    run_command(folder, command)


@pytest.mark.parametrize("command", list(filter(training_of, COMMANDS)))
def test_flags_of_all_that_train_are_read(monkeypatch, command):
    """Those too whose run repeats another's: as they are written, without SMALL."""
    monkeypatch.chdir(ROOT)
    (script, config, _), flags = training_of(command)
    args = importlib.import_module(script).parse_args(flags)
    assert args.given and (config is None or config in str(args.config))


def test_every_flag_named_in_the_pages_exists():
    text = re.sub(r"(sbatch|torchrun|tests/run.sh) --.*|`--all`", "", TEXT)  # not ours
    named = set(re.findall(r"`?(--[a-z_]+)", text))
    known = set()
    for benchmark in (ROOT / "tests" / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z_]+)"', benchmark.read_text(encoding="utf-8")))
    for script in ROOT.glob("*.py"):
        if script.stem not in ("common", "exporting"):
            known |= set(re.findall(r"--[a-z_]+", run_here(script.name, "--help").stdout))
    assert not named - known, f"README or docs name flags that no script has: {sorted(named - known)}"
