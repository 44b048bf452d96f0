"""Backbones and weights: feature widths, known forms of weight files, three resolutions, frozen stages.

    python -m pytest tests/test_backbones.py
"""
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import common
from evidence import baseline_models
from readers import backbones
import train_assessor
import train_video
from conftest import fit_as_sklearn


def test_weights_files_in_their_known_forms(tmp_path):
    model = torchvision.models.resnet18()
    state = model.state_dict()
    forms = {"bare": state, "nested": {"state_dict": state, "epoch": 3},
             "parallel": {f"module.{name}": value for name, value in state.items()},
             "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()}}
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pth")
        backbone, width = backbones.build_backbone("resnet18", weights=tmp_path / f"{name}.pth")
        difference = (backbone.conv1.weight - model.conv1.weight).abs().max()
        assert width == 512 and difference < (1e-3 if name == "half" else 1e-12)
    with pytest.raises(common.UserError, match="not the weights of this backbone"):
        backbones.build_backbone("resnet50", weights=tmp_path / "bare.pth")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "none.pth")
    with pytest.raises(common.UserError, match="none.pth holds no tensors: expected a state dict, found .*epoch"):
        backbones.load_weights_file(tmp_path / "none.pth")


def test_published_weights_of_before_archives_are_known_by_their_hash(tmp_path, monkeypatch):
    state = {"conv1.weight": torch.arange(4.0)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    digest = hashlib.sha256((tmp_path / "old.pth").read_bytes()).hexdigest()
    for prefix in (digest[:8], "0" * 8):
        path = tmp_path / f"resnet18-{prefix}.pth"
        shutil.copy(tmp_path / "old.pth", path)
        monkeypatch.setattr(backbones, "cached_weights_file", lambda *_, path=path: (path, "url"))
        if prefix == digest[:8]:
            assert torch.equal(backbones.load_weights("resnet18")["conv1.weight"], state["conv1.weight"])
            continue
        with pytest.raises(common.CheckpointError, match="is damaged .*does not begin with 00000000.; delete it"):
            backbones.load_weights("resnet18")


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "encoder_q.", "module.encoder_q.", "state.net."])
def test_a_prefix_that_all_layers_share_is_taken_off_and_said(tmp_path, capsys, prefix):
    backbones._say_once.cache_clear()
    model = torchvision.models.resnet18()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    state |= {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    for _ in range(2):
        backbone, _ = backbones.build_backbone("resnet18", weights=tmp_path / "moco.pth")
        assert torch.equal(backbone.layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    said = capsys.readouterr().out
    shown = prefix.removeprefix("module.")
    assert said.count("note:") == 1
    assert f"120 layers were loaded without the prefix {shown}" in said and "124 others" in said


def test_files_from_before_torch_1_6_and_safetensors(tmp_path):
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(common.CheckpointError, match="before torch 1.6; write it anew: python -c") as caught:
        backbones.load_weights_file(tmp_path / "old.pth")
    exec(str(caught.value).split('"')[1])  # the remedy is the line to run
    assert torch.equal(backbones.load_weights_file(tmp_path / "old.pth")["fc.weight"], model.fc.weight)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone, _ = backbones.build_backbone("resnet18", weights=tmp_path / "model.safetensors")
    assert torch.equal(backbone.conv1.weight, model.conv1.weight)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(common.CheckpointError, match="no usable safetensors"):
        backbones.load_weights_file(tmp_path / "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_that_are_no_file_are_refused(tmp_path, monkeypatch, name):
    """And not handed to the package, which would wait for this pipe for ever, deaf to signals."""
    monkeypatch.setattr(common, "optional_package", lambda *names: pytest.fail("it would wait"))
    os.mkfifo(tmp_path / name)
    with pytest.raises(common.CheckpointError, match=f"{name} .expected a regular file"):
        backbones.load_weights(None, tmp_path / name)


def test_safetensors_without_the_package_say_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")
    monkeypatch.setattr(common.importlib, "import_module", missing)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(common.UserError, match="pip install safetensors"):
        backbones.load_weights_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name, size, words", [
    ("inception_v3", 64, ""), ("maxvit_t", 64, ""), ("vit_b_16", 100, " needs a multiple of 16")])
def test_pictures_of_a_size_that_a_network_cannot_take_are_refused_in_one_line(name, size, words):
    with pytest.raises(common.UserError, match=f"--image_size {size}: {name}{words}"):
        backbones.build_backbone(name, pretrained=False, image_size=size)


def test_versions_of_layers_survive_a_checkpoint():
    """MNASNet cannot be loaded without the version of its layers."""
    model, _ = backbones.build_backbone("mnasnet0_5", pretrained=False)
    state = common.to_plain_types(model.state_dict())
    other, _ = backbones.build_backbone("mnasnet0_5", pretrained=False)
    common.load_state(other, state, "best_model.pth")
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())


