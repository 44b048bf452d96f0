"""Annotations of parts, in their own JSON or in COCO -> one list of boxes with part and state.

Units: boxes are x1 y1 x2 y2 in pixels of the upright picture.
"""
import collections
import dataclasses
import json
import re
from pathlib import Path

import common
from readers import file_names

STATES = ("intact", "damaged", "absent", "occluded")
INTACT, ABSENT, UNKNOWN = 0, 2, -1


@dataclasses.dataclass
class Annotations:
    """What one file says, before any picture is opened."""
    path: Path
    parts: list  # every part name of the file
    images: list  # dicts: name, id, size (width, height) or None, absent (parts without a box), fields
    objects: list  # dicts: image (its index), key, part, box, state, trust, crowd
    category_ids: dict  # part -> id in a COCO file, empty for part annotations


def read_annotations(path):
    """Part annotations or a COCO file -> Annotations. UserError that lists what cannot be read, with image and key."""
    if not path.is_file():
        raise common.UserError(f"{path}: expected a JSON file of annotations, found no such file")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), strict=False, object_pairs_hook=unique_keys)
    except RecursionError:
        raise common.UserError(f"{path}: nested too deeply for annotations; is it the right file?") from None
    except ValueError as error:
        raise common.UserError(f"{path}: expected JSON, found {common.one_line(error)}. Export it again.") from None
    if not isinstance(content, dict):
        raise common.UserError(f"{path}: expected {{image: {{parts}}}} or COCO, found a {type(content).__name__}")
    found, faults = Annotations(path, [], [], [], {}), []
    (read_coco if isinstance(content.get("images"), list) else read_part_json)(content, found, faults)
    names = collections.Counter(image["name"] for image in found.images)
    faults += [f"{name!r} stands there {count} times" for name, count in names.items() if count > 1]
    refuse(faults, f"{path}: cannot be read:", "Correct these entries.")
    if not found.images:
        raise common.UserError(f"{path}: expected annotated images, found none in {len(content)} entries")
    return found


def refuse(faults, what, remedy):
    """UserError that counts the faults and shows the first ten; nothing where there are none."""
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise common.UserError(f"{what} {'; '.join(map(clean, faults[:10]))}{more}. {remedy}")


def unique_keys(pairs):
    """JSON object whose keys are all different: the second of two equal ones would be lost without a word."""
    twice = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} twice in one object")
    return dict(pairs)


def clean(text):
    """Text without control characters and outer blanks; numbers become text."""
    return "".join(c for c in str(text) if c.isprintable()).strip()


