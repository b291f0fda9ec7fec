"""Recipes: read a LazyConfig file, change values by name, save what was used, build the model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pydoc import ErrorDuringImport
from typing import Any

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.overrides import TorchFunctionMode

from vitdet.plain_recipes import plain_recipe
from vitdet.utils.checks import InputError, nearest
from vitdet.utils.files import write_text

KEYS = ("model", "dataloader", "optimizer", "schedule", "train")  # of a recipe to train
_HERE = Path(__file__).resolve().parent
# the recipes: in a wheel they are inside the package, in a checkout beside it
CONFIGS = (_HERE if (_HERE / "configs").is_dir() else _HERE.parent) / "configs"


@dataclass
class Train:
    """`train` of a recipe: every key, its type, and what holds where a recipe leaves it out."""

    output_dir: str = "./output"
    init_checkpoint: str | None = ""  # weights written by converter.py; none: random
    seed: int = 0
    device: str = "auto"
    precision: str = "fp16"
    eval_precision: str = "fp32"  # as detectron2 and EVA evaluate, so as published AP
    num_images: int = MISSING  # the length: images seen by all processes together
    epochs: float | None = None  # sets num_images to so many rounds of the data
    reference_batch: int | None = None  # the batch that optimizer.lr is for; the run says so
    checkpoint_every: Any = 5000 * 64  # images, "10%" of the training, "500 iterations"
    eval_every: Any = 5000 * 64  # the same
    log_every: int | None = None  # iterations; left out: 20, or fewer for twenty lines a run
    keep_checkpoints: int = 5
    best_metric: str | None = "auto"  # what model_best.pth is best in, as "bbox/AP"; auto: first AP
    patience: int | None = None  # evaluations in a row without a new best, then the training ends
    clip_grad_norm: float | None = None
    ema_decay: float | None = None  # of a moving average of the weights, evaluated too
    eval_weights: str = "model"  # what --eval-only takes of a file: "model" or "ema"
    compile: bool = False  # torch.compile of the backbone's blocks
    accumulate: int = 1  # parts in which a process takes its images of a step, to save memory
    freeze_blocks: int = 0  # so many blocks, and the embeddings before them, do not learn
    tune: str = "all"  # what of the backbone learns: "all", adapters ("lora"), nothing ("head")
    lora_rank: int = 8  # of the adapters
    lora_alpha: float = 16.0  # they are added with the factor alpha / rank
    on_bad_step: str = "stop"  # a loss or gradient that is not finite: "stop" or "skip"
    max_bad_steps: int = 10  # then the run stops all the same
    allow_changed_data: bool = False  # let --resume go on with other data than the run's
    parallel: str = "ddp"  # or "fsdp": weights and optimizer sharded over the processes
    step_timeout: float | None = 1800.0  # seconds a step may take before the run ends; None: never
    # Of DistributedDataParallel. fp16_compression: gradients travel between GPUs as fp16 with
    # precision="fp16", which has a loss scale, as bf16 with "bf16", and as they are with "fp32".
    ddp: dict[str, Any] | None = field(default_factory=lambda: {"fp16_compression": True})


# Of recipes that earlier versions saved; they changed no weights, and are passed over.
_FORMER_KEYS = ("looks_every", "sharded_checkpoints", "hash_images", "tags", "first_step_timeout")
_FORMER_KEYS += ("async_checkpoints",)
_FORMER_SWITCHES = ("loggers", "early_stopping")  # the same where they are off
# Images that a person types are images of the training, of whatever length: kept as "N images".
_PERIODS = ("train.checkpoint_every", "train.eval_every", "schedule.warmup", "schedule.milestones")


def complete(train: DictConfig) -> DictConfig:
    """Return `train` of a recipe with the types of `Train` and with what it leaves out.

    Raises:
        InputError: an unknown key or a value of another type.
    """
    made: Any = OmegaConf.structured(Train)
    known = [each.name for each in fields(Train)]
    if train.get("ddp") is not None:
        made.ddp = {}  # what is given takes its place and does not join it
    for key in map(str, train):
        if key in _FORMER_KEYS or (key in _FORMER_SWITCHES and not train[key]):
            continue
        if key not in known:
            raise InputError(f"train.{key}: there is no such key. {_hint(key, known)}")
        try:
            if OmegaConf.is_missing(train, key):  # merging would take the default
                made[key] = MISSING
            else:
                made = OmegaConf.merge(made, OmegaConf.masked_copy(train, key))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"train.{key}: {reason}. vitdet/config.py has its type.") from error
    return made


def _hint(name: str, names: Iterable[Any], prefix: str = "") -> str:
    known = [str(each) for each in names]
    close = nearest(name, known)
    return f"Did you mean {prefix}{close}?" if close else f"It has {', '.join(known) or 'no keys'}."


# --- reading -------------------------------------------------------------------------------------


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False
) -> DictConfig:
    """Read a recipe and change values in it.

    Args:
        path: a LazyConfig `.py` file, which is run; or a `.yaml` file that `save_config` wrote,
            which is plain data (`vitdet.plain_recipes`). configs/... where there is no such file
            is that of this package.
        overrides: "dotted.key=value" each; the value is YAML ("1e-4", "[1, 2]", "null", "true").
            A key must exist, or be an argument of the callable that its node describes.
        trust: build what a .yaml names outside this project, too: it may run code of its author.

    Returns:
        The recipe, with its interpolations unresolved; its `train` is a `Train`.

    Raises:
        InputError: no such file, it does not load, an unknown key, a value of another type.
    """
    cfg = change(_read(_ours(Path(path).expanduser()), trust), overrides)
    if isinstance(cfg.get("train"), DictConfig):
        cfg.train = complete(cfg.train)
    return cfg


def _ours(path: Path) -> Path:
    tables = (each.with_name(f"{each.name}.py") for each in path.parents if each.name)
    if path.parts[:1] != ("configs",) or any(each.is_file() for each in (path, *tables)):
        return path
    return CONFIGS.parent / path


def _read(path: Path, trust: bool) -> DictConfig:
    if not path.is_file():
        return _row(path)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: it is no text ({error}). Correct the file.") from error
        return OmegaConf.create(plain_recipe(text, str(path), trust=trust))
    if path.suffix != ".py":
        raise InputError(f"{path}: expected a .py or .yaml file. Recipes lie under configs/.")
    loaded = _run(path)
    if "ROWS" in loaded:
        row = path.with_suffix("") / f"{next(iter(loaded.ROWS))}.py"
        raise InputError(f"--config-file: {path} is a table of recipes. Name a row, as {row}.")
    return loaded


def _row(path: Path) -> DictConfig:
    """Return a row of a table: configs/paper/t4_in1k_b.py is "t4_in1k_b" of configs/paper.py."""
    here = [str(each) for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
    for folder in path.parents if path.suffix == ".py" else ():
        table = folder.with_name(f"{folder.name}.py") if folder.name else folder
        name = path.relative_to(folder).with_suffix("")
        if table.is_file():
            recipes = _run(table, "recipes")
            if name.as_posix() in recipes.rows:
                row = recipes(name.as_posix())
                return OmegaConf.create(row, flags={"allow_objects": True})  # type: ignore[return-value]
            here += [str(folder / f"{each}.py") for each in recipes.rows]
            break
    close = nearest(str(path), here)
    hint = f"Did you mean {close}?" if close else "Recipes lie under configs/."
    raise InputError(f"--config-file: expected a recipe, got {path}. {hint}")


def _run(path: Path, key: str | None = None) -> Any:
    try:
        if key is not None:  # a table, whose recipes may alter its parts
            return LazyConfig.load(str(path), key)
        status = path.stat()
        return copy.deepcopy(_ran(str(path.absolute()), status.st_mtime_ns, status.st_size))
    except (SyntaxError, ImportError, AssertionError, NameError) as error:
        what = f"expected a recipe that loads, got {type(error).__name__}: {error}"
        raise InputError(f"{path}: {what}. Correct the file.") from error


@functools.cache
def _ran(path: str, *_: int) -> Any:
    """Run a file once, however often a command reads it: it may register data sets."""
    return LazyConfig.load(path)


# --- changing ------------------------------------------------------------------------------------


def change(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a recipe with values changed as in `load_config`."""
    for override in overrides:
        _override(cfg, override)
    typed = [override.partition("=")[0] for override in overrides]
    for key in _PERIODS:
        if key in typed and not (key.startswith("schedule.") and "schedule.num_images" in typed):
            part, _, last = key.partition(".")
            cfg[part][last] = _in_images(cfg[part][last])
    if "train.num_images" in typed and cfg.train.get("epochs") is not None:
        if "train.epochs" in typed:
            text = "expected train.num_images or train.epochs, got both. Leave one of them out."
            raise InputError(f"length of the training: {text}")
        cfg.train.epochs = None
    return cfg


