"""What a study runs: cells of a grid, each a few settings over one recipe, and which prompts they may see."""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, replace

from inpo_fast.config import RunConfig, flat, parse, to_dict
from inpo_fast.runtime.errors import UserError

RECIPE = "configs/pocket.yaml"
OUTSIDE = "clip:inpo_fast/pocket/assets/clip"  # the study's column "outside", and in its results' names
# what the recipe had before `tuning` chose its beta and lr: what a preset does not name keeps its meaning
BEFORE = {"objective.beta": "2000", "optim.lr": "5e-5", "objective.tau_norm": "rms"}
SPLITS = ("reporting", "tuning")
TUNING_SHARE = 3  # one prompt in so many is for tuning


@dataclass(frozen=True)
class Cell:
    """A row of the table. settings: (key, value) of the configuration, as on the command line.

    first: settings of a run that comes before, with the same seed; its model is the base (and reference) of this one.
    """

    name: str
    settings: tuple[tuple[str, str], ...]
    first: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Study:
    """shared: settings of all cells. kind: train (runs, pictures, a judge), reconstruct (no training), landscape (the
    loss around the base) or leak (what its first step pays for)."""

    name: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = (0,)
    shared: tuple[tuple[str, str], ...] = ()
    kind: str = "train"
    split: str = "reporting"
    pictures: int = 2  # of each prompt
    against: str | None = None  # the cell that the others are compared with, prompt by prompt and seed by seed


def grid(axes: dict[str, list[str]]) -> tuple[Cell, ...]:
    """Every combination; a cell's name has what differs between cells. UserError for a key without values."""
    for key, values in axes.items():
        if not values or not all(values):
            raise UserError(f"--grid {key}: has no value; write {key}=FIRST,SECOND")
        if len(set(values)) < len(values):
            raise UserError(f"--grid {key}: has a value twice; each cell is run once")
    varied = [key for key, values in axes.items() if len(values) > 1] or list(axes)
    cells = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        cells.append(Cell(" ".join(f"{_short(key)}={settings[key]}" for key in varied), tuple(settings.items())))
    return tuple(cells)


def _short(key: str) -> str:
    """The last part of a key tells enough, but for keys of timesteps."""
    return ".".join(key.split(".")[-2:]) if "timesteps" in key else key.split(".")[-1]


def config_of(study: Study, cell: Cell, seed: int, output: str | None = None) -> RunConfig:
    """The run of one cell and training seed, without its own evaluation. UserError where the cell is no valid run."""
    try:
        return replace(_parsed((*study.shared, *cell.settings)), seed=seed, output=output)
    except UserError as problem:
        raise UserError(f"cell {cell.name!r}: {problem}") from problem


@functools.cache  # a parser takes a fifth of a second, and a study has many cells and seeds
def _parsed(settings: tuple[tuple[str, str], ...]) -> RunConfig:
    last = {"evaluate.prompts": "null", "evaluate.seen_prompts": "null", "evaluate.outside_judge": OUTSIDE}
    words = (f"--{key}={value}" for key, value in (BEFORE | dict(settings) | last).items())
    return parse("python -m bench.study", ["--config", RECIPE, *words])


def result_name(study: Study, cell: Cell, seed: int) -> str:
    """File of a result: another one as soon as anything that decides it differs, and the same for all studies that
    have this very run. What stands at its default is left out, so that a new key of the configuration renames nothing.
    """
    facts = {"seed": seed, "kind": study.kind, "split": study.split, "pictures": study.pictures}
    facts["config"] = settings_of(config_of(study, cell, seed))
    if cell.first:
        facts["first"] = settings_of(config_of(study, first_of(cell), seed))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    return f"{facts['config'].get('method', RunConfig.method)}-{digest}-seed{seed}.json"


def first_of(cell: Cell) -> Cell:
    return Cell(f"{cell.name}, first", cell.first)


def settings_of(config: RunConfig) -> dict:
    """Flat: what differs from the defaults, but for the seed and the output."""
    own, plain = flat(to_dict(config)), _defaults()
    return {key: value for key, value in own.items() if value != plain[key] and key not in ("seed", "output")}


@functools.cache
def _defaults() -> dict:
    return flat(to_dict(RunConfig()))


def split_prompts(prompts: list[str], split: str) -> list[str]:
    """One third, chosen by a hash of the text alone, is for tuning, the others for reporting: what beta, lr and n were
    chosen on is never what is reported."""
    chosen = [hashlib.sha256(prompt.encode()).digest()[0] % TUNING_SHARE == 0 for prompt in prompts]
    return [prompt for prompt, tuning in zip(prompts, chosen, strict=True) if tuning == (split == "tuning")]
