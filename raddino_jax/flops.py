"""Analytic FLOPs of a config, what MFU is measured against, and an estimate of its memory.

Conventions: one multiply-add is 2 FLOPs; only matrix products and attention count; a backward pass is twice its
forward, once for the patch embedding, whose input needs no gradient; recomputation earns nothing. The count is that of
the recipe, as the reference computes it: the last block's feed-forward on patches that no loss asks for is in it,
although it is left out here (4 % of a ViT-B step). The compiler's own count is no use: it counts the body of a loop
once.
"""

from dataclasses import dataclass, replace

import jax


@dataclass(frozen=True)
class Chip:
    """Dense bf16 peak in TFLOP/s, memory in GiB and its bandwidth in TB/s, from the makers' data sheets."""

    peak: float
    memory: float
    bandwidth: float


CHIPS = {  # by the start of jax's device_kind
    "NVIDIA A100-SXM4-40GB": Chip(312.0, 40, 1.56),
    "NVIDIA A100-PCIE-40GB": Chip(312.0, 40, 1.56),
    "NVIDIA A100": Chip(312.0, 80, 2.04),
    "NVIDIA H100 PCIe": Chip(756.0, 80, 2.0),
    "NVIDIA H100 NVL": Chip(835.0, 94, 3.9),
    "NVIDIA H100": Chip(989.4, 80, 3.35),
    "NVIDIA H200 NVL": Chip(835.0, 141, 4.8),
    "NVIDIA H200": Chip(989.4, 141, 4.8),
    "NVIDIA L40S": Chip(362.0, 48, 0.86),
    "NVIDIA L4": Chip(121.0, 24, 0.3),
    "TPU v4": Chip(275.0, 32, 1.2),
    "TPU v5 lite": Chip(197.0, 16, 0.82),
    "TPU v5e": Chip(197.0, 16, 0.82),
    "TPU v5p": Chip(459.0, 95, 2.77),
    "TPU v5": Chip(459.0, 95, 2.77),
    "TPU v6 lite": Chip(918.0, 32, 1.64),
    "TPU v6e": Chip(918.0, 32, 1.64),
}


def chip(device: jax.Device) -> Chip | None:
    """The data sheet of a device, None where it is unknown (a CPU).

    Of a device at hand `memory` is what jax may use of it: on a GPU three quarters, unless
    XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    row = next((row for kind, row in CHIPS.items() if device.device_kind.startswith(kind)), None)
    limit = _limit(device)
    return row if row is None or limit is None else replace(row, memory=limit / 2**30)


def _limit(device) -> int | None:
    """Bytes that the allocator of a device gives out at most; None where nobody knows."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):  # a device that is only described
        return None


@dataclass(frozen=True)
class Crop:
    """Forward FLOPs of one crop: what drop path may skip, and the patch embedding."""

    blocks: float
    embedding: float


def vit(backbone, side: int) -> Crop:
    """Forward pass of one crop of side x side pixels through a `models.vit.ViT`, three channels."""
    width, patches = backbone.width, (side // backbone.patch_size) ** 2
    tokens = patches + 1 + backbone.registers
    # SwiGLU's three products of 8/3 D cost what the MLP's two of 4 D cost, up to rounding.
    hidden = 4 * width if backbone.ffn == "mlp" else 1.5 * ((int(4 * width * 2 / 3) + 7) // 8 * 8)
    linear = tokens * 2 * (4 * width**2 + 2 * width * hidden)
    attention = 4 * tokens**2 * width
    return Crop(backbone.depth * (linear + attention), patches * 2 * 3 * backbone.patch_size**2 * width)


def head(head, width: int) -> float:
    """Forward pass of one token through a `models.heads.DINOHead`, prototypes included."""
    widths = [width] + [head.hidden] * (head.layers - 1) + [head.bottleneck, head.prototypes]
    return sum(2 * a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def llama(model, tokens: int) -> Crop:
    """Forward pass of one text through a `models.llama.Llama`: its layers and its logits (as `embedding`).

    A token attends to itself and those before it, half of all pairs.
    """
    linear = tokens * 2 * model.depth * (4 * model.width**2 + 3 * model.width * model.hidden)
    attention = 2 * tokens * (tokens + 1) * model.width * model.depth
    return Crop(linear + attention, tokens * 2 * model.width * model.vocabulary)


def tuning(writer, tokens: int, patches: int, channels: int) -> float:
    """FLOPs of tuning an `evals.writer.Writer` on one text, without the encoder that is frozen.

    With LoRA the language model's own weights need no gradient, which is a third of its products.
    """
    model, rank = writer.llama, writer.lora
    text, attention = llama(model, tokens), 2 * tokens * (tokens + 1) * model.width * model.depth
    projector = patches * 2 * (channels * model.width + model.width**2)
    if not rank:
        return 3 * (text.blocks + text.embedding + projector)
    narrow = tokens * 2 * rank * model.depth * (8 * model.width + 3 * (model.width + model.hidden))
    return 2 * (text.blocks - attention + text.embedding) + 3 * (attention + narrow + projector)


def traced(function, *shapes) -> float:
    """FLOPs of one call by the compiler's count before it optimises: of what is no ViT and has no loops."""
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def step(objective, global_size: int, local_size: int, local_crops: int) -> float:
    """FLOPs per image of one training step: teacher forward, student forward and backward, heads.

    Masked tokens are counted at their static budget, because padding is computed too.
    """
    rates = objective.drop_rates
    keep = 1 - sum(rates) / len(rates)
    big, small = vit(objective.backbone, global_size), vit(objective.backbone, local_size)
    teacher = 2 * (big.blocks + big.embedding)
    student = sum(
        crops * (3 * keep * crop.blocks + 2 * crop.embedding) for crops, crop in ((2, big), (local_crops, small))
    )
    width = objective.backbone.width
    masked = objective.masked_budget / objective.group_size
    dino = head(objective.dino_head, width) * (2 + 3 * (2 + local_crops))
    ibot = head(objective.ibot_head or objective.dino_head, width) * masked * 4
    return teacher + student + dino + ibot


# Arrays [tokens, width] in the compute type that a block keeps for the backward pass, by remat policy; fitted to what
# `plan` reports for ViT-B on a TPU v5p. While one block is at work it needs what "none" keeps of it besides.
KEPT = {"none": 17.0, "dots": 14.0, "full": 2.0}


def memory(
    objective, global_size: int, local_size: int, local_crops: int, images: float, remat: str, fsdp: int = 1
) -> float:
    """GiB that a training step of `images` films on one device should need, to choose a remat policy by.

    Parameters, two moments, teacher and gradient in float32, spread over `fsdp` devices; what blocks keep; a handful
    of chunks of prototype logits. An estimate: `plan` knows.
    """
    backbone, rates = objective.backbone, objective.drop_rates
    student = jax.eval_shape(objective.init, jax.random.key(0))
    state = 5 * 4 * sum(leaf.size for leaf in jax.tree.leaves(student)) / fsdp
    sides = [(2, global_size), (local_crops, local_size)]
    tokens = sum(n * ((side // backbone.patch_size) ** 2 + 1 + backbone.registers) for n, side in sides)
    keep = 1 - sum(rates) / len(rates) if remat != "full" else 1.0  # the stream itself is kept whole
    rows = images * tokens * backbone.width * backbone.dtype.itemsize
    blocks = rows * (KEPT[remat] * keep * backbone.depth + KEPT["none"])
    return (state + blocks + 4 * 4 * objective.logits_budget) / 2**30
