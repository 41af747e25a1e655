"""The pixels of a DICOM file: stored values, and the values that a screen would show.

`images.read` is the way in. `header` reads what the picture depends on; `stored_values` unpacks every transfer syntax
that archives of radiographs hold (plain, RLE, JPEG, lossless JPEG, JPEG-LS, JPEG 2000); `displayed` applies the
modality LUT and, if asked, the first VOI LUT or window; `inverted` says whether black and white are exchanged. Errors
are those of `images`.
"""

import io
import itertools
import logging
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom import encaps

from raddino_jax.data import images

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


# Its warnings quote the values they object to.
warnings.filterwarnings("ignore", module=r"pydicom\b")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def header(data: bytes, limits: images.Limits):
    """The imaging part of a DICOM header, with the defaults that cannot change the picture."""
    if DEFLATED in data[132:4096]:
        data = _inflate(data, limits)
    tags = [*TAGS, *OVERLAY_BIT_POSITIONS]
    dataset = pydicom.dcmread(io.BytesIO(data), force=True, specific_tags=tags)
    if not dataset.get("PixelData"):
        if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
            raise images.Unsupported("expected whole numbers as DICOM pixels, found floating point")
        if "Rows" in dataset:
            raise images.Truncated("expected pixels after the DICOM header, found none")
        raise images.NotAnImage("expected a DICOM image, found a DICOM object without pixels")
    return dataset


def _inflate(data: bytes, limits: images.Limits) -> bytes:
    """A deflated data set, unpacked no further than the limit; its meta header ends where group 2's
    first element says."""
    start = 144 + int.from_bytes(data[140:144], "little")
    plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limits.max_bytes + 1)
    if len(plain) > limits.max_bytes:
        raise images.TooLarge(f"expected at most {limits.max_bytes:,} bytes, found more after unpacking")
    return plain


def _whole(dataset, name: str, default: int | None = None) -> int:
    value = dataset.get(name)
    if value is None or value == "":
        if default is None:
            raise images.Damaged(f"expected the DICOM attribute {name}, found none")
        return default
    return int(value)


def _number(dataset, name: str) -> float | None:
    """The first value of an attribute; None where it is absent or empty."""
    value = dataset.get(name)
    if value is None or value == "" or value == []:
        return None
    first = float(value if isinstance(value, (str, float, int)) else np.ravel(value)[0])
    if not np.isfinite(first):
        raise images.Damaged(f"expected a finite {name} in the DICOM header, found none")
    return first


def _photometric(dataset) -> str:
    return str(dataset.get("PhotometricInterpretation") or "").strip().upper()


