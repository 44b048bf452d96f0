"""Does the suite notice? Ten deliberate breaks of the code, each of which must turn a test red.

    python tests/breaks.py [name of a break ...]

Each break is made in a copy of the repository, and the tests named beside it are run there: first without the break,
when they must pass, then with it, when they must fail. Prints a table (Markdown); exit code 1 where one goes unseen.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BREAKS = {  # what is broken: (file, code, what stands there instead, tests that must notice)
    "the old file is written over, not replaced": (
        "common.py", "            os.replace(temporary, path)\n",
        "            temporary.unlink()\n            open(path, 'wb').write(content)\n",
        "tests/torture/test_save_path.py -k best"),
    "the history is appended to": (
        "common.py", '        write_table(self.run.path("training_history.csv"), self.history)\n\n    def _model',
        '        open(self.run.path("training_history.csv"), "a").write(f"{self.history[-1]}\\n")\n\n    def _model',
        "tests/test_checkpoints.py -k stop_after_any"),
    "draws are seeded by the time": (
        "common.py", "    return torch.Generator().manual_seed(mix(*integers))",
        "    return torch.Generator().manual_seed(mix(*integers, time.time_ns()))",
        "tests/torture/test_signals.py -k assessor.py-0"),
    "loader workers are not guarded from signals": (  # one TERM may be lucky, five are not
        "common.py", "worker_init_fn=_guard_worker if workers else None", "worker_init_fn=None",
        "tests/torture/test_signals.py --all_cases -k assessor.py-2"),
    "an evaluation is padded to equal shares": (
        "common.py", "(n_samples * rank // size, n_samples * (rank + 1) // size)",
        "(n_samples * rank // size, n_samples * rank // size + -(-n_samples // size))",
        "tests/torture/test_ranks.py -k slices"),
    "every process counts the same, whatever its share": (
        "common.py", "self.scaler.scale(loss * (own / step)).backward()",
        "self.scaler.scale(loss * (whole / step / self.processes.size)).backward()",
        "tests/torture/test_ranks.py -k trains_the_same"),
    "checkpoints may hold anything": (
        "common.py", "content = torch.load(path, map_location=\"cpu\", weights_only=True)",
        "content = torch.load(path, map_location=\"cpu\", weights_only=False)",
        "tests/torture/test_hostile.py -k pickle"),
    "checksums are not checked": (
        "common.py", "        damaged = archive.testzip()\n", "        damaged = None\n",
        "tests/torture/test_damaged.py -k flip"),
    "16-bit pictures are clipped": (
        "common.py", "def _grey_to_8bit(image):\n",
        "def _grey_to_8bit(image):\n    return image.convert('L')\n\n\ndef _unused(image):\n",
        "tests/test_images.py -k 16_bit"),
    "a run folder may be there already": (
        "common.py", "                folder.mkdir()\n", "                folder.mkdir(exist_ok=True)\n",
        "tests/torture/test_concurrency.py"),
}


def run_tests(folder, words):
    """True where the tests pass; their last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words.split()],
                          cwd=folder, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]  # not 'no tests' or 'wrong usage'
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def try_break(name, file, code, instead, tests):
    """True where the tests pass without the break and fail with it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
            ".*", "outputs", "sample_data", "__pycache__"))
        shutil.copy(ROOT / "pytest.ini", folder)
        assert run_tests(folder, tests)[0], f"{tests} fails without any break"
        path = Path(folder) / file
        text = path.read_text(encoding="utf-8")
        assert text.count(code) == 1, f"{name}: the code to break stands {text.count(code)} times in {file}"
        path.write_text(text.replace(code, instead), encoding="utf-8")
        passed, last = run_tests(folder, tests)
    print(f"| {name} | `{tests}` | {'NOT SEEN' if passed else 'red: ' + last} |", flush=True)
    return not passed


def main():
    print("| break | tests | result |\n|---|---|---|")
    wanted = sys.argv[1:] or list(BREAKS)
    seen = [try_break(name, *BREAKS[name]) for name in wanted]
    print(f"\nbreaks: {sum(seen)} of {len(seen)} seen")
    sys.exit(not all(seen))


if __name__ == "__main__":
    main()
