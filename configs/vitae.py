"""ViTAE-Transformer/ViTDet on COCO: ViT-B, ViTAE-B, ViTAE-S, and its to-do list.

    python train_net.py --config-file configs/vitae/mask_rcnn_vit_b_100ep.py
        --num-gpus 8 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT

Source: its configs/ViTDet. 25 rounds of the 117266 images of train2017 that have an object, four
times over, in fp32; lr / 10 after 22 x 4 = 88 and 24 x 4 = 96 epochs, warm-up 250 iterations of 64
from 0.067. No weight decay on vectors (norms, biases) and on positions; the published
`custom_keys` say less, but their constructor never reads them
(mmcv_custom/layer_decay_optimizer_constructor.py). Costs are of 32 A100 with 2 images each.
"""

from types import SimpleNamespace

from .COCO.mask_rcnn_vitdet_b_100ep import model as _vitdet
from .COCO.mask_rcnn_vitdet_b_100ep import optimizer as _vitdet_optimizer
from .COCO.mask_rcnn_vitdet_b_100ep import schedule as _vitdet_schedule
from .COCO.mask_rcnn_vitdet_b_100ep import train as _vitdet_train
from .common.ablations import convolutions
from .common.changes import LVIS_100, cascaded, lvis
from .common.data.coco import dataloader
from .common.mmdet import optimizer, schedule, train
from .common.models.mask_rcnn_vitae import model, vitae_b, vitae_s
from .common.rows import Change, Recipes, Row, training
from .common.rows import optimizer as rates

optimizer.weight_decay_vectors = 0.0
optimizer.no_decay = ["pos_embed", "cls_token", "rel_pos_"]
optimizer.layer_decay_rate = 0.7
schedule.warmup_factor = 0.067


def backbone(node: object) -> Change:
    """Another backbone."""
    return lambda parts: parts.model.backbone.update(net=node)


def as_vitdet(parts: SimpleNamespace) -> None:
    """detectron2's pyramid, heads and training."""
    parts.model, parts.optimizer = _vitdet, _vitdet_optimizer
    parts.schedule, parts.train = _vitdet_schedule, _vitdet_train


ROWS = {
    "mask_rcnn_vit_b_100ep": Row(
        "51.1/45.5", 118.56, "ViTDet-ViT-Base-100e.py",
        note='"TPU" weights of MAE\'s authors; 51.1/45.4 from their own "GPU" weights. 0.720 s an '
        "iteration (183228 x 0.720 s = 37 h), 34.6 GB",
    ),
    "mask_rcnn_vitae_b_100ep": Row(
        "51.6/45.8", 121.33, "ViTDet-ViTAE-Base-100e.py", (backbone(vitae_b),), "mae_vitae_b.pth",
        "activations recomputed; 0.963 s an iteration (183228 x 0.963 s = 49 h), 19.3 GB",
    ),
    "mask_rcnn_vitae_s_100ep": Row(
        "45.6/40.1", 47.72, "ViTDet-ViTAE-Small-100e.py", (backbone(vitae_s),),
        "ViTAE-S.pth.tar (ImageNet-1K, the averaged weights in it)",
        "0.02 M of the parameters are random features that are never trained; 0.645 s an iteration "
        "(183228 x 0.645 s = 33 h), 23.7 GB. The published config counts 12 layers for the lr "
        "decay, which gives the last three cells 1.43, 2.04 and 2.92 times the full rate. The log "
        "of the run behind the row (logs/ViTAE-S-GPU.log.json) counts 17 = 3 + 14 cells, and so "
        "does this recipe; for the config's rates add optimizer.num_layers=12",
    ),
    # its to-do list, of which nothing was published
    "cascade_mask_rcnn_vit_b_100ep": Row(
        "", 148.83, '"tune the models for Cascade RCNN"', (cascaded,),
        note="detectron2's recipe of the same heads has 54.0/46.7",
    ),
    "mask_rcnn_vit_b_conv_100ep": Row(
        "", 126.19, '"conv blocks for global information"', (convolutions("bottleneck"),),
        note="ViTDet (arXiv 2203.16527), Table 8a, without relative positions: four global blocks "
        "51.2/45.5, four bottleneck blocks 51.0/45.3",
    ),
    "mask_rcnn_vit_b_lvis_100ep": Row(
        "", 124.61, '"train ViT models for the LVIS dataset"',
        (lvis, rates(lr=2e-4), LVIS_100, training(checkpoint_every=5000 * 64)),
        note="length and lr of detectron2's recipe for LVIS, which has 40.2/38.2",
    ),
    "mask_rcnn_vitae_b_vitdet_100ep": Row(
        "", 116.66, '"train ViTAE with the ViTDet framework"', (as_vitdet, backbone(vitae_b)),
        "mae_vitae_b.pth", "all but the backbone is COCO/mask_rcnn_vitdet_b_100ep.py's",
    ),
}  # fmt: skip
recipes = Recipes(ROWS, "vitae", globals())
