"""How fast is an epoch of train_assessor.py? Ratios against loops timed in turn with it, in the same run.

    python tests/benchmarks/assessor.py
    python tests/benchmarks/assessor.py --backbone resnet50 --images 320 --repeats 5

    script      one epoch as the script trains: cached pictures, fused augmentation, its precision
    bare        forward, backward and optimiser step on batches that already lie in memory, in the same precision
    reference   a loop as tutorials write it: fp32, Pillow decoding, torchvision augmentation as strong, 2 workers
Printed: median seconds of each, the ratios of the medians with the range over the repeats, and peak memory.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import train_assessor  # noqa: E402
from turns import print_turns, time_in_turn  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="torchvision classifier")
    parser.add_argument("--images", type=int, default=192, help="pictures per epoch")
    parser.add_argument("--side", type=int, default=1024, help="side of the pictures on disk in pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each loop, after one that is not timed")
    return parser.parse_args()


def make_data(folder, options):
    """Smooth random JPEGs and random ratings; returns the ratings file."""
    draws = np.random.default_rng(0)
    rows = ["image,first,second"]
    for i in range(options.images):
        small = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        cv2.imwrite(
            str(folder / f"{i}.jpg"), cv2.resize(small, (options.side, options.side), interpolation=cv2.INTER_CUBIC)
        )
        rows.append(f"{i}.jpg,{draws.normal():.4f},{draws.normal():.4f}")
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    return folder / "ratings.csv"


class ScriptEpochs:
    """The script's own dataset, loader, step and bookkeeping."""

    def __init__(self, folder, table, options):
        sys.argv = ["train_assessor.py"]
        self.args = train_assessor.parse_args(
            [
                "--images_dir", str(folder), "--ratings_file", str(table), "--output_dir", str(folder / "out"),
                "--backbone", options.backbone, "--no_pretrained", "--batch_size", str(options.batch_size),
                "--save_minutes", "0", "--epochs", "1000",
            ]
        )
        self.run = common.start_run(self.args)
        study = train_assessor.load_study(self.args, self.run)
        split = {"train": np.arange(options.images), "val": np.arange(2), "test": np.arange(0)}
        scaler = train_assessor.fit_scaler(study.ratings, False)
        self.loader, _ = train_assessor.make_loaders(study, split, scaler, self.args, self.run.compute)
        self.model = self.run.compute.place(train_assessor.build_model(self.args, [0.0, 0.0]))
        optimizer = common.build_optimizer([(self.model, 1.0)], self.args)
        self.training = common.Training(self.run, self.model, optimizer, self.args, "last", dict)
        self.loss_function = train_assessor.rating_loss("mse")

    def epoch(self):
        train_assessor.train_one_epoch(self.model, self.loader, self.loss_function, self.training, self.run.compute)
        self.training.epoch, self.training.batch, self.training.sums = self.training.epoch + 1, 0, {}


class BareEpochs:
    """Nothing but the arithmetic: normalised batches in memory."""

    def __init__(self, script, options):
        self.compute = script.run.compute
        self.model = self.compute.place(train_assessor.build_model(script.args, [0.0, 0.0])).train()
        self.optimizer = common.build_optimizer([(self.model, 1.0)], script.args)
        layout = torch.channels_last if self.compute.channels_last else torch.contiguous_format
        self.batches = [
            (
                torch.randn(min(options.batch_size, options.images - start), 3, 224, 224).to(
                    self.compute.device, memory_format=layout
                ),
                torch.randn(min(options.batch_size, options.images - start), 2).to(self.compute.device),
            )
            for start in range(0, options.images, options.batch_size)
        ]

    def epoch(self):
        for images, target in self.batches:
            with self.compute.autocast():
                predicted = self.model(images)
            loss = torch.nn.functional.mse_loss(predicted, target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


class PlainFiles(torch.utils.data.Dataset):
    """Pillow decoding and torchvision transforms at every access."""

    def __init__(self, folder, options):
        self.paths = [folder / f"{i}.jpg" for i in range(options.images)]
        self.transform = transforms.Compose(
            [
                transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10),
                transforms.ColorJitter(0.3, 0.3, 0.3, 0.1), transforms.RandomGrayscale(0.1),
                transforms.RandomPerspective(0.2, p=0.3), transforms.ToTensor(),
                transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD),
                transforms.RandomErasing(0.2, scale=(0.02, 0.15)),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), torch.zeros(2)


class ReferenceEpochs:
    """fp32, contiguous memory, AdamW as torch makes it, 2 loader workers."""

    def __init__(self, script, folder, options):
        self.device = script.run.compute.device
        self.model = train_assessor.build_model(script.args, [0.0, 0.0]).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.loader = torch.utils.data.DataLoader(
            PlainFiles(folder, options), options.batch_size, shuffle=True, num_workers=2, persistent_workers=True
        )

    def epoch(self):
        for images, target in self.loader:
            loss = torch.nn.functional.mse_loss(self.model(images.to(self.device)), target.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def main():
    options = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script = ScriptEpochs(folder, make_data(folder, options), options)
        with script.run:
            after_script = common.peak_memory(script.run.compute.device)
            loops = {
                "script": script,
                "bare": BareEpochs(script, options),
                "reference": ReferenceEpochs(script, folder, options),
            }
            seconds = time_in_turn(loops, options.repeats)
    print(f"\n{options.backbone}, {options.images} pictures of {options.side} px, batch {options.batch_size}, "
          f"{script.run.compute.text}, {torch.get_num_threads()} threads, {options.repeats} repeats")
    print_turns(seconds, options.images, "images", 3)
    print(f"peak memory of the process {common.peak_memory(script.run.compute.device) / 2**30:.2f} GB, "
          f"with the pictures cached and before any epoch {after_script / 2**30:.2f} GB")


if __name__ == "__main__":
    main()
