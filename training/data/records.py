"""One sample of the pyramid: a picture, its caption, and the levels added to it (docs/data.md).

A sample is a handful of members that share a key: `jpg` (or `png`, `webp`), `txt`, `json`, `roi.npy`. The functions
here turn members into a checked `Sample` and back; they neither decode pictures nor know about tar files. Everything
read is treated as untrusted: sizes are bounded, arrays are never unpickled, and what does not fit raises `BadSample`
with a word that can be counted.
"""

import ast
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pyramidclip_hf.files import json_text
from pyramidclip_hf.levels_pyramidclip import LEVELS

IMAGE_SUFFIXES = ("jpg", "png", "webp")
MAX_ATTRIBUTES = 3
# Objects of a picture that a model is shown, unless told otherwise (paper).
MAX_REGIONS = 10
# Of a picture, as the image processor has it.
MAX_IMAGE_PIXELS = 100_000_000
MAX_JSON_BYTES = 8 << 20
MAX_TEXT_BYTES = 1 << 20
# Detectors round boxes to pixels and may overshoot the edge by a fraction of one; more than this is a unit mistake
# (pixels for fractions).
BOX_TOLERANCE = 0.01

# What a sample that lacks a member may be: one of which the members lie apart.
_TORN = "; in a tar, the members of a sample stand next to each other"
_JSON_KEYS = ("caption", "captions", "summary", "tags", "regions")


Box = tuple[float, float, float, float]
T = TypeVar("T")


class Fault(NamedTuple):
    """Why a sample cannot be used.

    Attributes:
        key: the sample's; None where it is not known.
        where: the shard or file it came from; None where it is not known.
        reason: one short machine-readable word, which counts are kept by.
        detail: a sentence for people.
    """

    key: str | None
    where: str | None
    reason: str
    detail: str = ""


class BadSample(Exception):
    """A sample that cannot be used; it takes and has the fields of `Fault`."""

    def __init__(self, key: str | None, where: str | None, reason: str, detail: str = ""):
        super().__init__(key, where, reason, detail)
        self.key, self.where, self.reason, self.detail = key, where, reason, detail

    @property
    def fault(self) -> Fault:
        """What is wrong with the sample, as a value."""
        return Fault(self.key, self.where, self.reason, self.detail)

    def __str__(self) -> str:
        return f"{self.where}: sample {self.key!r}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Region:
    """One detected region.

    Attributes:
        box: x1, y1, x2, y2 over the width and height of the uncropped picture.
        score: the detector's confidence, if known.
        label: the noun.
        attributes: the most confident one last.
    """

    box: Box
    score: float | None = None
    label: str = ""
    attributes: list[str] = field(default_factory=list)


@dataclass
class Sample:
    """A checked sample.

    Attributes:
        image: the undecoded bytes of the picture, of the kind `image_suffix`.
        roi: read-only float16 (K, F), in the order of `regions`.
        extra: the keys of `KEY.json` that are not ours.
        captions: all of them where a picture has several; `caption` is then the first.
        caption_aug: the caption as a run changed it.
        number: of the sample in a run's order, which random numbers hang on.
        turn: how often a run went through its data set before, likewise.
    """

    key: str
    image: bytes | None
    image_suffix: str
    caption: str | None = None
    summary: str | None = None
    tags: list[str] | None = None
    regions: list[Region] | None = None
    roi: np.ndarray | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    captions: list[str] | None = None
    caption_aug: str | None = None
    number: int = 0
    turn: int = 0


def phrase(region: Region) -> str:
    """The words for a region: its last three attributes (the most confident one last), then the noun."""
    return " ".join([*region.attributes[-MAX_ATTRIBUTES:], region.label]).strip()


def best_objects(sample: Sample, most: int = MAX_REGIONS, drop_repeated_tags: bool = False) -> Sample:
    """The sample with its most confident objects alone, most confident first: what every reader shows a model.

    Regions and their features are those objects. Tags that name the regions become the names of these, in their order
    (paper, appendix A.2: the same objects give features and text); tags that name something else stay as they are.

    Args:
        sample: stays as it is. Regions without a score come last, equal scores keep their order.
        most: how many objects stay, at least 1.
        drop_repeated_tags: a phrase counts once; else, as in the paper, it comes as often as objects are called so.
    """
    regions, tags, roi = sample.regions, sample.tags, sample.roi
    if regions:
        scores = np.array([-np.inf if region.score is None else region.score for region in regions])
        kept = np.argsort(-scores, kind="stable")[:most]
        best = [regions[i] for i in kept]
        for name in (phrase, _label):
            if tags is not None and set(tags) == {name(region) for region in regions} - {""}:
                tags = [name(region) for region in best if name(region)]
                break
        if roi is not None:
            roi = roi[: len(kept)] if np.array_equal(kept, np.arange(len(kept))) else roi[kept]
        regions = best
    if tags is not None and drop_repeated_tags:
        tags = list(dict.fromkeys(tags))
    return replace(sample, regions=regions, tags=tags, roi=roi)


def _label(region: Region) -> str:
    return region.label.strip()


