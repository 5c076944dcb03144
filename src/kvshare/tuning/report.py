"""A tuning as JSON: the file that `--kv-dtype` takes, with everything that was measured in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvshare.layout import CacheLayout
from kvshare.tuning.tune import REFERENCE, Measured, Tuning


def to_json(tuning: Tuning, layout: CacheLayout, model: str) -> dict[str, Any]:
    """`kv_dtype` is what the engine reads; the rest says where it comes from. Bytes at `context` tokens, KL in nats a token."""
    return {
        "kv_dtype": {str(owner): name for owner, name in tuning.chosen.items()},
        "model": model,
        "reference": REFERENCE,
        "target_kl": tuning.target_kl,
        "context": tuning.context,
        "reference_bytes": tuning.reference_bytes,
        **({"interrupted": True} if tuning.interrupted else {}),
        **_measured(tuning.found),
        "uniform": {name: _measured(one) for name, one in tuning.uniform.items()},
        "owners": [
            {
                "layer": owner,
                "attention": layout.layers[owner].kind,
                "readers": list(layout.readers(owner)),
                "chosen": tuning.chosen[owner],
                "alone": {name: _measured(one) for name, one in forms.items()},
            }
            for owner, forms in tuning.owners.items()
        ],
    }


def _measured(one: Measured) -> dict[str, Any]:
    return {"bytes": one.bytes, **asdict(one.divergence)}
