"""Train a network that reads an image and predicts its ratings, each a continuous score.

    python train_assessor.py --images_dir ./images --ratings_file ./ratings/per_image_Slider_mean_sd_from_wide.csv
    python train_assessor.py --images_dir ./images --ratings_file ratings.csv --dry_run

Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), best_model.pth (for predict_assessor.py),
metrics.json, best_model_per_dimension_performance.csv and its plot, predictions_val.csv, training_history.csv and
.png, splits.json, leakage_report.json, args.json, log.txt. With --folds 5 the same in fold_0/ to fold_4/, pooled above
them.

The loop over epochs stands in fit(). Where a score comes from: judge() hands the predictions of the test rows,
else of the val rows (with folds those of every fold), to evidence/score_judging.py, beside the best baseline on
these rows; r, R2, MAE and RMSE of each rating are those of common.metrics_from_sums, mean R2 is their mean (of
those that are defined), and evidence/subject_intervals.py gives each its interval.

Letters: N images, M images of some part of them, B batch, R ratings (columns of the table, such as Valence),
F backbone features, S side of the input in pixels.
Units: predictions and their metrics are in the unit of the ratings file, the mse loss in squared sds of the training
ratings; images are uint8 RGB until they reach the device.
"""
import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common
from evidence import (
    baseline_models, confounding, heat_maps, judging, plotting, prediction_tables, rater_agreement, reporting,
    row_warnings, score_judging, seen_rows, splitting, table_judging, verdicts)
from readers import backbones, csv_tables, file_names, picture_files, rating_flags, rating_tables

HISTORY_METRICS = ("mse", "mae", "r2", "pearson_r")
SMALL_DATA = Path(__file__).with_name("configs") / "assessor_small_data.yaml"
SMALL_DATA_BELOW = 3000  # pictures
OVERFITTING_REMEDY = "Fewer trained layers (--freeze_stages 3 --freeze_norm), --head ridge, more pictures"
NETWORK_FLAGS = "backbone head dropout image_size flip_average".split()  # --init_from takes them from the checkpoint
CHECKPOINT_FLAGS = [*NETWORK_FLAGS, "freeze_backbone"]  # stored in best_model.pth
MODEL_CHOICES = {"config", "backbone", "pretrained", "weights"}  # flags that keep --recipe auto from small_data


def parse_args(argv=None, recipe="plain", **network):
    """The flags.

    Their defaults are those of network (see network_to_start_from), else those of the recipe.
    """
    parser = common.Parser(__doc__)
    common.add_shared_arguments(parser)
    data = parser.group("images and ratings")
    data("--images_dir", type=Path, required=True, may_change=True,
         help="folder of pictures, searched with its subfolders")
    data("--ratings_file", type=Path, required=True, may_change=True,
         help="table with one row per picture, or one per single rating")
    rating_flags.add_arguments(data)
    data("--normalize_targets", action="store_true", default=True,
         help="train on (rating - mean) / sd of the train rows (default)")
    data("--no_normalize_targets", dest="normalize_targets", action="store_false",
         help="train in the unit of the ratings file")
    model = parser.group("model")
    model("--recipe", choices=("auto", "small_data", "plain"), default="auto", may_change=True,
          help="defaults of the flags: small_data = those of configs/assessor_small_data.yaml; plain = those "
               f"listed here; auto (the default) = small_data under {SMALL_DATA_BELOW} pictures, unless a model "
               "is chosen (--backbone, --head mlp, --weights, --no_pretrained or a --config)")
    model("--backbone", "--model", "--encoder", nargs="+", action=OneOrSeveral, default="resnet50", metavar="NAME",
          help="any torchvision classifier: resnet18, efficientnet_b3, vit_b_16, ..., or timm:NAME; NAME=FILE or "
               "NAME=SET has weights of its own. Several are compared on one split, with --freeze_backbone")
    model("--image_size", "--img_size", type=common.SIDE, default=224,
          help="side of the square input in pixels, cropped from pictures whose short side is 8/7 of it")
    model("--head", choices=("mlp", "ridge"), default="mlp",
          help="mlp: two hidden layers on the last features; ridge: one linear layer on the last three resolutions, "
               "trained with the backbone and at the end replaced by the ridge regression on the train rows")
    model("--dropout", type=common.DROPOUT, default=0.5, help="in the hidden layers of the mlp head")
    model("--flip_average", action="store_true", help="predict the mean over a picture and its mirror image")
    model("--no_flip_average", dest="flip_average", action="store_false",
          help="predict each picture as it is, also where recipe or --init_from say otherwise")
    backbones.add_freezing_arguments(model)
    model("--freeze_epochs", type=common.WHOLE, default=0,
          help="epochs at the start that train the head alone")
    model("--loss", choices=("mse", "smooth_l1", "weighted"), default="mse",
          help="weighted: mse in which a rating that its raters agree on counts more (inverse variance)")
    model("--select", choices=("pearson_r", "r2", "loss", "last"), default="pearson_r",
          help="validation metric that chooses the epoch; last = the last one, so that validation rows choose nothing")
    if recipe == "small_data":
        parser.set_defaults(**common.config_values(parser, SMALL_DATA))
    parser.set_defaults(**network)
    args = common.parse_arguments(parser, argv)
    splitting.check_flags(parser, args)
    return args


