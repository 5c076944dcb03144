"""From a checkpoint to a model: which tensors make up which parameter, checked before they are read, without a second copy of the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from kvshare.checkpoints.block_layers import layers_in_blocks, put_block_layer
from kvshare.checkpoints.checkpoint import Checkpoint
from kvshare.checkpoints.gguf_blocks import PackedBlocks
from kvshare.checkpoints.mapped_rows import expect_random_reads
from kvshare.checkpoints.progress import Progress
from kvshare.checkpoints.resident import ResidentMemory
from kvshare.checkpoints.source import Source
from kvshare.errors import CheckpointError
from kvshare.kernels.quantized_weight import ActivationWidth
from kvshare.layout import layout_from_config

logger = logging.getLogger(__name__)

_SHOWN = 5  # names listed in a message before "and N more"
_KEY_VALUE = re.compile(r"^model\.layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")


class Loadable(Protocol):
    """What is loaded besides being a module, built on the meta device: it says what it is made of.

    Two attributes may name parameters to be treated in another way. `keep_float32`: they become float32, whatever the
    model's dtype. `memory_mapped`: tables of which a step reads a few rows; they stay where they are in the file, and where
    that holds blocks, the parameter is replaced by its `PackedBlocks`, whose `rows` decodes the rows it is asked for.
    """

    def weight_sources(self) -> Mapping[str, Source]:
        """For every parameter and persistent buffer, by its name in `state_dict()`, where it comes from."""
        ...


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    progress: Progress | None = None,
    keep_blocks: bool = False,
    resident: ResidentMemory | None = None,
    activations: ActivationWidth = "int16",
) -> tuple[str, ...]:
    """Fill `model`, built on the meta device, from `checkpoint`: floating-point numbers become `dtype`, integers stay what they are.

    With `keep_blocks`, linear layers, embeddings and experts that the checkpoint holds in quantized blocks keep them, and native kernels
    multiply with the blocks, by activations that are rounded to `activations`; without, all are widened to `dtype`.
    Every shape is compared before any data is read. A tensor that is stored in the dtype it is wanted in, and blocks, stay views of
    the mapped file, unless `resident` holds copies of all but the `memory_mapped` ones. Returns (and logs) the tensors of the file
    that nobody reads, but for the k and v of layers that share another layer's cache, which are expected to lie there dead. Raises
    `CheckpointError` for tensors that are missing or of another shape.
    """
    sources = matched_sources(model, checkpoint)
    wanted = model.state_dict(keep_vars=True)
    keep_float32, mapped = (frozenset(getattr(model, attribute, ())) for attribute in ("keep_float32", "memory_mapped"))
    block_layers = layers_in_blocks(model, sources, checkpoint) if keep_blocks else {}
    in_blocks = {name for names in block_layers.values() for name in names}
    total = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in wanted.values()}.values())
    done, loaded = 0, {}
    for name, old in wanted.items():
        if name in in_blocks:
            continue
        if id(old) not in loaded:  # a tied tensor is loaded once and stays tied
            goal = old.dtype if not old.is_floating_point() else torch.float32 if name in keep_float32 else dtype
            value = _mapped(checkpoint, sources[name]) if name in mapped else _read(checkpoint, sources[name], goal)
            if resident and name not in mapped and isinstance(value, Tensor):
                value = resident.hold(value)
            is_parameter = isinstance(old, nn.Parameter)
            loaded[id(old)] = nn.Parameter(value, requires_grad=False) if is_parameter and isinstance(value, Tensor) else value
            done += old.nbytes
            if progress:
                progress(done, total)
        _assign(model, name, loaded[id(old)])
    for path, names in sorted(block_layers.items()):  # behind the rest: the layer takes its bias along
        put_block_layer(model, path, [sources[name] for name in names], checkpoint, dtype, resident, activations)
        done += sum(wanted[name].nbytes for name in names)
        if progress:
            progress(done, total)
    return _report_unread(checkpoint, sources)


def matched_sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Source]:
    """Where each parameter comes from in this checkpoint, which is checked to have it in the right shape.

    Raises `CheckpointError` for tensors that are missing or of another shape, before any data is read.
    """
    present = checkpoint.names()
    sources = {name: source.present_in(present) for name, source in cast(Loadable, model).weight_sources().items()}
    wanted = model.state_dict(keep_vars=True)
    _check_names(model, wanted, sources)
    _check_file(wanted, sources, checkpoint)
    return sources


def _check_names(model: nn.Module, wanted: Mapping[str, Tensor], sources: Mapping[str, Source]) -> None:
    if wanted.keys() != sources.keys():
        difference = sorted(wanted.keys() ^ sources.keys())
        raise TypeError(f"{type(model).__name__}.weight_sources() and its state_dict() differ in {_listed(difference)}")


def _check_file(wanted: Mapping[str, Tensor], sources: Mapping[str, Source], checkpoint: Checkpoint) -> None:
    """Refuse, before reading any data, a checkpoint that lacks tensors or holds them in other shapes."""
    present = checkpoint.names()
    missing = sorted({name for source in sources.values() for name in source.names if name not in present})
    if missing:
        raise CheckpointError(f"{checkpoint.origin}: {len(missing)} tensors of this model are missing: {_listed(missing)}")
    wrong = []
    for name, tensor in wanted.items():
        shapes = [checkpoint.shape(part) for part in sources[name].names]
        found = sources[name].shape_of(shapes)
        if found != tuple(tensor.shape):
            parts = " + ".join(f"{part} {list(shape)}" for part, shape in zip(sources[name].names[:_SHOWN], shapes, strict=False))
            wrong.append(f"{parts} for a parameter of shape {list(tensor.shape)}")
    if wrong:
        raise CheckpointError(f"{checkpoint.origin}: {len(wrong)} tensors have another shape than the config says: {_listed(wrong)}")


def _read(checkpoint: Checkpoint, source: Source, dtype: torch.dtype) -> Tensor:
    """The source's tensor in `dtype`. Joined parts are converted one by one, so that no second copy of the whole exists."""
    if source.combine is not None:
        return source.combine([checkpoint.get(name, dtype) for name in source.names])
    if len(source.names) == 1:
        whole = checkpoint.get(source.names[0], dtype)
    else:
        shapes = [checkpoint.shape(name) for name in source.names]
        whole = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=dtype)
        for name, rows in zip(source.names, whole.split([shape[0] for shape in shapes]), strict=True):
            rows.copy_(checkpoint.get(name, dtype))
    return whole if source.stack is None else whole.unflatten(0, (source.stack, -1))


