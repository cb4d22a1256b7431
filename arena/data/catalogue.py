"""The data sets that the arena knows, and the spec strings that name them.

A spec is ``name`` or ``name:field=value,field=value``, such as ``cifar10``, ``gtsrb:side=48`` or
``signs:classes=20,size=8000``. For data of your own the path stands after the colon:
``imagefolder:photos,side=64``, ``parquet:../data/mine``. This module imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from arena.core.registry import BadInput, nearest


class DataError(BadInput):
    """Data that cannot be used, or a request that names none; one sentence says why."""


@dataclass(frozen=True)
class DatasetInfo:
    """One line of the catalogue."""

    name: str
    summary: str
    splits: str  # how the three splits come about, in words
    licence: str  # as far as known, and what to cite
    classes: int | None = None  # None: as many as the data has
    side: int | None = None  # pixels; images are resized to this unless the spec says otherwise
    channels: int | None = None  # 1 grey, 3 RGB; None: as the images are
    hub: str | None = None  # Hugging Face hub id
    hub_config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=lambda: _AS_NAMED)
    first: int = 0  # validation = this many first training images, in file order
    share: float = 0.04  # else: this share of them, drawn by class with a fixed seed
    test_share: float = 0.1  # where the source has no test split: drawn alike
    tracks: bool = False  # rows are frames of video tracks, which no split may cut
    attributes: tuple[str, ...] = ()  # binary columns whose bits, highest first, make the label
    keep: tuple[str, ...] = ()  # hub class names kept, in label order; colour images only
    keep_rows: int | None = None  # at most this many training images of each kept class
    class_names: tuple[str, ...] = ()  # used where the source names none
    takes_path: bool = False
    fields: Mapping[str, tuple[int, int, int | None]] = field(default_factory=lambda: _SIDE)


_AS_NAMED: Mapping[str, str] = MappingProxyType({"train": "train", "test": "test"})
_SIDE: Mapping[str, tuple[int, int, int | None]] = MappingProxyType(
    {"side": (8, 1024, None)}
)  # field -> lowest, highest, default
_SIGNS = MappingProxyType(
    {
        "classes": (5, 45, 10),
        "side": (32, 224, 32),
        "size": (100, 500_000, 10_000),
        "seed": (0, 2**31 - 1, 0),
    }
)
_DIGITS = tuple("0123456789")
_DRAWN = "validation: 4 % of the training set, drawn by class with a fixed seed"

_ALL = (
    DatasetInfo(
        "signs",
        "drawn traffic-like signs, made on the spot: needs no files and no network",
        "size training images; validation 100 a class, test 200 a class",
        "drawn by this package (MIT)",
        channels=3,
        fields=_SIGNS,
    ),
    DatasetInfo(
        "cifar10",
        "small photographs of animals and vehicles",
        "48,000 / 2,000 / 10,000; validation: the first 2,000 training images in file order",
        "no licence stated; cite Krizhevsky, Learning Multiple Layers of Features, 2009",
        classes=10,
        side=32,
        channels=3,
        hub="uoft-cs/cifar10",
        first=2_000,
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
    ),
    DatasetInfo(
        "svhn",
        "house numbers from street views, cropped to one digit",
        "67,257 / 6,000 / 26,032; validation: the first 6,000 training images in file order",
        "non-commercial use only; cite Netzer et al., Reading Digits in Natural Images, 2011",
        classes=10,
        side=32,
        channels=3,
        hub="ufldl-stanford/svhn",
        hub_config="cropped_digits",
        first=6_000,
        class_names=_DIGITS,
    ),
    DatasetInfo(
        "gtsrb",
        "German traffic signs, 43 classes",
        "validation: the first tenth of each class's tracks (a track is never cut); test whole",
        "no licence stated; cite Stallkamp et al., Man vs. Computer, Neural Networks 2012",
        classes=43,
        side=32,
        channels=3,
        hub="tanganke/gtsrb",
        share=0.1,
        tracks=True,
    ),
    DatasetInfo(
        "stl10",
        "photographs of ten classes; the labelled images only",
        f"4,800 / 200 / 8,000; {_DRAWN}",
        "no licence stated; cite Coates et al., An Analysis of Single-Layer Networks, 2011",
        classes=10,
        side=96,
        channels=3,
        hub="tanganke/stl10",
        class_names=(
            *("airplane", "bird", "car", "cat", "deer"),
            *("dog", "horse", "monkey", "ship", "truck"),
        ),
    ),
    DatasetInfo(
        "celeba8",
        "faces; heavy makeup x mouth slightly open x smiling makes eight classes",
        "162,770 / 19,867 / 19,962, as released",
        "non-commercial research only; cite Liu et al., Deep Learning Face Attributes, 2015",
        classes=8,
        side=64,
        channels=3,
        hub="flwrlabs/celeba",
        hub_config="img_align+identity+attr",
        hub_splits=MappingProxyType({"train": "train", "val": "valid", "test": "test"}),
        attributes=("Heavy_Makeup", "Mouth_Slightly_Open", "Smiling"),
        class_names=tuple(
            f"{makeup}, {mouth}, {smile}"
            for makeup in ("no makeup", "makeup")
            for mouth in ("mouth closed", "mouth open")
            for smile in ("not smiling", "smiling")
        ),
    ),
    DatasetInfo(
        "imagenette",
        "ten easily told classes of ImageNet",
        "9,469 / 3,925; validation: a tenth of the training set, drawn by class with a fixed seed",
        "images: ImageNet, non-commercial research; cite Howard, fastai/imagenette, 2019",
        classes=10,
        side=128,
        channels=3,
        hub="frgfm/imagenette",
        hub_config="320px",
        hub_splits=MappingProxyType({"train": "train", "test": "validation"}),
        share=0.1,
        class_names=(
            *("tench", "English springer", "cassette player", "chain saw", "church"),
            *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
        ),
    ),
    DatasetInfo(
        "mnist",
        "handwritten digits, grey",
        f"57,600 / 2,400 / 10,000; {_DRAWN}",
        "commonly given as CC BY-SA 3.0; cite LeCun et al., Gradient-Based Learning, 1998",
        classes=10,
        side=28,
        channels=1,
        hub="ylecun/mnist",
        class_names=_DIGITS,
    ),
    DatasetInfo(
        "fashion_mnist",
        "articles of clothing, grey",
        f"57,600 / 2,400 / 10,000 where whole; {_DRAWN}",
        "MIT (Zalando SE); cite Xiao et al., Fashion-MNIST, 2017",
        classes=10,
        side=28,
        channels=1,
        hub="zalando-datasets/fashion_mnist",
        class_names=(
            *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    DatasetInfo(
        "lisa",
        "US traffic signs cut from video frames, 18 classes; from local files only",
        "5,635 / 704 / 704, drawn by class with a fixed seed where the files have no test split",
        "research use; cite Mogelmose et al., Vision-Based Traffic Sign Detection, 2012",
        classes=18,
        side=32,
        channels=3,
        share=0.1,
    ),
    DatasetInfo(
        "tiny_imagenet_10",
        "ten classes of Tiny ImageNet, 400 training images each; colour images only",
        "3,600 / 400 / 496; validation: a tenth of the training set, drawn with a fixed seed",
        "ImageNet, non-commercial research; cite Le and Yang, Tiny ImageNet, CS231n 2015",
        classes=10,
        side=64,
        channels=3,
        hub="zh-plus/tiny-imagenet",
        hub_splits=MappingProxyType({"train": "train", "test": "valid"}),
        share=0.1,
        keep=(
            *("n01443537", "n02099601", "n02124075", "n02279972", "n02504458"),
            *("n02814860", "n04146614", "n04285008", "n07747607", "n07873807"),
        ),
        keep_rows=400,
        class_names=(
            *("goldfish", "golden retriever", "Egyptian cat", "monarch", "African elephant"),
            *("beacon", "school bus", "sports car", "orange", "pizza"),
        ),
    ),
    DatasetInfo(
        "imagefolder",
        "your images: PATH with a folder per class, or with train/, test/ and val/ of those",
        "as the folders say; a missing test split is a tenth, validation 4 %, drawn by class",
        "yours",
        takes_path=True,
    ),
    DatasetInfo(
        "parquet",
        "your images: PATH with train-*.parquet and test-*.parquet as on the Hugging Face hub",
        "as the files say; a missing test split is a tenth, validation 4 %, drawn by class",
        "yours",
        takes_path=True,
    ),
)
CATALOGUE: Mapping[str, DatasetInfo] = MappingProxyType({info.name: info for info in _ALL})


def describe() -> list[DatasetInfo]:
    """Every data set that `load` knows, the embedded one first."""
    return list(CATALOGUE.values())


@dataclass(frozen=True)
class Request:
    """A spec, understood."""

    info: DatasetInfo
    path: str | None
    fields: Mapping[str, int | None]

    @property
    def name(self) -> str:
        """The canonical spec; a side that is the data set's own is left out."""
        fields = [
            f"{key}={value}"
            for key, value in self.fields.items()
            if value is not None and (key != "side" or value != self.info.side)
        ]
        parts = [self.path, *fields] if self.path is not None else fields
        return f"{self.info.name}:{','.join(parts)}" if parts else self.info.name


