"""What the paper reports (arXiv 2503.18454), to stand beside our own numbers where base and prompts are the same.

Tables 3 to 8: median and mean of each model; table 1: win-rates of InPO in percent. PickScore, HPS and CLIP are scaled
by 100 there and here; guidance 7.5 (SD1.5) and 5 (SDXL).
"""

COLUMNS = ("aesthetic", "pickscore", "hps-v2.0", "clip-h")  # our judges for the paper's columns
GUIDANCE = {"SD1.5": 7.5, "SDXL": 5.0}
BASES = {  # last part of a hub id or folder
    "stable-diffusion-v1-5": "SD1.5",
    "sd15": "SD1.5",
    "stable-diffusion-xl-base-1.0": "SDXL",
    "sdxl": "SDXL",
}
# (base, prompt set) -> model -> (median, mean) of each column
SCORES = {
    ("SDXL", "hpdv2"): {
        "Base": ((6.1143, 6.1346), (22.756, 22.781), (28.614, 28.624), (38.360, 38.155)),
        "SFT": ((5.8049, 5.8327), (21.524, 21.380), (27.467, 27.204), (37.217, 36.531)),
        "DPO": ((6.1124, 6.1310), (23.133, 23.152), (29.165, 29.174), (38.865, 38.711)),
        "InPO": ((6.1676, 6.1820), (23.254, 23.274), (29.576, 29.550), (38.627, 38.449)),
    },
    ("SD1.5", "hpdv2"): {
        "Base": ((5.3491, 5.3848), (20.719, 20.727), (26.647, 26.633), (34.276, 33.945)),
        "SFT": ((5.7255, 5.7515), (21.647, 21.648), (28.032, 27.977), (36.292, 35.845)),
        "DPO": ((5.5219, 5.5841), (21.274, 21.297), (27.428, 27.392), (35.591, 35.197)),
        "KTO": ((5.6922, 5.7248), (21.566, 21.582), (28.376, 28.306), (35.902, 35.648)),
        "InPO": ((5.7734, 5.8056), (21.894, 21.916), (28.523, 28.502), (36.876, 36.495)),
    },
    ("SDXL", "parti"): {
        "Base": ((5.7519, 5.7681), (22.648, 22.628), (28.447, 28.424), (35.550, 35.531)),
        "SFT": ((5.5373, 5.5403), (21.666, 21.554), (27.213, 27.085), (34.827, 34.696)),
        "DPO": ((5.8181, 5.7942), (22.914, 22.928), (28.885, 28.906), (36.401, 36.457)),
        "InPO": ((5.8493, 5.8566), (23.039, 23.005), (29.123, 29.143), (35.914, 35.903)),
    },
    ("SD1.5", "parti"): {
        "Base": ((5.3494, 5.3132), (21.406, 21.389), (27.291, 27.172), (33.065, 33.128)),
        "SFT": ((5.5798, 5.5506), (21.803, 21.759), (28.192, 28.129), (33.887, 33.956)),
        "DPO": ((5.4445, 5.3874), (21.619, 21.631), (27.596, 27.511), (33.551, 33.694)),
        "KTO": ((5.5466, 5.5110), (21.755, 21.736), (28.240, 28.110), (34.101, 34.013)),
        "InPO": ((5.6056, 5.5698), (21.957, 21.923), (28.431, 28.325), (34.533, 34.683)),
    },
    ("SDXL", "pickapic"): {
        "Base": ((5.9775, 6.0057), (22.219, 22.159), (27.995, 27.978), (36.470, 36.124)),
        "SFT": ((5.6416, 5.6452), (21.028, 21.003), (26.790, 26.681), (35.589, 35.427)),
        "DPO": ((6.0179, 6.0160), (22.581, 22.627), (28.515, 28.586), (37.404, 37.392)),
        "InPO": ((6.0372, 6.0558), (22.606, 22.692), (28.824, 28.817), (37.130, 36.842)),
    },
    ("SD1.5", "pickapic"): {
        "Base": ((5.3545, 5.3296), (20.632, 20.661), (26.527, 26.480), (33.023, 32.619)),
        "SFT": ((5.6441, 5.6285), (21.278, 21.253), (27.707, 27.509), (34.050, 34.144)),
        "DPO": ((5.5258, 5.4654), (21.020, 21.053), (27.098, 26.913), (33.270, 33.302)),
        "KTO": ((5.6029, 5.5831), (21.184, 21.190), (27.645, 27.580), (34.003, 33.910)),
        "InPO": ((5.6810, 5.6585), (21.456, 21.490), (27.866, 27.765), (34.782, 34.728)),
    },
}
# (base, prompt set) -> opponent -> win-rate of InPO by each column, percent
WIN_RATES = {
    ("SDXL", "hpdv2"): {
        "Base": (56.37, 79.25, 85.38, 53.37),
        "SFT": (66.66, 88.31, 89.91, 59.00),
        "DPO": (55.87, 59.28, 65.81, 46.91),
    },
    ("SDXL", "parti"): {
        "Base": (61.70, 72.89, 78.31, 50.55),
        "SFT": (69.70, 88.54, 88.91, 56.99),
        "DPO": (57.17, 56.92, 60.11, 42.28),
    },
    ("SD1.5", "hpdv2"): {
        "Base": (80.19, 85.84, 90.22, 66.44),
        "SFT": (56.63, 66.84, 58.91, 57.87),
        "DPO": (70.50, 74.94, 84.06, 61.09),
        "KTO": (59.81, 67.41, 60.94, 60.03),
    },
    ("SD1.5", "parti"): {
        "Base": (74.63, 73.16, 81.86, 61.89),
        "SFT": (52.27, 62.50, 58.03, 57.54),
        "DPO": (68.01, 63.54, 75.31, 57.54),
        "KTO": (59.01, 62.25, 58.76, 57.60),
    },
}


def reference(base: str, prompt_set: str, published: bool, guidance: float, judges: list[str]) -> dict | None:
    """The paper's numbers for our judges' names, None where base, prompts or guidance are not the paper's."""
    kind = BASES.get(base.rstrip("/").split("/")[-1].lower())
    if not published or (kind, prompt_set) not in SCORES or guidance != GUIDANCE[kind]:
        return None
    column = {name: COLUMNS.index(own) for name in judges if (own := name.partition(":")[0]) in COLUMNS}
    if not column:
        return None
    return {
        "base": kind,
        "scores": {
            name: {model: {"median": row[c][0], "mean": row[c][1]} for model, row in SCORES[kind, prompt_set].items()}
            for name, c in column.items()
        },
        "win_rates": {
            name: {model: row[c] / 100 for model, row in WIN_RATES.get((kind, prompt_set), {}).items()}
            for name, c in column.items()
        },
    }
