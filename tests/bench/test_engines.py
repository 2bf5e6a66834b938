"""`python -m tests.bench.engines` at toy size: all engines are there, checked, and each row says what it should."""

import pytest
import torch

from pyramidclip_hf import PyramidCLIPConfig
from tests.bench import engines

TEXT = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32, "pooling": "eos"}
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "num_leff_layers": 1},
    "resnet": {"tower": "resnet", "image_size": 64, "layers": (1, 1, 1, 1), "width": 4, "num_attention_heads": 4},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_every_engine_is_timed_in_every_type(tower):
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package, reason='needs the extra: pip install "pyramidclip-hf[export]"')
    config = PyramidCLIPConfig(projection_dim=16, vision_config=TOWERS[tower], text_config=TEXT)
    rows = {row["row"]: row for row in engines.measure(tower, config, rounds=3, batch=2, compiled=False)}
    clip = ["CLIPModel"] if tower == "vit" else []
    others = ["ONNX Runtime", "OpenVINO"]
    assert list(rows[f"{tower}, float32"]["engines"]) == [*clip, "plain", "fused", *others]
    assert list(rows[f"{tower}, int8"]["engines"]) == others
    if engines.has_bf16_instructions():
        assert list(rows[f"{tower}, bfloat16"]["engines"]) == [*clip, "plain", "fused", "OpenVINO"]
    assert rows[f"{tower}, float32"]["best_of_torch"]["ours"] in ("plain", "fused")


def test_a_row_has_the_ratios_of_its_rounds():
    seconds = {
        ("float32", "CLIPModel"): [4.0, 4.0, 8.0],
        ("float32", "plain"): [4.0, 2.0, 8.0],
        ("float32", "fused"): [2.0, 2.0, 2.0],
        ("float32", "OpenVINO"): [4.0, 1.0, 2.0],
    }
    row = engines.row_of("ViT-B-32", "float32", 8, seconds, dict.fromkeys(seconds, 0.99999))
    assert row["engines"]["fused"] == {"per_second": 4.0, "ratio": 2.0, "spread": [2.0, 4.0], "least_cosine": 0.99999}
    assert row["engines"]["plain"]["ratio"] == 1.0
    assert row["best_of_torch"] == {"ours": "fused", "other": "OpenVINO", "ratio": 1.0, "spread": [0.5, 2.0]}
    table = engines.engines_table({"machine": {"product_gigaflops": {"float32": 120.5}}, "rows": [row]})
    assert table.splitlines()[2] == (
        "| ViT-B-32, float32 | 2: 1.00 (1.00 to 1.00) | 2: 1.00 (1.00 to 2.00) | 4: 2.00 (2.00 to 4.00) | | | | "
        "4: 4.00 (1.00 to 4.00) | fused / OpenVINO: 1.00 (0.50 to 2.00) | 120.5 GF/s |"
    )


def test_an_engine_that_computes_something_else_is_not_timed():
    calls = {("float32", "plain"): lambda: torch.eye(3), ("int8", "OpenVINO"): lambda: 1 - torch.eye(3)}
    with pytest.raises(RuntimeError, match=r"OpenVINO in int8: cosine 0.0000"):
        engines.check(calls)
