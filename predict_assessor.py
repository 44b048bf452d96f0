"""Predict ratings for images with one checkpoint of train_assessor.py, or the mean of several.

    python predict_assessor.py --checkpoint outputs/run_X/best_model.pth --image_dir my_images --output predictions.csv
    python predict_assessor.py --checkpoint outputs/run_of_folds --image_dir path/to/images --interval 0.9
    python predict_assessor.py --checkpoint outputs/run_X --image_dir my_images --export model.pt2

Writes one CSV with a row for every input in input order: image, each rating in the unit of the ratings file,
<rating>_sd (standard deviation over the checkpoints, where there are several), <rating>_low and <rating>_high
(with --interval), seen (what the checkpoints did with the picture in training: train, chose or new),
warning (trained on; outside the training labels; unlike the training pictures: farther from them than every
held-out one), and error (why a picture could not be read; its ratings and seen are then empty).

Letters: N images, B batch, R ratings, M members (the checkpoints), F features of a backbone, S side of the square
input in pixels.
"""
import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
import exporting
from evidence import calibrating, heat_maps, prediction_tables, reporting, row_warnings, seen_rows
from readers import csv_tables, file_names, picture_files
from train_assessor import explain, load_assessor, mean_over, views_of


@dataclasses.dataclass
class Member:
    """One of the checkpoints whose mean is predicted."""
    model: nn.Module  # in eval mode
    settings: dict  # content of its checkpoint

    def ratings_and_features(self, inputs):
        """(B, 3, S, S) -> on the CPU ratings (B, R) in the unit of the ratings file, features (B, F).

        With flip_average the features are means over each picture and its mirror image. The head of
        a frozen backbone reads these means, on which it was trained and judged. Any other was
        judged by the mean of its two outputs; with an mlp head that is another number.
        """
        views = views_of(inputs, self.settings["flip_average"])
        features = [self.model.backbone(view) for view in views]  # (B, 3, S, S) -> (B, F) each
        mean = sum(features) / len(views)
        if self.settings["freeze_backbone"]:
            features = [mean]
        outputs = mean_over(self.model, features)  # (B, F) -> (B, R)
        scaler = self.settings["scaler"]
        return outputs.cpu() * scaler["sd"] + scaler["mean"], mean.float().cpu()

    def predict(self, pixels, compute):
        """uint8 (B, S, S, 3) -> ratings (B, R), features (B, F) of ratings_and_features."""
        inputs = common.to_input(pixels, compute, self.settings["pixel_mean"], self.settings["pixel_sd"])
        with compute.autocast():
            return self.ratings_and_features(inputs)

    def predict_pixels(self, pixels):
        """uint8 (B, S, S, 3) -> float32 (B, R): the ratings alone, as the exported file computes them."""
        inputs = exporting.normalise(pixels, self.settings["pixel_mean"], self.settings["pixel_sd"])
        return self.ratings_and_features(inputs)[0].float()


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.group("prediction")
    add("--checkpoint", type=Path, nargs="+", required=True,
        help="best_model.pth files, or run folders (of folds: every fold)")
    add("--image_dir", type=Path, help="folder of pictures, searched with its subfolders")
    add("--image_list", type=Path, help="text file with one path a line; relative paths start at the file's folder")
    add("--images", type=Path, nargs="+", default=[], help="single picture files (default: none)")
    add("--output", type=common.new_file, default="predictions.csv", help="CSV to write")
    add("--interval", type=common.bounded(float, 0.01, 0.999),
        help="share of new pictures, such as 0.9, whose true ratings the (conformal) bounds shall hold")
    exporting.add_argument(add, "the model")
    add("--explain", type=common.bounded(int, 1, 20), metavar="N",
        help="also write a page of heat maps of the first N pictures (up to 20): where the model "
             "looks, beside the same with random weights; its name is that of --output with .html")
    add("--explain_rating", metavar="NAME", help="with --explain: the rating (default: the mean over all)")
    add("--predict_batch_size", type=common.POSITIVE, default=32, help="pictures per batch")
    common.add_compute_arguments(parser)
    parser.set_defaults(seed=0)  # the loader asks for it, nothing is drawn
    args = common.parse_arguments(parser, argv)
    if not (args.image_dir or args.image_list or args.images):
        parser.error("no pictures given; name them with --image_dir, --image_list or --images")
    if args.explain_rating and not args.explain:
        parser.error(f"--explain_rating {args.explain_rating} says what --explain shows; give both")
    if args.output.suffix.lower() != ".csv":
        parser.error(f"--output {args.output}: expected a name that ends in .csv")
    return args


