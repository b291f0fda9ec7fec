"""What a recipe's plain ViT has to be for given weights: the recipe follows the file.

Sizes come from the shapes, what no shape tells from config.json, or from the format.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from vitdet.convert import FORMATS
from vitdet.convert.describe import about_of, describe, is_plain
from vitdet.plain_recipes import recipe_of_file
from vitdet.utils.checks import InputError
from vitdet.utils.files import replacing
from vitdet.weights import Weights

NET = "model.backbone.net"
RECORD = "start.json"  # in the folder of a run that began with such a file
_TRAINING = ("_target_", "drop_path_rate", "checkpoint_blocks", "frozen", "freeze_patch_embed")
# what a file may ask of a recipe: numbers and words, nothing that is called
_HARMLESS = re.compile(r"model(\.[a-z]\w*)+=[\w.+, \"\[\]-]*$")

# Heads whose channels are not 64, by width: ViT-H, EVA-g, SigLIP-so400m, ViT-G
_HEADS = {1280: 16, 1408: 16, 1152: 16, 1664: 16}
_SHAPES = (  # what shapes tell
    *("embed_dim", "depth", "mlp_ratio", "ffn_layer", "qkv_bias", "layer_scale", "pre_norm"),
    *("use_abs_pos", "pretrain_use_cls_token", "residual_block_indexes"),
)
_TOLD = {  # what is read of config.json, where it is there
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), int),
    **{"layer_norm_eps": float, "hidden_act": str},
}
_ACTIVATIONS = {
    **{"gelu": "gelu", "quick_gelu": "quick_gelu", "silu": "gelu"},  # silu is that of a SwiGLU
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


def net_settings(
    content: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    weights: str | None = None,
    source_format: str | None = None,
    patch_size: int = 16,
    alone: bool = True,
    source: str = "source",
) -> dict[str, Any]:
    """Return {argument of `vitdet.backbones.vit.ViT`: value}, as far as a file tells them.

    Args:
        content: of a file of a foundation model, as `vitdet.checkpoint.read` returned it.
        config: config.json of its folder, {} where there is none.
        weights: the key of the file that holds the state dict, None to find it.
        source_format: a name in `FORMATS`, None to recognise it.
        patch_size: of the model; positions keep the file's grid.
        alone: only where no pyramid and heads are beside it.
        source: the file, for messages.

    Returns:
        {} for detectors (`alone`), files of ours, unknown formats, backbones that are no plain ViT.

    Raises:
        InputError: config.json and the weights are of two models; an activation that ours lack; a
            model of timm without pos_embed, whose positions no file tells.
    """
    found = describe(content, weights=weights, source_format=source_format, source=source)
    if not is_plain(found, alone=alone):
        return {}
    sizes, fmt = found["backbone"], found["format"]
    config = _checked(config, sizes, source)
    settings = {name: sizes[name] for name in _SHAPES if name in sizes}
    settings["num_heads"] = _heads(sizes, config, fmt)
    if grid := sizes.get("pos_embed_grid"):
        sides = [side * patch_size for side in grid]
        settings["pretrain_img_size"] = sides[0] if grid[0] == grid[1] else sides
    if sizes["use_rel_pos"]:
        settings["use_rel_pos"] = True
    elif fmt == "timm" and not sizes["use_abs_pos"]:
        text = "expected positions, got no pos_embed. Which others timm computes for this model no"
        raise InputError(f"{source}: {text} file tells: take a model that has pos_embed.")
    openai = fmt == "clip" and ("input_resolution" in content or len(found["dtypes"]) > 1)
    settings |= _untold(fmt, config, settings, source, openai=openai)
    if settings["rope"] == "pe":
        side = grid[0] if grid else 16
        settings |= {"rope_pretrain_grid": side, "pos_embed_resize": "tile"}
        settings |= {"patch_bias": sizes["patch_bias"], "use_rel_pos": False}
        settings |= {"window_size": side} if fmt == "sam3" else {}
    if sizes["kind"] == "eva02":  # its rotary grid is that of 224 pixels, after 448 pixels too
        settings |= {"split_qkv": True, "rope": "eva02", "rope_pretrain_grid": 16}
        settings |= {"inner_attn_norm": sizes["inner_attn_norm"], "use_rel_pos": False}
    return settings


def _checked(config: Mapping[str, Any], sizes: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Return what config.json, or timm of its model, tells of the image tower of these weights."""
    config = vision if isinstance(vision := config.get("vision_config"), Mapping) else config
    config = {**_told_by_timm(config), **config}
    for key, kind in _TOLD.items():
        if key in config and not (type(value := config[key]) is kind and value):
            text = f"{key}: expected {kind.__name__}, got {value!r}. Fetch it anew."
            raise InputError(f"{source}: config.json: {text}")
    for ours, theirs in (("embed_dim", "hidden_size"), ("depth", "num_hidden_layers")):
        if config.get(theirs, sizes[ours]) != sizes[ours]:
            raise InputError(
                f"{source}: config.json says {theirs} {config[theirs]}, the weights have "
                f"{sizes[ours]}: they are not of one model. Fetch both anew."
            )
    return config


