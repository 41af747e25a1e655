"""Every encoder against the code it was released with: random weights, saved in the released format, loaded through
`encoders.load`, every stage compared."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from raddino_jax import encoders
from raddino_jax import params as trees
from raddino_jax.conversion.huggingface import Preprocess
from raddino_jax.conversion.rules import WeightsError
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
                scales = re.search(
                    r"(norm|bn|ln_|ls\d|layer_scale|downsample\.1|projector.model.1).*(weight|gamma|lambda1)$",
                    name,
                )
                value.copy_(
                    fresh.abs() + 0.7 if name.endswith("running_var") else fresh + 1 if scales else fresh
                )
    return module.eval()


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.size:  # no registers
        return 0.0
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(load, pictures, expected: dict) -> encoders.Encoder:
    """Every stage within tolerance in both types; returns the float32 encoder. load: dtype -> encoder.

    "e." stands before what calling the encoder returns: float32 alone, as compiling it is what costs time here.
    """
    for dtype, tolerance in [("bfloat16", BFLOAT16), ("float32", FLOAT32)]:
        encoder = load(dtype)
        batch = encoder.preprocess(pictures)
        found, wanted = dict(encoder.stages(batch)), expected
        if dtype == "bfloat16":
            wanted = {name: value for name, value in expected.items() if not name.startswith("e.")}
        elif any(name.startswith("e.") for name in expected):
            found |= {f"e.{name}": value for name, value in encoder(batch).items()}
        errors = {name: relative(found[name], channels_last(value, found[name])) for name, value in wanted.items()}
        print(dtype, {name: f"{error:.0e}" for name, error in errors.items()})
        worst = max(errors, key=errors.get)
        assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}, at most {tolerance} in {dtype}"
    return encoder


def channels_last(value, like) -> np.ndarray:
    """Torch's feature maps have their channels first."""
    array = value.detach().float().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 and array.shape != like.shape else array


def three_channels(pictures, settings: Preprocess, resize_and_crop) -> "torch.Tensor":
    """What the released pipeline feeds its network: three normalised channels [n, 3, S, S]."""
    levels = (
        np.stack([resize_and_crop(film) for film in pictures])[:, None].astype(np.float32)
        * settings.scale
        / 255
    )
    mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (settings.mean, settings.std))
    return torch.from_numpy(np.broadcast_to((levels - mean) / std, (len(levels), 3, *levels.shape[2:])).copy())


# --- DINOv2 through Hugging Face -----------------------------------------------------------------------------


def dinov2(folder: Path, registers: int, swiglu: bool = False, crop: int = 56, size: int = 56, **settings):
    sizes = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **sizes)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    randomised(model).save_pretrained(folder)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": crop + 8},
        crop_size={"height": crop, "width": crop},
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
        "embedded": out.hidden_states[0],
        **blocks,
        "cls": out.pooler_output,
        "registers": out.last_hidden_state[:, 1 : 1 + registers],
        "patches": patches,
    } | ({} if registers else {"e.cls": out.pooler_output, "e.patches": patches.unflatten(1, (side, side))})


IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "registers, swiglu, crop, statistics",
    [(0, False, 56, {}), (4, False, 70, IMAGENET), (0, True, 42, IMAGENET)],
)
def test_dinov2(tmp_path, registers, swiglu, crop, statistics):
    """At the stored size and where transformers resizes position embeddings."""
    model = dinov2(tmp_path, registers, swiglu, crop, **statistics)
    processor = transformers.BitImageProcessorPil.from_pretrained(tmp_path)
    pictures = films()
    pixels = processor([Image.fromarray(film) for film in pictures], return_tensors="pt")["pixel_values"]
    encoder = compare(
        lambda dtype: encoders.load(str(tmp_path), dtype=dtype), pictures, dinov2_stages(model, pixels)
    )
    assert (encoder.image_size, encoder.patch_size, encoder.width) == (crop, 14, 64)
    if not statistics:
        np.testing.assert_allclose(encoder.preprocess(pictures)[..., 0], pixels[:, 0], atol=1e-5)


# --- CLIP -----------------------------------------------------------------------------------------------------


def small(name: str, network, **preprocess) -> encoders.Row:
    """The row of an encoder with a network of test size."""
    row = encoders.ENCODERS[name]
    return dataclasses.replace(
        row, network=network, preprocess=dataclasses.replace(row.preprocess, **preprocess)
    )


CLIP_SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    image_size=56,
    patch_size=14,
)
SMALL_CLIP = CLIPViT(64, 2, 4, patch_size=14, image_size=56, projection=32)


def clip_processor(size: int = 56):
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def clip_stages(out) -> dict:
    return {
        "embedded": out.hidden_states[0],
        "blocks_0": out.hidden_states[1],
        "blocks_1": out.hidden_states[2],
        "cls": out.pooler_output,
        "patches": out.last_hidden_state[:, 1:],
    }


