"""How often a training step of each script waits for the device: never within an accumulation, at most once a step.

    python -m pytest tests/test_waiting.py

With a CUDA GPU torch itself counts. Without one the network lies on torch's device `meta`, whose tensors have no
numbers: what reads one, or copies to it in a way that waits, is counted here and answered with ones. torchvision's
detector chooses proposals by their number, so in train_detector.py the network is replaced by a convolution.
"""
import contextlib
import warnings
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import common
import train_assessor
import train_detector
import train_dreamer
import train_video

BATCHES = 6
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select",
         "unique")


class WaitsOnMeta(TorchFunctionMode):
    """Counts what would wait for the device that `meta` stands for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        on_device = isinstance(first, torch.Tensor) and first.is_meta
        goes_there = any(str(value) == "meta" for value in (*args[1:], kwargs.get("device")) if value is not None)
        if name in READS and on_device:
            self.count += 1
            return {"tolist": [1.0] * first.numel(), "cpu": torch.ones(first.shape), "__bool__": True}.get(name, 1.0)
        if name == "__getitem__" and on_device:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += sum(isinstance(place, list) or getattr(place, "dtype", None) == torch.bool or
                              (isinstance(place, torch.Tensor) and not place.is_meta) for place in places)
        copies = name == "to" and not on_device and not kwargs.get("non_blocking")
        if goes_there and (copies or name in ("tensor", "as_tensor")):
            self.count += 1
        return function(*args, **kwargs)


class WaitsOnCuda:
    """Counts what torch says of waiting for the GPU."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self._caught = warnings.catch_warnings(record=True)
        self._list = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self.count += sum("synchronizing CUDA operation" in str(each.message) for each in self._list)
        self._caught.__exit__(*error)


@pytest.fixture
def device(monkeypatch):
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta
    monkeypatch.setattr(nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True)
    return torch.device("meta")


