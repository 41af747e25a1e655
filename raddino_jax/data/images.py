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
import itertools
import os
import re
import stat
import struct
import subprocess
import sys
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
    with _refusing("picture"):
        if dataset is not None:
            values = _modality(stored, dataset)
            values = _voi(values, dataset) if mode == "voi" else values
            grey = _stretch(values, mode)
            # After the window, whose centre refers to the values before inversion. A constant
            # picture says nothing and stays black.
            return 255 - grey if _inverted(dataset) and grey.any() else grey
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
    _check_size(*new, LIMITS)
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
    with _refusing(kind):
        if kind == "dicom":
            dataset = _dataset(data, limits)
            return _dicom_pixels(dataset, limits), dataset
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
def _refusing(kind: str):
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


def _check_size(width: int, height: int, limits: Limits) -> None:
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
    _check_size(*image.size, limits)
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
        _, precision, _, _, components = _codestream(data[data.find(J2K_START) :])
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
    _check_scans(data)
    if image.mode not in ("L", "RGB"):
        return _upright(_grey(image), image)
    return _upright(_luma(_libjpeg(data)), image)


def _check_scans(data: bytes) -> None:
    """A progressive JPEG may revisit every pixel in each of thousands of scans: minutes per file.

    Encoders write about ten. A marker inside compressed data is always escaped, so counting works.
    """
    if data.count(b"\xff\xda") > 200:
        raise Unsupported("expected a JPEG of at most 200 scans, found more")


def _libjpeg(data: bytes) -> np.ndarray:
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


def _luma(pixels: np.ndarray) -> np.ndarray:
    """[H, W] as it is, [H, W, 3] by the weights and the rounding of Pillow."""
    if pixels.ndim == 2:
        return pixels
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 32768 >> 16).astype(pixels.dtype)


# PNG: Pillow checks neither the checksums nor whether all rows are there (missing ones come back
# black), and keeps only the upper byte of 16-bit colour.

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
ADAM7 += [(0, 1, 1, 2)]  # passes of an interlaced PNG: first column and row, steps between them


def _png(data: bytes, kind: str, limits: Limits) -> np.ndarray:
    header, packed = _png_chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    _check_size(width, height, limits)
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
    return _upright(_luma(samples[..., :3]) if colour != 4 else samples[..., 0], image)


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


# DICOM.

# All that is ever looked at: nothing about the patient is decoded.
TAGS = (
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns "
    "BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept "
    "ModalityLUTSequence VOILUTSequence VOILUTFunction WindowCenter WindowWidth "
    "PresentationLUTShape RedPaletteColorLookupTableDescriptor RedPaletteColorLookupTableData "
    "GreenPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableDescriptor BluePaletteColorLookupTableData "
    "FloatPixelData DoubleFloatPixelData PixelData"
).split()
OVERLAY_BIT_POSITIONS = [(group, 0x0102) for group in range(0x6000, 0x6020, 2)]
DEFLATED = b"1.2.840.10008.1.2.1.99"
IMPLICIT, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
NATIVE = (IMPLICIT, "1.2.840.10008.1.2.1", EXPLICIT_BIG)
RLE = "1.2.840.10008.1.2.5"


def _pydicom():
    import logging
    import warnings

    import pydicom

    # Its warnings quote the values they object to.
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return pydicom


def _dataset(data: bytes, limits: Limits):
    """The imaging part of a DICOM header, with the defaults that cannot change the picture."""
    pydicom = _pydicom()
    if DEFLATED in data[132:4096]:
        data = _inflate(data, limits)
    tags = [*TAGS, *OVERLAY_BIT_POSITIONS]
    dataset = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=tags)
    if not dataset.get("PixelData"):
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise Unsupported("expected whole numbers as DICOM pixels, found floating point")
        if "Rows" in dataset:
            raise Truncated("expected pixels after the DICOM header, found none")
        raise NotAnImage("expected a DICOM image, found a DICOM object without pixels")
    return dataset


