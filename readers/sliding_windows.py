"""Windows that slide over a whole recording, each frame of which is decoded once and forgotten when no window needs it.

Letters: B windows, T frames of a window, n frames, S side of the input in pixels.
"""
import itertools

import numpy as np
import torch

import common

MOST_AT_ONCE = 64  # frames


def slide(grid, length, step, batch_size, side, frame_features):
    """Yield (places on the grid, {name: (B, T, ...)}) of up to batch_size windows at a time.

    grid: of a video_files.Recording, for windows of this length. length, step: frames of a window,
    and from one window to the next; the last one ends with the recording, and what is shorter is
    one window, in which the last frame is shown on. names: pixels uint8 (S, S, 3), is_new of the
    grid, and those that frame_features(pixels (n + 1, S, S, 3)) gives for all frames but the first,
    which it was given before.
    """
    kept = {}  # name -> (n, ...) of the latest frames
    n_frames = 0
    next_place = 0
    grid = iter(grid)  # which goes on where the last slice ended
    n_at_once = min(step * batch_size, MOST_AT_ONCE)
    while frames := list(itertools.islice(grid, n_at_once)):
        shown, is_new = zip(*frames)
        crops = [common.eval_crop(frame, side) for frame in shown]
        pixels = torch.from_numpy(np.stack(crops))
        last_pixels = kept.get("pixels", pixels[:1])[-1:]
        new = {"pixels": pixels, "is_new": torch.tensor(is_new)}
        new |= frame_features(torch.cat([last_pixels, pixels]))
        for name, values in new.items():
            before = kept.get(name, values[:0])
            kept[name] = torch.cat([before, values])[-len(frames) - length:]
        n_frames += len(frames)
        places = range(next_place, n_frames - length + 1, step)
        if places:
            next_place = places[-1] + step
            yield places, _windows(kept, places, n_frames, length)
    last = n_frames - length
    if last > next_place - step:
        yield [last], _windows(kept, [last], n_frames, length)


def _windows(kept, places, n_frames, length):
    """{name: (B, T, ...)}; kept ends with frame n_frames - 1 of the grid."""
    from_end = torch.tensor(places)[:, None] + torch.arange(length) - n_frames  # (B, T), below 0
    return {name: values[from_end] for name, values in kept.items()}