def test_clip_from_hugging_face(tmp_path):
    """The repository holds both towers, of which the image tower is read."""
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    text |= dict(bos_token_id=0, eos_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=CLIP_SIZES, projection_dim=32)
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    clip_processor().save_pretrained(tmp_path)
    pictures = films()
    pixels = clip_processor()([Image.fromarray(film) for film in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model.vision_model(pixels, output_hidden_states=True)
        expected = clip_stages(out) | {"projected": model.visual_projection(out.pooler_output)}
    row = small("clip_vitl14_224", SMALL_CLIP, resize=56, crop=56)
    by_row = compare(
        lambda dtype: encoders.open_row("clip_vitl14_224", row, str(tmp_path), dtype), pictures, expected
    )
    by_path = encoders.load(str(tmp_path))
    same_params(by_path, by_row)


def same_params(one: encoders.Encoder, other: encoders.Encoder) -> None:
    assert one.network == other.network and one.settings == other.settings
    for ours, theirs in zip(*(jax.tree.leaves(e.params) for e in (one, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_clip_without_the_projection(tmp_path):
    """CLIPVisionModel saves the image tower alone, in names without its prefix."""
    model = randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_SIZES)))
    model.save_pretrained(tmp_path / "tower")
    prefixed = {f"vision_model.{name}": value for name, value in model.state_dict().items()}
    torch.save(prefixed | {"visual_projection.weight": torch.ones(32, 64)}, tmp_path / "whole.bin")
    row = small("clip_vitl14_336", SMALL_CLIP, resize=56, crop=56)
    tower, whole = (
        encoders.open_row("clip_vitl14_336", row, str(tmp_path / name)) for name in ("tower", "whole.bin")
    )
    assert tower.network == whole.network.clone(projection=0)
    ours, theirs = trees.flatten(tower.params), trees.flatten(whole.params)
    assert theirs.keys() - ours.keys() == {"proj/kernel"}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


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
    canvas.paste(
        Image.fromarray(film).resize(shape, Image.LANCZOS), ((pad - shape[0]) // 2, (pad - shape[1]) // 2)
    )
    tensor = torch.from_numpy(np.repeat(np.asarray(canvas, np.float32)[None], 3, axis=0))
    tensor = functional.normalize(tensor, (101.48761,) * 3, (83.43944,) * 3)
    return functional.resize(tensor, size, functional.InterpolationMode.BICUBIC, antialias=False)


SMALL_CHEXZERO = CLIPViT(64, 2, 4, patch_size=8, image_size=40, projection=32)


def test_chexzero(tmp_path):
    model = open_clip_model()
    pictures = films()
    pixels = torch.stack([chexzero_pipeline(film, 64, 40) for film in pictures])
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    visual = model.visual
    blocks = {f"blocks_{i}": block for i, block in enumerate(visual.transformer.resblocks)}
    out = collected(visual, {"embedded": visual.ln_pre, "norm": visual.ln_post, **blocks}, pixels)
    row = small("chexzero", SMALL_CHEXZERO, resize=40, crop=40, pad=64)
    cls = out["norm"][:, 0] if out["norm"].ndim == 3 else out["norm"]
    expected = {name: out[name] for name in ("embedded", *blocks)} | {
        "cls": cls,
        "projected": out["returned"],
        "patches": out["blocks_1"][:, 1:],
    }
    encoder = compare(lambda dtype: encoders.open_row("chexzero", row, str(path), dtype), pictures, expected)
    np.testing.assert_allclose(encoder.preprocess(pictures)[..., 0], pixels[:, 0], atol=1e-5)


def test_clip_as_openai_publishes_it(tmp_path):
    """A TorchScript archive in half precision: read without running what is in it."""
    model = open_clip_model()
    pixels = torch.zeros(1, 3, 40, 40)
    traced = torch.jit.trace(model, (pixels, torch.zeros(1, 6, dtype=torch.int64)), check_trace=False)
    traced.half().save(tmp_path / "ViT.pt")
    torch.save(model.half().state_dict(), tmp_path / "state.pt")
    row = small("clip_vitl14_224", SMALL_CHEXZERO, resize=40, crop=40)
    same_params(*(encoders.open_row("clip", row, str(tmp_path / name)) for name in ("ViT.pt", "state.pt")))


# --- timm: BiomedCLIP and MRM -----------------------------------------------------------------------------------


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=48, patch_size=16, embed_dim=64, depth=2, num_heads=4, num_classes=0, global_pool="token"
    )


SMALL_TIMM = ViT(64, 2, 4, patch_size=16, image_size=48, layerscale=0.0, mask_token=False, offset=0.0)


def timm_stages(trunk, pixels, call) -> dict:
    blocks = {f"blocks_{i}": block for i, block in enumerate(trunk.blocks)}
    out = collected(call, {"embedded": trunk.norm_pre, "norm": trunk.norm, **blocks}, pixels)
    return {name: out[name] for name in ("embedded", *blocks, "returned")} | {
        "cls": out["norm"][:, 0],
        "patches": out["norm"][:, 1:],
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
    text = {
        "text.transformer.embeddings.word_embeddings.weight": torch.ones(3, 2),
        "logit_scale": torch.ones(()),
    }
    torch.save(state | text, tmp_path / "open_clip_pytorch_model.bin")
    row = small("biomedclip", Projected(SMALL_TIMM, 32), resize=48, crop=48)
    pictures = films()
    pixels = three_channels(pictures, row.preprocess, torchvision_pipeline(row.preprocess))
    expected = timm_stages(model.trunk, pixels, model)
    expected["projected"] = expected.pop("returned")
    compare(lambda dtype: encoders.open_row("biomedclip", row, str(tmp_path), dtype), pictures, expected)


def test_mrm(tmp_path):
    """Its file is a checkpoint of training, with the decoder, the text model and the command line in it."""
    import argparse

    trunk = randomised(timm_vit())
    state = dict(trunk.state_dict())
    others = {
        name: torch.ones(2, 3)
        for name in ("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "bert_mlp.weight")
    }
    torch.save({"model": state | others, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "MRM.pth")
    row = small("mrm", SMALL_TIMM, resize=48, crop=48)
    pictures = films()
    pixels = three_channels(pictures, row.preprocess, torchvision_pipeline(row.preprocess))
    expected = timm_stages(trunk, pixels, trunk)
    np.testing.assert_array_equal(expected.pop("returned"), expected["cls"])
    expected["e.cls"] = expected["patches"].mean(1)
    compare(lambda dtype: encoders.open_row("mrm", row, str(tmp_path / "MRM.pth"), dtype), pictures, expected)


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
        torch.nn.Conv2d(512, 128, 1, bias=False),
        torch.nn.BatchNorm2d(128),
        torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 1),
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
        "fused": fused,
        "global": fused.mean((2, 3)),
        "projected_patches": projected,
        "projected": projected.mean((2, 3)),
        "patches": out["layer4"],
        "e.cls": mean,
        "e.patches": out["layer4"],
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
    path = str(tmp_path / "biovil_t_image_model_proj_size_128.pt")
    expected = biovil_t_stages(model, pixels)
    encoder = compare(lambda dtype: encoders.open_row("biovil_t", row, path, dtype), pictures, expected)
    assert (encoder.width, encoder.patch_size) == (2048, 32)
    np.testing.assert_allclose(encoder.preprocess(pictures)[..., 0], pixels[:, 0], atol=1e-6)


# --- the table of encoders ----------------------------------------------------------------------------------------

NAMES = (
    "rad_dino dinov2_vits14 dinov2_vitb14 dinov2_vitl14 dinov2_vitg14 "
    "clip_vitl14_224 clip_vitl14_336 biomedclip chexzero mrm biovil_t"
).split()


def test_every_encoder_has_a_row():
    assert list(encoders.ENCODERS) == NAMES
    for name, row in encoders.ENCODERS.items():
        assert row.repository or row.home, f"{name}: where are its weights?"


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    """Of the whole network, traced without memory."""
    row = encoders.ENCODERS[name]
    assert trees.count(encoders.expected_params(row.network, row.preprocess.crop)) == row.parameters


def test_parameters_of_the_released_classes():
    """As their own code counts them; BioViL-T's adds what one film alone never reaches, and not its statistics."""
    timm = pytest.importorskip("timm")
    from torchvision.models import resnet50

    def count(module) -> int:
        return sum(value.numel() for value in module.parameters())

    with torch.device("meta"):
        vit = count(timm.create_model("vit_base_patch16_224", num_classes=0))
        clip = {
            size: count(
                transformers.CLIPVisionModelWithProjection(
                    transformers.CLIPVisionConfig(
                        hidden_size=1024,
                        num_hidden_layers=24,
                        num_attention_heads=16,
                        intermediate_size=4096,
                        image_size=size,
                        patch_size=14,
                        projection_dim=768,
                    )
                )
            )
            for size in (224, 336)
        }
        resnet = resnet50()
    found = {name: encoders.ENCODERS[name].parameters for name in NAMES}
    assert found["mrm"] == vit and found["biomedclip"] == vit + 768 * 512
    assert found["clip_vitl14_224"] == clip[224] and found["clip_vitl14_336"] == clip[336]
    statistics = sum(value.numel() for name, value in resnet.named_buffers() if "running" in name)
    after = 2048 * 256 + 256 + 512 * 128 + 4 * 128 + 128 * 128 + 128
    assert found["biovil_t"] == count(resnet) - count(resnet.fc) + statistics + after


TOKENS = {  # image side, patch side, width of what is probed
    **dict.fromkeys(["rad_dino", "dinov2_vitb14"], (518, 14, 768)),
    "dinov2_vits14": (518, 14, 384),
    "dinov2_vitl14": (518, 14, 1024),
    "dinov2_vitg14": (518, 14, 1536),
    "clip_vitl14_224": (224, 14, 1024),
    "clip_vitl14_336": (336, 14, 1024),
    "biomedclip": (224, 16, 768),
    "chexzero": (224, 32, 768),
    "mrm": (224, 16, 768),
    "biovil_t": (448, 32, 2048),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_each_encoder_returns(name):
    """One grey film, patches on its grid, the width of what is probed; traced without memory."""
    row, (side, patch, width) = encoders.ENCODERS[name], TOKENS[name]
    assert row.preprocess.crop == side
    params = {"params": encoders.expected_params(row.network, side)}
    out = jax.eval_shape(row.network.apply, params, jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32))
    assert np.prod(out["patches"].shape[1:-1]) == (side // patch) ** 2
    assert (out["patches"] if row.feature == "patch_mean" else out[row.feature]).shape[-1] == width


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, row in encoders.ENCODERS.items() if row.parameters < 100_000_000])
def test_random_weights_need_no_files(name):
    """Of those that fit into memory eight times, once per virtual device."""
    encoder = encoders.load(name, weights="random")
    assert (encoder.image_size, encoder.patch_size, encoder.width) == TOKENS[name]
    out = encoder(encoder.preprocess(films(1)))
    side = encoder.image_size // encoder.patch_size
    assert out["patches"].shape[:3] == (1, side, side) and np.isfinite(out["cls"]).all()


# --- using one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    dinov2(path, registers=0)
    return path


def test_any_number_of_films(folder):
    """Split over eight devices: the rows do not depend on how many come together."""
    encoder = encoders.load(str(folder))
    assert encoder.mesh.size == len(jax.local_devices())
    batch = encoder.preprocess(films(9))
    whole = encoder(batch)
    for n in (1, 8):
        part = encoder(batch[:n])
        for name in ("cls", "patches"):
            assert part[name].shape[0] == n
            np.testing.assert_allclose(part[name], whole[name][:n], rtol=1e-5, atol=1e-5)
    for wrong in (batch[..., 0], np.repeat(batch, 3, axis=-1), batch[:0]):
        with pytest.raises(ValueError, match=r"expected films \[n, S, S, 1\]"):
            encoder(wrong)


def test_other_features(folder):
    plain, mean = encoders.load(str(folder)), encoders.load(str(folder), feature="patch_mean")
    batch = plain.preprocess(films(2))
    np.testing.assert_allclose(mean(batch)["cls"], plain(batch)["patches"].mean((1, 2)), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="feature='head' is none of cls, patch_mean"):
        encoders.load(str(folder), feature="head")


def test_weights_that_are_not_of_this_encoder(folder, tmp_path):
    with pytest.raises(
        WeightsError, match=r"as rad_dino does not fit this model[\s\S]*expected \(768,\), found \(64,\)"
    ):
        encoders.load("rad_dino", weights=str(folder))
    model = open_clip_model()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match="expected weights of one of the formats dinov2, hf_dinov2; found"):
        encoders.load("rad_dino", weights=str(tmp_path / "clip.pt"))
    with pytest.raises(WeightsError, match="load them by the name of the encoder"):
        encoders.load(str(tmp_path / "clip.pt"))
    with pytest.raises(WeightsError, match="'resnet50' is neither an encoder .*rad_dino.* nor a path"):
        encoders.load("resnet50")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"no weights in this folder \(expected one of [^;]*$"):
        encoders.load(str(tmp_path / "empty"))
    for name in ("config.json", "starts.jsonl"):
        (tmp_path / "empty" / name).write_text("{}")
    with pytest.raises(WeightsError, match="workdir of a run without a checkpoint yet: start it again"):
        encoders.load(str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match=r"no weights in this folder.*; for one of clip\.pt give the path"):
        encoders.load(str(tmp_path))
    with pytest.raises(WeightsError, match="found an empty name"):
        encoders.load("")


def test_random_weights_in_the_form_of_a_path(folder):
    encoder = encoders.load(str(folder), weights="random")
    other = encoders.load(str(folder))
    assert encoder.settings == other.settings and encoder.network == other.network
    same = [
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(e.params) for e in (encoder, other)), strict=True)
    ]
    assert not any(same)