def find_inputs(args):
    """[(name in the CSV, path)] of every input, in the order of the flags."""
    inputs = [(str(path), path) for path in args.images]
    if args.image_list:
        names = map(str.strip, csv_tables.read_text(args.image_list).splitlines())
        inputs += [(name, args.image_list.parent / name.replace("\\", "/")) for name in names if name]
    if args.image_dir:
        inputs += [(path.relative_to(args.image_dir).as_posix(), path)
                   for path in file_names.find_images(args.image_dir)]
    if not inputs:
        raise common.UserError(f"no pictures found in {args.image_dir or args.image_list}")
    return inputs


def load_members(files, compute):
    """Checkpoint files -> list of Member. UserError where ratings or input sizes differ."""
    members = [Member(*load_assessor(path, compute)) for path in files]
    first = members[0].settings
    for path, member in zip(files, members):
        for key in ("names", "image_size", "pixel_range"):
            if member.settings[key] != first[key]:
                raise common.UserError(
                    f"{path} has {key} {member.settings[key]}, {files[0]} {first[key]}; members of one mean must agree")
    networks = dict.fromkeys(
        "{backbone}, head {head}, flip average {flip_average}".format(**member.settings) for member in members)
    epochs = ", ".join(str(member.settings["epoch"]) for member in members)
    print(f"model: {'; '.join(networks)}; {first['image_size']} px, {len(first['names'])} ratings, "
          f"{len(members)} checkpoint(s) of epochs {epochs}")
    return members


def pictures_to_predict(inputs, settings):
    """picture_files.Pictures of find_inputs, in the size that the model takes."""
    prepare = functools.partial(crop_picture, settings["image_size"])
    short_side = common.resize_side(settings["image_size"])
    return picture_files.Pictures([path for _, path in inputs], short_side, prepare, settings["pixel_range"])


def crop_picture(image_size, pixels, _):
    """Centre crop of uint8 (H, W, 3)."""
    return common.eval_crop(pixels, image_size)


@torch.inference_mode()
def predict(members, loader, compute):
    """-> (predicted (M, N, R) float64 in the unit of the ratings, (N,) seen, errors: N texts, (N,) warnings)."""
    batches = []
    hashes = []
    errors = []
    for batch in loader:
        batches.append([member.predict(batch["pixels"], compute) for member in members])
        hashes.append(batch["hashes"])
        errors += batch["error"]
    hashes = torch.cat(hashes).numpy()  # (N, 2)
    seen = seen_rows.worst_of_each(seen_rows.of_checkpoint(member.settings).words(hashes) for member in members)
    is_bad = [bool(error) for error in errors]
    seen[is_bad] = ""
    answers = []
    for member, own in zip(members, zip(*batches)):
        ratings, features = (torch.cat(each).numpy() for each in zip(*own))  # (N, R), (N, F)
        ratings[is_bad] = np.nan
        features[is_bad] = np.nan
        answers.append((member.settings, features, ratings))
    predicted = np.stack([ratings for _, _, ratings in answers])
    return predicted, seen, errors, row_warnings.texts(answers, seen, "pictures", print)


def half_widths(members, coverage):
    """(R,) conformal half-widths from the members' residuals on rows they were not trained on; inf where too few.

    A row that several members held out, as those of several seeds on one split do, counts once.
    UserError: some members have groups and others none.
    """
    if not all("abs_residuals" in member.settings for member in members):
        raise common.UserError("--interval rests on residuals that the best_model.pth of a finished run holds; a "
                               "top_epoch_N.pth or an unfinished run has none")
    residuals = np.concatenate([member.settings["abs_residuals"].numpy() for member in members])
    owners = [member.settings["residual_subjects"] for member in members]
    rows = np.concatenate([member.settings["residual_rows"] for member in members])
    if None in owners and any(owners):
        raise common.UserError("--interval: some checkpoints were trained with --group_column and "
                               "others without; give those of one kind")
    if any(member.settings["metric"] != "last" for member in members):
        print("note: --interval rests on rows that have chosen an epoch: the bounds may hold less "
              f"than {coverage:.0%} of new pictures (train with --select last)")
    once = np.unique(rows, return_index=True)[1]
    subjects = None if None in owners else np.concatenate(owners)[once]
    return np.array([calibrating.conformal_quantile(own, 1 - coverage, subjects) for own in residuals[once].T])


