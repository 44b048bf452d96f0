"""Predict ratings for images with one checkpoint of train_assessor.py, or the mean of several.

    python predict_assessor.py --checkpoint outputs/run_X/best_model.pth --image_dir my_images --output predictions.csv
    python predict_assessor.py --checkpoint outputs/run_of_folds --image_dir path/to/images --interval 0.9

Writes one CSV with a row for every input in input order: image, each rating in the unit that the model was trained on,
<rating>_sd (spread between the members, where there are several), <rating>_low and <rating>_high (with --interval), and
error (why a picture could not be read; its ratings are then empty).

Letters: N images, B batch, R ratings, M members, S side of the square input in pixels.
"""
from pathlib import Path

import numpy as np
import torch

import common
from evidence import calibrating
from readers import file_names, picture_files
from train_assessor import Assessor, mirrored_mean, resize_side, with_head_features

SCRIPT = "train_assessor.py"


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.group("prediction")
    add("--checkpoint", type=Path, nargs="+", required=True,
        help="best_model.pth files, or run folders (of folds: every fold)")
    add("--image_dir", type=Path, help="folder of pictures, searched with its subfolders")
    add("--image_list", type=Path, help="text file with one path a line; relative paths start at the file's folder")
    add("--images", type=Path, nargs="+", default=[], help="single picture files")
    add("--output", type=Path, default=Path("predictions.csv"), help="CSV to write")
    add("--interval", type=common.bounded(float, 0.01, 0.999), help="coverage of the conformal bounds, such as 0.9")
    add("--predict_batch_size", type=common.bounded(int, 1), default=32, help="pictures per batch")
    common.add_compute_arguments(parser)
    parser.set_defaults(seed=0)  # the loader asks for it, nothing is drawn
    args = common.parse_arguments(parser, argv)
    if not (args.image_dir or args.image_list or args.images):
        parser.error("no pictures given; name them with --image_dir, --image_list or --images")
    return args


def find_inputs(args):
    """[(name to print, path)] of every input, in the order of the flags."""
    inputs = [(str(path), path) for path in args.images]
    if args.image_list:
        if not args.image_list.is_file():
            raise common.UserError(f"no such file: --image_list {args.image_list}")
        lines = args.image_list.read_text(encoding="utf-8-sig").splitlines()
        inputs += [(line.strip(), args.image_list.parent / line.strip()) for line in lines if line.strip()]
    if args.image_dir:
        inputs += [(path.relative_to(args.image_dir).as_posix(), path) for path in file_names.find_images(args.image_dir)]
    if not inputs:
        raise common.UserError(f"no pictures found in {args.image_dir or args.image_list}")
    return inputs


def load_members(files, compute):
    """Checkpoint files -> [(model in eval mode, its settings)]. UserError where ratings or input sizes differ."""
    members = []
    for path in files:
        settings = common.load_model_file(path, SCRIPT)
        with common.checkpoint_fields(path):
            backbone, n_features = common.build_backbone(settings["backbone"], False, None, settings["image_size"])
            features = with_head_features(backbone, n_features, settings["head"], settings["image_size"])
            model = Assessor(*features, len(settings["names"]), settings["head"], settings["dropout"])
        common.load_state(model, settings["model"], path)
        members.append((compute.place(model).eval(), settings))
    first = members[0][1]
    for path, (_, settings) in zip(files, members):
        if (settings["names"], settings["image_size"]) != (first["names"], first["image_size"]):
            raise common.UserError(f"{path} predicts {settings['names']} at {settings['image_size']} px, {files[0]} "
                                   f"{first['names']} at {first['image_size']} px; members of one mean must agree")
    print(f"model: {first['backbone']}, head {first['head']}, {first['image_size']} px, {len(first['names'])} ratings, "
          f"flip average {first['flip_average']}, {len(members)} checkpoint(s) of epochs "
          f"{', '.join(str(settings['epoch']) for _, settings in members)}", flush=True)
    return members


