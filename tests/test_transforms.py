"""Augmentation and crops: parameters against torchvision's own draws, geometry and colour against its unfused chain.

    python -m pytest tests/test_transforms.py -q
"""
import colorsys
import dataclasses
import math

import cv2
import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as F

import common

SIZE = 224
BILINEAR = transforms.InterpolationMode.BILINEAR
DRAWS = 4000


def waves(height=256, width=320, amplitude=50.0, wavelength=40.0):
    """uint8 (H, W, 3): coloured waves between 78 and 178, whose second derivative is known."""
    y, x = np.mgrid[0:height, 0:width] * (2 * math.pi / wavelength)
    channels = [np.sin(x + phase) * np.cos(y - phase) for phase in (0.0, 1.0, 2.0)]
    return np.rint(128 + amplitude * np.stack(channels, -1)).astype(np.uint8)


def drawn(count=DRAWS, preset="full", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [common.sample_augmentation(preset, generator) for _ in range(count)]


@pytest.fixture(scope="module")
def full_draws():
    return drawn()


def augmented(image, parameters, size):
    """One picture, uint8 (H, W, 3) -> (size, size, 3)."""
    return common.augment_clip(image[None], parameters, size)[0]


def geometry_only(parameters):
    keep = ("crop", "flip", "rotation_deg", "translate", "scale", "shear_deg", "corners")
    return common.Augmentation(**{name: getattr(parameters, name) for name in keep})


def end_points(corners, size):
    """Where the corners of the square go, as torchvision's RandomPerspective numbers them."""
    reach = int(0.2 * (size // 2)) + 1
    (a, b), (c, d), (e, f), (g, h) = (np.reshape(corners, (4, 2)) * reach).astype(int).tolist()
    last = size - 1
    return [[a, b], [last - c, d], [last - e, last - f], [g, last - h]]


def torchvision_geometry(image, parameters, size=SIZE):
    """The unfused chain on a float tensor (C, H, W): crop, flip, rotate, affine, perspective, each bilinear."""
    height, width = image.shape[-2:]
    top = int(parameters.crop[1] * (height - size + 1))
    left = int(parameters.crop[0] * (width - size + 1))
    image = F.crop(image, top, left, size, size)
    image = F.hflip(image) if parameters.flip else image
    image = F.rotate(image, parameters.rotation_deg, BILINEAR)
    shift = [round(fraction * size) for fraction in parameters.translate]
    image = F.affine(image, 0.0, shift, parameters.scale, [parameters.shear_deg, 0.0], BILINEAR)
    if parameters.corners is None:
        return image
    last = size - 1
    start = [[0, 0], [last, 0], [last, last], [0, last]]
    return F.perspective(image, start, end_points(parameters.corners, size), BILINEAR)


def with_mask(array, parameters):
    """(chain's picture (S, S, C), (S, S) True where no step of the chain has mixed in pixels from outside)."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32)).permute(2, 0, 1)
    both = torchvision_geometry(torch.cat([tensor, torch.ones_like(tensor[:1])]), parameters)
    return both[:-1].permute(1, 2, 0).numpy(), (both[-1] > 1 - 1e-6).numpy()


# Distribution of the parameters ------------------------------------------

def same_distribution(ours, theirs, name):
    p = stats.ks_2samp(ours, theirs).pvalue
    assert p > 1e-3, f"{name}: p = {p:.2g}, mean {np.mean(ours):.4f} and {np.mean(theirs):.4f}"


def test_rotation_affine_and_jitter_are_drawn_as_torchvision_draws(full_draws):
    torch.manual_seed(1)
    rotation = [transforms.RandomRotation.get_params([-15.0, 15.0]) for _ in range(DRAWS)]
    affine = [transforms.RandomAffine.get_params([0.0, 0.0], (0.1, 0.1), (0.9, 1.1), [-10.0, 10.0], [SIZE, SIZE])
              for _ in range(DRAWS)]
    jitter = [transforms.ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], [-0.1, 0.1]) for _ in range(DRAWS)]
    same_distribution([d.rotation_deg for d in full_draws], rotation, "rotation")
    for axis in (0, 1):
        same_distribution([round(d.translate[axis] * SIZE) for d in full_draws], [a[1][axis] for a in affine], "shift")
    same_distribution([d.scale for d in full_draws], [a[2] for a in affine], "scale")
    same_distribution([d.shear_deg for d in full_draws], [a[3][0] for a in affine], "shear")
    assert {a[3][1] for a in affine} == {0.0}, "torchvision shears along x alone, as we do"
    for position, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        same_distribution([getattr(d, name) for d in full_draws], [j[position] for j in jitter], name)


def test_crop_and_perspective_are_drawn_as_torchvision_draws(full_draws):
    torch.manual_seed(2)
    crop = [transforms.RandomCrop.get_params(torch.empty(3, 256, 341), (SIZE, SIZE)) for _ in range(DRAWS)]
    same_distribution([common.window_start(256, SIZE, d.crop[1]) for d in full_draws], [c[0] for c in crop], "top")
    same_distribution([common.window_start(341, SIZE, d.crop[0]) for d in full_draws], [c[1] for c in crop], "left")
    ours = np.array([end_points(d.corners, SIZE) for d in full_draws if d.corners is not None])
    theirs = np.array([transforms.RandomPerspective.get_params(SIZE, SIZE, 0.2)[1] for _ in range(DRAWS)])
    for corner in range(4):
        for axis in (0, 1):
            same_distribution(ours[:, corner, axis], theirs[:, corner, axis], f"corner {corner} axis {axis}")


def test_erased_rectangle_is_drawn_as_torchvision_draws(full_draws):
    torch.manual_seed(3)
    picture = torch.empty(3, SIZE, SIZE)
    theirs = np.array([transforms.RandomErasing.get_params(picture, (0.02, 0.15), (0.3, 3.3), [0.0])[:4]
                       for _ in range(1000)])
    ours = []
    for parameters in (d for d in full_draws if d.erase is not None):
        marked = augmented(np.zeros((SIZE, SIZE, 3), np.uint8),
                                           common.Augmentation(erase=parameters.erase), SIZE)
        rows, columns = np.nonzero(marked[..., 0].any(1))[0], np.nonzero(marked[..., 0].any(0))[0]
        ours.append((rows[0], columns[0], len(rows), len(columns)))
    ours = np.array(ours)
    for column, name in enumerate(("top", "left", "height", "width")):
        same_distribution(ours[:, column], theirs[:, column], name)
    same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3], "area")


@pytest.mark.parametrize("chosen, probability", [
    (lambda d: d.flip, 0.5), (lambda d: d.greyscale, 0.1), (lambda d: d.corners is not None, 0.3),
    (lambda d: d.erase is not None, 0.2)], ids=["flip", "greyscale", "perspective", "erase"])
def test_probabilities(full_draws, chosen, probability):
    count = sum(map(chosen, full_draws))
    assert stats.binomtest(count, DRAWS, probability).pvalue > 1e-3


def test_jitter_order_is_a_uniform_permutation(full_draws):
    orders = [d.jitter_order for d in full_draws]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_parameters_are_independent(full_draws):
    table = np.array([[*d.crop, d.flip, d.rotation_deg, *d.translate, d.scale, d.shear_deg, d.brightness, d.contrast,
                       d.saturation, d.hue, d.greyscale, d.corners is not None, d.erase is not None]
                      for d in full_draws], float)
    off_diagonal = np.corrcoef(table.T)[np.triu_indices(table.shape[1], 1)]
    # 105 correlations of standard error 1 / sqrt(4000): the largest of them stays under 4 standard errors.
    assert np.abs(off_diagonal).max() < 4 / math.sqrt(DRAWS)


def test_same_generator_same_draw_and_equal_consumption():
    assert drawn(20, seed=3) == drawn(20, seed=3) != drawn(20, seed=4)
    generators = {preset: torch.Generator().manual_seed(9) for preset in ("none", "light", "full")}
    for preset, generator in generators.items():
        common.sample_augmentation(preset, generator)
    assert len({torch.rand(1, generator=generator).item() for generator in generators.values()}) == 1
    with pytest.raises(KeyError, match="'strong'"):
        common.sample_augmentation("strong", torch.Generator())


def test_presets_none_and_light():
    assert drawn(3, "none") == [common.Augmentation()] * 3
    for parameters in drawn(200, "light"):
        rest = dataclasses.replace(parameters, crop=(0.5, 0.5), flip=False, brightness=1.0, contrast=1.0,
                                   saturation=1.0, jitter_order=common.Augmentation.jitter_order)
        assert rest == common.Augmentation()
        assert max(abs(getattr(parameters, name) - 1) for name in ("brightness", "contrast", "saturation")) <= 0.1


# Geometry -----------------------------------------------------------------

def test_crop_and_flip_copy_pixels():
    image = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    for parameters in drawn(20, "light"):
        parameters = dataclasses.replace(parameters, brightness=1.0, contrast=1.0, saturation=1.0)
        top, left = int(parameters.crop[1] * 33), int(parameters.crop[0] * 77)
        expected = image[top:top + SIZE, left:left + SIZE]
        found = augmented(image, parameters, SIZE)
        assert np.array_equal(found, expected[:, ::-1] if parameters.flip else expected)
    assert np.array_equal(augmented(image, common.Augmentation(), SIZE), common.eval_crop(image, SIZE))


def test_every_output_pixel_comes_from_the_place_torchvision_takes_it_from():
    # Bilinear interpolation is exact on ramps, so the chain applied to the coordinates themselves returns, at each
    # output pixel, the place in the picture that it shows: the whole chain's geometry without interpolation error.
    y, x = np.mgrid[0:256, 0:320] + 0.5
    centres = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1)
    used = 0
    for parameters in drawn(60, seed=5):
        places, valid = with_mask(np.stack([x, y], -1), parameters)
        top, left = int(parameters.crop[1] * 33), int(parameters.crop[0] * 97)
        back = np.linalg.inv(common.homography(parameters, (left, top, SIZE, SIZE), SIZE))
        ours = np.dstack([centres, np.ones((SIZE, SIZE))]) @ back.T
        ours = ours[..., :2] / ours[..., 2:]
        assert np.abs(ours - places)[valid].max() < 0.01, parameters
        used += valid.mean()
    assert used / 60 > 0.6


def test_landmarks_land_where_the_homography_says():
    landmarks = np.array([[60.0, 70.0], [200.0, 60.0], [160.0, 130.0], [90.0, 190.0], [230.0, 200.0]])  # x, y
    y, x = np.mgrid[0:256, 0:320] + 0.5
    grid = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1)
    checked = 0
    for parameters in map(geometry_only, drawn(25, seed=6)):
        top, left = int(parameters.crop[1] * 33), int(parameters.crop[0] * 97)
        matrix = common.homography(parameters, (left, top, SIZE, SIZE), SIZE)
        for point in landmarks:
            target = matrix @ [*point, 1]
            target = target[:2] / target[2]
            if not ((target > 15) & (target < SIZE - 15)).all():
                continue
            blob = 250 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 2.5 ** 2))
            shown = augmented(np.repeat(blob[..., None], 3, 2).astype(np.uint8), parameters, SIZE)
            weight = shown[..., 0].astype(float)
            assert np.abs((grid * weight[..., None]).sum((0, 1)) / weight.sum() - target).max() < 0.1
            checked += 1
    assert checked > 50


def test_pictures_match_the_unfused_chain():
    # A bilinear step errs by at most (|f_xx| + |f_yy|) / 8, here 2 a (2 pi / 40)^2 / 8 = 0.31 grey levels; scaling by
    # .9 and perspective sharpen the waves to at most 1.35 of that. The chain has three steps, ours one, and rounding
    # of the pictures adds half a level on each side: 4 x 0.31 x 1.35 + 1 = 2.7 at any pixel, and 1 on average.
    image = waves()
    for parameters in map(geometry_only, drawn(40, seed=7)):
        expected, valid = with_mask(image, parameters)
        difference = np.abs(augmented(image, parameters, SIZE) - expected)[valid]
        assert difference.max() < 2.7 and difference.mean() < 1.0


def test_outside_is_black_and_crops_give_pixels_back():
    white = np.full((256, 320, 3), 255, np.uint8)
    shares = []  # of the picture that is black: ours, and the chain's
    for parameters in map(geometry_only, drawn(40, seed=8)):
        ours = augmented(white, parameters, SIZE)
        expected, valid = with_mask(white, parameters)
        assert (ours[valid] == 255).all(), "whatever the chain shows, we show"
        shares.append(((ours == 0).mean(), (expected == 0).mean()))
    ours, chain = np.transpose(shares)
    assert (ours <= chain + 0.002).all() and (ours < chain).sum() > 30 and ours.mean() < chain.mean() / 2
    shifted = augmented(white, common.Augmentation(crop=(0.0, 0.0), translate=(0.1, 0.0)), SIZE)
    assert (shifted[:, :22] == 0).all() and (shifted[:, 22:] == 255).all()


def test_one_draw_serves_all_frames_of_a_clip():
    parameters = geometry_only(drawn(1, seed=10)[0])
    image = waves()
    shown = [augmented(frame, parameters, SIZE) for frame in (image, image // 2)]
    assert np.abs(shown[0] // 2 - shown[1].astype(int)).max() <= 1


def test_pictures_smaller_than_the_crop_are_an_error():
    small = np.zeros((200, 300, 3), np.uint8)
    for call in (lambda: common.eval_crop(small, SIZE),
                 lambda: augmented(small, common.Augmentation(), SIZE)):
        with pytest.raises(ValueError, match="224 pixels does not fit into a picture of 200"):
            call()


# Colour -------------------------------------------------------------------

def torchvision_colour(image, parameters):
    """The unfused chain on floats, which torchvision does not cut to whole numbers after each step."""
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
    for name in parameters.jitter_order:
        tensor = getattr(F, f"adjust_{name}")(tensor, getattr(parameters, name))
    tensor = F.rgb_to_grayscale(tensor, 3) if parameters.greyscale else tensor
    return tensor.permute(1, 2, 0).numpy() * 255


def colour_only(parameters, **changes):
    keep = ("brightness", "contrast", "saturation", "hue", "jitter_order", "greyscale")
    return common.Augmentation(**{name: getattr(parameters, name) for name in keep} | changes)


def test_colour_without_hue_is_torchvision_to_the_rounding():
    # Nothing is cut at 0 or 255 here: half a level from rounding the result, and OpenCV holds the coefficients in
    # ten binary digits, which moves a pixel of 3 x 200 levels by at most 3 x 200 / 2048 = .29.
    image = np.rint(128 + (waves(SIZE, SIZE) - 128.0) * 0.6).astype(np.uint8)
    for parameters in drawn(60, seed=11):
        parameters = colour_only(parameters, hue=0.0)
        difference = np.abs(augmented(image, parameters, SIZE) - torchvision_colour(image, parameters))
        assert difference.max() < 0.8 and difference.mean() < 0.3, parameters


def test_hue_turns_the_way_torchvision_turns():
    colours = np.array([[180, 90, 90], [180, 180, 90], [90, 180, 90], [90, 180, 180], [90, 90, 180], [180, 90, 180]])
    for hue in (-0.1, -0.05, 0.05, 0.1):
        for colour in colours:
            image = np.tile(colour.astype(np.uint8), (8, 8, 1))
            found = augmented(image, common.Augmentation(hue=hue), 8)[0, 0]
            before, after = colorsys.rgb_to_hsv(*colour / 255)[0], colorsys.rgb_to_hsv(*found / 255)[0]
            turned = (after - before + 0.5) % 1 - 0.5
            assert abs(turned - hue) < 0.03, (colour, hue, turned)
            assert abs(found.sum() - colour.sum()) <= 2, "R + G + B stays"


@pytest.mark.parametrize("third", [1 / 3, -1 / 3])
def test_hue_by_a_third_is_exactly_torchvision(third):
    image = waves(SIZE, SIZE)
    parameters = common.Augmentation(hue=third)
    expected = torchvision_colour(image, parameters)
    assert np.abs(augmented(image, parameters, SIZE) - expected).max() < 1


def test_hue_pictures_are_near_torchvision():
    # A pure red turned by .1 is (1, .6, 0) in HSV and (.87, .40, -.28) by rotation: .20 of its chroma on average over
    # the channels, and no colour is worse. So the bound is .2 of the mean chroma (max - min) and rounding.
    image = waves(SIZE, SIZE)
    for parameters in drawn(60, seed=12):
        parameters = colour_only(parameters, greyscale=False)
        expected = torchvision_colour(image, parameters)
        difference = np.abs(augmented(image, parameters, SIZE) - expected)
        assert difference.mean() < 0.2 * np.ptp(expected, axis=2).mean() + 0.5, parameters


def test_greyscale_and_erase():
    image = waves(SIZE, SIZE)
    grey = augmented(image, common.Augmentation(greyscale=True), SIZE)
    assert np.abs(grey - torchvision_colour(image, common.Augmentation(greyscale=True))).max() <= 1
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    erased = augmented(image, common.Augmentation(erase=(0.1, 1.0, 0.0, 0.0)), SIZE)
    side = round(SIZE * math.sqrt(0.1))
    tensor = common.to_input(torch.from_numpy(erased[None]), common.choose_compute("cpu", "off"))
    assert tensor[0, :, :side, :side].abs().max() < 0.01
    assert np.array_equal(erased[side:], image[side:]) and np.array_equal(erased[:, side:], image[:, side:])


def test_inputs_are_left_alone():
    image = waves()
    image.flags.writeable = False
    for parameters in drawn(5, seed=13):
        assert augmented(image, parameters, SIZE).flags.writeable
    assert common.eval_crop(image, SIZE).flags.writeable


# Whole pictures and the model's input --------------------------------------

def test_distribution_of_whole_pictures():
    size, image = SIZE // 2, waves(SIZE * 4 // 7, SIZE * 5 // 7)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    chain = transforms.Compose([
        transforms.RandomCrop(size), transforms.RandomHorizontalFlip(0.5), transforms.RandomRotation(15, BILINEAR),
        transforms.RandomAffine(0, (0.1, 0.1), (0.9, 1.1), 10, BILINEAR), transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
        transforms.RandomGrayscale(0.1), transforms.RandomPerspective(0.2, 0.3, BILINEAR)])
    torch.manual_seed(14)
    centre = slice(31, 81)  # where the chain has hardly any black corners
    theirs = np.array([chain(tensor)[:, centre, centre].float().numpy().mean((1, 2)) for _ in range(400)])
    ours = np.array([augmented(image, dataclasses.replace(d, erase=None), size)[centre, centre]
                     .mean((0, 1)) for d in drawn(400, seed=15)])
    for channel, name in enumerate(("red", "green", "blue")):
        same_distribution(ours[:, channel], theirs[:, channel], name)


@pytest.mark.parametrize("height, width", [(256, 256), (256, 340), (300, 224), (224, 224)])
def test_eval_crop_is_the_centre(height, width):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = F.center_crop(torch.from_numpy(image).permute(2, 0, 1), [SIZE, SIZE]).permute(1, 2, 0).numpy()
    assert np.array_equal(common.eval_crop(image, SIZE), expected)


def test_the_short_side_before_the_crop_leaves_a_seventh():
    assert [common.resize_side(size) for size in (224, 384, 32)] == [256, 439, 37]


@pytest.mark.parametrize("channels_last", [True, False])
def test_to_input_is_torchvision_normalize(channels_last):
    batch = torch.from_numpy(np.stack([waves(40, 50), 255 - waves(40, 50)]))
    compute = dataclasses.replace(common.choose_compute("cpu", "off"), channels_last=channels_last)
    found = common.to_input(batch, compute)
    expected = F.normalize(batch.permute(0, 3, 1, 2) / 255, common.IMAGENET_MEAN, common.IMAGENET_STD)
    assert found.shape == (2, 3, 40, 50) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected.contiguous(), rtol=1e-5, atol=1e-5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)
    assert batch.dtype == torch.uint8


# --- clips, and the presets of the published studies ----------------------------------------------------------

def test_a_clip_is_changed_alike_in_all_frames():
    """Equal frames stay equal under every preset, and one frame of a clip is what the same draw makes of a picture."""
    image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    for preset in common.AUGMENTATIONS:
        for seed in range(12):
            parameters = common.sample_augmentation(preset, torch.Generator().manual_seed(seed))
            clip = common.augment_clip(np.stack([image] * 3), parameters, 64)
            assert (clip == clip[0]).all() and np.array_equal(clip[0], augmented(image, parameters, 64))


def test_the_colours_of_a_clip_do_not_flicker():
    """A frame that turns dark stays as dark beside its neighbours: contrast looks at the whole clip."""
    frames = np.stack([np.full((64, 64, 3), level, np.uint8) for level in (100, 150)])
    for parameters in (common.Augmentation(contrast=0.5), common.Augmentation(brightness=1.2)):
        dark, bright = common.augment_clip(frames, parameters, 64).reshape(2, -1).mean(1)
        factor = parameters.contrast * parameters.brightness
        assert bright - dark == pytest.approx(50 * factor, abs=1)


def test_resized_crops_are_those_of_torchvision():
    """RandomResizedCrop's window, warped by us, against crop and resize by torchvision."""
    image = waves()
    parameters = common.Augmentation(crop=(0.5, 0.5), resized=(0.6, 1.1))
    left, top, width, height = common.crop_window(image.shape, parameters, SIZE)
    assert width * height == pytest.approx(0.6 * image.shape[0] * image.shape[1])
    assert width / height == pytest.approx(1.1)
    box = [round(value) for value in (top, left, height, width)]
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = F.resized_crop(tensor, *box, [SIZE, SIZE], BILINEAR, antialias=False).permute(1, 2, 0).numpy()
    ours = augmented(image, parameters, SIZE)
    assert np.abs(ours.astype(int) - expected)[4:-4, 4:-4].mean() < 3


def test_heavy_has_the_chances_of_its_study():
    generator = torch.Generator().manual_seed(1)
    draws = [common.sample_augmentation("heavy", generator) for _ in range(3000)]
    shares = {0.2: ([d.greyscale for d in draws], [d.noise is not None for d in draws]),
              0.3: ([d.blur > 0 for d in draws], [d.erase is not None for d in draws]),
              0.4: ([d.autocontrast for d in draws],)}
    for chance, kinds in shares.items():
        assert np.mean(kinds, axis=1) == pytest.approx(chance, abs=0.025)  # three standard errors
    seeds = [d.noise[1] for d in draws if d.noise]
    assert len(set(seeds)) == len(seeds), "none has the noise of another"
    areas, ratios = np.transpose([d.resized for d in draws])
    assert [areas.min(), areas.max()] == pytest.approx([0.6, 1], abs=0.002)
    assert [ratios.min(), ratios.max()] == pytest.approx([3 / 4, 4 / 3], abs=0.002)
    shuffled = np.mean([d.channels != (0, 1, 2) for d in draws])  # one shuffle in six changes nothing
    assert shuffled == pytest.approx(0.1 * 5 / 6, abs=0.02)


@pytest.mark.parametrize("preset, blurred, limits", [
    ("basic", 0.0, {"rotation_deg": 10, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}),
    ("enhanced", 0.3, {"rotation_deg": 15, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1,
                       "scale": 0.1}),
    ("heavy", 0.3, {"rotation_deg": 10, "brightness": 0.5, "contrast": 0.5, "saturation": 0.3, "hue": 0.05})])
def test_presets_of_published_studies_draw_up_to_their_limits(preset, blurred, limits):
    draws = drawn(1000, preset)
    unchanged = common.Augmentation()
    for name in ("rotation_deg", "brightness", "contrast", "saturation", "hue", "scale", "shear_deg"):
        changes = np.array([getattr(d, name) - getattr(unchanged, name) for d in draws])
        limit = limits.get(name, 0)
        assert [changes.min(), changes.max()] == pytest.approx([-limit, limit], abs=0.02 * limit), name
    shifts = np.array([d.translate for d in draws])
    assert np.abs(shifts).max(0) == pytest.approx(0.1 if preset == "enhanced" else 0, abs=0.002)
    assert np.mean([d.flip for d in draws]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([d.blur > 0 for d in draws]) == pytest.approx(blurred, abs=0.05)
    if preset != "heavy":  # whose chances are above
        rare = ("corners", "resized", "greyscale", "erase", "channels", "autocontrast", "noise")
        assert {getattr(d, name) for d in draws for name in rare} == {None, False, (0, 1, 2)}


def test_noise_is_of_each_pixel_and_colour_and_blur_as_wide_as_its_sigma():
    grey = np.full((64, 64, 3), 128, np.uint8)
    added = augmented(grey, common.Augmentation(noise=(10.0, 3)), 64) - 128.0
    assert added.std() == pytest.approx(10, rel=0.03)
    for others in ((0, 1), (0, 2), (1, 2)):  # alike along none of the axes: means shrink with the root of their number
        means = added.mean(others)
        assert np.abs(means).max() < 4 * 10 / math.sqrt(added.size / means.size)
    square = np.zeros((65, 65, 3), np.uint8)
    square[28:37, 28:37] = 255
    light = augmented(square, common.Augmentation(blur=2.0), 65)[..., 0].astype(float)
    for axis in (0, 1):  # variances add up; (9^2 - 1) / 12 is that of the square
        variance = np.average((np.arange(65) - 32.0) ** 2, weights=light.sum(axis))
        assert variance - 80 / 12 == pytest.approx(2.0 ** 2, rel=0.02)


def test_autocontrast_is_that_of_torchvision():
    image = (np.random.default_rng(2).integers(60, 180, (32, 32, 3))).astype(np.uint8)
    expected = F.autocontrast(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    ours = augmented(image, common.Augmentation(autocontrast=True), 32)
    assert np.abs(ours.astype(int) - expected).max() <= 1
