"""Every encoder against the code it was released with: random weights, saved in the released format, loaded through
`encoders.load`, every stage compared."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from raddino_jax import encoders
from raddino_jax import params as trees
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError
from raddino_jax.data import images
from raddino_jax.models.clip import CLIPViT, Projected
from raddino_jax.models.resnet import BioViLT
from raddino_jax.models.vit import ViT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOAT32, BFLOAT16 = 2e-5, 2e-2  # relative to the largest number of a stage


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def films(n: int = 3, low: int = 60, high: int = 140) -> list[np.ndarray]:
    """Smooth films with noise, of different sizes, wide and tall."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        height, width = rng.integers(low, high, 2)
        y, x = np.mgrid[0:height, 0:width]
        smooth = 128 + 70 * np.sin(y / 17 + rng.random()) * np.cos(x / 13) + rng.normal(0, 12, (height, width))
        found.append(smooth.clip(0, 255).astype(np.uint8))
    return found


def randomised(module):
    """Every parameter and statistic random: zeros and ones would hide a mistake."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                fresh = torch.randn_like(value) * (0.3 if value.ndim < 2 else 0.6 * value[0].numel() ** -0.5)
                scales = re.search(r"(norm|bn|ln_|layernorm|ls\d|layer_scale|downsample\.1|projector.model.1).*(weight|gamma|lambda1)$", name)
                value.copy_(fresh.abs() + 0.7 if name.endswith("running_var") else fresh + 1 if scales else fresh)
    return module.eval()


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(encoder, batch, expected: dict, tolerance: float = FLOAT32) -> dict[str, float]:
    """Largest relative error per stage; torch's feature maps are channels first."""
    found = {**encoder.stages(batch), **{f"e.{k}": v for k, v in encoder(batch).items()}}
    errors = {}
    for name, value in expected.items():
        value = value.detach().float().numpy()
        ours = np.asarray(found[name], np.float32)
        value = np.moveaxis(value, 1, -1) if value.ndim == 4 and value.shape != ours.shape else value
        errors[name] = relative(ours, value)
    print({k: f"{v:.1e}" for k, v in errors.items()})
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e} of {tolerance}"
    return errors


def three_channels(pictures, settings: Preprocess, resize_and_crop) -> "torch.Tensor":
    """What the released pipeline feeds its network: three normalised channels [n, 3, S, S]."""
    levels = np.stack([resize_and_crop(film) for film in pictures])[:, None].astype(np.float32) * settings.scale / 255
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (settings.mean, settings.std))
    return torch.from_numpy(np.broadcast_to((levels - mean) / std, (len(levels), 3, *levels.shape[2:])).copy())


# --- DINOv2 through Hugging Face -----------------------------------------------------------------------------


def dinov2(folder: Path, registers: int, swiglu: bool = False, crop: int = 56, size: int = 56, **settings):
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=size, patch_size=14, use_swiglu_ffn=swiglu)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    randomised(model).save_pretrained(folder)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": crop + 8}, crop_size={"height": crop, "width": crop},
        **dict(image_mean=[0.5307] * 3, image_std=[0.2583] * 3) | settings,
    ).save_pretrained(folder)
    return model


def dinov2_stages(model, pixels) -> dict:
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True)
    depth, registers = model.config.num_hidden_layers, getattr(model.config, "num_register_tokens", 0)
    blocks = {f"blocks_{i}": out.hidden_states[i + 1] for i in range(depth)}
    side = int((out.last_hidden_state.shape[1] - 1 - registers) ** 0.5)
    patches = out.last_hidden_state[:, 1 + registers :]
    return {
        "embedded": out.hidden_states[0], **blocks, "cls": out.pooler_output, "patches": patches,
        "e.cls": out.pooler_output, "e.patches": patches.reshape(len(patches), side, side, -1),
    }


