"""README.md beside the weights, for people and for the hub: what they are, how they were made, what is known of them.

Everything in it is read from the run's folder. It claims what evaluation.json says of this very model, no more.
"""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import yaml

from inpo_fast.config import flat
from inpo_fast.handover.output_model import KOHYA_NAME
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.methods import METHODS, Method, deviations, family_of
from inpo_fast.models.families import PIPELINES
from inpo_fast.models.files.hub import ID, base_folder, hub_id
from inpo_fast.models.files.lora_place import lora_file
from inpo_fast.report.results import sanity_checks, verdict
from inpo_fast.report.start import ITSELF, WITH_LORA, name_of, started_from
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, write_text
from inpo_fast.runtime.masking import masked_tree

RECIPE = (
    "seed",
    "models",
    "data",
    "inversion",
    "objective",
    "train",
    "optim",
    "online",
)  # what config.yaml says of the result
ELSEWHERE = ("models.base", "models.random", "data.source")  # told in other sections
LICENCES = {  # of bases whose own card is not at hand, as their authors' pages on the hub name them
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "segmind/SSD-1B": "apache-2.0",
    "segmind/Segmind-Vega": "apache-2.0",
}
DATA_SET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
LOAD = """```python
import torch
from diffusers import {kinds}

{unet}pipeline = {kind}.from_pretrained("{source}", {given}dtype=torch.float32)  # torch.float16 on a GPU
{lora}image = pipeline("a prompt").images[0]
```"""
ON_START = (  # of a LoRA that was trained on top of another UNet than the base's
    "This LoRA was trained on top of {start}, not of the base model: it belongs on the UNet of that start, which is "
    "put into the base's pipeline below. On the base itself, or in a checkpoint of the base, it gives another model."
)
READERS = """| file | names | read by |
| --- | --- | --- |
| `pytorch_lora_weights.safetensors` | diffusers | `load_lora_weights` of diffusers, SimpleTuner, ai-toolkit |
| `{kohya}` | kohya | ComfyUI, A1111, Forge, InvokeAI, sd-scripts, OneTrainer |"""


def write_cards(run: Path) -> list[Path]:
    """model/README.md, and lora/README.md if there is a LoRA, of a finished run. UserError where that fails."""
    try:
        config = masked_tree(yaml.safe_load((run / "config.yaml").read_text()))  # an earlier version did not mask it
        manifest, index = (parse_json((run / n).read_text()) for n in ("manifest.json", "model/model_index.json"))
        manifest = masked_tree(manifest)
        evaluation = run / "evaluation.json"
        result = parse_json(evaluation.read_text()) if evaluation.is_file() else None
        cards = [run / name / "README.md" for name in ("model", "lora") if (run / name).is_dir()]
        if result is not None and result["variant"] != manifest["variant"]:
            # `python -m inpo_fast.evaluate` writes there which model it compared
            is_ours = Path(result["variant"]).resolve() == (run / "model").resolve()
            result = result if is_ours else None
        elif result is not None and (start := started_from(manifest["model"])):  # an earlier version did not say it
            result |= {"compared_with": start}
        for path in cards:
            write_text(path, card(config, manifest, result, index["_class_name"], is_lora=path.parent.name == "lora"))
    except OSError as problem:
        raise UserError(f"the model card in {run} cannot be written ({problem})") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{run} does not hold a finished run: no model card ({problem!r})") from problem
    return cards


def card(config: dict, manifest: dict, result: dict | None, kind: str, *, is_lora: bool) -> str:
    """Markdown. result: what evaluation.json says of this model. kind: the name of the pipeline's class."""
    variant, base = manifest["variant"], manifest["model"]["base"]
    random = config["models"].get("random")
    init = config["models"].get("init") or ""
    on_start = init if init and manifest["model"].get("reference") != WITH_LORA and not lora_file(init) else ""
    own_id = hub_id(on_start or base) if is_lora else hub_id(init) or hub_id(base)
    family, method = _method(config)
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if licence := _licence(base, hub_id(base)):
        front |= licence
    if own_id:
        front |= {"base_model": own_id, "base_model_relation": "adapter" if is_lora else "finetune"}
    if data_set := DATA_SET.match(manifest["data"]["source"]):
        front["datasets"] = [data_set[1]]
    architecture = "Stable Diffusion XL" if "XL" in kind else "Stable Diffusion"
    tag = architecture.lower().replace(" ", "-")
    front["tags"] = ["text-to-image", tag, "preference-alignment", family, *(["lora"] if is_lora else [])]
    recipe = [name for name in RECIPE if name != "online" or config.get(name, {}).get("every")]
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {architecture} aligned with preference pairs: {variant}{', LoRA' * is_lora}",
            f"Method: {method}.",
            f"Base model: {_base(base, hub_id(base), random)}{_start(init)}. {_reference(manifest)}"
            f"Licence: {_licence_in_words(front)}.",
            "## How to load",
            *([ON_START.format(start=_linked(on_start))] if is_lora and on_start else []),
            _load(kind, base, on_start, is_lora),
            *([READERS.format(kohya=KOHYA_NAME)] if is_lora else []),
            "## Evaluation",
            _evaluation(result, manifest["model"]),
            "## Data",
            _table(_data(manifest["data"])),
            "## Recipe",
            _table({k: v for k, v in _told({k: config[k] for k in recipe}).items() if k not in ELSEWHERE}),
            "## Provenance",
            _table(_told({key: value for key, value in manifest.items() if key not in ("variant", "data")})),
            "Written by inpo-fast from the files of the run.\n",
        ]
    )


