"""Settings: YAML under flags, errors that name the field, and a list of all flags that only changes on purpose."""

import dataclasses
import json

import pytest

from training.settings.fields import in_sections
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import argument_parser, parse_settings

MINIMAL = ["--max-steps", "10"]


def parsed(words):
    return parse_settings(PretrainingArguments, words)


# A new setting is a decision: it needs a line here, a help text, and a place in the documentation.
FIELDS = """
    output_dir model train_data validation_data global_batch_size epochs learning_rate precision resume max_steps
    model_config loss_weights objective label_smoothing allow_empty_terms multi_positive freeze
    seed dataloader_workers validation_samples data_shares shuffle_window_samples max_regions drop_repeated_tags
    allow_mixed_regions allow_unfinished global_crop_area local_crop_area view_crop_area synonyms max_bad_fraction
    fetch_attempts fetch_seconds cache_gigabytes max_image_pixels per_device_chunk_size gradient_accumulation_steps
    warmup_fraction final_learning_rate_fraction weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ema_decay
    gradient_checkpointing sync_batch_norm deterministic torch_compile torch_compile_mode text_lengths
    log_every_steps trackers save_every_steps accept_identity process_timeout_minutes keep_checkpoints dry_run
    log_duplicate_rates eval_every_steps push_to_hub
    overfit_batches
""".split()

GRAPHS = ["--torch-compile", "--torch-compile-mode", "reduce-overhead"]


