"""What can happen to a job of train_assessor.sh on SLURM; run by run.sh, which starts one.

Each scenario is one case or two: in all of them the run must end with the bits of one that was left alone.
"""
import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "torture")]
import common  # noqa: E402
from test_ranks import rank_environments  # noqa: E402
from test_resume import fingerprint  # noqa: E402

FLAGS = ("--backbone shufflenet_v2_x0_5 --no_pretrained --image_size 32 --batch_size 8 --group_column subject "
         "--save_minutes 0.01 --epochs 40 --patience 0 --keep_last").split()
LONG = "1000"  # epochs that take longer than a time limit, on a quick machine too
ROOM = "--gres=none --mem=1G --cpus-per-task=2".split()  # what these nodes have, instead of a GPU
DREAMER = ("--encoder resnet18 --no_pretrained --image_size 32 --token_type spatial --d_model 32 --n_layers 1 "
           "--n_heads 2 --feedforward 32 --batch_size 8 --optimizer sgd --save_minutes 0.01 --epochs 8 --keep_last").split()


def shell(*words):
    """Output of a command of SLURM."""
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


class Job:
    """A job of train_assessor.sh in the copy of the repository; `out` is its output folder.

    The names of these nodes lead nowhere, and so the job is told where its processes meet.
    """

    def __init__(self, lab, name, flags, *options, out=None):
        self.lab, self.out = lab, lab.work / (out or f"out {name}")
        words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={lab.work}/logs/{name}_%a.out", *ROOM,
                 *options, "train_assessor.sh", *flags, "--output_dir", self.out]
        self.log = lab.work / "logs" / f"{name}_4294967294.out"  # what SLURM writes for %a outside of an array
        self.id = subprocess.run([*map(str, words)], cwd=lab.repo, capture_output=True, text=True, check=True,
                                 timeout=60, env={**os.environ, "MASTER_ADDR": "127.0.0.1"}).stdout.strip()

    def text(self):
        """What the job has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, pattern, count=1, seconds=240):
        """Wait until the pattern stands in the job's output that often."""
        end = time.monotonic() + seconds
        while len(re.findall(pattern, self.text())) < count:
            assert time.monotonic() < end, f"no {pattern!r} in {seconds} s:\n{self.text()[-2000:]}"
            time.sleep(0.1)

    def training(self, start=1):
        """Wait until the job has trained an epoch since this start."""
        self.wait_for(rf"job \S+, start {start},(.|\n)*?epoch \d+/\d+  ")
        return self

    def signal(self, number="USR1", element=""):
        """scancel --signal: the signal of SLURM to all processes of the job's step."""
        shell("scancel", f"--signal={number}", f"{self.id}{element}")
        return self

    def ended(self, seconds=300):
        """Wait until the queue holds no more of it; returns (state, exit code) as SLURM reports them."""
        end = time.monotonic() + seconds
        while shell("squeue", "-h", "-j", self.id, "--states=all", "-o", "%T") and not self._is_over():
            assert time.monotonic() < end, f"job not over in {seconds} s:\n{self.text()[-2000:]}"
            time.sleep(0.3)
        record = shell("scontrol", "show", "job", self.id)
        return re.search(r"JobState=(\w+)", record)[1], re.search(r"ExitCode=(\d+):", record)[1]

    def _is_over(self):
        states = shell("squeue", "-h", "-j", self.id, "--states=all", "-o", "%T").split()
        return all(state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") for state in states)

    def run(self, n=1):
        """The run folder; there are to be n with a record, and none being made."""
        runs = sorted(folder for folder in self.out.glob("run_*") if (folder / "args.json").exists())
        assert len(runs) == n, f"expected {n} run folders, found {runs}:\n{self.text()[-2000:]}"
        return runs[0]

    def starts(self):
        """How often SLURM started it."""
        return len(re.findall(r"^job \S+, start \d+,", self.text(), re.MULTILINE))

    def has_bits_of(self, kind):
        """The run's weights, optimiser, history and best model are those of the local run that was left alone."""
        assert self.ended() == ("COMPLETED", "0"), f"{self.ended()}:\n{self.text()[-2000:]}"
        local = next((self.lab.work / f"local_{kind}").glob("run_*"))
        histories = [(run / "training_history.csv").read_text() for run in (local, self.run())]
        assert histories[0] == histories[1], f"{self.run()}: another history than the local run's"
        assert fingerprint(self.run()) == self.lab.expected[kind], "other bits than the local run"


class Lab:
    """A copy of the repository, data, and the fingerprints of undisturbed local runs."""

    def __init__(self, work):
        self.work, self.repo, self.expected = work, work / "repo", {}
        for folder in (self.repo / "logs", work / "logs"):
            folder.mkdir(parents=True)
        for path in (*ROOT.glob("*.py"), ROOT / "train_assessor.sh"):
            shutil.copy(path, self.repo)
        for room in ("readers", "evidence"):
            shutil.copytree(ROOT / room, self.repo / room)
        for task, n in (("assessor", 30), ("dreamer", 48)):
            self.local("make_sample_data.py", ["--task", task, "--output_dir", work / "data", "--n_samples", n])
        pictures, slices = work / "data" / "assessor", work / "data" / "dreamer"
        self.flags = [*FLAGS, "--images_dir", pictures / "images", "--ratings_file",
                      pictures / "ratings" / "per_image_Slider_mean_sd_from_wide.csv"]
        self.dreamer = [*DREAMER, "--data_dir", slices, "--patient_map", slices / "patient_map.json"]
        kinds = {"one": ("train_assessor.py", self.flags, 1), "two": ("train_assessor.py", self.flags, 2),
                 "long": ("train_assessor.py", [*self.flags, "--epochs", LONG], 1),
                 "dreamer": ("train_dreamer.py", self.dreamer, 1)}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            self.expected = dict(zip(kinds, pool.map(lambda kind: self.local_run(kind, *kinds[kind]), kinds)))

    def local(self, script, flags, env=None):
        """Start a script of the copy here, without SLURM."""
        process = subprocess.Popen([sys.executable, str(self.repo / script), *map(str, flags)], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})})
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-2000:]

    def local_run(self, kind, script, flags, size):
        """Fingerprint of a local run by `size` processes."""
        out = self.work / f"local_{kind}"
        environments = rank_environments(size) if size > 1 else [{}]
        with concurrent.futures.ThreadPoolExecutor(size) as pool:
            list(pool.map(lambda env: self.local(script, [*flags, "--output_dir", out], env), environments))
        return fingerprint(next(out.glob("run_*")))


