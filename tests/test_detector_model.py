"""The network of train_detector.py: torchvision's losses and boxes, the state head in the same pass, and the weights.

    python -m pytest tests/test_detector_model.py
"""
import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import common
import train_detector
from evidence import row_warnings
from readers import backbones
from readers.part_boxes import STATES, UNKNOWN

FP32 = common.choose_compute("cpu", "off")
VALIDATION = SimpleNamespace(seed=5, state_weight=0.5)  # the flags that evaluate looks at


def small_settings(**changes):
    return {"model": "fasterrcnn_resnet18_fpn", "min_size": 64, "max_size": 64, "anchor_sizes": [12, 20, 32, 48],
            "parts": ["bell", "chain", "saddle"], "states": list(STATES), "nms_iou": 0.5, "frozen_norm": False,
            "pixel_mean": list(common.IMAGENET_MEAN), "pixel_sd": list(common.IMAGENET_STD), **changes}


def small_detector(**changes):
    torch.manual_seed(0)
    model = train_detector.PartDetector(small_settings(**changes))
    for sampler in (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 32  # seconds instead of minutes
    return model


BOXES = torch.tensor([[4.0, 4, 28, 28], [36, 6, 60, 30], [6, 36, 30, 60], [38, 38, 62, 62]])
COLOURS = ((250, 30, 30), (30, 250, 30), (40, 40, 250), (250, 250, 30))


def sample(labels=(1, 2, 3, 1), states=(0, 1, 2, 3), boxes=BOXES, name="0.jpg"):
    """One picture of 64 px with a coloured square in each box."""
    pixels = torch.full((64, 64, 3), 120, dtype=torch.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes.int().tolist(), COLOURS):
        pixels[y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.uint8)
    return {"pixels": pixels, "scale": np.ones(2), "boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64),
            "states": torch.tensor(states, dtype=torch.int64), "name": name}


def device_batch(*samples, settings=None):
    return train_detector.to_device(train_detector.collate(samples), FP32, settings or small_settings())


# --- the same as torchvision ----------------------------------------------------------

def test_losses_and_detections_are_torchvisions():
    """The four losses and the boxes of FasterRCNN itself, with the same weights, draws and picture."""
    model = small_detector(states=[]).eval()
    judge = train_detector.build_rcnn(model.settings).eval()
    judge.backbone, judge.rpn, judge.roi_heads.box_head = model.backbone, model.rpn, model.roi_heads.box_head
    judge.roi_heads.box_predictor, judge.roi_heads.score_thresh = model.roi_heads.box_predictor, 0.05
    judge.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    # normalised once for both: with random weights, rounding alone would reorder the proposals
    judge.transform = GeneralizedRCNNTransform(64, 64, (0, 0, 0), (1, 1, 1)).eval()
    inputs, sizes, targets = device_batch(sample(), sample((2, 2, 3, 3)))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] += 2  # so that something is detected
        torch.manual_seed(7)
        own, found = model(inputs, sizes, targets), model(inputs, sizes)
        judge.rpn.training = judge.roi_heads.training = judge.training = True
        torch.manual_seed(7)
        theirs = judge(list(inputs), targets)
        judge.rpn.training = judge.roi_heads.training = judge.training = False
        their_boxes = judge(list(inputs))
    assert set(own) == set(theirs) and len(found[0]["boxes"])
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-4, atol=1e-5)
    for mine, other in zip(found, their_boxes):
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("first", [(40, 44), (64, 64)])
def test_scales_do_not_depend_on_the_first_pictures(first):
    """torchvision keeps a guess from the first batch: half the stride where padding is large, for the rest of a run."""
    maps = {str(k): torch.randn(2, 8, 64 >> k, 64 >> k) for k in (3, 4, 5)}
    boxes, pool = [torch.tensor([[4.0, 4, 30, 30]])] * 2, train_detector.PaddedRoIAlign(["3", "4", "5"], 7, 2)
    pool(maps, boxes, [(first[0], 64), (first[1], 60)])
    found = pool(maps, boxes, [(60, 64), (64, 60)])
    assert pool.scales == [1 / 8, 1 / 16, 1 / 32]
    judge = torchvision.ops.MultiScaleRoIAlign(["3", "4", "5"], 7, 2)
    assert (found - judge(maps, boxes, [(60, 64), (64, 60)])).abs().max() < 1e-5


