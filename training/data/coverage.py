"""Which share of the pairs each loss term gets, looked at in the data before a run draws any of it.

A term runs on the pairs that have both of its levels. Captions alone leave five of the paper's six terms empty, and
with them every one that sees the whole picture.
"""

import collections
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pyramidclip_hf.files import json_text
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS, TERMS
from training.data.records import BadSample, Fault, has_level, sample_from_members
from training.data.remote import ShardCache, is_url
from training.data.sources import DataSet, Unit

# Of each data set: a share of one half is known to 4 points, and the looking takes less than a second.
PAIRS_LOOKED_AT = 512
UNITS_LOOKED_AT = 8
ENOUGH = 0.5

_MEMBERS = frozenset(("txt", "json", "roi.npy"))


@dataclass(frozen=True)
class Coverage:
    """What was seen of the data.

    Attributes:
        pairs: readable pairs that were looked at.
        shares: term -> share of them that has both of its levels, for each of `TERMS`.
    """

    pairs: int
    shares: Mapping[str, float]

    def empty(self, terms: Sequence[str]) -> list[str]:
        """Those of `terms` that no pair was seen for."""
        return [term for term in terms if not self.shares[term]]

    def scarce(self, terms: Sequence[str]) -> list[str]:
        """Those of `terms` that less than half of the pairs were seen for, but some."""
        return [term for term in terms if 0 < self.shares[term] < ENOUGH]

    def described(self, terms: Sequence[str]) -> str:
        """Each of `terms` with its share of the pairs."""
        return ", ".join(f"{term} {_percent(self.shares[term])}" for term in terms)

    def fitting_objective(self) -> dict[str, float]:
        """Term -> weight for this data: equal weights on the paper's terms that at least half of the pairs feed.

        Where none of these sees the whole picture, as inference does, `global_caption` is among them.
        """
        terms = [term for term in DEFAULT_LOSS_WEIGHTS if self.shares[term] >= ENOUGH]
        if not any(TERMS[term][0] == "global" for term in terms):
            terms.insert(0, "global_caption")
        return dict.fromkeys(terms, round(1 / len(terms), 4))

    def check(self, terms: Sequence[str], allow_empty: bool) -> list[str]:
        """Lines to say at the start of a run with these terms.

        Raises:
            ValueError: a term is empty, and that is not allowed.
        """
        looked = f"of {self.pairs} pairs looked at"
        fitting = f"--loss-weights '{json_text(self.fitting_objective())}'"
        if (empty := self.empty(terms)) and not allow_empty:
            raise ValueError(
                f"loss_weights: {', '.join(empty)}: none {looked} has what this needs ({_missing(empty)}). An "
                f"objective that fits the data: {fitting}. Or add what is missing (docs/prepare.md), or train with "
                "terms that stay empty: --allow-empty-terms"
            )
        lines = [f"pairs that each term gets, {looked}: {self.described(terms)}"]
        if wanting := [*empty, *self.scarce(terms)]:
            lines.append(
                f"warning: less than half of the pairs for {self.described(wanting)}. An objective that fits: {fitting}"
            )
        return lines


def look_at(
    data_sets: Sequence[DataSet],
    roi_feature_size: int,
    cache: ShardCache | None = None,
    levels: Collection[str] = tuple(LEVELS),
) -> Coverage:
    """Looks at pairs that lie spread over each data set (behind a URL: in one shard of each), not at their pictures.

    Args:
        data_sets: of the run.
        roi_feature_size: features of another width count as missing.
        cache: for remote shards.
        levels: that the objective names; of others, what has another form counts as missing.

    Raises:
        ValueError: none of the pairs can be used; with the reasons. Or none of a data set has its picture.
    """
    pairs, counts, faults = 0, collections.Counter[str](), list[Fault]()
    for data in data_sets:
        before, absent = pairs, ""
        units = _spread([unit for unit in data.units if unit.samples], UNITS_LOOKED_AT)
        if is_url(units[0].name):
            units = units[:1]
        for unit in units:
            if unit is units[0] or absent:
                absent = _lacking_pictures(data, unit, PAIRS_LOOKED_AT // len(units), cache)
            for found in _levels(data, unit, PAIRS_LOOKED_AT // len(units), roi_feature_size, cache, levels):
                if isinstance(found, Fault):
                    faults.append(found)
                    continue
                pairs += 1
                counts.update(term for term, levels in TERMS.items() if found.issuperset(levels))
        if absent and pairs > before:
            raise ValueError(_without_pictures(data, pairs - before, absent))
    if not pairs:
        reasons = collections.Counter(fault.reason for fault in faults)
        listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        raise ValueError(
            f"train_data: none of {len(faults)} pairs looked at can be used: {listed}. The first: "
            f"{BadSample(*faults[0])}. Data of another form is made into shards by `python -m training.prepare.pack`"
        )
    return Coverage(pairs, {term: counts[term] / pairs for term in TERMS})


def _spread(units: Sequence[Unit], number: int) -> list[Unit]:
    number = min(number, len(units))
    return [units[i * len(units) // number] for i in range(number)]


def _levels(
    data: DataSet,
    unit: Unit,
    number: int,
    roi_feature_size: int,
    cache: ShardCache | None,
    levels: Collection[str],
) -> list[set[str] | Fault]:
    """Of at most `number` samples of a unit: the levels that are there, or what is wrong with it."""
    found: list[set[str] | Fault] = []
    reader = data.open(unit, cache)
    try:
        number = min(number, len(reader))
        for i in (n * len(reader) // number for n in range(number)):
            try:
                sample = sample_from_members(reader.read(i, _MEMBERS), reader.key(i), reader.name, False, levels)
            except BadSample as bad:
                found.append(bad.fault)
                continue
            if sample.caption is None:
                found.append(Fault(sample.key, reader.name, "no-caption", "expected KEY.txt, or `caption` in the JSON"))
                continue
            if sample.roi is not None and sample.roi.shape[1] != roi_feature_size:
                sample.roi = None
            found.append({name for name, level in LEVELS.items() if level.kind == "picture" or has_level(sample, name)})
    finally:
        reader.close()
    return found


def _lacking_pictures(data: DataSet, unit: Unit, number: int, cache: ShardCache | None) -> str:
    """What is there in place of the first picture, if none of at most `number` samples of a unit has its own."""
    first, reader = "", data.open(unit, cache)
    try:
        number = min(number, len(reader))
        for i in (n * len(reader) // number for n in range(number)):
            if not (absent := reader.lacks_picture(i)):
                return ""
            first = first or absent
    finally:
        reader.close()
    return first


def _without_pictures(data: DataSet, pairs: int, absent: str) -> str:
    """The sentence for a data set none of whose pictures is there."""
    if data.manifest is None:
        told = "shards with pictures are made by `python -m training.prepare.pack`, or by img2dataset"
    else:
        told = (
            f"paths count from the manifest's folder, {data.manifest.path.parent.absolute()}: put the manifest where "
            "they begin, or write them so, or in full"
        )
    return f"train_data {data.name}: none of {pairs} pairs looked at has its picture, {absent}; {told}"


def _missing(terms: Sequence[str]) -> str:
    """The levels that terms need and not every pair has."""
    needed = {level for term in terms for level in TERMS[term]}
    names = {"roi": "regions"}
    return ", ".join(names.get(level, level) for level in LEVELS if level in needed and LEVELS[level].mask)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == 0 or share >= 0.005 else "below 1%"
