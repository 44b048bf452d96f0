"""Train a network that reads an image and predicts its ratings, each a continuous score.

    python train_assessor.py --images_dir ./images --ratings_file ./ratings/per_image_Slider_mean_sd_from_wide.csv
    python train_assessor.py --images_dir ./images --ratings_file ratings.csv --dry_run

Writes outputs/run_YYYYMMDD_HHMMSS/: report.html (open it first), best_model.pth (for predict_assessor.py), metrics.json,
best_model_per_dimension_performance.csv and .png, predictions_val.csv, training_history.csv and .png, splits.json,
leakage_report.json, args.json, log.txt. With --folds K the same in fold_0/ to fold_K-1/, and pooled above them.

Letters: N images, B batch, R ratings, F backbone features, S side of the square input in pixels.
Units: every metric and prediction is in the unit of the ratings file; images are uint8 RGB until they reach the device.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common

HISTORY_METRICS = ("mse", "mae", "r2", "pearson_r")


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    common.add_shared_arguments(parser)
    data = parser.add_argument_group("images and ratings").add_argument
    data("--images_dir", type=Path, required=True, help="folder of pictures, searched with its subfolders")
    data("--ratings_file", type=Path, required=True, help="table with one row per picture, or one per single rating")
    data("--image_column", help="column that names the picture (found by itself: image, filename, file, stimulus, path)")
    data("--target_columns", nargs="+", metavar="NAME", help="ratings to predict (default: all *_mean, else all numeric columns)")
    data("--duplicates", choices=("error", "mean"), default="error", help="rows of one picture: refuse, or average")
    data("--normalize_targets", action="store_true", help="train on (rating - mean) / sd of the train rows; metrics keep the unit")
    model = parser.add_argument_group("model").add_argument
    model("--backbone", default="resnet50", help="any torchvision classifier: resnet18, efficientnet_b3, vit_b_16, ...")
    model("--head", choices=("mlp", "ridge"), default="mlp",
          help="mlp: two hidden layers on the last features; ridge: linear on the last three resolutions, trained with "
               "the backbone, then solved anew in closed form on the train rows")
    model("--flip_average", action="store_true", help="predict the mean over a picture and its mirror image")
    model("--freeze_stages", type=common.bounded(int, 0), default=0, help="first resolutions of the backbone (a ResNet has 5) that stay as they are")
    model("--freeze_norm", action="store_true", help="keep the published BatchNorm statistics: steadier with few pictures")
    model("--dropout", type=common.bounded(float, 0, 0.95), default=0.5, help="in the two hidden layers of the head")
    model("--image_size", type=common.bounded(int, 32), default=224, help="side of the input in pixels, cut from a short side 8/7 as long")
    model("--loss", choices=("mse", "smooth_l1", "weighted"), default="mse",
          help="weighted: mse, each rating by the certainty that its rater sd and n give it")
    model("--backbone_lr_mult", type=common.bounded(float, 0), default=1.0, help="learning rate of the backbone over that of the head")
    model("--freeze_epochs", type=common.bounded(int, 0), default=0, help="epochs at the start that train the head alone")
    model("--freeze_backbone", action="store_true", help="train the head alone, on features computed once")
    model("--feature_views", type=common.bounded(int, 1), default=1,
          help="with --freeze_backbone: views of each picture; 1 = the plain one, more are augmented")
    model("--select", choices=("pearson_r", "r2", "loss", "last"), default="pearson_r",
          help="validation metric that chooses the epoch; last = no choice, so that validation stays unseen")
    args = common.parse_arguments(parser, argv)
    if args.folds == 1 or (args.fold != "all" and args.fold >= args.folds):
        parser.error(f"--folds {args.folds} --fold {args.fold}: expected at least 2 folds and a fold from 0 to folds - 1")
    if not args.folds and not args.split_file and args.val_ratio == 0:
        parser.error(f"--val_ratio {args.val_ratio:g}: the validation part must not be empty, it chooses the epoch")
    if args.folds and args.split_file:
        parser.error(f"--folds {args.folds} and --split_file {args.split_file} both make the split; give one")
    return args


# --- data: row on disk -> table -> sample ------------------------------------

@dataclasses.dataclass
class Study:
    """What is known of N pictures: ratings (N, R) float64 with NaN = missing, rater statistics, pixels, groups."""
    names: list  # R
    images: np.ndarray  # (N,) text, as the table writes them
    ratings: np.ndarray  # (N, R)
    sd: np.ndarray | None  # (N, R) over raters
    n: np.ndarray | None  # (N, R) raters
    single_ratings: dict | None  # rating name -> N arrays, where the table has one row per single rating
    groups: np.ndarray | None  # (N,) text
    store: common.ImageStore
    stored: np.ndarray  # (N,) index of each picture in the store
    skipped: list  # dicts of image and reason
    fingerprint: str
    features: dict | None = None  # head -> (V, N, F) through the backbone before training; view 0 is the plain centre crop

    def picture(self, row):
        """Decoded picture of a row, uint8 (H, W, 3)."""
        return self.store[self.stored[row]]

    def audit(self, field):
        """(N,) one field of the pictures' audit, such as pixel_sha."""
        return [getattr(self.store.audit[i], field) for i in self.stored]