class OneOrSeveral(argparse.Action):
    """One value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def network_to_start_from(args):
    """{flag: value} of the network that --init_from names; {} without one.

    {} also where --resume names a run: its args.json has the flags already.
    """
    if not args.init_from or args.resume not in (None, "auto"):
        return {}
    content = common.load_model_file(args.init_from)
    with common.checkpoint_fields(args.init_from):
        return {name: content[name] for name in NETWORK_FLAGS}


def choose_recipe(args, pictures, network):
    """small_data or plain: what --recipe says, or for auto what suits the network and the number of pictures."""
    if args.recipe != "auto":
        return args.recipe
    head = args.head if "head" in args.given else network.get("head")
    if pictures >= SMALL_DATA_BELOW or args.given & MODEL_CHOICES or head == "mlp":
        return "plain"
    return "small_data"


# --- data: row on disk -> table -> sample ---------------------------------------------

@dataclasses.dataclass(kw_only=True)
class Study(picture_files.StoredPictures):
    """N rated pictures: ratings, what is known of the raters, pixels and groups."""
    names: list  # R names of ratings
    images: np.ndarray  # (N,) text, as the table writes them
    ratings: np.ndarray  # (N, R) float64, NaN = missing
    sd: np.ndarray | None  # (N, R) over raters
    n: np.ndarray | None  # (N, R) number of raters
    single_ratings: dict  # rating -> N arrays, where the table has one row per single rating
    groups: np.ndarray | None  # (N,) text
    columns: dict  # the table's other columns: name -> (N,) text
    skipped: list  # dicts of image and reason

    def labels(self, rows):
        """A text for each of these rows: the picture's name, and its first ratings."""
        texts = []
        for row in rows:
            shown = [f"{name} {rating:.3g}" for name, rating in zip(self.names[:2], self.ratings[row])]
            texts.append("\n".join([self.images[row], *shown]))
        return texts

    def groups_of(self, rows):
        """(M,) groups of these rows, or None."""
        return None if self.groups is None else self.groups[rows]

    @property
    def strata(self):
        """(N,) mean rating, by which splits are stratified."""
        return np.nanmean(self.ratings, axis=1)

    def data_record(self, split):
        """What args.json says of the data and their split; resuming refuses a run whose data differ."""
        contents = [*self.names, *self.images, self.ratings, self.sd, self.n, *self.columns.values(),
                    *self.audit("file_sha")]
        return common.data_record(contents, split, pictures=len(self.images), ratings=self.names)


def read_table(args):
    """The rating_tables.RatingsTable of --ratings_file; raises UserError where it does not suit the flags."""
    table = rating_tables.read_ratings(
        args.ratings_file, group_column=args.group_column, **rating_flags.values_of(args))
    verdicts.parse_criteria(args.criteria, score_judging.criteria_names(table.names))
    if args.loss == "weighted" and (table.sd is None or np.isnan(table.sd).all()):
        raise common.UserError("--loss weighted needs rater sds: expected X_sd columns or single ratings of several "
                               f"raters, found no sd for {len(table.names)} ratings; use --loss mse")
    return table


