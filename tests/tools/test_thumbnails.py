import base64
import io

import pytest
from PIL import Image

from onepass_trl.passes import ImageSource
from onepass_trl.tools.thumbnails import SIDE, thumbnail_of
from onepass_trl.vision import ImageError
from tests.images import make_image


def decoded(uri):
    kind, content = uri.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return base64.b64decode(content)


@pytest.mark.parametrize(
    ("size", "small"), [((1000, 500), (160, 80)), ((30, 4000), (1, 160)), ((12, 7), (12, 7))]
)
def test_thumbnails_are_small_and_know_the_size_of_the_image(tmp_path, size, small):
    make_image(*size).save(tmp_path / "a.png")
    thumbnail = thumbnail_of(ImageSource(str(tmp_path / "a.png")))
    assert (thumbnail.width, thumbnail.height) == size
    content = decoded(thumbnail.as_uri())
    assert Image.open(io.BytesIO(content)).size == small
    assert max(small) <= SIDE
    assert len(content) < 40_000


def test_nothing_else_of_the_file_is_embedded():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "secret description"
    make_image(20, 20).save(file, "JPEG", comment=b"secret comment", exif=exif)
    assert file.getvalue().count(b"secret") == 2
    content = decoded(thumbnail_of(ImageSource(content=file.getvalue())).as_uri())
    assert b"secret" not in content


def test_a_broken_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"the image \('.*gone\.png'\) can't be read"):
        thumbnail_of(ImageSource(str(tmp_path / "gone.png")))
