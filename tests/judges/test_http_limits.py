"""The HTTP judge against servers that do not end, say too much, or answer what is no answer, and against its file."""

import base64
import contextlib
import gzip
import json
import socket
import threading
import time
from email.utils import formatdate

import numpy as np
import pytest
import yaml

from inpo_fast.judges import judge_id
from inpo_fast.judges.cache import ScoreCache
from inpo_fast.judges.http import HttpJudge
from inpo_fast.runtime import masking
from inpo_fast.runtime.errors import UserError

IMAGE, PROMPT = np.zeros((4, 4, 3), np.uint8), "a cat"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("inpo_fast.judges.http.LONGEST_WAIT", 0.01)
    monkeypatch.setattr(masking, "_told", set())


@pytest.fixture
def serve():
    """`serve(answer)`: a server that hands each connection, its request read, to `answer`; its port, the requests."""
    listeners = []

    def begin(answer):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        asked = []

        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        def one(connection):
            with connection:
                data = b""
                while b"\r\n\r\n" not in data:
                    if not (some := connection.recv(65536)):
                        return
                    data += some
                head, _, body = data.partition(b"\r\n\r\n")
                length = next(
                    int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")
                )
                while len(body) < length:
                    body += connection.recv(65536)
                asked.append(head.decode("latin-1"))
                with contextlib.suppress(OSError):  # the judge had enough
                    answer(connection)

        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1], asked

    yield begin
    for listener in listeners:
        listener.close()


def replying(body: bytes, head: str = "", status: str = "200 OK"):
    return lambda c: c.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body)


def saying(text, **more):
    return json.dumps({"choices": [{"message": {"content": text}, **more}]}).encode()


def judge(folder, port, **changes):
    settings = {"url": f"http://127.0.0.1:{port}/v1/chat/completions", "model": "m", "timeout": 0.4, "retries": 0}
    (folder / "judge.yaml").write_text(yaml.safe_dump(settings | changes))
    return HttpJudge(folder / "judge.yaml")


def score(judge, count=1):
    return judge.score([IMAGE] * count, [PROMPT] * count).total


def drip(before: bytes):
    def answer(connection):
        connection.sendall(before)
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.05)

    return answer


def continuing(connection):
    for _ in range(200):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n"),  # until the connection ends
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nX-Header: "),
        drip(b"HTTP/1.1 500 Oh\r\nContent-Length: 1000000\r\n\r\n"),
        drip(b""),
        continuing,
        lambda connection: time.sleep(3),
    ],
    ids=["body", "body without length", "chunk", "header", "error page", "status", "100 Continue", "silence"],
)
def test_an_answer_that_does_not_end_is_ended(tmp_path, serve, answer):
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no whole answer within 0\.4 s"):
        score(judge(tmp_path, serve(answer)[0]))
    assert time.monotonic() - begun < 2


def endless(head: bytes, some: bytes = b"x" * 65536):
    def answer(connection):
        connection.sendall(head)
        while True:
            connection.sendall(some)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1500000000\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    ],
    ids=["length", "no length", "chunks"],
)
def test_an_answer_has_a_largest_size(tmp_path, serve, answer):
    with pytest.raises(UserError, match="an answer of more than 4 MiB"):
        score(judge(tmp_path, serve(answer)[0], timeout=20, retries=3))


