"""DARTS-ES and DARTS-ADA: what a search does where lambda_max has grown (paper, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rdarts_fast.config import SearchConfig
from rdarts_fast.events import Events
from rdarts_fast.run_dir import RunDir
from rdarts_fast.search_state import SearchState


def goes_on(settings: SearchConfig, state: SearchState, run: RunDir, events: Events) -> bool:
    """Whether there is an epoch to search. Where the trace has fired, DARTS-ES ends, and DARTS-ADA
    goes back as long as it can regularise more (paper, section 3).
    """
    stop_epoch = state.trace.stop_epoch
    if stop_epoch is not None and settings.early_stop == "stop":
        return False
    stronger = state.regularisation.raised(settings)
    if stop_epoch is not None and stronger is not None:
        branch, records = state.branch + 1, state.records
        state.from_checkpoint(run.load_checkpoint(epoch_checkpoint(stop_epoch)))
        state.branch, state.records = branch, records
        state.regularise(stronger)
        run.save_checkpoint(state.to_checkpoint())
        mark_abandoned(run, state)
        events.rewind(state.epoch)
        print(
            f"lambda_max has grown: back to the end of epoch {stop_epoch}, from there with weight "
            f"decay {stronger.weight_decay:g} and drop path {stronger.drop_path_prob:g}",
            flush=True,
        )
    return state.epoch < settings.epochs


def epoch_checkpoint(epoch: int) -> str:
    """Return the name of the checkpoint that a rollback to the end of an epoch needs."""
    return f"epoch-{epoch:03d}"


def save_for_rollback(settings: SearchConfig, state: SearchState, run: RunDir) -> None:
    """Keep the state where a rollback may need it, and no state that none can need any more.

    The rule names the epoch `lag` before the measurement at which it fires: this one, or the first
    after a rollback.
    """
    if settings.adaptive == "off":
        return
    trace, done = state.trace, state.epoch - 1
    left = state.regularisation.raises_left(settings)
    if left and done % trace.every == 0 and done >= trace.start_epoch:
        run.save_checkpoint(state.to_checkpoint(), epoch_checkpoint(done))
    oldest = max(done - trace.lag - (left - 1) * (trace.lag - trace.every), 0)
    kept = range(oldest, done + 1) if left else ()
    run.prune_checkpoints([epoch_checkpoint(epoch) for epoch in kept])


def mark_abandoned(run: RunDir, state: SearchState) -> None:
    """Mark in metrics.jsonl the epochs that a rollback has undone."""
    run.mark_metrics("abandoned", lambda records: abandoned(records, state.epoch))


def abandoned(records: Sequence[Mapping[str, Any]], next_epoch: int) -> list[bool]:
    """Return of each epoch's record whether a later one, or the next to come, is of an epoch not
    after it.
    """
    flags, first = [], next_epoch
    for record in reversed(records):
        flags.append(record["epoch"] >= first)
        first = min(first, record["epoch"])
    return flags[::-1]


def early_stop(metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the record of the epoch that DARTS-ES stops with, by the first time the rule fired;
    None where it never did.
    """
    for i, record in enumerate(metrics):
        if "stop_epoch" in record:
            return next(r for r in metrics[i::-1] if r["epoch"] == record["stop_epoch"])
    return None
