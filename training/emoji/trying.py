"""Held-out scenes as files, so that the page of `pyramidclip app` has something to show after the demo."""

from pathlib import Path

from pyramidclip_hf.files import write_atomically
from training.data.records import members_from_sample
from training.data.samples import ShardSamples

# Scenes with their regions to begin with, and labels beside those that name what is in them.
_EXAMPLES, _LABELS = 8, 16


def write_pictures(scenes: Path, folder: Path) -> None:
    """Writes what `pyramidclip app` looks for in a demo's folder; the same bytes each time.

    pictures/KEY.png is every held-out scene, to search in. examples/ has the first ones with their regions as shards
    hold them, and labels.txt, the objects of those, then of others.

    Args:
        scenes: with validation/.
        folder: of the demo.
    """
    pictures, examples = folder / "pictures", folder / "examples"
    for made in (pictures, examples):
        made.mkdir(parents=True, exist_ok=True)
    labels: dict[str, None] = {}
    for number, sample in enumerate(ShardSamples(str(scenes / "validation"))):
        members = members_from_sample(sample)
        write_atomically(pictures / f"{sample.key}.{sample.image_suffix}", members[sample.image_suffix])
        if number < _EXAMPLES:
            for suffix in members.keys() & {sample.image_suffix, "json", "roi.npy"}:
                write_atomically(examples / f"{sample.key}.{suffix}", members[suffix])
        if len(labels) < _LABELS:
            labels.update((region.label, None) for region in sample.regions or [] if region.label)
    write_atomically(examples / "labels.txt", "".join(f"{label}\n" for label in list(labels)[:_LABELS]).encode())
