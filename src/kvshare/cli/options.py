"""Options that several verbs take, said once: which model, how it is loaded, how tokens are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvshare.cli.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    from kvshare.engine.llm import LLM

MODEL_HELP = "A directory, a .gguf file, a name on the hub, the name of weights in an installed package (smollm2, gemma3-270m), or demo."

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=MODEL_HELP)]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(envvar="KVSHARE_DTYPE", rich_help_panel="Model", help="auto: bfloat16, unless the checkpoint is float32."),
]
MaxContext = Annotated[
    str | None,
    typer.Option(
        "--max-context",
        "--max-model-len",
        envvar=["KVSHARE_MAX_CONTEXT", "KVSHARE_MAX_MODEL_LEN"],
        metavar="TOKENS",
        show_default="the model's limit, or what fits",
        rich_help_panel="Model",
        help="Most tokens of prompt and answer; 32k is 32,768.",
    ),
]
KVMemory = Annotated[
    str | None,
    typer.Option(
        envvar="KVSHARE_KV_MEMORY",
        metavar="SIZE",
        show_default="what the context needs",
        rich_help_panel="Model",
        help="Memory for the cache, like 2GB or 512MiB.",
    ),
]
KVLayout = Annotated[
    Literal["plain", "compact", "v-only"],
    typer.Option(
        envvar="KVSHARE_KV_LAYOUT",
        rich_help_panel="Model",
        help="What Gemma 4's layers with keys equal to values store: both, V and the rotated part of K, or V alone.",
    ),
]
Weights = Annotated[
    Literal["auto", "native", "bf16", "int8", "int4"],
    typer.Option(
        envvar="KVSHARE_WEIGHTS",
        rich_help_panel="Model",
        help="native: multiply with the quantized blocks of a GGUF file as they are; bf16: widen them; int8, int4: also quantize what is "
        "plain, at load; auto: native where the kernels are built, plain numbers with --dtype float32 or float16.",
    ),
]
Activations = Annotated[
    Literal["int16", "int8"],
    typer.Option(
        envvar="KVSHARE_ACTIVATIONS",
        rich_help_panel="Model",
        help="What activations are rounded to where up to 48 rows meet quantized blocks, each 32 with a scale: int8 multiplies three and "
        "more rows in up to half the time, and costs as much accuracy as int8 weights, in some models several times as much. "
        "Longer chunks of prompts are not rounded.",
    ),
]
WeightCache = Annotated[
    bool,
    typer.Option(
        envvar="KVSHARE_WEIGHT_CACHE",
        rich_help_panel="Model",
        help="Keep weights that were quantized at load on disk (in $KVSHARE_CACHE or the user's cache), and map them the next time.",
    ),
]
KV_DTYPES = (
    "bf16, fp16, fp32, fp8, int8, int4, rot9, rot8, rot4, rot3, rot2 (rotated), native (DeepSeek's own), "
    "one of them with the newest rows in bf16 (rot4+32)"
)
KVDtype = Annotated[
    str | None,
    typer.Option(
        envvar="KVSHARE_KV_DTYPE",
        metavar="NAME|FILE",
        show_default="as --dtype",
        rich_help_panel="Model",
        help=f"Precision of the cache: {KV_DTYPES}, or a .json file that kvshare tune wrote. Below 16 bits the cache takes less memory, "
        "and less time to read where kernels are built.",
    ),
]

_MODELS_OWN = "the model's own"
Temperature = Annotated[
    float | None, typer.Option(show_default=_MODELS_OWN, rich_help_panel="Sampling", help="0 always takes the most probable token.")
]
TopK = Annotated[
    int | None, typer.Option(show_default=_MODELS_OWN, rich_help_panel="Sampling", help="Choose among that many; 0 is all of them.")
]
TopP = Annotated[
    float | None,
    typer.Option(show_default=_MODELS_OWN, rich_help_panel="Sampling", help="Choose among the fewest tokens that reach this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option(show_default=_MODELS_OWN, rich_help_panel="Sampling", help="Drop tokens below this share of the best one's probability."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(show_default=_MODELS_OWN, rich_help_panel="Sampling", help="Above 1 makes tokens of prompt and answer less probable."),
]
PresencePenalty = Annotated[
    float | None, typer.Option(show_default="0", rich_help_panel="Sampling", help="Taken off the logits of tokens that the answer has.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(show_default="0", rich_help_panel="Sampling", help="The same, for each time that the answer has them.")
]
Seed = Annotated[int | None, typer.Option(show_default="random", rich_help_panel="Sampling", help="The same seed gives the same text.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", show_default=False, rich_help_panel="Sampling", help="End before this text; may be given several times."),
]


def load_llm(
    model: str,
    dtype: str,
    max_context: str | None = None,
    kv_memory: str | None = None,
    kv_layout: str = "plain",
    kv_dtype: str | None = None,
    weights: str = "auto",
    weight_cache: bool = True,
    activations: Literal["int16", "int8"] = "int16",
    max_sequences: int = 1,
) -> LLM:
    """Load what the command line named, and say on stderr which file that is."""
    tokens = parse_tokens(max_context) if max_context is not None else None
    memory = parse_bytes(kv_memory) if kv_memory is not None else None

    from kvshare.checkpoints.resolve import locate
    from kvshare.engine.llm import LLM

    path = locate(model)
    typer.secho(f"{model}: {path}" if str(path) != model else model, err=True, dim=True)
    return LLM(
        path,
        dtype=dtype,
        max_context=tokens,
        kv_memory=memory,
        kv_layout=kv_layout,
        kv_dtype=kv_dtype,
        weights=weights,
        weight_cache=weight_cache,
        activations=activations,
        max_sequences=max_sequences,
    )
