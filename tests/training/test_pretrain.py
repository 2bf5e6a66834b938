"""Pre-training on made-up data: its losses and gradients, what it refuses, what it leaves."""

import ctypes
import dataclasses
import math
import mmap
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.loading import quiet_transformers
from pyramidclip_hf.modeling_pyramidclip_text import keys_with_first
from tests.training.processes import run_in_processes
from tests.training.runs import MODEL_CONFIG, NO_BATCH_NORM, MemoryReader, logged, run_settings, settings, use_memory
from tests.training.tiny import RESNET, TEXT, VIT
from training import pretrain
from training.loop import run as loop
from training.loop.processes import form_group, start_accelerator
from training.scale import memory_per_gpu


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


def test_the_logged_losses_are_those_of_the_objective(tmp_path):
    """The first step's terms, against a loss written out here on the same samples."""
    pretrain.run(settings(tmp_path, max_steps=1, learning_rate=0.0))
    reader = MemoryReader(settings(tmp_path))
    batch = next(iter(reader.batches(0, 0)))
    torch.manual_seed(0)
    model = pretrain.initial_model(settings(tmp_path))[0].train()
    with torch.no_grad():
        embeds = model.encode_levels(("local", "caption"), **{k: v for k, v in batch.items() if k != "sample_keys"})
    images, texts = (torch.nn.functional.normalize(embeds[level].double(), dim=1) for level in ("local", "caption"))
    logits = images @ texts.T / 0.07
    target = torch.full((8, 8), 0.2 / 7, dtype=torch.float64).fill_diagonal_(0.8)
    expected = -(target * (logits.log_softmax(0) + logits.log_softmax(1))).sum() / 16
    # BatchNorm sees the global pictures as a batch of their own, so leaving them out changes nothing for the local
    # ones.
    assert logged(tmp_path, "loss/local_caption") == pytest.approx([expected.item()], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "ViT-B-61"},
            "expected an architecture, a folder or a Hub id .* got 'ViT-B-61'; did you mean ViT-B-16",
        ),
        (
            {"global_batch_size": 64},
            "40 samples, fewer than one global batch: 1 process x 64 = 64. Lower .* at most 40",
        ),
        ({"overfit_batches": 6}, "overfit_batches 6: the data has only 5 batches of 8"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"trackers": ["tensorbord"]}, "trackers: expected some of .*tensorboard.* got tensorbord"),
        ({"validation_data": "nowhere"}, "no folder or file nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_starts(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        pretrain.run(settings(tmp_path, **changes))


def test_texts_are_cut_to_the_positions_of_the_model_that_is_saved_with_the_processor(tmp_path):
    shorter = {**MODEL_CONFIG, "text_config": {**MODEL_CONFIG["text_config"], "max_position_embeddings": 9}}
    model, processor = pretrain.initial_model(settings(tmp_path, model_config=shorter))
    processor.save_pretrained(tmp_path)
    for one in (processor, PyramidCLIPProcessor.from_pretrained(tmp_path)):
        inputs = one(text=["many words " * 20], return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 9)
    assert model.config.text_config.max_position_embeddings == 9


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
        pretrain.run(settings(tmp_path, trackers=["wandb"]))


def test_overfitting_two_batches_reaches_the_smoothing_floor(tmp_path, monkeypatch):
    use_memory(monkeypatch, samples=16, missing=False)
    weights = {"local_caption": 0.5, "roi_tags": 0.5}
    pretrain.run(
        settings(
            tmp_path, max_steps=500, overfit_batches=2, learning_rate=5e-3, loss_weights=weights, save_every_steps=0,
            log_every_steps=50, model_config=NO_BATCH_NORM, weight_decay=0.0,
        )
    )  # fmt: skip
    floor = -0.8 * math.log(0.8) - 0.2 * math.log(0.2 / 7)  # the entropy of the softened targets at N = 8
    losses = logged(tmp_path, "loss/total")
    assert floor - 1e-4 < losses[-1] < floor + 0.15 < losses[0]


def test_caching_and_two_processes_give_the_losses_of_one(tmp_path):
    """Losses, gradient norm and learning rate of every step, on a model without BatchNorm."""
    common = {"model_config": NO_BATCH_NORM, "log_every_steps": 1, "save_every_steps": 0, "max_steps": 6}
    pretrain.run(settings(tmp_path / "one", **common))
    pretrain.run(settings(tmp_path / "cached", per_device_chunk_size=2, **common))
    run_in_processes(run_settings, 2, settings(tmp_path / "two", **common))
    run_in_processes(run_settings, 2, settings(tmp_path / "both", per_device_chunk_size=2, **common))
    for name in ("loss/total", "loss/roi_tags", "grad_norm", "logit_scale", "learning_rate"):
        if expected := logged(tmp_path / "one", name):
            for other in ("cached", "two", "both"):
                np.testing.assert_allclose(
                    logged(tmp_path / other, name), expected, rtol=1e-4, err_msg=f"{name} {other}"
                )
    assert len(logged(tmp_path / "two", "learning_rate")) == 6


def test_half_precision_checkpointing_and_the_moving_average(tmp_path):
    changes = {"precision": "bf16", "gradient_checkpointing": True, "ema_decay": 0.5, "max_steps": 3}
    pretrain.run(settings(tmp_path, **changes))
    weights = PyramidCLIPModel.from_pretrained(tmp_path / "final").state_dict()
    average = PyramidCLIPModel.from_pretrained(tmp_path / "final-average").state_dict()
    assert weights["text_projection.weight"].dtype == torch.float32
    assert not torch.equal(weights["text_projection.weight"], average["text_projection.weight"])


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host needs before it can go on."""

    WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "max"}, {"pooling": "eos"}, {"tower": RESNET}, {"per_device_chunk_size": 4}, {"multi_positive": True}],
    ids=lambda changes: next(iter(changes)) + "=" + str(next(iter(changes.values())))[:4],
)
def test_the_host_reads_nothing_off_the_device_in_a_step(tmp_path, monkeypatch, changes):
    config = {**MODEL_CONFIG, "text_config": {**TEXT, "pooling": changes.pop("pooling", "eos")}}
    config["vision_config"] = changes.pop("tower", VIT)
    size = config["vision_config"]["image_size"]
    use_memory(monkeypatch, missing=False, image_size=size)
    args = settings(tmp_path, model_config=config, ema_decay=0.5, **changes)
    form_group(args)
    with quiet_transformers():
        run = loop.start(args, pretrain.contrastive_task, tmp_path, start_accelerator(args, tmp_path))
    run.task.objective.train()
    tensors = next(iter(run.task.reader.batches(0, 0)))
    keys = tensors.pop("sample_keys")
    loop.optimizer_step(run, tensors, 1e-3)  # the optimizer's state is made
    with HostReads() as reads:
        losses, norm = loop.optimizer_step(run, tensors, 1e-3)
        run.window.add(1, losses, norm, run.task.logit_scale, 1e-3, keys)
        run.pace.add(8, 0.0)
    assert not reads.found
    with reads:
        assert math.isfinite(losses.loss.item())
    assert reads.found == ["_local_scalar_dense"]


def test_a_model_continues_from_a_folder_and_freezes_a_tower(tmp_path):
    first = pretrain.run(settings(tmp_path / "first", max_steps=2))
    again = settings(tmp_path / "second", model=str(first.final), model_config=None, freeze="vision", max_steps=3)
    again.loss_weights, again.label_smoothing = {"global_caption": 1.0}, 0.0
    second = pretrain.run(again)
    before = PyramidCLIPModel.from_pretrained(first.final)
    after = PyramidCLIPModel.from_pretrained(second.final)
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert changed and not [name for name in changed if name.startswith(("vision_model.", "visual_projection."))]
    assert after.config.loss_weights == {"global_caption": 1.0} and after.config.label_smoothing == 0.0


def how_torch_computes():
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    return torch.are_deterministic_algorithms_enabled(), warn_only, benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_deterministic_algorithms_are_for_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen = how_torch_computes(), []
    advance = loop.advance
    monkeypatch.setattr(loop, "advance", lambda run: (seen.append(how_torch_computes()), advance(run)))
    pretrain.run(settings(tmp_path / "a", max_steps=1, deterministic=True))
    pretrain.run(settings(tmp_path / "b", max_steps=1))
    assert seen == [(True, False, False, ":4096:8"), before]
    assert how_torch_computes() == before == (False, False, True, None)


@pytest.mark.parametrize("workspace", [None, ":0:0"])
def test_deterministic_algorithms_are_refused_where_cuda_has_started_without_them(tmp_path, monkeypatch, workspace):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="deterministic: CUDA has started .* without CUBLAS_WORKSPACE_CONFIG: set it"):
        pretrain.run(settings(tmp_path, deterministic=True))


@pytest.mark.parametrize(
    ("gigabytes", "chunk", "words"),
    [
        (1.0, None, r"for 256 pairs at once \(no more\)\. By training.scale's count at most (\d+) fit: set "
         r"per_device_chunk_size to (\d+), which keeps the batch"),
        (1.0, 8, r"for 8 pairs at once .* count (\d+) should fit: look at what else"),
        (0.001, None, "count not one fits: take a smaller model"),
    ],
)  # fmt: skip
def test_too_little_memory_names_what_fits(tmp_path, monkeypatch, capsys, gigabytes, chunk, words):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("no more\nof this")

    monkeypatch.setattr(pretrain, "complete_run", exhausted)
    properties = SimpleNamespace(total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    config = {**MODEL_CONFIG, "vision_config": {**VIT, "image_size": 224}}
    args = settings(tmp_path, global_batch_size=256, per_device_chunk_size=chunk, model_config=config)
    with pytest.raises(pretrain.OutOfMemory, match=words) as refused:
        pretrain.run(args)
    for number in re.search(words, str(refused.value)).groups():
        fits = dataclasses.replace(args, per_device_chunk_size=None, global_batch_size=int(number))
        assert memory_per_gpu(fits, 1).total < 0.95e9 * gigabytes


class FencedReader(MemoryReader):
    """Tensors as a loader process may hand them over: each begins at a page, and what lies before cannot be read."""

    def batches(self, epoch, position):
        for batch in super().batches(epoch, position):
            yield {name: fenced(value) if torch.is_tensor(value) else value for name, value in batch.items()}


def fenced(tensor):
    memory = mmap.mmap(-1, mmap.PAGESIZE + tensor.nbytes)
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    assert ctypes.CDLL(None).mprotect(start, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=mmap.PAGESIZE, count=tensor.numel())
    return copy.view(tensor.shape).copy_(tensor)


def attended(rank, world_size):
    """Compiled attention over ten regions behind a first token; the largest difference from the plain one."""

    def attend(regions, tokens):
        seen = keys_with_first(regions)[:, None, None, :].expand(-1, 1, tokens.shape[2], -1)
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=seen)

    draw = torch.Generator().manual_seed(0)
    regions, tokens = torch.rand(32, 10, generator=draw) > 0.3, torch.randn(32, 1, 11, 16, generator=draw)
    found = torch.compile(attend)(fenced(regions), tokens)
    return (found - attend(regions, tokens)).abs().max().item()


@pytest.mark.slow
def test_compiled_code_does_not_read_in_front_of_the_mask_of_regions():
    """As it did, a byte, where the first token was put in front by a concatenation: the end of the process."""
    assert run_in_processes(attended, 1, timeout=300)[0] < 1e-5


def test_workers_begin_before_the_model_is_built(tmp_path, monkeypatch):
    seen, build = [], pretrain.initial_model
    monkeypatch.setattr(loop, "begin_workers", lambda device, workers: seen.append((device.type, workers)))
    monkeypatch.setattr(pretrain, "initial_model", lambda args: seen.append("model") or build(args))
    pretrain.run(settings(tmp_path, dry_run=True, dataloader_workers=3))
    assert seen == [("cpu", 3), "model"]


@pytest.mark.parametrize(
    ("pooling", "lengths", "message"),
    [
        ("max", [8], "text_lengths: under pooling max each text has 12 tokens"),
        ("eos", [8, 13], r"texts have at most 12 tokens, got \[8, 13\]"),
        ("eos", [], "set text_lengths, e.g. 32 12"),
    ],
)
def test_cuda_graphs_are_for_texts_of_fixed_lengths(tmp_path, pooling, lengths, message):
    text = {**TEXT, "pooling": pooling, "max_position_embeddings": 12}
    args = settings(
        tmp_path / "run",
        model_config={**MODEL_CONFIG, "text_config": text},
        torch_compile=True,
        torch_compile_mode="reduce-overhead",
        text_lengths=lengths,
    )
    with pytest.raises(ValueError, match=message):
        pretrain.run(args)


def test_cuda_graphs_refuse_batch_statistics_of_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "synchronised_batch_norm", lambda args: True)
    graphs = {"torch_compile": True, "torch_compile_mode": "reduce-overhead", "text_lengths": [8]}
    with pytest.raises(ValueError, match="Set sync_batch_norm: false"):
        pretrain.run(settings(tmp_path / "run", **graphs))


@pytest.mark.slow
@pytest.mark.parametrize("tower", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path, monkeypatch, tower):
    """Compiled with Inductor, on memory in front of which nothing can be read."""
    use_memory(monkeypatch, FencedReader, image_size=tower["image_size"])
    changes = {"model_config": {**MODEL_CONFIG, "vision_config": tower}, "loss_weights": {"roi_caption": 1.0}}
    changes |= {"max_steps": 3, "log_every_steps": 1, "save_every_steps": 0}
    ways = {"plain": {}, "compiled": {"torch_compile": True}}
    if tower is VIT:  # a CPU has no CUDA graphs; all else is as with them
        graphs = {"torch_compile_mode": "reduce-overhead", "text_lengths": [12]}
        ways["graphs"] = {"torch_compile": True, **graphs}
    for name, way in ways.items():
        args = settings(tmp_path / name, **way, **changes)
        run_in_processes(run_settings, 1, args, timeout=600)  # a fault ends the process
    wanted = pytest.approx(logged(tmp_path / "plain", "loss/total"), rel=1e-5)
    assert all(logged(tmp_path / name, "loss/total") == wanted for name in ways)