class Repeated(torch.utils.data.Dataset):
    """One sample, again and again."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 4 * BATCHES

    def __getitem__(self, key):
        return {**self.sample, "name": str(key[1])}


def start(device, folder, model, sample, accumulate, collate=None):
    """(Training, loader, Compute) of a network on the device and batches of four equal samples."""
    compute = common.Compute(device, "fp32", True, "", common.Processes())
    args = Namespace(
        seed=1, epochs=9, lr=0.01, weight_decay=0.0, scheduler="none", warmup_epochs=0.0, plateau_patience=5, min_lr=0.0,
        accumulate=accumulate, clip_grad=1.0, patience=0, min_epochs=0, min_delta=0.0, dry_run=False, save_minutes=0,
        save_every=0, save_top_k=0, num_workers=0, resume=None, tensorboard=False, wandb=False, compile=False,
        optimizer="adamw", mixup=0.4, loss="mse", model="cnn_lstm", backbone="resnet18", weights=None)
    run = common.Run(folder, args, compute, Namespace(received=0, armed=False, disarm=lambda: None))
    model = model.to(device)
    if device.type == "meta":  # it has no fused step
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.param_groups[0]["factor"] = 1.0
        optimizer.register_step_pre_hook(lambda each, *_: setattr(each, "found_inf", None))
    else:
        optimizer = common.build_optimizer(model, args)
    training = common.Training(run, model, optimizer, args, "last", {})
    return training, common.make_loader(
        Repeated(sample), args, compute, True, collate=collate, batch_size=4), compute


def backbone(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def picture(*shape):
    return torch.full(shape, 7, dtype=torch.uint8)


def assessor_epoch(device, folder, accumulate):
    model = train_assessor.Assessor(backbone(), 4, 2, "mlp", 0.5)
    sample = {"input": picture(32, 32, 3), "target": torch.tensor([1.0, float("nan")]), "weight": torch.ones(2)}
    training, loader, compute = start(device, folder, model, sample, accumulate)
    return training, lambda: train_assessor.train_one_epoch(model, loader, training, compute)


def video_epoch(device, folder, accumulate, mask):
    """Scores of clips, with mixup, a total that is the sum of its parts, and a shorter clip where the mask says so."""
    model = train_video.FrameLstm(backbone(), 4, 3, hidden=8)
    sample = {"input": picture(3, 32, 32, 3), "mask": torch.tensor(mask), "target": torch.ones(3),
              "weight": torch.tensor(1.0)}
    training, loader, compute = start(device, folder, model, sample, accumulate)
    scores = train_video.Scores.__new__(train_video.Scores)
    scores.args = Namespace(loss="mse", consistency_weight=0.1)
    scores.sd, scores.target_weight, scores.total, scores.parts = (1.0, 1.0, 2.0), (1.0, 2.0, 1.0), 2, [0, 1]
    return training, lambda: train_video.train_one_epoch(model, loader, scores, training, compute)


def behaviour_epoch(device, folder, accumulate):
    """Classes of clips with weights, by a network over all frames at once."""
    model = train_video.ClipNet(nn.Sequential(nn.Conv3d(3, 4, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten()), 4, 2)
    sample = {"input": picture(3, 32, 32, 3), "mask": torch.ones(3, dtype=torch.bool),
              "target": torch.tensor([0.0, 1.0]), "weight": torch.tensor(1.0)}
    training, loader, compute = start(device, folder, model, sample, accumulate)
    behaviours = train_video.Behaviours.__new__(train_video.Behaviours)
    behaviours.args = Namespace(loss="focal", label_smoothing=0.1, focal_gamma=2.0)
    behaviours.class_weight = (1.0, 2.0)
    return training, lambda: train_video.train_one_epoch(model, loader, behaviours, training, compute)


class DetectorStub(nn.Module):
    """A convolution whose losses read the boxes as well."""
    settings = {"pixel_mean": list(common.IMAGENET_MEAN), "pixel_sd": list(common.IMAGENET_STD)}

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 3)

    def forward(self, inputs, sizes, targets):
        boxes = sum(target["boxes"].mean() for target in targets)
        return {"loss_box_reg": self.layer(inputs).mean() * boxes, "loss_state": self.layer(inputs).square().mean()}


def detector_epoch(device, folder, accumulate):
    sample = {"pixels": picture(40, 60, 3), "boxes": torch.ones(2, 4), "labels": torch.ones(2, dtype=torch.long),
              "states": torch.zeros(2, dtype=torch.long)}
    model = DetectorStub()
    training, loader, compute = start(device, folder, model, sample, accumulate, train_detector.collate)
    return training, lambda: train_detector.train_one_epoch(model, loader, training, compute, 0.5)


def dreamer_epoch(device, folder, accumulate):
    flags = "--token_type channel --d_model 16 --n_heads 2 --n_layers 1 --feedforward 16"
    args = train_dreamer.parse_args(flags.split())
    scaler = {name: {"mean": torch.zeros(6), "sd": torch.ones(6)} for name in ("motion", "at1", "at2")}
    stages = nn.Sequential(nn.Conv2d(1, 4, 3, 16, 1), nn.ReLU())
    encoder = train_dreamer.Encoder.__new__(train_dreamer.Encoder)
    nn.Module.__init__(encoder)
    encoder.stages, encoder.n_features, encoder.n_cells, encoder.freeze_layers = stages, 4, 4, 0
    encoder.pixel_scale = torch.tensor([127.5, 127.5])
    model = train_dreamer.Dreamer(encoder, args, scaler, "se3_left")
    sample = {"frames": picture(2, 1, 32, 32), **{name: torch.ones(6) for name in ("motion", "other_motion", "at1", "at2")}}
    training, loader, compute = start(device, folder, model, sample, accumulate)
    loss = train_dreamer.DreamLoss(args, scaler)
    return training, lambda: train_dreamer.train_one_epoch(model, loader, loss, training, compute)


EPOCHS = {
    "assessor": assessor_epoch,
    "scores of whole clips": lambda *which: video_epoch(*which, mask=[True, True, True]),
    "scores of short clips": lambda *which: video_epoch(*which, mask=[True, True, False]),
    "behaviours": behaviour_epoch,
    "detector without its network": detector_epoch,
    "dreamer": dreamer_epoch,
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", EPOCHS)
def test_a_step_looks_at_the_device_once(device, tmp_path, name, accumulate):
    """At most one wait a step in the second epoch; the first one copies what lasts."""
    training, epoch = EPOCHS[name](device, tmp_path, accumulate)
    waits = WaitsOnCuda() if device.type == "cuda" else WaitsOnMeta()
    counts = []
    for _ in range(2):
        before = waits.count
        with waits:
            epoch()
        counts.append(waits.count - before)
        training.progress.next_epoch()
    assert counts[1] <= BATCHES // accumulate, f"{counts[1]} waits in {BATCHES // accumulate} steps"