def load_study(args, run):
    """Ratings and pictures, matched and checked; what cannot be used is counted, printed and listed in skipped.csv."""
    table = common.read_ratings(args.ratings_file, args.image_column, args.target_columns, args.duplicates, args.group_column)
    paths, unused = common.match_images(table.images, args.images_dir)
    found = np.flatnonzero([path is not None for path in paths])
    if not len(found):
        raise common.UserError(f"none of the {len(paths)} pictures named in {args.ratings_file} is in {args.images_dir} "
                               f"(first: {table.images[0]!r}); check --images_dir and --image_column")
    store = common.ImageStore([paths[row] for row in found], resize_side(args.image_size), args.cache)
    stored = np.array(common.check_bad_files(store.audit, args.on_bad_file), dtype=int)
    rows = found[stored]
    skipped = [{"image": table.images[i], "reason": "no such picture"} for i, path in enumerate(paths) if path is None]
    skipped += [{"image": table.images[found[i]], "reason": a.error} for i, a in enumerate(store.audit) if a.error]
    skipped += [{"image": name, "reason": "no row in the ratings file"} for name in unused]
    if skipped:
        common.write_table(run.path("skipped.csv"), skipped)
    run.say(f"data: {len(rows)} rated pictures, {len(table.names)} ratings; {len(skipped)} skipped"
            f"{' (listed in skipped.csv)' if skipped else ''}; {store.description}")
    for note in table.notes:
        run.say(f"note: {note}")
    study = Study(
        table.names, np.array(table.images, dtype=str)[rows], table.mean[rows],
        None if table.sd is None else table.sd[rows], None if table.n is None else table.n[rows],
        {k: [v[i] for i in rows] for k, v in table.ratings_by_image.items()} if table.ratings_by_image else None,
        table.extra[args.group_column].to_numpy(str)[rows] if args.group_column else None, store, stored, skipped, "")
    study.fingerprint = common.data_fingerprint([*study.names, *study.images, study.ratings, *study.audit("file_sha")])
    return study


def resize_side(image_size):
    """Short side that pictures are scaled to before the crop: 256 for 224."""
    return round(image_size * 8 / 7)


class RatedImages(torch.utils.data.Dataset):
    """Samples of chosen rows; a key is (epoch, index), which seeds the augmentation.

    Each sample: image uint8 (S, S, 3), or frozen features (F,); target (R,) scaled, NaN = missing; weight (R,); name.
    """

    def __init__(self, study, rows, target, weight, args, augment):
        self.study, self.rows, self.args, self.augment = study, rows, args, augment
        self.target = torch.tensor(target[rows], dtype=torch.float32)
        self.weight = torch.tensor(weight[rows], dtype=torch.float32)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, index = key
        row = self.rows[index]
        return {"input": self._input(row, common.generator_for(self.args.seed, epoch, int(row))),
                "target": self.target[index], "weight": self.weight[index], "name": self.study.images[row]}

    def _input(self, row, generator):
        if self.args.freeze_backbone:
            features = self.study.features[self.args.head]
            views = len(features) if self.augment != "none" else 1
            return torch.from_numpy(features[torch.randint(views, (), generator=generator), row])
        if self.augment == "none":
            return torch.from_numpy(common.eval_crop(self.study.picture(row), self.args.image_size))
        drawn = common.sample_augmentation(self.augment, generator)
        return torch.from_numpy(common.apply_augmentation(self.study.picture(row), drawn, self.args.image_size))


# --- model and loss ------------------------------------------------------------

class Assessor(nn.Module):
    """Backbone (B, 3, S, S) -> (B, F), then a head (B, F) -> (B, R): two hidden layers (mlp) or one linear layer (ridge)."""

    def __init__(self, backbone, n_features, n_ratings, head, dropout, freeze_norm=False):
        super().__init__()
        self.backbone, self.freeze_norm = backbone, freeze_norm
        hidden = [nn.Linear(n_features, 512), nn.ReLU(), nn.Dropout(dropout), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*hidden, nn.Linear(256, n_ratings)) if head == "mlp" else nn.Sequential(nn.Linear(n_features, n_ratings))
        self.trainable = [p for p in backbone.parameters() if p.requires_grad]

    def forward(self, inputs):
        # (B, 3, S, S) images, or (B, F) features of a frozen backbone, which go straight to the head
        features = inputs if inputs.ndim == 2 else self.backbone(inputs)  # (B, 3, S, S) -> (B, F)
        with torch.autocast(features.device.type, enabled=False):  # bf16 has steps of 0.25 at a rating of 50
            return self.head(features.float())  # (B, F) -> (B, R)

    def freeze_backbone(self, frozen):
        """Take the backbone out of training, or put back what was trainable at first."""
        for parameter in self.trainable:
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if not any(p.requires_grad for p in self.trainable):
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d) and (self.freeze_norm or not module.weight.requires_grad):
                module.eval()
        return self


