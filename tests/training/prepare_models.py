"""Tiny models with random weights for the tests of `training.prepare`, saved as checkpoints."""

import json

import torch


def make_language_model(folder, texts, causal=False):
    """A checkpoint with random weights and a Unigram tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(list(texts) * 4, trainer)
    pieces = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    torch.manual_seed(0)
    if causal:
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        config.initializer_range = 0.4
        model = GPT2LMHeadModel(config)
    else:
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            initializer_factor=3.0,
        )
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_vinvl(folder):
    """A VinVL at reduced width with random weights; its features have 128 numbers."""
    from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor

    torch.manual_seed(0)
    config = VinVLConfig(
        layers=(1, 1, 1, 1),
        groups=4,
        width_per_group=2,
        stem_channels=4,
        rpn_pre_nms_top_n=200,
        rpn_post_nms_top_n=40,
        label_embedding_size=8,
        attribute_hidden_size=16,
        id2label={0: "background", **{i: f"thing {i}" for i in range(1, 9)}},
        id2attribute={0: "none", **{i: f"shade{i}" for i in range(1, 7)}},
    )
    VinVLForObjectAttributeDetection(config).save_pretrained(folder)
    VinVLImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(folder)
    return str(folder)
