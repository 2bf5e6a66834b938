"""The readers of files from strangers, for tests/test_fuzz.py: whole bytes, how they are read, what may be raised."""

import base64
import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from conversion.architecture import check_checkpoint as original_checkpoint
from conversion.architecture import config_from_shapes as original_shapes
from conversion.checkpoint_file import as_float32, read_checkpoint, state_dict_of
from conversion.clip_sources import read_clip
from conversion.convert_torchvision import convert as convert_torchvision
from conversion.convert_vinvl import check_checkpoint as check_vinvl
from conversion.convert_vinvl import config_from_shapes as vinvl_shapes
from conversion.convert_vinvl import read_label_map, released_names
from conversion.key_map import to_original
from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPImageProcessor,
    PyramidCLIPModel,
    PyramidCLIPProcessor,
    PyramidCLIPTokenizer,
)
from pyramidclip_hf.app import labels_of, open_picture, read_regions
from pyramidclip_hf.backends import read_record
from pyramidclip_hf.embedding_files import EmbeddingJob, embedding_blocks, read_embeddings, read_metadata, rows_at
from pyramidclip_hf.embedding_search import check_made_by
from pyramidclip_hf.export import read_pairs
from pyramidclip_hf.files import cache_folder, read_utf8
from pyramidclip_hf.loading import Loaded, load_dual_encoder, load_processor
from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection
from pyramidclip_hf.vinvl.boxes_vinvl import cell_anchors
from training.data.annotations import mask_of, open_annotations
from training.data.labelled import names_from_file
from training.data.records import BadSample, sample_from_members
from training.data.samples import open_picture as open_bytes
from training.data.shard_index import ShardIndex, build_index, index_path
from training.data.shards import ShardReader, ShardWriter
from training.data.sources import open_data_set
from training.data.words import read_synonyms
from training.evaluation.arguments import read_templates
from training.evaluation.captions import read_captions
from training.evaluation.hub import labelled_hub
from training.evaluation.results import read_json, write_json
from training.loop.terms.tokens import TokenPair
from training.loop.token_scoring import HEADS_FILE, load_token_heads, save_token_heads
from training.prepare.formats import BadRow, FormatOptions, open_format
from training.prepare.formats.lxmert import LxmertOptions
from training.prepare.selecting.reading import read_rules
from training.prepare.sources import open_source
from training.prepare.steps.flags import SourceArguments
from training.prepare.steps.pictures import picture_suffix
from training.prepare.steps.regions import best_regions
from training.prepare.steps.svg import Drawer
from training.prepare.steps.work import Tally
from training.prepare.synonyms import sets_of
from training.settings.reading import read_chain

Read = Callable[[bytes, Path], object]
RECORD = b'{"tags": ["a"], "summary": "s", "regions": [{"box": [0, 0, 0.5, 1], "score": 0.5, "label": "dog"}]}'


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def a_shard(folder: Path) -> Path:
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(3):
            writer.write_members(f"{i}", {"jpg": b"x" * 700, "txt": b"words", "json": RECORD})
    return folder / "a.tar"


def read_shard(data: bytes, folder: Path) -> None:
    path = folder / "a.tar"
    path.write_bytes(data)
    index_path(path).unlink(missing_ok=True)
    index = build_index(path)
    index_path(path).write_bytes(index.dumps().encode("utf-8", "surrogateescape"))
    with ShardReader(path) as reader:
        for i in range(len(reader)):
            sample_from_members(reader.read(i), reader.key(i), "a.tar")


