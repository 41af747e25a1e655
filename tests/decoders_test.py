"""Decoders and U-Nets against PyTorch: modules of transformers, MONAI and segmentation-models-pytorch, and plain
layers, with random weights copied over; parameters are counted as the paper prints them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raddino_jax import params as trees
from raddino_jax.models import decoders, unet

torch = pytest.importorskip("torch")
F = torch.nn.functional

TOLERANCE = 2e-5  # of the largest logit, float32


def parameters(module, shape) -> int:
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


SIZES = [
    (decoders.Linear(1), (1, 1, 6, 6, 768), 769),
    (decoders.Linear(1), (1, 1, 6, 6, 2048), 2_049),
    (decoders.ViTDet(1), (1, 4, 6, 6, 768), 24_784_129),
    (decoders.UPerNet(1), (1, 4, 6, 6, 768), 39_338_241),
    (unet.ResidualUNet(1), (1, 64, 64, 1), 17_857_153),
    (unet.ResidualUNet(1), (1, 64, 64, 3), 17_858_433),
    (unet.EfficientUNet(1), (1, 64, 64, 1), 42_492_473),
]


@pytest.mark.parametrize("module, shape, expected", SIZES)
def test_number_of_parameters(module, shape, expected):
    assert parameters(module, shape) == expected


def randomised(module):
    """Every parameter and statistic random: zeros and ones would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                scale = 0.3 if value.ndim < 2 else value[0].numel() ** -0.5
                fresh = torch.randn_like(value) * scale
                positive = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
                value.copy_(fresh.abs() + 0.7 if positive else fresh)
    return module.eval()


def convolution(prefix, layer, transposed=False):
    """A torch convolution as our leaves."""
    order = (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
    found = {f"params/{prefix}/kernel": layer.weight.detach().numpy().transpose(order)}
    if layer.bias is not None:
        found[f"params/{prefix}/bias"] = layer.bias.detach().numpy()
    return found


def dense(prefix, layer):
    """A 1 x 1 convolution as a linear layer."""
    weight = layer.weight.detach().numpy()
    return {f"params/{prefix}/kernel": weight[:, :, 0, 0].T, f"params/{prefix}/bias": layer.bias.detach().numpy()}


def norm(prefix, layer):
    found = {f"params/{prefix}/scale": layer.weight, f"params/{prefix}/bias": layer.bias}
    if getattr(layer, "running_mean", None) is not None:
        found |= {f"batch_stats/{prefix}/mean": layer.running_mean, f"batch_stats/{prefix}/var": layer.running_var}
    return {name: value.detach().numpy() for name, value in found.items()}


def apply(module, arrays, x):
    """Our module with these leaves, which have to be exactly the ones that it wants."""
    variables = trees.unflatten({name: jnp.asarray(value) for name, value in arrays.items()})
    expected = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(x.shape, jnp.float32))
    shapes = {name: leaf.shape for name, leaf in trees.flatten(expected).items()}
    assert {name: leaf.shape for name, leaf in trees.flatten(variables).items()} == shapes
    return np.asarray(jax.jit(module.apply)(variables, jnp.asarray(x)))


def agree(found, expected, tolerance=TOLERANCE):
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def maps(side, width=12, n=2):
    torch.manual_seed(1)
    return torch.randn(4, n, width, side, side)


def ours(x):
    """[4, n, D, h, w] -> [n, 4, h, w, D]."""
    return x.numpy().transpose(1, 0, 3, 4, 2)


# --- decoders -----------------------------------------------------------------------------------------------


class TorchPyramid(torch.nn.Module):
    """mmsegmentation's Feature2Pyramid with rescales [4, 2, 1, 0.5], layer by layer."""

    def __init__(self, width):
        super().__init__()
        double = lambda: torch.nn.ConvTranspose2d(width, width, 2, 2)  # noqa: E731
        self.norm, self.first, self.second, self.third = torch.nn.BatchNorm2d(width), double(), double(), double()

    def forward(self, x):
        finest = self.second(F.gelu(self.norm(self.first(x[0]))))
        return [finest, self.third(x[1]), x[2], F.max_pool2d(x[3], 2)]

    def leaves(self):
        doubled = [("up_0", self.first), ("up_1", self.second), ("up_2", self.third)]
        found = norm("pyramid/norm/batch", self.norm)
        for name, layer in doubled:
            found |= convolution(f"pyramid/{name}", layer, transposed=True)
        return found


