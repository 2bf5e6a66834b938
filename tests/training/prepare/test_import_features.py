"""`training.prepare.import_features`: region features that others stored, read as they say and refused where they do
not fit."""

import base64
import json

import numpy as np
import pytest

from tests.training.prepare.small_data import counts, picture, problems, read_tars, records, run_step, write_tar
from training.data.records import sample_from_members
from training.data.shards import read_dataset_json
from training.prepare import import_features


def run(path, *flags, made_by="a detector"):
    return run_step(import_features, ["--made_by", made_by, "--device", "cpu", "--input", str(path), *map(str, flags)])


def b64(values, dtype="<f4"):
    """Numbers as the formats write them; what is text already stays."""
    if isinstance(values, str):
        return values
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def roi_of(members):
    return sample_from_members(members, "k", "here", require_image=False).roi


@pytest.fixture
def names(tmp_path):
    (tmp_path / "objects.txt").write_text("cat,kitty\ndog\ntree\nsky\n")
    (tmp_path / "attributes.txt").write_text("red\nbig\n")
    return ["--objects", tmp_path / "objects.txt", "--attributes", tmp_path / "attributes.txt"]


def lxmert_row(key="a", size=(100, 50), classes=(0, 1), scores=(0.4, 0.6), boxes=None, features=None, **columns):
    """A row of LXMERT's columns in a picture of `size` (width, height)."""
    count = len(classes)
    boxes = [[0, 0, 50, 25]] * count if boxes is None else boxes
    features = np.arange(count * 8).reshape(count, 8) if features is None else features
    row = {
        "img_id": key,
        "img_h": size[1],
        "img_w": size[0],
        "objects_id": b64(classes, "<i8"),
        "objects_conf": b64(scores),
        "attrs_id": b64([1] * count, "<i8"),
        "attrs_conf": b64([0.5] * count),
        "num_boxes": count,
        "boxes": b64(boxes),
        "features": b64(features),
    }
    return "\t".join(str(value) for value in (row | columns).values())


def test_the_real_lxmert_sample_against_a_plain_reading(tmp_path, data_dir):
    objects = [line.split(",")[0].strip() for line in open(data_dir / "bottom_up_objects_vocab.txt")]
    attributes = [line.split(",")[0].strip() for line in open(data_dir / "bottom_up_attributes_vocab.txt")]
    table = data_dir / "lxmert_train2014_obj36_sample.tsv"
    flags = [
        "--objects",
        data_dir / "bottom_up_objects_vocab.txt",
        "--attributes",
        data_dir / "bottom_up_attributes_vocab.txt",
    ]
    run(table, *flags, "--store_dir", tmp_path / "store", "--rows_per_shard", 4)
    stored, made = read_tars(tmp_path / "store"), records(tmp_path / "store")
    rows = [line.rstrip("\n").split("\t") for line in open(table)]
    assert list(stored) == [row[0] for row in rows] and len(rows) == 10
    for row in rows:
        key, (height, width), count = row[0], map(int, row[1:3]), int(row[7])
        arrays = {
            i: np.frombuffer(base64.b64decode(row[i]), dtype)
            for i, dtype in ((3, "i8"), (4, "f4"), (5, "i8"), (6, "f4"), (8, "f4"), (9, "f4"))
        }
        ranks = sorted(range(count), key=lambda i: -arrays[4][i])[:10]
        boxes, features = arrays[8].reshape(count, 4), arrays[9].reshape(count, 2048)
        regions = made[key]["regions"]
        assert [region["label"] for region in regions] == [objects[arrays[3][i]] for i in ranks]
        assert [region["score"] for region in regions] == pytest.approx([float(arrays[4][i]) for i in ranks], abs=1e-6)
        np.testing.assert_allclose(
            [r["box"] for r in regions], boxes[ranks] / [width, height, width, height], atol=1e-6
        )
        expected = [[attributes[arrays[5][i]]] if arrays[6][i] >= 0.1 else [] for i in ranks]
        assert [region["attributes"] for region in regions] == expected
        np.testing.assert_array_equal(roi_of(stored[key]), features[ranks].astype(np.float16))
    assert made["COCO_train2014_000000132417"]["tags"][:3] == ["blue sky", "white tree", "green tree"]
    assert read_dataset_json(tmp_path / "store")["roi_feature_size"] == 2048
    assert counts(tmp_path / "store", "regions")["regions_in"] == 360


