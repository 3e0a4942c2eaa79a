"""CrossMatch: perturbed images times perturbed features, all taught by the clean prediction.

Paper: B. Zhao, C. Wang, S. Ding, "CrossMatch: Enhance Semi-Supervised Medical Image Segmentation with Perturbation
    Strategies and Knowledge Distillation", JBHI 2024, https://arxiv.org/abs/2405.00354
Family: consistency
Needs: nothing but one network; an even number of unlabelled images
Cost: x6.5
Idea: A weak and two strong views of each unlabelled image are decoded with all, most or few of their feature channels. The
    clean decode of the weak view teaches all others, and each of its dropped decodes the like one of a strong view.
Algorithm:
    u, v = halves of x_u                            # data.batch [12, 24] is the paper's 12 + 12 + 12, [2, 4] its 2 + 2 + 2
    streams(x): F = encoder(x), decoder([F; drop(F, weak); drop(F, strong)]) in one pass -> n, w, s
    q_n, q_w, q_s = streams(v), no gradient, in training mode
    p_x, p_n, p_w, p_s = streams([x_l; u])          # channels dropped only on u
    u_k = strong_view(u), pasted with strong_view(v) inside box M_k         for k = 1, 2, each drawn anew
    p_n1, p_n2, p_w2, p_s2 = streams([u_1; u_2])    # channels dropped only on u_2
    y_n, y_w, y_s: argmax of p_n, p_w, p_s; y^(k): those of q inside M_k; each counts where its own max prob >= tau
    L_sup = (CE + Dice)(p_x, y_l) / 2
    L_ip = .25 Dice(p_n1, y_n^(1)) + .25 Dice(p_n2, y_n^(2))
    L_tkd = mean of Dice(p_w, y_n), Dice(p_s, y_n), Dice(p_w2, y_n^(2)), Dice(p_s2, y_n^(2))
    L_dkd = mean of Dice(p_w2, y_w^(2)), Dice(p_s2, y_s^(2))
    L = (L_sup + L_ip + kappa ((1 - eta) L_tkd + eta L_dkd)) / 2
Constants: ACDC/train_cross_match.py of github.com/AiEson/CrossMatch (59772e0); LA/code/train_cross_match.py has
    tau=la kappa=1 smooth=1e-5 include_background=false
Deviations: u and v come from one draw of unlabelled images, so they never are the same one. v passes the network once,
    clean and dropped together, where the authors pass it alone and then again with x_l; batch statistics differ by that. In
    the dropped passes their V-Net skips the dropout before its head; here the network is used as it is. Strong views are not
    rounded to bytes (2D). Their 3D boxes have the first and the last axis confused; box_axes=official does the same.
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, log_softmax, masked_cross_entropy, soft_dice_loss
from tailseg.parts.mixing import cutmix_boxes, paste
from tailseg.parts.perturb import drop_channels, strong_view, unperturbed
from tailseg.parts.pseudo_labels import PseudoLabels, likeliest
from tailseg.parts.ramps import gaussian_ramp


@final
class CrossMatch(Method):
    """tau: least confidence of a pseudo-label that counts, or the schedule "la". eta: share of the distillation that comes
    from the dropped teachers. kappa: weight of the distillation. weak_dropout, strong_dropout: shares of the channels
    dropped. loss_weights: of the labelled images, the mean over the two strong views, the distillation (before kappa); the
    authors' first release had thirds and kappa=1. unsup: on unlabelled images, Dice over the kept voxels, or their
    cross-entropy over all voxels. mix_eval: labels of v in evaluation mode, as in the authors' first releases. box_axes:
    "official" confuses the axes of 3D boxes as the authors do. include_background, smooth: of every Dice.

    The defaults are those of ACDC, for ISIC too. LA and Pancreas: tau="la", kappa=1, smooth=1e-5, include_background=False.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        tau: float | Literal["la"] = 0.95,
        eta: float = 0.3,
        kappa: float = 0.5,
        weak_dropout: float = 0.25,
        strong_dropout: float = 0.75,
        loss_weights: tuple[float, float, float] = (0.5, 0.25, 0.5),
        unsup: Literal["dice", "ce"] = "dice",
        mix_eval: bool = False,
        box_axes: Literal["own", "official"] = "own",
        include_background: bool = True,
        smooth: float = 1e-4,
    ) -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.tau, self.eta, self.kappa, self.loss_weights = tau, eta, kappa, loss_weights
        self.weak_dropout, self.strong_dropout = weak_dropout, strong_dropout
        self.mix_eval, self.box_axes = mix_eval, box_axes
        self.unsup, self.include_background, self.smooth = unsup, include_background, smooth

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if unlabelled < 2 or unlabelled % 2:
            raise ValueError(
                f"method 'crossmatch' mixes pairs of unlabelled patches: data.batch [{labelled}, {unlabelled}] must hold "
                f"an even number of them, at least 2; try [{labelled}, {max(unlabelled + unlabelled % 2, 2)}]."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        n, tau = len(batch.x_l), self.threshold(progress)
        u, v = batch.x_u.chunk(2)  # one draw; the authors draw v on its own
        with torch.no_grad(), unperturbed(self.net) if self.mix_eval else contextlib.nullcontext():
            # one pass; the authors make a clean one, and another with x_l for the dropped streams
            inside_n, inside_w, inside_s = (PseudoLabels.of(q, tau) for q in self._streams(v, 0)[1:])
        p_x, p_n, p_w, p_s = self._streams(torch.cat([batch.x_l, u]), n)

        u_1, u_2, v_1, v_2 = strong_view(torch.cat([u, u, v, v])).chunk(4)
        boxes_1, boxes_2 = self._boxes(2 * len(u), u).chunk(2)
        mixed = torch.cat([paste(v_1, u_1, boxes_1), paste(v_2, u_2, boxes_2)])
        p_n1, p_n2, p_w2, p_s2 = self._streams(mixed, len(u))

        target_n = PseudoLabels.of(p_n, tau)
        target_n1, target_n2 = target_n.paste(inside_n, boxes_1), target_n.paste(inside_n, boxes_2)
        target_w2 = PseudoLabels.of(p_w, tau).paste(inside_w, boxes_2)
        target_s2 = PseudoLabels.of(p_s, tau).paste(inside_s, boxes_2)

        loss = self._unsup_loss
        sup = (cross_entropy(p_x, batch.y_l) + self._dice(p_x, batch.y_l)) / 2
        strong = (loss(p_n1, target_n1) + loss(p_n2, target_n2)) / 2
        teacher = (loss(p_w, target_n) + loss(p_s, target_n) + loss(p_w2, target_n2) + loss(p_s2, target_n2)) / 4
        like = (loss(p_w2, target_w2) + loss(p_s2, target_s2)) / 2
        weights, k = self.loss_weights, self.task.num_classes
        distil = self.kappa * weights[2]
        return StepOutput(
            losses={
                "sup": weights[0] * sup,
                "strong": weights[1] * strong,
                "tkd": distil * (1 - self.eta) * teacher,
                "dkd": distil * self.eta * like,
            },
            predicted=count_classes(likeliest(p_x), k) + count_classes(target_n.labels, k),
            logs={
                "tau": p_x.new_full((), tau),
                "kept": target_n.kept.float().mean(),
                "kept_mix": inside_n.kept.float().mean(),
            },
        )

    def threshold(self, progress: Progress) -> float:
        """Where it is "la": .75 in the first step, then a bound on the entropy, ramped, that the authors use as one on the
        largest probability; from .52 to .67 it lets nearly every voxel of a binary task pass."""
        if not isinstance(self.tau, str):
            return self.tau
        if progress.step == 0:
            return 0.75
        # their ramp is as long as the 17000 steps of the learning rate; the run stops after 14000
        return (0.75 + 0.25 * gaussian_ramp(progress.fraction("step") * 14000 / 17000)) * math.log(2)

    def _streams(self, x: Tensor, first: int) -> tuple[Tensor, ...]:
        """Log-probabilities of the clean decodes of x[:first] and of x[first:], and of the weakly and strongly dropped
        decodes of x[first:]; one pass of the decoder, so that they share batch statistics."""
        count = len(x) - first
        # the gradient of a split keeps channels_last; that of a slice is contiguous, and slow to add to the others
        halves = [feature.split([first, count]) for feature in self.net.encoder(x)]
        own, rest = [half[0] for half in halves], [half[1] for half in halves]
        streams = (own, rest, drop_channels(rest, self.weak_dropout), drop_channels(rest, self.strong_dropout))
        joint = [torch.cat(maps) for maps in zip(*streams, strict=True)]
        return log_softmax(self.net.decoders[0](joint).logits).split([first, count, count, count])

    def _boxes(self, count: int, x: Tensor) -> Tensor:
        """(count, *S) bool."""
        sides = x.shape[2:]
        if self.box_axes == "own" or len(sides) == 2:
            return cutmix_boxes(count, sides, device=x.device)
        # drawn over the sides in reverse, written over the sides as they are: what falls outside is lost, as in la_heart.py
        boxes = cutmix_boxes(count, sides[::-1], device=x.device)
        longer = sides[0] - sides[2]
        return F.pad(boxes, (0, -longer, 0, 0, 0, longer))

    def _dice(self, log_probs: Tensor, target: Tensor, kept: Tensor | None = None) -> Tensor:
        return soft_dice_loss(log_probs, target, kept, smooth=self.smooth, include_background=self.include_background)

    def _unsup_loss(self, log_probs: Tensor, target: PseudoLabels) -> Tensor:
        loss = self._dice if self.unsup == "dice" else masked_cross_entropy
        return loss(log_probs, target.labels, target.kept)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
