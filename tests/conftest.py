"""What the tests share: the import path, sample data made once, and a way to run a script as a user would."""

import contextlib
import fcntl
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
IN_MEMORY = Path("/dev/shm")
if IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > 16 << 30:  # checkpoints are forced to disk, a tenth of the time
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


SLOW_FILES = ("test_video test_kills test_dreamer test_signals test_assessor test_readme test_detector test_seen test_ranks "
              "test_ranks_scripts test_hostile test_lost_disk test_resume test_shell").split()
SESSION_FOLDER = "session"  # made once, for all modules
FORK_SERVERS = []  # at most one
DRAW = {"BLANK_PLOTS": ""}  # environment of a run whose plots are drawn
FAULTS = {}  # group of the fault table -> (cases that held, cases that were to be run)


def pytest_addoption(parser):
    parser.addoption("--all_cases", action="store_true", help="all cases of the torture groups, not the short part")
    parser.addoption("--fault_table", metavar="FILE", help="append the lines fault, cases and result (Markdown)")


def pytest_configure(config):
    """Of the forked runs only those with DRAW draw their plots; tests/test_report.py and others draw each kind."""
    if not config.getoption("all_cases"):
        os.environ["BLANK_PLOTS"] = "1"


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that the two workers of tests/run.sh end together."""
    def place(item):
        name = item.path.stem
        return SLOW_FILES.index(name) if name in SLOW_FILES else len(SLOW_FILES)
    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test and its fixtures draw does not depend on the tests that ran before in the same process."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test marked fault(GROUP) is itself a case of that group."""
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and report.when == "call" and not report.skipped:
        held, planned = FAULTS.get(marker.args[0], (0, 0))
        FAULTS[marker.args[0]] = (held + report.passed, planned + 1)
    return report


def pytest_unconfigure():
    while FORK_SERVERS:
        FORK_SERVERS.pop().close()


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its counts to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = FAULTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for group, counts in getattr(node, "workeroutput", {}).get("faults", {}).items():
        FAULTS[group] = tuple(map(sum, zip(FAULTS.get(group, (0, 0)), counts)))


def pytest_terminal_summary(terminalreporter, config):
    if not FAULTS or hasattr(config, "workeroutput"):
        return
    rows = ["| fault | cases | result |", "|---|---|---|"]
    for group, (held, planned) in FAULTS.items():
        rows.append(f"| {group} | {planned} | {'all held' if held == planned else f'{planned - held} FAILED'} |")
    terminalreporter.section("faults")
    terminalreporter.write_line("\n".join(rows))
    if config.getoption("fault_table"):
        with open(config.getoption("fault_table"), "a", encoding="utf-8") as table:
            table.write("\n".join(rows[2:]) + "\n")


class Cases:
    """Counts the cases of one fault group over all tests that share its name; a case that raises does not hold."""

    def __init__(self, all_cases):
        self.all_cases = all_cases

    def number(self, short, every):
        """How many cases this session runs: `short` of them, or `every` one under --all_cases."""
        return every if self.all_cases else short

    @contextlib.contextmanager
    def case(self, group):
        """One case: entered it is planned, left without an error it held."""
        held, planned = FAULTS.get(group, (0, 0))
        FAULTS[group] = (held, planned + 1)
        yield
        held, planned = FAULTS[group]
        FAULTS[group] = (held + 1, planned)


@pytest.fixture(scope="session")
def cases(request):
    """The counter of the fault table: `with cases.case("save path"): ...` around each case."""
    return Cases(request.config.getoption("all_cases"))


@pytest.fixture(scope="module", autouse=True)
def _remove_folders_of_the_module(tmp_path_factory):
    """Run folders hold checkpoints: the whole suite's would take many GB at once."""
    base = tmp_path_factory.getbasetemp()
    before = set(base.iterdir())
    yield
    for folder in set(base.iterdir()) - before:
        if folder.name != SESSION_FOLDER:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    """A script that runs within this process sets them, and on its way out has them ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def made_data(tmp_path_factory):
    """made_data(task, n): folder of sample data, made once for the tests of all workers, which only read it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / SESSION_FOLDER
    folder.mkdir(exist_ok=True)

    def make(task, n):
        made = folder / str(n) / task
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                run_script("make_sample_data.py", "--task", task, "--output_dir", made.parent, "--n_samples", n)
        return made
    return make