def read_file(name: str, read: Callable[[Path], object]) -> Read:
    def written(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


def picture(kind: str) -> bytes:
    return saved(lambda file: Image.effect_noise((24, 16), 60).convert("RGB").save(file, kind))


def read_table(name: str) -> Read:
    def read(path: Path) -> None:
        source = open_source(SourceArguments(input=[str(path)]))
        for part in source.parts():
            for _ in source.read(part):
                pass

    return read_file(name, read)


def read_rows(data: bytes, folder: Path) -> None:
    """Of a table of region features, opened anew: its index is kept by size and time, which here may be equal."""
    shutil.rmtree(cache_folder() / "tsv", ignore_errors=True)
    (folder / "rows.tsv").write_bytes(data)
    (folder / "names.txt").write_text("dog\ncat\n")
    names = str(folder / "names.txt")
    rows = open_format(folder / "rows.tsv", options=FormatOptions(LxmertOptions(names, names)))
    for row in range(len(rows)):
        with contextlib.suppress(BadRow):
            rows.key(row)
            best_regions(rows.read(row, rows.size(row) or (640, 480)), 10, Tally(), "rows.tsv", "k")


def read_manifest(data: bytes, folder: Path) -> None:
    (folder / "m.jsonl").write_bytes(data)
    found = open_data_set(folder / "m.jsonl")
    for unit in found.units:
        reader = found.open(unit)
        for i in range(len(reader)):
            with contextlib.suppress(BadSample):
                sample_from_members(reader.read(i), reader.key(i), reader.name)
        reader.close()


def numbers(values: list[float], kind: str) -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


FEATURE = numbers([0.5] * 8, "<f4")
SCENE = {"objects": [{"rect": [1, 2, 30, 40], "conf": 0.9, "class": "dog", "feature": FEATURE}]}
LXMERT = "\t".join([
    "k", "480", "640", numbers([0], "<i8"), numbers([0.9], "<f4"), numbers([1], "<i8"), numbers([0.9], "<f4"), "1",
    numbers([1, 2, 30, 40], "<f4"), FEATURE,
])  # fmt: skip


def parquet() -> bytes:
    table = pyarrow.table({"image": ["a.jpg"] * 40, "caption": [f"words {i % 3}" for i in range(40)]})
    return saved(lambda file: pyarrow.parquet.write_table(table, file))


def a_model(name: str) -> Callable[[Path], bytes]:
    """A file of a tiny saved model, whose other files stay in the folder."""

    def make(folder: Path) -> bytes:
        tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision = {**tower, "image_size": 16, "patch_size": 8, "num_leff_layers": 0, "roi_feature_size": 4}
        text = {**tower, "vocab_size": 300}
        config = PyramidCLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
        PyramidCLIPModel(config).save_pretrained(folder)
        letters = {chr(code): code - 32 for code in range(33, 127)} | {"<|startoftext|>": 298, "<|endoftext|>": 299}
        tokenizer = PyramidCLIPTokenizer(vocab=letters, merges=[])
        PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=16), tokenizer).save_pretrained(folder)
        return (folder / name).read_bytes()

    return make


def labelled_parquet() -> bytes:
    table = pyarrow.table({"image": [b"x"] * 40, "label": [f"word {i % 3}" for i in range(40)]})
    return saved(lambda file: pyarrow.parquet.write_table(table, file))


def embeddings_in_parquet(folder: Path) -> bytes:
    job = EmbeddingJob(folder / "x.parquet", "m", {"kind": "path", "model_sha256": "0"}, ["a", "b", "c"])
    job.save(0, ["a", "b", "c"], np.eye(3, 4, dtype=np.float32), [])
    job.finish()
    return (folder / "x.parquet").read_bytes()


def embeddings() -> bytes:
    rows = np.eye(3, 4, dtype=np.float32)
    metadata = '{"model": "m", "model_sha256": "0", "kind": "path", "settings": {}, "rows": 3, "skipped": []}'
    return saved(
        lambda file: np.savez_compressed(file, path=np.array(["a", "b", "c"]), embedding=rows, metadata=metadata)
    )


def checkpoint(archive: bool) -> bytes:
    content = {"state_dict": {"a": torch.ones(3)}, "best": np.float64(0.5)}
    return saved(lambda file: torch.save(content, file, _use_new_zipfile_serialization=archive))


def numbers_file(rows: int, width: int) -> bytes:
    return saved(lambda file: np.save(file, np.ones((rows, width), np.float16)))


def read_data_set(name: str) -> Read:
    """A folder of shards, or a list of them, by the file that describes it."""

    def read(path: Path) -> None:
        a_shard(path.parent)
        open_data_set(path.parent if name == "dataset.json" else path)

    return read_file(name, read)


