"""Pictures in folders, for styles and reflections."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from arena.core import folders
from arena.core.registry import BadInput


def png(colour, size=(20, 30), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two files and a Parquet file of five pictures in row groups of two; one file beside them."""
    place = tmp_path / "pictures"
    (place / "inside").mkdir(parents=True)
    (place / "b.PNG").write_bytes(png((255, 0, 0)))
    (place / "inside" / "a.png").write_bytes(png((0, 0, 255)))
    (place / "notes.txt").write_text("no picture")
    (place / ".hidden.png").write_bytes(png((9, 9, 9)))
    (place / "folder.png").mkdir()
    rows = [{"bytes": png((0, 40 * k, 0)), "path": None} for k in range(5)]
    table = pa.table({"label": list(range(5)), "img": rows})
    pq.write_table(table, place / "more.parquet", row_group_size=2)
    return place


def test_pictures_are_found_in_files_and_in_parquet(folder):
    found = folders.places(str(folder))
    assert [(place.path.name, place.row) for place in found] == [
        ("b.PNG", -1),
        ("a.png", -1),
        *(("more.parquet", row) for row in range(5)),
    ]
    colours = [folders.read(place, 3, 6, 8) for place in found]
    assert all(colour.shape == (3, 6, 8) for colour in colours)
    assert [(colour[:, 0, 0] * 255).round().tolist() for colour in colours] == [
        [255, 0, 0],
        [0, 0, 255],
        *([0, 40 * k, 0] for k in range(5)),
    ]
    grey = folders.read(found[0], 1, 6, 8)
    assert grey.shape == (1, 6, 8)
    assert float(grey[0, 0, 0]) == pytest.approx(76 / 255)  # the luminance of red


def test_a_picture_is_not_transposed(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((3, 0), (10, 20, 30))
    picture.save(tmp_path / "p.png")
    out = folders.read(folders.places(str(tmp_path))[0], 3, 2, 4)
    assert (out[:, 0, 3] * 255).round().tolist() == [10, 20, 30]


def test_the_digest_follows_names_and_contents(folder):
    before = folders.digest(str(folder))
    (folder / "notes.txt").write_text("still no picture")
    assert folders.digest(str(folder)) == before
    (folder / "b.PNG").write_bytes(png((254, 0, 0)))
    assert folders.digest(str(folder)) != before


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no pictures"):
        folders.places(str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match=r"broken.png cannot be read as a picture"):
        folders.read(folders.places(str(tmp_path))[0], 3, 8, 8)
    Image.new("I;16", (4, 4)).save(tmp_path / "broken.png")
    with pytest.raises(BadInput, match="more than 8 bits"):
        folders.read(folders.places(str(tmp_path))[0], 3, 8, 8)
    (tmp_path / "x.parquet").write_bytes(b"not a table")
    with pytest.raises(BadInput, match=r"x.parquet' cannot be read as a Parquet file"):
        folders.places(str(tmp_path))
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match="no column of encoded images"):
        folders.places(str(tmp_path))


def test_plain_columns_of_bytes_will_do(tmp_path):
    both = pa.array([png((255, 0, 0)), png((0, 0, 255))], pa.binary())
    pq.write_table(pa.table({"label": [1, 2], "png": both}), tmp_path / "p.parquet")
    shown = [folders.read(place, 3, 4, 4)[:, 0, 0] for place in folders.places(str(tmp_path))]
    assert [colour.tolist() for colour in shown] == [[1, 0, 0], [0, 0, 1]]


def test_pictures_that_shrink_are_averaged(tmp_path):
    """As Pillow's Lanczos does; a plain bilinear lookup would see stripes of one colour."""
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (column % 2) for _ in range(64) for column in range(64)])
    stripes.save(tmp_path / "s.png")
    small = folders.read(folders.places(str(tmp_path))[0], 1, 8, 8)
    assert ((small - 0.5).abs() < 0.1).all()
