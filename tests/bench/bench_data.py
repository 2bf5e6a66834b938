"""The data path against what people would use instead, per core.

    python -m tests.bench.bench_data [--rounds 7] [--output runs/bench_data.json]

`views_row`: both views of a 1024 px JPEG against torchvision's two RandomResizedCrop pipelines on one decoded picture
(their usual form; decoding for each of them would be slower still). `loader_row`: whole batches, two views and a
caption, against open_clip's WebDataset loader on the same shards. Needs the extra `dev`.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from pyramidclip_hf import PyramidCLIPProcessor
from tests.bench.paired import compare
from training.data.loader import TrainingReader, settings_for
from training.data.pixels import Normalisation
from training.data.records import Sample
from training.data.shards import ShardWriter
from training.data.views import ViewSettings, make_views


def photographs(side):
    """JPEG bytes (quality 90) of the two pictures in scikit-image that are large enough, as squares of `side` px."""
    import skimage.data

    for load in (skimage.data.hubble_deep_field, skimage.data.retina):
        picture = Image.fromarray(load()).resize((side, side), Image.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        yield file.getvalue()


def torchvision_view(area, mean, std):
    """The straightforward form of one view: PIL picture -> normalised float32 (3, 224, 224)."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=area, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def views_row(rounds, side=1024, pictures=8):
    """A line of the table: pictures a second with both views, one thread."""
    files = list(photographs(side))
    files *= pictures // len(files)
    images = PyramidCLIPProcessor().image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    views = [torchvision_view(area, images.image_mean, images.image_std) for area in ((0.9, 1.0), (0.5, 1.0))]
    settings = ViewSettings()

    def ours():
        for number, data in enumerate(files):
            for view in make_views(data, settings, 0, 0, number).values():
                view.to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)

    def theirs():
        for data in files:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            for view in views:
                view(picture)

    measured = compare(ours, theirs, rounds)
    return _row(f"global + local views of a {side} px JPEG, per core", measured, len(files), at_least=1.5)


def loader_row(rounds, side=512, samples=64, batch=32):
    """A line of the table: the whole loader in one process, from tar to batch, both views and the tokenised caption."""
    processor = PyramidCLIPProcessor()
    with tempfile.TemporaryDirectory() as folder:
        files = list(photographs(side))
        with ShardWriter(Path(folder, "00000.tar")) as writer:
            for number in range(samples):
                caption = f"a picture of the sky, taken on a clear night, number {number}"
                writer.write(Sample(f"{number:06d}", files[number % len(files)], "jpg", caption))
        settings = settings_for(processor, ("global", "local", "caption"))
        reader = TrainingReader([folder], settings, processor.tokenizer, batch)
        open_clip = open_clip_loader(Path(folder, "00000.tar"), samples, batch, processor.image_processor)
        epochs = iter(range(1_000_000))
        normalise = Normalisation(processor.image_processor.image_mean, processor.image_processor.image_std)

        def ours():
            seen = 0
            for made in reader.batches(next(epochs)):
                # The device's part, done here as the other loader has it done.
                pixels = [normalise(made[name]) for name in ("pixel_values", "local_pixel_values")]
                seen += len(pixels[0])
            assert seen == samples

        def theirs():
            assert sum(len(texts) for _, texts in open_clip) == samples

        measured = compare(ours, theirs, rounds)
    return _row(f"loader, {side} px JPEG, both views and caption, against open_clip", measured, samples, at_least=1)


def open_clip_loader(shard, samples, batch, images):
    """open_clip's training loader, its picture transform twice: batches of (pictures (B, 2, 3, 224, 224), ids (B, 77)).

    The steps are those of its `get_wds_dataset` (shuffle, decode to PIL, transform, tokenise, batch), put together
    here because version 3.3 cannot read tars with webdataset 1.0.
    """
    import open_clip
    import webdataset
    from open_clip.transform import AugmentationCfg

    views = [
        open_clip.image_transform(
            224, True, mean=images.image_mean, std=images.image_std, aug_cfg=AugmentationCfg(scale=area)
        )
        for area in ((0.9, 1.0), (0.5, 1.0))
    ]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(str(shard)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(samples),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(
            image=lambda picture: torch.stack([view(picture) for view in views]), text=lambda text: tokenizer(text)[0]
        ),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch),
    )


def _row(name, measured, items, at_least):
    return {
        "row": name,
        "ratio": round(measured.ratio, 2),
        "spread": [round(value, 2) for value in measured.spread],
        "at_least": at_least,
        "items_per_second": round(items / measured.ours, 1),
        "items_per_second_of_the_other": round(items / measured.theirs, 1),
    }


def main():
    """Measures both rows, prints them and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each way")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [views_row(args.rounds), loader_row(args.rounds)]
    for row in rows:
        low, high = row["spread"]
        print(f"{row['row']:<70} {row['ratio']:5.2f} x ({low:.2f} to {high:.2f})  wanted {row['at_least']:g} x")
        print(f"{'':<70} {row['items_per_second']:.0f} against {row['items_per_second_of_the_other']:.0f} pictures/s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"threads": 1, "rows": rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
