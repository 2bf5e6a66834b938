"""Training batches of labelled pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.runs import MODEL_CONFIG
from tests.training.to_evaluate import COUNTS, write_pictures
from training.data.labelled import labelled_folder
from training.data.order import SampleOrder
from training.loop.initial_model import named_model
from training.settings.finetuning import FinetuneArguments
from training.transfer.batches import LabelledBatches, LabelledReader
from training.transfer.parts import Part


def test_views_depend_on_seed_epoch_and_picture_alone(tmp_path):
    folder = write_pictures(tmp_path, COUNTS)
    pictures, order = labelled_folder(folder), SampleOrder([[24]], 3, 1)
    processor = named_model("ViT-B-32", MODEL_CONFIG, 0)[1]

    def maker(area=(0.3, 0.9), flip=True):
        return LabelledBatches(pictures, order, processor, area, flip)

    first = maker()[1, range(8)]
    assert torch.equal(first["pixel_values"], maker()[1, range(8)]["pixel_values"])
    number = int(first["sample_keys"][5])
    assert order.locate(1, 5)[2] == number and first["labels"][5] == pictures.labels[number]
    assert not torch.equal(maker().view(1, number), maker().view(2, number))
    flipped = 0
    for number in range(24):
        plain, perhaps = maker(flip=False).view(0, number), maker().view(0, number)
        assert torch.equal(perhaps, plain) or torch.equal(perhaps, plain.flip(-1))
        flipped += torch.equal(perhaps, plain.flip(-1))
    assert 4 < flipped < 20
    # The whole picture, against PIL's own filter.
    whole = maker((1.0, 1.0), flip=False)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    whole.data = dataclasses.replace(pictures, read=lambda number: square)
    expected = np.asarray(square.resize((16, 16), Image.BICUBIC)).astype(int)
    assert np.abs(whole.view(0, 0).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


@pytest.fixture
def reader(tmp_path):
    """Of the pictures of a folder; `device` is where the batches go."""
    data = labelled_folder(write_pictures(tmp_path, COUNTS))
    processor = named_model("ViT-B-32", MODEL_CONFIG, 0)[1]

    def build(device, workers=2):
        args = FinetuneArguments(train_data=str(tmp_path), model="x", global_batch_size=8, dataloader_workers=workers)
        part = Part(str(tmp_path), data, np.arange(len(data)))
        return LabelledReader(part, processor, args, torch.device(device))

    return build


@pytest.mark.parametrize(("device", "pinned", "method"), [("cpu", False, None), ("cuda", True, "forkserver")])
def test_beside_a_gpu_workers_are_started_and_memory_is_pinned(reader, monkeypatch, device, pinned, method):
    seen = {}
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda maker, **options: seen.update(options) or [])
    reader(device)._start(0, 0)
    assert (seen["pin_memory"], seen["multiprocessing_context"]) == (pinned, method)


@pytest.mark.slow
def test_workers_that_are_started_make_the_same_batches(reader):
    started = reader("cpu")
    started.start_method = "forkserver"
    for found, wanted in zip(started.batches(0), reader("cpu", workers=0).batches(0), strict=True):
        assert found["sample_keys"] == wanted["sample_keys"] and torch.equal(found["labels"], wanted["labels"])
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
