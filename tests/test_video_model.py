"""train_video.py: clips, masks, networks, losses, balancing; and a motion that only an ordered sequence can tell.

    python -m pytest tests/test_video_model.py
"""
import argparse
import contextlib
import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from torch import nn

import common
import exporting
from evidence import class_scores, event_splits, prediction_tables, verdicts
from readers import backbones, event_tables, video_files
import make_sample_data
import train_video


def arguments(*flags, task="classify"):
    """Arguments of a run with these flags, as a script would have them."""
    return train_video.parse_args(["--task", task, "--manifest", "m.csv", "--no_pretrained", *map(str, flags)])


def table_of(labels, repeats=None, moments=None):
    """A Table of classes a and b with one group a row."""
    n = len(labels)
    texts = np.array([f"clip {i}" for i in range(n)])
    extra = pd.DataFrame({"moment": moments if moments is not None else ["M0"] * n, "row_order": ["0"] * n})
    return event_tables.EventTable(
        names=["a", "b"], clip_ids=texts, lines=texts, sources=texts, windows=np.full((n, 2), np.nan), unit=np.full(n, "sec"),
        events=texts, videos=texts, parts=np.full(n, ""), extra=extra, label=np.array(labels), target=None, groups=None,
        repeats=np.ones(n, np.int64) if repeats is None else np.array(repeats), skipped=[], notes=[])


def scored_table(target, names, moments=None):
    table = table_of([0] * len(target), moments=moments)
    table.names, table.label, table.target = names, None, np.array(target, float)
    return table


def behaviours(args, table, rows=None):
    """Behaviours of a table as the script makes them, all rows for training unless others are named."""
    return train_video.Behaviours(args, table, np.arange(len(table)) if rows is None else rows)


def scores(args, table):
    return train_video.Scores(args, table, np.arange(len(table)))


def study_of(args, n_frames=40, size=64, n_clips=6, short=()):
    """A Study of random clips (T, size, size, 3); those in `short` have only 3 frames on their grid."""
    clips = [np.random.default_rng(i).integers(0, 256, (3 if i in short else n_frames, size, size, 3), dtype=np.uint8)
             for i in range(n_clips)]
    store = SimpleNamespace(audit=[video_files.ClipAudit(str(i), indices=range(len(clip)), usable=len(clip))
                                   for i, clip in enumerate(clips)], cache="ram",
                            part=lambda row, start, stop: clips[row][start:stop])
    table = table_of([i % 2 for i in range(n_clips)])
    return train_video.Study(table, store, np.arange(n_clips), args), clips


def tiny_backbone(width=6):
    """Three pictures' worth of convolution with BatchNorm: (frames, 3, S, S) -> (frames, width)."""
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())


def frame_lstm(width=6, hidden=8, n_outputs=2, dropout=0.0):
    torch.manual_seed(0)
    return train_video.FrameLstm(tiny_backbone(width), width, n_outputs, hidden, dropout=dropout)


# --- clips ------------------------------------------------------------------------------------

def test_a_clip_has_one_augmentation_for_all_its_frames():
    """A clip of one repeated picture stays a clip of one repeated picture, and differs from draw to draw."""
    args = arguments("--image_size", 48, "--n_frames", 5)
    study, clips = study_of(args)
    still = np.repeat(clips[0][:1], 40, axis=0)
    study.frames = lambda row, start, stop: still[start:stop]
    data = train_video.Clips(study, np.arange(6), np.full(6, "heavy", dtype=object))
    drawn = [data[epoch, 0]["input"].numpy() for epoch in range(12)]
    assert all((clip == clip[:1]).all() for clip in drawn)
    assert len({clip.tobytes() for clip in drawn}) == 12
    assert (data[3, 0]["input"].numpy() == drawn[3]).all(), "a draw depends on seed, epoch and sample alone"


def test_training_starts_are_random_and_scored_starts_even():
    args = arguments("--image_size", 32, "--n_frames", 8, "--clips_per_event", 5, "--jitter_sec", 0.5, "--fps", 4)
    study, _ = study_of(args, n_frames=40)
    for found in study.store.audit:
        found.first, found.usable = 2, 36  # of 40, for jitter 2 grid frames before and after the window
    assert study.starts(0) == [2, 9, 16, 23, 30]
    middle = argparse.Namespace(**{**vars(args), "clips_per_event": 1})
    assert dataclasses.replace(study, args=middle).starts(0) == [16]
    seen = set()
    numbered = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 32, 32, 3))
    study.frames = lambda row, start, stop: numbered[start:stop]
    data = train_video.Clips(study, np.arange(6), np.full(6, "none", dtype=object))
    for epoch in range(300):
        frames = data[epoch, 1]["input"][:, 0, 0, 0].tolist()
        assert frames == list(range(frames[0], frames[0] + 8))
        seen.add(frames[0])
    assert seen == set(range(33)), "with the jitter, from the first frame of the grid to its last"
    first, again = ([data[epoch, 1]["input"][0, 0, 0, 0].item() for epoch in range(30)] for _ in range(2))
    assert first == again, "a start depends on seed, epoch and sample alone"


def test_a_row_is_shown_by_frames_of_its_window():
    """Not by those around it, which training alone reads, for jitter."""
    study, _ = study_of(arguments("--jitter_sec", 1), n_frames=40, size=8)
    for found in study.store.audit:
        found.first, found.usable = 10, 20
    numbered = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 8, 8, 3))
    study.store.part = lambda row, start, stop: numbered[start:stop]
    assert study.strip(0)[0, ::8, 0].tolist() == [10, 14, 19, 24, 29]


def test_baselines_see_the_clips_that_are_predicted():
    """Mean over the clips of a row of their features, each pooled over its frames, one clip at a time."""
    args = arguments("--image_size", 32, "--n_frames", 8, "--clips_per_event", 3, "--fps", 4, "--model", "cnn_lstm",
                     "--no_pretrained", "--num_workers", 0, "--use_amp", "off")
    study, clips = study_of(args, size=32, n_clips=2)
    compute = common.choose_compute("cpu", "off")
    run = SimpleNamespace(compute=compute, say=print)
    features = train_video.untuned_features(args, study, run, np.arange(2))
    pooled = features.of_rows["logistic"]
    assert features.of_rows["motion_readout"].shape == (2, 4 * (64 + 128 + 256)), "three resolutions at 32 pixels"
    solved = common.with_flags(args, model="motion_readout")
    own = train_video.untuned_features(solved, dataclasses.replace(study, args=solved), run, np.arange(2)).of_rows
    np.testing.assert_allclose(own["motion_readout"], features.of_rows["motion_readout"], rtol=1e-3, atol=1e-4)
    last = np.r_[64 + 128:448, 448 + 64 + 128:2 * 448]  # of the means, and of the standard deviations
    assert (own["logistic"] == own["motion_readout"][:, last]).all(), "the plain readout of a solved model knows no motion"
    model = train_video.build_model(args, 2).eval()
    for row, frames in enumerate(clips):
        assert study.starts(row) == [0, 16, 32]
        each = []
        for start in study.starts(row):
            inputs = torch.from_numpy(frames[start:start + 8]).movedim(-1, 1) / 255
            inputs = (inputs - torch.tensor(common.IMAGENET_MEAN)[:, None, None]) / torch.tensor(
                common.IMAGENET_STD)[:, None, None]
            with torch.no_grad():
                features = model.backbone(inputs).numpy()  # (T, F)
            each.append(np.concatenate([features.mean(0), features.std(0)]))
        assert pooled[row] == pytest.approx(np.mean(each, axis=0), rel=1e-3, abs=1e-4)