def tag_text(tags: Sequence[str]) -> str:
    """The text of the tag level: phrases joined by comma and blank (paper section 3.1)."""
    return ", ".join(tags)


def level_text(sample: Sample, level: str) -> str | None:
    """The text of one of a sample's text levels, or None where it has none."""
    found = getattr(sample, level)
    if isinstance(found, list):
        return tag_text(found) if found else None
    return found


def has_level(sample: Sample, level: str) -> bool:
    """Whether a sample has a level of the pyramid."""
    kind = LEVELS[level].kind
    if kind == "text":
        return level_text(sample, level) is not None
    return (sample.image if kind == "picture" else sample.roi) is not None


def sample_from_members(
    members: Mapping[str, bytes],
    key: str,
    where: str,
    require_image: bool = True,
    levels: Collection[str] = tuple(LEVELS),
) -> Sample:
    """Checks the members of one sample.

    Args:
        members: suffix -> bytes.
        key: names the sample in errors.
        where: what it came from, in errors.
        require_image: off: a sample whose picture was not read is fine, its `image` is None.
        levels: those of `LEVELS` that are wanted. What is there of others and has another form (`tags` of the JSON may
            mean anything to whoever made it) counts as missing.

    Returns:
        The sample; a caption, summary, tags or regions that are missing or blank are None.

    Raises:
        BadSample: with reason `no-image`, `text-too-large`, `bad-utf8`, `json-too-large`, `bad-json`, `bad-caption`,
            `bad-summary`, `bad-tags`, `bad-regions`, `bad-roi` or `roi-count` (rows of `roi.npy` and number of regions
            differ).
    """
    suffix = next((s for s in (*IMAGE_SUFFIXES, "jpeg") if s in members), None)
    if suffix is None and require_image:
        found = ", ".join(sorted(members)) or "nothing"
        raise BadSample(key, where, "no-image", f"expected a member .jpg, .png or .webp, found {found}{_TORN}")
    record = _read_json(members.get("json"), key, where)
    captions = _captions(members.get("txt"), record, key, where)

    def of_level(level: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except BadSample:
            if level in levels:
                raise
            return None

    regions = of_level("roi", lambda: _regions(record.get("regions"), key, where))
    roi = of_level("roi", lambda: _roi(members, len(regions or ()), key, where))
    return Sample(
        key=key,
        image=None if suffix is None else members[suffix],
        image_suffix="jpg" if suffix == "jpeg" else suffix or "jpg",
        caption=captions[0] if captions else None,
        summary=of_level("summary", lambda: _text(record.get("summary"), "bad-summary", key, where)),
        tags=of_level("tags", lambda: _tags(record.get("tags"), key, where)),
        regions=regions,
        roi=roi,
        extra={name: value for name, value in record.items() if name not in _JSON_KEYS},
        captions=captions if len(captions) > 1 else None,
    )


def members_from_sample(sample: Sample) -> dict[str, bytes]:
    """The members of a sample, the inverse of `sample_from_members`; equal samples give equal bytes.

    Returns:
        Suffix -> bytes.

    Raises:
        ValueError: the sample has no picture, or `roi` and `regions` differ in length.
    """
    if sample.image is None:
        raise ValueError(f"sample {sample.key!r} has no picture: expected its encoded bytes in `image`")
    if sample.image_suffix not in IMAGE_SUFFIXES:
        raise ValueError(
            f"sample {sample.key!r}: image_suffix is {sample.image_suffix!r}, expected {', '.join(IMAGE_SUFFIXES)}"
        )
    members = {sample.image_suffix: sample.image}
    if sample.caption is not None:
        members["txt"] = sample.caption.encode(errors="replace")
    record = dict(sample.extra)
    if sample.captions:
        record["captions"] = list(sample.captions)
    if sample.summary is not None:
        record["summary"] = sample.summary
    if sample.tags is not None:
        record["tags"] = list(sample.tags)
    if sample.regions is not None:
        record["regions"] = [
            {
                "box": [round(float(v), 6) for v in r.box],
                "score": r.score,
                "label": r.label,
                "attributes": list(r.attributes),
            }
            for r in sample.regions
        ]
    if record:
        members["json"] = json_bytes(record)
    if sample.roi is not None:
        if len(sample.roi) != len(sample.regions or ()):
            count = len(sample.regions or ())
            raise ValueError(f"sample {sample.key!r}: {len(sample.roi)} rows for {count} regions")
        members["roi.npy"] = npy_bytes(sample.roi)
    return members


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """`KEY.json` of its content. Half of a surrogate pair, which UTF-8 cannot hold, is escaped as JSON does."""
    return json_text(record, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a float16 `.npy` file that holds `array` (K, F).

    Raises:
        ValueError: another shape, or a value that is not finite in float16.
    """
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, dtype="<f2")
    if half.ndim != 2:
        raise ValueError(f"region features have shape {half.shape}, expected (K, F)")
    if not np.isfinite(half).all():
        raise ValueError(
            "region features hold values that are not finite in float16 (over 65504, or NaN); scale them first"
        )
    header = repr({"descr": "<f2", "fortran_order": False, "shape": half.shape}).encode()
    padding = -(len(header) + 11) % 64
    header = header + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + half.tobytes()


def _read_json(data: bytes | None, key: str, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    if len(data) > MAX_JSON_BYTES:
        raise BadSample(key, where, "json-too-large", f"{len(data)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(key, where, "bad-json", str(error)) from None
    if not isinstance(record, dict):
        raise BadSample(key, where, "bad-json", f"expected an object, found {type(record).__name__}")
    return record


def _captions(text: bytes | None, record: Mapping[str, Any], key: str, where: str) -> list[str]:
    """All captions of a sample: the list `captions` where there is one, else `KEY.txt`, else `caption` of the JSON."""
    if isinstance(record.get("captions"), list):
        listed = [_text(item, "bad-caption", key, where) for item in record["captions"]]
        captions = [item for item in listed if item is not None]
        if captions:
            return captions
    if text is not None:
        if len(text) > MAX_TEXT_BYTES:
            raise BadSample(
                key, where, "text-too-large", f"caption of {len(text)} bytes, at most {MAX_TEXT_BYTES} are read"
            )
        try:
            caption = str(bytes(text), "utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSample(key, where, "bad-utf8", f"caption: {error}") from None
        if caption:
            return [caption]
    found = _text(record.get("caption"), "bad-caption", key, where)
    return [found] if found else []


def _text(value: object, reason: str, key: str, where: str) -> str | None:
    """A stripped string, or None for null, NaN (how spreadsheets write a missing cell) and blanks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise BadSample(key, where, reason, f"expected a string, found {type(value).__name__}")
    return value.strip() or None


def _tags(value: object, key: str, where: str) -> list[str] | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, list):
        raise BadSample(key, where, "bad-tags", f"expected a list of phrases, found {type(value).__name__}")
    tags = [_text(item, "bad-tags", key, where) for item in value]
    return [tag for tag in tags if tag is not None] or None


def _regions(value: object, key: str, where: str) -> list[Region] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise BadSample(key, where, "bad-regions", f"expected a list, found {type(value).__name__}")
    return [_region(item, key, where) for item in value]


def _region(item: object, key: str, where: str) -> Region:
    if not isinstance(item, dict):
        raise BadSample(key, where, "bad-regions", f"expected an object, found {type(item).__name__}")
    box, score = item.get("box"), item.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite_number, box)):
        raise BadSample(key, where, "bad-regions", f"box {str(box)[:80]}: expected four finite numbers x1, y1, x2, y2")
    low, high = -BOX_TOLERANCE, 1 + BOX_TOLERANCE
    if not all(low <= v <= high for v in box) or box[0] > box[2] or box[1] > box[3]:
        raise BadSample(
            key,
            where,
            "bad-regions",
            f"box {box}: expected 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1 (fractions of width and height)",
        )
    if score is not None and not _is_finite_number(score):
        raise BadSample(key, where, "bad-regions", f"score {str(score)[:80]}: expected a finite number or null")
    label, attributes = item.get("label", ""), item.get("attributes") or []
    if (
        not isinstance(label, str)
        or not isinstance(attributes, list)
        or not all(isinstance(a, str) for a in attributes)
    ):
        raise BadSample(key, where, "bad-regions", "expected `label` as a string and `attributes` as a list of strings")
    x1, y1, x2, y2 = (min(max(float(v), 0.0), 1.0) for v in box)
    return Region((x1, y1, x2, y2), score, label, attributes)


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _roi(members: Mapping[str, bytes], regions: int, key: str, where: str) -> np.ndarray | None:
    """The features of as many regions, or None where there are none of either."""
    if "roi.npy" not in members:
        return None
    roi = _roi_array(members["roi.npy"], key, where)
    if len(roi) != regions:
        raise BadSample(key, where, "roi-count", f"{len(roi)} rows of features for {regions} regions")
    return roi if regions else None


