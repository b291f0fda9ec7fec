"""Recipes: read a LazyConfig file, change values by name, save what was used, build the model."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from pydoc import ErrorDuringImport
from typing import Any

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.overrides import TorchFunctionMode

from vitdet.plain_recipes import plain_recipe
from vitdet.settings import Train, complete
from vitdet.utils.checks import InputError, nearest
from vitdet.utils.files import write_text

KEYS = ("model", "dataloader", "optimizer", "schedule", "train")  # of a recipe to train

# --- reading -------------------------------------------------------------------------------------


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
        The recipe, with its interpolations unresolved; its `train` is a `Train`.

    Raises:
        InputError: no such file, it does not load, a key that does not exist, a value of another
            type than the one it replaces or than `train` has there.
    """
    path = Path(path)
    cfg = _changed(_read(path, trust), overrides)
    if isinstance(cfg.get("train"), DictConfig):
        cfg.train = complete(cfg.train)
    return cfg


def config_of(content: dict[str, Any], overrides: Sequence[str] = ()) -> DictConfig:
    """Return the recipe that a YAML text gave as plain data, values changed as in `load_config`."""
    return _changed(OmegaConf.create(content), overrides)


def _changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        _override(cfg, override)
    return cfg


def table_of(path: Path) -> tuple[Path, str] | None:
    """Return the table that a recipe is a row of, and its name there, None for a recipe of its own.

    configs/paper/t4_in1k_b.py is the row "t4_in1k_b" of configs/paper.py, which `recipes` holds
    (configs/common/rows.py).
    """
    for folder in path.parents if path.suffix == ".py" and not path.is_file() else ():
        if folder.name and (table := folder.with_name(f"{folder.name}.py")).is_file():
            return table, path.relative_to(folder).with_suffix("").as_posix()
    return None


def _row(path: Path) -> DictConfig:
    found = table_of(path)
    recipes: Any = found and _run(found[0], "recipes")
    here = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    if found is None or found[1] not in recipes.rows:
        here += [str(path.parent / f"{name}.py") for name in recipes.rows] if recipes else []
        close = nearest(str(path), here)
        hint = f"Did you mean {close}?" if close else "Recipes lie under configs/."
        raise InputError(f"--config-file: expected a recipe, got {path}. {hint}")
    cfg: Any = OmegaConf.create(recipes(found[1]), flags={"allow_objects": True})
    return cfg


def _run(path: Path, key: str | None = None) -> Any:
    try:
        return LazyConfig.load(str(path), key)
    except (SyntaxError, ImportError, AssertionError, NameError) as error:
        what = f"expected a recipe that loads, got {type(error).__name__}: {error}"
        raise InputError(f"{path}: {what}. Correct the file.") from error


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
    assert isinstance(loaded, DictConfig)  # load() without keys returns the whole file
    if "ROWS" in loaded:
        row = path.with_suffix("") / f"{next(iter(loaded.ROWS))}.py"
        raise InputError(f"--config-file: {path} is a table of recipes. Name a row, as {row}.")
    return loaded


# --- changing ------------------------------------------------------------------------------------


def _override(cfg: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"argument {override!r}: expected key=value, got {override}.")
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
    names: list[str] = []
    if isinstance(node, ListConfig):
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        names = [str(i) for i in range(len(node))]
    elif isinstance(node, DictConfig):
        if part in node.keys():  # noqa: SIM118 (a value left open, "???", is not `in` the node)
            return None if OmegaConf.is_missing(node, part) else node[part]
        known = arguments(node)
        if where == "train":
            known = {each.name: getattr(Train, each.name, None) for each in fields(Train)}
        if optional and part in known:
            return known[part]
        names = [str(name) for name in {**dict.fromkeys(node), **known} if name != "_target_"]
    prefix = f"{where}." if where else ""
    close = nearest(part, names)
    hint = f"Did you mean {prefix}{close}?"
    if not close:
        hint = f"It has: {', '.join(sorted(names)) or 'no keys'}."
    place = where or "the recipe"
    raise InputError(f"override {key!r}: expected a key of {place}, got {part!r}. {hint}")


