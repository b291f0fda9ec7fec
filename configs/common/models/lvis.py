"""What LVIS v1 changes in the heads: 1203 classes, federated loss, more and weaker detections.

Federated loss: "Probabilistic two-stage detection" (arXiv 2103.07461), sigmoid cross entropy over
the classes present and up to 50 drawn ones, drawn with probability (images of the class) ** 0.5.
"""

from copy import deepcopy

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from vitdet.data.datasets import federated_loss_weights


def lvis_heads(roi_heads: DictConfig) -> DictConfig:
    """Return `roi_heads` (standard or cascade) for the 1203 classes of LVIS v1."""
    heads = deepcopy(roi_heads)
    heads.num_classes = 1203
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        predictor.test_score_thresh = 0.02
        predictor.test_topk_per_image = 300
        predictor.use_sigmoid_ce = True
        predictor.use_fed_loss = True
        predictor.get_fed_loss_cls_weights = L(federated_loss_weights)(
            dataset="lvis_v1_train", freq_power=0.5
        )
    return heads
