"""Architectures of transformers and timm by their configurations, on the meta device, and the table of their layouts.

`python tests/architectures.py` writes docs/architectures.md.
"""

import importlib.metadata
import warnings
from pathlib import Path

import torch
from torch import nn

from alrao_fast import describe_rates

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TRANSFORMERS = """
albert aria_text bart beit bert bloom clip data2vec-vision deberta-v2 deepseek_v3 deit
distilbert electra falcon falcon_mamba gemma2 gpt2 gpt_neox gpt_oss granitemoe ibert jetmoe
llama llama4_text mamba mistral mixtral olmoe openai-gpt opt phi pvt qwen2 qwen2_moe qwen3_moe
recurrent_gemma roberta rwkv swin t5 vit wav2vec2 whisper xlnet yolos zamba2
""".split()
TIMM = """
beitv2_base_patch16_224 botnet26t_256 cait_xxs24_224 coatnet_0_rw_224 convnext_tiny
crossvit_tiny_240 deit_tiny_distilled_patch16_224 densenet121 dm_nfnet_f0 eca_nfnet_l0
edgenext_xx_small efficientnet_b0 eva02_tiny_patch14_224 fastvit_t8 gmlp_s16_224 halonet26t
hiera_tiny_224 levit_128 maxvit_tiny_rw_224 mixer_b16_224 mobilenetv3_large_100 nest_tiny
nfnet_f0 poolformer_s12 pvt_v2_b0 regnety_016 resmlp_12_224 resnet50 resnext50_32x4d
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tnt_s_patch16_224
vit_small_patch14_reg4_dinov2 vit_tiny_patch16_224 volo_d1_224 xcit_nano_12_p16_224
""".split()
# Few layers: those are the same, and take time.
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
)


def of_transformers(name: str, **sizes: int) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[name](**sizes)
    for key in _LAYERS:
        if (
            not sizes
            and name not in ("zamba2", "recurrent_gemma")
            and isinstance(getattr(config, key, None), int)
        ):
            setattr(config, key, min(getattr(config, key), 4))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModel.from_config(config)


def of_timm(name: str, **options: object) -> nn.Module:
    import timm

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **options)


def shares(net: nn.Module) -> dict[str, float]:
    """The share of the entries under each rule."""
    entries: dict[str, int] = {}
    for row in describe_rates(net, file=None):
        size = int(torch.tensor(row.shape).prod()) if row.shape else 1
        entries[row.rule] = entries.get(row.rule, 0) + size
    total = sum(entries.values())
    return {rule: size / total for rule, size in entries.items()}


def table() -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "timm"))
    lines = [
        "# Architectures",
        "",
        "Which rule says how the rates of a model's parameters lie, by the share of its entries. Models are made from",
        f"their configurations ({versions}; of transformers at most four layers); the page is",
        "written by `python tests/architectures.py`.",
        "",
        "- *built-in*: a rule by the module's class, of torch.nn or of the library.",
        "- *shape*: a parameter with one dimension alone, or broadcast along its first (tokens, positions, scales).",
        "- *default*: one rate per index of dimension 0, and nobody knows whether that is the output.",
        "",
        "Experts that keep their weights as [experts, in, out] (GPT-OSS, Llama 4, Aria) share a rate between the units",
        "of the same number; all others have one for each unit of each expert. A layer scale has rates of its own,",
        "q_bias and v_bias those of the units that they belong to.",
        "",
    ]
    for library, names, make in (
        ("transformers", TRANSFORMERS, of_transformers),
        ("timm", TIMM, of_timm),
    ):
        lines += [
            f"## {library}",
            "",
            "| model | built-in | shape | default |",
            "|---|---:|---:|---:|",
        ]
        for name in names:
            of_rule = shares(make(name))
            cells = [f"{of_rule.get(rule, 0):.2%}" for rule in ("built-in", "shape", "default")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(table())
