"""AFD: online adversarial feature distillation (Chung et al., ICML 2020, arXiv 2002.01775).

M networks (the student first), B batch, C classes, D features.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kd.component import component, require
from kd.methods.learner import Answer, Cohort, last_linear
from kd.methods.losses import wide
from kd.methods.peers import Together, hard_losses, pulled
from kd.methods.shown import Members, Shown


class JudgedCohort(Cohort):
    """Networks in a ring, each with a critic that tells its features from its neighbour's."""

    def __init__(self, student: nn.Module, peers: Sequence[nn.Module], width: int) -> None:
        super().__init__(student, peers)
        self.width = width
        sizes = [last_linear(network).in_features for network in self.networks]
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) for _ in sizes
        )
        self.transfers = nn.ModuleList(nn.Linear(size, width) for size in sizes)

    def answer(self, images: Tensor) -> Answer:
        """All networks' logits, and the critics' outputs (M, B).

        `own` and `neighbour` train only the critics, since the features are detached; `fooled`
        trains only the networks, since the critics' parameters are.
        """
        logits_MBC, seen = self.answer_with_features(images)
        features = [
            F.layer_norm(wide(transfer(features_BD)), (self.width,))
            for transfer, features_BD in zip(self.transfers, seen, strict=True)
        ]
        own, neighbour, fooled = [], [], []
        for k, critic in enumerate(self.critics):
            own.append(critic(features[k].detach()))
            neighbour.append(critic(features[k - 1].detach()))
            held = {name: tensor.detach() for name, tensor in critic.named_parameters()}
            fooled.append(functional_call(critic, held, (features[k],)))
        said = {"own": own, "neighbour": neighbour, "fooled": fooled}
        judged = {f"{name}_MB": wide(torch.cat(each, dim=1)).T for name, each in said.items()}
        return logits_MBC[0], {"logits_MBC": logits_MBC, **judged}


@component
class AFD(Together):
    """Hard loss + T^2 KL(neighbour || own) + weight * (1 - critic(own features))^2, for each.

    A critic learns to output 1 for the neighbour's features and 0 for its own network's (least
    squares).  Network k learns from k - 1, the first from the last.  Critics see the features
    before the last layer, normalised (training diverged without), and one optimiser updates all
    parameters; the paper has feature maps and several optimisers: our interpretation.
    """

    kind: Literal["afd"] = "afd"
    temperature: float = 3.0
    """Divides the logits before the softmax, above 0."""
    weight: float = 0.1
    """Weight of the adversarial losses, at least 0."""
    width: int = 64
    """Number of features that critics see, at least 1."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(self.width >= 1, "width", self.width, "at least 1")

    def learner(
        self, student: nn.Module, peers: Sequence[nn.Module], members: Members | None = None
    ) -> nn.Module:
        """The cohort and its critics."""
        return JudgedCohort(student, peers, self.width)

    def loss(self, shown: Shown) -> Tensor:
        """The sum of all networks' losses and all critics'."""
        logits_MBC, also = shown.also["logits_MBC"], shown.also
        soft = [
            pulled(own_BC, logits_MBC[k - 1], self.temperature)
            for k, own_BC in enumerate(logits_MBC)
        ]
        critics = (1 - also["neighbour_MB"]).square() + also["own_MB"].square()
        fooling = (1 - also["fooled_MB"]).square()
        adversarial = (critics + fooling).mean(dim=1).sum()
        hard = hard_losses(logits_MBC, shown)
        return hard + torch.stack(soft).sum() + self.weight * adversarial
