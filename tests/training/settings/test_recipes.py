"""The recipes: every value marked, the paper's values right, every ablation row runnable, every engine's config
readable.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from tests.training.runs import MODEL_CONFIG, MemoryReader, use_memory
from tests.training.tiny import RESNET
from training import pretrain
from training.loop.tracking import read_metrics
from training.pretrain import further_terms
from training.scale import recipe_config
from training.settings.fields import identity_of
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import parse_settings, read_chain, read_settings

CONFIGS = Path(pretrain.__file__).parent / "configs"
CLIP = sorted(CONFIGS.glob("clip_*_epochs.yaml"))
PAPER = [path for path in sorted(CONFIGS.glob("*_epochs.yaml")) if path not in CLIP]
ABLATIONS = yaml.safe_load((CONFIGS / "ablations.yaml").read_text())
ROWS = [(table, name) for table, rows in ABLATIONS.items() for name in rows]


def test_there_is_a_recipe_for_each_run_of_the_paper():
    assert [path.stem for path in PAPER] == [
        f"{model}_{run}_epochs" for model in ("rn50", "vit_b_16", "vit_b_32") for run in ("143m_32", "15m_32", "15m_8")
    ]


def test_the_papers_clip_is_the_recipe_beside_it_but_for_what_clip_is():
    """One term, hard targets and, in a ViT, no LeFF: also the first row of Table 14."""
    stems = [f"{model}_{run}_epochs" for model in ("rn50", "vit_b_16", "vit_b_32") for run in ("143m_32", "15m_32")]
    assert [path.stem for path in CLIP] == [f"clip_{stem}" for stem in stems]
    clip = read_settings(PretrainingArguments, CONFIGS / "clip.yaml")
    assert clip == ABLATIONS["peer_level"]["clip"]
    for stem in stems:
        beside = read_settings(PretrainingArguments, CONFIGS / f"{stem}.yaml")
        found = read_settings(PretrainingArguments, CONFIGS / f"clip_{stem}.yaml")
        assert found == {**beside, **clip, "output_dir": f"runs/clip_{stem}"}
        config = recipe_config(PretrainingArguments(**found))
        assert config.vision_config.num_leff_layers == 0 and config.loss_weights == {"global_caption": 1.0}
        assert not any("depthwise" in name for name, _ in fake_model(config).named_parameters())


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_value_is_marked_and_the_papers_values_are_the_papers(path):
    chain = [file for file, _ in read_chain(path)]
    assert [file.name for file in chain] == [path.name, "base.yaml"]
    lines = [line for file in chain for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.search(r"# (paper|ours)\b", line) for line in lines)
    args = parse_settings(PretrainingArguments, ["--config", str(path)])
    model, data, epochs = re.fullmatch(r"(\w+?)_(15m|143m)_(\d+)_epochs", path.stem).groups()
    assert args.model == {"rn50": "RN50", "vit_b_32": "ViT-B-32", "vit_b_16": "ViT-B-16"}[model]
    assert (args.epochs, args.global_batch_size) == (int(epochs), 8192 if data == "143m" else 4096)
    assert (args.weight_decay, args.max_regions, args.label_smoothing) == (0.2, 10, 0.2)
    assert (args.global_crop_area, args.local_crop_area) == ([0.9, 1.0], [0.5, 1.0])
    assert args.loss_weights == pytest.approx(DEFAULT_LOSS_WEIGHTS)
    assert len(args.train_data) == (5 if data == "143m" else 1)
    assert args.precision == "bf16" and args.learning_rate == (1e-3 if data == "143m" else 5e-4)


METHODS = {
    "clip": ({"global_caption": 1.0}, {}),
    "slip": ({"global_caption": 1.0}, {"views_simclr": 1.0}),
    "filip": ({}, {"global_caption_tokens": 1.0}),
    "declip": (
        {},
        {
            **dict.fromkeys(("view1_caption", "view1_caption_aug", "view2_caption", "view2_caption_aug"), 0.1),
            **dict.fromkeys(("views_simsiam", "caption_mlm", "views_nn"), 0.2),
        },
    ),
    "pyramidclip": (DEFAULT_LOSS_WEIGHTS, {}),
}
METHODS["defilip"] = ({}, {**METHODS["declip"][1], "view1_caption_tokens": 0.2})


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_of_table_2_are_mappings(name):
    """Each value marked, weights those of the sources, and each a run by one command behind any recipe."""
    path, (pairs, further) = CONFIGS / f"{name}.yaml", METHODS[name]
    for line in path.read_text().splitlines():
        if line and not line.startswith("#") and not line.endswith(":"):
            assert re.search(r"# (paper|source code|ours)\b", line), line
    args = parse_settings(
        PretrainingArguments, ["--config", f"{CONFIGS}/vit_b_32_15m_32_epochs.yaml", str(path), "--output-dir", "run"]
    )
    with torch.device("meta"):
        found = further_terms(args, recipe_config(args))
    assert (args.loss_weights, args.label_smoothing) == (pytest.approx(pairs), 0.2 if name == "pyramidclip" else 0.0)
    assert {**found.pairs, **{term.name: term.weight for term in found.terms}} == pytest.approx(further)
    leff = recipe_config(args).vision_config.num_leff_layers
    assert leff == (9 if name == "pyramidclip" else 0)


def fake_model(config):
    with torch.device("meta"):
        return PyramidCLIPModel(config)


# All settings of the recipes whose value is not the default; the rest of each name says what is left.
RECIPE = {
    "validation_data": "data/validation",
    "loss_weights": dict.fromkeys(
        ("global_summary", "local_caption", "roi_summary", "global_tags", "roi_caption", "local_tags"), 1 / 6
    ),
    "label_smoothing": 0.2,
    "dataloader_workers": 8,
    "eval_every_steps": 2000,
    "keep_checkpoints": 3,
}
MODELS = {"rn50": "RN50", "vit_b_16": "ViT-B-16", "vit_b_32": "ViT-B-32"}
SMALL = {"train_data": ["data/yfcc15m"], "global_batch_size": 4096, "learning_rate": 5e-4}
LARGE = {
    "train_data": ["data/sbu", "data/cc3m", "data/cc12m", "data/yfcc15m", "data/laion99m"],
    "global_batch_size": 8192,
    "learning_rate": 1e-3,
}
RUNS = {"15m_8": {**SMALL, "epochs": 8}, "15m_32": {**SMALL, "epochs": 32}, "143m_32": {**LARGE, "epochs": 32}}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("run", RUNS)
def test_the_recipes_are_settings_of_these_values(model, run):
    name = f"{model}_{run}_epochs"
    found = parse_settings(PretrainingArguments, ["--config", str(CONFIGS / f"{name}.yaml")])
    expected = {"output_dir": f"runs/{name}", "model": MODELS[model], **RECIPE, **RUNS[run]}
    assert found.to_dict() == PretrainingArguments(**expected).to_dict()


def test_the_recipes_do_not_hang_on_defaults():
    """A default that changes changes no recipe: each says all that decides its run."""
    said = {name for _, content in read_chain(PAPER[0]) for name in content}
    groups = identity_of(PretrainingArguments(max_steps=1))
    decided = {name for group in ("schedule", "optimizer") for name in groups[group]} - {"ema_decay"}
    assert decided | {"seed", "max_regions", "global_crop_area", "local_crop_area", "precision"} <= said


def test_the_demo_recipe_is_readable():
    args = parse_settings(PretrainingArguments, ["--config", str(CONFIGS / "demo.yaml")])
    assert args.model_config["text_config"]["pooling"] == "eos" and args.max_steps


@pytest.mark.parametrize(("table", "name"), ROWS, ids=lambda value: value)
def test_every_ablation_row_is_a_run_at_the_papers_scale_by_one_command(table, name, tmp_path):
    row = ABLATIONS[table][name]
    asked = row.get("model_config", {}).get("vision_config", {})
    for recipe in ("rn50_15m_8_epochs", "vit_b_32_15m_8_epochs"):
        words = ["--config", f"{CONFIGS}/{recipe}.yaml", f"{CONFIGS}/ablations.yaml:{table}.{name}"]
        args = parse_settings(PretrainingArguments, [*words, "--output-dir", str(tmp_path)])
        assert (args.loss_weights, args.label_smoothing) == (row["loss_weights"], row["label_smoothing"])
        assert (args.epochs, args.global_batch_size, args.learning_rate) == (8, 4096, 5e-4)
        assert set(args.loss_weights) <= set(TERMS) and sum(args.loss_weights.values()) == pytest.approx(1)
        if recipe.startswith("rn50"):
            if table != "front" or name == "m_0":
                assert recipe_config(args).vision_config.num_leff_layers == 0
            continue
        vision = recipe_config(args).vision_config
        assert vision.num_leff_layers == asked.get("num_leff_layers", 9)
        assert vision.num_picture_layers == asked.get("num_picture_layers", vision.num_leff_layers)


@pytest.mark.parametrize(
    "row", ["components.leff", "peer_level.clip", "mismatched.with_both", "front.m_3", "front.m_9_without_leff"]
)
def test_an_ablation_row_at_the_papers_scale_is_tried_by_a_dry_run(row, tmp_path, monkeypatch, capsys):
    """The command as it is documented; only the widths, the batch and the data are small."""
    use_memory(monkeypatch, missing=False)
    monkeypatch.chdir(tmp_path)
    Path("data/yfcc15m").mkdir(parents=True)  # the recipe's
    recipe, table = CONFIGS / "vit_b_32_15m_8_epochs.yaml", CONFIGS / "ablations.yaml"
    vision = {**MODEL_CONFIG["vision_config"], "num_hidden_layers": 12}
    del vision["num_leff_layers"]  # the row's
    small = json.dumps({**MODEL_CONFIG, "vision_config": vision})
    (tmp_path / "here.yaml").write_text(
        f"train_data: {tmp_path}\nvalidation_data:\nglobal_batch_size: 8\nprecision: fp32\n"
    )
    words = ["--config", str(recipe), f"{table}:{row}", str(tmp_path / "here.yaml"), "--model-config", small]
    assert pretrain.main([*words, "--dry-run", "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    name, _, key = row.partition(".")
    for term in ABLATIONS[name][key]["loss_weights"]:
        assert term in said
    assert "dry run: 2 steps done" in said and "40 steps, 320 samples" in said  # 8 epochs of the 40 that there are
    assert not (tmp_path / "run").exists()


def test_the_ablation_rows_are_the_papers():
    peer, full = {"global_summary", "local_caption"}, set(DEFAULT_LOSS_WEIGHTS)
    relation = peer | {"roi_summary", "global_tags"}
    expected = {
        "components": {
            "peer": peer,
            "global_relation": relation,
            "local_relation": full,
            "softened": full,
            "leff": full,
        },
        "peer_level": {
            "clip": {"global_caption"},
            "clip_local_crop": {"local_caption"},
            "peer": peer,
            "peer_and_regions": peer | {"roi_tags"},
        },
        "mismatched": {
            "full": full,
            "with_global_caption": full | {"global_caption"},
            "with_local_summary": full | {"local_summary"},
            "with_both": set(TERMS) - {"roi_tags"},
        },
        "front": dict.fromkeys(("m_0", "m_3", "m_6", "m_9", "m_12", "m_9_without_leff"), full),
    }
    assert {
        table: {name: set(row["loss_weights"]) for name, row in rows.items()} for table, rows in ABLATIONS.items()
    } == (expected)
    # Softened targets are the fourth of the five steps, and belong to no row of the peer-level table.
    assert [ABLATIONS["components"][name]["label_smoothing"] for name in expected["components"]] == [0, 0, 0, 0.2, 0.2]
    assert {row["label_smoothing"] for row in ABLATIONS["peer_level"].values()} == {0}


@pytest.mark.parametrize("stem", ["rn50_15m_8_epochs", "vit_b_16_143m_32_epochs"])
def test_overfitting_two_batches_drives_a_recipe_to_its_floor(stem, tmp_path, monkeypatch):
    """Everything of the recipe but sizes, length and learning rate."""
    monkeypatch.setattr(pretrain, "open_reader", lambda *arguments: reader)
    vision = RESNET if stem.startswith("rn50") else MODEL_CONFIG["vision_config"]
    config = {**MODEL_CONFIG, "vision_config": vision, "projection_dim": 16}
    settings = read_settings(PretrainingArguments, CONFIGS / f"{stem}.yaml")
    settings |= {
        "epochs": None,
        "max_steps": 120 if stem.startswith("rn50") else 220,
        "global_batch_size": 8,
        "learning_rate": 1e-2,
        "overfit_batches": 2,
    }
    settings |= {"precision": "fp32", "validation_data": None, "trackers": ["none"], "save_every_steps": 0}
    settings |= {"model_config": config, "output_dir": str(tmp_path), "log_every_steps": 20}
    args = PretrainingArguments(**settings)
    reader = MemoryReader(args, 16, missing=False, image_size=config["vision_config"]["image_size"])
    pretrain.run(args)
    losses = [line["loss/total"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in line]
    floor = -0.8 * math.log(0.8) - 0.2 * math.log(0.2 / 7)  # entropy of the softened targets at N = 8
    assert floor - 1e-4 < losses[-1] < floor + 0.15 < losses[0], losses


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_engines_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    expected = {
        "one_gpu": (DistributedType.NO, 1, 1),
        "one_node": (DistributedType.MULTI_GPU, 8, 1),
        "two_processes": (DistributedType.MULTI_GPU, 2, 1),
        "several_nodes": (DistributedType.MULTI_GPU, 64, 8),
        "deepspeed_refused": (DistributedType.DEEPSPEED, 8, 1),
        "fsdp2_refused": (DistributedType.FSDP, 8, 1),
    }[path.stem]
    assert (config.distributed_type, config.num_processes, config.num_machines) == expected
    runs_here = path.stem in ("one_gpu", "two_processes")
    text = path.read_text()
    assert runs_here or "Not run." in text or "eight GPUs" in text or "refused" in text