def _in_images(value: Any) -> Any:
    if isinstance(value, ListConfig):
        return [_in_images(each) for each in value]
    return f"{value} images" if type(value) in (int, float) and value else value


def _override(cfg: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"argument {override!r}: expected key=value, got {override}.")
    *parents, last = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[:depth]), key)
    # an argument of the node's callable, or a key of `train`, may be left out of the recipe
    unset = arguments(node) if isinstance(node, DictConfig) else {}
    if parents == ["train"]:
        unset = {each.name: getattr(Train, each.name, None) for each in fields(Train)}
    new = isinstance(node, DictConfig) and last not in list(node) and last in unset
    old = unset[last] if new else _child(node, last, ".".join(parents), key, unset)
    OmegaConf.set_struct(node, False)
    index: Any = int(last) if isinstance(node, ListConfig) else last
    node[index] = _typed(key, old, text)


def _child(node: Any, part: str, where: str, key: str, unset: Iterable[str] = ()) -> Any:
    """Return the value of `part` in `node`, or raise naming the nearest key."""
    names: list[str] = []
    if isinstance(node, ListConfig):
        names = [str(place) for place in range(len(node))]
        if part in names:
            return node[int(part)]
    elif isinstance(node, DictConfig):
        if part in list(node):  # a value left open, "???", is not `in` the node itself
            return None if OmegaConf.is_missing(node, part) else node[part]
        known = {**dict.fromkeys(node), **arguments(node), **dict.fromkeys(unset)}
        names = [str(name) for name in known if name != "_target_"]
    hint = _hint(part, names, f"{where}." if where else "")
    expected = f"expected a key of {where or 'the recipe'}, got {part!r}"
    raise InputError(f"override {key!r}: {expected}. {hint}")


