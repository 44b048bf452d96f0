"""The shell scripts: run_local.sh (environment, choice of data, flags), train_assessor.sh (environment, srun, requeue).

    python -m pytest tests/test_shell.py
"""
import csv
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_video

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_local.sh", "train_assessor.sh", "tests/run.sh", ".ci/run")
TABLE = "per_image_Slider_mean_sd_from_wide.csv"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def write_executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(command, cwd, **environment):
    """CompletedProcess of a command without any SLURM or environment variables of the caller but PATH and HOME."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=600,
                          stdin=subprocess.DEVNULL, env={**kept, "PYTHON": sys.executable, **environment})


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_accepts_the_script(script):
    assert run(["bash", "-n", REPO / script], REPO).stderr == "", f"{script} has a syntax error"
    assert os.access(REPO / script, os.X_OK), f"{script} is not executable"


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = run(["shellcheck", *SCRIPTS], REPO)
    assert result.returncode == 0, result.stdout


# --- run_local.sh --------------------------------------------------------------

def test_run_local_asks_the_real_verify_setup_for_the_packages_of_several_files(tmp_path):
    """The other tests stand a recorder in its place, which takes anything."""
    function = re.search(r"^has_packages\(\).*?^\}$", (REPO / "run_local.sh").read_text(), re.M | re.S)[0]
    for text, code in (("torch>=1.0\n", 0), ("torch>=99\n", 1)):
        (tmp_path / "more.txt").write_text(text)
        call = f'{function}\nhas_packages "$PYTHON" requirements.txt {tmp_path / "more.txt"}'
        asked = run(["bash", "-c", call], REPO, here=str(REPO))
        assert (asked.returncode, asked.stderr) == (code, "")


RECORDER = """import sys
if __name__ == "__main__":
    print("CALLED {name}", *sys.argv[1:], sep="|")
"""
FAKE_VERIFY = RECORDER + """    sys.exit("--download_weights" in sys.argv and {missing} or int({code}))
def unmet_requirements(paths):
    return []
