"""The main settings in all pairs of values, trained for two steps: `python tests/faults/covering_array.py`.

Every run works, with a margin of 0 and the loss that the method has there at its first step, or is refused in one line.
What the rules of the configuration refuse is not in the array: so a refused pair of values hides no other pair. Runs
that are marked so are stopped after their first step and resumed, to the same bits as at once.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import yaml
from covertable import make
from tiny_runs import Forked, free_port, metrics, run_command, run_training, same_bits, save_recipe
from tiny_world import one_level, pair_table, save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.config import RunConfig
from inpo_fast.config.rules import check
from inpo_fast.config.run import Kind
from inpo_fast.data.config import Shuffle
from inpo_fast.method.config import Estimator, EvaluateAt, Grid
from inpo_fast.method.methods import METHODS
from inpo_fast.models.config import Precision
from inpo_fast.runtime.errors import UserError

Row = Mapping[str, str]


def of(key: str, values) -> dict[str, list[str]]:
    """A setting's values as they stand on a command line."""
    return {str(value): [f"--{key}={value}"] for value in values}


def switch(*words: str) -> dict[str, list[str]]:
    return {"no": [], "yes": list(words)}


def factors(place: Path) -> dict[str, dict[str, list[str]]]:
    """Name -> value -> words of the command line; the first value of each is what most runs have."""
    adapter = ["--models.lora.rank=2", "--models.lora.alpha=3"]
    cached = ["--inversion.model=reference", f"--inversion.cache={place}/CACHE"]
    more = list(get_args(Estimator))[1:]
    return {
        "processes": {"1": [], "2": []},
        "resumed": switch(),
        "method": of("method", METHODS),
        "base": of("models.base", [place / name for name in ("sd", "sd-v", "sd-v-zsnr", "sdxl")]),
        "init": {
            "none": [],
            "folder": [f"--models.init={place}/INIT"],
            "lora": [f"--models.init={place}/LORA"],
        },
        "precision": of("models.precision", get_args(Precision)),
        "fast": of("models.fast", ["off", "fused"]) | {"fp8": ["--models.fast=fused", "--inversion.fp8=true"]},
        "lora": switch(*adapter),
        "recompute": switch("--models.gradient_checkpointing=true"),
        "optimizer": of("optim.kind", get_args(Kind)),
        "decay": of("optim.decay", ["constant", "linear", "cosine"]),
        "average": of("optim.average", ["none", "last-half", "ema"]),
        "sharded": switch("--train.shard_states=true"),
        "estimator": {"ddim": []}
        | {"refined " + e: [f"--inversion.estimator={e}", "--inversion.refinements=2"] for e in more if e != "random"}
        | {"refined at source": ["--inversion.estimator=renoise", "--inversion.refine_at=source"]}
        | {"random": ["--inversion.estimator=random"]},
        "grid": of("inversion.grid", get_args(Grid)),
        "evaluate_at": of("inversion.evaluate_at", get_args(EvaluateAt)),
        "inverted by": of("inversion.model", ["policy", "reference"]),
        "guidance": of("inversion.guidance", [0.0, 1.0, 2.5]),
        "eta": of("inversion.eta", [0.0, 0.1]),
        "error_space": of("objective.error_space", ["noise", "velocity"]),
        "tau_norm": of("objective.tau_norm", ["none", "rms", "orthogonal"]),
        "winner_preserving": switch("--objective.winner_preserving=0.5"),
        "smoothing": of("objective.label_smoothing", [0.0, 0.1]),
        "per_pair": of("objective.timesteps.per_pair", [1, 2]),
        "cache": {  # below "inverted by", over which it has the last word
            "none": [],
            "latents": [f"--data.cache={place}/CACHE"],
            "trajectories": cached,
            "frozen": [*cached, "--inversion.frozen=true"],
        },
        "source": {
            "parquet": [f"--data.source={place}/pairs.parquet"],
            "relabelled": [
                f"--data.source={place}/pairs.parquet",
                f"--data.labels={place}/labels.parquet",
                "--data.labels_as=soft",
            ],
            "folder": [f"--data.source={place}/folder"],
            "hpd": [f"--data.source={place}/list.json", f"--data.images={place}/folder"],
            "webdataset": [f"--data.source={place}/pairs.tar"],
        },
        "shuffle": of("data.shuffle", get_args(Shuffle)),
        "crop": of("data.crop", ["center", "random"]),
        "dropout": of("data.prompt_dropout", [0.0, 0.5]),
        "posterior": of("data.vae_sample", ["true", "false"]),
        "filters": switch("--data.filters.block_words=[circle]", "--data.filters.weights={red: 0.5}"),
        "online": switch("--online.every=1", "--online.judge=pocket-rules", "--online.sampler_steps=2"),
        "pictures": switch("--observe.images_every=1", "--observe.images=2", f"--observe.prompts={place}/prompts.txt"),
        "held out": switch(f"--observe.held_out={place}/held_out.parquet", "--observe.held_out_pairs=3"),
        "evaluated": switch(
            f"--evaluate.prompts={place}/prompts.txt", "--evaluate.seeds=1", "--evaluate.sampler_steps=2"
        ),
    }


