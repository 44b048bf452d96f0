"""Check that this machine and these data are ready. One row per check: OK, WARN or FAIL, then what to do.

    python verify_setup.py                                           # this machine, in seconds
    python verify_setup.py --task assessor --images_dir ./images --ratings_file ./ratings/table.csv
    python verify_setup.py --task detector --images_dir ./images --json annotations.json
    python verify_setup.py --task video --manifest events.csv --video_root videos
    python verify_setup.py --task dreamer --data_dir data/processed --patient_map patients.json
    python verify_setup.py --full                                    # minutes: also tries every train script
    python verify_setup.py --download_weights resnet50 vit_b_16      # on a machine with internet

With --task video, detector or dreamer further flags name the data: those of the train script's --mode audit (scores of
frame sequences: --config configs/video_scores_small_data.yaml). For the assessor, ./images with the table in ./ratings
need no flag. Writes only to a temporary folder, with --download_weights to the weights cache, and of data too large for
the memory to the cache of decoded pictures.
Exit code 1 if any row says FAIL, else 0. Packages are imported where used, so the table appears without torch too.
"""
import argparse
import collections
import contextlib
import importlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from readers import rating_flags

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
PUBLISHED_TABLE = "per_image_Slider_mean_sd_from_wide.csv"
FIRST_PICTURES = 300  # that are decoded
DRY_RUN_FLAGS = {  # paths are relative to the folder of make_sample_data.py
    "assessor": f"--images_dir assessor/images --ratings_file assessor/ratings/{PUBLISHED_TABLE} "
                "--backbone resnet18 --image_size 64",
    "detector": "--train_json detector/annotations.json --train_images detector/images --split_ratio 0.7 "
                "--group_column street --min_size 64 --max_size 96 --num_workers 0 --model fasterrcnn_resnet18_fpn",
    "dreamer": "--data_dir dreamer --patient_map dreamer/patient_map.json --encoder resnet18 "
               "--image_size 64 --token_type spatial --d_model 48",
    "video": "--manifest video/manifests/all.csv --video_root video/videos --label_map "
             "video/manifests/label_map.json --model cnn_lstm --image_size 32 --n_frames 4"}
WEIGHTS = {
    "assessor": "resnet18 resnet34 resnet50 resnet101 efficientnet_b0 efficientnet_b3 vit_b_16",
    "video": "r3d_18 resnet18",
    "detector": "resnet18 fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_320_fpn",
    "dreamer": "resnet34 resnet18"}
TASKS = tuple(WEIGHTS)
OPENCV = "opencv-python opencv-python-headless opencv-contrib-python opencv-contrib-python-headless".split()
MODULES = {"pillow": "PIL", "opencv-python": "cv2", "PyYAML": "yaml"}  # packages whose module has another name
IMPORT_REMEDIES = {
    "cv2": "where system libraries are missing: apt install libgl1 libglib2.0-0, or without root: "
           "pip uninstall opencv-python; pip install --force-reinstall opencv-python-headless",
    "torchvision": "its release may not match that of torch: pip install --upgrade torch torchvision"}
GIB = 1 << 30
Check = collections.namedtuple("Check", "status name found remedy", defaults=("",))


# --- Python and packages: standard library only --------------------------------