"""


@pytest.fixture
def repo(tmp_path):
    """A folder 'the repository' with run_local.sh and recorders in place of the Python scripts."""
    folder = tmp_path / "the repository"
    folder.mkdir()
    shutil.copy(REPO / "run_local.sh", folder)
    (folder / "requirements.txt").write_text("torch>=2.10\n")
    for name in ("train_assessor.py", "train_video.py", "make_sample_data.py"):
        (folder / name).write_text(RECORDER.format(name=name))
    set_verify(folder)
    return folder


def set_verify(folder, missing=0, code=0):
    (folder / "verify_setup.py").write_text(FAKE_VERIFY.format(name="verify_setup.py", missing=missing, code=code))


def calls(result, script):
    """Argument lists with which a recorder was called."""
    lines = [line.split("|") for line in result.stdout.splitlines() if line.startswith("CALLED ")]
    return [line[1:] for line in lines if line[0] == f"CALLED {script}"]


def value(flags, name):
    """What argparse would take: the value after the last --name."""
    return flags[len(flags) - flags[::-1].index(f"--{name}")]


def make_own_data(folder, *tables):
    (folder / "images").mkdir()
    (folder / "ratings").mkdir()
    for name in tables:
        (folder / "ratings" / name).write_text("image,a\n")


def test_without_data_it_makes_samples_and_user_flags_win(repo, tmp_path):
    result = run([repo / "run_local.sh", "--epochs", "3"], tmp_path)
    assert result.returncode == 0, result.stderr
    flags = calls(result, "train_assessor.py")[0]
    assert value(flags, "ratings_file") == str(repo / "sample_data/assessor/ratings" / TABLE), flags
    assert value(flags, "epochs") == "3" and value(flags, "backbone") == "resnet18", flags
    assert "--no_pretrained" not in flags, "the weights could be had"
    assert "SAMPLE DATA" in result.stderr


def test_without_weights_it_says_random_loudly(repo, tmp_path):
    set_verify(repo, missing=1)
    result = run([repo / "run_local.sh"], tmp_path)
    assert "--no_pretrained" in calls(result, "train_assessor.py")[0], result.stderr
    assert "RANDOM WEIGHTS" in result.stderr


@pytest.mark.parametrize("tables, chosen", [(("mine.csv",), "mine.csv"), (("a.csv", TABLE, "b.csv"), TABLE)])
def test_own_data_in_the_current_folder(repo, tmp_path, tables, chosen):
    make_own_data(tmp_path, *tables)
    result = run([repo / "run_local.sh"], tmp_path)
    flags = ["--images_dir", "./images", "--ratings_file", f"./ratings/{chosen}"]
    assert calls(result, "train_assessor.py") == [flags], result.stderr
    assert calls(result, "verify_setup.py") == [["--task", "assessor", *flags]], result.stderr
    assert not calls(result, "make_sample_data.py")


def test_own_data_beside_the_script(repo, tmp_path):
    make_own_data(repo, "mine.csv")
    flags = calls(run([repo / "run_local.sh"], tmp_path), "train_assessor.py")[0]
    assert value(flags, "images_dir") == str(repo / "images"), flags


@pytest.mark.parametrize("tables, words", [(("a.csv", "b.csv"), "several tables"), ((), "no .csv")])
def test_unclear_tables_are_one_error(repo, tmp_path, tables, words):
    make_own_data(tmp_path, *tables)
    result = run([repo / "run_local.sh"], tmp_path)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert not calls(result, "train_assessor.py")


@pytest.mark.parametrize("flags", [["--images_dir", "a b", "--ratings_file", "t.csv"],
                                   ["--images-dir=a b", "--ratings-file=t.csv"]])
def test_named_data_pass_through(repo, tmp_path, flags):
    result = run([repo / "run_local.sh", *flags], tmp_path)
    assert calls(result, "train_assessor.py") == [flags] and not calls(result, "verify_setup.py"), result.stderr


@pytest.mark.parametrize("flags", [["--config", "c.yaml"], ["--resume", "outputs/run_1"], ["--resume=outputs/run_1"]])
def test_config_and_a_run_know_their_data(repo, tmp_path, flags):
    make_own_data(tmp_path, "mine.csv")
    result = run([repo / "run_local.sh", *flags], tmp_path)
    assert calls(result, "train_assessor.py") == [flags], result.stderr


@pytest.mark.parametrize("flags", [["--resume", "auto"], ["--resume=auto"], ["--resume", "--epochs", "3"]])
def test_the_newest_run_is_looked_for_by_its_data(repo, tmp_path, flags):
    make_own_data(tmp_path, "mine.csv")
    result = run([repo / "run_local.sh", *flags], tmp_path)
    assert "--images_dir" in calls(result, "train_assessor.py")[0], result.stderr


def test_faults_of_own_data_do_not_stop_a_script_whose_flags_may_mend_them(repo, tmp_path):
    make_own_data(tmp_path, "mine.csv")
    set_verify(repo, code=1)
    result = run([repo / "run_local.sh", "--on_bad_file", "skip"], tmp_path)
    assert calls(result, "train_assessor.py")[0][-2:] == ["--on_bad_file", "skip"], result.stderr
    assert "found problems" in result.stderr


def test_a_failed_check_stops_before_training(repo, tmp_path):
    set_verify(repo, code=1)
    result = run([repo / "run_local.sh"], tmp_path)
    assert result.returncode == 1 and not calls(result, "train_assessor.py"), result.stderr


def test_first_argument_names_another_script(repo, tmp_path):
    flags = ["--manifest=a b.csv", "--video-root", "v", "--task", "regress"]
    result = run([repo / "run_local.sh", "train_video.py", *flags], tmp_path)
    assert calls(result, "train_video.py") == [flags] and not calls(result, "verify_setup.py"), result.stderr
    missing = run([repo / "run_local.sh", "train_nothing.py"], tmp_path)
    assert missing.returncode == 1 and "train_nothing.py" in missing.stderr and "train_assessor.py" in missing.stderr


def test_video_without_data_makes_samples(repo, tmp_path):
    result = run([repo / "run_local.sh", "train_video.py", "--epochs", "3"], tmp_path)
    assert result.returncode == 0, result.stderr
    flags = calls(result, "train_video.py")[0]
    assert "SAMPLE DATA" in result.stderr
    assert value(flags, "manifest") == str(repo / "sample_data/video/manifests/all.csv")
    assert value(flags, "config") == str(repo / "configs/video_small_data.yaml") and value(flags, "epochs") == "3"
    assert value(flags, "val_ratio") == value(flags, "test_ratio") == "0.25", "rows that choose nothing are judged"
    for split in ("--folds=4", "--val-ratio=0.6", "--test_ratio=0.7", "--split_file=s.json", "--test_groups=1,2",
                  "--cv_file=f.json"):
        own = calls(run([repo / "run_local.sh", "train_video.py", split], tmp_path), "train_video.py")[0]
        args = train_video.parse_args([flag.replace(str(repo), str(REPO)) for flag in own])
        assert own[-1] == split and args.test_ratio in (0, 0.7), "no shares beside those that are asked for"
    assert calls(result, "make_sample_data.py") == [["--task", "video", "--output_dir", str(repo / "sample_data")]]
    set_verify(repo, missing=1)
    flags = calls(run([repo / "run_local.sh", "train_video.py"], tmp_path), "train_video.py")[0]
    assert "--no_pretrained" in flags


@pytest.mark.parametrize("flags", [["-h"], ["--config", "c.yaml"], ["--mode", "predict", "--checkpoint", "x"],
                                   ["--resume=outputs/run_1"], ["--train-manifest", "t.csv"]])
def test_video_with_data_passes_through(repo, tmp_path, flags):
    result = run([repo / "run_local.sh", "train_video.py", *flags], tmp_path)
    assert calls(result, "train_video.py") == [flags] and not calls(result, "make_sample_data.py"), result.stderr


def test_exit_code_of_the_script_is_passed_on(repo, tmp_path):
    (repo / "train_assessor.py").write_text("raise SystemExit(75)")
    assert run([repo / "run_local.sh"], tmp_path).returncode == 75


def test_help_and_install_only(repo, tmp_path):
    text = run([repo / "run_local.sh", "--help"], tmp_path).stdout
    assert "--install_only" in text and "set -euo" not in text
    assert run([repo / "run_local.sh", "--install_only"], tmp_path).stdout.splitlines()[-1] == sys.executable


def test_python_too_old_or_absent(repo, tmp_path):
    write_executable(tmp_path / "old", "#!/bin/sh\nexit 1\n")
    result = run([repo / "run_local.sh"], tmp_path, PYTHON=str(tmp_path / "old"))
    assert result.returncode == 1 and "3.10" in result.stderr, result.stderr


def test_no_venv_and_no_pip_names_the_package(repo, tmp_path):
    write_executable(tmp_path / "bare", f'#!/bin/sh\n[ "$1" != -m ] || exit 1\nexec "{sys.executable}" "$@"\n')
    result = run([repo / "run_local.sh"], tmp_path, PYTHON=str(tmp_path / "bare"), VENV=str(tmp_path / "env"))
    assert result.returncode == 1 and "apt install python3-venv" in result.stderr, result.stderr


def test_a_folder_that_is_no_environment_is_left_alone(repo, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("precious")
    result = run([repo / "run_local.sh"], tmp_path, VENV=str(tmp_path / "thesis"))
    assert result.returncode == 1 and "not a virtual environment" in result.stderr, result.stderr
    assert os.listdir(tmp_path / "thesis") == ["text"]


def test_run_local_for_real_on_made_data(tmp_path):
    """The user's first command in a copy of the repository, with the two shortest settings."""
    for path in (*REPO.glob("*.py"), REPO / "run_local.sh", REPO / "requirements.txt"):
        shutil.copy(path, tmp_path)
    for room in ("readers", "evidence"):
        shutil.copytree(REPO / room, tmp_path / room)
    result = run([tmp_path / "run_local.sh", "--no_pretrained", "--dry_run", "--image_size", "64"], tmp_path)
    assert result.returncode == 0, result.stderr
    [report] = tmp_path.glob("outputs/run_*/report.html")
    assert report.stat().st_size > 1000, "an empty report"
    with open(tmp_path / "sample_data/assessor/ratings" / TABLE, newline="") as handle:
        assert len(list(csv.reader(handle))) > 100