def load_study(args, run, table):
    """Ratings and pictures, matched and checked; what cannot be used is counted, for skipped.csv."""
    path_of, without_row, matching = file_names.match_images(table.images, args.images_dir, args.exact_names)
    paths = list(path_of.values())
    found = np.flatnonzero([path is not None for path in paths])
    if not len(found):
        raise common.UserError(
            f"none of the {len(paths)} pictures named in {args.ratings_file} is in {args.images_dir} "
            f"(first: {table.images[0]!r}); check --images_dir and --image_column")
    run.say(f"decoding {len(found)} pictures")
    store = picture_files.ImageStore([paths[row] for row in found], common.resize_side(args.image_size), args.cache,
                                     args.pixel_range)
    stored = np.array(picture_files.check_bad_files(store.audit, args.on_bad_file), dtype=int)

    reasons = {name: "no such picture" for name, path in path_of.items() if path is None}
    reasons |= {table.images[row]: audit.error for row, audit in zip(found, store.audit) if audit.error}
    reasons |= dict.fromkeys(without_row, "no row in the ratings file")

    rows = found[stored]  # of the table: `stored` counts the pictures that were found
    run.say(f"data: {len(rows)} rated pictures, {len(table.names)} ratings; {len(reasons)} skipped"
            f"{' (listed in skipped.csv)' if reasons else ''}; {store.description}")
    for note in table.notes + matching:
        run.say(f"note: {note}")
    columns = {name: cells.to_numpy(str)[rows] for name, cells in table.extra.items()}
    return Study(
        names=table.names,
        images=np.array(table.images)[rows],
        ratings=table.mean[rows],
        sd=None if table.sd is None else table.sd[rows],
        n=None if table.n is None else table.n[rows],
        single_ratings={name: [each[row] for row in rows] for name, each in table.single_ratings.items()},
        groups=columns.get(args.group_column),
        columns=columns,
        store=store,
        stored=stored,
        skipped=[{"image": name, "reason": reason} for name, reason in reasons.items()],
    )


@dataclasses.dataclass(eq=False)
class RatedImages(common.Samples):
    """Samples of chosen rows; a key is (epoch, index), which seeds the augmentation.

    Each sample: input uint8 (S, S, 3), or (F,) where there are features; target (R,);
    weight (R,); name.
    """
    study: Study
    rows: np.ndarray  # (M,)
    target: torch.Tensor  # (N, R) scaled, NaN = missing
    weight: torch.Tensor  # (N, R)
    args: argparse.Namespace
    augment: str
    features: np.ndarray | None = None  # (N, F) of a frozen backbone

    def __getitem__(self, key):
        epoch, index = key
        row = int(self.rows[index])
        return {
            "input": torch.from_numpy(self.input_of(epoch, row)),
            "target": self.target[row],
            "weight": self.weight[row],
            "name": self.study.images[row],
        }

    def input_of(self, epoch, row):
        """Features (F,), or one picture uint8 (S, S, 3): the centre crop, or a random draw of the augmentation."""
        if self.features is not None:
            return self.features[row]
        drawn = common.sample_augmentation(self.augment, common.generator_for(self.args.seed, epoch, row))
        return common.augment_clip(self.study.picture(row)[None], drawn, self.args.image_size)[0]


# --- model and loss ----------------------------------------------------------------------

class Assessor(backbones.BackboneModel):
    """Backbone and head: pictures -> ratings.

    The head has two hidden layers (mlp) or none (ridge).
    """

    def __init__(self, backbone, n_features, n_ratings, head, dropout, freeze_norm=False):
        super().__init__(backbone, freeze_norm)
        if head == "mlp":
            self.head = nn.Sequential(
                nn.Linear(n_features, 512), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(512, 256), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(256, n_ratings))
        else:
            self.head = nn.Sequential(nn.Linear(n_features, n_ratings))

    def forward(self, inputs):
        # features of a frozen backbone (B, F) go straight to the head
        features = inputs if inputs.ndim == 2 else self.backbone(inputs)  # (B, 3, S, S) -> (B, F)
        with common.in_fp32(features):  # bf16 has steps of 0.25 at a rating of 50
            return self.head(features.float())  # (B, F) -> (B, R)


def build_backbone(args, head):
    """The flags' backbone -> (module: (B, 3, S, S) -> (B, F), F), the seed decides its random part.

    head: mlp reads the last features, ridge those of three resolutions.
    """
    torch.manual_seed(common.hash_seed(args.seed))
    backbone, n_features = backbones.build_backbone(args.backbone, args.pretrained, args.weights, args.image_size)
    backbones.freeze_stages(backbone, args.freeze_stages, torch.zeros(1, 3, args.image_size, args.image_size))
    if head == "mlp":
        return backbone, n_features
    backbone = backbones.MultiScale(backbone, args.image_size)
    return backbone, backbone.n_features


def build_model(args, train_mean):
    """Assessor as the flags describe it, which begins by predicting `train_mean` (R,), in the scale of training."""
    backbone, n_features = build_backbone(args, args.head)
    model = Assessor(backbone, n_features, len(train_mean), args.head, args.dropout, args.freeze_norm)
    nn.init.zeros_(model.head[-1].weight)
    model.head[-1].bias.data = torch.tensor(train_mean, dtype=torch.float32)
    return model


