"""Base classes of the methods with teachers: soft targets, their mixing, and the loss.

B batch, K members, C classes, S temperatures, R entries of a row.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kd.component import ConfigError, component, require
from kd.methods.learning import Learning, Needs
from kd.methods.losses import hard_loss, log_probs, wide
from kd.methods.mixing import AllLogits, SoftTargets, combined, soft_targets, standardized
from kd.methods.shown import Members, Shown
from kd.methods.trust import ByImage, ByStudent, Trust


@component
class Taught(Learning):
    """scale * (share * soft loss + (1 - share) * hard loss); subclasses define soft and share."""

    scale: float = 1.0
    """Multiplies the whole loss, above 0.  Papers that simply add the two terms correspond to
    alpha 0.5 and scale 2."""
    standardize: bool = False
    """Standardise the logits of student and teachers to mean 0 and deviation 1 before the softmax
    (Sun et al., CVPR 2024); needs at least three classes."""
    trust: Trust | None = None
    """How much each teacher counts for each image, times its ensemble weight; null: the same for
    every image."""

    needs: ClassVar[Needs] = "teachers"

    def __post_init__(self) -> None:
        require(self.scale > 0, "scale", self.scale, "above 0")

    @property
    def by_image(self) -> bool:
        """See `Learning`; false as well if the trust compares images of a batch."""
        return self.alone and (self.trust is None or self.trust.alone)

    @property
    @abstractmethod
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures of the soft targets; the soft losses are averaged over them."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""

    def labels_alone(self, progress: float) -> bool:
        """If the soft loss has no weight."""
        return self.share(progress) == 0

    @abstractmethod
    def soft(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The soft loss of each image (B,); terms that compare images are added to all equally.

        Args:
            logits_BC: The student's logits, standardised if `standardize`.
            soft_log_probs_BC: Log of the soft targets, which are already at `temperature`.
            temperature: T, one of `temperatures`.
            shown: The whole batch.
        """

    def reduction(self, members: Members) -> SoftTargets | AllLogits:
        """How the members' logits are reduced for `loss`."""
        if isinstance(self.trust, ByStudent):
            return AllLogits()
        return SoftTargets(
            members.weights_K, self.temperatures, members.mixing, self.standardize, self.trust
        )

    def loss(self, shown: Shown) -> Tensor:
        """The loss of a batch, a scalar."""
        # Autocast would compute matrix products of probabilities and gradients in half precision.
        with torch.autocast(shown.logits_BC.device.type, enabled=False):
            return self.exact_loss(shown)

    def exact_loss(self, shown: Shown) -> Tensor:
        """The loss in at least float32."""
        share, given = self.share(shown.progress), (shown.label_probs_BC, shown.labelled)
        if share == 0:  # the teachers were not evaluated
            return self.scale * hard_loss(shown.logits_BC, *given)
        logits_BC = standardized(shown.logits_BC) if self.standardize else shown.logits_BC
        soft_SBC, emphasis_B = self.targets(logits_BC, shown)
        pairs = zip(soft_SBC, self.temperatures, strict=True)
        soft_SB = torch.stack([self.by_images(logits_BC, *each, shown) for each in pairs])
        soft = (emphasis_B * soft_SB).mean()
        hard = hard_loss(shown.logits_BC, *given)
        return self.scale * (share * soft + (1 - share) * hard)

    def by_images(
        self, logits_BC: Tensor, soft_log_probs_BC: Tensor, temperature: float, shown: Shown
    ) -> Tensor:
        """The result of `soft`, checked to be a loss for each image (B,).

        Raises:
            ConfigError: it is no tensor, has another shape, which would be broadcast, or has no
                gradient, so that the student would learn from labels alone.
        """
        soft_B = self.soft(logits_BC, soft_log_probs_BC, temperature, shown)
        found = tuple(soft_B.shape) if isinstance(soft_B, Tensor) else type(soft_B).__name__
        if found != (len(logits_BC),):
            raise ConfigError(
                f"{type(self).__name__}.soft returned {found} for logits of shape "
                f"{tuple(logits_BC.shape)}; it must return a loss for each image, of shape "
                f"{(len(logits_BC),)}"
            )
        if logits_BC.requires_grad and torch.is_grad_enabled() and not soft_B.requires_grad:
            raise ConfigError(
                f"{type(self).__name__}.soft returned a loss without a gradient; it must be "
                "computed from logits_BC, without detach() or argmax"
            )
        return soft_B

    def targets(self, logits_BC: Tensor, shown: Shown) -> tuple[Tensor, Tensor]:
        """Log of the soft targets (S, B, C), and how much each image counts (B,)."""
        assert shown.rows_BR is not None
        rows_BR = wide(shown.rows_BR)
        everyone_B = rows_BR.new_ones(len(rows_BR))
        if isinstance(self.trust, ByStudent):
            return self.asked(self.trust, logits_BC, rows_BR, shown), everyone_B
        if isinstance(self.trust, ByImage) and self.trust.emphasizes:
            labelled_B = shown.label_probs_BC.sum(dim=1) > 0
            emphasis_B = evened(rows_BR[:, -1], labelled_B, self.trust.unlabelled)
            return by_slot(rows_BR[:, :-1].contiguous(), logits_BC.shape[1]), emphasis_B
        return by_slot(rows_BR, logits_BC.shape[1]), everyone_B

    def asked(self, trust: ByStudent, logits_BC: Tensor, rows_BR: Tensor, shown: Shown) -> Tensor:
        """Log of the soft targets (S, B, C) with weights that depend on the student's logits.

        Members are compared by the gradients of plain KD, whatever `soft` is: a soft loss of the
        mixture has no gradient per member.
        """
        members = shown.members
        assert members is not None
        logits_KBC, temperature = by_slot(rows_BR, logits_BC.shape[1]), self.temperatures[0]
        compared_KBC = standardized(logits_KBC) if self.standardize else logits_KBC
        student_BC = log_probs(logits_BC.detach(), temperature).exp()
        gradients_KBC = student_BC - log_probs(compared_KBC, temperature).exp()
        weights_BK = combined(trust.factors(gradients_KBC, members), members.weights_K)
        given = (weights_BK, self.temperatures, members.mixing, self.standardize)
        return soft_targets(logits_KBC, *given)


def by_slot(rows_BR: Tensor, num_classes: int) -> Tensor:
    """Rows (B, S C) as (S, B, C)."""
    return rows_BR.view(len(rows_BR), -1, num_classes).transpose(0, 1)


def evened(emphasis_B: Tensor, labelled_B: Tensor, unlabelled: float = 1.0) -> Tensor:
    """Scale emphasis to mean 1 over the labelled images, and to `unlabelled` over the others.

    The soft loss then keeps its scale as the teachers become surer, and neither group drowns
    the other.
    """
    even_B = torch.ones_like(emphasis_B)
    for group_B in (labelled_B, ~labelled_B):
        mean = (emphasis_B * group_B).sum() / group_B.sum().clamp(min=1)
        even_B = torch.where(group_B & (mean > 0), emphasis_B / mean.clamp(min=1e-30), even_B)
    return torch.where(labelled_B, even_B, unlabelled * even_B)


@component
class SoftMethod(Taught):
    """A method with one temperature and a fixed share of the soft loss, as most have."""

    temperature: float = 4.0
    """Divides the logits before the softmax, in teachers and student alike; above 0."""
    alpha: float = 0.9
    """Weight of the soft loss, in [0, 1]; the hard loss gets the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The only temperature."""
        return (self.temperature,)

    def share(self, progress: float) -> float:
        """Always alpha."""
        return self.alpha
