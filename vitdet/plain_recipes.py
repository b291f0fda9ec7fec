"""Recipes that came from elsewhere: of a checkpoint, of a run's folder, of a .yaml.

Such a text may be anyone's, so it is plain data and nothing else: no tags and aliases of YAML, no
interpolation, numbers within bounds, and in each place the parts that configs/ has there, by their
exact names. A recipe in Python is its author's own program; `--trust` says the same of a text.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

from vitdet.utils.checks import InputError


def _of(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


# What configs/ builds, by place (tests/test_plain_recipes.py keeps it equal).
PARTS = {
    "model": {
        "detectron2.layers.ShapeSpec",
        *_of("detectron2.modeling", "FPN FastRCNNOutputLayers GeneralizedRCNN MViT RetinaNet"),
        *_of("detectron2.modeling", "StandardROIHeads SwinTransformer"),
        "detectron2.modeling.anchor_generator.DefaultAnchorGenerator",
        *_of("detectron2.modeling.backbone.fpn", "LastLevelMaxPool LastLevelP6P7"),
        "detectron2.modeling.box_regression.Box2BoxTransform",
        "detectron2.modeling.matcher.Matcher",
        "detectron2.modeling.meta_arch.retinanet.RetinaNetHead",
        "detectron2.modeling.poolers.ROIPooler",
        "detectron2.modeling.proposal_generator.RPN",
        *_of("detectron2.modeling.roi_heads", "CascadeROIHeads FastRCNNConvFCHead"),
        "detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead",
        *_of("vitdet.backbones", "eva02.EVA02ViT msvit.MsViT vit.ViT"),
        *_of("vitdet.backbones", "vitae.ViTAE vitae_s.ViTAES"),
        "vitdet.data.datasets.federated_loss_weights",
        *_of("vitdet.heads", "CascadeROIHeads StandardROIHeads rpn_head"),
        *_of("vitdet.layers.norms", "channel_layer_norm group_norm layer_norm"),
        "vitdet.pyramid.SimpleFeaturePyramid",
    },
    "mapper": {
        *_of("vitdet.data.augment", "fixed_resize large_scale_jitter resize_shortest_edge"),
        "vitdet.data.mapper.Mapper",
    },
    "dataset": {
        *_of("vitdet.data.datasets", "coco_dataset coco_mini joined_dataset named_dataset"),
        "vitdet.data.shapes.shapes_dataset",
    },
    "loader": {
        *_of("vitdet.data.loaders", "build_test_loader build_train_loader"),
        "vitdet.evaluation.CocoEvaluator",
    },
    "optimizer": {"vitdet.optim.adamw"},
    "schedule": {*_of("vitdet.optim", "Constant Cosine MultiStep")},
    "train": set(),
}

# Recipes of configs/ have at most 8,400 characters, 900 nodes, 7 levels, lists of 24 and, for sizes
# and counts, numbers of 4,000. Greater ones only cost time and memory.
_MAX_CHARACTERS, _MAX_NODES, _MAX_LEVELS, _MAX_LIST = 100_000, 5_000, 16, 200
_MAX_NUMBERS = (  # the first whose expression is the path
    (r"model\.(.*\.)?(depths?|num_(heads|blocks|layers|convs?|fc|stages))", 256),
    (r"model\b.*", 20_000),
    (r"dataloader\.\w+\.mapper\b.*", 8_192),
    (r"dataloader\..*\.num_workers", 64),
    (r"dataloader\..*\.seed", 2**63),
    (r"dataloader\..*\.dataset\.size", 2_048),
    (r"dataloader\.\w+\.dataset\b.*", 20_000),
    (r"dataloader\b.*", 100_000),
    (r".*", 10**13),  # images of a training, its seed
)
_WORD = re.compile(r"[\w.-]{0,100}", re.ASCII)
_PATHS = ("json", "images", "root", "name", "names", "output_dir")

_REMEDY = (
    "Only if you trust its author: --trust (trust=True) builds it, and may run code of theirs. A "
    "recipe of your own with parts of your own is a .py file."
)


def plain_recipe(text: str, source: str, *, trust: bool = False) -> dict[str, Any]:
    """Return the content of a recipe's YAML text, in which nothing but plain data stands.

    `trust` takes any YAML that holds no tags of Python.

    Raises:
        InputError: no YAML, or anything in it that a saved recipe of configs/ could not have.
    """
    content = _parsed(text, source, trust)
    if not trust:
        _check(content, (), source)
    return content


def recipe_of_file(text: str, source: str, *, trust: bool = False) -> dict[str, Any]:
    """Return what predicting and evaluating need of the recipe in a checkpoint, as plain data.

    No output folder is in it; of what it says about the training numbers and words are left.
    Arguments and errors are those of `plain_recipe`.
    """
    whole = _parsed(text, source, trust)
    model, loaders, train = (whole.get(key) for key in ("model", "dataloader", "train"))
    loaders = loaders if isinstance(loaders, dict) else {}
    train = {} if train is None else train
    if not all(isinstance(each, dict) for each in (model, train, loaders.get("test"))):
        expected = "expected groups of settings at model, dataloader.test and train"
        raise InputError(f"{source}: {expected}. Give the recipe: config=... or --config-file.")
    data = {key: value for key, value in loaders.items() if key != "train"}
    needed = {"model": model, "dataloader": data, "train": train}
    if trust:
        return needed
    _check(needed, (), source)
    if isinstance(data.get("evaluator"), dict):
        data["evaluator"].pop("output_dir", None)
    words = {k: v for k, v in train.items() if not isinstance(v, str) or _WORD.fullmatch(v)}
    return needed | {"train": {k: v for k, v in words.items() if not isinstance(v, list | dict)}}


class _Loader(yaml.SafeLoader):
    """Reads YAML of a bounded size and depth without aliases, of which few make millions."""

    nodes = levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("an alias (*name)")
        self.nodes += 1
        self.levels += 1
        if self.nodes > _MAX_NODES or self.levels > _MAX_LEVELS:
            raise ValueError("it is too large or nested too deep")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


# What PyYAML raises on texts that are none, beside its own errors.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError)


def _parsed(text: str, source: str, trust: bool) -> dict[str, Any]:
    try:
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"it has {len(text)} characters")
        content = yaml.load(text, yaml.SafeLoader if trust else _Loader)
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} at the top, not a mapping")
    except _NO_YAML as error:
        what = f"expected a recipe that loads, got {type(error).__name__}: {error}"
        raise InputError(f"{source}: {what}. Correct the file, or give another recipe.") from error
    return content


def _check(node: Any, path: tuple[str, ...], source: str) -> None:
    """Check what stands at `path`; the depth is bounded already."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str) or not _WORD.fullmatch(key):
                _refuse(source, path, "keys that are words", f"{key!r:.100}")
            _check(value, (*path, key), source)
            if key == "_target_" and str(value) not in PARTS.get(_place(path), ()):
                what = "parts of this vitdet and detectron2 only, those that configs/ has there"
                _refuse(source, path, what, str(value)[:200])
    elif isinstance(node, list):
        if len(node) > _MAX_LIST:
            _refuse(source, path, f"at most {_MAX_LIST} items", str(len(node)))
        for value in node:
            _check(value, path, source)
    elif isinstance(node, str):
        _check_text(node, path, source)
    elif node is not None and not isinstance(node, bool):
        _check_number(node, path, source)


