"""clip-benchmark's own command on a tiny model, against our evaluation of the same pictures."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.training.to_evaluate import save_tiny_model
from training.evaluate import main
from training.evaluation.clip_benchmark import _arguments, load_pyramidclip
from training.evaluation.results import read_json

pytest.importorskip("clip_benchmark")
CLASSES = ["cat", "dog", "owl", "cow", "hen", "pig"]
WORDS = "red green blue big small dog cat bird house tree car boat sun moon star".split()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "final")


@pytest.fixture(scope="module")
def pictures():
    """Thirty pictures as PNG, a class number and captions each."""
    rng, found = np.random.default_rng(0), []
    for number in range(30):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(file, "PNG")
        texts = [" ".join(rng.permutation(WORDS)[:4]) for _ in range(1 + number % 3)]
        found.append((file.getvalue(), number % 7 % 6, texts))
    return found


def write_webdataset(root, pictures, suffix, content):
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text("1")
    with tarfile.open(root / "test/0.tar", "w") as tar:
        for number, (data, label, texts) in enumerate(pictures):
            for name, part in (("png", data), (suffix, content(label, texts).encode())):
                member = tarfile.TarInfo(f"s{number:04d}.{name}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))


def bench(folder, root, output, *more):
    common = ["--dataset", "wds/mine", "--dataset_root", str(root), "--output", str(output), "--num_workers", "0"]
    assert main(["--bench", "--model", folder, *common, "--no_amp", "--batch_size", "7", *more]) == 0
    return json.loads(output.read_text())["metrics"]


def ours(folder, output, *arguments):
    assert main(["--model", folder, "--cpu", "--batch-size", "8", "--output", str(output), *arguments]) == 0
    return {one.metric_type: one.metric_value for one in read_json(output)[1]}


def test_zero_shot_classification_equals_ours(model_folder, pictures, tmp_path):
    root, classes = tmp_path / "wds", tmp_path / "classes"
    write_webdataset(root, pictures, "cls", lambda label, texts: str(label))
    (root / "classnames.txt").write_text("\n".join(CLASSES))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nmy {c}")
    for number, (data, label, _) in enumerate(pictures):
        (classes / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (classes / CLASSES[label] / f"{number}.png").write_bytes(data)
    (tmp_path / "templates").write_text("a photo of a {}.\nmy {}\n")
    theirs = bench(model_folder, root, tmp_path / "theirs.json", "--task", "zeroshot_classification")
    found = ours(
        *(model_folder, tmp_path / "ours.json", "--task", "zero-shot", "--data", str(classes)),
        *("--templates", str(tmp_path / "templates")),
    )
    assert 0 < theirs["acc1"] < theirs["acc5"] < 1
    assert (found["top_1"], found["top_5"], found["mean_per_class"]) == pytest.approx(
        (theirs["acc1"], theirs["acc5"], theirs["mean_per_class_recall"])
    )


def test_retrieval_equals_ours(model_folder, pictures, tmp_path):
    root, folder = tmp_path / "wds", tmp_path / "pictures"
    write_webdataset(root, pictures, "txt", lambda label, texts: "\n".join(texts))
    (root / "dataset_type.txt").write_text("retrieval")
    folder.mkdir()
    lines = ["image,caption"]
    for number, (data, _, texts) in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(data)
        lines += [f"{number}.png,{text}" for text in texts]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    theirs = bench(
        *(model_folder, root, tmp_path / "theirs.json", "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    )
    found = ours(
        *(model_folder, tmp_path / "ours.json", "--data", str(folder), "--captions", str(tmp_path / "captions.txt"))
    )
    assert (found["images"], found["texts"]) == (30, len(lines) - 1)
    for k in (1, 5, 10):
        assert found[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert found[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
    assert 0 < theirs["text_retrieval_recall@5"] < 1


def test_a_torchvision_data_set_and_the_table(model_folder, tmp_path, capsys):
    images = tmp_path / "root/dtd/dtd/images"
    for name in ("banded", "woven"):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(images / name / "1.jpg")
    (tmp_path / "root/dtd/dtd/labels").mkdir()
    (tmp_path / "root/dtd/dtd/labels/test1.txt").write_text("banded/1.jpg\nwoven/1.jpg\n")
    command = ["--bench", "eval", "--model", model_folder, "--dataset", "dtd", "--num_workers", "0"]
    where = ["--dataset_root", str(tmp_path / "root"), "--output", str(tmp_path / "{dataset}-{model}.json")]
    assert main([*command, *where]) == 0
    (result,) = tmp_path.glob("dtd-*final.json")
    assert json.loads(result.read_text())["metrics"]["acc1"] == 0.5  # the same picture twice
    assert main(["--bench", "build", str(result), "--output", str(tmp_path / "b.csv")]) == 0
    assert "mean_per_class_recall" in (tmp_path / "b.csv").read_text()


def test_what_is_added_to_the_arguments():
    assert _arguments(["--model", "runs/demo/final", "--quiet"]) == [
        *("eval", "--model", "runs_demo_final", "--quiet", "--model_type", "pyramidclip", "--pretrained", "")
    ]
    given = ["--model", "ViT-B-32", "--model_type", "open_clip", "--pretrained", "openai"]
    assert _arguments(["eval", *given]) == ["eval", *given]
    given = ["--model", "./m", "--pretrained", "", "--model_type", "pyramidclip"]
    assert _arguments(given) == ["eval", "--model", "m", *given[2:]]


def test_texts_are_padded_and_cut(model_folder):
    model, transform, tokenizer = load_pyramidclip(model_folder)
    ids = tokenizer(["a cat", "cat " * 200])
    assert ids.shape == (2, model.config.text_config.max_position_embeddings)
    assert tokenizer("a cat").shape[0] == 1
    assert transform(Image.new("L", (50, 40))).shape == (3, 32, 32)


def test_what_is_wrong_ends_with_code_2(model_folder, tmp_path, capsys):
    def error_of(*arguments):
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "--bench comes first" in error_of("--cpu", "--bench", "--model", model_folder)
    assert "--bench needs --model" in error_of("--bench", "--dataset", "cifar10")
    assert "a model that writes" in error_of("--bench", "--model", model_folder, "--task", "captioning")
    known = ("--bench", "--model", model_folder, "--quiet", "--dataset")
    assert "there is no such folder" in error_of(*known, "cifar10", "--dataset_root", str(tmp_path / "none"))
    assert "cifar10 cannot be read" in error_of(*known, "cifar10", "--dataset_root", str(tmp_path))
    assert "downloads nothing" in error_of(*known, "flickr30k", "--dataset_root", str(tmp_path))
    assert "there is no such folder" in error_of("--bench", "--model", "./none", "--dataset_root", str(tmp_path))
    assert not list(tmp_path.iterdir())