def test_half_precision_that_overflowed_becomes_its_largest_number(tmp_path, capsys):
    """A running variance of 1e5 is infinite in fp16 and would silence its channel; NaN is refused."""
    state = torchvision.models.resnet18().state_dict()
    state["bn1.running_var"][3] = 1e5
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    assert half["bn1.running_var"][3].isinf()
    torch.save(half, tmp_path / "half.pth")
    loaded = backbones.load_weights_file(tmp_path / "half.pth")["bn1.running_var"]
    assert loaded.dtype == torch.float32 and loaded[3] == 65504 and (loaded[:3] == 1).all()
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "half.pth" in said and "bn1.running_var" in said and "65504" in said
    backbones.load_weights_file(tmp_path / "half.pth")
    assert not capsys.readouterr().out, "a run loads its backbone several times"
    half["conv1.weight"][0] = float("nan")
    torch.save(half, tmp_path / "nan.pth")
    with pytest.raises(common.CheckpointError, match=r"not finite \(conv1.weight\)"):
        backbones.load_weights_file(tmp_path / "nan.pth")
    state["bn1.running_var"][3] = float("inf")  # nothing was converted here
    torch.save(state, tmp_path / "single.pth")
    with pytest.raises(common.CheckpointError, match=r"not finite \(bn1.running_var\)"):
        backbones.load_weights_file(tmp_path / "single.pth")


def test_weights_that_cannot_be_had_name_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(common.UserError) as caught:
        backbones.build_backbone("resnet18")
    assert "--weights FILE" in str(caught.value) and "verify_setup.py --download_weights resnet18" in str(caught.value)
    with pytest.raises(common.UserError, match="--weights V3: no such file, and .* of resnet50 are .*IMAGENET1K_V2"):
        backbones.build_backbone("resnet50", weights="V3")


@pytest.mark.parametrize("name, width", [
    ("resnet18", 512), ("resnet50", 2048), ("efficientnet_b0", 1280), ("vit_b_16", 768), ("mobilenet_v3_small", 1024),
    ("densenet121", 1024), ("convnext_tiny", 768), ("googlenet", 1024)])
def test_backbones_give_their_feature_width(name, width):
    backbone, n_features = backbones.build_backbone(name, pretrained=False)
    assert n_features == width
    with torch.inference_mode():
        assert backbone.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, width)


def test_unknown_backbones_are_named(tmp_path):
    with pytest.raises(common.UserError, match="resnet50"):
        backbones.build_backbone("resnet5O", pretrained=False)
    with pytest.raises(common.UserError, match="linear layer"):
        backbones.build_backbone("squeezenet1_0", pretrained=False)


# --- the head on three resolutions ------------------------------------------------------

def test_three_resolutions_are_those_of_the_network():
    """The features are the grid averages of layer2, layer3 and layer4, as the network itself computes them."""
    backbone, _ = backbones.build_backbone("resnet18", pretrained=False)
    scales = backbones.MultiScale(backbone, 64).eval()
    images, maps = torch.randn(2, 3, 64, 64), []
    hooks = [getattr(backbone, name).register_forward_hook(lambda m, i, output: maps.append(output))
             for name in ("layer2", "layer3", "layer4")]
    with torch.inference_mode():
        backbone.eval()(images)
        expected = torch.cat([torch.nn.functional.adaptive_avg_pool2d(m, 4).flatten(1) for m in maps], 1)
        assert torch.allclose(scales(images), expected, atol=1e-5)
    assert scales.n_features == expected.shape[1] == (128 + 256 + 512) * 16
    for hook in hooks:
        hook.remove()


