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
    "train": "trained the model, or one that it started from: the result is not held out; judge other rows "
             "(--test_ratio), or train without --init_from",
    "chose": "chose the epoch, the threshold or the temperature: the result is selected on these rows, therefore "
             "optimistic; give a test part or, where they chose the epoch alone, a fixed number of epochs "
             "(--select last; a detector has --folds)",
    "not known": "may have been seen in training: their table or the checkpoint does not say it",
}


@dataclasses.dataclass
class SeenRows:
    """Which rows made a checkpoint and all that it started from, as pixel_cache.content_hashes.

    is_complete False: one of them does not say, so that a row which is not listed may have been seen all the same.
    """
    fitted: np.ndarray  # trained on
    chose: np.ndarray  # chose an epoch, a threshold or a temperature
    is_complete: bool = True

    def __post_init__(self):
        self.fitted = np.asarray(self.fitted, np.int64)
        self.chose = np.asarray(self.chose, np.int64)

    def plus(self, other):
        """The rows of both."""
        return SeenRows(np.union1d(self.fitted, other.fitted), np.union1d(self.chose, other.chose),
                        self.is_complete and other.is_complete)

    def words(self, hashes):
        """(M, K) hashes of rows -> (M,) one of WORDS each."""
        is_fitted = np.isin(hashes, self.fitted).any(1)
        has_chosen = np.isin(hashes, self.chose).any(1)
        return np.select([is_fitted, has_chosen], ["train", "chose"], "new" if self.is_complete else "not known")


def of_checkpoint(content, path="the checkpoint"):
    """The SeenRows in what a checkpoint holds; one of an older version does not say them."""
    if not content.get("seen"):
        return SeenRows([], [], is_complete=False)
    with common.checkpoint_fields(path):
        return SeenRows(**content["seen"])


def of_run(run, args, hashes, split):
    """SeenRows of a run and of the weights it starts from; those of other programs have seen none of our rows.

    hashes: (N, K) of all rows; split: {part: rows} of train, and of val, which chooses the epoch unless --select says
    last.
    """
    choosing = [] if args.select in ("last", "val_last") else split["val"]  # names of columns may be given in full
    seen = SeenRows(hashes[split["train"]], hashes[choosing])
    given = filter(None, (args.init_from, args.weights))
    for path in filter(zipfile.is_zipfile, given):  # no .safetensors
        content = common.read_checkpoint(path)
        if content.get("format") == common.FORMAT:
            seen = seen.plus(of_checkpoint(content, path))
    if not seen.is_complete:
        run.say("note: the weights to start from are of an older version, which does not say the rows it was "
                "trained on: whether rows are new is not known in this run")
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
