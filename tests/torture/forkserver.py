"""Runs of the train scripts without the seconds that imports take: a server imports everything once and forks per run.

Started as a program it is the server: a JSON line a request on its input, one a response on its output. A run is a
process group of its own, with the signals, exit code and interpreter exit of `python train_x.py`; it differs in that
the modules are loaded and that runs of one server share a hash seed, so references come from another server. Where
BLANK_PLOTS is set, all plots are saved blank: drawing them takes up to half of a short run. Where QUICK_EXIT is set, the
interpreter is not taken apart at the end: a third of a second, in which what the server has loaded is copied.
"""
import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("judge_predictions", "make_sample_data", "predict_assessor", "train_assessor", "train_video",
           "train_detector", "train_dreamer", "rank_worker")
HEAVY = ("cv2", "pandas", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image", "torchvision.models",
         "torchvision.models.detection", "pycocotools.cocoeval", "tqdm", "yaml")


class ForkServer:
    """The tests' side. start() gives a Trial; close() ends the server."""

    def __init__(self, env=None):
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        assert self._ask({"do": "hello"}) == "ready"

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script, flags, log, env=None, errors=None, folder=None):
        """Fork a run of the script in a folder; what it prints is appended to `log`, errors to `errors` where given."""
        argv = [str(ROOT / script), *map(str, flags)]
        pid = self._ask({"do": "start", "argv": argv, "log": str(log), "errors": str(errors or log),
                         "env": env or {}, "folder": str(folder or Path.cwd())})
        return Trial(self, pid, log)

    def close(self):
        """End the server."""
        self._process.stdin.close()
        self._process.wait(30)


class Trial:
    """One forked run."""

    def __init__(self, server, pid, log):
        self.server, self.pid, self.log = server, pid, Path(log)

    def wait(self, seconds):
        """Exit code (negative: the signal that killed it), or None after that many seconds."""
        end = time.monotonic() + seconds
        while True:
            code = self.server._ask({"do": "poll", "pid": self.pid})
            if code is not None or time.monotonic() > end:
                return code
            time.sleep(0.005)

    def wait_for(self, text):
        """Return once the run has printed that; AssertionError where it ends before."""
        while text not in self.text():
            assert self.wait(0.01) is None or text in self.text(), self.text()[-2000:]

    def finish(self, seconds=600):
        """Exit code at the end of the run; AssertionError with the end of its log where it hangs."""
        code = self.wait(seconds)
        if code is None:
            self.signal(signal.SIGKILL)
            self.wait(10)
            raise AssertionError(f"still running after {seconds} s:\n{self.text()[-2000:]}")
        return code

    def signal(self, number):
        """Send a signal to the whole process group, as a scheduler does; False where nothing is left of it."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def left_over(self):
        """True while any process of the group lives: a loader worker that nobody ended."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == self.pid and fields[0] != "Z":
                return True
        return False

    def text(self):
        """What the run has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def serve():
    """Answer requests; returns the argv of a run in the forked child, which then goes on as that script."""
    children = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if not pid:
                return request
            children[pid] = None
            answer = pid
        elif request["do"] == "poll":
            pid = request["pid"]
            if children[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if ended else None
            answer = children[pid]
        else:
            answer = "ready"
        print(json.dumps(answer), flush=True)
    return None


def become(request):
    """Make this forked process a run of the script."""
    os.setsid()
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, file in ((1, request["log"]), (2, request["errors"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    if "ADDRESS_SPACE_LEFT" in os.environ:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ["ADDRESS_SPACE_LEFT"]),) * 2)
    if "CPU_SECONDS" in os.environ:
        resource.setrlimit(resource.RLIMIT_CPU, (int(os.environ["CPU_SECONDS"]),) * 2)
    if os.environ.get("BLANK_PLOTS"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        FigureCanvasAgg.draw = FigureCanvasAgg.get_renderer  # the page without what is on it
    import common
    main = sys.modules[Path(sys.argv[0]).stem].main
    if "QUICK_EXIT" not in os.environ:
        return common.run_main(main)
    code = 0
    try:
        common.run_main(main)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.modules["triton"] = None  # compiles for GPUs; its newest says at the exit of a run what gc.freeze() keeps alive
    for name in (*HEAVY, *SCRIPTS):
        importlib.import_module(name)
    gc.freeze()  # what is loaded is not searched for garbage again at the exit of every run
    asked = serve()
    if asked is None:
        os._exit(0)  # without a word of what the packages did not free
    become(asked)
