"""Released checkpoints to folders and back, on the published reference's tiny models (tests/golden.py)."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from conversion.checkpoint_file import read_checkpoint
from conversion.convert_original_checkpoint import CheckFailed, compare_folder, convert, main, reverse
from conversion.key_map import to_original
from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer
from tests.golden import FIXTURES, NAMES, golden_config, reference_state_dict


@pytest.fixture(scope="module", params=NAMES)
def released(request, tmp_path_factory):
    """(name, checkpoint file, its tensors)."""
    state_dict = reference_state_dict(request.param)
    path = tmp_path_factory.mktemp("released") / f"{request.param}.pth.tar"
    torch.save({"epoch": 32, "state_dict": {f"module.{key}": value for key, value in state_dict.items()}}, path)
    return request.param, path, state_dict


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    said = []
    convert(released[1], folder, check=FIXTURES / f"{released[0]}.npz", say=said.append)
    return folder, said


def small_state_dict(**changes):
    """Released tensors of sizes that no golden model has, filled with random numbers."""
    config = PyramidCLIPConfig(
        projection_dim=24,
        text_config={"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 10, "max_position_embeddings": 20,
                     "bos_token_id": 97, "eos_token_id": 98, "intermediate_size": 96},
        vision_config={"hidden_size": 128, "num_hidden_layers": 3, "num_leff_layers": 1, "patch_size": 8,
                       "image_size": 40, "roi_feature_size": 12, "intermediate_size": 160, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    return config, to_original(PyramidCLIPModel(config).state_dict(), config)


def test_the_released_layout_has_one_number_for_leff_and_regions():
    with pytest.raises(ValueError, match="LeFF in 1 blocks and regions behind 2"):
        small_state_dict(num_picture_layers=2)


def assert_holds_the_small_weights(folder):
    """The folder's model, under the released names, is `small_state_dict` bit for bit."""
    config, wanted = small_state_dict()
    found = to_original(load_file(folder / "model.safetensors"), config)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "small.pt"
    torch.save({"state_dict": small_state_dict()[1]}, path)
    return path


def test_outputs_meet_the_stored_ones_and_every_difference_is_printed(converted):
    _, said = converted
    printed = [line for line in said if "largest difference" in line]
    assert len(printed) == 6
    assert all(float(line.split()[-1]) < 1e-5 for line in printed)
    assert any("equal bit for bit" in line for line in said) and any("finite" in line for line in said)


def test_configuration_is_read_off_the_shapes(released, converted):
    config = PyramidCLIPConfig.from_pretrained(converted[0])
    expected = golden_config(released[0])
    for name in ("text_config", "vision_config"):
        assert getattr(config, name).to_dict() == getattr(expected, name).to_dict()
    assert config.projection_dim == expected.projection_dim


def test_reverse_gives_the_same_bits(released, converted, tmp_path):
    output = tmp_path / "back.pth.tar"
    assert main(["--reverse", "--model", str(converted[0]), "--output", str(output)]) == 0
    back, original = torch.load(output, weights_only=True)["state_dict"], released[2]
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


def test_folder_is_complete(converted):
    folder = converted[0]
    assert type(AutoModel.from_pretrained(folder)) is PyramidCLIPModel
    ids = PyramidCLIPTokenizer.from_pretrained(folder)(["a", "a small red cup"], padding=True)["input_ids"]
    assert ids[0][3:] == [0, 0, 0]
    picture = np.zeros((70, 90, 3), dtype=np.uint8)
    pixels = PyramidCLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert json.loads((folder / "processor_config.json").read_text(encoding="utf8"))["roi_feature_size"] == 2048
    card = (folder / "README.md").read_text(encoding="utf8")
    assert "license: unknown" in card and "published no licence for these weights" in card
    assert not list(folder.glob("*.bin"))
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


