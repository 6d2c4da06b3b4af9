"""Relabelled pairs against labels computed by hand; the sidecar's errors; the whole chain on the pocket's pairs."""

import json
import sys
from math import exp
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_world import save_pairs, save_tiny_model

from inpo_fast import evaluate as evaluate_command
from inpo_fast import relabel as relabel_command
from inpo_fast import train as train_command
from inpo_fast.data import relabelled
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import decode, png
from inpo_fast.data.loader import DataConfig, open_data
from inpo_fast.data.sources import open_source
from inpo_fast.judges import Scores, relabelling
from inpo_fast.runtime.errors import UserError


class Mean:
    """The brighter the better, or the darker."""

    tie = 0.01

    def __init__(self, name="bright", sign=1.0, limit=10**9):
        self.name, self.sign, self.asked, self.limit = name, sign, 0, limit

    def check(self, prompts): ...

    def score(self, images, prompts):
        self.asked += len(images)
        if self.asked > self.limit:
            raise KeyboardInterrupt
        return Scores(np.array([self.sign * image.mean() / 10 for image in images]))


def grey(level):
    return png(np.full((4, 4, 3), level, np.uint8))


def write(folder: Path, levels) -> str:
    """A source whose better image has the first level of each pair; None: a broken image."""
    images = [[b"broken" if level is None else grey(level) for level in pair] for pair in levels]
    columns = {"caption": [f"p{i}" for i in range(len(levels))], "jpg_0": [i[0] for i in images]}
    columns |= {"jpg_1": [i[1] for i in images], "label_0": [1.0] * len(levels), "label_1": [0.0] * len(levels)}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "pairs.parquet", row_group_size=2)
    return str(folder / "pairs.parquet")


LEVELS = [(100, 80), (80, 100), (50, 50), (10, 40), (None, 3), (200, 100)]


def run(path, judges, output, temperatures=(1.0,), how="mean"):
    config = DataConfig(source=path)
    source = open_source(path)
    folder = relabelling.relabel(source, judges, output, config)
    about = {"source": path, "source_identity": identity_of(source), "judges": {}}
    return relabelling.finish(folder, output, judges, temperatures, how, about)


def test_labels_are_bradley_terrys(tmp_path, monkeypatch):
    monkeypatch.setattr(relabelling, "PART", 4)
    path = write(tmp_path / "set", LEVELS)
    table = run(path, [Mean()], tmp_path / "l.parquet", (4.0,))
    sigmoid = [1 / (1 + exp(-(a - b) / 10 / 4)) for a, b in ((100, 80), (80, 100), (50, 50), (10, 40), (200, 100))]
    soft = table["soft"].to_pylist()
    assert soft[4] is None and table["hard"].to_pylist() == [1, 0, 0.5, 0, None, 1]
    np.testing.assert_allclose([*soft[:4], soft[5]], sigmoid, atol=1e-12)
    assert table["better.bright"].to_pylist()[:2] == [10, 8]
    assert not list(tmp_path.glob(".l.parquet.parts"))
    hard = open_data(DataConfig(source=path, labels=str(tmp_path / "l.parquet")))
    assert [hard.read(i).prompt for i in range(len(hard))] == ["p0", "p1", "p3", "p5"]  # a tie and a broken pair less
    assert hard.ties == 1 and hard.labels["turned_around"] == 2 and hard.labels["unjudged"] == 1
    levels = [
        tuple(int(np.asarray(decode(x, 99))[0, 0, 0]) for x in (p.winner, p.loser)) for p in map(hard.read, range(4))
    ]
    assert levels == [(100, 80), (100, 80), (40, 10), (200, 100)] and hard.read(1).label == 1.0
    both = open_data(DataConfig(source=path, labels=str(tmp_path / "l.parquet"), labels_as="soft"))
    assert both.read(1).label == pytest.approx(1 - sigmoid[1]) and both.read(1).winner == hard.read(1).winner
    assert hard.blocks.tolist() == [2, 3, 4]  # of row groups of two: where each ends among what is left


