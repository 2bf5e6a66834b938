"""`pyramidclip embed` against a loop over the model; stopped, killed and continued."""

import errno
import json
import os
import signal
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import pyramidclip_command
from pyramidclip_command import EXIT_SKIPPED
from pyramidclip_hf import PyramidCLIPModel, files, zero_shot
from pyramidclip_hf.embedding_files import EmbeddingJob, read_embeddings
from pyramidclip_hf.picture_files import find_pictures
from tests.pyramidclip_hf.commands.plain import (
    BROKEN,
    WIDEST,
    embed,
    good_ones,
    plain_image_embedding,
    plain_text_embeddings,
    run,
)
from tests.rounding import assert_equal_to_rounding


def test_shards_give_the_vectors_of_the_files_in_them(pictures, capsys, model_dir, tmp_path):
    names = find_pictures([str(pictures)])
    for number, some in enumerate((names[:4], names[4:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in some:
                tar.add(path, os.path.relpath(path, pictures))
    found = []
    for name, source in (("files", pictures), ("shards", tmp_path)):
        assert embed(capsys, model_dir, source, tmp_path / f"{name}.npz")[0] == EXIT_SKIPPED
        found.append(read_embeddings(tmp_path / f"{name}.npz"))
    assert (found[0].embeddings == found[1].embeddings).all() and len(found[0].names) == 7
    inside = [path.partition(".tar/")[2] for path in found[1].names]
    assert inside == [os.path.relpath(path, pictures) for path in found[0].names]
    # With the reasons, which must not hang on where the bytes lay in memory.
    skipped = [(name.partition(".tar/")[2], why) for name, why in found[1].metadata["skipped"]]
    said = [(os.path.relpath(name, pictures), why) for name, why in found[0].metadata["skipped"]]
    assert [name for name, _ in skipped] == [name for name, _ in said] and " at 0x" not in str(skipped)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embed_agrees_with_a_loop_over_the_model(suffix, pictures, capsys, model_dir, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    output = tmp_path / f"pictures{suffix}"
    code, out, err = embed(capsys, model_dir, pictures, output, "--json")
    summary = json.loads(out)
    assert code == EXIT_SKIPPED and summary["rows"] == 7
    assert {entry["path"] for entry in summary["skipped"]} == {str(pictures / name) for name in BROKEN}
    assert all(f"skipped {pictures / name}: " in err for name in BROKEN)
    stored = read_embeddings(output)
    order = [path for path in find_pictures([str(pictures)]) if path in good_ones(pictures)]
    assert stored.names == order and stored.kind == "path"
    assert stored.embeddings.flags.writeable  # torch warns of an array that is not
    expected = np.stack([plain_image_embedding(model_dir, path) for path in order])
    assert_equal_to_rounding(stored.embeddings, expected, WIDEST)
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
            pyramidclip_command.main([str(word) for word in argv])
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("at_a_time", [1, 2], ids=["as on a CPU", "as on a GPU"])
def test_killed_at_any_moment_the_same_command_gives_the_same_file(
    pictures, capsys, model_dir, tmp_path, monkeypatch, at_a_time
):
    fuse = PyramidCLIPModel.fuse
    monkeypatch.setattr(PyramidCLIPModel, "fuse", lambda self, linear="auto": fuse(self, "torch"))
    undisturbed = tmp_path / "undisturbed.npz"
    embed(capsys, model_dir, pictures, undisturbed)
    monkeypatch.setattr(zero_shot, "_batches_at_a_time", lambda device: at_a_time)
    moment = 0
    while True:
        output = tmp_path / f"killed{moment}.npz"
        argv = ["embed", "--model", model_dir, pictures, "--output", output, "--part-size", 3, "--batch-size", 2]
        if not kill_at(moment, [*argv, "--quiet"]):
            break
        code, _, err = run(capsys, *argv)
        assert code == EXIT_SKIPPED and all(f"skipped {pictures / name}: " in err for name in BROKEN)
        assert output.read_bytes() == undisturbed.read_bytes(), f"killed at {moment}"
        moment += 1
    assert moment == 2 * 6  # the job, its choice of library, three parts, the result
    (tmp_path / "killed0.npz.parts").mkdir()  # as if killed while it was removed
    (tmp_path / "killed0.npz.parts" / "part-000000.npz").touch()
    assert run(capsys, *[tmp_path / "killed0.npz" if one == output else one for one in argv])[0] == EXIT_SKIPPED
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
    assert code == EXIT_SKIPPED and seen == [1, 2] and "1 of 3 parts are done" in err
    code, out, err = embed(capsys, model_dir, pictures, output)
    assert code == EXIT_SKIPPED and "complete already" in err and seen == [1, 2]


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
    assert code == EXIT_SKIPPED and "1 of 3 parts are done" in err
    assert read_embeddings(output).metadata["model"] == other_model_dir


def test_pictures_that_come_meanwhile_wait_for_another_run(pictures, capsys, model_dir, tmp_path, monkeypatch):
    folder, output = tmp_path / "growing", tmp_path / "pictures.npz"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(folder / f"{number}.png")
    stop_after_one_part(monkeypatch, capsys, model_dir, folder, output)
    Image.new("RGB", (9, 9)).save(folder / "0-new.png")
    code, _, err = embed(capsys, model_dir, folder, output)
    assert code == EXIT_SKIPPED and "pictures have come (1) and gone (0)" in err
    assert "0-new.png: it came after this job began" in err and "1 of 6 were skipped" in err
    assert [os.path.basename(name) for name in read_embeddings(output).names] == [f"{n}.png" for n in range(5)]
    code, out, err = embed(capsys, model_dir, folder, output, "--quiet", "--json")  # finished: still said, still kept
    assert code == EXIT_SKIPPED and "pictures have come (1) and gone (0)" in err and json.loads(out)["rows"] == 5


def test_a_damaged_part_is_named(pictures, capsys, model_dir, tmp_path, monkeypatch):
    output = tmp_path / "pictures.npz"
    stop_after_one_part(monkeypatch, capsys, model_dir, pictures, output)
    part = tmp_path / "pictures.npz.parts" / "part-000000.npz"
    part.write_bytes(part.read_bytes()[:100])
    code, _, err = embed(capsys, model_dir, pictures, output)
    assert code == 2 and str(part) in err and "delete it" in err
    part.unlink()
    assert embed(capsys, model_dir, pictures, output)[0] == EXIT_SKIPPED


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
    assert code == EXIT_SKIPPED and "UTF-8" in err and json.loads(out)["rows"] == 1
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
    assert_equal_to_rounding(stored.embeddings, plain_text_embeddings(model_dir, texts), WIDEST)
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
        (["--output", "x.npz", "--texts", __file__, __file__], "one kind"),
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
