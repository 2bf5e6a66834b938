"""A detector of the full shape but for its width, with weights that spread its answers."""

import pytest
import torch

from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection

TINY = {
    "layers": (1, 2, 2, 1),
    "groups": 2,
    "width_per_group": 4,
    "stem_channels": 64,
    "anchor_sizes": (16, 32, 64),
    "num_labels": 12,
    "num_attributes": 9,
    "label_embedding_size": 6,
    "attribute_hidden_size": 10,
    "rpn_pre_nms_top_n": 60,
    "rpn_post_nms_top_n": 20,
    "roi_chunk_size": 7,
    "max_attributes_per_object": 3,
    "min_detections": 3,
    "max_detections": 15,
}


def make_model(seed=0, **overrides):
    """Random weights under which no output is constant, with norms and biases that do something."""
    torch.manual_seed(seed)
    model = VinVLForObjectAttributeDetection(VinVLConfig(**(TINY | overrides))).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("weight"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
            else:
                buffer.normal_(std=0.1)
        for head, gain in ((model.rpn.cls_logits, 4), (model.roi_head.cls_score, 3)):
            head.weight.mul_(gain)
            head.bias.normal_(std=0.1)
        model.roi_head.bbox_pred.weight.mul_(20)
        model.roi_head.bbox_pred.bias.normal_()
        model.attribute_head.cls_embedding.weight.normal_()
        model.attribute_head.fc_attr.weight.mul_(2)
        model.attribute_head.attr_score.weight.mul_(40)
    return model


@pytest.fixture(scope="session")
def tiny_model():
    """Shared: not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def model_with():
    """The function that builds a tiny model with some config values changed."""
    return make_model
