"""What reports and statistics must know of each metric: how it is written, and how its estimates behave."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """What statistics and reports must know of a metric."""
    name: str
    label: str
    lower_is_better: bool = False
    normal_scale: str | None = "logit"  # where its estimates are closest to a normal distribution: that of shares


ERROR = {"lower_is_better": True, "normal_scale": "log"}
CALIBRATION_ERROR = {"lower_is_better": True, "normal_scale": None}
METRICS = {metric.name: metric for metric in (
    Metric("pearson_r", "r", normal_scale="signed_logit"),
    Metric("r2", "R2", normal_scale="log1m"),
    Metric("mae", "MAE", **ERROR),
    Metric("mse", "MSE", **ERROR),
    Metric("rmse", "RMSE", **ERROR),
    Metric("loss", "loss", **ERROR),
    Metric("accuracy", "accuracy"),
    Metric("balanced_accuracy", "balanced accuracy"),
    Metric("macro_f1", "macro F1"),
    Metric("roc_auc", "AUC"),
    Metric("mcc", "MCC", normal_scale="signed_logit"),
    Metric("ece", "ECE", **CALIBRATION_ERROR),
    Metric("ece_adaptive", "adaptive ECE", **CALIBRATION_ERROR),
    Metric("ece_above_null", "ECE above its null", **CALIBRATION_ERROR),
    Metric("ece_adaptive_above_null", "adaptive ECE above its null", **CALIBRATION_ERROR),
    Metric("brier", "Brier score", **ERROR),
    Metric("precision", "precision"),
    Metric("recall", "recall"),
    Metric("f1", "F1"),
    Metric("average_precision", "average precision"),
    Metric("map", "mean AP"),
    Metric("map50", "mean AP50"),
    Metric("map_present", "mean AP without absent parts"),
    Metric("joint_map", "mean joint AP of part and state"),
    Metric("ap", "AP"),
    Metric("ap50", "AP50"),
    Metric("state_accuracy", "state accuracy"),
    Metric("hallucination_rate", "hallucinations: absent part claimed at its box", lower_is_better=True),
    Metric("hallucination_rate_anywhere", "hallucinations: absent part claimed anywhere", lower_is_better=True),
    *(Metric(f"{name}_at_{iou}", f"{name} at IoU {iou}")
      for name in ("precision", "recall", "f1") for iou in (0.25, 0.5)),
    Metric("kappa", "kappa", normal_scale="signed_logit"))}

BASELINES = {  # as sentences write them
    "heads": "same detector with only its heads trained",
    "ridge": "ridge regression",
    "ridge_multiscale": "ridge regression on three feature scales",
    "logistic": "logistic regression",
}


def number_text(value, spec=".3f"):
    """A number as reports write it; NaN is "undefined"."""
    return "undefined" if value != value else format(value, spec)
