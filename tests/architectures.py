"""The architectures whose rates are checked, built without data from their configurations, and their table.

`python tests/architectures.py` writes docs/architectures.md anew; it needs transformers and timm.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from alrao_fast.optim import layouts

PAGE = Path(__file__).parents[1] / "docs/architectures.md"
TRANSFORMERS = (
    "albert aria_text bart beit bert bloom clip convnextv2 data2vec-vision deepseek_v3 deformable_detr deit dinov2 "
    "distilbert electra falcon flava gemma2 gpt2 gpt_neox gpt_oss granitemoehybrid hiera ibert imagegpt jetmoe levit "
    "llama llama4_text mamba mamba2 mistral mixtral mllama nemotron_h olmoe openai-gpt opt perceiver phi pvt "
    "qwen2 qwen2_moe qwen3_next recurrent_gemma reformer roberta rwkv sam swin swinv2 t5 vit vit_mae wav2vec2 "
    "wav2vec2-conformer whisper xlnet yolos"
).split()
TIMM = (
    "bat_resnext26ts "
    "beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coatnet_0_rw_224 convmixer_768_32 convnext_tiny "
    "convnextv2_atto crossvit_tiny_240 davit_tiny deit_tiny_distilled_patch16_224 densenet121 efficientnet_b0 "
    "eva02_tiny_patch14_224 fastvit_t8 gmlp_s16_224 halonet26t hiera_tiny_224 levit_128 maxvit_tiny_rw_224 "
    "mixer_b16_224 mobilenetv3_large_100 mobilenetv4_hybrid_medium nest_tiny nfnet_f0 poolformer_s12 pvt_v2_b0 "
    "regnety_016 resmlp_12_224 resnet50 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tf_efficientnet_cc_b0_4e "
    "tnt_s_patch16_224 visformer_tiny vit_small_patch14_reg4_dinov2 vit_tiny_patch16_224 volo_d1_224 "
    "xcit_nano_12_p16_224"
).split()


class Shares(NamedTuple):
    """Of all entries the shares that torch.nn's rules lay out, that the package's rules do, and that no rule does."""

    entries: int
    torch: float
    package: float
    default: float


def build_transformers(name: str) -> nn.Module:
    """The model of the default configuration, on meta."""
    from transformers import CONFIG_MAPPING, AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[name]())


def build_timm(name: str) -> nn.Module:
    """The model, on meta."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name)


def shares(model: nn.Module) -> Shares:
    table = layouts.resolve_all([model])
    with mock.patch.object(layouts, "_LIBRARIES", []):
        bare = layouts.resolve_all([model])
    entries = sum(p.numel() for p in table)
    by_torch, covered = _covered(bare), _covered(table)
    return Shares(
        entries, by_torch / entries, (covered - by_torch) / entries, 1 - covered / entries
    )


def _covered(table: dict[Tensor, layouts.Layout]) -> int:
    """The entries under a rule, or with a rate each, which is right without any: a norm's scale."""
    return sum(
        p.numel()
        for p, layout in table.items()
        if layout.rule != "default" or layout.length(p) == p.numel()
    )


HEADING = """# Architectures

Models of transformers and timm, built from their default configurations, and the share of their entries whose learning
rates follow the rules for torch.nn's modules, the rules for the modules of these packages (Conv1D, fused experts,
tokens and position embeddings, tables of position biases, gains, layer scales, ...) and no rule: those have one rate
per index of their dimension 0. `alrao.describe_rates(net)` prints the same of any model; an optimizer warns where 1 %
of the trained entries or more have no rule, and `alrao.register_feature_layout` adds one.

A fused expert's unit has a rate of its own in each expert. Where the weight is stored as [experts, in, out] (GPT-OSS,
Llama 4, Aria; also the gates of RecurrentGemma) a unit's rates do not lie side by side in memory, and the optimizer
keeps one float32 rate per entry of these weights on the device, 4 bytes each; [experts, out, in] (Mixtral, Qwen,
DeepSeek and most others) costs one rate per unit.

`python tests/architectures.py` writes this page.
"""


def main() -> None:
    warnings.simplefilter("ignore")
    lines = [HEADING]
    for package, build, names in (
        ("transformers", build_transformers, TRANSFORMERS),
        ("timm", build_timm, TIMM),
    ):
        lines.append(f"## {package} {version(package)}\n")
        lines.append("| model | entries | torch.nn's rules | the package's rules | no rule |")
        lines.append("|---|---:|---:|---:|---:|")
        for name in names:
            s = shares(build(name))
            cells = " | ".join(f"{100 * share:.2f} %" for share in s[1:])
            lines.append(f"| {name} | {s.entries / 1e6:,.1f} M | {cells} |")
        lines.append("")
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
