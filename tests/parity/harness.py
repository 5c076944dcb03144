"""Running one model in every way the engine can, to be compared with transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvshare.cache.arena import Arena
from kvshare.cache.paged_step import PagedCache, PagedStep
from kvshare.cache.step import DenseStep
from kvshare.cache.tables import SequenceCache
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.weights import load_weights
from kvshare.engine.decode_steps import DecodeSteps
from kvshare.layout import PrecisionChoice
from kvshare.models import build_model
from kvshare.models.model import Model

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values for every float parameter and persistent buffer: norms, scalars, temperatures and sinks at neutral values hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict())
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    gains = ("norm", "scale", "temp", "layer_scalar")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim <= 1:
                tensor.copy_(1 + 0.2 * noise if any(gain in name for gain in gains) else 0.2 * noise)
            else:
                tensor.copy_(noise * max(0.08, tensor.shape[-1] ** -0.5))
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def load(directory: Path, dtype: torch.dtype = torch.float32, kv_form: str = "plain") -> Model:
    """The model of a directory, through the code that users run."""
    checkpoint = open_checkpoint(directory)
    model = build_model(checkpoint.config, dtype, kv_form)
    load_weights(model, checkpoint, dtype)
    return model.eval()


class Paged:
    """A model, an arena and the sequences in it, driven by hand. Checks the plan against the arena after every step."""

    def __init__(
        self, model: Model, sequences: int, context: int = 512, dtype: torch.dtype = torch.float32, precision: PrecisionChoice | None = None
    ):
        self.model, self.precision = model, precision or PRECISION[dtype]
        page_bytes = model.layout.page_bytes(self.precision)
        pages = model.layout.peak_pages(context, sequences, self.precision, chunk=context) + 8
        self.arena = Arena(pages, page_bytes)
        self.arena.pages.fill_(0xFF)  # NaN in every float type: a row that is read before it is written shows
        self.cache = PagedCache(model.layout, self.precision, model.key_balance())
        self.decode_steps = DecodeSteps(model, self.cache)
        self.sequences = [SequenceCache(model.layout, self.arena, self.precision) for _ in range(sequences)]

    def replayed(self, tokens: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:  # -> [sequences, vocab]
        """What the engine would make of a step of one token a sequence."""
        with torch.inference_mode():
            return torch.stack(list(self.decode_steps.logits(tokens, caches)))

    @torch.no_grad()
    def step(self, tokens: Sequence[Tensor], which: Sequence[int] | None = None, keep: Sequence[int] | None = None) -> Tensor:
        """Append `tokens[i]` to sequence `which[i]`; logits of all rows, or of the rows in `keep`."""
        caches = [self.sequences[i] for i in (which if which is not None else range(len(tokens)))]
        counts = [len(t) for t in tokens]
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)
        found, states = None, [page for cache in caches for page in cache.state_pages]
        if set(counts) == {1} and keep is None:
            before = self.arena.pages[states]
            found = self.replayed([int(t) for t in tokens], caches)
            after, self.arena.pages[states] = self.arena.pages[states], before  # the step itself starts from there as well
        logits = self.model.logits(self.model(torch.cat(list(tokens)), PagedStep(self.cache, caches, counts, keep)))
        if found is not None:
            assert torch.equal(found, logits.float()), "a replayed step differs from the step itself"
            assert torch.equal(after, self.arena.pages[states]), "a replayed step leaves other states than the step itself"
        for cache, count in zip(caches, counts, strict=True):
            cache.commit(count)
            assert cache.num_pages == self.model.layout.held_pages(cache.num_tokens, self.precision)
        self.arena.check_integrity()
        return logits


@torch.no_grad()
def one_shot(model: Model, ids: Tensor) -> Tensor:  # [sequences, tokens] -> [sequences, tokens, vocab]
    step = DenseStep(model.layout, [ids.shape[1]] * ids.shape[0])
    return model.logits(model(ids.flatten(), step)).unflatten(0, ids.shape)


def chunked(model: Model, ids: Tensor, sizes: Sequence[int], dtype: torch.dtype = torch.float32, precision: str | None = None) -> Tensor:
    """All sequences side by side through the arena, `sizes` tokens a step."""
    paged, outs, start = Paged(model, len(ids), dtype=dtype, precision=precision), [], 0
    for size in sizes:
        outs.append(paged.step([row[start : start + size] for row in ids]).unflatten(0, (len(ids), size)))
        start += size
    assert start == ids.shape[1]
    return torch.cat(outs, dim=1)


def ragged(model: Model, ids: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each sequence advances by its own random number of tokens (also none) a step: prefill chunks and decode steps in one batch."""
    generator = torch.Generator().manual_seed(seed)
    paged, done = Paged(model, len(ids), dtype=dtype), [0] * len(ids)
    outs: list[list[Tensor]] = [[] for _ in ids]
    while min(done) < ids.shape[1]:
        takes = [int(torch.randint(0, 12, (), generator=generator)) for _ in ids]
        takes = [min(take, ids.shape[1] - d) for take, d in zip(takes, done, strict=True)]
        which = [i for i, take in enumerate(takes) if take]
        if not which:
            continue
        logits = paged.step([ids[i, done[i] : done[i] + takes[i]] for i in which], which)
        for i, part in zip(which, logits.split([takes[i] for i in which]), strict=True):
            outs[i].append(part)
            done[i] += takes[i]
    return torch.stack([torch.cat(parts) for parts in outs])


