"""MagicNet: volumes are cut into cubes that change places between samples, and say where they came from.

Paper: D. Chen, Y. Bai, W. Shen, Q. Li, L. Yu, Y. Wang, "MagicNet: Semi-Supervised Multi-Organ Segmentation via Magic-Cube
    Partition and Recovery", CVPR 2023, https://arxiv.org/abs/2212.14310
Family: mixing
Needs: an EMA teacher (no gradients); data.patch_size in multiples of cubes times what the network divides by (48 = 3 x 16); a
    network with instance normalisation and no dropout, as the authors' (cubes and volumes would share running statistics)
Cost: x5.6
Idea: organs lie at the same place in every scan, so cubes at one location are exchanged across the batch and put back after
    the network, and single cubes must name their location. Pseudo-labels blend the teacher with the cube-wise predictions: the
    more frequent a class, the more the cubes decide.
Algorithm:
    z = f(x)
    cross-image: at each location another permutation of the samples; z_x = head(put back(embedding f(permuted x)))
    within-image: features of all single cubes; L_loc = CE(location head(bottleneck), location), of each volume's cubes together
    z_c = head(put together(embedding of the cubes))
    L_sup = [CE(z, y) + Dice(z, y) + Dice(z_x, y) + Dice(z_c, y)] / 4 on the labelled patches
    t = g(u + noise), y_t = argmax t;  r = (n / max n)^(1 / T) with n = class counts of pseudo-labels
    label = y_t in the first steps, then argmax of (1 - r[y_t]) t + r[y_t] z_c
    L_con = Dice(z_x, label) on the unlabelled patches
    L = L_sup + .1 L_loc + w L_con,  w = .1 exp(-5 (1 - t)^2), t over the run in 200 plateaus
    after the step: g <- a g + (1 - a) f, a = min(1 - 1 / (step + 1), .99); every 20 steps n = counts of these 20
Constants: train_main_btcv.py, utils/cube_losses.py and utils/cube_utils.py of github.com/DeepMed-Lab-ECNU/MagicNet (commit
    316d7ee). GA-MagicNet (ECCV 2024): losses=ga; its code also keeps ramp_steps=70000 in runs of 17000 steps.
Deviations: cubes come back to where they were cut; the authors' within-image recovery transposes them (compat_cube_order).
    The bottleneck of a cube is averaged to two voxels per axis before the location head, which changes nothing for their
    cubes of 32 voxels and makes the head independent of the patch. Cubes of all volumes go through the network as one batch,
    and the cube-wise logits of the blending are those of L_sup: equal without batch statistics and dropout.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.options import OptionError
from tailseg.parts.counts import count_classes
from tailseg.parts.cubes import cut_cubes, draw_orders, exchange, join_cubes
from tailseg.parts.gradient_aware import ga_ce, ga_dice
from tailseg.parts.losses import cross_entropy, log_softmax, soft_dice_loss
from tailseg.parts.perturb import add_noise
from tailseg.parts.ramps import gaussian_ramp
from tailseg.parts.ranks import sum_over_ranks
from tailseg.parts.teachers import Teacher


@final
class MagicNet(Method):
    """cubes: per axis. ramp_steps: length of the ramp of con_weight, None is the run. blend_after, refresh: steps.
    temperature: of the class counts. blend: what is blended."""

    counts: Tensor  # (K,) pseudo-labels of the window before, over all ranks
    window: Tensor  # (K,) pseudo-labels since then
    places: Tensor  # (cubes^d,) location label of each cube

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        cubes: int = 3,
        losses: Literal["official", "ga"] = "official",
        location_weight: float = 0.1,
        con_weight: float = 0.1,
        ramp_steps: int | None = None,
        blend: Literal["logit", "prob"] = "logit",
        blend_after: int = 100,
        refresh: int = 20,
        temperature: float = 1.0,
        decay: float = 0.99,
        compat_cube_order: bool = False,
    ) -> None:
        super().__init__(task)
        if cubes < 2:
            raise OptionError(f"method.cubes is {cubes}; a patch must be cut into at least 2 cubes per axis.")
        self.net = build(init="default")
        self.teacher = Teacher(self.net, decay=decay, warm_up="step", mode="train")
        dims, places = task.spatial_dims, cubes**task.spatial_dims
        self.location_head = _location_head(self.net.feature_channels[-1] * 2**dims, places)
        self.cubes, self.location_weight, self.con_weight, self.ramp_steps = (
            cubes,
            location_weight,
            con_weight,
            ramp_steps,
        )
        self.blend, self.blend_after, self.refresh, self.temperature = blend, blend_after, refresh, temperature
        self.compat_cube_order = compat_cube_order
        self.ce = cross_entropy if losses == "official" else partial(ga_ce, percent=10.0)
        self.dice = partial(soft_dice_loss, smooth=1e-10) if losses == "official" else ga_dice
        self.register_buffer("counts", torch.zeros(task.num_classes, dtype=torch.int64))
        self.register_buffer("window", torch.zeros(task.num_classes, dtype=torch.int64))
        # the authors number the cube (i, j, k) i + 3j + 9k and list it as 9i + 3j + k
        numbers = torch.arange(places).view((cubes,) * dims).permute(*reversed(range(dims))).flatten()
        self.register_buffer("places", numbers, persistent=False)

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        unit = self.cubes * self.net.size_divisor
        if any(side % unit for side in patch_size):
            near = [max(1, round(side / unit)) * unit for side in patch_size]
            raise ValueError(
                f"method 'magicnet' cuts patches into {self.cubes} cubes per axis, each a multiple of the network's "
                f"{self.net.size_divisor} voxels: sides of data.patch_size {list(patch_size)} must be multiples of {unit}; try "
                f"{near}, or another method.cubes."
            )
        norms = nn.InstanceNorm2d, nn.InstanceNorm3d
        if prod(patch_size) == unit ** len(patch_size) and any(isinstance(part, norms) for part in self.net.modules()):
            raise ValueError(
                f"method 'magicnet' cuts data.patch_size {list(patch_size)} into cubes of which the network's deepest stage "
                f"keeps one voxel, too few for instance normalisation; try {[2 * unit] * len(patch_size)}."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        x, y, n = batch.x, batch.y_l, len(batch.x_l)
        logits = self.net(x).logits  # (B, K, *S), B = B_l + B_u
        cubes = cut_cubes(x, self.cubes)  # (B, P, C, *S / N), P = N^d
        logits_cross = self._cross_image(cubes)
        features = self.net.encoder(cubes.flatten(0, 1))  # all volumes at once; the authors take one after the other
        location, accuracy = self._locate(features[-1].unflatten(0, cubes.shape[:2]))
        embedding = self.net.decoders[0](features).embedding.unflatten(0, cubes.shape[:2])
        # a quirk kept on request: the authors paste cube (i, j, k) where (k, j, i) was
        logits_within = self.net.head(join_cubes(embedding, self.cubes, transposed=self.compat_cube_order))

        log_probs, log_probs_cross = log_softmax(logits[:n]), log_softmax(logits_cross)
        dice = (
            self.dice(log_probs, y) + self.dice(log_probs_cross[:n], y) + self.dice(log_softmax(logits_within[:n]), y)
        )
        losses = {"sup": (self.ce(log_probs, y) + dice) / 4, "location": self.location_weight * location}
        shares = self._shares()
        if len(batch.x_u):
            # the authors decode the cubes once more for these logits
            pseudo_labels = self._pseudo_labels(batch.x_u, logits_within[n:].detach(), shares, progress)
            self.window += sum_over_ranks(count_classes(pseudo_labels, self.task.num_classes))
            losses["con"] = self._con_weight(progress) * self.dice(log_probs_cross[n:], pseudo_labels)
        return StepOutput(
            losses=losses,
            predicted=count_classes(logits.argmax(1), self.task.num_classes),
            logs={"location_accuracy": accuracy, "cube_shares": shares},
        )

    def _cross_image(self, cubes: Tensor) -> Tensor:
        """Logits (B, K, *S) of the images, seen with cubes of one location exchanged between samples."""
        order = draw_orders(cubes)  # (B, P)
        mixed = self.net(join_cubes(exchange(cubes, order), self.cubes)).embedding
        recovered = exchange(cut_cubes(mixed, self.cubes), order.argsort(0))
        return self.net.head(join_cubes(recovered, self.cubes))

    def _locate(self, bottleneck: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of the cubes' locations. bottleneck: (B, P, E, *S / N / size_divisor)."""
        # one volume at a time: the head normalises over its cubes. Their order is nothing to the head, so none is drawn
        guesses = torch.stack([self.location_head(_halves(cubes)).float() for cubes in bottleneck])  # (B, P, P)
        loss = F.cross_entropy(guesses.flatten(0, 1), self.places.repeat(len(guesses)))
        return loss, (guesses.detach().argmax(2) == self.places).float().mean()

    def _shares(self) -> Tensor:
        """(K,) the cubes' say where the teacher sees each class: 1 for the most frequent one, 0 before there are counts."""
        return (self.counts / self.counts.max().clamp(min=1)) ** (1 / self.temperature)

    @torch.no_grad()
    def _pseudo_labels(self, x_u: Tensor, logits_cubes: Tensor, shares: Tensor, progress: Progress) -> Tensor:
        teacher, cubes = self.teacher(add_noise(x_u)).logits.float(), logits_cubes.float()  # (B_u, K, *S)
        if progress.step <= self.blend_after:
            return teacher.argmax(1)
        if self.blend == "prob":
            teacher, cubes = teacher.softmax(1), cubes.softmax(1)
        return _blend(teacher, cubes, shares).argmax(1)

    def _con_weight(self, progress: Progress) -> float:
        plateau = 200 * progress.step // (self.ramp_steps or progress.total_steps)
        return self.con_weight * gaussian_ramp(plateau / 200)

    def after_step(self, progress: Progress) -> None:
        self.teacher.follow(self.net, progress)
        if progress.step % self.refresh == 0:
            self.counts.copy_(self.window)
            self.window.zero_()

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)


def _location_head(channels: int, places: int) -> nn.Module:
    # only ever trained, hence no running statistics
    norm = nn.BatchNorm1d(4096, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, 4096), norm, nn.LeakyReLU(0.2), nn.Linear(4096, places))


def _blend(teacher: Tensor, cubes: Tensor, shares: Tensor) -> Tensor:
    """(1 - r) teacher + r cubes with r = shares of the teacher's class. teacher, cubes: (B, K, *S). shares: (K,)."""
    return torch.lerp(teacher, cubes, shares[teacher.argmax(1)].unsqueeze(1))


def _halves(features: Tensor) -> Tensor:
    """(B, E, *S) -> (B, E, 2, 2, ...): means of the two halves of each axis, which share the middle voxel of an odd side.

    What adaptive average pooling computes, without its CUDA kernels that no deterministic run may use.
    """
    for axis in range(2, features.dim()):
        side = features.shape[axis]
        half = -(-side // 2)
        ends = features.narrow(axis, 0, half), features.narrow(axis, side - half, half)
        features = torch.stack([end.mean(axis) for end in ends], axis)
    return features