# --- train_assessor.sh ---------------------------------------------------------

# Exits with the code in the file `exit_code`; writes the file `state`, where there is one, as the run's checkpoint.
FAKE_TRAIN = """import argparse, os, pathlib, sys
print("ARGS", *sys.argv, sep="|")
print("CPUS", os.environ.get("SRUN_CPUS_PER_TASK"))
print("MEETS AT", os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", "--output-dir", type=pathlib.Path, default="outputs")
outputs = parser.parse_known_args()[0].output_dir
if pathlib.Path("state").exists():
    (outputs / "run_1_job7" / "fold_0").mkdir(parents=True, exist_ok=True)
    (outputs / "run_1_job7" / "fold_0" / "last.pth").write_text(pathlib.Path("state").read_text())
sys.exit(int(pathlib.Path("exit_code").read_text()))
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with train_assessor.sh, fake train scripts, and a fake srun and scontrol that record their calls."""
    folder = tmp_path / "repo"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(REPO / "train_assessor.sh", folder)
    for name in ("train_assessor.py", "train_video.py"):
        (folder / name).write_text(FAKE_TRAIN)
    of_environment = FAKE_TRAIN.replace('default="outputs"', 'default=os.environ.get("OUTPUT_DIR")')
    (folder / "train_detector.py").write_text(of_environment)
    write_executable(folder / "bin" / "srun", '#!/bin/sh\necho "SRUN $*"\nshift 2\nexec "$@"\n')
    write_executable(folder / "bin" / "scontrol", """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' first second; else echo "$@" >>scontrol_calls; fi
""")
    return folder


