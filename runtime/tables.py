"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .ahead import Built
    from .kernel_bench import Measured
    from .tune import Found
    from .verify import Verified


def amount(number: float) -> str:
    """`8.1 B`, `17.3 M`, `960`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: `8.1 GB`, `960 B`."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= one:
            return f"{number / one:.2f} {unit}"
    return f"{number:.0f} B"


def print_difference(data: dict[str, Any]) -> None:
    """The tables of `heddle diff`."""
    from .diff import written

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("", *(f"{n} ({f})" for n, f in zip(data["models"], data["families"], strict=True)), ""):
        table.add_column(title, justify="right" if title else "left")
    for name, (a, b) in data["figures"].items():
        known = a is not None and b is not None and a
        shown = ["cannot stream" if x is None else f"{x:,}" if name == "parameters" else amount(x) for x in (a, b)]
        table.add_row(name.replace("_", " "), *shown, f"{b / a:.3f}x" if known else "")
    console.print(table)
    for title, what in (("settings", "settings"), ("dims of weights", "dims"), ("parameters by block", "blocks")):
        if data[what]:
            table = Table(box=None, pad_edge=False)
            for column in (title, *data["models"]):
                table.add_column(column, justify="left" if column == title else "right", overflow="fold")
            for name, pair in data[what].items():
                table.add_row(name, *map(written, pair))
            console.print()
            console.print(table)
    weights = data["weights"]
    told = [f"{weights['same']} have the same path and shape"]
    for key, words in (("other_shape", "another shape"), ("only_first", "only in the first"),
                       ("only_second", "only in the second")):  # fmt: skip
        if weights[key]["count"]:
            some = list(weights[key]["examples"])
            named = ", ".join([*some[:4], *["..."] * (len(some) > 4)])
            told.append(f"{weights[key]['count']} {words} ({named})")
    second, first = reversed(data["models"])
    fits = f"`{second}` is a cut of `{first}`: `heddle prune` makes its weights" if data["is_part"] else (
        f"`{second}` is no cut of `{first}`: {data['why_not']}")  # fmt: skip
    console.print(f"\nweights: {', '.join(told)}\n{fits}", soft_wrap=True)


def print_summary(data: dict[str, Any]) -> None:
    """The table of `heddle show`."""
    console = Console(highlight=False)
    active = data["active_parameters"]
    routed = f", {active:,} for a token" if active < data["parameters"] else ""
    console.print(f"[bold]{data['model']}[/] ({data['family']}): {data['parameters']:,} parameters{routed}")
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    for title in ("copies", "parameters", "share"):
        table.add_column(title, justify="right")
    for row in data["blocks"]:
        share = row["parameters"] / max(1, data["parameters"])
        table.add_row(row["path"], str(row["copies"]), f"{row['parameters']:,}", f"{share:.1%}")
    console.print(table)
    console.print(f"{amount(data['flops_per_token'])}FLOP a token, forward, at {data['length']} tokens")
    if data["state_bytes"] is None:
        console.print("cannot be sampled from token by token: it reads ahead")
    else:
        console.print(f"{amount(data['state_bytes'])}B of state a sequence of {data['length']} tokens, rows in bf16")
    if "weights" in data:
        for weight in data["weights"]:
            dims = ", ".join(f"{d['name']} = {d['size']}" for d in weight["dims"])
            console.print(f"  {weight['path']}  \\[{dims}]  {weight['init']}")


def _print_opinion(said: dict[str, Any]) -> None:
    """What spmd_types says, and of what: uses that it was told of are not covered."""
    if "by" not in said:
        print(f"spmd_types: not asked ({said['why']})")
        return
    word = {True: "accepts it", False: f"REFUSES IT: {said['why']}", None: f"gives no answer ({said['why']})"}
    print(f"{said['by']}: {word[said['accepted']]}")
    print(f"        covered: {said['conversions']} conversions, {sum(said['read'].values())} uses of ops")
    reasons: dict[str, list[str]] = {}
    for op, why in said["why not"].items():
        reasons.setdefault(why, []).append(f"{said['trusted'][op]} {op}")
    for why, ops in reasons.items():
        print(f"        not covered: {', '.join(ops)} ({why})")


def print_card(card: dict[str, Any]) -> None:
    """A certificate, a line for each thing that was looked at."""
    mesh = ", ".join(f"{axis} = {n}" for axis, n in card["mesh"].items())
    proof, numbers, pipeline = card["proof"], card["numbers"], card["pipeline"]
    print(f"{card['model']} under `{card['layout']}` ({mesh}): {card['ranks']} ranks, {card['artifact']}")
    made = ", ".join(f"{n} {kind}" for kind, n in proof["conversions"].items()) or "none"
    print(f"proved: where {proof['values']} values are, and their gradients; conversions: {made}")
    print(f"        {proof['weights']} weights, {proof['split']} split, {proof['owed']} with a sum owed once a step")
    run = card["run"]
    ends = {True: "comes to its end", False: "DOES NOT COME TO ITS END", None: "was not run to its end"}[run["ends"]]
    told = " at ".join(x for x in (run["why"], run["line"]) if x)
    print(f"run: one step, on shapes alone, {ends}{f': {told}' if told else ''}")
    _print_opinion(card["opinion"])
    if pipeline:
        once = "each layer in one" if pipeline["once"] else "A LAYER IN NONE OR TWO"
        ends = "the schedule ends" if pipeline["ends"] else "THE SCHEDULE STANDS STILL"
        print(f"stages: {len(pipeline['stages'])}, {once}; {ends}")
    if numbers["close"] is None:
        print(f"numbers: not run here ({numbers['why']})")
        return
    word = "equal" if numbers["close"] else "DIFFER FROM"
    print(f"numbers: loss, norm and {numbers['compared'] - 2} gradients of simulated ranks {word} one device in fp64")
    print(f"         the largest difference is {numbers['difference']:.1e} (`{numbers['worst']}`)")


def print_builds(built: Sequence[Built]) -> None:
    """Kernels that were built ahead of time, by target: a line of figures, and below it for what each was built."""
    console = Console(highlight=False, soft_wrap=True)
    widths = (11, 8, 9, 14, 12, 9)
    titles = ("registers", "spills", "shared", "tensor cores", "wide loads", "seconds")
    longest = max((len(one.kernel) for one in built), default=0)
    for place, one in enumerate(built):
        if not place or built[place - 1].target != one.target:
            console.print(f"{one.target:{longest}}", *map(str.rjust, titles, widths), sep="")
        read = one.resources
        figures = ["-"] * 5
        if read is not None:
            cores = ", ".join(f"{count} {kind}" for kind, count in read.tensor_cores) or "none"
            spills = str(read.spill_loads + read.spill_stores)
            figures = [str(read.registers), spills, f"{one.shared:,}", cores, f"{read.wide_loads}/{read.loads}"]
        console.print(
            f"{one.kernel:{longest}}", *map(str.rjust, [*figures, f"{one.seconds:.1f}"], widths), sep="", markup=False
        )
        settings = (*one.constants, *one.options)
        what = (", ".join(one.shapes), ", ".join(f"{name}={value}" for name, value in settings))
        console.print(f"  {'; '.join(filter(None, what))}", markup=False)
        for problem in one.problems:
            console.print(f"  cannot be used: {problem}", markup=False)


def print_verified(rows: Sequence[Verified]) -> None:
    """What `heddle verify` found: of each kernel the error of its worst draw, that of eager PyTorch, the ratio of both,
    and the share of the error allowed; below it the draw."""
    console = Console(highlight=False)
    tested = [row for row in rows if not row.why_not]
    if tested:
        longest = max(len("kernel"), *(len(", ".join(row.ops)) for row in tested))
        console.print(f"{'kernel':{longest}}  draws    error  eager's  ratio  of allowed", markup=False)
    for row in tested:
        verdict = ("holds" if row.holds else "FAILS") + ("" if row.launches else ", no kernel ran")
        ratio = f"{row.error / row.eager:.2f}" if row.eager else "-"
        figures = f"{row.draws:5}  {row.error:7.1e}  {row.eager:7.1e}  {ratio:>5}  {row.worst:10.2f}"
        console.print(f"{', '.join(row.ops):{longest}}  {figures}  {verdict}", soft_wrap=True, markup=False)
        where = f"{row.where}, {row.shapes}" if row.where else "exact in every draw"
        console.print(f"  {where} ({row.line})", soft_wrap=True, markup=False)
    for row in rows:
        if row.why_not:
            said = f"PyTorch computes `{row.ops[-1]}`: {row.why_not} ({row.line})"
            console.print(said, soft_wrap=True, markup=False)


def print_tuned(found: Sequence[Found]) -> None:
    """The table of `heddle tune`: what each kernel took untuned and as it is cut now; of a product, if it is used."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("kernel", "tried", "untuned us", "us", "", "cut"):
        table.add_column(title, justify="left" if title in ("kernel", "cut") else "right", overflow="fold")
    for one in found:
        t = one.tuned
        cut = ", ".join(f"{n} = {v!r}" for n, v in t.constants.items()) or "as untuned"
        if t.library_us is not None:
            cut += f"; {'used' if t.is_used else 'not used'}, PyTorch's product takes {t.library_us:.1f} us"
        ratio = f"{t.untuned_us / t.us:.2f}x" if t.us and t.untuned_us else ""
        us = [f"{x:.1f}" if x is not None else "" for x in (t.untuned_us, t.us)]
        table.add_row(t.kernel, str(len(one.tried)), *us, ratio, cut.replace("[", "\\["))
    console.print(table)


def print_measured(rows: Sequence[Measured]) -> None:
    """The table of `heddle bench --target`: what each kernel took, or would take at a device's rates."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    estimated = any(row.estimated for row in rows)
    for title in ("kernel", "us, an estimate" if estimated else "us", "moves", "computes", "of copying", "of products"):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    for name in peers:
        table.add_column(f"{name} / ours", justify="right")
    for row in rows:
        shares = [f"{x:.0%}" if x is not None else "" for x in (row.copy_share, row.matmul_share)]
        ratios = [f"{row.peers[name]:.2f}x" if name in row.peers else "" for name in peers]
        time = f"{row.seconds * 1e6:.0f}"
        table.add_row(", ".join(row.ops), time, size(row.bytes), f"{amount(row.flops)}FLOP", *shares, *ratios)
    console.print(table)
    if estimated:
        console.print("no time was measured: what programs of kernels ask for, at the rates of the device")