def scene_graph_object(score, label="cat", box=(0, 0, 50, 25), fill=1.0, **fields):
    names = ["white", "tall", "rusty", "__no_attribute__", "furry", *["above"] * 11]
    scores = [0.09, 0.5, 0.07, 0.3, 0.2, *[0.0] * 11]
    found = {"rect": list(box), "bbox_id": 0, "class": label, "conf": score, "feature": b64(np.full(2048, fill))}
    return found | {"attributes": names, "attr_scores": scores} | fields


def scene_graph_row(key, objects):
    return f"{key}\t{json.dumps({'objects': objects, 'relations': None})}"


@pytest.mark.parametrize("hw", ['[{"height": 50, "width": 100}]', '{"height": 50, "width": 100}', "50 100"])
def test_scene_graph_benchmark(tmp_path, hw):
    objects = [scene_graph_object(score, f"thing{i}", fill=i) for i, score in enumerate([0.3, 0.9, 0.5])]
    (tmp_path / "predictions.tsv").write_text(scene_graph_row("a", objects) + "\n" + scene_graph_row("b", []) + "\n")
    (tmp_path / "x.hw.tsv").write_text(f"a\t{hw}\nb\t{hw}\n")
    run(tmp_path / "predictions.tsv", "--hw", tmp_path / "x.hw.tsv", "--store_dir", tmp_path / "store", "--top", 2)
    record, stored = records(tmp_path / "store"), read_tars(tmp_path / "store")
    assert [(r["label"], r["score"], r["box"]) for r in record["a"]["regions"]] == [
        ("thing1", 0.9, [0, 0, 0.5, 0.5]),
        ("thing2", 0.5, [0, 0, 0.5, 0.5]),
    ]
    # The published rule: "white" is a common word and must reach 0.1; what is padding never counts; the likeliest last.
    assert record["a"]["regions"][0]["attributes"] == ["rusty", "furry", "tall"]
    assert record["a"]["tags"] == ["rusty furry tall thing1", "rusty furry tall thing2"]
    assert roi_of(stored["a"])[:, 0].tolist() == [1, 2] and roi_of(stored["a"]).shape == (2, 2048)
    assert record["b"] == {"regions": []} and "roi.npy" not in stored["b"]
    assert problems(tmp_path / "store", "regions") == [("kept", "b", "no-regions", 2)]
    assert read_dataset_json(tmp_path / "store")["made_by"]["regions"]["attributes"] is True


def test_what_scene_graph_benchmark_left_out_is_refused_or_named(tmp_path, capsys):
    path = tmp_path / "predictions.tsv"
    for field, remedy in (
        ("feature", "TEST.OUTPUT_FEATURE True"),
        ("conf", "TSV_SAVE_SUBSET"),
        ("class", "TSV_SAVE_SUBSET"),
    ):
        item = scene_graph_object(0.5)
        del item[field]
        path.write_text(scene_graph_row("a", [item]) + "\n" + field * 3)
        with pytest.raises(ValueError, match=f"without '{field}'.*{remedy}"):
            run(path, "--store_dir", tmp_path / "store")
    item = scene_graph_object(0.5)
    del item["attributes"], item["attr_scores"]
    path.write_text(scene_graph_row("a", [item]) + "\n")
    run(path, "--store_dir", tmp_path / "store")
    assert problems(tmp_path / "store", "regions") == [("rejected", "a", "no-size", 1)]
    assert "has no attributes: tags are made without" in capsys.readouterr().out


