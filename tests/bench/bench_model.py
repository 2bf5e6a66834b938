"""Embedding pictures and texts, `model.fuse()`d, against CLIPModel and against the plain form of `tests.plain_forms`:
`python -m tests.bench --rows image bf16 text`.

Against the plain form values are compared before times are; CLIPModel is another model.
"""

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.modeling_pyramidclip_resnet import PyramidCLIPResNetBottleneck
from tests.bench.paired import Comparison, compare
from tests.plain_forms import DualEncoder, lively, plain_form

TOLERANCE = 1e-4  # fp32, a share of the largest output
BF16_COSINE = 0.99  # between an embedding in bf16 and in fp32


def model_and_plain_form(architecture: str, **changes) -> tuple[PyramidCLIPModel, DualEncoder]:
    """A fused model and its plain form, with weights and statistics by which every layer and the picture show in the
    output; a new ResNet's bottlenecks end in zeros.
    """
    torch.manual_seed(0)
    model = lively(PyramidCLIPModel(PyramidCLIPConfig.from_architecture(architecture, **changes)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0  # the statistics of one batch
            if isinstance(module, PyramidCLIPResNetBottleneck):
                module.norm3.weight.mul_(0.3)  # sixteen residuals of full size would double every rounding
        model.train().encode_image(pictures(model.config, 4))
    model.eval()
    plain = plain_form(model)
    return model.fuse(), plain


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To TOLERANCE of the largest output."""
    torch.testing.assert_close(found, wanted, atol=TOLERANCE * wanted.abs().max().item(), rtol=0)


def pictures(config: PyramidCLIPConfig, batch: int) -> torch.Tensor:
    """(batch, 3, H, W) noise."""
    side = config.vision_config.image_size
    return torch.randn(batch, 3, side, side)


def clip_model(config: PyramidCLIPConfig) -> CLIPModel:
    """transformers' CLIP with a picture tower of the size of `config`'s."""
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    vision = CLIPVisionConfig(**{name: getattr(config.vision_config, name) for name in same})
    text = CLIPTextConfig(num_hidden_layers=1)
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    return CLIPModel(CLIPConfig(**both, projection_dim=config.projection_dim)).eval()


def against_clip(architecture: str, rounds: int, batch: int = 8) -> Comparison:
    """Picture embeddings against CLIPModel's, fp32."""
    ours, _ = model_and_plain_form(architecture, text_config={"num_hidden_layers": 1})
    theirs, pixels = clip_model(ours.config), pictures(ours.config, batch)
    with torch.inference_mode():
        return compare(
            lambda: ours.encode_image(pixels), lambda: theirs.get_image_features(pixel_values=pixels), rounds
        )


def against_plain_form(
    architecture: str, rounds: int, batch: int = 8, dtype: torch.dtype = torch.float32
) -> Comparison:
    """Picture embeddings of the fused model in `dtype` against those of the plain form in fp32."""
    ours, plain = model_and_plain_form(architecture, text_config={"num_hidden_layers": 1})
    pixels = pictures(ours.config, batch)
    with torch.inference_mode():
        wanted = plain.encode_image(pixels)
        assert_equal(ours.encode_image(pixels), wanted)
        ours, narrow = ours.to(dtype), pixels.to(dtype)
        if dtype == torch.bfloat16:
            cosine = F.cosine_similarity(ours.encode_image(narrow).float(), wanted).min().item()
            assert cosine > BF16_COSINE, f"an embedding in bf16 has a cosine of {cosine:.4f} with the one in fp32"
        return compare(lambda: ours.encode_image(narrow), lambda: plain.encode_image(pixels), rounds)


def short_texts(rounds: int, batch: int = 32, tokens: int = 16) -> Comparison:
    """Texts of `tokens` tokens under pooling "eos" against the plain form of the same texts padded to 77."""
    ours, plain = model_and_plain_form(
        "ViT-B-32", text_config={"pooling": "eos"}, vision_config={"num_hidden_layers": 1}
    )
    padded = torch.zeros(batch, 77, dtype=torch.int64)
    padded[:, : tokens - 1] = torch.randint(1000, 2000, (batch, tokens - 1))
    text = ours.config.text_config
    padded[:, 0], padded[:, tokens - 1] = text.bos_token_id, text.eos_token_id
    short = padded[:, :tokens].contiguous()
    with torch.inference_mode():
        assert_equal(ours.encode_text(short), plain.encode_text(padded))
        return compare(lambda: ours.encode_text(short), lambda: plain.encode_text(padded), rounds)


def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bf16 itself; elsewhere bf16 is emulated, and slower than fp32."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
