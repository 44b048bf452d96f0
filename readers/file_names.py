"""The names that a table writes -> the files of a folder."""
import collections
import dataclasses
import os
import posixpath
import re
import unicodedata
import urllib.parse
from pathlib import Path

import common

UNREAD_FORMATS = {  # pictures that are listed, so that none is passed over in silence, but not read
    ".heic": "HEIC (iPhone): convert to JPEG",
    ".heif": "HEIF: convert to JPEG",
    ".avif": "AVIF: convert to PNG",
    ".jp2": "JPEG 2000: convert to PNG",
    ".dcm": "DICOM: export as PNG of 16 bits",
}
IMAGE_SUFFIXES = (*".jpg .jpeg .jfif .png .bmp .gif .tif .tiff .webp .tga .mpo".split(), *UNREAD_FORMATS)
VIDEO_SUFFIXES = (".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .mts .npy .ts .m2ts .h264 .h265 "
                  ".hevc .3gp .flv .vob .ogv .asf").split()  # others are opened to see


def names_picture(name):
    """True for a name that ends as those of pictures do."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def find_images(folder):
    """All image files under `folder`, recursive, in natural order (2 before 10); hidden and '._' ones ignored."""
    paths = [folder / file for file in visible_files(folder) if names_picture(file.name)]
    return sorted(paths, key=natural_key)


def images_by_name(folder):
    """{clean name below the folder: Path} of find_images."""
    return {clean_name(path.relative_to(folder).as_posix()): path for path in find_images(folder)}


def visible_files(root):
    """Yield the paths below root of its files, folder by folder, by name; without hidden ones, links followed once.

    UserError where root is no folder.
    """
    if not root.is_dir():
        raise common.UserError(f"{root}: expected a folder, found no such folder. Check the path.")
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        for name in sorted(files):
            if not name.startswith("."):
                yield inside / name


def natural_key(name):
    """Sorting key in which digits count as numbers: 'a2' stands before 'a10'."""
    pieces = re.split("([0-9]+)", str(name).casefold())
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, str(name)


def find_videos(root):
    """({path below root: Path} of all videos, .npy clips and folders of pictures, the same of the other files).

    Pictures, hidden and '._' files are ignored.
    """
    found = {}
    others = {}
    for file in visible_files(root):
        suffix = file.suffix.lower()
        is_picture = suffix in IMAGE_SUFFIXES
        source = file.parent if is_picture else file
        kind = found if is_picture or suffix in VIDEO_SUFFIXES else others
        kind[source.as_posix()] = root / source
    return found, others


def clean_name(name):
    """One spelling of a name: NFC, forward slashes, no blanks around it, no ./ before it."""
    return unicodedata.normalize("NFC", str(name).strip()).replace("\\", "/").removeprefix("./")


def without_root(name):
    r"""'E:\Some study\Cam 8\a.mp4' -> 'Some study/Cam 8/a.mp4', '../../a.mp4' -> 'a.mp4': what may lie in a folder."""
    below = re.sub("^[A-Za-z]:", "", clean_name(name))
    return posixpath.normpath(f"/{below}").lstrip("/")


@dataclasses.dataclass
class Fit:
    """The files that fit a name best: several where the name does not decide between them.

    name: below the folder. agrees: no folder differs, and no leading zeros do. is_guess: the end of
    the path, or a unique base name, decided.
    """
    name: str
    files: list
    agrees: bool
    is_guess: bool = False


class NameIndex:
    """Files below a folder, found by names with or without suffix and folders, in any case.

    files: their paths below the folder as clean_name spells them; suffixes: those that
    a name may lack or have wrong.
    """

    def __init__(self, files, suffixes):
        self.suffixes = suffixes
        self.by_tail = collections.defaultdict(list)
        for file in files:
            for tail in self._tails(file):
                self.by_tail[tail].append(file)

    def find(self, name):
        """The Fit of a clean name: the exact path, else the files that have most folders before their name in common.

        Of several the one whose folders do not differ comes first, then the same suffix, the same
        number of folders and the same case.
        """
        tail = next((tail for tail in self._tails(name) if tail in self.by_tail), None)
        if tail is None:
            return Fit(name, [], agrees=False)
        parts, suffix = self._split(name)
        scores = {}
        for file in self.by_tail[tail]:
            file_parts, file_suffix = self._split(file)
            agrees = isinstance(tail, tuple) and len(tail) in (len(parts), len(file_parts))
            same_suffix = (suffix.lower() == file_suffix.lower()) + (suffix == file_suffix)
            same_case = sum(map(str.__eq__, parts, file_parts))
            scores[file] = agrees, same_suffix, len(parts) == len(file_parts), same_case
        best = max(scores.values())
        return Fit(name, [file for file, score in scores.items() if score == best], agrees=best[0])

    def match(self, names, exact):
        """Clean names -> {name: Fit}; a file that does not agree counts only where it is unique on both sides.

        exact: no guess counts.
        """
        fits = {}
        wanted_as = collections.defaultdict(set)  # file -> ends of the names that do not agree; '' for those that do
        for name in names:
            fit = self.find(without_root(name))
            if not fit.agrees:  # read as a browser's: 'a%20b.png' -> 'a b.png'
                unquoted = self.find(without_root(urllib.parse.unquote(name)))
                fit = unquoted if unquoted.files else fit
            fits[name] = fit
            fit.is_guess = not fit.agrees or fit.name != posixpath.normpath(name)
            end = "" if fit.agrees else "/".join(fit.name.casefold().split("/")[-2:])
            for file in fit.files:
                wanted_as[file].add(end)
        for fit in fits.values():
            is_unique = len(fit.files) == 1 and len(wanted_as[fit.files[0]]) == 1
            if not (fit.agrees or is_unique) or (exact and fit.is_guess):
                fit.files = []
        return fits

    def _split(self, name):
        """'a/B.JPG' -> (['B', 'a'], '.JPG'): from the name of the file outwards."""
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in self.suffixes:
            stem = name
            suffix = ""
        return stem.split("/")[::-1], suffix

    def _tails(self, name):
        """Keys of a path, the most telling first: the whole, without its first folder, ..., base name; loose_stem."""
        parts, _ = self._split(name)
        keys = list(map(str.casefold, parts))
        tails = [tuple(keys[:n]) for n in range(len(keys), 0, -1)]
        return [*tails, loose_stem(parts[0])]


def loose_stem(stem):
    """Key of a name without suffix: any case, and numbers without the leading zeros that spreadsheets drop."""
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem.casefold()


def below_folder(names, folder):
    """{name as written: its clean spelling, an absolute one inside the folder as a path below it}."""
    root = f"{clean_name(folder.absolute().as_posix())}/"
    return {name: clean_name(name).removeprefix(root) for name in names}


def match_images(names, images_dir, exact=False, spelling=str):
    """Names as a table writes them -> ({name: Path or None}, names of files that no row asks for, notes).

    With or without folder and suffix, any case, backslashes, NFC or NFD. Of a name from elsewhere
    (C:\\, /data, ..) the end of the path counts; a folder may differ from the one on disk only
    where the base name is unique on both sides; exact: neither counts. No file outside `images_dir`
    is ever meant. UserError: a name fits several files, or several names one; those may do so of
    which the function `spelling` makes the same.
    """
    files = images_by_name(images_dir)
    if not files:
        raise common.UserError(f"{images_dir}: expected images ({' '.join(IMAGE_SUFFIXES)}), found none.")
    written = below_folder(names, images_dir)
    fits = NameIndex(files, IMAGE_SUFFIXES).match(written.values(), exact)
    names_of = collections.defaultdict(list)
    for name, fit in fits.items():
        names_of[tuple(fit.files)].append(name)
    unclear = [f"{common.shorten_list(sorted(meant))} -> {common.shorten_list(hit)}"
               for hit, meant in names_of.items()
               if len(hit) > 1 or (hit and len(set(map(spelling, meant))) > 1)]
    if unclear:
        raise common.UserError(f"expected one file for one image name in {images_dir}, found "
                               f"{common.shorten_list(unclear)}. Write folder and suffix.")
    unused = [file for file in files if (file,) not in names_of]
    found, notes = chosen_paths(written, fits, files)
    missing = [name for name, fit in fits.items() if not fit.files]
    if 10 * len(missing) > len(fits):
        notes.append(f"WARNING: {len(missing)} of {len(fits)} names fit no picture "
                     f"({common.shorten_list(missing, 3)}), and {len(unused)} files have no row. Compare the "
                     "spelling; save a table with umlauts as UTF-8; else the folder lacks them")
    return found, unused, notes


def chosen_paths(written, fits, files):
    """({name as written: Path, None where no file fits}, notes: a line on the names that a guess matched, if any).

    written: of below_folder; fits: {clean name: Fit}; files: {clean name: Path}.
    """
    chosen = {name: fit.files[0] for name, fit in fits.items() if fit.files}
    guessed = [f"{name} -> {file}" for name, file in chosen.items() if fits[name].is_guess]
    notes = []
    if guessed:
        notes.append(f"{len(guessed)} of {len(fits)} names are of another folder or spelling; the end of the path, or "
                     f"a base name that is unique, decided (not with --exact_names): {common.shorten_list(guessed, 3)}")
    return {name: files.get(chosen.get(own)) for name, own in written.items()}, notes


def match_videos(names, root, exact=False):
    """Names as a manifest writes them -> ({name: Path or None}, notes on guesses and on videos without a row).

    A name with the suffix of a picture means a picture, a clip of one frame. As match_images.
    UserError: a name fits several files, or several folders mean one file.
    """
    videos, others = find_videos(root)
    files = {clean_name(file): path for file, path in (others | videos).items()}
    written = below_folder(names, root)
    fits = NameIndex(files, VIDEO_SUFFIXES).match(written.values(), exact)  # other suffixes: only whole names
    pictures = list(filter(names_picture, written.values()))
    if pictures:
        images = images_by_name(root)
        fits |= NameIndex(images, IMAGE_SUFFIXES).match(pictures, exact)
        files |= images
    unclear = [f"{name} -> {common.shorten_list(fit.files, 4)}" for name, fit in fits.items() if len(fit.files) > 1]
    folders_of = collections.defaultdict(set)  # file in no folder -> those that the names give it
    for name, fit in fits.items():
        *folders, _ = without_root(name).casefold().split("/")
        for file in fit.files:
            if folders and "/" not in file:
                folders_of[file].add(folders[-1])
    unclear += [f"{common.shorten_list(sorted(folders), 4)} -> {file}"
                for file, folders in folders_of.items() if len(folders) > 1]
    if unclear:
        raise common.UserError(f"expected one file below --video_root {root} for a name, found "
                               f"{common.shorten_list(unclear)}; write folders into the paths, or "
                               f"keep the folders on disk as the paths have them")
    found, notes = chosen_paths(written, fits, files)
    paths = list(filter(None, found.values()))
    used = {root, *paths, *(path.parent for path in paths)}
    unused = sorted(name for name, path in videos.items() if path not in used)
    if unused:
        notes.append(f"{len(unused)} videos or folders of pictures below {root} have no row and "
                     f"are not used: {common.shorten_list(unused, 3)}")
    return found, notes