def read_number(value):
    """A finite JSON number as float, else None; true and text are no numbers."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e9 else None


def read_state(values, where, faults):
    """State number that these fields (text or 0 to 3) agree on, UNKNOWN where all are blank."""
    found = set()
    for value in values:
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        text = clean(value).lower() if value is not None else ""
        number = STATES.index(text) if text in STATES else int(text) if re.fullmatch("[0-9]{1,3}", text) else None
        if text not in ("", "unknown", "none") and (number is None or number >= len(STATES) or isinstance(value, bool)):
            faults.append(f"{where}: state {str(value)[:30]!r} is none of {', '.join(STATES)} or 0 to 3"
                          f"{common.closest(text, STATES)}")
        elif number is not None:
            found.add(number)
    if len(found) > 1:
        faults.append(f"{where}: its fields name different states: {', '.join(STATES[k] for k in sorted(found))}")
    return found.pop() if found else UNKNOWN


def read_size(fields, where, faults):
    """(width, height) in pixels, or None where the file does not say."""
    if fields.get("width") is None and fields.get("height") is None:
        return None
    size = [read_number(fields.get(name)) for name in ("width", "height")]
    if None in size or min(size) < 1:
        faults.append(f"{where}: width {fields.get('width')!r}, height {fields.get('height')!r} are no picture size")
        return None
    return round(size[0]), round(size[1])


def read_box(values, where, faults):
    """[x1, y1, x2, y2] of four numbers left, top, width, height; None, and a fault, where they are none."""
    numbers = [read_number(value) for value in values]
    if len(numbers) != 4 or None in numbers:
        faults.append(f"{where}: expected a box of four numbers, found {str(values)[:60]}")
        return None
    left, top, width, height = numbers
    return [left, top, left + width, top + height]


def add_object(found, image, key, part, box, state, trust, crowd):
    """Append one object; an absent part whose box is missing or zero becomes a part without a box."""
    if part not in found.parts:
        found.parts.append(part)
    if state == ABSENT and (box is None or box[2] <= box[0] or box[3] <= box[1]):
        found.images[image]["absent"].append(part)
    else:
        found.objects.append({"image": image, "key": key, "part": part, "box": box, "state": state, "trust": trust,
                              "crowd": crowd})


def read_part_json(content, found, faults):
    """{image: {image: {height, width}, parts: {part: {absolute_bounding_box, object_state, trust}}}}."""
    for name, entry in content.items():
        parts = entry.get("parts") if isinstance(entry, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(fields, dict) for fields in parts.values()):
            faults.append(f"{clean(name)!r}: expected an object with parts")
            continue
        fields = entry.get("image") if isinstance(entry.get("image"), dict) else {}
        found.images.append({"name": clean(name), "id": len(found.images), "size": read_size(fields, name, faults),
                             "absent": [], "fields": {**entry, **fields}})
        for part, fields in parts.items():
            where, box = f"{clean(name)!r}, {clean(part)}", fields.get("absolute_bounding_box")
            state = read_state([fields.get("object_state"), fields.get("object_state_class")], where, faults)
            if box is not None or state != ABSENT:
                sides = [box.get(side) for side in ("left", "top", "width", "height")] if isinstance(box, dict) else []
                box = read_box(sides, where, faults)
            trust = read_trust(fields, where, faults)
            add_object(found, len(found.images) - 1, clean(part), clean(part), box, state, trust, False)


def read_trust(fields, where, faults):
    """Trust of the annotators in 0..1; 1 where it is missing."""
    trust = read_number(fields.get("trust", 1.0) if fields.get("trust") is not None else 1.0)
    if trust is None:
        faults.append(f"{where}: trust {fields['trust']!r} is no number")
    return 1.0 if trust is None else trust


def read_records(content, key, faults):
    """{id: record} of one list of a COCO file; ids are numbers or text, from 0 or with gaps."""
    records, listed = {}, content.get(key)
    if not isinstance(listed, list):
        faults.append(f"expected a list {key!r}, found {type(listed).__name__}")
        return records
    for place, record in enumerate(listed):
        own = record.get("id", f"{key} {place}" if key == "annotations" else None) if isinstance(record, dict) else None
        if isinstance(own, bool) or not isinstance(own, (int, str)):
            faults.append(f"{key}[{place}]: expected an object with an id, found {str(record)[:60]}")
        elif own in records:
            faults.append(f"{key}[{place}]: the id {own!r} is used twice")
        else:
            records[own] = record
    return records


def read_coco(content, found, faults):
    """images, annotations, categories; state in state, state_id or attributes.state, or nowhere."""
    categories, images = ({own: record for own, record in read_records(content, key, faults).items()}
                          for key in ("categories", "images"))
    found.category_ids = {clean(category.get("name", "")): own for own, category in categories.items()}
    found.parts = list(found.category_ids)
    if len(found.parts) < len(categories) or "" in found.parts:
        faults.append(f"categories: expected different names, found {', '.join(found.parts)}")
    place = {}
    for own, image in images.items():
        place[own] = len(found.images)
        if not clean(image.get("file_name", "")):
            faults.append(f"image {own!r}: no file_name")
        absent = image.get("absent_parts") if isinstance(image.get("absent_parts"), list) else []
        found.images.append({"name": clean(image.get("file_name", "")), "id": own, "fields": image,
                             "size": read_size(image, f"image {own!r}", faults), "absent": [clean(p) for p in absent]})
    for own, fields in read_records(content, "annotations", faults).items():
        read_coco_annotation(own, fields, place, categories, found, faults)


def read_coco_annotation(own, fields, place, categories, found, faults):
    """One entry of annotations."""
    where, ids = f"annotation {own!r}", [fields.get("image_id"), fields.get("category_id")]
    unknown = [f"{key} {value!r}" for key, value, known in zip(("image_id", "category_id"), ids, (place, categories))
               if not isinstance(value, (int, str)) or value not in known]
    if unknown:
        return faults.append(f"{where}: unknown {' and '.join(unknown)}")
    attributes = fields.get("attributes") if isinstance(fields.get("attributes"), dict) else {}
    where = f"{found.images[place[ids[0]]]['name']!r}, {where}"
    box = read_box(fields["bbox"] if isinstance(fields.get("bbox"), list) else [], where, faults)
    state = read_state([fields.get("state"), fields.get("state_id"), attributes.get("state")], where, faults)
    add_object(found, place[ids[0]], f"annotation {own}", clean(categories[ids[1]].get("name", "")), box, state,
               read_trust(fields, where, faults), fields.get("iscrowd") in (1, "1", "true"))


def find_pictures(found, folder):
    """(path of each image or None, names of the files without an entry); names that leave the folder are refused."""
    paths, unused = file_names.match_images([image["name"] for image in found.images], folder)
    root = Path(folder).resolve()
    leaving = [image["name"] for image, path in zip(found.images, paths) if path and root not in path.resolve().parents]
    refuse(leaving, f"{found.path}: these links lead out of {folder}:", "Copy the pictures into the folder.")
    if not any(paths):
        raise common.UserError(f"none of the {len(paths)} pictures named in {found.path} is in {folder} (first: "
                               f"{found.images[0]['name']!r}); check the folder")
    return paths, unused
