"""Small inputs for the tests of preparing and reading data, and a look at what came out.

Pictures, tables and shards; models with random weights; a data set with all levels, and what serves it.
"""

import base64
import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.data.records import Region, Sample
from training.data.shards import ShardReader, ShardWriter, write_dataset_json

FEATURES = 8


def picture(number=0, size=(32, 24), form="JPEG"):
    """Encoded bytes of a picture that differs from number to number."""
    values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def plain_picture(form, size=(30, 20), **options):
    """Encoded bytes of a red picture."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, form, **options)
    return buffer.getvalue()


def write_pictures(folder, count, size=(32, 24)):
    """`count` files 0.jpg, 1.jpg, ...; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [picture(number, size) for number in range(count)]
    for number, item in enumerate(data):
        (folder / f"{number}.jpg").write_bytes(item)
    return data


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path, samples):
    """A tar as other programs write it, from [(key, {suffix: bytes})]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read_tars(folder):
    """{key: {suffix: bytes}} of all shards in `folder`, read with tarfile alone; keys must be unique."""
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                members = found.setdefault(key, {})
                assert suffix not in members, f"{member.name} twice"
                members[suffix] = tar.extractfile(member).read()
    return found


def run_step(module, words):
    """What a preparation command does in this process: errors come through, and the total comes back."""
    return getattr(module, module.__name__.rpartition(".")[2])(module.parse([*map(str, words)]))


def tree(folder):
    """{relative path: bytes} of everything below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def problems(folder, stage):
    """[(what, key, reason, line)] in the order they were named."""
    lines = (Path(folder) / "reports" / f"{stage}.problems.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(e["what"], e.get("key"), e["reason"], e.get("line")) for e in entries]


def counts(folder, stage):
    """The stored counts of a stage."""
    return json.loads((Path(folder) / "reports" / f"{stage}.json").read_text(encoding="utf-8"))["counts"]


def records(folder):
    """{key: KEY.json} of all shards in `folder`."""
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with ShardReader(path) as reader:
            for i, key in enumerate(reader.keys):
                found[key] = json.loads(reader.read(i).get("json", b"{}"))
    return found


def make_language_model(folder, texts, causal=False):
    """A checkpoint with random weights and a Unigram tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(list(texts) * 4, trainer)
    pieces = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    torch.manual_seed(0)
    if causal:
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        config.initializer_range = 0.4
        model = GPT2LMHeadModel(config)
    else:
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            initializer_factor=3.0,
        )
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_vinvl(folder):
    """A VinVL at reduced width with random weights; its features have 128 numbers."""
    from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor

    torch.manual_seed(0)
    config = VinVLConfig(
        layers=(1, 1, 1, 1),
        groups=4,
        width_per_group=2,
        stem_channels=4,
        rpn_pre_nms_top_n=200,
        rpn_post_nms_top_n=40,
        label_embedding_size=8,
        attribute_hidden_size=16,
        id2label={0: "background", **{i: f"thing {i}" for i in range(1, 9)}},
        id2attribute={0: "none", **{i: f"shade{i}" for i in range(1, 7)}},
    )
    VinVLForObjectAttributeDetection(config).save_pretrained(folder)
    VinVLImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    return str(folder)


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


def write_plain_shards(folder, shards, per_shard, size):
    """Shards of pictures without regions; keys k0, k1, ..."""
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        rows = [(f"k{i}", {"jpg": picture(i, size), "txt": b"a caption"}) for i in numbers]
        write_tar(folder / f"{shard:05d}.tar", rows)


def lxmert_row(key, count, width, seed):
    """One row of LXMERT's table for a 100 x 50 picture, with `count` regions of `width` numbers."""
    rng = np.random.default_rng(seed)

    def text(values, dtype):
        return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()

    ids, scores = rng.integers(0, 3, count), rng.random(count)
    boxes = np.tile([0, 0, 50, 25], (count, 1))
    columns = [key, 50, 100, text(ids, "<i8"), text(scores, "<f4"), text(ids % 2, "<i8"), text(scores, "<f4"), count]
    columns += [text(boxes, "<f4"), text(rng.random((count, width)), "<f4")]
    return "\t".join(map(str, columns))