def conv_norm(prefix, module):
    return convolution(f"{prefix}/conv", module.conv) | norm(f"{prefix}/norm/batch", module.batch_norm)


@pytest.mark.parametrize("side", [14, 9, 7])
def test_upernet_is_that_of_transformers(side):
    """At 9 and 7 patches pooling windows overlap, and levels are not multiples of each other."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    width, channels = 12, 8
    config = UperNetConfig(backbone_config={"model_type": "convnext"}, hidden_size=channels, pool_scales=[1, 2, 3, 6])
    config.num_labels = 3
    pyramid, head = randomised(TorchPyramid(width)), randomised(UperNetHead(config, [width] * 4))
    x = maps(side, width)
    arrays = pyramid.leaves() | dense("classify", head.classifier)
    for i in range(3):
        arrays |= conv_norm(f"lateral_{i}", head.lateral_convs[i]) | conv_norm(f"smooth_{i}", head.fpn_convs[i])
    for i, pool in enumerate(head.psp_modules.blocks):
        arrays |= conv_norm(f"pool_{i}", pool.layers[1])
    arrays |= conv_norm("pooling", head.bottleneck) | conv_norm("fuse", head.fpn_bottleneck)
    with torch.no_grad():
        expected = head(pyramid(x))
    agree(apply(decoders.UPerNet(3, channels), arrays, ours(x)), expected)


@pytest.mark.parametrize("side", [8, 7])
def test_vitdet_is_its_layers_in_torch(side):
    width, channels = 12, 8

    def layer(given, size):
        found = torch.nn.Module()
        found.conv = torch.nn.Conv2d(given, channels, size, padding=size // 2, bias=False)
        found.batch_norm = torch.nn.BatchNorm2d(channels)
        found.forward = lambda x: F.relu(found.batch_norm(found.conv(x)))
        return randomised(found)

    pyramid = randomised(TorchPyramid(width))
    lateral, smooth = [layer(width, 1) for _ in range(3)], [layer(channels, 3) for _ in range(3)]
    fuse, classify = layer(4 * channels, 3), torch.nn.Conv2d(channels, 2, 1)
    x = maps(side, width)
    with torch.no_grad():
        levels = [one(level) for one, level in zip(lateral, pyramid(x)[:3], strict=True)]
        levels.append(F.max_pool2d(levels[2], 2))
        for i in (2, 1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[2:], mode="bilinear")
        levels[:3] = [one(level) for one, level in zip(smooth, levels[:3], strict=True)]
        size = levels[0].shape[2:]
        expected = classify(fuse(torch.cat([F.interpolate(v, size, mode="bilinear") for v in levels], 1)))
    arrays = pyramid.leaves() | dense("classify", classify) | conv_norm("fuse", fuse)
    for i in range(3):
        arrays |= conv_norm(f"lateral_{i}", lateral[i]) | conv_norm(f"smooth_{i}", smooth[i])
    agree(apply(decoders.ViTDet(2, channels), arrays, ours(x)), expected)


def test_linear_is_a_1x1_convolution_of_the_last_layer():
    layer, x = torch.nn.Conv2d(12, 3, 1), maps(5)
    with torch.no_grad():
        expected = layer(x[-1])
    agree(apply(decoders.Linear(3), dense("classify", layer), ours(x)[:, -1:]), expected)


def test_resize_is_torchs_bilinear():
    x = torch.randn(2, 3, 5, 7)
    for shape in [(13, 9), (10, 14), (4, 3), (5, 7)]:
        agree(np.asarray(decoders.resize(jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), shape)),
              F.interpolate(x, shape, mode="bilinear", align_corners=False))


def test_batch_norm_learns_the_statistics_of_torch():
    """One step in training mode: what it returns, and the running statistics (torch's variance is the unbiased one)."""
    torch.manual_seed(0)
    layer, x = torch.nn.BatchNorm2d(4), torch.randn(3, 4, 5, 6) + 2
    expected = layer(x)
    module = decoders.Norm()
    given = jnp.asarray(x.numpy().transpose(0, 2, 3, 1))
    variables = module.init(jax.random.key(0), given)
    found, after = module.apply(variables, given, True, mutable="batch_stats")
    agree(np.asarray(found), expected)
    stats = after["batch_stats"]["batch"]
    np.testing.assert_allclose(stats["mean"], layer.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + (layer.running_var - 0.9) * 89 / 90, rtol=1e-5)


# --- U-Nets -------------------------------------------------------------------------------------------------


def instance(prefix, block, names):
    found = {}
    for ours_, theirs, number in names:
        found |= convolution(f"{prefix}/{ours_}/conv", getattr(block, theirs).conv)
        found |= norm(f"{prefix}/{ours_}/norm", getattr(block, number))
    return found


def test_residual_unet_is_monais():
    from monai.networks.nets import DynUNet

    filters = [4, 6, 8, 10]
    net = randomised(DynUNet(
        2, 1, 3, kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3, filters=filters,
        res_block=True,
    ))  # fmt: skip
    residual = [("conv1", "conv1", "norm1"), ("conv2", "conv2", "norm2"), ("shortcut", "conv3", "norm3")]
    arrays = dense("classify", net.output_block.conv.conv)
    for i, block in enumerate([net.input_block, *net.downsamples, net.bottleneck]):
        arrays |= instance(f"down_{i}", block, residual)
    for i, block in zip((2, 1, 0), net.upsamples, strict=True):
        arrays |= convolution(f"up_{i}", block.transp_conv.conv, transposed=True)
        arrays |= instance(f"merge_{i}", block.conv_block, residual[:2])
    x = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        expected = net(x)
    agree(apply(unet.ResidualUNet(3, filters), arrays, x.numpy().transpose(0, 2, 3, 1)), expected)


def test_efficient_unet_is_that_of_segmentation_models():
    """At the sizes of B0, whose 16 blocks hold every kind of layer that B6 has."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    widths = (16, 8, 8, 4, 4)
    net = randomised(smp.Unet("efficientnet-b0", encoder_weights=None, in_channels=1, classes=2,
                              decoder_channels=widths))
    net.encoder._out_indexes = [2, 4, 10, 15]  # the ends of stages, as they are for B6; for B0 it has 8
    x = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        expected = net(x)
    module = unet.EfficientUNet(2, (1.0, 1.0), widths)
    agree(apply(module, efficient_leaves(net), x.numpy().transpose(0, 2, 3, 1)), expected)


def efficient_leaves(net):
    encoder = net.encoder
    found = convolution("stem", encoder._conv_stem) | norm("stem_norm/batch", encoder._bn0)
    for i, block in enumerate(encoder._blocks):
        here = f"block_{i}"
        if hasattr(block._expand_conv, "weight"):
            found |= convolution(f"{here}/expand", block._expand_conv) | norm(f"{here}/expand_norm/batch", block._bn0)
        found |= convolution(f"{here}/filter", block._depthwise_conv) | norm(f"{here}/filter_norm/batch", block._bn1)
        found |= dense(f"{here}/squeeze", block._se_reduce) | dense(f"{here}/excite", block._se_expand)
        found |= convolution(f"{here}/narrow", block._project_conv) | norm(f"{here}/narrow_norm/batch", block._bn2)
    for i, block in enumerate(net.decoder.blocks):
        for name in ("conv1", "conv2"):
            here, layer = f"decoder_{i}_{name}", getattr(block, name)
            found |= convolution(f"{here}/conv", layer[0]) | norm(f"{here}/norm/batch", layer[1])
    return found | convolution("classify", net.segmentation_head[0])


def test_unets_take_any_size():
    """Films are padded evenly to what the coarsest level needs, and the padding is cut off again."""
    module, x = unet.ResidualUNet(2, (4, 6, 8)), jax.random.normal(jax.random.key(0), (1, 21, 30, 1))
    variables, network = jax.jit(module.init)(jax.random.key(1), x), jax.jit(module.apply)
    padded = jnp.pad(x, [(0, 0), (1, 2), (1, 1), (0, 0)])
    found, whole = network(variables, x), network(variables, padded)
    assert found.shape == (1, 21, 30, 2)
    np.testing.assert_array_equal(found, whole[:, 1:22, 1:31])


def test_stochastic_depth_leaves_whole_branches_out_in_training_alone():
    block, x = unet.MBConv(8, 3, 1, 1, 0.5, jnp.float32), jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    variables = jax.jit(block.init)(jax.random.key(1), x)

    def left_out(train):
        given = dict(mutable="batch_stats", rngs={"dropout": jax.random.key(2)})
        out = jax.jit(lambda v: block.apply(v, x, train, **given)[0])(variables)
        return np.all(np.asarray(out == x), axis=(1, 2, 3))

    assert 0 < left_out(train=True).sum() < 16
    assert not left_out(train=False).any()
