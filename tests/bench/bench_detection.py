"""Pictures a second of the RN50 detector, beside torchvision's `fasterrcnn_resnet50_fpn`, and where the time goes.

    python -m tests.bench.bench_detection [--short-side 320] [--pictures 1] [--rounds 3] [--precision fp32|bf16]

Training is a whole step of SGD, measuring is what is found in one picture, both with random weights in turn in one
process, on pictures of SHORT x 1.375 SHORT. Both detectors are as their makers set them, 512 regions of a picture in
training, all weights learn; ours is of C4 form, whose fourth stage runs on each region, torchvision's has a feature
pyramid with a light head. The parts are forward passes alone, with what their modules took between hooks.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pyramidclip_hf.configuration_detection import PyramidCLIPDetectionConfig
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_detection import Objects, PyramidCLIPForObjectDetection
from tests.bench.paired import compare

CLASSES, OBJECTS = 80, 7
TOY = {"vision_config": {"tower": "resnet", "image_size": 64, "layers": (1, 1, 1, 1), "width": 4},
       "roi_samples": 8, "rpn_samples": 16, "train_proposals": [50, 20], "test_proposals": [50, 10]}  # fmt: skip
Call = Callable[[], object]


def our_detector(device: torch.device, toy: bool = False) -> PyramidCLIPForObjectDetection:
    """A Faster R-CNN on RN50's trunk with the defaults, or with `toy` a tiny one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = TOY if toy else {"vision_config": PyramidCLIPConfig.from_architecture("RN50").vision_config}
    with device:
        return PyramidCLIPForObjectDetection(PyramidCLIPDetectionConfig(**sizes, num_labels=CLASSES))


def torchvisions_detector(device: torch.device, short_side: int, toy: bool = False) -> nn.Module:
    """`fasterrcnn_resnet50_fpn` with new weights, for pictures that have `short_side` already; `toy`: few regions."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    few = {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 10} if toy else {}
    sizes = {"min_size": short_side, "max_size": 4 * short_side, **few}
    with device:
        return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **sizes)


def pictures(count: int, short_side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (count, 3, H, W), boxes (count, OBJECTS, 4) within them, labels (count, OBJECTS)."""
    generator = torch.Generator().manual_seed(1)
    height, width = short_side, int(short_side * 1.375) // 32 * 32
    pixels = torch.rand(count, 3, height, width, generator=generator)
    corners = torch.rand(count, OBJECTS, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    sides = short_side * (0.1 + 0.3 * torch.rand(count, OBJECTS, 2, generator=generator))
    labels = torch.randint(CLASSES, (count, OBJECTS), generator=generator)
    return pixels.to(device), torch.cat([corners, corners + sides], 2).to(device), labels.to(device)


def training_ways(device: torch.device, count: int, short_side: int, precision: str, toy: bool) -> dict[str, Call]:
    """Name -> one optimizer step on `count` pictures."""
    pixels, boxes, labels = pictures(count, short_side, device)
    ours, theirs = our_detector(device, toy).train(), torchvisions_detector(device, short_side, toy).train()
    targets = [Objects(*one) for one in zip(boxes, labels)]
    given = [{"boxes": box, "labels": label + 1} for box, label in zip(boxes, labels)]

    def step(model: nn.Module, losses: Callable[[], Mapping[str, torch.Tensor]]) -> Call:
        # A rate at which random weights stay finite; it decides nothing about the time.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)

        def call() -> float:
            optimizer.zero_grad()
            with _autocast(device, precision):
                loss = torch.stack(list(losses().values())).sum()
            loss.backward()
            optimizer.step()
            return loss.item()

        return call

    return {
        "ours, C4": step(ours, lambda: ours(pixels, None, targets, range(count)).means()),
        "torchvision, FPN": step(theirs, lambda: theirs(list(pixels), given)),
    }


def measuring_ways(device: torch.device, short_side: int, precision: str, toy: bool) -> dict[str, Call]:
    """Name -> what is found in one picture."""
    pixels, _, _ = pictures(1, short_side, device)
    ours, theirs = our_detector(device, toy).eval(), torchvisions_detector(device, short_side, toy).eval()

    def way(model: nn.Module, given: object) -> Call:
        @torch.inference_mode()
        def call() -> object:
            with _autocast(device, precision):
                return model(given)

        return call

    return {"ours, C4": way(ours, pixels), "torchvision, FPN": way(theirs, list(pixels))}


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def parts_of(device: torch.device, count: int, short_side: int, precision: str, toy: bool) -> dict[str, float]:
    """Seconds of the forward passes' parts of a training step, then the backward pass and the optimizer together."""
    pixels, boxes, labels = pictures(count, short_side, device)
    model = our_detector(device, toy).train()
    spent: dict[str, float] = {}
    named = {"stem and three stages": [model.trunk.stem, *model.trunk.stages[:3]],
             "proposals' convolutions": [model.proposals.head],
             "fourth stage on regions": [model.trunk.stages[3], model.extra_norm]}  # fmt: skip

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for name, modules in named.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: spent.update({name: spent.get(name, 0.0) - now()}))
            module.register_forward_hook(lambda *_, name=name: spent.update({name: spent[name] + now()}))
    for _ in range(2):  # the first one warms up
        spent.clear()
        start = now()
        with _autocast(device, precision):
            losses = model(pixels, None, [Objects(*one) for one in zip(boxes, labels)], range(count)).means()
        middle = now()
        torch.stack(list(losses.values())).sum().backward()
        end = now()
    spent["suppression, matching, pooling, heads"] = middle - start - sum(spent.values())
    return {**spent, "backward": end - middle}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_detection", description=__doc__.split("\n")[0])
    parser.add_argument("--short-side", type=int, default=320)
    parser.add_argument("--pictures", type=int, default=1, help="of a training step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--toy", action="store_true", help="few regions, ours tiny: only shows that it runs")
    args = parser.parse_args()
    device, side = torch.device("cpu"), args.short_side
    print(f"{torch.get_num_threads()} threads, {args.precision}, pictures of {side} x {int(side * 1.375) // 32 * 32}")
    sized = {
        "training": (training_ways(device, args.pictures, side, args.precision, args.toy), args.pictures),
        "measuring": (measuring_ways(device, side, args.precision, args.toy), 1),
    }
    for what, (ways, count) in sized.items():
        found = compare(*ways.values(), rounds=args.rounds)
        low, high = found.spread
        print(
            f"{what}: {count / found.ours:.3f} pictures/s, torchvision's {count / found.theirs:.3f}; "
            f"{found.ratio:.2f} x ({low:.2f} to {high:.2f})"
        )
    parts = parts_of(device, args.pictures, side, args.precision, args.toy)
    for part, seconds in parts.items():
        print(f"  {part:<40} {seconds:7.2f} s  {100 * seconds / sum(parts.values()):3.0f} %")


if __name__ == "__main__":
    main()
