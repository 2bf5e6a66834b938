"""The identity of a run: what an upgrade brings along is none of it, what changes the function is."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from pyramidclip_hf import PyramidCLIPConfig
from tests.training.runs import resumable_settings as arguments
from tests.training.runs import use_memory
from tests.training.tiny import RESNET, TEXT, VIT
from training import pretrain
from training.loop.identity import IdentityError, compare_identity, completed_model, model_identity
from training.loop.record import sealed
from training.loop.run_folder import list_checkpoints

PATH = Path("runs/x/checkpoints/step-00000001")


def config(vision=VIT, **changes):
    return PyramidCLIPConfig(text_config=TEXT, vision_config={**vision, **changes}, projection_dim=8)


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.fixture
def run(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    pretrain.run(arguments(tmp_path, steps=3))
    return tmp_path


def change_record(folder, change):
    path = list_checkpoints(folder)[-1] / "run.json"
    record = json.loads(path.read_text())
    change(record["identity"]["model"])
    path.write_text(json.dumps(sealed(record)))


def resumed(folder, **changes):
    return pretrain.run(arguments(folder, steps=3, resume="latest", **changes))


def newer_transformers(monkeypatch):
    """A release whose base class has one more field, one less, and another default of a third."""
    before = PreTrainedConfig.to_dict

    def to_dict(self):
        found = before(self) | {"brand_new_default": 7, "chunk_size_feed_forward": 5}
        return {name: value for name, value in found.items() if name != "is_encoder_decoder"}

    monkeypatch.setattr(PreTrainedConfig, "to_dict", to_dict)
    monkeypatch.setattr(PreTrainedConfig, "chunk_size_feed_forward", 5)


def test_a_release_of_transformers_with_other_defaults_continues_a_run(run, monkeypatch):
    newer_transformers(monkeypatch)
    assert resumed(run).finished


def test_a_record_with_all_of_transformers_defaults_is_continued(run, monkeypatch):
    """As records were before: every field of the base class, in the composed configuration and in its towers."""
    everything = json.loads((list_checkpoints(run)[-1] / "model/config.json").read_text())
    everything = PyramidCLIPConfig.from_dict(everything).to_dict()
    change_record(run, lambda model: model.update({**everything, "a_field_of_an_older_release": 1}))
    newer_transformers(monkeypatch)
    assert resumed(run).finished
    with pytest.raises(IdentityError, match="model.text_config.hidden_act: was 'quick_gelu', is now 'gelu'"):
        changed = copy.deepcopy(arguments(run).model_config)
        changed["text_config"]["hidden_act"] = "gelu"
        resumed(run, model_config=changed)


def test_a_field_of_ours_that_the_record_does_not_know_had_its_default(run):
    """`num_picture_layers` followed `num_leff_layers` when it did not exist."""
    change_record(run, lambda model: model["vision_config"].pop("num_picture_layers"))
    assert resumed(run).finished
    changed = copy.deepcopy(arguments(run).model_config)
    changed["vision_config"]["num_picture_layers"] = 2
    with pytest.raises(IdentityError, match="model.vision_config.num_picture_layers: was 1, is now 2"):
        resumed(run, model_config=changed)


def test_what_is_known_to_be_the_same_is_accepted_by_name(run, capsys):
    change_record(run, lambda model: model.update(a_field_that_is_gone=3))
    with pytest.raises(IdentityError, match="--accept-identity model.a_field_that_is_gone$"):
        resumed(run)
    with pytest.raises(ValueError, match="accept_identity: expected names such as model.a_field_that_is_gone, "):
        resumed(run, accept_identity=["model.a_field_that_is_gome"])
    assert resumed(run, accept_identity=["model.a_field_that_is_gone"]).finished
    said = capsys.readouterr().out
    assert "an accepted difference: model.a_field_that_is_gone: was 3, is now None" in said


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_every_field_of_ours_is_in_it_and_none_of_the_base_class(vision):
    found = model_identity(config(vision))
    base = {entry.name for entry in fields(PreTrainedConfig)}
    for part in (found, found["text_config"], found["vision_config"]):
        assert not base & set(part)
    own = {entry.name for entry in fields(config(vision))} - base
    assert own - set(found) == {"logit_scale_init_value"}  # where training began
    assert set(found["vision_config"]) == {entry.name for entry in fields(config(vision).vision_config)} - base
    assert through_json(completed_model(through_json(found), config(vision))) == through_json(found)


def test_a_record_is_completed_with_defaults_and_derived_values():
    saved = through_json(model_identity(config(num_leff_layers=1)))
    for name in ("num_picture_layers", "freeze_patch_embedding", "intermediate_size"):
        del saved["vision_config"][name]
    found = completed_model(saved, config())
    assert found == through_json(model_identity(config(num_leff_layers=1, freeze_patch_embedding=True)))


def test_names_are_compared_flat_and_how_may_change():
    saved = {"model": {"a": {"b": [1, 2]}, "c": 1}, "how": {"precision": "bf16"}}
    now = {"model": {"a": {"b": (1, 2)}, "c": 1}, "how": {"precision": "fp32"}}
    assert compare_identity(saved, now, PATH) == [
        "continuing with a changed setting: how.precision: was 'bf16', is now 'fp32'"
    ]
    now["model"]["a"]["b"] = (1, 3)
    with pytest.raises(
        IdentityError, match=r"model.a.b: was \[1, 2\], is now \[1, 3\]\nRestore.*--accept-identity model.a.b"
    ):
        compare_identity(saved, now, PATH)
    assert len(compare_identity(saved, now, PATH, ["model.a.b", "model.c"])) == 2  # one that no longer differs is none