def oscar_files(folder, dtype="<f4", form="pretraining", key="a", shift=0.0, drop=0):
    """Features and names of three regions in a picture of 100 x 50, in one of the two forms; returns the path of the
    features."""
    folder.mkdir(parents=True, exist_ok=True)
    rects = np.array([[0, 0, 50, 25], [10, 10, 90, 40], [20, 5, 30, 45]], float)
    boxes = rects / [100, 50, 100, 50]
    sides = (boxes[:, 2:] - boxes[:, :2]) + shift * 0
    table = np.concatenate([np.arange(3 * 2048).reshape(3, 2048) % 100, boxes + shift, sides], 1)
    objects = [
        {"class": f"Thing{i}", "rect": r.tolist(), "conf": c} for i, (r, c) in enumerate(zip(rects, [0.2, 0.8, 0.5]))
    ]
    objects = objects[: 3 - drop]
    if form == "pretraining":
        (folder / "features.tsv").write_text(f"{key}\t3\t{b64(table, dtype)}\n")
        record = {"image_h": 50, "image_w": 100, "objects": objects}
        (folder / "predictions.tsv").write_text(f"{key}\t{json.dumps(record)}\n")
        return folder / "features.tsv"
    (folder / "train.feature.tsv").write_text(f"{key}\t{json.dumps({'num_boxes': 3, 'features': b64(table, dtype)})}\n")
    (folder / "train.label.tsv").write_text(f"{key}\t{json.dumps(objects)}\n")
    return folder / "train.feature.tsv"


@pytest.mark.parametrize("form", ["pretraining", "captions"])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_oscar_in_both_forms_and_widths_of_number(tmp_path, form, dtype, capsys):
    run(oscar_files(tmp_path / "in", dtype, form), "--store_dir", tmp_path / "store")
    regions = records(tmp_path / "store")["a"]["regions"]
    assert [(r["label"], r["score"], r["attributes"]) for r in regions] == [
        ("Thing1", 0.8, []),
        ("Thing2", 0.5, []),
        ("Thing0", 0.2, []),
    ]
    np.testing.assert_allclose(regions[0]["box"], [0.1, 0.2, 0.9, 0.8], atol=5e-4)
    expected = (np.arange(3 * 2048).reshape(3, 2048) % 100)[[1, 2, 0]]
    np.testing.assert_array_equal(roi_of(read_tars(tmp_path / "store")["a"]), expected.astype(np.float16))
    assert "has no attributes" in capsys.readouterr().out
    assert read_dataset_json(tmp_path / "store")["made_by"]["regions"]["attributes"] is False


def test_oscar_rows_that_do_not_belong_together(tmp_path):
    good = oscar_files(tmp_path / "good").read_text()
    for name, options, reason in (("count", {"drop": 1}, "count-mismatch"), ("box", {"shift": 0.05}, "box-mismatch")):
        path = oscar_files(tmp_path / name, key="b", **options)
        path.write_text(good + path.read_text())
        names = path.with_name("predictions.tsv")
        names.write_text((tmp_path / "good" / "predictions.tsv").read_text() + names.read_text())
        run(path, "--store_dir", tmp_path / f"store-{name}")
        assert problems(tmp_path / f"store-{name}", "regions") == [("rejected", "b", reason, 2)]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "features.tsv").write_text(good)
    with pytest.raises(ValueError, match="features without names and scores"):
        run(tmp_path / "alone" / "features.tsv", "--store_dir", tmp_path / "store")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".npz", ".npy"])
def test_what_needs_unpickling_is_not_read(tmp_path, suffix):
    (tmp_path / f"features{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not read: .*pickle"):
        run(tmp_path / f"features{suffix}", "--store_dir", tmp_path / "store")


def test_formats_without_scores_and_names_are_refused(tmp_path):
    path = tmp_path / "bottom_up.tsv"
    path.write_text(f"1\t100\t50\t1\t{b64([[0, 0, 5, 5]])}\t{b64(np.ones((1, 2048)))}\n")
    with pytest.raises(ValueError, match="no scores and no class names"):
        run(path, "--store_dir", tmp_path / "store")
    path.write_text(lxmert_row() + "\n")
    with pytest.raises(ValueError, match="--objects FILE --attributes FILE"):
        run(path, "--store_dir", tmp_path / "store")