@pytest.mark.parametrize("crop", [56, 70])
@pytest.mark.parametrize("registers, swiglu", [(0, False), (4, False), (0, True)])
def test_dinov2(tmp_path, registers, swiglu, crop):
    """At the stored size and where transformers resizes position embeddings."""
    model = dinov2(tmp_path, registers, swiglu, crop)
    processor = transformers.BitImageProcessorPil.from_pretrained(tmp_path)
    pictures = films()
    pixels = processor([Image.fromarray(film) for film in pictures], return_tensors="pt")["pixel_values"]
    encoder = encoders.load(str(tmp_path))
    assert (encoder.image_size, encoder.patch_size, encoder.width) == (crop, 14, 64)
    batch = encoder.preprocess(pictures)
    np.testing.assert_allclose(batch[..., 0], pixels[:, 0], atol=1e-5)
    compare(encoder, batch, dinov2_stages(model, pixels))


# --- CLIP -----------------------------------------------------------------------------------------------------


def small(name: str, network, **preprocess) -> encoders.Row:
    """The row of an encoder with a network of test size."""
    row = encoders.ENCODERS[name]
    return dataclasses.replace(row, network=network, preprocess=dataclasses.replace(row.preprocess, **preprocess))


CLIP_SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=56, patch_size=14)
SMALL_CLIP = CLIPViT(64, 2, 4, patch_size=14, image_size=56, projection=32)


def clip_processor(size: int = 56):
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def clip_stages(out) -> dict:
    return {
        "embedded": out.hidden_states[0], "blocks_0": out.hidden_states[1], "blocks_1": out.hidden_states[2],
        "cls": out.pooler_output, "patches": out.last_hidden_state[:, 1:], "e.cls": out.pooler_output,
    }


@pytest.mark.parametrize("whole", [True, False])
def test_clip_from_hugging_face(tmp_path, whole):
    """The repository holds both towers; CLIPVisionModel saves the image tower alone, in other names."""
    vision = transformers.CLIPVisionConfig(**CLIP_SIZES)
    if whole:
        text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50, bos_token_id=0, eos_token_id=1)
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=CLIP_SIZES, projection_dim=32))
    else:
        model = transformers.CLIPVisionModel(vision)
    randomised(model).save_pretrained(tmp_path)
    clip_processor().save_pretrained(tmp_path)
    pictures = films()
    pixels = clip_processor()([Image.fromarray(film) for film in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tower = model.vision_model if whole else model
        out = tower(pixels, output_hidden_states=True)
        expected = clip_stages(out)
        if whole:
            expected["projected"] = model.visual_projection(out.pooler_output)
    row = small("clip_vitl14_224", SMALL_CLIP, resize=56, crop=56)
    by_row = encoders.open_row("clip_vitl14_224", row, str(tmp_path))
    compare(by_row, by_row.preprocess(pictures), expected)
    by_path = encoders.load(str(tmp_path))
    assert by_path.settings == row.preprocess
    np.testing.assert_array_equal(by_path(by_path.preprocess(pictures))["cls"], by_row(by_row.preprocess(pictures))["cls"])


def collected(model, modules: dict, *inputs) -> dict:
    """{name: output of a module} of one forward pass."""
    out, hooks = {}, []
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(lambda _, __, value, name=name: out.__setitem__(name, value)))
    with torch.no_grad():
        out["returned"] = model(*inputs)
    for hook in hooks:
        hook.remove()
    return out


def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=40)
    text = open_clip.CLIPTextCfg(layers=1, width=32, heads=2, vocab_size=50, context_length=6)
    return randomised(open_clip.CLIP(32, vision, text, quick_gelu=True))


