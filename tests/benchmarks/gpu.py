"""What only a GPU can show: are results the same in every precision, resumed and repeated, and how fast is a step?

    tests/benchmarks/gpu.sh OUT                 # all of it, at most 25 minutes
    tests/benchmarks/gpu.sh OUT --minutes 7     # begin with the same, end sooner
    tests/benchmarks/gpu.sh OUT --small         # tiny settings: does it run? also on a CPU

One Markdown table, OUT/gpu.md, is written row by row, so that a run that is cut leaves
what it has measured:

    speed       training passes of each script against the bare loop, a plain loop and packages (see assessor.py, ...)
    profile     waits for the device a step, where the host's time goes, part of the time that the GPU works, and the
                ten costliest kernels
    repeats     with --deterministic two runs give the same bits, and so does one that was stopped and continued
    precision   bf16 and fp16 against fp32, three seeds each: the validation metric after a fixed last epoch
    compile     a training pass with --compile and without, and what compiling takes
"""
import argparse
import concurrent.futures
import importlib
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

import equality
import turns

import common

HERE = Path(__file__).resolve()
PARTS = ("speed", "profile", "repeats", "precision", "compile")  # in this order
SIZES = {  # of a training pass: (on a GPU, --small)
    "assessor": ("--backbone resnet50 --images 4096 --side 512 --batch_size 64",
                 "--backbone resnet18 --images 8 --side 256 --batch_size 4"),
    "video": ("--model r3d_18 --clips 256 --side 320 --batch_size 16",
              "--model r3d_18 --clips 4 --side 96 --batch_size 2"),
    "detector": ("--model fasterrcnn_resnet50_fpn --images 256 --side 1024 --min_size 640 --batch_size 8",
                 "--images 4 --side 96 --min_size 64 --batch_size 2"),
    "dreamer": ("--transitions 512 --batch_size 32",
                "--transitions 4 --side 32 --batch_size 2 --d_model 48 --n_layers 1 --encoder resnet18"),
}
TASKS = ("assessor", "clips", "detector", "dreamer")  # of equality.py: small runs to their end
COMPILED = ("assessor", "video", "dreamer")  # train_detector.py refuses --compile
SEEDS = (1, 2, 3)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of gpu.md")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin nothing new, and cut what runs, after this")
    parser.add_argument("--small", action="store_true", help="tiny settings, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure, in this order")
    parser.add_argument("--tasks", nargs="+", choices=tuple(SIZES), default=list(SIZES), help="of these scripts")
    return parser.parse_args()


# --- the table, and commands within the time -------------------------------------------------

class Table:
    """Rows of gpu.md, each written and printed as soon as it is known."""

    def __init__(self, path, minutes):
        self.path = path
        self.started = time.monotonic()
        self.ends = self.started + 60 * minutes
        packages = {name: find_version(name) for name in ("torchvision", "timm", "lightning", "fastai", "av")}
        listed = ", ".join(f"{name} {version}" for name, version in packages.items())
        path.write_text(f"# {device_name()}\n\ntorch {torch.__version__} (CUDA {torch.version.cuda}), {listed}; "
                        f"{common.count_cores()} cores\n\n| what | measured | goal | reached |\n|---|---|---|---|\n")
        print(path.read_text(), end="", flush=True)

    def row(self, what, measured, goal="", reached=None):
        """reached: True, False, or None where there is nothing to reach."""
        word = {True: "yes", False: "NO", None: ""}[reached]
        line = f"| {what} | {measured} | {goal} | {word} |"
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        print(f"{line}  [{time.monotonic() - self.started:.0f} s]", flush=True)

    def seconds_left(self):
        return self.ends - time.monotonic()


def find_version(package):
    """Version of an installed package, or 'none'."""
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def device_name():
    """The card, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else common.choose_compute("cpu", "off").text


class Failed(Exception):
    """A command that did not end well; its text says why in a line."""


def run(command, table, **options):
    """Output of a command that ends in time and well."""
    if table.seconds_left() < 5:
        raise Failed("not measured: no time left")
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, **options)
    try:
        text, _ = process.communicate(timeout=table.seconds_left())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        raise Failed("cut: no time left") from None
    if process.returncode:
        print(text[-3000:], flush=True)
        raise Failed(f"failed, exit code {process.returncode}: {common.one_line(last_line(text))}")
    return text


def last_line(text):
    return (text.strip().splitlines() or [""])[-1]


# --- speed -------------------------------------------------------------------------------------

def measure_speed(table, options):
    """Rows of each script's training pass against the others, all timed in turn."""
    for name in options.tasks:
        file = options.out / f"{name}.jsonl"
        file.unlink(missing_ok=True)
        command = [sys.executable, HERE.with_name(f"{name}.py"), *sizes(name, options), "--json", file, "--together",
                   "--workers", 1 if options.small else common.resolve_workers("auto", False),
                   "--repeats", n_repeats(options), "--loops", "bare", "reference"]
        if name == "assessor":
            command += ["timm", "lightning", "fastai"]
        try:
            print(run(command, table), flush=True)
        except Failed as reason:
            table.row(f"speed, {name}", reason)
            continue
        write_speed(table, json.loads(file.read_text().splitlines()[-1]))


