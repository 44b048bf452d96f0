"""Annotations of parts, in their own JSON or in COCO -> one list of boxes with part and state.

Part annotations become COCO first, so that one reader reads both. Letters: N pictures, K
boxes of one picture, P parts. Units: boxes are x1 y1 x2 y2 in pixels of the upright
picture; in a file left, top, width, height.
"""
import collections
import dataclasses
import itertools
import os
import re
from pathlib import Path

import numpy as np

import common
from readers import csv_tables, file_names, picture_files

STATES = "intact damaged absent occluded".split()
ABSENT = 2
UNKNOWN = -1
# what a file may write -> number: "damaged" and "1" are 1
STATE_NUMBERS = {word: number for number, state in enumerate(STATES) for word in (state, str(number))}
NO_STATE = ("", "unknown", "none", "undefined", "__undefined__")  # the last is what CVAT writes
BOX_FORMATS = "xywh xyxy cxcywh fractions".split()
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
SIDE_WORD = re.compile("(?<![a-z])(left|right)(?![a-z])")
SIDE_LETTER = re.compile("(?<![a-z])(l|r)(?![a-z])")
ROBOFLOW_VERSION = re.compile(r"\.rf\.\w{16,}(?=\.\w+$)")  # goat_jpg.rf.1b8f0c....jpg, of which there may be several
OVER_EDGE = 3  # pixels by which a box may leave its picture before its convention is doubted


@dataclasses.dataclass
class AnnotatedImage:
    name: str
    id: object  # number or text, as the file writes it
    size: tuple | None  # (width, height) in pixels, None where neither file nor picture says
    absent: dict  # part that is absent and has no box -> trust of the annotators
    fields: dict  # all that the file says of the image
    objects: list = dataclasses.field(default_factory=list)  # of PartObject
    origin: str = ""  # train, val or test: the split whose file names it
    path: Path | None = None  # of its picture, once it is found


@dataclasses.dataclass
class PartObject:
    key: str  # what a message calls it: the part's name, or its annotation in a COCO file
    part: str
    box: list  # x1, y1, x2, y2
    state: int  # index of STATES, or UNKNOWN
    trust: float  # of the annotators, 0 to 1
    crowd: bool
    attributes: dict  # as the file has them
    fields: dict = dataclasses.field(compare=False)  # all that the file says of it


@dataclasses.dataclass
class Annotations:
    """What one file says, before any picture is opened."""
    path: Path
    images: list  # of AnnotatedImage
    category_ids: dict  # every part of the file -> its id there
    skipped: list  # dicts of image, annotation and reason
    notes: list


@dataclasses.dataclass
class Reading:
    """How a file is read, and what is noticed on the way."""
    box_format: str  # one of BOX_FORMATS
    state_attribute: str  # in lower case
    has_states: bool = False  # whether any box has it
    faults: list = dataclasses.field(default_factory=list)  # each stops the run
    skipped: list = dataclasses.field(default_factory=list)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # of what was put right


@dataclasses.dataclass(kw_only=True)
class PartTruth:
    """Annotated boxes of N pictures: what is trained on and what detections are judged against."""
    parts: list  # P names; labels count from 0
    images: np.ndarray  # (N,) text
    ids: list  # N ids as their file writes them
    sizes: np.ndarray  # (N, 2) width and height in pixels
    boxes: list  # N of (K, 4) float32
    labels: list  # N of (K,) int64
    states: list  # N of (K,) int64, UNKNOWN where there is none
    ignored: list  # N of (K,) bool, True = a crowd or not trusted: not judged; in training background
    absent: list  # N of int64 arrays: labels of the parts said to be absent without a box
    groups: np.ndarray | None  # (N,) text
    keeps_absent: bool = True  # False: boxes of absent parts are background

    def shown(self, row):
        """(K,) bool, False = a box of an absent part that is background."""
        return self.keeps_absent | (self.states[row] != ABSENT)

    def judged(self, row):
        """(K,) bool, True = trained on and judged."""
        return self.shown(row) & ~self.ignored[row]

    def relative(self, row):
        """Judged boxes of a picture -> (boxes (K, 4) in 0..1 of its sides, labels (K,), states (K,))."""
        judged = self.judged(row)
        boxes = self.boxes[row][judged] / np.tile(self.sizes[row], 2)
        return boxes, self.labels[row][judged], self.states[row][judged]

    def judged_states(self):
        """States of all judged boxes, UNKNOWN where there is none."""
        return np.concatenate([states[self.judged(row)] for row, states in enumerate(self.states)])

    def has_states(self):
        """Whether any judged box has a state; else this is plain detection."""
        return (self.judged_states() >= 0).any()

    def parts_without_state(self):
        """Names of the parts of which no judged box has a state."""
        labels = np.concatenate([labels[self.judged(row)] for row, labels in enumerate(self.labels)])
        return np.delete(self.parts, labels[self.judged_states() >= 0]).tolist()

    def take(self, rows):
        """The PartTruth of chosen pictures."""
        lists = "ids boxes labels states ignored absent".split()
        return dataclasses.replace(
            self,
            images=self.images[rows],
            sizes=self.sizes[rows],
            groups=None if self.groups is None else self.groups[rows],
            **{name: [getattr(self, name)[row] for row in rows] for name in lists})