def test_a_sidecar_fits_its_source_under_other_names(tmp_path):
    path, labels = write(tmp_path / "set", LEVELS), str(tmp_path / "l.parquet")
    run(path, [Mean()], Path(labels), (4.0,))
    want = open_data(DataConfig(source=path, labels=labels, labels_as="soft"))
    renamed = Path(path).rename(tmp_path / "set" / "of my own.parquet")
    got = open_data(DataConfig(source=str(renamed), labels=labels, labels_as="soft"))
    assert got.labels["turned_around"] == 2 and len(got) == len(want) == 4 and got.blocks.tolist() == [2, 3, 4]
    pairs = [(got.read(i), got.source.read(int(got.kept[i]))) for i in range(4)]
    assert [(pair.label, pair.winner == own.winner) for pair, own in pairs] == [
        (pytest.approx(0.5 + abs(soft - 0.5)), soft > 0.5)
        for soft in pq.read_table(labels)["soft"].to_pylist()
        if soft not in (None, 0.5)
    ]
    table = pq.read_table(labels)
    pq.write_table(table.take([2, 3, 0, 1, 4, 5]), labels)  # by place it would give others' labels
    with pytest.raises(
        UserError, match=r"under other names of files \(pairs\.parquet:1:0 then, of my own\.parquet:0:0 now"
    ):
        open_data(DataConfig(source=str(renamed), labels=labels))
    renamed.rename(path)
    again = open_data(DataConfig(source=path, labels=labels, labels_as="soft"))  # by id any order will do
    assert again.identity() == want.identity()
    pq.write_table(table.slice(0, 4), labels)
    for name in (path, str(renamed)):
        Path(path).rename(name)
        with pytest.raises(UserError, match=r"has no label for . of 6 pairs.*until it is whole"):
            open_data(DataConfig(source=name, labels=labels))


def test_votes():
    a, b, c = np.array([0.9, 0.6, 0.5]), np.array([0.2, 0.7, 0.5]), np.array([0.3, np.nan, 0.5])
    soft, hard = relabelling.vote([a, b, c], "mean")
    assert soft[0] == pytest.approx(1.4 / 3) and hard[0] == 0 and np.isnan(hard[1]) and hard[2] == 0.5
    soft, hard = relabelling.vote([a, b, c], "majority")
    assert soft[0] == pytest.approx(1 / 3) and hard[0] == 0
    soft, hard = relabelling.vote([np.array([0.9]), np.array([0.2])], "majority")
    assert soft[0] == 0.5 and hard[0] == 0.5
    assert relabelling.probabilities(np.array([1e6]), np.array([0.0]), 0.01, 0.1).tolist() == [1.0]  # no overflow


def test_an_interrupted_relabelling_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(relabelling, "PART", 2)
    path = write(tmp_path / "set", [(i, 2 * i) for i in range(7)])
    with pytest.raises(KeyboardInterrupt):
        run(path, [Mean(limit=9)], tmp_path / "l.parquet")
    judge = Mean()
    resumed = run(path, [judge], tmp_path / "l.parquet")
    assert judge.asked == 14 - 8  # four pairs were done
    assert resumed.equals(run(path, [Mean()], tmp_path / "m.parquet"))
    with pytest.raises(KeyboardInterrupt):
        run(path, [Mean(limit=9)], tmp_path / "n.parquet")
    with pytest.raises(UserError, match="beginning of another relabelling"):
        run(path, [Mean("other")], tmp_path / "n.parquet")


def test_two_processes_share_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(relabelling, "PART", 2)
    path = write(tmp_path / "set", [(i, 2 * i) for i in range(7)])
    asked = []
    for rank in (1, 0):
        monkeypatch.setattr(relabelling.distributed, "rank_and_world", lambda rank=rank: (rank, 2))
        judge = Mean()
        if rank:  # the first process makes the folder
            (tmp_path / ".l.parquet.parts").mkdir()
        source = open_source(path)
        relabelling.relabel(source, [judge], tmp_path / "l.parquet", DataConfig(source=path))
        asked.append(judge.asked)
    assert asked[0] == 6 and sum(asked) >= 10  # the second looks after the first is done: it takes half of the rest
    assert len(list((tmp_path / ".l.parquet.parts").glob("*.parquet"))) == 3