def test_each_grid_has_its_columns():
    """Means over 4 cells of a fine grid are the coarse grid, and each block has the channels of its resolution."""
    backbone, _ = backbones.build_backbone("resnet18", pretrained=False)
    scales = backbones.MultiScale(backbone, 64, grids=(2, 4)).eval()
    with torch.inference_mode():
        features = scales(torch.randn(2, 3, 64, 64)).numpy()
    assert np.array_equal(np.concatenate(list(scales.blocks.values())), np.arange(scales.n_features))
    for stage, n_channels in enumerate((128, 256), start=1):  # 8 x 8 and 4 x 4 cells: no grid is finer than its map
        coarse, fine = (features[:, scales.blocks[f"resolution {stage}, {grid} x {grid}"]] for grid in (2, 4))
        cells = fine.reshape(2, n_channels, 2, 2, 2, 2).mean((3, 5))
        assert np.allclose(coarse, cells.reshape(2, -1), atol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "convnext_tiny"])
def test_three_resolutions_exist_in_other_families(name):
    backbone, _ = backbones.build_backbone(name, pretrained=False)
    scales = backbones.MultiScale(backbone, 64).eval()
    with torch.inference_mode():
        assert scales(torch.zeros(1, 3, 64, 64)).shape == (1, scales.n_features)


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_pooling_over_a_grid_equals_torch(grid):
    maps = torch.randn(2, 5, 7, 6, requires_grad=True)
    weights = torch.randn(2, 5, grid * grid)
    found = {}
    for name, pooled in (("own", backbones.pool_over_grid(maps, grid)),
                         ("torch", torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2))):
        gradient, = torch.autograd.grad((pooled * weights).sum(), maps)
        found[name] = pooled, gradient
    for own, other in zip(found["own"], found["torch"]):
        assert torch.allclose(own, other, atol=1e-6)


def test_channels_that_come_last_and_tokens_become_maps():
    """Swin gives (B, H, W, C); a ViT tokens after a class token: both as their own modules give them."""
    swin, _ = backbones.build_backbone("swin_t", pretrained=False, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    found = backbones.FeatureMaps(swin, 64)
    with torch.inference_mode():
        maps = found(images)
        expected = swin.features[:6](images).permute(0, 3, 1, 2)
    assert [tuple(each.shape[1:]) for each in maps] == [(192, 8, 8), (384, 4, 4), (768, 2, 2)]
    assert torch.allclose(maps[1], expected, atol=1e-5)

    vit, _ = backbones.build_backbone("vit_b_16", pretrained=False, image_size=32)
    found = backbones.FeatureMaps(vit, 32)
    with torch.inference_mode():
        maps = found(torch.randn(2, 3, 32, 32))
        tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert [tuple(each.shape) for each in maps] == [(2, 768, 2, 2)] * 3
    assert torch.equal(backbones.feature_maps(tokens)[1, :, 1, 0], tokens[1, 3])  # the class token and two more come first


@pytest.mark.parametrize("name, trained", [("swin_t", "features.7"), ("vit_b_16", "encoder.layers.encoder_layer_9")])
def test_three_stages_of_a_transformer_are_frozen(name, trained):
    backbone, _ = backbones.build_backbone(name, pretrained=False, image_size=64)
    backbones.freeze_stages(backbone, 3, torch.zeros(1, 3, 64, 64))
    kept = [path for path, p in backbone.named_parameters() if p.requires_grad]
    frozen = [path for path, p in backbone.named_parameters() if not p.requires_grad]
    assert any(path.startswith(trained) for path in kept) and not any(path.startswith(trained) for path in frozen)
    assert {"class_token", "encoder.pos_embedding"} & {*frozen, *kept} <= set(frozen)


def test_a_network_without_maps_is_refused():
    class Flat(torch.nn.Module):
        """Pictures -> features, at once."""

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))

        def forward(self, images):
            return self.layers(images)
    with pytest.raises(common.UserError, match="--head mlp"):
        backbones.MultiScale(Flat(), 32)