def read_oscar(data: bytes, folder: Path) -> None:
    """Features and the table of their names, one of which is damaged."""
    wide = numbers([0.1, 0.1, 0.5, 0.5, 0.4, 0.4], "<f4")
    features = base64.b64encode(base64.b64decode(FEATURE) + base64.b64decode(wide)).decode()
    whole = {
        "x.feature.tsv": f"k\t1\t{features}\n".encode(),
        "x.label.tsv": b'k\t[{"rect": [1, 2, 30, 40], "conf": 0.9, "class": "dog"}]\n',
    }
    shutil.rmtree(cache_folder() / "tsv", ignore_errors=True)
    place = data.index(b"\0") if b"\0" in data else 0
    for name, text in zip(whole, (data[:place], data[place + 1 :])):
        (folder / name).write_bytes(text or whole[name])
    rows = open_format(folder / "x.feature.tsv")
    for row in range(len(rows)):
        with contextlib.suppress(BadRow):
            best_regions(rows.read(row, rows.size(row) or (640, 480)), 10, Tally(), "x", "k")


OSCAR = b"k\t1\t" + base64.b64encode(np.ones(8 + 6, "<f4").tobytes()) + b"\n\0k\t" + json.dumps(
    {"image_w": 64, "image_h": 48, "objects": SCENE["objects"]}).encode() + b"\n"  # fmt: skip


def read_evaluation_table(data: bytes, folder: Path) -> None:
    (folder / "t.parquet").write_bytes(data)
    labelled_hub(str(folder / "t.parquet"))


def saved_set(folder: Path) -> bytes:
    import datasets

    datasets.Dataset.from_dict({"image": [b"x", b"yy"], "label": ["a", "b"]}).save_to_disk(folder / "set")
    (file,) = (folder / "set").glob("*.arrow")
    return file.read_bytes()


def read_saved_set(data: bytes, folder: Path) -> None:
    (file,) = (folder / "set").glob("*.arrow")
    # A new file: what is mapped into memory of the one before may not change.
    file.unlink()
    file.write_bytes(data)
    labelled_hub(str(folder / "set"))


VOC = b"""<?xml version="1.0" encoding="UTF-8"?><annotation><filename>a.jpg</filename>
<size><width>64</width><height>48</height></size><object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"""
POLYGON = [1, 1, 30, 1, 30, 30]
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 30], "area": 9.5, "segmentation": [POLYGON]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 30], "iscrowd": 1,
         "segmentation": {"size": [48, 64], "counts": [10, 20, 3042]}},
    ],
    "categories": [{"id": 3, "name": "dog"}],
}  # fmt: skip


def read_annotations(kind: str) -> Read:
    """With masks, as training makes them of what passes."""

    def read(data: bytes, folder: Path) -> None:
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "JPEGImages/a.jpg").write_bytes(b"x")
        (folder / "ImageSets/Main/all.txt").write_text("a\n")
        (folder / "Annotations/a.xml").write_bytes(data)
        (folder / "coco.json").write_bytes(data)
        source = f"{folder}:all" if kind == "voc" else f"{folder / 'coco.json'}:JPEGImages"
        for one in open_annotations([source], training=True).pictures:
            for thing in one.objects:
                mask_of(thing, min(one.width, 9999), min(one.height, 9999))

    return read


def asked_model() -> Loaded[Any]:
    """Stands for the model of the app: what it reads of a file is compared with this one's name alone."""
    return cast(Loaded[Any], SimpleNamespace(sha256=lambda: "0", name="m", model=None))


def read_regions_of(name: str) -> Read:
    description, features = RECORD, numbers_file(1, 4)

    def read(data: bytes, folder: Path) -> None:
        (folder / "a.json").write_bytes(data if name == "a.json" else description)
        (folder / "a.roi.npy").write_bytes(data if name == "a.roi.npy" else features)
        read_regions(str(folder / "a.json"), str(folder / "a.roi.npy"))

    return read


def weights_of(model: Callable[[], torch.nn.Module], names: Callable[[Any], dict[str, Any]] = dict) -> Any:
    def make(_: Path) -> bytes:
        torch.manual_seed(0)
        return saved(lambda file: torch.save(names(model().state_dict()), file))

    return make


def small_resnet() -> torch.nn.Module:
    """Under torchvision's names, of a width that nobody trains."""
    import torchvision

    # `base_width` is a share of 64: the width is the stem's.
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=2)
    return model.half()


