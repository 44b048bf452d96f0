"""Which rows a model has seen: what its checkpoint says of them, and what follows for rows that it predicts.

Letters: N rows, M rows predicted, K hashes of a row.
"""
import collections
import dataclasses
import zipfile

import numpy as np

import common

WORDS = ("train", "chose", "not known", "new")  # from the worst to the best
SENTENCES = {  # what follows from the words but "new"
    "train": "trained the model, or one that it started from: the result is not held out; judge "
             "other rows (--test_ratio), or train without --init_from",
    "chose": "chose the epoch, the threshold or the temperature: the result is selected on these rows, therefore "
             "optimistic; give a test part or, where they chose the epoch alone, a fixed number of "
             "epochs (--select last; a detector has --folds)",
    "not known": "may have been seen in training: their table does not say it",
}


@dataclasses.dataclass
class SeenRows:
    """Which rows made a checkpoint and all that it started from, as pixel_cache.content_hashes."""
    fitted: np.ndarray  # trained on
    chose: np.ndarray  # chose an epoch, a threshold or a temperature

    def __post_init__(self):
        self.fitted = np.asarray(self.fitted, np.int64)
        self.chose = np.asarray(self.chose, np.int64)

    def plus(self, other):
        """The rows of both."""
        return SeenRows(np.union1d(self.fitted, other.fitted), np.union1d(self.chose, other.chose))

    def words(self, hashes):
        """(M, K) hashes of rows -> (M,) one of WORDS each."""
        is_fitted = np.isin(hashes, self.fitted).any(1)
        has_chosen = np.isin(hashes, self.chose).any(1)
        return np.select([is_fitted, has_chosen], ["train", "chose"], "new")


def of_checkpoint(content, path="the checkpoint"):
    """The SeenRows in what a checkpoint holds."""
    with common.checkpoint_fields(path):
        return SeenRows(**content["seen"])


def of_run(args, hashes, split):
    """SeenRows of a run and of the weights it starts from; those of other programs have seen none of our rows.

    hashes: (N, K) of all rows; split: {part: rows} of train, and of val, which chooses the epoch
    unless --select says last.
    """
    choosing = [] if args.select in ("last", "val_last") else split["val"]  # names of columns may be given in full
    seen = SeenRows(hashes[split["train"]], hashes[choosing])
    given = filter(None, (args.init_from, args.weights))
    for path in filter(zipfile.is_zipfile, given):  # no .safetensors
        content = common.read_checkpoint(path)
        if content.get("format") == common.FORMAT:
            seen = seen.plus(of_checkpoint(content, path))
    return seen


def worst(words):
    """The worst of several WORDS."""
    return min(words, key=WORDS.index)


def worst_of_each(models):
    """(M,) the worst of the words of several models, (M,) each."""
    return np.array([worst(words) for words in zip(*models)])


def sentences(words):
    """{word: sentence} on the rows that are not new: (M,) of WORDS."""
    counts = collections.Counter(words)
    return {word: f"{counts[word]} of {len(words)} rows {text}" for word, text in SENTENCES.items() if counts[word]}


def say_notes(words, say):
    """Say the sentences on predictions as notes."""
    for sentence in sentences(words).values():
        say(f"note: {sentence}")