@pytest.mark.parametrize(
    ("body", "head", "words"),
    [
        (b"[" * 200_000, "", "not a chat completion"),
        (b'{"choices":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "", "not a chat completion"),
        (b"<html>hello</html>", "Content-Type: text/html\r\n", r"not a chat completion \(text/html\): <html>"),
        (gzip.compress(b"0" * 10_000_000), "Content-Encoding: gzip\r\n", r"not a chat completion \(gzip\)"),
        (b"", "", "not a chat completion"),
        (b"{}", "", "not a chat completion"),
        (b"null", "", "not a chat completion"),
        (b'{"choices": []}', "", "not a chat completion"),
        (b'{"choices": [{}]}', "", "not a chat completion"),
        (b'{"choices": "x"}', "", "not a chat completion"),
        (b'{"error": {"message": "busy\\nwith\\x1b others"}}', "", "not a chat completion"),
        (b"\xff\xfe\x00", "", "not a chat completion"),
        (b"9" * 10_000, "", "not a chat completion"),
    ],
    ids=[
        "deep",
        "deep-choices",
        "html",
        "gzip",
        "empty",
        "object",
        "null",
        "no-choices",
        "no-message",
        "text",
        "error",
        "bytes",
        "number",
    ],
)
def test_what_is_no_chat_completion_is_told_in_one_line(tmp_path, serve, body, head, words):
    with pytest.raises(UserError, match=words) as refused:
        score(judge(tmp_path, serve(replying(body, head))[0], timeout=5))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700


@pytest.mark.parametrize(
    "answer",
    [
        lambda connection: None,
        lambda connection: connection.sendall(b"\x00\x01 what\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 abc\r\n\r\n"),
    ],
    ids=["closed", "no HTTP", "half", "a chunk that is none", "headers", "status"],
)
def test_a_broken_connection_is_one_line(tmp_path, serve, answer):
    with pytest.raises(UserError, match="after 2 tries"):
        score(judge(tmp_path, serve(answer)[0], retries=1, timeout=5))


@pytest.mark.parametrize(
    ("content", "value"),
    [("7/10", 7.0), ([{"type": "text", "text": "Score: "}, {"type": "text", "text": "7"}], 7.0), ("10\n", 10.0)],
)
def test_clear_answers(tmp_path, serve, content, value):
    assert score(judge(tmp_path, serve(replying(saying(content)))[0])).tolist() == [value]


@pytest.mark.parametrize(
    "content", [None, "", "no idea", [], [1], {}, 7, True, "On a scale from 0 to 10 I give this a 7."]
)
def test_an_unclear_answer_is_counted_said_and_no_score(tmp_path, serve, caplog, content):
    port, asked = serve(replying(saying(content)))
    own = judge(tmp_path, port, retries=2)
    assert np.isnan(score(own)).all() and len(asked) == 3 and (own.asked, own.unclear) == (1, 1)
    assert "1 of 1 answers hold no clear score from 0 to 10" in caplog.text


def test_a_number_that_was_cut_off_may_have_gone_on(tmp_path, serve):
    """1 of "10" where max_tokens ends it."""
    assert np.isnan(score(judge(tmp_path, serve(replying(saying("Score: 1", finish_reason="length")))[0]))).all()
    assert score(judge(tmp_path, serve(replying(saying("Score: 1", finish_reason="stop")))[0])).tolist() == [1.0]
    assert score(judge(tmp_path, serve(replying(saying("1/10, as the", finish_reason="length")))[0])).tolist() == [1.0]


def test_a_judge_that_is_mostly_unclear_is_refused(tmp_path, serve):
    own = judge(tmp_path, serve(replying(saying("well, six or 7")))[0], max_unclear=0.2, timeout=5)
    assert np.isnan(score(own, 4)).all()  # of few answers the share says nothing
    with pytest.raises(
        UserError, match=r"5 of 5 answers hold no clear score.*'well, six or 7'; with those before 9 of 9"
    ):
        score(own, 5)


def test_an_unclear_answer_is_kept_too(tmp_path, serve):
    """It was paid for, and the same would come again."""
    port, asked = serve(replying(saying("no idea")))
    for _ in range(2):
        assert np.isnan(ScoreCache(tmp_path / "scores").score(judge(tmp_path, port), [IMAGE], [PROMPT]).total).all()
    assert len(asked) == 1


@pytest.mark.parametrize("header", ["86400", "1e999", "nan", "-5", "soon", "a date", "99" * 400])
def test_a_server_may_ask_for_a_wait_but_not_for_ever(tmp_path, serve, header):
    header = formatdate(time.time() + 9999) if header == "a date" else header
    port, asked = serve(replying(b"busy", f"Retry-After: {header}\r\n", "429 Too Many"))
    begun = time.monotonic()
    with pytest.raises(UserError, match="HTTP 429 Too Many: busy"):
        score(judge(tmp_path, port, retries=2, timeout=5))
    assert len(asked) == 3 and time.monotonic() - begun < 1


def test_one_refusal_ends_the_others_tries(tmp_path, serve, monkeypatch):
    """Not after all of their waits."""
    monkeypatch.setattr("inpo_fast.judges.http.LONGEST_WAIT", 30.0)
    answers = iter([replying(b"no", status="401 Who"), *[replying(b"", "Retry-After: 30\r\n", "503 Busy")] * 9])
    port, _ = serve(lambda connection: next(answers)(connection))
    begun = time.monotonic()
    with pytest.raises(UserError, match="HTTP 401 Who: no"):
        score(judge(tmp_path, port, retries=9, timeout=5), 3)
    assert time.monotonic() - begun < 5


KEY = "sk-the-key-itself-0123"


@pytest.mark.parametrize("written", [f"{KEY}\n", f"  {KEY}\r\n", KEY])
def test_a_key_may_end_with_a_line(tmp_path, serve, monkeypatch, written):
    monkeypatch.setenv("MY_KEY", written)
    port, asked = serve(replying(saying("7")))
    assert score(judge(tmp_path, port, key_env="MY_KEY")).tolist() == [7.0]
    assert f"Authorization: Bearer {KEY}\r\n" in asked[0] + "\r\n"


@pytest.mark.parametrize("written", [f"{KEY}\n{KEY}", f"{KEY}\x00", f"{KEY}ü", " \n"])
def test_a_key_that_is_none_is_refused_and_not_told(tmp_path, monkeypatch, written):
    monkeypatch.setenv("MY_KEY", written) if "\x00" not in written else monkeypatch.setattr(
        "os.environ", {"MY_KEY": written}
    )
    with pytest.raises(UserError, match="key_env: ") as refused:
        judge(tmp_path, 1, key_env="MY_KEY")
    assert KEY not in str(refused.value)


def test_a_key_goes_to_its_own_host_and_into_no_message(tmp_path, serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    other, asked = serve(replying(saying("7")))
    for status in ("301 Moved", "302 Found", "303 See", "307 Moved", "308 Moved"):
        port, _ = serve(replying(b"", f"Location: http://127.0.0.1:{other}/v1\r\n", status))
        with pytest.raises(UserError, match=f"HTTP {status}"):
            score(judge(tmp_path, port, key_env="MY_KEY", timeout=5))
    assert not asked
    port, _ = serve(replying(f"wrong key {KEY}".encode(), status="401 Unauthorized"))
    with pytest.raises(UserError, match=r"wrong key \*\*\*"):
        score(judge(tmp_path, port, key_env="MY_KEY", timeout=5))


def test_an_address_may_say_who_asks(tmp_path, serve):
    """As Basic, and it is shown nowhere, nor part of the cache's key."""
    port, asked = serve(replying(saying("7")))
    place = "http://{}@127.0.0.1:{}/v1?api-version=2&key={}"
    own = judge(tmp_path, port, url=place.format("me:pass%20word", port, "k-123456"), price=1)
    assert score(own).tolist() == [7.0]
    assert asked[0].startswith("POST /v1?api-version=2&key=k-123456 HTTP/1.1") and f"Host: 127.0.0.1:{port}" in asked[0]
    assert f"Authorization: Basic {base64.b64encode(b'me:pass word').decode()}" in asked[0]
    assert f"http://***@127.0.0.1:{port}/v1?api-version=2&key=***" in own.cost(3)
    same = judge(tmp_path, port, url=place.format("you:other-word", port, "k-777777"))
    assert judge_id(own) == judge_id(same) and "word" not in judge_id(own)
    for url in (
        f"http://127.0.0.1:{port}/v1?api-version=3",
        f"http://127.0.0.1:{port}/v2?api-version=2",
        "http://h/v1",
    ):
        assert judge_id(judge(tmp_path, port, url=url)) != judge_id(own)
    with pytest.raises(UserError, match="no score for") as refused:
        score(judge(tmp_path, port, url=place.format("me:pass%20word", 1, "k-123456")))
    assert not any(secret in str(refused.value) for secret in ("pass", "k-123456"))


def test_a_proxy_of_the_environment_is_used_and_its_password_not_told(tmp_path, serve, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    port, asked = serve(replying(saying("7")))
    monkeypatch.setenv("http_proxy", f"http://me:hunter2hunter2@127.0.0.1:{port}")
    assert score(judge(tmp_path, port, url="http://judge.example/v1")).tolist() == [7.0]
    assert asked[0].startswith("POST http://judge.example/v1 HTTP/1.1") and "Proxy-Authorization: Basic" in asked[0]
    for place in ("127.0.0.1:1", "127.0.0.1:port", "[::1"):
        monkeypatch.setenv("http_proxy", f"http://me:hunter2hunter2@{place}")
        with pytest.raises(UserError, match="no score for") as refused:
            score(judge(tmp_path, port, url="http://judge.example/v1"))
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "no address", "http://", "http:///v1", "http://[::1", "http://h:port/", "http://h:99999/", "ftp://h/", "//h",
        "http://h/a b", "http://h/ü", "http://ü.example/", "http://h/\x07", "localhost:8000", "http://me:hunter2hunter2@",
        "http://me:hunter2/hunter2@h/", "http://@/", "file:///etc/hosts",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_one_line(tmp_path, url):
    with pytest.raises(UserError, match="url") as refused:
        judge(tmp_path, 1, url=url)
    assert "hunter2" not in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timeout": float("inf")}, "timeout"), ({"timeout": float("nan")}, "timeout"), ({"timeout": 0}, "timeout"),
        ({"high": float("inf")}, "high"), ({"low": 10**400}, "low"), ({"retries": -1}, "retries"),
        ({"retries": 1.5}, "retries"), ({"parallel": 10**9}, "parallel"), ({"max_tokens": 0}, "max_tokens"),
        ({"model": 7}, "model"), ({"question": ["{prompt}"]}, "question"), ({"key_env": 7}, "key_env"),
        ({"max_cost": "much"}, "max_cost"), ({"max_unclear": 2}, "max_unclear"), ({"tie": -1}, "tie"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        judge(tmp_path, 1, **changes)
    assert judge(tmp_path, 1, retries=2.0, max_cost=None).settings.retries == 2
