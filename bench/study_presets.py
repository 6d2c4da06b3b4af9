"""Studies by name. What a method trains with was chosen on the tuning split: `tuning`, six settings for each method."""

from bench.study_cells import Cell, Study, grid

SEEDS, TUNING_SEED = tuple(range(5)), 10  # what was tuned on is not reported
BETA, LR, RMS, N = "objective.beta", "optim.lr", "objective.tau_norm", "inversion.steps"
Settings = dict[str, str]

INPO = {"method": "inpo", RMS: "none"}
SFT = {"method": "sft", LR: "2e-4"}
KINDS: dict[str, Settings] = {
    "inpo": INPO,
    "inpo-rms": {"method": "inpo", RMS: "rms"},
    "inpo-ref": INPO | {"inversion.model": "reference"},
    "smpo": {"method": "smpo", RMS: "none", "inversion.estimator": "renoise", "objective.gamma": "1"},
    "dpo": {"method": "dpo"},
    "dpo-wp": {"method": "dpo", BETA: "2000"},
    "kto": {"method": "kto"},
    "sft": {"method": "sft"},
    "sft, then inpo": INPO | {BETA: "2000"},
}
LRS = ("5e-5", "1e-4", "2e-4")
# two values of what else decides, by three learning rates; sft has nothing else, so six learning rates
AXES: dict[str, tuple[str, tuple[str, str]]] = {
    **dict.fromkeys(("inpo", "inpo-rms", "inpo-ref", "smpo"), (BETA, ("1000", "2000"))),
    "dpo": (BETA, ("500", "2000")),
    "kto": (BETA, ("500", "2000")),
    "dpo-wp": ("objective.winner_preserving", ("0.2", "0.5")),
}


def _tuning() -> tuple[Cell, ...]:
    out = []
    for name, kind in KINDS.items():
        if name == "sft":
            choices = [{LR: lr} for lr in ("2e-5", "5e-5", "1e-4", "2e-4", "4e-4", "8e-4")]
        elif name == "sft, then inpo":
            choices = [{"first": first, LR: lr} for first in ("1e-4", "2e-4") for lr in LRS]
        else:
            key, values = AXES[name]
            choices = [{key: value, LR: lr} for value in values for lr in LRS]
        for choice in choices:
            words = " ".join(f"{key.split('.')[-1]}={value}" for key, value in choice.items())
            first = (SFT | {LR: choice.pop("first")}) if "first" in choice else {}
            out.append(Cell(f"{name}: {words}", tuple((kind | choice).items()), tuple(first.items())))
    return tuple(out)


METHODS = {
    "inpo": {"method": "inpo", RMS: "none"},
    "inpo-rms": {"method": "inpo", RMS: "rms"},
    "smpo": {"method": "smpo", RMS: "none", "inversion.estimator": "renoise", "objective.gamma": "1"},
    "dpo": {"method": "dpo", "optim.lr": "1e-4"},
    "dpo-wp": {"method": "dpo", "optim.lr": "1e-4", "objective.winner_preserving": "0.5"},
    "kto": {"method": "kto", "objective.beta": "1000", "optim.lr": "1e-4"},
    "sft": {"method": "sft", "optim.lr": "1e-4"},
}


def cells(table: dict[str, dict[str, str]]) -> tuple[Cell, ...]:
    return tuple(Cell(name, tuple(settings.items())) for name, settings in table.items())


def _reconstruction() -> tuple[Cell, ...]:
    """n, grid and convention of the explicit inversion; then solved steps at n = 5 and n = 10."""
    explicit = grid({
        "inversion.grid": ["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"],
        "inversion.evaluate_at": ["source", "target"],
        N: ["3", "5", "10", "30"],
    })  # fmt: skip
    return explicit + grid({"inversion.estimator": ["renoise", "fixed-point"], N: ["5", "10"]})


def _solver(kinds: dict[str, str]) -> tuple[Cell, ...]:
    """About as many UNet evaluations each: n times the evaluations of a step."""
    table = {"ddim n=10": {N: "10"}, "ddim n=30": {N: "30"}}
    for kind, n in kinds.items():
        table[f"{kind} n={n}"] = {"inversion.estimator": kind, N: n}
    return cells(table)


QUALITIES = {name: {"data.source": f"build/study/{name}.parquet"} for name in ("below", "above")} | {"base": {}}
BIASED = {"data.source": "build/study/bright.parquet"}
ALIKE = {"data.filters.score": "alike", "data.filters.min_score": "0.98"}  # keeps half of the pairs
DRAWN_BY = {"base": {}} | {
    f"{name} model": {"data.source": f"build/study/{name}.parquet"} for name in ("better", "worse")
}
SOLVERS = {"renoise": "5", "fixed-point": "5", "gradient": "3"}
PRESETS = {
    "reconstruction": Study("reconstruction", _reconstruction(), kind="reconstruct"),
    "solver-error": Study("solver-error", _solver(SOLVERS), kind="reconstruct"),
    "solver": Study("solver", _solver(SOLVERS), SEEDS),
    "scan": Study("scan", grid({N: ["3", "5", "10", "30"]}), SEEDS),
    "guidance": Study("guidance", grid({"inversion.guidance": ["0", "0.5", "1", "5"]}), SEEDS),
    "timesteps": Study(
        "timesteps", grid({"objective.timesteps.min": ["0", "100", "200", "400"]}), SEEDS
    ),  # the last 1000, 900, 800, 600 timesteps (S9)
    "quality": Study(
        "quality",
        cells(
            {
                f"{name}, {data}": METHODS[name]
                | ({} if data == "base" else {"data.source": f"build/study/{data}.parquet"})
                for name in ("inpo", "inpo-rms", "dpo", "sft")
                for data in ("below", "base", "above")
            }
        ),
        SEEDS,
    ),
    "transfer": Study(
        "transfer",
        cells(
            {
                f"{name}, pairs by the {who}": METHODS[name] | source
                for name in ("inpo", "inpo-rms", "dpo", "sft")
                for who, source in DRAWN_BY.items()
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
    ),
    "tuning": Study("tuning", _tuning(), (TUNING_SEED,), split="tuning", pictures=4),
    "methods": Study("methods", cells(METHODS), SEEDS),
    "short": Study(
        "short",
        cells({name: METHODS[name] for name in ("inpo", "inpo-rms", "dpo", "sft", "kto")}),
        (0, 1),
        (("train.steps", "16"), ("train.pairs_per_step", "32"), ("optim.warmup_steps", "2"), ("optim.lr", "1e-4")),
        pictures=1,
    ),
}