def _typed(key: str, old: Any, text: str) -> Any:
    """Read `text` as YAML and check it against the type of the value that it replaces."""
    value = _value(text)
    if isinstance(value, str) and key in _PERIODS:
        return value  # a share of the training, or iterations (engine/recipe.py)
    if isinstance(old, str) and value is not None and not old.startswith("${"):
        return value if isinstance(value, str) else text
    if type(old) is int and type(value) is float and value.is_integer():
        return int(value)
    kinds = {bool: (bool,), int: (int,), float: (int, float), ListConfig: (list,)}
    if value is not None and type(value) not in kinds.get(type(old), (type(value),)):
        kind = type(old).__name__.removesuffix("Config").lower()
        expected = f"expected {kind}, as the recipe's {old!r}"
        raise InputError(f"override {key!r}: {expected}, got {text!r}.")
    return value


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-4 as a string
    return value


# --- saving --------------------------------------------------------------------------------------


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the recipe, interpolations resolved, as YAML that `load_config` reads again."""
    write_text(Path(path), config_text(cfg))


def config_text(cfg: DictConfig) -> str:
    """Return the recipe, interpolations resolved, as YAML, or raise an InputError."""
    try:
        plain = _plain(cfg, "")
    except OmegaConfBaseException as error:
        raise InputError(f"recipe: {str(error).splitlines()[0]}. Correct it.") from error
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=100)


def _plain(node: Any, key: str) -> Any:
    """Turn a node into dicts, lists and scalars; callables become dotted names."""
    if isinstance(node, DictConfig):
        return {str(k): _plain(node[k], f"{key}.{k}" if key else str(k)) for k in node}
    if isinstance(node, ListConfig | list | tuple):
        return [_plain(item, f"{key}.{i}") for i, item in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if key.endswith("_target_") and callable(node):
        return _convert_target_to_string(node)
    expected = "expected numbers, text, lists, or a LazyCall, which can be saved"
    raise InputError(f"config value {key}: {expected}, got {node!r}.")


# --- building ------------------------------------------------------------------------------------


def arguments(node: DictConfig) -> dict[str, Any]:
    """Return {argument: default} of the callable that a LazyCall node describes."""
    target = node.get("_target_")
    return {} if target is None else _arguments(_located(target))


def _arguments(target: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.signature(target).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None if p.default is p.empty else p.default for p in found if p.kind in by_name}


def _located(target: Any) -> Any:
    """Return what a dotted name stands for; it may be imported for that."""
    try:
        return locate(target) if isinstance(target, str) else target
    except ErrorDuringImport as error:  # pydoc, which detectron2 asks, wraps ^C in it
        if isinstance(error.value, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except ImportError as error:
        expected = f"_target_: expected a name that can be imported, got {target}"
        raise InputError(f"{expected} ({error}). Correct it, or install its package.") from error


def instantiate(node: Any, **parts: Any) -> Any:
    """Build what a LazyCall node describes, and first what its arguments describe.

    As detectron2's, but arguments that do not fit are an InputError before the call. What is no
    LazyCall is returned as it is; `parts` are arguments that are there already.
    """
    if isinstance(node, ListConfig):
        return ListConfig([instantiate(each) for each in node], flags={"allow_objects": True})
    if isinstance(node, list):
        return [instantiate(each) for each in node]
    if not isinstance(node, dict | DictConfig) or "_target_" not in node:
        return node
    given: dict[str, Any] = {
        str(key): instantiate(node[key]) for key in node if key not in parts and key != "_target_"
    }
    given |= parts
    target = _located(node["_target_"])
    try:
        inspect.signature(target).bind(**given)
    except TypeError as error:
        names = _arguments(target)
        unknown = next((name for name in given if name not in names), "")
        name, hint = getattr(target, "__name__", target), _hint(unknown, names)
        raise InputError(f"recipe, arguments of {name}: {error}. {hint}") from error
    except ValueError:  # of a callable written in C nothing is known
        pass
    return target(**given)


class _LinspaceOnCpu(TorchFunctionMode):
    """Keep torch.linspace on the CPU.

    detectron2's Swin and MViT read drop path rates out of one, which a meta tensor cannot give.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, on the CPU if it is linspace."""
        where = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **where})


