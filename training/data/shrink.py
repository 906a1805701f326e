"""Photos made smaller before they are packed."""

from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms.v2 import functional

from training.data.encoded import decode

JPEG_QUALITY = 95  # of 100: what is lost on top of the first compression is not seen


def shrink(encoded: bytes, shortest_side: int) -> bytes:
    """The JPEG or PNG file with its shortest side brought down to `shortest_side` pixels; unchanged if it is no longer.

    A shrunk file is upright RGB of 8 bits, in the format that it had. Raises RuntimeError or ValueError if it cannot be
    decoded.
    """
    image = decode(encoded)
    if min(image.shape[1:]) <= shortest_side:
        return encoded
    smaller = functional.resize(image, [shortest_side], antialias=True)
    is_png = encoded.startswith(b"\x89PNG")
    return bytes((encode_png(smaller) if is_png else encode_jpeg(smaller, quality=JPEG_QUALITY)).numpy())