def build_backbone(args, head):
    """The flags' backbone with the features that `head` reads -> (module, F); the seed decides the random part."""
    torch.manual_seed(common.mix(args.seed))
    backbone, n_features = common.build_backbone(args.backbone, args.pretrained, args.weights, args.image_size)
    common.freeze_stages(backbone, args.freeze_stages, args.image_size)
    if head == "ridge":
        backbone = common.MultiScale(backbone, args.image_size)
        n_features = backbone.n_features
    return backbone, n_features


def build_model(args, n_ratings):
    """Assessor as the flags describe it."""
    return Assessor(*build_backbone(args, args.head), n_ratings, args.head, args.dropout, args.freeze_norm)


def mirrored_mean(model, inputs, flip_average):
    """Outputs for (B, 3, S, S) inputs, with flip_average the mean over each picture and its mirror image."""
    outputs = model(inputs)
    return (outputs + model(inputs.flip(-1))) / 2 if flip_average and inputs.ndim == 4 else outputs


def rating_loss(loss):
    """Loss function (predicted (B, R), target (B, R) with NaN = missing, weight (B, R)) -> float tensor.

    The mean over rows of each row's mean over its labelled ratings, so that every row counts the same in any batch.
    """
    pointwise = nn.functional.smooth_l1_loss if loss == "smooth_l1" else nn.functional.mse_loss

    def masked(predicted, target, weight):
        labelled = ~torch.isnan(target)  # (B, R), True = a rating is there
        errors = pointwise(predicted, torch.where(labelled, target, predicted.detach()), reduction="none")
        return ((errors * weight * labelled).sum(1) / labelled.sum(1).clamp(min=1)).mean()
    return masked


def rating_weights(study, rows, loss):
    """(N, R) weights with mean 1 over the labelled train cells; all 1 unless loss is weighted.

    Inverse variance: 1 / (1 + (sd^2 / n) / variance of the ratings), so that a rating that its raters agree on counts
    more. A cell without a usable sd (missing or 0) gets the weight 1.
    """
    weights = np.ones_like(study.ratings)
    if loss != "weighted":
        return weights
    if study.sd is None:
        raise common.UserError("--loss weighted needs rater sds: expected X_sd columns or single ratings, "
                               f"found means alone for {len(study.names)} ratings; use --loss mse")
    noise = study.sd ** 2 / (1 if study.n is None else np.maximum(study.n, 1))
    raw = 1 / (1 + noise / np.nanvar(study.ratings[rows], axis=0))
    raw[~(study.sd > 0)] = np.nan
    return np.nan_to_num(raw / np.nanmean(raw[rows], axis=0), nan=1.0)


def fit_scaler(ratings, normalize):
    """Train-row mean and sd (R,) that targets are scaled by; without --normalize_targets 0 and 1, which change nothing."""
    if not normalize:
        return {"mean": np.zeros(ratings.shape[1]), "sd": np.ones(ratings.shape[1])}
    return {"mean": np.nanmean(ratings, axis=0), "sd": np.maximum(np.nanstd(ratings, axis=0), 1e-8)}


# --- training -------------------------------------------------------------------

def make_loaders(study, split, scaler, args, compute):
    """Loaders of the train rows (augmented), and of train, val and test rows as they are."""
    target = (study.ratings - scaler["mean"]) / scaler["sd"]
    weight = rating_weights(study, split["train"], args.loss)
    cached = study.store.cache == "ram" or args.freeze_backbone

    def loader(part, train):
        dataset = RatedImages(study, split[part], target, weight, args, args.augment if train else "none")
        size = args.batch_size if train else args.val_batch_size or args.batch_size
        return common.make_loader(dataset, size, args, compute, train, cached)
    return loader("train", True), {part: loader(part, False) for part in ("train", "val", "test")}


def train_one_epoch(model, loader, loss_function, training, compute):
    """One pass over the train rows; returns {'train_loss': mean over the rows}."""
    model.train()
    for batch in training.batches(loader):
        inputs, target, weight = to_device(batch, compute)
        with compute.autocast():
            predicted = model(inputs)  # (B, 3, S, S) -> (B, R)
        training.step(loss_function(predicted, target, weight), len(target))
    return training.epoch_means()


def to_device(batch, compute):
    """Batch -> inputs (B, 3, S, S) normalised, or features (B, F); target (B, R); weight (B, R)."""
    inputs = batch["input"]
    if inputs.dtype == torch.uint8:
        inputs = common.to_input(inputs, compute.device, channels_last=compute.channels_last)
    target, weight = (batch[name].to(compute.device, non_blocking=True) for name in ("target", "weight"))
    return inputs.to(compute.device), target, weight


