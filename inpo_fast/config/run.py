"""A run's configuration: dataclasses <-> YAML and `--group.key=value`. Strict: an unknown key is an error."""

import difflib
import functools
import re
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from inpo_fast import objectives, recipes
from inpo_fast.config_rules import check
from inpo_fast.data.windows import DataConfig
from inpo_fast.inversion import InversionConfig
from inpo_fast.models import ModelsConfig
from inpo_fast.objectives import Method, ObjectiveConfig
from inpo_fast.optim import OptimConfig
from inpo_fast.refusal import Refusal


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how much at once, how often saved."""

    steps: int = 400
    """Optimizer steps."""
    pairs_per_step: int = 1024
    """The global batch: pairs of one optimizer step over all processes."""
    micro_batch: int = 8
    """Pairs per forward and backward pass of one process. No effect on the result beyond rounding."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    milestone_every: int = 0
    """Checkpoints of every so many steps stay on disk as well (a multiple of checkpoint_every). 0: none."""
    shard_states: bool = False
    """Several processes: each keeps only its part of the fp32 masters and of the optimizer's state (for SDXL). The
    same result, to rounding."""
    patience_minutes: float = 30.0
    """How long a process waits for the others at the end of a step before it names the one that hangs and stops."""
    threads: int | None = None
    """CPU threads per process. None: torch's choice."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The comparison with the base model at the end of a run, and of `python -m inpo_fast.evaluate`."""

    prompts: str | None = None
    """Held-out prompts that decide: a text file, one a line; a folder with HPDv2's four lists; Parti's .tsv; .parquet
    or hf://… with captions. None: no evaluation."""
    seen_prompts: str | None = None
    """Prompts from the training distribution, for the seen-against-held-out guard."""
    judge: str = "pocket-rules"
    """Which judge decides the win-rate."""
    outside_judge: str | None = None
    """A second judge that no reward was made from, reported as a guard."""
    judges: tuple[str, ...] = ()
    """Of a comparison of several models (inpo_fast.evaluate): all of these. Empty: judge and outside_judge."""
    seeds: int = 4
    """Pictures per prompt and model."""
    sampler_steps: int = 50
    """DDIM steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale (7.5 SD1.5, 5 SDXL)."""
    batch: int = 16
    """Pictures drawn at once."""
    control_eps_scale: float = 1.01
    """The control row: the base with its noise prediction scaled by this. A judge it fools is a grain meter."""
    seed: int = 0
    """Of the initial noise; independent of the training seed, so that runs are compared on the same noise."""


@dataclass(frozen=True)
class ObserveConfig:
    """Looking at a run while it trains: pictures, held-out pairs, Weights & Biases."""

    images_every: int = 0
    """Steps between pictures of fixed prompts, drawn as evaluate.* says (one seed). 0: none."""
    images: int = 8
    """How many prompts, spread evenly over them."""
    prompts: str | None = None
    """Where they come from, as evaluate.prompts. None: evaluate.prompts."""
    held_out: str | None = None
    """Preference pairs that are not trained on, as data.source: accuracy, margins and errors on them. None: none."""
    held_out_every: int = 50
    """Steps between two looks at them; the first step and the last have one."""
    held_out_pairs: int = 256
    """How many of them, the same each time."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics and pictures go to (WANDB_MODE=offline keeps them here). None: none."""


@dataclass(frozen=True)
class OnlineConfig:
    """Pairs drawn from the policy while it trains and judged at once (online InPO; with method=dpo online DPO …)."""

    every: int = 0
    """Steps of a round: before its first one new pairs are drawn from the policy as it is. 0: none."""
    start: int = 0
    """The first step that has drawn pairs."""
    mix: float = 0.5
    """Share of the pairs that are drawn instead of read; each keeps the prompt of the pair whose place it takes."""
    judge: str | None = None
    """Who says which picture is better, as evaluate.judge."""
    candidates: int = 2
    """Pictures drawn for a prompt; the best and the worst of them make the pair."""
    sampler_steps: int = 50
    """DDIM steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale (7.5 SD1.5, 5 SDXL)."""
    batch: int = 16
    """Pictures drawn at once."""
    keep: bool = False
    """Keep the pictures of rounds that no checkpoint needs any more; they can be read as data.source."""

    @property
    def evaluations_a_pair(self) -> int:
        """UNet evaluations that drawing one pair takes."""
        return self.candidates * self.sampler_steps * (2 if self.guidance > 1 else 1)


