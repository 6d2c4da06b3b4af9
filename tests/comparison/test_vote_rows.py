"""One parquet for several pages and several voters: nothing that was voted on is lost or becomes somebody else's."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_world import save_pairs

from inpo_fast.comparison.votes import Votes, cases_of_evaluation, cases_of_source
from inpo_fast.data.images import decode, png
from inpo_fast.data.sources import open_source
from inpo_fast.judges.cache import image_hash
from inpo_fast.runtime.errors import UserError

PAIRS = (("base", "ours"), ("base", "control"), ("control", "ours"))


@pytest.fixture
def evaluation(tmp_path):
    """Pictures of three models on six prompts; `ours` are the brightest."""
    lines = []
    for name, brightness in (("base", 40), ("ours", 200), ("control", 99)):
        for i in range(6):
            picture = np.full((8, 8, 3), brightness + i, np.uint8)
            (tmp_path / f"{name}{i}.png").write_bytes(png(picture))
            about = {"model": name, "prompt": f"p{i}", "seed": 0, "file": f"{name}{i}.png"}
            lines.append(json.dumps(about | {"image": image_hash(picture)}))
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "v.parquet"


def log_of(output):
    return output.with_name(f"{output.name}.votes.jsonl")


def level(encoded):
    return int(np.asarray(decode(encoded, 10**6))[0, 0, 0])


def rows_of(output):
    return pq.read_table(output).to_pylist()


def is_for_the_brighter(row):
    return (row["label_0"] == 1) == (level(row["jpg_0"]) > level(row["jpg_1"]))


def vote_on_all(cases, output, user=0, best=max):
    """For the brighter one (best=min: the darker one) of each pair that this voter has no vote on. How many."""
    votes, asked = Votes(cases, output, user), 0
    while (number := votes.next()) is not None:
        left, right = (level(picture) for picture in votes.cases[number].pictures())
        votes.vote(number, "left" if left == best(left, right) else "right")
        asked += 1
    votes.close()
    return asked


def test_pairs_of_models_gather_in_one_parquet(evaluation, output):
    for count, models in enumerate(PAIRS, 1):
        assert vote_on_all(cases_of_evaluation(evaluation, models, 0), output) == 6
        rows = rows_of(output)
        assert len(rows) == 6 * count and len({row["ranking_id"] for row in rows}) == 6 * count
        assert {frozenset((row["model_0"], row["model_1"])) for row in rows} == {*map(frozenset, PAIRS[:count])}
    assert all(map(is_for_the_brighter, rows)) and len(open_source(str(output))) == 18
    before = output.stat()
    for models in PAIRS:  # nobody votes: other models, and fewer pairs
        for limit in (2, None):
            votes = Votes(cases_of_evaluation(evaluation, models, 3)[:limit], output)
            assert votes.done == len(votes.cases) and votes.save() == 18
            votes.close()
    after = output.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_nothing_is_written_when_nobody_voted(evaluation, output):
    votes = Votes(cases_of_evaluation(evaluation, (), 0), output)
    assert votes.save() == 0 and not output.exists()
    votes.vote(0, "left")
    assert votes.save() == 1
    votes.undo()
    assert votes.save() == 0 and rows_of(output) == []  # what was taken back is no row
    votes.close()


def test_a_renamed_source_has_its_votes(tmp_path, output):
    path = Path(save_pairs(tmp_path / "pairs.parquet", rows=8))
    asked = vote_on_all(cases_of_source(open_source(str(path)), 0), output)
    before = rows_of(output)
    assert asked == len(before) > 2
    path.rename(tmp_path / "other.parquet")
    source = open_source(str(tmp_path / "other.parquet"))
    for limit in (2, None):
        assert vote_on_all(cases_of_source(source, 0)[:limit], output) == 0
        assert rows_of(output) == before


def test_each_voter_has_rows(evaluation, output):
    cases = cases_of_evaluation(evaluation, (), 0)
    assert vote_on_all(cases, output, user=1) == 6
    first = rows_of(output)
    assert vote_on_all(cases, output, user=2, best=min) == 6  # whatever the first one said
    rows = rows_of(output)
    assert rows[:6] == first and [row["user_id"] for row in rows] == [1] * 6 + [2] * 6
    assert len({row["ranking_id"] for row in rows}) == 12
    assert all(is_for_the_brighter(row) == (row["user_id"] == 1) for row in rows)
    assert [json.loads(line)["user"] for line in log_of(output).read_text().splitlines()] == [1] * 6 + [2] * 6
    votes = Votes(cases, output, user=1)
    assert votes.done == 6 and "6 of other voters" in votes.notice
    votes.undo()
    assert votes.save() == 11 and [row["user_id"] for row in rows_of(output)].count(2) == 6
    votes.close()
    output.unlink()  # the log and the pictures make it anew, for both
    votes = Votes(cases, output, user=3)
    assert votes.next() == 0 and "11 have no row" in votes.notice and votes.save() == 11
    assert sorted(row["user_id"] for row in rows_of(output)) == [1] * 5 + [2] * 6
    votes.close()


def test_logs_without_voters_keep_the_rows_voters(evaluation, output):
    """As an older version wrote them: the voter stood in the parquet alone."""
    cases = cases_of_evaluation(evaluation, (), 0)
    assert vote_on_all(cases, output, user=1) == 6
    lines = [json.loads(line) for line in log_of(output).read_text().splitlines()]
    for line in lines:
        line.pop("user", None)
    log_of(output).write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = rows_of(output)
    assert vote_on_all(cases[:2], output, user=2) == 2
    assert rows_of(output)[:6] == before and [row["user_id"] for row in rows_of(output)[6:]] == [2, 2]
    votes = Votes(cases, output, user=1)
    assert votes.done == 6
    votes.undo()
    votes.close()
    votes = Votes(cases, output, user=1)
    assert votes.done == 5 and votes.save() == 7
    votes.close()


def test_a_row_follows_its_vote_where_its_pair_is_not_shown(evaluation, output):
    """Voted otherwise, killed before the parquet was written; then other models are compared."""
    cases = cases_of_evaluation(evaluation, ("base", "ours"), 0)
    vote_on_all(cases, output)
    votes = Votes(cases, output)
    votes.undo()
    number = votes.next()
    darker = min((0, 1), key=lambda side: level(cases[number].pictures()[side]))
    votes.save = lambda: None  # killed before
    votes.vote(number, ("left", "right")[darker])
    votes.close()
    other = Votes(cases_of_evaluation(evaluation, ("base", "control"), 0), output)
    assert other.save() == 6
    other.close()
    turned = [row["caption"] for row in rows_of(output) if not is_for_the_brighter(row)]
    assert turned == [cases[number].prompt]


def test_rows_outlive_a_damaged_log(evaluation, output):
    cases = cases_of_evaluation(evaluation, ("base", "ours"), 0)
    vote_on_all(cases, output)
    lines = log_of(output).read_text().splitlines()
    log_of(output).write_text("\n".join([*lines[:2], lines[2][:50]]))
    assert vote_on_all(cases_of_evaluation(evaluation, ("base", "control"), 0), output) == 6
    assert len(rows_of(output)) == 12 and all(map(is_for_the_brighter, rows_of(output)))


def test_a_picture_that_is_gone_costs_its_own_row_alone(evaluation, output):
    votes = Votes(cases_of_evaluation(evaluation, ("base", "ours"), 0), output)
    for number in range(3):
        votes.vote(number, "left")
    (evaluation / f"ours{votes.cases[1].prompt[1]}.png").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        votes.save()
    assert {row["caption"] for row in rows_of(output)} == {votes.cases[i].prompt for i in (0, 2)}
    votes.close()


def test_undo_takes_back_what_came_last(evaluation, output):
    """Also where a pair was skipped before, as a picture of it was gone."""
    votes = Votes(cases_of_evaluation(evaluation, ("base", "ours"), 0), output)
    (evaluation / f"ours{votes.cases[0].prompt[1]}.png").unlink()
    votes.vote(0, "skip")
    votes.vote(1, "left")
    votes.undo()
    assert votes.next() == 1
    votes.undo()
    assert votes.next() == 0
    votes.close()


@pytest.mark.parametrize("content", [b"PAR1", None])
def test_a_parquet_that_holds_no_votes_is_not_replaced(evaluation, output, content):
    output.write_bytes(content) if content else pq.write_table(pa.table({"x": [1]}), output)
    before = output.read_bytes()
    log_of(output).write_text("")
    for _ in range(2):  # and the lock is given back
        with pytest.raises(UserError, match=r"cannot be read .*move it away|has other columns") as error:
            Votes(cases_of_evaluation(evaluation, (), 0), output)
    assert "\n" not in str(error.value) and output.read_bytes() == before