def _inflate(data: bytes, limits: Limits) -> bytes:
    """A deflated data set, unpacked no further than the limit; its meta header ends where group 2's
    first element says."""
    start = 144 + int.from_bytes(data[140:144], "little")
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limits.max_bytes + 1)
    if len(plain) > limits.max_bytes:
        raise TooLarge(f"expected at most {limits.max_bytes:,} bytes, found more after unpacking")
    return plain


def _whole(dataset, name: str, default: int | None = None) -> int:
    value = dataset.get(name)
    if value is None or value == "":
        if default is None:
            raise Damaged(f"expected the DICOM attribute {name}, found none")
        return default
    return int(value)


def _number(dataset, name: str) -> float | None:
    """The first value of an attribute; None where it is absent or empty."""
    value = dataset.get(name)
    if value is None or value == "" or value == []:
        return None
    first = float(value if isinstance(value, (str, float, int)) else np.ravel(value)[0])
    if not np.isfinite(first):
        raise Damaged(f"expected a finite {name} in the DICOM header, found none")
    return first


def _photometric(dataset) -> str:
    return str(dataset.get("PhotometricInterpretation") or "").strip().upper()


def _inverted(dataset) -> bool:
    """Shape INVERSE belongs to MONOCHROME1 and says the same thing again, so it counts once."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    return _photometric(dataset) == "MONOCHROME1" or shape == "INVERSE"


def _dicom_pixels(dataset, limits: Limits) -> np.ndarray:
    """Header and pixel bytes -> stored values [H, W]."""
    rows, columns = _whole(dataset, "Rows"), _whole(dataset, "Columns")
    samples, frames = _whole(dataset, "SamplesPerPixel", 1), _whole(dataset, "NumberOfFrames", 1)
    _check_size(columns, rows, limits)
    if frames > 1:  # a film loop or a tomosynthesis; its first frame is no radiograph
        raise Unsupported(f"expected one DICOM frame, found {frames}")
    if samples not in (1, 3):
        raise Unsupported(f"expected 1 or 3 samples per pixel, found {samples}")
    syntax = _syntax(dataset)
    if syntax in NATIVE:
        pixels = _native(dataset, (rows, columns, samples))
        pixels = _used_bits(pixels, dataset)
    else:
        pixels = _unpacked(dataset, syntax, (rows, columns, samples))
    return _one_channel(pixels, dataset)


def _syntax(dataset) -> str:
    """The transfer syntax; a file without a meta header is told by how its elements are written."""
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if syntax and str(syntax) != DEFLATED.decode():
        return str(syntax)
    if dataset["PixelData"].is_undefined_length:
        raise Unsupported("expected a DICOM transfer syntax, found compressed pixels without one")
    return NATIVE[1] if dataset.original_encoding[1] else EXPLICIT_BIG


def _native(dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """Uncompressed pixel bytes -> [H, W] or [H, W, 3]."""
    rows, columns, samples = shape
    data, allocated = dataset.PixelData, _whole(dataset, "BitsAllocated")
    if allocated not in (8, 16, 32):
        raise Unsupported(f"expected 8, 16 or 32 bits per sample, found {allocated}")
    if _photometric(dataset) in ("YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420"):
        raise Unsupported("expected full-size colour planes in the DICOM file, found halved ones")
    width = allocated // 8
    size = rows * columns * samples * width
    # Writers pad to an even length. More than a row or a column left over means that Rows or
    # Columns is wrong, and the picture would come out sheared.
    if not size <= len(data) < size + max(2, min(rows, columns) * width):
        kind = Truncated if len(data) < size else Damaged
        raise kind(f"expected {size:,} bytes of DICOM pixels, found {len(data):,}")
    big = not dataset.original_encoding[1]
    if big and width == 1 and dataset["PixelData"].VR == "OW":  # bytes, swapped as words
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    pixels = np.frombuffer(data, f"{'>' if big else '<'}u{width}", rows * columns * samples)
    return _arranged(pixels.astype(f"u{width}"), dataset, shape)


def _arranged(pixels: np.ndarray, dataset, shape: tuple[int, int, int]) -> np.ndarray:
    rows, columns, samples = shape
    if samples == 1:
        return pixels.reshape(rows, columns)
    if _whole(dataset, "PlanarConfiguration", 0) == 1:
        return np.moveaxis(pixels.reshape(samples, rows, columns), 0, -1)
    return pixels.reshape(rows, columns, samples)


def _used_bits(pixels: np.ndarray, dataset) -> np.ndarray:
    """Unsigned containers -> values: overlay bits dropped, sign extended, left-aligned ones moved.

    Bits beyond the declared ones that nothing explains are refused: masked they would wrap around,
    and which of header and pixels is wrong cannot be known.
    """
    allocated = 8 * pixels.itemsize
    stored = _whole(dataset, "BitsStored", allocated)
    top = _whole(dataset, "HighBit", stored - 1) + 1
    if not 0 < stored <= top <= allocated:
        raise Damaged(f"expected at most {allocated} bits, found {stored} stored up to bit {top}")
    for tag in OVERLAY_BIT_POSITIONS:
        if tag in dataset and top <= int(dataset[tag].value or 0) < allocated:
            pixels = pixels & ~pixels.dtype.type(1 << int(dataset[tag].value))
    beyond = pixels >> top if top < allocated else np.zeros_like(pixels)
    if _whole(dataset, "PixelRepresentation", 0) == 0:
        sound, values = not beyond.any(), pixels
    else:
        signed = pixels.view(f"i{pixels.itemsize}")
        values = signed << (allocated - top) >> (allocated - top)
        sound = bool(np.all((beyond == 0) | (values == signed)))
    if not sound:
        raise Damaged(f"expected DICOM pixels of {stored} bits, found larger values")
    return values >> (top - stored)


def _one_channel(pixels: np.ndarray, dataset) -> np.ndarray:
    """Grey as it is, palette and RGB by luma, YBR by its Y."""
    photometric = _photometric(dataset)
    if pixels.ndim == 3:
        if photometric.startswith("YBR_FULL"):
            return np.ascontiguousarray(pixels[..., 0])
        if photometric in ("RGB", "YBR_RCT", "YBR_ICT"):
            return _luma(pixels)
    elif photometric in ("MONOCHROME1", "MONOCHROME2"):
        return pixels
    elif photometric == "PALETTE COLOR":
        colours = [_table(dataset, f"{c}PaletteColorLookupTable") for c in ("Red", "Green", "Blue")]
        return _luma(np.stack([_looked_up(pixels, *colour) for colour in colours], axis=-1))
    # Without it black and white cannot be told apart.
    raise Unsupported(
        "expected a DICOM photometric interpretation of MONOCHROME1 or 2, RGB, YBR or PALETTE "
        f"COLOR that fits the samples per pixel, found {'another' if photometric else 'none'}"
    )


# Compressed DICOM frames.

FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG and JPEG-LS markers
GDCM_READS = {  # marker -> (name, transfer syntax, bits that come back right)
    0xC1: ("JPEG", "1.2.840.10008.1.2.4.51", (12,)),
    0xC3: ("lossless JPEG", "1.2.840.10008.1.2.4.57", range(8, 17)),
    0xF7: ("JPEG-LS", "1.2.840.10008.1.2.4.80", range(8, 17)),
}
GDCM_SECONDS = 60


def _unpacked(dataset, syntax: str, shape: tuple[int, int, int]) -> np.ndarray:
    """One compressed frame -> stored values, told by its own header: transfer syntaxes are wrong at
    times, and the sizes in both headers have to agree."""
    from pydicom import encaps

    buffer = io.BytesIO(dataset.PixelData)
    encaps.parse_basic_offsets(buffer)
    frame = b"".join(encaps.generate_fragments(buffer))
    if syntax == RLE:
        return _used_bits(_arranged_rle(frame, dataset, shape), dataset)
    if sniff(frame) == "jpeg2000":  # some writers leave the boxes of a JP2 file around the stream
        frame = frame[frame.find(J2K_START) :]
    elif sniff(frame) != "jpeg":
        raise Unsupported("expected pixels packed as RLE, JPEG, JPEG-LS or JPEG 2000, found others")
    kind, precision, *found = _codestream(frame)
    if tuple(found) != shape:
        raise Damaged(f"expected a frame of {_by(shape)} (DICOM header), found {_by(found)}")
    if kind == 0x51:
        import openjpeg

        pixels = openjpeg.decode(frame)
    elif precision == 8 and kind in (0xC0, 0xC1, 0xC2):
        _check_scans(frame)
        pixels = _libjpeg(frame)
        if pixels.ndim == 3:  # libjpeg has turned YCbCr into RGB
            dataset.PhotometricInterpretation = "RGB"
    else:
        pixels = _gdcm(frame, kind, precision, shape)
    return _signed(np.ascontiguousarray(pixels), precision, dataset)


def _by(shape) -> str:
    return " x ".join(map(str, shape))


def _signed(pixels: np.ndarray, precision: int, dataset) -> np.ndarray:
    """Decoders that know no sign hand out the bit pattern; the header says whether it has one."""
    if pixels.dtype.kind == "i" or _whole(dataset, "PixelRepresentation", 0) == 0:
        return pixels
    top = min(precision, _whole(dataset, "BitsStored", precision))
    shift = 8 * pixels.itemsize - top
    return pixels.view(f"i{pixels.itemsize}") << shift >> shift


def _codestream(frame: bytes) -> tuple[int, int, int, int, int]:
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


def _gdcm(frame: bytes, marker: int, precision: int, shape: tuple[int, int, int]) -> np.ndarray:
    """JPEG lossless, JPEG-LS and 12-bit JPEG through GDCM, in a process of its own.

    On damaged streams GDCM aborts the process, or only complains on stderr: a child can be watched.
    Costs about 0.15 s per file.
    """
    name, syntax, bits = GDCM_READS.get(marker, ("JPEG", "", ()))
    if precision not in bits:
        raise Unsupported(f"expected a JPEG frame of a known kind, found {name}, {precision} bits")
    if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise Truncated("expected a JPEG frame up to its end mark, found one that is cut off")
    rows, columns, samples = shape
    width = 1 if precision <= 8 else 2
    # -P: the folder of this file must not come first on the child's path.
    command = [sys.executable, "-P", __file__, syntax, *map(str, (*shape, 8 * width, precision))]
    try:
        child = subprocess.run(command, input=frame, capture_output=True, timeout=GDCM_SECONDS)
    except subprocess.TimeoutExpired:
        raise Damaged(f"expected a JPEG frame to decode in {GDCM_SECONDS} s, gave up") from None
    complaint = re.search(rb"Corrupt JPEG|Premature end", child.stderr)
    if child.returncode or complaint or len(child.stdout) != rows * columns * samples * width:
        raise Damaged("expected a sound JPEG frame in the DICOM file, found one that is damaged")
    pixels = np.frombuffer(child.stdout, f"<u{width}")
    return pixels.reshape((rows, columns) if samples == 1 else shape)


def _gdcm_child(syntax: str, rows: int, columns: int, samples: int, allocated: int, bits: int):
    """The child of `_gdcm`: compressed frame on stdin, plain samples on stdout."""
    import resource

    import gdcm

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may abort; no core file in the archive
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(sys.stdin.buffer.read())
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    colours = gdcm.PhotometricInterpretation
    colours = colours(colours.RGB if samples == 3 else colours.MONOCHROME2)
    image.SetPhotometricInterpretation(colours)
    syntaxes = gdcm.TransferSyntax
    image.SetTransferSyntax(syntaxes(syntaxes.GetTSType(syntax)))
    image.SetPixelFormat(gdcm.PixelFormat(samples, allocated, bits, bits - 1, 0))
    sys.stdout.buffer.write(image.GetBuffer().encode("utf-8", "surrogateescape"))


def _arranged_rle(frame: bytes, dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """One run-length packed plane per byte of a sample, the most significant byte first."""
    rows, columns, samples = shape
    width = _whole(dataset, "BitsAllocated") // 8
    if width not in (1, 2, 4):
        raise Unsupported(f"expected 8, 16 or 32 bits per sample, found {8 * width}")
    count, *offsets = struct.unpack("<16I", frame[:64])
    if count != samples * width:
        raise Damaged(f"expected {samples * width} RLE planes, found {count}")
    bounds = [*offsets[:count], len(frame)]
    if sorted(bounds) != bounds:
        raise Damaged("expected RLE planes one after the other, found them out of order")
    parts = [frame[start:end] for start, end in itertools.pairwise(bounds)]
    planes = [_unrolled(part, rows * columns) for part in parts]
    planes = np.frombuffer(b"".join(planes), np.uint8).reshape(samples, width, rows * columns)
    pixels = np.ascontiguousarray(planes[:, ::-1].transpose(0, 2, 1)).view(f"<u{width}")
    return np.moveaxis(pixels.reshape(samples, rows, columns), 0, -1).reshape(
        (rows, columns) if samples == 1 else shape
    )


def _unrolled(packed: bytes, size: int) -> bytes:
    """PackBits, up to `size` bytes."""
    plain, position = bytearray(), 0
    while len(plain) < size and position < len(packed):
        head = packed[position]
        if head < 128:
            plain += packed[position + 1 : position + 2 + head]
            position += 2 + head
        else:  # 128 stands for nothing
            plain += packed[position + 1 : position + 2] * (257 - head if head > 128 else 0)
            position += 2 if head > 128 else 1
    if len(plain) != size:
        kind = Truncated if len(plain) < size else Damaged
        raise kind(f"expected {size:,} bytes in an RLE plane, found {len(plain):,}")
    return bytes(plain)


# Stored values -> the values a screen would show.


def _table(item, prefix: str) -> tuple[np.ndarray, int]:
    """A DICOM lookup table -> (entries, the value that the first entry belongs to)."""
    count, first, _ = (int(value) for value in item[f"{prefix}Descriptor"].value)
    count = count or 65536  # which does not fit the 16 bits of its field
    data = item[f"{prefix}Data"].value
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else "<u2")
    table = np.asarray(data, np.uint16)
    if len(table) < count:
        raise Truncated(f"expected a DICOM lookup table of {count} entries, found {len(table)}")
    return table[:count], first


def _looked_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def _modality(values: np.ndarray, dataset) -> np.ndarray:
    """Detector numbers -> the units that windows refer to. A negative slope turns the picture."""
    if dataset.get("ModalityLUTSequence"):
        return _looked_up(values, *_table(dataset.ModalityLUTSequence[0], "LUT"))
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope == 0:
        raise Damaged("expected a DICOM rescale slope that keeps the picture, found zero")
    if slope in (None, 1) and intercept in (None, 0):
        return values
    return values * np.float64(1 if slope is None else slope) + (intercept or 0)


def _voi(values: np.ndarray, dataset) -> np.ndarray:
    """The first VOI LUT, else the first window (PS3.3 C.11.2.1), else unchanged."""
    if dataset.get("VOILUTSequence"):
        return _looked_up(values, *_table(dataset.VOILUTSequence[0], "LUT"))
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if centre is None or width is None:
        return values
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "LINEAR":  # defined on whole numbers: a width of 1 is a threshold
        centre, width = centre - 0.5, width - 1
    if width < 0 or (width == 0 and function != "LINEAR"):
        raise Damaged("expected a DICOM window with a width, found one without")
    if width == 0:
        return (values > centre).astype(np.uint8)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise Unsupported("expected a LINEAR, LINEAR_EXACT or SIGMOID window, found another")
    return np.clip(values.astype(np.float64), centre - width / 2, centre + width / 2)


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


if __name__ == "__main__":
    _gdcm_child(sys.argv[1], *map(int, sys.argv[2:]))
