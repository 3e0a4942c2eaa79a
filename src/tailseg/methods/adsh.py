"""Adsh: cross pseudo supervision behind thresholds that let the same share of every class pass.

Paper: L.-Z. Guo, Y.-F. Li, "Class-Imbalanced Semi-Supervised Learning with Adaptive Thresholding", ICML 2022,
    https://proceedings.mlr.press/v162/guo22e.html
Family: pseudo-labels
Needs: two networks
Cost: x4.0
Idea: one confidence threshold for all classes lets hardly any pseudo-label of a rare class pass. A fixed threshold tells
    which share rho of the most frequent class passes, and each class gets the threshold that the same share of it passes.
Algorithm:
    t_A = t_B = 0; R_A, R_B = empty banks of `bank` softmax maps
    each step, with N in {A, B}, z_N = N([x_l; x_u]), pi_N = softmax z_N, p_N = argmax z_N:
        if R_N has room: add pi_N_u
        else: from all voxels of R_N, n_k = #{argmax = k}, M = argmax n, rho = #{R_M > tau_1} / n_M
            t_N,k = entry int(rho n_k) of R_N,k in descending order;  empty R_N
        G_N,k(v) = 1[pi_N,k(v) > t_N,k]
        sup = DC(z_A_l, y) + DC(z_B_l, y)
        cps = CE(z_A * G_B, p_B) + CE(z_B * G_A, p_A), the mask multiplying the logits
        loss = sup + lambda(t) cps
    variant=faithful: t_N,k = entry int(rho n_k) - 1 of the confidences of voxels with argmax k, from tau_1 on;
        cps = mean over all voxels of m_B CE(z_A, p_B) + m_A CE(z_B, p_A), m_N = 1[max pi_N >= t_N[p_N]]
    predict softmax of the mean logit of A and B
Constants: code/train_adsh.py, github.com/xmed-lab/DHC, whose bank is a quarter of the unlabelled scans (Synapse 10 and 20 %:
    4, 40 %: 3; AMOS 2, 5, 10 %: 53, 51, 48). The paper has majority_threshold=0.95 and takes all unlabelled scans.
Deviations: the bank counts probabilities on a grid instead of holding maps of gigabytes, which moves a threshold t by at
    most sqrt(t) / 32768 <= 3.1e-5; n, rho and the ranks stay exact. Where rho n_k is the number of all voxels the code fails,
    and here the last one is taken. The rest of the default is the code's, which masks logits, ranks a class among
    all voxels and counts the slots that the batches leave empty as background (in the 51 of AMOS one of them);
    empty_slots=ignore does not. variant=faithful masks the loss and ranks the voxels predicted as the class, as the paper does;
    there a class keeps its threshold when nothing was predicted as it, and rank -1 means the first. A bank smaller
    than the unlabelled patches of a step takes them all the same. It is no class weighter: it masks, voxel by voxel.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, dice_ce, log_softmax, masked_cross_entropy
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import num_ranks, sum_over_ranks
from tailseg.parts.two_networks import mean_and_each

# deviation: the code keeps whole softmax maps. The grid is even in the square root: finer where a class is improbable
STEPS = 2**15
LEVELS = STEPS + 1


def grid_index(probs: Tensor) -> Tensor:
    """int64 index of the grid's value nearest to each probability (nearest by square root)."""
    return (probs.sqrt() * STEPS).round().nan_to_num().long()  # a diverged network fails by its loss, not by an index


def grid_values(device: torch.device | None = None) -> Tensor:
    """(LEVELS,) probabilities of the grid, ascending from 0 to 1."""
    return (torch.arange(LEVELS, device=device) / STEPS) ** 2


def shared_ranks(predicted: Tensor, sure: Tensor) -> Tensor:
    """(K,) int64 int(rho n_k): how many voxels of each class pass when all pass at the rate of the most frequent class.

    predicted: (K,) int64 n, voxels by argmax. sure: (K,) int64 voxels whose probability of k exceeds the majority threshold.
    """
    majority = predicted.argmax(0, keepdim=True)  # (1,): to index by a tensor without axes is to wait for its value
    # in integers: the code's float32 ratio, with 1e-8 added above and below the line, rounds at millions of voxels
    return sure[majority] * predicted // predicted[majority].clamp_min(1)


def ranked_values(histogram: Tensor, ranks: Tensor, values: Tensor) -> Tensor:
    """(K,) entry number ranks[k] (from 0, at most the last) of each class's values in descending order.

    histogram: (K, L) int64 how often class k has values[l]. ranks: (K,) int64. values: (L,) ascending.
    """
    last = histogram.sum(1) - 1  # deviation: where a rank is beyond it, the code fails
    at_least = histogram.flip(1).cumsum(1)  # (K, L) number of entries not below the value, largest value first
    position = (at_least <= ranks.minimum(last).clamp_min(0).unsqueeze(1)).sum(1)
    return values.flip(0)[position.clamp_max(len(values) - 1)]


