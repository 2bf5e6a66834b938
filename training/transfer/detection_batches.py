"""Training batches of annotated pictures; scale and mirroring are functions of (seed, epoch, picture) alone."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from pyramidclip_hf.configuration_detection import PyramidCLIPDetectionConfig
from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from pyramidclip_hf.modeling_detection import normalised, resized_picture
from training.data.annotations import AnnotatedPicture, AnnotatedPictures, mask_of
from training.data.order import SampleOrder
from training.data.samples import open_picture
from training.loop.distributed import rank, world_size
from training.settings.detecting import DetectionArguments
from training.transfer.batches import StrictBatches, StrictReader

# Pictures of a batch are padded to a multiple of it.
DIVISOR = 32
# What is drawn for a picture in an epoch.
_SCALE, _FLIP, _SAMPLES = range(3)


def read_picture(one: AnnotatedPicture, max_image_pixels: int) -> Image.Image:
    """The picture, upright and RGB.

    Raises:
        ValueError: it cannot be read, has more pixels, or is not of the size that its annotation says.
    """
    try:
        data = one.path.read_bytes()
    except OSError as error:
        raise ValueError(f"{one.path}: {error}") from error
    picture = upright_rgb(open_picture(data, str(one.path), max_image_pixels))
    if picture.size != (one.width, one.height):
        raise ValueError(
            f"{one.path} is {picture.width} x {picture.height}, its annotation says {one.width} x {one.height}: the "
            "boxes are of another picture or of another size of it"
        )
    return picture


class DetectionBatches(StrictBatches):
    """Makes training batches; runs inside loader workers.

    Args:
        data: The pictures.
        order: Over one shard of them.
        short_sides: One is drawn for each picture, pixels.
        long_side: At most.
        flip: Whether half of them are mirrored.
        config: Of the detector: whether masks are made, mean and standard deviation of pixels.
    """

    def __init__(
        self,
        data: AnnotatedPictures,
        order: SampleOrder,
        short_sides: Sequence[int],
        long_side: int,
        flip: bool,
        config: PyramidCLIPDetectionConfig,
    ):
        super().__init__(data.name, len(data), order)
        self.data, self.short_sides, self.long_side = data, list(short_sides), long_side
        self.flip, self.config = flip, config

    def together(
        self, epoch: int, numbers: Sequence[int], views: Sequence[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """A batch of B pictures with N objects in all.

        Returns:
            `pixel_values` (B, 3, H, W) float32, `image_sizes` (B, 2), `boxes` (N, 4) float32 in those pixels,
            `box_counts` (B,), `class_labels` (N,), `draws` (B,) int64; `masks` (N, H, W) uint8 where there are any.
        """
        sizes = torch.tensor([view["pixels"].shape[1:] for view in views])
        height, width = ((int(side) + DIVISOR - 1) // DIVISOR * DIVISOR for side in sizes.amax(dim=0))

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            return F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]))

        batch = {
            "pixel_values": torch.stack([padded(view["pixels"]) for view in views]),
            "image_sizes": sizes,
            "boxes": torch.cat([view["boxes"] for view in views]),
            "box_counts": torch.tensor([len(view["boxes"]) for view in views]),
            "class_labels": torch.cat([view["labels"] for view in views]),
            "draws": torch.tensor([self._draw(epoch, number, _SAMPLES).integers(2**62) for number in numbers]),
        }
        if self.config.with_masks:
            batch["masks"] = torch.cat([padded(view["masks"]) for view in views])
        return batch

    def _draw(self, epoch: int, number: int, what: int) -> np.random.Generator:
        return np.random.default_rng((self.order.seed, epoch, number, what))

    def view(self, epoch: int, number: int) -> dict[str, torch.Tensor]:
        """A picture as it is seen in an epoch: `pixels` (3, h, w), `boxes` (n, 4), `labels` (n,), `masks` (n, h, w)."""
        one = self.data.pictures[number]
        side = int(self._draw(epoch, number, _SCALE).choice(self.short_sides))
        flipped = self.flip and self._draw(epoch, number, _FLIP).random() < 0.5
        resized = resized_picture(read_picture(one, self.data.max_image_pixels), side, self.long_side)
        scale = torch.tensor([resized.width / one.width, resized.height / one.height] * 2)
        boxes = torch.tensor([thing.box for thing in one.objects], dtype=torch.float32).reshape(-1, 4) * scale
        labels = torch.tensor([thing.label for thing in one.objects], dtype=torch.int64)
        found = {"labels": labels}
        if self.config.with_masks:
            masks = [self._mask(one, index, resized.size) for index in range(len(one.objects))]
            found["masks"] = torch.stack(masks).flip(-1) if flipped else torch.stack(masks)
        if flipped:
            resized = ImageOps.mirror(resized)
            boxes = torch.stack([resized.width - boxes[:, 2], boxes[:, 1], resized.width - boxes[:, 0], boxes[:, 3]], 1)
        return {**found, "pixels": normalised(resized, self.config), "boxes": boxes}

    def _mask(self, one: AnnotatedPicture, index: int, size: tuple[int, int]) -> torch.Tensor:
        full = Image.fromarray(mask_of(one.objects[index], one.width, one.height) * 255)
        small = np.asarray(full.resize(size, Image.Resampling.BILINEAR))
        return torch.from_numpy((small > 127).astype(np.uint8))


class DetectionReader(StrictReader):
    """The training batches of this process; a picture that cannot be read ends the run with its name."""

    def __init__(
        self,
        data: AnnotatedPictures,
        args: DetectionArguments,
        config: PyramidCLIPDetectionConfig,
        device: torch.device,
    ):
        order = SampleOrder([[len(data)]], args.seed, window_samples=1)
        maker = DetectionBatches(data, order, args.short_sides, args.long_side, args.flip, config)
        super().__init__(
            maker, order, args.global_batch_size, rank(), world_size(), workers=args.workers, device=device
        )
        self.fingerprint = data.fingerprint
        self.description = [
            {"name": data.name, "samples": len(data), "objects": data.objects, "classes": len(data.class_names)}
        ]