# --- scenarios: each is a function of the lab; its docstring is its name in the output --------------

def undisturbed(lab):
    """left alone"""
    Job(lab, "alone", [*lab.flags, "--num_workers", 0]).has_bits_of("one")


def undisturbed_workers(lab):
    """left alone, 2 workers"""
    Job(lab, "alone2", [*lab.flags, "--num_workers", 2]).has_bits_of("one")


def signalled(lab):
    """USR1: saved, requeued, continued"""
    job = Job(lab, "usr1", [*lab.flags, "--num_workers", 0]).training().signal()
    job.has_bits_of("one")
    assert job.starts() == 2 and "requeued" in job.text()


def signalled_workers(lab):
    """USR1 with 2 workers"""
    job = Job(lab, "usr1w", [*lab.flags, "--num_workers", 2]).training().signal()
    job.has_bits_of("one")
    assert job.starts() == 2


def signalled_three_times(lab):
    """USR1 three times"""
    job = Job(lab, "usr3", [*lab.flags, "--num_workers", 0])
    for start in (1, 2, 3):
        job.training(start).signal()
    job.has_bits_of("one")
    assert job.starts() == 4


def time_limit(lab):
    """SLURM's own time limit, requeued each time"""
    # this SLURM sends the signal up to a minute earlier than asked for
    job = Job(lab, "limit", [*lab.flags, "--epochs", LONG, "--num_workers", 2], "--time=2", "--signal=USR1@40")
    assert job.ended(1200) == ("COMPLETED", "0"), job.text()[-2000:]
    job.has_bits_of("long")
    assert job.starts() >= 2, "the limit was never reached"


def array(lab):
    """array: only the signalled element restarts"""
    job = Job(lab, "array", [*lab.flags, "--num_workers", 0], "--array=0-1")
    logs = [lab.work / "logs" / f"array_{element}.out" for element in (0, 1)]
    job.log = logs[0]
    job.training().signal(element="_0")
    job.ended()
    texts = [log.read_text() for log in logs]
    assert "start 2," in texts[0] and "start 2," not in texts[1]
    job.run(2)
    runs = sorted(job.out.glob("run_*"))
    assert [fingerprint(run) for run in runs] == [lab.expected["one"]] * 2


def two_nodes(lab):
    """two nodes, one process on each"""
    job = Job(lab, "nodes", [*lab.flags, "--num_workers", 0], "--nodes=2", "--ntasks=2")
    job.has_bits_of("two")
    assert "processes: 2" in job.text() and job.text().count("open next") == 1


def two_nodes_signalled(lab):
    """two nodes, USR1"""
    job = Job(lab, "nodes2", [*lab.flags, "--num_workers", 2], "--nodes=2", "--ntasks=2").training().signal()
    job.has_bits_of("two")
    assert job.starts() == 2


