"""How a student learns: from a frozen ensemble, from peers that learn with it, or from labels.

A method has a `loss(shown)`, which gets tensors, never models; with teachers also a `reduction` of
their logits to what the loss needs; with peers a `learner`, which holds them.  One file each, and
one word here: the union is the registry.
"""

from kd.methods.afd import AFD
from kd.methods.annealed import AnnealedKD
from kd.methods.boc import BOC
from kd.methods.codistillation import Codistillation
from kd.methods.continuation import ContinuationKD
from kd.methods.custom import CustomMethod
from kd.methods.dist import DIST
from kd.methods.dkd import DKD
from kd.methods.dml import DML
from kd.methods.ffl import FFL
from kd.methods.gated import Gated
from kd.methods.kd import KD
from kd.methods.labels import Labels
from kd.methods.learner import Frozen, Learner, decay_at
from kd.methods.learning import Learning
from kd.methods.losses import hard_loss, label_probs, soft_loss
from kd.methods.mixing import AllLogits, SoftTargets, mix
from kd.methods.mlkd import MLKD
from kd.methods.okddip import OKDDip
from kd.methods.own_mean import OwnMean
from kd.methods.prokd import ProKD
from kd.methods.prokt import ProKT
from kd.methods.shown import Members, Mixing, Reduction, Shown
from kd.methods.surround import surrounded
from kd.methods.taught import SoftMethod, Taught
from kd.methods.virtual_teacher import VirtualTeacher

TaughtMethod = KD | DKD | DIST | MLKD | AnnealedKD | ContinuationKD | Gated
"""Need a frozen ensemble."""
LoneMethod = Labels | VirtualTeacher | OwnMean
"""Need no other network."""
PeerMethod = ProKT | ProKD | DML | Codistillation | OKDDip | FFL | AFD | BOC
"""Need networks that train along with the student."""
Method = TaughtMethod | LoneMethod | PeerMethod | CustomMethod

__all__ = [
    "AFD",
    "BOC",
    "DIST",
    "DKD",
    "DML",
    "FFL",
    "KD",
    "MLKD",
    "AllLogits",
    "AnnealedKD",
    "Codistillation",
    "ContinuationKD",
    "CustomMethod",
    "Frozen",
    "Gated",
    "Labels",
    "Learner",
    "Learning",
    "Members",
    "Method",
    "Mixing",
    "OKDDip",
    "OwnMean",
    "ProKD",
    "ProKT",
    "Reduction",
    "Shown",
    "SoftMethod",
    "SoftTargets",
    "Taught",
    "VirtualTeacher",
    "decay_at",
    "hard_loss",
    "label_probs",
    "mix",
    "soft_loss",
    "surrounded",
]