def last_rows_only(model: Model, ids: Tensor, chunk: int) -> Tensor:
    """Prefill in chunks that ask for no logits but the last row's: [sequences, vocab]."""
    paged = Paged(model, len(ids))
    logits = torch.empty(0)
    for start in range(0, ids.shape[1], chunk):
        parts = [row[start : start + chunk] for row in ids]
        final = start + chunk >= ids.shape[1]
        keep = [len(parts[0]) * (i + 1) - 1 for i in range(len(ids))] if final else []
        logits = paged.step(parts, keep=keep)
    return logits


def forked(model: Model, ids: Tensor, cut: int, precision: PrecisionChoice | None = None) -> Tensor:
    """The first `cut` tokens once, then a fork that runs something else in between: the original must not notice."""
    paged = Paged(model, 2, precision=precision)
    first = paged.step([ids[:cut]], [0])
    child = paged.sequences[1] = paged.sequences[0].fork()
    rest, noise = ids[cut:], (ids[cut:] + 1) % (int(ids.max()) + 1)
    outs = [first]
    for start in range(0, len(rest), 3):
        paged.step([noise[start : start + 3]], [1])
        outs.append(paged.step([rest[start : start + 3]], [0]))
    child.release()
    paged.sequences[0].release()
    assert paged.arena.num_free == paged.arena.num_pages
    return torch.cat(outs)


WAYS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "one shot": one_shot,
    "one shot, paged": lambda model, ids: chunked(model, ids, [ids.shape[1]]),
    "chunks of 7": lambda model, ids: chunked(model, ids, [7] * (ids.shape[1] // 7) + [ids.shape[1] % 7] * (ids.shape[1] % 7 > 0)),
    "odd chunks": lambda model, ids: chunked(model, ids, [3, 17, 1, 5, ids.shape[1] - 26]),
    "stepwise": lambda model, ids: chunked(model, ids, [1] * ids.shape[1]),
    "ragged": ragged,
    "forked": lambda model, ids: torch.stack([forked(model, row, 19) for row in ids]),
}


def assert_equals_oracle(model: Model, reference: Tensor, ids: Tensor, bound: float = 2e-4) -> None:
    """Every way of running gives the oracle's logits [sequences, tokens, vocab] within `bound`, also for the last row alone."""
    for name, run in WAYS.items():
        difference = (run(model, ids).double() - reference.double()).abs().max().item()
        assert difference < bound, f"{name}: logits differ by {difference:.2e}"
    for chunk in (ids.shape[1], 7):
        difference = (last_rows_only(model, ids, chunk).double() - reference[:, -1].double()).abs().max().item()
        assert difference < bound, f"last row only, chunks of {chunk}: logits differ by {difference:.2e}"


def random_ids(vocab: int, sequences: int = 2, tokens: int = 41, seed: int = 1) -> Tensor:
    return torch.randint(3, vocab, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def oracle_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """transformers' logits without a cache: [sequences, tokens, vocab]."""
    return model(input_ids=ids, use_cache=False).logits


def greedy(model: Model, prompts: Tensor, count: int) -> Tensor:  # [sequences, tokens] -> [sequences, count]
    """The likeliest continuation of each prompt, all sequences in one batch, a token a step."""
    paged, tokens = Paged(model, len(prompts)), []
    ends = [len(prompts[0]) * (i + 1) - 1 for i in range(len(prompts))]
    logits = paged.step(list(prompts), keep=ends)
    for _ in range(count):
        tokens.append(logits.argmax(-1))
        logits = paged.step(list(tokens[-1][:, None]))
    return torch.stack(tokens, dim=1)


def oracle_greedy(model: torch.nn.Module, prompts: Tensor, count: int) -> Tensor:  # [sequences, tokens] -> [sequences, count]
    """What transformers' `generate` continues each prompt with."""
    whole = model.generate(prompts, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    return whole[:, prompts.shape[1] :]