@torch.no_grad()
def evaluate(model, loader, loss_function, scaler, compute, flip_average):
    """Whole split at once -> (predicted (N, R) float64 in the unit of the ratings, loss in the unit of training)."""
    model.eval()
    outputs, targets, weights = [], [], []
    for batch in loader:
        inputs, target, weight = to_device(batch, compute)
        with compute.autocast():
            outputs.append(mirrored_mean(model, inputs, flip_average))  # (B, 3, S, S) -> (B, R)
        targets.append(target)
        weights.append(weight)
    output = torch.cat(outputs)  # (N, R)
    loss = loss_function(output, torch.cat(targets), torch.cat(weights)).item()
    return output.cpu().double().numpy() * scaler["sd"] + scaler["mean"], loss


def fit(run, args, study, split):
    """Train on split['train'], choose the epoch on split['val']; returns the chosen model, its loaders and its scaler."""
    compute = run.compute
    scaler = fit_scaler(study.ratings[split["train"]], args.normalize_targets)
    common.write_json(run.path("target_scaler.json"), {"names": study.names, **scaler})
    train_loader, loaders = make_loaders(study, split, scaler, args, compute)
    loss_function = rating_loss(args.loss)
    model = build_model(args, len(study.names))
    centre = np.nanmean((study.ratings[split["train"]] - scaler["mean"]) / scaler["sd"], axis=0)
    nn.init.zeros_(model.head[-1].weight)  # the first prediction is the train mean: no epochs are spent on the offset
    model.head[-1].bias.data = torch.tensor(centre, dtype=torch.float32)
    if args.init_from:
        start_from(model, args.init_from, study.names)
    model = compute.place(model)
    model.freeze_backbone(args.freeze_backbone)
    optimizer = common.build_optimizer([(model.backbone, args.backbone_lr_mult), (model.head, 1.0)], args)
    residuals = {}
    training = common.Training(
        run, model, optimizer, args, select=args.select if args.select == "last" else f"val_{args.select}",
        describe=lambda: describe(args, study, scaler, residuals), higher_is_better=args.select != "loss")
    for epoch in training.epochs():
        model.freeze_backbone(args.freeze_backbone or epoch <= args.freeze_epochs)
        row = train_one_epoch(model, train_loader, loss_function, training, compute)
        predicted, loss = evaluate(model, loaders["val"], loss_function, scaler, compute, args.flip_average)
        target = study.ratings[split["val"]]
        residuals["val"] = (np.abs(predicted - target), None if study.groups is None else study.groups[split["val"]])
        means = common.mean_metrics(common.regression_metrics(predicted, target))
        training.end_epoch({**row, "val_loss": loss, **{f"val_{name}": means[name] for name in HISTORY_METRICS}})
    best = common.load_model_file(run.path("best_model.pth"), common.script_name())
    common.load_state(model, best["model"], "best_model.pth")
    if args.head == "ridge":
        solve_head(model, loaders["train"], study, split["train"], scaler, args, compute)
        predicted, _ = evaluate(model, loaders["val"], loss_function, scaler, compute, args.flip_average)
        best |= {"model": model.state_dict(), "abs_residuals": np.abs(predicted - study.ratings[split["val"]])}
        common.save_checkpoint(run.path("best_model.pth"), common.plain(best))
    return model, loaders, scaler, training


@torch.no_grad()
def solve_head(model, loader, study, rows, scaler, args, compute):
    """Put the ridge solution for the tuned backbone's features of the train rows into the linear head."""
    model.eval()
    features = []
    for batch in loader:
        inputs, _, _ = to_device(batch, compute)
        with compute.autocast():
            features.append(inputs if inputs.ndim == 2 else mirrored_mean(model.backbone, inputs, args.flip_average).float())
    target = (study.ratings[rows] - scaler["mean"]) / scaler["sd"]
    ridge = common.fit_ridge(torch.cat(features).cpu().numpy(), target, groups=None if study.groups is None else study.groups[rows])
    weights = ridge.weights / ridge.feature_sd[:, None]  # (F, R), for features that are not standardised
    model.head[-1].weight.copy_(torch.from_numpy(weights.T))
    model.head[-1].bias.copy_(torch.from_numpy(ridge.intercept - ridge.feature_mean @ weights))


def describe(args, study, scaler, residuals):
    """What predict_assessor.py needs beside the weights: architecture, names, scaling, and the validation residuals."""
    values, subjects = residuals["val"]
    return {"backbone": args.backbone, "head": args.head, "flip_average": args.flip_average, "dropout": args.dropout, "image_size": args.image_size, "names": study.names,
            "label_sd": np.nanstd(study.ratings, axis=0), "pixel_mean": list(common.IMAGENET_MEAN), "pixel_sd": list(common.IMAGENET_STD), "scaler": scaler,
            "abs_residuals": values, "residual_subjects": None if subjects is None else list(subjects)}