def version_numbers(text):
    """'2.14.1+cu130' -> (2, 14, 1): the leading numbers, for comparison."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", text)[0])))


def read_requirements(path):
    """requirements file with lines `package` or `package>=version` -> {package: lowest version, '' for any}."""
    required = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        package, _, lowest = line.split("#")[0].replace(" ", "").partition(">=")
        if package:
            required[package] = lowest
    return required


def installed_version(package):
    """(name, version) of a package, (name, None) if absent; any build of OpenCV counts as opencv-python."""
    for name in OPENCV if package == "opencv-python" else (package,):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    return package, None


def unmet_requirements(paths):
    """['torch 2.9.1 (needs 2.10 or newer)', 'tqdm is missing', ...] for requirements files; nothing is imported."""
    unmet = []
    for path in paths:
        for package, lowest in read_requirements(path).items():
            name, version = installed_version(package)
            if version is None:
                unmet.append(f"{name} is missing")
            elif version_numbers(version) < version_numbers(lowest):
                unmet.append(f"{name} {version} (needs {lowest} or newer)")
    return unmet


def check_installation():
    """Python, the packages' versions against requirements.txt, then whether each loads."""
    yield check_minimum("Python", sys.version_info, (3, 10), (3, 10), f"{sys.version.split()[0]} in {sys.prefix}",
                        "create the environment with Python 3.10 or newer")
    unmet = unmet_requirements([REQUIREMENTS])
    for fault in unmet:
        yield Check("FAIL", "packages", fault, f"{sys.executable} -m pip install -r {REQUIREMENTS}")
    if not unmet:
        required = read_requirements(REQUIREMENTS)
        yield Check("OK", "packages", ", ".join(" ".join(installed_version(package)) for package in required))
        yield from check_imports(MODULES.get(package, package) for package in required)


def check_imports(modules):
    """Import each module; one row for each that does not load."""
    faults = []
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            remedy = IMPORT_REMEDIES.get(module, f"pip install --force-reinstall {module}, or create a new environment")
            faults.append(Check("FAIL", f"import {module}", " ".join(str(error).split()), remedy))
    yield from faults or [Check("OK", "imports", "every package loads")]


# --- the machine ---------------------------------------------------------------

def check_processor():
    """Processor, and the precision that is fast on it."""
    import common
    import torch
    compute = common.choose_compute("cpu", "auto")
    yield Check("OK", "processor", f"{compute.text}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")


def check_gpu():
    """One row for each GPU, or why there is none."""
    import torch
    if torch.cuda.is_available():
        yield from map(gpu_row, range(torch.cuda.device_count()))
    elif shutil.which("nvidia-smi"):
        yield Check("WARN", "GPU", f"nvidia-smi exists, but torch {torch.__version__} sees no GPU",
                    f"check that it lists a card and CUDA {torch.version.cuda} or newer; SLURM: --gres=gpu:1")
    else:
        yield Check("OK", "GPU", "none with CUDA: everything runs on the CPU")


def gpu_row(index):
    """Name, memory and bf16 of CUDA device number `index`, and whether this torch build computes on it."""
    import torch
    facts = torch.cuda.get_device_properties(index)
    found = (f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {'bf16' if facts.major >= 8 else 'no bf16'}, "
             f"compute capability {facts.major}.{facts.minor}")
    try:
        torch.ones(8, 8, device=f"cuda:{index}").sum().item()
    except RuntimeError as error:  # no kernels for this card
        reason = str(error).splitlines()[0]
        return Check("WARN", f"GPU {index}", f"{found}; torch {torch.__version__} cannot compute on it: {reason}",
                     "a new card: pip install --upgrade torch torchvision; an old one: pip install --force-reinstall "
                     "torch torchvision --index-url https://download.pytorch.org/whl/cu126; or run with --device cpu")
    return Check("OK", f"GPU {index}", found)


def check_minimum(name, value, fail_below, warn_below, found, remedy):
    """Check of a value that should not be small."""
    if value >= warn_below:
        return Check("OK", name, found)
    return Check("FAIL" if value < fail_below else "WARN", name, found, remedy)


def check_space(output_dir):
    """Free space where runs are written and in shared memory, and the number of files a process may open."""
    folder = output_dir.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / GIB
    yield check_minimum("disk", free, 1, 10, f"{free:.1f} GiB free for {output_dir}",
                        "free some space or use another --output_dir")
    if Path("/dev/shm").is_dir():  # loader processes pass batches through it
        free = shutil.disk_usage("/dev/shm").free / GIB
        yield check_minimum("/dev/shm", free, 0, 1, f"{free:.1f} GiB free",
                            "start the container with --shm-size=8g, or use --num_workers 0")
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = math.inf if files == resource.RLIM_INFINITY else files
        yield check_minimum("open files", files, 0, 1024, f"ulimit -n {files}", "run ulimit -n 4096 before training")