@pytest.mark.parametrize("levels, bins", [((3, 4, 5), 7), ((2, 3, 4, 5), 5)])
def test_boxes_are_pooled_as_torchvision_does(levels, bins):
    """Values and gradients, for boxes of all sizes, also at the edges, and a picture without any."""
    draws = torch.Generator().manual_seed(1)
    names = [str(level) for level in levels]
    maps = {name: torch.randn(3, 8, 640 >> level, 896 >> level, generator=draws).requires_grad_()
            for name, level in zip(names, levels)}
    ends = torch.rand(200, 2, 2, generator=draws) ** 3 * torch.tensor([896, 640])
    boxes = torch.cat([ends.amin(1), ends.amax(1)], 1)
    boxes[:3] = torch.tensor([[0, 0, 896, 640], [895.9, 639.5, 896, 640], [40, 40, 40, 40]])
    boxes = list(boxes.split([90, 0, 110]))
    found = []
    for kind in (torchvision.ops.MultiScaleRoIAlign, train_detector.PaddedRoIAlign):
        pooled = kind([*names, "absent"], bins, 2)({**maps, "pool": torch.zeros(3, 8, 4, 4)}, boxes, [(640, 896)] * 3)
        direction = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape)
        found.append([pooled, *torch.autograd.grad(pooled, maps.values(), direction)])
    for theirs, ours in zip(*found):
        assert theirs.shape == ours.shape and theirs.abs().max() > 0.1, "every map takes part"
        assert (theirs - ours).abs().max() < 1e-4 * theirs.abs().max()
    none = train_detector.PaddedRoIAlign(names, bins, 2)(maps, [each[:0] for each in boxes], [(640, 896)] * 3)
    assert none.shape == (0, *found[0][0].shape[1:])


def test_detections_do_not_depend_on_the_other_pictures_of_a_batch():
    """96 px are three cells of stride 32: padded to them alone, the coarsest map would have anchors 48 px apart."""
    model = small_detector().eval()
    generator = torch.Generator().manual_seed(0)
    samples = [{**sample(name=str(side)), "pixels": torch.randint(0, 256, (side, 128, 3), generator=generator,
                                                                  dtype=torch.uint8)} for side in (96, 128, 120)]

    def detect(*chosen):
        inputs, sizes, _ = device_batch(*chosen)
        with torch.no_grad():
            return model(inputs, sizes)
    for together, each in zip(detect(*samples), samples):
        alone, = detect(each)
        assert len(alone["scores"])
        for name in ("boxes", "labels", "scores", "states"):
            torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-3)


def test_portraits_and_landscapes_are_detected_as_if_alone():
    """Those of one loader batch, in their order; padded to a common size they would not be."""
    model = small_detector().eval()
    draws = torch.Generator().manual_seed(0)
    samples = [{**sample(), "pixels": torch.randint(0, 256, (*sides, 3), generator=draws, dtype=torch.uint8)}
               for sides in ((64, 128), (60, 120), (128, 64), (64, 128))]

    def found_in(*loader):
        return train_detector.detect(model, loader, FP32)["detections"]
    together = found_in(train_detector.collate_alike(samples))
    alone = found_in(*([train_detector.collate([each])] for each in samples))
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    padded = found_in([train_detector.collate(samples)])
    assert any(one.boxes.shape != other.boxes.shape or not np.allclose(one.boxes, other.boxes, atol=1e-2)
               for one, other in zip(padded, alone))


@pytest.mark.parametrize("name", train_detector.MODELS)
def test_inputs_are_multiples_of_every_stride_of_a_model(name):
    anchors = [12, 20, 32, 48] if name == train_detector.RESNET18 else train_detector.COCO_ANCHORS
    model = train_detector.build_rcnn({"model": name, "anchor_sizes": anchors}).eval()
    height, width = train_detector.padded_size([(70, 96)])
    inputs = torch.zeros(1, 3, height, width)
    with torch.no_grad():
        maps = list(model.backbone(inputs).values())
    strides = {side / cells for each in maps for side, cells in zip((height, width), each.shape[2:])}
    assert max(strides) == train_detector.PADDING and strides <= {4, 8, 16, 32, 64}
    generator = model.rpn.anchor_generator
    found, = generator(torchvision.models.detection.image_list.ImageList(inputs, [(70, 96)]), maps)
    per_place = generator.num_anchors_per_location()
    assert len(found) == sum(n * each[0, 0].numel() for n, each in zip(per_place, maps, strict=True))


@pytest.mark.parametrize("n_trained", range(6))
def test_frozen_stages_are_those_of_torchvision(n_trained):
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d,
                                 trainable_layers=n_trained).body
    own = small_detector().backbone.body
    train_detector.freeze_layers(own, n_trained)
    trained = [{name for name, p in body.named_parameters() if p.requires_grad and p.ndim == 4} for body in (own, theirs)]
    assert trained[0] == trained[1]