@final
class Adsh(Method):
    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cps_weight: float = 0.1,
        ramp: Unit = "epoch",
        variant: Literal["official", "faithful"] = "official",
        majority_threshold: float = 0.9,
        bank: int = 4,
        empty_slots: Literal["count", "ignore"] = "count",
    ) -> None:
        super().__init__(task)
        self.net_a, self.net_b = build(init="kaiming"), build(init="xavier")
        self.cps_weight = cps_weight
        self.ramp: Unit = ramp
        self.official = variant == "official"
        self.majority_threshold, self.bank = majority_threshold, bank
        self.count_empty = self.official and empty_slots == "count"
        k = task.num_classes
        self.thresholds: Tensor
        self.histogram: Tensor
        self.predicted: Tensor
        self.sure: Tensor
        self.filled: Tensor
        # rows: A, B
        self.register_buffer("thresholds", torch.full((2, k), 0.0 if self.official else majority_threshold))
        self.register_buffer("histogram", torch.zeros(2, k, LEVELS, dtype=torch.int64))
        self.register_buffer("predicted", torch.zeros(2, k, dtype=torch.int64))
        self.register_buffer("sure", torch.zeros(2, k, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # patches in the bank

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n = batch.x, len(batch.x_l)
        logits_a, logits_b = self.net_a(x).logits, self.net_b(x).logits  # (B_l + B_u, K, *S)
        log_probs_a, log_probs_b = log_softmax(logits_a), log_softmax(logits_b)
        pseudo_a, pseudo_b = logits_a.argmax(1), logits_b.argmax(1)  # (B_l + B_u, *S)
        probs_a, probs_b = log_probs_a.detach().exp(), log_probs_b.detach().exp()
        self._fill_or_renew([probs_a[n:], probs_b[n:]], [pseudo_a[n:], pseudo_b[n:]])
        t_a, t_b = self.thresholds.clone().unbind()

        sup = dice_ce(log_probs_a[:n], batch.y_l) + dice_ce(log_probs_b[:n], batch.y_l)
        if self.official:
            mask_a, mask_b = self._class_mask(probs_a, t_a), self._class_mask(probs_b, t_b)  # (B_l + B_u, K, *S)
            # quirk: a masked logit is 0 and takes part in the softmax, so a negative one rises
            cps = cross_entropy(log_softmax(logits_a * mask_b), pseudo_b)
            cps = cps + cross_entropy(log_softmax(logits_b * mask_a), pseudo_a)
        else:
            mask_a, mask_b = probs_a.amax(1) >= t_a[pseudo_a], probs_b.amax(1) >= t_b[pseudo_b]  # (B_l + B_u, *S)
            cps = masked_cross_entropy(log_probs_a, pseudo_b, mask_b)
            cps = cps + masked_cross_entropy(log_probs_b, pseudo_a, mask_a)
        weight = self.cps_weight * ramp_up(progress, self.ramp)
        k = self.task.num_classes
        return StepOutput(
            losses={"sup": sup, "cps": weight * cps},
            predicted=count_classes(pseudo_a, k) + count_classes(pseudo_b, k),
            logs={
                "agreement": (pseudo_a == pseudo_b).float().mean(),
                "kept_a": mask_a.float().mean(),
                "kept_b": mask_b.float().mean(),
                "thresholds_a": t_a,
                "thresholds_b": t_b,
            },
        )

    @staticmethod
    def _class_mask(probs: Tensor, thresholds: Tensor) -> Tensor:
        """(B, K, *S) bool: where each class is more probable than its threshold."""
        return probs > thresholds.reshape(1, -1, *(1,) * (probs.dim() - 2))

    def _fill_or_renew(self, probs: list[Tensor], pseudo_labels: list[Tensor]) -> None:
        """Add each network's (of A and B) unlabelled patches to its bank, or make thresholds of a full bank and empty it.

        Which of the two is decided on the device, and both are computed, for a step never waits for the host.
        """
        patches = len(probs[0]) * num_ranks()
        if patches == 0:  # nothing to fill the banks with, so the thresholds stay
            return
        room = (self.filled == 0) | (self.filled + patches <= self.bank)
        renewed = [self._thresholds(network, probs[0][0, 0].numel()) for network in range(2)]
        self.thresholds.copy_(torch.where(room, self.thresholds, torch.stack(renewed)))
        k = self.task.num_classes
        counts = (
            (self.histogram, [self._count_levels(*each) for each in zip(probs, pseudo_labels, strict=True)]),
            (self.predicted, [count_classes(labels, k) for labels in pseudo_labels]),
            (self.sure, [(each > self.majority_threshold).transpose(0, 1).flatten(1).sum(1) for each in probs]),
        )
        for statistic, seen in counts:
            statistic.copy_((statistic + sum_over_ranks(torch.stack(seen))) * room)
        self.filled.copy_((self.filled + patches) * room)

    def _count_levels(self, probs: Tensor, pseudo_labels: Tensor) -> Tensor:
        """(K, LEVELS) int64 voxels at each level of the grid; faithful: only of the predicted class's probability."""
        if self.official:  # class by class, for less memory at once
            levels = [grid_index(each).flatten() for each in probs.unbind(1)]
            return torch.stack([each.new_zeros(LEVELS).scatter_add_(0, each, torch.ones_like(each)) for each in levels])
        level = (pseudo_labels * LEVELS + grid_index(probs.amax(1))).flatten()
        counts = level.new_zeros(self.task.num_classes * LEVELS)
        return counts.scatter_add_(0, level, torch.ones_like(level)).view(-1, LEVELS)

    def _thresholds(self, network: int, voxels_per_patch: int) -> Tensor:
        """(K,) from what is in the bank of network 0 (A) or 1 (B)."""
        histogram, predicted = self.histogram[network], self.predicted[network]
        if self.count_empty:
            # quirk: slots that no patch came to hold zeros, whose argmax is the background
            empty = (self.bank - self.filled).clamp_min(0) * voxels_per_patch
            histogram, predicted = histogram.clone(), predicted.clone()
            histogram[:, 0] += empty
            predicted[0] += empty
        ranks = shared_ranks(predicted, self.sure[network])
        if self.official:
            return ranked_values(histogram, ranks, grid_values(histogram.device))
        values = ranked_values(histogram, ranks - 1, grid_values(histogram.device))
        return torch.where(predicted > 0, values, self.thresholds[network])

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax((self.net_a(x).logits.float() + self.net_b(x).logits.float()) / 2, 1)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return mean_and_each(self.net_a(x).logits, self.net_b(x).logits)