def check_model(tasks):
    """Run a small backbone with random weights once; list the published weights that are not in the cache."""
    import torch
    from readers import backbones
    backbone, _ = backbones.build_backbone("resnet18", pretrained=False)
    shape = tuple(backbone.eval()(torch.zeros(1, 3, 224, 224)).shape)
    yield Check("OK", "model", f"resnet18 returns features of shape {shape}")
    missing = [name for name in weights_of(tasks) if not backbones.cached_weights_file(name)[0].exists()]
    yield listing("WARN", "weights not cached", missing, "downloaded at first use; without internet, first run on a "
                      "machine with it: python verify_setup.py --download_weights NAME")


def weights_of(tasks):
    """Names of the published weights that these tasks start from, each once."""
    return dict.fromkeys(" ".join(WEIGHTS[task] for task in tasks).split())


def download_weights(names):
    """Fill the weights cache: a line before and a row after each file, which is loaded once as a check."""
    import common
    import torchvision
    from readers import backbones
    unknown = [name for name in names if name not in torchvision.models.list_models()]
    if unknown:
        raise common.UserError(f"torchvision has no model {', '.join(unknown)}")
    socket.setdefaulttimeout(30)  # fail instead of waiting behind a firewall that drops requests
    for name in names:
        path, url = backbones.cached_weights_file(name)
        say(f"{'reading' if path.exists() else f'downloading {url} to'} {path}")
        try:
            backbones.load_weights(name)
        except common.UserError as error:
            remedy = f"remove {path}" if path.exists() else f"download {url} on another machine and copy it to {path}"
            yield Check("FAIL", name, str(error), remedy)
        else:
            yield Check("OK", name, f"{path.stat().st_size / 1e6:.0f} MB in {path}")


# --- the data ------------------------------------------------------------------

def run_script(script, *flags, folder=None):
    """Run a script of this repository in a folder; returns the process.

    UserError with its complaint where it fails.
    """
    import common
    command = [sys.executable, HERE / script, *flags]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="backslashreplace")
    if result.returncode:
        raise common.UserError(f"{script} ended with exit code {result.returncode}: {result.stderr.strip()[-1000:]}")
    return result


def find_assessor_data(args):
    """(images folder, ratings table): the flags, else ./images with the table in ./ratings, else None."""
    import common
    if bool(args.images_dir) != bool(args.ratings_file):
        raise common.UserError(f"--images_dir needs --ratings_file; found {args.images_dir or args.ratings_file} alone")
    if args.images_dir:
        return args.images_dir, args.ratings_file
    tables = sorted(Path("ratings").glob("*.csv")) if Path("images").is_dir() else []
    tables = [path for path in tables if path.name == PUBLISHED_TABLE] or tables
    if len(tables) > 1:
        raise common.UserError(
            f"{len(tables)} tables in ./ratings: {common.shorten_list(tables)}; name one with --ratings_file")
    return (Path("images"), tables[0]) if tables else None


def check_assessor(args):
    """Audit of a ratings table and its images, where there are any: rows without image, images without row."""
    import common
    from readers import file_names
    named = find_assessor_data(args)
    if not named:
        return
    images_dir, path = named
    yield Check("OK", "data", f"{images_dir}, {path}")
    ratings = yield from check_table(path, args)
    paths, without_row, notes = file_names.match_images(ratings.images, images_dir, args.exact_names)
    yield from (Check("WARN" if note.startswith("WARNING") else "OK", "note", note) for note in notes)
    without_file = [name for name, image in paths.items() if not image]
    yield listing("WARN", "rows without image", without_file, "they will be skipped")
    yield listing("WARN", "images without row", without_row, "they will be skipped")
    found = list(filter(None, paths.values()))
    if not found:
        raise common.UserError(f"no row of {path} has an image in {images_dir}; check --image_column")
    yield from check_images(found)


