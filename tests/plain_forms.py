"""The model (docs/design.md, Towers) written module by module, with nothing merged, skipped or reordered: what the
towers are compared with, in values and in time.

Names of modules are the package's, so that `plain_form(model)` can load its weights by name. Nothing else is shared.
Attention is written out; BatchNorm, QuickGELU and every change of layout are separate operations; the attention pooling
projects and attends from all tokens, as the reference's nn.MultiheadAttention does, and keeps the first.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width, heads, out=True):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        if out:
            self.out_proj = nn.Linear(width, width)

    def attend(self, x, hidden=None):
        """`hidden`: what may not be seen, True, to be broadcast over (B, H, L, L)."""
        query, key, value = (
            layer(x).reshape(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3).contiguous()
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return (torch.softmax(scores, dim=-1) @ value).permute(0, 2, 1, 3).reshape(x.shape)

    def forward(self, x, hidden=None):
        return self.out_proj(self.attend(x, hidden))


class MLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), QuickGELU(), nn.Linear(inner, width)

    def forward(self, x, grid=None):
        return self.fc2(self.act(self.fc1(x)))


class LeFF(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.act = QuickGELU()
        self.fc1, self.norm1 = nn.Linear(width, inner), nn.BatchNorm1d(inner)
        self.depthwise, self.norm2 = (
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm1d(inner),
        )
        self.fc2, self.norm3 = nn.Linear(inner, width), nn.BatchNorm1d(width)

    def forward(self, x, grid):
        first, x = x[:, :1], x[:, 1:]
        x = self.act(self.norm1(self.fc1(x).transpose(1, 2)).transpose(1, 2))
        picture = x.transpose(1, 2).reshape(len(x), -1, *grid).contiguous()
        x = self.depthwise(picture).flatten(2)
        x = self.act(self.norm2(x)).transpose(1, 2)
        x = self.act(self.norm3(self.fc2(x).transpose(1, 2)).transpose(1, 2))
        return torch.cat([first, x], dim=1)


class Block(nn.Module):
    def __init__(self, config, leff=False):
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.mlp = (LeFF if leff else MLP)(width, config.intermediate_size)

    def forward(self, x, hidden=None, grid=None):
        x = x + self.self_attn(self.layer_norm1(x), hidden)
        return x + self.mlp(self.layer_norm2(x), grid)


class Encoder(nn.Module):
    def __init__(self, config, leff=0):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, index < leff) for index in range(config.num_hidden_layers))


class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class Text(nn.Module):
    """Rows padded with 0 to any length; under "max" it has to be the full one."""

    def __init__(self, config):
        super().__init__()
        self.config, self.embeddings, self.encoder = config, TextEmbeddings(config), Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids):
        length = ids.shape[1]
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        for layer in self.encoder.layers:
            x = layer(x, later)
        x = self.final_layer_norm(x)
        if self.config.pooling == "max":
            return x.max(dim=1).values
        return torch.stack([row[(part == self.config.eos_token_id).nonzero()[0, 0]] for row, part in zip(x, ids)])


class ViTEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.grid_size**2 + 1, width)
        self.roi_projection = nn.Linear(config.roi_feature_size + 4, width, bias=False)


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.embeddings = config, ViTEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config, config.num_leff_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def tokens(self, patches):
        return torch.cat([self.embeddings.class_embedding.repeat(len(patches), 1, 1), patches], dim=1)

    def forward(self, pixels):
        patches = self.embeddings.patch_embedding(pixels)
        grid = patches.shape[2:]
        x = self.tokens(patches.flatten(2).permute(0, 2, 1)) + self.embeddings.position_embedding.weight
        x = self.pre_layernorm(x)
        for layer in self.encoder.layers:
            x = layer(x, grid=grid)
        return self.post_layernorm(x)[:, 0]

    def regions(self, features, mask):
        x = self.pre_layernorm(self.tokens(self.embeddings.roi_projection(features)))
        for layer in self.encoder.layers[self.config.num_picture_layers :]:
            x = layer(x, hide_padding(mask))
        return self.post_layernorm(x)[:, 0]


def hide_padding(mask):
    """(B, K) -> (B, 1, 1, 1 + K), True on what may not be seen; the first token is always there."""
    return ~torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)[:, None, None]


class Stem(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.relu, self.pool = nn.ReLU(), nn.AvgPool2d(2)
        self.conv1, self.norm1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.norm2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.norm3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.pool(self.relu(self.norm3(self.conv3(x))))


class Shortcut(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.conv, self.norm = nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)

    def forward(self, x):
        return self.norm(self.conv(self.pool(x)))


class Bottleneck(nn.Module):
    def __init__(self, inner, width, stride):
        super().__init__()
        self.relu, self.pool = nn.ReLU(), nn.AvgPool2d(stride)
        self.conv1, self.norm1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        same = stride == 1 and inner == 4 * width
        self.shortcut = nn.Identity() if same else Shortcut(inner, 4 * width, stride)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.pool(self.relu(self.norm2(self.conv2(y))))
        return self.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layers(x)


class Trunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.stem, stages, inner = Stem(config.width), [], config.width
        for index, depth in enumerate(config.layers):
            width = config.width * 2**index
            first = Bottleneck(inner, width, 1 if index == 0 else 2)
            stages.append(Stage([first, *(Bottleneck(4 * width, width, 1) for _ in range(depth - 1))]))
            inner = 4 * width
        self.stages = nn.Sequential(*stages)

    def forward(self, x):
        return self.stages(self.stem(x))


class AttentionPool(Attention):
    def __init__(self, config):
        width = config.hidden_size
        super().__init__(width, config.num_attention_heads, out=False)
        self.position_embedding = nn.Embedding(config.grid_size**2 + 1, width)
        self.roi_projection = nn.Linear(config.roi_feature_size + 4, width, bias=False)
        self.roi_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)


class ResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.trunk, self.attention_pool = Trunk(config), AttentionPool(config)

    def forward(self, pixels):
        x = self.trunk(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.attention_pool.position_embedding.weight
        return self.attention_pool.attend(x)[:, 0]

    def regions(self, features, mask):
        pool = self.attention_pool
        x = pool.roi_projection(features)
        means = [row[real].sum(dim=0) / max(1, int(real.sum())) for row, real in zip(x, mask)]
        x = pool.roi_layernorm(torch.cat([torch.stack(means)[:, None], x], dim=1))
        return pool.attend(x, hide_padding(mask))[:, 0]


class DualEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.text_model = Text(text)
        self.vision_model = (ViT if vision.tower == "vit" else ResNet)(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=vision.tower == "resnet")
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def encode_image(self, pixels):
        return self.visual_projection(self.vision_model(pixels))

    def encode_rois(self, features, mask):
        return self.visual_projection(self.vision_model.regions(features, mask))

    def encode_text(self, ids):
        return self.text_projection(self.text_model(ids))


def plain_form(model) -> DualEncoder:
    """The plain form of a `PyramidCLIPModel`, with its weights, in eval mode."""
    plain = DualEncoder(model.config)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def lively(model):
    """`model` with statistics, scales and shifts that folding cannot get right by accident."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.2, 2.0, generator=generator)
            if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                module.weight.normal_(1, 0.3, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                module.bias.normal_(0, 0.2, generator=generator)
    return model
