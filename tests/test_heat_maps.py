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


class WithUnread(Reader):
    """A Reader with further maps, of which its outputs read nothing."""

    def __init__(self):
        super().__init__()
        self.unread = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        outputs = super().forward(images)
        self.unread(images)
        return outputs


def test_each_map_is_of_the_last_layer_that_counts_and_scaled_by_its_own_maximum(images):
    """Dark pictures too have a place of heat 1; that some places count nothing is no reason to go a layer up."""
    model = WithUnread()
    model.maps[0].weight.data.abs_()
    images = images * torch.tensor([1, 0.5, 0.1]).view(3, 1, 1, 1)
    found, _ = heat_maps.explain(model, ["maps.0", "maps", "unread"], images)
    with torch.no_grad():
        heat = (model.maps(images)[:, None] * model.head.weight.view(2, 4, 8, 8)).sum((1, 2))
    heat = nn.functional.interpolate(heat[:, None], (64, 64), mode="bilinear")[:, 0]
    for own, expected in zip(found, heat.numpy()):
        np.testing.assert_allclose(own, expected / expected.max(), atol=1e-6)


@pytest.mark.parametrize("n_same, level, words", [
    (16, "caution", "they hardly change"), (14, "caution", "they change in part"), (8, "caution", "they change in part"),
    (7, "good", "they change, so"), (0, "good", "they change, so")])
def test_maps_are_judged_by_the_mean_of_their_correlations(n_same, level, words):
    """Of 25 pictures some have the same two maps, which correlate by 1, and the second one of the others is flat."""
    maps = np.zeros((2, 25, 4, 4))
    maps[0] = np.arange(16).reshape(4, 4) / 15
    maps[1, :n_same] = maps[0, 0]
    cases = [{"image": np.zeros((4, 4, 3), np.uint8), "title": "a picture"}] * 25
    grids, verdict = heat_maps.show(cases, np.zeros((25, 4, 4, 3), np.uint8), maps, "Valence")
    assert len(grids) == 25 and verdict.level == level
    assert f"of Valence, each beside that of the network with random weights: mean rank correlation {n_same / 25:.2f}; " + words \
        in verdict.sentence


def test_a_cold_place_is_grey_and_a_hot_one_has_the_tint(monkeypatch):
    """0.8 of the mean of (30, 60, 90) is 48, of which a fifth is left under 0.8 of the tint; the second map is cold."""
    drawn = []
    monkeypatch.setattr(heat_maps.reporting, "html_cases", drawn.append)
    pixels = np.full((1, 2, 2, 3), [30, 60, 90], np.uint8)
    maps = np.zeros((2, 1, 2, 2))
    maps[0, 0, 0, 1] = 1
    heat_maps.show([{"title": "a picture"}], pixels, maps, "Valence")
    [(_, learnt, random)] = drawn
    expected = np.full((2, 2, 3), 48)
    np.testing.assert_array_equal(random["image"], expected)
    expected[0, 1] = 193, 57, 9  # of (230, 60, 0)
    np.testing.assert_array_equal(learnt["image"], expected)


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
    state = torch.get_rng_state()
    other = heat_maps.shuffle_weights(model)
    assert torch.equal(torch.get_rng_state(), state), "what else is drawn does not depend on it"
    again = heat_maps.shuffle_weights(model)
    assert all(map(torch.equal, other.parameters(), again.parameters()))
    for own, shuffled in zip(model.parameters(), other.parameters()):
        assert torch.equal(own.flatten().sort()[0], shuffled.flatten().sort()[0])
    assert not torch.equal(model.head.weight, other.head.weight) and torch.equal(model.head.weight, Reader().head.weight)
