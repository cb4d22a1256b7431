"""Data sets: specs, readers, splits, cache and the defender's draw."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import io
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import arena.data
from arena.core import progress
from arena.core.seeding import stream
from arena.data import cache, loading, readers, splits
from arena.data.catalogue import CATALOGUE, DataError, describe, parse

REAL = Path(os.environ.get("ARENA_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} in {REAL} (set ARENA_DATA_DIR)")
    return REAL / name


# --- making small files -----------------------------------------------------------------------


def pictures(n: int, *, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(n, side, side, channels) uint8 noise; no last axis where channels = 1."""
    shape = (n, side, side, channels) if channels > 1 else (n, side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_parquet(
    file: Path, images: list, labels: object, names: list[str] | None = None, **columns: object
) -> Path:
    """A Parquet file in the hub's layout; `images` are encoded, or arrays to be encoded as PNG."""
    rows = [
        {"bytes": image if image is None or isinstance(image, bytes) else encoded(image)}
        | {"path": None}
        for image in images
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    data: dict[str, object] = {"image": pa.array(rows, kind)}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        data["label"] = labels
        features["label"] = {"_type": "ClassLabel", "names": names} if names else {}
    table = pa.table(data | columns)
    meta = json.dumps({"info": {"features": features}})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": meta}), file)
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ARENA_CACHE_DIR", str(path))
    monkeypatch.delenv("ARENA_DATA_DIR", raising=False)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 training and 12 test images of two classes."""
    path = tmp_path / "mine"
    write_parquet(path / "train-0.parquet", [*pictures(40)], [0, 1] * 20, ["cat", "dog"])
    write_parquet(path / "test-0.parquet", [*pictures(12, seed=1)], [0, 1] * 6, ["cat", "dog"])
    return path


def entries(own_cache: Path) -> list[Path]:
    return [child for child in own_cache.iterdir() if (child / "meta.json").exists()]


def rows_of(data: arena.data.Dataset) -> dict[str, set[bytes]]:
    return {
        split: {x.numpy().tobytes() for x in getattr(data, split).x}
        for split in ("train", "val", "test")
    }


# --- catalogue and specs ----------------------------------------------------------------------


def test_the_catalogue_imports_nothing_heavy():
    code = (
        "import sys, arena.data; arena.data.describe(); "
        "print(*sorted({'torch', 'numpy', 'pyarrow', 'PIL', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == ""


def test_the_catalogue_says_what_a_user_needs():
    names = [info.name for info in describe()]
    assert names[0] == "signs"
    wanted = "cifar10 svhn gtsrb stl10 celeba8 imagenette mnist fashion_mnist lisa tiny_imagenet_10"
    assert set(wanted.split()) | {"signs", "imagefolder", "parquet"} == set(names)
    for info in describe():
        assert info.summary
        assert info.splits
        assert info.licence
        assert not info.class_names or len(info.class_names) == info.classes
        assert len(info.keep) in (0, info.classes)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("cifar10", "cifar10"),
        ("cifar10:side=32", "cifar10"),
        ("gtsrb:side=48", "gtsrb:side=48"),
        ("signs", "signs:classes=10,side=32,size=10000,seed=0"),
        ("signs: size=8000, classes=20", "signs:classes=20,side=32,size=8000,seed=0"),
        ("imagefolder:a/b", "imagefolder:a/b"),
        ("imagefolder:a,b=c/d,side=16", "imagefolder:a,b=c/d,side=16"),
        ("parquet:C:\\x, y,side=8", "parquet:C:\\x, y,side=8"),
    ],
)
def test_canonical_names(spec, name):
    assert parse(spec).name == name
    assert parse(name).name == name


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("cifar100", "'cifar10'"),
        ("CIFAR10", "'cifar10'"),
        ("", "unknown data set"),
        ("cifar10:", "nothing follows the colon"),
        ("cifar10:size=32", "'side'"),
        ("signs:class=12", "'classes'"),
        ("signs:classes=4", "from 5 to 45, got '4'"),
        ("signs:classes=46", "from 5 to 45"),
        ("signs:side=big", "whole number from 32 to 224, got 'big'"),
        ("signs:side", "got ''"),
        ("signs:seed=1,seed=2", "twice"),
        ("imagefolder", "needs a path"),
        ("imagefolder:,side=3", "needs a path"),
    ],
)
def test_bad_specs_are_named(spec, says):
    with pytest.raises(DataError, match=re.escape(says)) as error:
        parse(spec)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


# --- Parquet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_pixels_and_labels_survive(tmp_path, kind):
    train, test = pictures(30), pictures(9, seed=1)
    labels = np.arange(30) % 3
    names = ["a", "b", "c"]
    write_parquet(tmp_path / "train.parquet", [encoded(x, kind) for x in train], labels, names)
    write_parquet(tmp_path / "test.parquet", [encoded(x, kind) for x in test], [2] * 9, names)
    data = arena.data.load(f"parquet:{tmp_path}")
    assert data.classes == ("a", "b", "c")
    assert data.shape == (3, 8, 8)
    assert data.num_classes == 3
    assert data.train.x.dtype == data.test.x.dtype == torch.uint8
    assert data.train.y.dtype == torch.int64
    assert torch.equal(data.test.x, torch.from_numpy(test).permute(0, 3, 1, 2))
    assert data.test.y.tolist() == [2] * 9
    label_of = {x.transpose(2, 0, 1).tobytes(): y for x, y in zip(train, labels, strict=True)}
    for part in (data.train, data.val):
        assert [label_of[x.numpy().tobytes()] for x in part.x] == part.y.tolist()
    assert len(data.train) + len(data.val) == 30


def test_jpeg_is_decoded_as_pillow_does(tmp_path):
    files = [encoded(x, "JPEG") for x in pictures(6)]
    write_parquet(tmp_path / "train.parquet", files, [0, 1] * 3)
    write_parquet(tmp_path / "test.parquet", files, [0, 1] * 3)
    data = arena.data.load(f"parquet:{tmp_path}")
    for x, file in zip(data.test.x, files, strict=True):
        assert np.array_equal(x.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(file))))


def test_shards_come_in_numeric_order(tmp_path):
    images = pictures(12)
    for shard in range(12):  # as text, "10" stands before "2"
        write_parquet(tmp_path / f"train-{shard}.parquet", [images[shard]], [shard % 2])
        write_parquet(tmp_path / f"test-{shard}.parquet", [images[shard]], [shard % 2])
    data = arena.data.load(f"parquet:{tmp_path}")
    assert torch.equal(data.test.x, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert data.test.y.tolist() == [0, 1] * 6


def test_chunks_join_without_seam(folder, monkeypatch):
    whole = arena.data.load(f"parquet:{folder}", cache_dir=folder / "a")
    monkeypatch.setattr(readers, "_CHUNK", 7)
    parts = arena.data.load(f"parquet:{folder}", cache_dir=folder / "b")
    assert whole.fingerprint == parts.fingerprint


@pytest.mark.parametrize("column", ["img", "picture"])
def test_columns_are_found_by_what_they_hold(folder, column):
    for split in ("train", "test"):
        table = pq.read_table(folder / f"{split}-0.parquet")
        other = {"note": ["x"] * len(table), column: table["image"], "labels": table["label"]}
        pq.write_table(pa.table(other), folder / f"{split}-0.parquet")
    data = arena.data.load(f"parquet:{folder}")
    assert data.classes == ("0", "1")
    assert data.test.y.tolist() == [0, 1] * 6


def test_grey_stays_one_channel(tmp_path):
    images = pictures(8, channels=1)
    write_parquet(tmp_path / "train.parquet", [*images], [0, 1] * 4)
    write_parquet(tmp_path / "test.parquet", [*images], [0, 1] * 4)
    data = arena.data.load(f"parquet:{tmp_path}")
    assert data.shape == (1, 8, 8)
    assert torch.equal(data.test.x[:, 0], torch.from_numpy(images))


def test_every_mode_becomes_grey_or_colour(tmp_path):
    colour = Image.fromarray(pictures(1)[0])
    grey = Image.fromarray(pictures(1, channels=1)[0])
    clear = colour.convert("RGBA")
    clear.putalpha(7)
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.info["transparency"] = bytes(range(256))
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    images = [colour, grey, clear, palette, deep]
    files = [encoded(image) for image in images]
    write_parquet(tmp_path / "train.parquet", files, [0] * 5)
    write_parquet(tmp_path / "test.parquet", files, [0] * 5)
    x = arena.data.load(f"parquet:{tmp_path}").test.x.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(x[0], colour)
    assert np.array_equal(x[1], grey.convert("RGB"))
    assert np.array_equal(x[2], colour)
    assert np.array_equal(x[3], palette.convert("RGBA").convert("RGB"))
    assert np.array_equal(x[4][..., 0], np.asarray(deep) >> 8)
    write_parquet(tmp_path / "grey" / "train.parquet", [encoded(grey), encoded(deep)] * 2, [0] * 4)
    assert arena.data.load(f"parquet:{tmp_path / 'grey'}").shape == (1, 8, 8)


def test_a_side_resizes(tmp_path):
    images = [Image.fromarray(pictures(1, side=side)[0]) for side in (8, 16, 40)]
    files = [encoded(image) for image in images]
    write_parquet(tmp_path / "train.parquet", files, [0] * 3)
    write_parquet(tmp_path / "test.parquet", files, [0] * 3)
    with pytest.raises(DataError, match=r"vary in size \(8x8 in row 0 of .*16x16 in row 1"):
        arena.data.load(f"parquet:{tmp_path}")
    data = arena.data.load(f"parquet:{tmp_path},side=12")
    assert data.shape == (3, 12, 12)
    for x, image in zip(data.test.x, images, strict=True):
        small = image.resize((12, 12), Image.Resampling.BILINEAR)
        assert np.array_equal(x.permute(1, 2, 0), small)


def test_images_of_the_catalogue_have_its_side_and_channels(tmp_path):
    names = list("0123456789")
    write_parquet(tmp_path / "mnist/train.parquet", [*pictures(40)], [*range(10)] * 4, names)
    data = arena.data.load("mnist", data_dir=tmp_path)
    assert (data.name, data.shape) == ("mnist", (1, 28, 28))
    assert arena.data.load("mnist:side=16", data_dir=tmp_path).name == "mnist:side=16"


def test_the_environment_names_the_data_directory(tmp_path, monkeypatch):
    write_parquet(tmp_path / "mnist/train.parquet", [*pictures(40)], [*range(10)] * 4)
    monkeypatch.setenv("ARENA_DATA_DIR", str(tmp_path))
    data = arena.data.load("mnist")
    assert data.classes == tuple("0123456789")
    assert str(tmp_path) not in data.source
    assert hashlib.sha256((tmp_path / "mnist/train.parquet").read_bytes()).hexdigest()[:16] in (
        data.source
    )


def test_attributes_make_the_label_of_celeba8(tmp_path):
    bits = [[(i >> shift) & 1 == 1 for i in range(8)] * 2 for shift in (2, 1, 0)]
    columns = dict(zip(CATALOGUE["celeba8"].attributes, bits, strict=True))
    columns |= {"Bald": [True] * 16}
    for split in ("train", "valid", "test"):
        images = [*pictures(16, seed=len(split))]
        write_parquet(tmp_path / f"celeba8/{split}.parquet", images, None, **columns)
    data = arena.data.load("celeba8", data_dir=tmp_path)
    assert data.test.y.tolist() == [*range(8)] * 2
    assert data.val.y.tolist() == [*range(8)] * 2
    assert data.classes[0] == "no makeup, mouth closed, not smiling"
    assert data.classes[5] == "makeup, mouth closed, smiling"


def test_the_validation_files_are_the_test_set_where_the_hub_has_no_other(tmp_path):
    place = tmp_path / "imagenette"
    write_parquet(place / "train-0.parquet", [*pictures(40, side=9)], [*range(10)] * 4)
    write_parquet(place / "validation-0.parquet", [*pictures(20, side=9)], [*range(10)] * 2)
    data = arena.data.load("imagenette:side=9", data_dir=tmp_path)
    assert [len(data.train), len(data.val), len(data.test)] == [36, 4, 20]


# --- faults -----------------------------------------------------------------------------------


def spoil(folder: Path, what: str) -> None:
    file = folder / "train-0.parquet"
    images, names = [*pictures(20)], ["cat", "dog"]
    if what == "file":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "page":
        raw = bytearray(file.read_bytes())
        raw[4:2000] = bytes(1996)
        file.write_bytes(raw)
    elif what == "image":
        images[7] = encoded(images[7])[:60]
        write_parquet(file, images, [0, 1] * 10, names)
    elif what == "format":
        images[3] = b"no image"
        write_parquet(file, images, [0, 1] * 10, names)
    elif what == "bytes":
        images[5] = None
        write_parquet(file, images, [0, 1] * 10, names)
    elif what == "column":
        write_parquet(file, images, None)
    elif what == "no image column":
        pq.write_table(pa.table({"label": [0, 1]}), file)
    elif what == "text labels":
        write_parquet(file, images, ["cat", "dog"] * 10)
    elif what == "null label":
        write_parquet(file, images, [0] * 4 + [None] + [1] * 15, names)
    elif what == "label range":
        write_parquet(file, images, [0] * 9 + [2] + [1] * 10, names)
    elif what == "negative label":
        write_parquet(file, images, [0] * 9 + [-1] + [1] * 10)
    elif what == "class count":
        write_parquet(file, images, [0, 1] * 10, ["cat", "dog", "cow"])
    elif what == "class names":
        write_parquet(file, images, [0, 1] * 10, ["cat", "cow"])
    elif what == "unnamed class":
        write_parquet(file, images, [0] * 20)
        write_parquet(folder / "test-0.parquet", images, [0, 1] * 10)
    elif what == "shard":
        file.rename(folder / "train-00000-of-00003.parquet")
    elif what == "no rows":
        write_parquet(file, [], pa.array([], pa.int64()), names)
    elif what == "no test rows":
        write_parquet(folder / "test-0.parquet", [], pa.array([], pa.int64()), names)
    elif what == "train":
        file.unlink()
    elif what == "all":
        file.unlink()
        (folder / "test-0.parquet").unlink()
    elif what == "shard columns":
        write_parquet(folder / "train-1.parquet", images, [0, 1] * 10, ["one", "two"])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("file", r"train-0\.parquet is not a Parquet file"),
        ("page", r"train-0\.parquet"),
        ("image", r"row 7 of .*train-0\.parquet holds a damaged image"),
        ("format", r"row 3 of .*train-0\.parquet holds a damaged image \(of no known format\)"),
        ("bytes", r"row 5 of .*train-0\.parquet has no image bytes"),
        ("column", r"train-0\.parquet has no column 'label', only 'image'"),
        ("no image column", r"train-0\.parquet has no column of encoded images"),
        ("text labels", r"label column 'label' of .* holds string"),
        ("null label", r"row 4 of .* has no label"),
        ("label range", r"row 9 of .* has the label 2, which must be from 0 to 1"),
        ("negative label", r"row 9 of .* has the label -1, which must be 0 or more"),
        ("class count", r"differ in their number of classes: 3 and 2"),
        ("class names", r"name their classes differently: 'cow' and 'dog'"),
        ("unnamed class", r"test split .* has the label 1, but there are 1 classes"),
        ("shard", r"holds 1 of the 3 train files"),
        ("no rows", r"no images in its training split"),
        ("no test rows", r"no images left for its test split"),
        ("train", r"has no train-\*\.parquet, only test"),
        ("all", r"holds no Parquet files: expected .*train-\*\.parquet"),
        ("shard columns", r"the train files in .* differ in their columns"),
    ],
)
def test_faults_are_one_sentence_that_names_the_culprit(folder, own_cache, monkeypatch, what, says):
    monkeypatch.setattr(readers, "_CHUNK", 4)
    spoil(folder, what)
    with pytest.raises(DataError, match=says) as error:
        arena.data.load(f"parquet:{folder}")
    assert "\n" not in str(error.value)
    assert [child for child in own_cache.iterdir() if child.is_dir()] == [own_cache / "sha256"]


def test_a_data_set_of_another_class_count_is_refused(tmp_path):
    names = [str(i) for i in range(9)]
    write_parquet(tmp_path / "cifar10/train.parquet", [*pictures(18)], [*range(9)] * 2, names)
    with pytest.raises(DataError, match="cifar10 has 10 classes, but the data has 9"):
        arena.data.load("cifar10", data_dir=tmp_path)


def test_missing_places_are_named_with_what_is_expected(tmp_path):
    absent = tmp_path / "absent"
    with pytest.raises(DataError, match=r"absent does not exist: .*absent/cifar10/train-\*"):
        arena.data.load("cifar10", data_dir=absent)
    (tmp_path / "data/gtsrb").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no Parquet files of cifar10: .*\(there: gtsrb\)"):
        arena.data.load("cifar10", data_dir=tmp_path / "data")
    with pytest.raises(DataError, match=r"there is no folder .*absent"):
        arena.data.load(f"imagefolder:{absent}")
    with pytest.raises(DataError, match="no copy of lisa is known on the Hugging Face hub"):
        arena.data.load("lisa")


# --- folders of images ------------------------------------------------------------------------


def write_classes(root: Path, count: int = 10, classes: tuple[str, ...] = ("10", "2")) -> None:
    for seed, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, x in enumerate(pictures(count, seed=seed)):
            Image.fromarray(x).save(root / name / f"{i}.png")
    (root / classes[0] / "notes.txt").write_text("not an image")
    (root / classes[0] / ".hidden.png").write_text("not an image")


def test_class_folders(tmp_path):
    write_classes(tmp_path)
    data = arena.data.load(f"imagefolder:{tmp_path}")
    assert data.classes == ("2", "10")
    assert [len(data.train), len(data.val), len(data.test)] == [17, 1, 2]
    for part in (data.train, data.val, data.test):
        for x, y in part_rows(part):
            assert any(np.array_equal(x, z) for z in pictures(10, seed=1 - y))


def part_rows(part):
    return [(x.permute(1, 2, 0).numpy(), int(y)) for x, y in zip(part.x, part.y, strict=True)]


def test_split_folders(tmp_path):
    for split, count in (("train", 6), ("valid", 3), ("test", 11)):
        write_classes(tmp_path / split, count)
    data = arena.data.load(f"imagefolder:{tmp_path}")
    assert [len(data.train), len(data.val), len(data.test)] == [12, 6, 22]
    # Rows are numbered by file name, so 10.png is the last and not the third.
    assert np.array_equal(data.test.x[10].permute(1, 2, 0), pictures(11, seed=1)[10])


def test_a_known_data_set_may_lie_in_class_folders(tmp_path):
    write_classes(tmp_path / "lisa", 2, tuple(f"sign{i}" for i in range(18)))
    data = arena.data.load("lisa", data_dir=tmp_path)
    assert data.classes[0] == "sign0"
    assert data.shape == (3, 32, 32)


def test_folder_faults(tmp_path):
    with pytest.raises(DataError, match="holds no folders of images"):
        arena.data.load(f"imagefolder:{tmp_path}")
    write_classes(tmp_path / "a")
    (tmp_path / "a" / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images, though it is a class"):
        arena.data.load(f"imagefolder:{tmp_path / 'a'}")
    write_classes(tmp_path / "b" / "train")
    write_classes(tmp_path / "b" / "test", classes=("2", "3"))
    with pytest.raises(DataError, match="train and test differ in 10, 3"):
        arena.data.load(f"imagefolder:{tmp_path / 'b'}")
    write_classes(tmp_path / "c")
    (tmp_path / "c" / "2" / "7.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2/7\.png holds a damaged image"):
        arena.data.load(f"imagefolder:{tmp_path / 'c'}")


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` reading Parquet files: hub.files[(id, config, split)] = file."""
    import datasets

    fake = SimpleNamespace(files={}, calls=[], cache=None)

    def load_dataset(path, name=None, *, split):
        fake.calls.append((path, name, split))
        if (path, name, split) not in fake.files:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub\n(a second line)")
        table = pq.read_table(fake.files[path, name, split])
        url = f"hf://datasets/{path}@{'0123456789' * 4}/{split}.parquet"
        info = datasets.DatasetInfo(
            features=datasets.Features.from_arrow_schema(table.schema),
            download_checksums={url: {}},
        )
        return datasets.Dataset(table, info=info)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


def test_hub_and_local_copy_agree(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    for split, n in (("train", 60), ("test", 20)):
        file = tmp_path / f"svhn/{split}.parquet"
        labels, names = [i % 10 for i in range(n)], list("0123456789")
        write_parquet(file, [*pictures(n, seed=n)], labels, names)
        hub.files["ufldl-stanford/svhn", "cropped_digits", split] = file
    remote = arena.data.load("svhn")
    local = arena.data.load("svhn", data_dir=tmp_path)
    assert remote.fingerprint == local.fingerprint
    assert remote.name == local.name == "svhn"
    assert remote.source == (
        "Hugging Face hub: ufldl-stanford/svhn (cropped_digits), "
        "revision 0123456789012345678901234567890123456789"
    )
    assert len(hub.calls) == 2
    hub.files.clear()  # what was fetched once is there without a network
    assert arena.data.load("svhn").fingerprint == local.fingerprint


def test_without_a_network_the_sentence_says_what_to_do(hub):
    with pytest.raises(DataError, match="'signs'") as error:
        arena.data.load("cifar10")
    assert "--data-dir" in str(error.value)
    assert "Couldn't reach 'uoft-cs/cifar10'" in str(error.value)
    assert "second line" not in str(error.value)


def test_a_damaged_image_of_the_hub_is_named_by_its_row(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    images = [*pictures(20)]
    images[12] = b"no image"
    for split in ("train", "test"):
        file = write_parquet(tmp_path / f"{split}.parquet", images, [*range(10)] * 2)
        hub.files["uoft-cs/cifar10", None, split] = file
    with pytest.raises(DataError, match=r"row 12 of uoft-cs/cifar10 \(train\) holds a damaged"):
        arena.data.load("cifar10")


def test_ten_classes_are_kept_of_tiny_imagenet(tmp_path, hub):
    info = CATALOGUE["tiny_imagenet_10"]
    names = sorted([*info.keep, "n01629819", "n09999999"], reverse=True)
    kept = [names.index(name) for name in info.keep]
    grey, colour = pictures(1, side=64, channels=1)[0], pictures(1, side=64)[0]
    labels = [label for label in range(12) for _ in range(403)]
    images = [encoded(grey)] + [encoded(colour)] * (len(labels) - 1)
    train = write_parquet(tmp_path / "a.parquet", images, labels, names)
    test = write_parquet(
        tmp_path / "b.parquet", [grey, *[colour] * 12], [kept[3], *range(12)], names
    )
    hub.files = {("zh-plus/tiny-imagenet", None, "train"): train}
    hub.files["zh-plus/tiny-imagenet", None, "valid"] = test
    data = arena.data.load("tiny_imagenet_10")
    assert [len(data.train), len(data.val), len(data.test)] == [3600, 400, 10]
    assert sorted(data.test.y.tolist()) == [*range(10)]
    # names run backwards, so the kept labels come in falling order
    assert data.test.y.tolist() == [*range(10)][::-1]
    assert data.classes[0] == "goldfish"
    assert torch.bincount(data.val.y).tolist() == [40] * 10


# --- signs ------------------------------------------------------------------------------------


def test_signs_are_generated_once(monkeypatch, own_cache):
    from arena.data import signs

    signature, calls = inspect.signature(signs.generate), []

    def generate(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        calls.append(given["split"])
        rng = stream(given["seed"], given["split"])
        shape = (given["count"], 3, given["side"], given["side"])
        x = torch.randint(256, shape, dtype=torch.uint8, generator=rng)
        return x, torch.arange(given["count"]) % given["classes"]

    monkeypatch.setattr(signs, "generate", generate)
    first = arena.data.load("signs:size=150,classes=5", data_dir="/ignored")
    again = arena.data.load("signs:classes=5,size=150,seed=0")
    other = arena.data.load("signs:classes=5,size=150,seed=1")
    assert calls == ["train", "val", "test"] * 2
    assert first.name == "signs:classes=5,side=32,size=150,seed=0"
    assert [len(first.train), len(first.val), len(first.test)] == [150, 500, 1000]
    assert first.classes == signs.class_names(5)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_sign_limits_are_those_of_the_generator():
    from arena.data import signs

    fields = CATALOGUE["signs"].fields
    assert fields["classes"][:2] == signs.CLASS_LIMITS
    assert fields["side"][:2] == signs.SIDE_LIMITS


# --- splits -----------------------------------------------------------------------------------


def labels_of(counts: list[int], sorted_rows: bool = False) -> torch.Tensor:
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    return y if sorted_rows else y[torch.randperm(len(y), generator=stream(0, "labels"))]


@pytest.mark.parametrize(
    ("name", "train", "test", "sizes"),
    [
        ("cifar10", [5_000] * 10, [1_000] * 10, (48_000, 2_000, 10_000)),
        ("svhn", [7_325] * 9 + [7_332], [2_603] * 9 + [2_605], (67_257, 6_000, 26_032)),
        ("lisa", [391] * 17 + [396], None, (5_635, 704, 704)),
        ("stl10", [500] * 10, [800] * 10, (4_800, 200, 8_000)),
    ],
)
def test_published_sizes(name, train, test, sizes):
    labels = {"train": labels_of(train)} | ({"test": labels_of(test)} if test else {})
    plan = splits.assign(labels, CATALOGUE[name])
    assert tuple(len(rows) for _, rows in plan.values()) == sizes
    if CATALOGUE[name].first:
        assert plan["val"][1].tolist() == [*range(sizes[1])]


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda c: sum(c) >= 10),
    has_test=st.booleans(),
    has_val=st.booleans(),
    name=st.sampled_from(["cifar10", "gtsrb", "mnist", "lisa"]),
)
def test_splits_share_no_row_and_lose_none(counts, has_test, has_val, name):
    y = labels_of(counts)
    labels = {"train": y} | ({"test": y} if has_test else {}) | ({"val": y} if has_val else {})
    plan = splits.assign(labels, dataclasses.replace(CATALOGUE[name], first=3))
    drawn = torch.cat([rows for source, rows in plan.values() if source == "train"])
    assert drawn.sort().values.tolist() == [*range(len(y))]
    assert all(bool((rows[1:] > rows[:-1]).all()) for _, rows in plan.values())
    assert plan["train"][0] == "train"


@pytest.mark.parametrize("frames", [10, 30])
def test_no_track_is_cut(frames):
    tracks = [7, 75, 14, 23, 9, 40, 12, 8, 21, 30, 11, 60]
    counts = [n * frames for n in tracks]
    counts[3] -= 1  # one track is a frame short, late in its class
    track_of = torch.cat(
        [
            torch.arange(n) // frames + 1_000 * c
            if c != 3
            else (torch.arange(n) + (torch.arange(n) >= 20 * frames - 1)) // frames + 3_000
            for c, n in enumerate(counts)
        ]
    )
    y = labels_of(counts, sorted_rows=True)
    plan = splits.assign({"train": y, "test": y}, CATALOGUE["gtsrb"])
    kept, held = (track_of[plan[split][1]] for split in ("train", "val"))
    assert not set(kept.tolist()) & set(held.tolist())
    assert len(held) / len(y) == pytest.approx(0.1, abs=0.02)
    assert set(y[plan["val"][1]].tolist()) == set(range(len(tracks)))


def test_unsorted_tracks_are_said_to_be_lost(caplog):
    y = labels_of([300] * 5)
    with caplog.at_level(logging.WARNING, "arena"):
        plan = splits.assign({"train": y, "test": y}, CATALOGUE["gtsrb"])
    assert "not sorted by class into tracks" in caplog.text
    assert len(plan["val"][1]) == 150


# --- the defender's images --------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda c: sum(c) >= 5),
    share=st.floats(0.05, 0.9) | st.just(1.0),
    poison=st.floats(0, 0.5),
    seed=st.integers(0, 5),
    mask=st.booleans(),
)
def test_clean_draws(counts, share, poison, seed, mask):
    y = labels_of(counts)
    n = len(y)
    bad = torch.randperm(n, generator=stream(seed, "poison"))[: int(poison * n)]
    free = torch.ones(n, dtype=torch.bool)
    free[bad] = False
    k = round(share * n) if share < 1 else n - len(bad)
    exclude = ~free if mask else bad
    if not 1 <= k <= n - len(bad):
        with pytest.raises(ValueError, match="cannot draw"):
            arena.data.draw_clean(y, share, stream(seed, "clean"), exclude)
        return
    rows = arena.data.draw_clean(y, share, stream(seed, "clean"), exclude)
    assert rows.dtype == torch.int64
    assert len(rows) == k
    assert bool((rows[1:] > rows[:-1]).all())
    assert not set(rows.tolist()) & set(bad.tolist())
    present = set(y[free].tolist())
    if k >= len(present):
        assert set(y[rows].tolist()) == present
    again = arena.data.draw_clean(y, share, stream(seed, "clean"), exclude)
    assert torch.equal(rows, again)
    got, ideal = torch.bincount(y[rows], minlength=len(counts)), torch.tensor(counts) * k / n
    room = torch.bincount(y[free], minlength=len(counts))
    if bool((room >= ideal.ceil()).all()) and bool((ideal[room > 0] >= 1).all()):
        assert float((got - ideal).abs().max()) < 1


def test_clean_draws_are_paired():
    y = labels_of([1_000] * 10)
    without = arena.data.draw_clean(y, 0.05, stream(3, "clean"))
    bad = torch.randperm(10_000, generator=stream(0, "poison"))[:1_000]
    paired = arena.data.draw_clean(y, 0.05, stream(3, "clean"), bad)
    common = set(without.tolist()) & set(paired.tolist())
    assert common == set(without.tolist()) - set(bad.tolist())
    assert torch.bincount(y[paired]).tolist() == [50] * 10
    other = arena.data.draw_clean(y, 0.05, stream(4, "clean"))
    assert len(set(without.tolist()) & set(other.tolist())) < 60


def test_seats_go_by_largest_remainder():
    y = labels_of([50, 31, 19])  # of 7 seats: 3.5, 2.17, 1.33
    rows = arena.data.draw_clean(y, 0.07, stream(0, "clean"))
    assert torch.bincount(y[rows]).tolist() == [4, 2, 1]
    rows = arena.data.draw_clean(labels_of([96, 2, 2]), 0.05, stream(0, "clean"))
    assert torch.bincount(labels_of([96, 2, 2])[rows]).tolist() == [3, 1, 1]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), 0.001])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"share|cannot draw 0"):
        arena.data.draw_clean(labels_of([10, 10]), share, stream(0, "clean"))