def n_repeats(options):
    """Timed epochs of each loop."""
    if options.small:
        return 1
    return 2 if options.minutes < 15 else 5


def write_speed(table, report):
    loops = report["loops"]
    what = report["title"]
    script = loops["script"]
    table.row(what, f"{report['count'] / script['median']:.1f} {report['unit']}/s, an epoch {script['median']:.2f} s, "
                    f"first step after {script['first_step']:.1f} s")
    for each in report["ratios"]:
        goals = {"bare": ("<= 1.05", each["ratio"] <= 1.05), "script": ("> 1", each["ratio"] > 1)}
        goal, reached = goals.get(each["under"], ("", None))
        table.row(f"{what}: {each['over']} / {each['under']}",
                  f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})", goal, reached)
    memory = ", ".join(f"{name} {loop['peak'] / 2 ** 30:.2f}" for name, loop in loops.items())
    table.row(f"{what}: peak memory, GB", memory)


def sizes(name, options):
    return SIZES[name][options.small].split()


# --- whole runs: repeats and precision -------------------------------------------------------

def forced(precision):
    """How a run is made to compute in this precision: (wrapper, flags)."""
    if precision == "fp32":
        return [], ["--use_amp", "off"]
    return [HERE, "--force", precision], ["--use_amp", "auto"]


def force_precision(precision, script, *flags):
    """Run a script whose fast precision is this one, in this process."""
    common.fast_precision = lambda device: precision
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def command_of(made, out, *flags, wrapper=()):
    script, own, _ = made
    return [sys.executable, *wrapper, turns.ROOT / script, *own, "--num_workers", 2, "--output_dir", out,
            "--save_minutes", 0, *flags]


def run_folder(out):
    return next(Path(out).glob("run_*"))


def short(task, options):
    """Flags for quick runs in the small form."""
    if not options.small:
        return []
    sides = ["--min_size", 64, "--max_size", 96] if task == "detector" else ["--image_size", 32]
    return ["--epochs", 2, *sides]


def in_parallel(options, jobs):
    """{key: future} of functions without arguments; small runs share the GPU."""
    n_threads = 1 if options.small else max(1, common.count_cores() // 2)
    pool = concurrent.futures.ThreadPoolExecutor(n_threads)
    return {key: pool.submit(job) for key, job in jobs.items()}


def make_tasks(options):
    """{task: (script, flags, column)} with its sample data, made once."""
    def make(name):
        place = options.folder / name
        place.mkdir()
        return getattr(equality, name)(place)
    if options.made is None:
        names = [name for name in TASKS if name.replace("clips", "video") in options.tasks]
        futures = in_parallel(options, {name: lambda name=name: make(name) for name in names})
        options.made = {name: future.result() for name, future in futures.items()}
    return options.made


def measure_repeats(table, options):
    """With --deterministic: the same run twice, and once more stopped after its first epoch and continued."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = make_tasks(options)
        jobs = {}
        for name, task in made.items():
            flags = ["--deterministic", *short(name, options)]
            for way in ("first", "second"):
                jobs[name, way] = lambda task=task, out=folder / f"{name}_{way}", flags=flags: run(
                    command_of(task, out, *flags), table)
            jobs[name, "stopped"] = lambda task=task, out=folder / f"{name}_stopped", flags=flags: stop_and_continue(
                command_of(task, out, *flags), out, task[0], table)
        found = in_parallel(options, jobs)
        for name in made:
            what = f"repeats, {made[name][0]} ({name}) with --deterministic"
            try:
                for way in ("first", "second", "stopped"):
                    found[name, way].result()
            except Failed as reason:
                table.row(what, reason, "same bits", False if "no time" not in str(reason) else None)
                continue
            first, second, stopped = (run_folder(folder / f"{name}_{way}") for way in ("first", "second", "stopped"))
            again = same_bits(first, second)
            resumed = same_bits(first, stopped)
            table.row(what, f"twice: {again}; stopped and continued: {resumed}", "same bits",
                      again == resumed == "same bits")


def stop_and_continue(command, out, script, table):
    """Run a command, stop it by SIGTERM after its first epoch, and continue it."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGTERM)
        if table.seconds_left() < 0:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed("cut: no time left")
    if process.wait() != common.EXIT_SAVED:
        print("".join(lines)[-3000:], flush=True)
        raise Failed(f"stopped by SIGTERM: expected exit code {common.EXIT_SAVED}, found {process.returncode}: "
                     f"{common.one_line(last_line(''.join(lines)))}")
    return run([sys.executable, turns.ROOT / script, "--resume", run_folder(out)], table)


def same_bits(one, other):
    """'same bits', or what differs in the history and the weights of the best epoch of two runs."""
    if (one / "training_history.csv").read_bytes() != (other / "training_history.csv").read_bytes():
        return "training_history.csv differs"
    weights = [common.read_checkpoint(each / "best_model.pth")["model"] for each in (one, other)]
    differ = [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])]
    return f"{len(differ)} weights differ" if differ else "same bits"


