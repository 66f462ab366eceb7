"""The words and the tables of the demo."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.table import Table

from integration.demo.figures import OURS, STOCK, STOCK_ZSTD, Part, Results, Resume, merge, rate

LABELS = {OURS: "dcp-storage", STOCK: "stock DCP", STOCK_ZSTD: "stock DCP + ZStandard"}
_KEYS = {"model": "weights", "model_bf16": "weights to ship", "optim": "AdamW moments"}
_SHOWN_BYTES = 1_000_000


def machine_text(machine: dict[str, Any]) -> str:
    """Return the machine in one line."""
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}"


def weights_text(weights: dict[str, int]) -> str:
    """Return what was loaded."""
    millions = weights["values"] / 1e6
    return f"all-MiniLM-L6-v2: {weights['tensors']} tensors, {millions:.1f} M parameters, {_mb(weights['bytes'])} MB"


def train_text(results: Results) -> str:
    """Return how the training went."""
    losses = results.losses
    how = f"{len(losses)} AdamW steps, FSDP2 on {ranks_text(results.ranks)} (gloo)"
    return f"{how}: loss {losses[0]:.2f} -> {losses[-1]:.2f}"


def save_text(results: Results) -> str:
    """Return what was saved."""
    raw = merge(results.parts[OURS])
    rounds = len(results.save_s[OURS])
    synced = ", synced to disk" if results.place.is_local else ""
    return f"{_mb(raw.raw_bytes)} MB of weights and moments, with each of {len(LABELS)} writers {rounds} times{synced}"


def kill_text(results: Results, step: int) -> str:
    """Return how the ranks died, and what the save under way had come to."""
    when = f"SIGKILL to {ranks_text(results.ranks)} {results.killed_after_s:.2f} s into replacing step {step}"
    outcome = "it had been committed" if results.second_save_finished else "never finished"
    return f"{when} by step {step + 1} (async_save, {outcome})"


def resume_text(resume: Resume, results: Results) -> str:
    """Return what there is to say about a resume."""
    check = resume.checks[OURS]
    outcome = f"[red]{len(check.different)} DIFFER[/red]" if check.different else "[green]bit-exact[/green]"
    same = resume.loss == results.evaluated.get(check.step)
    loss = f"loss {resume.loss:.4f} {'as before' if same else '[red]NOT as before[/red]'}"
    tensors = f"{check.tensors} tensors, {_mb(check.raw_bytes)} MB, {outcome}"
    return f"{ranks_text(resume.ranks)}: step {check.step}, {tensors}; {loss}; next step {resume.next_loss:.2f}"


def ranks_text(count: int) -> str:
    """Return `1 rank` or `N ranks`."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def speed_table(results: Results) -> Table:
    """Return size and times by contestant."""
    raw_bytes = merge(results.parts[OURS]).raw_bytes
    loads = [f"Load on {ranks_text(resume.ranks)}" for resume in results.resumes]
    table = _table(f"One checkpoint of {_mb(raw_bytes)} MB, saved from {ranks_text(results.ranks)}")
    for column in ("Stored", "Ratio", "Save", *loads):
        table.add_column(column, justify="right")
    for name, label in LABELS.items():
        parts = merge(results.parts[name])
        times = (results.save_s[name], *(resume.load_s[name] for resume in results.resumes))
        cells = (f"{median(seconds):.2f} s {rate(raw_bytes, seconds):5.0f} MB/s" for seconds in times)
        table.add_row(label, f"{_mb(parts.stored_bytes)} MB", f"{parts.ratio:.3f}", *cells, style=_style(name))
    return table


def ratio_table(results: Results) -> Table:
    """Return the stored share by dtype and kind of tensor."""
    table = _table("Stored size as a share of the raw size")
    for column in ("Raw", *LABELS.values()):
        table.add_column(column, justify="right")
    by_row = {name: _rows(parts) for name, parts in results.parts.items()}
    for row, part in by_row[OURS].items():
        ratios = (f"{by_row[name][row].ratio:.3f}" for name in LABELS)
        table.add_row(row, f"{_mb(part.raw_bytes)} MB", *ratios)
    return table


def closing(results: Results) -> Iterator[str | Table]:
    """Yield what stands below the story."""
    for table in (speed_table(results), ratio_table(results)):
        yield ""
        yield table
    yield ""
    yield verdict(results)


def verdict(results: Results) -> str:
    """Return the closing line."""
    if results.failures:
        return "[bold red]FAILED[/bold red]: " + "; ".join(results.failures)
    counts = ", ".join(str(resume.ranks) for resume in results.resumes)
    saved = 1 - merge(results.parts[OURS]).stored_bytes / merge(results.parts[STOCK]).stored_bytes
    faster = median(results.save_s[STOCK]) / median(results.save_s[OURS])
    pace = f"{faster:.1f}x as fast" if faster >= 1 else f"slower ({faster:.2f}x)"
    return (
        f"[bold green]OK[/bold green]: bit-exact after the kill on {counts} ranks; "
        f"{saved:.0%} fewer bytes than stock DCP, and saving is {pace}."
    )


def _rows(parts: list[Part]) -> dict[str, Part]:
    """Return a row for each kind, then for each dtype that has several; without the few bytes of position ids."""
    large = [part for part in parts if part.raw_bytes >= _SHOWN_BYTES]
    rows = {f"{part.dtype}  {_KEYS.get(part.key, part.key)}": part for part in large}
    for dtype in {part.dtype: None for part in large}:
        of_dtype = [part for part in large if part.dtype == dtype]
        if len(of_dtype) > 1:
            rows[f"{dtype}  all"] = merge(of_dtype, dtype=dtype)
    return rows


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    return table


def _style(name: str) -> str:
    return "bold" if name == OURS else ""


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"
