"""Backbones and weights: published networks without their last layer; weights from a file, the cache or the network.

Letters: B batch, F features, C channels, T frames, N tokens, H and W height and width
in pixels, S side of a square.
"""
import functools
import hashlib
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common

TIMM = "timm:"  # what the names of its networks begin with here


def build_backbone(name, pretrained=True, weights=None, image_size=224, family="models"):
    """Classifier without its last layer -> (module: (B, 3, H, W) -> (B, F), feature width F).

    name: of a torchvision classifier, or timm:NAME. weights: state dict file, or the name of a set
    of published weights; family: "models", or "video" for networks (B, 3, T, H, W) -> (B, F), of
    which timm has none.
    Raises UserError for an unknown name, weights that cannot be had (both ways out named), or a
    file whose layers are others.
    """
    if name.startswith(TIMM) and family == "models":
        return _timm_backbone(name, pretrained, weights, image_size)
    from torchvision import models
    classifiers = models.list_models(module=models.video if family == "video" else models)
    if name not in classifiers:
        raise common.UserError(
            f"{name} is no torchvision classifier of {family}{common.did_you_mean(name, classifiers)}")
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    try:
        model = models.get_model(name, weights=None, **options)
    except AssertionError:
        raise common.UserError(
            f"--image_size {image_size}: {name} needs a multiple of {name.rsplit('_', 1)[1]}") from None
    last = _last_linear(model, name)
    if family == "models" and image_size != 224:  # which they all take
        _pass_one_picture(model, name, image_size)
    if weights or pretrained:
        _say_size(name, weights, image_size)
        load_backbone_state(model, load_weights(name, weights), last, weights or name)
    n_features = model.get_submodule(last).weight.shape[1]
    model.set_submodule(last, nn.Identity())
    return model, n_features


def _pass_one_picture(model, name, image_size):
    """The output for a black picture.

    UserError where the network takes no pictures of this size.
    """
    try:
        with torch.inference_mode():
            output = model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise common.UserError(f"--image_size {image_size}: {name} takes no pictures of this size "
                               f"({common.one_line(error)[:100]}); try 224") from None
    model.train()
    return output


def _timm_backbone(name, pretrained, weights, image_size):
    """A network of the package timm for pictures of this size -> (module, F), as build_backbone."""
    timm = common.optional_package("timm")
    own_name = name.removeprefix(TIMM)
    if not timm.is_model(own_name):
        raise common.UserError(f"timm has no {own_name}{common.did_you_mean(own_name, timm.list_models())}")

    def create(**options):
        try:
            return timm.create_model(own_name, img_size=image_size, num_classes=0, **options)
        except TypeError:  # a network that takes any size
            return timm.create_model(own_name, num_classes=0, **options)
    overlay = None
    if weights:
        state = load_weights_file(weights)
        with torch.random.fork_rng(devices=[]):  # so that it begins as the model does
            untrained = create()
        prefix = shared_prefix(state, untrained.state_dict())
        overlay = {"state_dict": {layer.removeprefix(prefix): value for layer, value in state.items()}}
    try:
        model = create(pretrained=bool(pretrained or weights), pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError, ImportError) as error:
        raise common.UserError(f"no weights for {name} ({common.one_line(error)}). Give --weights FILE, or run once "
                               "where there is internet; --no_pretrained starts from random weights") from None
    if weights:  # timm leaves a layer that it does not find as it was drawn
        missing = [layer for layer, value in untrained.named_parameters()
                   if value.min() < value.max() and torch.equal(value, model.get_parameter(layer))]
        if missing:
            raise common.UserError(f"{weights}: not the weights of this backbone: {len(missing)} "
                                   f"layers missing (first: {missing[0]})")
    if pretrained or weights:
        _say_size(name, weights, image_size)
    return model, _pass_one_picture(model, name, image_size).shape[1]


def _say_size(name, weights, image_size):
    """A note where published weights expect pictures of another size."""
    side = expected_pixels(name, weights)[0]
    if side != image_size:
        _say_once(f"note: the published weights of {name} expect pictures of {side} px, --image_size is {image_size}")