def test_a_mobilenet_is_frozen_by_resolutions():
    model = small_detector(model="fasterrcnn_mobilenet_v3_large_320_fpn", anchor_sizes=[32, 64, 128, 256, 512])
    train_detector.freeze_layers(model.backbone.body, 2)
    trained = {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {str(block) for block in range(7, 17)}


def test_frozen_norm_is_not_trained_and_keeps_its_statistics():
    model = small_detector(frozen_norm=True)
    train_detector.freeze_layers(model.backbone.body, 5)
    norms = [module for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    spread = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()  # as with several GPUs
    norms = [module for module in spread.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


# --- the state head ---------------------------------------------------------------------

class PlacesAsFeatures(nn.Module):
    """Stands in for RoI pooling: the features of a box are its centre, (Q, 2), whatever the maps hold."""

    def forward(self, features, boxes, image_shapes):
        # B of (Q, 4) -> (Q of all pictures, 2)
        return torch.cat([(each[:, :2] + each[:, 2:]) / 2 for each in boxes])


class StateFromPlace(nn.Module):
    """Stands in for a perfect state head: the quadrant of a picture of 64 px is the state."""

    def forward(self, places):
        # (Q, 2) -> (Q, 4)
        quadrant = (places[:, 0] > 32).long() + 2 * (places[:, 1] > 32).long()
        return 50.0 * nn.functional.one_hot(quadrant, 4).float()


class NoPrediction(nn.Module):
    def forward(self, places):
        # (Q, 2) -> (Q, 4), (Q, 16)
        return torch.zeros(len(places), 4), torch.zeros(len(places), 16)


def detector_that_knows(order):
    """A detector whose state head is right for boxes in the four quadrants, and targets with the boxes in `order`."""
    model = small_detector()
    heads = model.roi_heads
    heads.box_roi_pool, heads.box_head, heads.box_predictor = PlacesAsFeatures(), nn.Identity(), NoPrediction()
    heads.state_head = StateFromPlace()
    targets = [{"boxes": BOXES[list(each)], "labels": torch.ones(len(each), dtype=torch.int64),
                "states": torch.tensor(each)} for each in order]
    return model, targets


def proposals_near(targets):
    """Shifted copies of every box among background boxes, in random order."""
    torch.manual_seed(1)
    near = [torch.cat([*(t["boxes"] + torch.randn(len(t["boxes"]), 4) for _ in range(6)),
                       64 * torch.rand(9, 4).sort(1)[0]]) for t in targets]
    return [each[torch.randperm(len(each))] for each in near]


ORDERS = [(2, 0, 3, 1), (1, 3), (3, 2, 1)]


def test_each_proposal_learns_the_state_of_the_box_that_it_matched():
    model, targets = detector_that_knows(ORDERS)
    losses = model.box_losses({}, proposals_near(targets), [(64, 64)] * 3, targets)
    assert losses["loss_state"].item() < 1e-6


@pytest.mark.parametrize("shift", ["next box", "next picture"])
def test_a_matching_that_is_off_by_one_is_seen(monkeypatch, shift):
    """The test above has teeth: states taken one box or one picture further give a large loss."""
    model, targets = detector_that_knows(ORDERS)
    if shift == "next box":
        right = train_detector.target_states
        monkeypatch.setattr(train_detector, "target_states",
                            lambda states, matched: right(states, (matched + 1) % max(len(states), 1)))
    else:
        states = [t["states"] for t in targets]
        for target, other in zip(targets, states[1:] + states[:1]):
            target["states"] = other.repeat(4)[:len(target["boxes"])]
    assert model.box_losses({}, proposals_near(targets), [(64, 64)] * 3, targets)["loss_state"].item() > 5


def test_unknown_states_and_background_teach_nothing():
    model, targets = detector_that_knows([(2, 0, 3, 1), (1, 3), ()])
    targets[0]["states"] = torch.tensor([2, UNKNOWN, UNKNOWN, 1])
    losses = model.box_losses({}, proposals_near(targets), [(64, 64)] * 3, targets)
    assert losses["loss_state"].item() < 1e-6
    for target in targets:
        target["states"] = torch.full_like(target["states"], UNKNOWN)
    losses = model.box_losses({}, proposals_near(targets), [(64, 64)] * 3, targets)
    assert losses["loss_state"].item() == 0 and torch.isfinite(losses["loss_classifier"])


def test_each_final_detection_carries_its_own_state():
    model, _ = detector_that_knows(ORDERS)
    boxes = [BOXES[[2, 0, 3]], BOXES[:0], BOXES[[1]]]
    states = model.state_probabilities({}, boxes, [(64, 64)] * 3)
    assert [each.argmax(1).tolist() for each in states] == [[2, 0, 3], [], [1]]
    torch.testing.assert_close(states[0].sum(1), torch.ones(3))


def test_the_temperature_softens_the_states():
    model, _ = detector_that_knows(ORDERS)
    model.temperature = 50.0
    states, = model.state_probabilities({}, [BOXES[[1]]], [(64, 64)])
    torch.testing.assert_close(states, torch.eye(4)[[1]].softmax(1))


def test_of_two_boxes_of_a_part_the_better_is_kept():
    model = small_detector(states=[]).eval()
    inputs, sizes, _ = device_batch(sample())
    most = []
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] += 2
        for model.roi_heads.nms_thresh in (0.5, 0.1):
            found = model(inputs, sizes)[0]
            overlap = torchvision.ops.box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0)
            most.append(overlap[found["labels"][:, None] == found["labels"]].max().item())
    assert most[0] > 0.1 >= most[1]


def test_the_overlap_and_temperature_of_a_run_stay_with_its_checkpoint(monkeypatch, tmp_path):
    """A flag overrules the overlap."""
    (tmp_path / "best_model.pth").touch()
    model = small_detector()
    for flag, expected in ((None, 0.3), (0.7, 0.7)):
        content = {"settings": small_settings(nms_iou=0.3), "model": model.state_dict(), "temperature": 1.7}
        monkeypatch.setattr(common, "load_model_file", lambda path: content)
        found, _ = train_detector.load_detector(tmp_path / "best_model.pth", FP32, flag)
        assert (found.roi_heads.nms_thresh, found.temperature) == (expected, 1.7)


def test_the_temperature_of_the_states_is_that_of_the_lowest_loss(monkeypatch):
    """Of the val boxes that were found, by SciPy; the features of the train and the val pictures stay with it."""
    draws = np.random.default_rng(0)
    logits = 4 * draws.normal(size=(60, 4))
    true = np.where(draws.random(60) < 0.6, logits.argmax(1), draws.integers(0, 4, 60))
    features = {"train": draws.random((5, 3)), "val": draws.random((4, 3))}
    monkeypatch.setattr(train_detector, "detect", lambda model, loader, compute: {
        "picture_features": list(features[loader]), "detections": "those of the val pictures"})
    monkeypatch.setattr(train_detector.detection_scores, "coco_match", lambda truth, found, metric: (truth, found))
    monkeypatch.setattr(train_detector.detection_scores, "found_states", lambda matching, found: SimpleNamespace(
        probabilities=scipy.special.softmax(logits, 1), true=true) if matching == ("truth", found) else None)
    saved = []
    training = SimpleNamespace(model=SimpleNamespace(settings=small_settings()), load_best=dict, save_model=saved.append,
                               run=SimpleNamespace(compute=FP32, say=print))
    train_detector.finish_best_model(training, "truth", "train", "val")
    judge = scipy.optimize.minimize_scalar(
        lambda log_t: -scipy.special.log_softmax(logits / np.exp(log_t), 1)[np.arange(60), true].mean(), bounds=(-3, 3))
    assert saved[0]["temperature"] == pytest.approx(np.exp(judge.x), rel=0.01) and judge.x > 0.3
    expected = row_warnings.known_data(features["train"], features["val"])
    assert repr(saved[0]["known_data"]) == repr(expected)


def test_overfitting_is_told_of_the_best_epoch(monkeypatch):
    """The one that is judged, not the last; beside the alarms of the split."""
    history = [{"train_loss": 0.5, "val_loss": loss} for loss in (3.0, 2.0, 9.0)]
    judged = []
    for name, value in {"check_split": ["leak"], "check_states": None, "write_annotations": None, "load_models": (None, None),
                        "detect_rows": "found", "fit": SimpleNamespace(history=history, best_epoch=2),
                        "untuned_features": "features"}.items():
        monkeypatch.setattr(train_detector, name, lambda *_, value=value: value)
    monkeypatch.setattr(train_detector.splitting, "add_similar", lambda *given: given[1:])
    monkeypatch.setattr(train_detector.plotting, "plot_history", lambda *_: None)
    monkeypatch.setattr(train_detector, "judge", lambda *given, **known: judged.append((given[-3:], known)))
    recorded = {}
    run = SimpleNamespace(write_record=lambda *_, **further: recorded.update(further), say=print, path=str, compute=None)
    args = train_detector.parse_args(["--train_json", "a.json", "--train_images", "images", "--group_column", "street",
                                      "--val_batch_size", "3"])
    split = {"train": np.arange(2), "val": np.array([2]), "test": np.array([], int)}
    train_detector.run_split(run, args, SimpleNamespace(truth=SimpleNamespace(images="names")), split)
    (where, known), = judged
    assert where == ("val", ["found"], ("features", split, "names")) and known["best_epoch"] == 2
    assert known["alarms"] == ["leak", *train_detector.overfitting_alarms(history[1])] and len(known["alarms"]) == 2
    assert recorded == {"val_batch_size": 3}, "a resumed run must keep it"


def test_folds_are_judged_as_one_with_the_alarms_of_their_split_and_the_numbers_of_each(monkeypatch, tmp_path):
    """Of three folds the last two, as if one more were to be trained by another job."""
    rows = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    splits = [{"train": np.arange(6), "val": np.array([0]), "test": own} for own in rows]
    for k in range(3):
        (tmp_path / f"fold_{k}").mkdir()
        common.write_json(tmp_path / f"fold_{k}" / "metrics.json", {
            "best_epoch": k, "headline": {"value": 0.25 * k, "baseline": {"value": 0.125 * k}}})
    judged, written, recorded = [], [], []
    for name, function in {
            "make_folds": lambda *_: splits, "examine_split": lambda *_: None, "check_states": lambda *_: None,
            "check_split": lambda *_: ["leak"], "load_models": lambda path, *_: (path.parent.name, path.name),
            "detect_rows": lambda run, args, study, rows, *found: SimpleNamespace(rows=rows, found=found),
            "write_annotations": lambda run, args, study, split: written.append(split["folds"].tolist()),
            "untuned_features": lambda args, study, compute, rows: rows.tolist(),
            "judge": lambda run, args, study, split, part, scored, similar, **known: judged.append(
                (split, part, scored, similar, known))}.items():
        monkeypatch.setattr(train_detector, name, function)
    checked = []
    monkeypatch.setattr(train_detector.splitting, "check_leakage", lambda report, is_allowed: checked.append(is_allowed))

    def train_the_last_two(*_):
        assert checked == [False] * 3, "all before the first one is trained"
        return [1, 2]
    monkeypatch.setattr(train_detector.splitting, "add_similar", lambda *given: given[1:])
    truth = SimpleNamespace(take=lambda rows: truth, has_states=lambda: True, images="names")
    run = SimpleNamespace(path=lambda name: tmp_path / name, each_fold=train_the_last_two, compute=None,
                          write_record=lambda study, split: recorded.append(list(split)))
    args = train_detector.parse_args(["--train_json", "a.json", "--train_images", "images", "--folds", "3", "--no_pretrained"])
    train_detector.run_folds(run, args, SimpleNamespace(truth=truth, stored=np.arange(6)))
    [(split, part, scored, similar, known)] = judged
    assert similar == ([0, 1, 2, 3, 4, 5], split, "names")
    assert recorded == [["fold_0", "fold_1", "fold_2"]] == [list(split)] and written == [[1, 2, 4, 5]] and part == "folds"
    assert [(each.rows.tolist(), each.found) for each in scored] == [
        ([1], ("fold_1", "best_model.pth")), ([2, 4, 5], ("fold_2", "best_model.pth"))]
    assert known == {"alarms": ["leak"], "limits": train_detector.limits(args), "folds": [
        {"fold": 1, "best_epoch": 1, "rows": 1, "ap": 0.25, "baseline_ap": 0.125},
        {"fold": 2, "best_epoch": 2, "rows": 3, "ap": 0.5, "baseline_ap": 0.25}]}
    assert len(known["limits"]) == 2, "no --group_column, and random weights"


def test_evaluation_reads_pictures_as_the_checkpoint_does(monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def load_study(args, files, say, parts):
        raise Asked(args.absent, args.min_size, args.pixel_range, files, parts)
    content = {"settings": small_settings(pixel_range=[0, 4095]), "absent": "drop", "epoch": 2}
    monkeypatch.setattr(train_detector, "load_models", lambda *_: ({}, content))
    monkeypatch.setattr(train_detector, "load_study", load_study)
    (tmp_path / "best_model.pth").touch()
    args = train_detector.parse_args(["--mode", "evaluate", "--checkpoint", str(tmp_path / "best_model.pth"), "--json", "a.json",
                                      "--images_dir", "images", "--output_dir", str(tmp_path)])
    with pytest.raises(Asked) as asked:
        train_detector.evaluate_checkpoint(args)
    files = {"test": (args.json, args.images_dir)}
    assert asked.value.args == ("drop", 64, [0, 4095], files, content["settings"]["parts"])


def test_states_that_no_train_box_has_still_have_a_loss():
    """Balanced weights: a validation batch of such states alone would else have 0 / 0, which no epoch survives."""
    truth = SimpleNamespace(judged_states=lambda: np.array([0, 0, 0, 1, UNKNOWN]))
    weights = train_detector.state_weights(SimpleNamespace(state_class_weights="balanced"), truth)
    assert weights == pytest.approx([4 / 3 / 2, 4 / 2, 1, 1])
    model = train_detector.PartDetector(small_settings(), weights)
    model.roi_heads.state_head = nn.Identity()
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1.0, 0]])
    targets, matched = [{"states": torch.tensor([2, 3])}], [torch.tensor([0, 1])]
    expected = nn.functional.cross_entropy(logits, torch.tensor([2, 3])).item()
    assert model.state_loss(logits, matched, [torch.tensor([1, 2])], targets).item() == pytest.approx(expected)


