"""Votes in a real browser against the rows they become; the log against crashes; the page against hostile prompts."""

import http.client
import json
import threading

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
    first.vote(0, "right")  # a form sent twice
    with first.log.open("a") as file:
        file.write('{"case": "cut sho')
    again = Votes(cases, output)
    assert again.next() == 3 and again.done == 3
    again.vote(3, "tie")
    again.undo()
    again.vote(3, "left")
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
