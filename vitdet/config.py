"""Recipes: read a LazyConfig file, change values by name, save what was used, build the model."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.config import instantiate as _instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.overrides import TorchFunctionMode

from vitdet.lazy_calls import arguments, check_calls
from vitdet.plain_recipes import plain_recipe
from vitdet.settings import OPTIONAL_TRAIN_KEYS
from vitdet.utils.checks import InputError, fail, nearest
from vitdet.utils.files import write_text

__all__ = [
    "KEYS",
    "backbone_settings",
    "build_model",
    "config_of",
    "config_text",
    "instantiate",
    "load_config",
    "model_settings",
    "save_config",
    "set_num_classes",
]

KEYS = ("model", "dataloader", "optimizer", "schedule", "train")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False
) -> DictConfig:
    """Read a recipe and change values in it.

    Args:
        path: a LazyConfig `.py` file, which is run; or a `.yaml` file that `save_config` wrote,
            which is plain data (`vitdet.plain_recipes`).
        overrides: "dotted.key=value" each; the value is YAML ("1e-4", "[1, 2]", "null", "true").
            A key must exist, or be an argument of the callable that its node describes.
        trust: build what a .yaml names outside this project, too: it may run code of its author.

    Returns:
        The recipe, with its interpolations unresolved.

    Raises:
        InputError: no such file, it does not load, a key that does not exist, a value of another
            type than the one it replaces, a node with an argument that its callable does not have
            or does not take a value of this type for.
    """
    path = Path(path)
    if not path.is_file():
        here = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = nearest(str(path), here)
        hint = f"Did you mean {close}?" if close else "Recipes lie under configs/."
        fail("--config-file", expected="a file", got=str(path), remedy=hint)
    return _changed(_read(path, trust), overrides)


def config_of(content: dict[str, Any], overrides: Sequence[str] = ()) -> DictConfig:
    """Return the recipe that a YAML text gave as plain data, values changed as in `load_config`."""
    return _changed(OmegaConf.create(content), overrides)


def _changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        _override(cfg, override)
    check_calls(cfg)
    return cfg


def _read(path: Path, trust: bool) -> DictConfig:
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: it is no text ({error}). Correct the file.") from error
        return OmegaConf.create(plain_recipe(text, str(path), trust=trust))
    if path.suffix != ".py":
        raise InputError(f"{path}: expected a .py or .yaml file. Recipes lie under configs/.")
    try:
        loaded = LazyConfig.load(str(path))
    except (SyntaxError, ImportError, AssertionError, NameError) as error:
        what = f"{path}: {type(error).__name__}: {error}"
        fail(what, expected="a recipe that loads", got="this error", remedy="Correct the file.")
    assert isinstance(loaded, DictConfig)  # load() without keys returns the whole file
    return loaded


def _override(cfg: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        fail(f"argument {override!r}", expected="key=value", got=override, remedy="Add the '='.")
    *parents, last = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[:depth]), key)
    old = _child(node, last, ".".join(parents), key, optional=True)
    value = _typed(key, old, text)
    index: Any = int(last) if isinstance(node, ListConfig) else last
    OmegaConf.set_struct(node, False)
    node[index] = value


def _child(node: Any, part: str, where: str, key: str, *, optional: bool = False) -> Any:
    """Return the value of `part` in `node`, or raise naming the nearest key.

    With `optional` an argument of the node's callable that is not set yet gives its default, and so
    does a key of `train` that a recipe may leave out.
    """
    if isinstance(node, ListConfig):
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        names: list[str] = [str(i) for i in range(len(node))]
    elif isinstance(node, DictConfig):
        if part in node.keys():  # noqa: SIM118 (a value left open, "???", is not `in` the node)
            return None if OmegaConf.is_missing(node, part) else node[part]
        known = OPTIONAL_TRAIN_KEYS if where == "train" else arguments(node)
        if optional and part in known:
            return known[part]
        names = [str(name) for name in {**dict.fromkeys(node), **known} if name != "_target_"]
    else:
        names = []
    prefix = f"{where}." if where else ""
    close = nearest(part, names)
    hint = (
        f"Did you mean {prefix}{close}?"
        if close
        else f"It has: {', '.join(sorted(names)) or 'no keys'}."
    )
    fail(
        f"override {key!r}",
        expected=f"a key of {where or 'the recipe'}",
        got=repr(part),
        remedy=hint,
    )


def _typed(key: str, old: Any, text: str) -> Any:
    """Read `text` as YAML and check it against the type of the value that it replaces."""
    value = _value(text)
    if isinstance(value, str) and value.endswith("%") and key.endswith("_every"):
        return value  # a share of the training
    if isinstance(old, str) and value is not None and not old.startswith("${"):
        return value if isinstance(value, str) else text
    kinds = {bool: (bool,), int: (int,), float: (int, float)}
    for kind, allowed in kinds.items():
        if type(old) is not kind or value is None or type(value) in allowed:
            continue
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
        fail(
            f"override {key!r}",
            expected=f"{kind.__name__}, as the recipe's {old!r}",
            got=f"{text!r}",
            remedy="Give a value of that type.",
        )
    if isinstance(old, ListConfig) and not isinstance(value, list) and value is not None:
        fail(f"override {key!r}", expected="a list", got=repr(text), remedy="Write [a, b, ...].")
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


def save_config(cfg: DictConfig, path: str | Path, notes: Sequence[str] = ()) -> None:
    """Write the recipe, interpolations resolved, as YAML that `load_config` reads again.

    The file appears whole or not at all.

    Args:
        cfg: the recipe.
        path: of the file.
        notes: lines of comment at its top.

    Raises:
        InputError: a value that YAML cannot hold, or a disk that refuses.
    """
    write_text(Path(path), "".join(f"# {line}\n" for line in notes) + config_text(cfg))


def config_text(cfg: DictConfig) -> str:
    """Return the recipe, interpolations resolved, as YAML.

    Raises:
        InputError: a value that YAML cannot hold.
    """
    try:
        plain = _plain(cfg, "")
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        fail("recipe", expected="interpolations that resolve", got=first, remedy="Correct it.")
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
        return _dotted_name(node)
    fail(
        f"config value {key}",
        expected="numbers, text, lists, or a LazyCall",
        got=repr(node),
        remedy="Describe it by a LazyCall, which can be saved.",
    )


def _dotted_name(target: Callable[..., Any]) -> str:
    """Return the shortest module path under which `target` can be imported again."""
    module, name = target.__module__, target.__qualname__
    parts = module.split(".")
    for end in range(1, len(parts)):
        short = ".".join(parts[:end])
        if getattr(importlib.import_module(short), name, None) is target:
            return f"{short}.{name}"
    return f"{module}.{name}"


def set_num_classes(cfg: DictConfig, num_classes: int) -> None:
    """Make the recipe's heads predict `num_classes` classes (without background).

    A saved recipe has the number at every place, where the one it comes from refers to one place.
    """
    model = cfg.model
    heads = model.roi_heads if "roi_heads" in model else model
    heads.num_classes = num_classes
    _set_where_given(heads, "num_classes", num_classes)


def _set_where_given(node: Any, key: str, value: int) -> None:
    if isinstance(node, DictConfig):
        if key in node:
            node[key] = value
        for name in node:
            _set_where_given(node._get_node(name), key, value)
    elif isinstance(node, ListConfig):
        for place in range(len(node)):
            _set_where_given(node._get_node(place), key, value)


def backbone_settings(model: Any) -> dict[str, Any]:
    """Return the arguments of the transformer that a recipe's model is built on, {} without one.

    Args:
        model: the `model` node of a recipe, or a node in it.

    Returns:
        {argument: value}, defaults of the constructor among them.
    """
    if not isinstance(model, DictConfig):
        return {}
    given = {str(name): model[name] for name in model if not OmegaConf.is_missing(model, name)}
    defaults = arguments(model)
    if {"embed_dim", "depth"} <= defaults.keys():
        return defaults | given
    return next((found for part in given.values() if (found := backbone_settings(part))), {})


def model_settings(node: Any, model: nn.Module) -> dict[str, Any]:
    """Return what no shape tells of a recipe's model and a file may have to agree with.

    Args:
        node: the `model` node of the recipe.
        model: what is built from it.

    Returns:
        `backbone_settings`, and the kinds of norms ("LN", "GN1" for a GroupNorm of one group,
        "GN1+LN", "none") as "pyramid.norm", "box_head.norm" and "mask_head.norm".
    """
    parts: dict[str, list[nn.Module]] = {"pyramid": [], "box_head": [], "mask_head": []}
    for name, module in model.named_modules():
        *_, last = name.split(".")
        part = "pyramid" if last.startswith("simfp_") else last
        if part in parts:
            parts[part].append(module)
    norms = {f"{part}.norm": _norm_kind(modules) for part, modules in parts.items() if modules}
    return backbone_settings(node) | norms


def _norm_kind(modules: list[nn.Module]) -> str:
    # "LN" is that of maps: vitdet's ChannelLayerNorm and detectron2's LayerNorm
    kinds = set()
    for module in (part for whole in modules for part in whole.modules()):
        name = type(module).__name__
        if isinstance(module, nn.GroupNorm):
            kinds.add(f"GN{module.num_groups}")
        elif name.endswith("LayerNorm"):
            kinds.add("LN")
        elif "BatchNorm" in name:
            kinds.add("BN")
    return "+".join(sorted(kinds)) or "none"


class _LinspaceOnCpu(TorchFunctionMode):
    """Keep torch.linspace on the CPU.

    detectron2's Swin and MViT take drop path rates out of a linspace with `.item()` in their
    constructors, which a meta tensor cannot give. Can go when they use Python numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, on the CPU if it is linspace."""
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def instantiate(node: Any) -> Any:
    """Build what a LazyCall node describes, and first what its arguments describe."""
    return _instantiate(node)


def build_model(model: DictConfig, device: str | torch.device = "cpu") -> nn.Module:
    """Build the detector that `cfg.model` describes.

    Args:
        model: the `model` node of a recipe.
        device: where its parameters are made; "meta" makes shapes only, for any size at once.
    """
    with torch.device(device), _LinspaceOnCpu():
        return instantiate(model)
