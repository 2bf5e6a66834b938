"""Small inputs for the tests of `training.prepare`: pictures, tables, shards, and a look at what came out."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.shards import ShardReader


def picture(number=0, size=(32, 24), form="JPEG"):
    """Encoded bytes of a picture that differs from number to number."""
    values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
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
