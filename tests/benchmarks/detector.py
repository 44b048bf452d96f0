"""How fast is an epoch of train_detector.py? Ratios against loops timed in turn with it, in the same run.

    python tests/benchmarks/detector.py
    python tests/benchmarks/detector.py --model fasterrcnn_resnet50_fpn --images 16 --min_size 320

    script      one training pass as the script does it: cached pictures, its precision, flip, colour and size at random
    bare        forward, backward and optimiser step on batches that already lie in memory, in the same precision
    reference   a loop in the manner of torchvision's references/detection: fp32, Pillow decoding, flip and colour in
                torchvision, resize, normalisation and RoIAlign of torchvision inside the model, 2 workers
"""
import json
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from turns import compare, more_flags, parser_of  # it puts the repository on the import path

import common
import train_detector

PARTS, BOXES = 8, 6


def parse_args():
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="fasterrcnn_resnet18_fpn", choices=tuple(train_detector.MODELS),
                        help="detector")
    parser.add_argument("--images", type=int, default=24, help="pictures per epoch")
    parser.add_argument("--side", type=int, default=1024, help="longer side of the pictures on disk in pixels")
    parser.add_argument("--min_size", type=int, default=256, help="short side of the input in pixels")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures per batch")
    return parser.parse_args()


def make_data(folder, options):
    """Smooth random JPEGs of 4:3 and a COCO file with random boxes."""
    draws, height = np.random.default_rng(0), options.side * 3 // 4
    content = {"images": [], "annotations": [], "categories": [{"id": k, "name": f"part_{k}"} for k in range(PARTS)]}
    for i in range(options.images):
        small = draws.integers(0, 256, (18, 24, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(small, (options.side, height), interpolation=cv2.INTER_CUBIC))
        content["images"].append({"id": i, "file_name": f"{i}.jpg"})
        for k in range(BOXES):
            left, top, side = (float(value) for value in draws.uniform(0.05, 0.6, 3) * height)
            width = 0.05 * height + side / 2  # which ends within the picture
            content["annotations"].append({"id": i * BOXES + k, "image_id": i, "state": int(draws.integers(4)),
                                           "bbox": [left, top, width, width],
                                           "category_id": int(draws.integers(PARTS))})
    common.write_json(folder / "coco.json", content)


def script_args(folder, options):
    """Flags of the script for these data; all loops have the same anchors."""
    is_small = options.model == train_detector.RESNET18
    anchors = ["--anchor_sizes", "16", "23", "36", "51", "76", "107", "152", "215"] if is_small else []
    return train_detector.parse_args([
        "--train_json", str(folder / "coco.json"), "--train_images", str(folder), "--output_dir", str(folder / "out"),
        "--split_ratio", "0.9", "--model", options.model, "--no_pretrained", "--save_minutes", "0",
        "--min_size", str(options.min_size), "--max_size", str(2 * options.min_size), "--epochs", "1000",
        "--batch_size", str(options.batch_size), *anchors, *more_flags(options)])


class ScriptEpochs:
    """The script's own dataset, loader, step and bookkeeping."""

    def __init__(self, folder, options):
        self.args = script_args(folder, options)
        self.run = common.start_run(self.args)
        study = train_detector.load_study(self.args, {"train": (folder / "coco.json", folder)}, self.run.say)
        rows = np.arange(options.images)
        self.settings = train_detector.model_settings(self.args, study.truth) | {"frozen_norm": True}
        self.loader = train_detector.make_loader(
            study, rows, self.settings, self.args, self.run.compute, train=True)
        self.model = self.run.compute.place(train_detector.build_model(self.args, self.settings, None))
        optimizer = common.build_optimizer(self.model, self.args)
        self.training = common.Training(self.run, self.model, optimizer, self.args, "val_loss", {})

    def epoch(self):
        train_detector.train_one_epoch(self.model, self.loader, self.training, self.run.compute, 0.5)
        self.training.progress.next_epoch()


class BareEpochs:
    """Nothing but the arithmetic: the script's batches of one epoch, normalised, in memory."""

    def __init__(self, folder, options):
        script = ScriptEpochs(folder, options)
        self.compute, self.settings = script.run.compute, script.settings
        self.model, self.optimizer = script.model.train(), script.training.optimizer
        self.loader, self.batches = script.loader, []

    def prepare(self):
        """Sizes are drawn anew in every epoch: take the script's batches of the same one."""
        self.batches = []
        self.batches = [train_detector.to_device(batch, self.compute, self.settings) for batch in self.loader]
        self.loader.batch_sampler.epoch += 1

    def epoch(self):
        for inputs, sizes, targets in self.batches:
            with self.compute.autocast():
                losses = self.model(inputs, sizes, targets)
            self.optimizer.zero_grad(set_to_none=True)
            train_detector.total_loss(losses, 0.5).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
            self.optimizer.step()


class PlainFiles(torch.utils.data.Dataset):
    """Pillow decoding, flip and colour in torchvision at every access; boxes of the COCO file."""

    def __init__(self, folder):
        content = json.loads((folder / "coco.json").read_text())
        self.paths, self.objects = [folder / image["file_name"] for image in content["images"]], {}
        for each in content["annotations"]:
            left, top, width, height = each["bbox"]
            self.objects.setdefault(each["image_id"], []).append(
                ([left, top, left + width, top + height], each["category_id"] + 1, each["state"]))
        self.colour = transforms.ColorJitter(0.1, 0.1, 0.1)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        picture = transforms.functional.to_tensor(self.colour(Image.open(self.paths[index]).convert("RGB")))
        boxes, labels, states = (torch.tensor(each) for each in zip(*self.objects[index]))
        if torch.rand(()) < 0.5:
            picture, boxes = picture.flip(-1), boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
                [picture.shape[-1], 0, picture.shape[-1], 0])
        return picture, {"boxes": boxes, "labels": labels, "states": states}


