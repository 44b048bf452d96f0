"""A trained model as one file that other programs load: torch.export (.pt2) or ONNX (.onnx), compared with its script.

Beside the model the file holds about.json: the names of the outputs, and how pictures are made into its input.

Letters: B pictures or clips, K outputs, S side of the square input in pixels.
"""
import argparse
import io
import json

import torch
from torch import nn

import common

ABOUT = "about.json"
TOLERANCE = 1e-4


def add_argument(add, what):
    """Declare --export in a group of flags; what: what the file is a model of, and what it is checked on."""
    add("--export", type=_model_file, metavar="FILE",
        help=f"also write {what}, or the mean of several, as one file that needs nothing of this repository: .pt2 "
             "(torch.export) or .onnx (packages onnx, onnxscript, onnxruntime); checked on the first ten")


def _model_file(text):
    path = common.new_file(text)
    if path.suffix not in (".pt2", ".onnx"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .pt2 or .onnx")
    if path.suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            common.optional_package(package)
    return path


def normalise(pixels, mean, sd):
    """uint8 (..., S, S, 3) -> (..., 3, S, S) on the scale that a network expects; mean, sd: of the three colours."""
    colours = (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(sd)
    return colours.movedim(-1, -3)


class MeanOutput(nn.Module):
    """The mean of several members' outputs (B, K) for the same pixels and what else they need.

    members: each with `model`, and predict_pixels(uint8 (B, ..., S, S, 3), ...), which calls it.
    """

    def __init__(self, members):
        super().__init__()
        self.members = members
        self.models = nn.ModuleList(member.model.float().cpu() for member in members)

    def forward(self, *inputs):
        return sum(member.predict_pixels(*inputs) for member in self.members) / len(self.members)


def about_pictures(names, image_size, pixel_range):
    """What about.json says of every model: the names of its outputs, and how its pictures are resized and cropped."""
    return {
        "names": names,
        "short_side": common.resize_side(image_size),
        "crop": image_size,
        "resize": "upright, transparency on white, the other side in proportion; JPEGs are decoded at 1/2, 1/4 or 1/8 "
                  "where that leaves 1.5 short sides (Pillow's draft), and get the size that the whole picture would; "
                  "area where it shrinks, cubic where it grows; the crop begins at (side - crop + 1) // 2",
        "pixel_range": pixel_range,
    }


@torch.no_grad()
def export(path, members, answer, inputs, about, unit=1.0):
    """Write the MeanOutput of members as one file, load it, and say how far it is from what the script predicts.

    answer: function of a member and a Compute -> (B, K), what the script predicts for
    the inputs; inputs: {name: (B, ...)} of up to ten rows; about: content of
    about.json; unit: (K,) or a number, of which a difference may be TOLERANCE.
    UserError: it is more, or the network cannot be exported.
    """
    model = MeanOutput(members).eval().requires_grad_(False)
    compute = common.choose_compute("cpu", "off")
    expected = sum(answer(member, compute) for member in members) / len(members)
    # a batch of one would be taken for a fixed size
    two = tuple(torch.cat([each, each]) for each in inputs.values())
    sizes = tuple({0: torch.export.Dim("batch")} for _ in two)
    try:
        program = torch.export.export(model, two, dynamic_shapes=(sizes,), strict=False)
        content, found = _convert(path.suffix, program, inputs, about)
    except Exception as error:  # of torch.export and the converter, of many classes
        raise common.UserError(f"--export {path}: this network cannot be exported to {path.suffix} "
                               f"({common.one_line(error)}); train another --model or --backbone") from None
    worst = ((found - expected).abs() / unit).max().item()
    if not worst <= TOLERANCE:
        raise common.UserError(f"--export {path}: its outputs differ from this script's by {worst:.1g} on "
                               f"{len(expected)} rows; not written. Please report this with the network's name")
    common.write_whole(path, content)
    shapes = ", ".join(f"{name} (B, {', '.join(map(str, each.shape[1:]))})" for name, each in inputs.items())
    print(f"{path}: {shapes} -> {common.shorten_list(about['names'])}; on {len(expected)} rows "
          f"within {worst:.1g} of this script with --use_amp off")


def _convert(suffix, program, inputs, about):
    """Exported program -> (content of its file, outputs (B, K) of that)."""
    text = json.dumps(about)
    if suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={ABOUT: text})
        return file.getvalue(), torch.export.load(file).module()(*inputs.values())
    import onnxruntime
    written = torch.onnx.export(program, input_names=list(inputs), output_names=["outputs"], verbose=False)
    written.model.metadata_props[ABOUT] = text
    content = written.model_proto.SerializeToString()
    values = {name: each.numpy() for name, each in inputs.items()}
    return content, torch.from_numpy(onnxruntime.InferenceSession(content).run(None, values)[0])
