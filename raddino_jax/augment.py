"""Views of a radiograph, made on the device: DINOv2's multi-crop augmentation as RAD-DINO uses it.

RAD-DINO: arXiv 2401.10815, section 3.2 and appendix E.1; DINOv2: arXiv 2304.07193. A view is drawn
first (`draw`: a few numbers) and applied afterwards. An operation whose coin says no gets a neutral
parameter, so there is no branch to compile. Operations work on levels, whole numbers in 0..255 held
as float32, and round as the PIL operation that they stand for. A radiograph has one channel:
saturation, hue and conversion to grey, which DINOv2 has besides, leave it as it is.

Letters: B images, V local views, H and W image height and width, G and L side of a global and of a
local view.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

KINDS = ("global1", "global2", "local")
CROP_TRIES = 10
BLUR_RADIUS = 4  # 9 taps
NO_SOLARIZE = 256.0
GREY_LEVEL = 1 / 255
TAP_STEPS = 2**15  # 255 levels times these times the 1.25 of a kernel's absolute taps stay below 2^24


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """What a view may look like. Defaults: RAD-DINO's; DINOv2's where the paper leaves it open."""

    global_size: int = 518
    local_size: int = 196
    local_crops: int = 8
    # "side": a crop's side is U(scale) of the image's, in the paper's words U(259, 518) and
    # U(104, 259) of 518 px. "area": its area is, which is what torchvision makes of such numbers.
    crop_scale_mode: str = "side"
    global_scale: tuple[float, float] = (0.5, 1.0)
    local_scale: tuple[float, float] = (0.2, 0.5)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Probabilities. Solarisation acts on the second global view alone.
    flip: float = 0.5
    jitter: float = 0.8
    blur_global1: float = 0.0
    blur_global2: float = 0.1
    blur_local: float = 0.5
    solarize: float = 0.2
    # Strengths x: a factor is U(1 - x, 1 + x), the exponent of the gamma curve exp(U(-x, x)), the
    # standard deviation of the added noise U(0, x) in units of the normalised view.
    brightness: float = 0.4
    contrast: float = 0.4
    gamma: float = 0.0
    noise: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_threshold: int = 128
    standardize: bool = False  # zero mean and unit variance in each view, whatever the exposure

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):  # a config read from JSON
                object.__setattr__(self, field.name, tuple(value))
        if self.crop_scale_mode not in ("side", "area"):
            raise ValueError(f"crop_scale_mode is {self.crop_scale_mode!r}, not 'side' or 'area'")
        for name in ("global_scale", "local_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is ({low}, {high}), not an interval of positive numbers")


RAD_DINO = ViewSettings()

# What the reference does, and did for the released weights: it passes its blur probabilities to a
# parameter of the opposite meaning, so view 1 is never blurred and view 2 nearly always.
DINOV2 = ViewSettings(
    global_size=224,
    local_size=98,
    crop_scale_mode="area",
    global_scale=(0.32, 1.0),
    local_scale=(0.05, 0.32),
    blur_global2=0.9,
)


class Draw(NamedTuple):
    """Parameters of one view. Neutral: factors and gamma 1, sigma and noise 0, threshold 256."""

    box: Array  # int32 [4]: top, left, height, width
    flip: Array
    brightness: Array
    contrast: Array
    brightness_first: Array
    gamma: Array
    sigma: Array
    threshold: Array
    noise: Array
    noise_key: Array


def crop_box(
    u: Array, shape: tuple[int, int], scale: Array, ratio: tuple[float, float], mode: str
) -> Array:
    """Crop box, int32 [4], from uniform numbers u [4, tries].

    In mode "area" it is torchvision's RandomResizedCrop: area = fraction * H * W, the fraction from
    U(scale), the aspect log-uniform in `ratio`, w = round(sqrt(area * aspect)) and
    h = round(sqrt(area / aspect)); the first box that fits counts, else the largest central one. In
    mode "side" area = fraction^2 * H * W: sqrt(area), the side of a square crop, is U(scale) of the
    image's side. Large boxes fit less often: of RAD-DINO's U(259, 518) the median is 371, not 388.
    """
    height, width = shape
    fraction = scale[0] + (scale[1] - scale[0]) * u[0]
    area = (jnp.square(fraction) if mode == "side" else fraction) * height * width
    aspect = jnp.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = jnp.floor(u[2] * (height - h + 1)), jnp.floor(u[3] * (width - w + 1))
    first = jnp.stack([top, left, h, w])[:, jnp.argmax(fits)].astype(jnp.int32)
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return jnp.where(fits.any(), first, jnp.array([(height - h) // 2, (width - w) // 2, h, w]))


def draw(key: Array, settings: ViewSettings, shape: tuple[int, int], kind: Array | int) -> Draw:
    """Parameters of one view of an image of `shape` (H, W); `kind` is an index of KINDS."""
    s = settings
    scale = jnp.array([s.global_scale, s.global_scale, s.local_scale])[kind]
    blur = jnp.array([s.blur_global1, s.blur_global2, s.blur_local])[kind]
    solarize = jnp.array([0.0, s.solarize, 0.0])[kind]
    # All numbers in one call of the generator: a call for each takes far longer to compile.
    key, noise_key = jax.random.split(key)
    names = "flip jitter brightness contrast order gamma blur sigma solarize noise".split()
    numbers = jax.random.uniform(key, (len(names) + 4 * CROP_TRIES,))
    u = dict(zip(names, numbers[: len(names)], strict=True))

    def uniform(name: str, low: float, high: float) -> Array:
        return low + (high - low) * u[name]

    def factor(name: str, x: float) -> Array:
        return jnp.where(u["jitter"] < s.jitter, uniform(name, max(0.0, 1 - x), 1 + x), 1.0)

    crop = numbers[len(names) :].reshape(4, CROP_TRIES)
    return Draw(
        box=crop_box(crop, shape, scale, s.crop_ratio, s.crop_scale_mode),
        flip=u["flip"] < s.flip,
        brightness=factor("brightness", s.brightness),
        contrast=factor("contrast", s.contrast),
        brightness_first=u["order"] < 0.5,
        gamma=jnp.exp(uniform("gamma", -s.gamma, s.gamma)),
        sigma=jnp.where(u["blur"] < blur, uniform("sigma", *s.blur_sigma), 0.0),
        threshold=jnp.where(u["solarize"] < solarize, float(s.solarize_threshold), NO_SOLARIZE),
        noise=uniform("noise", 0.0, s.noise),
        noise_key=noise_key,
    )


def _cubic(x: Array) -> Array:
    """Keys' cubic convolution kernel with a = -0.5, PIL's BICUBIC (torch's has -0.75)."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _resampling(
    start: Array, length: Array, pixels: int, size: int, flip: Array | bool = False
) -> Array:
    """Matrix [size, pixels] that resamples pixels start .. start + length - 1 of a line to `size`.

    Antialiased as in PIL: when shrinking, the kernel is stretched by the scale. Taps outside the
    crop count as absent and the others are renormalised, as if the crop had been cut out first.

    Taps are whole multiples of 1 / TAP_STEPS (PIL's, of 2^-22). Sums of their products with levels are then exact in
    float32: no level depends on the order in which a device, or a share of the batch, adds them.
    """
    scale = length / size
    target = jnp.arange(size)
    centre = (jnp.where(flip, size - 1 - target, target) + 0.5) * scale
    pixel = jnp.arange(pixels)[None] - start
    taps = _cubic((pixel + 0.5 - centre[:, None]) / jnp.maximum(scale, 1.0))
    taps = jnp.where((pixel >= 0) & (pixel < length), taps, 0.0)
    return jnp.round(TAP_STEPS * taps / taps.sum(-1, keepdims=True)) / TAP_STEPS