def test_any_size_is_recognised(tmp_path):
    config, state_dict = small_state_dict()
    torch.save(state_dict, tmp_path / "bare.pt")
    found = convert(tmp_path / "bare.pt", tmp_path / "model", check=True, say=lambda line: None)
    assert found.vision_config.to_dict() == config.vision_config.to_dict()
    assert found.text_config.to_dict() == config.text_config.to_dict()


def test_heads_can_be_given_because_no_shape_tells_them(small_file, tmp_path):
    arguments = ["--checkpoint", str(small_file), "--output-dir", str(tmp_path / "model")]
    assert main([*arguments, "--vision-heads", "4", "--text-heads", "2"]) == 0
    config = PyramidCLIPConfig.from_pretrained(tmp_path / "model")
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (4, 2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(prefix, tmp_path):
    torch.save({"state_dict": {prefix + key: value for key, value in small_state_dict()[1].items()}}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "model", check=True, say=lambda line: None)
    assert_holds_the_small_weights(tmp_path / "model")


def test_file_from_before_the_archive_format(tmp_path):
    torch.save({"state_dict": small_state_dict()[1]}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "x.pt", tmp_path / "model", check=True, say=lambda line: None)
    assert_holds_the_small_weights(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly_and_said(dtype, tmp_path):
    state_dict = {key: value.to(dtype) if value.is_floating_point() else value
                  for key, value in small_state_dict()[1].items()}  # fmt: skip
    torch.save({"state_dict": state_dict}, tmp_path / "half.pt")
    said = []
    convert(tmp_path / "half.pt", tmp_path / "model", check=True, say=said.append)
    assert "converted to fp32" in said[0]
    reverse(tmp_path / "model", tmp_path / "back.pt", say=said.append)
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    for key, value in state_dict.items():
        assert back[key].dtype in (torch.float32, torch.int64) and torch.equal(back[key], value.to(back[key].dtype))


def test_double_precision_is_refused(tmp_path):
    state_dict = small_state_dict()[1]
    state_dict["logit_scale"] = state_dict["logit_scale"].double()
    torch.save(state_dict, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="logit_scale.*float64"):
        convert(tmp_path / "x.pt", tmp_path / "model")


def test_missing_unused_and_misshapen_tensors_are_all_listed(tmp_path):
    state_dict = small_state_dict()[1]
    del state_dict["ln_final.bias"], state_dict["visual.ln_pre.weight"]
    state_dict |= {"extra.weight": torch.ones(1), "visual.proj": torch.ones(128, 25)}
    torch.save(state_dict, tmp_path / "x.pt")
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "x.pt", tmp_path / "model")
    text = str(caught.value)
    assert "missing: ln_final.bias, visual.ln_pre.weight\n" in text and "unused: extra.weight\n" in text
    assert "visual.proj is (128, 25), expected (128, 24)" in text
    assert os.listdir(tmp_path) == ["x.pt"]


def test_named_architecture_must_fit(small_file, tmp_path, refused):
    words = ["--checkpoint", small_file, "--output-dir", tmp_path / "model", "--architecture", "ViT-B-16"]
    refused(main, words, "ViT-B-16.*misshapen: .*token_embedding.weight is")


def test_plain_clip_is_named_as_such(tmp_path):
    names = {
        "token_embedding.weight": (9, 4),
        "positional_embedding": (7, 4),
        "text_projection": (4, 4),
        "ln_final.weight": (4,),
        "visual.class_embedding": (4,),
        "transformer.resblocks.0.ln_1.weight": (4,),
    }
    torch.save({name: torch.ones(shape) for name, shape in names.items()}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="no PyramidCLIP checkpoint.*init_from_clip"):
        convert(tmp_path / "clip.pt", tmp_path / "model")


def test_checkpoint_of_another_model(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no PyramidCLIP checkpoint.*'weight', 'bias'"):
        convert(tmp_path / "x.pt", tmp_path / "model")


class RunsCode:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["archive", "before archives", "plain pickle"])
def test_pickle_that_would_run_code_runs_nothing(how, tmp_path):
    path, mark = tmp_path / "evil.pth.tar", tmp_path / "ran"
    content = {"state_dict": small_state_dict()[1], "epoch": RunsCode(mark)}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "archive")
    with pytest.raises(ValueError, match="mkdir.*nothing of it was read|nothing of it was run") as caught:
        convert(path, tmp_path / "model")
    # torch's own advice, to switch the protection off, must not reach the user.
    assert "weights_only" not in str(caught.value) and caught.value.__suppress_context__
    assert not mark.exists() and os.listdir(tmp_path) == ["evil.pth.tar"]
    if how != "plain pickle":
        torch.load(path, weights_only=False)
        assert mark.exists(), "the file must be one that runs code when read carelessly"


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(kept, archive, tmp_path):
    torch.save(small_state_dict()[1], tmp_path / "whole.pt", _use_new_zipfile_serialization=archive)
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="cut.pt is truncated"):
        convert(tmp_path / "cut.pt", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello", encoding="utf8")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "b")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"a": torch.ones(1), "b": "text"}}, tmp_path / "mixed.pt")
    for name, message in {
        "text.pt": "no PyTorch checkpoint", "zip.pt": "no PyTorch checkpoint", "script.pt": "TorchScript archive",
        "list.pt": "holds no weights", "mixed.pt": "no tensors: {'b': 'str'}",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        convert(tmp_path / "nowhere.pt", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="a folder"):
        convert(tmp_path, tmp_path / "model")


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.float32(-3), np.int64(7), np.bool_(True), np.array(2.0, ">f8")[()]]
)
def test_numbers_of_numpy_beside_the_weights_are_read(number, archive, tmp_path):
    torch.save({"best": number}, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
    read = read_checkpoint(tmp_path / "x.pt")["best"]
    assert type(read) is type(number) and read == number


class Reduced:
    """Pickled as a call, with a state for what it gives."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_the_state_of_a_number_type_never_reaches_numpy(tmp_path):
    """NumPy's own `dtype.__setstate__` dies of this one with SIGSEGV, so another process reads it."""
    kind = Reduced(np.dtype, ("f8", False, True), (3, "<", None, -1, -1, 0))
    for archive in (True, False):
        torch.save({"best": kind}, tmp_path / f"{archive}.pt", _use_new_zipfile_serialization=archive)
    code = "import sys; from conversion.checkpoint_file import read_checkpoint; [*map(read_checkpoint, sys.argv[1:])]"
    files = [str(tmp_path / "True.pt"), str(tmp_path / "False.pt")]
    assert subprocess.run([sys.executable, "-c", code, *files], timeout=120).returncode == 0


@pytest.mark.parametrize(("arguments", "state"), [
    (("O", False, True), (3, "|", None, None, None, -1, -1, 63)), (("f8", False, True), (3, "x", None)),
    (("f8", False, True), 5), (("V9999999999", False, True), None), (("m8", False, True), None),
])  # fmt: skip
def test_what_is_no_number_of_numpy_is_refused(arguments, state, tmp_path):
    kind = Reduced(np.dtype, arguments, state)
    torch.save({"best": Reduced(np._core.multiarray.scalar, (kind, b"12345678"))}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt is truncated or no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "x.pt")


def test_damage_anywhere_in_a_checkpoint_is_a_sentence(tmp_path):
    """zipfile and torch raise BadZipFile, AssertionError, NotImplementedError and more for these."""
    torch.save({"a": torch.ones(2), "best": np.float64(0.5)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    for start in (content.index(b"PK\x01\x02"), *range(content.index(b"PK\x01\x02") + 4, end, 7)):
        damaged = bytearray(content)
        damaged[start] ^= 0xFF
        (tmp_path / "x.pt").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_checkpoint(tmp_path / "x.pt")


def test_weights_that_stand_for_more_than_they_hold_are_refused(tmp_path):
    """A stride of 0 makes a terabyte of one number; so does a size without storage."""
    for name, weight in {
        "repeated": torch.ones(1).expand(10**6, 10**6), "sparse": torch.zeros(10**6, 10**6, layout=torch.sparse_coo),
        "empty": torch.ones(10**9, 0), "absent": torch.ones(10**6, 10**6, device="meta"),
    }.items():  # fmt: skip
        torch.save({"token_embedding.weight": weight}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"token_embedding.weight stands for .* and does not hold them|no PyTorch"):
            convert(tmp_path / "x.pt", tmp_path / "model")
        assert name and not (tmp_path / "model").exists()


def test_an_archive_whose_parts_unpack_to_far_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.checkpoint_file._ALWAYS_BYTES", 1 << 20)
    torch.save({"a": torch.zeros(1 << 19)}, tmp_path / "whole.pt")
    assert read_checkpoint(tmp_path / "whole.pt")["a"].shape == (1 << 19,)
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="its parts unpack to 2"):
        read_checkpoint(tmp_path / "x.pt")


def test_folder_with_a_model_needs_overwrite(small_file, tmp_path, refused):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf8")
    arguments = ["--checkpoint", str(small_file), "--output-dir", str(folder)]
    assert main(arguments) == 0
    before = (folder / "config.json").read_bytes()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an older model")
    refused(main, arguments, "already holds a model.*--overwrite")
    assert (folder / "config.json").read_bytes() == before
    assert main([*arguments, "--overwrite", "--text-heads", "2"]) == 0
    assert (folder / "config.json").read_bytes() != before
    assert (folder / "notes.txt").read_text(encoding="utf8") == "mine"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    refused(main, ["--checkpoint", small_file, "--output-dir", small_file], "is a file")


def test_reverse_does_not_replace_a_file_unasked(small_file, tmp_path):
    convert(small_file, tmp_path / "model", say=lambda line: None)
    (tmp_path / "out.pt").write_text("mine", encoding="utf8")
    with pytest.raises(FileExistsError, match="--overwrite"):
        reverse(tmp_path / "model", tmp_path / "out.pt")
    reverse(tmp_path / "model", tmp_path / "out.pt", overwrite=True, say=lambda line: None)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]


def test_failed_check_leaves_no_folder(tmp_path):
    state_dict = small_state_dict()[1]
    state_dict["ln_final.bias"][3] = float("nan")
    torch.save(state_dict, tmp_path / "x.pt")
    with pytest.raises(CheckFailed, match="not finite: .*text_model.final_layer_norm.bias"):
        convert(tmp_path / "x.pt", tmp_path / "model", check=True)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_check_sees_a_changed_bit(small_file, tmp_path):
    config, state_dict = small_state_dict()
    convert(small_file, tmp_path / "model", say=lambda line: None)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    weights[name].view(torch.int32)[5, 7] ^= 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"resblocks2.0.attn.in_proj_weight'\]"):
        compare_folder(tmp_path / "model", state_dict, config)