def test_the_list_of_settings_is_frozen_and_every_one_is_explained():
    fields = [entry for section in in_sections(PretrainingArguments).values() for entry in section]
    assert [entry.name for entry in fields] == FIELDS
    assert len(fields) == len(dataclasses.fields(PretrainingArguments))
    assert all(len(entry.metadata["help"]) > 10 for entry in fields)
    flags = argument_parser(PretrainingArguments)._option_string_actions
    assert all(f"--{name.replace('_', '-')}" in flags for name in FIELDS)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "max_steps: 100\nlearning_rate: 5e-4\ntrain_data: [a, b]\nvalidation_data: c\nsync_batch_norm: false\n"
        "loss_weights: {global_caption: 0.5, roi_tags: 0}\nmodel_config:\n  vision_config: {image_size: 64}\nseed:\n"
    )
    args = parse_settings(
        PretrainingArguments, ["--config", str(config), "--learning-rate", "1e-3", "--train_data", "d", "--dry-run"]
    )
    assert (args.max_steps, args.learning_rate, args.train_data, args.validation_data) == (100, 1e-3, ["d"], "c")
    assert args.loss_weights == {"global_caption": 0.5}  # a weight of 0 is not named
    assert args.model_config == {"vision_config": {"image_size": 64}}
    assert (args.sync_batch_norm, args.dry_run, args.seed, args.weight_decay) == (False, True, 0, 0.2)
    args = parse_settings(
        PretrainingArguments,
        ["--config", str(config), "--loss-weights", '{"local_caption": 1}', "--sync-batch-norm", "true"],
    )
    assert args.loss_weights == {"local_caption": 1.0} and args.sync_batch_norm
    assert PretrainingArguments(**args.to_dict()) == args and json.dumps(args.to_dict())
    config.write_text("trackers: []\nmax_steps: 1")
    assert parsed(["--config", str(config)]).trackers == []
    assert parsed(["--config", str(config), "--trackers", "wandb"]).trackers == ["wandb"]
    assert parsed(["--max-steps", "1", "--trackers", "none"]).trackers == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "unknown flag '--learning-rat' in the command line; did you mean --learning-rate"),
        (["--lr", "1"], "unknown flag '--lr' in the command line; did you mean --learning-rate[?]$"),
        (["--zzz", "1"], "unknown flag '--zzz' in the command line; --help lists the [0-9]+ that there are$"),
        (["--push-to-hub", "a/b/c"], "push_to_hub: expected an id of the Hub, such as user/name, got 'a/b/c'"),
        (["stray"], "unknown word 'stray'"),
        (["--output-dir", ""], "output_dir: expected the name of a folder, got ''; the working folder is called [.]"),
        (["--learning-rate", "fast"], "learning.rate.*expected a number, got 'fast'"),
        (["--precision", "fp8"], "precision.*invalid choice: 'fp8'"),
        (["--loss-weights", "{global"], "loss_weights: expected a JSON object"),
        (["--loss-weights", "[1]"], "loss_weights: expected a mapping, got list"),
        (["--loss-weights", '{"global_captions": 1}'], "unknown terms"),
        (["--epochs", "3"], "exactly one of epochs and max_steps.*epochs=3 and max_steps=10"),
        (["--global-batch-size", "1"], "global_batch_size: expected a number of at least 2, got 1"),
        (["--keep-checkpoints", "1" + "0" * 400], "keep_checkpoints: expected a number of at least 1, got 1000"),
        (["--learning-rate", "nan"], "learning_rate: expected a number of at least 0, got nan"),
        (["--cache-gigabytes", "0"], "cache_gigabytes: expected a number above 0, got 0"),
        (["--warmup-fraction", "1.5"], "warmup_fraction: expected a share from 0 to below 1, got 1.5"),
        (["--local-crop-area", "0.9", "0.5"], r"local_crop_area: expected two shares .* got \[0.9, 0.5\]"),
        (["--gradient-accumulation-steps", "4"], "only 1 is possible, got 4.*fewer negatives.*per_device_chunk_size"),
        (["--torch-compile-mode", "reduce-overhead"], "reduce-overhead needs torch_compile, which is off"),
        ([*GRAPHS, "--gradient-checkpointing"], "reduce-overhead with gradient_checkpointing is not possible"),
        ([*GRAPHS, "--per-device-chunk-size", "8"], "reduce-overhead with per_device_chunk_size is not possible"),
        (["--text-lengths", "32", "16"], r"text_lengths: expected rising numbers .* got \[32, 16\]"),
        (["--text-lengths", "1"], r"text_lengths: expected .* from 2 on, each once, got \[1\]"),
        (["--config", "nowhere.yaml"], "expected a YAML file, and nowhere.yaml is not there"),
    ],
)
def test_a_wrong_word_is_an_error_that_says_what_to_do(words, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parsed(MINIMAL + words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stepz: 3", "unknown key 'max_stepz' in .*; did you mean max_steps"),
        ("batch_size: 3", "did you mean global_batch_size"),
        ("learning_rate: {peak: 1}", "learning_rate takes no mapping"),
        ("- 3", "expected 'field: value' lines, got a list"),
        ("a: [", "not readable as YAML"),
        ("max_steps: many", "max_steps.*expected a whole number, got 'many'"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed(["--config", str(config)])


def test_the_global_batch_is_divided_evenly_or_not_at_all():
    args = PretrainingArguments(max_steps=1, global_batch_size=96, per_device_chunk_size=12)
    assert args.per_device_batch_size(4) == 24
    with pytest.raises(ValueError, match="global_batch_size 96 cannot be divided among 5 processes"):
        args.per_device_batch_size(5)
    with pytest.raises(ValueError, match=r"per_device_chunk_size 12 must divide .* 32 \(= global_batch_size 96 / 3"):
        args.per_device_batch_size(3)


def test_the_reading_processes_are_those_that_the_machine_has_for_them(monkeypatch):
    monkeypatch.setattr("training.settings.run.usable_cores", lambda: 12)
    assert parsed(MINIMAL).workers == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert parsed(MINIMAL).workers == 1
    assert parsed([*MINIMAL, "--dataloader-workers", "0"]).workers == 0
    monkeypatch.setattr("training.settings.run.usable_cores", lambda: 400)
    assert parsed(MINIMAL).workers == 16