def _mapped(checkpoint: Checkpoint, source: Source) -> Tensor | PackedBlocks:
    """The source's one tensor where it lies in the file."""
    (name,) = source.names
    table = checkpoint.packed(name) or checkpoint.get(name)
    expect_random_reads(table if isinstance(table, Tensor) else table.blocks)
    return table


def _assign(model: nn.Module, name: str, value: Tensor | PackedBlocks) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(value, Tensor):
        delattr(module, leaf)  # a module keeps nothing but a tensor under the name of a parameter
    setattr(module, leaf, value)


def _report_unread(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> tuple[str, ...]:
    read = {name for source in sources.values() for name in source.names}
    owner = layout_from_config(checkpoint.config).owner
    unread = sorted(name for name in checkpoint.names() - read if not _is_dead(name, owner))
    if unread:
        logger.warning("%s: %d tensors are not part of this model and were not read: %s", checkpoint.origin, len(unread), _listed(unread))
    return tuple(unread)


def _is_dead(name: str, owner: tuple[int, ...]) -> bool:
    """Whether this is a key or value projection of a layer that reads another's cache: checkpoints ship them, nothing uses them."""
    match = _KEY_VALUE.match(name)
    return match is not None and int(match[1]) < len(owner) and owner[int(match[1])] != int(match[1])


def _listed(entries: list[str]) -> str:
    more = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