def read_annotations(path, box_format=None, state_attribute=None):
    """Part annotations or a COCO file -> Annotations.

    UserError that lists what cannot be read, with image and key.

    box_format: one of BOX_FORMATS, None for xywh; state_attribute: the attribute that
    names the state, None: state.
    """
    content = common.read_json(path, common.unique_keys)
    if not isinstance(content, dict):
        raise common.UserError(f"{path}: expected {{image: {{parts}}}} or COCO, found a {type(content).__name__}")
    reading = Reading(box_format or "xywh", (state_attribute or "state").lower())
    coco = content if isinstance(content.get("images"), list) else parts_as_coco(content, reading.faults)
    found = read_coco(path, coco, reading)
    names = collections.Counter(image.name for image in found.images)
    reading.faults += [f"{name!r} is listed {count} times" for name, count in names.items() if count > 1]
    refuse(reading.faults, f"{path}: cannot be read as {{image: {{parts}}}} or COCO:",
           "Correct these entries, or export a file of another format as COCO.")
    if not found.images:
        raise common.UserError(f"{path}: expected annotated images, found none in {len(content)} entries")
    if state_attribute and not reading.has_states:
        raise common.UserError(f"--state_attribute {state_attribute}: no box in {path} has it. {' '.join(found.notes)}")
    return found


def refuse(faults, what, remedy):
    """UserError that counts the faults and shows the first ten; nothing where there are none."""
    if faults:
        raise common.UserError(f"{what} {common.shorten_list(map(clean, faults))}. {remedy}")


def clean(text):
    """Text without control characters and outer blanks; numbers become text."""
    return "".join(c for c in str(text) if c.isprintable()).strip()


# --------------------------------------------------------------------------------------
# Part annotations -> COCO
# --------------------------------------------------------------------------------------

