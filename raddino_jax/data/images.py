"""Any X-ray file -> one 8-bit grey picture with bright bone, or one sentence on why not.

`read` takes a path or the bytes of a DICOM, PNG, JPEG, JPEG 2000, TIFF, WebP or BMP file. What a
file is, its content says; its name is never asked. Three modes map to 8 bits:

    raddino     DICOM: minimum to maximum of the whole picture, no VOI window (the recipe of the
                released RAD-DINO). Other files: 8-bit pictures stay as they are, deeper ones are
                stretched from minimum to maximum, unless they are an 8-bit picture in a wider box
    voi         the same after the first VOI LUT or window of the DICOM header, if there is one
    percentile  from the 1st to the 99th percentile, for every file

Whatever cannot be read faithfully raises an ImageError. Its message names what was expected and
what was found, never a value of a DICOM tag: those may say who the patient is. For the same reason
errors of the decoding libraries, which quote the file, are not chained.
"""

import contextlib
import dataclasses
import io
import os
import re
import stat
import struct
import zlib

import numpy as np
from PIL import Image, ImageFile

MODES = ("raddino", "voi", "percentile")
PERCENTILES = (1, 99)


class ImageError(ValueError):
    """A file that gives no picture; the message is a sentence for a person."""


class NotAnImage(ImageError):
    """By its content the file is something else."""


class Unreadable(ImageError):
    """The file system does not hand the file out."""


class Truncated(ImageError):
    """The file ends too early."""


class Damaged(ImageError):
    """The file is whole in length but contradicts itself."""


class TooLarge(ImageError):
    """More bytes or pixels than `Limits` allows."""


class Unsupported(ImageError):
    """A sound file of a kind that is not read, or not one radiograph."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest file (bytes) and picture (pixels) worth opening: a small file may unpack to much.

    The default is four times the largest digital radiograph (43 cm at 0.1 mm).
    """

    max_pixels: int = 80_000_000
    max_bytes: int = 256 * 2**20


LIMITS = Limits()