def published_set(name, weights):
    """torchvision's set of published weights of the name `weights`; for None, or a file, the default one."""
    from torchvision import models
    sets = models.get_model_weights(name)
    if weights is None or Path(weights).exists():
        return sets.DEFAULT
    if str(weights) not in sets.__members__:
        raise common.UserError(f"--weights {weights}: no such file, and the published weights of "
                               f"{name} are {', '.join(sets.__members__)}")
    return sets[str(weights)]


def pixel_statistics(name, weights=None):
    """(mean, sd) of the three colours, from 0 to 1, that the published weights of a network expect."""
    return expected_pixels(name, weights)[1:]


@functools.cache
def expected_pixels(name, weights):
    """(side in pixels, mean, sd) that the published weights of a network expect.

    A weights file does not say what it expects: it is taken to be what the network's
    published weights do.
    """
    if name.startswith(TIMM):
        published = common.optional_package("timm").get_pretrained_cfg(name.removeprefix(TIMM))
        return published.input_size[-1], published.mean, published.std
    expected = published_set(name, weights).transforms()
    side = expected.crop_size[0]
    if name in ("googlenet", "inception_v3"):  # with weights they bring the usual statistics to these by themselves
        return side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return side, tuple(expected.mean), tuple(expected.std)


def _last_linear(model, name):
    """Path of the classifier's last layer, linear or a convolution.

    UserError where it ends in something else.
    """
    if hasattr(model, "aux_logits"):  # the side heads of GoogLeNet and Inception serve only their own training
        model.aux_logits = False
        model.AuxLogits = model.aux1 = model.aux2 = None
    paths = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))]
    if not paths or len(model.get_submodule(paths[-1]).weight) not in (1000, 400):  # classes of ImageNet, Kinetics
        raise common.UserError(f"--backbone {name} does not end in a linear layer; choose another, such as resnet50")
    return paths[-1]


def cached_weights_file(name, weights=None):
    """(path, url) of torchvision's published weights of a model; the path in the hub cache may not exist yet."""
    url = published_set(name, weights).url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name, url


def load_weights(name, weights=None):
    """State dict for a torchvision network: of the file `weights`, else of its published set, from cache or network.

    Raises UserError where the set is in neither, CheckpointError where the file in the
    cache is damaged.
    """
    if weights and Path(weights).exists():
        return load_weights_file(weights)
    path, url = cached_weights_file(name, weights)
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)[1]  # of the SHA-256
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:
            raise common.UserError(f"no pretrained weights for {name}: {path} is missing and the download failed "
                                   f"({error}). Run `python verify_setup.py --download_weights {name}` where there is "
                                   "internet, or give --weights FILE; --no_pretrained starts from random weights"
                                   ) from None
    if zipfile.is_zipfile(path):
        return load_weights_file(path)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        raise common.CheckpointError(f"{path} is damaged (its SHA-256 does not begin with {prefix}); delete it")
    # an older file without a checked archive, but the hash proves it
    return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)


def load_weights_file(path):
    """Weights file -> {name: float tensor}; bare, under state_dict or model, prefixed by module., half precision.

    A value that overflowed in a conversion to half precision becomes its largest number, 65504,
    with a note. Raises CheckpointError for other values that are not finite: a run could be trained
    with them, and never be continued.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return _state_dict(common.read_checkpoint(path), path)
    module = common.optional_package("safetensors", "safetensors.torch")
    try:
        tensors = module.load_file(path)
    except Exception as error:  # its own class for damage
        raise common.CheckpointError(f"{path} is no usable safetensors file ({common.one_line(error)})") from None
    return _state_dict(tensors, path)


def _state_dict(state, path):
    """{name: float tensor} of what a file of weights holds."""
    for key in ("state_dict", "model", "model_state"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise common.UserError(f"{path} holds no tensors: expected a state dict, found {list(state)[:5]}")
    # an infinite running variance would silence its channel
    overflowed = [name for name, value in tensors.items() if value.dtype == torch.float16 and value.isinf().any()]
    for name in overflowed:
        tensors[name] = tensors[name].nan_to_num(math.nan)  # infinite numbers become the largest
    if overflowed:
        _say_once(f"note: {path}: numbers too large for half precision in "
                  f"{common.shorten_list(overflowed, 3)}; 65504 is used in their place")
    common.check_weights(tensors, path)
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def shared_prefix(state, own):
    """What a state dict writes before the names of a model's own layers, such as encoder_q.; else ""."""
    first = next(iter(own))
    prefixes = dict.fromkeys(name.removesuffix(first) for name in state if name.endswith(first))
    return max(prefixes, key=lambda prefix: sum(prefix + name in state for name in own), default="")