def _told_by_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's own model of an "architecture" has and no shape tells, as config.json."""
    if not isinstance(architecture := config.get("architecture"), str):
        return {}
    import timm  # takes seconds

    if not timm.is_model(architecture):
        return {}
    with torch.device("meta"):
        blocks = getattr(timm.create_model(architecture, num_classes=0), "blocks", None)
    if not blocks or not hasattr(getattr(blocks[0], "attn", None), "num_heads"):
        return {}
    act = getattr(blocks[0].mlp, "act", None)
    told = {"QuickGELU": "quick_gelu", "SiLU": "silu", "GELUTanh": "gelu_pytorch_tanh"}
    name = told.get(type(act).__name__, "gelu")
    name = "gelu_pytorch_tanh" if getattr(act, "approximate", "none") == "tanh" else name
    changed = args if isinstance(args := config.get("model_args"), Mapping) else {}
    heads = changed.get("num_heads", blocks[0].attn.num_heads)
    return {"num_attention_heads": heads, "layer_norm_eps": blocks[0].norm1.eps, "hidden_act": name}


def _heads(sizes: Mapping[str, Any], config: Mapping[str, Any], fmt: str) -> int:
    width = sizes["embed_dim"]
    usual = width // 64 or 1
    if not fmt.startswith(("dino", "hf_dino")):
        pe = {1536: 16} if ("rope", "pe") in FORMATS[fmt].settings else {}
        usual = (_HEADS | pe).get(width, usual)
    return int(config.get("num_attention_heads", sizes.get("num_heads")) or usual)


def _untold(
    fmt: str, config: Mapping[str, Any], settings: Mapping[str, Any], source: str, *, openai: bool
) -> dict[str, Any]:
    """Return the epsilon, the activation and the rotary positions, which no shape tells.

    `openai` says whose CLIP it is: its archives alone have kernels of float16 and norms of float32.
    """
    known = {key: value for key, value in FORMATS[fmt].settings if "." not in key}
    eps, act = known.get("norm_eps", 1e-6), "gelu"
    if fmt == "hf_vit" and not settings["layer_scale"]:
        eps = 1e-12
    elif fmt == "hf_clip" and not settings["pre_norm"]:
        act = "gelu" if settings["pretrain_use_cls_token"] else "gelu_tanh"  # BLIP; SigLIP
    elif fmt in ("clip", "hf_clip") or settings["pre_norm"]:
        eps = 1e-5
        act = "quick_gelu" if fmt == "hf_clip" or openai else "gelu"
    if "hidden_act" in config:
        if config["hidden_act"] not in _ACTIVATIONS:
            text = f"expected one of {', '.join(_ACTIVATIONS)}, got {config['hidden_act']}"
            raise InputError(
                f"{source}: config.json: hidden_act: {text}. Our models have no other."
            )
        act = _ACTIVATIONS[config["hidden_act"]]
    eps = config.get("layer_norm_eps", eps)
    return {"norm_eps": float(eps), "act_layer": act, "rope": known.get("rope", "none")}


def pixels(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], source: str = "source"
) -> dict[str, list[float]]:
    """Return "pixel_mean" and "pixel_std" of the pretraining, {} where no json tells them.

    Args:
        config: config.json of timm, which has them under "pretrained_cfg".
        preprocessor: preprocessor_config.json of transformers.
        source: the folder, for messages.

    Raises:
        InputError: there is something else than three numbers.
    """
    timm = config.get("pretrained_cfg")
    timm = timm if isinstance(timm, Mapping) else {}
    found = {}
    for name, ours, theirs in (
        ("mean", "pixel_mean", "image_mean"),
        ("std", "pixel_std", "image_std"),
    ):
        if (values := timm.get(name, preprocessor.get(theirs))) is None:
            return {}
        numbers = isinstance(values, list) and all(type(each) in (int, float) for each in values)
        if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
            text = f"{theirs}: expected three numbers, got {values!r:.100}. Fetch it anew."
            raise InputError(f"{source}: preprocessor_config.json: {text}")
        found[ours] = [round(255 * float(value), 3) for value in values]
    return found