def _typed(key: str, old: Any, text: str) -> Any:
    """Read `text` as YAML and check it against the type of the value that it replaces."""
    value = _value(text)
    if isinstance(value, str) and key in ("train.checkpoint_every", "train.eval_every"):
        return value  # a share of the training, or iterations (engine/recipe.py)
    if isinstance(old, str) and value is not None and not old.startswith("${"):
        return value if isinstance(value, str) else text
    kinds = {bool: (bool,), int: (int,), float: (int, float)}
    for kind, allowed in kinds.items():
        if type(old) is not kind or value is None or type(value) in allowed:
            continue
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
        expected = f"expected {kind.__name__}, as the recipe's {old!r}"
        raise InputError(f"override {key!r}: {expected}, got {text!r}.")
    if isinstance(old, ListConfig) and not isinstance(value, list) and value is not None:
        raise InputError(f"override {key!r}: expected a list, got {text!r}. Write [a, b, ...].")
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
    """Write the recipe, interpolations resolved, as YAML that `load_config` reads again.

    The file appears whole or not at all.

    Raises:
        InputError: a value that YAML cannot hold, or a disk that refuses.
    """
    write_text(Path(path), config_text(cfg))


def config_text(cfg: DictConfig) -> str:
    """Return the recipe, interpolations resolved, as YAML.

    Raises:
        InputError: a value that YAML cannot hold.
    """
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
        return _dotted_name(node)
    expected = "expected numbers, text, lists, or a LazyCall, which can be saved"
    raise InputError(f"config value {key}: {expected}, got {node!r}.")


def _dotted_name(target: Callable[..., Any]) -> str:
    """Return the shortest module path under which `target` can be imported again."""
    module, name = target.__module__, target.__qualname__
    parts = module.split(".")
    for end in range(1, len(parts)):
        short = ".".join(parts[:end])
        if getattr(importlib.import_module(short), name, None) is target:
            return f"{short}.{name}"
    return f"{module}.{name}"


# --- building ------------------------------------------------------------------------------------


def arguments(node: DictConfig) -> dict[str, Any]:
    """Return {argument: default} of the callable that a LazyCall node describes."""
    target = node.get("_target_")
    if isinstance(target, str):
        target = _located(target)
    return {} if target is None else _arguments(target)


def _arguments(target: Callable[..., Any]) -> dict[str, Any]:
    found = inspect.signature(target).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None if p.default is p.empty else p.default for p in found if p.kind in by_name}


def _located(name: str) -> Any:
    """Return what a dotted name stands for; it may be imported for that."""
    try:
        return locate(name)
    except ErrorDuringImport as error:  # pydoc, which detectron2 asks, wraps ^C in it
        if isinstance(error.value, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except ImportError as error:
        expected = f"_target_: expected a name that can be imported, got {name}"
        raise InputError(f"{expected} ({error}). Correct it, or install its package.") from error


def instantiate(node: Any, **parts: Any) -> Any:
    """Build what a LazyCall node describes, and first what its arguments describe.

    As detectron2's, but arguments that do not fit are told before the call.

    Args:
        node: of a recipe; what is no LazyCall is returned as it is.
        parts: arguments that are there already, instead of the node's own.

    Raises:
        InputError: an argument that the callable does not have or lacks; or no such callable.
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
    target = node["_target_"]
    if isinstance(target, str):
        target = _located(target)
    try:
        inspect.signature(target).bind(**given)
    except TypeError as error:
        names = _arguments(target)
        unknown = next((name for name in given if name not in names), "")
        close = nearest(unknown, names)
        hint = f"Did you mean {close}?" if close else f"It has {', '.join(names)}."
        name = getattr(target, "__name__", target)
        raise InputError(f"recipe, arguments of {name}: {error}. {hint}") from error
    except ValueError:  # of a callable written in C nothing is known
        pass
    return target(**given)


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


def build_model(model: DictConfig, device: str | torch.device = "cpu") -> nn.Module:
    """Build the detector that `cfg.model` describes.

    Args:
        model: the `model` node of a recipe.
        device: where its parameters are made; "meta" makes shapes only, for any size at once.
    """
    with torch.device(device), _LinspaceOnCpu():
        return instantiate(model)


def set_num_classes(cfg: DictConfig, num_classes: int) -> None:
    """Make the recipe's heads predict `num_classes` classes (without background).

    A saved recipe has the number at every place, where the one it comes from refers to one place.
    """
    heads = cfg.model.roi_heads if "roi_heads" in cfg.model else cfg.model
    heads.num_classes = num_classes
    _set_where_given(heads, num_classes)


def _set_where_given(node: Any, num_classes: int) -> None:
    if isinstance(node, DictConfig):
        if "num_classes" in node:
            node.num_classes = num_classes
        for name in node:
            _set_where_given(node._get_node(name), num_classes)
    elif isinstance(node, ListConfig):
        for place in range(len(node)):
            _set_where_given(node._get_node(place), num_classes)


def backbone_settings(model: Any) -> dict[str, Any]:
    """Return {argument: value} of the transformer that a recipe's model is built on, or {}.

    Args:
        model: the `model` node of a recipe, or a node in it. Defaults of the constructor count.
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
