"""The rule tables of the weights formats (`rules.Rule`), each usable either way."""

from raddino_jax.conversion.rules import CONV, LINEAR, Rule


def _affine(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


# DINOv2 hub backbones (.pth), the RAD-DINO release's backbone_compatible.safetensors, teacher.backbone of
# training checkpoints. Chunked blocks are renamed by `unchunk` first.
DINOV2 = [
    *(Rule(name, name) for name in ("cls_token", "pos_embed", "mask_token", "register_tokens")),
    Rule("patch_embed.proj.weight", "patch_embed/kernel", CONV),
    Rule("patch_embed.proj.bias", "patch_embed/bias"),
    *_norm("blocks.{i}.norm1", "blocks_{i}/norm1"),
    *_affine("blocks.{i}.attn.qkv", "blocks_{i}/attn/qkv"),
    *_affine("blocks.{i}.attn.proj", "blocks_{i}/attn/proj"),
    Rule("blocks.{i}.ls1.gamma", "blocks_{i}/ls1/gamma"),
    *_norm("blocks.{i}.norm2", "blocks_{i}/norm2"),
    *(rule for layer in ("fc1", "fc2", "w12", "w3") for rule in _affine(f"blocks.{{i}}.mlp.{layer}", f"blocks_{{i}}/mlp/{layer}")),
    Rule("blocks.{i}.ls2.gamma", "blocks_{i}/ls2/gamma"),
    *_norm("norm", "norm"),
]

# DINO and iBOT heads: dino_head.safetensors of the RAD-DINO release, teacher.dino_head of training checkpoints.
DINO_HEAD = [
    *_affine("mlp.{i}", "mlp_{i}"),
    *_affine("mlp", "mlp"),  # a head of one layer
    Rule("last_layer.weight_g", "last_layer/weight_g"),
    Rule("last_layer.weight_v", "last_layer/weight_v"),
]
