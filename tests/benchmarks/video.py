"""How fast is an epoch of train_video.py? Ratios against loops timed in turn with it, in the same run.

    python tests/benchmarks/video.py
    python tests/benchmarks/video.py --model cnn_lstm --clips 48

    script      one training pass as the script does it: cached clips, one fused augmentation a clip, its precision
    bare        forward, backward and optimiser step on batches that already lie in memory, in the same precision
    reference   a loop as tutorials write it: fp32, every frame of a file read at each access, torchvision transforms
                frame by frame as strong, 2 workers
"""
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from turns import compare, more_flags, parser_of  # it puts the repository on the import path

import common
import train_video

SECONDS, RATE = 4, 25  # of each file


def parse_args():
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="r3d_18", help="as train_video.py names it")
    parser.add_argument("--clips", type=int, default=24, help="clips per epoch")
    parser.add_argument("--side", type=int, default=320, help="width of the videos in pixels; 3 / 4 of it high")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per batch")
    return parser.parse_args()


def make_data(folder, options):
    """MPEG-4 files of drifting colours, half of each class, all different since copies would stop a run."""
    draws, rows = np.random.default_rng(0), ["path,label"]
    size = (options.side, options.side * 3 // 4)
    for i in range(options.clips):
        rows.append(f"{i}.mp4,{'ab'[i % 2]}")
        small = draws.integers(0, 256, (12, 40, 3), dtype=np.uint8)
        picture = cv2.resize(small, (2 * size[0], size[1]), interpolation=cv2.INTER_CUBIC)
        writer = cv2.VideoWriter(str(folder / f"{i}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), RATE, size)
        for t in range(SECONDS * RATE):
            left = t * size[0] // (SECONDS * RATE)  # of the part of the picture that is shown
            writer.write(np.ascontiguousarray(picture[:, left:left + size[0]]))
        writer.release()
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def script_args(folder, options):
    """Flags of the script for these data."""
    return train_video.parse_args([
        "--manifest", str(folder / "manifest.csv"), "--output_dir", str(folder / "out"), "--model", options.model,
        "--no_pretrained", "--batch_size", str(options.batch_size), "--save_minutes", "0", "--epochs", "1000",
        *more_flags(options)])


class ScriptEpochs:
    """The script's own dataset, loader, step and bookkeeping."""

    def __init__(self, folder, options):
        self.args = script_args(folder, options)
        self.run = common.start_run(self.args, fixed_shapes=True)
        study = train_video.load_study(self.args, train_video.read_table(self.args), self.run.say)
        rows = np.arange(options.clips)
        objective = train_video.Behaviours(self.args, study.table, rows)
        self.objective, split = objective, {"train": rows, "val": rows[:2], "test": rows[:0]}
        self.loader, _ = train_video.make_loaders(study, split, objective, self.run.compute, None)
        self.model = self.run.compute.place(train_video.build_model(self.args, 2))
        optimizer = common.build_optimizer(self.model, self.args)
        self.training = common.Training(self.run, self.model, optimizer, self.args, "last", {})

    def epoch(self):
        train_video.train_one_epoch(self.model, self.loader, self.objective, self.training, self.run.compute)
        self.training.progress.next_epoch()


class BareEpochs:
    """Nothing but the arithmetic: normalised batches in memory."""

    def __init__(self, folder, options):
        script = ScriptEpochs(folder, options)
        self.compute, self.loss = script.run.compute, script.objective.loss
        self.model, self.optimizer = script.model.train(), script.training.optimizer
        self.batches = [(*train_video.to_device(batch, script.args, self.compute),
                         batch["target"].to(self.compute.device), batch["weight"].to(self.compute.device))
                        for batch in script.loader]

    def epoch(self):
        for clips, mask, target, weight in self.batches:
            with self.compute.autocast():
                outputs = self.model(clips, mask)
            loss = self.loss(outputs.float(), target, weight)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


class PlainFiles(torch.utils.data.Dataset):
    """The whole file is decoded at every access; torchvision changes each frame alike, one by one."""

    def __init__(self, folder, args, options):
        self.paths, self.args = [folder / f"{i}.mp4" for i in range(options.clips)], args
        self.transform = transforms.Compose([
            transforms.Resize(128), transforms.RandomResizedCrop(112, (0.6, 1.0)), transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(10), transforms.ColorJitter(0.5, 0.5, 0.3, 0.05), transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(5, (0.1, 2.0))], 0.3), transforms.RandomAutocontrast(0.4),
            transforms.ToTensor(), transforms.Normalize(*train_video.pixel_statistics(args)),
            transforms.RandomErasing(0.3, (0.02, 0.15))])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        capture, frames = cv2.VideoCapture(str(self.paths[index])), []
        while True:
            found, frame = capture.read()
            if not found:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        chosen = (np.arange(self.args.n_frames) * RATE / self.args.fps).astype(int)  # from the start, at --fps
        clip, seed = [], int(torch.randint(2 ** 31, ()))
        for place in chosen:
            torch.manual_seed(seed)  # the same draw for all frames
            clip.append(self.transform(Image.fromarray(frames[min(place, len(frames) - 1)])))
        return torch.stack(clip), index % 2


class ReferenceEpochs:
    """fp32, contiguous memory, AdamW as torch makes it, loader workers."""

    def __init__(self, folder, options):
        args, self.device = script_args(folder, options), common.choose_compute("auto", "off").device
        self.model = train_video.build_model(args, 2).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.loader = torch.utils.data.DataLoader(PlainFiles(folder, args, options), options.batch_size,
                                                  shuffle=True, num_workers=options.workers, persistent_workers=True)

    def epoch(self):
        for clips, label in self.loader:
            mask = torch.ones(clips.shape[:2], dtype=torch.bool)
            logits = self.model(clips.to(self.device), mask)
            loss = torch.nn.functional.cross_entropy(logits, label.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def main():
    options = parse_args()
    compare(__file__, options, make_data, {"script": ScriptEpochs, "bare": BareEpochs, "reference": ReferenceEpochs},
            f"train_video.py: {options.model}, {options.clips} clips of {SECONDS} s, {options.side} px wide, batch "
            f"{options.batch_size}", "clips", options.clips,
            [("script", "bare", "<=", 1.05), ("reference", "script", ">=", 4)])


if __name__ == "__main__":
    main()