def prepare(place: Path) -> None:
    """Models, pairs and prompts."""
    place.mkdir(parents=True, exist_ok=True)
    pipelines = {"sd": tiny_pipeline(), "sdxl": tiny_xl(), "sd-v": tiny_pipeline(), "sd-v-zsnr": tiny_pipeline()}
    for name, pipeline in pipelines.items():
        settings = {"prediction_type": "v_prediction"} if "-v" in name else {}
        settings |= {"rescale_betas_zero_snr": True} if name.endswith("zsnr") else {}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
        one_level(pipeline).save_pretrained(place / name)
    source = Path(save_pairs(place / "pairs.parquet", rows=24))
    pq.write_table(pair_table(48).slice(24), place / "held_out.parquet")
    rows = [row for row in pair_table(24).to_pylist() if row["label_0"] != 0.5]
    (place / "folder").mkdir(exist_ok=True)
    lines, records = [], []
    with tarfile.open(place / "pairs.tar", "w") as tar:
        for number, row in enumerate(rows):
            names = [f"{number}-{side}.png" for side in "01"]
            for side, name in enumerate(names):
                (place / "folder" / name).write_bytes(row[f"jpg_{side}"])
                tar.add(place / "folder" / name, f"{number}.{side}.png")
            better = int(row["label_1"])
            lines.append({"prompt": row["caption"], "chosen": names[better], "rejected": names[1 - better]})
            records.append({"prompt": row["caption"], "path1": names[better], "path2": names[1 - better]})
            about = place / "about.json"
            about.write_text(json.dumps({"prompt": row["caption"], "label": better, "label_0": 1 - better}))
            tar.add(about, f"{number}.json")
    (place / "folder" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "list.json").write_text(json.dumps(records))
    (place / "prompts.txt").write_text("\n".join(row["caption"] for row in rows[:3]))
    words = ["--source", str(source), "--judge", "pocket-rules", "--output", str(place / "labels.parquet")]
    assert Forked(place / "relabel", run_command, "inpo_fast.relabel", *words).wait() == 0
    groups = {"objective": {"beta": 500.0}, "inversion": {"steps": 2, "batch": 8}}
    groups |= {"evaluate": {"batch": 2}, "online": {"batch": 2}, "optim": {"lr": 1e-3, "warmup_steps": 1}}
    groups["train"] = {"steps": 2, "pairs_per_step": 4, "micro_batch": 1, "checkpoint_every": 1, "threads": 1}
    groups["data"] = {"source": str(source), "workers": 1}
    save_recipe(place, models={"base": str(place / "sd")}, **groups)


def make_start(row: Row, place: Path) -> None:
    """What models.init of the row begins from, made once by a run of our own."""
    base = Path(row["base"]).name
    for kind, word in (("folder", "--models.lora.rank=0"), ("lora", "--models.lora.rank=2")):
        name = f"{base}-{kind}"
        if row["init"] == kind and not (place / name).exists():
            words = [f"--models.base={row['base']}", "--train.steps=1", "--method=sft", word]
            assert ends(place, name, 1, words) == [0], complaints(place, name, 1)