def start_from(model, path, names):
    """--init_from: the weights of another run of this script, for the same ratings."""
    content = common.load_model_file(path, common.script_name())
    if content.get("names") != names:
        raise common.UserError(f"--init_from {path} predicts {content.get('names')}, this run {names}: same ratings expected")
    common.load_state(model, content["model"], path)


# --- results: prediction -> whole-split metric -> run folder -----------------------

@dataclasses.dataclass
class Scored:
    """Predictions for rows that the model was not trained on, beside the baselines' for the same rows."""
    rows: np.ndarray  # (M,) rows of the study
    predicted: dict  # "predicted" (the model) and each baseline -> (M, R)
    part: str  # val, test or folds


def baselines(study, train, rows):
    """What needs no training of a network -> name -> (M, R): ridge on the frozen backbone's features, and the train mean."""
    groups = None if study.groups is None else study.groups[train]
    predicted = {"train_mean": common.train_mean_baseline(study.ratings[train], len(rows))}
    for head, features in study.features.items():
        ridge = common.fit_ridge(features[0, train], study.ratings[train], groups=groups)
        predicted["ridge" if head == "mlp" else "ridge_multiscale"] = ridge.predict(features[0, rows])
    return predicted


def frozen_features(args, study, run, rows):
    """{head: (V, N, F)} features of these rows through the backbone before training, NaN elsewhere.

    They serve the ridge baselines and --freeze_backbone. "mlp" are the last features, "ridge" those of three resolutions.
    """
    def pixels(row, view):
        if view == 0:
            return common.eval_crop(study.picture(row), args.image_size)
        drawn = common.sample_augmentation(args.augment, common.generator_for(args.seed, view, int(row)))
        return common.apply_augmentation(study.picture(row), drawn, args.image_size)
    features = {}
    for head in dict.fromkeys(["mlp", args.head]):
        backbone, n_features = build_backbone(args, head)
        backbone = common.fold_batchnorm(run.compute.place(backbone))
        views = args.feature_views if args.freeze_backbone and args.augment != "none" and head == args.head else 1
        features[head] = np.full((views, len(study.images), n_features), np.nan, np.float32)
        for view in range(views):
            features[head][view, rows] = common.frozen_features(
                lambda inputs: mirrored_mean(backbone, inputs, args.flip_average), [(row, view) for row in rows], pixels, run.compute)
    return features


def write_predictions(path, study, scored):
    """predictions CSV: image, then of each rating the true value, the model's, and the baselines'; original unit."""
    rows = []
    for i, row in enumerate(scored.rows):
        cells = {"image": study.images[row]}
        for r, name in enumerate(study.names):
            cells[f"{name}_true"] = study.ratings[row, r]
            cells |= {f"{name}_{kind}": values[i, r] for kind, values in scored.predicted.items()}
        rows.append(cells)
    common.write_table(path, rows)


def read_predictions(path, study, part):
    """The predictions CSV of a finished fold -> Scored."""
    table = common.read_table(path)
    place = {name: row for row, name in enumerate(study.images)}
    kinds = [column.removeprefix(f"{study.names[0]}_") for column in table if column.startswith(f"{study.names[0]}_")]
    predicted = {kind: np.stack([common.to_numbers(table[f"{name}_{kind}"], f"{path}, {name}_{kind}") for name in study.names], 1)
                 for kind in kinds if kind != "true"}
    return Scored(np.array([place[name] for name in table["image"]]), predicted, part)


def noise_ceilings(study):
    """Ceilings from the raters' disagreement over all pictures: dict of r2 and r (R,), or None where nothing measures it."""
    if study.single_ratings:
        r2 = np.array([common.split_half(study.single_ratings[name]) for name in study.names])
        return {"r2": r2, "r": np.sqrt(r2), "source": "split half with Spearman-Brown, 100 halves of the single ratings"}
    if study.sd is not None and study.n is not None:
        ceiling = common.noise_ceiling(study.ratings, study.sd, study.n)
        return {"r2": ceiling["r2"], "r": ceiling["r"], "source": "1 - mean(sd^2 / n) / var(mean)"}
    return None


def score(study, scored):
    """Metrics with intervals of the model, paired with the best of the baselines; returns (result, its name)."""
    target = study.ratings[scored.rows]
    subjects = None if study.groups is None else study.groups[scored.rows]
    means = {kind: np.nan_to_num(common.mean_metrics(common.regression_metrics(scored.predicted[kind], target))["r2"], nan=-np.inf)
             for kind in scored.predicted if kind != "predicted"}
    best = max(means, key=means.get)
    return common.bootstrap_regression(scored.predicted["predicted"], target, subjects, scored.predicted[best]), best