def _levels(x: Array) -> Array:
    return jnp.floor(jnp.clip(x, 0, 255) + 0.5)


def resized_crop(x: Array, box: Array, size: int, flip: Array | bool = False) -> Array:
    """Levels [H, W] -> [size, size]: cut out the box (top, left, height, width), resize, mirror.

    Bicubic, as two matrix products, across then down, with PIL's rounding between them. Under vmap
    the crops of an image are one product. It takes the whole float32: the bfloat16 or TF32 products
    that accelerators prefer are off by a level or two.
    """
    top, left, height, width = box
    across = _resampling(left, width, x.shape[1], size, flip)
    down = _resampling(top, height, x.shape[0], size)
    highest = jax.lax.Precision.HIGHEST
    x = _levels(jnp.einsum("hw,ow->ho", x, across, precision=highest))
    return _levels(jnp.einsum("ph,ho->po", down, x, precision=highest))


def brightness(x: Array, factor: Array | float) -> Array:
    """Blend with black: factor * level, truncated as PIL does."""
    return jnp.trunc(jnp.clip(factor * x, 0, 255))


def contrast(x: Array, factor: Array | float) -> Array:
    """Blend with the image's mean level, which PIL rounds to a whole number first."""
    mean = jnp.floor(x.mean((-2, -1), keepdims=True) + 0.5)
    return jnp.trunc(jnp.clip(mean + factor * (x - mean), 0, 255))


