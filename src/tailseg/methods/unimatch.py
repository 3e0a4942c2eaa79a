"""UniMatch: FixMatch with two strong views and a stream of dropped features.

Paper: L. Yang, L. Qi, L. Feng, W. Zhang, Y. Shi, "Revisiting Weak-to-Strong Consistency in Semi-Supervised
    Semantic Segmentation", CVPR 2023, https://arxiv.org/abs/2208.09910
Family: consistency
Needs: nothing but one network; an even number of unlabelled images
Cost: x4.2
Idea: One prediction on the weak view teaches two strong views of the image, each with a box of another image, and the weak
    view itself after half of its feature channels were dropped. Wide and independent perturbations hang on one target.
Algorithm:
    u, v = halves of x_u                            # data.batch [12, 24] is the paper's 12 + 12 + 12
    y_v, c_v = f(v) in evaluation mode, no gradient
    F = encoder([x_l; u])
    p_x, p_w, p_fp = decoder([F; drop(F_u)])        # one pass; channel dropout on every map of the encoder
    y_w, c_w = argmax and max of softmax(p_w), no gradient
    u_k = strong_view(u), v_k = strong_view(v), box M_k     for k = 1, 2, each drawn anew
    u_k, y_k, c_k = those of v inside M_k, those of u outside
    [p_1; p_2] = f([u_1; u_2])
    L_x = (CE + Dice)(p_x, y_l) / 2
    L = (L_x + .25 Dice(p_1, y_1) + .25 Dice(p_2, y_2) + .5 Dice(p_fp, y_w)) / 2     # each where c >= tau
Constants: unimatch.py and util/utils.py in more-scenarios/medical of github.com/LiheYoung/UniMatch (2D, ACDC)
Deviations: the labelled features are not decoded a second time with dropped channels (the authors throw the result away), so
    batch statistics lack them. u and v come from one draw of unlabelled images, so they never are the same one. Strong
    views are not rounded to bytes. In 3D, where there is no code of theirs, the strong views are CrossMatch's.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, StepOutput, Task
from tailseg.parts.counts import count_classes
from tailseg.parts.losses import cross_entropy, log_softmax, masked_cross_entropy, soft_dice_loss
from tailseg.parts.mixing import cutmix_boxes, paste
from tailseg.parts.perturb import drop_channels, strong_view, unperturbed
from tailseg.parts.pseudo_labels import PseudoLabels, likeliest


@final
class UniMatch(Method):
    """tau: least confidence of a pseudo-label that counts. feature_dropout: share of the channels dropped. loss_weights: of the
    labelled images, the mean over the two strong views, the dropped features. unsup: on unlabelled images, Dice over the
    kept voxels, or their cross-entropy over all voxels. include_background, smooth: of every Dice.
    """

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        tau: float = 0.95,
        feature_dropout: float = 0.5,
        loss_weights: tuple[float, float, float] = (0.5, 0.25, 0.25),
        unsup: Literal["dice", "ce"] = "dice",
        include_background: bool = True,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__(task)
        self.net = build(init="default")
        self.tau, self.feature_dropout, self.loss_weights = tau, feature_dropout, loss_weights
        self.unsup, self.include_background, self.smooth = unsup, include_background, smooth

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        if unlabelled < 2 or unlabelled % 2:
            raise ValueError(
                f"method 'unimatch' mixes pairs of unlabelled patches: data.batch [{labelled}, {unlabelled}] must hold an "
                f"even number of them, at least 2; try [{labelled}, {max(unlabelled + unlabelled % 2, 2)}]."
            )

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        n = len(batch.x_l)
        u, v = batch.x_u.chunk(2)  # one draw; the authors draw v on its own
        with torch.no_grad(), unperturbed(self.net):
            target_v = PseudoLabels.of(log_softmax(self.net(v).logits), self.tau)

        features = self.net.encoder(torch.cat([batch.x_l, u]))
        # the authors decode the labelled features here too, and throw the result away
        # the gradient of a split keeps channels_last; that of a slice is contiguous, and slow to add to the others
        halves = [feature.split([n, len(u)]) for feature in features]
        dropped = drop_channels([half[1] for half in halves], self.feature_dropout)
        joint = [torch.cat([*half, drop]) for half, drop in zip(halves, dropped, strict=True)]
        log_probs = log_softmax(self.net.decoders[0](joint).logits)
        p_x, p_w, p_fp = log_probs.split([n, len(u), len(u)])
        target_w = PseudoLabels.of(p_w, self.tau)

        u_1, u_2, v_1, v_2 = strong_view(torch.cat([u, u, v, v])).chunk(4)
        boxes_1, boxes_2 = cutmix_boxes(2 * len(u), u.shape[2:], device=u.device).chunk(2)
        target_1, target_2 = target_w.paste(target_v, boxes_1), target_w.paste(target_v, boxes_2)
        mixed = torch.cat([paste(v_1, u_1, boxes_1), paste(v_2, u_2, boxes_2)])
        p_1, p_2 = log_softmax(self.net(mixed).logits).chunk(2)

        sup = (cross_entropy(p_x, batch.y_l) + self._dice(p_x, batch.y_l)) / 2
        strong = (self._unsup_loss(p_1, target_1) + self._unsup_loss(p_2, target_2)) / 2
        feature = self._unsup_loss(p_fp, target_w)
        k = self.task.num_classes
        weights = self.loss_weights
        return StepOutput(
            losses={"sup": weights[0] * sup, "strong": weights[1] * strong, "feature": weights[2] * feature},
            predicted=count_classes(likeliest(p_x), k) + count_classes(target_w.labels, k),
            logs={"kept": target_w.kept.float().mean(), "kept_mix": target_v.kept.float().mean()},
        )

    def _dice(self, log_probs: Tensor, target: Tensor, kept: Tensor | None = None) -> Tensor:
        return soft_dice_loss(log_probs, target, kept, smooth=self.smooth, include_background=self.include_background)

    def _unsup_loss(self, log_probs: Tensor, target: PseudoLabels) -> Tensor:
        loss = self._dice if self.unsup == "dice" else masked_cross_entropy
        return loss(log_probs, target.labels, target.kept)

    def predict(self, x: Tensor) -> Tensor:
        return torch.softmax(self.net(x).logits.float(), 1)
