"""Training a detector on squares and bars: it continues bit for bit, is the same on two processes, refuses."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("torchvision", reason="the detector is made of torchvision's parts")
pytest.importorskip("pycocotools", reason='needs pycocotools: pip install -e ".[detection]"')

from pyramidclip_command import EXIT_STOPPED
from pyramidclip_hf.configuration_detection import PyramidCLIPDetectionConfig
from pyramidclip_hf.modeling_detection import PyramidCLIPForObjectDetection
from tests.training.processes import run_in_processes
from tests.training.runs import after_step, assert_equal_runs
from tests.training.tiny import RESNET, VIT
from tests.training.to_detect import DETECTOR, MODEL, settings, write_data
from training import detection, detection_table
from training.data.annotations import open_annotations
from training.data.batches import DataError
from training.data.order import SampleOrder
from training.emoji import scenes
from training.evaluation.detection import measure
from training.evaluation.results import read_json
from training.loop import run as loop
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics
from training.settings.detecting import DetectionArguments
from training.settings.reading import parse_settings
from training.transfer.detection_batches import DetectionBatches
from training.transfer.detector import find_objects, initial_detector


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        name: write_data(folder / name, count, seed) for seed, (name, count) in enumerate((("train", 8), ("test", 3)))
    }


def run_settings(rank, world_size, args):
    return detection.run(args).steps


def disturbed(rank, world_size, args, step, kind):
    after_step(step, lambda: os.kill(os.getpid(), kind))
    return detection.run(args).finished


def test_a_run_leaves_a_detector_its_scores_and_a_page(tmp_path, data):
    args = settings(tmp_path / "run", data, test_data=[data["test"]], validation_data=data["test"], with_masks=True)
    args.eval_every_steps, args.trackers = 3, ["tensorboard"]
    result = detection.run(args)
    assert result.finished and result.steps == 6
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation/box_ap" in line] == [3, 6]
    tracked = EventAccumulator(str(next((tmp_path / "run" / "tensorboard").rglob("events.*")).parent)).Reload()
    assert [event.step for event in tracked.Scalars("validation/box_ap")] == [3, 6]
    seen = [event.value for event in tracked.Scalars("loss/mask")]
    assert seen == pytest.approx([line["loss/mask"] for line in lines if "loss/mask" in line])
    rates = [line["learning_rate"] for line in lines if "loss/total" in line]
    # Two steps of warm-up (0.2 of 6, rounded up); falls after 4 (0.75, rounded to the even) and 6 steps.
    assert rates == pytest.approx([2e-5, 0.02 * (0.0005 + 0.5), 0.02, 0.02, 2e-3, 2e-3])
    terms = ("objectness", "rpn_box", "classification", "box", "mask")
    assert lines[0]["loss/total"] == pytest.approx(sum(lines[0][f"loss/{name}"] for name in terms), rel=1e-5)
    model = PyramidCLIPForObjectDetection.from_pretrained(result.final).eval()
    assert model.config.id2label == {0: "square", 1: "bar"} and model.config.short_side == 48
    (found,) = model.detect([Image.open(data["test"].rpartition("a.json")[0] + "pictures/1.png")])
    names = {"picture": Image.open(data["test"].rpartition("a.json")[0] + "pictures/1.png")}
    page = (Path(__file__).resolve().parents[2] / "docs" / "detection.md").read_text(encoding="utf8")
    exec(page.split("```python\n")[1].split("```")[0].replace("runs/voc/final", str(result.final)), names)
    assert torch.equal(names["found"].boxes, found.boxes) and set(names["names"]) <= {"square", "bar"}
    entries = json.loads((tmp_path / "run" / "detections.json").read_text())
    own = [entry for entry in entries if entry["image_id"] == 10]
    assert [entry["score"] for entry in own] == pytest.approx(found.scores.tolist(), abs=1e-5)
    assert {entry["category_id"] for entry in entries} <= {4, 9}
    _, rows, _ = read_json(result.final / "results.json")
    assert {row.metric_type for row in rows} >= {"voc_ap", "box_ap50", "mask_ap"}
    assert {row.dataset_config for row in rows} == {None, "square", "bar"}
    assert "pipeline_tag: object-detection" in (result.final / "README.md").read_text()
    assert (result.final / "results.csv").read_text().count("square") == 18
    page = (tmp_path / "run" / "detections.html").read_text()
    assert page.count("data:image/jpeg") == 3 and "Most mistakes first" in page


@pytest.mark.slow
def test_it_learns_a_handful_of_scenes_by_heart(tmp_path):
    """Pictures that it has seen: the test of the method is docs/transfer.md's table."""
    assert scenes.main(["--output-dir", str(tmp_path), "--format", "coco", "--train", "8", "--validation", "2"]) == 0
    source = f"{tmp_path / 'instances_train.json'}:train"
    args = settings(
        tmp_path / "run", {"train": source}, max_steps=60, global_batch_size=8, save_every_steps=0, flip=False,
        log_every_steps=10, short_sides=[96], test_short_side=96, precise_batch_norm=1, decay_at=[0.8],
        model_config={**MODEL, "vision_config": {**RESNET, "width": 16, "hidden_size": 512, "image_size": 96}},
        detector={**DETECTOR, "anchor_sizes": [32, 64], "roi_size": 8, "roi_samples": 32, "rpn_samples": 64},
    )  # fmt: skip
    known = open_annotations([source], training=False)

    def ap50(model):
        return measure(known, find_objects(model.eval(), known)).metrics["voc_ap50"]

    untrained, _ = initial_detector(args, known.class_names)
    before = ap50(untrained)
    result = detection.run(args)
    losses = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/total" in line]
    for name in ("total", "objectness", "classification"):  # that of boxes rises while more regions hit
        assert losses[-1][f"loss/{name}"] < 0.5 * losses[0][f"loss/{name}"]
    after = ap50(PyramidCLIPForObjectDetection.from_pretrained(result.final))
    assert before < 0.05 and after > 0.2, (before, after)


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp_path, data):
    plain, killed = tmp_path / "a", tmp_path / "b"
    changes = {"with_masks": True, "test_data": [data["test"]]}
    run_in_processes(run_settings, 1, settings(plain, data, **changes))
    with pytest.raises(AssertionError):
        run_in_processes(disturbed, 1, settings(killed, data, **changes), 5, signal.SIGKILL)
    assert list_checkpoints(killed)[-1].name == "step-00000004"
    run_in_processes(run_settings, 1, settings(killed, data, resume="latest", dataloader_workers=1, **changes))
    assert_equal_runs(plain, killed, kept=())