def words_of(row: Row, known: Mapping[str, Mapping[str, list[str]]], place: Path) -> list[str]:
    """A row's command line. models.init belongs to its base, a cache to this run alone."""
    base, name = Path(row["base"]).name, number(row)
    words = [word for key in known for word in known[key][row[key]]]
    ready = [("/INIT", f"/{base}-folder/model"), ("/LORA", f"/{base}-lora/lora"), ("/CACHE", f"/{name}-cache")]
    for old, new in ready:
        words = [word.replace(old, new) for word in words]
    return words


def number(row: Row) -> str:
    """The same wherever the folder is."""
    return f"run-{zlib.crc32(' '.join(f'{name}={Path(value).name}' for name, value in row.items()).encode()):08x}"


def configured(base: RunConfig, words: list[str]) -> RunConfig:
    """As the command line would have it, without the parser, which takes a hundred times as long."""
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        base = _put(base, key.split("."), value)
    return base


def _put(config, path: list[str], text: str):
    name, *rest = path
    before = getattr(config, name)
    value = _put(before, rest, text) if rest else text if isinstance(before, str) else yaml.safe_load(text)
    return replace(config, **{name: value})


def refused_pairs(known: Mapping[str, Mapping[str, list[str]]]) -> list[dict]:
    """Pairs of values that the configuration's rules refuse, for covertable."""
    out, base = [], replace(RunConfig(), output="out")
    for (one, ones), (other, others) in itertools.combinations(known.items(), 2):
        for a, b in itertools.product(ones, others):
            try:
                check(configured(base, [*ones[a], *others[b]]))
                if {(one, _kind(a)), (other, _kind(b))} in REFUSED_LATER:
                    raise UserError("once the model or the source is open")
            except UserError:
                out.append(_without({(one, a), (other, b)}))
    return out + [_without(combination) for combination in REFUSED_LATER if len(combination) > 2]


def _without(combination: set[tuple[str, str]]) -> dict:
    together = [{"operator": "eq", "left": name, "value": value} for name, value in sorted(combination)]
    return {"operator": "not", "condition": {"operator": "and", "conditions": together}}


def _kind(value: str) -> str:
    """Of v-models, refined estimators and sources that are read alone, what they have in common."""
    if value.startswith("refined"):
        return "refined"
    name = Path(value).name
    return "v" if "-v" in name else "alone" if name in ("folder", "hpd", "webdataset") else name


REFUSED_LATER = (  # what only the open model or source can tell
    {("base", "v"), ("estimator", "refined")},
    {("base", "sd"), ("error_space", "velocity")},
    {("base", "sdxl"), ("error_space", "velocity")},
    {("source", "alone"), ("shuffle", "blocks")},
    {("cache", "trajectories"), ("grid", "spread")},
    {("cache", "trajectories"), ("grid", "exact"), ("evaluate_at", "target")},
)


def rows(known: Mapping[str, Mapping[str, list[str]]], strength: int, seed: int = 0) -> list[Row]:
    """strength 2: every pair of values that is not refused; 1: every value. seed: which of many such arrays."""
    names = {name: list(values) for name, values in known.items()}
    if strength == 2:
        return make(names, constraints=refused_pairs(known), salt=str(seed))
    chosen, found = [], rows(known, 2, seed)  # few of them that have everything, greedily
    left = {(name, value) for name, values in names.items() for value in values}
    assert left == {pair for row in found for pair in row.items()}
    while left:
        chosen.append(max(found, key=lambda row: len(left & set(row.items()))))
        left -= set(chosen[-1].items())
    return chosen


