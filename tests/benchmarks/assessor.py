"""How fast is an epoch of train_assessor.py? Ratios against loops timed in turn with it, in the same run.

    python tests/benchmarks/assessor.py
    python tests/benchmarks/assessor.py --backbone resnet50 --loops bare reference

    script      one training pass as the script does it: cached pictures, fused augmentation, its precision
    bare        forward, backward and optimiser step on batches that already lie in memory, in the same precision
    reference   a loop as tutorials write it: fp32, Pillow decoding, torchvision augmentation as strong, 2 workers
    timm, fastai, lightning   the loaders and training loops of these packages over the same pictures, augmentation,
                network, optimiser, batch and workers, in fp32 as they come (needs tests/benchmarks/requirements.txt)
"""
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from turns import compare, more_flags, parser_of  # it puts the repository on the import path

import common
import train_assessor

PEERS = ("timm", "fastai", "lightning")


def parse_args():
    parser = parser_of(__doc__)
    parser.add_argument("--backbone", default="resnet18", help="torchvision classifier")
    parser.add_argument("--images", type=int, default=192, help="pictures per epoch")
    parser.add_argument("--side", type=int, default=1024, help="side of the pictures on disk in pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per batch")
    options = parser.parse_args()
    if options.images % options.batch_size:
        parser.error(f"--images {options.images} is no multiple of --batch_size {options.batch_size}: timm would leave "
                     "out the last batch")
    return options


