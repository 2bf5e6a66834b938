"""The `pyramidclip` command against plain loops over the model: one picture at a time, no parts, no threads."""

import configparser
import errno
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor, cli, files
from pyramidclip_hf.embedding_files import EmbeddingJob, read_embeddings
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.picture_files import contact_sheet, find_pictures, read_ahead
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES

ROTATED = "b/rotated.jpg"
BROKEN = ("b/cut.jpg", "b/words.png")
COLOURS = {"a/red.png": (230, 20, 20), "a/green.webp": (20, 200, 40), "blue.jpg": (20, 40, 220)}


def save_tiny_model(folder, seed):
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_leff_layers": 1}  # fmt: skip
    model = PyramidCLIPModel(PyramidCLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True, scope="module")
def each_processor_is_read_once():
    """Most of the time of a command on a tiny model goes into the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PyramidCLIPProcessor, "from_pretrained", functools.cache(PyramidCLIPProcessor.from_pretrained))
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def other_model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven good pictures, one of them turned by EXIF, two broken ones, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a", "b", ".hidden"):
        (folder / name).mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    for name in ("a/noise.PNG", "b/noise.gif", "noise.bmp"):
        Image.fromarray(rng.integers(60, 140, (50, 36, 3), np.uint8)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(60, 140, (30, 60, 3), np.uint8)).save(folder / ROTATED, exif=exif)
    (folder / BROKEN[0]).write_bytes((folder / ROTATED).read_bytes()[:700])
    (folder / BROKEN[1]).write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    Image.new("RGB", (8, 8)).save(folder / ".hidden" / "no.png")
    Image.new("RGB", (8, 8)).save(folder / "a" / "._red.png")
    return folder


def good_ones(folder):
    found = [*COLOURS, "a/noise.PNG", "b/noise.gif", "noise.bmp", ROTATED]
    return {str(folder / name) for name in found}


@functools.cache
def loaded(model_dir):
    return PyramidCLIPModel.from_pretrained(model_dir).eval(), PyramidCLIPProcessor.from_pretrained(model_dir)


def plain_image_embedding(model_dir, path):
    model, processor = loaded(model_dir)
    with torch.no_grad():
        embed = model.encode_image(processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"])[0]
    return (embed / embed.norm()).numpy()


def plain_text_embeddings(model_dir, texts):
    model, processor = loaded(model_dir)
    with torch.no_grad():
        embeds = [model.encode_text(processor(text=[text], return_tensors="pt")["input_ids"])[0] for text in texts]
    return torch.stack([embed / embed.norm() for embed in embeds]).numpy()


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command in this process."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# Which pictures


def test_folders_globs_files_and_stdin(pictures, monkeypatch):
    everything = good_ones(pictures) | {str(pictures / name) for name in BROKEN}
    assert set(find_pictures([str(pictures)])) == everything
    in_a = {str(pictures / name) for name in ("a/red.png", "a/green.webp", "a/noise.PNG")}
    assert set(find_pictures([str(pictures / "a")])) == in_a
    assert find_pictures([str(pictures / "*.jpg")]) == [str(pictures / "blue.jpg")]
    assert set(find_pictures([str(pictures / "**" / "*.jpg")])) == {path for path in everything if path.endswith("jpg")}
    # Named outright, a file counts whatever it is called, and each counts once.
    named = [str(pictures / "notes.txt"), str(pictures / "blue.jpg")]
    assert find_pictures([*named, str(pictures / "*.jpg")]) == named
    assert find_pictures(["-", named[1]], ["with space.jpg\n", "\n", f"{named[1]}\r\n"]) == ["with space.jpg", named[1]]
    assert find_pictures([str(pictures)]) == find_pictures([str(pictures)])


@pytest.mark.parametrize("missing", ["no/such/folder", "nothing-*.jpg"])
def test_what_is_not_there_is_an_error(missing, pictures, capsys, model_dir):
    code, out, err = run(capsys, "classify", "--model", model_dir, pictures / missing, "--labels", "cat")
    assert (code, out) == (2, "") and missing in err and err.count("\n") == 1


def test_reading_ahead_keeps_the_order_and_its_bound():
    begun, seen = [], []

    def read(item):
        begun.append(item)
        time.sleep(0.02 if item == "0" else 0)
        return int(item) ** 2

    for item, value in read_ahead(map(str, range(50)), read, workers=4, ahead=8):
        assert len(begun) <= len(seen) + 8 + 2
        seen.append((item, value))
    assert seen == [(str(number), number**2) for number in range(50)]


# classify


def test_classify_agrees_with_the_plain_softmax(pictures, capsys, model_dir, tmp_path):
    labels = ["cat", "a dog", "bird"]
    (tmp_path / "templates.txt").write_text("a {}\nmany {} here\n")
    embeds = plain_text_embeddings(model_dir, [t.replace("{}", x) for x in labels for t in ("a {}", "many {} here")])
    classes = embeds.reshape(3, 2, -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    scale = np.exp(loaded(model_dir)[0].logit_scale.item())
    flags = ["--templates", tmp_path / "templates.txt", "--top-k", 2, "--batch-size", 3]
    code, out, err = run(capsys, "classify", "--model", model_dir, pictures, "--labels", *labels, *flags, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == cli.EXIT_SKIPPED and {row["path"] for row in rows} == good_ones(pictures)
    assert all(f"skipped {pictures / name}: " in err for name in BROKEN) and "2 of 9 were skipped" in err
    for row in rows:
        logits = scale * classes @ plain_image_embedding(model_dir, row["path"])
        expected = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-expected)[:2]
        assert [one["label"] for one in row["predictions"]] == [labels[place] for place in best]
        assert np.allclose([one["probability"] for one in row["predictions"]], expected[best], atol=2e-5)


def test_classify_writes_tabs_and_takes_the_eighty_prompts(pictures, capsys, model_dir, tmp_path, monkeypatch):
    (tmp_path / "labels.txt").write_text("\ufeffcat\ndog\n", encoding="utf8")
    (tmp_path / "templates.txt").write_text("\n".join(IMAGENET_TEMPLATES))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{pictures / 'blue.jpg'}\n{pictures / 'gone.jpg'}\n"))
    flags = ["--model", model_dir, "--labels-file", tmp_path / "labels.txt", "--top-k", 2]
    code, out, err = run(capsys, "classify", *flags, "-", "--quiet")
    assert code == cli.EXIT_SKIPPED and f"skipped {pictures / 'gone.jpg'}" in err
    path, first, probability, second, rest = out.rstrip("\n").split("\t")
    assert path == str(pictures / "blue.jpg") and {first, second} == {"cat", "dog"}
    assert float(probability) + float(rest) == pytest.approx(1, abs=2e-4)
    again = run(capsys, "classify", *flags, pictures / "blue.jpg", "--templates", tmp_path / "templates.txt")
    assert again[:2] == (0, out)


@pytest.mark.parametrize(
    ("labels", "message"),
    [("cat\n\ndog\n", "line 2 is blank"), ("", "it is empty"), ("cat\nCat\n", "repeated"), (b"\xff\xfe", "UTF-8")],
)
def test_labels_that_cannot_be(labels, message, pictures, capsys, model_dir, tmp_path):
    data = labels if isinstance(labels, bytes) else labels.encode()
    (tmp_path / "labels.txt").write_bytes(data)
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels-file", tmp_path / "labels.txt"]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and message in err


def test_pictures_beyond_the_limit_are_not_decoded(pictures, capsys, model_dir):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", pictures / "noise.bmp", "--labels", "cat"]
    code, out, err = run(capsys, *argv, "--max-image-pixels", 1500)
    assert code == cli.EXIT_SKIPPED and str(pictures / "blue.jpg") in out
    assert "36 x 50 pixels" in err and "1500" in err


# embed


def embed(capsys, model_dir, pictures, output, *flags):
    argv = ["embed", "--model", model_dir, pictures, "--output", output, "--part-size", 3, "--batch-size", 2, *flags]
    return run(capsys, *argv)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embed_agrees_with_a_loop_over_the_model(suffix, pictures, capsys, model_dir, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    output = tmp_path / f"pictures{suffix}"
    code, out, err = embed(capsys, model_dir, pictures, output, "--json")
    summary = json.loads(out)
    assert code == cli.EXIT_SKIPPED and summary["rows"] == 7
    assert {entry["path"] for entry in summary["skipped"]} == {str(pictures / name) for name in BROKEN}
    assert all(f"skipped {pictures / name}: " in err for name in BROKEN)
    stored = read_embeddings(output)
    order = [path for path in find_pictures([str(pictures)]) if path in good_ones(pictures)]
    assert stored.names == order and stored.kind == "path"
    assert stored.embeddings.flags.writeable  # torch warns of an array that is not
    expected = np.stack([plain_image_embedding(model_dir, path) for path in order])
    assert np.abs(stored.embeddings - expected).max() < 1e-5
    assert stored.metadata["model"] == model_dir and stored.metadata["settings"]["dtype"] == "float32"
    assert sorted(os.listdir(tmp_path)) == [output.name]
    if suffix == ".npz":
        with np.load(output, allow_pickle=False) as arrays:
            assert sorted(arrays) == ["embedding", "metadata", "path"]
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(output)
        assert table.column_names == ["path", "embedding"]
        assert json.loads(table.schema.metadata[b"pyramidclip"]) == stored.metadata
        assert table.to_pylist()[0]["embedding"] == stored.embeddings[0].tolist()


def kill_at(moment, argv):
    """Runs the command in a child that kills itself at the `moment`-th step of putting a file into place (even: just
    before the renaming, odd: just after); False where it came to its end."""
    child = os.fork()
    if not child:
        try:
            steps = iter(range(1000))
            replace = os.replace

            def counted(*paths):
                for done in (False, True):
                    if next(steps) == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if not done:
                        replace(*paths)

            os.replace = counted
            cli.main([str(word) for word in argv])
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_same_command_gives_the_same_file(pictures, capsys, model_dir, tmp_path, monkeypatch):
    fuse = PyramidCLIPModel.fuse
    monkeypatch.setattr(PyramidCLIPModel, "fuse", lambda self, linear="auto": fuse(self, "torch"))
    undisturbed = tmp_path / "undisturbed.npz"
    embed(capsys, model_dir, pictures, undisturbed)
    moment = 0
    while True:
        output = tmp_path / f"killed{moment}.npz"
        argv = ["embed", "--model", model_dir, pictures, "--output", output, "--part-size", 3, "--batch-size", 2]
        if not kill_at(moment, [*argv, "--quiet"]):
            break
        code, _, err = run(capsys, *argv)
        assert code == cli.EXIT_SKIPPED and all(f"skipped {pictures / name}: " in err for name in BROKEN)
        assert output.read_bytes() == undisturbed.read_bytes(), f"killed at {moment}"
        moment += 1
    assert moment == 2 * 6  # the job, its choice of library, three parts, the result
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz"}


def test_ctrl_c_says_how_to_go_on(pictures, capsys, model_dir, tmp_path, monkeypatch):
    output = tmp_path / "pictures.npz"
    save = EmbeddingJob.save

    def interrupted(self, number, *args):
        if number == 1:
            signal.raise_signal(signal.SIGINT)
        save(self, number, *args)

    monkeypatch.setattr(EmbeddingJob, "save", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    code, out, err = embed(capsys, model_dir, pictures, output)
    signal.signal(signal.SIGINT, handler)
    assert code == 130 and "same command continues" in err and not output.exists()
    monkeypatch.undo()
    seen = []

    def noted(self, number, *args):
        seen.append(number)
        save(self, number, *args)

    monkeypatch.setattr(EmbeddingJob, "save", noted)
    code, out, err = embed(capsys, model_dir, pictures, output)
    assert code == cli.EXIT_SKIPPED and seen == [1, 2] and "1 of 3 parts are done" in err
    code, out, err = embed(capsys, model_dir, pictures, output)
    assert code == cli.EXIT_SKIPPED and "complete already" in err and seen == [1, 2]


def stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output, *flags):
    save = EmbeddingJob.save

    def once(self, number, *args):
        save(self, number, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingJob, "save", once)
        assert embed(capsys, model_dir, pictures, output, *flags)[0] == 130


def test_a_job_keeps_to_the_library_that_its_first_run_chose(pictures, capsys, model_dir, tmp_path, monkeypatch):
    output, asked, fuse = tmp_path / "pictures.npz", [], PyramidCLIPModel.fuse
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has one library only")

    def measured(self, linear="auto"):
        asked.append(linear)
        # What "auto" finds is up to the moment; let it be one, then the other.
        return fuse(self, "onednn" if linear == "auto" and len(asked) == 1 else linear.replace("auto", "torch"))

    monkeypatch.setattr(PyramidCLIPModel, "fuse", measured)
    stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output)
    embed(capsys, model_dir, pictures, output)
    assert asked == ["auto", "onednn", "onednn"]


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_do_not_continue(finished, pictures, capsys, model_dir, other_model_dir, tmp_path, monkeypatch):
    output = tmp_path / "pictures.npz"
    if finished:
        embed(capsys, model_dir, pictures, output)
    else:
        stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output)
    changes = {
        f"model then {model_dir}": (other_model_dir, pictures),
        'dtype then "float32", now "bfloat16"': (model_dir, pictures, "--dtype", "bfloat16"),
        "max_image_pixels then 100000000, now 5000": (model_dir, pictures, "--max-image-pixels", 5000),
        "inputs then": (model_dir, pictures / "a"),
    }
    for message, (model, where, *flags) in changes.items():
        code, _, err = embed(capsys, model, where, output, *flags)
        assert code == 2 and message in err and "--overwrite" in err
    # With --overwrite too, a stopped job continues, and what was finished before stays until it has ended.
    before = output.read_bytes() if finished else None
    stop_after_one_part(monkeypatch, capsys, other_model_dir, pictures, output, "--overwrite")
    assert (output.read_bytes() if finished else None) == before
    code, _, err = embed(capsys, other_model_dir, pictures, output, "--overwrite")
    assert code == cli.EXIT_SKIPPED and "1 of 3 parts are done" in err
    assert read_embeddings(output).metadata["model"] == other_model_dir


def test_pictures_that_come_meanwhile_wait_for_another_run(pictures, capsys, model_dir, tmp_path, monkeypatch):
    folder, output = tmp_path / "growing", tmp_path / "pictures.npz"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(folder / f"{number}.png")
    stop_after_one_part(monkeypatch, capsys, model_dir, folder, output)
    Image.new("RGB", (9, 9)).save(folder / "0-new.png")
    code, _, err = embed(capsys, model_dir, folder, output)
    assert code == 0 and "1 pictures have come and 0 have gone" in err
    assert [os.path.basename(name) for name in read_embeddings(output).names] == [f"{n}.png" for n in range(5)]
    code, out, err = embed(capsys, model_dir, folder, output, "--quiet", "--json")  # finished: still said, still kept
    assert code == 0 and "1 pictures have come and 0 have gone" in err and json.loads(out)["rows"] == 5


def test_a_damaged_part_is_named(pictures, capsys, model_dir, tmp_path, monkeypatch):
    output = tmp_path / "pictures.npz"
    stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output)
    part = tmp_path / "pictures.npz.parts" / "part-000000.npz"
    part.write_bytes(part.read_bytes()[:100])
    code, _, err = embed(capsys, model_dir, pictures, output)
    assert code == 2 and str(part) in err and "delete it" in err
    part.unlink()
    assert embed(capsys, model_dir, pictures, output)[0] == cli.EXIT_SKIPPED


def test_a_full_disk_keeps_what_is_complete(pictures, capsys, model_dir, tmp_path, monkeypatch):
    output = tmp_path / "pictures.npz"
    stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    code, _, err = embed(capsys, model_dir, pictures, output)
    assert code == 1 and "disk is full" in err and "same command continues" in err
    assert sorted(os.listdir(tmp_path / "pictures.npz.parts")) == ["job.json", "linear.txt", "part-000000.npz"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names are Unicode")
def test_a_name_that_is_not_utf8_is_skipped(pictures, capsys, model_dir, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"\xff.png", "gr\u00fcn.png".encode()):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write((pictures / "a/red.png").read_bytes())
    code, out, err = embed(capsys, model_dir, folder, tmp_path / "x.npz", "--json")
    assert code == cli.EXIT_SKIPPED and "UTF-8" in err and json.loads(out)["rows"] == 1
    assert read_embeddings(tmp_path / "x.npz").names == [str(folder / "gr\u00fcn.png")]


def test_nothing_readable_writes_nothing(pictures, capsys, model_dir, tmp_path):
    output = tmp_path / "none.npz"
    code, out, err = run(capsys, "embed", "--model", model_dir, pictures / BROKEN[0], "--output", output)
    assert code == 2 and "None of 1 could be embedded" in err and not output.exists()


def test_texts_are_embedded_in_their_order(capsys, model_dir, tmp_path, pictures):
    texts = ["a red bat", "fox", "a long line about a purple helicopter over a house", "fox"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    output = tmp_path / "texts.npz"
    argv = ["embed", "--model", model_dir, "--texts", tmp_path / "texts.txt", "--output", output, "--part-size", 3]
    assert run(capsys, *argv)[0] == 0
    stored = read_embeddings(output)
    assert stored.names == texts and stored.kind == "text"
    assert np.abs(stored.embeddings - plain_text_embeddings(model_dir, texts)).max() < 1e-5
    code, out, _ = run(capsys, "search", output, "--image", pictures / "blue.jpg", "--top-k", 1, "--json")
    scores = stored.embeddings @ plain_image_embedding(model_dir, pictures / "blue.jpg")
    assert code == 0 and json.loads(out)["text"] == texts[int(scores.argmax())]
    sheet = run(capsys, "search", output, "--text", "fox", "--output", tmp_path / "sheet.png")
    assert sheet[0] == 2 and "holds texts" in sheet[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.csv"], ".parquet or .npz"),
        (["--output", "nowhere/x.npz"], "no folder nowhere"),
        (["--output", "x.npz", "--texts", "t.txt", "a.png"], "one kind"),
        (["--output", "x.npz"], "Expected pictures"),
    ],
)
def test_wrong_ways_to_embed(flags, message, capsys, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "embed", "--model", model_dir, *flags)
    assert code == 2 and message in err


def test_parquet_without_pyarrow_names_the_extra(pictures, capsys, model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = embed(capsys, model_dir, pictures, tmp_path / "x.parquet")
    assert code == 2 and "pyramidclip-hf[train]" in err and ".npz" in err


# search


@pytest.fixture(scope="module")
def embedded(pictures, model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("embedded") / "pictures.npz"
    assert cli.main(["embed", "--model", model_dir, str(pictures), "--output", str(output), "--quiet"]) == 3
    return output


def test_search_ranks_by_cosine(embedded, pictures, capsys, model_dir):
    texts, image = ["a red bat", "fox"], str(pictures / "a/red.png")
    code, out, err = run(capsys, "search", embedded, "--text", *texts, "--image", image, "--top-k", 3, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["query"] for row in rows] == [q for q in [*texts, image] for _ in range(3)]
    stored = read_embeddings(embedded)
    queries = [*plain_text_embeddings(model_dir, texts), plain_image_embedding(model_dir, image)]
    for number, query in enumerate(queries):
        scores = stored.embeddings @ query
        best = np.argsort(-scores)[:3]
        own = rows[3 * number : 3 * number + 3]
        assert [row["path"] for row in own] == [stored.names[place] for place in best]
        assert [row["rank"] for row in own] == [1, 2, 3]
        assert np.allclose([row["score"] for row in own], scores[best], atol=1e-5)
    assert rows[6]["path"] == image and rows[6]["score"] == pytest.approx(1, abs=1e-5)
    plain = run(capsys, "search", embedded, "--text", texts[0], "--top-k", 1)[1]
    assert plain == f"{texts[0]}\t1\t{rows[0]['score']:.4f}\t{rows[0]['path']}\n"


def test_search_refuses_another_model(embedded, model_dir, other_model_dir, capsys, tmp_path):
    code, out, err = run(capsys, "search", embedded, "--model", other_model_dir, "--text", "fox")
    assert (code, out) == (2, "") and "another model" in err and model_dir in err and other_model_dir in err
    # A copy of the model is the same model.
    for part in loaded(model_dir):
        part.save_pretrained(tmp_path)
    assert run(capsys, "search", embedded, "--model", tmp_path, "--text", "fox")[0] == 0


def test_files_that_are_no_embeddings(embedded, capsys, tmp_path):
    def refused(name, message):
        code, out, err = run(capsys, "search", tmp_path / name, "--text", "fox")
        assert (code, out) == (2, "") and message in err, err

    refused("gone.npz", "There is no file")
    refused("x.csv", ".parquet or .npz")
    (tmp_path / "cut.npz").write_bytes(embedded.read_bytes()[:500])
    refused("cut.npz", "damaged")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    refused("foreign.npz", "no file of embeddings")
    np.savez(tmp_path / "pickled.npz", metadata=np.array({"kind": "path"}, dtype=object), allow_pickle=True)
    refused("pickled.npz", "allow_pickle=False")
    with np.load(embedded) as arrays:
        stored = dict(arrays)
    np.savez(tmp_path / "long.npz", **{**stored, "embedding": stored["embedding"] * 2})
    refused("long.npz", "not of unit length")
    np.savez(tmp_path / "short.npz", **{**stored, "embedding": stored["embedding"][1:]})
    refused("short.npz", "for 7")


def test_the_contact_sheet_shows_the_hits_in_order(embedded, pictures, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    argv = ["search", embedded, "--image", pictures / "blue.jpg", "--text", "a fox", "--top-k", 7, "--json"]
    code, out, err = run(capsys, *argv, "--output", sheet)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and str(sheet) in err
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)

    def first_seen(colour):
        """(row, column) of the topmost pixel of a colour; JPEG and WebP move it a little."""
        places = np.argwhere(np.abs(pixels - colour).max(axis=-1) <= 8)
        assert len(places) > 10_000, "a thumbnail of a plain colour is 208 x 156 pixels"
        return places[0]

    rank = {row["path"]: row["rank"] for row in rows[:7]}
    ranks = {name: rank[str(pictures / name)] for name in COLOURS}
    tops = {name: tuple(first_seen(colour)) for name, colour in COLOURS.items()}
    by_rank = sorted(COLOURS, key=ranks.get)
    same_row = [name for name in by_rank if ranks[name] <= 5]
    assert [tops[name][1] for name in same_row] == sorted(tops[name][1] for name in same_row)
    assert all(tops[name][0] > max(tops[other][0] for other in same_row) for name in by_rank if ranks[name] > 5)


def test_a_missing_picture_has_a_placeholder(embedded, pictures, capsys, tmp_path, monkeypatch):
    hits = [("nowhere/gone.png",), (str(pictures / "a/red.png"),), (str(pictures / BROKEN[0]),)]
    found = [[type("Hit", (), {"rank": n + 1, "score": 0.5, "name": name})() for n, (name,) in enumerate(hits)]]
    sheet, absent = contact_sheet([("a query that is long " * 20, None)], found, "of 3 pictures")
    assert absent == 2
    whole, none_absent = contact_sheet([("a query that is long " * 20, None)], [found[0][1:2] * 3], "of 3 pictures")
    assert none_absent == 0 and whole.size == sheet.size
    red = np.abs(np.asarray(sheet).astype(int) - COLOURS["a/red.png"]).max(axis=-1) <= 8
    three = np.abs(np.asarray(whole).astype(int) - COLOURS["a/red.png"]).max(axis=-1) <= 8
    assert 3 * red.sum() == three.sum() > 0
    # An embeddings file whose pictures have moved: the list is printed and the sheet drawn all the same.
    with np.load(embedded) as arrays:
        stored = dict(arrays)
    moved = np.array([f"moved{name}" for name in stored["path"].tolist()])
    np.savez(tmp_path / "moved.npz", **{**stored, "path": moved})
    argv = ["search", tmp_path / "moved.npz", "--text", "fox", "--top-k", 2, "--output", tmp_path / "sheet.jpg"]
    code, out, err = run(capsys, *argv)
    assert code == 0 and out.count("\n") == 2 and "2 pictures of the sheet could not be read" in err
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"


# explain


def test_explain_writes_the_overlay(pictures, capsys, model_dir, tmp_path):
    from pyramidclip_hf.explain import explain_image

    overlay = tmp_path / "overlay.png"
    argv = ["explain", "--model", model_dir, pictures / ROTATED, "--text", "a fox", "--output", overlay]
    code, out, err = run(capsys, *argv, "--json")
    row = json.loads(out)
    score = plain_text_embeddings(model_dir, ["a fox"])[0] @ plain_image_embedding(model_dir, pictures / ROTATED)
    assert code == 0 and row["score"] == pytest.approx(score, abs=1e-5) and row["output"] == str(overlay)
    # Upright: the file holds 60 x 30 pixels.
    assert Image.open(overlay).size == (30, 60)
    model, processor = loaded(model_dir)
    picture = Image.open(pictures / ROTATED)
    expected = explain_image(model, processor, picture, "a fox").overlay(picture)
    assert np.array_equal(np.asarray(Image.open(overlay)), np.asarray(expected))
    code, _, err = run(capsys, *argv[:3], pictures / BROKEN[0], *argv[4:])
    assert code == 2 and BROKEN[0] in err


# Models and devices


def test_folders_that_hold_no_model(model_dir, pictures, capsys, tmp_path):
    def refused(*messages):
        code, out, err = run(capsys, "classify", "--model", tmp_path, pictures / "blue.jpg", "--labels", "cat")
        assert (code, out) == (2, "") and all(message in err for message in messages), err

    refused("no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused("'clip'", "expected 'pyramidclip'")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        absent = {"config.json": "weights", "model.safetensors": "tokenizer", "tokenizer.json": "image processor"}
        (tmp_path / name).write_bytes(open(os.path.join(model_dir, name), "rb").read())
        if name in absent:
            refused(f"the {absent[name]} is missing")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be loaded")
    weights = safetensors.torch.load_file(os.path.join(model_dir, "model.safetensors"))
    wrong = {**weights, "logit_scale": torch.zeros(2)}
    safetensors.torch.save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    refused("1 weights are missing or of another shape", "logit_scale")
    weights.pop("visual_projection.weight")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused("1 weights are missing or of another shape", "visual_projection.weight")
    code, _, err = run(capsys, "classify", "--model", "no/such/folder", pictures / "blue.jpg", "--labels", "cat")
    assert code == 2 and "no such folder" in err
    code, _, err = run(capsys, "classify", "--model", "someone/nothing", pictures / "blue.jpg", "--labels", "cat")
    assert code == 2 and "the Hub did not give" in err


def test_a_hub_id_is_the_same_model_as_its_folder(embedded, model_dir, capsys):
    """From the Hub's cache, as after a download."""
    from huggingface_hub import constants

    cache = os.path.join(constants.HF_HUB_CACHE, "models--someone--tiny")
    commit = "0123456789abcdef0123456789abcdef01234567"
    os.makedirs(os.path.join(cache, "refs"))
    os.makedirs(os.path.join(cache, "snapshots"))
    with open(os.path.join(cache, "refs", "main"), "w") as file:
        file.write(commit)
    os.symlink(model_dir, os.path.join(cache, "snapshots", commit))
    by_folder = run(capsys, "search", embedded, "--text", "fox")
    assert run(capsys, "search", embedded, "--model", "someone/tiny", "--text", "fox")[:2] == by_folder[:2]


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_devices_that_are_not_there(device, model_dir, pictures, capsys):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat", "--device", device]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and f"--device {device}" in err and err.count("\n") == 1