BAD_ROWS = {
    "bad-base64": {"boxes": "!!!"},
    "bad-length": {"objects_conf": b64([0.5])},
    "bad-id": {"objects_id": b64([0, 4], "<i8")},
    "bad-number": {"num_boxes": "two"},
    "bad-size": {"img_w": 0},
    "bad-width": {"features": b64(np.ones((2, 9)))},
}


def test_malformed_rows_are_counted_with_line_and_reason(tmp_path, names):
    lines = [lxmert_row("good"), "", "no tab here"]
    lines += [lxmert_row(reason, **columns) for reason, columns in BAD_ROWS.items()]
    lines += [lxmert_row("short")[:40], lxmert_row("good"), lxmert_row("last")]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    run(tmp_path / "t.tsv", *names, "--store_dir", tmp_path / "store")
    assert list(read_tars(tmp_path / "store")) == ["good", "last"]
    expected = [("rejected", reason, reason, 4 + i) for i, reason in enumerate(BAD_ROWS)]
    expected += [
        ("rejected", "short", "bad-row", 10),
        ("rejected", None, "no-key", 3),
        ("rejected", "good", "duplicate-key", 11),
    ]
    assert problems(tmp_path / "store", "regions") == expected
    done = counts(tmp_path / "store", "regions")
    assert (done["in"], done["out"], done["rejected"]) == (11, 2, 9)


def test_regions_that_cannot_be_used_are_named_and_the_others_stay(tmp_path, names):
    nan, inf = float("nan"), float("inf")
    boxes = [
        [0, 0, 50, 25],
        [60, 0, 50, 25],
        [0, 30, 50, 25],
        [0, 0, 120, 25],
        [-9, 0, 5, 5],
        [nan, 0, 5, 5],
        *[[0, 0, 9, 9]] * 4,
        [0, 0, 100.5, 50.2],
    ]
    scores = [0.1, *[0.5] * 5, nan, 0.5, 0.5, 0.5, 0.9]
    features = np.ones((11, 8))
    features[7, 3], features[8, 0], features[9, 1] = nan, inf, 70_000
    row = lxmert_row(classes=[0] * 11, scores=scores, boxes=boxes, features=features)
    (tmp_path / "t.tsv").write_text(
        row
        + "\n"
        + lxmert_row("none", classes=[1], scores=[nan])
        + "\n"
        + lxmert_row("zero", classes=[], scores=[])
        + "\n"
    )
    run(tmp_path / "t.tsv", *names, "--store_dir", tmp_path / "store")
    reasons = [reason for _, key, reason, _ in problems(tmp_path / "store", "regions") if key == "a"]
    assert reasons == [
        *["box-upside-down"] * 2,
        *["box-outside"] * 2,
        "box-not-finite",
        "score-not-finite",
        *["feature-not-finite"] * 2,
        "feature-overflow",
    ]
    regions = records(tmp_path / "store")["a"]["regions"]
    # Half a pixel beyond the edge is rounding, and cut off.
    assert [(r["score"], r["box"]) for r in regions] == [(0.9, [0, 0, 1, 1]), (0.1, [0, 0, 0.5, 0.5])]
    assert [(k, reason) for _, k, reason, _ in problems(tmp_path / "store", "regions")[9:]] == [
        ("none", "score-not-finite"),
        ("none", "no-regions"),
        ("zero", "no-regions"),
    ]
    done = counts(tmp_path / "store", "regions")
    assert done["regions_in"] == 12 == done["regions_out"] + done["regions_beyond_top"] + done["regions_unusable"]