def test_class_weights_scale_the_state_loss():
    loss = {}
    for weights in (None, [1.0, 0.0, 1.0, 1.0]):
        model = train_detector.PartDetector(small_settings(), weights)
        model.roi_heads.state_head = nn.Identity()
        logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1.0, 0]])
        targets, matched = [{"states": torch.tensor([0, 1])}], [torch.tensor([0, 1])]
        loss[weights is None] = model.state_loss(logits, matched, [torch.tensor([1, 2])], targets).item()
    first, second = (nn.functional.cross_entropy(logits[k:k + 1], torch.tensor([k])).item() for k in (0, 1))
    assert loss[True] == pytest.approx((first + second) / 2) and loss[False] == pytest.approx(first)


def test_plain_detection_has_no_state_head():
    model = small_detector(states=[]).eval()
    inputs, sizes, targets = device_batch(sample(states=[UNKNOWN] * 4))
    with torch.no_grad():
        losses, found = model(inputs, sizes, targets), model(inputs, sizes)
    assert "loss_state" not in losses and len(losses) == 4
    assert train_detector.on_disk(found, np.ones((1, 2)))[0].states is None


def test_detections_are_told_in_pixels_of_the_picture_on_disk_with_parts_from_0():
    """By hand: a picture twice as wide and half as high on disk as in the input."""
    states = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    found = {"boxes": torch.tensor([[2.0, 4, 6, 8], [1, 2, 3, 4]]), "labels": torch.tensor([3, 1]),
             "scores": torch.tensor([0.75, 0.5]), "states": states}
    [first, second] = train_detector.on_disk([found, {name: each[:0] for name, each in found.items()}],
                                             np.array([[2, 0.5], [1, 1]]))
    assert first.boxes.tolist() == [[4, 2, 12, 4], [2, 1, 6, 2]] and first.labels.tolist() == [2, 0]
    assert first.scores.tolist() == [0.75, 0.5] and first.scores.dtype == float
    assert first.states.tolist() == states.tolist() and second.states.shape == (0, 4)


