"""Measurements of several rounds put together: medians, shares of what the machine could do, ratios within a round."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvshare.benchmark.machine import Machine
from kvshare.benchmark.run import Measurement
from kvshare.benchmark.work import PromptFlops

Row = Mapping[str, Any]
"""One measurement as JSON: what `row` returns, and what was seen from outside (memory); or `unfinished_s`, or `error`."""


def row(number: int, engine: str, measured: Measurement, machine: Machine, flops: PromptFlops | None) -> dict[str, Any]:
    """A measurement beside what the machine did in the same round."""
    return {"round": number, "engine": engine, **asdict(machine), **asdict(measured), **(flops._asdict() if flops else {})}


SAME_REGIME = 1.2
"""Decode speeds are compared where the highest bandwidth measured around either is at most so many times the lowest."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One engine at one context and batch: medians over rounds. None is what nobody measured, or what cannot be said."""

    engine: str
    context: int
    batch: int
    rounds: int
    ttft_s: float | None = None
    prefill_tok_s: float | None = None
    gemm_share: float | None = None  # operations that the prompt needs, over what the round's GEMM peak allows in that time
    least_share: float | None = None  # the same without what the last owner makes of rows that nobody asks for
    decode_tok_s: float | None = None  # of all sequences together
    read_gb_s: float | None = None  # that a decode step must read over the time it took
    read_share: float | None = None  # of the bandwidth around the steps; of the round's where that was not measured
    prefill_ratio: float | None = None  # the first engine's speed over this one's
    decode_ratio: float | None = None  # where some rounds are not marked, of those; otherwise of the marked ones
    level_ratio: float | None = None  # of decode speeds over the bandwidth around them, of all rounds
    compared: int = 0  # rounds in which both were measured
    marked: int = 0  # of these, the ones in which the machine read at another speed around either's decode steps
    held_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_anonymous_bytes: int | None = None
    note: str = ""


def summarize(rows: Iterable[Row], first: str | None = None) -> list[Summary]:
    """One summary for each engine, context and batch, in order of batch and context; ratios are to `first`, within a round."""
    groups: dict[tuple[int, int, str], dict[int, Row]] = defaultdict(dict)
    for each in rows:
        if "context" in each:
            groups[each["batch"], each["context"], each["engine"]][each["round"]] = each
    order = {engine: place for place, engine in enumerate(dict.fromkeys(key[2] for key in groups))}
    return [
        _summary(*key, by_round, groups.get((key[0], key[1], first), {}) if first and key[2] != first else {})
        for key, by_round in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] != first, order[item[0][2]]))
    ]


def unfinished(each: Row) -> str:
    """Why there is no figure."""
    if "at_least_s" in each:
        return f"longer than {each['limit_s']:.0f} s: {each['at_least_s']:.0f} s already at the pace of the shorter prompt; not tried"
    return each.get("error") or f"not finished in {each['unfinished_s']:.0f} s"


def decode_reads(each: Row) -> list[float]:
    """10^9 bytes a second, measured right around a row's decode steps; where that was not done, in its round."""
    return each.get("around_gb_s") or ([each["read_gb_s"]] if "read_gb_s" in each else [])


def decode_share(each: Row) -> float | None:
    """The bytes that a decode step must read over the time it took, over the highest bandwidth measured around it."""
    speed, limits = _decode_gb_s(each), decode_reads(each)
    return speed / max(limits) if speed and limits else None


def same_regime(*rows: Row) -> bool:
    """Whether the machine read equally fast around the decode steps of all rows."""
    return in_one_regime([speed for each in rows for speed in decode_reads(each)])


def in_one_regime(speeds: Sequence[float]) -> bool:
    """Whether bandwidths are equal within `SAME_REGIME`."""
    return not speeds or max(speeds) <= SAME_REGIME * min(speeds)


def _readable(each: Row) -> float:
    """10^9 bytes that the machine could have read during one decode step."""
    return each["decode_s"] * max(decode_reads(each))


def _decode_gb_s(each: Row) -> float | None:
    return each["step_bytes"] / each["decode_s"] / 1e9 if each.get("step_bytes") else None


def _summary(batch: int, context: int, engine: str, by_round: Mapping[int, Row], firsts: Mapping[int, Row]) -> Summary:
    done = {number: each for number, each in by_round.items() if "ttft_s" in each}
    if not done:
        why = next(iter(by_round.values()))
        return Summary(engine, context, batch, 0, note=unfinished(why))
    common = [number for number in done if "ttft_s" in firsts.get(number, {})]

    def median(value: Callable[[Row], float | None]) -> float | None:
        found = [number for number in map(value, done.values()) if number is not None]
        return statistics.median(found) if found else None

    def whole(name: str) -> int | None:
        found = median(lambda each: each.get(name))
        return None if found is None else round(found)

    def ratio(name: str, numbers: Sequence[int]) -> float | None:
        return statistics.median(by_round[number][name] / firsts[number][name] for number in numbers) if numbers else None

    same = [number for number in common if same_regime(by_round[number], firsts[number])]
    level = [_readable(by_round[n]) / _readable(firsts[n]) for n in common if decode_reads(by_round[n]) and decode_reads(firsts[n])]

    def share(each: Row, flops: str) -> float | None:
        return each[flops] * batch / each["ttft_s"] / 1e9 / each["gemm_gflop_s"] if each.get(flops) else None

    return Summary(
        engine,
        context,
        batch,
        len(done),
        ttft_s=median(lambda each: each["ttft_s"]),
        prefill_tok_s=median(lambda each: context * batch / each["ttft_s"]),
        gemm_share=median(lambda each: share(each, "prompt_flops")),
        least_share=median(lambda each: share(each, "least_flops")),
        decode_tok_s=median(lambda each: batch / each["decode_s"]),
        read_gb_s=median(_decode_gb_s),
        read_share=median(decode_share),
        prefill_ratio=ratio("ttft_s", common),
        decode_ratio=ratio("decode_s", same or common),
        level_ratio=statistics.median(level) if level else None,
        compared=len(common),
        marked=len(common) - len(same),
        held_bytes=whole("held_bytes"),
        peak_rss_bytes=whole("peak_rss_bytes"),
        peak_anonymous_bytes=whole("peak_anonymous_bytes"),
    )
