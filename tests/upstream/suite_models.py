"""transformers' common model and configuration tests for the towers, the dual encoder and the classifier.

What is skipped here carries its reason. What the mixins skip by themselves (generation, tied weights, quantisation,
several accelerators) is theirs.
"""

import inspect
import unittest

import torch
from torch import nn
from transformers_tests import test_modeling_common
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from pyramidclip_hf import (
    PyramidCLIPBackbone,
    PyramidCLIPBackboneConfig,
    PyramidCLIPConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPModel,
    PyramidCLIPTextConfig,
    PyramidCLIPTextModel,
    PyramidCLIPTextModelWithProjection,
    PyramidCLIPVisionConfig,
    PyramidCLIPVisionModel,
    PyramidCLIPVisionModelWithProjection,
)

VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_leff_layers": 1, "roi_feature_size": 6, "projection_dim": 24, "freeze_patch_embedding": False}  # fmt: skip
RESNET = {"tower": "resnet", "image_size": 32, "layers": (1, 1, 1, 1), "width": 2, "num_attention_heads": 4,
          "roi_feature_size": 6, "projection_dim": 24}  # fmt: skip
TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 24}  # fmt: skip


def set_existing_epsilons(config):
    """The mixins' own version also sets names that a configuration does not have, which ours refuse on reloading."""
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        if hasattr(part, "layer_norm_eps"):
            part.layer_norm_eps = 1.0


test_modeling_common.set_config_for_less_flaky_test = set_existing_epsilons


class VisionTester:
    """Makes a tiny image tower's configuration and pictures."""

    fields = VIT

    def __init__(self, parent):
        self.parent, self.batch_size, self.is_training = parent, 5, True
        self.image_size, self.num_channels = self.fields["image_size"], 3
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.seq_length = config.grid_size**2 + 1

    def get_config(self):
        return PyramidCLIPVisionConfig(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixels}


class ResNetTester(VisionTester):
    fields = RESNET


class TextTester:
    """Makes a tiny text tower's configuration and ids."""

    fields = TEXT

    def __init__(self, parent):
        self.parent, self.batch_size, self.is_training = parent, 5, True
        # "max" pooling makes every text as long as the positions, so the inputs are.
        self.seq_length = self.fields["max_position_embeddings"]
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4

    def get_config(self):
        return PyramidCLIPTextConfig(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 96) + 3
        ids[:, -1] = 2
        mask = random_attention_mask([self.batch_size, self.seq_length])
        mask[:] = 1
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class EosTextTester(TextTester):
    fields = TEXT | {"pooling": "eos"}


class DualTester:
    """Makes a tiny dual encoder's configuration and the plain CLIP inputs."""

    vision, text = VisionTester, TextTester

    def __init__(self, parent):
        self.parent, self.is_training = parent, True
        self.vision_model_tester, self.text_model_tester = self.vision(parent), self.text(parent)
        self.batch_size = self.text_model_tester.batch_size
        for name in ("seq_length", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(self.text_model_tester, name))

    def get_config(self):
        return PyramidCLIPConfig(
            text_config=self.text_model_tester.get_config().to_dict(),
            vision_config=self.vision_model_tester.get_config().to_dict(),
            projection_dim=24,
            loss_weights={"global_caption": 1.0},
        )

    def prepare_config_and_inputs_for_common(self):
        _, pictures = self.vision_model_tester.prepare_config_and_inputs_for_common()
        _, texts = self.text_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**texts, **pictures, "return_loss": True}


class ResNetDualTester(DualTester):
    vision, text = ResNetTester, EosTextTester


def without(prepared, name):
    """A configuration and its inputs, less one input."""
    config, inputs = prepared
    return config, {key: value for key, value in inputs.items() if key != name}


class Common(ModelTesterMixin):
    """What holds for every class."""

    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = self.model_tester_class(self)

    def test_forward_signature(self):
        for model_class in self.all_model_classes:
            names = list(inspect.signature(model_class.forward).parameters)
            self.assertEqual(names[1], model_class.main_input_name)


class Tower(Common):
    """A tower alone has no objective."""

    @unittest.skip("a tower has no loss")
    def test_training(self):
        pass

    @unittest.skip("a tower has no loss")
    def test_training_gradient_checkpointing(self):
        pass

    @unittest.skip("a tower has no loss")
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        pass

    @unittest.skip("a tower has no loss")
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        pass

    @unittest.skip("a tower has no loss")
    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        pass


class ImageInput:
    """Pictures have no token embeddings and no `inputs_embeds`."""

    @unittest.skip("pictures have no inputs_embeds")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.prepare_config_and_inputs_for_common()[0])
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)