def test_outputs_that_differ_fail(released, tmp_path):
    name, path, _ = released
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        stored = dict(arrays)
    stored["roi_image_features"] = stored["roi_image_features"] + np.float32(2e-4)
    np.savez(tmp_path / "other.npz", **stored)
    with pytest.raises(CheckFailed, match=r"\['roi_image_features'\] differ by more than 0.0001"):
        convert(path, tmp_path / "model", check=tmp_path / "other.npz", say=lambda line: None)
    assert not (tmp_path / "model").exists()


def test_stored_outputs_of_another_layout(small_file, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "y.npz").write_bytes(b"no archive")
    for name, message in (("x.npz", "none of the outputs"), ("y.npz", "expects an .npz"), ("z.npz", "expects an .npz")):
        with pytest.raises(ValueError, match=message):
            convert(small_file, tmp_path / "model", check=tmp_path / name, say=lambda line: None)


@contextlib.contextmanager
def tiny_disk(folder, megabytes):
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("inside", [True, False])
def test_full_disk_leaves_nothing_half_written(inside, small_file, tmp_path):
    convert(small_file, tmp_path / "good", say=lambda line: None)
    with tiny_disk(tmp_path / "disk", 1) as disk:
        folder = disk if inside else disk / "model"
        with pytest.raises(OSError, match="could not be written, and nothing half-written stays"):
            convert(small_file, folder, say=lambda line: None)
        assert os.listdir(disk) == []
        with pytest.raises(OSError, match="could not be written, and nothing half-written stays"):
            reverse(tmp_path / "good", disk / "out.pt")
        assert os.listdir(disk) == []


