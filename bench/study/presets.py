"""Studies by name. What a method trains with was chosen on the tuning split: `tuning`, six settings for each method."""

from collections.abc import Iterable

from bench.study.cells import Cell, Study, grid

SEEDS, TUNING_SEED = tuple(range(5)), 10  # what was tuned on is not reported
BETA, LR, RMS, N = "objective.beta", "optim.lr", "objective.tau_norm", "inversion.steps"
STEPS, BATCH, PER_PAIR = "train.steps", "train.pairs_per_step", "objective.timesteps.per_pair"
MIN_T = "objective.timesteps.min"
Settings = dict[str, str]

INPO = {"method": "inpo", RMS: "none"}
SFT = {"method": "sft", LR: "2e-4"}
# rounds of ten steps, from the eleventh on (the shipped pairs are the base's own); ten sampling steps, half of the
# evaluation's, so that drawing a pair costs no more than it must
ONLINE = INPO | {
    "online.every": "10",
    "online.start": "10",
    "online.judge": "pocket-rules",
    "online.sampler_steps": "10",
    "online.guidance": "3",
    "online.batch": "64",
}
KINDS: dict[str, Settings] = {
    "inpo": INPO,
    "inpo-rms": {"method": "inpo", RMS: "rms"},
    "inpo-orthogonal": {"method": "inpo", RMS: "orthogonal"},
    "inpo-ref": INPO | {"inversion.model": "reference"},
    "inpo-online": ONLINE | {BETA: "1000"},
    "smpo": {"method": "smpo", RMS: "none", "inversion.estimator": "renoise", "objective.gamma": "1"},
    "dpo": {"method": "dpo"},
    "dpo-wp": {"method": "dpo", BETA: "2000"},
    "kto": {"method": "kto"},
    "sft": {"method": "sft"},
    "sft, then inpo": INPO | {BETA: "2000"},
    "sft, then dpo": {"method": "dpo", BETA: "2000"},  # what of the gain is the first half's
}
THEN = ("sft, then inpo", "sft, then dpo")
LRS = ("5e-5", "1e-4", "2e-4")
# two values of what else decides, by three learning rates; sft has nothing else, so six learning rates
AXES: dict[str, tuple[str, tuple[str, str]]] = {
    **dict.fromkeys(("inpo", "inpo-rms", "inpo-orthogonal", "inpo-ref", "smpo"), (BETA, ("1000", "2000"))),
    "dpo": (BETA, ("500", "2000")),
    "kto": (BETA, ("500", "2000")),
    "dpo-wp": ("objective.winner_preserving", ("0.2", "0.5")),
    "inpo-online": ("online.mix", ("0.25", "0.5")),
}


def _tuning() -> tuple[Cell, ...]:
    out = []
    for name, kind in KINDS.items():
        if name == "sft":
            choices = [{LR: lr} for lr in ("2e-5", "5e-5", "1e-4", "2e-4", "4e-4", "8e-4")]
        elif name in THEN:
            choices = [{"first": first, LR: lr} for first in ("1e-4", "2e-4") for lr in LRS]
        else:
            key, values = AXES[name]
            choices = [{key: value, LR: lr} for value in values for lr in LRS]
        for choice in choices:
            words = " ".join(f"{key.split('.')[-1]}={value}" for key, value in choice.items())
            first = (SFT | {LR: choice.pop("first")}) if "first" in choice else {}
            out.append(Cell(f"{name}: {words}", tuple((kind | choice).items()), tuple(first.items())))
    return tuple(out)


# the best of `tuning` by win-rate on the tuning prompts, by gain where two are equal (a test compares with the results)
TUNED: dict[str, Settings] = {
    "inpo": {BETA: "1000", LR: "5e-5"},
    "inpo-rms": {BETA: "1000", LR: "1e-4"},
    "inpo-orthogonal": {BETA: "1000", LR: "5e-5"},
    "inpo-ref": {BETA: "2000", LR: "5e-5"},
    "inpo-online": {"online.mix": "0.25", LR: "1e-4"},
    "smpo": {BETA: "1000", LR: "5e-5"},
    "dpo": {BETA: "2000", LR: "5e-5"},
    "dpo-wp": {"objective.winner_preserving": "0.5", LR: "1e-4"},
    "kto": {BETA: "500", LR: "2e-4"},
    "sft": {LR: "5e-5"},
    "sft, then inpo": {LR: "5e-5"},
    "sft, then dpo": {LR: "5e-5"},
}
FIRST = SFT | {LR: "1e-4"}
# the best of `cheaper`: inpo at half its evaluations
CHEAP = {BATCH: "36", "train.micro_batch": "12", N: "3", PER_PAIR: "2"}
METHODS = {name: KINDS[name] | TUNED[name] for name in KINDS}


def cells(table: dict[str, Settings]) -> tuple[Cell, ...]:
    return tuple(Cell(name, tuple(settings.items())) for name, settings in table.items())


