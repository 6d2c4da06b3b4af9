"""Pairs in JSON in the manner of the HPD data sets, a list or one object a line; images by path.

HPDv3: `prompt`, `path1` (the better image), `path2`, perhaps `confidence` (0.5 to 1). HPDv2's train.json: `prompt`,
`file_path` of two images and `human_preference` [1, 0] or [0, 1]. `weight` where there is one.
Paths are relative to data.images, or to the JSON file's folder, and never leave it.
"""

from collections.abc import Iterator
from pathlib import Path

from inpo_fast.data import labels, records
from inpo_fast.data.folder import Choice, ListedSource, contradict, image_path, prompt
from inpo_fast.runtime.errors import UserError


class HpdSource(ListedSource):
    def __init__(self, listing: Path, images: Path | None = None):
        if listing.is_dir():
            raise UserError(f"data.source: {listing} is a folder; name the JSON file in it")
        super().__init__(listing, images or listing.parent)

    def _scan(self) -> Iterator[tuple[int, int, int, dict]]:
        return records.lines_or_list(self.listing)

    def _choice(self, record: dict, where: str) -> Choice:
        text, weight = prompt(record, where), labels.weight(record, where)
        said = labels.said(record)
        listed = self._listed(record, where) if {"file_path", "human_preference"} <= record.keys() else None
        if {"path1", "path2"} <= record.keys():
            paths, (side, label) = (record["path1"], record["path2"]), labels.confidence(record, where)
            if listed and contradict(paths, side, listed[0], listed[1][0]):
                side, said = labels.UNCLEAR, f"path1 {paths[0]!r} and human_preference {labels.CONTRADICT}"
        elif listed:
            paths, (side, label) = listed
            said = f"human_preference {record['human_preference']}"
        else:
            raise UserError(
                f"{where}: needs path1 (the better image) and path2, or file_path and human_preference; has "
                f"{sorted(record)}"
            )
        winner, loser = (image_path(path, where) for path in (paths[side == 1], paths[side != 1]))
        return Choice(side, text, winner, loser, label, weight, said)

    def _listed(self, record: dict, where: str) -> tuple[list, tuple[int, float]]:
        paths, preference = record["file_path"], record["human_preference"]
        if not (isinstance(paths, list) and isinstance(preference, list) and len(paths) == len(preference) == 2):
            raise UserError(f"{where}: file_path and human_preference must be lists of two")
        return paths, labels.choice({"label_0": preference[0], "label_1": preference[1]}, where)