@pytest.fixture(scope="session")
def sample(made_data):
    """Sample data of the assessor: .images, .ratings (mean, sd, n), .raw (single ratings), 48 pictures."""
    made = made_data("assessor", 48)
    return SimpleNamespace(images=made / "images", ratings=made / "ratings" / "per_image_Slider_mean_sd_from_wide.csv",
                           raw=made / "ratings" / "raw_ratings_long.csv")


def script_command(script, *flags):
    """The command of a script with these flags, for this interpreter."""
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def fork_server():
    """The server that runs are forked from; started at the first call."""
    from torture import forkserver
    if not FORK_SERVERS:
        FORK_SERVERS.append(forkserver.ForkServer())
    return FORK_SERVERS[0]


def run_script(script, *flags, code=0, env=None, folder=None):
    """Run a script to its end; the exit code must be as expected. Returns stdout, stderr and both together as text.

    The run is forked from fork_server(), so that it does not pay for its imports, nor for the end of its interpreter.
    """
    from torture import forkserver
    if Path(script).stem not in forkserver.SCRIPTS:
        return run_fresh(script, *flags, code=code, env=env, folder=folder)
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept, "out"), Path(kept, "err")
        quick = {"QUICK_EXIT": "1", **(env or {})}
        found = fork_server().start(script, flags, out, quick, err, folder).finish(600)
        stdout, stderr = (file.read_text(errors="replace") for file in (out, err))
    assert found == code, f"exit code {found}, expected {code}:\n{(stdout + stderr)[-3000:]}"
    return SimpleNamespace(stdout=stdout, stderr=stderr, text=stdout + stderr)


def run_fresh(script, *flags, code=0, env=None, folder=None):
    """run_script by an interpreter of its own, as a user's shell starts it."""
    done = subprocess.run(script_command(script, *flags), capture_output=True, text=True, timeout=600, cwd=folder,
                          env={**os.environ, **(env or {})})
    text = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{text[-3000:]}"
    return SimpleNamespace(stdout=done.stdout, stderr=done.stderr, text=text)


def run_here(script, *flags, code=0):
    """run_script within this process: for the many mistakes that end a run before anything is trained."""
    import common
    module, out, err = importlib.import_module(script.removesuffix(".py")), io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in common.STOP_SIGNALS}
    argv, sys.argv, found = sys.argv, [str(ROOT / script), *map(str, flags)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.run_main(module.main)
    except SystemExit as left:
        found = left.code or 0
    finally:
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    text = out.getvalue() + err.getvalue()
    assert found == code, f"exit code {found}, expected {code}:\n{text[-3000:]}"
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue(), text=text)


def small_run(sample, output_dir, *flags):
    """Flags of a training run that takes seconds: a small network, small pictures, random weights, two of the ratings."""
    text = ("--backbone shufflenet_v2_x0_5 --no_pretrained --image_size 32 --epochs 3 --batch_size 8 --num_workers 0 "
            "--group_column subject --target_columns Valence_mean Anger_mean")
    data = ["--images_dir", sample.images, "--ratings_file", sample.ratings, "--output_dir", output_dir]
    return [*data, *text.split(), *flags]


def only_run(output_dir):
    """The one run folder inside output_dir."""
    runs = sorted(Path(output_dir).glob("run_*"))
    assert len(runs) == 1, f"expected one run folder, found {runs}"
    return runs[0]


# --- for tests/torture ---------------------------------------------------------------------