def read_weights(read: Callable[[dict[str, torch.Tensor], Path], object]) -> Read:
    return read_file("w.pt", lambda path: read(as_float32(state_dict_of(read_checkpoint(path), path), path)[0], path))


def small_pyramid() -> PyramidCLIPModel:
    tower = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8, "num_leff_layers": 0, "roi_feature_size": 4}
    config = PyramidCLIPConfig(text_config={**tower, "vocab_size": 300}, vision_config=vision, projection_dim=4)
    return PyramidCLIPModel(config)


OPEN_CLIP = {"model_cfg": {
    "embed_dim": 4, "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 64, "heads": 1, "layers": 11}}}  # fmt: skip


def small_clip() -> torch.nn.Module:
    from open_clip.model import CLIP

    own = OPEN_CLIP["model_cfg"]
    return CLIP(own["embed_dim"], own["vision_cfg"], own["text_cfg"], quick_gelu=True).half()


def read_original(state: dict[str, torch.Tensor], _: Path) -> None:
    original_checkpoint(state, original_shapes(state))


def read_vinvl(state: dict[str, torch.Tensor], _: Path) -> None:
    names = {0: "__background__", 1: "dog"}
    check_vinvl(state, vinvl_shapes(state, names, names))


def vinvl_weights(_: Path) -> bytes:
    names = {0: "__background__", 1: "dog"}
    config = VinVLConfig(
        layers=(1, 1, 1, 1), groups=2, width_per_group=4, stem_channels=8, label_embedding_size=3,
        attribute_hidden_size=6, id2label=names, label2id={"dog": 1}, id2attribute=names,
    )  # fmt: skip
    state = VinVLForObjectAttributeDetection(config).state_dict()
    tensors = {released: state[name] for name, released in released_names(state).items()}
    first, again = "roi_heads.box.feature_extractor.head.layer4.", "attribute.feature_extractor.head.layer4."
    tensors |= {name.replace(first, again): value for name, value in tensors.items() if name.startswith(first)}
    tensors["rpn.anchor_generator.cell_anchors.0"] = torch.tensor(
        cell_anchors(config.anchor_sizes, config.anchor_ratios)
    )
    return saved(lambda file: torch.save(tensors, file))


def token_heads(folder: Path) -> bytes:
    config = small_pyramid().config
    save_token_heads(folder, [TokenPair("global_caption_tokens", 1.0, {"width": 4}, config)])
    return (folder / HEADS_FILE).read_bytes()


SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" xmlns:d="http://purl.org/dc/elements/1.1/" viewBox="0 0 9 5">'
    b"<metadata><Work><d:title>A leaf</d:title><d:subject><Bag><li>plant</li></Bag></d:subject></Work></metadata>"
    b'<defs><g id="a"><path d="M1 1L8 4Z" stroke="red"/></g></defs><use href="#a" transform="scale(.5)"/></svg>'
)


@functools.cache
def drawer() -> Drawer:
    """One process that draws for all changed files."""
    return Drawer(16, seconds=5)


Reader = tuple[Callable[[Path], bytes], Read, tuple[type[Exception], ...]]

# name: (whole bytes of a folder to work in, how they are read, the documented errors)
READERS: dict[str, Reader] = {
    "shard": (lambda folder: a_shard(folder).read_bytes(), read_shard, (ValueError, BadSample)),
    "index": (lambda folder: index_path(a_shard(folder)).read_bytes(),
              lambda data, _: ShardIndex.loads(data.decode("utf-8", "surrogateescape")), (ValueError,)),
    "record": (lambda _: RECORD,
               lambda data, _: sample_from_members({"jpg": b"x", "txt": b"t", "json": data}, "k", "w"),
               (BadSample,)),
    "jpeg": (lambda _: picture("JPEG"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "png": (lambda _: picture("PNG"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "webp": (lambda _: picture("WEBP"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "checkpoint": (lambda _: checkpoint(True), read_file("x.pt", read_checkpoint), (ValueError,)),
    "old checkpoint": (lambda _: checkpoint(False), read_file("x.pt", read_checkpoint), (ValueError,)),
    "CSV": (lambda _: b'image,caption,n\na.jpg,"some, words",1\nb.jpg,more,2\n' * 3, read_table("t.csv"),
            (ValueError,)),
    "JSONL": (lambda _: b'{"image": "a.jpg", "caption": ["words"], "score": 0.5}\n' * 4, read_table("t.jsonl"),
              (ValueError,)),
    "Parquet": (lambda _: parquet(), read_table("t.parquet"), (ValueError,)),
    "manifest": (lambda _: b'{"image": "a.jpg", "caption": "c", "roi": "a.npy", "tags": ["x"]}\n' * 4, read_manifest,
                 (ValueError,)),
    "scene graph": (lambda _: b"k\t" + json.dumps(SCENE).encode() + b"\n", read_rows, (ValueError,)),
    "LXMERT": (lambda _: LXMERT.encode() + b"\n", read_rows, (ValueError,)),
    "YAML": (lambda _: b"a: &a {x: [1, 2.5], y: true}\nb: {<<: *a, z: 'text'}\nseed: 3\n",
             read_file("s.yaml", lambda path: read_chain(str(path))), (ValueError,)),
    "config.json": (a_model("config.json"), read_file("config.json", lambda path: load_dual_encoder(str(path.parent))),
                    (ValueError,)),
    "tokenizer.json": (a_model("tokenizer.json"),
                       read_file("tokenizer.json", lambda path: load_processor(path.parent, "it")), (ValueError,)),
    "embeddings": (lambda _: embeddings(), read_file("x.npz", read_embeddings), (ValueError,)),
    "roi.npy": (lambda _: numbers_file(1, 4),
                lambda data, _: sample_from_members(
                    {"jpg": b"x", "txt": b"t", "json": RECORD, "roi.npy": data}, "k", "w"), (BadSample,)),
    "dataset.json": (lambda _: b'{"format": 1, "shards": {"a.tar": {"samples": 3}}, "counts": {"samples": 3}, '
                     b'"made_by": {"regions": [{"maker": "m"}]}, "roi_feature_size": 4}',
                     read_data_set("dataset.json"), (ValueError,)),
    "list of shards": (lambda _: b"# ours\na.tar\n" * 2, read_data_set("l.txt"),
                       (ValueError, FileNotFoundError)),
    "SVG": (lambda _: SVG, lambda data, _: drawer().draw(data), (BadSample,)),
    "Oscar": (lambda _: OSCAR, read_oscar, (ValueError,)),
    "rules": (lambda _: b"rules:\n  large: {rule: number, field: width, at_least: 200}\n"
              b"  few: {rule: sample, share: 0.5}\nseed: 3\n",
              read_file("r.yaml", lambda path: read_rules(str(path))), (ValueError,)),
    "synonyms": (lambda _: b'{"dog": ["hound", "puppy"], "red": ["crimson"]}', read_file("s.json", read_synonyms),
                 (ValueError,)),
    "WordNet": (lambda _: b"  1 licence\n00001740 03 n 02 entity 0 thing 0 001 @ 0 n 0000 | what is\n" * 3,
                read_file("data.noun", lambda path: list(sets_of(path))), (ValueError,)),
    "captions": (lambda _: b'{"images": [{"id": 1, "file_name": "a.jpg", "split": "test", "filename": "a.jpg", '
                 b'"sentences": [{"raw": "words"}]}], "annotations": [{"image_id": 1, "caption": "words"}]}',
                 read_file("c.json", lambda path: read_captions(str(path))), (ValueError,)),
    "Karpathy": (lambda _: b'{"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "words"}]}]}',
                 read_file("c.json", lambda path: read_captions(str(path))), (ValueError,)),
    "lines of captions": (lambda _: b"image,caption\na.jpg,some words\nb.jpg,more, words\n",
                          read_file("c.txt", lambda path: read_captions(str(path))), (ValueError,)),
    "class names": (lambda _: b"n01\tdog\nn02\tcat\n",
                    read_file("c.txt", lambda path: names_from_file(str(path), ["n01", "n02"])), (ValueError,)),
    "templates": (lambda _: b"a {}.\nmy {}\n", read_file("t.txt", lambda path: read_templates(str(path))),
                  (ValueError,)),
    "results": (lambda folder: (write_json([], folder / "r.json", "m"), (folder / "r.json").read_bytes())[1],
                read_file("r.json", read_json), (ValueError,)),
    "evaluation's Parquet": (lambda _: labelled_parquet(), read_evaluation_table, (ValueError, FileNotFoundError)),
    "saved data set": (saved_set, read_saved_set, (ValueError, FileNotFoundError)),
    "VOC": (lambda _: VOC, read_annotations("voc"), (ValueError, FileNotFoundError)),
    "COCO": (lambda _: json.dumps(COCO).encode(), read_annotations("coco"), (ValueError, FileNotFoundError)),
    "embeddings in Parquet": (embeddings_in_parquet, read_file("x.parquet", lambda path: (
        read_embeddings(path), list(embedding_blocks(path)), rows_at(path, np.array([1]), "path"))), (ValueError,)),
    "embeddings by blocks": (lambda _: embeddings(), read_file("x.npz", lambda path: list(embedding_blocks(path))),
                             (ValueError,)),
    "embeddings of the app": (lambda _: embeddings(), read_file("x.npz", lambda path: check_made_by(
        read_metadata(path), asked_model(), str(path))), (ValueError,)),
    "picture of the app": (lambda _: picture("PNG"), read_file("a.png", lambda path: open_picture(str(path), 10**6)),
                           (ValueError,)),
    "labels of the app": (lambda _: b"a dog\na cat\n", read_file("l.txt", lambda path: labels_of(read_utf8(path))),
                          (ValueError,)),
    "regions of the app": (lambda _: RECORD, read_regions_of("a.json"), (ValueError,)),
    "features of the app": (lambda _: numbers_file(1, 4), read_regions_of("a.roi.npy"), (ValueError,)),
    "export.json": (lambda _: b'{"model_sha256": "0", "logit_scale": 4.6, "files": {"vision_model.onnx": {"sha256": '
                    b'"0", "disagreement": 0.5}}}', read_file("export.json", lambda path: read_record(path.parent)),
                    (ValueError,)),
    "pairs of export": (lambda _: b'{"image": "a.jpg", "caption": "words"}\n' * 2, read_file(
        "p.jsonl", lambda path: (path.with_name("a.jpg").touch(), read_pairs(path))), (ValueError,)),
    "model.safetensors": (a_model("model.safetensors"), read_file(
        "model.safetensors", lambda path: load_dual_encoder(str(path.parent))), (ValueError,)),
    "preprocessor_config.json": (a_model("processor_config.json"), read_file(
        "processor_config.json", lambda path: load_processor(path.parent, "it")), (ValueError,)),
    "heads of tokens": (token_heads, read_file(
        HEADS_FILE, lambda path: load_token_heads(path.parent, small_pyramid().config, "it")), (ValueError,)),
    "torchvision's weights": (weights_of(small_resnet), read_weights(convert_torchvision), (ValueError,)),
    "released weights": (weights_of(small_pyramid, lambda state: to_original(state, small_pyramid().config)),
                         read_weights(read_original), (ValueError,)),
    "CLIP's weights": (weights_of(small_clip), read_file(
        "w.pt", lambda path: read_clip(path, vision_heads=1, text_heads=1)), (ValueError,)),
    "open_clip_config.json": (lambda folder: ((folder / "w.pt").write_bytes(weights_of(small_clip)(folder)),
                              json.dumps(OPEN_CLIP).encode())[1], read_file(
        "c.json", lambda path: read_clip(path.with_name("w.pt"), config_file=path)), (ValueError,)),
    "VinVL's weights": (vinvl_weights, read_weights(read_vinvl), (ValueError,)),
    "label map": (lambda _: b'{"label_to_idx": {"dog": 1, "cat": 2}, "attribute_to_idx": {"red": 1}}',
                  read_file("l.json", read_label_map), (ValueError,)),
    **{f"{kind} picture": (lambda _, kind=kind: picture(kind), lambda data, _: open_bytes(data, "it", 10**6),
                           (ValueError,)) for kind in ("GIF", "BMP", "TIFF", "PPM", "AVIF")},
}  # fmt: skip