def parts_as_coco(content, faults):
    """{image: {image: {height, width}, parts: {part: {absolute_bounding_box, object_state, trust}}}} -> COCO.

    Each annotation has the part's name as its `entry`, so that messages name what the user wrote. A
    part that is absent may have no bbox.
    """
    images = []
    annotations = []
    category_ids = {}
    for name, entry in content.items():
        parts = entry.get("parts") if isinstance(entry, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            faults.append(f"{clean(name)!r}: expected an object with parts")
            continue
        fields = {key: value for key, value in entry.items() if key not in ("image", "parts")}
        fields |= read_attributes(entry.get("image"))
        number = len(images)
        images.append({**fields, "id": number, "file_name": name})
        for part, written in parts.items():
            part = clean(part)
            box = written.get("absolute_bounding_box")
            if isinstance(box, dict):
                box = [box.get(side) for side in ("left", "top", "width", "height")]
            annotations.append({
                **written,
                "id": len(annotations) + 1,
                "entry": part,
                "image_id": number,
                "category_id": category_ids.setdefault(part, len(category_ids) + 1),
                "bbox": box,
                "state": written.get("object_state"),
                "state_id": written.get("object_state_class")})
    return coco_content(images, annotations, category_ids)


def coco_content(images, annotations, category_ids):
    """What a COCO file holds; category_ids: {part: id}."""
    categories = [{"id": own, "name": part} for part, own in category_ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


# --------------------------------------------------------------------------------------
# COCO -> Annotations
# --------------------------------------------------------------------------------------

def read_coco(path, content, reading):
    """images, annotations, categories -> Annotations; what cannot be read is appended to reading.faults."""
    categories = read_records(content, "categories", reading)
    parts = {category_id: clean(category.get("name", "")) for category_id, category in categories.items()}
    if "" in parts.values():
        reading.faults.append(f"categories: expected names, found {', '.join(parts.values())}")
    category_ids = {part: categories[category_id]["id"] for category_id, part in parts.items()}
    reading.counts["categories share a name and are one part"] = len(parts) - len(category_ids)
    images = {image_id: read_image(fields, reading)
              for image_id, fields in read_records(content, "images", reading).items()}
    unused = collections.defaultdict(collections.Counter)  # attribute -> how often each value
    for annotation_id, fields in read_records(content, "annotations", reading).items():
        image = images.get(read_id(fields.get("image_id")))
        category_id = read_id(fields.get("category_id"))
        found = read_object(annotation_id, fields, image, parts.get(category_id), reading)
        if found is None:
            continue
        category_ids[found.part] = categories[category_id]["id"]  # where categories share a name: one that a box uses
        for name, value in found.attributes.items():
            if name.lower() != reading.state_attribute:
                unused[name][str(value)] += 1
        if found.state == ABSENT and (found.box is None or cut_box(found.box, None) is None):
            image.absent[found.part] = found.trust
        else:
            image.objects.append(found)
    notes = [f"{count} {text}" for text, count in reading.counts.items() if count]
    for name, counts in unused.items():
        values = ", ".join(f"{value} {count}" for value, count in counts.most_common(4))
        notes.append(f"the attribute {name} of the boxes was not used: {values} (--state_attribute)")
    return Annotations(
        path=path,
        images=list(images.values()),
        category_ids=category_ids,
        skipped=reading.skipped,
        notes=notes)


def read_id(value):
    """The text of an id, which is a number or text: 0, '0' and 0.0 are one id; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, str) else None  # a bool is none


def read_records(content, key, reading):
    """{read_id of its id: record} of one list of a COCO file; ids are numbers or text, from 0 or with gaps.

    A record that equals the first of its id counts once, and so do equal annotations without one;
    other annotations whose ids repeat get new ones.
    """
    listed = content.get(key)
    if not isinstance(listed, list):
        reading.faults.append(f"expected a list {key!r}, found {type(listed).__name__}")
        return {}
    records = {}
    nameless = {}  # annotation without an id -> what stands for it
    for place, record in enumerate(listed):
        if not isinstance(record, dict):
            reading.faults.append(f"{key}[{place}]: expected an object, found {str(record)[:60]}")
            continue
        record_id = record.get("id")
        if record_id is None and key == "annotations":
            record_id = nameless.setdefault(str(record), f"number {place}")
        record_id = read_id(record_id)
        if record_id is None:
            reading.faults.append(f"{key}[{place}]: expected an id, a number or text, found {str(record)[:60]}")
        elif record_id not in records:
            records[record_id] = record
        elif records[record_id] == record or (
                key == "categories" and records[record_id].get("name") == record.get("name")):
            reading.counts[f"{key} are listed more than once"] += 1
        elif key == "annotations":
            records[f"{record_id} (number {place})"] = record
            reading.counts["annotations have an id that another one has"] += 1
        else:
            reading.faults.append(f"{key}[{place}]: the id {record_id!r} is used twice")
    return records


def read_image(fields, reading):
    """One entry of images -> AnnotatedImage."""
    image_id = fields["id"]
    name = clean(fields.get("file_name", ""))
    if not name:
        reading.faults.append(f"image {image_id!r}: no file_name")
    where = f"image {image_id!r} ({name})"
    absent = fields.get("absent_parts")
    if isinstance(absent, list):
        absent = dict.fromkeys(map(clean, absent))
    absent = read_attributes(absent)
    return AnnotatedImage(
        name=name,
        id=image_id,
        size=read_size(fields, where, reading),
        absent={clean(part): read_trust(trust, where, reading.faults) for part, trust in absent.items()},
        fields=fields)


def read_object(annotation_id, fields, image, part, reading):
    """One entry of annotations -> PartObject; None where its image or part is unknown (None), or it has no box.

    The state stands in state, state_id or an attribute, or nowhere.
    """
    is_coco = "entry" not in fields  # the field that part annotations and results are given here
    key = clean(fields.get("entry", f"annotation {annotation_id}"))
    ids = fields.get("image_id"), fields.get("category_id")
    name = image.name if image else ""
    reading.counts["ids are text or have a fraction"] += sum(
        type(value) is not int and read_number(value) is not None for value in ids)  # the name img_7 is sound
    if image is None or part is None:
        reason = f"image_id {ids[0]!r} or category_id {ids[1]!r} is unknown"
        if None in ids and is_coco:
            reading.skipped.append({"image": name, "annotation": key, "reason": reason})
        else:
            reading.faults.append(f"{key}: {reason}")
        return None
    where = f"{name!r}, {key}"
    attributes = read_attributes(fields.get("attributes"))
    named = [*attributes.items(), *fields.items()]
    states = [value for attribute, value in named if attribute.lower() == reading.state_attribute]
    reading.has_states |= bool(states)
    if reading.state_attribute == "state":
        states.append(fields.get("state_id"))
    state = read_state(states, where, reading.faults)
    box = fields.get("bbox")
    if not box and is_coco:
        box = box_of_polygons(fields.get("segmentation"), reading)
    elif box is not None or state != ABSENT:  # an absent part may lack its box
        box = read_box(box, where, reading, image.size)
    if box is None and state != ABSENT:
        reading.skipped.append({"image": name, "annotation": f"{key} ({part})", "reason": "no box"})
        return None
    return PartObject(
        key=key,
        part=part,
        box=box,
        state=state,
        trust=read_trust(fields.get("trust"), where, reading.faults),
        crowd=fields.get("iscrowd") in (1, "1", "true"),
        attributes=attributes,
        fields=fields)


def read_number(value):
    """A finite JSON number, or one written as text, as float, else None; true is no number."""
    if isinstance(value, str) and csv_tables.NUMBER.fullmatch(value.strip()):
        value = float(value)
    is_number = type(value) in (int, float) and abs(value) < 1e9
    return float(value) if is_number else None


def read_size(fields, where, reading):
    """(width, height) in pixels, or None where the file does not say, or says 0."""
    written = fields.get("width"), fields.get("height")
    if written == (None, None):
        return None
    size = list(map(read_number, written))
    if size == [0, 0]:
        reading.counts["images have the size 0, which is read from the pictures"] += 1
        return None
    if None in size or min(size) < 1:
        reading.faults.append(f"{where}: width {written[0]!r}, height {written[1]!r} are no picture size")
        return None
    return tuple(map(round, size))


def read_attributes(written):
    """{name: value} of an object, or of a list of {name, value}."""
    if isinstance(written, list):
        written = {str(each.get("name")): each.get("value") for each in written if isinstance(each, dict)}
    return written if isinstance(written, dict) else {}


def box_of_polygons(polygons, reading):
    """[x1, y1, x2, y2] round polygons [[x, y, x, y, ...], ...]; None where there is none."""
    try:
        points = np.array(sum(polygons, []), float).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return None
    if len(points) < 3 or not np.isfinite(points).all():
        return None
    reading.counts["boxes are drawn round their polygons"] += 1
    return [*points.min(0).tolist(), *points.max(0).tolist()]


def to_corners(x, y, third, fourth, box_format, size=None):
    """Four numbers of a box (or arrays of them) in one of BOX_FORMATS -> [x1, y1, x2, y2]; size: of its picture."""
    if box_format == "xyxy":
        return [x, y, third, fourth]
    if box_format == "cxcywh":
        x = x - third / 2
        y = y - fourth / 2
    corners = [x, y, x + third, y + fourth]
    if box_format == "fractions":
        return np.multiply(corners, [*size, *size]).tolist()
    return corners


def to_xywh(left, top, right, bottom):
    """Corners of a box -> [left, top, width, height]."""
    return [left, top, right - left, bottom - top]


def read_box(values, where, reading, size):
    """[x1, y1, x2, y2] of the four numbers of a box; None, and a fault, where they are none."""
    numbers = list(map(read_number, values)) if isinstance(values, list) else []
    if len(numbers) != 4 or None in numbers:
        reading.faults.append(f"{where}: expected a box of four numbers, found {str(values)[:60]}")
        return None
    reading.counts["boxes have numbers written as text"] += str in map(type, values)
    if reading.box_format == "fractions" and size is None:
        reading.faults.append(f"{where}: a box in fractions needs width and height of its image")
        return None
    return to_corners(*numbers, reading.box_format, size)


def read_state(values, where, faults):
    """State number that these fields (text or 0 to 3) agree on, UNKNOWN where all are blank."""
    found = set()
    for value in values:
        text = clean(value).lower().removesuffix(".0")
        if text in STATE_NUMBERS:
            found.add(STATE_NUMBERS[text])
        elif text not in NO_STATE:
            faults.append(
                f"{where}: state {str(value)[:30]!r} is none of {', '.join(STATES)} or 0 to 3"
                f"{common.did_you_mean(text, STATES)}; a part can have others in its name (ear_up)")
    if len(found) > 1:
        named = ", ".join(STATES[state] for state in sorted(found))
        faults.append(f"{where}: its fields name different states: {named}")
    return found.pop() if found else UNKNOWN


def read_trust(value, where, faults):
    """Trust of the annotators in 0..1; 1 where it is missing."""
    if value is None:
        return 1.0
    trust = read_number(value)
    if trust is None or not 0 <= trust <= 1:
        faults.append(f"{where}: trust {value!r} is no number from 0 to 1")
    return trust


def refuse_other_convention(images, path, box_format, way="Say which: --box_format"):
    """UserError where boxes, read as left, top, width, height, look like those of another of BOX_FORMATS.

    images: AnnotatedImages; box_format: what the flag says; where it is given, nothing is refused;
    way: what to do, up to the name of a convention. One of these signs is enough: no number is
    above 1; more than a tenth of the boxes leave their picture, and half as many at most in another
    convention; the areas in the file are those of corners alone.
    """
    known = [[*each.box, *image.size, read_number(each.fields.get("area"))]
             for image in images if image.size for each in image.objects if any(each.box)]
    if box_format or not known:
        return
    *corners, width, height, area = np.array(known, float).T  # each (K,)
    written = np.array(to_xywh(*corners))
    size = np.array([width, height])
    n_outside = {}
    n_area = {}
    for tried in ("xywh", "xyxy", "cxcywh"):
        first, last = np.reshape(to_corners(*written, tried), (2, 2, -1))  # (2, K) x and y of two corners
        is_inside = (first >= -OVER_EDGE) & (last <= size + OVER_EDGE) & (last >= first)
        n_outside[tried] = np.sum(~is_inside.all(0))
        n_area[tried] = np.sum(np.isclose((last - first).prod(0), area, rtol=0.01))
    likeliest = min(n_outside, key=n_outside.get)
    if np.abs(written).max() <= 1:
        likeliest = "fractions"
        why = "no number is above 1. Shares are of left, top, width, height: convert YOLO's, which are of centres"
    elif n_outside["xywh"] > 0.1 * len(known) and n_outside[likeliest] <= n_outside["xywh"] / 2:
        why = f"{n_outside['xywh']} of {len(known)} leave their picture, read as {likeliest} {n_outside[likeliest]}"
    elif n_area["xyxy"] > 0.9 * len(known) and n_area["xywh"] < 0.1 * len(known):
        likeliest = "xyxy"
        why = f"the area in the file is that of x1 y1 x2 y2 for {n_area['xyxy']} of {len(known)}"
    else:
        return
    raise common.UserError(
        f"{path}: the boxes look like {likeliest}, not like left, top, width, height (COCO): "
        f"{why}. {way} {likeliest}, or xywh to keep them.")


def cut_box(box, size):
    """(4,) x1, y1, x2, y2 within a picture of this (width, height), None = unknown; None where no area is left."""
    corners = np.array(box, float)
    if size is not None:
        corners = corners.clip(0, [*size, *size])
    return corners if (corners[2:] - corners[:2]).min() >= 0.5 else None


def cut_boxes(images):
    """AnnotatedImages -> (a list for each of its PartObjects, cut to the picture; dicts of those left out, which have
    no area in it; how many were cut). An absent part without area goes to the image's `absent` instead.
    """
    kept = []
    skipped = []
    n_cut = 0
    for image in images:
        kept.append([])
        for each in image.objects:
            box = cut_box(each.box, image.size)
            if box is not None:
                n_cut += not np.allclose(box, each.box, atol=1)
                kept[-1].append(dataclasses.replace(each, box=box))
            elif each.state == ABSENT and not each.crowd:
                image.absent.setdefault(each.part, each.trust)
            else:
                shown = " ".join(f"{value:g}" for value in each.box)
                skipped.append({
                    "image": image.name,
                    "annotation": f"{each.key} ({each.part})",
                    "reason": f"box {shown} has no area in its picture"})
    return kept, skipped, n_cut


# --------------------------------------------------------------------------------------
# Annotations -> COCO
# --------------------------------------------------------------------------------------

def number_parts(parts, category_ids):
    """{part: its id} as a COCO file has it; parts that it lacks get the smallest free ids from 1."""
    free = (number for number in itertools.count(1) if number not in category_ids.values())
    return {part: category_ids[part] if part in category_ids else next(free) for part in parts}


def as_coco(found_images, category_ids, folder):
    """AnnotatedImages -> (clean COCO with area, iscrowd, state and trust; dicts of the boxes without area, left out).

    category_ids: {part: its id}; folder: of the pictures, whose paths within it are then the names.
    """
    images = []
    annotations = []
    kept, dropped, _ = cut_boxes(found_images)
    for image, objects in zip(found_images, kept):
        name = image.path.relative_to(folder).as_posix() if image.path else image.name
        images.append({**image.fields, "file_name": name, "absent_parts": image.absent})
        if image.size:
            images[-1] |= zip(("width", "height"), image.size)
        for each in objects:
            box = to_xywh(*each.box.tolist())
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": image.id,
                "category_id": category_ids[each.part],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(each.crowd),
                "trust": each.trust})
            if each.state != UNKNOWN:
                annotations[-1] |= {"state": STATES[each.state], "state_id": each.state}
            if each.attributes:
                annotations[-1]["attributes"] = each.attributes
    return coco_content(images, annotations, category_ids), dropped


# --------------------------------------------------------------------------------------
# Annotations -> arrays
# --------------------------------------------------------------------------------------

def read_groups(images, column, notes):
    """(N,) group of each image: what its entry has under `column`.

    Where that is None: the picture of which it is a version (turned, lighter ...) by Roboflow's
    names, which a note says; None where no picture has two versions.
    """
    if column is None:
        originals = [ROBOFLOW_VERSION.sub("", image.name) for image in images]
        if len(set(originals)) == len(images):
            return None
        notes.append("versions of one picture, by Roboflow's names (.rf.), are one group; where "
                     "these are other pictures: --group_column file_name")
        return np.array(originals)
    values = [image.fields.get(column) for image in images]
    lacking = [image.name for image, value in zip(images, values) if value in (None, "")]
    refuse(lacking, f"--group_column {column}: missing in {len(lacking)} of {len(images)} images:",
           f"Fill it, or name another of {', '.join(images[0].fields)}.")
    return np.array(list(map(str, values)))


def as_truth(images, parts, min_trust, **others):
    """AnnotatedImages with a size -> (PartTruth, dicts of the boxes that were skipped, notes).

    others: groups and keeps_absent of the PartTruth. Boxes are cut to their picture; those without
    area there are skipped by name, those that annotators trusted less than min_trust are ignored.
    """
    kept, skipped, n_cut = cut_boxes(images)
    truth = PartTruth(
        parts=parts,
        images=np.array([image.name for image in images]),
        ids=[image.id for image in images],
        sizes=np.array([image.size for image in images]),
        boxes=[np.array([each.box for each in row], np.float32).reshape(-1, 4) for row in kept],
        labels=[np.array([parts.index(each.part) for each in row], np.int64) for row in kept],
        states=[np.array([each.state for each in row], np.int64) for row in kept],
        ignored=[np.array([each.crowd or each.trust < min_trust for each in row], bool)
                 for row in kept],
        absent=[np.array([parts.index(part) for part, trust in image.absent.items()
                          if part in parts and trust >= min_trust], int)
                for image in images],
        **others)
    used = [each for row in kept for each in row]
    counts = {
        "boxes reached over the edge and were cut": n_cut,
        "crowd boxes are ignored": sum(each.crowd for each in used),
        f"boxes are trusted less than {min_trust:g} and ignored":
            sum(each.trust < min_trust for each in used),
        "pictures have over 100 boxes; a detector here lists 100 of a picture at most, and AP counts 100 of a part":
            sum(len(row) > 100 for row in kept)}
    return truth, skipped, [f"{count} {text}" for text, count in counts.items() if count]


# --------------------------------------------------------------------------------------
# Annotations -> pictures
# --------------------------------------------------------------------------------------

def find_pictures(found, folder, exact_names):
    """Give the images of Annotations their paths; those without a picture are skipped.

    Links out of the folder are refused.
    """
    names = [image.name for image in found.images]
    paths, _, notes = file_names.match_images(names, folder, exact_names)
    for image in found.images:
        image.path = paths[image.name]
    found.notes += notes
    found.skipped += [{"image": image.name, "reason": "no such picture"} for image in found.images if not image.path]
    found.images = [image for image in found.images if image.path]
    if not found.images:
        raise common.UserError(f"none of the {len(names)} pictures named in {found.path} is in "
                               f"{folder} (first: {names[0]!r}); check the folder")
    root = folder.resolve()
    leaving = [image.name for image in found.images if root not in Path(os.path.realpath(image.path)).parents]
    refuse(leaving, f"{found.path}: these links lead out of {folder}:", "Copy the pictures into the folder.")


def without_entry(folders, images):
    """Dicts of the pictures in these folders that no file names; images: of all files, after find_pictures."""
    named = {os.path.realpath(image.path) for image in images}
    names = {os.path.realpath(path): name
             for folder in folders for name, path in file_names.images_by_name(folder).items()}
    return [{"image": name, "reason": "no entry in the annotations"}
            for path, name in names.items() if path not in named]


def check_pictures(audits, images, on_bad_file):
    """Places of the usable pictures, whose images get their size; dicts of the others.

    Where a picture has another size than annotated, the boxes would not fit.
    """
    for found, image in zip(audits, images):
        size = found.width, found.height
        annotated = image.size or size
        if not found.error and np.abs(np.subtract(size, annotated)).max() > 1:
            found.error = "is {} x {} pixels (EXIF applied), annotated as {} x {}".format(*size, *annotated)
        image.size = size
    good = picture_files.check_bad_files(audits, on_bad_file)
    if not good:
        raise common.UserError(f"none of the {len(images)} pictures can be used (first: {audits[0].error})")
    bad = [{"image": image.name, "reason": found.error} for found, image in zip(audits, images) if found.error]
    return good, bad


# --------------------------------------------------------------------------------------
# Names of parts
# --------------------------------------------------------------------------------------

def used_parts(found, images, known):
    """(parts, notes): those a checkpoint knows, else those with a box, in order of appearance.

    found: Annotations of several files; images: those of theirs that are used; known:
    parts of a checkpoint, or None.
    """
    used = {each.part for image in images for each in image.objects}
    if known:
        unknown = [name + common.did_you_mean(name, known) for name in sorted(used - set(known))]
        refuse(unknown, "the checkpoint does not know these parts:",
               f"It knows {', '.join(known)}.")
        return known, []
    if not used:
        raise common.UserError(f"no box in {common.shorten_list(each.path for each in found)}: nothing to learn")
    named = dict.fromkeys(name for each in found for name in each.category_ids)
    unused = [name for name in named if name not in used]
    notes = [f"parts without a box, left out: {', '.join(unused)}"] if unused else []
    return [name for name in named if name in used], notes


def mirrored_labels(parts):
    """(P,) label of each part in a mirrored picture, where left is right.

    None: a part with a side has no counterpart. Single letters, which may mean other things
    (l_shape), are sides where one of them has a counterpart.
    """
    spelled = [re.sub("(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in parts]  # leftWheel: left_wheel

    def turned(side, names):
        return [side.sub(lambda word: SIDES[word[0]], name) for name in names]
    others = turned(SIDE_WORD, spelled)
    with_letters = turned(SIDE_LETTER, others)
    if any(other in spelled for other, name in zip(with_letters, others) if other != name):
        others = with_letters
    if not set(others) <= set(spelled):
        return None
    return np.array([label if other == spelled[label] else spelled.index(other) for label, other in enumerate(others)])
