"""One process of a group that trains a small network in float64 through common.Training, for test_ranks.py.

It is forked from a server, with RANK and the like in its environment and one argument: a JSON file with a list of
cases. A case has folder, n (samples), batch_size, accumulate, and what is to go wrong: `stop` (a signal reaches the
last process alone in this step), `bad` (the sample whose loss is not a number) or `steep` (whose gradient is none).
The first process writes outcome.json with the exit or error, the history and the evaluation, beside the run folder's
own files.
"""
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import common

FLAGS = dict(seed=1, epochs=2, lr=0.01, weight_decay=0.01, optimizer="adamw", scheduler="cosine", warmup_epochs=0.5,
             plateau_patience=5, min_lr=0.0, clip_grad=1.0, patience=0, min_epochs=0, min_delta=0.0, dry_run=False,
             save_minutes=0, save_every=0, save_top_k=0, num_workers=0, resume="auto", tensorboard=False, wandb=False,
             compile=False, given=set())


class Samples(torch.utils.data.Dataset):
    """Pictures (3, 4, 4) and targets (1,) that depend on their number and the epoch alone; `bad` has a NaN target."""

    def __init__(self, n, bad=None):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        epoch, index = key
        generator = common.generator_for(epoch, index)
        target = torch.tensor([float("nan") if index == self.bad else index / self.n], dtype=torch.float64)
        pixels = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
        return {"x": pixels, "target": target, "name": str(index)}


def build_model(rank):
    """A convolution, GroupNorm (which looks at one sample at a time) and a linear layer, in float64.

    Its weights are others in each process, and so is its buffer after each step: those of the first one must count.
    """
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(),
                                torch.nn.Flatten(), torch.nn.Linear(16, 1)).double()
    model.register_buffer("steps_times_rank", torch.zeros(1))
    return model


def run_case(case, processes):
    """Train, evaluate after each epoch on all samples; returns the outcome."""
    args = SimpleNamespace(**FLAGS, batch_size=case["batch_size"], accumulate=case["accumulate"])
    compute = common.Compute(torch.device("cpu"), "fp32", False, "cpu", processes)
    folder, resumed = Path(case["folder"]), (Path(case["folder"]) / "last.pth").exists()
    processes.on_first(lambda: folder.mkdir(exist_ok=True))
    model, dataset = build_model(processes.rank), Samples(case["n"], case.get("bad"))
    loader = common.make_loader(dataset, args, compute, train=True)
    scoring = common.make_loader(Samples(case["n"]), args, compute, train=False, batch_size=args.batch_size)
    signals = common.StopSignals()  # anew in each case: a run that stops leaves its process deaf to them
    with common.Run(folder, args, compute, signals, resumed) as run:
        common.write_json(run.path("args.json"), {})  # without it an error removes the folder
        optimizer = common.build_optimizer(model, args)
        training = common.Training(run, model, optimizer, args, "val_loss", {}, False)
        steps, outputs = 0, []
        for _ in training.epochs():
            for batch in training.batches(loader):
                steps += 1
                if steps == case.get("stop") and processes.rank == processes.size - 1:
                    signal.raise_signal(signal.SIGTERM)
                loss = (model(batch["x"]) - batch["target"]).pow(2).mean()
                if case.get("steep") in batch["name"]:
                    loss = loss + (0 * loss).sqrt()
                model.steps_times_rank += processes.rank
                training.step(loss)
            assert model.steps_times_rank == 0
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "each epoch takes off its own"
            with torch.no_grad():
                outputs = torch.cat(processes.gather([model(batch["x"]) for batch in scoring])).flatten()
            training.end_epoch({**training.epoch_means(), "val_loss": outputs.square().mean().item()})
    return {"history": training.progress.history, "outputs": outputs.tolist() if len(outputs) else [],
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()}


def main():
    """All cases, one after the other."""
    common.BUCKET_BYTES = 100  # several messages a step, although the network is small
    processes = common.launched_processes()
    processes.join(torch.device("cpu"))
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            outcome = run_case(case, processes)
        except (common.UserError, SystemExit) as error:
            outcome = {"error": str(error), "kind": type(error).__name__}
        outcomes = processes.gather([outcome])
        if processes.is_first:
            outcome["of_others"] = [{name: other.get(name) for name in ("error", "kind")} for other in outcomes[1:]]
            (Path(case["folder"]) / "outcome.json").write_text(json.dumps(outcome))
