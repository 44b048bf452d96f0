"""The names that a table writes -> the files of a folder."""
import collections
import re
import unicodedata
from pathlib import Path

import common

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".tga", ".mpo")


def find_images(folder):
    """All image files under `folder`, recursive, in natural order (2 before 10); hidden and '._' ones ignored."""
    if not Path(folder).is_dir():
        raise common.UserError(f"{folder}: expected a folder of images, found no such folder. Check the path.")
    paths = [path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    found = {path.relative_to(folder): path for path in paths}
    natural = {name: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", str(name).casefold()))]
               for name in found if not any(part.startswith(".") for part in name.parts)}
    return [found[name] for name in sorted(natural, key=lambda name: (natural[name], str(name)))]


def clean_name(name):
    return unicodedata.normalize("NFC", str(name).strip()).replace("\\", "/").removeprefix("./")


def _path_key(name):
    """'a/B.JPG' -> '/a/b': without the image suffix and in one case."""
    stem, dot, suffix = name.rpartition(".")
    return "/" + (stem if dot + suffix.lower() in IMAGE_SUFFIXES else name).casefold()


def match_images(names, images_dir):
    """Names as a table writes them -> (N paths, None where no file fits; names of the files that no row asks for).

    With or without folder and suffix, any case, backslashes, NFC or NFD; a folder in the name must not contradict the
    one on disk. UserError: a name leaves `images_dir` or fits several files, or several names mean one file.
    """
    folder = Path(images_dir)
    files = {clean_name(path.relative_to(folder).as_posix()): path for path in find_images(folder)}
    if not files:
        raise common.UserError(f"--images_dir {folder}: expected images ({' '.join(IMAGE_SUFFIXES)}), found none.")
    root = f"{clean_name(folder.absolute().as_posix())}/"
    written = [clean_name(name).removeprefix(root) for name in names]
    leaving = [f"row {i + 1} {names[i]!r}" for i, name in enumerate(written)
               if re.match("/|[A-Za-z]:", name) or ".." in name.split("/")]
    if leaving:
        raise common.UserError(f"expected names inside --images_dir {folder}, found {common.shorten_list(leaving)}. Correct these rows.")
    by_stem, names_of = collections.defaultdict(dict), collections.defaultdict(set)
    for file in files:
        by_stem[_path_key(file).rpartition("/")[2]][file] = _path_key(file)
    hits = [_best_files(name, by_stem[_path_key(name).rpartition("/")[2]]) for name in written]
    for name, hit in zip(written, hits):
        names_of[hit].add(name)
    unclear = [f"{common.shorten_list(sorted(rows))} -> {common.shorten_list(hit)}" for hit, rows in names_of.items() if len(rows) * len(hit) > 1]
    if unclear:
        raise common.UserError(f"expected one file for one image name, found {common.shorten_list(unclear)}. Write folder and suffix.")
    used = {file for hit in hits for file in hit}
    return [files[hit[0]] if hit else None for hit in hits], [file for file in files if file not in used]


def _best_files(name, candidates):
    """Of {file: path key} those that fit best: several where the name does not decide, none where folders differ."""
    key, written = _path_key(name), Path(name)
    fitting = {file: other for file, other in candidates.items() if key.endswith(other) or other.endswith(key)}

    def score(file):
        return (min(len(key), len(fitting[file])), Path(file).suffix.lower() == written.suffix.lower(),
                len(fitting[file]) <= len(key), Path(file).stem == written.stem)
    best = max(map(score, fitting), default=None)
    return tuple(file for file in fitting if score(file) == best)
