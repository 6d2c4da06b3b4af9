"""The page, also as a browser shows it, is held against the run folder and the evaluation that it was made from."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inpo_fast.comparison.evaluation import Evaluation, Gallery, summarise
from inpo_fast.config import EvaluateConfig
from inpo_fast.judges import Scores
from inpo_fast.report import curves, pictures, plots
from inpo_fast.report.results import headline, verdict
from inpo_fast.report.write import write_report

EVIL = "<script>alert('&')</script>"
PROMPTS = [f'a red "circle" {EVIL}', *(f"prompt number {i}" for i in range(14))]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# from top to bottom
SECTIONS = ("verdict", "pictures", "why", "win-rates", "sanity-checks", "curves", "config", "manifest")


class Brightness:
    """A judge whose favourite is the brighter picture; its name and a part's name try to break out of the page."""

    name, tie = f"bright {EVIL} $x$", 1e-6

    def score(self, images, prompts) -> Scores:
        total = np.array([image.mean() / 255 for image in images])
        return Scores(total, {"alignment": total * 0 + 1, "looks": total, EVIL: total})


def gallery(seed: int, brightness: float, size: int = 8) -> Gallery:
    noise = np.random.default_rng(seed).random((2 * len(PROMPTS), size, size, 3))
    return Gallery(PROMPTS, 2, [(brightness * picture * 255).astype(np.uint8) for picture in noise])


def evaluation(aligned: float = 0.9, control: float = 0.6, size: int = 8) -> Evaluation:
    """Galleries of noise: `aligned` and `control` say how bright they are, the base is 0.7."""
    levels = {"base": 0.7, "aligned": aligned, "control": control, "base_seen": 0.7, "aligned_seen": aligned}
    galleries = {name: gallery(seed, level, size) for seed, (name, level) in enumerate(levels.items())}
    judge = Brightness()
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    result = summarise(galleries, scores, judge, judge, EvaluateConfig(seeds=2), "inpo-rms")
    return Evaluation(result, galleries, scores)