# --- published weights ------------------------------------------------------------------

@pytest.mark.parametrize("name, half", [("resnet50", False), ("efficientnet_v2_l", True), ("inception_v3", True),
                                        ("googlenet", True)])
def test_pixels_are_scaled_as_the_published_weights_expect(name, half, tmp_path):
    usual = common.IMAGENET_MEAN, common.IMAGENET_STD
    assert backbones.pixel_statistics(name) == (((0.5,) * 3, (0.5,) * 3) if half else usual)
    (tmp_path / "weights.pth").touch()
    assert backbones.pixel_statistics(name, tmp_path / "weights.pth") == backbones.pixel_statistics(name)


@pytest.mark.parametrize("name, side", [("efficientnet_b1", 240), ("timm:test_vit", 160)])
def test_weights_for_another_size_say_so(name, side, tmp_path, capsys):
    if name.startswith("timm:"):
        model = pytest.importorskip("timm").create_model(name.removeprefix("timm:"))
    else:
        model = torchvision.models.get_model(name, weights=None)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    for image_size, weights in ((side, tmp_path / "own.pth"), (64, None), (64, tmp_path / "own.pth")):
        assert "expect pictures" not in capsys.readouterr().out
        backbones.build_backbone(name, pretrained=False, weights=weights, image_size=image_size)
    assert f"weights of {name} expect pictures of {side} px, --image_size is 64" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_their_own_input_transform_see_the_same_pixels(name):
    """Built with its weights, torchvision's network turns usual pixels into those that ours is given."""
    judge = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    compute = common.choose_compute("cpu", "off")
    seen = judge._transform_input(common.to_input(pixels.clone(), compute))
    assert torch.allclose(common.to_input(pixels, compute, *backbones.pixel_statistics(name)), seen, atol=1e-5)


def test_a_published_set_is_taken_by_its_name(tmp_path, monkeypatch):
    import train_detector
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    path, _ = backbones.cached_weights_file("resnet18", "IMAGENET1K_V1")
    path.parent.mkdir()
    torch.save(state, path)
    backbone, _ = backbones.build_backbone("resnet18", weights="IMAGENET1K_V1")
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"])
    args = SimpleNamespace(seed=0, init_from=None, weights=Path("IMAGENET1K_V1"), pretrained=True, trainable_layers=3,
                           model="fasterrcnn_resnet18_fpn")
    settings = {"model": "fasterrcnn_resnet18_fpn", "min_size": 64, "max_size": 64, "anchor_sizes": [12, 20, 32, 48], "nms_iou": 0.5,
                "parts": ["bell"], "states": [], "frozen_norm": False, "pixel_mean": [0.5] * 3, "pixel_sd": [0.5] * 3}
    detector = train_detector.build_model(args, settings, None)
    assert torch.equal(detector.backbone.body.conv1.weight, state["conv1.weight"])
    with pytest.raises(common.UserError, match="IMAGENET1K_V7: no such file.*resnet50 are IMAGENET1K_V1, IMAGENET1K_V2"):
        backbones.build_backbone("resnet50", weights="IMAGENET1K_V7")


def test_position_embeddings_are_interpolated_to_the_size_of_the_pictures(tmp_path):
    published = torchvision.models.vit_b_32(image_size=64).state_dict()
    torch.save(published, tmp_path / "vit.pth")
    same, _ = backbones.build_backbone("vit_b_32", weights=tmp_path / "vit.pth", image_size=64)
    larger, _ = backbones.build_backbone("vit_b_32", weights=tmp_path / "vit.pth", image_size=128)
    assert torch.equal(same.encoder.pos_embedding, published["encoder.pos_embedding"])
    own = larger.encoder.pos_embedding  # (1, 1 + 4 * 4, 768)
    assert own.shape == (1, 17, 768) and torch.equal(own[:, 0], published["encoder.pos_embedding"][:, 0])
    corners = own[0, 1:].view(4, 4, -1)[[0, 0, 3, 3], [0, 3, 0, 3]]
    assert torch.allclose(corners, published["encoder.pos_embedding"][0, 1:], atol=1e-5)  # corners are aligned