def per_dimension_rows(study, result, ceiling):
    """One dict per rating: metrics with intervals, the baseline's, the noise ceiling and the share of it."""
    rows = []
    for r, name in enumerate(study.names):
        row = {"target": name}
        for metric in common.REGRESSION_METRICS:
            low, high = result["interval"][metric][r] if result["interval"] else (np.nan, np.nan)
            row |= {metric: result["value"][metric][r], f"{metric}_low": low, f"{metric}_high": high,
                    f"baseline_{metric}": result["value"][f"baseline_{metric}"][r]}
        if ceiling:
            row |= {"ceiling_r": ceiling["r"][r], "ceiling_r2": ceiling["r2"][r], "ceiling_pearson_r": ceiling["r"][r],
                    "share_of_ceiling_r2": row["r2"] / ceiling["r2"][r]}
        rows.append(row)
    return rows


def read_criteria(args, study):
    """--criteria, checked against the metrics of this run: r2 is the mean over ratings, r2_Valence one rating."""
    names = [f"{metric}{name}" for name in ["", *(f"_{rating}" for rating in study.names)] for metric in common.REGRESSION_METRICS]
    return common.parse_criteria(args.criteria, names)


def report_results(run, args, study, split, scored, alarms, best_epoch=None, folds=()):
    """metrics.json, per-dimension table, plots and report.html of one run, or of all folds pooled; returns metrics.json."""
    result, baseline = score(study, scored)
    ceiling = noise_ceilings(study)
    rows = per_dimension_rows(study, result, ceiling)
    target = study.ratings[scored.rows]
    alarms = common.regression_alarms(scored.predicted["predicted"], target, None, None, study.names) + alarms
    held_out = scored.part == "test" or args.select == "last"
    best_r2 = float(np.nanmean(ceiling["r2"])) if ceiling else None
    verdict = common.verdict_sentence(result, baseline.replace("_", " "), "r2", best_r2, held_out)
    criteria = common.judge_criteria(read_criteria(args, study), *common.named_values(result, study.names))
    metrics = {"part": scored.part, "best_epoch": best_epoch, "verdict": verdict, "held_out": held_out, "baseline": baseline,
               "mean": {name: result["value"][name] for name in result["value"] if "mean_" in name},
               "interval": {name: pair for name, pair in (result["interval"] or {}).items() if "mean_" in name},
               "per_subject": result["per_subject"], "sign_flip_p": result["sign_flip_p"], "method": result["method"],
               "sample": common.effective_size(target, None if study.groups is None else study.groups[scored.rows]),
               "ceiling": ceiling, "alarms": alarms, "criteria": criteria, "folds": list(folds), "per_dimension": rows}
    common.write_table(run.path("best_model_per_dimension_performance.csv"), rows)
    common.plot_per_target(rows, run.path("per_dimension_performance.png"))
    common.plot_scatter(scored.predicted["predicted"], target, study.names, run.path("predicted_against_true.png"))
    write_page(run, args, study, split, scored, metrics)
    common.write_json(run.path("metrics.json"), metrics)  # last: its presence says that the run is finished
    for line in [verdict, *(f"ALARM: {a}" for a in alarms),
                 *(f"{c['verdict']}: {c['name']} {c['relation']} {c['bar']:g}, found {c['value']:.4g}" for c in criteria)]:
        run.say(line)
    run.say(f"open next: {run.path('report.html')}")
    return metrics