def views_of(inputs, flip_average):
    """[inputs (B, 3, S, S)], with flip_average their mirror images too; features (B, F) have none."""
    return [inputs, inputs.flip(-1)] if flip_average and inputs.ndim == 4 else [inputs]


def mean_over(network, inputs):
    """Mean of what a network gives for each of a list of inputs."""
    return sum(map(network, inputs)) / len(inputs)


def rating_loss(loss, predicted, target, weight):
    """Mean over rows of each row's mean over its labelled ratings, so that every row counts the same in any batch.

    loss: of --loss; predicted, target with NaN = missing, weight: (B, R).
    """
    errors, labelled = common.labelled_errors(loss, predicted, target)
    row_error = (errors * weight).sum(1) / labelled.sum(1)  # a picture without any rating is refused before
    return row_error.mean()


def rating_weights(study, rows, loss):
    """(N, R) weights, for each rating with mean 1 over the train rows; all 1 unless loss is weighted.

    Inverse variance: 1 / (1 + (sd^2 / n) / variance of the ratings), so that a rating that its
    raters agree on counts more; without n each sd counts as that of one rater. A cell whose sd is
    missing or 0 (one rater) gets 1.
    """
    if loss != "weighted":
        return np.ones_like(study.ratings)
    raters = 1 if study.n is None else np.maximum(study.n, 1)
    noise = study.sd ** 2 / raters
    weights = 1 / (1 + noise / np.nanvar(study.ratings[rows], axis=0))
    weights[~(study.sd > 0)] = np.nan
    return np.nan_to_num(weights / common.mean_without_nan(weights[rows], axis=0), nan=1.0)


def fit_scaler(ratings, normalize):
    """Train-row mean and sd (R,) that targets are scaled by; with --no_normalize_targets 0 and 1: no change."""
    if not normalize:
        return {"mean": np.zeros(ratings.shape[1]), "sd": np.ones(ratings.shape[1])}
    return {"mean": np.nanmean(ratings, axis=0), "sd": np.maximum(np.nanstd(ratings, axis=0), 1e-8)}


def scaled_ratings(study, scaler):
    """(N, R) ratings in the unit of training."""
    return (study.ratings - scaler["mean"]) / scaler["sd"]


# --- training ---------------------------------------------------------------------------

def make_loaders(study, split, scaler, args, compute, features):
    """Loader of the augmented train rows, and {part: loader} of the rows of each part as they are."""
    target = torch.tensor(scaled_ratings(study, scaler), dtype=torch.float32)
    weight = torch.tensor(rating_weights(study, split["train"], args.loss), dtype=torch.float32)
    own_features = features[args.head] if args.freeze_backbone else None
    is_cached = study.store.cache == "ram" or args.freeze_backbone

    def loader(part, train):
        augment = args.augment if train else "none"
        dataset = RatedImages(study, split[part], target, weight, args, augment, own_features)
        return common.make_loader(dataset, args, compute, train, is_cached)
    return loader("train", True), {part: loader(part, False) for part, rows in split.items() if len(rows)}


def to_device(inputs, args, compute):
    """uint8 (B, S, S, 3) -> (B, 3, S, S) normalised, on the device; features (B, F) stay as they are."""
    if inputs.dtype != torch.uint8:
        return compute.send(inputs)
    statistics = backbones.pixel_statistics(args.backbone, args.weights)
    return common.to_input(inputs, compute, *statistics)


def train_one_epoch(model, loader, training, compute):
    """One pass over the train rows; returns {'train_loss': mean over the rows}."""
    model.train()
    for batch in training.batches(loader):
        inputs = to_device(batch["input"], training.args, compute)
        target = compute.send(batch["target"])
        weight = compute.send(batch["weight"])
        with compute.autocast():
            predicted = model(inputs)  # (B, 3, S, S) -> (B, R)
        training.step(rating_loss(training.args.loss, predicted, target, weight))
    return training.epoch_means()


@torch.no_grad()
def outputs_of(network, loader, compute):
    """float32 (M, K): what a network in evaluation mode gives for the M rows of a loader, K ratings or features."""
    args = loader.dataset.args
    outputs = []
    for batch in loader:
        inputs = to_device(batch["input"], args, compute)
        with compute.autocast():
            output = mean_over(network, views_of(inputs, args.flip_average))
        outputs.append(output.float().cpu())  # (B, 3, S, S) or (B, F) -> (B, K)
    return torch.cat(compute.processes.gather(outputs)).numpy()


