"""Reading settings: files that extend each other, both forms of flags, switches, plain dataclasses."""

import time
from dataclasses import dataclass, field
from typing import Literal

import pytest

from training.settings.finetuning import FinetuneArguments
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import argument_parser, parse_settings, read_chain, read_settings


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")  # the last one


def test_a_file_extends_another_one_key_by_key(tmp_path):
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", base="epochs: 3\nseed: 5\nloss_weights: {global_caption: 1}\ntrain_data: [a, b]\n")
    path = write(
        tmp_path,
        middle="extends: shared/base.yaml\nseed: 6\nloss_weights: {local_caption: 1}\nwarmup_fraction: 1e-2\n",
        top="extends: middle.yaml\nepochs:\nmax_steps: 7\nsync_batch_norm: false\n",
    )
    found = read_settings(PretrainingArguments, path)
    # Loss weights are replaced whole, as every value but model_config is; an empty value is the default.
    assert found == {
        "seed": 6,
        "loss_weights": {"local_caption": 1},
        "train_data": ["a", "b"],
        "warmup_fraction": 0.01,
        "max_steps": 7,
        "sync_batch_norm": False,
    }
    args = parse_settings(PretrainingArguments, ["--config", path, "--seed", "8"])
    assert (args.epochs, args.max_steps, args.seed, args.train_data) == (None, 7, 8, ["a", "b"])


def test_several_files_are_one_after_another_and_changes_to_the_model_add_up(tmp_path):
    base = write(tmp_path, base="seed: 1\nepochs: 1\nlearning_rate: 1.0\nmodel_config: {projection_dim: 8}\n")
    write(
        tmp_path,
        a="extends: base.yaml\nseed: 2\nmodel_config: {vision_config: {width: 4, layers: [1, 1, 1, 1]}}\n",
        b="extends: base.yaml\nlearning_rate: 2.0\nmodel_config: {vision_config: {width: 6}}\n",
        rows="table:\n  row: {learning_rate: 3.0}\n  other: {seed: 9}\n",
        both="extends: [a.yaml, b.yaml]\n",
    )
    a, b, both, rows = (str(tmp_path / f"{name}.yaml") for name in ("a", "b", "both", "rows"))
    towers = {"projection_dim": 8, "vision_config": {"width": 6, "layers": [1, 1, 1, 1]}}
    wanted = {"seed": 2, "epochs": 1, "learning_rate": 2.0, "model_config": towers}
    assert read_settings(PretrainingArguments, both) == read_settings(PretrainingArguments, a, b) == wanted
    assert [file.name for file, _ in read_chain(both)] == ["both.yaml", "b.yaml", "a.yaml", "base.yaml"]
    words = ["--config", base, both, f"{rows}:table.row", "--seed", "7"]
    args = parse_settings(PretrainingArguments, [*words, "--model-config", '{"vision_config": {"image_size": 32}}'])
    assert (args.seed, args.learning_rate) == (7, 3.0)
    assert args.model_config == {**towers, "vision_config": {**towers["vision_config"], "image_size": 32}}
    for place, message in (
        (f"{rows}:table.raw", "rows.yaml:table.raw: there is no raw; there: row, other"),
        (f"{rows}:table.row.seed", "there is no seed; there: learning_rate"),
        (f"{tmp_path}/no.yaml:table", "--config: expected a YAML file, and .*/no.yaml is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(PretrainingArguments, place)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": "extends: b.yaml", "b": "extends: a.yaml"},
            r"a.yaml: extends goes in a circle: \S*b.yaml -> \S*a.yaml -> ",
        ),
        ({"a": "extends: a.yaml"}, r"a.yaml: extends goes in a circle: \S*a.yaml -> \S*a.yaml$"),
        ({"a": "extends: nowhere.yaml"}, r"/a.yaml: extends: expected a YAML file, and \S*/nowhere.yaml is not there"),
        (
            {"a": "extends: {b: 1}"},
            r"/a.yaml: extends: expected the name of a YAML file, or a list of such, got {'b': 1}",
        ),
        ({"a": "extends: [1]"}, r"/a.yaml: extends: expected the name of a YAML file, or a list of such, got \[1\]"),
        ({"a": "max_stepz: 1", "b": "extends: a.yaml"}, "unknown key 'max_stepz' in .*/a.yaml; did you mean max_steps"),
        ({"a": "max_steps: many", "b": "extends: a.yaml"}, "/a.yaml: max_steps: expected a whole number, got 'many'"),
        ({"a": "precision: fp8"}, "/a.yaml: precision: invalid choice: 'fp8'"),
        ({"a": "model: [b, c]"}, r"/a.yaml: model: expected a single value, got \['b', 'c'\]"),
        ({"a": "sync_batch_norm: maybe"}, "/a.yaml: sync_batch_norm: expected true or false, got 'maybe'"),
        (
            {"a": "max_steps: 1\nmodel: b\nmax_steps: 2"},
            "/a.yaml: not readable as YAML: 'max_steps' stands there twice",
        ),
        ({"a": "model_config: {b: 1, b: 1}"}, "/a.yaml: not readable as YAML: 'b' stands there twice"),
        ({"a": "a: [", "b": "extends: a.yaml"}, "/a.yaml: not readable as YAML"),
    ],
)
def test_what_is_wrong_in_a_chain_is_said_of_the_file_where_it_is(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_settings(PretrainingArguments, write(tmp_path, **files))


def test_switches_are_turned_on_and_off():
    def flip(*words):
        return parse_settings(FinetuneArguments, ["--model", "m", "--train_data", "d", *words]).flip

    assert flip() and flip("--flip") and flip("--flip", "yes") and flip("--flip=TRUE")
    assert not (flip("--no-flip") or flip("--no_flip") or flip("--flip", "False") or flip("--flip=0"))
    with pytest.raises(ValueError, match="flip.*expected true or false, got 'maybe'"):
        flip("--flip", "maybe")
    with pytest.raises(ValueError, match="no-flip: expected no value"):
        flip("--no-flip", "no")


@dataclass(kw_only=True)
class Plain:
    data: str = field(metadata={"help": "where it is, 100%% of it"})
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "which"})
    numbers: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "how many"})
    config: str = field(default="x.yaml", metadata={"help": "a file of its own"})