def submit(folder, *flags, code=0, state=None, **environment):
    """(CompletedProcess, calls of scontrol) of one start of the job script, as SLURM would start a copy of it."""
    (folder / "exit_code").write_text(str(code))
    (folder / "state").unlink(missing_ok=True)
    if state is not None:
        (folder / "state").write_text(state)
    (folder / "scontrol_calls").unlink(missing_ok=True)
    spool = folder.parent / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(folder / "train_assessor.sh", spool / "slurm_script")
    environment = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "8",
                   "SLURM_JOB_NODELIST": "n1", **environment}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    result = run(["bash", spool / "slurm_script", *flags], spool, **environment)
    record = folder / "scontrol_calls"
    return result, record.read_text().splitlines() if record.exists() else []


def test_the_job_script_asks_for_what_resume_needs():
    lines = (REPO / "train_assessor.sh").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120", "--time=24:00:00", "--mem=32G", "--cpus-per-task=8",
            "--gres=gpu:1", "--output=logs/train_assessor_%j.out"} <= asked
    assert (REPO / "logs").is_dir(), "SLURM does not make the folder of its output file"


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_final_codes_are_passed_on_without_requeue(cluster, code):
    result, requeued = submit(cluster, code=code, state="a")
    assert result.returncode == code and requeued == [], result.stdout + result.stderr


def test_command_line_under_srun(cluster):
    result, _ = submit(cluster, "train_video.py", "--name", "two words")
    started = f"SRUN --ntasks=1 --kill-on-bad-exit=1 {sys.executable} train_video.py --resume auto --name two words"
    assert started in result.stdout, result.stdout
    assert "ARGS|train_video.py|--resume|auto|--name|two words" in result.stdout
    assert "CPUS 8" in result.stdout, "srun would start with one CPU"