def packed(folder, keys, size=(100, 50), **extra):
    """Shards as `pack` leaves them, with a member that nobody knows; the record of each sample has `extra`."""
    samples = []
    for number, key in enumerate(keys):
        record = {"path": f"{key}.jpg", **extra}
        samples.append(
            (key, {"jpg": picture(number, size), "txt": b"a  cat", "json": json.dumps(record).encode(), "cls": b"3"})
        )
    write_tar(folder / "00000.tar", samples[:2])
    write_tar(folder / "00001.tar", samples[2:])
    return dict(samples)


def test_merging_into_shards_by_key_leaves_everything_else_alone(tmp_path, names):
    before = packed(tmp_path / "data", ["a", "b", "c"])
    rows = [lxmert_row("c", scores=(0.9, 0.1)), lxmert_row("unused"), lxmert_row("a")]
    rows.append(lxmert_row("b").replace(b64([[0, 0, 50, 25]] * 2), "!"))
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data")
    after, made = read_tars(tmp_path / "data"), records(tmp_path / "data")
    for key, members in before.items():
        assert {s: d for s, d in after[key].items() if s in ("jpg", "txt", "cls")} == {
            s: d for s, d in members.items() if s != "json"
        }
        assert made[key]["path"] == f"{key}.jpg"
    assert [r["label"] for r in made["a"]["regions"]] == ["dog", "cat"] and made["a"]["tags"] == ["big dog", "big cat"]
    assert roi_of(after["a"]).tolist() == [list(range(8, 16)), list(range(8))]
    assert [r["label"] for r in made["c"]["regions"]] == ["cat", "dog"]
    assert after["b"] == before["b"]
    assert problems(tmp_path / "data", "regions") == [("kept", "b", "bad-base64", 4)]
    done = counts(tmp_path / "data", "regions")
    assert (done["in"], done["out"], done["rejected"], done["rows"], done["rows_unused"], done["rows_malformed"]) == (
        3,
        3,
        0,
        4,
        1,
        1,
    )
    described = read_dataset_json(tmp_path / "data")
    assert (
        described["roi_feature_size"] == 8
        and described["made_by"]["regions"]["maker"] == "a detector"
        and "unfinished" not in described
    )


def test_other_regions_are_not_replaced_unknowingly(tmp_path, names):
    packed(tmp_path / "data", ["a", "b", "c"])
    (tmp_path / "t.tsv").write_text(lxmert_row("a") + "\n")
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data")
    with pytest.raises(ValueError, match="already has regions made by .*a detector"):
        run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data", made_by="another detector")
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data", "--overwrite", made_by="another detector")
    assert read_dataset_json(tmp_path / "data")["made_by"]["regions"]["maker"] == "another detector"
    (tmp_path / "t.tsv").write_text(lxmert_row("b") + "\n")
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data", "--overwrite", made_by="a third")
    made = records(tmp_path / "data")
    assert "regions" not in made["a"] and "tags" not in made["a"] and "regions" in made["b"]


def test_pieces_are_read_as_one(tmp_path, names):
    for piece, keys in enumerate(("ab", "bc")):
        (tmp_path / f"{piece}.tsv").write_text("".join(lxmert_row(k, scores=(piece, 0.5)) + "\n" for k in keys))
    flags = [tmp_path / "1.tsv", *names]
    run(tmp_path / "0.tsv", *flags, "--store_dir", tmp_path / "store", "--rows_per_shard", 3)
    assert [(k, r["regions"][-1]["score"]) for k, r in records(tmp_path / "store").items()] == [
        ("a", 0),
        ("b", 0),
        ("c", 0.5),
    ]
    assert problems(tmp_path / "store", "regions") == [("rejected", "b", "duplicate-key", 1)]
    packed(tmp_path / "data", ["a", "b", "c"])
    run(tmp_path / "0.tsv", *flags, "--merge_into", tmp_path / "data")
    merged = {k: r["regions"] for k, r in records(tmp_path / "data").items()}
    assert merged == {k: r["regions"] for k, r in records(tmp_path / "store").items()}


