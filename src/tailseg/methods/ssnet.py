"""SS-Net: predictions smooth against adversarial noise, classes separated by a memory of good features.

Paper: Y. Wu, Z. Wu, Q. Wu, Z. Ge, J. Cai, "Exploring Smoothness and Class-Separation for Semi-supervised Medical Image
    Segmentation", MICCAI 2022, https://arxiv.org/abs/2203.01324
Family: contrast
Needs: nothing but one network
Cost: x6.3
Idea: The prediction of every image is kept under the small change of the image that would alter it most (one step of virtual
    adversarial training). The features of every voxel are pulled to a few well recognised features of its class.
Algorithm:
    z, h = f([x_l; x_u]);  p = softmax z
    of the correctly predicted foreground voxels of x_l, per class c: M_c <- the 32 projections P(h) that S_c ranks lowest
    C(h, labels) = 1/K sum over c of mean over voxels i of c, j of a_i (1 - cos(u_i, M_c[j])), where
        u = Q(P(h)) and a_i = sigmoid(S_c(u_i)), divided by its mean over c
    d <- unit vector of noise;  g = gradient in d of Dice(f(x + 10 d), p);  d <- g / |g|
    L_lds = Dice(f(x + 10 d), p)
    L = Dice(p[l], y) + lambda(t) [L_lds + 0.1 (C(h[l], y) + C(h[u], argmax p[u]))]
    predict: softmax z
Constants: github.com/xmed-lab/DHC, train_ssnet.py (the authors' own code weighs lambda by 1.0 and takes epsilon 6)
Deviations: h is taken before the network's last dropout, which belongs to its head here; the authors take it after. There is
    no selector of memory features: its weights cancel in the authors' code. Class selectors keep no running statistics, which
    nothing reads; under several processes they normalise over all of them. Means over i and j are rearranged, not changed.
    The memory keeps the lowest ranked features as the authors' code does; memory_rank=highest is the paper's text.
    with_ce=true adds the cross-entropy that the code computes and drops. All voxels go through P, Q and S as in the code
    (several GiB on large patches); voxels=<number> takes so many random ones of either half instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tailseg.core import IGNORE, Batch, BuildNetwork, Method, Progress, StepOutput, Task, Unit
from tailseg.parts.counts import count_classes, sum_per_class
from tailseg.parts.losses import cross_entropy, log_softmax
from tailseg.parts.ramps import ramp_up
from tailseg.parts.ranks import gather_over_ranks, sum_over_ranks


@final
class SSNet(Method):
    """consistency_weight: lambda at the end. ramp: what it grows with. contrast_weight: of the two contrasts beside the
    smoothness. xi: length of the noise that finds the direction. epsilon: length of the change in it.
    memory_size: features kept of each class. memory_rank: which ones by the score of the class's selector. with_ce: adds the
    cross-entropy with the labels. voxels: random voxels of either half that the contrast takes; null takes all.
    """

    memory: Tensor  # (K, M, E) projected features, the first memory_count[c] of class c are set
    memory_count: Tensor  # (K,) int64

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        consistency_weight: float = 0.1,
        ramp: Unit = "epoch",
        contrast_weight: float = 0.1,
        xi: float = 10.0,
        epsilon: float = 10.0,
        memory_size: int = 32,
        memory_rank: Literal["lowest", "highest"] = "lowest",
        with_ce: bool = False,
        voxels: int | None = None,
    ) -> None:
        super().__init__(task)
        if voxels is not None and voxels < 2:
            raise ValueError(f"voxels is {voxels}; batch normalisation needs 2 or more, null takes all.")
        self.net = build(init="default")
        features = 2 * self.net.embedding_channels
        self.projection = _mlp(self.net.embedding_channels, features)  # P
        self.prediction = _mlp(features, features)  # Q
        self.selectors = ClassSelectors(task.num_classes, features)  # S
        self.register_buffer("memory", torch.zeros(task.num_classes, memory_size, features))
        self.register_buffer("memory_count", torch.zeros(task.num_classes, dtype=torch.int64))
        self.consistency_weight, self.contrast_weight = consistency_weight, contrast_weight
        self.ramp: Unit = ramp
        self.xi, self.epsilon = xi, epsilon
        self.sign = 1.0 if memory_rank == "lowest" else -1.0
        self.with_ce = with_ce
        self.voxels = voxels

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, n, k = batch.x, len(batch.x_l), self.task.num_classes
        out = self.net(x)
        log_probs = log_softmax(out.logits)
        labels = out.logits.argmax(1)  # (B_l + B_u, *S)
        sup = dice_to_labels(log_probs[:n], batch.y_l)
        if self.with_ce:
            sup = sup + cross_entropy(log_probs[:n], batch.y_l)

        correct = (labels[:n] == batch.y_l) & (labels[:n] > 0)
        h_l, y_l, good = self._some(out.embedding[:n], batch.y_l, batch.y_l.where(correct, IGNORE))
        h_u, y_u = self._some(out.embedding[n:], labels[n:])
        self.remember(h_l, good)
        contrast = self.contrast(h_l, y_l) + self.contrast(h_u, y_u)
        weight = self.consistency_weight * ramp_up(progress, self.ramp)
        return StepOutput(
            losses={
                "sup": sup,
                "smooth": weight * self.smoothness(x),
                "contrast": weight * self.contrast_weight * contrast,
            },
            predicted=count_classes(labels, k),
            logs={"correct": correct.float().mean(), "memory": self.memory_count.float()},
        )

    def _some(self, embedding: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        """Features (N, E) and labels of all voxels (B, *S), or of `voxels` random ones (1, N)."""
        h = embedding.movedim(1, -1).flatten(0, -2)
        if self.voxels is None or self.voxels >= len(h):
            return h, *labels
        chosen = torch.randperm(len(h), device=h.device)[: self.voxels]
        return h[chosen], *(values.flatten()[chosen].unsqueeze(0) for values in labels)

    @torch.no_grad()
    def remember(self, h: Tensor, labels: Tensor) -> None:
        """Replace the memory of every class in labels (B, *S) by the best ranked of its features h (N, E), N = B |S|."""
        k, size = self.memory.shape[:2]
        self.projection.eval()  # running statistics here, as in the authors' code
        features = self.projection(h).float()  # (N, 2 E)
        self.projection.train(self.training)
        scores = self.sign * self.selectors(features, labels.flatten())  # (N,)

        order = scores.argsort()
        order = order[labels.flatten()[order].argsort(stable=True)]  # by class, within it by score; IGNORE last
        counts = count_classes(labels, k)
        rank = torch.arange(size, device=h.device)
        held = rank < counts.unsqueeze(1)  # (K, M)
        chosen = order[((counts.cumsum(0) - counts).unsqueeze(1) + rank).clamp(max=len(order) - 1)]
        candidates = features[chosen].masked_fill(~held.unsqueeze(2), 0.0)  # (K, M, 2 E)

        # the best of all ranks' best, so that every rank holds the same memory
        scores = gather_over_ranks(scores[chosen].masked_fill(~held, torch.inf).unsqueeze(0))
        best = scores.transpose(0, 1).flatten(1).argsort(dim=1, stable=True)[:, :size]
        candidates = gather_over_ranks(candidates.unsqueeze(0)).transpose(0, 1).flatten(1, 2)
        counts = gather_over_ranks(counts.unsqueeze(0)).sum(0)
        seen = counts > 0
        fresh = candidates.take_along_dim(best.unsqueeze(2), 1)
        self.memory = fresh.where(seen.view(-1, 1, 1), self.memory)
        self.memory_count = counts.clamp(max=size).where(seen, self.memory_count)

    def contrast(self, h: Tensor, labels: Tensor) -> Tensor:
        """C of the features h (N, E) of voxels with labels (B, *S). A class with one of them, or one memory, adds 0."""
        k = self.task.num_classes
        if not len(h):  # batch normalisation refuses to see nothing
            return h.new_zeros(())
        u = self.prediction(self.projection(h)).float()  # (N, 2 E)
        # the mean of 1 - cos(u, m_j) over j is 1 - u . (mean of m_j), vectors of length 1
        centres = F.normalize(self.memory, dim=2).sum(1) / self.memory_count.clamp_min(1).unsqueeze(1)  # (K, 2 E)
        distance = 1 - (F.normalize(u, dim=1) * centres[labels.flatten().clamp(max=k - 1)]).sum(1)
        attention = self.selectors(u.detach(), labels.flatten()).sigmoid()
        near = sum_per_class((attention * distance).view_as(labels), labels, k)
        total = sum_per_class(attention.view_as(labels), labels, k)
        near, total, counts = sum_over_ranks(torch.stack([near, total, count_classes(labels, k).float()])).unbind()
        used = (counts >= 2) & (self.memory_count >= 2)
        # the mean over i of a_i / mean(a) d_ij
        return (near / total.where(total > 0, 1.0)).where(used, 0.0).sum() / k

    def smoothness(self, x: Tensor) -> Tensor:
        """L_lds: minus the Dice between the predictions of each image and of the small change that harms it most."""
        with torch.no_grad():
            probs = log_softmax(self.net(x).logits).exp()
        with frozen_statistics(self.net):
            d = unit(torch.rand_like(x) - 0.5).requires_grad_()
            # a factor that half precision needs: the gradient of a mean over a million voxels would vanish in it
            voxels = probs[:, 0].numel()
            loss = voxels * dice_to_probs(log_softmax(self.net(x + self.xi * d).logits), probs)
            (gradient,) = torch.autograd.grad(loss, d)  # of d alone: no parameter's gradient changes
            d = unit(gradient / voxels)
            return dice_to_probs(log_softmax(self.net(x + self.epsilon * d).logits), probs)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)


class ClassSelectors(nn.Module):
    """For every class c a small network S_c that scores features: linear, batch norm, leaky ReLU, linear.

    The features of a class are normalised over that class, on all ranks together. Weights of all classes are stacked and
    features are sorted into blocks of one class each, so that the work does not grow with K and no size depends on labels.
    """

    def __init__(self, num_classes: int, features: int, *, block: int = 1024) -> None:
        super().__init__()
        k, bound = num_classes, features**-0.5  # torch's start of a linear layer
        self.weight = nn.Parameter(torch.empty(k, features, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(k, 1, features).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.ones(k, 1, features))
        self.shift = nn.Parameter(torch.zeros(k, 1, features))
        self.out_weight = nn.Parameter(torch.empty(k, features, 1).uniform_(-bound, bound))
        self.out_bias = nn.Parameter(torch.empty(k, 1, 1).uniform_(-bound, bound))
        self.block = block

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """(N,) scores of features (N, E) by the selectors of their labels (N,); those of IGNORE mean nothing."""
        slots, owners = blocks_by_class(labels, len(self.weight), self.block)
        shape = (len(owners), self.block)
        table = features.new_zeros(len(owners) * self.block, features.shape[1]).index_copy(0, slots, features)
        filled = features.new_zeros(len(owners) * self.block).index_fill(0, slots, 1.0).view(*shape, 1)
        c = owners.clamp(max=len(self.weight) - 1)
        hidden = torch.baddbmm(self.bias[c], table.view(*shape, -1), self.weight[c]).float()  # (blocks, block, E)

        count = self._sum_per_class(filled, owners).clamp_min(1.0)  # (K + 1, 1, 1), the last one of IGNORE
        mean = self._sum_per_class(hidden * filled, owners) / count
        hidden = (hidden - mean[owners]) * filled
        variance = self._sum_per_class(hidden.square(), owners) / count
        hidden = hidden * (self.scale[c] * (variance[owners] + 1e-5).rsqrt()) + self.shift[c]
        scores = torch.baddbmm(self.out_bias[c], F.leaky_relu(hidden, 0.2), self.out_weight[c])
        return scores.float().flatten()[slots]

    def _sum_per_class(self, values: Tensor, owners: Tensor) -> Tensor:
        """(K + 1, 1, E) sums over all ranks of values (blocks, block, E)."""
        sums = values.new_zeros(len(self.weight) + 1, 1, values.shape[2])
        return sum_over_ranks(sums.index_add(0, owners, values.sum(1, keepdim=True)))


def blocks_by_class(labels: Tensor, num_classes: int, block: int) -> tuple[Tensor, Tensor]:
    """A table of blocks of slots, each for one class, with room for labels (N,) however they fall.

    Returns the slot of every label, (N,), and the class of every block, (N // block + K + 1,); IGNORE is class K here.
    """
    bins = labels.clamp(max=num_classes)
    order = bins.argsort(stable=True)
    ordered = bins[order]
    classes = torch.arange(num_classes + 1, device=labels.device)
    starts, ends = torch.searchsorted(ordered, classes), torch.searchsorted(ordered, classes, right=True)
    blocks = (ends - starts + block - 1) // block
    last_blocks = blocks.cumsum(0)
    places = torch.arange(len(labels), device=labels.device) - starts[ordered]
    slots = torch.empty_like(order).scatter_(0, order, (last_blocks - blocks)[ordered] * block + places)
    every_block = torch.arange(len(labels) // block + num_classes + 1, device=labels.device)
    return slots, torch.searchsorted(last_blocks, every_block, right=True).clamp(max=num_classes)


def dice_to_labels(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean Dice over all classes; log_probs: (B, K, *S), labels: (B, *S) int64."""
    k = log_probs.shape[1]
    hits = log_probs.gather(1, labels.clamp(max=k - 1).unsqueeze(1)).squeeze(1).exp()
    annotated = (labels != IGNORE).unsqueeze(1)
    mass = (log_probs.exp() * annotated).sum((0, *range(2, log_probs.dim())))
    return _dice(sum_per_class(hits, labels, k), mass + count_classes(labels, k))


def dice_to_probs(log_probs: Tensor, target: Tensor) -> Tensor:
    """Minus the mean Dice over all classes; log_probs and target probabilities: (B, K, *S)."""
    axes = (0, *range(2, log_probs.dim()))
    probs = log_probs.exp()
    return _dice((probs * target).sum(axes), (probs + target).sum(axes))


def _dice(overlap: Tensor, mass: Tensor) -> Tensor:
    overlap, mass = sum_over_ranks(torch.stack([overlap, mass])).unbind()  # (K,) each
    return -((2 * overlap + 1e-8) / (mass + 2e-8)).mean()


def unit(d: Tensor) -> Tensor:
    """Each sample of d (B, C, *S) scaled to length 1."""
    return d / (d.flatten(1).norm(dim=1) + 1e-8).view(-1, *[1] * (d.dim() - 1))


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Batch normalisation goes on with the statistics of the batch, but leaves its running ones alone."""
    tracking = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def _mlp(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.BatchNorm1d(c_out), nn.ReLU(inplace=True), nn.Linear(c_out, c_out))