def build_model(model: DictConfig, device: str | torch.device = "cpu") -> nn.Module:
    """Build the detector of a recipe's `model` node; on "meta" of shapes only, of any size."""
    with torch.device(device), _LinspaceOnCpu():
        return instantiate(model)


def set_num_classes(cfg: DictConfig, num_classes: int) -> None:
    """Make the recipe's heads predict `num_classes` classes (without background).

    A saved recipe has the number at every place, where the one it comes from refers to one place.
    """
    heads = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
    heads.num_classes = num_classes
    nodes = [heads]
    while nodes:
        node = nodes.pop()
        if isinstance(node, DictConfig) and "num_classes" in node:
            node.num_classes = num_classes
        if isinstance(node, DictConfig | ListConfig):
            places = list(node) if isinstance(node, DictConfig) else range(len(node))
            nodes += [node._get_node(place) for place in places]


def backbone_settings(model: Any) -> dict[str, Any]:
    """Return {argument: value} of the transformer in a `model` node, defaults too, or {}."""
    if not isinstance(model, DictConfig):
        return {}
    given = {str(name): model[name] for name in model if not OmegaConf.is_missing(model, name)}
    defaults = arguments(model)
    if {"embed_dim", "depth"} <= defaults.keys():
        return defaults | given
    return next((found for part in given.values() if (found := backbone_settings(part))), {})


def model_settings(node: Any, model: nn.Module) -> dict[str, Any]:
    """Return what no shape tells of a recipe's model and a file may have to agree with.

    It is `backbone_settings` of `node`, and the kinds of norms in `model`, which is built from it
    ("LN", "GN1" for a GroupNorm of one group, "GN1+LN", "none"), as "pyramid.norm", "box_head.norm"
    and "mask_head.norm".
    """
    norms: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        part = "pyramid" if last.startswith("simfp_") else last
        if part in ("pyramid", "box_head", "mask_head"):
            norms.setdefault(f"{part}.norm", set()).update(map(_norm_kind, module.modules()))
    kinds = {key: "+".join(sorted(found - {""})) or "none" for key, found in norms.items()}
    return backbone_settings(node) | kinds


def _norm_kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.GroupNorm):
        return f"GN{module.num_groups}"
    # "LN" is that of maps: vitdet's ChannelLayerNorm and detectron2's LayerNorm
    return "LN" if name.endswith("LayerNorm") else "BN" if "BatchNorm" in name else ""