@dataclass(frozen=True)
class PlanConfig:
    """The machine that --dry-run plans for."""

    gpus: int | None = None
    """None: as many as there are processes."""
    memory: float = 80.0
    """GiB of one GPU."""
    tflops: float = 400.0
    """TFLOP/s that one GPU is expected to reach, for the GPU-hours. A guess of yours, not a measurement."""


@dataclass(frozen=True)
class RunConfig:
    """Align a diffusion model with preference pairs (DDIM-InPO, arXiv 2503.18454)."""

    method: Method = "inpo"
    """inpo: inversion preference optimization. smpo: SmPO-Diffusion (with inversion.estimator=renoise). dpo:
    Diffusion-DPO. kto: Diffusion-KTO. sft: winners only. docs/methods.md has the formulas."""
    seed: int = 0
    """Everything random is a function of it and of the pair's position."""
    output: str | None = None
    """Folder of the run. Default: runs/<name of the config file>."""
    resume: bool = False
    """Continue from the newest checkpoint in the output folder."""
    overwrite: bool = False
    """Delete what an earlier run left in the output folder."""
    dry_run: bool = False
    """Print what the run needs (memory, work, the window's arithmetic) and stop. Loads no weights."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inversion: InversionConfig = field(default_factory=InversionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def variant_of(config: RunConfig) -> str:
    """The honest name of what is trained."""
    name = objectives.label(config.method, config.objective, config.inversion)
    return f"{name}-online" if config.online.every else name


SWITCHES = {"--resume": "--resume", "--overwrite": "--overwrite", "--dry-run": "--dry_run"}  # may stand without a value


set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its --help


class StrictParser(ArgumentParser):
    """Errors are one line: the key, the nearest known name, the remedy."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Refusal(_explain(message, _keys(RunConfig)))


@functools.cache  # it takes a sixth of a second, most of what parsing takes
def make_parser(program: str) -> StrictParser:
    parser = StrictParser(prog=program, description=RunConfig.__doc__, exit_on_error=False, allow_abbrev=False)
    about = "YAML file with any of the keys below, or a shipped recipe's name, such as sd15; later ones win"
    parser.add_argument("--config", action="config", help=about)
    parser.add_class_arguments(RunConfig, nested_key=None, as_group=False)
    return parser


def parse(program: str, arguments: list[str] | None = None) -> RunConfig:
    """Command line (and the YAML files it names) to a checked configuration. Refusal on any mistake."""
    parser = make_parser(program)
    arguments = sys.argv[1:] if arguments is None else arguments
    words, named = _find_files([f"{SWITCHES[word]}=true" if word in SWITCHES else word for word in arguments])
    space = parser.parse_args(words)
    space.pop("config", None)
    config: RunConfig = _instantiate(RunConfig, parser.instantiate(space))
    if config.output is None:
        name = named[-1].stem if named else "unnamed"
        config = replace(config, output=str(Path("runs") / name))
    check(config)
    return config


def _find_files(words: list[str]) -> tuple[list[str], list[Path]]:
    """The words as the parser is to read them, and the files that --config means. A shipped recipe whose paths lead
    elsewhere than they say goes as text."""
    out, named, last = [], [], ""
    for word in words:
        key, equals, asked = word.partition("=") if word.startswith("--config=") else ("", "", word)
        if (key or last) == "--config" and not _is_yaml_mapping(asked):
            named.append(path := recipes.find(asked))
            tree = _read(path)
            led = recipes.lead_home(tree) if recipes.is_shipped(path) else tree
            asked = str(path) if led == tree else yaml.safe_dump(led, sort_keys=False)
        out.append(f"{key}{equals}{asked}")
        last = word
    return out, named