def output_columns(inputs, predicted, names, widths):
    """{column: N values} of the CSV, in input order; predicted: (M, N, R); widths: (R,) or None."""
    columns = {"image": [image for image, _ in inputs]}
    for r, name in enumerate(names):
        mean = predicted[:, :, r].mean(axis=0)
        columns[name] = mean
        if len(predicted) > 1:
            columns[f"{name}_sd"] = predicted[:, :, r].std(axis=0, ddof=1)
        if widths is not None:
            columns[f"{name}_low"] = mean - widths[r]
            columns[f"{name}_high"] = mean + widths[r]
    return columns


def export(path, members, pixels):
    """Write the mean of the members as one file, compared with this script on uint8 pictures (B, S, S, 3)."""
    settings = members[0].settings
    exporting.export(
        path, members, lambda member, compute: member.predict(pixels, compute)[0], {"pixels": pixels},
        about=exporting.about_pictures(settings["names"], settings["image_size"], settings["pixel_range"]),
        unit=settings["label_sd"])


def write_heat_maps(args, members, chosen, titles, pixels, compute):
    """Page of heat maps of pictures uint8 (B, S, S, 3), mean over the members; chosen: indices of the ratings shown."""
    maps = np.mean([explain(member.model, member.settings, pixels, compute, chosen) for member in members], axis=0)
    cases = [{"image": picture, "title": title} for picture, title in zip(pixels, titles)]
    shown = args.explain_rating or "the mean over the ratings"
    grids, verdict = heat_maps.show(cases, pixels, maps, shown)
    sections = [
        (f"Places on which the prediction rests: {shown}", grids),
        ("Command and versions", reporting.command_blocks())]
    reporting.write_report(args.output.with_suffix(".html"), "Where the model looks", verdict, sections, compute.text)
    print(verdict.sentence)


def print_summary(predicted, names, members, widths):
    """Mean, sd and range of each rating; one that is nearly constant beside the training labels is flagged."""
    import pandas as pd
    label_sd = np.mean([member.settings["label_sd"].numpy() for member in members], axis=0)
    table = pd.DataFrame(predicted.mean(axis=0), columns=names).agg(["mean", "std", "min", "max"]).T
    table[""] = np.where(table["std"] < 0.05 * label_sd, "NEARLY CONSTANT", "")
    print(table.round(3).to_string())
    if widths is not None and np.isinf(widths).any():
        print(f"interval: infinite for {np.isinf(widths).sum()} ratings, too few residuals: held-out pictures, or "
              "groups where --group_column named them; a lower --interval needs fewer")


def main():
    args = parse_args()
    inputs = find_inputs(args)
    compute = common.announce_compute(args)
    members = load_members(common.checkpoint_files(args.checkpoint), compute)
    settings = members[0].settings
    names = settings["names"]
    chosen = slice(None)
    if args.explain_rating:
        chosen = [names.index(prediction_tables.known_name(args.explain_rating, names, "--explain_rating"))]
    pictures = pictures_to_predict(inputs, settings)
    loader = common.make_loader(pictures, args, compute, False, batch_size=args.predict_batch_size)
    widths = half_widths(members, args.interval) if args.interval else None
    predicted, seen, errors, warnings = predict(members, loader, compute)
    columns = output_columns(inputs, predicted, names, widths)
    common.write_table(args.output, columns | {"seen": seen, "warning": warnings, "error": errors})
    print_summary(predicted, names, members, widths)
    seen_rows.say_notes(seen, print)
    readable = [i for i, error in enumerate(errors) if not error]
    print(f"{len(inputs)} pictures, {len(inputs) - len(readable)} could not be read (see the error "
          f"column); written to {args.output}")
    if not (args.explain or args.export):
        return
    if not readable:
        raise common.UserError(f"no picture could be read, and --explain and --export need one; see {args.output}")
    pixels = torch.stack([pictures[0, i]["pixels"] for i in readable[:20]])  # (B, S, S, 3)
    if args.explain:
        shown = [inputs[i][0] for i in readable[:args.explain]]
        write_heat_maps(args, members, chosen, shown, pixels[:args.explain].numpy(), compute)
    if args.export:
        export(args.export, members, pixels[:10])


if __name__ == "__main__":
    common.run_main(main)