def _load(kind: str, base: str, start: str, is_lora: bool) -> str:
    """Code that opens it. start: the model whose UNet a LoRA goes on top of, empty where that is the base's."""
    if not is_lora:
        return LOAD.format(kind=kind, kinds=kind, unet="", given="", source="PATH_OF_THIS_FOLDER", lora="")
    source, unet, family = hub_id(base) or "PATH_OF_THE_BASE_MODEL", "", PIPELINES[kind]
    part, network = family.part, family.network_class
    if start:
        place, path = hub_id(start) or "PATH_OF_THE_START", Path(start).expanduser()
        alone = (path / "config.json").is_file() and not (path / "model_index.json").is_file()
        how = f'from_pretrained("{place}", ' + ("" if alone else f'subfolder="{part}", ')
        if path.suffix == ".safetensors":
            how = f'from_single_file("{place}", config="{source}", subfolder="{part}", '
        unet = f"{part} = {network}.{how}dtype=torch.float32)\n"
    return LOAD.format(
        kind=kind,
        kinds=f"{kind}, {network}" if start else kind,
        unet=unet,
        given=f"{part}={part}, " if start else "",
        source=source,
        lora='pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")\n',
    )


def _base(base: str, own_id: str | None, random: str | None) -> str:
    if random:
        return f"**random weights** in the shape of {random}: this model draws nothing, it is for timings and tests"
    return f"[{own_id}](https://huggingface.co/{own_id})" if own_id else f"a local model, {Path(base).name}"


def _start(init: str) -> str:
    if not init:
        return ""
    return f", trained further from {'the LoRA ' if lora_file(init) else ''}{_linked(init)}"


def _linked(place: str) -> str:
    own_id = hub_id(place)
    return f"[{own_id}](https://huggingface.co/{own_id})" if own_id else name_of(place)


def _reference(manifest: dict) -> str:
    """What the policy was held against, where that is not the base itself."""
    words = {
        ITSELF: "The frozen reference of the loss is that start, not the base. ",
        WITH_LORA: "The frozen reference of the loss is the base with that LoRA. ",
    }
    return words.get(manifest["model"].get("reference"), "")


def _method(config: dict) -> tuple[str, str]:
    """The family of what was trained and the sentence on it, from the settings: a name's parts have hyphens."""
    objective, inversion = (
        SimpleNamespace(**(asdict(kind()) | config[group]))
        for kind, group in ((ObjectiveConfig, "objective"), (InversionConfig, "inversion"))
    )
    family = family_of(config["method"], inversion)
    differs = deviations(config["method"], objective, inversion)
    if config.get("online", {}).get("every"):
        differs["online"] = "the model draws some of its own pairs while it trains"
    told = _with_paper(METHODS[family])
    if differs:
        what = "; ".join(f"{words} ({part})" for part, words in differs.items())
        told += f", a variant that deviates from the publication: {what}"
    return family, told


def _with_paper(method: Method) -> str:
    paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    return f"{method.title}{paper}"


def _licence(base: str, own_id: str | None) -> dict:
    """What the base's own card says of its licence, if it lies in its folder; else the known one of its hub id."""
    folder = base_folder(base)
    try:
        text = (folder / "README.md").read_text(encoding="utf-8") if folder else ""
        parts = text.split("---", 2)
        own = yaml.safe_load(parts[1]) if text.startswith("---") and len(parts) == 3 else {}
        found = {key: str(own[key]) for key in ("license", "license_name", "license_link") if own.get(key)}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        found = {}
    return found if "license" in found else {"license": LICENCES[own_id]} if own_id in LICENCES else {}


def _licence_in_words(front: dict) -> str:
    name = front.get("license_name") or front.get("license")
    return f"{name}, the base model's" if name else "that of the base model, which its folder does not name"


def _evaluation(result: dict | None, model: dict) -> str:
    """The verdict in its own words, then every sanity check; a failing one stands first and in bold.

    model: the manifest's.
    """
    if result is None:
        opponent = started_from(model) or "its base"
        return (
            f"Its run's folder holds no evaluation of this model: it is not known whether it is better than {opponent}."
        )
    lines = [verdict(result), ""]
    for check in sorted(sanity_checks(result), key=lambda check: (check.ok is not False, check.ok is not None)):
        state = {True: "holds", False: "**FAILS**", None: "**cannot decide**"}[check.ok]
        lines.append(f"- {check.name}: {state}{f', {check.value}' if check.value else ''}. {check.meaning}")
    return "\n".join(lines)


def _data(data: dict) -> dict:
    """The manifest's account; a long list of dropped pairs as its length and its beginning."""
    dropped = data.get("dropped", [])
    more = f": {', '.join(map(str, dropped[:5]))}{', …' * (len(dropped) > 5)}" if dropped else ""
    return _told({**data, "dropped": f"{len(dropped)}{more}"})


def _told(tree: dict) -> dict:
    """Dotted keys. Of a path of this machine only its name."""
    return {key: Path(value).name if _is_path(value) else value for key, value in flat(tree).items()}


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "/" in value and (Path(value).exists() or not ID.fullmatch(value))


def _table(rows: dict) -> str:
    cells = [(name, str(value).replace("|", r"\|").replace("\n", " ")) for name, value in rows.items()]
    return "\n".join(["| key | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])
