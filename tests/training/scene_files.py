"""Small data sets for the tests of the data path: a few dozen pictures with all levels, and what a server needs."""

import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from training.data.records import Region, Sample
from training.data.shards import ShardWriter, write_dataset_json

FEATURES = 8


def jpeg(number, size=(60, 48)):
    """A picture that differs for each number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_sample(number):
    """Every third sample has no summary, every fourth no tags, every fifth no regions."""
    count = 0 if number % 5 == 4 else 1 + number % 4
    regions = [
        Region((0.1, 0.2, 0.5 + i / 10, 0.9), (7 * number + 3 * i) % 10 / 10, f"thing{i}", ["red"])
        for i in range(count)
    ]
    roi = np.random.default_rng(1000 + number).normal(size=(count, FEATURES)).astype(np.float16)
    return Sample(
        key=f"{number:04d}",
        image=jpeg(number),
        image_suffix="jpg",
        caption=f"caption of picture {number}",
        summary=None if number % 3 == 2 else f"summary {number}",
        tags=None if number % 4 == 3 else [f"red thing{i}" for i in range(count or 1)],
        regions=regions or None,
        roi=roi if count else None,
    )


def write_shards(folder, numbers, shard_size=8, made_by="detector 1", spoil=None):
    """Shards of the samples `numbers` with `dataset.json`; `spoil` {number: function of the sample's members}."""
    from training.data.records import members_from_sample

    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(numbers)
    for first in range(0, len(numbers), shard_size):
        with ShardWriter(folder / f"part-{first // shard_size:03d}.tar") as writer:
            for number in numbers[first : first + shard_size]:
                members = members_from_sample(make_sample(number))
                if spoil and number in spoil:
                    members = spoil[number](members)
                writer.write_members(f"{number:04d}", members)
    write_dataset_json(folder, {"regions": made_by}, FEATURES, {})
    return folder


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `cut` makes it close the connection in the middle of so many tars."""

    def __init__(self, *args, served, **kwargs):
        self.served = served
        super().__init__(*args, **kwargs)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.served.requests.append(self.path)
        if self.path.endswith(".tar") and self.served.cut > 0:
            self.served.cut -= 1
            data = open(self.translate_path(self.path), "rb").read()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().do_GET()


class Served:
    """A folder behind http://127.0.0.1: `url`, `requests` so far, `cut` how many tars to break off from now on."""

    def __init__(self, folder):
        self.requests, self.cut = [], 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, served=self, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
