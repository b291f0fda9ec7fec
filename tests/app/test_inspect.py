"""What `vitdet inspect` reads off a file, and the command that it names."""

import json

import pytest
import torch

from tests.convert.manifests import find, needs_manifests, pyramid, random, vit
from vitdet import checkpoint
from vitdet.app import cli
from vitdet.convert.describe import describe
from vitdet.convert.recipes import COMMANDS


def as_json(path, *words, capsys):
    assert cli.main(["inspect", str(path), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_file_of_ours(tmp_path, capsys):
    weights = random(pyramid(vit()))
    average = {name: value.half() for name, value in weights.items()}
    about = {"format": 1, "source_format": "mae", "initialised": ["simfp_4.0.weight"]}
    about |= {"class_names": ["cat", "dog"], "config": "model: {}"}
    path = tmp_path / "file.pth"
    torch.save({"model": weights, "ema_state": average, "vitdet": about, "images": 5}, path)
    found = as_json(path, capsys=capsys)
    assert found["file_bytes"] == path.stat().st_size
    assert (found["format"], found["nested_under"]) == ("vitdet", "model")
    assert found["beside"] == ["ema_state", "images", "vitdet"]
    assert (found["backbone_root"], found["recipes"]) == ("net.", [])
    sizes = {key: found["backbone"][key] for key in ("embed_dim", "depth", "pos_embed_grid")}
    assert sizes == {"embed_dim": 16, "depth": 2, "pos_embed_grid": [4, 4]}
    assert found["dtypes"] == {"float32": found["tensors"]}
    assert found["notes"] == ["other weights: ema_state (--weights)", "converted from mae"]
    assert set(as_json(path, "--weights", "ema_state", capsys=capsys)["dtypes"]) == {"float16"}

    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "left open    1 names (simfp_4.0.weight)\n" in text
    assert "classes      cat, dog\n" in text
    assert "recipe       in the file: vitdet predict, val, export need no --config-file\n" in text
    torch.save({"a": torch.ones(2)}, path)
    assert cli.main(["inspect", str(path)]) == 1
    assert "format       unknown\ntensors      1 (float32 1)" in capsys.readouterr().out


# published file: some of what its names and shapes say
ARCHITECTURES = {
    "mask_rcnn_vitdet_b.lvis": {
        **{"embed_dim": 768, "depth": 12, "num_heads": 12, "window_size": 14, "img_size": 1024},
        **{"global_block_indexes": [2, 5, 8, 11], "use_rel_pos": True},
    },
    "sam_vit_h": {"embed_dim": 1280, "pos_embed_grid": [64, 64], "pretrain_img_size": 1024},
    "dinov2_vitg14_reg": {
        "mlp_ratio": pytest.approx(2.6667, abs=1e-4),
        "num_register_tokens": 4,
        "layer_scale": True,
    },
    "dinov3_vitb16": {"use_abs_pos": False, "layer_scale": True, "num_heads": 12},
    "beit_base.unilm": {"num_heads": 12, "use_abs_pos": False},
    "openai.ViT-L-14-336": {"embed_dim": 1024, "patch_size": 14, "pos_embed_grid": [24, 24]},
    "hf_vitdet_base.residual": {"residual_block_indexes": [2, 5, 8, 11]},
    "eva02_L_coco_sys": {"num_heads": 16, "window_size": 32, "img_size": 1536},
    "vil_tiny_rpe": {"embed_dims": [48, 96, 192, 384], "depths": [1, 1, 9, 1]},
    "vitae_vitdet_vitae_s": {"embed_dims": [384], "depths": [14]},
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
def test_architectures_and_heads_of_published_files():
    for name, expected in ARCHITECTURES.items():
        found = describe(find(name).content())["backbone"]
        assert {key: found.get(key) for key in expected} == expected, name
    for name, expected in HEADS.items():
        found = describe(find(name).content())["head"]
        assert (found.get("kind"), found.get("num_classes")) == expected, name


@needs_manifests
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mask_rcnn_vitdet_b.coco", "mae_pretrain_vit_huge", "vil_tiny_retinanet"]
)
def test_the_command_for_a_published_file(name, tmp_path, monkeypatch, capsys):
    path = tmp_path / "file.pth"
    path.touch()
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: find(name).content())
    command = next(each for each in COMMANDS if name in each.files)
    (first,) = as_json(path, capsys=capsys)["recipes"]
    assert ["--config-file", first["recipe"], *first["options"]] == list(command.words())
    assert (first["initialised"] == 0) == (command.format in ("detectron2", "vil_det"))
    assert cli.main(["inspect", str(path)]) == 0
    words = f"--source-model {path} --output-model OUT.pth --config-file {first['recipe']}"
    shown = capsys.readouterr().out
    assert f"\n             vitdet convert {words}" in shown
    train = f"vitdet recipe --config-file {first['recipe']} --weights {path}\n"
    assert train in shown
    assert ("vitdet train --data" in shown) == (command.format == "mae")