def ends(place: Path, name: str, processes: int, words: list[str], command: str = "") -> list[int]:
    """Exit statuses of the trainer's processes, or of another command."""
    common = ["--config", str(place / "tiny.yaml"), "--output", str(place / name), *words]
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = (run_command, command) if command else (run_training,)
    started = [
        Forked(place / f"{name}-{rank}", *run, *common, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
        for rank in range(processes)
    ]
    return [process.wait() for process in started]


def complaints(place: Path, name: str, processes: int) -> list[str]:
    return [(place / f"{name}.err").read_text() for name in [f"{name}-{rank}" for rank in range(processes)]]


def tried(row: Row, known: Mapping[str, Mapping[str, list[str]]], place: Path) -> str:
    """ "worked", "refused: …", or what is wrong."""
    words, name, processes = words_of(row, known, place), number(row), int(row["processes"])
    make_start(row, place)
    if row["cache"] == "latents" and ends(place, name, 1, words, "inpo_fast.cache") != [0]:
        return _refusal(place, name, 1)
    if any(ends(place, name, processes, words)):
        return _refusal(place, name, processes)
    problem = _first_step(row, place / name)
    if not problem and row["resumed"] == "yes":
        problem = _resumed(row, words, place, name, processes)
    return problem or "worked"


def _refusal(place: Path, name: str, processes: int) -> str:
    for said in complaints(place, name, processes):
        lines = said.splitlines()
        ours = [line for line in lines if line.startswith("inpo_fast.")]
        if "Traceback" in said or "a mistake of inpo_fast" in said or len(ours) > 1:
            return f"{place / name}: not one line: {' | '.join(lines[-6:])}"
        if ours:
            return f"refused: {ours[0]}"
    return f"{place / name}: ended without a word"


def _first_step(row: Row, run: Path) -> str:
    first, *others = metrics(run)
    losses = {"kto": 0.5, "sft": first["loss"]}
    if len(others) != 1 or not all(math.isfinite(line["loss"]) for line in (first, *others)):
        return f"{run}: two finite steps were expected"
    exact = row["precision"] != "fp16"  # two copies of a model are not bit-equal there on a CPU
    if abs(first.get("margin", 0.0)) > (0.0 if exact else 0.05):
        return f"{run}: the first margin is {first['margin']}"
    if abs(first["loss"] - losses.get(row["method"], math.log(2))) > (1e-6 if exact else 0.05):
        return f"{run}: the first loss is {first['loss']}"
    if not (run / "model" / "model_index.json").is_file() or not (run / "report.html").is_file():
        return f"{run}: no model or no report"
    return ""


def _resumed(row: Row, words: list[str], place: Path, name: str, processes: int) -> str:
    whole = place / f"{name}-whole"
    shutil.copytree(place / name, whole)
    shutil.rmtree(place / name / "checkpoints" / "step-0002")
    if any(ends(place, name, processes, [*words, "--resume"])):
        return f"{place / name}: --resume: {_refusal(place, name, processes)}"
    return "" if same_bits(place / name, whole, 2) else f"{place / name}: resumed, it has other bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", type=int, default=2, choices=(1, 2), help="1: every value; 2: every pair of them")
    parser.add_argument("--seed", type=int, default=0, help="of the array: there are many")
    parser.add_argument("--place", type=Path, help="a folder that keeps everything")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        place = (own.place or Path(aside)).resolve()
        begun, results = time.monotonic(), []
        prepare(place)
        known = factors(place)
        found = rows(known, own.strength, own.seed)
        for at, row in enumerate(found):
            results.append(tried(row, known, place))
            print(f"{at + 1}/{len(found)} {number(row)} {results[-1]}", flush=True)
            if results[-1] != "worked":
                print("   ", *words_of(row, known, place), flush=True)
            if not own.place:
                shutil.rmtree(place / number(row), ignore_errors=True)
    worked, refused = results.count("worked"), sum(result.startswith("refused") for result in results)
    print(
        f"{len(known)} settings, {len(found)} runs: {worked} worked, {refused} refused in one line, "
        f"{len(found) - worked - refused} wrong; {time.monotonic() - begun:.0f} s"
    )
    sys.exit(worked + refused < len(found))


if __name__ == "__main__":
    main()
