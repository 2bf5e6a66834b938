"""Each setting is declared once: what is derived from the declaration, and that no field leaves something out."""

import dataclasses
import re

import pytest

from tests.write_tables import pages, with_tables
from training.settings.fields import GROUPS, Through, check_fields, default_identity, identity_of, setting
from training.settings.finetuning import FinetuneArguments
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import argument_parser
from training.settings.run import RunSettings, changed

KINDS = [PretrainingArguments, FinetuneArguments]
PRETRAINING = PretrainingArguments(max_steps=1)
FINETUNING = FinetuneArguments(model="m", train_data="d")


@pytest.mark.parametrize("kind", [RunSettings, *KINDS])
def test_every_field_says_which_part_of_the_identity_it_is(kind):
    for entry in dataclasses.fields(kind):
        group = entry.metadata["identity"]
        assert group is None or (group.group if isinstance(group, Through) else group) in GROUPS, entry.name


def test_a_field_that_does_not_say_is_refused():
    with pytest.raises(TypeError, match="identity"):
        setting(1, "a number of things", section="data")
    with pytest.raises(ValueError, match="section: expected one of first, .* got 'dat'"):
        setting(1, "a number of things", section="dat", identity=None)


def test_a_kind_of_training_repeats_a_shared_setting_only_to_change_it():
    shared = {entry.name: entry for entry in dataclasses.fields(RunSettings)}
    for kind in KINDS:
        for entry in dataclasses.fields(kind):
            if entry.name in shared:
                before = shared[entry.name].metadata
                assert (
                    entry.metadata["identity"] == before["identity"] and entry.metadata["section"] == before["section"]
                )
                assert entry.metadata["checks"][: len(before["checks"])] == before["checks"]
    assert {name for name in vars(FinetuneArguments)["__annotations__"] if name in shared} == {
        *"output_dir model train_data validation_data global_batch_size epochs learning_rate seed".split(),
        *"warmup_fraction adam_beta2 adam_epsilon max_grad_norm".split(),
    }


# What a checkpoint of each kind keeps by value. Every setting is here, or what it decides is compared in another form
# (`Through`), or a run may be continued under another value: each of these is a decision.
IDENTITY = {
    PretrainingArguments: {
        "data": "seed data_shares shuffle_window_samples max_regions drop_repeated_tags allow_mixed_regions "
        "global_crop_area local_crop_area view_crop_area max_image_pixels overfit_batches",
        "objective": "multi_positive freeze",
        "schedule": "global_batch_size learning_rate warmup_fraction final_learning_rate_fraction",
        "optimizer": "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ema_decay",
        "model": "",
        "how": "precision per_device_chunk_size sync_batch_norm gradient_checkpointing deterministic torch_compile "
        "torch_compile_mode text_lengths",
    },
    FinetuneArguments: {
        "data": "seed crop_area flip",
        "objective": "label_smoothing",
        "schedule": "head_epochs global_batch_size learning_rate warmup_fraction final_learning_rate_fraction",
        "optimizer": "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
        "model": "",
        "how": "precision sync_batch_norm gradient_checkpointing deterministic",
    },
}
THROUGH = {
    PretrainingArguments: {
        ("data", "fingerprint"): {"train_data"},
        ("data", "synonyms"): {"synonyms"},
        ("objective", "loss_weights"): {"loss_weights"},
        ("objective", "further"): {"objective"},
        ("objective", "label_smoothing"): {"label_smoothing"},
        ("schedule", "total_steps"): {"epochs", "max_steps"},
        ("model", ""): {"model", "model_config"},
    },
    FinetuneArguments: {
        ("data", "fingerprint"): {"train_data", "dataset", "validation_fraction", "test_fraction"},
        ("data", "classes"): {"classes"},
        ("schedule", "total_steps"): {"epochs"},
        ("model", ""): {"model", "model_config"},
    },
}
FREE = {
    PretrainingArguments: "output_dir validation_data validation_samples max_bad_fraction fetch_attempts fetch_seconds "
    "cache_gigabytes dataloader_workers "
    "allow_unfinished gradient_accumulation_steps log_every_steps log_duplicate_rates trackers eval_every_steps "
    "save_every_steps keep_checkpoints process_timeout_minutes accept_identity resume push_to_hub dry_run "
    "allow_empty_terms",
    FinetuneArguments: "output_dir validation_data test_data dataloader_workers eval_batch_size log_every_steps "
    "trackers eval_every_epochs save_every_steps keep_checkpoints process_timeout_minutes accept_identity resume "
    "dry_run max_image_pixels",
}


