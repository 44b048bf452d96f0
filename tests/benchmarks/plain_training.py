"""Run a train script without what makes it fast, for comparison by equality.py.

    python tests/benchmarks/plain_training.py train_assessor.py --use_amp off --cache none ...
    python tests/benchmarks/plain_training.py --keep_one_warp train_assessor.py ...

Replaced are the memory layout (contiguous), the fused optimiser, decoding at reduced size, kept freed memory and, unless
--keep_one_warp is given, the augmentation: torchvision's operations one after the other on the same draws.
"""
import dataclasses
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import JpegImagePlugin
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

BILINEAR = InterpolationMode.BILINEAR


def warp_in_steps(frames, drawn, size):
    """Geometry, one operation after the other: uint8 (T, H, W, 3) -> (T, size, size, 3)."""
    window = common.crop_window(frames.shape[1:], drawn, size)
    left, top, width, height = map(round, window)
    clip = torch.tensor(frames).permute(0, 3, 1, 2)  # (T, H, W, 3) -> (T, 3, H, W)
    clip = F.resized_crop(clip, top, left, height, width, [size, size], BILINEAR, antialias=True)
    if drawn.flip:
        clip = F.hflip(clip)
    if drawn.rotation_deg:
        clip = F.rotate(clip, drawn.rotation_deg, BILINEAR)
    shift = [round(fraction * size) for fraction in drawn.translate]
    if any(shift) or drawn.shear_deg or drawn.scale != 1:
        clip = F.affine(clip, 0.0, shift, drawn.scale, [drawn.shear_deg, 0.0], BILINEAR)
    if drawn.corners is not None:
        start, end = (corners.astype(int).tolist() for corners in common.moved_corners(drawn.corners, size))
        clip = F.perspective(clip, start, end, BILINEAR)
    return np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy())  # (T, 3, S, S) -> (T, S, S, 3)


def jitter_in_steps(pixels, drawn):
    """Colour operations, one after the other: uint8 (H, W, 3) -> (H, W, 3)."""
    clip = torch.tensor(pixels[None]).permute(0, 3, 1, 2)  # (1, 3, H, W)
    for name in drawn.jitter_order:
        amount = getattr(drawn, name)
        if amount != (0.0 if name == "hue" else 1.0):
            clip = getattr(F, f"adjust_{name}")(clip, amount)
    clip = F.rgb_to_grayscale(clip, 3) if drawn.greyscale else clip[:, list(drawn.channels)]
    return np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy())


def without_channels_last(choose_compute):
    """choose_compute whose models keep torch's default memory layout."""
    def choose(*args, **options):
        return dataclasses.replace(choose_compute(*args, **options), channels_last=False)
    return choose


def without_fused_step(build_optimizer):
    """build_optimizer whose optimisers step as torch does by default."""
    def build(*args, **options):
        optimizer = build_optimizer(*args, **options)
        for group in optimizer.param_groups:
            group["fused"] = None
        optimizer.register_step_pre_hook(lambda each, *_: setattr(each, "found_inf", None))  # a fused step alone reads it
        return optimizer
    return build


def slow_down(keep_one_warp, replace=setattr):
    """Replace the fast ways in this process by plain ones; replace: setattr, or a test's own that undoes it."""
    replace(common, "choose_compute", without_channels_last(common.choose_compute))
    replace(common, "build_optimizer", without_fused_step(common.build_optimizer))
    replace(common, "keep_freed_memory", lambda: None)
    replace(JpegImagePlugin.JpegImageFile, "draft", lambda image, mode, size: None)
    if not keep_one_warp:
        replace(common, "warp_clip", warp_in_steps)
        replace(common, "jitter_colours", jitter_in_steps)


if __name__ == "__main__":
    sys.argv.pop(0)
    keep = sys.argv[0] == "--keep_one_warp"
    if keep:
        sys.argv.pop(0)
    slow_down(keep)
    runpy.run_path(sys.argv[0], run_name="__main__")