def evaluate(model, loader, scaler, compute):
    """Whole split at once -> (predicted (M, R) float64 in the unit of the ratings, loss in the unit of training)."""
    output = outputs_of(model.eval(), loader, compute)  # (M, R)
    data = loader.dataset
    target = data.target[data.rows]
    loss = rating_loss(data.args.loss, torch.from_numpy(output), target, data.weight[data.rows]).item()
    return output * scaler["sd"] + scaler["mean"], loss


def fit(run, args, study, split, features):
    """Train on split['train'] and choose the epoch on split['val'], unless --select says last.

    Returns Training, and what finish_best_model gives.
    """
    compute = run.compute
    scaler = fit_scaler(study.ratings[split["train"]], args.normalize_targets)
    common.write_json(run.path("target_scaler.json"), {"names": study.names, **scaler})
    train_loader, loaders = make_loaders(study, split, scaler, args, compute, features)
    plotting.plot_batch(run, train_loader.dataset, study.labels(split["train"]))
    model = build_model(args, np.nanmean(scaled_ratings(study, scaler)[split["train"]], axis=0))
    if args.init_from:
        backbones.start_from(model, args.init_from, args.freeze_backbone)
    model = compute.place(model)
    model.freeze_backbone(args.freeze_backbone)
    optimizer = common.build_optimizer(model, args, model.backbone)

    training = common.Training(
        run, model, optimizer, args,
        select="last" if args.select == "last" else f"val_{args.select}",
        metadata=model_metadata(args, study, split, scaler),
        higher_is_better=args.select != "loss",
        seen=seen_rows.of_run(args, study.hashes, split))
    for epoch in training.epochs():
        model.freeze_backbone(args.freeze_backbone or epoch <= args.freeze_epochs)
        row = train_one_epoch(model, train_loader, training, compute)
        predicted, row["val_loss"] = evaluate(model, loaders["val"], scaler, compute)
        means = common.mean_metrics(predicted, study.ratings[split["val"]])
        row |= {f"val_{name}": means[name] for name in HISTORY_METRICS}
        training.end_epoch(row)

    return training, finish_best_model(training, study, split, loaders, scaler)


def finish_best_model(training, study, split, loaders, scaler):
    """Complete best_model.pth: residuals of the val rows, known_data, and with --head ridge its solved head.

    The head is solved on the features of the train rows in the best epoch. Returns
    {part: predicted (M, R)} of it.
    """
    run = training.run
    args = training.args
    model = training.model
    best = training.load_best()
    model.eval()
    backbone = nn.Identity() if args.freeze_backbone else model.backbone  # inputs of a frozen one are features
    features = {part: outputs_of(backbone, loaders[part], run.compute) for part in ("train", "val")}
    if args.head == "ridge":
        rows = split["train"]
        target = scaled_ratings(study, scaler)[rows]
        readout = baseline_models.fit_readout(features["train"], target, study.groups_of(rows))
        readout.write_into(model.head[-1])
    predicted = {part: evaluate(model, loader, scaler, run.compute)[0] for part, loader in loaders.items()}
    val = split["val"]
    if args.head == "ridge":
        solved = common.mean_metrics(predicted["val"], study.ratings[val])
        weighting = ", every rating counts the same in it" if args.loss == "weighted" else ""
        run.say("the readout is solved anew on the features of the chosen epoch: val R2 "
                f"{best['history']['val_r2']:.2f} -> {solved['r2']:.2f}{weighting}")
    subjects = study.groups_of(val)
    best |= {
        "known_data": row_warnings.known_data(features["train"], features["val"], study.ratings[split["train"]]),
        "abs_residuals": np.abs(predicted["val"] - study.ratings[val]),
        "residual_subjects": None if subjects is None else list(subjects),
        "residual_rows": list(study.images[val]),
    }
    training.save_model(best)
    return predicted


def model_metadata(args, study, split, scaler):
    """What predict_assessor.py needs beside the weights: architecture, names and scaling."""
    pixel_mean, pixel_sd = backbones.pixel_statistics(args.backbone, args.weights)
    return {
        **{name: getattr(args, name) for name in CHECKPOINT_FLAGS},
        "names": study.names,
        "scaler": scaler,
        "pixel_mean": pixel_mean,
        "pixel_sd": pixel_sd,
        "pixel_range": study.store.pixel_range,
        "label_sd": np.nanstd(study.ratings[split["train"]], axis=0),
    }