# --- cache ------------------------------------------------------------------------------------


def test_the_fingerprint_is_over_pixels_labels_and_class_count(folder):
    data = arena.data.load(f"parquet:{folder}")
    whole = hashlib.sha256(b"classes=2")
    for split in ("train", "val", "test"):
        part = getattr(data, split)
        whole.update(f";{split}={(len(part), *data.shape)};".encode())
        whole.update(hashlib.sha256(part.x.numpy().tobytes()).digest())
        whole.update(hashlib.sha256(part.y.numpy().astype("<i8").tobytes()).digest())
    assert data.fingerprint == whole.hexdigest()


def test_nothing_is_read_twice(folder, monkeypatch):
    first = arena.data.load(f"parquet:{folder}")

    def fail(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(readers, "open_parquet", fail)
    monkeypatch.setattr(hashlib, "file_digest", fail)
    again = arena.data.load(f"parquet:{folder}")
    assert again.fingerprint == first.fingerprint
    assert again.source == first.source


def test_the_same_files_elsewhere_are_the_same_data(folder, own_cache):
    first = arena.data.load(f"parquet:{folder}")
    moved = folder.rename(folder.parent / "moved")
    again = arena.data.load(f"parquet:{moved}")
    assert again.fingerprint == first.fingerprint
    assert len(entries(own_cache)) == 1


def test_changed_files_are_read_again(folder):
    first = arena.data.load(f"parquet:{folder}")
    test = [*pictures(12, seed=2)]
    write_parquet(folder / "test-0.parquet", test, [0, 1] * 6, ["cat", "dog"])
    again = arena.data.load(f"parquet:{folder}")
    assert again.fingerprint != first.fingerprint
    assert np.array_equal(again.test.x[0].permute(1, 2, 0), test[0])


def test_a_change_of_the_same_size_is_noticed(own_cache):
    file, root = own_cache / "some.parquet", cache.directory(None)
    for text in (b"one", b"two"):
        file.write_bytes(text)
        os.utime(file, ns=(0, text[0]))
        assert cache.file_digests([file], root) == [hashlib.sha256(text).hexdigest()]


def test_tensors_can_be_written_to_and_the_cache_stays(folder):
    first = arena.data.load(f"parquet:{folder}")
    before = first.train.x.clone()
    first.train.x.zero_()
    assert torch.equal(arena.data.load(f"parquet:{folder}").train.x, before)


@pytest.mark.parametrize("damage", ["short", "long", "gone", "json", "keys", "kind", "no meta"])
def test_damage_is_noticed_said_and_mended(folder, own_cache, caplog, damage):
    first = arena.data.load(f"parquet:{folder}")
    before = first.train.x.clone()
    (entry,) = entries(own_cache)
    x, meta = entry / "train_x.npy", entry / "meta.json"
    if damage == "short":
        x.write_bytes(x.read_bytes()[:-9])
    elif damage == "long":
        x.write_bytes(x.read_bytes() + b"..")
    elif damage == "gone":
        x.unlink()
    elif damage == "json":
        meta.write_text(meta.read_text()[:40])
    elif damage == "keys":
        meta.write_text("{}")
    elif damage == "kind":
        meta.write_text("[1]")
    elif damage == "no meta":
        meta.unlink()
    with caplog.at_level(logging.WARNING, "arena"):
        again = arena.data.load(f"parquet:{folder}")
    assert "is damaged" in caplog.text
    assert caplog.text.count("\n") == 1
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.x, before)


