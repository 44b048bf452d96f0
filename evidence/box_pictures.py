"""Pictures with boxes drawn on them: what was annotated, what was detected, and both side by side.

Letters: H, W height and width in pixels, K boxes.
"""
import io

import numpy as np

import common
from readers import part_boxes

STATE_COLOURS = (
    (0, 158, 115),  # intact
    (213, 94, 0),  # damaged
    (204, 121, 167),  # absent
    (0, 114, 178),  # occluded
    (110, 110, 110),  # no state
)
LEGEND = "Green intact, orange damaged, pink absent, blue occluded, grey no state"
LONG_SIDE = 640  # of a drawn picture, in pixels
FRAME = 2
FONT_SIZE = 12
GAP = 12  # between the pictures of a sheet


def draw_boxes(pixels, size, boxes, texts, states):
    """Picture (H, W, 3) scaled to LONG_SIDE, with a frame in the colour of its state and a text at
    every box.

    size: (width, height) of the picture in the pixels that the boxes (K, 4) are given in.
    """
    from PIL import Image, ImageDraw, ImageFont
    height, width = pixels.shape[:2]
    scale = LONG_SIDE / max(height, width)
    picture = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)))
    scaled = boxes * (width * scale / size[0])
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_SIZE)
    placed = []
    for k in np.argsort(scaled[:, 1], kind="stable"):
        left, top, right, bottom = scaled[k].tolist()
        colour = STATE_COLOURS[states[k]]
        frame = [left, top, max(left, right), max(top, bottom)]
        draw.rectangle(frame, outline=colour, width=FRAME)
        text_width, text_height = draw.textbbox((0, 0), texts[k], font=font)[2:]
        x = min(left, picture.width - text_width - 4)
        y = max(0, top - text_height - 4)
        y = free_height(x, y, text_width, text_height, placed, picture.height)
        placed.append((x, y, text_width))
        draw.rectangle([x, y, x + text_width + 4, y + text_height + 3], fill=colour)
        draw.text((x + 2, y), texts[k], fill="white", font=font)
    return np.asarray(picture)


def free_height(x, y, width, height, placed, picture_height):
    """The first y from here on at which a label hides none of those placed: (x, y, width) each."""
    below = [other_y for other_x, other_y, other in placed if abs(x - other_x) < max(width, other)]
    while y + 2 * height < picture_height and any(abs(y - other) < height + 3 for other in below):
        y += height + 4
    return y


def draw_detections(pixels, size, detected, parts, threshold):
    """The Detections from `threshold` on a picture (H, W, 3) of `size`, with part, state and score.
    """
    detected = detected.take(detected.scores >= threshold)
    states = detected.called()
    texts = [f"{label_text(parts[label], state)} {score:.2f}"
             for label, state, score in zip(detected.labels, states, detected.scores)]
    return draw_boxes(pixels, size, detected.boxes, texts, states)


def draw_truth(pixels, truth, row):
    """The annotated boxes on the picture (H, W, 3) of a row of a PartTruth; ignored ones are left
    out.
    """
    keep = ~truth.ignored[row]
    labels = truth.labels[row][keep]
    states = truth.states[row][keep]
    texts = [label_text(truth.parts[label], state) for label, state in zip(labels, states)]
    return draw_boxes(pixels, truth.sizes[row], truth.boxes[row][keep], texts, states)


def label_text(part, state):
    """Name of a part, and its state where it has one."""
    return part if state == part_boxes.UNKNOWN else f"{part} {part_boxes.STATES[state]}"


def write_picture(path, pixels):
    """JPEG of uint8 (H, W, 3)."""
    from PIL import Image
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=85)
    common.write_whole(path, packed.getvalue())


def write_sheet(path, truth, detections, picture, rows, threshold):
    """Contact sheet: in each line a picture with its annotated boxes (left) and what was detected
    (right).

    picture: function of a row -> uint8 (H, W, 3).
    """
    lines = []
    for row in rows:
        pixels = picture(row)
        left = draw_truth(pixels, truth, row)
        right = draw_detections(pixels, truth.sizes[row], detections[row], truth.parts, threshold)
        gap = np.full((len(left), GAP, 3), 255, np.uint8)
        lines.append(np.concatenate([left, gap, right], axis=1))
    width = max(line.shape[1] for line in lines)
    padded = []
    for line in lines:
        margins = ((0, GAP), (0, width - line.shape[1]), (0, 0))
        padded.append(np.pad(line, margins, constant_values=255))
    write_picture(path, np.concatenate(padded))