# --- a recipe -------------------------------------------------------------------------------------


def changes(
    cfg: DictConfig,
    found: Weights,
    typed: Sequence[str] = (),
    *,
    weights: str | None = None,
    source_format: str | None = None,
    source: str = "source",
    alone: bool = True,
) -> list[str] | None:
    """Return key=value for each setting of a recipe's plain ViT that a file has otherwise.

    Args:
        cfg: a recipe with the changes that a person typed.
        found: a file, or a folder of the hub.
        typed: those changes, which win: none of their keys is returned.
        weights: as of `net_settings`, like the next two.
        alone: as there; if not, windows divide the training map where the file has no tables.

    Returns:
        None where nothing follows: the recipe has no plain ViT at `NET`, or `net_settings` is {}.

    Raises:
        InputError: see there.
    """
    from vitdet.config import arguments, backbone_settings  # detectron2 takes seconds to import

    node = OmegaConf.select(cfg, NET)
    if not isinstance(node, DictConfig) or "parallel_branch" not in arguments(node):
        return None
    now = backbone_settings(node)
    how: dict[str, Any] = {"weights": weights, "source_format": source_format, "source": source}
    told = {"patch_size": now["patch_size"], "alone": alone}
    net = net_settings(found.content, found.config, **told, **how)
    if not net or now["parallel_branch"]:
        return None
    keys = {word.partition("=")[0] for word in typed}
    new = dict(net)
    hidden = [int(net["embed_dim"] * each.get("mlp_ratio", 4.0)) for each in (now, net)]
    if hidden[0] == hidden[1]:
        new.pop("mlp_ratio", None)
    theirs = describe(found.content, **how)["backbone"]
    if theirs.get("pretrain_img_size") == now["pretrain_img_size"]:
        new.pop("pretrain_img_size", None)  # kernel and grid resampled, as in EVA's p14to16 files
    if "class_token" in theirs:
        new.pop("pretrain_use_cls_token", None)  # its row, or zeros for it, nobody reads
    if "depth" in new and f"{NET}.depth" not in keys:
        new = _of_depth(now, net["depth"]) | new
    if not alone and "window_size" not in theirs:
        new["window_size"] = _dividing(new.get("window_size", now["window_size"]), now)
    elif "window_size" in theirs:
        new |= {key: theirs[key] for key in ("window_size", "global_block_indexes")}
    new = {key: value for key, value in new.items() if now[key] != value}
    told = {f"{NET}.{key}": value for key, value in new.items()}
    if "pixel_mean" in cfg.model:
        told |= {
            f"model.{key}": v for key, v in pixels(found.config, found.preprocessor, source).items()
        }
    return [setting(key, value) for key, value in told.items() if key not in keys]


def model_of_run(content: Mapping[str, Any], *, source: str) -> DictConfig | None:
    """Return the `model` of the recipe that lies in a checkpoint of ours, None for other files."""
    text = about_of(content).get("config")
    if not isinstance(text, str):
        return None
    return OmegaConf.create(recipe_of_file(text, f"recipe in {source}")).model


def nearest_recipe(model: DictConfig, recipes: Mapping[str, DictConfig]) -> str:
    """Return the key of the recipe whose `model` is most like one."""

    def items(node: Any, path: str = "") -> set[str]:
        if not isinstance(node, DictConfig):
            return {f"{path}={node}"}
        return set().union(*(items(node[key], f"{path}.{key}") for key in node))

    theirs = items(model)
    return min(recipes, key=lambda name: len(items(recipes[name].model) ^ theirs))


def different(cfg: DictConfig, model: DictConfig, typed: Sequence[str] = ()) -> list[str]:
    """Return key=value for each setting that the backbone of a run has otherwise than a recipe's.

    How it was trained is the recipe's own affair.
    """
    from vitdet.config import backbone_settings

    keys = {word.partition("=")[0] for word in typed}
    nets = OmegaConf.select(cfg, NET), OmegaConf.select(model, NET.removeprefix("model."))
    settings = map(backbone_settings, nets)
    pixels = [{k: node.get(k) for k in ("pixel_mean", "pixel_std")} for node in (cfg.model, model)]
    return [
        setting(f"{key}{name}", theirs[name])
        for key, ours, theirs in ((f"{NET}.", *settings), ("model.", *pixels))
        for name in theirs
        if name in ours and name not in _TRAINING and ours[name] != theirs[name]
        if f"{key}{name}" not in keys
    ]


