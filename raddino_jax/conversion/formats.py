"""The weights formats by name: how each is told, what of it is ours, and which table reads and writes it.

A file holds one or several modules ("backbone", "dino_head", "ibot_head"); each becomes a flat dict of our names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raddino_jax.conversion import rules, tables
from raddino_jax.conversion.rules import Rule, WeightsError

Arrays = Mapping[str, np.ndarray]

HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class Format:
    """One format of one module.

    mark: a pattern that at least one of its names fits, and no name of the formats after it in FORMATS.
    rules: its table. aliases: other spellings, read but never written.
    prefix: a pattern at the start of names that some files have and others not.
    dropped: patterns of names that belong to parts we do not hold, such as the text tower.
    """

    mark: str
    rules: Sequence[Rule]
    aliases: Sequence[Rule] = ()
    prefix: str = ""
    dropped: tuple[str, ...] = ()

    def read(self, foreign: Arrays, what: str) -> dict[str, np.ndarray]:
        """Foreign arrays by name -> ours. what: how errors name the source."""
        named = {re.sub(f"^{self.prefix}", "", name): value for name, value in rules.unchunk(foreign).items()}
        if len(named) < len(foreign):
            raise WeightsError(f"{what}: {len(foreign) - len(named)} parameters have the name of another one")
        kept = {n: v for n, v in named.items() if not any(re.search(pattern, n) for pattern in self.dropped)}
        return rules.read([*self.rules, *self.aliases], kept, what)


# The first whose mark is found is the format; see Format.mark for what that asks of their order.
FORMATS = {
    "hf_dinov2": Format(
        r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$",
        tables.HF_DINOV2,
        tables.HF_DINOV2_IN_MEMORY,
        prefix=r"dinov2(_with_registers)?\.",
    ),
    "clip_hf": Format(
        r"(^|\.)pre_layrnorm\.weight$",
        tables.CLIP_HF,
        prefix=r"vision_model\.",
        dropped=(r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"position_ids$"),
    ),
    "biomedclip": Format(
        r"^visual\.trunk\.patch_embed\.", tables.BIOMEDCLIP, dropped=(r"^text\.", r"^logit_(scale|bias)$")
    ),
    # Everything outside the image tower is text: tokens, the text transformer, sizes that OpenAI stores as tensors.
    "clip_openai": Format(
        r"^visual\.transformer\.resblocks\.", tables.CLIP_OPENAI, dropped=(r"^(?!visual\.)",)
    ),
    "biovil_t": Format(
        r"^encoder\.backbone_to_vit\.",
        tables.BIOVIL_T,
        # One film at a time: the pooler that compares it with the film before never runs.
        dropped=(
            r"num_batches_tracked$",
            r"^encoder\.encoder\.fc\.",
            r"^encoder\.vit_pooler\.",
            r"^classifier\.",
        ),
    ),
    "mrm": Format(
        r"^decoder_embed\.",
        tables.MRM,
        dropped=(r"^decoder_", r"^bert_", r"^mask_token$", r"^(head|fc_norm)\."),
    ),
    "dinov2": Format(r"^patch_embed\.proj\.weight$", tables.DINOV2),
    "dino_head": Format(r"^last_layer\.weight_v$", tables.DINO_HEAD),
}
# What continues as a DINOv2 backbone, and is written again.
DINOV2 = ("dinov2", "hf_dinov2")

_WRAPPERS = r"^(module\.|_orig_mod\.)+"  # DistributedDataParallel and torch.compile
_SHARDED = r"_flat_param|_fsdp_wrapped_module"


def detect(names: Sequence[str], what: str, among: Sequence[str] = ()) -> str:
    """The format of parameter names. among: formats to choose from, all by default.

    Raises WeightsError that shows names and the formats known.
    """
    for name, known in FORMATS.items():
        if (not among or name in among) and any(re.search(known.mark, n) for n in names):
            return name
    shown = ", ".join(list(names)[:6]) or "nothing"
    raise WeightsError(
        f"{what}: expected weights of one of the formats {', '.join(among or FORMATS)}; "
        f"found {len(names)} parameters: {shown}{', ...' if len(names) > 6 else ''}"
    )


def read(foreign: Arrays, what: str, among: Sequence[str] = ()) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """Foreign arrays of a file -> (format of the backbone or head, {module: our arrays by name}).

    among: as `detect`; a single one is taken without looking. Raises WeightsError that lists names.
    """
    foreign = {re.sub(_WRAPPERS, "", name): value for name, value in foreign.items()}
    if any(re.search(_SHARDED, name) for name in foreign):
        raise WeightsError(
            f"{what}: one shard of a run of DINOv2 (FSDP), which is no whole model; "
            "take eval/training_<step>/teacher_checkpoint.pth of that run"
        )
    parts = _modules(foreign)
    if not parts:
        name = among[0] if len(among) == 1 else detect(list(foreign), what, among)
        module = "dino_head" if name == "dino_head" else "backbone"
        return name, {module: FORMATS[name].read(foreign, what)}
    strays = [name for name in foreign if name.partition(".")[0] not in parts]
    if strays:
        raise WeightsError(f"{what}: beside {', '.join(parts)} found {', '.join(strays[:6])}")
    name = detect(list(parts.get("backbone", ())), what, among) if "backbone" in parts else "dino_head"
    formats = {module: name if module == "backbone" else "dino_head" for module in parts}
    return name, {
        module: FORMATS[formats[module]].read(part, f"{what} ({module})") for module, part in parts.items()
    }


def _modules(foreign: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """The modules of a training checkpoint ("backbone.…", "dino_head.…", "ibot_head.…"); {} for other files."""
    parts = {m: {} for m in ("backbone", *HEADS)}
    for name, value in foreign.items():
        module, _, rest = name.partition(".")
        if module in parts:
            parts[module][rest] = value
    return {module: part for module, part in parts.items() if part}


def write(name: str, arrays: Arrays, what: str) -> dict[str, np.ndarray]:
    """Our arrays -> those of a format, by name."""
    return rules.write(FORMATS[name].rules, arrays, what)