def parse(spec: str) -> Request:
    """Read a spec; raises `DataError` naming what is unknown or out of range."""
    name, colon, rest = spec.strip().partition(":")
    info = CATALOGUE.get(name)
    if info is None:
        raise DataError(f"unknown data set {name!r}: {nearest(name.lower(), CATALOGUE)}")
    items = rest.split(",") if rest else []
    path = None
    if info.takes_path:
        # A path may hold commas: only trailing pieces that look like fields are fields.
        end = len(items)
        while end > 1 and re.fullmatch(r"\s*\w+\s*=[^/\\]*", items[end - 1]):
            end -= 1
        path, items = ",".join(items[:end]).strip(), items[end:]
        if not path:
            raise DataError(f"{name!r} needs a path after the colon, as in '{name}:FOLDER,side=32'")
    elif colon and not rest:
        raise DataError(f"nothing follows the colon of {spec!r}: write {name!r} or give a field")
    fields = {key: default for key, (_, _, default) in info.fields.items()}
    if info.side is not None:
        fields["side"] = info.side
    given: set[str] = set()
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in info.fields:
            raise DataError(
                f"data set {name!r} has no field {key!r}: {nearest(key.lower(), info.fields)}"
            )
        if key in given:
            raise DataError(f"field {key!r} is given twice in {spec!r}")
        given.add(key)
        low, high, _ = info.fields[key]
        value = int(text) if re.fullmatch(r"-?\d{1,12}", text) else None
        if not equals or value is None or not low <= value <= high:
            raise DataError(
                f"{key} of {name} must be a whole number from {low} to {high}, got {text!r}"
            )
        fields[key] = value
    return Request(info, path, MappingProxyType(fields))
