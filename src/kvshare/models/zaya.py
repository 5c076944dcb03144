"""ZAYA1 (Zyphra 2026) with compressed convolutional attention (CCA, arXiv 2510.04476): attention happens inside a compressed space.

Queries and keys are projected to few dimensions and mixed over time by a causal convolution; half of every token's values belong to the
token before it. The cache of a layer is its keys and values, and per sequence the convolution's tail and one delayed value.

Feed-forward: one expert a token, chosen by a small network whose input also carries the routers of the layers below (depth averaging).
The residual stream is float32 and scaled wherever something is added to it. Checkpoints come in two schemas, native and legacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.cache.step import Step
from kvshare.checkpoints.source import Source
from kvshare.kernels import recurrent, routing, small_ops
from kvshare.layers.activations import gelu, swiglu
from kvshare.layers.causal_conv import CausalWindows, TwoStageConv
from kvshare.layers.embedding import Embedding
from kvshare.layers.experts import Experts
from kvshare.layers.linear import Linear, RouterLinear
from kvshare.layers.norm import RMSNorm, add_scaled
from kvshare.layers.rotary import Rotation, frequencies
from kvshare.layout import CacheLayout
from kvshare.models.model import Model
from kvshare.models.zaya_config import FULL, SLIDING, ZayaConfig
from kvshare.models.zaya_names import zaya_sources


class Attention(nn.Module):
    """CCA. Below, d is the head's width, h a query head and g(h) its key-value head."""

    def __init__(self, config: ZayaConfig, index: int):
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_packed = config.num_heads + config.num_kv_heads  # query and key heads go through the convolution together
        half = config.num_kv_heads * config.head_dim // 2  # numbers of a token's current values, and of its delayed ones
        self.sizes = (self.num_packed * config.head_dim, half, half)
        self.project = Linear(config.hidden_size, sum(self.sizes), config.bias)  # queries, keys, current values, delayed values
        self.conv = TwoStageConv(self.num_packed, config.head_dim, *config.conv_taps)
        self.temperature = nn.Parameter(torch.empty(config.num_kv_heads))
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, config.bias)

    def append(self, x: Tensor, rotation: Rotation, windows: Windows | InPlace, step: Step) -> Tensor:  # [tokens, hidden]
        """Keys and values go into the cache, the convolution's tail and the delayed value into its states.

        Returns the rotated queries [tokens, heads, head_dim]: they come out of the same convolution.
        """
        projected = self.project(x)
        if isinstance(windows, InPlace):
            qk, v = self._stepped(projected, step)
        else:
            qk, v = self._mixed(projected, windows, step)
        q, k = (rotation.half_split(each) for each in qk.split((self.num_heads, self.num_kv_heads), dim=1))
        step.append(self.index, {"k": k, "v": v.unflatten(-1, (self.num_kv_heads, self.head_dim))})
        return q

    def _stepped(self, projected: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What `_mixed` gives, in one native call."""
        conv, delayed = step.state_in_place(self.index, "conv"), step.state_in_place(self.index, "delayed_value")
        if conv is None or delayed is None:
            raise RuntimeError("convolutions are stepped in place only in steps of one token a sequence")
        first = None if self.project.bias is None else self.project.bias[-self.sizes[2] :]
        return recurrent.convolved(projected, self.native_weights(), conv, delayed, first)

    def native_weights(self) -> recurrent.ConvolvedHeads:
        conv = self.conv
        weights = conv.depthwise, conv.depthwise_bias, conv.grouped, conv.grouped_bias
        return recurrent.ConvolvedHeads(self.num_heads, self.num_kv_heads, self.head_dim, *weights, self.temperature)

    def _mixed(self, projected: Tensor, windows: Windows, step: Step) -> tuple[Tensor, Tensor]:
        """Queries above keys [tokens, packed heads, d], not rotated yet, and values [tokens, kv_heads * d]."""
        packed, current, delayed = projected.split(self.sizes, dim=-1)
        qk = self._unit(self._convolved(packed, windows.conv, step) + self._means(packed))
        k = qk[:, self.num_heads :] * self.temperature[:, None]
        values = torch.cat([current, self._shifted(delayed, windows.value, step)], dim=-1)
        return torch.cat([qk[:, : self.num_heads], k], dim=1), values

    def forward(self, q: Tensor, step: Step) -> Tensor:  # [tokens, heads, head_dim] -> [tokens, hidden]
        return self.output(step.attend(self.index, q, scale=self.head_dim**-0.5).flatten(1))

    def _convolved(self, packed: Tensor, windows: CausalWindows, step: Step) -> Tensor:  # [tokens, channels] -> [tokens, packed heads, d]
        tails = step.state(self.index, "conv").transpose(1, 2)  # [sequences, taps, channels]
        seen, tails = windows.gather(packed, tails)
        step.replace_state(self.index, "conv", tails.transpose(1, 2))
        return self.conv(seen)

    def _means(self, packed: Tensor) -> Tensor:  # [tokens, channels] -> [tokens, packed heads, d]
        """What passes by the convolution: (q_h + k_g(h)) / 2 to query h, and the mean of these over its query heads to key g."""
        heads = packed.unflatten(-1, (self.num_packed, self.head_dim))
        q, k = heads.split((self.num_heads, self.num_kv_heads), dim=1)
        means = (q.unflatten(1, (self.num_kv_heads, -1)) + k[:, :, None]) * 0.5  # [tokens, kv_heads, group, d]
        return torch.cat([means.flatten(1, 2), means.mean(2)], dim=1)

    def _unit(self, heads: Tensor) -> Tensor:  # [..., d]
        """Each head at length sqrt(d)."""
        length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).clamp_min(torch.finfo(heads.dtype).eps)
        return heads * (self.head_dim**0.5 / length)

    def _shifted(self, delayed: Tensor, windows: CausalWindows, step: Step) -> Tensor:  # [tokens, numbers]
        """Each token gets the numbers of the token before it. The projected numbers are cached, not the wider hidden state."""
        before = step.state(self.index, "delayed_value")  # [sequences, numbers]
        if self.project.bias is not None:  # what lies before the first token projects to the bias, not to 0
            fresh = torch.tensor([past == 0 for past in step.past], device=before.device)
            before = torch.where(fresh[:, None], self.project.bias[-self.sizes[2] :], before)
        seen, last = windows.gather(delayed, before[:, None])
        step.replace_state(self.index, "delayed_value", last[:, 0])
        return seen[:, 0]


@dataclass(frozen=True, slots=True)
class Windows:
    """Where predecessors lie, for the whole step."""

    conv: CausalWindows
    value: CausalWindows  # one token back


class InPlace:
    """Stands for windows where kernels find predecessors by position: in steps of one token a sequence."""


class Router(nn.Module):
    """Chooses one expert, or none, from a narrow state that is carried from layer to layer of the same token.

    The last class adds nothing, as in transformers. (Zyphra's training code adds the token itself there, times its probability; a bias
    of -1, the initial one, lets that class win only where the router is all but sure.)
    """

    def __init__(self, config: ZayaConfig, index: int):
        super().__init__()
        self.down = RouterLinear(config.hidden_size, config.router_width, bias=True)
        self.depth_scale = nn.Parameter(torch.empty(config.router_width)) if index else None
        self.norm = RMSNorm(config.router_width, config.eps)
        self.first = RouterLinear(config.router_width, config.router_width, bias=True)
        self.second = RouterLinear(config.router_width, config.router_width, bias=True)
        self.scores = RouterLinear(config.router_width, config.num_experts + 1)  # the last class is no expert
        self.balance = nn.Parameter(torch.empty(config.num_experts + 1))  # what the file holds, the last entry too

    def forward(self, x: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # [tokens, hidden], [tokens, router_width]
        """Chosen class and its weight [tokens, 1], and the state [tokens, router_width] for the router above."""
        state = self.down(x)
        if self.depth_scale is not None and below is not None:
            state = add_scaled(state, below, self.depth_scale)
        logits = self.scores(gelu(self.second(gelu(self.first(self.norm(state))))))
        if routing.takes(logits):
            return *routing.route(logits, 1, "softmax", x.dtype, bias=self.balance, tiny=None), state
        probabilities = logits.float().softmax(-1)  # [tokens, experts + 1]
        chosen = (probabilities + self.balance).argmax(-1, keepdim=True)
        return chosen, probabilities.gather(-1, chosen).to(x.dtype), state


class ResidualScale(nn.Module):
    """r <- (out + b) * s + (r + b') * s', channel by channel, in float32."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.hidden_states_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.hidden_states_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.residual_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.residual_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # 2 x [tokens, hidden] each
        """The sum, and the same in the type of `out`."""
        if small_ops.takes(out) and residual.dtype == torch.float32:
            pairs = (self.hidden_states_bias, self.hidden_states_scale), (self.residual_bias, self.residual_scale)
            return recurrent.scaled_residual(out, residual, *pairs)
        scaled = (out.float() + self.hidden_states_bias) * self.hidden_states_scale
        total = scaled + (residual + self.residual_bias) * self.residual_scale
        return total, total.to(out.dtype)


class Block(nn.Module):
    def __init__(self, config: ZayaConfig, layout: CacheLayout, index: int):
        super().__init__()
        self.index = index
        self.kind = FULL if layout.layers[index].stream("k").window is None else SLIDING
        self.attention_norm = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config, index)
        self.after_attention = ResidualScale(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.eps)
        self.router = Router(config, index)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_width, swiglu)
        self.after_mlp = ResidualScale(config)

    def forward(
        self,
        residual: Tensor,  # [tokens, hidden], float32
        x: Tensor,  # [tokens, hidden], the same in the model's type
        below: Tensor | None,  # [tokens, router_width], the router state of the layer below
        rotations: Mapping[str, Rotation],
        windows: Windows | InPlace,
        step: Step,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.attention.append(self.attention_norm(x), rotations[self.kind], windows, step)
        if step.narrows(self.index):  # every layer owns its rows, so this is the last one
            kept, step = step.rows_kept, step.tail()
            residual, q, below = residual[kept], q[kept], None if below is None else below[kept]
        residual, x = self.after_attention(self.attention(q, step), residual)
        x = self.mlp_norm(x)
        chosen, weights, state = self.router(x, below)
        return *self.after_mlp(self.experts(x, chosen, weights), residual), state


class Zaya(Model):
    released_as = ("the legacy schema: attention and experts as layers of their own",)
    unsupported = ("published FP8 and MXFP4 experts", "owner maps")

    def __init__(self, config: Mapping[str, Any], layout: CacheLayout):
        super().__init__()
        self.config = ZayaConfig.read(config)
        self.layout, self.vocab_size = layout, self.config.vocab_size
        hidden = self.config.hidden_size
        self.embedding = Embedding(self.vocab_size, hidden)
        self.input_scale, self.input_bias = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(hidden))
        self.blocks = nn.ModuleList(Block(self.config, layout, index) for index in range(len(layout.layers)))
        self.norm = RMSNorm(hidden, self.config.eps)
        self.head = None if self.config.tied else Linear(hidden, self.vocab_size)
        self.head_bias = nn.Parameter(torch.empty(self.vocab_size)) if self.config.head_bias else None
        self.frequencies = {kind: frequencies(rope, self.config.head_dim) for kind, rope in self.config.rope.items()}
        self.keep_float32 = frozenset(name for name, _ in self.named_parameters() if name.endswith(".balance") or ".after_" in name)

    def forward(self, tokens: Tensor, step: Step) -> Tensor:  # [tokens] -> [rows kept, hidden]
        x = self.embedding(tokens)
        rotations = {kind: waves.at(step.positions, x.dtype) for kind, waves in self.frequencies.items()}
        windows = self._windows(step, x)
        residual, state = (x.float() + self.input_bias) * self.input_scale, None
        x = residual.to(x.dtype)
        for block in self.blocks:
            residual, x, state = block(residual, x, state, rotations, windows, step)
        return self.norm(x)

    def _windows(self, step: Step, x: Tensor) -> Windows | InPlace:  # [tokens, hidden]
        first = self.blocks[0]
        assert isinstance(first, Block)
        if step.state_in_place(0, "conv") is not None and first.attention.native_weights().takes(x):
            return InPlace()
        return Windows(*(CausalWindows.of(step.counts, taps, x.device) for taps in (sum(self.config.conv_taps) - 2, 1)))

    def logits(self, hidden: Tensor) -> Tensor:  # [rows, hidden] -> [rows, vocab_size]
        scores = self.embedding.scores(hidden) if self.head is None else self.head.scores(hidden)
        return scores if self.head_bias is None else scores + self.head_bias

    def weight_sources(self) -> dict[str, Source]:
        return zaya_sources((name for name, _ in self.named_parameters()), self.config)
