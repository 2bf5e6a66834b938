# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The nine named architectures; only the standard library."""

from typing import Any


def _resnet(layers: tuple[int, ...], image_size: int, width: int) -> dict[str, Any]:
    return {"tower": "resnet", "layers": layers, "image_size": image_size, "width": width}


def _vit(hidden_size: int, num_hidden_layers: int, patch_size: int, image_size: int = 224) -> dict[str, Any]:
    return {"tower": "vit", "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers,
            "patch_size": patch_size, "image_size": image_size}  # fmt: skip


# CLIP's dimensions: name -> (projection_dim, vision fields, text fields). RN50x64: the reference's file says a text
# width of 512, which contradicts its own weights; CLIP's is 1024.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "RN50": (1024, _resnet((3, 4, 6, 3), 224, 64), {"hidden_size": 512}),
    "RN101": (512, _resnet((3, 4, 23, 3), 224, 64), {"hidden_size": 512}),
    "RN50x4": (640, _resnet((4, 6, 10, 6), 288, 80), {"hidden_size": 640}),
    "RN50x16": (768, _resnet((6, 8, 18, 8), 384, 96), {"hidden_size": 768}),
    "RN50x64": (1024, _resnet((3, 15, 36, 10), 448, 128), {"hidden_size": 1024}),
    "ViT-B-32": (512, _vit(768, 12, 32), {"hidden_size": 512}),
    "ViT-B-16": (512, _vit(768, 12, 16), {"hidden_size": 512}),
    "ViT-L-14": (768, _vit(1024, 24, 14), {"hidden_size": 768}),
    "ViT-L-14-336": (768, _vit(1024, 24, 14, 336), {"hidden_size": 768}),
}