def test_features_of_a_picture_of_another_shape_are_not_taken(tmp_path, names):
    packed(tmp_path / "data", ["a", "b", "c"], size=(60, 30))  # the same shape, smaller: resized
    (tmp_path / "t.tsv").write_text(lxmert_row("a") + "\n" + lxmert_row("b", size=(50, 100)) + "\n")
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "data", "--output_dir", tmp_path / "out")
    made = records(tmp_path / "out")
    assert "regions" in made["a"] and "regions" not in made["b"]
    assert problems(tmp_path / "out", "regions") == [
        ("kept", "b", "size-mismatch", 2),
        ("kept", "c", "no-row", None),
    ]
    assert "regions" not in records(tmp_path / "data")["a"]


def test_scene_graph_sizes_come_from_the_picture_where_no_table_has_them(tmp_path):
    packed(tmp_path / "data", ["a", "b", "c"])
    (tmp_path / "predictions.tsv").write_text(scene_graph_row("a", [scene_graph_object(0.5)]) + "\n")
    run(tmp_path / "predictions.tsv", "--merge_into", tmp_path / "data")
    assert records(tmp_path / "data")["a"]["regions"][0]["box"] == [0, 0, 0.5, 0.5]


def test_keys_by_pattern_and_by_field(tmp_path, names):
    packed(tmp_path / "data", ["a", "b", "c"], image_id=17)
    (tmp_path / "t.tsv").write_text(lxmert_row("COCO_000017") + "\n")
    flags = ["--key_pattern", r"_0*(\d+)$", "--match_field", "image_id"]
    run(tmp_path / "t.tsv", *names, *flags, "--merge_into", tmp_path / "data")
    assert all("regions" in record for record in records(tmp_path / "data").values())


def test_a_store_merges_to_what_the_file_merges_to(tmp_path, names):
    (tmp_path / "t.tsv").write_text("\n".join(lxmert_row(key) for key in "cab") + "\n")
    for folder in ("direct", "stored"):
        packed(tmp_path / folder, ["a", "b", "c"])
    run(tmp_path / "t.tsv", *names, "--merge_into", tmp_path / "direct")
    run(tmp_path / "t.tsv", *names, "--store_dir", tmp_path / "store", "--rows_per_shard", 2)
    run_step(
        import_features,
        ["--input", str(tmp_path / "store"), "--merge_into", str(tmp_path / "stored"), "--device", "cpu"],
    )
    assert read_tars(tmp_path / "stored") == read_tars(tmp_path / "direct")
    # They came from one detector, and may be mixed.
    described = [read_dataset_json(tmp_path / name) for name in ("stored", "direct")]
    assert described[0]["made_by"]["regions"] == described[1]["made_by"]["regions"]
    with pytest.raises(ValueError, match="name it with --made-by"):
        run_step(
            import_features,
            [
                "--input",
                str(tmp_path / "t.tsv"),
                *map(str, names),
                "--store_dir",
                str(tmp_path / "x"),
                "--device",
                "cpu",
            ],
        )


@pytest.mark.parametrize(
    "odd",
    [
        [5],
        [{}],
        [scene_graph_object(10**400)],
        [scene_graph_object(0.5, box=(0, 0, 10**400, 1))],
        [scene_graph_object(0.5, attr_scores=None)],
        [scene_graph_object(0.5, attributes=5)],
        [scene_graph_object(0.5, feature={})],
        {"a": 1},
    ],
)
def test_an_odd_row_is_named_with_its_line_and_the_others_go_on(tmp_path, odd):
    rows = [scene_graph_row("good", [scene_graph_object(0.5)]), scene_graph_row("odd", odd)]
    (tmp_path / "predictions.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "x.hw.tsv").write_text("odd\t50 100\ngood\t50 100\n")
    run(tmp_path / "predictions.tsv", "--hw", tmp_path / "x.hw.tsv", "--store_dir", tmp_path / "store")
    assert list(read_tars(tmp_path / "store")) == ["good"]
    assert [(key, line) for _, key, _, line in problems(tmp_path / "store", "regions")] == [("odd", 2)]
