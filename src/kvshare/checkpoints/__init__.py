"""Weights, configs and tokenizers on disk: safetensors directories, GGUF files, installed packages, hub names."""

from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.resolve import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