class ReferenceEpochs:
    """fp32, contiguous memory, AdamW as torch makes it, loader workers."""

    def __init__(self, folder, options):
        self.device, size = common.choose_compute("auto", "off").device, options.min_size
        args = script_args(folder, options)
        truth = SimpleNamespace(parts=[f"part_{k}" for k in range(PARTS)], has_states=lambda: True)
        settings = train_detector.model_settings(args, truth) | {"frozen_norm": True}
        self.model = train_detector.build_model(args, settings, None)
        pool = self.model.roi_heads.box_roi_pool
        self.model.roi_heads.box_roi_pool = MultiScaleRoIAlign(pool.featmap_names, pool.output_size,
                                                               pool.sampling_ratio)
        self.model = self.model.to(self.device).train()
        self.transform = GeneralizedRCNNTransform(size, 2 * size, common.IMAGENET_MEAN, common.IMAGENET_STD)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.loader = torch.utils.data.DataLoader(PlainFiles(folder), options.batch_size, shuffle=True, num_workers=options.workers,
                                                  persistent_workers=True, collate_fn=lambda batch: zip(*batch))

    def epoch(self):
        for pictures, targets in self.loader:
            targets = [{name: value.to(self.device) for name, value in target.items()} for target in targets]
            images, targets = self.transform([picture.to(self.device) for picture in pictures], targets)
            losses = self.model(images.tensors, images.image_sizes, targets)
            self.optimizer.zero_grad()
            train_detector.total_loss(losses, 0.5).backward()
            self.optimizer.step()


def main():
    options = parse_args()
    compare(__file__, options, make_data, {"script": ScriptEpochs, "bare": BareEpochs, "reference": ReferenceEpochs},
            f"train_detector.py: {options.model}, {options.images} pictures of {options.side} px to a short side of "
            f"{options.min_size}, batch {options.batch_size}", "images", options.images,
            [("script", "bare", "<=", 1.05), ("reference", "script", ">=", 2)])


if __name__ == "__main__":
    main()
