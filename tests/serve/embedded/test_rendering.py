"""The process for templates and images: it is ended when it takes too long, and the next request has another."""

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from w8a8.serve.embedded.images import check
from w8a8.serve.embedded.rendering import Renderer
from w8a8.serve.embedded.worker import RefusedError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer()
    yield made
    made.close()


def file(image: Image.Image, kind: str, **how: Any) -> bytes:
    written = BytesIO()
    image.save(written, kind, **how)
    return written.getvalue()


def url(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_an_image_is_what_pillow_decodes(renderer: Renderer, kind: str, mode: str) -> None:
    if kind == "JPEG" and mode in {"P", "RGBA"}:
        mode = "CMYK"
    picture = Image.linear_gradient("L").resize((33, 7)).convert("RGB").convert(mode)
    data = file(picture, kind)
    [found] = renderer.decode([url(data, kind)])
    assert found.mode in {"L", "RGB", "RGBA"}
    assert found.convert("RGB").tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()


def test_a_picture_that_takes_minutes_is_ended(renderer: Renderer) -> None:
    """A JPEG of 400 kB: one pass over its 16 million pixels, said ten thousand times."""
    jpeg = file(Image.new("L", (4096, 4096), 9), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    slow = url(jpeg[:-2] + last * 10_000 + jpeg[-2:], "JPEG")
    check([slow])
    with pytest.raises(RefusedError, match="did not end within 5 s"):
        renderer.decode([slow])
    sound = url(file(Image.new("RGB", (8, 8)), "PNG"), "PNG")
    assert [image.size for image in renderer.decode([sound, sound])] == [(8, 8)] * 2
    assert renderer.render("{{ messages[0].b }}{{ a }}", [{"b": "c"}], given={"a": 1}) == "c1"


def test_a_damaged_picture_is_refused_and_the_next_is_not(renderer: Renderer) -> None:
    data = file(Image.effect_noise((200, 200), 9), "PNG")
    with pytest.raises(RefusedError, match="not a readable image"):
        renderer.decode([url(data[:4000], "PNG")])
    assert len(renderer.decode([url(data, "PNG")])) == 1