def test_sigterm_saves(tmp_path, data):
    args = settings(tmp_path, data, save_every_steps=0)
    assert run_in_processes(disturbed, 1, args, 3, signal.SIGTERM) == [False]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, data):
    """But for rounding: BatchNorm, which sees other batches, is held."""
    folders = [tmp_path / str(number) for number in (1, 2)]
    for processes, folder in enumerate(folders, 1):
        args = settings(folder, data, batch_norm="frozen", learning_rate=1e-3, test_data=[data["test"]])
        assert run_in_processes(run_settings, processes, args) == [6] * processes
    losses = [[line["loss/total"] for line in read_metrics(folder / "metrics.jsonl") if "loss/total" in line]
              for folder in folders]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dry_run(tmp_path, data, capsys):
    detection.run(settings(tmp_path / "none", data, dry_run=True))
    told = capsys.readouterr().out
    assert "Faster R-CNN over 2 classes, 8 regions of a picture, short sides 48 to 64; sgd" in told
    assert "6 steps, 24 samples" in told and not (tmp_path / "none").exists()


def test_scale_and_mirroring_are_of_seed_epoch_and_picture(data):
    opened = open_annotations([data["train"]], training=True)
    order = SampleOrder([[len(opened)]], 3, window_samples=1)
    made = DetectionBatches(
        opened, order, [48, 64], 96, True, PyramidCLIPDetectionConfig(vision_config={**RESNET}, with_masks=True)
    )
    first, again = made[1, [0, 1, 2]], made[1, [0, 1, 2]]
    assert all(torch.equal(first[name], again[name]) for name in first if isinstance(first[name], torch.Tensor))
    assert not torch.equal(first["draws"], made[2, [0, 1, 2]]["draws"])
    assert first["pixel_values"].shape[2] % 32 == first["pixel_values"].shape[3] % 32 == 0
    seen = {(tuple(view["pixels"].shape[1:]), bool(view["boxes"][0, 0] > 24))
            for epoch in range(20) for view in [made.view(epoch, 0)]}  # fmt: skip
    assert {size for size, _ in seen} == {(48, 64), (64, 85)}
    for epoch in range(4):
        view = made.view(epoch, 0)
        for box, mask in zip(view["boxes"], view["masks"]):  # mask and box move together
            rows, columns = mask.nonzero(as_tuple=True)
            drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            torch.testing.assert_close(drawn.float(), box, atol=1.01, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ViT-B-32", "model_config": {**MODEL, "vision_config": VIT}}, "picture tower is a ViT.*a backbone"),
        ({"detector": {**DETECTOR, "anchor_sizes": [64]}}, "side of 48 is smaller than the smallest anchor of 64"),
        ({"global_batch_size": 9}, "the data has 8 samples, fewer than one global batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(tmp_path, data, changes, message):
    with pytest.raises(ValueError, match=message):
        detection.run(settings(tmp_path, data, **changes))


def test_a_mask_head_needs_masks_and_a_test_its_own_pictures(tmp_path, data):
    bare = write_data(tmp_path / "bare", 2, 5, masks=False)
    with pytest.raises(ValueError, match="have no masks"):
        detection.run(settings(tmp_path / "a", {"train": bare}, with_masks=True, global_batch_size=2))
    with pytest.raises(ValueError, match="8 of 8 pictures of a are trained on"):
        detection.run(settings(tmp_path / "b", data, test_data=[data["train"]]))


def test_a_picture_of_another_size_ends_the_run_with_its_name(tmp_path):
    source = write_data(tmp_path / "own", 2, 6)
    Image.new("RGB", (60, 48)).save(tmp_path / "own" / "pictures" / "2.png")
    with pytest.raises(DataError, match="2.png is 60 x 48, its annotation says 64 x 48"):
        detection.run(settings(tmp_path / "run", {"train": source}, global_batch_size=2))
    with pytest.raises(DataError, match="more than max_image_pixels=99"):
        detection.run(settings(tmp_path / "few", {"train": source}, global_batch_size=2, max_image_pixels=99))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model: expected"),
        ({"short_sides": [16]}, "at least 32"),
        ({"short_sides": [800]}, "long_side 96 is below"),
        ({"decay_at": [0.9, 0.5]}, "rising shares"),
        ({"gradient_checkpointing": True}, "regions would be counted twice"),
        ({"train_data": []}, "train_data: expected VOC_FOLDER"),
    ],
)
def test_settings_that_cannot_be(tmp_path, data, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, data, **changes)


