"""How fast is an epoch of train_dreamer.py, and what do channel tokens cost beside spatial ones? Ratios in one run.

    python tests/benchmarks/dreamer.py
    python tests/benchmarks/dreamer.py --transitions 32 --d_model 256 --n_layers 4

    script      one training pass as the script does it: cached frames, its precision, no dropout inside attention
    bare        forward, backward and optimiser step on batches that already lie in memory, in the same precision
    reference   a loop as tutorials write it: fp32, frames decoded by Pillow at every access, dropout .1 in attention
    spatial     the bare loop with 49 spatial tokens instead of 512 channel tokens
"""
import json

import numpy as np
import torch
from PIL import Image
from torch import nn

from turns import compare, more_flags, parser_of  # it puts the repository on the import path

import common
from readers import probe_poses
import train_dreamer


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--encoder", default="resnet34", help="torchvision ResNet")
    add("--transitions", type=int, default=16, help="transitions per epoch")
    add("--side", type=int, default=224, help="side of the frames in pixels")
    add("--batch_size", type=int, default=8, help="transitions per batch")
    add("--d_model", type=int, default=768, help="width of a token")
    add("--n_layers", type=int, default=6, help="transformer layers")
    return parser.parse_args()


def make_data(parent, options):
    """A sequence of smooth random frames with random poses."""
    folder = parent / "sequence"
    draws = np.random.default_rng(0)
    poses, rows = draws.normal(0, 10, (options.transitions + 1, 6)), []
    for which in ("ft1", "ft2"):
        (folder / which).mkdir(parents=True)
    for i in range(options.transitions + 1):
        small = Image.fromarray(draws.integers(0, 256, (24, 24), dtype=np.uint8))
        small = small.resize((options.side, options.side), Image.Resampling.BICUBIC)
        small.save(folder / "ft1" / f"{i}.png")
        small.save(folder / "ft2" / f"{i}.png")
    for i in range(options.transitions):
        rows.append({"ft1_image_path": f"ft1/{i}.png", "ft2_image_path": f"ft2/{i + 1}.png",
                     "at1_6dof": poses[i].tolist(), "action_change_6dof": (poses[i + 1] - poses[i]).tolist(),
                     "at2_6dof": poses[i + 1].tolist()})
    (folder / probe_poses.FILE_NAME).write_text(json.dumps(rows))


def script_args(folder, options, *more):
    """Flags of the script for these data."""
    return train_dreamer.parse_args([
        "--data_dir", str(folder / "sequence"), "--output_dir", str(folder / "out"), "--encoder", options.encoder,
        "--no_pretrained", "--batch_size", str(options.batch_size), "--image_size", str(options.side), "--d_model",
        str(options.d_model), "--n_layers", str(options.n_layers), "--feedforward", str(4 * options.d_model),
        "--save_minutes", "0", "--epochs", "1000", "--token_type", "channel", *more, *more_flags(options)])


def unit_scaler():
    return {name: {"mean": np.zeros(6), "sd": np.full(6, 10.0)} for name in ("motion", "at1", "at2")}


class ScriptEpochs:
    """The script's own dataset, loader, step and bookkeeping."""

    def __init__(self, folder, options):
        self.args = script_args(folder, options)
        self.run = common.start_run(self.args, fixed_shapes=True)
        study = train_dreamer.load_study(self.args, self.run)
        rows = np.arange(options.transitions)
        self.loader = train_dreamer.make_loader(study, rows, self.args, self.run.compute, train=True)
        self.model = self.run.compute.place(train_dreamer.build_model(self.args, unit_scaler(), "additive"))
        optimizer = common.build_optimizer(self.model, self.args)
        self.training = common.Training(self.run, self.model, optimizer, self.args, "last", {})
        self.loss_function = train_dreamer.DreamLoss(self.args, unit_scaler())

    def epoch(self):
        train_dreamer.train_one_epoch(self.model, self.loader, self.loss_function, self.training, self.run.compute)
        self.training.progress.next_epoch()


class BareEpochs:
    """Nothing but the arithmetic: batches in memory."""
    tokens = "channel"

    def __init__(self, folder, options):
        args = script_args(folder, options, "--token_type", self.tokens)
        self.compute = common.start_run(args, fixed_shapes=True).compute
        device = self.compute.device
        self.model = self.compute.place(train_dreamer.build_model(args, unit_scaler(), "additive")).train()
        self.optimizer = common.build_optimizer(self.model, args)
        self.loss_function = train_dreamer.DreamLoss(args, unit_scaler())
        self.batches = []
        for start in range(0, options.transitions, options.batch_size):
            size = min(options.batch_size, options.transitions - start)
            frames = torch.randint(0, 256, (2, size, 1, options.side, options.side), dtype=torch.uint8).to(device)
            motion, at1 = (10 * torch.randn(2, size, 6)).to(device)
            self.batches.append((frames, motion, {"at1": at1, "at2": at1 + motion}))

    def epoch(self):
        for (frame_t1, frame_t2), motion, poses in self.batches:
            with self.compute.autocast():
                imagined, features_t2 = self.model(frame_t1, motion), self.model.true_features(frame_t2)
            loss, _ = self.loss_function(imagined, poses, features_t2)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


class SpatialEpochs(BareEpochs):
    """The same with the encoder's places as tokens."""
    tokens = "spatial"


class PlainFrames(torch.utils.data.Dataset):
    """Pillow decoding at every access."""

    def __init__(self, folder, options):
        self.folder, self.count = folder / "sequence", options.transitions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        paths = self.folder / "ft1" / f"{index}.png", self.folder / "ft2" / f"{index + 1}.png"
        frames = np.stack([np.asarray(Image.open(path).convert("L")) for path in paths])
        return torch.from_numpy(frames), torch.randn(6) * 10, torch.randn(6) * 10


class ReferenceEpochs:
    """fp32, contiguous memory, AdamW as torch makes it, attention with dropout, loader workers."""

    def __init__(self, folder, options):
        self.device, args = common.choose_compute("auto", "off").device, script_args(folder, options)
        self.model = train_dreamer.build_model(args, unit_scaler(), "additive")
        for layer in self.model.imagination.layers[:-1]:
            layer.self_attn.dropout = 0.1
        self.model = self.model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-4)
        self.loss_function = train_dreamer.DreamLoss(args, unit_scaler())
        self.loader = torch.utils.data.DataLoader(
            PlainFrames(folder, options), options.batch_size, shuffle=True, num_workers=options.workers, persistent_workers=True)

    def epoch(self):
        for frames, motion, at1 in self.loader:
            frames, motion, at1 = frames.to(self.device), motion.to(self.device), at1.to(self.device)
            imagined = self.model(frames[:, :1], motion)
            loss, _ = self.loss_function(imagined, {"at1": at1, "at2": at1 + motion}, self.model.true_features(frames[:, 1:]))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def main():
    options = parse_args()
    compare(__file__, options, make_data,
            {"script": ScriptEpochs, "bare": BareEpochs, "reference": ReferenceEpochs, "spatial": SpatialEpochs},
            f"train_dreamer.py: {options.encoder}, {options.transitions} transitions of {options.side} px, batch "
            f"{options.batch_size}, width {options.d_model}, {options.n_layers} layers", "transitions",
            options.transitions,
            [("script", "bare", "<=", 1.05), ("reference", "script", ">=", 4), ("bare", "spatial", ">", 1)])


if __name__ == "__main__":
    main()