def read(
    source: str | os.PathLike | bytes, mode: str = "raddino", limits: Limits = LIMITS
) -> np.ndarray:
    """A path or the bytes of a file -> uint8 [H, W], bright bone, ready to train on."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    stored, dataset = _load(source, limits)
    with refusing("picture"):
        if dataset is not None:
            from raddino_jax.data import dicom

            grey = _stretch(dicom.displayed(stored, dataset, window=mode == "voi"), mode)
            # After the window, whose centre refers to the values before inversion. A constant
            # picture says nothing and stays black.
            return 255 - grey if dicom.inverted(dataset) and grey.any() else grey
        narrow = None if mode == "percentile" else _narrow(stored)
        return _stretch(stored, mode) if narrow is None else narrow


def read_raw(source: str | os.PathLike | bytes, limits: Limits = LIMITS) -> np.ndarray:
    """The stored numbers [H, W] (uint8, uint16, int16, float32, ...), before any mapping.

    Of a DICOM file: no rescale, no window, MONOCHROME1 as it is. Of others: orientation applied.
    """
    return _load(source, limits)[0]


def resize_short_side(array: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W] -> uint8, shorter side `size`, longer side rounded down, PIL bicubic."""
    if array.dtype != np.uint8 or array.ndim != 2:
        raise TypeError(f"expected uint8 [H, W], found {array.dtype} {list(array.shape)}")
    height, width = array.shape
    short = min(height, width)
    new = (size * width // short, size * height // short)
    check_size(*new, LIMITS)
    return np.asarray(Image.fromarray(array).resize(new, Image.Resampling.BICUBIC))


# What a file is.

J2K_START = b"\xff\x4f\xff\x51"  # of a codestream, inside a JP2 file too
MAGIC = (  # (kind, offset, bytes); DICOM first, its preamble may look like a TIFF
    ("dicom", 128, b"DICM"),
    ("png", 0, b"\x89PNG\r\n\x1a\n"),
    ("jpeg", 0, b"\xff\xd8\xff"),
    ("jpeg2000", 0, b"\0\0\0\x0cjP  \r\n\x87\n"),
    ("jpeg2000", 0, J2K_START),
    ("tiff", 0, b"II*\0"),
    ("tiff", 0, b"MM\0*"),
    ("tiff", 0, b"II+\0"),
    ("tiff", 0, b"MM\0+"),
    ("webp", 8, b"WEBPVP8"),
)
STRANGERS = (
    (b"<", "an HTML or XML page"),
    (b"version https://git-lfs", "a git-lfs pointer (`git lfs pull` fetches the file)"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"GIF8", "a GIF"),
)
HEAD = 512  # bytes that are enough to tell
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
VALUE_TYPES = set(
    "AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OW PN SH SL SQ SS ST TM UI UL UN US UT".split()
)


def sniff(data: bytes) -> str | None:
    """The format by content: dicom, png, jpeg, jpeg2000, tiff, webp, bmp; None if no image.

    The first 512 bytes are enough.
    """
    for kind, offset, magic in MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return kind
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in BMP_HEADERS:
        return "bmp"
    return "dicom" if _starts_like_a_dataset(data) else None


def is_candidate(path: str | os.PathLike) -> bool:
    """Whether the file begins like an image that `read` knows; False for folders and pipes."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return sniff(file.read(HEAD)) is not None
    except OSError:
        return False


def _starts_like_a_dataset(data: bytes) -> bool:
    """DICOM without the 128-byte preamble starts with a short element of group 2 or 8."""
    if len(data) < 16:
        return False
    group, element, length = struct.unpack("<HHI", data[:8])
    if data[4:6].decode("latin-1") in VALUE_TYPES:
        return group in (0x0002, 0x0008, 0x0800)  # the last one: 8, in big endian
    return group in (0x0002, 0x0008) and element <= 0x0100 and length < 256


def _stranger(data: bytes) -> str:
    if not data:
        return "an empty file"
    start = data[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data.strip(b"\0"):
        return "nothing but zeros"
    return next((name for magic, name in STRANGERS if start.startswith(magic)), "something else")


# Bytes -> (stored values [H, W], DICOM header or None).


def _load(source, limits: Limits):
    # Another library may have switched this on for the whole process; half a picture is none.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    data = _bytes_of(source, limits)
    kind = sniff(data[:HEAD])
    if kind is None:
        raise NotAnImage(
            "expected an image (DICOM, PNG, JPEG, JPEG 2000, TIFF, WebP or BMP), "
            f"found {_stranger(data)}"
        )
    with refusing(kind):
        if kind == "dicom":
            # dicom.py builds on this module; here pydicom is loaded by the first file that needs it.
            from raddino_jax.data import dicom

            dataset = dicom.header(data, limits)
            return dicom.stored_values(dataset, limits), dataset
        return {"png": _png, "jpeg": _jpeg, "tiff": _tiff}.get(kind, _picture)(
            data, kind, limits
        ), None


def _bytes_of(source, limits: Limits) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would wait for ever
                raise NotAnImage("expected a file, found a folder or a device")
            with open(source, "rb") as file:
                data = file.read(limits.max_bytes + 1)
        except OSError as error:
            raise Unreadable(f"the file cannot be opened: {error.strerror}") from None
    if len(data) > limits.max_bytes:
        raise TooLarge(f"expected at most {limits.max_bytes:,} bytes, found more")
    return data


@contextlib.contextmanager
def refusing(kind: str):
    """Whatever a decoding library raises on a bad file becomes an ImageError without its words."""
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        raise TooLarge(f"this {kind} file unpacks to more than fits into memory") from None
    except Exception as error:  # a mutated header makes the libraries raise nearly anything
        if isinstance(error, EOFError) or re.search("truncated|Premature end of JPEG", str(error)):
            raise Truncated(f"expected a whole {kind} file, found one that is cut off") from None
        raise Damaged(
            f"expected a sound {kind} file, found one that does not decode ({type(error).__name__})"
        ) from None


def check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise Damaged(f"expected at least one pixel, found a size of {width} x {height}")
    if width * height > limits.max_pixels:
        raise TooLarge(f"expected at most {limits.max_pixels:,} pixels, found {width} x {height}")


# Pictures that Pillow opens.

INTEGER_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE = 274, 262, 258  # TIFF tags, the first one EXIF too
UPRIGHT = {  # EXIF orientation -> what turns the stored rows upright
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[::-1],
}


def _open(data: bytes, kind: str, limits: Limits) -> Image.Image:
    """The header only; refuses what is too large or more than one picture."""
    image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    check_size(*image.size, limits)
    # A JPEG with further frames (MPO) holds previews of the first one; nothing else does so surely.
    if kind != "jpeg" and getattr(image, "n_frames", 1) > 1:
        raise Unsupported(f"expected one picture, found {image.n_frames} in one file")
    return image


def _grey(image: Image.Image) -> np.ndarray:
    """Pillow image -> [H, W]: 8-bit as luma without alpha, deeper ones as they are."""
    if image.mode in INTEGER_MODES:
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.array(image)
    if image.mode not in GREY_MODES:
        raise Unsupported("expected grey, RGB, CMYK or palette colours, found another colour space")
    return np.array(image.convert("L"))


def _upright(values: np.ndarray, image: Image.Image) -> np.ndarray:
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1), lambda a: a)
    return np.ascontiguousarray(turn(values))


def _picture(data: bytes, kind: str, limits: Limits) -> np.ndarray:
    image = _open(data, kind, limits)
    if kind == "jpeg2000":
        _, precision, _, _, components = codestream(data[data.find(J2K_START) :])
        if precision > 8 and components > 1:  # Pillow would keep the upper byte alone
            raise Unsupported(f"expected 8-bit colour, found {precision} bits; save it as grey")
    return _upright(_grey(image), image)


def _tiff(data: bytes, kind: str, limits: Limits) -> np.ndarray:
    image = _open(data, kind, limits)
    depths = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
    white_is_zero = image.tag_v2.get(PHOTOMETRIC) == 0
    if len(depths) > 1 and max(depths) > 8:
        raise Unsupported(f"expected 8-bit colour, found {max(depths)} bits; save it as grey")
    values = _grey(image)  # Pillow turns a TIFF upright by itself
    if white_is_zero and values.dtype != np.uint8:  # and inverts it up to 8 bits only
        white = 65535 if values.dtype == np.uint16 else values.max() + values.min()
        values = white - values
    return values


def _jpeg(data: bytes, kind: str, limits: Limits) -> np.ndarray:
    image = _open(data, kind, limits)
    check_scans(data)
    if image.mode not in ("L", "RGB"):
        return _upright(_grey(image), image)
    return _upright(luma(libjpeg(data)), image)


def check_scans(data: bytes) -> None:
    """A progressive JPEG may revisit every pixel in each of thousands of scans: minutes per file.

    Encoders write about ten. A marker inside compressed data is always escaped, so counting works.
    """
    if data.count(b"\xff\xda") > 200:
        raise Unsupported("expected a JPEG of at most 200 scans, found more")


def libjpeg(data: bytes) -> np.ndarray:
    """JPEG bytes -> uint8 [H, W] or [H, W, 3].

    Not through Pillow: it silences the warnings of libjpeg, and a scan with a hole in it comes back
    as a picture that is shifted and grey from there on. TensorStore takes them for errors. That
    finds about half of all damage inside a scan; JPEG has no checksum to find the rest.
    """
    import tensorstore as ts

    context = ts.Context()
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    store.write("jpeg", data).result()
    spec = {"driver": "jpeg", "kvstore": {"driver": "memory", "path": "jpeg"}}
    pixels = ts.open(spec, context=context).result().read().result()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def luma(pixels: np.ndarray) -> np.ndarray:
    """[H, W] as it is, [H, W, 3] by the weights and the rounding of Pillow."""
    if pixels.ndim == 2:
        return pixels
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 32768 >> 16).astype(pixels.dtype)


FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG and JPEG-LS markers


def codestream(frame: bytes) -> tuple[int, int, int, int, int]:
    """Header of a JPEG, JPEG-LS or JPEG 2000 stream -> marker, bits, rows, columns, components."""
    if frame.startswith(J2K_START):
        right, bottom, left, top = struct.unpack(">4I", frame[8:24])
        components, depth = struct.unpack(">HB", frame[40:43])
        return 0x51, (depth & 0x7F) + 1, bottom - top, right - left, components
    position = 2
    while True:
        mark, marker, length = struct.unpack(">BBH", frame[position : position + 4])
        if mark != 0xFF or marker == 0xDA:
            raise Damaged("expected a JPEG frame header before the scan, found none")
        if marker == 0xFF:  # a filler
            position += 1
            continue
        if marker in FRAME_HEADERS:
            return marker, *struct.unpack(">BHHB", frame[position + 4 : position + 10])
        position += 2 + length


# PNG: Pillow checks neither the checksums nor whether all rows are there (missing ones come back
# black), and keeps only the upper byte of 16-bit colour.

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
ADAM7 += [(0, 1, 1, 2)]  # passes of an interlaced PNG: first column and row, steps between them


def _png(data: bytes, kind: str, limits: Limits) -> np.ndarray:
    header, packed = _png_chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    check_size(width, height, limits)
    bits = depth * CHANNELS[colour]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    grids = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    size = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in grids if columns > 0)
    lines = zlib.decompressobj().decompress(packed, size)
    if len(lines) < size:
        raise Truncated(f"expected {size:,} bytes of PNG rows, found {len(lines):,}")
    image = _open(data, kind, limits)
    if depth < 16 or colour == 0:
        return _upright(_grey(image), image)
    if interlaced:
        raise Unsupported("expected 16-bit colour in plain rows, found it interlaced")
    samples = _png_samples(lines, width, height, CHANNELS[colour])
    return _upright(luma(samples[..., :3]) if colour != 4 else samples[..., 0], image)


def _png_chunks(data: bytes) -> tuple[bytes, bytes]:
    """-> (header, compressed rows), every checksum compared up to the end mark."""
    header, packed, position = b"", [], 8
    while True:
        if position + 12 > len(data):
            raise Truncated("expected a PNG up to its end mark, found one that is cut off")
        length, name = struct.unpack(">I4s", data[position : position + 8])
        end = position + 12 + length
        if end > len(data):
            raise Truncated(f"expected a PNG of at least {end:,} bytes, found {len(data):,}")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Damaged("expected PNG checksums that match, found one that does not")
        body, position = data[position + 8 : end - 4], end
        if name == b"IHDR":
            header = body
        elif name == b"IDAT":
            packed.append(body)
        elif name == b"IEND":
            return header, b"".join(packed)


def _png_samples(lines: bytes, width: int, height: int, channels: int) -> np.ndarray:
    """Filtered rows of 16-bit samples -> uint16 [H, W, channels].

    A pixel is predicted from its left, upper and upper left neighbours, so all pixels of one
    anti-diagonal can be undone at once: about a second for 4 million pixels.
    """
    rows = np.frombuffer(lines, np.uint8).reshape(height, -1)
    filters, coded = rows[:, 0], rows[:, 1:].reshape(height, width, 2 * channels)
    plain = np.zeros((height + 1, width + 1, 2 * channels), np.int16)  # a border of zeros
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, up, corner = plain[y + 1, x], plain[y, x + 1], plain[y, x]
        to_left, to_up = abs(up - corner), abs(left - corner)
        to_corner = abs(left + up - 2 * corner)
        nearest = np.where(to_up <= to_corner, up, corner)
        nearest = np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
        guesses = [np.zeros_like(left), left, up, (left + up) // 2, nearest]
        plain[y + 1, x + 1] = (coded[y, x] + np.choose(filters[y, None], guesses)) & 255
    plain = plain[1:, 1:].astype(np.uint16)
    return plain[..., 0::2] * 256 + plain[..., 1::2]


# Any values -> 8 bits.


def _narrow(values: np.ndarray) -> np.ndarray | None:
    """The 8-bit picture itself, where the values are one in a wider box; else None.

    Boxes: 16 bits by 257, any shift by up to 8 bits (12-bit data in a 16-bit PNG), floats in
    [0, 1]. Stretching those from minimum to maximum would change a picture that is complete.
    """
    if values.dtype == np.uint8:
        return values
    if values.min() == values.max() or values.min() < 0:
        return None
    if values.dtype.kind == "f":
        scaled = np.rint(values * 255) if values.max() <= 1 else values
        exact = scaled is not values and np.abs(scaled - values * 255).max() < 1e-3
        return scaled.astype(np.uint8) if exact else None
    used = int(np.bitwise_or.reduce(values, axis=None))
    step = min(used & -used, 256) if (values % 257).any() else 257  # the lowest bit ever set
    return (values // step).astype(np.uint8) if values.max() // step <= 255 else None


def _stretch(values: np.ndarray, mode: str) -> np.ndarray:
    """[low, high] -> [0, 255], rounded; a constant picture -> zeros."""
    if not np.isfinite(values).all():
        raise Damaged("expected finite pixel values, found infinite ones or NaN")
    if mode == "percentile":
        low, high = np.percentile(values, PERCENTILES)
    else:
        low, high = values.min(), values.max()
    low, high = float(low), float(high)
    if not low < high:
        return np.zeros(values.shape, np.uint8)
    grey = values.astype(np.float32 if values.itemsize <= 2 else np.float64)
    grey -= low
    grey *= 255 / (high - low)
    return np.clip(np.rint(grey, out=grey), 0, 255, out=grey).astype(np.uint8)
