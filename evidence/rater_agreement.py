"""How far the raters agree, and so how far any model could come.

Letters: N rows, R ratings.
"""

import dataclasses
import math

import numpy as np

from evidence import reporting


def noise_ceiling(mean, sd, n):
    """(R,) R2 ceiling of each target from summary ratings.

    mean, sd: (N, R); n: (N, R) raters, or a number.

    1 - mean(sd^2 / n) / var(mean), the reliability of a mean in classical test theory; its root is
    the ceiling of r. Rows of one rater or without an sd count with the noise of the others' single
    ratings, rows without a mean or n not at all. NaN: not measurable.
    """
    import pandas as pd
    mean = pd.DataFrame(np.where(n > 0, mean, np.nan))
    raters = pd.DataFrame(np.broadcast_to(n, mean.shape)).where(mean.notna())
    share = 1 / raters  # of a single rating's noise
    valid = (sd >= 0) & (n > 1)
    noise = (sd ** 2 * share).where(valid).mean() / share.where(valid).mean()
    r2 = 1 - noise * share.mean() / mean.var()
    return r2.where(r2 >= 0).to_numpy()


def _stack_ratings(ratings, fewest):
    """N 1-D arrays -> (values (M,), image (M,) sorted indices, counts (N,)) without NaN.

    Images with fewer than `fewest` ratings are left out.
    """
    import pandas as pd
    scores = pd.Series(list(ratings)).explode().astype(float).dropna()  # the image is the index
    scores = scores[scores.groupby(level=0).transform("size") >= fewest]
    image, _ = pd.factorize(scores.index)
    return scores.to_numpy(), image, np.bincount(image)


def _weight_of_noise(values, image, counts):
    """What noise of variance 1 in a single rating takes from the R2 ceiling of the means; ratings of _stack_ratings."""
    means = np.bincount(image, values) / counts
    return np.mean(1 / counts) / means.var(ddof=1)


def split_half(ratings, halves=100):
    """Reliability of the mean rating (= its R2 ceiling) of one target: N 1-D arrays -> float.

    Each image's raters are cut in two at random, the halves' means correlated over images (those
    with 2 raters or more), stepped up by Spearman-Brown 2r / (1 + r), for an odd number of raters
    as Horst 1951 does for unequal halves, and averaged over `halves`. Images of one rater count
    with the noise of the others' single ratings. Not above 0: NaN, not measurable.
    """
    values, image, counts = _stack_ratings(ratings, 2)
    if len(counts) < 3:  # two images always correlate by 1 or -1
        return math.nan
    generator = np.random.default_rng(0)
    n_first = counts // 2
    n_second = counts - n_first
    evenness = np.mean(4 * n_first * n_second / counts ** 2)  # 1 for equal halves
    place = np.arange(len(values)) - (np.cumsum(counts) - counts)[image]
    is_first = place < n_first[image]  # (M,)
    total = np.bincount(image, values)
    reliability = []
    for _ in range(halves):
        order = np.argsort(image + generator.random(len(values)))  # shuffled within each image
        first = np.bincount(image[is_first], values[order[is_first]])
        second = total - first
        r = np.corrcoef(first / n_first, second / n_second)[0, 1]
        reliability.append(2 * r / (r + np.sqrt(r ** 2 + evenness * (1 - r ** 2))))
    weight = _weight_of_noise(*_stack_ratings(ratings, 1)) / _weight_of_noise(values, image, counts)
    r2 = 1 - (1 - np.mean(reliability)) * weight
    return r2 if r2 > 0 else math.nan


def icc(ratings):
    """(ICC(1,1), ICC(1,k)) of one target by one-way ANOVA: N 1-D arrays -> single and mean rating.

    Shrout & Fleiss 1979; unequal numbers of raters enter as n0 = (M - sum n^2 / M) / (N - 1).
    Negative: NaN.
    """
    values, image, counts = _stack_ratings(ratings, 1)
    n_images = len(counts)
    n_ratings = len(values)
    if n_images < 2 or n_ratings == n_images:
        return math.nan, math.nan
    means = np.bincount(image, values) / counts
    between = (counts * (means - values.mean()) ** 2).sum() / (n_images - 1)
    within = ((values - means[image]) ** 2).sum() / (n_ratings - n_images)
    n0 = (n_ratings - (counts**2).sum() / n_ratings) / (n_images - 1)
    signal = between - within
    if signal <= 0:
        return math.nan, math.nan
    return signal / (between + (n0 - 1) * within), signal / between


# --- the ceiling of a run and how a page shows it --------------------------------------------------

@dataclasses.dataclass(kw_only=True)
class Ceiling:
    """How far any model could come, given how far the raters agree; None where it cannot be measured."""
    source: str  # what it was computed from, or why it could not be
    r2: np.ndarray | None = None  # (R,)
    icc: np.ndarray | None = None  # (R, 2) ICC(1,1) and ICC(1,k)
    possible: list | tuple = ()  # dicts of R2 ceilings for numbers of raters

    @property
    def mean_r2(self):
        """Mean over the targets; NaN where some are not known, since a model's mean R2 is of all of them; or None."""
        return None if self.r2 is None else self.r2.mean()

    def columns(self):
        """Columns for the table of the targets, where it is known."""
        columns = {"ceiling_r2": self.r2, "ceiling_pearson_r": np.sqrt(self.r2)}
        if self.icc is not None:
            columns["icc_1_1"], columns["icc_1_k"] = self.icc.T
        return columns


def measure_ceiling(names, mean, sd=None, n=None, single_ratings=None):
    """Ceiling of R targets, from single ratings {name: N arrays}, or from mean, sd and n, (N, R) each."""
    import pandas as pd
    if single_ratings:
        ratings = [single_ratings[name] for name in names]
        return Ceiling(source="split half with Spearman-Brown, 100 halves of the single ratings",
                       r2=np.array(list(map(split_half, ratings))),
                       icc=np.array(list(map(icc, ratings))))
    if sd is None:
        return Ceiling(source="not measurable: the table has means alone. Columns of the raters' sd and number "
                              "(Valence_sd, Valence_n), or a row for every single rating, would give one")
    if n is not None:
        return Ceiling(source="1 - mean(sd^2 / n) / var(mean), where an sd of 0 counts if n is "
                              "over 1: these raters agree, if only that the scale ends there",
                       r2=noise_ceiling(mean, sd, n))
    mean = np.where(sd > 0, mean, np.nan)  # an sd of 0 may be of one rater
    tables = {f"n = {raters}": noise_ceiling(mean, sd, raters) for raters in (2, 4, 6, 10, 15, 20, 30)}
    possible = pd.DataFrame({"target": names, **tables}).to_dict("records")
    return Ceiling(source="not measurable: the table has rater sds but no number of raters n, on which the ceiling "
                          "depends. Rows with sd = 0 are left out: they may be of one rater", possible=possible)


def ceiling_blocks(ceiling):
    """HTML of the section Noise ceiling; none without a Ceiling."""
    if ceiling is None:
        return []
    blocks = [reporting.html_text(f"Source: {ceiling.source}.")]
    if ceiling.r2 is not None and np.isnan(ceiling.mean_r2):
        text = f"Measurable for {np.isfinite(ceiling.r2).sum()} of {len(ceiling.r2)} ratings, so there is no mean."
        blocks.append(reporting.html_text(text))
    return [*blocks, reporting.html_table(ceiling.possible, caption="R2 ceiling by number of raters")]
