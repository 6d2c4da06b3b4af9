"""What a run started from, and so what its model is compared with, in words: models.init where it is set, else base."""

from pathlib import Path

from inpo_fast.models.files.hub import hub_id
from inpo_fast.runtime.masking import masked

ITSELF, WITH_LORA = "models.init", "models.base with the LoRA of models.init"  # as manifest.json names the reference


def started_from(model: dict) -> str | None:
    """None: the base. model: manifest.json's `model`; of earlier versions, which do not say what init was: the base."""
    kinds = {ITSELF: "the model it started from", WITH_LORA: "the base with the LoRA it started from"}
    kind, init = kinds.get(model.get("reference") or ""), model.get("init")
    return f"{kind}, {name_of(init)}" if kind and init else None


def trained_on(model: dict) -> str:
    """The place of the model that a LoRA of the run goes on top of, and that a whole model was trained from."""
    return model["init"] if model.get("reference") == ITSELF and model.get("init") else model["base"]


def public_name(model: dict) -> str | None:
    """Of `trained_on`, for a file's metadata: a hub id; of a start on this machine its name, of a base none."""
    place = trained_on(model)
    return name_of(place) if place != model["base"] else hub_id(place)


def name_of(place: str) -> str:
    """A hub id; of a path its end: sft/lora rather than lora, which every run has. Nothing else of this machine."""
    path = Path(place).expanduser()
    name = "/".join(path.absolute().parts[-2:]) if path.name in ("model", "lora", "unet") else path.name
    return masked(hub_id(place) or name)