def check_table(path, args):
    """Rows, targets and missing cells; returns the RatingsTable."""
    import numpy as np

    from readers import rating_tables
    ratings = rating_tables.read_ratings(path, **rating_flags.values_of(args))
    also = " and ".join(name for name in ("sd", "n") if getattr(ratings, name) is not None) or "neither sd nor n"
    yield Check("OK", "ratings", f"{len(ratings.images)} images; {len(ratings.names)} ratings with {also}, means "
                f"{np.nanmin(ratings.mean):g} to {np.nanmax(ratings.mean):g}: {', '.join(ratings.names)}")
    yield from (Check("OK", "note", note) for note in ratings.notes)
    counts = np.isnan(ratings.mean).sum(axis=0)
    gaps = [f"{name} lacks {count} of {len(ratings.images)}" for name, count in zip(ratings.names, counts) if count]
    yield listing("WARN", "missing cells", gaps, "the loss ignores them")
    return ratings


def check_images(paths):
    """Decode the first pictures: the speed, and those that cannot be read; a training run looks at all."""
    from readers import picture_files
    start = time.perf_counter()
    audits = picture_files.ImageStore(paths[:FIRST_PICTURES], 256, cache="none").audit
    speed = len(audits) / (time.perf_counter() - start)
    yield Check("OK", "loading",
                f"{len(audits)} of {len(paths)} pictures to a short side of 256 px: {speed:.0f} a second")
    bad = [f"{audit.path}: {audit.error}" for audit in audits if audit.error]
    yield listing("FAIL", "unreadable images", bad, "fix or remove them, or train with --on_bad_file skip",
                  none=f"none of the {len(audits)} looked at")


def check_by_script(task, flags, temporary):
    """--mode audit of the train script, which knows its formats; flags: where the data are (none: nothing is checked).

    Raises UserError with what could not be read.
    """
    import common
    if not flags:
        return
    output = temporary / f"audit_{task}"
    if task == "dreamer":
        run_script("train_dreamer.py", "--mode", "audit", *flags, "--output_dir", output)
        [path] = output.glob("run_*/audit.json")
        yield from (Check(**check) for check in common.read_json(path)["checks"])
        return
    small = ["--min_size", "128"] if task == "detector" else []  # quicker, and shows as well what is there twice
    done = run_script(f"train_{task}.py", "--mode", "audit", *small, *flags, "--output", output)
    report = common.read_json(output)
    found = done.stdout.strip().removesuffix(f"; written to {output}")
    if counts_anything(report) or report.get("damaged") or "WARNING" in found:
        yield Check("WARN", "data", found, "correct what is counted or marked WARNING; keep copies, and the levels of "
                    "a column that tells the label, on one side of the split")
    else:
        yield Check("OK", "data", found)
    bad = [": ".join(each) for each in report.get("unreadable", {}).items()]
    yield listing("FAIL", "unreadable", bad, "fix or remove them, or train with a larger --max_missing")
    skipped = [": ".join(each.values()) for each in report["skipped"]]
    yield listing("WARN", "left out", skipped, "correct them, or train without them")


def counts_anything(found):
    """Whether an audit's JSON has a count above 0, other than of near neighbours, which every recording has."""
    if "count" in found:
        return found["count"] > 0
    return any(counts_anything(each) for name, each in found.items()
               if isinstance(each, dict) and not name.startswith("near_"))


def listing(status, what, examples, remedy, none="none"):
    """A row of this status with the count and the first of the examples (FAIL: all), OK where there are none."""
    import common
    if not examples:
        return Check("OK", what, none)
    shown = "\n".join(["", *examples]) if status == "FAIL" else f" {common.shorten_list(examples)}"
    return Check(status, what, f"{len(examples)}:{shown}", remedy)


