"""What reports and statistics must know of each metric: how it is written, and how its estimates behave."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """What statistics and reports must know of a metric."""
    name: str
    label: str
    lower_is_better: bool = False
    is_share: bool = False  # lies in 0 to 1
    inflated_by_resampling: bool = False  # rows drawn twice raise it by themselves
    normal_scale: str | None = None  # where its estimates are closer to a normal distribution


METRICS = {metric.name: metric for metric in (
    Metric("pearson_r", "r", normal_scale="arctanh"),
    Metric("r2", "R2", normal_scale="log1m"),
    Metric("mae", "MAE", lower_is_better=True),
    Metric("mse", "MSE", lower_is_better=True, normal_scale="log"),
    Metric("rmse", "RMSE", lower_is_better=True, normal_scale="log"),
    Metric("loss", "loss", lower_is_better=True, normal_scale="log"),
    Metric("accuracy", "accuracy", is_share=True, normal_scale="logit"),
    Metric("balanced_accuracy", "balanced accuracy", is_share=True, normal_scale="logit"),
    Metric("macro_f1", "macro F1", is_share=True, normal_scale="logit"),
    Metric("roc_auc", "AUC", is_share=True, normal_scale="logit"),
    Metric("mcc", "MCC"),
    Metric("ece", "ECE", lower_is_better=True, is_share=True, inflated_by_resampling=True),
    Metric("ece_adaptive", "adaptive ECE", lower_is_better=True, is_share=True, inflated_by_resampling=True),
    Metric("brier", "Brier score", lower_is_better=True, normal_scale="log"),
    Metric("precision", "precision", is_share=True, normal_scale="logit"),
    Metric("recall", "recall", is_share=True, normal_scale="logit"),
    Metric("f1", "F1", is_share=True, normal_scale="logit"),
    Metric("average_precision", "average precision", is_share=True, inflated_by_resampling=True, normal_scale="logit"),
    Metric("map", "mean AP", is_share=True, inflated_by_resampling=True),
    Metric("map50", "mean AP50", is_share=True, inflated_by_resampling=True),
    Metric("map_present", "mean AP without absent parts", is_share=True, inflated_by_resampling=True),
    Metric("joint_map", "mean joint AP", is_share=True, inflated_by_resampling=True),
    Metric("ap", "AP", is_share=True, inflated_by_resampling=True),
    Metric("state_accuracy", "state accuracy", is_share=True, normal_scale="logit"),
    Metric("hallucination_rate", "hallucination rate", lower_is_better=True, is_share=True, normal_scale="logit"),
    Metric("hallucination_rate_anywhere", "hallucination rate anywhere", lower_is_better=True, is_share=True,
           normal_scale="logit"),
    Metric("absent_box_detected", "absent boxes detected", is_share=True, normal_scale="logit"))}