def _check_number(number: Any, path: tuple[str, ...], source: str) -> None:
    if not isinstance(number, int | float):
        _refuse(source, path, "numbers, text and lists", type(number).__name__)
    most = next(most for each, most in _MAX_NUMBERS if re.fullmatch(each, ".".join(path)))
    if not abs(number) <= most:  # nor is it a number when it is none at all
        got = f"{number:.6g}" if isinstance(number, float) else "a greater one"
        _refuse(source, path, f"a number up to {most}", got)


def _check_text(text: str, path: tuple[str, ...], source: str) -> None:
    if "${" in text:
        _refuse(source, path, "values, and nothing that is looked up when it is built", text[:100])
    place = _place(path)
    free = place in ("train", "optimizer") or (place != "model" and path[-1] in _PATHS)
    plain = text.isprintable() and "://" not in text and len(text) < 4096
    if not (free and plain) and not _WORD.fullmatch(text):
        _refuse(source, path, "a word", repr(text[:100]))


def _refuse(source: str, path: tuple[str, ...], expected: str, got: str) -> NoReturn:
    raise InputError(f"{source}: {'.'.join(path)}: expected {expected}, got {got}. {_REMEDY}")


def _place(path: tuple[str, ...]) -> str:
    """Return the key of PARTS for what stands at a path of keys."""
    head, *rest = path or ("",)
    if head in ("optimizer", "schedule", "train"):
        return head
    if head != "dataloader":
        return "model"
    if rest[1:2] == ["mapper"]:
        return "mapper"
    return "dataset" if rest[1:2] == ["dataset"] else "loader"