@pytest.mark.parametrize("settings", [PRETRAINING, FINETUNING], ids=lambda settings: type(settings).__name__)
def test_the_identity_is_what_was_decided(settings):
    kind, through = type(settings), {}
    found = identity_of(settings)
    assert {group: set(values) for group, values in found.items()} == {
        group: set(names.split()) for group, names in IDENTITY[kind].items()
    }
    for entry in dataclasses.fields(kind):
        if isinstance(entry.metadata["identity"], Through):
            through.setdefault(tuple(entry.metadata["identity"]), set()).add(entry.name)
    assert through == THROUGH[kind]
    free = {entry.name for entry in dataclasses.fields(kind) if entry.metadata["identity"] is None}
    assert free == set(FREE[kind].split())
    assert found == default_identity(kind)


def test_the_identity_has_the_values():
    found = identity_of(dataclasses.replace(PRETRAINING, max_image_pixels=5, precision="fp32"))
    assert (found["data"]["max_image_pixels"], found["how"]["precision"]) == (5, "fp32")
    assert default_identity(PretrainingArguments)["data"]["max_image_pixels"] == 100_000_000


def test_a_changed_field_keeps_words_and_bounds_and_adds_to_them():
    @dataclasses.dataclass(kw_only=True)
    class Settings:
        first: float = changed("adam_beta2", 0.5)
        second: int = changed("global_batch_size", 8, "pictures", at_least=4)

    first, second = dataclasses.fields(Settings)
    assert (first.default, first.metadata["help"]) == (0.5, "decay of AdamW's second moment")
    assert (second.default, second.metadata["help"], second.metadata["identity"]) == (8, "pictures", "schedule")
    with pytest.raises(ValueError, match="^first: expected a share from 0 to below 1, got 1$"):
        check_fields(Settings(first=1))
    for value, bound in ((0, 1), (3, 4)):
        with pytest.raises(ValueError, match=f"^second: expected a number of at least {bound}, got {value}$"):
            check_fields(Settings(second=value))


@pytest.mark.parametrize("kind", KINDS)
def test_the_help_is_in_sections_with_dashes_and_each_default_once(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = argument_parser(kind, f"What it does, in words.\n\n    a command\n\n{'More words. ' * 20}").format_help()
    assert re.match(
        r"usage: .* \[--config FILE ...\] \[--setting value ...\]\n\nWhat it does.*\n\n    a command\n\nMore", text
    )
    assert max(map(len, text.splitlines())) <= 100
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles[:3] == ["options", "what most runs set", "what is trained"] and titles[-1].startswith("watching")
    first = text.split("what most runs set:")[1].split("\n\n")[0]
    assert re.findall(r"^  (--[a-z-]+)", first, re.MULTILINE)[:3] == ["--output-dir", "--model", "--train-data"]
    assert len(re.findall(r"^  --", first, re.MULTILINE)) == 10
    assert not re.search(r"--\w+_", text)
    for entry in dataclasses.fields(kind):
        (said,) = re.findall(rf"^  --{entry.name.replace('_', '-')}(?![\w-])(.*?)(?=^  --|\n\n|\Z)", text, re.M | re.S)
        assert said.lower().count("default:") <= 1 and "None" not in said


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_documentation_has_every_setting_as_it_is(page):
    """`python -m tests.write_tables` writes the tables again."""
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text)


def test_all_tables_of_settings_are_compared():
    assert [page.name for page in pages()] == ["detection.md", "training.md", "transfer.md"]
    assert sum(page.read_text(encoding="utf-8").count("| setting | default") for page in pages()) == 4