@pytest.mark.parametrize("kind", ["folder", "webdataset", "hpd"])
def test_ids_are_known_before_pairs_are_read(tmp_path, kind):
    import io
    import tarfile

    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(grey(9))
    if kind == "webdataset":
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in (("7.0.png", b"A"), ("7.1.png", b"B"), ("7.json", b'{"prompt": "p", "label": 0}')):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        source = open_source(str(tmp_path / "x.tar"))
    elif kind == "folder":
        (tmp_path / "metadata.jsonl").write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}')
        source = open_source(str(tmp_path))
    else:
        (tmp_path / "t.json").write_text('[{"prompt": "p", "path1": "a.png", "path2": "b.png"}]')
        source = open_source(str(tmp_path / "t.json"))
    assert relabelled.pair_ids(source) == [source.read(0).id]


def test_errors_of_a_sidecar(tmp_path):
    path = write(tmp_path / "set", LEVELS)
    run(path, [Mean()], tmp_path / "l.parquet")
    other = write(tmp_path / "other", [(1, 2), *LEVELS[1:]])
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(path).read_bytes())
    for source, labels, words in (
        (other, "l.parquet", "made for another source"),
        (path, "none.parquet", "cannot be read"),
        (path, "set/pairs.parquet", "not written by python -m inpo_fast.relabel"),
    ):
        with pytest.raises(UserError, match=words):
            open_data(DataConfig(source=source, labels=str(tmp_path / labels)))
    table = pq.read_table(tmp_path / "l.parquet")
    pq.write_table(table.slice(1), tmp_path / "part.parquet")
    with pytest.raises(UserError, match=r"no label for 1 of 6 pairs, such as pairs\.parquet:0:0"):
        open_data(DataConfig(source=path, labels=str(tmp_path / "part.parquet")))


def test_chain_of_the_documentation(tmp_path, monkeypatch, capsys):
    """docs/judges.md: relabel, train on the sidecar, evaluate; by the command lines, on a tiny model."""
    pairs, model = save_pairs(tmp_path / "pairs.parquet"), save_tiny_model(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle on a blue background\na large green star on a black background\n")

    def command(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        main()

    labels, out = tmp_path / "labels.parquet", tmp_path / "run"
    command(
        relabel_command.main, "--source", pairs, "--judge", "pocket-rules", "--temperature", "0.1", "--output", labels
    )
    command(
        train_command.main, f"--models.base={model}", f"--data.source={pairs}", f"--data.labels={labels}",
        f"--output={out}",
        "--data.labels_as=soft", "--train.steps=2", "--train.pairs_per_step=4", "--train.micro_batch=2",
        "--inversion.steps=2", "--objective.beta=100",
    )  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["labels"]["judges"] == {"pocket-rules": "pocket-rules 1"}
    command(
        evaluate_command.main, f"--model=ours={out / 'model'}", "--base", model, "--output", tmp_path / "cmp",
        f"--evaluate.prompts={prompts}", "--evaluate.seeds=1", "--evaluate.sampler_steps=2",
        "--evaluate.judges=[pocket-rules]",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "42 pairs labelled by pocket-rules" in said and "| ours against base |" in said
    with pytest.raises(UserError, match="is there already"):
        command(relabel_command.main, "--source", pairs, "--judge", "pocket-rules", "--output", labels)


def test_scores_that_cost_something_are_not_lost_within_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(relabelling, "PART", 100)
    monkeypatch.setattr("inpo_fast.judges.cache.CHUNK", 4)
    path = write(tmp_path / "set", [(i, 2 * i + 30) for i in range(7)])

    class Paid(Mean):
        def cost(self, n):
            return f"{n} requests"

    with pytest.raises(KeyboardInterrupt):
        run(path, [Paid(limit=9)], tmp_path / "l.parquet")
    judge = Paid()
    run(path, [judge], tmp_path / "l.parquet")
    assert judge.asked <= 14 - 8


def test_parts_among_other_things_are_refused(tmp_path):
    """The folder of the parts is removed in the end: nothing of somebody else may be in it."""
    folder = tmp_path / ".l.parquet.parts"
    folder.mkdir()
    (folder / "mine.parquet").write_text("mine")
    with pytest.raises(UserError, match=r"\.l\.parquet\.parts holds other things"):
        relabelling._start(folder, {}, tmp_path / "l.parquet")
    assert (folder / "mine.parquet").read_text() == "mine"
