"""What a step of SD1.5 should take on a GPU, written down before there was one. A model, not a measurement.

n = 10, grid diffusers-0.22, fused, bf16, micro-batch 16, VAE and text in the loop (as bench.step runs it). The
time of a phase is its matrix work at the rate such shapes are expected to reach, plus the bytes that the fused path
moves beside it at a share of the card's copy rate, plus a part of what half-filled last waves cost. COUNTED is
inpo_fast/cost/step_cost.py's own count (a test holds it); the rates are guesses. `python -m bench.step.predictions`
prints the table of docs/performance.md.
"""

from bench import report

COUNTED = {  # phase: TFLOP and GB of a pair; 5.48 evaluations of the inversion an image
    "encode": (2.2466, 9.6457),
    "invert": (8.8039, 9.3151),
    "reference": (1.6065, 2.2543),
    "forward": (1.6065, 2.2543),
    "backward": (3.3331, 4.1738),
}
EVALUATIONS, MICRO_BATCH = 5.48, 16
FORWARD, BACKWARD, VAE = 432.0, 337.0, 315.0  # TFLOP/s: 1.86 ms a forward pass of an image, 9.9 ms backward of a pair
TFLOPS = {"encode": VAE, "invert": FORWARD, "reference": FORWARD, "forward": FORWARD, "backward": BACKWARD}
CARDS = {"H200": 4.3, "H100": 3.0}  # TB/s of a device copy, read + write; both have the same tensor cores
OF_COPY = 0.65  # what norms, gates and adds reach of it
TAILS = 1.5  # ms a pair, in all but the VAE
UNSURE = 0.15  # of each figure
RECIPE_PAIRS = 400 * 1024


def ms_per_pair(card: str, evaluations: float = EVALUATIONS) -> dict[str, float]:
    """Phase -> milliseconds. evaluations: of the inversion, mean per image; a benchmark draws its own timesteps."""
    matrix = {phase: 1000 * flop / TFLOPS[phase] for phase, (flop, _) in COUNTED.items()}
    tails = TAILS / sum(ms for phase, ms in matrix.items() if phase != "encode")
    out = {}
    for phase, (_, moved) in COUNTED.items():
        out[phase] = matrix[phase] * (1 + tails * (phase != "encode")) + moved / (CARDS[card] * OF_COPY)
    out["invert"] *= evaluations / EVALUATIONS
    return out


def pairs_s(card: str, precomputed: bool = False) -> float:
    return 1000 / sum(ms for phase, ms in ms_per_pair(card).items() if not (precomputed and phase == "encode"))


def table() -> str:
    head = [
        "card",
        *(f"{phase}, ms" for phase in COUNTED),
        "pair, ms",
        "pairs/s",
        "precomputed, ms",
        "pairs/s",
        "GPU-hours",
    ]
    rows = [head, ["---"] * len(head)]
    for card in CARDS:
        ms, without = ms_per_pair(card), pairs_s(card, precomputed=True)
        row = [f"{x:.1f}" for x in (*ms.values(), sum(ms.values()), pairs_s(card), 1000 / without, without)]
        rows.append([card, *row, f"{RECIPE_PAIRS / without / 3600:.2f}"])
    return report.markdown(rows)


def comparison(lines: list[dict]) -> str:
    """Markdown: the newest fused and compiled step of SD1.5 on a known card beside what was predicted."""
    found = report.newest_steps([x for x in lines if x["kernel"] == "train_step" and x.get("ms_per_pair")])
    parts = [
        _beside(card, x)
        for x in found
        for card in CARDS
        if card in x["device"] and (x["op"], x["shape"], x["dtype"]) == ("sd15", "512px", "bf16")
        if x["provider"] in ("fused", "compiled")
    ]
    return "\n\n".join(parts) or "No measured step of SD1.5 (fused) on an H100 or H200 to hold against the predictions."


def _beside(card: str, x: dict) -> str:
    predicted, measured = ms_per_pair(card, x["evaluations"]), x["ms_per_pair"]
    predicted["sum"] = sum(predicted.values())
    measured = {phase: measured.get(phase, 0.0) for phase in COUNTED}
    measured["sum"] = sum(measured.values())
    measured["wall"], predicted["wall"] = 1000 / x["pairs_s"], predicted["sum"]
    rows = [["phase", "predicted by a model, ms a pair", "measured", "measured / predicted"], ["---"] * 4]
    rows += [[p, f"{ms:.1f}", f"{measured[p]:.1f}", f"{measured[p] / ms:.2f}"] for p, ms in predicted.items()]
    largest = max(COUNTED, key=lambda p: abs(measured[p] - predicted[p]))
    away = measured[largest] - predicted[largest]
    off = "**Gradient off: not a result.** " if report.is_off(x) else ""
    return (
        f"{off}{x['provider']} on {x['device']} beside the prediction for an {card} (micro-batch {MICRO_BATCH}, +-"
        f"{UNSURE:.0%}), {x['evaluations']:.2f} evaluations an image, micro-batch {x['micro_batch']}:\n\n"
        f"{report.markdown(rows)}\n\nLargest gap: {largest}, {away:+.1f} ms a pair "
        f"({measured[largest] / predicted[largest]:.2f} times the prediction)."
    )


if __name__ == "__main__":
    print(table())