def test_half_types_work_and_say_where_they_are_slow(model_dir, pictures, capsys, monkeypatch):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat", "--device", "cpu"]
    for able in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        code, out, err = run(capsys, *argv, "--dtype", "bfloat16")
        assert code == 0 and out.endswith("cat\t1.0000\n") and ("float32 is faster" in err) is not able


def test_too_little_memory_is_named(model_dir, pictures, capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("no more memory")

    monkeypatch.setattr(PyramidCLIPModel, "encode_image", exhausted)
    code, _, err = run(capsys, "classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat")
    assert code == 1 and "Lower --batch-size" in err


# The command line


def test_a_closed_pipe_ends_quietly(model_dir, pictures, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        argv = ["classify", "--model", model_dir, str(pictures / "blue.jpg"), "--labels", "cat", "--quiet"]
        code = cli.main(argv)
        monkeypatch.undo()
    assert code == 141 and capsys.readouterr().err == ""


def test_help_loads_neither_torch_nor_transformers(checkout):
    """Run as the installed command does it: through `pyramidclip_command`."""
    code = (
        "import sys; sys.argv = ['pyramidclip', '--help']; import pyramidclip_command\n"
        "try: pyramidclip_command.main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy', 'PIL', 'pyramidclip_hf') if m in sys.modules])"
    )
    # PYTHONPATH and not the working folder, so that an installed package is tested the same way.
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and shown.stdout.endswith("[]\n"), shown.stderr
    assert all(name in shown.stdout for name in ("classify", "embed", "search", "explain", "exit codes"))


def test_the_installed_command_is_this_one(checkout):
    config = configparser.ConfigParser()
    config.read(checkout / "setup.cfg", encoding="utf8")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "pyramidclip" and config["options"]["py_modules"].split() == [module]
    assert callable(getattr(importlib.import_module(module), function))


def test_wrong_flags_exit_with_2(capsys):
    for argv in ([], ["paint"], ["classify", "x.png", "--model", "m"], ["embed", "--batch-size", "0"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
