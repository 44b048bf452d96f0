"""The names that a table writes -> the files of a folder."""
import collections
import dataclasses
import os
import posixpath
import re
import unicodedata
from pathlib import Path

import common

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".tga", ".mpo")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".mts", ".npy", ".ts",
                  ".m2ts", ".h264", ".h265", ".hevc", ".3gp", ".flv", ".vob", ".ogv", ".asf")  # others are opened to see


def find_images(folder):
    """All image files under `folder`, recursive, in natural order (2 before 10); hidden and '._' ones ignored."""
    folder = Path(folder)
    if not folder.is_dir():
        raise common.UserError(f"{folder}: expected a folder of images, found no such folder. Check the path.")
    names = []
    for inside, folders, files in walk_visible(folder):
        # a folder that is named like a picture is listed too, so that reading it can say what it is
        names += [inside / name for name in [*folders, *files] if name.lower().endswith(IMAGE_SUFFIXES)]
    return [folder / name for name in sorted(names, key=natural_key)]


def walk_visible(root):
    """(folder below root, its folders, its files) of each folder, by name; without hidden ones, links followed once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder).relative_to(root), folders, [name for name in files if not name.startswith(".")]


def natural_key(name):
    """Sorting key in which digits count as numbers: 'a2' stands before 'a10'."""
    pieces = re.split("([0-9]+)", str(name).casefold())
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, str(name)


def find_videos(root):
    """({path below root: Path} of all videos, .npy clips and folders of pictures, the same of the other files).

    Pictures, hidden and '._' files are ignored.
    """
    root = Path(root)
    if not root.is_dir():
        raise common.UserError(f"--video_root {root}: expected a folder of videos, found no such folder")
    found = {}
    others = {}
    for inside, _, files in walk_visible(root):
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in files):
            found[inside.as_posix()] = root / inside
        for name in files:
            if name.lower().endswith(VIDEO_SUFFIXES):
                found[(inside / name).as_posix()] = root / inside / name
            elif not name.lower().endswith(IMAGE_SUFFIXES):
                others[(inside / name).as_posix()] = root / inside / name
    return found, others


def clean_name(name):
    """One spelling of a name: NFC, forward slashes, no blanks around it, no ./ before it."""
    return unicodedata.normalize("NFC", str(name).strip()).replace("\\", "/").removeprefix("./")


def without_root(name):
    r"""'E:\Some study\Cam 8\a.mp4' -> 'Some study/Cam 8/a.mp4'; what climbs out of its root starts with '..'."""
    name = clean_name(name)
    below = re.sub("^[A-Za-z]:", "", name)
    if below == name and not name.startswith("/"):
        return posixpath.normpath(name)
    return posixpath.normpath(f"/{below.lstrip('/')}").lstrip("/")


@dataclasses.dataclass
class Fit:
    """The files that fit a name best: several where the name does not decide between them.

    common_folders: how many folders before the file's own name are the same. agrees: no folder differs.
    """
    files: list
    common_folders: int = 0
    agrees: bool = True


class NameIndex:
    """Files below a folder, found by names with or without suffix and folders, in any case.

    files: their paths below the folder as clean_name spells them; suffixes: those that a name may lack or have wrong.
    """

    def __init__(self, files, suffixes):
        self.files = set(files)
        self.suffixes = suffixes
        self.by_stem = collections.defaultdict(list)
        for file in files:
            parts, suffix = self._split(file)
            self.by_stem[parts[-1].casefold()].append((file, parts, suffix))

    def find(self, name, other_folders=False):
        """The Fit of a clean name: the exact path, else the files that have most folders before their name in common.

        Of several the one whose folders do not differ comes first, then the same suffix, the same number of folders and
        the same case. other_folders: a file may fit although its folders differ.
        """
        if name in self.files:
            return Fit([name], name.count("/"))
        parts, suffix = self._split(name)
        scores = {}
        for file, file_parts, file_suffix in self.by_stem[parts[-1].casefold()]:
            common_folders, agrees, same_case = compare_paths(parts, file_parts)
            if agrees or other_folders:
                same_suffix = (suffix.lower() == file_suffix.lower()) + (suffix == file_suffix)
                scores[file] = common_folders, agrees, same_suffix, len(parts) == len(file_parts), same_case
        if not scores:
            return Fit([])
        best = max(scores.values())
        return Fit([file for file, score in scores.items() if score == best], *best[:2])

    def _split(self, name):
        """'a/B.JPG' -> (['a', 'B'], '.JPG')."""
        *folders, last = name.split("/")
        stem, dot, suffix = last.rpartition(".")
        if dot + suffix.lower() in self.suffixes:
            return [*folders, stem], dot + suffix
        return [*folders, last], ""


def compare_paths(one, other):
    """Parts of two paths of one base name -> (folders in common before it, no folder differs?, parts in one case)."""
    pairs = list(zip(reversed(one), reversed(other)))
    same = [a.casefold() == b.casefold() for a, b in pairs]
    n_same = same.index(False) if False in same else len(same)
    return n_same - 1, n_same == len(pairs), sum(a == b for a, b in pairs)


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
        raise common.UserError(f"expected names inside --images_dir {folder}, "
                               f"found {common.shorten_list(leaving)}. Correct these rows.")
    index = NameIndex(files, IMAGE_SUFFIXES)
    hits = []
    names_of = collections.defaultdict(set)
    for name in written:
        hit = tuple(index.find(name).files)
        hits.append(hit)
        names_of[hit].add(name)
    unclear = [f"{common.shorten_list(sorted(meant))} -> {common.shorten_list(hit)}"
               for hit, meant in names_of.items() if len(meant) * len(hit) > 1]
    if unclear:
        raise common.UserError(f"expected one file for one image name, found {common.shorten_list(unclear)}. "
                               f"Write folder and suffix.")
    unused = [file for file in files if (file,) not in names_of]
    return [files[hit[0]] if hit else None for hit in hits], unused


def match_videos(names, root):
    """Names as a manifest writes them -> ({name: Path or None}, names that were found by base name alone).

    As match_images, but drives and folders of another machine are cut off, and a file in another folder may fit.
    UserError: a name leaves `root`, fits several files, or several folders mean one file.
    """
    videos, others = ({clean_name(file): path for file, path in files.items()} for files in find_videos(root))
    files = others | videos
    cleaned = {name: without_root(name) for name in dict.fromkeys(names)}
    leaving = [name for name, below in cleaned.items() if below.split("/")[0] == ".."]
    if leaving:
        raise common.UserError(f"expected videos inside --video_root {root}, found {common.shorten_list(leaving)}; "
                               f"correct these paths")
    index = NameIndex(videos, VIDEO_SUFFIXES)
    rest = NameIndex(others, ())  # a suffix that is not listed must be written
    fits = {}
    for name, below in cleaned.items():
        fit = index.find(below, other_folders=True)
        fits[name] = fit if fit.files else rest.find(below, other_folders=True)
    unclear = [f"{name} -> {common.shorten_list(fit.files, 4)}" for name, fit in fits.items() if len(fit.files) > 1]
    folders_of = collections.defaultdict(set)
    for name, fit in fits.items():
        *folders, _ = cleaned[name].casefold().split("/")
        if folders and fit.common_folders == 0:
            for file in fit.files:
                folders_of[file].add(folders[-1])
    unclear += [f"{common.shorten_list(sorted(folders), 4)} -> {file}"
                for file, folders in folders_of.items() if len(folders) > 1]
    if unclear:
        raise common.UserError(f"expected one file below --video_root {root} for a name, found "
                               f"{common.shorten_list(unclear)}; write folders into the paths, or keep the folders on "
                               f"disk as the paths have them")
    found = {name: files[fit.files[0]] if fit.files else None for name, fit in fits.items()}
    by_base_name = [name for name, fit in fits.items() if not (fit.agrees or fit.common_folders)]
    return found, by_base_name