def write_metrics(folder: Path, names: list[str], steps: int = 30) -> None:
    rows = [{"step": i + 1, **{name: math.sin(i / 5) / 9 + 1 for name in names}} for i in range(steps)]
    rows[-1][names[-1]] = None if steps > 1 else 1.0  # was not finite
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"step": 31, "lo'  # cut short by a crash
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_metrics(tmp_path, [line.metric for curve in curves.CURVES for line in curve.lines])
    (tmp_path / "config.yaml").write_text(f"method: inpo\noutput: runs/{EVIL}\n")
    manifest = {"variant": "inpo-rms", "data": {"pairs": 4096, "source": EVIL}, "model": {"base": EVIL}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def no_curves(monkeypatch):
    """They take longer than the rest of the page."""
    monkeypatch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")


def test_page_is_complete_escaped_and_self_contained(run):
    shown = evaluation()
    page = write_report(run, shown).read_text()
    places = [page.index(f'id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    assert html.escape(verdict(shown.result), quote=True).replace("&#x27;", "&#39;") in page
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6  # prompt, config, manifest, judge, part, base
    addresses = re.findall(r"""(?:src|href|url|srcset)\s*[=(]\s*["']?([^"'\s>)]{1,40})""", page)
    assert addresses and all(a.startswith(("data:image/", "#")) for a in addresses), addresses
    assert page.count("<svg") == sum(
        1 for curve in curves.CURVES if curve.contrast is not False and curve.objective != "utility"
    )
    assert "@import" not in page and len(page) < 3_000_000


@pytest.mark.parametrize(
    ("aligned", "control", "tone"),
    [(0.9, 0.6, "good"), (0.5, 0.6, "bad"), (0.7, 0.6, "undecided"), (0.9, 0.9, "undecided")],
    ids=["better", "worse", "equal", "better but the control wins too"],
)
def test_colour_of_the_verdict(run, no_curves, aligned, control, tone):
    page = write_report(run, evaluation(aligned, control)).read_text()
    assert re.search(r'id="verdict" class="card verdict (\w+)"', page)[1] == tone
    assert ("✘ FAILS" in page) == (control > 0.7 or aligned < 0.7)


@pytest.mark.parametrize(
    ("tone", "low", "high"),
    [
        ("good", 0.501, 0.9),
        ("undecided", 0.5, 0.9),
        ("undecided", 0.45, 0.55),
        ("undecided", 0.1, 0.5),
        ("bad", 0.1, 0.49),
    ],
)
def test_a_verdict_is_an_interval_on_one_side_of_a_half(tone, low, high):
    result = evaluation(0.9, 0.6).result | {"win_rate_low": low, "win_rate_high": high}
    assert headline(result).tone == tone


def test_missing_parts_are_left_out(tmp_path):
    page = write_report(tmp_path, None).read_text()  # an empty folder
    assert "Not evaluated" in page and "no training metrics" in page and "<details" not in page
    assert not (tmp_path / "samples.png").exists()
    bare = evaluation()
    bare.scores = {}
    page = write_report(tmp_path, Evaluation(bare.result)).read_text()  # only evaluation.json is left
    assert verdict(bare.result)[:60] in page and "<img" not in page
    page = write_report(tmp_path, bare).read_text()
    assert "<img" in page and "Why pictures won" not in page


def test_a_method_without_losers_has_no_margin(tmp_path):
    write_metrics(tmp_path, ["loss", "winner_delta", "tau_rms_winner", "eps_scale", "lr"], steps=1)
    page = write_report(tmp_path, None).read_text()
    assert page.count("<svg") == 5 and "ln 2" not in page and ">losers <" not in page


def test_long_runs_stay_small_and_keep_their_mean(tmp_path):
    write_metrics(tmp_path, [line.metric for curve in curves.CURVES for line in curve.lines], steps=5000)
    assert len(write_report(tmp_path, None).read_text()) < 1_000_000
    values = np.random.default_rng(0).random(1001)
    assert np.allclose(plots.running_mean(values, 1), values)
    assert np.allclose(plots.running_mean(np.ones(50), 7), 1)  # the ends too


def test_contact_sheet_and_limits_in_bytes(run, no_curves):
    write_report(run, evaluation())
    with Image.open(run / "samples.png") as sheet:
        assert sheet.width > 6 * 160 and sheet.height > 4 * 160  # 12 prompts, 8 pixels enlarged 20 times
        assert np.asarray(sheet)[20, 80].tolist() == np.asarray(sheet)[21, 81].tolist()  # squares, not a blur
    base, aligned = gallery(0, 0.7, 288), gallery(1, 0.9, 288)  # noise does not compress: the worst case
    assert len(pictures.contact_sheet(pictures.before_after(base, aligned))) < 2_000_000
    uris = pictures.data_uris(pictures.before_after(base, aligned), 500_000)
    assert len(uris) == 24 and sum(map(len, uris.values())) < 700_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_everything_on_a_desk_and_on_a_phone(run, tmp_path):
    shown = evaluation()
    page = write_report(run, shown).read_text()
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{html.escape(page)}"></iframe>' for w in (1100, 390))
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<!DOCTYPE html><meta charset=utf-8>{frames}<pre id=out></pre><script>onload = () => {{"
        "const seen = [...document.querySelectorAll('iframe')].map(f => { const d = f.contentDocument; return {"
        "overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth, images: d.images.length,"
        "broken: [...d.images].filter(i => !i.complete || !i.naturalWidth).length, scripts: d.scripts.length,"
        "sections: [...d.querySelectorAll('section, details')].filter(s => s.offsetHeight > 20).map(s => s.id),"
        "plots: [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 250).length,"
        "text: d.querySelector('#verdict p').innerText, config: d.querySelector('#config pre').textContent }; });"
        "out.textContent = JSON.stringify(seen); }</script>"
    )
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    ]  # fmt: skip
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    desk, phone = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1]))
    for seen in (desk, phone):
        assert seen["overflow"] <= 0 and seen["broken"] == 0 and seen["scripts"] == 0
        assert seen["images"] == page.count("<img ") >= 24 and seen["plots"] == page.count("<svg")
        assert seen["sections"] == list(SECTIONS)
        assert seen["text"].split() == verdict(shown.result).split()
        assert seen["config"] == (run / "config.yaml").read_text()