def measure_precision(table, options):
    """bf16 and fp16 against fp32: the same seeds, split, first weights and draws."""
    precisions = ("fp32", "bf16", "fp16")[:2 if options.small else 3]
    seeds = SEEDS[:2] if options.small else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = make_tasks(options)
        jobs = {}
        for name, task in made.items():
            for precision in precisions:
                wrapper, flags = forced(precision)
                for seed in seeds:
                    jobs[name, precision, seed] = lambda command=command_of(
                        task, folder / f"{name}_{precision}_{seed}", *flags, *short(name, options), "--seed", seed,
                        wrapper=wrapper): run(command, table)
        found = in_parallel(options, jobs)
        for name, (script, _, column) in made.items():
            values = {}
            try:
                for precision in precisions:
                    for seed in seeds:
                        found[name, precision, seed].result()
                    values[precision] = [last_value(folder / f"{name}_{precision}_{seed}", column) for seed in seeds]
            except Failed as reason:
                table.row(f"precision, {script} ({name})", reason)
                continue
            for precision in precisions[1:]:
                write_precision(table, f"{precision} against fp32, {script} ({name}), {column}", values["fp32"],
                                values[precision])


def last_value(out, column):
    lines = (run_folder(out) / "training_history.csv").read_text().splitlines()
    return float(dict(zip(lines[0].split(","), lines[-1].split(",")))[column])


def write_precision(table, what, plain, fast):
    difference = statistics.mean(fast) - statistics.mean(plain)
    spread = statistics.stdev(plain)
    fast, plain = (" ".join(f"{value:.4f}" for value in values) for values in (fast, plain))
    table.row(what, f"{fast} against {plain}: {difference:+.4f}, SD over seeds {spread:.4f}", "within the SD",
              abs(difference) <= spread)


# --- one script in this process: profile and compile -------------------------------------------

def start_loop(name, options, *more):
    """The script's own epochs over made data, the number of its batches, and function () that makes the bare loop."""
    module = importlib.import_module(name)
    sys.argv = [f"train_{name}.py", *sizes(name, options)]
    if more:
        sys.argv += ["--more", *more]
    own = module.parse_args()
    folder = Path(tempfile.mkdtemp())
    module.make_data(folder, own)
    loop = module.ScriptEpochs(folder, own)
    return loop, len(loop.loader.batch_sampler), lambda: module.BareEpochs(folder, own)


def timed(loop):
    started = time.perf_counter()
    loop.epoch()
    wait_for_gpu()
    return time.perf_counter() - started


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(name, options):
    """Print as JSON: waits a step, seconds an epoch and of the host, part that the GPU works, the costliest kernels."""
    from torch.profiler import ProfilerActivity
    loop, n_batches, make_bare = start_loop(name, options)
    loop.epoch()
    seconds = statistics.median(timed(loop) for _ in range(1 if options.small else 3))
    waits = count_waits(loop) / n_batches
    host = host_seconds(loop)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        profiled = timed(loop)
    costs = kernel_costs(profiler)
    total = sum(costs.values())
    listed = sorted(costs.items(), key=lambda item: -item[1])[:10]
    del loop
    print(json.dumps({
        "batches": n_batches, "seconds": seconds, "waits": waits, "profiled": profiled, "host": host,
        "bare": queueing_seconds(make_bare()), "busy": total / seconds,
        "top": [[kernel[:60], share / total] for kernel, share in listed]}))


def host_seconds(loop):
    """Seconds of the host in an epoch of the script: until it has a batch, in Training.step, and in all till its end.

    A GPU works on its own meanwhile; where the host takes as long as the epoch, it is
    the host that the GPU waits for.
    """
    training = loop.training
    spent = {}

    def timed_batches(loader, batches=training.batches):
        spent.update(batch=0.0, step=0.0)  # of this epoch alone
        iterator = batches(loader)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            spent["batch"] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def timed_step(*losses, step=training.step, **parts):
        started = time.perf_counter()
        step(*losses, **parts)
        spent["step"] += time.perf_counter() - started
    training.batches = timed_batches
    training.step = timed_step
    try:
        spent["all"], spent["epoch"] = queueing_seconds(loop)
    finally:
        del training.batches, training.step
    return spent