def untuned_features(args, study, run, rows):
    """{head: (N, F)} features of these rows' centre crops from the backbone before any tuning, NaN elsewhere.

    They serve the ridge baselines and --freeze_backbone: "mlp" the last features,
    "ridge" three resolutions.
    """
    # ratings stand in the place of targets and weights, which nobody reads
    pictures = RatedImages(study, rows, study.ratings, study.ratings, args, "none")
    loader = common.make_loader(pictures, args, run.compute, False, study.store.cache == "ram", batch_size=64)
    features = {}
    for head in dict.fromkeys(["mlp", args.head]):
        backbone, n_features = build_backbone(args, head)
        backbone = run.compute.place(backbone).eval()
        features[head] = np.full((len(study.images), n_features), np.nan, np.float32)
        features[head][rows] = outputs_of(backbone, loader, run.compute)
    return features


def predict_baselines(study, features, train, rows):
    """{name: (M, R)} predictions without training a network: the train mean, and ridge on the untuned features.

    features: of untuned_features. Those of "mlp" give the baseline ridge, those of
    "ridge" ridge_multiscale.
    """
    predicted = {"train_mean": baseline_models.train_mean_baseline(study.ratings[train], len(rows))}
    for head, known in features.items():
        ridge = baseline_models.fit_readout(known[train], study.ratings[train], study.groups_of(train))
        name = "ridge" if head == "mlp" else "ridge_multiscale"
        predicted[name] = ridge.predict(known[rows])
    return predicted


# --- where a trained model looks -------------------------------------------------------------

def load_assessor(path, compute):
    """File of a trained model -> (Assessor in evaluation mode, content of the file).

    UserError: a ridge head that is not solved yet, as in top_epoch_N.pth.
    """
    settings = common.load_model_file(path, "train_assessor.py")
    with common.checkpoint_fields(path):
        args = argparse.Namespace(
            **{name: settings[name] for name in CHECKPOINT_FLAGS},
            pretrained=False, weights=None, freeze_stages=0, freeze_norm=False, seed=0)
        model = build_model(args, np.zeros(len(settings["names"])))
    if args.head == "ridge" and "known_data" not in settings:
        raise common.UserError(f"{path}: the ridge regression of --head ridge is solved at the end "
                               "of a run; give its best_model.pth")
    common.load_state(model, settings["model"], path)
    return compute.place(model).eval(), settings


def explain(model, settings, pixels, compute, ratings=slice(None)):
    """Heat maps (2, B, S, S) of heat_maps.explain for uint8 (B, S, S, 3); model, settings: of load_assessor.

    ratings: indices of those that count.
    """
    inputs = common.to_input(torch.from_numpy(pixels), compute, settings["pixel_mean"], settings["pixel_sd"])
    paths = [f"backbone.{path}" for path in backbones.map_paths(model.backbone, inputs[:1])]
    return heat_maps.explain(model, paths, inputs, ratings)


def heat_map_blocks(study, rows, folders, cases, args, compute):
    """HTML of a case for each of these rows of the study, beside the heat maps of the model in its run folder."""
    pixels = np.stack([common.eval_crop(study.picture(row), args.image_size) for row in rows])
    maps = np.zeros((2, *pixels.shape[:3]))
    for folder in set(folders):
        own = folders == folder
        model, settings = load_assessor(folder / "best_model.pth", compute)
        maps[:, own] = explain(model, settings, pixels[own], compute)
    grids, verdict = heat_maps.show(cases, pixels, maps, "the mean over the ratings")
    return [reporting.html_text(verdict.sentence, verdict.level), *grids]


# --- results: predictions table -> judged run folder -------------------------------------------

@common.first_process_only
def judge(run, args, study, split, table, part, trained_on, similar, **known):
    """Judge a predictions table of held-out rows.

    split: {name: rows}; part: val, test or folds; trained_on: a pair (train rows, scored rows) for
    each network; similar: of splitting.similar_pairs; known: further fields of the Setting.
    """
    rows = table.rows_of(study.images)
    # what predicts without a pixel; any other column of numbers may be a further rating, given by looking
    levels = {name: cells for name, cells in study.columns.items()
              if splitting.names_group(name) or len(set(cells)) == 2 or not csv_tables.looks_numeric(cells)}
    confounds = confounding.level_priors(levels, study.ratings, *zip(*trained_on), study.groups)
    folders = [run.folder] * len(rows)
    if part == "folds":
        folders = [run.path(f"fold_{k}") for k in table.keys["fold"]]

    def blocks_of(shown, cases):
        return heat_map_blocks(study, rows[shown], np.array(folders)[shown], cases, args, run.compute)
    setting = judging.Setting(
        title="Ratings from images",
        part=part,
        seen=table.seen,
        data=data_blocks(study, split, table),
        similar=judging.similar_blocks(similar, study.images, study.picture),
        is_similar=np.isin(rows, similar),
        cases=judging.case_blocks(table, lambda i: study.picture(rows[i]), blocks_of),
        limits=limits(args),
        **known)
    ceiling = rater_agreement.measure_ceiling(
        study.names, study.ratings, study.sd, study.n, study.single_ratings)
    score_judging.judge_scores(
        run, table, setting, ceiling, confounds, rows,
        table_file="best_model_per_dimension_performance.csv",
        plot_file="per_dimension_performance.png")