def test_without_a_test_a_run_ends_too(tmp_path, data):
    result = detection.run(settings(tmp_path, data, max_steps=1, precise_batch_norm=0))
    assert result.finished and (result.final / "results.json").is_file()


def test_pictures_that_are_narrower_than_every_anchor(tmp_path, data):
    source = write_data(tmp_path / "narrow", 2, 5)
    document = json.loads((tmp_path / "narrow" / "a.json").read_text())
    document["images"].append({"id": 99, "file_name": "bar.png", "width": 300, "height": 12})
    box = {"id": 99, "image_id": 99, "category_id": 4, "bbox": [1, 1, 9, 9], "iscrowd": 0}
    document["annotations"].append(box)
    Image.new("RGB", (300, 12)).save(tmp_path / "narrow" / "pictures" / "bar.png")
    (tmp_path / "narrow" / "a.json").write_text(json.dumps(document))
    for parts in ({"train_data": [source]}, {"test_data": [source]}):
        with pytest.raises(ValueError, match=r"1 of 3 pictures .* of 300 x 12 becomes 96 x 4. Take them out"):
            detection.run(settings(tmp_path / "run", data, **parts))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_recipes_are_the_papers_schedules():
    words = ["--model", "RN50"]
    voc = parse_settings(DetectionArguments, ["--config", "training/configs/voc_faster_rcnn.yaml", *words], "")
    rates = [voc.learning_rate_of(step, voc.max_steps) for step in (0, 50, 100, 17999, 18000, 21999, 22000)]
    assert rates == pytest.approx([2e-5, 0.02 * (0.0005 + 0.5), 0.02, 0.02, 2e-3, 2e-3, 2e-4])
    coco = parse_settings(DetectionArguments, ["--config", "training/configs/coco_mask_rcnn.yaml", *words], "")
    rates = [coco.learning_rate_of(step, coco.max_steps) for step in (1000, 59999, 60000, 80000)]
    assert rates == pytest.approx([0.02, 0.02, 2e-3, 2e-4]) and coco.with_masks and voc.global_batch_size == 40


@pytest.mark.parametrize("recipe", ["emoji_detection", "voc_faster_rcnn", "coco_mask_rcnn"])
def test_recipes_can_be_read(recipe):
    parse_settings(DetectionArguments, ["--config", f"training/configs/{recipe}.yaml", "--model", "RN50"], "")


def test_the_table_of_several_models_goes_on_where_it_was(tmp_path, data, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    values = dataclasses.asdict(settings(tmp_path, data, test_data=[data["test"]], max_steps=2, save_every_steps=0))
    recipe.write_text(
        json.dumps({name: value for name, value in values.items() if name not in ("output_dir", "model")})
    )
    words = ["--recipe", str(recipe), "--output-dir", str(tmp_path / "out"), "--models", "one=RN50", "two=RN50"]
    stopped, ran, original = [], [], detection.run

    def one_run(args):
        ran.append(Path(args.output_dir).name)
        if len(ran) == 2 and not stopped:
            stopped.append(True)
            return loop.RunResult(tmp_path, 1, False, None, {}, None, None)
        return original(args)

    monkeypatch.setattr(detection, "run", one_run)
    assert detection_table.main([*words, "--seeds", "0"]) == EXIT_STOPPED
    assert detection_table.main([*words, "--seeds", "0"]) == 0
    assert ran == ["one-0", "two-0", "one-0", "two-0"]
    assert "is finished, step 2: nothing is left to do" in capsys.readouterr().out
    values = json.loads((tmp_path / "out" / "table.json").read_text())
    assert values["one"] == values["two"] and values["one"]["0"].keys() >= {"test/voc_ap", "test/box_ap75"}
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[2].startswith("| one | 1 | ")


def test_the_tables_means_and_deviations():
    metrics = [{f"test/{name}": value for name in detection_table.COLUMNS} for value in (0.1, 0.2, 0.3)]
    shown = detection_table.table_of({"random": dict(enumerate(metrics))}).splitlines()
    assert shown[2] == "| random | 3 | " + " | ".join(["20.0 ± 10.0"] * 9) + " |"
    with pytest.raises(ValueError, match="expected NAME=MODEL"):
        detection_table.parse(["--recipe", "x", "--output-dir", "x", "--models", "RN50"])
