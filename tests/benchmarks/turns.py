"""Loops in processes of their own, timed in turn: a busy machine is busy for all, and each has its own memory.

A benchmark calls compare() with its loops. The parent makes the data, starts this benchmark once
more per loop and tells the children one after the other to run an epoch; the first epoch of each is
not timed. Measured per loop: seconds of each epoch, seconds from the start of its process to its
first optimiser step, and the highest memory of the process while it trains (resident, without that
of loader workers; on a GPU what torch has reserved there).
"""
import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def parser_of(description):
    """ArgumentParser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed epochs of each loop, after one that is not timed")
    parser.add_argument("--loops", nargs="+", help="only these, and script")
    parser.add_argument("--workers", type=int, default=2, help="loader workers of the loops that are not the script")
    parser.add_argument("--together", action="store_true",
                        help="start all loops at once: sooner done, but first steps wait for one another")
    parser.add_argument("--more", nargs="+", default=[], metavar="FLAG=VALUE",
                        help="further flags of the script, without their dashes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures as one line of JSON")
    parser.add_argument("--child", nargs=3, metavar=("LOOP", "FOLDER", "START"), help=argparse.SUPPRESS)
    return parser


def more_flags(options):
    """--more as the script's own flags."""
    return [f"--{flag}" for flag in options.more]


class Turn:
    """A child's side: `with turn:` around each epoch waits for the parent's word and reports what it took."""

    def __init__(self, started):
        self.prepare = None  # function () to call before each epoch's clock starts
        self._answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to the other stream
        os.dup2(2, 1)
        self._started, self._first_step = started, None
        from torch.optim.optimizer import register_optimizer_step_post_hook
        register_optimizer_step_post_hook(self._note_step)

    def _note_step(self, *_):
        self._first_step = self._first_step or time.time() - self._started

    def __enter__(self):
        if not sys.stdin.readline():
            os._exit(0)
        if self.prepare:
            self.prepare()
        if self._first_step is None:
            _forget_peak()
        _wait_for_gpu()
        self._begin = time.perf_counter()

    def __exit__(self, kind, *_):
        if kind is None:
            _wait_for_gpu()
            seconds = time.perf_counter() - self._begin
            answer = {"seconds": seconds, "first_step": self._first_step, "peak": _peak()}
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def _wait_for_gpu():
    """A loop that reads no number would stop its clock before the GPU has done anything."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak():
    import torch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest resident size starts again from here
    except OSError:
        pass


def _peak():
    """Bytes: GPU memory where there is a GPU, else the highest resident size since the first epoch."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def compare(file, options, make_data, loops, title, unit, count, goals):
    """Time the loops in turn and print medians and ratios; in a child, run one of them.

    loops: {name: class whose objects (folder, options) have epoch(), or run_all(turn), which never
    ends; prepare(), if there is one, is called before each epoch, untimed}. make_data(folder,
    options) writes what they train on. title: what is timed, in words; unit, count: of an epoch.
    goals: [(over, under, "<=" or ">=", goal)], where over / under is a ratio of seconds. A loop
    with an attribute `package` is skipped by name where that is not installed.
    """
    if options.child:
        return _run_child(loops, options)
    unknown = set(options.loops or ()) - set(loops)
    if unknown:
        raise SystemExit(f"error: --loops {' '.join(sorted(unknown))}: expected some of {' '.join(loops)}")
    wanted = [name for name in loops if name in (options.loops or loops) or name == "script"]
    absent = [name for name in wanted if importlib.util.find_spec(getattr(loops[name], "package", "torch")) is None]
    if absent:
        print(f"skipped: {', '.join(absent)} (not installed: pip install -r tests/benchmarks/requirements.txt)")
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), options)
        children, results = {}, {}
        present = [name for name in wanted if name not in absent]
        if options.together:
            children = {name: Child(file, name, folder) for name in present}
        for name in present:  # each is alone until its first epoch is over: its first step waits for nobody
            if name not in children:
                children[name] = Child(file, name, folder)
            try:
                results[name] = [children[name].epoch()]
            except SystemExit as error:
                if name == "script":
                    raise
                print(f"skipped: {name}: {error}", flush=True)
                del children[name]
        for _ in range(options.repeats):
            for name, child in children.items():
                results[name].append(child.epoch())
        for child in children.values():
            child.close()
    report = summarise(results, title, unit, count, goals)
    print(as_text(report), flush=True)
    if options.json:
        with open(options.json, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(report) + "\n")
    return report


class Child:
    """The parent's side of one loop in a process of its own; what it prints is shown where it fails."""

    def __init__(self, file, name, folder):
        self.name, self.log = name, Path(folder) / f"{name}.log"
        command = [sys.executable, file, *sys.argv[1:], "--child", name, folder, repr(time.time())]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            text=True)

    def epoch(self):
        """Have it run an epoch; returns what Turn measured."""
        try:
            self.process.stdin.write("epoch\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.log.read_text()[-2000:]}\nthe loop {self.name} ended with exit code "
                             f"{self.process.wait()}")
        return json.loads(line)

    def close(self):
        """Have it end."""
        self.process.stdin.close()
        self.process.wait(60)


def _run_child(loops, options):
    name, folder, started = options.child
    turn = Turn(float(started))
    loop = loops[name](Path(folder), options)
    turn.prepare = getattr(loop, "prepare", None)
    if hasattr(loop, "run_all"):
        loop.run_all(turn)
    while True:
        with turn:
            loop.epoch()


def summarise(results, title, unit, count, goals):
    """What the children measured -> a dict of plain numbers; the first epoch counts for memory and first step only."""
    seconds = {name: [each["seconds"] for each in rows[1:]] for name, rows in results.items()}
    loops = {name: {"seconds": values, "median": statistics.median(values), "peak": results[name][-1]["peak"],
                    "first_step": results[name][0]["first_step"]} for name, values in seconds.items()}
    ratios = []
    for over, under, sign, goal in goals:
        if over in seconds and under in seconds:
            each = [a / b for a, b in zip(seconds[over], seconds[under])]
            ratios.append({"over": over, "under": under, "goal": f"{sign} {goal}", "low": min(each), "high": max(each),
                           "ratio": loops[over]["median"] / loops[under]["median"]})
    return {"title": title, "unit": unit, "count": count, "loops": loops, "ratios": ratios}


def as_text(report):
    """A summary as a Markdown heading with two tables."""
    repeats = len(next(iter(report["loops"].values()))["seconds"])
    lines = [f"\n### {report['title']}, medians of {repeats} epochs in turn\n",
             f"| loop | seconds | {report['unit']}/s | first step, s | peak memory, GB |", "|---|---|---|---|---|"]
    for name, loop in report["loops"].items():
        lines.append(f"| {name} | {loop['median']:.2f} | {report['count'] / loop['median']:.2f} | "
                     f"{loop['first_step']:.1f} | {loop['peak'] / 2**30:.2f} |")
    lines += ["\n| ratio of seconds | | range | goal |", "|---|---|---|---|"]
    lines += [f"| {each['over']} / {each['under']} | {each['ratio']:.2f} | {each['low']:.2f} to {each['high']:.2f} | "
              f"{each['goal']} |" for each in report["ratios"]]
    return "\n".join(lines)
