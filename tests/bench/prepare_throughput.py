"""Pairs a second and core of the preparation steps that need no accelerator.

    OMP_NUM_THREADS=1 python -m tests.bench.prepare_throughput [--pairs 1000]

Counts processor time, not the clock, so that other work on the machine does not matter; reading and writing wait for a
disk beside that. Pictures are cut out of scikit-learn's photographs.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.shards import ShardWriter
from training.prepare import import_features, pack, summarize

CAPTION = "Ornate palace with a red and green pagoda under a blue sky, 1024x768 wallpaper | IMG_{}.JPG - free shipping"


def pictures(number, side):
    """JPEG bytes of `number` different crops, `side` pixels on the short side."""
    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    sources = [Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    for i in range(number):
        left, top = (int(v) for v in rng.integers(0, 60, 2))
        image = sources[i % 2].crop((left, top, left + 560, top + 360)).resize((side * 560 // 360, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def measure(what, pairs, run):
    """Runs once, prints pairs a second of processor time."""
    start = time.process_time()
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = run()
    if code:
        raise SystemExit(f"{what}: {said.getvalue().splitlines()[-1]}")
    seconds = time.process_time() - start
    print(
        f"{what:58s} {pairs / seconds:9.0f} pairs/s a core   {1e9 / pairs * seconds / 3600:8.0f} core-hours a billion",
        flush=True,
    )


def write_features(path, keys):
    """LXMERT's columns with 36 boxes of 2048 numbers a picture."""
    rng = np.random.default_rng(0)
    encode = lambda values, dtype: base64.b64encode(np.asarray(values, dtype).tobytes()).decode()  # noqa: E731
    features = encode(rng.random((36, 2048)), "<f4")
    boxes = encode([[0, 0, 50, 25]] * 36, "<f4")
    with open(path, "w") as file:
        for key in keys:
            ids, scores = encode(rng.integers(0, 400, 36), "<i8"), encode(rng.random(36), "<f4")
            file.write("\t".join([key, "360", "560", ids, scores, ids, scores, "36", boxes, features]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1000)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["PYRAMIDCLIP_CACHE"] = str(folder / "cache")
        for side in (256, 512):
            source = folder / f"in{side}"
            rows = []
            with ShardWriter(source / "00000.tar") as writer:
                for i, data in enumerate(pictures(pairs, side)):
                    (source / f"{i}.jpg").write_bytes(data)
                    rows.append({"image": f"{i}.jpg", "caption": CAPTION.format(i)})
                    writer.write_members(
                        f"{i:09d}", {"jpg": data, "txt": CAPTION.format(i).encode(), "json": b'{"width": 1}'}
                    )
            size = sum(path.stat().st_size for path in source.glob("*.jpg")) / pairs / 1000
            (source / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            for check in ("decode", "header"):
                flags = ["--check", check, "--device", "cpu", "--samples_per_shard", "1000"]
                for kind, name in (("tars", "00000.tar"), ("table", "t.jsonl")):
                    argv = ["--input", str(source / name), "--output_dir", str(folder / f"{side}{check}{kind}"), *flags]
                    measure(
                        f"pack, {kind}, {side} px ({size:.0f} kB), --check {check}", pairs, lambda a=argv: pack.main(a)
                    )
        data = str(folder / "256decodetars")
        measure(
            "summarize, first-clause",
            pairs,
            lambda: summarize.main(["--input_dir", data, "--model", "first-clause", "--device", "cpu"]),
        )
        write_features(folder / "f.tsv", [f"{i:09d}" for i in range(pairs)])
        names = folder / "names.txt"
        names.write_text("\n".join(f"name {i}" for i in range(400)))
        flags = [
            "--input",
            str(folder / "f.tsv"),
            "--objects",
            str(names),
            "--attributes",
            str(names),
            "--made_by",
            "x",
            "--device",
            "cpu",
        ]
        measure(
            "import_features, LXMERT, 36 boxes, merged",
            pairs,
            lambda: import_features.main([*flags, "--merge_into", data]),
        )
        store = ["--store_dir", str(folder / "store")]
        measure("import_features, LXMERT, 36 boxes, to a store", pairs, lambda: import_features.main([*flags, *store]))
        merge = [
            "--input",
            str(folder / "store"),
            "--made_by",
            "x",
            "--device",
            "cpu",
            "--merge_into",
            str(folder / "512decodetars"),
        ]
        measure("import_features, store, merged", pairs, lambda: import_features.main(merge))


if __name__ == "__main__":
    main()