def make_data(folder, options):
    """Smooth random JPEGs, all different since copies would stop a run, and random ratings."""
    draws = np.random.default_rng(0)
    rows = ["image,first,second"]
    for i in range(options.images):
        small = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = cv2.resize(small, (options.side, options.side), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{i}.jpg"), picture)
        rows.append(f"{i}.jpg,{draws.normal():.4f},{draws.normal():.4f}")
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")


def script_args(folder, options):
    """Flags of the script for these data."""
    return train_assessor.parse_args([
        "--images_dir", str(folder), "--ratings_file", str(folder / "ratings.csv"), "--output_dir", str(folder / "out"),
        "--backbone", options.backbone, "--no_pretrained", "--batch_size", str(options.batch_size), "--save_minutes",
        "0", "--epochs", "1000", *more_flags(options)])


class ScriptEpochs:
    """The script's own dataset, loader, step and bookkeeping."""

    def __init__(self, folder, options):
        args = script_args(folder, options)
        self.run = common.start_run(args, fixed_shapes=True)
        study = train_assessor.load_study(args, self.run, train_assessor.read_table(args))
        split = {"train": np.arange(options.images), "val": np.arange(2), "test": np.arange(0)}
        scaler = train_assessor.fit_scaler(study.ratings, False)
        self.loader, _ = train_assessor.make_loaders(study, split, scaler, args, self.run.compute, None)
        self.model = self.run.compute.place(train_assessor.build_model(args, [0.0, 0.0]))
        optimizer = common.build_optimizer(self.model, args)
        self.training = common.Training(self.run, self.model, optimizer, args, "last", {})

    def epoch(self):
        train_assessor.train_one_epoch(self.model, self.loader, self.training, self.run.compute)
        self.training.progress.next_epoch()


class BareEpochs:
    """Nothing but the arithmetic: normalised batches in memory."""

    def __init__(self, folder, options):
        args = script_args(folder, options)
        self.compute = common.start_run(args, fixed_shapes=True).compute
        self.model = self.compute.place(train_assessor.build_model(args, [0.0, 0.0])).train()
        self.optimizer = common.build_optimizer(self.model, args)
        layout = torch.channels_last if self.compute.channels_last else torch.contiguous_format
        sizes = [min(options.batch_size, options.images - start)
                 for start in range(0, options.images, options.batch_size)]
        self.batches = [(torch.randn(size, 3, 224, 224).to(self.compute.device, memory_format=layout),
                         torch.randn(size, 2).to(self.compute.device)) for size in sizes]

    def epoch(self):
        for images, target in self.batches:
            with self.compute.autocast():
                predicted = self.model(images)
            loss = torch.nn.functional.mse_loss(predicted, target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


def augmentation():
    """torchvision's transforms that are as strong as `--augment full`, on Pillow's pictures; still a picture."""
    return [transforms.Resize(256), transforms.RandomCrop(224), transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(15),
            transforms.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.1), transforms.RandomGrayscale(0.1),
            transforms.RandomPerspective(0.2, p=0.3)]


class PlainFiles(torch.utils.data.Dataset):
    """Pillow decoding and torchvision transforms at every access: float (3, 224, 224) normalised, target (2,)."""

    target = torch.zeros(2)

    def __init__(self, folder, options):
        self.paths = [folder / f"{i}.jpg" for i in range(options.images)]
        self.transform = transforms.Compose([
            *augmentation(), transforms.ToTensor(), transforms.Normalize(common.IMAGENET_MEAN, common.IMAGENET_STD),
            transforms.RandomErasing(0.2, scale=(0.02, 0.15))])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.target


def plain_model(folder, options):
    """The script's network in fp32 and contiguous memory, and its device."""
    device = common.choose_compute("auto", "off").device
    return train_assessor.build_model(script_args(folder, options), [0.0, 0.0]).to(device).train(), device


class ReferenceEpochs:
    """fp32, contiguous memory, AdamW as torch makes it, loader workers."""

    def __init__(self, folder, options):
        self.model, self.device = plain_model(folder, options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.loader = torch.utils.data.DataLoader(PlainFiles(folder, options), options.batch_size, shuffle=True,
                                                  num_workers=options.workers, persistent_workers=True)

    def epoch(self):
        for images, target in self.loader:
            loss = torch.nn.functional.mse_loss(self.model(images.to(self.device)), target.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class TimmEpochs:
    """timm's loader with its prefetcher, its optimiser factory, and the step of its train.py; no mixed precision."""
    package = "timm"

    def __init__(self, folder, options):
        import timm.data
        import timm.optim
        import timm.utils
        self.utils, (self.model, self.device) = timm.utils, plain_model(folder, options)
        dataset = PlainFiles(folder, options)
        dataset.target = 0  # timm's loader knows class numbers alone
        self.loader = timm.data.create_loader(dataset, (3, 224, 224), options.batch_size, is_training=True,
                                              num_workers=options.workers, device=self.device, re_prob=0.2, persistent_workers=True)
        dataset.transform = transforms.Compose([*augmentation(), transforms.PILToTensor(), lambda t: t.numpy()])
        self.optimizer = timm.optim.create_optimizer_v2(self.model, "adamw", lr=1e-4, weight_decay=0.01)

    def epoch(self):
        losses = self.utils.AverageMeter()
        for images, _ in self.loader:
            target = torch.zeros(len(images), 2, device=self.device)
            self.optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(self.model(images), target)
            loss.backward()
            self.optimizer.step()
            losses.update(loss.item(), len(images))


class LightningEpochs:
    """A LightningModule in its Trainer, without logger, checkpoints and progress bar."""
    package = "lightning"

    def __init__(self, folder, options):
        import lightning

        class Module(lightning.LightningModule):
            """The network with a squared error."""

            def __init__(self, model):
                super().__init__()
                self.model = model

            def training_step(self, batch, _):
                return torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), 1e-4)
        self.lightning, self.module = lightning, Module(plain_model(folder, options)[0])
        self.loader = torch.utils.data.DataLoader(PlainFiles(folder, options), options.batch_size, shuffle=True,
                                                  num_workers=options.workers, persistent_workers=True)

    def run_all(self, turn):
        class Turns(self.lightning.Callback):
            """Waits before an epoch and reports after it."""

            def on_train_epoch_start(self, *_):
                turn.__enter__()

            def on_train_epoch_end(self, *_):
                turn.__exit__(None)
        trainer = self.lightning.Trainer(
            max_epochs=10 ** 6, logger=False, enable_checkpointing=False, callbacks=Turns(), num_sanity_val_steps=0,
            enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(self.module, self.loader)


class FastaiEpochs:
    """A fastai Learner over its own DataLoaders, with torch's AdamW."""
    package = "fastai"

    def __init__(self, folder, options):
        import functools

        from fastai import learner, optimizer
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        self.callback, (model, device) = learner.Callback, plain_model(folder, options)
        loader = DataLoader(PlainFiles(folder, options), bs=options.batch_size, shuffle=True, num_workers=options.workers,
                            device=device)
        adamw = functools.partial(optimizer.OptimWrapper, opt=torch.optim.AdamW)
        self.learner = learner.Learner(DataLoaders(loader, loader, device=device), model, torch.nn.MSELoss(), adamw)

    def run_all(self, turn):
        class Turns(self.callback):
            """Waits before an epoch and reports after it."""

            def before_train(self):
                turn.__enter__()

            def after_train(self):
                turn.__exit__(None)

            def before_validate(self):
                from fastai.callback.core import CancelValidException
                raise CancelValidException
        with self.learner.no_logging():
            self.learner.fit(10 ** 6, 1e-4, cbs=Turns())


LOOPS = {"script": ScriptEpochs, "bare": BareEpochs, "reference": ReferenceEpochs, "timm": TimmEpochs,
         "fastai": FastaiEpochs, "lightning": LightningEpochs}


def main():
    options = parse_args()
    compare(__file__, options, make_data, LOOPS,
            f"train_assessor.py: {options.backbone}, {options.images} JPEGs of {options.side} px, batch "
            f"{options.batch_size}", "images", options.images,
            [("script", "bare", "<=", 1.05), ("reference", "script", ">=", 3),
             *((peer, "script", ">", 1) for peer in PEERS)])


if __name__ == "__main__":
    main()