# --- every network of torchvision -------------------------------------------------------

CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
CLIP_NETWORKS = torchvision.models.list_models(module=torchvision.models.video)
NO_LINEAR_END = {"squeezenet1_0", "squeezenet1_1"}
SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}  # pixels; the others 64


def take_a_step(name, family, example):
    """Build with random weights, freeze what three resolutions allow (memory), step once on two ratings."""
    backbone, width = backbones.build_backbone(
        name, pretrained=False, image_size=example.shape[-1], family=family)
    backbones.freeze_stages(backbone, min(3, len(backbones.stage_ends(backbone, example))), example)
    model = train_assessor.Assessor(backbone, width, 2, "ridge", 0.0).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = model.head[0].weight.detach().clone()
    loss = (model(example) - 1).square().mean()
    loss.backward()
    torch.optim.SGD(trained, lr=0.01).step()
    assert torch.isfinite(loss) and width >= 64
    assert not torch.equal(model.head[0].weight, before)
    assert any(p.grad is not None and p.grad.any() for p in backbone.parameters())


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_takes_a_step(name):
    side = SIDES.get(name, 64)
    if name in NO_LINEAR_END:
        with pytest.raises(common.UserError, match="linear layer"):
            backbones.build_backbone(name, pretrained=False)
    else:
        take_a_step(name, "models", torch.randn(2, 3, side, side))


@pytest.mark.long
@pytest.mark.parametrize("name", CLIP_NETWORKS)
def test_every_clip_network_takes_a_step(name):
    n_frames, side = (16, 224) if name in train_video.FIXED_INPUT else (8, 64)
    take_a_step(name, "video", torch.randn(1, 3, n_frames, side, side))


# --- timm -------------------------------------------------------------------------------

def test_without_timm_its_networks_say_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")
    monkeypatch.setattr(common.importlib, "import_module", missing)
    with pytest.raises(common.UserError, match="pip install timm"):
        backbones.build_backbone("timm:resnet10t", pretrained=False)


@pytest.mark.parametrize("name, size", [
    ("vit_tiny_patch16_224", 64), ("vit_small_patch14_dinov2", 56), ("swin_tiny_patch4_window7_224", 224),
    ("convnext_atto", 64), ("efficientnet_lite0", 64), ("resnet10t", 64), ("mobilenetv4_conv_small", 64),
    ("eva02_tiny_patch14_224", 56)])
def test_networks_of_timm(name, size):
    """Features of one and of three resolutions, three frozen stages, pixels as its own data configuration has them."""
    timm = pytest.importorskip("timm")
    backbone, width = backbones.build_backbone(f"timm:{name}", pretrained=False, image_size=size)
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        assert backbone.eval()(images).shape == (1, width)
    scales = backbones.MultiScale(backbone, size)
    assert scales.eval()(images).shape == (1, scales.n_features)
    backbones.freeze_stages(backbone, 3, images)
    assert any(p.requires_grad for p in backbone.parameters())
    assert not all(p.requires_grad for p in backbone.parameters())
    config = timm.data.resolve_data_config({}, model=backbone)
    assert backbones.pixel_statistics(f"timm:{name}") == (config["mean"], config["std"])


def test_weights_of_timm_come_from_a_file(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    state = timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    backbone, _ = backbones.build_backbone("timm:vit_tiny_patch16_224", weights=tmp_path / "vit.pth", image_size=64)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert backbone.pos_embed.shape == (1, 17, 192)
    state = timm.create_model("resnet10t").state_dict()
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "own.pth")
    backbone, _ = backbones.build_backbone("timm:resnet10t", weights=tmp_path / "own.pth", image_size=64)
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    torch.save({name: value for name, value in state.items() if "layer4" not in name}, tmp_path / "short.pth")
    with pytest.raises(common.UserError, match=r"short.pth: not the weights .* 3 layers missing \(first: layer4"):
        backbones.build_backbone("timm:resnet10t", weights=tmp_path / "short.pth", image_size=64)
    with pytest.raises(common.UserError, match="timm has no resnet10x"):
        backbones.build_backbone("timm:resnet10x", pretrained=False)

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(common.UserError, match="no weights for timm:resnet10t .no route.*--weights FILE.*--no_pretrained"):
        backbones.build_backbone("timm:resnet10t")