def data_blocks(study, split, table):
    """HTML of the section Data and split."""
    sizes = [{"part": part, "pictures": len(rows)} for part, rows in split.items()]
    return [
        judging.rows_text(table, "pictures"),
        reporting.html_text(f"{len(study.names)} ratings; {len(study.skipped)} files or rows skipped."),
        reporting.html_table(sizes)]


def limits(args):
    """Sentences on what a reader must not conclude from this run."""
    lines = ["Valid for pictures like these, rated by people like these; nothing else was tested."]
    if not args.group_column:
        lines.append("No --group_column: pictures of one person or session may stand on both sides of the split.")
    if args.head == "ridge":
        lines.append("The readout is solved anew on the features of the chosen epoch; the curves show it before that.")
    return lines + judging.limits_of_start(args)


# --- one run, or one run per fold -------------------------------------------------------------

def check_split(run, study, split):
    """Refuse a split that leaks; write splits.json and the leakage report.

    Returns alarms on columns that it cuts.
    """
    report = splitting.leakage_report(
        split, study.images, study.audit("pixel_sha"), study.audit("phash"), {"groups": study.groups})
    return splitting.record_split(run, split, study.images, report, columns=study.columns, groups=study.groups)


def check_ratings(args, study, splits):
    """UserError for ratings from which the train rows of a split can learn nothing: none, or all the same."""
    import pandas as pd
    ratings = pd.DataFrame(study.ratings, columns=study.names)
    distinct = {part: pd.DataFrame([ratings.iloc[split[part]].nunique() for split in splits])  # (splits, R)
                for part in ("train", "val")}
    useless = ratings.columns[distinct["train"].min() < 2]
    if len(useless):
        raise common.UserError(
            f"{common.shorten_list(useless)}: no two different ratings in the train rows (of a "
            "fold). Name the others with --target_columns, or split with another --seed")
    if args.select in ("r2", "pearson_r") and distinct["val"].max(axis=1).min() < 2:
        raise common.UserError(
            f"the val rows (of a fold) have no two different values of any rating, so --select {args.select} has none: "
            "choose by --select last or loss, or make other parts (--seed, --folds)")


def run_split(run, args, study, split, features=None):
    """Train on one split and judge its held-out rows: test where there is one, else val."""
    alarms = check_split(run, study, split)
    split = splitting.rows_to_try(split, args, study.ratings)
    check_ratings(args, study, [split])
    run.write_record(study, split)
    if features is None:
        features = untuned_features(args, study, run, np.concatenate(list(split.values())))
    similar = splitting.add_similar(run, features["mlp"], split, study.images)
    training, predicted = fit(run, args, study, split, features)
    best_epoch = training.progress.best_epoch
    plotting.plot_history(training.progress.history, run.path("training_history.png"), best_epoch)
    train, val = (common.mean_metrics(predicted[part], study.ratings[split[part]]) for part in ("train", "val"))
    remedy = OVERFITTING_REMEDY if args.head == "mlp" else None  # a solved head always fits its own rows better
    alarms += verdicts.split_gap_alarms(train, val, remedy)
    tables = {}
    held_out = [part for part in predicted if part != "train"]
    for part in held_out:
        rows = split[part]
        tables[part] = prediction_tables.ScoreTable(
            keys={"image": study.images[rows]},
            names=study.names,
            truth=study.ratings[rows],
            predicted=predicted[part],
            baselines=predict_baselines(study, features, split["train"], rows),
            groups=study.groups_of(rows),
            seen=training.seen.words(study.hashes[rows]))
        tables[part].write(run.path(f"predictions_{part}.csv"))
    part = "test" if "test" in tables else "val"
    judge(run, args, study, split, tables[part], part, [(split["train"], split[part])], similar,
          alarms=alarms, best_epoch=best_epoch)