def check_dry_run(task, temporary):
    """Run the train script on sample data: 2 batches, 1 epoch, the whole run folder."""
    run_script("make_sample_data.py", "--task", task, "--output_dir", temporary)
    start = time.perf_counter()
    run_script(f"train_{task}.py", "--dry_run", "--no_pretrained", "--output_dir", temporary / "outputs",
               *DRY_RUN_FLAGS[task].split(), folder=temporary)
    yield Check("OK", f"dry run {task}", f"on sample data, {time.perf_counter() - start:.0f} s")


# --- the table -----------------------------------------------------------------

def parse_args(given):
    """Command line -> (flags of this script, words for the train script's audit); dashes within a flag count as
    underscores."""
    def with_underscores(match):
        return f"--{match[1].replace('-', '_')}"
    words = [re.sub("^--([^=]+)", with_underscores, word) for word in given]
    of_task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_task.add_argument("--task", choices=(*TASKS, "all"), default="all",
                         help="whose data, dry run and weights are checked")
    task = of_task.parse_known_args(words)[0].task
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, parents=[of_task])
    add = parser.add_argument
    add("--full", action="store_true",
        help="also run each train script on sample data: minutes instead of seconds")
    add("--output_dir", type=Path, default=Path("outputs"), help="where runs will be written: its disk is checked")
    add("--download_weights", nargs="*", metavar="NAME", help="only fill the weights cache (no name: all)")
    if task not in ("assessor", "all"):
        return parser.parse_known_args(words)
    add = parser.add_argument_group("data of the assessor").add_argument
    add("--images_dir", type=Path, help="folder of images (default: ./images)")
    add("--ratings_file", type=Path, help="ratings table (default: the one in ./ratings)")
    add("--exact_names", action="store_true",
        help="no guess at the file that a name of another folder or spelling means")
    rating_flags.add_arguments(add)
    return parser.parse_args(words), []


def show(check):
    """Print one row, its further lines, and below it what to do; returns its status."""
    indent = "\n" + " " * 27
    text = f"{check.status:<5} {check.name:<20} {check.found}".replace("\n", indent)
    if check.remedy:
        text += f"{indent}-> {check.remedy}"
    say(text)
    return check.status


def say(text):
    """Print it at once, in ASCII."""
    print(text.encode("ascii", "backslashreplace").decode(), flush=True)


def run_check(name, rows):
    """Print the rows of one check as they come, what stops it as the last; yields their statuses."""
    import common
    try:
        yield from map(show, rows)
    except common.UserError as error:
        yield show(Check("FAIL", name, str(error)))


def machine_and_task_checks(args, audit_flags, tasks, temporary):
    """(name, rows) of the machine, then of the data and, with --full, the dry run of each task."""
    yield "processor", check_processor()
    yield "GPU", check_gpu()
    yield "disk", check_space(args.output_dir)
    yield "model", check_model(tasks)
    for task in tasks:
        own = check_assessor(args) if task == "assessor" else check_by_script(task, audit_flags, temporary)
        yield f"data of {task}", own
        if args.full:
            yield f"dry run {task}", check_dry_run(task, temporary)


def main(argv=None):
    """Print the table; returns the exit code."""
    args, audit_flags = parse_args(sys.argv[1:] if argv is None else argv)
    statuses = list(map(show, check_installation()))
    if "FAIL" in statuses:
        print("Fix these first; the other checks need them.")
        return 1
    tasks = TASKS if args.task == "all" else (args.task,)
    with tempfile.TemporaryDirectory(prefix="verify_setup_") as temporary:
        checks = machine_and_task_checks(args, audit_flags, tasks, Path(temporary))
        if args.download_weights is not None:
            checks = [("--download_weights", download_weights(args.download_weights or weights_of(tasks)))]
        for name, rows in checks:
            statuses += run_check(name, rows)
    print(", ".join(f"{statuses.count(status)} {status}" for status in ("OK", "WARN", "FAIL")))
    if not args.full:
        print("--full also tries every train script on sample data; it takes minutes")
    return int("FAIL" in statuses)


if __name__ == "__main__":
    sys.exit(main())