def methods(names: Iterable[str], more: Settings | None = None) -> tuple[Cell, ...]:
    """With their tuned settings, and more."""
    first = dict.fromkeys(THEN, tuple((FIRST | (more or {})).items()))
    return tuple(Cell(name, tuple((METHODS[name] | (more or {})).items()), first.get(name, ())) for name in names)


def _equal_evaluations() -> tuple[Cell, ...]:
    """About 24,000 UNet evaluations each, what 25 steps of inpo take; a step takes 64 times those of a pair."""
    a_pair = {"smpo": 26.3, "dpo": 4, "dpo-wp": 4, "kto": 8, "sft": 2} | dict.fromkeys(
        ("inpo", "inpo-rms", "inpo-ref"), 15.1
    )
    steps = {name: round(25 * 15.1 / cost) for name, cost in a_pair.items()}
    found = [cell for name, n in steps.items() for cell in methods([name], {STEPS: str(n)})]
    found += cells({"inpo-cheap": METHODS["inpo"] | CHEAP})
    # a drawn pair takes 40 more, and the first round is the shipped pairs'
    found += cells({"inpo-online": METHODS["inpo-online"] | {STEPS: "18", "online.every": "5", "online.start": "5"}})
    # sft takes half of them
    second = {
        "sft, then inpo": METHODS["sft, then inpo"] | {STEPS: "12"},
        "sft, then inpo-cheap": METHODS["sft, then inpo"] | CHEAP | {STEPS: "25"},
        "sft, then dpo": METHODS["sft, then dpo"] | {STEPS: "47"},
    }
    first = tuple((FIRST | {STEPS: "94"}).items())
    return (*found, *(Cell(name, tuple(settings.items()), first) for name, settings in second.items()))


def _reconstruction() -> tuple[Cell, ...]:
    """n, grid and convention of the explicit inversion; then solved steps at n = 5 and n = 10."""
    explicit = grid({
        "inversion.grid": ["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"],
        "inversion.evaluate_at": ["source", "target"],
        N: ["3", "5", "10", "30"],
    })  # fmt: skip
    return explicit + grid({"inversion.estimator": ["renoise", "fixed-point"], N: ["5", "10"]})


def _batches() -> tuple[Cell, ...]:
    """Pairs of a step: gradients of inpo agree more than those of dpo, so that it should need fewer of them."""
    found = [(name, n) for name in ("inpo", "dpo") for n in ("8", "16", "32", "64")]
    table = {
        f"{name}, {n} pairs a step": METHODS[name] | {BATCH: n, "train.micro_batch": str(min(16, int(n)))}
        for name, n in found
    }
    return cells(table)


def _cheaper() -> tuple[Cell, ...]:
    """50 steps of inpo at about 480 UNet evaluations each, half of what they take: pairs of a step, levels n, timesteps
    that share a trajectory."""
    found = {}
    for pairs, micro, n, each in (
        (32, 16, 10, 1),
        (20, 10, 10, 2),
        (14, 14, 10, 4),
        (48, 16, 5, 1),
        (60, 15, 3, 1),
        (36, 12, 3, 2),
        (22, 11, 3, 4),
    ):
        settings = {BATCH: str(pairs), "train.micro_batch": str(micro), N: str(n), PER_PAIR: str(each)}
        found[f"{pairs} pairs a step, n={n}, {each} timesteps"] = METHODS["inpo"] | settings
    return cells(found)


def _solver(kinds: dict[str, str]) -> tuple[Cell, ...]:
    """About as many UNet evaluations each: n times the evaluations of a step."""
    table = {"ddim n=10": {N: "10"}, "ddim n=30": {N: "30"}}
    for kind, n in kinds.items():
        table[f"{kind} n={n}"] = {"inversion.estimator": kind, N: n}
    return cells(table)


