"""Frozen foundation models that give dense features to learn from: DINOv3.

Source: O. Siméoni et al., "DINOv3", 2025, https://arxiv.org/abs/2508.10104; github.com/facebookresearch/dinov3.
The weights are Meta's, under the DINOv3 License, and gated: they are read from a folder or from the local cache of the
Hugging Face hub, never downloaded, never bundled, never part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailseg.options import OptionError
from tailseg.parts.ranks import sum_over_ranks

RANDOM_TINY = "random-tiny"
LICENSE_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license"
HOW_TO_GET = f"""\
DINOv3 weights are given out by Meta under its own DINOv3 License ({LICENSE_URL}); TailSeg neither contains nor downloads them.
  1. Accept the licence at https://huggingface.co/facebook/dinov3-vitb16-pretrain-lvd1689m (ViT-B/16; the smaller ViT-S/16 is
     facebook/dinov3-vits16-pretrain-lvd1689m), then: pip install 'tailseg[dino]' and hf auth login
  2. hf download facebook/dinov3-vitb16-pretrain-lvd1689m
  3. tailseg teacher check facebook/dinov3-vitb16-pretrain-lvd1689m, then train with that name as method.teacher; the path
     of a folder with config.json and model.safetensors does as well.
To see the method run without weights: method.teacher={RANDOM_TINY}, whose features are random and whose results count for \
nothing."""

_NO_EXTRA = "reading DINOv3 needs transformers, which is not installed: pip install 'tailseg[dino]'"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the LVD-1689M models were trained
_TINY: dict[str, Any] = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 4,  # as the published models
    "patch_size": 16,
    "image_size": 224,
}


class TeacherError(OptionError):
    """Weights that are not there or that cannot be used; the text says what to do."""


class DenseTeacher(Protocol):
    """(N, 3, H, W) images in [0, 1], sides multiples of patch_size -> (N, width, H / patch_size, W / patch_size) features,
    without gradients. is_random: these are no learnt features, and no result made with them counts."""

    @property
    def width(self) -> int: ...

    @property
    def patch_size(self) -> int: ...

    @property
    def is_random(self) -> bool: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TeacherFacts:
    """What config.json says. registers: tokens that, like the class token, belong to no place of the image."""

    architecture: str
    patch_size: int
    width: int
    layers: int
    registers: int


class DINOv3(nn.Module):
    """A DINOv3 vision transformer, frozen and in evaluation mode whatever the method around it does.

    source: a folder with config.json and model.safetensors as transformers writes them, the name of a model that the local
    cache of the Hugging Face hub holds, or "random-tiny": a tiny transformer of random but always equal weights, to try
    things out. Nothing is read before it is asked for, so that a trained run predicts without the weights.

    The weights are no submodule: state_dict(), parameters(), train() and DDP see none of them.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self._facts: TeacherFacts | None = None
        self._hidden: list[nn.Module] = []  # holds the transformer once it is loaded
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).reshape(3, 1, 1), persistent=False)

    @property
    def is_random(self) -> bool:
        return self.source == RANDOM_TINY

    @property
    def facts(self) -> TeacherFacts:
        """Raises TeacherError if the weights are not there or of another kind."""
        if self._facts is None:
            self._facts = _read_facts(_TINY if self.is_random else _read_config(self.folder()), self.source)
        return self._facts

    @property
    def width(self) -> int:
        return self.facts.width

    @property
    def patch_size(self) -> int:
        return self.facts.patch_size

    def known_width(self) -> int | None:
        """width, or None where the weights are not there to tell."""
        try:
            return self.width
        except TeacherError:
            return None

    def folder(self) -> Path:
        """Where config.json and the weights lie. Raises TeacherError if they do not."""
        folder = find_weights(self.source)
        if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            raise TeacherError(f"{folder} holds no model.safetensors.\n{HOW_TO_GET}")
        return folder

    def check(self) -> None:
        """Raises TeacherError if weights or transformers are missing, without reading either."""
        if not self.is_random:
            self.folder()
        assert self.facts
        if importlib.util.find_spec("transformers") is None:
            raise TeacherError(_NO_EXTRA)

    def load(self) -> nn.Module:
        """The transformer, read at the first call. Raises TeacherError if it cannot be; draws no random numbers."""
        if not self._hidden:
            made = _make_tiny() if self.is_random else _load(self.folder(), self.facts)
            self._hidden.append(made.requires_grad_(False).eval())
        return self._hidden[0]

    def fingerprint(self) -> str:
        """Digest of the weights: the same wherever they lie, another when a file changes. Raises TeacherError."""
        if self.is_random:  # drawn, so they hang on the versions of torch and transformers
            parts = [tensor.numpy(force=True).tobytes() for tensor in self.load().state_dict().values()]
        else:
            folder, parts = self.folder(), []
            for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
                with path.open("rb") as file:
                    parts.append(hashlib.file_digest(file, "sha256").digest())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def try_out(self) -> int:
        """Read the weights and pass an image through; returns how many numbers they are. Raises TeacherError."""
        self.check()
        numbers = sum(parameter.numel() for parameter in self.load().parameters())
        if not torch.isfinite(self(torch.full((1, 3, 2 * self.patch_size, 2 * self.patch_size), 0.5))).all():
            raise TeacherError(f"{self.source} gives features that are not finite; its weights are damaged.")
        return numbers

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, width, H / patch_size, W / patch_size), after the last normalisation."""
        patch = self.patch_size
        if images.dim() != 4 or images.shape[1] != 3 or any(side % patch or not side for side in images.shape[2:]):
            raise ValueError(
                f"DINOv3 takes (N, 3, H, W) with sides that are multiples of {patch}, got {tuple(images.shape)}."
            )
        net: Any = self.load()
        if next(net.parameters()).device != images.device:
            net.to(images.device)
        tokens = net(
            pixel_values=(images - self.mean) / self.std
        ).last_hidden_state  # (N, 1 + registers + places, width)
        height, width = (side // patch for side in images.shape[2:])
        places = tokens[:, 1 + self.facts.registers :]
        return places.transpose(1, 2).reshape(len(images), self.width, height, width)

    def extra_repr(self) -> str:
        return repr(self.source)


class Projector(nn.Linear):
    """Student features (..., channels) -> (..., width of the teacher). Where no teacher is there to tell its width, None, it
    is read off the checkpoint, so that a trained run predicts without the weights of the teacher."""

    def __init__(self, channels: int, width: int | None) -> None:
        super().__init__(channels, width or 1)
        if width is None:
            self.register_load_state_dict_pre_hook(_take_width)


def _take_width(module: nn.Linear, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if weight is not None:
        module.out_features = len(weight)
        module.weight = nn.Parameter(module.weight.new_empty(len(weight), module.in_features))
        module.bias = nn.Parameter(module.weight.new_empty(len(weight)))


def find_weights(source: str) -> Path:
    """The folder of a path, or of a model in the local cache of the Hugging Face hub. Raises TeacherError if there is none."""
    if not source:
        raise TeacherError(f"no DINOv3 weights are named.\n{HOW_TO_GET}")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise TeacherError(
            f"{source} is a single file; name the folder with config.json and model.safetensors. Files that Meta's own code"
            f" loads (.pth) are of another format and not read.\n{HOW_TO_GET}"
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise TeacherError(f"there is no folder {source}.\n{HOW_TO_GET}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise TeacherError(f"'{source}' is no folder, and {_NO_EXTRA}") from None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise TeacherError(
            f"'{source}' is no folder, and the local cache of the Hugging Face hub holds no such model.\n{HOW_TO_GET}"
        ) from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(f"{folder} holds no config.json.\n{HOW_TO_GET}") from None
    except ValueError:
        raise TeacherError(f"{folder / 'config.json'} is damaged; fetch it again.\n{HOW_TO_GET}") from None
    return found if isinstance(found, dict) else {}


def _read_facts(config: dict[str, Any], source: str) -> TeacherFacts:
    kind = config.get("model_type")
    if kind == "dinov3_convnext":
        raise TeacherError(
            f"{source} is a ConvNeXt of the DINOv3 family, whose features come in strides of 32; take one of its vision"
            " transformers, e.g. facebook/dinov3-vitb16-pretrain-lvd1689m."
        )
    if kind != "dinov3_vit":
        raise TeacherError(f"{source} holds a model of type '{kind}', not a DINOv3 vision transformer (dinov3_vit).")
    names = ("patch_size", "hidden_size", "num_hidden_layers", "num_register_tokens")
    numbers = [config.get(name) for name in names]
    if not all(isinstance(number, int) for number in numbers) or config.get("num_channels", 3) != 3:
        told = ", ".join(f"{name} {number!r}" for name, number in zip(names, numbers, strict=True))
        raise TeacherError(f"config.json of {source} describes no DINOv3 for images of three channels: {told}.")
    patch_size, width, layers, registers = (int(number or 0) for number in numbers)
    return TeacherFacts("DINOv3 ViT", patch_size, width, layers, registers)


def _make_tiny() -> nn.Module:
    with _transformers() as transformers, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would reseed GPUs too
        config = transformers.DINOv3ViTConfig(**{key: value for key, value in _TINY.items() if key != "model_type"})
        return transformers.DINOv3ViTModel(config)


def _load(folder: Path, facts: TeacherFacts) -> nn.Module:
    with _transformers() as transformers, torch.random.fork_rng(devices=[]):
        try:
            net, report = transformers.DINOv3ViTModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # whatever transformers and safetensors make of a damaged file
            raise TeacherError(f"the weights in {folder} cannot be read: {error}") from error
    # transformers draws what a file lacks at random and only says so
    if lacking := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise TeacherError(
            f"the weights in {folder} are no whole DINOv3: {len(lacking)} are missing, e.g. {lacking[0]}."
        )
    assert net.config.num_register_tokens == facts.registers
    return net


@contextlib.contextmanager
def _transformers() -> Iterator[Any]:
    """The package, without its progress bars and load reports."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise TeacherError(_NO_EXTRA) from None
    if not hasattr(transformers, "DINOv3ViTModel"):
        raise TeacherError(f"transformers {transformers.__version__} has no DINOv3; it needs 4.56 or newer.")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def licence_of(folder: Path) -> str:
    """The licence of the weights in a folder, from the LICENSE file or the model card beside them."""
    for path in sorted(folder.glob("LICENSE*")):
        lines = [line.strip("# ").strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        if title := next(filter(None, lines), ""):
            return f"{title} ({path.name} beside the weights)"
    card = folder / "README.md"
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else ():
        key, _, value = line.partition(":")
        if key == "license_name" or (key == "license" and value.strip() != "other"):
            return f"{value.strip()} (the model card beside the weights)"
    return f"nothing beside the weights says so; Meta's DINOv3 are under the DINOv3 License, {LICENSE_URL}"


def slice_positions(depth: int, count: int) -> list[int]:
    """The slices floor((j + .5) depth / count) for j = 0 .. count - 1; every slice once where there are fewer than count."""
    count = min(depth, count)
    return [(2 * j + 1) * depth // (2 * count) for j in range(count)]


def slices_as_rgb(
    x: Tensor, positions: Sequence[int], context: Literal["neighbours", "repeat"] = "neighbours"
) -> Tensor:
    """(B, C, *S) patches -> (B * count, 3, H, W) images in [0, 1] of the slices at positions along D; 2D has one slice, 0.

    Three channels are taken as red, green and blue. Any other number is averaged to grey, and the image's channels are then
    the slice z three times ("repeat") or z - 1, z, z + 1 ("neighbours"), where the border repeats the last slice.
    A channel of a patch that lies in [0, 1] is taken as it is, any other is rescaled by its own extremes in the patch: what
    was prepared by z-scores would be far out of the teacher's range.
    """
    x = _unit_range(x)
    x = x.unsqueeze(2) if x.dim() == 4 else x  # (B, C, D, H, W)
    if x.shape[1] == 3:
        images = [x[:, :, z] for z in positions]
    else:
        grey, last = x.mean(1), x.shape[2] - 1
        reach = (-1, 0, 1) if context == "neighbours" else (0, 0, 0)
        images = [torch.stack([grey[:, min(max(z + r, 0), last)] for r in reach], 1) for z in positions]
    return torch.stack(images, 1).flatten(0, 1)


def _unit_range(x: Tensor) -> Tensor:
    space = tuple(range(2, x.dim()))
    low, high = x.amin(space, keepdim=True), x.amax(space, keepdim=True)  # (B, C, 1, ...)
    fits = (low >= 0) & (high <= 1)
    low, high = low.masked_fill(fits, 0.0), high.masked_fill(fits, 1.0)
    return (x - low) / (high - low).clamp_min(1e-6)


def read_slices(features: Tensor, positions: Sequence[int], depth: int, grid: Sequence[int]) -> Tensor:
    """Features (B, C, d, h, w) of patches that were `depth` voxels deep, read trilinearly -> (B * count, C, *grid).

    Slice z lies at (z + .5) d / depth - .5 of their depth, between two planes of features as a rule; height and width are
    covered evenly by the grid, as by the teacher's places. Features of 2D patches are (B, C, h, w), with depth 1.
    """
    features = features.unsqueeze(2) if features.dim() == 4 else features
    planes = features.shape[2]
    read: list[Tensor] = []
    for z in positions:
        at = min(max((z + 0.5) * planes / depth - 0.5, 0.0), planes - 1.0)
        below = int(at)
        read.append(
            torch.lerp(features[:, :, below].float(), features[:, :, min(below + 1, planes - 1)].float(), at - below)
        )
    return F.interpolate(torch.stack(read, 1).flatten(0, 1), size=list(grid), mode="bilinear", align_corners=False)


def feature_distance(student: Tensor, teacher: Tensor, *, uniqueness: bool = False) -> Tensor:
    """Mean over all places of w ||f_S / |f_S| - f_T / |f_T| ||^2 = w (2 - 2 cos), summed over channels; in [0, 4] with w = 1.

    student, teacher: (M, L, C) features of L places of each of M images. uniqueness: w of a place is 1 minus its mean cosine
    to the other places of its image in the teacher's eyes, over the mean of that in the image.
    """
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    distance = (student - teacher).square().sum(-1)  # (M, L)
    if uniqueness:
        distance = distance * _uniqueness(teacher)
    total, places = sum_over_ranks(torch.stack([distance.sum(), distance.new_full((), distance.numel())])).unbind()
    return total / places


def _uniqueness(teacher: Tensor) -> Tensor:
    """(M, L) weights with mean 1 in each image. teacher: (M, L, C), of length 1."""
    others = max(teacher.shape[1] - 1, 1)
    cosines = (teacher * teacher.sum(1, keepdim=True)).sum(-1) - 1  # summed over the other places
    unlike = (1 - cosines / others).clamp_min(0)
    return unlike / unlike.mean(1, keepdim=True).clamp_min(1e-6)