@torch.inference_mode()
def predict(members, loader, compute):
    """-> (predicted (M, N, R) float64 in the unit of the ratings, errors: N texts)."""
    (_, first), outputs, errors = members[0], [], []
    for batch in loader:
        # (B, S, S, 3) -> (B, 3, S, S)
        inputs = common.to_input(batch["pixels"], compute.device, first["pixel_mean"], first["pixel_sd"],
                                 compute.channels_last)
        with compute.autocast():
            each = [mirrored_mean(model, inputs, settings["flip_average"]) for model, settings in members]
        outputs.append(torch.stack(each).cpu())  # M x (B, R) -> (M, B, R)
        errors += batch["error"]
    predicted = torch.cat(outputs, dim=1).double().numpy()  # (M, N, R)
    for member, (_, settings) in enumerate(members):
        predicted[member] = predicted[member] * settings["scaler"]["sd"].numpy() + settings["scaler"]["mean"].numpy()
    predicted[:, [bool(error) for error in errors]] = np.nan
    return predicted, errors


def half_widths(members, coverage):
    """(R,) conformal half-widths from the members' residuals on rows they were not trained on; inf where too few."""
    residuals = np.concatenate([settings["abs_residuals"].numpy() for _, settings in members])  # (rows, R)
    subjects = [subject for _, settings in members for subject in settings["residual_subjects"] or []]
    return np.array([calibrating.conformal_quantile(column, 1 - coverage, subjects or None) for column in residuals.T])


def output_rows(inputs, predicted, errors, names, widths):
    """One dict per input, in input order."""
    mean, spread = predicted.mean(0), predicted.std(0, ddof=1) if len(predicted) > 1 else None
    rows = []
    for i, ((name, _), error) in enumerate(zip(inputs, errors)):
        row = {"image": name}
        for r, rating in enumerate(names):
            row[rating] = mean[i, r]
            row |= {} if spread is None else {f"{rating}_sd": spread[i, r]}
            if widths is not None:
                row |= {f"{rating}_low": mean[i, r] - widths[r], f"{rating}_high": mean[i, r] + widths[r]}
        rows.append({**row, "error": error})
    return rows


def print_summary(predicted, names, members, widths):
    """Mean, sd and range of each rating; a column that is nearly constant beside the training labels is flagged."""
    mean = predicted.mean(0)
    label_sd = np.stack([settings["label_sd"].numpy() for _, settings in members]).mean(0)
    print(f"{'rating':24}{'mean':>10}{'sd':>10}{'min':>10}{'max':>10}")
    for r, name in enumerate(names):
        values = mean[~np.isnan(mean[:, r]), r]
        if not len(values):
            continue
        flag = "  NEARLY CONSTANT" if len(values) > 1 and values.std() < 0.05 * label_sd[r] else ""
        print(f"{name[:23]:24}{values.mean():10.3f}{values.std():10.3f}{values.min():10.3f}{values.max():10.3f}{flag}")
    if widths is not None and not np.isfinite(widths).all():
        infinite = int((~np.isfinite(widths)).sum())
        print(f"interval: infinite for {infinite} ratings, too few residuals in the checkpoint")


def main():
    args = parse_args()
    inputs = find_inputs(args)
    compute = common.choose_compute(args.device, args.use_amp)
    print(f"device: {compute.text}", flush=True)
    members = load_members(common.checkpoint_files(args.checkpoint), compute)
    names, image_size = members[0][1]["names"], members[0][1]["image_size"]
    pictures = picture_files.Pictures([path for _, path in inputs], resize_side(image_size),
                                      lambda pixels, _: common.eval_crop(pixels, image_size))
    loader = common.make_loader(pictures, args.predict_batch_size, args, compute, train=False)
    predicted, errors = predict(members, loader, compute)
    widths = half_widths(members, args.interval) if args.interval else None
    common.write_table(args.output, output_rows(inputs, predicted, errors, names, widths))
    print_summary(predicted, names, members, widths)
    failed = sum(map(bool, errors))
    print(f"{len(inputs)} pictures, {failed} could not be read (see the error column); written to {args.output}")


if __name__ == "__main__":
    common.run_main(main)
