"""SCDL: class proxies in the decoder's feature space, added to another method.

Paper: Y. Su, Y. Zhong, K. Zhu, Z. Zhang, Z. Zhang, Y. Wang, Y. Zhang, J. Liu, "Semantic Class Distribution Learning for
    Debiasing Semi-Supervised Medical Image Segmentation", arXiv 2026, https://arxiv.org/abs/2603.05202
Family: plug-in
Needs: what its host needs (galoss, cps, dhc or magicnet)
Cost: x4.1
Idea: Each class owns a learnable Gaussian proxy in an embedding space of the decoder's features, to which rare classes get
    gradients by soft assignment. Tokens and proxies are aligned with each other, the proxies' means are anchored to class
    means of labelled patches, and what the proxies know about a token is added to the features before the last convolution.
Algorithm:
    X = decoder's last features, averaged over a 12^3 grid;  z = MLP(X)
    P(c | z) = softmax(cos(z, mu_c) / .2)
    priors: r_center = unit(sum_c P(c | z) unit(mu_c)), z_sam = unit(z + sigma_e N(0, 1)), mean of 2 draws
    logits = head(features + interpolate(W [r_center, z_sam]))             the host trains and predicts with these
    a_c = mean over 50 samples u ~ N(mu_c, sigma_c^2) of cos(z, u)
    w = classes of the token's labels, or stop(P^2 / sum P^2) where there are none
    L_P2E = mean over classes and tokens of exp(-(2 w - 1) a), L_E2P = mean over tokens of sum_c w (1 - a)
        of labelled and of unlabelled tokens, averaged
    L_SAC = mean over classes present of 1 - cos(stop(anchor_c), mu_c),  anchor_c = mean of unit(MLP(w-mean of X)), labelled
    L = L_host + ramp (L_P2E + .1 L_E2P + L_SAC),  ramp from 0 to 1 over the first 1000 steps
Constants: SCDL.py and the inference scripts of github.com/Zyh55555/SCDL (commit 31e6d6e); it has no training script. The
    main results are on Synapse (20 %) and AMOS (5 %), with host=galoss and host=magicnet.
Deviations: how the parts train together is ours, as it is not public: unit weights (by the paper; .1 by the code), the ramp,
    labels of tokens, proxies on network A of two. Tokens are those of the code; the paper takes them of the encoder, and
    adds its priors at every stage of the decoder. p2e=set with e2p_weight=1 are the paper's L_P2E and L_E2P, which know no
    labels. The paper's anchors encode labelled images once per class with all else masked; here they are means of tokens.
    The code's symmetric KL divergence compares a softmax with itself and is always 0: left out. A token is at least 8 voxels
    wide, as those of 12 in 96 voxels. With cps, dhc and magicnet as host GALoss's losses are on, as in the release;
    host={name: dhc, sup: ce_dice, unsup: ce} switches them off.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor

from tailseg.core import Batch, BuildNetwork, Method, Progress, SegNet, StepOutput, Task
from tailseg.methods.cps import CPS
from tailseg.methods.dhc import DHC
from tailseg.methods.galoss import GALoss
from tailseg.methods.magicnet import MagicNet
from tailseg.options import OptionError, check_options, suggest
from tailseg.parts.prototypes import (
    ClassProxies,
    PriorHead,
    align_by_set,
    align_by_token,
    anchor_loss,
    class_shares,
    class_tokens,
    sharpen,
)

_HOSTS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "galoss": (GALoss, {}),
    "cps": (CPS, {"sup": "ga", "unsup": "ga"}),
    "dhc": (DHC, {"sup": "ga", "unsup": "ga"}),
    "magicnet": (MagicNet, {"losses": "ga"}),
}
"""Name -> the method, and its defaults as a host."""


@final
class SCDL(Method):
    """host: the method it goes onto, by name or as {name: ..., <its options>}. networks: which of a host's two get proxies.
    scdl_weight: of all its losses. proxy_weight: of L_P2E and L_E2P. e2p_weight: of L_E2P beside L_P2E. sac_weight: of L_SAC.
    warm_up: steps until these weights are reached. p2e: form of the alignment, by token or by sets of tokens. tokens: per axis
    at most. token_size: least voxels per token and axis. dim: of the embedding. tau: temperature of the assignment.
    samples: of a proxy and step. z_sam: whether that prior is added. r_dist: whether the paper's third prior is too.
    weight_decay: of proxies, embedding and projection."""

    def __init__(
        self,
        task: Task,
        build: BuildNetwork,
        *,
        host: str | dict[str, Any] = "galoss",
        networks: Literal["a", "both"] = "a",
        scdl_weight: float = 1.0,
        proxy_weight: float = 1.0,
        e2p_weight: float = 0.1,
        sac_weight: float = 1.0,
        warm_up: int = 1000,
        p2e: Literal["token", "set"] = "token",
        tokens: int = 12,
        token_size: int = 8,
        dim: int = 256,
        tau: float = 0.2,
        samples: int = 50,
        z_sam: bool = True,
        r_dist: bool = False,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(task)
        heads: list[PriorHead] = []

        def build_with_priors(**needs: Any) -> SegNet:
            net = build(**needs)
            if networks == "both" or not heads:
                channels = net.embedding_channels
                proxies = ClassProxies(
                    channels, task.num_classes, dim=dim, tau=tau, samples=samples, z_sam=z_sam, r_dist=r_dist
                )
                decoder: Any = net.decoders[0]
                decoder.head = PriorHead(decoder.head, channels, proxies, tokens=tokens, token_size=token_size)
                heads.append(decoder.head)
            return net

        self.host = _make_host(host, task, build_with_priors)
        self.heads = tuple(heads)  # of the host's own networks: its teachers copy them, and get none of these losses
        self.scdl_weight, self.proxy_weight, self.warm_up = scdl_weight, proxy_weight, warm_up
        self.e2p_weight, self.sac_weight, self.p2e, self.weight_decay = e2p_weight, sac_weight, p2e, weight_decay

    def check_batch(self, labelled: int, unlabelled: int, patch_size: tuple[int, ...]) -> None:
        self.host.check_batch(labelled, unlabelled, patch_size)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        for head in self.heads:
            head.listen()
        output = self.host.step(batch, progress)
        aligned = [self._align(head, batch) for head in self.heads]
        p2e, e2p, sac, cosines = (torch.stack(parts).sum(0) for parts in zip(*aligned, strict=True))
        weight = self.scdl_weight * (min(progress.step / self.warm_up, 1.0) if self.warm_up else 1.0)
        losses = {
            "p2e": weight * self.proxy_weight * p2e,
            "e2p": weight * self.proxy_weight * self.e2p_weight * e2p,
            "sac": weight * self.sac_weight * sac,
        }
        logs = {**output.logs, "anchor_cosine": cosines / len(self.heads)}
        return StepOutput({**output.losses, **losses}, output.predicted, logs)

    def _align(self, head: PriorHead, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P2E, E2P, SAC and the cosines of SAC from the tokens of the network's first pass, which is over batch.x."""
        features, embedded, grid = head.take()
        proxies, n = head.proxies, len(batch.x_l)
        sampled, centred = (proxies.cosines(embedded, to) for to in (proxies.sampled(), proxies.centres()))  # (B, L, K)
        assigned = proxies.assign(centred)
        shares = class_shares(batch.y_l, self.task.num_classes, grid)  # (B_l, L, K)
        if self.p2e == "set":
            p2e, e2p = align_by_set(sampled, centred, assigned)
        else:
            p2e, e2p = align_by_token(sampled[:n], shares)
            if len(batch.x_u):
                p2e_u, e2p_u = align_by_token(sampled[n:], sharpen(assigned[n:]))
                p2e, e2p = (p2e + p2e_u) / 2, (e2p + e2p_u) / 2
        with torch.no_grad():
            means, there = class_tokens(features[:n], shares)
            instances = proxies.embed(means)
        return p2e, e2p, *anchor_loss(proxies.centres(), instances, there)

    def after_step(self, progress: Progress) -> None:
        self.host.after_step(progress)

    def class_sampling(self) -> Tensor | None:
        return self.host.class_sampling()

    def caveat(self) -> str:
        return self.host.caveat()

    def param_groups(self) -> list[dict[str, Any]]:
        own = [parameter for head in self.heads for parameter in head.own_parameters()]
        ids = {id(parameter) for parameter in own}
        groups = self.host.param_groups()
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        return [*groups, {"params": own, "weight_decay": self.weight_decay}]

    def predict(self, x: Tensor) -> Tensor:
        return self.host.predict(x)

    def predict_each(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.host.predict_each(x)


def _make_host(spec: str | dict[str, Any], task: Task, build: BuildNetwork) -> Method:
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", None))
    if name not in _HOSTS:
        raise OptionError(f"SCDL has no host '{name}'. {suggest(name, _HOSTS)}")
    make, defaults = _HOSTS[name]
    any_make: Any = make  # subclasses add (build, *, options) to what Method itself takes
    return any_make(task, build, **check_options(make, {**defaults, **options}))