def inverted(dataset) -> bool:
    """Shape INVERSE belongs to MONOCHROME1 and says the same thing again, so it counts once."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    return _photometric(dataset) == "MONOCHROME1" or shape == "INVERSE"


def stored_values(dataset, limits: images.Limits) -> np.ndarray:
    """Header and pixel bytes -> stored values [H, W]."""
    rows, columns = _whole(dataset, "Rows"), _whole(dataset, "Columns")
    samples, frames = _whole(dataset, "SamplesPerPixel", 1), _whole(dataset, "NumberOfFrames", 1)
    images.check_size(columns, rows, limits)
    if frames > 1:  # a film loop or a tomosynthesis; its first frame is no radiograph
        raise images.Unsupported(f"expected one DICOM frame, found {frames}")
    if samples not in (1, 3):
        raise images.Unsupported(f"expected 1 or 3 samples per pixel, found {samples}")
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
        raise images.Unsupported("expected a DICOM transfer syntax, found compressed pixels without one")
    return NATIVE[1] if dataset.original_encoding[1] else EXPLICIT_BIG


def _native(dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """Uncompressed pixel bytes -> [H, W] or [H, W, 3]."""
    rows, columns, samples = shape
    data, allocated = dataset.PixelData, _whole(dataset, "BitsAllocated")
    if allocated not in (8, 16, 32):
        raise images.Unsupported(f"expected 8, 16 or 32 bits per sample, found {allocated}")
    if _photometric(dataset) in ("YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420"):
        raise images.Unsupported("expected full-size colour planes in the DICOM file, found halved ones")
    width = allocated // 8
    size = rows * columns * samples * width
    # Writers pad to an even length. More than a row or a column left over means that Rows or
    # Columns is wrong, and the picture would come out sheared.
    if not size <= len(data) < size + max(2, min(rows, columns) * width):
        kind = images.Truncated if len(data) < size else images.Damaged
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
        raise images.Damaged(f"expected at most {allocated} bits, found {stored} stored up to bit {top}")
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
        raise images.Damaged(f"expected DICOM pixels of {stored} bits, found larger values")
    return values >> (top - stored)


def _one_channel(pixels: np.ndarray, dataset) -> np.ndarray:
    """Grey as it is, palette and RGB by luma, YBR by its Y."""
    photometric = _photometric(dataset)
    if pixels.ndim == 3:
        if photometric.startswith("YBR_FULL"):
            return np.ascontiguousarray(pixels[..., 0])
        if photometric in ("RGB", "YBR_RCT", "YBR_ICT"):
            return images.luma(pixels)
    elif photometric in ("MONOCHROME1", "MONOCHROME2"):
        return pixels
    elif photometric == "PALETTE COLOR":
        colours = [_table(dataset, f"{c}PaletteColorLookupTable") for c in ("Red", "Green", "Blue")]
        return images.luma(np.stack([_looked_up(pixels, *colour) for colour in colours], axis=-1))
    # Without it black and white cannot be told apart.
    raise images.Unsupported(
        "expected a DICOM photometric interpretation of MONOCHROME1 or 2, RGB, YBR or PALETTE "
        f"COLOR that fits the samples per pixel, found {'another' if photometric else 'none'}"
    )


# Compressed DICOM frames.

GDCM_READS = {  # marker -> (name, transfer syntax, bits that come back right)
    0xC1: ("JPEG", "1.2.840.10008.1.2.4.51", (12,)),
    0xC3: ("lossless JPEG", "1.2.840.10008.1.2.4.57", range(8, 17)),
    0xF7: ("JPEG-LS", "1.2.840.10008.1.2.4.80", range(8, 17)),
}
GDCM_SECONDS = 60
CHILD = str(Path(__file__).with_name("gdcm_frame.py"))


def _unpacked(dataset, syntax: str, shape: tuple[int, int, int]) -> np.ndarray:
    """One compressed frame -> stored values, told by its own header: transfer syntaxes are wrong at
    times, and the sizes in both headers have to agree."""
    buffer = io.BytesIO(dataset.PixelData)
    encaps.parse_basic_offsets(buffer)
    frame = b"".join(encaps.generate_fragments(buffer))
    if syntax == RLE:
        return _used_bits(_arranged_rle(frame, dataset, shape), dataset)
    if images.sniff(frame) == "jpeg2000":  # some writers leave the boxes of a JP2 file around the stream
        frame = frame[frame.find(images.J2K_START) :]
    elif images.sniff(frame) != "jpeg":
        raise images.Unsupported("expected pixels packed as RLE, JPEG, JPEG-LS or JPEG 2000, found others")
    kind, precision, *found = images.codestream(frame)
    if tuple(found) != shape:
        raise images.Damaged(f"expected a frame of {_by(shape)} (DICOM header), found {_by(found)}")
    if kind == 0x51:
        import openjpeg

        pixels = openjpeg.decode(frame)
    elif precision == 8 and kind in (0xC0, 0xC1, 0xC2):
        images.check_scans(frame)
        pixels = images.libjpeg(frame)
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


def _gdcm(frame: bytes, marker: int, precision: int, shape: tuple[int, int, int]) -> np.ndarray:
    """JPEG lossless, JPEG-LS and 12-bit JPEG through GDCM, in a process of its own.

    On damaged streams GDCM aborts the process, or only complains on stderr: a child can be watched.
    Costs about 0.15 s per file.
    """
    name, syntax, bits = GDCM_READS.get(marker, ("JPEG", "", ()))
    if precision not in bits:
        raise images.Unsupported(f"expected a JPEG frame of a known kind, found {name}, {precision} bits")
    if not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise images.Truncated("expected a JPEG frame up to its end mark, found one that is cut off")
    rows, columns, samples = shape
    width = 1 if precision <= 8 else 2
    # -P: the folder of that file must not come first on the child's path.
    command = [sys.executable, "-P", CHILD, syntax, *map(str, (*shape, 8 * width, precision))]
    try:
        child = subprocess.run(command, input=frame, capture_output=True, timeout=GDCM_SECONDS)
    except subprocess.TimeoutExpired:
        raise images.Damaged(f"expected a JPEG frame to decode in {GDCM_SECONDS} s, gave up") from None
    complaint = re.search(rb"Corrupt JPEG|Premature end", child.stderr)
    if child.returncode or complaint or len(child.stdout) != rows * columns * samples * width:
        raise images.Damaged("expected a sound JPEG frame in the DICOM file, found one that is damaged")
    pixels = np.frombuffer(child.stdout, f"<u{width}")
    return pixels.reshape((rows, columns) if samples == 1 else shape)


def _arranged_rle(frame: bytes, dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """One run-length packed plane per byte of a sample, the most significant byte first."""
    rows, columns, samples = shape
    width = _whole(dataset, "BitsAllocated") // 8
    if width not in (1, 2, 4):
        raise images.Unsupported(f"expected 8, 16 or 32 bits per sample, found {8 * width}")
    count, *offsets = struct.unpack("<16I", frame[:64])
    if count != samples * width:
        raise images.Damaged(f"expected {samples * width} RLE planes, found {count}")
    bounds = [*offsets[:count], len(frame)]
    if sorted(bounds) != bounds:
        raise images.Damaged("expected RLE planes one after the other, found them out of order")
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
        kind = images.Truncated if len(plain) < size else images.Damaged
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
        raise images.Truncated(f"expected a DICOM lookup table of {count} entries, found {len(table)}")
    return table[:count], first


def _looked_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def displayed(stored: np.ndarray, dataset, window: bool) -> np.ndarray:
    """Stored values [H, W] -> after the modality LUT and, with `window`, the first VOI LUT or window; not inverted."""
    values = _modality(stored, dataset)
    return _voi(values, dataset) if window else values


def _modality(values: np.ndarray, dataset) -> np.ndarray:
    """Detector numbers -> the units that windows refer to. A negative slope turns the picture."""
    if dataset.get("ModalityLUTSequence"):
        return _looked_up(values, *_table(dataset.ModalityLUTSequence[0], "LUT"))
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope == 0:
        raise images.Damaged("expected a DICOM rescale slope that keeps the picture, found zero")
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
        raise images.Damaged("expected a DICOM window with a width, found one without")
    if width == 0:
        return (values > centre).astype(np.uint8)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise images.Unsupported("expected a LINEAR, LINEAR_EXACT or SIGMOID window, found another")
    return np.clip(values.astype(np.float64), centre - width / 2, centre + width / 2)