def cancelled(lab):
    """scancel: not requeued; the same command continues it"""
    job = Job(lab, "cancel", [*lab.flags, "--num_workers", 0]).training()
    shell("scancel", job.id)
    assert job.ended()[0] == "CANCELLED" and job.starts() == 1
    Job(lab, "cancel2", [*lab.flags, "--num_workers", 0], out=job.out.name).has_bits_of("one")


def mistake(lab):
    """a wrong flag fails at once with code 2"""
    job = Job(lab, "mistake", [*lab.flags, "--learning_rat", "1"])
    assert job.ended() == ("FAILED", "2") and job.starts() == 1


def no_progress(lab):
    """stopped before the first step: requeued once, not twice"""
    job = Job(lab, "early", [*lab.flags, "--num_workers", 0])
    for start in (1, 2):
        job.wait_for("run folder:", start)
        job.signal()
    assert job.ended() == ("FAILED", "75") and "made no progress" in job.text() and job.starts() == 2


def other_script(lab):
    """another script as the first argument, USR1"""
    job = Job(lab, "dreamer", ["train_dreamer.py", *lab.dreamer, "--num_workers", 0]).training().signal()
    job.has_bits_of("dreamer")
    assert job.starts() == 2


def finished_again(lab):
    """a finished job that is requeued says so"""
    job = Job(lab, "again", [*lab.flags, "--num_workers", 0])
    job.has_bits_of("one")
    shell("scontrol", "requeue", job.id)
    job.wait_for("is finished: nothing to continue")
    assert job.ended() == ("COMPLETED", "0")
    job.has_bits_of("one")


def killed(lab):
    """kill -9 of the script: failed; the same command continues it"""
    job = Job(lab, "killed", [*lab.flags, "--num_workers", 0]).training()
    for pid in subprocess.run(["pgrep", "-f", f"train_assessor.py .*{job.out.name}"], capture_output=True,
                              text=True).stdout.split():
        if "srun" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    assert job.ended()[0] == "FAILED"
    Job(lab, "killed2", [*lab.flags, "--num_workers", 0], out=job.out.name).has_bits_of("one")


def two_jobs(lab):
    """two jobs with the same flags at once: a folder each"""
    first = Job(lab, "same1", [*lab.flags, "--num_workers", 0], out="same").training()
    second = Job(lab, "same2", [*lab.flags, "--num_workers", 0], out="same").training()
    assert [job.ended() for job in (first, second)] == [("COMPLETED", "0")] * 2, second.text()[-2000:]
    first.run(2)
    assert [fingerprint(run) for run in first.out.glob("run_*")] == [lab.expected["one"]] * 2


def preempted(lab):
    """preempted by a job of a higher partition"""
    job = Job(lab, "preempt", [*lab.flags, "--num_workers", 2], "--nodelist=n1", "--exclusive").training()
    shell("sbatch", "-p", "high", "--nodelist=n1", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 2")
    job.wait_for("start 2,")
    job.has_bits_of("one")


def node_down(lab):
    """the node goes down: SLURM itself starts it again"""
    job = Job(lab, "down", [*lab.flags, "--num_workers", 0], "--nodelist=n2").training()
    shell("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(2)
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], capture_output=True)  # or it is back already
    job.wait_for("start 2,")
    job.has_bits_of("one")


SIDE_BY_SIDE = [time_limit, undisturbed, undisturbed_workers, signalled, signalled_workers, signalled_three_times,
                array, two_nodes, two_nodes_signalled, cancelled, mistake, no_progress, other_script, finished_again,
                killed, two_jobs]
ONE_BY_ONE = [preempted, node_down]


def attempt(scenario, lab):
    """Run one scenario; True when it held."""
    start = time.monotonic()
    try:
        scenario(lab)
    except Exception:
        print(f"FAIL {scenario.__doc__}\n{traceback.format_exc()}", flush=True)
        return False
    print(f"ok   {scenario.__doc__} ({time.monotonic() - start:.0f} s)", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--fault_table", type=Path)
    args = parser.parse_args()
    lab = Lab(args.work)

    def wanted(scenarios):
        return [each for each in scenarios if not args.names or each.__name__ in args.names]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        held = list(pool.map(lambda each: attempt(each, lab), wanted(SIDE_BY_SIDE)))
    held += [attempt(each, lab) for each in wanted(ONE_BY_ONE)]
    print(f"slurm: {sum(held)} passed, {len(held) - sum(held)} failed")
    if args.fault_table:
        with open(args.fault_table, "a", encoding="utf-8") as table:
            result = "all held" if all(held) else f"{held.count(False)} FAILED"
            table.write(f"| real SLURM, two nodes | {len(held)} | {result} |\n")
    sys.exit(0 if held and all(held) else common.EXIT_CRASH)


if __name__ == "__main__":
    main()