def test_a_plain_dataclass_is_a_command_line(capsys):
    def parsed(*words):
        return parse_settings(Plain, words, "Does it.", config=False)

    found = parsed("--data", "d", "--kind", "b", "--numbers", "-3", "4")
    assert found == Plain(data="d", kind="b", numbers=[-3, 4])
    with pytest.raises(ValueError, match="the following arguments are required: --data$"):
        parsed("--kind", "a")
    with pytest.raises(ValueError, match="unknown flag '--numbrs'.*did you mean --numbers"):
        parsed("--data", "d", "--numbrs", "1")
    text = argument_parser(Plain, "Does it.", config=False).format_help()
    assert "100% of it" in text and "(default: 0 1)" in text and text.count("--config") == 1


@pytest.mark.parametrize("text", [
    "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n",
    "a: &a [*a]\n", "a: " + "[" * 5000,
])  # fmt: skip
def test_small_files_that_stand_for_much_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="nested too deep, or aliases"):
        read_chain(write(tmp_path, bomb=text))


def test_a_settings_file_is_of_bounded_size(tmp_path):
    with pytest.raises(ValueError, match="has more than"):
        read_chain(write(tmp_path, large="#" * (2 << 20)))


def test_merge_keys_that_copy_without_end_are_refused(tmp_path):
    """Each line holds the one before ten times: 10 ** 9 values in 600 bytes."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    wide = ["a: &a {" + ", ".join(f"k{n}: 1" for n in range(3000)) + "}", f"b: {{<<: [{', '.join(['*a'] * 9000)}]}}"]
    for text in ("\n".join(lines), "\n".join(wide)):
        began = time.perf_counter()
        with pytest.raises(ValueError, match="nested too deep, or aliases"):
            read_chain(write(tmp_path, bomb=text))
        assert time.perf_counter() - began < 10
    name = write(tmp_path, fine="base: &base {epochs: 3}\nrow: {<<: *base, seed: 1}\n")
    assert read_chain(f"{name}:row")[0][1] == {"epochs": 3, "seed": 1}


@pytest.mark.parametrize("text", ["seed: " + "9" * 5000, "seed: 2001-13-45", "? [1]\n: 2", "{" * 3000, "a: !!int x"])
def test_what_yaml_cannot_make_of_its_words_names_the_file(tmp_path, text):
    with pytest.raises(ValueError, match="bad.yaml: (not readable as YAML|nested too deep)"):
        read_chain(write(tmp_path, bad=text))
