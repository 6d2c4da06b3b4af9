"""Where a LoRA lies, and whether a file is one, by the names in its header: nothing of a model is needed for it."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from inpo_fast.runtime.errors import UserError

DIFFUSERS_WEIGHTS, PEFT_WEIGHTS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
RELATIVES = {  # what a tensor's name says of adapters that are not W + B A
    r"dora_scale|lora_magnitude_vector": "a DoRA (weights with a magnitude of their own)",
    r"\.hada_[wt]\d": "a LoHa (Hadamard products)",
    r"\.lokr_[wt]\d": "a LoKr (Kronecker products)",
    r"\.oft_|\.boft_|oft_blocks|\.oft_R": "an OFT (rotated weights)",
    r"\.on_input$|lora_ia3|ia3_l": "an IA3 (scaled activations)",
    r"^lora_unet_.+\.[ab][12]\.weight$": "a GLoRA",
    r"vera_lambda": "a VeRA",
    r"lora_mid\.weight$": "a LoCon with a core between its two matrices (Tucker)",
    r"\.diff(_b)?$|\.w_norm$|\.b_norm$|\.set_weight$": "an adapter with whole weights beside its LoRA",
    r"lora_controlnet": "a Control-LoRA",
}
ADAPTER = re.compile("|".join([r"[._]lora[._]", r"_lora\.(down|up)\.", *RELATIVES]))


def lora_file(path: str | Path, key: str = "--lora") -> Path | None:
    """The file of the LoRA that lies at `path`, a file or a folder; None where there is none.

    In a folder: diffusers' name, peft's, or the only one where there is nothing else; never beside a model. UserError,
    which begins with the setting `key`, where there are several of other names.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file() or (path / "model_index.json").is_file():
            return None
        names = [path / DIFFUSERS_WEIGHTS, path / PEFT_WEIGHTS]
        found = next((name for name in names if name.is_file()), None)
        if found is not None:
            return found
        files = sorted(path.glob("*.safetensors"))
        if not files or not all(is_lora(file) for file in files):
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3]) + ", …" * (len(files) > 3)
            raise UserError(f"{key}: {path} holds {len(files)} LoRAs ({names}); name the file of one")
        return files[0]
    return path if is_lora(path) else None


def is_lora(file: Path) -> bool:
    """Whether a .safetensors file holds a LoRA or a relative of it, by the names in its header."""
    if file.suffix.lower() != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "np") as opened:
            return any(ADAPTER.search(name) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
