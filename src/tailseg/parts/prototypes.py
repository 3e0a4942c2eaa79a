"""Class proxies: each class owns a learnable Gaussian in an embedding space that tokens of a decoder's features share.

Tokens are means of a feature map over the cells of a coarse grid, tokens (B, L, E) with L cells. All averages over tokens
and class instances are over those of all ranks.
Source: Y. Su et al., SCDL, 2026, https://arxiv.org/abs/2603.05202; SCDL.py of github.com/Zyh55555/SCDL (commit 31e6d6e).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailseg.options import OptionError
from tailseg.parts.ranks import sum_over_ranks


def token_grid(sides: Sequence[int], tokens: int, token_size: int) -> tuple[int, ...]:
    """Cells per axis: `tokens`, or fewer where they would be smaller than token_size voxels; at least one."""
    return tuple(max(1, min(tokens, side // token_size)) for side in sides)


def pool_tokens(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, *S) -> (B, L, C) float32 means over the cells of the grid; cells overlap where they cannot be equal."""
    # by one matrix per axis, as no deterministic run may use adaptive pooling or interpolation on CUDA
    x = x.float()
    for axis, cells in reversed([*enumerate(grid, 2)]):  # the last axis lies densest in memory
        eye = torch.eye(x.shape[axis], device=x.device)
        x = _along(x, axis, F.adaptive_avg_pool1d(eye, cells))
    return x.flatten(2).mT