def test_features_are_computed_of_the_rows_asked_for_alone():
    """Those of the others are NaN, and their frames are never read."""
    flags = "--image_size 32 --n_frames 4 --fps 4 --model cnn_lstm --num_workers 0 --use_amp off --freeze_backbone"
    args = arguments(*flags.split(), "--feature_views", 2)
    study, _ = study_of(args, size=32, n_clips=4)
    read = set()
    part = study.store.part
    study.store.part = lambda row, *span: read.add(int(row)) or part(row, *span)
    run = SimpleNamespace(compute=common.choose_compute("cpu", "off"), say=print)
    found = train_video.untuned_features(args, study, run, np.array([1, 3]))
    assert read == {1, 3} == {row for row, _ in found.of_clips}
    assert {key: len(views) for key, views in found.of_clips.items() if key[1] is None} == {(1, None): 2, (3, None): 2}
    assert all(np.isfinite(views).all() for views in found.of_clips.values())
    for values in found.of_rows.values():
        assert np.isnan(values[[0, 2]]).all() and np.isfinite(values[[1, 3]]).all()
    data = train_video.Clips(study, np.array([1, 3]), study.presets, features=found.of_clips)
    first, again = ([data[epoch, 1]["input"].numpy().tobytes() for epoch in range(30)] for _ in range(2))
    assert first == again and set(first) == {view.tobytes() for view in found.of_clips[3, None]} and len(set(first)) == 2
    clip = {name: value[None] for name, value in train_video.Clips(study, np.array([3]))[0, 0].items() if name != "name"}
    with torch.no_grad():
        expected = train_video.build_model(args, 2).eval().extract(*train_video.to_device(clip, args, run.compute))
    np.testing.assert_allclose(found.of_clips[3, study.starts(3)[0]][0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model, weights", [("cnn_lstm", "own.pth"), ("r3d_18", None)])
def test_the_motion_readout_to_compare_with_has_masks_of_its_own_and_weights_that_fit(model, weights, monkeypatch):
    """Weights of a clip network are not those of --backbone; frames that repeat the one before are no motion."""
    study, _ = study_of(arguments("--model", model, "--weights", "own.pth", "--n_frames", 4), n_clips=1)
    study.store.audit[0].indices = np.array([5, 5, 6, 6])
    monkeypatch.setattr(train_video, "build_model", lambda *_: nn.Identity())
    monkeypatch.setattr(train_video, "features_of_rows", lambda network, study, *_: (study.args, study.mask(0, 0).tolist()))
    args, mask = train_video.motion_features(study.args, study, common.choose_compute("cpu", "off"), np.arange(1))
    assert (args.model, args.weights and str(args.weights)) == (train_video.MOTION_READOUT, weights)
    assert mask == [True, False, True, False]


def test_short_sequences_are_padded_with_a_mask():
    args = arguments("--image_size", 32, "--n_frames", 8, task="regress")
    study, clips = study_of(args, n_frames=8, short=(2,))
    predicted = train_video.Clips(study, np.arange(6))[0, 2]
    assert predicted["name"] == "clip 2", "a loss that is not finite names its samples"
    trained = train_video.Clips(study, np.arange(6), np.full(6, "none", dtype=object))
    for sample in (predicted, *(trained[epoch, 2] for epoch in range(5))):
        assert sample["mask"].tolist() == [True] * 3 + [False] * 5
        assert (sample["input"][3:] == 0).all()
        assert (sample["input"][:3].numpy() == np.stack([common.eval_crop(frame, 32) for frame in clips[2]])).all()


def test_augmentation_can_depend_on_the_row():
    args = arguments("--image_size", 32, "--n_frames", 4, "--augment", "none", "--augment_for", "moment:M1=heavy")
    study, clips = study_of(args)
    study.table.extra["moment"] = ["M0", "M1"] * 3
    presets = event_tables.augment_presets(study.table, args.augment_for, args.augment)
    assert presets.tolist() == ["none", "heavy"] * 3
    data = train_video.Clips(study, np.arange(6), presets)
    plain = {common.eval_crop(frame, 32).tobytes() for frame in clips[0]}
    assert all(data[epoch, 0]["input"][0].numpy().tobytes() in plain for epoch in range(5))
    other = {common.eval_crop(frame, 32).tobytes() for frame in clips[1]}
    assert not any(data[epoch, 1]["input"][0].numpy().tobytes() in other for epoch in range(5))


def test_outputs_of_several_clips_are_joined_by_row():
    """mean and max over a row's clips, of any number, against a loop."""
    row_of, outputs = np.array([4, 4, 1, 2, 2, 2]), torch.randn(6, 3)

    class Model(nn.Module):
        def extract(self, clips, mask):
            return clips

        def forward(self, features, mask):
            return features
    loader = [{"input": outputs[start:start + 4], "mask": torch.ones(1)} for start in (0, 4)]
    row_starts = [(row, None) for row in row_of]
    loader = type("Loader", (list,), {})(loader)
    compute = common.choose_compute("cpu", "off")
    for aggregation, join in (("mean", np.mean), ("max", np.max)):
        loader.dataset = SimpleNamespace(rows=row_starts, args=arguments("--aggregation", aggregation))
        found, features = train_video.evaluate(Model(), loader, compute)
        assert found == pytest.approx(np.stack([join(outputs.numpy()[row_of == row], axis=0) for row in (4, 1, 2)]))
        assert features[1] == pytest.approx(outputs[2].numpy())


# --- networks -----------------------------------------------------------------------------------

def test_padding_changes_neither_outputs_nor_gradients():
    """Whatever stands in padded frames, and however many: the same outputs, the same gradients, zero there."""
    model, n_real = frame_lstm().train(), torch.tensor([5, 3, 1])
    clips = torch.randn(3, 5, 3, 16, 16)
    mask = torch.arange(5) < n_real[:, None]
    results = []
    for padding, length in ((0.0, 5), (1e3, 5), (float("nan"), 8)):
        padded = torch.full((3, length, 3, 16, 16), padding)
        longer = torch.arange(length) < n_real[:, None]
        padded[longer] = clips[mask]
        padded.requires_grad_(True)
        model.zero_grad()
        model.backbone[1].reset_running_stats()
        outputs = model(padded, longer)
        outputs.square().sum().backward()
        assert (padded.grad[~longer] == 0).all() and (padded.grad[longer] != 0).any()
        results.append([outputs.detach(), *(p.grad.clone() for p in model.parameters()),
                        model.backbone[1].running_mean.clone()])
    plain, other, longer = results
    assert all(torch.equal(a, b) for a, b in zip(plain, other))
    for a, b in zip(plain, longer):  # an LSTM over more steps multiplies larger matrices, which may round otherwise
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_last_real_frame_decides():
    """A clip cut after its third frame gives what the padded clip of three frames gives: no frame looks ahead."""
    model, clips = frame_lstm().eval(), torch.randn(2, 6, 3, 16, 16)
    cut = model(clips[:, :3], torch.ones(2, 3, dtype=torch.bool))
    masked = model(clips, torch.arange(6).expand(2, 6) < 3)
    assert torch.allclose(cut, masked, atol=1e-6)
    assert not torch.allclose(cut, model(clips, torch.ones(2, 6, dtype=torch.bool)), atol=1e-3)


def motion_by_loops(maps, is_new):
    """The definition, a clip and a channel at a time: maps (T, C, H, W) of its real frames; is_new (T,)."""
    kept = [t for t in range(len(maps)) if is_new[t]]
    means = np.array([maps[t].mean((1, 2)) for t in kept])
    rises, falls = [], []
    for t in kept[1:]:
        change = (maps[t] - maps[t - 1]).reshape(len(maps[0]), -1)
        rises.append(np.maximum(change.max(1), 0))
        falls.append(np.maximum(-change.min(1), 0))
    motion = [np.sqrt(np.mean(np.square(each), axis=0)) if each else np.zeros(len(maps[0])) for each in (rises, falls)]
    return [means.mean(0), means.std(0), *motion]


@pytest.mark.parametrize("n_real, repeats", [(7, ()), (4, ()), (7, (1, 2, 5)), (6, (1, 3, 5)), (1, ())])
def test_motion_features_are_those_of_their_definition(n_real, repeats):
    """Padding and frames that show the one before again count neither as frames nor as pairs; one frame has no motion."""
    args = arguments("--model", "motion_readout", "--image_size", 64, "--n_frames", 7, "--use_amp", "off")
    model = train_video.build_model(args, 2).eval()
    clips = torch.rand(2, 7, 3, 64, 64)
    is_new = np.array([t not in repeats for t in range(7)])
    for t in repeats:
        clips[0, t] = clips[0, t - 1]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0] = torch.from_numpy(is_new) & (torch.arange(7) < n_real)
    with torch.inference_mode():
        found = model.extract(clips, mask).numpy()
        every_map = [each.numpy() for each in model.backbone(clips.flatten(0, 1))]
    for row, (length, new) in enumerate([(n_real, is_new), (7, np.ones(7, bool))]):
        stages = [motion_by_loops(each[7 * row:7 * row + length], new) for each in every_map]
        expected = np.concatenate([np.concatenate(kind) for kind in zip(*stages)])
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-4)
    n_features = model.backbone.n_features
    assert {name: len(columns) for name, columns in backbones.motion_blocks(n_features).items()} == {
        "appearance": n_features // 2, "motion": n_features // 2, "both": n_features}
    last = every_map[-1].mean((2, 3)).reshape(2, 7, -1)[1]
    columns = model.backbone.last_resolution()
    np.testing.assert_allclose(found[1, columns], np.append(last.mean(0), last.std(0)), rtol=1e-3, atol=1e-4)


def test_frames_that_a_slow_source_shows_twice_are_left_out(tmp_path):
    """A source of 4 frames a second read at 8: every other grid frame is masked, but never the first of a clip."""
    np.save(tmp_path / "slow.npy", np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8))
    args = arguments("--model", "motion_readout", "--n_frames", 6, "--fps", 8)
    plan = video_files.plan_grid(video_files.probe(tmp_path / "slow.npy", 4), (0, 2), "rate", 8, 6)
    audit = video_files.ClipAudit("slow", indices=plan.indices, usable=16)
    assert len(plan.indices) == 16 and len(set(plan.indices)) == 16 - 7
    study = SimpleNamespace(args=args, audits=[audit])
    for start in range(4):
        shown = plan.indices[start:start + 6]
        expected = [t == 0 or shown[t] != shown[t - 1] for t in range(6)]
        assert train_video.Study.mask(study, 0, start).tolist() == expected
    study.args = arguments("--model", "cnn_lstm", "--n_frames", 6)
    assert train_video.Study.mask(study, 0, 1).all(), "an LSTM reads every frame of the grid"


