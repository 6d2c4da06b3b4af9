"""Votes in a real browser against the rows they become; the log against crashes; the page against hostile prompts."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from tiny_runs import run_command
from tiny_world import save_pairs

from inpo_fast.comparison.votes import Votes, cases_of_evaluation, cases_of_source
from inpo_fast.comparison.voting_page import Server
from inpo_fast.data.images import decode, png
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.data.sources import open_source
from inpo_fast.judges.cache import image_hash
from inpo_fast.runtime.errors import UserError

EVIL = '"><script>document.title="broken in"</script>{token}'


@pytest.fixture
def evaluation(tmp_path):
    """Pictures of two models on six prompts; `ours` are brighter. One prompt has equal pictures."""
    lines = []
    for model, level in (("base", 40), ("ours", 200), ("control", 99)):
        for i in range(7):
            picture = np.full((16, 16, 3), 7 if i == 6 else level + i, np.uint8)
            (tmp_path / f"{model}{i}.png").write_bytes(png(picture))
            about = {"model": model, "prompt": f"p{i} {EVIL}", "seed": 0, "file": f"{model}{i}.png"}
            lines.append(json.dumps(about | {"image": image_hash(picture)}))
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def serve(evaluation):
    servers = []

    def serve(votes):
        servers.append(Server(("127.0.0.1", 0), votes))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def log_of(output):
    return output.with_name(f"{output.name}.votes.jsonl")


def level(encoded):
    return int(np.asarray(decode(encoded, 10**6))[0, 0, 0])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_votes_and_the_trainer_accepts(evaluation, serve, tmp_path, capsys):
    votes = Votes(cases_of_evaluation(evaluation, (), 0), tmp_path / "out" / "votes.parquet", user=7)
    assert len(votes.cases) == 6  # equal pictures are not asked about
    server = serve(votes)
    seen = []
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/")

        def shown():
            browser.until("document.images.length == 2 && [...document.images].every(i => i.naturalWidth == 16)")
            script = "(i => { const c = document.createElement('canvas').getContext('2d'); c.drawImage(i, 0, 0);"
            levels = [
                browser.run(f"{script} return c.getImageData(0, 0, 1, 1).data[0]; }})(document.images[{n}])")
                for n in (0, 1)
            ]
            text = browser.run("document.getElementById('prompt').innerText")
            seen.append((text, *levels))
            return seen[-1]

        def voted(count):
            browser.until(f"document.title.startsWith('{count} of 6')")

        for number in range(1, 4):  # the brighter one, by mouse and by key
            _, left, right = shown()
            side = "left" if left > right else "right"
            browser.click(f"#{side}") if number == 1 else browser.key(f"Arrow{side.title()}")
            voted(number)
        before = shown()
        browser.key("t")
        voted(4)
        shown()
        browser.key("u")  # the tie was a slip
        voted(3)
        assert shown() == before
        for number, key in ((4, "t"), (5, "s"), (6, "ArrowLeft")):
            last = shown()
            browser.key(key)
            voted(number)
        assert browser.run("document.querySelector('h1').innerText") == "Thank you."
        assert browser.run("document.body.innerText.includes('base')") is False  # nowhere: blind
    assert {text for text, *_ in seen} <= {f"p{i} {EVIL}" for i in range(6)}
    table = pq.read_table(votes.output)
    assert table.schema.equals(PICKAPIC_SCHEMA) and len(table) == 5
    for row in table.to_pylist():
        levels = level(row["jpg_0"]), level(row["jpg_1"])
        assert (row["model_0"] == "ours") == (levels[0] > levels[1]) and row["user_id"] == 7
        assert row["image_0_uid"] != row["image_1_uid"] and row["are_different"] == (row["label_0"] != 0.5)
        if (row["caption"], *levels) == last:
            assert row["label_0"] == 1
        elif row["label_0"] != 0.5:
            assert (row["label_0"] == 1) == (levels[0] > levels[1])
    assert sorted(table["label_0"].to_pylist()).count(0.5) == 1
    assert len({(a > b) for _, a, b in seen}) == 2  # sides are drawn
    with pytest.raises(SystemExit) as end:
        run_command("inpo_fast.validate", "--source", str(votes.output), "--resolution", "16")
    assert not end.value.code and "fit to train on" in capsys.readouterr().out


def test_votes_survive_a_crash(evaluation, tmp_path):
    cases, output = cases_of_evaluation(evaluation, ("base", "ours"), 0), tmp_path / "v.parquet"
    first = Votes(cases, output)
    for number, choice in enumerate(("left", "skip", "right")):
        first.vote(number, choice)
    first.vote(0, "left")  # a form sent twice
    first.close()
    with log_of(output).open("a") as file:
        file.write('{"case": "cut sho')
    again = Votes(cases, output)
    assert again.next() == 3 and again.done == 3
    assert again.notice.startswith("v.parquet.votes.jsonl: 1 lines do not count here (1 that cannot be read)")
    again.vote(3, "tie")
    again.undo()
    again.vote(3, "left")
    again.close()
    third = Votes(cases, output)
    assert third.done == 4 and third.save() == 3
    assert pq.read_table(output)["label_0"].to_pylist() == [1, 0, 1]
    for number, choice in ((99, "left"), (-1, "left"), (4, "best")):
        with pytest.raises(ValueError):
            third.vote(number, choice)


def test_pairs_of_a_source_are_voted_on_anew(tmp_path):
    source = open_source(save_pairs(tmp_path / "pairs.parquet", rows=16))
    votes = Votes(cases_of_source(source, 0), tmp_path / "v.parquet")
    for number, case in enumerate(votes.cases):
        votes.vote(number, "left" if case.models[0] == "worse" else "right")
    turned = open_source(str(votes.output))
    losers = {source.read(i).loser for i in range(len(source))}
    assert len(turned) == len(source) and {turned.read(i).winner for i in range(len(turned))} == losers


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode("utf-8", "replace")


def test_only_the_page_itself_can_vote(evaluation, serve, tmp_path):
    votes = Votes(cases_of_evaluation(evaluation, (), 0), tmp_path / "v.parquet")
    server = serve(votes)
    status, page = ask(server, "GET", "/")
    assert status == 200 and "<script>document" not in page and "&lt;script&gt;" in page
    assert ask(server, "POST", "/vote", "case=0&choice=left&token=guess")[0] == 403
    assert ask(server, "POST", "/vote", "x" * 5000)[0] == 413
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "GET", "/image/0/7")[0] == ask(server, "GET", "/image/../../etc/passwd")[0] == 404
    assert votes.done == 0
    assert ask(server, "POST", "/vote", f"case=0&choice=best&token={server.token}")[0] == 400
    assert ask(server, "POST", "/vote", f"case=0&choice=left&token={server.token}")[0] == 303 and votes.done == 1


def test_what_cannot_be_voted_on_is_refused(evaluation, tmp_path):
    with pytest.raises(UserError, match="two of base, ours, control"):
        cases_of_evaluation(evaluation, ("base", "nobody"), 0)
    with pytest.raises(UserError, match=r"no pictures\.jsonl"):
        cases_of_evaluation(tmp_path / "nowhere", (), 0)
    (tmp_path / "old.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="name another file"):
        Votes(cases_of_evaluation(evaluation, (), 0), tmp_path / "old.parquet")


# ---- a vote is about two pictures and a prompt, whatever stands where


def voted_for_ours(evaluation, output, seed=0):
    """All six pairs for `ours`."""
    votes = Votes(cases_of_evaluation(evaluation, ("base", "ours"), seed), output)
    for number, case in enumerate(votes.cases):
        votes.vote(number, "left" if case.models[0] == "ours" else "right")
    votes.close()


def winners(output) -> list[str]:
    return [row["model_0"] if row["label_0"] == 1 else row["model_1"] for row in pq.read_table(output).to_pylist()]


@pytest.mark.parametrize(
    ("models", "seed"), [(("ours", "base"), 0), (("base", "ours"), 5), (("ours", "base"), 77), (("base", "ours"), 0)]
)
def test_votes_do_not_turn_around(evaluation, tmp_path, models, seed):
    output = tmp_path / "v.parquet"
    voted_for_ours(evaluation, output)
    again = Votes(cases_of_evaluation(evaluation, models, seed), output)
    assert again.done == 6 and again.notice is None and again.next() is None
    assert again.save() == 6 and winners(output) == ["ours"] * 6
    source = open_source(str(output))
    assert {level(source.read(i).winner) for i in range(6)} == {200 + i for i in range(6)}


def test_other_models_and_replaced_pictures_get_no_old_votes(evaluation, tmp_path):
    output = tmp_path / "v.parquet"
    voted_for_ours(evaluation, output)
    control = Votes(cases_of_evaluation(evaluation, ("base", "control"), 0), output)
    assert control.done == 0
    said = "6 lines do not count here (6 on pairs that are not among these); they stay where they are, and so do"
    assert control.notice == f"v.parquet.votes.jsonl: {said} their rows"
    control.close()
    for number in (1, 4):  # drawn anew under the same names, and the listing as it was
        picture = np.full((16, 16, 3), 150 + number, np.uint8)
        (evaluation / f"ours{number}.png").write_bytes(png(picture))
    (evaluation / "base2.png").unlink()
    again = Votes(cases_of_evaluation(evaluation, ("base", "ours"), 0), output)
    assert again.done == 3 and "3 on pairs that are not among these" in again.notice
    before = output.read_bytes()
    assert again.save() == 6 and winners(output) == ["ours"] * 6  # about the pictures that were shown, which it holds
    assert output.read_bytes() == before
    missing = next(i for i, case in enumerate(again.cases) if case.prompt.startswith("p2 "))
    with pytest.raises(UserError, match="cannot be read"):
        again.vote(missing, "left")
    again.vote(missing, "skip")  # nobody is held up by it
    assert again.done == 4
    again.close()


def test_a_replaced_source_gets_no_old_votes(tmp_path):
    """The ids of its pairs are the same."""
    path, output = save_pairs(tmp_path / "pairs.parquet", rows=8), tmp_path / "v.parquet"
    votes = Votes(cases_of_source(open_source(path), 0), output)
    for number in range(len(votes.cases)):
        votes.vote(number, "left")
    count = votes.done
    votes.close()
    table = pq.read_table(path)
    swapped = table.set_column(table.schema.get_field_index("jpg_0"), "jpg_0", table["jpg_1"])
    swapped = swapped.set_column(table.schema.get_field_index("jpg_1"), "jpg_1", table["jpg_0"])
    pq.write_table(swapped, path)  # the same pictures, the other way round: the same votes
    first = {row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"] for row in pq.read_table(output).to_pylist()}
    turned = Votes(cases_of_source(open_source(path), 0), output)
    assert turned.done == count and turned.save() == count
    rows = pq.read_table(output).to_pylist()
    assert {row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"] for row in rows} == first
    turned.close()
    captions = table["caption"].to_pylist()
    pq.write_table(table.set_column(table.schema.get_field_index("caption"), "caption", [captions[::-1]]), path)
    other = Votes(cases_of_source(open_source(path), 0), output)
    fits = sum(a == b for a, b in zip(captions, captions[::-1], strict=True))
    assert other.done <= fits and f"{count - other.done} on pairs that are not among these" in other.notice
    other.close()


def test_lines_of_an_older_version_are_not_trusted(evaluation, tmp_path):
    output, cases = tmp_path / "v.parquet", cases_of_evaluation(evaluation, ("base", "ours"), 0)
    lines = [json.dumps({"case": case.key, "choice": "left", "time": 1.0}) for case in cases]
    log_of(output).write_text("\n".join([*lines, json.dumps({"undo": cases[0].key}), "[" * 100_000, '"text"']))
    votes = Votes(cases, output)
    assert votes.done == 0
    assert "6 of an older version, which do not say which picture won; 2 that cannot be read" in votes.notice
    votes.vote(0, "right")
    votes.close()
    assert Votes(cases, output).done == 1


def test_the_log_is_believed_in_whole_or_not_at_all(evaluation, tmp_path):
    """A line whose winner is neither picture, or whose types are others, is no vote."""
    output = tmp_path / "v.parquet"
    voted_for_ours(evaluation, output)
    lines = [json.loads(line) for line in log_of(output).read_text().splitlines()]
    lines[0]["winner"] = lines[1]["winner"]
    lines[2]["pictures"] = lines[2]["pictures"][:1]
    lines[3]["case"] = 5
    lines[4]["winner"] = None
    log_of(output).write_text("\n".join(map(json.dumps, lines)))
    votes = Votes(cases_of_evaluation(evaluation, ("base", "ours"), 0), output)
    assert votes.done == 2 and "4 that cannot be read" in votes.notice


def test_a_contradicting_vote_is_not_answered_as_saved(evaluation, serve, tmp_path):
    """From a second tab that still shows the pair."""
    votes = Votes(cases_of_evaluation(evaluation, (), 0), tmp_path / "v.parquet")
    server = serve(votes)
    form = f"case=0&token={server.token}&choice="
    assert (
        ask(server, "POST", "/vote", form + "left")[0] == 303 and ask(server, "POST", "/vote", form + "left")[0] == 303
    )
    for choice in ("right", "tie", "skip"):
        status, said = ask(server, "POST", "/vote", form + choice)
        assert status == 409 and "the vote was not saved" in said
    assert votes.done == 1 and len(log_of(votes.output).read_text().splitlines()) == 1


def vote_command(*words, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "inpo_fast.vote", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **how,
    )


def test_one_page_at_a_time_for_an_output(evaluation, tmp_path):
    output = tmp_path / "out" / "v.parquet"
    words = ("--pictures", evaluation, "--output", output, "--port", "0")
    with vote_command(*words) as first:
        assert "0 of 6 pairs have a vote. Open http" in first.stdout.readline()
        with vote_command(*words) as second:
            try:
                said, problem = second.communicate(timeout=60)
            finally:
                second.kill()
                first.terminate()
        assert problem.startswith(
            f"python -m inpo_fast.vote: {output}: another run is writing there (pid {first.pid} on"
        )
        assert problem.count("\n") == 1 and not said
        other = Votes(cases_of_evaluation(evaluation, (), 0), output.with_name("w.parquet"))  # beside it is free
        other.close()
    Votes(cases_of_evaluation(evaluation, (), 0), output).close()  # and the lock went with the process


def test_ports_that_cannot_be_had(evaluation, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (99999999, -1, taken.getsockname()[1]):
            with pytest.raises(SystemExit) as end:
                words = ("--pictures", str(evaluation), "--output", str(tmp_path / f"{port}.parquet"))
                run_command("inpo_fast.vote", *words, f"--port={port}")
            problem = capfd.readouterr().err
            assert end.value.code == 2 and problem.count("\n") == 1 and str(port) in problem


def test_only_pictures_inside_the_folder_are_shown(evaluation, tmp_path_factory):
    """A listing of somebody else may name any file of this machine."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    secret.write_text("a password")
    lines = (evaluation / "pictures.jsonl").read_text().splitlines()
    shutil.copytree(evaluation, evaluation.parent / "beside")
    (evaluation / "link.png").symlink_to(secret)
    (evaluation / "linked").symlink_to(secret.parent)
    beside = evaluation.parent / "beside" / "base0.png"
    for name in (
        str(secret),
        f"../{secret.parent.name}/secret.txt",
        "link.png",
        "linked/secret.txt",
        str(beside),
        "a\0",
    ):
        changed = json.loads(lines[0]) | {"file": name}
        (evaluation / "pictures.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
        with pytest.raises(UserError, match=r"pictures\.jsonl:1: file .*below the folder"):
            cases_of_evaluation(evaluation, (), 0)
    (evaluation / "inner").mkdir()
    shutil.move(evaluation / "base0.png", evaluation / "inner" / "p.png")
    (evaluation / "base0.png").symlink_to(Path("inner") / "p.png")  # a link that stays inside is fine
    (evaluation / "pictures.jsonl").write_text("\n".join(lines))
    assert all(case.pictures() for case in cases_of_evaluation(evaluation, (), 0))


def test_a_pipe_among_the_pictures_holds_nobody_up(evaluation, serve, tmp_path):
    (evaluation / "ours0.png").unlink()
    os.mkfifo(evaluation / "ours0.png")
    votes = Votes(cases_of_evaluation(evaluation, (), 0), tmp_path / "v.parquet")
    number = next(i for i, case in enumerate(votes.cases) if case.prompt.startswith("p0 "))
    side = votes.cases[number].models.index("ours")
    assert ask(serve(votes), "GET", f"/image/{number}/{side}")[0] == 500


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"model": "base", "prompt": 3, "seed": 0, "file": "base0.png", "image": "x"}',
        '{"model": ["base"], "prompt": "p", "seed": 0, "file": "base0.png", "image": "x"}',
        '{"model": "base", "prompt": "p", "seed": [], "file": "base0.png", "image": "x"}',
        '{"model": "base", "prompt": "p", "seed": 0, "file": 7, "image": "x"}',
        '{"model": "base", "prompt": "p", "seed": 0, "file": "base0.png"}',
        '{"model": "base", "prompt": "\\ud800", "seed": 0, "file": "base0.png", "image": "x"}',
    ],
)
def test_lines_that_are_no_pictures(evaluation, line):
    with (evaluation / "pictures.jsonl").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(UserError, match=r"pictures\.jsonl:22: .*run the evaluation again") as error:
        cases_of_evaluation(evaluation, (), 0)
    assert "\n" not in str(error.value)


def test_pairs_with_a_prompt_that_is_no_text_are_not_asked_about(tmp_path):
    path = save_pairs(tmp_path / "p.parquet", rows=8)
    table = pq.read_table(path)
    captions = table["caption"].to_pylist()
    captions[0] = "a\0b"
    pq.write_table(table.set_column(table.schema.get_field_index("caption"), "caption", [captions]), path)
    source = open_source(path)
    assert len(cases_of_source(source, 0)) == len(source) - 1
