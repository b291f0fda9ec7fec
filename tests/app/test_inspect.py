"""What `vitdet inspect` reads off a file, and the recipes that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.manifests import CHECKPOINTS, find
from vitdet import checkpoint, config
from vitdet.app import cli, demo, inspect
from vitdet.backbones.vit import ViT
from vitdet.convert.inspect import describe
from vitdet.convert.recipes import COMMANDS
from vitdet.pyramid import SimpleFeaturePyramid

needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
SIZES: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = """
from detectron2.config import LazyCall as L
from vitdet.backbones.vit import ViT
from vitdet.pyramid import SimpleFeaturePyramid

net = L(ViT)(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_img_size={size})
model = L(SimpleFeaturePyramid)(net=net, out_channels=8, scale_factors=(1.0,))
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder of recipes: same size, other positions, other width, one that does not load."""
    folder = tmp_path / "recipes"
    (folder / "common").mkdir(parents=True)
    (folder / "same.py").write_text(RECIPE.format(size=64))
    (folder / "other_grid.py").write_text(RECIPE.format(size=96))
    (folder / "wide.py").write_text(RECIPE.format(size=64).replace("16, depth", "32, depth"))
    (folder / "broken.py").write_text("import absent_module\n")
    (folder / "common" / "part.py").write_text(RECIPE.format(size=64))
    return folder


def pyramid() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = ViT(**SIZES, pretrain_img_size=64)
    return SimpleFeaturePyramid(net, out_channels=8, scale_factors=(1.0,)).state_dict()


def saved(content: object, folder: Path) -> Path:
    path = folder / "file.pth"
    torch.save(content, path)
    return path


def as_json(path: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["inspect", str(path), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_recipes_of_a_folder(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"format": 1, "source_format": "mae", "initialised": ["simfp_4.0.weight"]}
    path = saved({"model": pyramid(), "vitdet": about, "images": 5}, tmp_path)
    found = as_json(path, "--configs", str(recipes), capsys=capsys)
    assert found["file_bytes"] == path.stat().st_size
    assert (found["format"], found["nested_under"]) == ("vitdet", "model")
    assert found["beside"] == ["images", "vitdet"]
    assert found["backbone_root"] == "net."
    sizes = {key: found["backbone"][key] for key in ("embed_dim", "depth", "patch_size")}
    assert sizes == {"embed_dim": 16, "depth": 2, "patch_size": 16}
    assert found["backbone"]["pos_embed_grid"] == [4, 4]
    assert found["initialised"] == ["simfp_4.0.weight"]
    assert found["dtypes"] == {"float32": found["tensors"]}
    notes = " ".join(found["notes"])
    assert "converted from mae" in notes
    assert "broken.py was not tried" in notes
    assert "part.py" not in notes
    fits = {Path(fit["recipe"]).name: fit for fit in found["recipes"]}
    assert list(fits) == ["same.py", "other_grid.py"]
    assert fits["same.py"]["fit"] == "whole"
    assert fits["other_grid.py"]["fit"] == "resized"
    assert fits["other_grid.py"]["resized"] == {"net.pos_embed": [[1, 17, 16], [1, 37, 16]]}

    assert cli.main(["inspect", str(path), "--configs", str(recipes)]) == 0
    text = capsys.readouterr().out
    assert f"whole        {recipes / 'same.py'}\n" in text
    assert f"resized      {recipes / 'other_grid.py'}: 1 resized\n" in text
    assert "left open    1 names (simfp_4.0.weight)" in text

    assert cli.main(["inspect", str(path), "--no-recipes"]) == 0
    assert "same.py" not in capsys.readouterr().out


def test_a_backbone_is_a_start(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ViT(**SIZES, pretrain_img_size=64).state_dict()
    tokens = {"cls_token": torch.zeros(1, 1, 16), "norm.weight": torch.ones(16)}
    path = saved({"model": weights | tokens | {"norm.bias": torch.zeros(16)}}, tmp_path)
    found = as_json(path, "--configs", str(recipes), capsys=capsys)
    assert found["format"] == "mae"
    assert [Path(fit["recipe"]).name for fit in found["recipes"]] == ["other_grid.py", "same.py"]
    for fit in found["recipes"]:
        assert fit["fit"] == "start"
        assert fit["dropped"]["class token: a detector's backbone has none"] == ["cls_token"]
        assert all(name.startswith("simfp_") for name in fit["initialised"])


def test_other_weights_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = {name: value.half() for name, value in pyramid().items()}
    path = saved({"model": pyramid(), "ema_state": average}, tmp_path)
    found = as_json(path, "--no-recipes", capsys=capsys)
    assert (found["nested_under"], found["recipes"]) == ("model", [])
    assert "other weights: ema_state (--weights)" in found["notes"]
    found = as_json(path, "--no-recipes", "--weights", "ema_state", capsys=capsys)
    assert found["nested_under"] == "ema_state"
    assert set(found["dtypes"]) == {"float16"}


# published file: some of what its names and shapes say
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mask_rcnn_vitdet_b.lvis": {
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "window_size": 14,
        "global_block_indexes": [2, 5, 8, 11],
        "img_size": 1024,
        "use_rel_pos": True,
    },
    "sam_vit_h": {"embed_dim": 1280, "pos_embed_grid": [64, 64], "pretrain_img_size": 1024},
    "dinov2_vitg14_reg": {"mlp_ratio": 2.6667, "num_register_tokens": 4, "layer_scale": True},
    "dinov3_vitb16": {"use_abs_pos": False, "layer_scale": True, "num_heads": 12},
    "openai.ViT-L-14-336": {"embed_dim": 1024, "patch_size": 14, "pos_embed_grid": [24, 24]},
    "hf_vitdet_base.residual": {"residual_block_indexes": [2, 5, 8, 11]},
    "eva02_L_coco_sys": {"num_heads": 16, "window_size": 32, "img_size": 1536},
    "vil_tiny_rpe": {"embed_dims": [48, 96, 192, 384]},
    "vitae_vitdet_vitae_s": {"embed_dims": [384]},
}
HEADS = {
    "mask_rcnn_vitdet_b.lvis": ("Mask R-CNN", 1203),
    "cascade_mask_rcnn_vitdet_h.coco": ("Cascade Mask R-CNN", 80),
    "eva02_L_m38m_to_o365": ("Cascade R-CNN", 365),
    "mmdet3_vitdet_mask_rcnn_vit_b": ("Mask R-CNN", 80),
    "vil_tiny_retinanet": ("RetinaNet", 80),
    "sam_vit_b": (None, None),
}


@needs_manifests
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_published_files(name: str) -> None:
    found = describe(find(name).content()).backbone
    expected = ARCHITECTURES[name]
    assert {key: found.get(key) for key in expected} == expected


@needs_manifests
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_published_files(name: str) -> None:
    found = describe(find(name).content()).head
    assert (found.get("kind"), found.get("num_classes")) == HEADS[name]


# published file: the best recipe, its kind of fit, what has to be given
FITS = {
    "mask_rcnn_vitdet_b.coco": ("COCO/mask_rcnn_vitdet_b_100ep", "whole", []),
    "mae_pretrain_vit_huge": ("COCO/mask_rcnn_vitdet_h_75ep", "start", ["--resize-patch-embed"]),
    "easycv_vitdet_mask_rcnn": ("easycv/mask_rcnn_vitdet_b_100ep", "whole", []),
    "eva02_B_coco_bsl": ("COCO/cascade_mask_rcnn_eva02_b_bsl", "whole", []),
    "vil_tiny_retinanet": ("vil/retinanet_vil_tiny_1x", "whole", []),
    "dinov2_vitb14": (
        "COCO/mask_rcnn_vitdet_b_100ep",
        "start",
        ["--resize-patch-embed"],
    ),
    "beit_base.unilm": ("COCO/mask_rcnn_vitdet_b_100ep", "start", ["--allow-inexact"]),
}


@needs_manifests
@pytest.mark.parametrize("name", FITS)
def test_recipes_of_published_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "file.pth"
    path.touch()
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: find(name).content())
    monkeypatch.chdir(inspect.CONFIGS.parent)
    found = as_json(path, capsys=capsys)
    recipe, fit, options = FITS[name]
    first = found["recipes"][0]
    command = next(each for each in COMMANDS if name in each.files)
    assert first["recipe"] == f"configs/{recipe}.py"
    assert first["fit"] == fit
    assert first["options"] == [*options, *command.overrides]
    assert {each["recipe"] for each in found["recipes"]} <= {
        f"configs/{each.recipe}.py" for each in COMMANDS
    }


@needs_manifests
def test_a_checkpoint_of_the_demo_is_told_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = config.build_model(config.load_config(demo.RECIPE).model, device="cpu")
    path = saved({"model": model.state_dict(), "vitdet": {"format": 1}}, tmp_path)
    found = as_json(path, capsys=capsys)
    assert [(fit["recipe"], fit["fit"]) for fit in found["recipes"]] == [
        (str(demo.RECIPE), "whole")
    ]


def test_few_recipes_are_tried() -> None:
    # each takes a tenth of a second and more to load, and there are more than a hundred
    for command in COMMANDS:
        found = describe(find(command.files[0]).content())
        assert 1 <= len(inspect.known(found)) <= 20