@pytest.mark.parametrize("asked, tasks", [({"SLURM_NTASKS": "6"}, 6), ({"SLURM_JOB_NUM_NODES": "2"}, 2), (
    {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, 8)])
def test_one_process_unless_more_are_asked_for(cluster, asked, tasks):
    """srun would start as many as fit where the job has a node for itself, and with them another result."""
    assert f"SRUN --ntasks={tasks} " in submit(cluster, **asked)[0].stdout


def test_processes_meet_on_the_first_node(cluster):
    assert "MEETS AT first 20007\n" in submit(cluster)[0].stdout
    assert "MEETS AT head 5\n" in submit(cluster, MASTER_ADDR="head", MASTER_PORT="5")[0].stdout


def test_saved_job_is_requeued_while_it_makes_progress(cluster):
    for state in ("epoch 1", "epoch 2"):
        result, requeued = submit(cluster, code=75, state=state)
        assert requeued == ["requeue 7"] and result.returncode == 75, result.stdout + result.stderr
    result, requeued = submit(cluster, code=75, state="epoch 2")
    assert requeued == [] and "no progress" in result.stdout and result.returncode == 75
    result, requeued = submit(cluster, code=75, state="epoch 3")
    assert requeued == ["requeue 7"], "progress after a stop counts again"
    (cluster / "outputs" / "run_1_job7" / "fold_0" / "last.pth").unlink()  # as where a fold ends
    (cluster / "outputs" / "run_1_job7" / "fold_0" / "metrics.json").write_text("{}")
    later = time.time() + 60
    os.utime(cluster / "outputs" / "run_1_job7" / "fold_0" / "metrics.json", (later, later))  # during the next start
    assert submit(cluster, code=75)[1] == ["requeue 7"], "a fold that is finished is progress"


def test_job_that_saves_nothing_is_requeued_once(cluster):
    """Its pictures may still have been decoded; a job that never gets further must end."""
    for saved, is_requeued in ((None, True), (None, False), ("epoch 1", True), (None, False), ("epoch 1", False)):
        result, requeued = submit(cluster, code=75, state=saved)
        assert requeued == ["requeue 7"] * is_requeued and result.returncode == 75
    assert "no progress under outputs (the --output_dir of the command line" in result.stdout


@pytest.mark.parametrize("flags", [["--output_dir", "my runs"], ["--output-dir=my runs"],
                                   ["--output_dir", "x", "--output_dir=my runs"]])
def test_progress_is_looked_for_in_the_output_folder(cluster, flags):
    result, requeued = submit(cluster, *flags, code=75, state="a")
    assert requeued == ["requeue 7"], result.stdout


def test_the_output_folder_of_the_detector_may_be_named_by_the_environment(cluster):
    result, requeued = submit(cluster, "train_detector.py", code=75, state="a", OUTPUT_DIR="my runs")
    assert requeued == ["requeue 7"], result.stdout
    for _ in range(2):
        result, _ = submit(cluster, "train_video.py", code=75, OUTPUT_DIR="my runs")
    assert "no progress under outputs (" in result.stdout, "the other scripts do not read it"


def test_array_element_is_requeued_by_its_own_number(cluster):
    _, requeued = submit(cluster, code=75, state="a", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert requeued == ["requeue 5_3"]


def test_without_slurm_it_names_the_other_script(cluster):
    result = run(["bash", cluster / "train_assessor.sh", "--epochs", "1"], cluster)
    assert result.returncode != 0 and "run_local.sh" in result.stderr


def test_environment_by_variables(cluster):
    for name in ("mine", ".venv"):
        (cluster / name / "bin").mkdir(parents=True)
        (cluster / name / "bin" / "activate").write_text(f'echo "ACTIVATED {name} $NOT_SET"\n')
    assert "ACTIVATED .venv" in submit(cluster)[0].stdout
    assert "ACTIVATED mine" in submit(cluster, VENV="mine")[0].stdout
    assert submit(cluster, VENV="absent")[0].returncode != 0
    write_executable(cluster / "bin" / "conda", "#!/bin/sh\necho 'conda() { echo \"CONDA $*\"; }'\n")
    assert "CONDA activate torch" in submit(cluster, CONDA_ENV="torch")[0].stdout
    modules = {"BASH_FUNC_module%%": '() { echo "MODULE $*"; }'}
    assert "MODULE load python/3.11 cuda" in submit(cluster, MODULES="python/3.11 cuda", **modules)[0].stdout
