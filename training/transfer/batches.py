"""Training batches of labelled pictures; crops are functions of (seed, epoch, picture) alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.batches import BatchReport, DataError
from training.data.labelled import LabelledPictures
from training.data.loader import BatchReader
from training.data.order import SampleOrder
from training.data.records import Fault
from training.data.views import crop_box, cut_view
from training.loop.distributed import rank, world_size
from training.settings.finetuning import FinetuneArguments
from training.transfer.parts import Part, fingerprint

ASPECT = (3 / 4, 4 / 3)
# What is drawn for a picture in an epoch.
_CROP, _FLIP = range(2)


class StrictBatches(torch.utils.data.Dataset):
    """Makes training batches of pictures, of which none is replaced; runs inside loader workers.

    A class derived from it says what a picture becomes (`view`) and what a batch is made of (`together`).

    Args:
        name: Of the data, for messages.
        size: How many pictures there are.
        order: Over one shard of them.
    """

    def __init__(self, name: str, size: int, order: SampleOrder):
        self.name, self.size, self.order = name, size, order

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, epoch_and_positions: tuple[int, Sequence[int]]) -> dict[str, Any]:
        """What `together` makes, `sample_keys` and `report`.

        A picture that cannot be read is named in `report`, and the batch holds nothing else then.
        """
        epoch, positions = epoch_and_positions
        numbers = [self.order.locate(epoch, position)[2] for position in positions]
        report, views = BatchReport(), []
        for number in numbers:
            try:
                views.append(self.view(epoch, number))
            except ValueError as error:
                report.bad.append(Fault(str(number), self.name, "bad-picture", str(error)))
        told = {"sample_keys": [str(number) for number in numbers], "report": report}
        return told if report.bad else {**self.together(epoch, numbers, views), **told}

    def view(self, epoch: int, number: int) -> Any:
        """A picture as it is seen in an epoch.

        Raises:
            ValueError: It cannot be read.
        """
        raise NotImplementedError

    def together(self, epoch: int, numbers: Sequence[int], views: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The batch of these pictures."""
        raise NotImplementedError


class LabelledBatches(StrictBatches):
    """Makes training batches of labelled pictures: `pixel_values` (B, 3, height, width) float32, `labels` (B,) int64.

    Crop and mirroring are functions of (seed, epoch, picture) alone.

    Args:
        data: The pictures.
        order: Over one shard of them.
        processor: Decides size, mean and standard deviation of what is made.
        area: Smallest and largest share of the picture in a crop.
        flip: Whether half of them are mirrored.
    """

    def __init__(
        self,
        data: LabelledPictures,
        order: SampleOrder,
        processor: PyramidCLIPProcessor,
        area: Sequence[float],
        flip: bool,
    ):
        super().__init__(data.name, len(data), order)
        images = processor.image_processor
        self.data, self.flip = data, flip
        self.area = (area[0], area[1])
        self.height, self.width = images.crop_size["height"], images.crop_size["width"]
        self.mean = torch.tensor(images.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(images.image_std).view(1, 3, 1, 1)

    def view(self, epoch: int, number: int) -> torch.Tensor:
        """uint8 (3, height, width): the random crop of a picture, perhaps mirrored."""
        picture = np.array(upright_rgb(self.data.read(number)))
        draws = [np.random.default_rng((self.order.seed, epoch, number, what)) for what in (_CROP, _FLIP)]
        box = crop_box(picture.shape[1], picture.shape[0], self.area, ASPECT, draws[_CROP])
        view = cut_view(torch.from_numpy(picture).permute(2, 0, 1)[None], box, self.height, self.width)
        return view.flip(-1) if self.flip and draws[_FLIP].random() < 0.5 else view

    def together(self, epoch: int, numbers: Sequence[int], views: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Normalised, with their labels."""
        pixels = (torch.stack(list(views)).float() / 255 - self.mean) / self.std
        return {"pixel_values": pixels, "labels": torch.tensor([self.data.labels[number] for number in numbers])}


class StrictReader(BatchReader):
    """Batches of which a picture that cannot be read ends the run with its name."""

    def _account(self, report: BatchReport, samples: int, epoch: int) -> None:
        if report.bad:
            self.close()
            number, name, _, detail = report.bad[0]
            raise DataError(
                f"picture {number} of {name}: {detail}. Training on labelled pictures replaces none of them: repair or "
                "remove it, and continue with --resume latest where only its pixels change"
            )
        self._counts["samples"] += samples


class LabelledReader(StrictReader):
    """The training batches of this process; a picture that cannot be read ends the run with its name."""

    def __init__(self, part: Part, processor: PyramidCLIPProcessor, args: FinetuneArguments, device: torch.device):
        data = part.pictures
        order = SampleOrder([[len(data)]], args.seed, window_samples=1)
        super().__init__(
            LabelledBatches(data, order, processor, args.crop_area, args.flip),
            order,
            args.global_batch_size,
            rank(),
            world_size(),
            workers=args.workers,
            device=device,
        )
        self.fingerprint = fingerprint(part)
        self.description = [{"name": part.source, "samples": len(data), "classes": len(data.class_names)}]