def _roi_array(data: bytes, key: str, where: str) -> np.ndarray:
    """A read-only view (K, F) on the bytes of a `.npy` file; no copy, no pickle. float16, or float32 as it is."""
    view = memoryview(data)
    try:
        if bytes(view[:6]) != b"\x93NUMPY" or view[6] not in (1, 2):
            raise ValueError("not a .npy file")
        start = 10 if view[6] == 1 else 12
        size = int.from_bytes(view[8:start], "little")
        if size > 4096:
            raise ValueError(f"header of {size} bytes")
        header = ast.literal_eval(str(bytes(view[start : start + size]), "latin-1").strip())
        dtype, shape = header["descr"], header["shape"]
        if dtype not in ("<f2", "<f4") or header["fortran_order"] or len(shape) != 2:
            raise ValueError(f"dtype {dtype!r}, shape {shape}: expected little-endian float16 (K, F) in row order")
        rows, width = shape
        found, expected = len(view) - start - size, rows * width * int(dtype[2])
        if min(rows, width) < 0 or found != expected:
            raise ValueError(f"{found} bytes of data for shape {shape}, expected {expected}")
        return np.frombuffer(view, dtype, rows * width, start + size).reshape(rows, width)
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError, MemoryError, RecursionError) as error:
        raise BadSample(key, where, "bad-roi", str(error)[:200]) from None
