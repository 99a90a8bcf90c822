"""Images in a request: `data:` URLs, whose size is known from their header before a pixel is decoded."""

import base64
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

from PIL import Image

from w8a8.serve.client import IMAGE_FORMATS

MODES = ("L", "RGB", "RGBA")
"""What a processor is given; all else becomes RGB, as it would there."""

MAX_PIXELS = 2**24
"""Pixels of one image: a processor needs some 50 bytes for each."""
MAX_TOTAL_PIXELS = 2**25
"""The same of all images of a request."""
MAX_IMAGES = 32
"""Images of a request: processors enlarge small ones."""
MAX_SIDE = 2**14
MAX_RATIO = 200
"""The longer side by the shorter: models have no positions for more."""


def open_image(url: str) -> Image.Image:
    """Read the header of the image in a `data:` URL. Raises ValueError if there is none, or if it is too large."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("must be a data:image/...;base64, URL; this server fetches nothing")
    with _readable():
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=IMAGE_FORMATS)
    short, long = sorted(image.size)
    if long > MAX_SIDE or short * long > MAX_PIXELS or long > MAX_RATIO * short:
        raise ValueError(
            f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are taken, {MAX_SIDE:,} on a side, and "
            f"sides of 1 to {MAX_RATIO}"
        )
    return image


def check(urls: Sequence[str]) -> None:
    """Check the images of a request, in `data:` URLs, by their headers. Raises ValueError if they are too large."""
    if len(urls) > MAX_IMAGES:
        raise ValueError(f"{len(urls)} images are too many; at most {MAX_IMAGES} are taken")
    if (pixels := sum(math.prod(open_image(url).size) for url in urls)) > MAX_TOTAL_PIXELS:
        raise ValueError(f"the images have {pixels:,} pixels together; at most {MAX_TOTAL_PIXELS:,} are taken")


def pixels_of(data: bytes) -> Image.Image:
    """Decode an image of at most 8 bits a channel, without a palette. Raises ValueError; may take for ever."""
    with _readable():
        image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
        image.load()
    return image if image.mode in MODES else image.convert("RGB")


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ValueError(f"is not a readable image ({', '.join(IMAGE_FORMATS)})") from error