def _of_depth(now: Mapping[str, Any], depth: int) -> dict[str, list[int]]:
    """Return the lists of blocks at the same shares of another depth: ends of quarters stay so."""
    names = ("global_block_indexes", "residual_block_indexes", "checkpoint_blocks")
    return {
        name: sorted({max((i + 1) * depth // now["depth"] - 1, 0) for i in now[name]})
        for name in names
        if now[name]
    }


def tuned(cfg: DictConfig, how: str, typed: Sequence[str] = ()) -> list[str]:
    """Return key=value for each setting of a recipe by which `--tune` trains it.

    Adapters learn at ten times the rate that the recipe has for the backbone's whole weights
    ("LoRA Without Regret", Schulman et al. 2025), in every layer the same and without decay; what
    is frozen drops no branches. What a person typed wins: a learning rate of theirs stays as it is.
    """
    from vitdet.config import arguments, backbone_settings

    keys = {word.partition("=")[0] for word in typed}
    told: dict[str, Any] = {"train.tune": how}
    if how == "lora":
        rules = arguments(cfg.optimizer) | dict(cfg.optimizer)
        fit = {"layer_decay_rate": None, "no_decay": [*rules.get("no_decay", ()), "lora_"]}
        if "optimizer.lr" not in keys:
            fit["backbone_lr_multiplier"] = 10.0 * rules.get("backbone_lr_multiplier", 1.0)
        told |= {f"optimizer.{key}": value for key, value in fit.items() if key in rules}
        if "drop_path_rate" in backbone_settings(OmegaConf.select(cfg, NET)):
            told[f"{NET}.drop_path_rate"] = 0.0
    return [setting(key, value) for key, value in told.items() if key not in keys]


def _dividing(window: int, now: Mapping[str, Any]) -> int:
    """Return the side nearest to a window's, the larger of two, that divides the training map."""
    side = now["img_size"] // now["patch_size"] if isinstance(now["img_size"], int) else 0
    fitting = [n for n in range(2, side) if side % n == 0 and window <= 2 * n <= 4 * window]
    return min(fitting, key=lambda n: (abs(n - window), -n), default=window)


def setting(key: str, value: Any) -> str:
    """Return key=value; what YAML could read as something else than text stands in quotes."""
    value = list(value) if isinstance(value, ListConfig) else value
    text = (
        value if value is not None and re.fullmatch(r"[\w./-]+", str(value)) else json.dumps(value)
    )
    return f"{key}={text}"


def remembered(content: Mapping[str, Any], *, source: str) -> list[str]:
    """Return the changes of the recipe that converter.py wrote a file for, [] for other files.

    Raises:
        InputError: they are no changes of a model by numbers and words.
    """
    words = about_of(content).get("recipe_overrides", [])
    if not isinstance(words, list) or not all(map(_HARMLESS.match, map(str, words))):
        text = "recipe_overrides: expected model.key=value of numbers and words, got"
        raise InputError(f"{source}: {text} {words!r}. Convert it again.")
    return [str(word) for word in words]


def of_model(overrides: Sequence[str]) -> list[str]:
    """Return those of a recipe's changes that `remembered` gives again."""
    return [word for word in overrides if _HARMLESS.match(word)]


def keep(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what a run began with beside its checkpoints, for --resume."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RECORD) as partial:
        partial.write_text(json.dumps(record) + "\n")


def begun(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Return what `keep` wrote where a run is resumed, its "overrides" a list of text, or None.

    A run that ended before its first checkpoint has none: it begins again, with its own weights
    where --weights names no others.

    Raises:
        InputError: the record is damaged.
    """
    from vitdet.engine.checkpoints import LAST  # the engine takes seconds to import

    path, goes_on = folder / RECORD, (folder / LAST).exists()
    if not args.resume or not path.is_file() or (args.weights and not goes_on):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record |= {"overrides": [str(each) for each in record["overrides"]]}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: it cannot be read ({error!r}). Start the run anew.") from error
    if goes_on:
        return record
    args.weights = Path(record["weights"]) if "weights" in record else None
    return None
