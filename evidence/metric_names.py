"""What reports and statistics must know of each metric: how it is written, and how its estimates behave."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """What statistics and reports must know of a metric."""
    label: str
    lower_is_better: bool = False
    normal_scale: str | None = "logit"  # where its estimates are closest to a normal distribution: that of shares
    chance: float | None = None  # what guessing reaches, where a verdict asks


ERROR = {"lower_is_better": True, "normal_scale": "log"}
CALIBRATION_ERROR = {"lower_is_better": True, "normal_scale": None}
PLAIN_METRICS = "accuracy balanced_accuracy precision recall average_precision state_accuracy".split()
METRICS = {
    "pearson_r": Metric("r", normal_scale="signed_logit"),
    "r2": Metric("R2", normal_scale="log1m", chance=0.0),
    "mae": Metric("MAE", **ERROR),
    "mse": Metric("MSE", **ERROR),
    "rmse": Metric("RMSE", **ERROR),
    "loss": Metric("loss", **ERROR),
    **{name: Metric(name.replace("_", " ")) for name in PLAIN_METRICS},
    "macro_f1": Metric("macro F1"),
    "roc_auc": Metric("AUC", chance=0.5),
    "mcc": Metric("MCC", normal_scale="signed_logit"),
    "ece": Metric("ECE", **CALIBRATION_ERROR),
    "ece_adaptive": Metric("adaptive ECE", **CALIBRATION_ERROR),
    "ece_above_null": Metric("ECE above its null", **CALIBRATION_ERROR),
    "ece_adaptive_above_null": Metric("adaptive ECE above its null", **CALIBRATION_ERROR),
    "brier": Metric("Brier score", **ERROR),
    "f1": Metric("F1"),
    "map": Metric("mean AP"),
    "map50": Metric("mean AP50"),
    "map_present": Metric("mean AP without absent parts"),
    "joint_map": Metric("mean joint AP of part and state"),
    "ap": Metric("AP"),
    "ap50": Metric("AP50"),
    "hallucination_rate": Metric("hallucinations: absent part claimed at its box", lower_is_better=True),
    "hallucination_rate_anywhere": Metric("hallucinations: absent part claimed anywhere", lower_is_better=True),
    **{f"{name}_at_{iou}": Metric(f"{name} at IoU {iou}")
       for name in ("precision", "recall", "f1") for iou in (0.25, 0.5)},
    "kappa": Metric("kappa", normal_scale="signed_logit"),
}

BASELINES = {  # as sentences write them
    "heads": "same detector with only its heads trained",
    "ridge": "ridge regression",
    "ridge_multiscale": "ridge regression on three feature scales",
    "logistic": "logistic regression",
}


def number_text(value, spec=".3f"):
    """A number as reports write it; NaN is "undefined"."""
    return "undefined" if value != value else format(value, spec)
