"""A tiny model, and what the commands should give, by plain loops over it: one picture at a time."""

import functools

import torch
from PIL import Image

import pyramidclip_command
from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor

ROTATED = "b/rotated.jpg"
# The longest sum of the tiny model: a patch of 3 x 8 x 8 pixels.
WIDEST = 192
BROKEN = ("b/cut.jpg", "b/words.png")
COLOURS = {"a/red.png": (230, 20, 20), "a/green.webp": (20, 200, 40), "blue.jpg": (20, 40, 220)}


def save_tiny_model(folder, seed):
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_leff_layers": 1}  # fmt: skip
    model = PyramidCLIPModel(PyramidCLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32)).save_pretrained(folder)
    return str(folder)


def good_ones(folder):
    found = [*COLOURS, "a/noise.PNG", "b/noise.gif", "noise.bmp", ROTATED]
    return {str(folder / name) for name in found}


@functools.cache
def loaded(model_dir):
    return PyramidCLIPModel.from_pretrained(model_dir).eval(), PyramidCLIPProcessor.from_pretrained(model_dir)


def plain_image_embedding(model_dir, path):
    model, processor = loaded(model_dir)
    with torch.no_grad():
        embed = model.encode_image(processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"])[0]
    return (embed / embed.norm()).numpy()


def plain_text_embeddings(model_dir, texts):
    model, processor = loaded(model_dir)
    with torch.no_grad():
        embeds = [model.encode_text(processor(text=[text], return_tensors="pt")["input_ids"])[0] for text in texts]
    return torch.stack([embed / embed.norm() for embed in embeds]).numpy()


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command in this process."""
    capsys.readouterr()
    code = pyramidclip_command.main([str(word) for word in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def embed(capsys, model_dir, pictures, output, *flags):
    argv = ["embed", "--model", model_dir, pictures, "--output", output, "--part-size", 3, "--batch-size", 2, *flags]
    return run(capsys, *argv)
