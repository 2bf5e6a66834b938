"""Emoji scenes as pictures with boxes and masks, in the folders of PASCAL VOC and of COCO."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from pyramidclip_hf.files import json_text, write_atomically
from training.emoji import pictures, words

Drawn = tuple[bytes, list[str], list[tuple[int, int, int, int]], list[np.ndarray]]
SPLIT_NAMES = {"train": "trainval", "validation": "test"}


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of an (H, W) mask: columns below each other, zeros first."""
    flat = np.asarray(mask, np.uint8).flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def write_coco(folder: Path, split: str, scenes: Sequence[Drawn], size: int) -> Path:
    """Writes FOLDER/SPLIT/ and FOLDER/instances_SPLIT.json; returns the latter."""
    place = folder / split
    place.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (data, names, boxes, masks) in enumerate(scenes, 1):
        file = f"{split}-{number - 1:07d}.jpg"
        write_atomically(place / file, data)
        images.append({"id": number, "file_name": file, "width": size, "height": size})
        for name, (x1, y1, x2, y2), mask in zip(names, boxes, masks):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": words.OBJECTS.index(name) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [size, size], "counts": run_lengths(mask)},
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(words.OBJECTS, 1)]
    document = {
        "info": {"description": "emoji scenes", "contributor": pictures.ATTRIBUTION},
        "licenses": [{"id": 1, "name": "CC BY-SA 4.0"}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = folder / f"instances_{split}.json"
    write_atomically(path, json_text(document).encode())
    return path


def write_voc(folder: Path, split: str, scenes: Sequence[Drawn], size: int) -> Path:
    """Writes Annotations/, JPEGImages/ and ImageSets/Main/trainval.txt or test.txt; returns the latter."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    keys = []
    for number, (data, names, boxes, _) in enumerate(scenes):
        key = f"{split}_{number:07d}"
        keys.append(key)
        write_atomically(folder / "JPEGImages" / f"{key}.jpg", data)
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = f"{key}.jpg"
        ET.SubElement(ET.SubElement(root, "source"), "annotation").text = pictures.ATTRIBUTION
        sides = ET.SubElement(root, "size")
        for name, value in (("width", size), ("height", size), ("depth", 3)):
            ET.SubElement(sides, name).text = str(value)
        for thing, (x1, y1, x2, y2) in zip(names, boxes):
            node = ET.SubElement(root, "object")
            ET.SubElement(node, "name").text = thing
            ET.SubElement(node, "difficult").text = "0"
            corners = ET.SubElement(node, "bndbox")
            for name, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                ET.SubElement(corners, name).text = str(value)
        write_atomically(folder / "Annotations" / f"{key}.xml", ET.tostring(root, encoding="utf-8"))
    path = folder / "ImageSets" / "Main" / f"{SPLIT_NAMES[split]}.txt"
    write_atomically(path, ("\n".join(keys) + "\n").encode())
    return path


WRITERS = {"coco": write_coco, "voc": write_voc}
