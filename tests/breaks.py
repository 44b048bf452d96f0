"""Does the suite notice? Ten deliberate breaks of the code, each of which must turn a test red.

    python tests/breaks.py [name of a break ...]

Each break is made in a copy of the repository, and the tests named beside it are run there: first without the break,
when they must pass, then with it, when they must fail. Prints a table (Markdown); exit code 1 where one goes unseen.
test_breaks.py holds the code of each break against the file it stands in.
"""
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Break:
    """A fault to put in: `code`, which stands once in `file`, is replaced; `tests` must notice."""
    name: str
    file: str
    code: str
    replaced_by: str
    tests: str

    def broken_text(self):
        """The text of the file with the fault in it. Raises AssertionError where its code does not stand there once."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        count = text.count(self.code)
        assert count == 1, f"break '{self.name}': {self.code!r} stands {count} times in {self.file}, expected once"
        return text.replace(self.code, self.replaced_by)


BREAKS = [
    Break(name="the old file is written over, not replaced", file="common.py",
          code="os.replace(temporary, path)",
          replaced_by="temporary.unlink(), open(path, 'wb').write(content)",
          tests="tests/torture/test_save_path.py -k best"),
    Break(name="the history is appended to", file="common.py",
          code='write_table(self.run.path("training_history.csv"), self.progress.history)',
          replaced_by='open(self.run.path("training_history.csv"), "a").write(f"{self.progress.history[-1]}\\n")',
          tests="tests/test_checkpoints.py -k stop_after_any"),
    Break(name="draws are seeded by the time", file="common.py",
          code="manual_seed(hash_seed(*integers))",
          replaced_by="manual_seed(hash_seed(*integers, time.time_ns()))",
          tests="tests/torture/test_signals.py -k assessor.py-0"),
    Break(name="loader workers are not guarded from signals", file="common.py",  # one TERM may be lucky, five are not
          code="worker_init_fn=_guard_worker,",
          replaced_by="",
          tests="tests/torture/test_signals.py --all_cases -m long -k assessor.py-2"),
    Break(name="an evaluation is padded to equal shares", file="common.py",
          code="self.n_samples * (self.rank + 1) // self.size",
          replaced_by="self.n_samples * self.rank // self.size + -(-self.n_samples // self.size)",
          tests="tests/torture/test_ranks.py -k slices"),
    Break(name="every process counts the same, whatever its share", file="common.py",
          code="one_or_nan * (own / step.n_samples)",
          replaced_by="one_or_nan * (len(sampler.step_span(batch, 1)) / step.n_samples / self.processes.size)",
          tests="tests/torture/test_ranks.py -k trains_the_same"),
    Break(name="checkpoints may hold anything", file="common.py",
          code='content = torch.load(path, map_location="cpu", weights_only=True)',
          replaced_by='content = torch.load(path, map_location="cpu", weights_only=False)',
          tests="tests/torture/test_hostile.py -k pickle"),
    Break(name="checksums are not checked", file="common.py",
          code="archive.testzip()",
          replaced_by="None",
          tests="tests/torture/test_damaged.py -k flip"),
    Break(name="16-bit pictures are clipped", file="readers/picture_files.py",
          code="_grey_to_8bit(image, pixel_range)[..., None]",
          replaced_by="np.asarray(image.convert('L'))[..., None]",
          tests="tests/test_images.py -k 16_bit"),
    Break(name="a run folder may be there already", file="common.py",
          code="folder.mkdir()",
          replaced_by="folder.mkdir(exist_ok=True)",
          tests="tests/torture/test_concurrency.py"),
]


def run_tests(folder, words):
    """True where the tests pass; their last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words.split()],
                          cwd=folder, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]  # not 'no tests' or 'wrong usage'
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def is_noticed(fault):
    """True where the tests pass without the break and fail with it."""
    broken = fault.broken_text()
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns(".*", "outputs", "sample_data", "__pycache__")
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=left_out)
        passed, last = run_tests(folder, fault.tests)
        assert passed, f"{fault.tests} fails without any break: {last}"
        (Path(folder) / fault.file).write_text(broken, encoding="utf-8")
        passed, last = run_tests(folder, fault.tests)
    print(f"| {fault.name} | `{fault.tests}` | {'NOT SEEN' if passed else 'red: ' + last} |", flush=True)
    return not passed


def main():
    wanted = sys.argv[1:]
    unknown = set(wanted) - {fault.name for fault in BREAKS}
    assert not unknown, f"no such break: {unknown}"
    print("| break | tests | result |\n|---|---|---|")
    noticed = [is_noticed(fault) for fault in BREAKS if not wanted or fault.name in wanted]
    print(f"\nbreaks: {sum(noticed)} of {len(noticed)} seen")
    sys.exit(not all(noticed))


if __name__ == "__main__":
    main()