def queueing_seconds(loop):
    """Of the second of two epochs: seconds until the host has given the device all its work, and until that is done."""
    def measure():
        if hasattr(loop, "prepare"):
            loop.prepare()
        wait_for_gpu()
        started = time.perf_counter()
        loop.epoch()
        queued = time.perf_counter() - started
        wait_for_gpu()
        return queued, time.perf_counter() - started
    measure()
    return measure()


def kernel_costs(profiler):
    """{kernel, on a CPU operation: seconds}"""
    costs = {}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if torch.cuda.is_available():
            is_kernel = on_gpu and not getattr(event, "is_user_annotation", False)
            value = event.time_range.elapsed_us() if is_kernel else 0
        else:
            value = event.self_cpu_time_total
        if value:
            costs[event.name] = costs.get(event.name, 0.0) + value / 1e6
    return costs


def count_waits(loop):
    """How often an epoch of the script waits for the device, as torch itself counts; NaN without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loop.epoch()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


def measure_profile(table, options):
    for name in options.tasks:
        try:
            found = child("profile", name, table, options)
        except Failed as reason:
            table.row(f"profile, {name}", reason)
            continue
        what = f"train_{name}.py, {found['batches']} batches an epoch, epochs in a row"
        goal = ("at most 1", found["waits"] <= 1) if name != "detector" else ("torchvision's own count", None)
        table.row(f"{what}: seconds an epoch", f"{found['seconds']:.3f}")
        if found["waits"] == found["waits"]:
            table.row(f"{what}: waits for the device a step", f"{found['waits']:.2f}", *goal)
        write_host(table, what, found)
        table.row(f"{what}: the device works", f"{found['busy']:.0%} of the time")
        top = "; ".join(f"{kernel.replace('|', ' ')} {share:.0%}" for kernel, share in found["top"])
        table.row(f"{what}: where the device's time goes", top)


def write_host(table, what, found):
    """Where the host's time goes, beside the bare loop: is it the host, the loader or the device that a step waits for?"""
    host = {name: 1000 * seconds / found["batches"] for name, seconds in found["host"].items()}
    queued, done = (1000 * seconds / found["batches"] for seconds in found["bare"])
    forward = host["all"] - host["batch"] - host["step"]
    table.row(f"{what}: ms of the host a step",
              f"{host['batch']:.2f} for the batch, {forward:.2f} for input, forward and loss, {host['step']:.2f} in "
              f"Training.step, of {host['epoch']:.2f}; the bare loop {queued:.2f} of {done:.2f}")


def compile_loop(name, options):
    """Print as JSON: seconds an epoch with --compile and without, and of the first epoch with it."""
    seconds = {}
    first = {}
    for way, more in (("off", []), ("on", ["compile"])):
        loop, *_ = start_loop(name, options, *more)
        first[way] = timed(loop)
        seconds[way] = statistics.median(timed(loop) for _ in range(1 if options.small else 3))
        del loop
    print(json.dumps({"seconds": seconds, "first": first}))


def measure_compile(table, options):
    for name in COMPILED:
        if name not in options.tasks:
            continue
        what = f"train_{name}.py --compile"
        try:
            found = child("compile", name, table, options)
        except Failed as reason:
            table.row(what, reason)
            continue
        seconds = found["seconds"]
        table.row(what, f"{seconds['off'] / seconds['on']:.2f} times as fast ({seconds['off']:.3f} to "
                        f"{seconds['on']:.3f} s an epoch); first epoch {found['first']['on']:.0f} s, without "
                        f"{found['first']['off']:.0f} s")


def child(part, name, table, options):
    """What a process of its own prints as its last line, from JSON."""
    command = [sys.executable, HERE, "--child", part, name, *(["--small"] if options.small else [])]
    return json.loads(last_line(run(command, table)))


MEASURES = {"speed": measure_speed, "repeats": measure_repeats, "precision": measure_precision,
            "profile": measure_profile, "compile": measure_compile}


def main():
    if sys.argv[1:2] == ["--force"]:
        force_precision(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--child"]:
        part, name, *rest = sys.argv[2:]
        {"profile": profile, "compile": compile_loop}[part](name, SimpleNamespace(small="--small" in rest))
        return
    options = parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(options.out / "gpu.md", options.minutes)
    options.made = None
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for part in options.parts:
            MEASURES[part](table, options)
    print(f"written: {table.path}", flush=True)


if __name__ == "__main__":
    main()