def _read(path: Path) -> dict:
    """The settings in a file. Refusal where it holds something else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise Refusal(f"--config {path}: cannot be read ({problem.strerror})") from problem
    except UnicodeDecodeError as problem:
        raise Refusal(f"--config {path}: not text in UTF-8 ({problem})") from problem
    except yaml.YAMLError as problem:  # jsonargparse reads some of it otherwise
        raise Refusal(f"--config {path}: not YAML ({' '.join(str(problem).split())})") from problem
    if not isinstance(tree, dict):
        raise Refusal(f"--config {path}: holds no settings; a recipe has lines such as `method: inpo`")
    _check_groups(str(path), RunConfig, tree)
    return tree


def _is_yaml_mapping(text: str) -> bool:
    """Settings on the command line, `--config '{seed: 3}'`, and not a file's name."""
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def _check_groups(path: str, kind: type, tree: dict, prefix: str = "") -> None:
    """`train: 3` where a group of keys belongs: jsonargparse ignores it or fails in its own way."""
    for f in fields(kind):
        if is_dataclass(f.type) and f.name in tree:
            if not isinstance(tree[f.name], dict):
                raise Refusal(f"{path}: {prefix}{f.name} is {tree[f.name]!r}, expected keys below it or no such line")
            _check_groups(path, f.type, tree[f.name], f"{prefix}{f.name}.")


def _instantiate(kind: type, space: Namespace):
    return kind(**{f.name: space[f.name] for f in fields(kind)})


def split_batch(config: TrainConfig, world: int) -> int:
    """Micro-batches per step and process. Refusal, before anything is loaded, when the arithmetic does not divide."""
    if config.pairs_per_step % world:
        near = max(world, config.pairs_per_step // world * world)
        raise Refusal(
            f"train.pairs_per_step={config.pairs_per_step} does not divide over {world} processes; "
            f"take a multiple of {world} such as {near}"
        )
    own = config.pairs_per_step // world
    if own % config.micro_batch:
        fits = max(d for d in range(1, min(own, config.micro_batch) + 1) if own % d == 0)
        raise Refusal(
            f"train.micro_batch={config.micro_batch} does not divide the {own} pairs that each of {world} processes "
            f"has per step; take a divisor such as {fits}"
        )
    return own // config.micro_batch


def to_dict(config) -> dict:
    """Nested plain values, in the order of the fields."""
    out = {}
    for f in fields(config):
        value = getattr(config, f.name)
        out[f.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return out


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested groups of a configuration as one, keys joined by dots."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# how jsonargparse words an unknown key, on the command line and in a file
UNKNOWN_KEY = (
    (r"[Uu]nrecognized arguments: --(?P<key>[\w.\-]+)", False),
    (r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", True),
    (r"Option '(?P<key>[\w.]+)' is not accepted", False),
)


def _keys(kind: type, prefix: str = "") -> list[str]:
    names = []
    for f in fields(kind):
        names.append(prefix + f.name)
        if is_dataclass(f.type):
            names += _keys(f.type, prefix + f.name + ".")
    return names


def _explain(message: str, known: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest key when one is unknown."""
    line = " ".join(message.split())
    for pattern, prefix in UNKNOWN_KEY:
        if found := re.search(pattern, line):
            key = ".".join(part for part in (found["group"] if prefix else "", found["key"]) if part)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
                name for name in known if name.split(".")[-1] == key.split(".")[-1]
            ]
            hint = f"; did you mean '{near[0]}'?" if near else ""
            return f"unknown key '{key}'{hint} (--help lists all)"
    return line