def gamma_curve(x: Array, gamma: Array | float) -> Array:
    """Power law that keeps black and white, as another exposure or display curve would."""
    return jnp.round(255 * jnp.power(x / 255, gamma))


def gaussian_blur(x: Array, sigma: Array | float) -> Array:
    """9 x 9 Gaussian with reflected borders; sigma 0 leaves the image as it is.

    Separable, and a sum of shifted copies: with weights that differ from image to image it would be
    a grouped convolution, slow on every backend.
    """
    offset = jnp.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    # At sigma 0.01 every weight but the centre's underflows to 0.
    kernel = jnp.exp(-0.5 * jnp.square(offset / jnp.maximum(sigma, 0.01)))
    kernel /= kernel.sum()
    for axis in (x.ndim - 1, x.ndim - 2):
        margin = [(BLUR_RADIUS, BLUR_RADIUS) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(x, margin, mode="reflect")
        x = sum(
            kernel[k] * jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis)
            for k in range(kernel.size)
        )
    return jnp.round(x)


def solarize(x: Array, threshold: Array | float) -> Array:
    """Invert the levels from `threshold` on."""
    return jnp.where(x < threshold, x, 255 - x)


def standardize(x: Array) -> Array:
    """Grey values in [0, 1] to zero mean and unit variance over the last two axes.

    A crop may be black all over, or nearly so, and must not become a picture of its rounding. So values count from the
    first pixel's, which makes a constant image zero to the last digit, and the variance has a floor: that of one grey
    level is added to it.
    """
    x = x - x[..., :1, :1]
    x = x - x.mean((-2, -1), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean((-2, -1), keepdims=True) + GREY_LEVEL**2)


def _apply(image: Array, view: Draw, settings: ViewSettings, size: int, blurs: bool) -> Array:
    """Levels [H, W] -> [size, size]. `blurs`: whether views of this size are ever blurred."""
    x = resized_crop(image, view.box, size, view.flip)
    x = brightness(x, jnp.where(view.brightness_first, view.brightness, 1.0))
    x = contrast(x, view.contrast)
    x = brightness(x, jnp.where(view.brightness_first, 1.0, view.brightness))
    x = gamma_curve(x, view.gamma) if settings.gamma else x
    x = gaussian_blur(x, view.sigma) if blurs else x
    return solarize(x, view.threshold)


def _normalize(x: Array, view: Draw, settings: ViewSettings, mean: float, std: float) -> Array:
    x = standardize(x / 255) if settings.standardize else (x / 255 - mean) / std
    if settings.noise:  # drawn flat, which compiles in half the time
        x += view.noise * jax.random.normal(view.noise_key, (x.size,)).reshape(x.shape)
    return x


def views(
    key: Array,
    images: Array,
    settings: ViewSettings,
    slots: Array,
    mean: float,
    std: float,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, Array]:
    """Two global and V local views: {"global": [B, 2, G, G, 1], "local": [B, V, L, L, 1]}.

    Args:
      key: one per step.
      images: uint8 [B, H, W].
      slots: int [B], each image's place in the global batch. Every view has a key of its own, made
        of `key`, slot and number of the view: no draw depends on how devices share the batch.
      mean, std: of level / 255; not used where each view is standardised by itself.
    """
    s, shape = settings, images.shape[1:]

    def make(image, drawn, size, blurs):
        def one(view):
            x = _apply(image, view, s, size, blurs)
            return _normalize(x, view, s, mean, std).astype(dtype)[..., None]

        return jax.vmap(one)(drawn)

    def of_image(key, image):
        kinds = jnp.array([0, 1] + [2] * s.local_crops)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(kinds.size))
        drawn = jax.vmap(lambda key, kind: draw(key, s, shape, kind))(keys, kinds)
        pair, crops = jax.tree.map(lambda x: x[:2], drawn), jax.tree.map(lambda x: x[2:], drawn)
        image = image.astype(jnp.float32)
        return {
            "global": make(image, pair, s.global_size, s.blur_global1 + s.blur_global2 > 0),
            "local": make(image, crops, s.local_size, s.blur_local > 0),
        }

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots)
    return jax.vmap(of_image)(keys, images)
