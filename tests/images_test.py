"""Every kind of file that X-ray archives hold: read faithfully, or refused in a sentence."""

import csv
import faulthandler
import hashlib
import io
import itertools
import json
import os
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from raddino_jax.data import images

ROOT = Path(__file__).resolve().parent.parent
CXR = Path(os.environ.get("RADDINO_CXR") or ROOT.parent / "shared" / "cxr")


def _radiograph(height=60, width=81, top=4095, dtype=np.uint16) -> np.ndarray:
    """A bright blob with noise: no two rows, columns or quadrants alike."""
    y, x = np.mgrid[0:height, 0:width]
    blob = np.exp(-(((y - height / 3) / 20) ** 2) - ((x - width / 4) / 30) ** 2)
    noise = np.random.default_rng(0).random((height, width))
    picture = 0.85 * blob + 0.1 * x / width + 0.05 * noise
    picture = (picture - picture.min()) / np.ptp(picture)
    return np.rint(picture * top).astype(dtype)


def _minmax(values) -> np.ndarray:
    """The definition: [minimum, maximum] -> [0, 255], rounded."""
    values = np.asarray(values, np.float64)
    return np.rint((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)


def _close(found: np.ndarray, wanted: np.ndarray, by: int = 1) -> None:
    """Equal but for the rounding of halves."""
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= by


# The files of a folder like shared/cxr.


def _manifest(name: str) -> list:
    path = CXR / name / "manifest.csv"
    if not path.is_file():
        mark = pytest.mark.skip(reason=f"no {name}/manifest.csv in {CXR} (set RADDINO_CXR)")
        return [pytest.param(None, marks=mark, id="absent")]
    with open(path, encoding="utf-8") as file:
        return [pytest.param(row, id=row["file"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("row", _manifest("odd"))
def test_odd_file(row):
    path = CXR / "odd" / row["file"]
    if row["expect"] == "reject":
        with pytest.raises(images.ImageError, match="expected .* found"):
            images.read(path)
        return
    found = images.read(path)
    assert found.dtype == np.uint8 and found.ndim == 2 and found.size
    assert images.is_candidate(path)
    assert np.array_equal(found, images.read(path.read_bytes()))  # the name plays no part
    if row["same_as"]:
        wanted = np.asarray(Image.open(CXR / "odd" / row["same_as"]).convert("L"))
        assert found.shape == wanted.shape
        allowed = re.search(r"mean abs diff <\s*(\d+)", row["note"])
        lossy = "JPEG" in row["kind"] and "2000" not in row["kind"]
        bound = float(allowed[1]) if allowed else 1.0 if lossy else 0.0
        difference = np.abs(found.astype(int) - wanted).mean()
        assert difference <= bound, f"differs from {row['same_as']} by {difference} on average"
    if "constant" in row["kind"]:
        assert np.ptp(found) == 0


@pytest.mark.parametrize("row", _manifest("dicom"))
def test_dicom_file(row):
    path = CXR / row["file"]
    stored = images.read_raw(path)
    assert stored.shape == (int(row["rows"]), int(row["cols"]))
    if row["px_min"]:
        assert (stored.min(), stored.max()) == (int(row["px_min"]), int(row["px_max"]))
    if row["px_sha1"]:
        assert hashlib.sha1(stored.tobytes()).hexdigest().startswith(row["px_sha1"])
    if row["photometric"] in ("MONOCHROME1", "MONOCHROME2"):
        sign = {"1": -1.0, "2": 1.0}[row["photometric"][-1]]
        _close(images.read(path), _minmax(sign * stored))
    reference = re.search(r"images/\S+\.\w+", row["note"])
    for mode in images.MODES:
        found = images.read(path, mode)
        assert found.dtype == np.uint8 and found.shape == stored.shape
        if reference:
            wanted = Image.open(CXR / reference[0]).convert("L").resize(found.shape[::-1])
            assert np.corrcoef(found.ravel(), np.asarray(wanted).ravel())[0, 1] > 0.99


# DICOM files made here.

NATIVE = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
}
JPEG_BASELINE, J2K_LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
RLE = "1.2.840.10008.1.2.5"
GDCM = ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEGLSNearLossless"]
LOSSLESS_JPEG, JPEG_EXTENDED = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.51"


def _dataset(array: np.ndarray, syntax: str = NATIVE["explicit"], **tags):
    """A data set around an array; a tag of None is left out."""
    import pydicom

    stored = tags.pop("BitsStored", 12 if array.itemsize == 2 else 8 * array.itemsize)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    fields = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
        "SOPInstanceUID": "1.2.3",
        "Modality": "DX",
        "PatientName": "Doe^Jane",
        "PatientID": "SECRET-7",
        "Rows": array.shape[0],
        "Columns": array.shape[1],
        "SamplesPerPixel": 1 if array.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if array.ndim == 2 else "RGB",
        "PlanarConfiguration": None if array.ndim == 2 else 0,
        "BitsAllocated": 8 * array.itemsize,
        "BitsStored": stored,
        "HighBit": None if stored is None else stored - 1,
        "PixelRepresentation": int(array.dtype.kind == "i"),
    }
    for name, value in {**fields, **tags}.items():
        if value is not None:
            setattr(dataset, name, value)
    order = ">" if syntax == NATIVE["big endian"] else "<"
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if array.itemsize == 1 else "OW"
    return dataset


def _written(dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _dicom(array: np.ndarray, syntax: str = NATIVE["explicit"], **tags) -> bytes:
    return _written(_dataset(array, syntax, **tags))


def _compressed(array: np.ndarray, syntax: str, frame: bytes | None = None, **tags) -> bytes:
    """RLE and JPEG 2000 by pydicom; other syntaxes around a frame that is ready."""
    from pydicom.encaps import encapsulate

    dataset = _dataset(array, **tags)
    if frame is None:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    return _written(dataset)


def _with_gdcm(plain: bytes, syntax: str, folder: Path) -> bytes:
    """In a process of its own: GDCM may abort."""
    source, target = folder / "plain.dcm", folder / f"{syntax}.dcm"
    source.write_bytes(plain)
    program = (
        "import gdcm, sys\n"
        "reader = gdcm.ImageReader(); reader.SetFileName(sys.argv[1]); assert reader.Read()\n"
        "change = gdcm.ImageChangeTransferSyntax()\n"
        "syntax = getattr(gdcm.TransferSyntax, sys.argv[3])\n"
        "change.SetTransferSyntax(gdcm.TransferSyntax(syntax))\n"
        "change.SetInput(reader.GetImage()); assert change.Change()\n"
        "file, image = reader.GetFile(), change.GetOutput()\n"
        "writer = gdcm.ImageWriter(); writer.SetFileName(sys.argv[2])\n"
        "writer.SetFile(file); writer.SetImage(image); assert writer.Write()\n"
    )
    subprocess.run([sys.executable, "-c", program, source, target, syntax], check=True)
    return target.read_bytes()


@pytest.fixture(scope="module")
def gdcm_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("gdcm")
    plain = _dicom(_radiograph())
    return {name: _with_gdcm(plain, name, folder) for name in GDCM}


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("dtype, low", [("u1", 0), ("u2", 0), ("i2", -2000), ("u4", 0), ("i4", -9)])
def test_uncompressed_dicom(syntax, dtype, low):
    # An odd number of pixels: 8-bit data end in a padding byte.
    array = (_radiograph(61, 81, 250 if dtype == "u1" else 4000).astype(int) + low).astype(dtype)
    data = _dicom(array, NATIVE[syntax])
    stored = images.read_raw(data)
    assert stored.dtype == array.dtype and np.array_equal(stored, array)
    _close(images.read(data), _minmax(array))


def test_big_endian_bytes_in_words():
    array = _radiograph(60, 80, 255, np.uint8)
    dataset = _dataset(array, NATIVE["big endian"])
    dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset["PixelData"].VR = "OW"
    assert np.array_equal(images.read_raw(_written(dataset)), array)


DEPTHS = [("u1", 8), ("u2", 10), ("u2", 16), ("i2", 12), ("i2", 16)]


@pytest.mark.parametrize("syntax", [RLE, J2K_LOSSLESS])
@pytest.mark.parametrize("dtype, stored", DEPTHS)
def test_lossless_dicom(syntax, dtype, stored):
    array = _radiograph(top=2**stored - 1, dtype=np.int64)
    array = (array - (2 ** (stored - 1) if dtype == "i2" else 0)).astype(dtype)
    data = _compressed(array, syntax, BitsStored=stored)
    assert np.array_equal(images.read_raw(data), array)
    _close(images.read(data), _minmax(array))


@pytest.mark.parametrize("name", GDCM)
def test_dicom_that_gdcm_decodes(gdcm_files, name):
    assert np.array_equal(images.read_raw(gdcm_files[name]), _radiograph())


@pytest.mark.parametrize("dtype, stored", DEPTHS)
def test_jpeg_ls_depths(tmp_path, dtype, stored):
    array = _radiograph(top=2**stored - 1, dtype=np.int64)
    array = (array - (2 ** (stored - 1) if dtype == "i2" else 0)).astype(dtype)
    data = _with_gdcm(_dicom(array, BitsStored=stored), "JPEGLSLossless", tmp_path)
    assert np.array_equal(images.read_raw(data), array)


def _huffman(differences) -> bytes:
    """JPEG differences, category and bits, by a table that gives each category five bits."""
    bits = ""
    for difference in np.ravel(differences).tolist():
        size = abs(difference).bit_length()
        bits += f"{size:05b}"
        if 0 < size < 16:  # a category of 16 stands for 32768 and has no bits
            bits += f"{difference + (difference < 0) * (2**size - 1):0{size}b}"
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


def _jpeg(marker: int, precision: int, shape, scan: bytes, spectral: bytes, tables: bytes) -> bytes:
    def segment(code, body):
        return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body

    counts = bytes(17 if length == 5 else 0 for length in range(1, 17))
    header = struct.pack(">BHHB", precision, *shape, 1) + b"\x01\x11\x00"
    huffman = segment(0xC4, b"\x00" + counts + bytes(range(17)))
    start = segment(0xDA, b"\x01\x01\x00" + spectral)
    return b"\xff\xd8" + tables + segment(marker, header) + huffman + start + scan + b"\xff\xd9"


@pytest.mark.parametrize(
    "precision, predictor", [*((12, p) for p in range(1, 8)), *((b, 1) for b in range(8, 17))]
)
def test_lossless_jpeg(precision, predictor):
    """An encoder as ITU-T T.81 annex H words it, for depths that GDCM does not write."""
    array = _radiograph(20, 33, 2**precision - 1, np.uint8 if precision <= 8 else np.uint16)
    x = array.astype(int)
    a, b, c = np.roll(x, 1, 1), np.roll(x, 1, 0), np.roll(np.roll(x, 1, 0), 1, 1)
    guess = [a, b, c, a + b - c, a + (b - c >> 1), b + (a - c >> 1), a + b >> 1][predictor - 1]
    guess[0], guess[:, 0] = a[0], b[:, 0]
    guess[0, 0] = 1 << precision - 1
    scan = _huffman((x - guess + 32768) % 65536 - 32768)
    frame = _jpeg(0xC3, precision, x.shape, scan, bytes([predictor, 0, 0]), b"")
    data = _compressed(array, LOSSLESS_JPEG, frame, BitsStored=precision)
    assert np.array_equal(images.read_raw(data), array)


def test_12_bit_jpeg():
    """Blocks of one value each: a DC coefficient and an end of block."""
    blocks = _radiograph(6, 9)
    array = np.kron(blocks, np.ones((8, 8), np.uint16))
    steps = np.diff(blocks.ravel().astype(int), prepend=2048)
    scan = _huffman(np.stack([steps, np.zeros_like(steps)], axis=-1))
    counts = bytes([0, 0, 0, 0, 1] + [0] * 11)
    tables = struct.pack(">BBHB", 0xFF, 0xDB, 67, 0) + bytes([8] * 64)
    tables += struct.pack(">BBHB", 0xFF, 0xC4, 20, 0x10) + counts + b"\0"
    frame = _jpeg(0xC1, 12, array.shape, scan, bytes([0, 63, 0]), tables)
    assert np.array_equal(images.read_raw(_compressed(array, JPEG_EXTENDED, frame)), array)
    deep = _jpeg(0xC1, 16, array.shape, scan, bytes([0, 63, 0]), tables)
    with pytest.raises(images.Unsupported, match="16 bits"):  # GDCM writes these and misreads them
        images.read(_compressed(array, JPEG_EXTENDED, deep))


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_jpeg_baseline_dicom(photometric):
    frame = _saved(_radiograph(top=255, dtype=np.uint8), "JPEG", quality=95)
    array = np.asarray(Image.open(io.BytesIO(frame)))
    data = _compressed(array, JPEG_BASELINE, frame, PhotometricInterpretation=photometric)
    assert np.array_equal(images.read_raw(data), array)
    wanted = _minmax(array)
    _close(images.read(data), wanted if photometric[-1] == "2" else 255 - wanted)


def test_frame_and_header_must_agree():
    array = _radiograph(top=255, dtype=np.uint8)
    frame = _saved(array, "JPEG")
    with pytest.raises(images.Damaged, match="60 x 81 x 1"):
        images.read(_compressed(array, JPEG_BASELINE, frame, Rows=59))
    # A frame says itself how it is packed; the wrong transfer syntax does no harm.
    assert np.array_equal(
        images.read_raw(_compressed(array, J2K_LOSSLESS, frame)),
        images.read_raw(_compressed(array, JPEG_BASELINE, frame)),
    )


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big endian"])
def test_dicom_without_preamble(syntax):
    """Only the bare data set, as older archives wrote it."""
    array = _radiograph()
    whole = _dicom(array, NATIVE[syntax])
    bare = whole[144 + int.from_bytes(whole[140:144], "little") :]
    for data in (whole, whole[132:], bare):
        assert images.sniff(data[:512]) == "dicom"
        assert np.array_equal(images.read_raw(data), array)


@pytest.mark.parametrize(
    "tag", ["HighBit", "BitsStored", "PixelRepresentation", "SamplesPerPixel", "Modality"]
)
def test_missing_tags_with_a_sure_default(tag):
    array = _radiograph(top=65535)
    assert np.array_equal(images.read_raw(_dicom(array, **{"BitsStored": 16, tag: None})), array)


@pytest.mark.parametrize("tag", ["PhotometricInterpretation", "Rows", "BitsAllocated", "PixelData"])
def test_missing_tags_without_one(tag):
    dataset = _dataset(_radiograph())
    del dataset[tag]
    with pytest.raises(images.ImageError, match="expected .* found"):
        images.read(_written(dataset))


def test_bits_beyond_the_stored_ones():
    array = _radiograph()
    assert np.array_equal(images.read_raw(_dicom(array << 4, HighBit=15)), array)  # left-aligned
    flagged = array | np.uint16(1 << 14)
    overlay = _dataset(flagged)
    overlay.add_new(0x60000102, "US", 14)
    assert np.array_equal(images.read_raw(_written(overlay)), array)
    with pytest.raises(images.Damaged, match="12 bits"):
        images.read(_dicom(flagged))
    # 12-bit negative numbers with and without their sign in the upper four bits
    signed = array.astype(np.int16) - 2048
    assert np.array_equal(images.read_raw(_dicom(signed & 0x0FFF, PixelRepresentation=1)), signed)
    with pytest.raises(images.Damaged):
        images.read(_dicom(signed & 0x0FFF | 0x5000, PixelRepresentation=1))


def _lut(values: np.ndarray, first: int):
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, 12])
    item.add_new("LUTData", "OW", values.astype("<u2").tobytes())
    return pydicom.Sequence([item])


WINDOWS = {
    "none": {},
    "linear, off centre": {"WindowCenter": 900, "WindowWidth": 700},
    "two": {"WindowCenter": [1500, 2], "WindowWidth": [800, 1], "VOILUTFunction": "LINEAR"},
    "exact": {"WindowCenter": 1200, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 1200, "WindowWidth": 600, "VOILUTFunction": "SIGMOID"},
    "threshold": {"WindowCenter": 2000, "WindowWidth": 1},
    "table": {"VOILUTSequence": "squares"},
}


def _windowed(values: np.ndarray, name: str) -> np.ndarray:
    """PS3.3 C.11.2 as it is printed there, one branch after the other."""
    if name == "none":
        return values
    if name == "table":
        return np.clip(values, 100, 4095) ** 2 // 4096
    tags = WINDOWS[name]
    c, w = np.ravel(tags["WindowCenter"])[0], np.ravel(tags["WindowWidth"])[0]
    if name == "sigmoid":
        return 1 / (1 + np.exp(-4 * (values - c) / w))
    if name == "exact":
        inside = (values - c) / w + 0.5
        return np.select([values <= c - w / 2, values > c + w / 2], [0, 1], inside)
    inside = (values - (c - 0.5)) / max(w - 1, 1) + 0.5
    low, high = values <= c - 0.5 - (w - 1) / 2, values > c - 0.5 + (w - 1) / 2
    return np.select([low, high], [0, 1], inside)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("slope, intercept", [(None, None), (0.5, 300), (-0.5, 2500), (2, None)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescale_then_window_then_inversion(photometric, slope, intercept, window):
    array = _radiograph()
    tags = dict(WINDOWS[window], RescaleSlope=slope, RescaleIntercept=intercept)
    if window == "table":
        tags["VOILUTSequence"] = _lut(np.arange(100, 4096) ** 2 // 4096, 100)
    data = _dicom(array, PhotometricInterpretation=photometric, **tags)
    units = array * (1.0 if slope is None else slope) + (intercept or 0)
    for mode, shown in (
        ("raddino", units),
        ("voi", _windowed(np.rint(units).astype(int) if window == "table" else units, window)),
        ("percentile", np.clip(units, *np.percentile(units, images.PERCENTILES))),
    ):
        wanted = _minmax(shown)
        _close(images.read(data, mode), 255 - wanted if photometric[-1] == "1" else wanted)
    assert np.array_equal(images.read_raw(data), array)


@pytest.mark.parametrize(
    "photometric, shape, inverted",
    [
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME2", "IDENTITY", False),
    ],
)
def test_inverted_once(photometric, shape, inverted):
    array = _radiograph()
    data = _dicom(array, PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    _close(images.read(data), 255 - _minmax(array) if inverted else _minmax(array))


def test_modality_table():
    array = _radiograph()
    data = _dicom(array, ModalityLUTSequence=_lut(np.arange(4095, 99, -1), 100))
    _close(images.read(data), _minmax(-np.maximum(array, 100).astype(float)))


def test_unusable_windows_and_slopes():
    array = _radiograph()
    for tags in ({"RescaleSlope": 0}, {"WindowCenter": 5, "WindowWidth": 0}):
        with pytest.raises(images.Damaged):
            images.read(_dicom(array, **tags), "voi")
    empty = _dicom(array, WindowCenter="", WindowWidth="", RescaleSlope="", RescaleIntercept="")
    assert np.array_equal(images.read(empty, "voi"), images.read(empty))
    beside = images.read(_dicom(array, WindowCenter=30000, WindowWidth=10), "voi")
    assert not beside.any()  # nothing inside the window: constant, so black


def test_colour_dicom():
    grey = _radiograph(top=255, dtype=np.uint8)
    colour = np.dstack([grey, 255 - grey, grey // 2])
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    planes = np.ascontiguousarray(np.moveaxis(colour, -1, 0))
    apart = _dataset(colour, PlanarConfiguration=1)
    apart.PixelData = planes.tobytes()
    boxed = _compressed(colour, J2K_LOSSLESS, _saved(colour, "JPEG2000"))
    packed = [_compressed(colour, syntax) for syntax in (RLE, J2K_LOSSLESS)]
    for data in (_dicom(colour), _written(apart), boxed, *packed):
        assert np.array_equal(images.read_raw(data), luma)
    assert np.array_equal(
        images.read_raw(_dicom(colour, PhotometricInterpretation="YBR_FULL")), grey
    )
    frame = _saved(colour, "JPEG", quality=95)
    jpeg = _compressed(colour, JPEG_BASELINE, frame, PhotometricInterpretation="YBR_FULL_422")
    _close(images.read_raw(jpeg), np.asarray(Image.open(io.BytesIO(frame)).convert("L")), 0)
    with pytest.raises(images.Unsupported):
        images.read(_dicom(colour, PhotometricInterpretation="HSV"))


def test_palette_dicom():
    array = _radiograph(top=255, dtype=np.uint8)
    tags = {}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table = (np.arange(255, -1, -1) * 257).astype("<u2").tobytes()
        tags[f"{colour}PaletteColorLookupTableData"] = table
    data = _dicom(array, PhotometricInterpretation="PALETTE COLOR", **tags)
    assert np.array_equal(images.read_raw(data), (255 - array).astype(np.uint16) * 257)


def test_more_than_one_frame():
    array = _radiograph()
    assert images.read(_dicom(array, NumberOfFrames=1)).shape == array.shape
    with pytest.raises(images.Unsupported, match="found 2"):
        images.read(_dicom(np.vstack([array, array]), Rows=len(array), NumberOfFrames=2))


def test_rows_that_would_shear_the_picture():
    array = _radiograph()
    for tags in ({"Rows": 59}, {"Columns": 80}):
        with pytest.raises(images.Damaged):
            images.read(_dicom(array, **tags))
    for tags in ({"Rows": 61}, {"Columns": 82}):
        with pytest.raises(images.Truncated):
            images.read(_dicom(array, **tags))


def test_damaged_frames_are_refused(gdcm_files):
    """A hole in a JPEG scan shifts the rest of the picture; decoders only warn."""
    picture = _radiograph(400, 400, 255, np.uint8)
    jpeg = bytearray(_saved(picture, "JPEG", quality=95))
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 600] = bytes(600)
    lossless = bytearray(gdcm_files["JPEGLosslessProcess14_1"])
    lossless[len(lossless) // 2 : len(lossless) // 2 + 64] = bytes(64)
    for data in (jpeg, _compressed(picture, JPEG_BASELINE, bytes(jpeg)), lossless):
        with pytest.raises(images.Damaged):
            images.read(bytes(data))


def test_errors_keep_the_patient_private(capfd, recwarn):
    """Neither a message, a chained error, a warning nor a log line quotes the header."""
    array = _radiograph()
    dataset = _dataset(array, PatientBirthDate="19", PatientComments="SECRET " * 3)
    good = _written(dataset)
    said = []
    for position in range(132, len(good) - array.nbytes, 3):
        data = bytearray(good)
        data[position] ^= 0x55
        try:
            images.read(bytes(data), "voi")
        except images.ImageError as error:
            assert error.__cause__ is None and (error.__suppress_context__ or not error.__context__)
            said.append(str(error))
    assert len(said) > 10
    said += [str(warning.message) for warning in recwarn] + list(capfd.readouterr())
    assert not re.search("Doe|Jane|SECRET|DX", " ".join(said))


# Pictures made here.


def _saved(array, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png(header: tuple, rows: bytes, *extra: bytes) -> bytes:
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", *header)), *extra]
    chunks += [_chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _packed(samples: np.ndarray, depth: int) -> np.ndarray:
    """Samples [H, n] of 1, 2, 4, 8 or 16 bits -> rows of bytes."""
    if depth == 16:
        return samples.astype(">u2").view(np.uint8)
    bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return np.packbits(bits.reshape(len(samples), -1), axis=1)


def _filtered(rows: np.ndarray, step: int) -> bytes:
    """PNG rows, each behind a filter of another type, written as the standard words it."""
    lines, above = [], np.zeros(rows.shape[1] + step, int)
    for number, row in enumerate(rows):
        kind = number % 5
        row = np.concatenate([np.zeros(step, int), row.astype(int)])
        left, up, corner = row[:-step], above[step:], above[:-step]
        estimate = left + up - corner
        near = np.array([abs(estimate - left), abs(estimate - up), abs(estimate - corner)])
        paeth = np.choose(near.argmin(0), [left, up, corner])
        guess = [0, left, up, (left + up) // 2, paeth][kind]
        lines.append(bytes([kind]) + ((row[step:] - guess) % 256).astype(np.uint8).tobytes())
        above = row
    return b"".join(lines)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_png_of_every_depth(depth):
    top = 2**depth - 1
    array = _radiograph(top=min(top, 4095))  # 16 bits hold 12-bit data
    data = _png((81, 60, depth, 0, 0, 0, 0), _filtered(_packed(array, depth), max(1, depth // 8)))
    _close(images.read(data), _minmax(array))
    assert np.array_equal(images.read_raw(data), array if depth == 16 else array * (255 // top))


@pytest.mark.parametrize("colour, channels", [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("depth", [8, 16])
def test_colour_png(depth, colour, channels):
    grey = _radiograph(top=255 if depth == 8 else 4095)
    rest = np.random.default_rng(1).integers(0, grey.max(), (*grey.shape, 3))
    pixels = np.dstack([grey, rest])[..., :channels]
    rows = _filtered(_packed(pixels.reshape(60, -1), depth), channels * depth // 8)
    data = _png((81, 60, depth, colour, 0, 0, 0), rows)
    wanted = pixels[..., :3] @ [0.299, 0.587, 0.114] if channels > 2 else grey
    assert np.abs(images.read_raw(data) - wanted).max() <= 1  # the alpha channel plays no part
    _close(images.read(data), np.rint(wanted) if depth == 8 else _minmax(wanted))


@pytest.mark.parametrize("depth", [1, 8, 16])
def test_interlaced_png(depth):
    array = _radiograph(top=2**depth - 1)
    rows = b""
    for x, y, dx, dy in images.ADAM7:
        part = array[y::dy, x::dx]
        rows += b"".join(b"\0" + line.tobytes() for line in _packed(part, depth))
    data = _png((81, 60, depth, 0, 0, 0, 1), rows)
    _close(images.read(data), _minmax(array), 0 if depth < 16 else 1)
    with pytest.raises(images.Truncated):
        images.read(_png((81, 60, depth, 0, 0, 0, 1), rows[:-1]))


def test_png_with_rows_missing_or_a_wrong_checksum():
    """Pillow alone returns black rows for the first and does not look at the others."""
    array = _radiograph(top=255, dtype=np.uint8)
    rows = _filtered(array, 1)
    with pytest.raises(images.Truncated):
        images.read(_png((81, 60, 8, 0, 0, 0, 0), rows[: 82 * 40]))
    good = _png((81, 60, 8, 0, 0, 0, 0), rows, _chunk(b"gAMA", struct.pack(">I", 45455)))
    assert np.array_equal(images.read(good), array)
    assert np.array_equal(images.read(good + b"\n"), array)
    for position in (20, 45, len(good) // 2, len(good) - 20):
        bad = bytearray(good)
        bad[position] ^= 1
        with pytest.raises(images.ImageError):
            images.read(bytes(bad))


@pytest.mark.parametrize("widen", [257, 256, 16, 4, 1])
def test_8_bit_pictures_in_wider_boxes_stay_as_they_are(widen):
    array = np.clip(_radiograph(top=255, dtype=np.uint8), 20, 200)
    assert np.array_equal(images.read(array_png := _saved(array, "PNG")), array)
    wide = _saved(array.astype(np.uint16) * widen, "PNG")
    assert np.array_equal(images.read(wide), array)
    assert np.array_equal(images.read(_saved(array.astype(np.float32) / 255, "TIFF")), array)
    for data in (array_png, wide):
        clipped = np.clip(array, *np.percentile(array, images.PERCENTILES))
        _close(images.read(data, "percentile"), _minmax(clipped))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4"])
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
def test_tiff(dtype, options):
    array = _radiograph(top=255 if dtype == "u1" else 4001).astype(dtype)
    array = array - 1000 if dtype in ("i4", "f4") else array
    data = _saved(array, "TIFF", **options)
    assert np.array_equal(images.read_raw(data), array)
    _close(images.read(data), array if dtype == "u1" else _minmax(array))


def _tiff(array: np.ndarray, photometric: int, *more: tuple, order="<") -> bytes:
    """One uncompressed strip; `more` are further (tag, type, value)."""
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data += b"\0" * (len(data) % 2)
    tags = [(256, 4, array.shape[1]), (257, 4, array.shape[0]), (258, 3, 8 * array.itemsize)]
    tags += [(259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, len(array))]
    tags += [(279, 4, array.nbytes), *more]
    entries = b""
    for tag, kind, value in sorted(tags):
        field = struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 0)[: 5 - kind]))
        entries += struct.pack(order + "HHI", tag, kind, 1) + field
    start = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return start + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_with_white_as_zero(dtype):
    array = _radiograph(top=np.iinfo(dtype).max, dtype=dtype)
    _close(images.read(_tiff(array, 1)), _minmax(array))
    _close(images.read(_tiff(array, 1, order=">")), _minmax(array))
    _close(images.read(_tiff(array, 0)), 255 - _minmax(array))


def test_tiff_that_is_no_single_finite_grey_picture():
    array = _radiograph(top=255, dtype=np.uint8)
    pages = _saved(array, "TIFF", save_all=True, append_images=[Image.fromarray(array)])
    with pytest.raises(images.Unsupported, match="found 2"):
        images.read(pages)
    for value in (np.nan, np.inf):
        holed = array.astype(np.float32)
        holed[3, 4] = value
        with pytest.raises(images.Damaged, match="finite"):
            images.read(_saved(holed, "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    upright = _radiograph(60, 80, 255, np.uint8)
    row, column = upright, upright.T  # what is stored, so that the tag's turn gives `upright`
    stored = {
        1: row,
        2: row[:, ::-1],
        3: row[::-1, ::-1],
        4: row[::-1],
        5: column,
        6: column[::-1],  # "the top row is the right side": turned by 90 degrees clockwise
        7: column[::-1, ::-1],
        8: column[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    found = images.read(_saved(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < (3 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize(
    "kind, mode, bound",
    [
        *itertools.product(["PNG"], ["1", "L", "LA", "P", "RGB", "RGBA"], [0]),
        *itertools.product(["BMP"], ["1", "L", "P", "RGB", "RGBA"], [0]),
        *itertools.product(["TIFF"], ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"], [0]),
        *itertools.product(["WEBP"], ["RGB", "RGBA"], [0]),
        *itertools.product(["JPEG"], ["L", "RGB", "CMYK"], [1]),
        *itertools.product(["JPEG2000"], ["L", "LA", "RGB", "RGBA"], [0]),
    ],
)
def test_colour_modes(kind, mode, bound):
    grey = Image.fromarray(_radiograph(top=255, dtype=np.uint8))
    image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(grey.point(lambda v: 255 - v // 2))
    options = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    wanted = np.asarray(grey.convert(mode).convert("L") if mode == "1" else grey)
    difference = np.abs(images.read(_saved(image, kind, **options)).astype(int) - wanted)
    assert difference.mean() <= bound


def test_jpeg_with_bytes_after_its_end():
    """Cameras add a preview or padding there."""
    array = _radiograph(top=255, dtype=np.uint8)
    for data in (_saved(array, "JPEG"), _saved(array, "MPO", save_all=True)):
        assert np.array_equal(images.read(data + b"\0\n"), images.read(data))


def test_deep_jpeg_2000():
    array = _radiograph(top=4095)
    data = _saved(array, "JPEG2000")
    _close(images.read(data), _minmax(array))


# What is refused.


@pytest.mark.parametrize("kind", ["dicom", "PNG", "JPEG", "JPEG2000", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated(kind, kept, monkeypatch):
    array = _radiograph(200, 200, 255, np.uint8)
    data = _dicom(array) if kind == "dicom" else _saved(array, kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # some other library's doing
    assert images.read(data).shape == (200, 200)
    with pytest.raises(images.ImageError):
        images.read(data[: int(len(data) * kept)])


@pytest.mark.parametrize("syntax", [RLE, J2K_LOSSLESS, *GDCM])
def test_truncated_frames(syntax, gdcm_files):
    data = gdcm_files[syntax] if syntax in GDCM else _compressed(_radiograph(), syntax)
    for kept in (0.5, 0.9, 0.99):
        with pytest.raises(images.ImageError):
            images.read(data[: int(len(data) * kept)])


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"\0" * 2000, "zeros"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>no such file</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"%PDF-1.7", "PDF"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"PK\x03\x04" + bytes(40), "zip"),
        (b"BMI,weight,height\n21,60,1.7\n", "something else"),
    ],
)
def test_strangers(data, words, tmp_path):
    assert images.sniff(data) is None
    path = tmp_path / "named.png"
    path.write_bytes(data)
    assert not images.is_candidate(path)
    with pytest.raises(images.NotAnImage, match=words):
        images.read(path)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    for name in ("pipe.png", "."):
        assert not images.is_candidate(tmp_path / name)
        with pytest.raises(images.NotAnImage, match="folder or a device"):
            images.read(tmp_path / name)
    assert not images.is_candidate(tmp_path / "absent.png")
    with pytest.raises(images.Unreadable, match="No such file"):
        images.read(tmp_path / "absent.png")


def test_dicom_without_pixels():
    dataset = _dataset(_radiograph(), Modality="SR")
    del dataset.PixelData
    with pytest.raises(images.Truncated, match="after the DICOM header"):
        images.read(_written(dataset))
    del dataset.Rows
    with pytest.raises(images.NotAnImage, match="without pixels"):
        images.read(_written(dataset))


def test_bombs():
    """Small files that claim, or unpack to, gigabytes."""
    tiny = images.Limits(max_pixels=1000, max_bytes=100_000)
    array = _radiograph(top=255, dtype=np.uint8)
    for data in (_dicom(array), *(_saved(array, k) for k in ("PNG", "JPEG", "JPEG2000", "TIFF"))):
        with pytest.raises(images.TooLarge, match="1,000 pixels"):
            images.read(data, limits=tiny)
    with pytest.raises(images.TooLarge, match="100,000 bytes"):
        images.read(bytes(100_001), limits=tiny)
    claimed = _png((60000, 60000, 16, 6, 0, 0, 0), b"")
    deflated = _dicom(np.zeros((2000, 2000), np.uint16), NATIVE["deflated"])
    assert len(deflated) < 100_000
    runs = _dataset(array)
    runs.Rows = runs.Columns = 60000
    for data in (claimed, _written(runs)):
        with pytest.raises(images.TooLarge, match="60000 x 60000"):
            images.read(data)
    with pytest.raises(images.TooLarge, match="after unpacking"):
        images.read(deflated, limits=tiny)
    jpeg = _saved(array, "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    with pytest.raises(images.Unsupported, match="scans"):
        images.read(jpeg[:start] + jpeg[start:-2] * 300 + jpeg[-2:])


@pytest.mark.parametrize("value", [0, 700])
def test_constant_pictures_are_black(value):
    array = np.full((20, 30), value, np.uint16)
    for data in (
        _dicom(array),
        _dicom(array, PhotometricInterpretation="MONOCHROME1"),
        _dicom(array, RescaleSlope=3, RescaleIntercept=-7, WindowCenter=9, WindowWidth=4),
        _saved(array, "PNG"),
        _saved(array.astype(np.float32), "TIFF"),
    ):
        for mode in images.MODES:
            assert not images.read(data, mode).any()


def test_unknown_mode():
    with pytest.raises(ValueError, match="raddino, voi, percentile") as caught:
        images.read(b"", "minmax")
    assert not isinstance(caught.value, images.ImageError)


@pytest.mark.parametrize("shape", [(60, 81), (81, 60), (518, 518), (1, 7), (2000, 777)])
def test_resize_short_side(shape):
    array = _radiograph(*shape, 255, np.uint8)
    small = images.resize_short_side(array, 70)
    assert min(small.shape) == 70 and small.dtype == np.uint8
    assert max(small.shape) == 70 * max(shape) // min(shape)
    wanted = Image.fromarray(array).resize(small.shape[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(small, np.asarray(wanted))


def test_resize_refuses_what_is_no_8_bit_picture():
    for array in (np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(TypeError):
            images.resize_short_side(array, 2)
    with pytest.raises(images.TooLarge):
        images.resize_short_side(np.zeros((1, 10000), np.uint8), 518)


# Damage at random.


def _corpus(gdcm_files: dict[str, bytes]) -> dict[str, bytes]:
    deep, grey = _radiograph(), _radiograph(top=255, dtype=np.uint8)
    colour = np.dstack([grey, 255 - grey, grey // 2])
    wide = np.dstack([deep, 4095 - deep, deep // 2]).reshape(60, -1)
    files = {f"dicom {name}": _dicom(deep, syntax) for name, syntax in NATIVE.items()}
    files |= {f"dicom {name}": data for name, data in gdcm_files.items()}
    lut = {"ModalityLUTSequence": _lut(np.arange(4096), 0), "WindowCenter": 9, "WindowWidth": 4}
    files |= {
        "dicom tables": _dicom(deep, VOILUTSequence=_lut(np.arange(4096), 0), **lut),
        "dicom bare": _dicom(deep)[132:],
        "dicom rgb": _dicom(colour),
        "dicom rle": _compressed(deep, RLE),
        "dicom j2k": _compressed(deep, J2K_LOSSLESS),
        "dicom jpeg": _compressed(grey, JPEG_BASELINE, _saved(grey, "JPEG")),
        "png 8": _saved(grey, "PNG"),
        "png 16": _saved(deep, "PNG"),
        "png rgb": _saved(colour, "PNG"),
        "png palette": _saved(Image.fromarray(grey).convert("P"), "PNG"),
        "png rgb 16": _png((81, 60, 16, 2, 0, 0, 0), _filtered(_packed(wide, 16), 6)),
        "jpeg": _saved(grey, "JPEG"),
        "jpeg progressive": _saved(grey, "JPEG", progressive=True),
        "jpeg rgb": _saved(colour, "JPEG"),
        "jpeg cmyk": _saved(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        "jpeg2000": _saved(deep, "JPEG2000"),
        "tiff": _saved(deep, "TIFF"),
        "tiff lzw": _saved(grey, "TIFF", compression="tiff_lzw"),
        "webp": _saved(grey, "WEBP", lossless=True),
        "bmp": _saved(grey, "BMP"),
    }
    return files


def _mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """1 to 8 changes: bytes, zeroed runs, cuts, insertions, repeats; a third near the start."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        end = len(data) if rng.random() < 0.7 else min(len(data), 600)
        if end == 0:
            break
        at, run = int(rng.integers(end)), int(rng.integers(1, 60))
        kind = rng.random()
        if kind < 0.5:
            data[at] = rng.choice([0, 255, 128, int(rng.integers(256)), data[at] ^ 1])
        elif kind < 0.65:
            data[at : at + run] = bytes(run)
        elif kind < 0.75:
            del data[at:]
        elif kind < 0.85:
            del data[at : at + run]
        else:
            data[at:at] = rng.bytes(run) if kind < 0.95 else data[at : at + run]
    return bytes(data)


def _fuzz(count: int, folder: Path, corpus: dict[str, bytes]) -> dict:
    """Reads `count` mutated files; dies of a crash, a hang or a foreign exception."""
    # GDCM costs a process per file: a sixth as many of those.
    names = [n for n in corpus for _ in range(1 if n.removeprefix("dicom ") in GDCM else 6)]
    result = {"read": 0, "changed": {}, "refused": {}, "slowest_s": 0.0}
    whole = {name: images.read(data, "voi") for name, data in corpus.items()}
    for number in range(count):
        rng = np.random.default_rng(number)
        name = names[number % len(names)]
        data = _mutated(rng, corpus[name])
        (folder / "current").write_bytes(data)  # what to look at after a crash
        faulthandler.dump_traceback_later(60, exit=True)
        start = time.perf_counter()
        try:
            found = images.read(data, "voi")
            assert found.dtype == np.uint8 and found.ndim == 2 and found.size
            same = np.array_equal(found, whole[name])
            result["read"] += 1
            if not same:
                result["changed"][name] = result["changed"].get(name, 0) + 1
            # Their checksums leave no way to a different picture.
            assert same or not name.startswith("png"), name
        except images.ImageError as error:
            kind = type(error).__name__
            result["refused"][kind] = result["refused"].get(kind, 0) + 1
        result["slowest_s"] = max(result["slowest_s"], time.perf_counter() - start)
    faulthandler.cancel_dump_traceback_later()
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def _fuzzed(count: int, folder: Path, gdcm_files: dict[str, bytes]) -> dict:
    """In a process with 2 GiB to spare, which may crash without taking pytest along."""
    for name, data in _corpus(gdcm_files).items():
        (folder / name).write_bytes(data)
    child = subprocess.run(
        [sys.executable, __file__, str(count), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RADDINO_CXR": str(CXR)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert child.returncode == 0, f"{child.stderr[-2000:]}\nthe file: {folder / 'current'}"
    result = json.loads(child.stdout.splitlines()[-1])
    print(count, "files:", result)
    assert result["read"] + sum(result["refused"].values()) == count
    assert result["slowest_s"] < 10
    return result


def test_damage_is_read_or_refused(tmp_path, gdcm_files):
    assert _fuzzed(200, tmp_path, gdcm_files)["refused"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_much_damage_is_read_or_refused(tmp_path, gdcm_files):
    assert _fuzzed(10_000, tmp_path, gdcm_files)["refused"]


def _main(count: int, folder: Path) -> None:
    corpus = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for data in corpus.values():
        images.read(data)  # every library is loaded, every thread started
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(_fuzz(count, folder, corpus)))


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
