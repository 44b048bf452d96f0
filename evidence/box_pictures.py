"""Pictures with boxes drawn on them: what was annotated, what was detected, and both side by side.

Letters: H, W height and width in pixels, K boxes.
"""
import numpy as np

from evidence import plotting
from readers import part_boxes

STATE_COLOURS = (
    plotting.GREEN,  # intact
    plotting.ORANGE,  # damaged
    plotting.PURPLE,  # absent
    plotting.BLUE,  # occluded
    "#6e6e6e",  # no state: UNKNOWN is -1, the last
)
LONG_SIDE = 640  # of a drawn picture, in pixels
FRAME = 2  # width in pixels
TEXT = 13  # height in pixels; on the page a sheet has 60 % of its size
GAP = 12  # between the pictures of a sheet


def colours_of(labels, states, n_parts):
    """K colours, as Pillow takes them: of the states, or where none is known, of the parts."""
    if (states != part_boxes.UNKNOWN).any():
        return [STATE_COLOURS[state] for state in states]
    return [f"hsv({360 * label / n_parts:.1f}, 100%, 70%)" for label in labels]


def draw_boxes(pixels, size, boxes, labels, states, parts, scores=None):
    """Pillow picture of pixels (H, W, 3), scaled to LONG_SIDE, with a frame, part, state and score at each of K boxes.

    size: (width, height) of the picture in the pixels that the boxes (K, 4) are given in.
    """
    import cv2
    from PIL import Image, ImageDraw
    scale = LONG_SIDE / max(size)
    drawn = Image.fromarray(cv2.resize(pixels, [max(1, round(side * scale)) for side in size]))
    texts = [f" {plotting.shorten_name(parts[label], 24)}" for label in labels]
    for k in np.flatnonzero(states != part_boxes.UNKNOWN):
        texts[k] += f" {part_boxes.STATES[states[k]]}"
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores)]
    colours = colours_of(labels, states, len(parts))
    corners = (boxes * scale).astype(int).tolist()
    drawing = ImageDraw.Draw(drawn)
    for box, colour in zip(corners, colours):
        drawing.rectangle(box, outline=colour, width=FRAME)
    font = plotting.picture_font(TEXT)
    for box, text, colour in zip(corners, texts, colours):  # over all frames
        extent = font.getbbox(text)[2:]
        place = np.minimum(box[:2], np.subtract(drawn.size, extent)).clip(0)  # the whole text is on the picture
        drawing.rectangle([*place, *(place + extent)], fill=colour)
        drawing.text(place, text, "white", font)
    return drawn


def draw_detections(pixels, size, detected, parts, threshold):
    """The Detections from `threshold` on a picture (H, W, 3) of `size`, with part, state and score."""
    detected = detected.take(detected.scores >= threshold)
    return draw_boxes(
        pixels, size, detected.boxes, detected.labels, detected.called(), parts, detected.scores)


def draw_truth(pixels, truth, row):
    """The annotated boxes, but for ignored ones, on the picture (H, W, 3) of a row of a PartTruth."""
    keep = ~truth.ignored[row]
    return draw_boxes(
        pixels, truth.sizes[row], truth.boxes[row][keep], truth.labels[row][keep],
        truth.states[row][keep], truth.parts)


def write_sheet(path, truth, detections, picture, rows, threshold):
    """Contact sheet: in each line a picture with its annotated boxes (left) and what was detected (right).

    picture: function of a row -> uint8 (H, W, 3).
    """
    from PIL import Image
    lines = []
    for row in rows:
        pixels = picture(row)
        left = draw_truth(pixels, truth, row)
        right = draw_detections(pixels, truth.sizes[row], detections[row], truth.parts, threshold)
        line = Image.new("RGB", (2 * LONG_SIDE + GAP, left.height + GAP), "white")
        line.paste(left)
        line.paste(right, (left.width + GAP, 0))
        lines.append(line)
    plotting.write_picture(path, Image.fromarray(np.concatenate(lines)))