def test_pictures_without_objects_give_finite_losses():
    model = small_detector().train()
    empty = sample([], [], BOXES[:0])
    losses = model(*device_batch(empty, empty))
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_state"].item() == 0
    train_detector.total_loss(losses, 0.5).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_one_picture_can_be_learnt_by_heart():
    """All boxes, parts and states of one picture come back: the two heads share the pass and the matching is right."""
    model, n_steps = small_detector(), 120
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = device_batch(sample())
    model.train()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 20, (n_steps - step) / 40)
        torch.manual_seed(step)
        loss = train_detector.total_loss(model(*batch), 1.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(*batch[:2])[0]
    sure = found["scores"] > 0.8
    overlap = torchvision.ops.box_iou(BOXES, found["boxes"][sure])  # (4, D)
    best = overlap.argmax(1)
    assert len(set(best.tolist())) == 4 and (overlap.max(1)[0] > 0.5).all()
    assert (overlap.max(0)[0] > 0.4).all(), "nothing is found beside them"
    assert found["labels"][sure][best].tolist() == [1, 2, 3, 1]
    assert found["states"][sure][best].argmax(1).tolist() == [0, 1, 2, 3]


# --- the validation loss ----------------------------------------------------------------------

def test_validation_changes_nothing_and_repeats():
    """BatchNorm in training before: every buffer and weight is the same afterwards, no gradient, no dropout."""
    model = small_detector().train()
    loader = [train_detector.collate_alike(samples) for samples in ([sample(), sample((2, 2, 3, 3))], [sample()])]
    before = copy.deepcopy(model.state_dict())
    results = [train_detector.evaluate(model, loader, VALIDATION, FP32)[1] for _ in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert results[0] == results[1] and not any(p.grad is not None for p in model.parameters())
    names = ["loss", "loss_classifier", "loss_box_reg", "loss_state", "loss_objectness", "loss_rpn_box_reg"]
    assert list(results[0]) == [f"val_{name}" for name in names]
    parts = sum(results[0][f"val_{name}"] * (0.5 if name == "loss_state" else 1) for name in names[1:])
    assert results[0]["val_loss"] == pytest.approx(parts)
    model.train()
    assert model.backbone.body.bn1.training and model.roi_heads.state_head[2].training


def test_the_features_of_pictures_in_a_batch_are_those_of_each_alone():
    """In batches of two and one, padded, on a model that was in training."""
    model = small_detector().train()
    batches = [train_detector.collate([sample(), sample((2, 2, 3, 3))]), train_detector.collate([sample()])]
    found = np.stack(train_detector.detect(model, [batches], FP32)["picture_features"])
    assert found.shape == (3, 256)
    model.eval()
    for features, (batch, k) in zip(found, [(batches[0], 0), (batches[0], 1), (batches[1], 0)]):
        with torch.no_grad():
            maps = model.features(train_detector.to_inputs(batch, FP32, model.settings))
            own = {name: each[k:k + 1] for name, each in maps.items()}
            assert features == pytest.approx(model.picture_features(own, batch["sizes"][k:k + 1])[0].numpy(), rel=1e-4, abs=1e-6)


def test_the_validation_loss_is_the_training_loss_without_dropout():
    """Mean over the pictures of batches of two and one, each with draws of its own."""
    model = small_detector().eval()
    batches = [train_detector.collate([sample(), sample((2, 2, 3, 3))]), train_detector.collate([sample((3, 3, 2, 2))])]
    found = train_detector.evaluate(model, [batches], VALIDATION, FP32)[1]["val_loss"]
    expected = []
    for number, batch in enumerate(batches):
        torch.manual_seed(common.hash_seed(5, 1, number))
        losses = model(*train_detector.to_device(batch, FP32, model.settings))
        expected += [train_detector.total_loss(losses, 0.5).item()] * len(batch["sizes"])
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


BF16 = common.Compute(torch.device("cpu"), "bf16", True, "", common.Processes())


@pytest.mark.skipif(common.fast_precision(torch.device("cpu")) != "bf16", reason="this processor has no bf16")
def test_bf16_gives_the_same_losses_within_its_precision():
    model = small_detector().eval()
    batch = train_detector.collate([sample()])
    exact, rounded = (train_detector.evaluate(model, [[batch]], VALIDATION, compute)[1] for compute in (FP32, BF16))
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=0.05, abs=0.02), name


def test_anchors_are_not_rounded_to_bf16():
    model = small_detector().eval()
    inputs, sizes, _ = device_batch(sample())
    with BF16.autocast(), torch.no_grad():
        maps = list(model.features(inputs).values())
        anchors = model.rpn.anchor_generator(torchvision.models.detection.image_list.ImageList(inputs, sizes), maps)
    assert anchors[0].dtype == torch.float32


# --- weights --------------------------------------------------------------------------------

class Flags:
    """The flags that build_model looks at."""
    seed, pretrained, weights, init_from, trainable_layers = 42, False, None, None, 3
    model = train_detector.RESNET18


def test_weights_of_a_classifier_and_of_a_whole_detector(tmp_path):
    classifier = torchvision.models.resnet18()
    torch.save({name: value.half() if value.is_floating_point() else value
                for name, value in classifier.state_dict().items()}, tmp_path / "classifier.pth")
    Flags.weights = tmp_path / "classifier.pth"
    model = train_detector.build_model(Flags, small_settings(frozen_norm=True), None)
    torch.testing.assert_close(model.backbone.body.layer3[0].conv1.weight,
                               classifier.layer3[0].conv1.weight.half().float())
    assert not model.backbone.body.layer1[0].conv1.weight.requires_grad
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    Flags.weights = tmp_path / "detector.pth"
    other = train_detector.build_model(Flags, small_settings(parts=["a", "b"], frozen_norm=True), None)
    torch.testing.assert_close(other.rpn.head.cls_logits.weight, model.rpn.head.cls_logits.weight)
    torch.testing.assert_close(other.roi_heads.box_head.fc6.weight, model.roi_heads.box_head.fc6.weight)
    assert other.roi_heads.box_predictor.cls_score.out_features == 3


def test_the_seed_decides_the_random_part():
    made = []
    for seed in (1, 1, 2):
        flags = SimpleNamespace(seed=seed, pretrained=False, weights=None, init_from=None)
        made.append(train_detector.build_model(flags, small_settings(), None).roi_heads.state_head[0].weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("prefix", ["model.", "module.", "detector.net."])
def test_a_prefix_of_all_layers_is_taken_off(tmp_path, capsys, prefix):
    model, other = small_detector(), small_detector()
    nn.init.ones_(model.rpn.head.cls_logits.weight)
    for whole in (model, model.backbone.body):
        torch.save({prefix + name: value for name, value in whole.state_dict().items()}, tmp_path / "w.pth")
        nn.init.zeros_(other.backbone.body.conv1.weight)
        train_detector.load_pretrained(other, backbones.load_weights_file(tmp_path / "w.pth"), "w.pth")
        torch.testing.assert_close(other.backbone.body.conv1.weight, model.backbone.body.conv1.weight)
        said = capsys.readouterr().out
        assert said.count("\n") == (prefix != "module.") and (f"without the prefix {prefix}" in said) == bool(said)
    torch.testing.assert_close(other.rpn.head.cls_logits.weight, model.rpn.head.cls_logits.weight)


def test_names_of_older_torchvision_files_are_understood():
    """COCO weights of 2019 name the pyramid's and the RPN's layers one level higher."""
    model = small_detector(model="fasterrcnn_mobilenet_v3_large_320_fpn", anchor_sizes=[32, 64, 128, 256, 512])
    state = {re.sub(r"(blocks\.\d|conv)\.0\.(0\.)?", lambda m: m[1] + ".", name)
             if ".fpn." in name or ".conv." in name and name.startswith("rpn") else name: value
             for name, value in model.state_dict().items()}
    assert set(state) != set(model.state_dict())
    train_detector.load_pretrained(model, state, "old.pth")


def test_layers_of_a_larger_classifier_that_are_left_are_said(capsys):
    """The names and shapes of a ResNet-18 are a part of those of a ResNet-34."""
    train_detector.load_pretrained(small_detector(), torchvision.models.resnet34().state_dict(), "r34.pth")
    assert "others of the file were not" in capsys.readouterr().out


def test_wrong_weights_are_refused(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    Flags.weights = tmp_path / "r50.pth"
    with pytest.raises(common.UserError, match="another shape|not the weights"):
        train_detector.build_model(Flags, small_settings(), None)
    state = small_detector().state_dict()
    name = "rpn.head.cls_logits.bias"
    short = {other: value for other, value in state.items() if other != name}
    refusal = "d.pth: not the weights of this detector: "
    with pytest.raises(common.UserError, match=f'{refusal}.*Missing key.* "head.cls_logits.bias"'):
        train_detector.load_pretrained(small_detector(), short, "d.pth")
    extra = "rpn.head.scale"
    with pytest.raises(common.UserError, match=f'{refusal}.*Unexpected key.* "head.scale"'):
        train_detector.load_pretrained(small_detector(), {**state, extra: torch.ones(1)}, "d.pth")
    with pytest.raises(common.UserError, match=f"{refusal}.*size mismatch for head.cls_logits.bias"):
        train_detector.load_pretrained(small_detector(), {**state, name: torch.zeros(99)}, "d.pth")


@pytest.mark.parametrize("name, published", [("fasterrcnn_resnet18_fpn", "resnet18"), ("fasterrcnn_resnet50_fpn",) * 2])
def test_published_weights_that_cannot_be_had(tmp_path, monkeypatch, name, published):
    class Online(Flags):
        pretrained, weights, model = True, None, name
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    sizes = [8, 16, 32, 64] if name == train_detector.RESNET18 else list(train_detector.COCO_ANCHORS)
    with pytest.raises(common.UserError) as error:
        train_detector.build_model(Online, small_settings(model=name, anchor_sizes=sizes), None)
    for word in (f"--download_weights {published}", "--weights FILE", "--no_pretrained"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", train_detector.MODELS)
def test_every_model_can_be_built(name):
    sizes = range(8, 72, 8) if name == train_detector.RESNET18 else train_detector.COCO_ANCHORS
    parts = list(map(str, range(22)))
    made = train_detector.PartDetector(small_settings(model=name, anchor_sizes=list(sizes), parts=parts))
    per_place = {"fasterrcnn_resnet18_fpn": 6, "fasterrcnn_mobilenet_v3_large_320_fpn": 15}.get(name, 3)
    assert set(made.rpn.anchor_generator.num_anchors_per_location()) == {per_place}
    heads = made.roi_heads
    width = 512 if name == "fasterrcnn_resnet18_fpn" else 1024
    shapes = [tuple(module.weight.shape) for module in heads.state_head if isinstance(module, nn.Linear)]
    assert heads.box_predictor.cls_score.out_features == 23 and shapes == [(256, width), (4, 256)]