def test_full_disk_leaves_the_old_model(small_file, tmp_path):
    with tiny_disk(tmp_path / "disk", 8) as disk:
        convert(small_file, disk / "model", say=lambda line: None)
        before = {path.name: path.read_bytes() for path in (disk / "model").iterdir()}
        with pytest.raises(OSError, match="could not be written"):
            convert(small_file, disk / "model", overwrite=True, say=lambda line: None)
        assert {path.name: path.read_bytes() for path in (disk / "model").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-dir", "x"], "--checkpoint is needed"),
        (["--checkpoint", "x"], "--output-dir is needed"),
        (["--reverse", "--model", "x"], "--output is needed with --reverse"),
        (["--checkpoint", "x", "--output-dir", "y", "--model", "z"], "--model is only for --reverse"),
        (["--reverse", "--model", "x", "--output", "y", "--check"], "--check is not for --reverse"),
        (["--checkpoint", "x", "--output-dir", "y", "--architecture", "RN50", "--text-heads", "2"], "fixes the heads"),
    ],
)
def test_command_lines_that_make_no_sense(arguments, message, refused):
    refused(main, arguments, message)


FULL_SIZE = """
import json, re, sys, time
from conversion.convert_original_checkpoint import main

step = {"convert": ["--checkpoint", "released.pth.tar", "--output-dir", "model", "--check"],
        "reverse": ["--reverse", "--model", "model", "--output", "back.pth.tar"]}[sys.argv[1]]
start = time.perf_counter()
main(step)
seconds = time.perf_counter() - start
# Not ru_maxrss: a child's starts at what its parent occupied.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["ViT-B-16", "RN50"])
def test_full_size_round_trip_is_quick_and_small(architecture, tmp_path, checkout):
    config = PyramidCLIPConfig.from_architecture(architecture)
    model = PyramidCLIPModel(config)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    released = to_original(model.state_dict(), config)
    torch.save({"epoch": 32, "state_dict": released}, tmp_path / "released.pth.tar")
    measured = {}
    for step in ("convert", "reverse"):
        ran = subprocess.run([sys.executable, "-c", FULL_SIZE, step], cwd=tmp_path, check=True, capture_output=True,
                             text=True, env={**os.environ, "PYTHONPATH": str(checkout)})  # fmt: skip
        measured[step] = json.loads(ran.stdout.splitlines()[-1])
    print({step: (round(m["seconds"], 1), round(m["peak_bytes"] / size, 2)) for step, m in measured.items()})
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True, mmap=True)["state_dict"]
    assert back.keys() == released.keys() and all(torch.equal(back[key], released[key]) for key in released)
    assert sum(m["seconds"] for m in measured.values()) < 30
    if architecture == "ViT-B-16":
        # The whole process, torch and transformers (0.8 GB) included.
        assert max(m["peak_bytes"] for m in measured.values()) < 3 * size


def test_reverse_refuses_a_model_that_is_not_whole(small_file, tmp_path, refused):
    """What is missing would be drawn at random and written into the checkpoint."""
    convert(small_file, tmp_path / "model", say=lambda line: None)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "logit_scale"}, path, {"format": "pt"})
    refused(main, ["--reverse", "--model", tmp_path / "model", "--output", tmp_path / "x.pt"], "logit_scale")
    refused(main, ["--reverse", "--model", tmp_path / "gone", "--output", tmp_path / "x.pt"], "no such file or folder")
    assert not (tmp_path / "x.pt").exists()
