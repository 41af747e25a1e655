"""A program of its own for `dicom`: python gdcm_frame.py SYNTAX ROWS COLUMNS SAMPLES ALLOCATED BITS.

One compressed frame on stdin -> plain samples on stdout, through GDCM, which may abort on a damaged one.
"""

import resource
import sys

import gdcm


def decode(syntax: str, rows: int, columns: int, samples: int, allocated: int, bits: int):
    """Compressed frame on stdin, plain samples on stdout."""
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


if __name__ == "__main__":
    decode(sys.argv[1], *map(int, sys.argv[2:]))
