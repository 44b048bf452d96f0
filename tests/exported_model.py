"""What a program that has an exported model and nothing of this repository does: python exported_model.py MODEL FOLDER"""
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

model_file, folder = map(Path, sys.argv[1:])
if model_file.suffix == ".pt2":
    import torch
    files = {"about.json": ""}
    model = torch.export.load(model_file, extra_files=files).module()
    about = json.loads(files["about.json"])
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(model_file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["about.json"])

ratings = {}
for path in sorted(folder.iterdir()):
    width, height = ImageOps.exif_transpose(Image.open(path)).size
    opened = Image.open(path)
    opened.draft(None, [math.ceil(1.5 * about["short_side"])] * 2)  # large JPEGs are decoded at 1/2, 1/4 or 1/8
    upright = ImageOps.exif_transpose(opened).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    picture = np.asarray(Image.alpha_composite(white, upright).convert("RGB"))
    scale = about["short_side"] / min(width, height)
    size = round(width * scale), round(height * scale)
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale <= 1 else cv2.INTER_CUBIC)
    top, left = ((side - about["crop"] + 1) // 2 for side in picture.shape[:2])
    pixels = np.ascontiguousarray(picture[None, top:top + about["crop"], left:left + about["crop"]])  # (1, S, S, 3)
    if model_file.suffix == ".pt2":
        found = model(torch.from_numpy(pixels)).tolist()[0]
    else:
        found = session.run(None, {"pixels": pixels})[0][0].tolist()
    ratings[path.name] = dict(zip(about["names"], found))
print(json.dumps(ratings))