class ViTVisionModelTest(ImageInput, Tower, unittest.TestCase):
    all_model_classes = (PyramidCLIPVisionModel, PyramidCLIPVisionModelWithProjection)
    model_tester_class = VisionTester

    def test_config(self):
        ConfigTester(
            self, config_class=PyramidCLIPVisionConfig, has_text_modality=False, hidden_size=64
        ).run_common_tests()


class ResNetVisionModelTest(ImageInput, Tower, unittest.TestCase):
    all_model_classes = (PyramidCLIPVisionModel, PyramidCLIPVisionModelWithProjection)
    model_tester_class = ResNetTester
    has_attentions = False  # stages have none; the attention pooling is the only one

    @unittest.skip("a ResNet has four stages")
    def test_num_layers_is_small(self):
        pass

    @unittest.skip("a ResNet's hidden states are feature maps of its stages, not sequences of one width")
    def test_hidden_states_output(self):
        pass


class TextModelTest(Tower, unittest.TestCase):
    all_model_classes = (PyramidCLIPTextModel, PyramidCLIPTextModelWithProjection)
    model_tester_class = TextTester

    def test_config(self):
        ConfigTester(self, config_class=PyramidCLIPTextConfig, hidden_size=64).run_common_tests()

    @unittest.skip("the text tower pools by token id, so it takes ids, not inputs_embeds")
    def test_inputs_embeds(self):
        pass


class EosTextModelTest(TextModelTest):
    model_tester_class = EosTextTester


class DualEncoderTest(Common, unittest.TestCase):
    all_model_classes = (PyramidCLIPModel,)
    model_tester_class = DualTester
    _is_composite = True
    has_attentions = False  # the towers' outputs carry them
    test_all_params_have_gradient = False  # nor does the region branch without regions

    def test_batching_equivalence(self, **kwargs):
        prepare = self.model_tester.prepare_config_and_inputs_for_common
        # A contrastive loss of one pair does not exist, and that of a batch is no sum over its rows.
        self.model_tester.prepare_config_and_inputs_for_common = lambda: without(prepare(), "return_loss")
        super().test_batching_equivalence(**kwargs)

    def test_config(self):
        fields = {"projection_dim": 24, "label_smoothing": 0.1}
        ConfigTester(
            self, PyramidCLIPConfig, has_text_modality=False, common_properties=["projection_dim"], **fields
        ).run_common_tests()

    @unittest.skip("the towers' outputs carry the hidden states")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("the towers' outputs carry the hidden states")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("the dual encoder takes ids and pictures, not inputs_embeds")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("the dual encoder has two inputs; each tower gives its own")
    def test_model_get_set_embeddings(self):
        pass


class ResNetDualEncoderTest(DualEncoderTest):
    model_tester_class = ResNetDualTester

    @unittest.skip("a ResNet's stages have no attention")
    def test_get_image_features_attentions(self):
        pass


class ClassifierTest(ImageInput, Common, unittest.TestCase):
    all_model_classes = (PyramidCLIPForImageClassification,)
    test_all_params_have_gradient = False  # a classifier does not see regions
    model_tester_class = DualTester
    _is_composite = True

    def setUp(self):
        super().setUp()
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def pictures_only():
            config, inputs = prepare()
            return config, {"pixel_values": inputs["pixel_values"]}

        self.model_tester.prepare_config_and_inputs_for_common = pictures_only
        for name in ("seq_length", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self.model_tester, name, getattr(self.model_tester.vision_model_tester, name))

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs


class BackboneTester(VisionTester):
    """A tower as a backbone, two of its stages wanted."""

    def get_config(self):
        return PyramidCLIPBackboneConfig(**self.fields, out_features=["stage1", "stage2"])


class ResNetBackboneTester(BackboneTester):
    fields = RESNET


class ViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (PyramidCLIPBackbone,)
    config_class = PyramidCLIPBackboneConfig

    def setUp(self):
        self.model_tester = BackboneTester(self)


class ResNetBackboneTest(ViTBackboneTest):
    has_attentions = False

    def setUp(self):
        self.model_tester = ResNetBackboneTester(self)


class ViTBackboneModelTest(ImageInput, Tower, unittest.TestCase):
    all_model_classes = (PyramidCLIPBackbone,)
    model_tester_class = BackboneTester
    test_all_params_have_gradient = False  # nothing behind the last map is computed

    @unittest.skip("a backbone gives a tuple of maps")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class ResNetBackboneModelTest(ResNetVisionModelTest):
    all_model_classes = (PyramidCLIPBackbone,)
    model_tester_class = ResNetBackboneTester
    test_all_params_have_gradient = False

    @unittest.skip("a backbone gives a tuple of maps")
    def test_retain_grad_hidden_states_attentions(self):
        pass