SCRIPTS = ["train_assessor.py", "train_video.py", "train_detector.py", "train_dreamer.py"]
# each script with one number of workers in the short part, the next script with the other
SCRIPTS_AND_WORKERS = [
    pytest.param(script, workers, marks=pytest.mark.long if (k + workers // 2) % 2 else ())
    for k, script in enumerate(SCRIPTS) for workers in (0, 2)]
# with what makes a resume hard: draws in the loader and in the step, schedules, groups of batches, momentum
ASSESSOR = "--scheduler plateau --accumulate 2 --save_every 2 --keep_last".split()
VIDEO = ("--model cnn_lstm --backbone shufflenet_v2_x0_5 --hidden 16 --no_pretrained --image_size 32 --n_frames 4 "
         "--fps 4 --epochs 3 --batch_size 8 --num_workers 0 --augment heavy --mixup 0.3 --jitter_sec 0.3 --balance sampler --keep_last").split()
DETECTOR = ("--model fasterrcnn_resnet18_fpn --no_pretrained --min_size 32 --max_size 40 --epochs 3 --batch_size 2 "
            "--num_workers 0 --visualize 1 --optimizer sgd --keep_last").split()
DREAMER = ("--encoder resnet18 --no_pretrained --image_size 32 --token_type spatial --d_model 32 --n_layers 1 "
           "--n_heads 2 --feedforward 32 --epochs 3 --batch_size 8 --num_workers 0 --optimizer sgd --augment full "
           "--scheduler onecycle --accumulate 2 --keep_last").split()


@pytest.fixture(scope="session")
def tiny_flags(sample, made_data, tmp_path_factory):
    """{script: flags of a training run on made data that takes seconds}, without --output_dir."""
    videos, parts, slices = made_data("video", 40), made_data("detector", 36), made_data("dreamer", 48)
    manifests = videos / "manifests"
    few = tmp_path_factory.getbasetemp() / SESSION_FOLDER / "few"
    few.mkdir(parents=True)
    for part, n in (("train", 4), ("val", 2)):  # its heads take a second a batch
        content = json.loads((parts / f"{part}_coco.json").read_text())
        content["images"] = content["images"][:n]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]
        (few / f"{part}.json").write_text(json.dumps(content))
    assessor = small_run(sample, "unused", *ASSESSOR)
    assert assessor[4] == "--output_dir"
    return {
        "train_assessor.py": assessor[:4] + assessor[6:],
        "train_video.py": [*VIDEO, "--video_root", videos / "videos", "--label_map",
                           manifests / "label_map.json", "--train_manifest", manifests / "train.csv",
                           "--val_manifest", manifests / "val.csv"],
        "train_detector.py": [*DETECTOR, "--train_json", few / "train.json", "--val_json",
                              few / "val.json", "--train_images", parts / "images", "--val_images",
                              parts / "images"],
        "train_dreamer.py": [*DREAMER, "--data_dir", slices, "--patient_map", slices / "patient_map.json"]}


def fit_as_sklearn(features, truth, penalty=None, **options):
    """baseline_models.fit_readout on standardised features without a floor; penalty: the only lambda to choose from."""
    from evidence import baseline_models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_models, "FEATURE_SD_FLOOR", 0.0)
        if penalty is not None:
            patch.setattr(baseline_models, "RIDGE_LAMBDAS", np.array([penalty]))
            patch.setattr(baseline_models, "LOGISTIC_LAMBDAS", np.array([penalty]))
        return baseline_models.fit_readout(features, truth, **options)


def class_alarms(probability, label, names):
    """The alarms on (N, C) probabilities of these labels; the second class is the positive one."""
    from evidence import prediction_tables, verdicts
    return verdicts.classification_alarms(prediction_tables.ClassTable(
        keys={}, names=names, baselines={}, positive=1, truth=label, probability=probability))


@pytest.fixture
def quick_folder(tmp_path):
    """An empty folder, in memory where there is room: thousands of checkpoints are forced to disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 4 << 30:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="torture_", dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server():
    """A fork server other than that of run_script, so with another hash seed: it repeats what that one has run."""
    from torture.forkserver import ForkServer
    own = ForkServer()
    yield own
    own.close()