@pytest.mark.parametrize("name, size", [("r3d_18", 32), ("mc3_18", 32), ("r2plus1d_18", 32),
                                        ("swin3d_t", 32)])
def test_clip_networks_give_an_output_a_class(name, size):
    args = arguments("--model", name, "--image_size", size, "--n_frames", 4)
    model = train_video.build_model(args, 3).eval()
    with torch.inference_mode():
        outputs = model(torch.randn(1, args.n_frames, 3, size, size), torch.ones(1, args.n_frames, dtype=torch.bool))
    assert outputs.shape == (1, 3) and model.head.linear.in_features == {"swin3d_t": 768}.get(name, 512)


@pytest.mark.parametrize("name, width", [("mvit_v2_s", 768), ("s3d", 1024)])
def test_networks_of_one_input_size(name, width):
    """They are built for it, run, and refuse another one before any data are read into them."""
    args = arguments("--model", name, "--image_size", 224)
    model = train_video.build_model(args, 2).eval()
    with torch.inference_mode():
        outputs = model(torch.randn(1, 16, 3, 224, 224), torch.ones(1, 16, dtype=torch.bool))
    assert outputs.shape == (1, 2) and model.head.linear.in_features == width
    args.image_size = 112
    with pytest.raises(common.UserError, match="needs --n_frames 16 --image_size 224, found 16 and 112"):
        train_video.build_model(args, 2)


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "mvit_v2_s", "swin3d_t"])
def test_colours_are_those_that_the_published_weights_expect(name):
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    batch = {"input": torch.full((1, 2, 32, 32, 3), 255, dtype=torch.uint8), "mask": torch.ones(1, 2) > 0}
    clips, _ = train_video.to_device(batch, arguments("--model", name), common.choose_compute("cpu", "off"))
    expected = (1 - torch.tensor(transforms.mean)) / torch.tensor(transforms.std)
    assert torch.allclose(clips[0, 0, :, 0, 0], expected, atol=1e-5)


def test_unknown_networks_are_named():
    with pytest.raises(common.UserError, match="r3d_18"):
        train_video.build_model(arguments("--model", "r3d_81"), 2)
    with pytest.raises(common.UserError, match="timm:resnet18 is no torchvision classifier of video"):  # it takes pictures
        train_video.build_model(arguments("--model", "timm:resnet18"), 2)


@pytest.mark.parametrize("name, frozen", [("r3d_18", {"stem", "layer1"}), ("cnn_lstm", {"conv1", "bn1"})])
def test_frozen_stages_are_the_first_ones(name, frozen):
    args = arguments("--model", name, "--image_size", 64, "--n_frames", 8, "--freeze_stages", 1)
    model = train_video.build_model(args, 2)
    found = {path.split(".")[0] for path, p in model.backbone.named_parameters() if not p.requires_grad}
    assert found == frozen
    assert all(p.requires_grad for p in model.head.parameters())


def test_published_weights_that_are_missing_name_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    args = arguments("--model", "r3d_18", "--image_size", 32)
    args.pretrained = True
    with pytest.raises(common.UserError) as caught:
        train_video.build_model(args, 2)
    assert "--weights FILE" in str(caught.value) and "--download_weights r3d_18" in str(caught.value)


def test_weights_of_a_clip_network_from_a_file(tmp_path):
    torch.manual_seed(3)
    state = torchvision.models.video.r3d_18().state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pth")
    args = arguments("--model", "r3d_18", "--image_size", 32, "--weights", tmp_path / "w.pth")
    model = train_video.build_model(args, 2)
    assert torch.equal(model.backbone.layer4[1].conv2[0].weight, state["layer4.1.conv2.0.weight"])
    args.model = "mc3_18"
    with pytest.raises(common.UserError, match="not the weights of this backbone"):
        train_video.build_model(args, 2)


