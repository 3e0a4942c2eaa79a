"""Hard labels made by a network, and where it is sure enough of them."""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor

from tailseg.parts.mixing import paste


def likeliest(logits: Tensor) -> Tensor:
    """(B, *S) int64 the class of the largest of logits, probabilities or their logarithms (B, K, *S); of equals, the first."""
    return logits.detach().max(1).indices  # argmax takes fourteen times as long on a CPU, where the classes lie apart


class PseudoLabels(NamedTuple):
    """labels: (B, *S) int64. kept: (B, *S) bool, where they count."""

    labels: Tensor
    kept: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, tau: float) -> Self:
        """The likeliest classes of log-probabilities (B, K, *S); kept where their probability is at least tau."""
        confidence, labels = log_probs.detach().max(1)
        return cls(labels, confidence.exp() >= tau)

    def paste(self, inside: PseudoLabels, boxes: Tensor) -> PseudoLabels:
        """Those of `inside` in the boxes (B, *S), these elsewhere."""
        return PseudoLabels(paste(inside.labels, self.labels, boxes), paste(inside.kept, self.kept, boxes))