def test_frozen_stages_are_the_first_ones():
    backbone, _ = backbones.build_backbone("resnet18", pretrained=False)
    backbones.freeze_stages(backbone, 3, torch.zeros(1, 3, 64, 64))
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    with pytest.raises(common.UserError, match="--freeze_stages 9"):
        backbones.freeze_stages(backbone, 9, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_a_frozen_backbone_drops_nothing_and_keeps_its_statistics(freeze_norm):
    """Also where it is frozen for the first epochs alone; trained again, it drops again."""
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model = backbones.BackboneModel(backbone, freeze_norm).train()
    for frozen, expected in ((False, [True, not freeze_norm, True]), (True, [False] * 3),
                             (False, [True, not freeze_norm, True])):
        model.freeze_backbone(frozen)
        assert model.training and [layer.training for layer in backbone] == expected
        assert {weight.requires_grad for weight in backbone.parameters()} == {not frozen}


def test_features_of_another_backbone_are_refused(tmp_path, monkeypatch):
    """--freeze_backbone computes features before --init_from gives the model its weights."""
    monkeypatch.setattr(common, "script_name", lambda: "train_assessor.py")
    model = train_assessor.Assessor(torch.nn.Linear(3, 4), 4, 2, "ridge", 0.0)
    content = {"format": common.FORMAT, "script": "train_assessor.py", "model": model.state_dict(), "seen": None,
               "names": ["a", "b"]}
    common.save_checkpoint(tmp_path / "same.pth", content)
    weight = model.backbone.weight.detach().clone()
    content["model"] = {name: value + 1 for name, value in model.state_dict().items()}
    common.save_checkpoint(tmp_path / "other.pth", content)
    backbones.start_from(model, tmp_path / "same.pth", is_frozen=True, names=["a", "b"])
    with pytest.raises(common.UserError, match="its backbone was trained, or began from other"):
        backbones.start_from(model, tmp_path / "other.pth", is_frozen=True)
    assert torch.equal(model.backbone.weight, weight)
    backbones.start_from(model, tmp_path / "other.pth", is_frozen=False)
    assert torch.equal(model.backbone.weight, weight + 1)


def test_frozen_parts_keep_weights_and_statistics_in_training():
    backbone, width = backbones.build_backbone("resnet18", pretrained=False)
    backbones.freeze_stages(backbone, 3, torch.zeros(1, 3, 64, 64))
    model = train_assessor.Assessor(backbone, width, 2, "mlp", 0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name.removeprefix("backbone.").split(".")[0] for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {"layer3", "layer4", "head"}


def test_the_solved_head_is_ridge_on_the_tuned_features():
    """A linear layer is written that predicts what the readout predicts from the same features."""
    draws = np.random.default_rng(0)
    features, ratings = draws.normal(size=(40, 12)).astype(np.float32), draws.normal(5, 2, (40, 3))
    ratings[3, 1] = np.nan
    model = train_assessor.Assessor(torch.nn.Identity(), 12, 3, "ridge", 0.0)
    readout = baseline_models.fit_readout(features, ratings)
    readout.write_into(model.head[-1])
    expected = readout.predict(features)
    with torch.inference_mode():
        assert np.allclose(model(torch.from_numpy(features)).numpy(), expected, atol=1e-4)


def test_a_feature_that_hardly_varied_does_not_explode():
    """Without a floor, a feature of sd 1e-4 that is 1 on a new picture moves its prediction by many sds."""
    draws = np.random.default_rng(0)
    features = draws.normal(size=(60, 5))
    features[:, 4] *= 1e-4
    target = features[:, :1] + 1e3 * features[:, 4:]
    new = np.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    plain, floored = (abs(fit(features, target).predict(new)).max() for fit in (fit_as_sklearn, baseline_models.fit_readout))
    assert plain > 100 and floored < plain / 5