def test_clips_keep_the_memory_layout_of_the_convolutions():
    """What to_device hands on is channels_last_3d for clip networks and channels_last for frames: no copy inside."""
    args = arguments("--model", "r3d_18", "--image_size", 32)
    compute = common.choose_compute("cpu", "on")
    batch = {"input": torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8), "mask": torch.ones(2, 4) > 0}
    clips, mask = train_video.to_device(batch, args, compute)
    assert clips.shape == (2, 4, 3, 32, 32)
    assert clips.transpose(1, 2).is_contiguous(memory_format=torch.channels_last_3d)
    mean, sd = (torch.tensor(values)[:, None, None] for values in backbones.pixel_statistics("r3d_18"))
    expected = (batch["input"][1, 2].permute(2, 0, 1) / 255 - mean) / sd
    assert torch.allclose(clips[1, 2], expected, atol=1e-5)
    seen, model = [], frame_lstm()
    model.backbone[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mask[1, 2:] = False
    model(clips, mask)
    assert seen[0].shape == (6, 3, 32, 32) and seen[0].is_contiguous(memory_format=torch.channels_last)
    placed = compute.place(train_video.build_model(args, 2))
    assert placed.backbone.layer2[0].conv1[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_mixed_precision_agrees_with_fp32():
    args = arguments("--model", "cnn_lstm", "--image_size", 64, "--n_frames", 4, "--dropout", 0)
    model = train_video.build_model(args, 2)
    clips, mask = torch.randn(4, 4, 3, 64, 64), torch.ones(4, 4, dtype=torch.bool)
    with torch.inference_mode():
        model.train()(clips, mask)  # running statistics that are not the identity
        plain = model.eval()(clips, mask)
        compute = common.choose_compute("cpu", "on")
        with compute.autocast():
            mixed = compute.place(model)(clips, mask)
    assert mixed.dtype == torch.float32 and compute.precision == "bf16"
    assert (mixed - plain).abs().max() < 0.05 * plain.abs().max()


def test_clip_networks_are_computed_in_fp32_on_a_cpu():
    """Under autocast too: the same outputs and the same gradients to the last bit."""
    args = arguments("--model", "r3d_18", "--image_size", 32, "--n_frames", 4, "--dropout", 0)
    compute, results = common.choose_compute("cpu", "on"), []
    model, mask = train_video.build_model(args, 2).eval(), torch.ones(2, 4, dtype=torch.bool)
    clips = torch.randn(2, 4, 3, 32, 32)
    for context in (contextlib.nullcontext(), compute.autocast()):
        model.zero_grad()
        with context:
            outputs = model(clips, mask)
        outputs.square().sum().backward()
        results.append([outputs.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("model, is_fp32", [("cnn_lstm", False), ("r3d_18", True), ("motion_readout", True)])
def test_an_lstm_alone_is_in_mixed_precision_on_a_cpu(model, is_fp32, monkeypatch):
    """In training; a mean that has one is so too."""
    asked = []
    monkeypatch.setattr(common, "start_run", lambda args, **how: contextlib.nullcontext(asked.append(how)))
    monkeypatch.setattr(train_video, "read_table", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_video.train(arguments("--model", model))
    assert asked == [{"fp32_on_cpu": is_fp32, "fixed_shapes": is_fp32}]
    members = [train_video.Member(None, {}, arguments("--model", each)) for each in ("motion_readout", model)]
    assert train_video.all_in_fp32(members) == is_fp32


def test_bounded_scores_begin_at_the_mean_and_stay_inside():
    head = train_video.Head(8, 2, 0.0, bounded=True)
    head.start_at([1.5, 7.0], [0.0, 1.0], [2.0, 13.0])
    with torch.inference_mode():
        assert head(torch.zeros(1, 8))[0].tolist() == pytest.approx([1.5, 7.0], abs=1e-4)
        far = head(1e4 * torch.randn(50, 8))
    assert (far >= torch.tensor([0.0, 1.0])).all() and (far <= torch.tensor([2.0, 14.0])).all()
    open_head = train_video.Head(8, 2, 0.0)
    open_head.start_at([1.5, 7.0], [1.5, 7.0], [0.5, 3.0])
    with torch.inference_mode():
        assert open_head(torch.zeros(1, 8))[0].tolist() == pytest.approx([1.5, 7.0], abs=1e-4)


def test_the_shift_of_the_class_shares_is_added_outside_training():
    head = train_video.Head(8, 2, 0.0)
    head.prior_shift.copy_(torch.tensor([0.5, -0.25]))
    with torch.inference_mode():
        difference = head.eval()(torch.ones(1, 8)) - head.train()(torch.ones(1, 8))
    assert difference[0].tolist() == pytest.approx([0.5, -0.25])


def test_the_seed_decides_the_random_part_of_a_network():
    flags = ["--model", "cnn_lstm", "--image_size", 32]
    one, again, other = (train_video.build_model(arguments(*flags, "--seed", seed), 2).head.linear.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_first_output_is_the_class_prior():
    args, table = arguments(), table_of([0] * 9 + [1] * 3)
    objective = behaviours(args, table)
    head = train_video.Head(8, 2, 0.0)
    head.start_at(*objective.scale)
    with torch.inference_mode():
        assert torch.softmax(head(torch.zeros(1, 8)), 1)[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-4)


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_one_batch_can_be_learnt_by_heart(task):
    """Model, loss and head scale together: eight random clips are told apart, or scored, almost without error."""
    args = arguments("--dropout", 0, task=task)
    if task == "classify":
        objective = behaviours(args, table_of([0, 1] * 4))
    else:
        target = np.random.default_rng(0).uniform(0, 14, (8, 2))
        objective = scores(args, scored_table(target, ["one", "two"]))
    model = frame_lstm(width=16, hidden=32)
    model.head.start_at(*objective.scale)
    clips, mask = torch.randn(8, 6, 3, 16, 16), torch.arange(6) < torch.tensor([6, 6, 5, 4, 3, 6, 2, 1])[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = objective.loss(model(clips, mask), objective.target, objective.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


# --- export -------------------------------------------------------------------------------------------

def tiny_network(model):
    """A network of each kind on a backbone of three resolutions, with drawn weights, in evaluation mode."""
    torch.manual_seed(1)
    if model == "mc3_18":  # a clip network
        backbone = nn.Sequential(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        return train_video.ClipNet(backbone, 6, 2).eval()
    if model == "cnn_lstm":
        return frame_lstm().eval()
    layers = [nn.Sequential(nn.Conv2d(n, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()) for n in (3, 6, 6)]
    return train_video.MotionReadout(nn.Sequential(*layers), 2, 32).eval()


@pytest.mark.parametrize("model, task, suffix", [
    ("motion_readout", "classify", ".pt2"), ("motion_readout", "classify", ".onnx"), ("cnn_lstm", "regress", ".pt2"),
    pytest.param("cnn_lstm", "regress", ".onnx", marks=pytest.mark.long), ("mc3_18", "classify", ".pt2"),
    pytest.param("mc3_18", "classify", ".onnx", marks=pytest.mark.long)])
def test_an_exported_network_gives_what_the_script_gives(model, task, suffix, tmp_path, capsys):
    """Normalisation, class shares and temperature lie within; as many clips as one likes, padded ones too."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    args = arguments("--model", model, "--image_size", 32, "--n_frames", 6, "--clips_per_event", 2,
                     *(["--fps", 4] if task == "classify" else []), task=task)
    args.pixel_mean, args.pixel_sd, args.pixel_range = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4], [0, 4095]
    args.positive_class = "b"
    network = tiny_network(model)
    network.head.prior_shift.copy_(torch.tensor([0.5, -0.25]))
    calibration = {"calibration": {"temperature": 1.7, "threshold": 0.5}} if task == "classify" else {}
    member = train_video.Member(network, {"names": ["a", "b"], "positive": "b", **calibration}, args)
    study, clips = study_of(args, size=32, short=(2,))
    if task == "regress":
        study.table = scored_table(np.zeros((6, 2)), ["a", "b"])
    file = tmp_path / f"model{suffix}"
    train_video.export(file, [member, member], study)
    assert f"{file}: clips (B, 6, 32, 32, 3)" in capsys.readouterr().out

    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2, 3:] = False
    pixels = np.zeros((6, 6, 32, 32, 3), np.uint8)
    for own, clip in zip(pixels, clips):
        own[:len(clip[:6])] = clip[:6]
    colours = (torch.from_numpy(pixels) / 255 - torch.tensor(args.pixel_mean)) / torch.tensor(args.pixel_sd)
    with torch.inference_mode():
        expected = network(colours.movedim(-1, 2), mask)
    if task == "classify":
        expected = torch.softmax(expected / 1.7, 1)
    inputs = {"clips": pixels} if model == "mc3_18" else {"clips": pixels, "mask": mask.numpy()}
    if suffix == ".onnx":
        session = runtime.InferenceSession(file)
        about = json.loads(session.get_modelmeta().custom_metadata_map["about.json"])
        found = session.run(None, inputs)[0]
    else:
        files = {"about.json": ""}
        found = torch.export.load(file, extra_files=files).module()(*map(torch.from_numpy, inputs.values()))
        about = json.loads(files["about.json"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    resize = about.pop("resize")
    assert resize.startswith("upright, transparency on white") and resize.endswith("the crop begins at (side - crop + 1) // 2")
    of_classes = {"frames_per_sec": 4, "clip_sec": 1.5, "threshold": 0.5, "positive_class": "b"}
    assert about == {"names": ["a", "b"], "frames": 6, "short_side": 37, "crop": 32, "pixel_range": [0, 4095], "task": task,
                     **(of_classes if task == "classify" else {})}


class Branching(train_video.ClipNet):
    """A network whose steps depend on its numbers, which cannot be written as one graph."""

    def forward(self, clips, mask):
        return super().forward(clips if clips.max().item() > 1 else clips.sqrt(), mask)


def test_models_that_cannot_leave_are_named(tmp_path):
    args = arguments("--model", "mc3_18", "--image_size", 32, "--n_frames", 6)
    args.pixel_mean, args.pixel_sd = [0.5] * 3, [0.5] * 3
    network = Branching(tiny_network("mc3_18").backbone, 6, 2).eval()
    content = {"names": ["a", "b"], "positive": "b"}
    study, _ = study_of(args, size=32)
    with pytest.raises(common.UserError, match="cannot be exported to .pt2 .*train another --model"):
        train_video.export(tmp_path / "m.pt2", [train_video.Member(network, content, args)], study)
    with pytest.raises(common.UserError, match=r"differ from this script's by .* on 6 rows"):
        pixels = torch.zeros(6, 6, 32, 32, 3, dtype=torch.uint8)
        member = train_video.Member(tiny_network("mc3_18"), content, args)
        exporting.export(tmp_path / "m.pt2", [member], lambda *_: torch.ones(6, 2), {"clips": pixels},
                         exporting.about_pictures(["a", "b"], 32, None))
    assert not (tmp_path / "m.pt2").exists()


def test_an_exported_file_is_written_whole_and_only_if_it_is_right(tmp_path):
    """An older file outlives a failed check; what the disk refuses is not said of the network."""
    pixels = torch.arange(96, dtype=torch.uint8).reshape(2, 4, 4, 3)
    colours = pixels.float().mean((1, 2))
    member = SimpleNamespace(model=nn.Flatten(), predict_pixels=lambda pixels: pixels.float().mean((1, 2)))

    def export(file, expected, **unit):
        about = exporting.about_pictures(["red", "green", "blue"], 4, None)
        exporting.export(file, [member], lambda *_: expected, {"pixels": pixels}, about, **unit)
    file = tmp_path / "m.pt2"
    one_off = colours - torch.tensor([[0, 0, 0], [0, 0.1, 0]])
    export(file, one_off, unit=torch.tensor([1, 1001, 1]))
    before = file.read_bytes()
    for unit in ({}, {"unit": 950}, {"unit": torch.tensor([9999, 950, 9999])}):
        with pytest.raises(common.UserError, match="differ from this script's by 0.* on 2 rows"):
            export(file, one_off, **unit)
    with pytest.raises(common.CannotSave, match="cannot write .*m.pt2"):
        export(tmp_path / "gone" / "m.pt2", colours)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


def test_models_of_two_kinds_are_no_file(tmp_path):
    """Each kind reads the frames that its own mask tells."""
    members = [train_video.Member(None, {"names": ["a"]}, arguments("--model", model)) for model in ("cnn_lstm", "r3d_18")]
    with pytest.raises(common.UserError, match="different --model"):
        train_video.export(tmp_path / "m.pt2", members, None)


@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_a_clip_without_a_number_is_not_passed_over(aggregation):
    outputs = np.array([[1.0], [np.nan], [3.0]])
    found = class_scores.combine_clips(outputs, [(4, 0), (4, 8), (2, 0)], aggregation)
    assert np.isnan(found[0]) and found[1] == 3


def test_frames_that_fill_up_short_clips_are_not_read():
    model = train_video.MotionReadout(torchvision.models.resnet18(), 2, 32).eval()
    clips = torch.rand(2, 6, 3, 32, 32)
    mask = torch.tensor([[True] * 2 + [False] * 4, [True] * 3 + [False] * 3])
    counts = []
    model.backbone.network.register_forward_pre_hook(lambda network, inputs: counts.append(len(inputs[0])))
    features = model.backbone.frame_features(clips)
    with torch.no_grad():
        torch.testing.assert_close(model.extract(clips, mask), model.extract(features, mask), rtol=1e-4, atol=1e-5)
    assert counts == [12, 6]


# --- classes: loss, weights, sampler, boost ----------------------------------------------------------

def test_cross_entropy_is_that_of_torch():
    """Class weights (scaled to mean 1 over the train rows), smoothing and row weights against torch, row by row."""
    labels = [0] * 6 + [1] * 2
    args = arguments("--balance", "weights", "--label_smoothing", 0.1, "--sample_weight", "moment:M2=2.5")
    table = table_of(labels, moments=["M2", "M0"] * 4)
    objective = behaviours(args, table)
    assert list(objective.class_weight) == pytest.approx([8 / 12, 2.0])
    assert objective.weight.tolist() == [2.5, 1.0] * 4
    logits = torch.randn(8, 2)
    rows = nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none", label_smoothing=0.1)
    expected = (rows * objective.weight * torch.tensor(objective.class_weight).float()[torch.tensor(labels)]).mean()
    assert torch.allclose(objective.loss(logits, objective.target, objective.weight), expected)


@pytest.mark.parametrize("alpha, gamma", [(None, 2.0), (0.75, 2.0), (0.25, 0.5), (None, 0.0)])
def test_focal_loss_is_that_of_torchvision(alpha, gamma):
    """Two classes: sigmoid_focal_loss of the difference of the logits; alpha scaled to mean 1 over the train rows."""
    labels = [0] * 9 + [1] * 3
    flags = ["--focal_alpha", alpha] if alpha is not None else []
    args = arguments("--loss", "focal", "--focal_gamma", gamma, *flags)
    objective = behaviours(args, table_of(labels))
    logits, target = torch.randn(12, 2), torch.tensor(labels, dtype=torch.float32)
    expected = torchvision.ops.sigmoid_focal_loss(logits[:, 1] - logits[:, 0], target, -1 if alpha is None else alpha,
                                                  gamma, "mean")
    scale = 1 if alpha is None else 0.25 * alpha + 0.75 * (1 - alpha)
    assert torch.allclose(objective.loss(logits, objective.target, objective.weight), expected / scale, atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.1])
def test_boost_repeats_the_rare_class_in_train_rows_up_to_the_share(share):
    labels = [0] * 81 + [1] * 19
    objective = behaviours(arguments("--boost_to", share), table_of(labels))
    rows = objective.epoch_rows
    own = np.mean(objective.label[rows] == 1)
    assert own == pytest.approx(max(share, 0.19), abs=0.01)
    counts = np.bincount(rows, minlength=100)
    assert (counts[:81] == 1).all() and np.ptp(counts[81:]) <= 1
    seen = class_scores.softmax(np.log(objective.prior)[None] - objective.prior_shift)
    assert seen[0, 1] == pytest.approx(own)
    assert (objective.prior_shift[1] < 0) == (share > 0.19), "boosted, so it must be brought down"


def test_rows_repeated_by_the_manifest_are_drawn_as_often():
    objective = behaviours(arguments(), table_of([0, 0, 1, 1], repeats=[1, 1, 3, 1]))
    assert objective.epoch_rows.tolist() == [0, 1, 2, 2, 2, 3]
    assert class_scores.softmax(objective.prior_shift[None])[0] == pytest.approx([2 / 3, 1 / 3]), "seen 1 to 2, in the data 1 to 1"


@pytest.mark.parametrize("task, column, higher_is_better, bias, shift", [
    ("classify", "val_b_average_precision", True, np.log([0.75, 0.25]), np.log([1.5, 0.5])), ("regress", "val_loss", False, 0, 0)])
def test_a_network_starts_from_the_train_rows_and_is_chosen_by_the_column_of_its_task(
        task, column, higher_is_better, bias, shift, monkeypatch):
    class Asked(Exception):
        pass

    def training(run, model, *_, select, higher_is_better, **__):
        raise Asked(model, select, higher_is_better)
    monkeypatch.setattr(common, "Training", training)
    monkeypatch.setattr(train_video, "build_model", lambda *_: frame_lstm())
    monkeypatch.setattr(train_video.plotting, "plot_batch", lambda *_: None)
    args = arguments("--model", "cnn_lstm", "--num_workers", 0, *(["--balance", "sampler"] if task == "classify" else []),
                     task=task)
    study, _ = study_of(args, n_frames=1, size=1, n_clips=5)
    study.table = table_of([0, 0, 0, 1, 1])
    study.store.hashes, study.store.pixel_range = np.arange(20).reshape(5, 4), None
    if task == "regress":
        study.table = scored_table(np.arange(10).reshape(5, 2), ["a", "b"])
    run = SimpleNamespace(compute=common.choose_compute("cpu", "off"), say=print)
    with pytest.raises(Asked) as asked:
        train_video.fit(run, args, study, {"train": np.arange(4), "val": np.array([4])}, train_video.Features({}, None))
    model, *chosen = asked.value.args
    assert chosen == [column, higher_is_better]
    assert model.head.linear.bias.tolist() == pytest.approx(np.broadcast_to(bias, 2), abs=1e-6)
    assert model.head.prior_shift.tolist() == pytest.approx(np.broadcast_to(shift, 2), abs=1e-6)


def test_sampler_draws_all_classes_alike():
    labels = [0] * 90 + [1] * 10
    args = arguments("--balance", "sampler", "--batch_size", 8, "--num_workers", 0)
    study, _ = study_of(args, n_frames=1, size=1, n_clips=100)
    study.table = table_of(labels)
    objective = behaviours(args, study.table)
    compute = common.choose_compute("cpu", "off")
    batches = train_video.make_loaders(study, {}, objective, compute, None)[0].batch_sampler
    drawn = []
    for epoch in range(40):
        batches.epoch = epoch
        drawn += [index for batch in batches for _, index in batch]
    assert np.mean(np.array(drawn) >= 90) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(4000))
    assert class_scores.softmax(objective.prior_shift[None])[0] == pytest.approx([0.9, 0.1]), "an even logit means the natural share"


def test_the_sampler_and_weights_in_the_loss_are_both_taken_back():
    labels = [0] * 90 + [1] * 10
    objective = behaviours(arguments("--balance", "sampler", "--focal_alpha", 0.8, "--force"), table_of(labels))
    seen = class_scores.softmax(np.log(objective.prior)[None] - objective.prior_shift)
    assert seen[0] == pytest.approx([0.2, 0.8]), "drawn 1 to 1, weighted 1 to 4"


def test_mixup_mixes_clips_and_classes_alike():
    torch.manual_seed(0)
    target = torch.eye(4)
    clips = target[:, :, None, None, None].expand(4, 4, 3, 2, 2).clone()
    mask, weight, kept = torch.eye(4) > 0, torch.arange(4.0), []
    for _ in range(200):
        mixed, real, shares, mixed_weight = train_video.mix_up(clips, mask, target, weight, 0.4)
        assert ((shares > 0) == real).all(), "a frame is real where one of the two clips has it"
        assert torch.allclose(mixed_weight, shares @ weight)
        assert torch.allclose(mixed[:, :, 0, 0, 0], shares) and torch.allclose(shares.sum(1), torch.ones(4))
        kept.append(shares.diagonal().mean().item())
    # E[share + (1 - share) / 4] of a random partner, itself included
    assert np.mean(kept) == pytest.approx(0.625, abs=0.1) and np.min(kept) < 0.4 < 0.9 < np.max(kept)


@pytest.mark.parametrize("alpha", [0, 5])
def test_a_step_learns_what_mixup_made(alpha):
    """Clips, targets and weights that reach model and loss are those of the batch, or blends of any two of them."""
    torch.manual_seed(0)
    batch = {"input": torch.eye(4), "mask": torch.ones(4, 2) > 0, "target": torch.eye(4), "weight": torch.arange(4.0)}
    args = arguments("--mixup", alpha)
    learnt = []
    objective = SimpleNamespace(loss=lambda *seen: learnt.append(seen))
    training = SimpleNamespace(args=args, batches=lambda loader: loader, step=lambda loss: None, epoch_means=dict)

    class Model(nn.Module):
        def forward(self, clips, mask):
            return clips
    train_video.train_one_epoch(Model(), [batch], objective, training, common.choose_compute("cpu", "off"))
    (clips, target, weight), = learnt
    assert torch.equal(clips, target) and torch.allclose(weight, target @ batch["weight"])
    assert torch.equal(target, batch["target"]) == (alpha == 0)


def test_the_positive_class_is_the_rarest_that_is_there():
    """Of all rows, unlabelled ones (-1) aside; a class without rows is none to look for."""
    assert prediction_tables.choose_positive(None, ["a", "b", "c"], np.array([0] * 21 + [1] * 19 + [-1] * 5)) == 1
    assert prediction_tables.choose_positive("A", ["a", "b"], np.array([0, 0, 1])) == 0


def test_the_positive_class_is_the_rarest_of_all_rows_in_every_fold():
    """21 and 19 rows: with the first five left out, the other class is rarer in the train rows."""
    table = table_of([0] * 21 + [1] * 19)
    for train in (np.arange(40), np.arange(5, 40), np.arange(35)):
        assert behaviours(arguments(), table, train).positive == 1


def test_a_class_without_train_rows_and_wrong_class_names():
    with pytest.raises(common.UserError, match="no train row of class b"):
        behaviours(arguments(), table_of([0, 0, 1]), np.array([0, 1]))
    with pytest.raises(common.UserError, match="--positive_class: found no c"):
        behaviours(arguments("--positive_class", "c"), table_of([0, 1]), np.array([0, 1]))
    objective = behaviours(arguments("--positive_class", "A"), table_of([0, 0, 1]))
    assert objective.positive == 0
    for name, column in ((objective.default_select, ("val_a_average_precision", True)), ("f1_b", ("val_b_f1", True)),
                         ("loss", ("val_loss", False)), ("val_last", ("last", True))):
        assert verdicts.select_column(name, objective.meanings) == column


@pytest.mark.parametrize("select, fails", [
    (None, True), ("a_f1", False), ("b_recall", True), ("auc", True), ("balanced_accuracy", False), ("loss", False),
    ("last", False)])
def test_a_validation_part_that_cannot_choose_the_epoch_is_refused(select, fails):
    """Rows 2 and 3 alone are of class b; the second fold leaves none of them out."""
    folds = [{"train": np.array([0, 2]), "val": np.array([1, 3])}, {"train": np.array([1, 2, 3]), "val": np.array([0])}]
    args = arguments(*([] if select is None else ["--select", select]), "--positive_class", "b", "--folds", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_splits, "make_folds", lambda *_: folds)
        if not fails:
            return train_video.check_flags_of_table(args, table_of([0, 0, 1, 1]))
        with pytest.raises(common.UserError, match="val holds no row of class b, which --select .* needs: .*--seed"):
            train_video.check_flags_of_table(args, table_of([0, 0, 1, 1]))


# --- scores: masks, weights, consistency ---------------------------------------------------------------

NAMES = ["Ears", "Mouth", "Total"]


def scores_of(*flags, target=None):
    draws = np.random.default_rng(0)
    if target is None:
        parts = draws.uniform(0, 2, (8, 2))
        target = np.column_stack([parts, parts.sum(1) + draws.uniform(-0.2, 0.2, 8)])
    args = arguments(*flags, task="regress")
    return scores(args, scored_table(target, NAMES, ["M0", "M2"] * 4))


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_missing_scores_change_neither_loss_nor_gradient(loss):
    objective = scores_of("--loss", loss, "--consistency_weight", 0)
    target = objective.target.clone()
    target[1, 2] = target[3, 0] = target[5] = torch.nan
    predicted, sd = torch.randn(8, 3, requires_grad=True), torch.tensor(objective.sd, dtype=torch.float32)
    value = objective.loss(predicted, target, objective.weight)
    value.backward()
    pointwise = {"mse": nn.functional.mse_loss, "smooth_l1": nn.functional.smooth_l1_loss}[loss]
    labelled = ~torch.isnan(target)
    rows = [pointwise((p / sd)[m], (t / sd)[m]) if m.any() else torch.tensor(0.0)
            for p, t, m in zip(predicted, target, labelled)]
    assert torch.allclose(value, torch.stack(rows).mean())
    assert (predicted.grad[~labelled] == 0).all() and (predicted.grad[labelled] != 0).all()


def test_weights_of_rows_and_scores():
    objective = scores_of("--sample_weight", "moment:M2=2.5", "--target_weights", "Mouth=0", "Total=3",
                          "--consistency_weight", 0)
    predicted, sd = torch.randn(8, 3), torch.tensor(objective.sd, dtype=torch.float32)
    error = ((predicted - objective.target) / sd) ** 2
    expected = ((error[:, 0] + 3 * error[:, 2]) / 4 * torch.tensor([1, 2.5] * 4)).mean()
    assert torch.allclose(objective.loss(predicted, objective.target, objective.weight), expected)
    for wrong in ("Mouth=-1", "Mouth=nan", "Mouth"):
        with pytest.raises(common.UserError, match="expects NAME=WEIGHT of Ears, Mouth, Total, found"):
            scores_of("--target_weights", wrong)


def test_consistency_ties_the_total_to_its_parts_without_labels():
    objective = scores_of("--consistency_weight", 0.1)
    assert (objective.total, objective.parts) == (2, [0, 1])
    predicted = torch.randn(8, 3, requires_grad=True)
    value = objective.loss(predicted, torch.full((8, 3), torch.nan), objective.weight)
    gap = (predicted[:, 2] - predicted[:, 0] - predicted[:, 1]) / objective.sd[2]
    assert torch.allclose(value, 0.1 * (gap ** 2).mean().float(), atol=1e-6)
    value.backward()
    assert torch.allclose(predicted.grad[:, 0], -predicted.grad[:, 2]) and (predicted.grad != 0).all()


def test_a_moment_is_one_in_any_spelling():
    """As in --sample_weight: the table of the moments and their means would part M2 from m2."""
    table = table_of([0] * 6, moments=["M2", "m2", "M0", "M2", "", "m0"])
    assert train_video.moment_levels(arguments(), table).tolist() == ["M2", "M2", "M0", "M2", "", "M0"]
    assert train_video.moment_levels(arguments(), table, [1, 4]).tolist() == ["M2", ""]
    assert train_video.moment_levels(arguments("--moment_column", "day"), table) == ()


def test_a_total_that_sums_nothing_is_tied_to_nothing():
    """Values far apart: by its name it is a total, in its numbers it is not."""
    draws = np.random.default_rng(0)
    target = np.column_stack([draws.normal(70, 5, 8), draws.normal(38, 1, 8), draws.normal(400, 90, 8)])
    assert scores_of(target=target).parts == []


def test_other_repeats_groups_or_columns_are_other_data():
    """Columns may weigh rows (--sample_weight), and what they tell without a picture is judged."""
    study, _ = study_of(arguments("--image_size", 32, "--n_frames", 8))
    others = {"repeats": np.array([3, 1, 1, 1, 1, 1]), "groups": np.array(list("aabbcc")), "events": np.array(list("uvwxyz")),
              "extra": study.table.extra.assign(moment=list("012012"))}
    records = [study.data_record({})["fingerprint"]]
    for name, value in others.items():
        other = dataclasses.replace(study, table=dataclasses.replace(study.table, **{name: value}))
        records.append(other.data_record({})["fingerprint"])
    assert len(set(records)) == 5


def test_the_ensemble_repeats_the_alarms_of_its_split(monkeypatch):
    """Its report is the one that is quoted."""
    study, _ = study_of(arguments("--image_size", 32))
    judged = []
    monkeypatch.setattr(train_video.event_audit, "record_split", lambda *_: ["column subject repeats on two sides"])
    monkeypatch.setattr(train_video.splitting, "add_similar", lambda *_: ())
    monkeypatch.setattr(train_video, "judge", lambda *_, alarms, similar: judged.append(alarms))
    run = SimpleNamespace(path=lambda name: name)
    features = train_video.Features({"logistic": np.zeros((6, 1))}, None)
    table = SimpleNamespace(write=lambda path: None)
    train_video.judge_ensemble(run, study, features, np.array([4, 5]), table)
    assert judged == [["column subject repeats on two sides"]]


def test_a_network_that_starts_from_another_run_is_not_random():
    study, _ = study_of(arguments("--image_size", 32))
    assert any("random weights" in line for line in event_splits.limits(study.args, study.table))
    args = arguments("--init_from", "run", "--image_size", 32)
    assert not any("random weights" in line for line in event_splits.limits(args, study.table))


@pytest.mark.parametrize("split_by, groups, is_said", [(None, "abc", False), (None, "a", True), ("video", "abc", True)])
def test_a_split_that_parts_no_groups_says_nothing_of_new_ones(split_by, groups, is_said):
    """One pen alone is cut by its videos, whatever the flags say."""
    table = SimpleNamespace(groups=np.resize(list(groups), 6))
    said = event_splits.limits(common.with_flags(arguments(), split_by=split_by), table)
    assert any("nothing is said of new ones" in line for line in said) == is_said


def test_constant_scores_are_refused_by_name():
    with pytest.raises(common.UserError, match="nothing to learn: Mouth; .*--target_columns"):
        scores_of(target=np.column_stack([np.arange(8), np.ones(8), np.arange(8)]))


def test_a_score_that_no_train_row_has_is_named_without_warnings(recwarn):
    table = scored_table([[1.0, np.nan], [3.0, np.nan]], ["pain", "fear"])
    assert event_tables.strata_of(table).tolist() == [1.0, 3.0]
    with pytest.raises(common.UserError, match="nothing to learn: fear; leave it out"):
        scores(arguments(task="regress"), table)
    assert not recwarn.list


@pytest.mark.parametrize("task, epochs, batch", [("classify", 30, 4), ("regress", 50, 64)])
def test_help_shows_the_defaults_of_the_task(task, epochs, batch, capsys):
    with pytest.raises(SystemExit, match="0"):
        train_video.parse_args(["--task", task, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"passes over the training rows (default: {epochs})" in text
    assert f"over all processes (default: {batch})" in text
    assert f"are those of {task}, others" in text and "clock (default: 12.0, for judge_bouts" in text


def test_bounds_are_the_range_of_the_train_rows():
    objective = scores_of("--bounded")
    centre, low, span = objective.scale
    assert low == pytest.approx(objective.values.min(0)) and low + span == pytest.approx(objective.values.max(0))
    assert centre == pytest.approx(objective.values.mean(0))


def test_min_epochs_and_patience_together():
    """patience 2, min_epochs 5: a best model before epoch 5 stays the best, and nothing stops before epoch 5."""
    scores = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    stopping, best, stopped = common.EarlyStopping(2, 5, 0.0), (None, -np.inf), None
    for epoch, score in enumerate(scores, 1):
        best = (epoch, score) if score > best[1] else best
        if stopping.update(score, epoch):
            stopped = epoch
            break
    assert stopped == 5 and best == (1, 5.0)
    args = arguments(task="regress")
    assert (args.patience, args.min_epochs, args.min_delta, args.clip_grad, args.batch_size) == (15, 5, 1e-4, 0.5, 64)


# --- motion ----------------------------------------------------------------------------------------

class BrightArea(nn.Module):
    """How much of a frame exceeds each of four brightnesses, which training may move: (frames, 3, S, S) -> (., 4)."""

    def __init__(self):
        super().__init__()
        self.levels, self.norm = nn.Conv2d(3, 12, 1, groups=3), nn.BatchNorm1d(4, momentum=0.05)
        nn.init.ones_(self.levels.weight)
        nn.init.constant_(self.norm.weight, 5.0)  # a clip moves its features less than clips differ
        levels = torch.tensor([110, 130, 150, 170]) / 255
        mean, sd = (torch.tensor(values)[:, None] for values in (common.IMAGENET_MEAN, common.IMAGENET_STD))
        self.levels.bias.data = ((mean - levels) / sd).flatten()

    def forward(self, frames):
        found = torch.relu(self.levels(frames)).mean((2, 3))  # (frames, 3, S, S) -> (frames, 12)
        return self.norm(found.unflatten(1, (3, 4)).mean(1))  # mean over the colours -> (frames, 4)


class BagOfFrames(train_video.FrameLstm):
    """The same layers on the mean over the frames, which knows everything but their order."""

    def forward(self, clips, mask):
        features = (self.extract(clips, mask).sum(1) / mask.sum(1, keepdim=True))[:, None]  # (B, 1, F)
        return self.head(self.lstm(features)[0][:, -1])


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Function n_frames -> (Study, train rows, held-out rows of other pens) on 240 sample clips at 32 px, 12 fps."""
    folder, typed = tmp_path_factory.mktemp("moving"), sys.argv
    (folder / "video").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        make_sample_data.make_events(folder / "video", 240, 42)
    sys.argv = typed

    def study(n_frames):
        manifests = folder / "video" / "manifests"
        args = arguments("--manifest", manifests / "all.csv", "--label_map", manifests / "label_map.json",
                         "--video_root", folder / "video" / "videos", "--image_size", 32, "--fps", 12, "--n_frames",
                         n_frames, "--model", "cnn_lstm", "--clips_per_event", 3, "--balance", "weights")
        found = train_video.load_study(args, train_video.read_table(args), lambda text: None)
        is_train = found.table.groups.astype(int) <= 6
        return found, np.flatnonzero(is_train), np.flatnonzero(~is_train)
    return study


def held_out_auc(moving, kind, n_frames, epochs=20, batch_size=16):
    """AUC of tail events of new pens after training with the script's clips, loss and evaluation."""
    study, train, test = moving(n_frames)
    args, compute = study.args, common.choose_compute("cpu", "off")
    objective = train_video.Behaviours(args, study.table, train)
    torch.manual_seed(0)
    model = kind(BrightArea(), 4, 2, 32)
    model.head.start_at(*objective.scale)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    data = train_video.Clips(study, train, np.full(len(study.table), "none", dtype=object), objective)
    args.num_workers = 0
    loader = common.make_loader(data, args, compute, True, batch_size=batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(loader.batch_sampler))
    for epoch in range(epochs):
        loader.batch_sampler.epoch = epoch
        for batch in loader:
            clips, mask = train_video.to_device(batch, args, compute)
            loss = objective.loss(model(clips, mask), batch["target"], batch["weight"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    scoring = common.make_loader(train_video.Clips(study, test), args, compute, False, batch_size=48)
    logits, _ = train_video.evaluate(model, scoring, compute)
    assert objective.names[objective.positive] == "tail" and len(test) == 60
    probability = class_scores.softmax(logits)[:, objective.positive]
    return roc_auc_score(objective.label[test] == objective.positive, probability)


def test_motion_is_learnt_from_the_order_of_frames(moving):
    """Ordered frames tell the classes of new pens apart."""
    assert held_out_auc(moving, train_video.FrameLstm, 16, epochs=12) > 0.95


@pytest.mark.long
def test_frames_without_an_order_tell_nothing(moving):
    """One frame, or all frames in a bag."""
    chance_sd = np.sqrt(61 / (12 * 15 * 45))  # of an AUC of 15 and 45 rows by chance
    for kind, n_frames in ((train_video.FrameLstm, 1), (BagOfFrames, 16)):
        assert abs(held_out_auc(moving, kind, n_frames, epochs=10) - 0.5) < 2.6 * chance_sd