def write_page(run, args, study, split, scored, metrics):
    """report.html: the verdict first, then the order of sections that all train scripts share."""
    mean, interval = metrics["mean"], metrics["interval"]

    def figure(label, name):
        low, high = interval.get(name, (np.nan, np.nan))
        return label, f"{mean[name]:.3f}", f"95 % interval {low:.3f} to {high:.3f}" if name in interval else metrics["method"]
    figures = [figure("Mean R2", "mean_r2"), figure("Mean r", "mean_pearson_r"),
               (f"R2 of {metrics['baseline'].replace('_', ' ')}", f"{mean['baseline_mean_r2']:.3f}", "baseline on the same rows")]
    if metrics["ceiling"]:
        figures.append(("R2 ceiling", f"{np.nanmean(metrics['ceiling']['r2']):.3f}", "what the raters' agreement allows, mean"))
    low = interval.get("difference_mean_r2", (np.nan, np.nan))[0]
    level = "good" if low > 0 and not metrics["alarms"] else "poor" if mean["difference_mean_r2"] <= 0 else "caution"
    sample = metrics["sample"]
    data_rows = [{"part": part, "pictures": len(rows)} for part, rows in split.items()]
    columns = {"target": "rating", "pearson_r": "r", "r2": "R2", "r2_low": "R2 low", "r2_high": "R2 high", "mae": "MAE", "rmse": "RMSE",
               "baseline_r2": "baseline R2", **({"ceiling_r2": "ceiling R2", "share_of_ceiling_r2": "share"} if metrics["ceiling"] else {})}
    sections = [
        ("Data and split", [
            common.html_text(f"{sample['rows']} pictures scored, {sample['distinct_label_vectors']} distinct label vectors, "
                             f"{sample['subjects']} subjects; {len(study.names)} ratings; {len(study.skipped)} files or rows skipped."),
            common.html_table(data_rows)]),
        ("Leakage", [common.html_text(common.leakage_text(common.read_json(run.path("leakage_report.json"))))]),
        ("Metrics", [
            *(common.html_text(f"ALARM: {alarm}", "poor") for alarm in metrics["alarms"]),
            common.html_table(metrics["per_dimension"], columns, {name: ".3f" for name in columns if name != "target"},
                              caption=f"Each rating on the {scored.part} rows, in the unit of the ratings file; "
                                      f"baseline: {metrics['baseline'].replace('_', ' ')}; intervals: {metrics['method']}"),
            common.html_image(run.path("per_dimension_performance.png"), "r and R2 of each rating, with interval, baseline and ceiling"),
            common.html_image(run.path("predicted_against_true.png"), "Predicted against true"),
            *([common.html_table(metrics["criteria"], caption="Criteria")] if metrics["criteria"] else []),
            *([common.html_table(fold_rows(metrics["folds"]), caption="Folds")] if metrics["folds"] else [])]),
        ("Noise ceiling", ceiling_blocks(study, metrics["ceiling"])),
        ("Learning curves", [common.html_image(path, "Loss and validation metrics by epoch")
                             for path in sorted(run.folder.glob("**/training_history.png"))[:1]]),
        ("Best and worst cases", case_blocks(study, scored)),
        ("Limits", [common.html_text(limits_text(args, metrics))]),
        ("Command and versions", [common.html_code(common.command_line()), common.html_table(
            [{"package": name, "version": version} for name, version in common.package_versions().items()])])]
    common.write_report(run.path("report.html"), f"Ratings from images: {run.folder.name}", (level, metrics["verdict"]),
                        sections, foot=run.compute.text, figures=figures)


def ceiling_blocks(study, ceiling):
    """How far any model could come: one source, or a table over the possible numbers of raters, or why there is none."""
    if ceiling:
        return [common.html_text(f"Source: {ceiling['source']}.")]
    if study.sd is None:
        return [common.html_text("Not measurable: the ratings file has means alone, no rater sd.")]
    table = common.ceiling_table(study.ratings, study.sd)
    rows = [{"rating": name, **{f"n = {n}": table[n][r] for n in (2, 4, 6, 10, 15, 20, 30)}} for r, name in enumerate(study.names)]
    return [common.html_text("The ratings file has rater sds but no number of raters, so the ceiling depends on it:"),
            common.html_table(rows, formats={name: ".3f" for name in rows[0]}, caption="R2 ceiling by number of raters")]


def case_blocks(study, scored, count=6):
    """Thumbnails of the pictures with the smallest and the largest error, over all ratings in units of their sd."""
    target, predicted = study.ratings[scored.rows], scored.predicted["predicted"]
    error = np.sqrt(np.nanmean(((predicted - target) / np.nanstd(study.ratings, axis=0)) ** 2, axis=1))
    order = np.argsort(error)

    def case(i):
        worst = np.nanargmax(np.abs(predicted[i] - target[i]) / np.nanstd(study.ratings, axis=0))
        return {"image": study.picture(scored.rows[i]), "title": study.images[scored.rows[i]], "lines": [
            f"rms error {error[i]:.2f} sd", f"{study.names[worst]}: true {target[i, worst]:.2f}, predicted {predicted[i, worst]:.2f}"]}
    return [common.html_text("Best:"), common.html_cases([case(i) for i in order[:count]]),
            common.html_text("Worst:"), common.html_cases([case(i) for i in order[::-1][:count]])]


def limits_text(args, metrics):
    """What a reader must not conclude from this run, as a list."""
    lines = ["Valid for pictures like these, rated by raters like these; other cameras, people or instructions were not tested."]
    if not metrics["held_out"]:
        lines.append(f"The epoch was chosen by {args.select} on the rows that are scored here, so the numbers are optimistic; "
                     "use --test_ratio, or --select last with a fixed number of epochs.")
    if not args.group_column:
        lines.append("No --group_column: pictures of one person or one session may stand on both sides of the split.")
    if not args.pretrained and not args.weights:
        lines.append("The network started from random weights; published weights usually do far better on data of this size.")
    return "\n".join(f"- {line}" for line in lines)


def fold_rows(folds):
    """Fold table: one dict per fold, then mean and SD over the folds."""
    rows = [{"fold": fold["fold"], "rows": fold["rows"], "best_epoch": fold["best_epoch"],
             **{name: fold["mean"][f"mean_{name}"] for name in common.REGRESSION_METRICS},
             "baseline_r2": fold["mean"]["baseline_mean_r2"]} for fold in folds]
    values = {name: np.array([row[name] for row in rows], float) for name in rows[0] if name not in ("fold", "rows", "best_epoch")}
    summary = [{"fold": "mean", **{name: v.mean() for name, v in values.items()}},
               {"fold": "SD", **{name: v.std(ddof=1) if len(v) > 1 else np.nan for name, v in values.items()}}]
    return rows + summary