def run_folds(run, args, study):
    """One run per fold in fold_K/, then the out-of-fold predictions pooled and judged as one."""
    splits = splitting.folds_of_flags(args, study.images, study.strata, study.groups)
    check_ratings(args, study, splits)
    folds = {f"fold_{k}": split["val"] for k, split in enumerate(splits)}
    alarms = check_split(run, study, folds)
    run.write_record(study, folds)
    features = untuned_features(args, study, run, np.arange(len(study.images)))
    similar = splitting.add_similar(run, features["mlp"], folds, study.images)
    chosen = run.each_fold(splits, lambda child, split: run_split(child, args, study, split, features))
    tables = prediction_tables.read_folds(run, chosen, "val")
    pooled = prediction_tables.join(tables, chosen)
    pooled.write(run.path("predictions_folds.csv"))
    done = judging.finished_folds(run, chosen, [table.fold_numbers() for table in tables])
    trained_on = [(splits[k]["train"], splits[k]["val"]) for k in chosen]
    judge(run, args, study, folds, pooled, "folds", trained_on, similar, alarms=alarms, folds=done)


def run_study(run, args, study):
    """Train one model, or one for each fold, as the flags say."""
    if args.folds:
        return run_folds(run, args, study)
    run_split(run, args, study, splitting.split_of_flags(args, study.images, study.strata, study.groups))


def flags_of_backbones(args):
    """The flags for each network that --backbone names; one that is written NAME=WEIGHTS has weights of its own."""
    several = []
    for text in np.atleast_1d(args.backbone):
        name, _, weights = str(text).partition("=")
        own_weights = Path(weights) if weights else args.weights
        several.append(common.with_flags(args, backbone=name, weights=own_weights))
    if len(several) > 1 and not args.freeze_backbone:
        raise common.UserError(f"--backbone {' '.join(args.backbone)}: several are compared on features that stay as "
                               "published; add --freeze_backbone, or --config configs/assessor_backbones.yaml")
    if len(set(map(comparison_folder, several))) < len(several):
        raise common.UserError(f"--backbone {' '.join(args.backbone)}: two of them would have the "
                               "same name; name their files of weights differently")
    return several


def comparison_folder(args):
    """Name of the folder of one of several networks: that of the network, and of the file of its weights."""
    name = f"{args.backbone} {args.weights.stem}" if args.weights else args.backbone
    return "run_" + re.sub(r"\W+", "_", name)


def compare_backbones(run, several, study):
    """A run for each backbone in a folder of its own, on the same split; above them which of any two is better.

    several: of flags_of_backbones.
    """
    run.write_record(study, {})
    for args in several:
        with run.child(comparison_folder(args), args) as child:
            if not run.compute.processes.on_first(lambda: common.is_finished(child.folder, args)):
                run_study(child, args, study)
    runs = sorted(judging.list_runs(run.folder), reverse=True,
                  key=lambda row: -np.inf if row["value"] is None else row["value"])
    table_judging.write_runs_page(run, run.folder, runs, most_compared=len(runs))


def parse_args_with_recipe():
    """(The flags, the table that they name, small_data or plain).

    What is typed wins over the recipe, which depends on the number of pictures, in the
    table that the flags name. So they are parsed twice: to find the table, and with
    the values of the recipe as defaults.
    """
    args = parse_args()
    table = read_table(args)
    network = network_to_start_from(args)
    recipe = choose_recipe(args, len(table.images), network)
    return parse_args(recipe=recipe, **network), table, recipe


def main():
    args, table, recipe = parse_args_with_recipe()
    with common.start_run(args, fixed_shapes=True) as run:
        if not run.resumed:
            named = " ".join(np.atleast_1d(args.backbone))
            run.say(f"note: recipe {recipe} (--recipe {args.recipe}, {len(table.images)} pictures) for flags that are "
                    f"not given; this run has --backbone {named} --head {args.head} --epochs "
                    f"{args.epochs} --select {args.select} ...")
        several = flags_of_backbones(args)
        for flags in several:  # wrong names, weights and checkpoints stop here, before pictures are decoded
            if args.init_from:
                backbones.starting_content(args.init_from, names=table.names, backbone=flags.backbone, head=args.head)
            build_backbone(flags, args.head)
        study = load_study(args, run, table)
        if len(several) > 1:
            compare_backbones(run, several, study)
        else:
            run_study(run, several[0], study)


if __name__ == "__main__":
    common.run_main(main)
