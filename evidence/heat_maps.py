"""Where a network looks: which places of a picture its output rests on, and whether what it has learnt decides that.

Letters: B pictures, R outputs, C channels, h and w height and width of a map, S side
of a picture in pixels.
"""
import copy

import numpy as np
import torch
from torch import nn

from evidence import reporting, verdicts
from readers import backbones

TINT = np.array([230, 60, 0])  # of the places that matter


def explain(model, paths, inputs, outputs=slice(None)):
    """Heat maps of normalised pictures (B, 3, S, S), and the same with random weights -> (2, B, S, S), each up to 1.

    paths: of the model's modules that give feature maps; of the last on which the output rests. All
    0 where it rests on none. outputs: which of the R count.
    """
    both = []
    for each in (model, shuffle_weights(model)):
        heat = torch.cat([_gradient_maps(each, paths, few, outputs) for few in inputs.split(8)])  # (B, h, w)
        heat = nn.functional.interpolate(heat[:, None], inputs.shape[2:], mode="bilinear")[:, 0]
        both.append(heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-30))
    return torch.stack(both).cpu().numpy()


def _gradient_maps(model, paths, inputs, outputs):
    """Gradient times activation, summed over channels: its magnitude, mean over the outputs -> (B, h, w).

    On the last map it is each place's share of the output, up to what the layers above add
    (Selvaraju et al. 2017, with the gradient of each place as in Draelos & Carin 2020).
    """
    *found, (_, predicted) = backbones.outputs_at(model, [*paths, ""], inputs)
    heat = inputs.new_zeros(len(inputs), 1, 1)
    for _, layer in reversed(found):
        heat = 0
        for column in predicted[:, outputs].T:
            gradient, = torch.autograd.grad(column.sum(), layer, retain_graph=True, materialize_grads=True)
            heat = heat + backbones.feature_maps(gradient * layer).sum(1).abs().detach()  # (B, C, h, w) -> (B, h, w)
        if heat.any():  # a ViT reads its class token alone after the last block
            break
    return heat


@torch.no_grad()
def shuffle_weights(model):
    """A copy that has learnt nothing: the numbers of each tensor stand in random order."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for values in other.state_dict().values():
        order = torch.randperm(values.numel(), generator=generator)
        values.copy_(values.flatten()[order].view_as(values))
    return other


def rank_correlations(maps):
    """(2, B, S, S) -> (B,) Spearman correlation of each picture's two maps; 0 where one is flat."""
    import pandas as pd
    learnt, random = (pd.DataFrame(each.reshape(len(each), -1).T).rank() for each in maps)
    return learnt.corrwith(random).fillna(0).to_numpy()


def show(cases, pixels, maps, shown):
    """Grids of each picture with its two maps (2, B, S, S), and in words what the maps are worth -> (HTML, Verdict).

    cases: dict for reporting.html_cases of each picture; pixels: uint8 (B, S, S, 3);
    shown: text, whose maps they are.
    """
    correlations = rank_correlations(maps)
    grey = pixels.mean(-1, keepdims=True) * 0.8
    drawn = (grey + (TINT - grey) * 0.8 * maps[..., None]).astype(np.uint8)  # (2, B, S, S, 3)
    grids = [
        reporting.html_cases([
            case,
            {"image": learnt, "title": "where it looks"},
            {"image": random, "title": "with random weights", "lines": [f"rank correlation {correlation:.2f}"]}])
        for case, learnt, random, correlation in zip(cases, *drawn, correlations)]
    mean = correlations.mean()
    level = "caution"
    if not maps[0].any():
        meaning = "they are empty: this network has no feature map on which its output rests"
    elif mean > 0.6:
        meaning = "they hardly change: they show the picture and its edges, not what was learnt"
    elif mean > 0.3:
        meaning = "they change in part: what was learnt does not alone decide them"
    else:
        level = "good"
        meaning = "they change, so what was learnt decides where the network looks"
    sentence = (f"Heat maps of {shown}, each beside that of the network with random weights: mean "
                f"rank correlation {mean:.2f}; {meaning}.")
    return grids, verdicts.Verdict(level, "Where it looks", sentence)