# --- one run, or one run per fold ---------------------------------------------------

def prepare_split(run, args, study, split, all_parts=None):
    """Write splits.json and the leakage report; refuse a split that leaks. all_parts: what to look between (default: split)."""
    common.write_splits(run.path("splits.json"), split, study.images)
    report = common.leakage_report(all_parts or split, study.audit("pixel_sha"), np.array(study.audit("phash"), dtype=np.uint64),
                                   study.images, groups=study.groups)
    common.write_json(run.path("leakage_report.json"), report)
    run.say(common.leakage_text(report))
    common.check_leakage(report, args.allow_leakage)


def run_split(run, args, study, split):
    """Train and score one split; returns the held-out rows' Scored: test where there is one, else val."""
    prepare_split(run, args, study, split)
    if args.dry_run:
        split = {part: rows[:2 * args.batch_size] for part, rows in split.items()}
    if study.features is None:
        study.features = frozen_features(args, study, run, np.concatenate(list(split.values())))
    run.write_args(**study_record(study))
    model, loaders, scaler, training = fit(run, args, study, split)
    loss_function = rating_loss(args.loss)
    predicted = {part: evaluate(model, loader, loss_function, scaler, run.compute, args.flip_average)[0]
                 for part, loader in loaders.items() if len(split[part])}
    train = common.mean_metrics(common.regression_metrics(predicted["train"], study.ratings[split["train"]]))
    val = common.mean_metrics(common.regression_metrics(predicted["val"], study.ratings[split["val"]]))
    alarms = common.split_gap_alarms(train, val)
    for part in ("val", "test"):
        if len(split[part]):
            scored = Scored(split[part], {"predicted": predicted[part], **baselines(study, split["train"], split[part])}, part)
            write_predictions(run.path(f"predictions_{part}.csv"), study, scored)
    common.plot_history(training.history, run.path("training_history.png"), training.best["epoch"])
    report_results(run, args, study, split, scored, alarms, training.best["epoch"])
    return scored


def run_folds(run, args, study):
    """One run per fold in fold_K/, then the out-of-fold predictions pooled and scored as one."""
    fold_of = common.make_folds(len(study.images), args.folds, np.nanmean(study.ratings, axis=1), study.groups, args.seed, study.images)
    folds = {f"fold_{k}": np.flatnonzero(fold_of == k) for k in range(args.folds)}
    prepare_split(run, args, study, folds)
    study.features = frozen_features(args, study, run, np.arange(len(study.images)))
    run.write_args(**study_record(study))
    chosen = range(args.folds) if args.fold == "all" else [args.fold]
    results, done = [], []
    for k in chosen:
        split = {"train": np.flatnonzero(fold_of != k), "val": folds[f"fold_{k}"], "test": np.array([], dtype=int)}
        with run.child(f"fold_{k}") as child:
            if child.path("metrics.json").exists():
                child.say(f"fold {k} is finished")
                scored = read_predictions(child.path("predictions_val.csv"), study, "val")
            else:
                scored = run_split(child, args, study, split)
            metrics = common.read_json(child.path("metrics.json"))
        results.append(scored)
        done.append({"fold": k, "rows": len(scored.rows), "best_epoch": metrics["best_epoch"], "mean": metrics["mean"]})
    common.write_table(run.path("fold_table.csv"), fold_rows(done))
    pooled = Scored(np.concatenate([s.rows for s in results]),
                    {kind: np.concatenate([s.predicted[kind] for s in results]) for kind in results[0].predicted}, "folds")
    write_predictions(run.path("predictions_folds.csv"), study, pooled)
    report_results(run, args, study, folds, pooled, common.identical_fold_alarms([list(fold["mean"].values()) for fold in done]), folds=done)


def study_record(study):
    """What args.json says of the data; a resumed run must find the same."""
    return {"fingerprint": study.fingerprint, "pictures": len(study.images), "ratings": study.names}


def main():
    args = parse_args()
    with common.start_run(args) as run:
        study = load_study(args, run)
        read_criteria(args, study)
        if args.folds:
            return run_folds(run, args, study)
        if args.split_file:
            split = common.read_split_file(args.split_file, study.images)
            split = {part: split.get(part, np.array([], dtype=int)) for part in ("train", "val", "test")}
            if not len(split["val"]):
                raise common.UserError(f"--split_file {args.split_file} has no val part; it chooses the epoch")
        else:
            ratios = {"train": args.train_ratio, "val": args.val_ratio, "test": args.test_ratio}
            split = common.make_split(len(study.images), ratios, np.nanmean(study.ratings, axis=1), study.groups, args.seed, study.images)
        run_split(run, args, study, split)


if __name__ == "__main__":
    common.run_main(main)
