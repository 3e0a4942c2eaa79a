"""Trained networks for others to use: ONNX, torch.export, safetensors and MONAI bundles, each checked and described."""

from tailseg.export.safetensors import load_safetensors as load_safetensors