def test_a_damaged_memory_of_digests_is_made_anew(folder, own_cache):
    first = arena.data.load(f"parquet:{folder}")
    (memory,) = (own_cache / "sha256").iterdir()
    memory.write_text("[]")
    assert arena.data.load(f"parquet:{folder}").fingerprint == first.fingerprint
    assert len(json.loads(memory.read_text())) == 2


def test_one_of_several_makes_it_and_the_others_wait(folder, monkeypatch):
    written, write = [], cache._write
    monkeypatch.setattr(cache, "_write", lambda *args: (written.append(1), write(*args)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: arena.data.load(f"parquet:{folder}"), range(8)))
    assert len(written) == 1
    assert len({data.fingerprint for data in found}) == 1


def test_a_full_disk_is_said_and_leaves_nothing(folder, own_cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
        with pytest.raises(DataError, match=r"no room in the cache .* 0 MB are free"):
            arena.data.load(f"parquet:{folder}")

    def fsync(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", fsync)
        with pytest.raises(DataError, match="no room in the cache"):
            arena.data.load(f"parquet:{folder}")
    assert [child for child in own_cache.iterdir() if child.is_dir()] == [own_cache / "sha256"]


def test_a_cache_that_cannot_be_written_is_said(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set ARENA_CACHE_DIR"):
        arena.data.load(f"parquet:{folder}", cache_dir=tmp_path / "file")


def test_what_a_killed_process_left_is_cleared(folder, own_cache):
    arena.data.load(f"parquet:{folder}")
    (entry,) = entries(own_cache)
    left = own_cache / f"{entry.name}.tmpdead"
    left.mkdir()
    (entry / "meta.json").unlink()
    arena.data.load(f"parquet:{folder}")
    assert not left.exists()


def test_progress_is_reported(folder):
    heard = []
    with progress.listening(lambda what, done, total, figures: heard.append((what, done, total))):
        arena.data.load(f"parquet:{folder}")
    assert heard[-1] == (f"parquet:{folder}", 52, 52)


def test_a_new_reading_rule_makes_a_new_entry(folder, own_cache, monkeypatch):
    arena.data.load(f"parquet:{folder}")
    monkeypatch.setattr(loading, "_READING", 0)
    arena.data.load(f"parquet:{folder}")
    assert len(entries(own_cache)) == 2


# --- the real files ---------------------------------------------------------------------------


def opened(name: str) -> readers.Source:
    info = CATALOGUE[name]
    return readers.open_parquet(readers.parquet_files(real(name), info), info, name)


@pytest.mark.parametrize(
    ("name", "split", "rows", "labels", "corner"),
    [
        ("cifar10", "train", 50_000, [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [59, 62, 63]),
        ("cifar10", "test", 10_000, [3, 8, 8, 0, 6, 6, 1, 6, 3, 1], [158, 112, 49]),
        ("mnist", "train", 60_000, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [0]),
        ("mnist", "test", 10_000, [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], [0]),
        ("fashion_mnist", "test", 10_000, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7], [0]),
        ("gtsrb", "test", 12_630, [16, 1, 38, 33, 11, 38, 18, 12, 25, 35], None),
    ],
)
def test_published_files_are_read_in_their_order(name, split, rows, labels, corner):
    source, info = opened(name), CATALOGUE[name]
    assert len(source.splits[split].labels) == rows
    assert source.splits[split].labels[:10].tolist() == labels
    assert len(source.classes) == info.classes
    shape = (info.channels, info.side, info.side)
    _, x = next(readers.decode(source.splits[split], np.arange(1), shape))
    assert x.shape == (1, *shape)
    if corner is not None:
        assert x[0, :, 0, 0].tolist() == corner


def test_the_tracks_of_the_real_gtsrb_stay_whole():
    """Tracks told apart by their pixels in the one class with a short one (rows 190 to 198)."""
    y = torch.from_numpy(opened("gtsrb").splits["train"].labels)
    plan = splits.assign({"train": y, "test": y}, CATALOGUE["gtsrb"])
    held = plan["val"][1]
    assert (len(y), len(held)) == (13_069, 1_330)
    starts = torch.bincount(y).cumsum(0) - torch.bincount(y)
    place = held - starts[y[held]]
    assert all(int(place[y[held] == c].max()) % 10 == 9 for c in range(43))
    assert int(place[y[held] == 33].max()) < 190


def test_tiny_imagenet_loads(own_cache):
    data = arena.data.load("tiny_imagenet_10", data_dir=real("tiny_imagenet_10").parent)
    assert [len(data.train), len(data.val), len(data.test)] == [3_600, 400, 496]
    assert data.shape == (3, 64, 64)
    assert torch.bincount(data.val.y).tolist() == [40] * 10
    found = rows_of(data)
    assert not found["train"] & found["val"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "fingerprint"),
    [
        ("cifar10", [48_000, 2_000, 10_000], "a9a44630561577a1"),
        ("gtsrb", [11_739, 1_330, 12_630], "da029b626ad8ab51"),
        ("mnist", [57_600, 2_400, 10_000], "a760314ce0443b51"),
        ("fashion_mnist", [19_200, 800, 10_000], "47e68180669d0939"),
    ],
)
def test_whole_data_sets_have_their_fingerprints(name, sizes, fingerprint):
    data = arena.data.load(name, data_dir=real(name).parent)
    assert [len(data.train), len(data.val), len(data.test)] == sizes
    assert data.fingerprint[:16] == fingerprint
