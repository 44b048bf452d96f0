"""Heat maps: they show the places that a made network is known to read, and say when they only show the picture.

    python -m pytest tests/test_heat_maps.py
"""
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from evidence import heat_maps
from readers import backbones


class Reader(nn.Module):
    """Maps (B, 4, 8, 8), of which the two outputs read only the first two rows of the first four columns."""

    def __init__(self, n_read=4):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(8))
        weight = torch.zeros(2, 4, 8, 8)
        weight[:, :, :2, :n_read] = torch.rand(2, 4, 2, n_read) + 0.5
        self.head = nn.Linear(4 * 64, 2)
        self.head.weight.data = weight.flatten(1)

    def forward(self, images):
        return self.head(self.maps(images).flatten(1))


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def show(maps):
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    return heat_maps.show([{"image": picture, "title": "a picture"} for picture in pixels], pixels, maps, "Valence")


def test_the_places_that_are_read_are_hot_and_others_cold(images):
    maps = heat_maps.explain(Reader(), ["maps"], images)
    assert maps.shape == (2, 3, 64, 64) and maps.min() >= 0 and np.allclose(maps.max((2, 3)), 1)
    learnt, random = maps[:, :, 4:-4, 4:-4]  # the scaling up mixes neighbours
    assert (learnt[:, :8, :24] > 0.1).all() and (learnt[:, 20:, :] == 0).all() and (learnt[:, :, 40:] == 0).all()
    assert (random[:, 20:, :] > 0).any(), "random weights read elsewhere"
    verdict = show(maps)[1]
    assert verdict.level == "good" and "what was learnt decides" in verdict.sentence


def test_gradient_times_activation_is_each_place_s_share_of_the_output(images):
    """All is positive here, so that the shares add up to the output without its bias."""
    model = Reader()
    model.maps[0].weight.data.abs_()
    model.head.weight.data.abs_()
    heat = heat_maps._gradient_maps(model, ["maps"], images, [1])  # (B, 8, 8)
    with torch.no_grad():
        shares = (model.maps(images) * model.head.weight[1].view(4, 8, 8)).sum(1)
        assert torch.allclose(heat, shares, atol=1e-6)
        assert torch.allclose(heat.sum((1, 2)), model(images)[:, 1] - model.head.bias[1], atol=1e-5)


def test_maps_of_the_picture_alone_are_called_so(images):
    """A head that weighs all places alike shows the bright places, with and without what was learnt."""
    model = Reader()
    model.head.weight.data.fill_(1.0)
    model.maps[0].weight.data.fill_(1.0)
    maps = heat_maps.explain(model, ["maps"], images)
    grids, verdict = show(maps)
    assert verdict.level == "caution" and "not what was learnt" in verdict.sentence
    assert len(grids) == 3 and all("rank correlation 1.00" in grid for grid in grids)


def test_rank_correlations_are_those_of_scipy():
    maps = np.random.default_rng(0).integers(0, 9, (2, 4, 8, 8)).astype(float)  # with ties
    maps[0, 3] = 0.5  # flat
    found = heat_maps.rank_correlations(maps)
    expected = [spearmanr(a.ravel(), b.ravel())[0] for a, b in zip(*maps[:, :3])]
    assert np.allclose(found, [*expected, 0])


def test_a_vision_transformer_is_read_before_its_last_block():
    """Its output rests on the class token alone after the last block, so that the map there is zero."""
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=16)
    nn.init.normal_(vit.heads.head.weight)
    images = torch.randn(1, 3, 32, 32)
    paths = backbones.map_paths(vit.eval(), images)
    assert paths[-1] == "encoder.layers.encoder_layer_5"
    heat = heat_maps._gradient_maps(vit, paths, images, slice(0, 3))
    assert heat.shape == (1, 4, 4) and (heat > 0).all()
    assert not heat_maps._gradient_maps(vit, paths[-1:], images, slice(0, 3)).any()


def test_a_network_without_maps_is_called_so(images):
    verdict = show(heat_maps.explain(Reader(), [], images))[1]
    assert verdict.level == "caution" and "they are empty" in verdict.sentence


def test_shuffling_keeps_the_numbers_of_each_tensor_and_the_model():
    model = Reader()
    other = heat_maps.shuffle_weights(model)
    for own, shuffled in zip(model.parameters(), other.parameters()):
        assert torch.equal(own.flatten().sort()[0], shuffled.flatten().sort()[0])
    assert not torch.equal(model.head.weight, other.head.weight) and torch.equal(model.head.weight, Reader().head.weight)