# with inpo's beta and learning rate: what is tau_norm's or the inversion's, what the tuning's
DPO_AS_INPO = METHODS["dpo"] | TUNED["inpo"]
ALIKE_BUT_FOR_NOISE = {"inpo": METHODS["inpo"], "dpo as inpo": DPO_AS_INPO}
COMPARED = ("inpo", "inpo-rms", "dpo", "sft")
QUALITIES = {
    "below": {"data.source": "build/study/below.parquet"},
    "base": {},
    "above": {"data.source": "build/study/above.parquet"},
}
BIASED = {"data.source": "build/study/bright.parquet"}
ALIKE = {"data.filters.score": "alike", "data.filters.min_score": "0.98"}  # keeps half of the pairs
DRAWN_BY = {"base": {}} | {
    f"{name} model": {"data.source": f"build/study/{name}.parquet"} for name in ("better", "worse")
}
SURE = {"data.source": "build/study/sure.parquet"}
SOLVERS = {"renoise": "5", "fixed-point": "5", "gradient": "3"}
PAPER = tuple(METHODS["inpo"].items())  # what presets vary one thing of
GRID, AT = "inversion.grid", "inversion.evaluate_at"
GRIDS = {
    f"{name}, n={n}": {GRID: name, N: n}
    for name, n in (("exact", "5"), ("exact", "10"), ("spread", "3"), ("spread", "5"))
}
GRIDS |= {
    "exact, n=10, told the target": {N: "10", AT: "target"},
    # the published script's semantics, as in configs/sd15-published.yaml
    "diffusers-0.20, n=10": {GRID: "diffusers-0.20", N: "10"},
    "diffusers-0.20, n=10, with prompt and noise": {GRID: "diffusers-0.20", N: "10"}
    | {"inversion.guidance": "1", "inversion.eta": "0.1"},
}
# what Gaussian noise instead of the inversion's leaves is the base's own, and Diffusion-DPO's too
LEAK = grid({RMS: ["none", "rms", "orthogonal"]}) + cells(
    {"Gaussian noise": {RMS: "none", "inversion.estimator": "random"}}
)
CUT = {"inpo": (0, 100, 200, 400), "dpo": (0, 400)}  # timesteps that are not trained
PRESETS = {
    "reconstruction": Study("reconstruction", _reconstruction(), kind="reconstruct"),
    "solver-error": Study("solver-error", _solver(SOLVERS), kind="reconstruct"),
    "solver": Study("solver", _solver(SOLVERS), SEEDS, PAPER),
    "scan": Study("scan", grid({N: ["3", "5", "10", "30"]}), SEEDS, PAPER),
    "grids": Study("grids", cells(GRIDS), SEEDS, PAPER),
    "batch": Study("batch", _batches(), SEEDS),
    "guidance": Study("guidance", grid({"inversion.guidance": ["0", "0.5", "1", "5"]}), SEEDS, PAPER),
    # the last 1000, 900, 800, 600 timesteps (S9); whether what InPO gains by it is InPO's
    "timesteps": Study(
        "timesteps",
        cells({f"{n}, {1000 - t} timesteps": METHODS[n] | {MIN_T: f"{t}"} for n in ("inpo", "dpo") for t in CUT[n]}),
        SEEDS,
    ),
    "quality": Study(
        "quality",
        cells({f"{n}, {d}": METHODS[n] | source for n in COMPARED for d, source in QUALITIES.items()})
        + cells({f"inpo-rms as inpo, {d}": METHODS["inpo"] | {RMS: "rms"} | QUALITIES[d] for d in ("below", "above")})
        + cells({f"dpo as inpo, {d}": DPO_AS_INPO | source for d, source in QUALITIES.items()}),
        SEEDS,
    ),
    "transfer": Study(
        "transfer",
        cells(
            {
                f"{name}, pairs by the {who}": METHODS[name] | source
                for name in COMPARED
                for who, source in DRAWN_BY.items()
            }
            # a better model's pictures differ less, so that more of their labels are wrong
            | {f"{name}, sure pairs by the better model": method | SURE for name, method in ALIKE_BUT_FOR_NOISE.items()}
            | {
                f"dpo as inpo, pairs by the {who}": DPO_AS_INPO | DRAWN_BY[who]
                for who in ("better model", "worse model")
            }
        ),
        SEEDS,
    ),
    "landscape": Study(
        "landscape",
        grid({"inversion.guidance": ["0", "0.5", "1", "5"]}),
        shared=(("train.steps", "12"), ("optim.warmup_steps", "2"), ("optim.average", "none")),  # of the run of update
        kind="landscape",
    ),
    "leak": Study("leak", LEAK, kind="leak"),
    "drift": Study(
        "drift",
        cells(
            {
                "inpo": {},
                "inpo, inverted by the reference": {"inversion.model": "reference"},
                "inpo, winner preserving": {"objective.winner_preserving": "0.5"},
                "inpo, both": {"inversion.model": "reference", "objective.winner_preserving": "0.5"},
            }
        ),
        SEEDS,
        PAPER,
    ),
    "bias": Study(
        "bias",
        cells(
            {
                "clean pairs": {},
                "planted bias": BIASED,
                "planted bias, smoothed labels": BIASED | {"objective.label_smoothing": "0.15"},
                "planted bias, winner preserving": BIASED | {"objective.winner_preserving": "0.5"},
                "planted bias, filtered": BIASED | ALIKE,
                "planted bias, weighted": {"data.source": "build/study/balanced.parquet"},
            }
        ),
        SEEDS,
        PAPER,
    ),
    "tuning": Study("tuning", _tuning(), (TUNING_SEED,), split="tuning", pictures=4),
    "cheaper": Study("cheaper", _cheaper(), (10, 11, 12), split="tuning", pictures=4),
    "methods": Study("methods", methods(METHODS), SEEDS, against="dpo"),
    "evaluations": Study("evaluations", _equal_evaluations(), SEEDS, against="dpo"),
    "short": Study(
        "short",
        methods(("inpo", "inpo-rms", "dpo", "sft", "kto")),
        (0, 1),
        ((STEPS, "16"), (BATCH, "32"), ("optim.warmup_steps", "2")),
        pictures=1,
    ),
}