def chexzero_pipeline(film: np.ndarray, pad: int, size: int) -> np.ndarray:
    """The published one, in the published order: pad, three channels of levels, normalise, resize the tensor."""
    from torchvision.transforms import functional

    ratio = pad / max(film.shape)
    shape = tuple(int(side * ratio) for side in film.shape[::-1])
    canvas = Image.new("L", (pad, pad))
    canvas.paste(Image.fromarray(film).resize(shape, Image.LANCZOS), ((pad - shape[0]) // 2, (pad - shape[1]) // 2))
    tensor = torch.from_numpy(np.repeat(np.asarray(canvas, np.float32)[None], 3, axis=0))
    tensor = functional.normalize(tensor, (101.48761,) * 3, (83.43944,) * 3)
    return functional.resize(tensor, size, functional.InterpolationMode.BICUBIC, antialias=False)


@pytest.mark.parametrize("saved", ["state dict", "TorchScript"])
def test_chexzero_and_openai_names(tmp_path, saved):
    model = open_clip_model()
    pictures = films()
    pixels = torch.stack([chexzero_pipeline(film, 64, 40) for film in pictures])
    path = tmp_path / "weights.pt"
    if saved == "state dict":
        torch.save(model.state_dict(), path)
    else:  # as OpenAI publishes CLIP; here in float32
        torch.jit.trace(model, (pixels, torch.zeros(3, 6, dtype=torch.int64)), check_trace=False).save(path)
    visual = model.visual
    blocks = {f"blocks_{i}": block for i, block in enumerate(visual.transformer.resblocks)}
    out = collected(visual, {"embedded": visual.ln_pre, "norm": visual.ln_post, **blocks}, pixels)
    row = small("chexzero", CLIPViT(64, 2, 4, patch_size=8, image_size=40, projection=32), resize=40, crop=40, pad=64)
    encoder = encoders.open_row("chexzero", row, str(path))
    batch = encoder.preprocess(pictures)
    np.testing.assert_allclose(batch[..., 0], pixels[:, 0], atol=1e-5)
    expected = {name: out[name] for name in ("embedded", *blocks)}
    cls = out["norm"][:, 0] if out["norm"].ndim == 3 else out["norm"]
    compare(encoder, batch, expected | {"cls": cls, "e.cls": cls, "projected": out["returned"], "patches": out["blocks_1"][:, 1:]})


# --- timm: BiomedCLIP and MRM -----------------------------------------------------------------------------------


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=4, num_classes=0, global_pool="token",
    )


SMALL_TIMM = ViT(64, 2, 4, patch_size=16, image_size=48, layerscale=0.0, mask_token=False, offset=0.0)


def timm_stages(trunk, pixels, call) -> dict:
    blocks = {f"blocks_{i}": block for i, block in enumerate(trunk.blocks)}
    out = collected(call, {"embedded": trunk.norm_pre, "norm": trunk.norm, **blocks}, pixels)
    return {name: out[name] for name in ("embedded", *blocks, "returned")} | {
        "cls": out["norm"][:, 0], "patches": out["norm"][:, 1:],
    }


def torchvision_pipeline(settings: Preprocess):
    from torchvision import transforms

    mode = getattr(transforms.InterpolationMode, settings.resample.upper())
    steps = transforms.Compose([transforms.Resize(settings.resize, mode), transforms.CenterCrop(settings.crop)])
    return lambda film: np.asarray(steps(Image.fromarray(film)))


def test_biomedclip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.timm_model.TimmModel("vit_base_patch16_224", 32, pool="", proj="linear")
    model.trunk, model.head.proj = timm_vit(), torch.nn.Linear(64, 32, bias=False)
    state = {f"visual.{name}": value for name, value in randomised(model).state_dict().items()}
    text = {"text.transformer.embeddings.word_embeddings.weight": torch.ones(3, 2), "logit_scale": torch.ones(())}
    torch.save(state | text, tmp_path / "open_clip_pytorch_model.bin")
    row = small("biomedclip", Projected(SMALL_TIMM, 32), resize=48, crop=48)
    pictures = films()
    pixels = three_channels(pictures, row.preprocess, torchvision_pipeline(row.preprocess))
    expected = timm_stages(model.trunk, pixels, model)
    expected["projected"] = expected.pop("returned")
    for weights in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        encoder = encoders.open_row("biomedclip", row, str(weights))
    compare(encoder, encoder.preprocess(pictures), expected | {"e.cls": expected["cls"]})


def test_mrm(tmp_path):
    """Its file is a checkpoint of training, with the decoder, the text model and the command line in it."""
    import argparse

    trunk = randomised(timm_vit())
    state = dict(trunk.state_dict())
    others = {name: torch.ones(2, 3) for name in ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "bert_mlp.weight")}
    torch.save({"model": state | others, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "MRM.pth")
    row = small("mrm", SMALL_TIMM, resize=48, crop=48)
    pictures = films()
    pixels = three_channels(pictures, row.preprocess, torchvision_pipeline(row.preprocess))
    expected = timm_stages(trunk, pixels, trunk)
    np.testing.assert_array_equal(expected.pop("returned"), expected["cls"])
    encoder = encoders.open_row("mrm", row, str(tmp_path / "MRM.pth"))
    compare(encoder, encoder.preprocess(pictures), expected | {"e.cls": expected["patches"].mean(1)})


# --- BioViL-T ---------------------------------------------------------------------------------------------------


def biovil_t(blocks=(1, 1, 1, 1)):
    """torchvision's ResNet and the published layers after it, under the published names."""
    from torchvision.models import resnet

    model, encoder, projector = (torch.nn.Module() for _ in range(3))
    encoder.encoder = resnet.ResNet(resnet.Bottleneck, list(blocks))
    encoder.backbone_to_vit = torch.nn.Conv2d(2048, 256, 1, bias=False)
    encoder.missing_previous_emb = torch.nn.Parameter(torch.zeros(1, 256, 1, 1))
    encoder.vit_pooler = torch.nn.Linear(3, 3)  # which one film alone never reaches
    projector.model = torch.nn.Sequential(
        torch.nn.Conv2d(512, 128, 1, bias=False), torch.nn.BatchNorm2d(128), torch.nn.ReLU(), torch.nn.Conv2d(128, 128, 1)
    )
    model.encoder, model.projector = encoder, projector
    return randomised(model)


def biovil_t_stages(model, pixels) -> dict:
    net = model.encoder.encoder
    layers = {f"layer{i}": getattr(net, f"layer{i}") for i in range(1, 5)}
    out = collected(net, {"stem": net.maxpool, **layers}, pixels)
    with torch.no_grad():
        static = model.encoder.backbone_to_vit(out["layer4"])
        fused = torch.cat([static, model.encoder.missing_previous_emb.expand_as(static)], dim=1)
        projected = model.projector.model(fused)
    del out["returned"]
    mean = out["layer4"].mean((2, 3))
    return out | {
        "fused": fused, "global": fused.mean((2, 3)), "projected_patches": projected,
        "projected": projected.mean((2, 3)), "patches": out["layer4"], "e.cls": mean, "e.patches": out["layer4"],
    }


def remapped(film: np.ndarray) -> np.ndarray:
    values = film.astype(float)
    values -= values.min()
    values /= values.max()
    values *= 255
    return values.astype(np.uint8)


def test_biovil_t(tmp_path):
    model = biovil_t()
    torch.save(model.state_dict(), tmp_path / "biovil_t_image_model_proj_size_128.pt")
    row = small("biovil_t", BioViLT((1, 1, 1, 1)), resize=72, crop=64)
    pictures = films()
    resize = torchvision_pipeline(row.preprocess)
    pixels = three_channels(pictures, row.preprocess, lambda film: resize(remapped(film)))
    encoder = encoders.open_row("biovil_t", row, str(tmp_path / "biovil_t_image_model_proj_size_128.pt"))
    assert (encoder.width, encoder.patch_size) == (2048, 32)
    batch = encoder.preprocess(pictures)
    np.testing.assert_allclose(batch[..., 0], pixels[:, 0], atol=1e-6)
    compare(encoder, batch, biovil_t_stages(model, pixels))
    other = encoders.open_row("biovil_t", row, str(tmp_path / "biovil_t_image_model_proj_size_128.pt"), feature="projected")
    assert other.width == 128