def spread_tokens(tokens: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
    """(B, L, C) on the grid -> (B, C, *sides) float32, by linear interpolation between the centres of the cells."""
    x = tokens.float().mT.unflatten(2, tuple(grid))
    for axis, side in enumerate(sides, 2):
        eye = torch.eye(x.shape[axis], device=x.device)
        x = _along(x, axis, F.interpolate(eye[None], side, mode="linear", align_corners=False)[0])
    return x


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiplies one axis of x with a matrix (in, out), in full precision."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


def class_shares(labels: Tensor, num_classes: int, grid: Sequence[int]) -> Tensor:
    """(B, L, K) share of each class among the annotated voxels of each token; all 0 where none is annotated.

    labels: (B, *S) int64.
    """
    # class by class: a one-hot map of the patches would be the largest tensor of the step
    shares = [pool_tokens((labels == k).unsqueeze(1), grid) for k in range(num_classes)]
    shares = torch.cat(shares, 2)
    return shares / shares.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class ClassProxies(nn.Module):
    """K Gaussians N(mu_c, sigma_c^2) in d dimensions, and the network that embeds tokens of E channels there.

    tau: temperature of the assignment. samples: drawn of each Gaussian per use. draws: noisy copies of each embedding in the
    prior z_sam. r_dist, z_sam: which priors go beside r_center. In evaluation nothing is drawn.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        dim: int = 256,
        tau: float = 0.2,
        samples: int = 50,
        draws: int = 2,
        dropout: float = 0.2,
        z_sam: bool = True,
        r_dist: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("samples", samples), ("draws", draws)):
            if value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1.")
        if tau <= 0:
            raise OptionError(f"tau is {tau}; a temperature must be above 0.")
        wide = 2 * dim
        hidden = [nn.Linear(channels, wide), nn.ReLU(), nn.Dropout(dropout), nn.Linear(wide, wide), nn.ReLU()]
        self.embed = nn.Sequential(*hidden, nn.Dropout(dropout), nn.Linear(wide, dim))
        self.proxies = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_classes, wide)))  # mu and raw sigma
        self.noise = nn.Parameter(torch.full((dim,), 0.05), requires_grad=z_sam)
        self.tau, self.samples, self.draws = tau, samples, draws
        self.z_sam, self.r_dist = z_sam, r_dist
        self.prior_channels = dim * (1 + z_sam + r_dist)

    @property
    def mu(self) -> Tensor:
        """(K, d)."""
        return self.proxies.chunk(2, 1)[0]

    @property
    def sigma(self) -> Tensor:
        """(K, d), positive."""
        return F.softplus(self.proxies.chunk(2, 1)[1])

    def centres(self) -> Tensor:
        """(K, d) directions of the means."""
        return F.normalize(self.mu, dim=1)

    def sampled(self) -> Tensor:
        """(K, d) mean over samples u of u / |u|; its product with a direction z is the mean of cos(z, u).

        In evaluation its expectation to first order, mu / sqrt(|mu|^2 + |sigma|^2).
        """
        if not self.training:
            return self.mu / torch.hypot(self.mu, self.sigma).norm(dim=1, keepdim=True)
        noise = torch.randn(self.samples, *self.mu.shape, device=self.mu.device)
        return F.normalize(self.mu + self.sigma * noise, dim=2).mean(0)

    def cosines(self, embedded: Tensor, directions: Tensor) -> Tensor:
        """(..., K) of embedded tokens (..., d) with directions (K, d), float32."""
        with torch.autocast(embedded.device.type, enabled=False):
            return F.normalize(embedded.float(), dim=-1) @ directions.mT

    def assign(self, cosines: Tensor) -> Tensor:
        """P(c | z) of cosines (..., K)."""
        return torch.softmax(cosines / self.tau, -1)

    def priors(self, embedded: Tensor) -> Tensor:
        """(..., prior_channels) float32: what the proxies know about each embedded token (..., d); unit vectors, joined.

        r_center: mean of the proxies' directions under the assignment by mu. z_sam: the embedding under noise. r_dist: as
        r_center, under the assignment by samples.
        """
        embedded, centres = embedded.float(), self.centres()
        with torch.autocast(embedded.device.type, enabled=False):
            found = [self.assign(self.cosines(embedded, centres)) @ centres]
            if self.r_dist:
                found.append(self.assign(self.cosines(embedded, self.sampled())) @ centres)
        # the paper writes both without normalisation, the code normalises the first
        found = [F.normalize(prior, dim=-1) for prior in found]
        if self.z_sam and self.training:
            noise = self.noise * torch.randn(self.draws, *embedded.shape, device=embedded.device)
            found.append(F.normalize(embedded + noise, dim=-1).mean(0))
        elif self.z_sam:
            found.append(F.normalize(embedded, dim=-1))
        return torch.cat(found, -1)


class Tokens(NamedTuple):
    """What a PriorHead has heard."""

    features: Tensor  # (B, L, E)
    embedded: Tensor  # (B, L, d)
    grid: tuple[int, ...]


class PriorHead(nn.Module):
    """The head of a decoder, which first adds to the embedding what class proxies know about its tokens.

    It can listen: then it keeps the tokens of the next embedding it sees, until they are taken.
    """

    def __init__(
        self, head: nn.Module, channels: int, proxies: ClassProxies, *, tokens: int = 12, token_size: int = 8
    ) -> None:
        super().__init__()
        if tokens < 1 or token_size < 1:
            raise OptionError(f"tokens is {tokens} and token_size {token_size}; both must be at least 1.")
        self.head, self.proxies = head, proxies
        self.project = nn.Linear(proxies.prior_channels, channels, bias=False)  # a convolution of size 1 over tokens
        self.tokens, self.token_size = tokens, token_size
        self.listening = False
        self.heard: Tokens | None = None

    def forward(self, embedding: Tensor) -> Tensor:
        sides = embedding.shape[2:]
        grid = token_grid(sides, self.tokens, self.token_size)
        features = pool_tokens(embedding, grid)
        embedded = self.proxies.embed(features)
        if self.listening:
            self.listening, self.heard = False, Tokens(features, embedded, grid)
        prior = spread_tokens(self.project(self.proxies.priors(embedded)), grid, sides)
        return self.head(embedding + prior.to(embedding.dtype))

    def listen(self) -> None:
        self.listening, self.heard = True, None

    def take(self) -> Tokens:
        heard, self.listening, self.heard = self.heard, False, None
        assert heard is not None, "the network with this head was not called"
        return heard

    def own_parameters(self) -> list[nn.Parameter]:
        """Trainable ones of the proxies and the projection, without those of the head itself."""
        both = [*self.proxies.parameters(), *self.project.parameters()]
        return [parameter for parameter in both if parameter.requires_grad]


def sharpen(assigned: Tensor) -> Tensor:
    """P^2 over its sum (..., K), without gradient: the class distribution of a token that nobody annotated."""
    squares = assigned.detach().square()
    return squares / (squares.sum(-1, keepdim=True) + 1e-6)


def align_by_token(cosines: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """P2E, the mean over classes and tokens of exp(-(2 w - 1) a), and E2P, the mean over tokens of sum_c w (1 - a).

    cosines: a (B, L, K). weights: w (B, L, K), class distribution of each token; a token whose weights are all 0 is left out.
    """
    seen = (weights.sum(2, keepdim=True) > 0).float()  # (B, L, 1)
    p2e = (seen * torch.exp((1 - 2 * weights) * cosines)).sum() / cosines.shape[2]
    e2p = (weights * (1 - cosines)).sum()
    p2e, e2p, count = sum_over_ranks(torch.stack([p2e, e2p, seen.sum()])).unbind()
    return p2e / count.clamp_min(1), e2p / count.clamp_min(1)


def align_by_set(sampled: Tensor, centred: Tensor, assigned: Tensor) -> tuple[Tensor, Tensor]:
    """P2E, the mean over classes of exp(E- - E+), where E+ and E- are means of `sampled` over tokens weighed by P and by 1 - P,
    and E2P, the mean over tokens of sum_c P (1 - centred).

    sampled, centred: cosines (B, L, K) with samples and means of the proxies. assigned: P (B, L, K).
    """
    sets = torch.stack([assigned, 1 - assigned])  # (2, B, L, K)
    cosines, sizes = (sets * sampled).sum((1, 2)), sets.sum((1, 2))  # (2, K)
    e2p = (assigned * (1 - centred)).sum((0, 1))  # (K,)
    count = torch.full_like(e2p, sampled.shape[0] * sampled.shape[1])
    cosines, sizes, rest = sum_over_ranks(torch.stack([cosines, sizes, torch.stack([e2p, count])])).unbind()
    inside, outside = (cosines / sizes.clamp_min(1e-6)).unbind()
    return torch.exp(outside - inside).mean(), rest[0].sum() / rest[1, 0]


def class_tokens(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, E) mean token of each class in each patch, and (B, K) whether the class is there.

    features: (B, L, E). weights: (B, L, K) class distribution of each token.
    """
    sizes = weights.sum(1)  # (B, K)
    with torch.autocast(features.device.type, enabled=False):
        sums = weights.mT @ features.float()
    return sums / sizes.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2), sizes > 0


def anchor_loss(centres: Tensor, instances: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the classes present of 1 - cos(anchor, mu), and (K,) these cosines, 0 for a class that is absent.

    The anchor is the mean direction of a class's embedded instances; only the centres (K, d) get a gradient.
    instances: (B, K, d). there: (B, K) bool.
    """
    directions = F.normalize(instances.detach().float(), dim=2) * there.unsqueeze(2)
    total = sum_over_ranks(torch.cat([directions.sum(0), there.sum(0).float().unsqueeze(1)], 1))  # (K, d + 1)
    anchors, present = F.normalize(total[:, :-1], dim=1), (total[:, -1] > 0).float()
    cosines = (anchors * centres).sum(1) * present  # (K,)
    return (present - cosines).sum() / present.sum().clamp_min(1), cosines.detach()
