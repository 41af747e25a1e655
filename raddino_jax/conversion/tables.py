"""The rule tables of the weights formats (`rules.Rule`), each usable either way."""

from raddino_jax.conversion.rules import CHANNELS, CONV, LINEAR, ONE, ONE_ONE, POINT, Rule


def _affine(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _fused(theirs: tuple[str, ...], ours: str) -> list[Rule]:
    """Several layers that we keep as one: query, key and value, or the two halves of a gate."""
    weights, biases = (tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias"))
    return [Rule(weights, f"{ours}/kernel", LINEAR), Rule(biases, f"{ours}/bias")]


def _batch_norm(theirs: str, ours: str) -> list[Rule]:
    statistics = [Rule(f"{theirs}.running_{name}", f"{ours}/{name}") for name in ("mean", "var")]
    return _norm(theirs, ours) + statistics


# Feed-forward layers: an MLP, or SwiGLU with both halves of the gate in w12.
_FFN = ("fc1", "fc2", "w12", "w3")


def _timm(prefix: str = "", ours: str = "") -> list[Rule]:
    """The vision transformer as timm names it: DINOv2's names without its LayerScale and mask token."""
    theirs, block = f"{prefix}blocks.{{i}}", f"{ours}blocks_{{i}}"
    return [
        *(Rule(f"{prefix}{name}", f"{ours}{name}") for name in ("cls_token", "pos_embed")),
        Rule(f"{prefix}patch_embed.proj.weight", f"{ours}patch_embed/kernel", CONV),
        Rule(f"{prefix}patch_embed.proj.bias", f"{ours}patch_embed/bias"),
        *_norm(f"{theirs}.norm1", f"{block}/norm1"),
        *_affine(f"{theirs}.attn.qkv", f"{block}/attn/qkv"),
        *_affine(f"{theirs}.attn.proj", f"{block}/attn/proj"),
        *_norm(f"{theirs}.norm2", f"{block}/norm2"),
        *(rule for layer in _FFN for rule in _affine(f"{theirs}.mlp.{layer}", f"{block}/mlp/{layer}")),
        *_norm(f"{prefix}norm", f"{ours}norm"),
    ]


# DINOv2 hub backbones (.pth), the RAD-DINO release's backbone_compatible.safetensors, teacher.backbone of
# training checkpoints. Chunked blocks are renamed by `unchunk` first.
DINOV2 = [
    *_timm(),
    *(Rule(name, name) for name in ("mask_token", "register_tokens")),
    *(Rule(f"blocks.{{i}}.ls{n}.gamma", f"blocks_{{i}}/ls{n}/gamma") for n in (1, 2)),
]

# DINO and iBOT heads: dino_head.safetensors of the RAD-DINO release, teacher.dino_head of training checkpoints.
DINO_HEAD = [
    *_affine("mlp.{i}", "mlp_{i}"),
    *_affine("mlp", "mlp"),  # a head of one layer
    Rule("last_layer.weight_g", "last_layer/weight_g"),
    Rule("last_layer.weight_v", "last_layer/weight_v"),
]

# Dinov2Model and Dinov2WithRegistersModel as Hugging Face stores them on disk, in every version of transformers.
HF_DINOV2 = [
    *(Rule(f"embeddings.{name}", name) for name in ("cls_token", "mask_token", "register_tokens")),
    Rule("embeddings.position_embeddings", "pos_embed"),
    Rule("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", CONV),
    Rule("embeddings.patch_embeddings.projection.bias", "patch_embed/bias"),
    *_norm("encoder.layer.{i}.norm1", "blocks_{i}/norm1"),
    *_fused(
        tuple(f"encoder.layer.{{i}}.attention.attention.{name}" for name in ("query", "key", "value")),
        "blocks_{i}/attn/qkv",
    ),
    *_affine("encoder.layer.{i}.attention.output.dense", "blocks_{i}/attn/proj"),
    Rule("encoder.layer.{i}.layer_scale1.lambda1", "blocks_{i}/ls1/gamma"),
    *_norm("encoder.layer.{i}.norm2", "blocks_{i}/norm2"),
    *_affine("encoder.layer.{i}.mlp.fc1", "blocks_{i}/mlp/fc1"),
    *_affine("encoder.layer.{i}.mlp.fc2", "blocks_{i}/mlp/fc2"),
    *_affine("encoder.layer.{i}.mlp.weights_in", "blocks_{i}/mlp/w12"),
    *_affine("encoder.layer.{i}.mlp.weights_out", "blocks_{i}/mlp/w3"),
    Rule("encoder.layer.{i}.layer_scale2.lambda1", "blocks_{i}/ls2/gamma"),
    *_norm("layernorm", "norm"),
]

# The names transformers 5 has in memory: not on disk, but in state dicts that people save by hand.
HF_DINOV2_IN_MEMORY = [
    *_fused(tuple(f"encoder.layer.{{i}}.attention.{name}_proj" for name in "qkv"), "blocks_{i}/attn/qkv"),
    *_affine("encoder.layer.{i}.attention.o_proj", "blocks_{i}/attn/proj"),
    *_fused(tuple(f"encoder.layer.{{i}}.mlp.{half}_proj" for half in ("gate", "up")), "blocks_{i}/mlp/w12"),
    *_affine("encoder.layer.{i}.mlp.down_proj", "blocks_{i}/mlp/w3"),
]

# CLIPVisionModel of Hugging Face; "vision_model." before every name is taken off first.
CLIP_HF = [
    Rule("embeddings.class_embedding", "cls_token", ONE_ONE),
    Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", CONV),
    Rule("embeddings.position_embedding.weight", "pos_embed", ONE),
    *_norm("pre_layrnorm", "norm_pre"),  # sic
    *_norm("encoder.layers.{i}.layer_norm1", "blocks_{i}/norm1"),
    *_fused(tuple(f"encoder.layers.{{i}}.self_attn.{name}_proj" for name in "qkv"), "blocks_{i}/attn/qkv"),
    *_affine("encoder.layers.{i}.self_attn.out_proj", "blocks_{i}/attn/proj"),
    *_norm("encoder.layers.{i}.layer_norm2", "blocks_{i}/norm2"),
    *_affine("encoder.layers.{i}.mlp.fc1", "blocks_{i}/mlp/fc1"),
    *_affine("encoder.layers.{i}.mlp.fc2", "blocks_{i}/mlp/fc2"),
    *_norm("post_layernorm", "norm"),
    Rule("visual_projection.weight", "proj/kernel", LINEAR),
]

# The image tower of OpenAI's CLIP, of open_clip, and of CheXzero, which was tuned from it.
CLIP_OPENAI = [
    Rule("visual.class_embedding", "cls_token", ONE_ONE),
    Rule("visual.conv1.weight", "patch_embed/kernel", CONV),
    Rule("visual.positional_embedding", "pos_embed", ONE),
    *_norm("visual.ln_pre", "norm_pre"),
    *_norm("visual.transformer.resblocks.{i}.ln_1", "blocks_{i}/norm1"),
    Rule("visual.transformer.resblocks.{i}.attn.in_proj_weight", "blocks_{i}/attn/qkv/kernel", LINEAR),
    Rule("visual.transformer.resblocks.{i}.attn.in_proj_bias", "blocks_{i}/attn/qkv/bias"),
    *_affine("visual.transformer.resblocks.{i}.attn.out_proj", "blocks_{i}/attn/proj"),
    *_norm("visual.transformer.resblocks.{i}.ln_2", "blocks_{i}/norm2"),
    *_affine("visual.transformer.resblocks.{i}.mlp.c_fc", "blocks_{i}/mlp/fc1"),
    *_affine("visual.transformer.resblocks.{i}.mlp.c_proj", "blocks_{i}/mlp/fc2"),
    *_norm("visual.ln_post", "norm"),
    Rule("visual.proj", "proj/kernel"),
]

# The image tower of BiomedCLIP: a timm transformer and a projection.
BIOMEDCLIP = [*_timm("visual.trunk.", "trunk/"), Rule("visual.head.proj.weight", "proj/kernel", LINEAR)]

# The encoder of MRM, named as timm and MAE name theirs.
MRM = _timm()

# chexbert.pth: BertModel of Hugging Face without its pooler, and a linear layer per class; "module." is taken off
# first.
_LAYER = "bert.encoder.layer.{i}"
CHEXBERT = [
    Rule("bert.embeddings.word_embeddings.weight", "bert/words"),
    Rule("bert.embeddings.position_embeddings.weight", "bert/places"),
    Rule("bert.embeddings.token_type_embeddings.weight", "bert/kinds"),
    *_norm("bert.embeddings.LayerNorm", "bert/norm"),
    *_fused(
        tuple(f"{_LAYER}.attention.self.{name}" for name in ("query", "key", "value")), "bert/layers_{i}/attn/qkv"
    ),
    *_affine(f"{_LAYER}.attention.output.dense", "bert/layers_{i}/attn/proj"),
    *_norm(f"{_LAYER}.attention.output.LayerNorm", "bert/layers_{i}/norm1"),
    *_affine(f"{_LAYER}.intermediate.dense", "bert/layers_{i}/fc1"),
    *_affine(f"{_LAYER}.output.dense", "bert/layers_{i}/fc2"),
    *_norm(f"{_LAYER}.output.LayerNorm", "bert/layers_{i}/norm2"),
    *_affine("linear_heads.{i}", "heads_{i}"),
]

# LlamaForCausalLM of Hugging Face: Llama 2 and Vicuna, without biases and with a head of its own.
LLAMA = [
    Rule("model.embed_tokens.weight", "words"),
    *(
        Rule(f"model.layers.{{i}}.self_attn.{name}_proj.weight", f"layers_{{i}}/attn/{name}/kernel", LINEAR)
        for name in "qkvo"
    ),
    *(
        Rule(f"model.layers.{{i}}.mlp.{name}_proj.weight", f"layers_{{i}}/{name}/kernel", LINEAR)
        for name in ("gate", "up", "down")
    ),
    Rule("model.layers.{i}.input_layernorm.weight", "layers_{i}/norm1/scale"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers_{i}/norm2/scale"),
    Rule("model.norm.weight", "norm/scale"),
    Rule("lm_head.weight", "lm_head/kernel", LINEAR),
]

# What LLaVA puts between an encoder and a language model, as it saves it apart (mm_projector.bin).
PROJECTOR = [
    rule
    for number, layer in ((0, "fc1"), (2, "fc2"))
    for rule in (
        Rule(f"model.mm_projector.{number}.weight", f"{layer}/kernel", LINEAR),
        Rule(f"model.mm_projector.{number}.bias", f"{layer}/bias"),
    )
]


def _resnet(theirs: str, ours: str) -> list[Rule]:
    """A torchvision ResNet with bottlenecks, without its classifier."""
    rules = [Rule(f"{theirs}conv1.weight", f"{ours}conv1/kernel", CONV), *_batch_norm(f"{theirs}bn1", f"{ours}bn1")]
    for layer in range(1, 5):
        block, our_block = f"{theirs}layer{layer}.{{i}}", f"{ours}layer{layer}_{{i}}"
        for conv in range(1, 4):
            rules.append(Rule(f"{block}.conv{conv}.weight", f"{our_block}/conv{conv}/kernel", CONV))
            rules += _batch_norm(f"{block}.bn{conv}", f"{our_block}/bn{conv}")
        rules.append(Rule(f"{block}.downsample.0.weight", f"{our_block}/downsample_conv/kernel", CONV))
        rules += _batch_norm(f"{block}.downsample.1", f"{our_block}/downsample_bn")
    return rules


# The image model of BioViL-T.
BIOVIL_T = [
    *_resnet("encoder.encoder.", "resnet/"),
    Rule("encoder.backbone_to_vit.weight", "backbone_to_vit/kernel", CONV),
    Rule("encoder.missing_previous_emb", "missing_previous_emb", CHANNELS),
    Rule("projector.model.0.weight", "projector_0/kernel", CONV),
    *_batch_norm("projector.model.1", "projector_1"),
    Rule("projector.model.3.weight", "projector_3/kernel", POINT),
    Rule("projector.model.3.bias", "projector_3/bias"),
]