def load_backbone_state(model, state, last, source):
    """Load all but the classifier `last`, strictly; a prefix that all layers share is taken off."""
    whole = model.state_dict()
    own = [name for name in whole if not name.startswith(f"{last}.")]
    prefix = shared_prefix(state, own)
    found = {name: state[prefix + name] for name in own if prefix + name in state}
    if "encoder.pos_embedding" in found:  # a ViT's, which fits one size of pictures
        from torchvision.models.vision_transformer import interpolate_embeddings
        found = interpolate_embeddings(model.image_size, model.patch_size, found)
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    wrong = [name for name in found if found[name].shape != whole[name].shape]
    if missing or wrong:
        raise common.UserError(f"{source}: not the weights of this backbone: {len(missing)} of {len(own)} layers "
                               f"missing, {len(wrong)} of another shape (first: {[*missing, *wrong][0]})")
    whole.update(found)  # which keeps the versions of the layers, without which MNASNet cannot be loaded
    model.load_state_dict(whole)
    n_others = len(state) - len(found)
    if prefix or n_others > 2:
        how = f" without the prefix {prefix}" if prefix else ""
        _say_once(f"note: {source}: {len(found)} layers were loaded{how}, {n_others} others of the file were not")


_say_once = functools.cache(common.print_first)  # a backbone is built several times in a run


def feature_maps(output):
    """Output of a layer -> maps (B, C, H, W) or (B, C, T, H, W) of equal height and width; None where it holds none.

    The channels of Swin come last. The last tokens (B, N, C) of a ViT lie on a square grid; those
    before them, such as the class token, belong to no place.
    """
    if not isinstance(output, torch.Tensor) or output.ndim < 3:
        return None
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        return output[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))  # (B, N, C) -> (B, C, H, W)
    *_, third_last, second_last, last = output.shape
    if last == second_last:
        return output
    if second_last == third_last:
        return output.movedim(-1, 1)  # (B, H, W, C) -> (B, C, H, W)
    return None


def outputs_at(network, paths, images):
    """One pass of images -> [(path, output)] of the modules at these paths, in the order in which they end."""
    outputs = []

    def keep(path, module, inputs, output):
        outputs.append((path, output))
    hooks = [network.get_submodule(path).register_forward_hook(functools.partial(keep, path)) for path in paths]
    network(images)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.inference_mode()
