"""How models are compared: the settings, which need none of the models' libraries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """The comparison with the base model at the end of a run, and of `python -m inpo_fast.evaluate`."""

    prompts: str | None = None
    """Held-out prompts that decide: a text file, one a line; a folder with HPDv2's four lists; Parti's .tsv; .parquet
    or hf://… with captions; .json, .jsonl, .csv. One that is listed again counts once. None: no evaluation."""
    seen_prompts: str | None = None
    """Prompts from the training distribution, for the sanity check of seen against held-out prompts."""
    judge: str = "pocket-rules"
    """Which judge decides the win-rate."""
    outside_judge: str | None = None
    """The independent judge, which no reward was made from: one of the sanity checks."""
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
    """The negative control: the base with its noise prediction scaled by this. A judge that prefers it measures
    grain."""
    seed: int = 0
    """Of the initial noise; independent of the training seed, so that runs are compared on the same noise."""
