"""Squares and bars on grey as annotated pictures, and settings of a tiny detector."""

import json

import numpy as np
from PIL import Image, ImageDraw

from tests.training.tiny import RESNET, TEXT
from training.settings.detecting import DetectionArguments

MODEL = {"text_config": {**TEXT, "pooling": "eos"}, "vision_config": RESNET, "projection_dim": 8}
DETECTOR = {"anchor_sizes": [16, 32], "roi_size": 4, "roi_samples": 8, "rpn_samples": 16,
            "train_proposals": [50, 20], "test_proposals": [50, 10]}  # fmt: skip


def write_data(folder, count, seed, masks=True):
    """Red squares and blue bars on grey, 64 x 48, as COCO's file; its source string."""
    draw = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture = Image.new("RGB", (64, 48), tuple(int(v) for v in draw.integers(90, 160, 3)))
        images.append({"id": number * 10, "file_name": f"{number}.png", "width": 64, "height": 48})
        for category, (width, height), colour in ((4, (22, 22), "red"), (9, (30, 12), "blue")):
            if draw.random() < 0.3 and category == 9:
                continue
            x, y = int(draw.integers(0, 64 - width)), int(draw.integers(0, 48 - height))
            ImageDraw.Draw(picture).rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append({"id": len(annotations) + 1, "image_id": number * 10, "category_id": category,
                                "bbox": [x, y, width, height], "iscrowd": 0,
                                **({"segmentation": [corners]} if masks else {})})  # fmt: skip
        picture.save(folder / "pictures" / f"{number}.png")
    categories = [{"id": 4, "name": "square"}, {"id": 9, "name": "bar"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(document))
    return f"{folder / 'a.json'}:pictures"


def settings(folder, data, **changes):
    """Six steps of four pictures, two to a pass."""
    chosen = {
        "output_dir": str(folder),
        "model": "RN50",
        "model_config": MODEL,
        "detector": DETECTOR,
        "train_data": [data["train"]],
        "global_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.02,
        "warmup_fraction": 0.2,
        "short_sides": [48, 64],
        "test_short_side": 48,
        "long_side": 96,
        "precise_batch_norm": 2,
        "dataloader_workers": 0,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "keep_checkpoints": 9,
        "trackers": ["none"],
    }
    return DetectionArguments(**{**chosen, **changes})