def stage_ends(backbone, example):
    """Paths of the modules that end each resolution, largest first; where there is but one, each quarter of the blocks.

    Found by passing an example input on.
    """
    for depth in (0, 1):  # children, then grandchildren
        paths = [path for path, _ in backbone.named_modules() if path and path.count(".") == depth]
        ends = {}  # width of maps -> path of the last module that gives maps of it
        for path, output in outputs_at(backbone.eval(), paths, example):
            maps = feature_maps(output)
            if maps is not None and output.ndim == example.ndim and maps.shape[-1] > 1:
                ends[maps.shape[-1]] = path
        if len(ends) >= 3:
            return [ends[width] for width in sorted(ends, reverse=True)]
    chains = [[f"{path}.{name}" for name, _ in module.named_children()] for path, module in backbone.named_modules()
              if isinstance(module, (nn.Sequential, nn.ModuleList))]
    blocks = max(chains, key=len, default=[])
    if len(blocks) < 4:
        return []
    return [blocks[len(blocks) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]


class FeatureMaps(nn.Module):
    """A backbone's maps of its last three resolutions: (B, 3, S, S) -> three of (B, C, H, W).

    Raises UserError for a backbone that has none.
    """

    def __init__(self, backbone, image_size):
        super().__init__()
        self.network = backbone
        example = torch.zeros(1, 3, image_size, image_size)
        self.ends = stage_ends(backbone, example)[-3:]
        with torch.inference_mode():
            maps = self(example)
        if len(maps) < 3 or any(each is None for each in maps):
            raise common.UserError(f"this backbone has no feature maps of 3 resolutions (found {len(maps)}), which "
                                   "--head ridge and --model motion_readout read; use --head mlp, "
                                   "or another such as resnet18")
        self.n_channels = [each.shape[1] for each in maps]

    def forward(self, images):
        return [feature_maps(output) for _, output in outputs_at(self.network, self.ends, images)]


class MotionFeatures(FeatureMaps):
    """Feature maps of C channels together -> F = 4 C features of a clip, by frame_features and then pool.

    Two of each channel are its appearance: mean and SD over time of its mean over the picture. Two
    are its motion: how far it rises, and how far it falls, from one frame to the next at the place
    where it does so most, as the root mean square over time.
    """

    def __init__(self, backbone, image_size):
        super().__init__(backbone, image_size)
        self.n_features = 4 * sum(self.n_channels)

    def last_resolution(self):
        """Columns of appearance of the last resolution alone."""
        means_and_sds = np.arange(self.n_features // 2).reshape(2, -1)
        return means_and_sds[:, -self.n_channels[-1]:].ravel()

    def frame_features(self, clips):
        """(B, T, 3, S, S) -> (B, T, 3, C): mean, largest rise and largest fall since the frame before.

        The first frame has none before it and gets 0. In fp32: bf16 would round changes away.
        """
        with common.in_fp32(clips):
            maps = self(clips.flatten(0, 1))  # three of (B * T, C, H, W)
        features = []
        for each in maps:
            places = each.flatten(2).unflatten(0, clips.shape[:2])  # (B, T, C, H * W)
            change = torch.diff(places, dim=1, prepend=places[:, :1])
            rise = change.amax(3).clamp(min=0)
            fall = change.amin(3).clamp(max=0)
            features.append(torch.stack([places.mean(3), rise, fall], 2))
        return torch.cat(features, 3)  # three of (B, T, 3, C) -> (B, T, 3, C)

    def pool(self, features, mask):
        """frame_features (B, T, 3, C), mask (B, T), True = a frame to read -> (B, F).

        The change of the first frame does not count: in a window of a recording it is
        from before the window.
        """
        mask = mask.to(features.device)
        is_pair = mask[:, 1:, None, None]
        squares = (features[:, 1:, 1:] ** 2 * is_pair).sum(1)  # (B, 2, C)
        motion = (squares / is_pair.sum(1).clamp(min=1)).sqrt()
        return torch.cat([over_time(features[:, :, 0], mask), motion.flatten(1)], 1)


def motion_blocks(n_features):
    """{name: columns of MotionFeatures} that a readout may choose from."""
    appearance, motion = np.arange(n_features).reshape(2, -1)
    return {"appearance": appearance, "motion": motion, "both": np.append(appearance, motion)}


def over_time(features, mask):
    """Mean and SD over time of features of frames, (B, T, F) -> (B, 2 F); those of clips (B, F) stay as they are.

    mask: (B, T), True = counts.
    """
    if features.ndim == 2:
        return features
    mask = mask[..., None].to(features.device)  # (B, T, 1)
    count = mask.sum(1).clamp(min=1)
    mean = (features * mask).sum(1) / count
    deviation = (features - mean[:, None]) * mask
    return torch.cat([mean, ((deviation ** 2).sum(1) / count).sqrt()], 1)


class MultiScale(nn.Module):
    """Feature maps of a backbone's last three resolutions, each averaged over grids: (B, 3, S, S) -> (B, F).

    What is predicted may depend on small things or large ones; the last layer alone
    keeps little of the small.
    """

    def __init__(self, backbone, image_size, grids=(4,)):
        super().__init__()
        self.maps = FeatureMaps(backbone, image_size)
        self.grids = grids  # cells on each side
        self.blocks = {}  # name -> columns of the features
        self.n_features = 0
        for stage, n_channels in enumerate(self.maps.n_channels, start=1):
            for grid in grids:
                columns = self.n_features + np.arange(n_channels * grid ** 2)
                self.blocks[f"resolution {stage}, {grid} x {grid}"] = columns
                self.n_features += len(columns)

    def forward(self, images):
        maps = self.maps(images)  # (B, 3, S, S) -> three of (B, C, H, W)
        pooled = [pool_over_grid(each, grid).flatten(1) for each in maps for grid in self.grids]
        return torch.cat(pooled, 1)  # (B, F)


@functools.cache
@torch.inference_mode(False)
def pooling_matrix(height, width, grid, device):
    """(H * W, cells) share of each pixel in the mean of each cell of adaptive_avg_pool2d."""
    pixels = torch.eye(height * width).view(-1, 1, height, width)
    return nn.functional.adaptive_avg_pool2d(pixels, grid).flatten(1).to(device)


def pool_over_grid(maps, grid):
    """(B, C, H, W) -> float32 (B, C, cells): adaptive_avg_pool2d, whose own gradient varies on GPUs."""
    matrix = pooling_matrix(*maps.shape[2:], grid, maps.device)
    with common.in_fp32(maps):
        return maps.float().flatten(2) @ matrix  # (B, C, H * W) -> (B, C, cells)


def map_paths(backbone, example):
    """Paths of the modules of a backbone, or of its MultiScale, that end each resolution."""
    if isinstance(backbone, MultiScale):
        return [f"maps.network.{path}" for path in backbone.maps.ends]
    return stage_ends(backbone, example)


def freeze_stages(backbone, n_stages, example):
    """Take the layers of the first n_stages resolutions out of training.

    UserError where there are fewer.
    """
    if n_stages == 0:
        return
    ends = stage_ends(backbone, example)
    if n_stages > len(ends):
        raise common.UserError(f"--freeze_stages {n_stages}: this backbone has {len(ends)} "
                               f"resolutions: {', '.join(ends)}")
    *_, last = backbone.get_submodule(ends[n_stages - 1]).modules()  # it may be a layer without weights
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if module is last:
            break


def batch_norms(model):
    """The BatchNorm layers of a model, SyncBatchNorm included."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def starting_content(path, **expected):
    """--init_from -> checkpoint of another run of this script.

    UserError where a field differs from `expected`.
    """
    content = common.load_model_file(path)
    with common.checkpoint_fields(path):
        found = content | content.get("settings", {}) | content.get("architecture", {})
        wrong = [f"{name} {found[name]}, expected {value}" for name, value in expected.items() if found[name] != value]
    if wrong:
        raise common.UserError(f"--init_from {path} was trained for something else: {'; '.join(wrong)}")
    return content


def start_from(model, path, /, is_frozen, **expected):
    """--init_from: give a model the weights of another run of this script, after the checks of starting_content.

    is_frozen: features were computed with the model's own backbone, so a file with
    another backbone is refused.
    """
    state = starting_content(path, **expected)["model"]
    own = {name: value for name, value in model.state_dict().items() if name.startswith(("backbone.", "encoder."))}
    if is_frozen and any(name in state and not torch.equal(value, state[name]) for name, value in own.items()):
        raise common.UserError(
            f"--init_from {path}: its backbone was trained, or began from other --weights or --seed, and this run "
            "reads features of a frozen one. Leave out --init_from, or train the backbone too")
    common.load_state(model, state, path)


def add_freezing_arguments(add):
    """What of a pretrained backbone is trained, and how fast: for scripts with a BackboneModel."""
    add("--freeze_backbone", action="store_true",
        help="train only the layers after the backbone, on features computed once")
    add("--freeze_stages", type=common.WHOLE, default=0,
        help="how many of the backbone's resolutions, from the first (a ResNet has 5), keep their "
             "weights")
    add("--freeze_norm", action="store_true",
        help="keep the BatchNorm statistics: more stable with few samples")
    add("--backbone_lr_mult", type=common.AMOUNT, default=1.0,
        help="learning rate of the backbone, as a multiple of --lr")


class BackboneModel(nn.Module):
    """A `backbone` that may be frozen, and what a script puts on top of it.

    Layers that are not trained stay in evaluation mode, and with freeze_norm every BatchNorm does.
    """

    def __init__(self, backbone, freeze_norm):
        super().__init__()
        self.backbone = backbone
        self.freeze_norm = freeze_norm
        self.trainable = [p for p in backbone.parameters() if p.requires_grad]

    def freeze_backbone(self, frozen):
        """Take the backbone out of training, or put back what was trainable at first."""
        for parameter in self.trainable:
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if not any(p.requires_grad for p in self.trainable):
            self.backbone.eval()
        for module in batch_norms(self.backbone):
            if self.freeze_norm or not module.weight.requires_grad:
                module.eval()
        return self


def is_same(one, other):
    """Whether two networks have the same layers and weights."""
    one = one.state_dict()
    other = other.state_dict()
    return one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))
