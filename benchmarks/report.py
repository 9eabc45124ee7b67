"""From measured runs to a table, a plot and the page docs/benchmarks.md."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from scenarios import GOALS, SCENARIOS, Goal, Metric, Scenario

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"
PLOT = DOCS / "images" / "bench.svg"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

OURS = "broker"
COMPILED = "compiled"
"""The broker with its loops over bytes in C."""
PEERS = ("nats", "uws", "picows", "websockets", "nchan", "ceiling")
LOAD_LIMIT = 0.85
"""CPU of the generator above which it may be what limits the figure."""
LATE_MS = 10.0
"""How late a paced publication may be sent at worst; it counts as latency of the server."""
NOISE = 0.25
SAME = 0.05
"""A difference between two trees of the broker below which they count as equal."""

_UNITS: dict[Metric, tuple[str, str]] = {
    "deliveries_per_second": ("deliveries/s", ""),
    "publishes_per_second": ("publishes/s", ""),
    "p50_ms": ("p50", " ms"),
    "p99_ms": ("p99", " ms"),
    "p999_ms": ("p99.9", " ms"),
    "connects_per_second": ("connects/s", ""),
    "kib_per_connection": ("memory each", " KiB"),
    "noticed_seconds": ("all gone after", " s"),
    "bytes_per_delivery": ("bytes each", ""),
}

_RATES = ("deliveries_per_second", "publishes_per_second", "connects_per_second")

Runs = dict[str, dict[str, list[dict[str, Any]]]]
Figures = dict[str, float | None]
"""By round; None where the run failed."""
Values = Callable[[Runs, str, str, Metric], Figures]


def text(results: dict[str, Any]) -> str:
    """Everything measured, as Markdown."""
    runs: Runs = results["runs"]
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['kernel']}, {machine['date']}. {machine['versions']}.",
        *(["", results["note"]] if results.get("note") else []),
        "",
        *_table(runs),
        "",
        *_marks(runs),
        *[f"\nLeft out: {name} ({why})." for name, why in results.get("left_out", {}).items()],
        "",
        *_goals(runs),
    ]
    for more in (_losses(runs), _own(runs)):
        if more:
            lines += ["", *more]
    return "\n".join(lines)


def write(results: dict[str, Any]) -> None:
    """Put the table into the page, between its two marks, and draw the plot beside it."""
    page = PAGE.read_text(encoding="utf-8")
    section = f"{BEGIN}\n\n{text(results)}\n\n{END}"
    page, count = re.subn(f"{BEGIN}.*{END}", lambda _: section, page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE}: has to hold {BEGIN} and {END} once")
    PAGE.write_text(page, encoding="utf-8")
    _draw(results["runs"])


def _metrics(scenario: Scenario) -> tuple[Metric, ...]:
    if scenario.rate:
        return ("p50_ms", "p99_ms", "p999_ms")
    if scenario.name == "storm":
        return ("connects_per_second", "noticed_seconds")
    if scenario.kind == "connections":
        return ("kib_per_connection", "connects_per_second", "noticed_seconds")
    if scenario.words:
        return (scenario.metric, "bytes_per_delivery")
    return (scenario.metric,)


def _values(runs: Runs, scenario: str, server: str, metric: Metric) -> Figures:
    return {
        run["round"]: None if "error" in run or run["stalled"] else float(run[metric])
        for run in runs.get(scenario, {}).get(server, [])
    }


def _per_cpu(runs: Runs, scenario: str, server: str, metric: Metric) -> Figures:
    """The same rates, had the server had its core to itself: what others take does not count."""
    rates = _values(runs, scenario, server, metric)
    found: Figures = {}
    for run in runs.get(scenario, {}).get(server, []):
        rate = rates[run["round"]]
        if metric == "connects_per_second":
            spent = run.get("connect_cpu_ms")
            found[run["round"]] = 1e3 / spent if spent else None
        else:
            found[run["round"]] = rate / run["server_cpu"] if rate and run["server_cpu"] else None
    return found


def _ratio(ours: Figures, theirs: Figures) -> float | None:
    """The median of the ratios within each round; None where no round has both."""
    ratios = [
        a / b
        for number, b in theirs.items()
        if b is not None and b > 0 and (a := ours.get(number)) is not None
    ]
    return median(ratios) if ratios else None


def _middle(values: Figures) -> float | None:
    known = [value for value in values.values() if value is not None]
    return median(known) if known else None


def _short(value: float, unit: str = "") -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995 and not unit:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}{unit}" if value < 999.5 else f"{value:,.0f}{unit}"


def _rows(runs: Runs) -> Iterator[tuple[Scenario, Metric]]:
    for scenario in SCENARIOS:
        if scenario.name in runs:
            for metric in _metrics(scenario):
                yield scenario, metric


def _table(runs: Runs) -> list[str]:
    known = (COMPILED, *PEERS)
    shown = [peer for peer in known if any(peer in servers for servers in runs.values())]
    head = ["scenario", "figure", "rounds", OURS, *shown]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for scenario, metric in _rows(runs):
        if any(name.startswith(f"{OURS} ") for name in runs[scenario.name]):
            continue  # the broker against itself; see `_own`
        words, unit = _UNITS[metric]
        ours = _values(runs, scenario.name, OURS, metric)
        rounds = max(len(found) for found in runs[scenario.name].values())
        cells = [scenario.title, words, str(rounds)]
        for server in (OURS, *shown):
            theirs = _values(runs, scenario.name, server, metric)
            cells.append(_cell(runs, scenario, server, theirs, ours, unit, rounds))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(
    runs: Runs, scenario: Scenario, server: str, values: Figures, ours: Figures, unit: str,
    rounds: int,
) -> str:  # fmt: skip
    if not values:
        return ""
    middle = _middle(values)
    if middle is None:
        return "fails"
    text = f"{_short(middle, unit)}{''.join(_signs(runs[scenario.name][server]))}"
    ratio = _ratio(ours, values)
    remarks = []
    if server == OURS:
        text = f"**{text}**"
    elif ratio is None:
        remarks.append("no pair")
    else:
        remarks.append(f"{ratio:.2g}×" if ratio < 100 else f"{ratio:.0f}×")
    if len(values) < rounds:
        remarks.append(f"of {len(values)}")
    return f"{text} ({', '.join(remarks)})" if remarks else text


def load_is_limit(run: dict[str, Any]) -> bool:
    """Whether the generator, not the server, may be what limits this run's figure."""
    # Paced, the generator looks at the clock all the time; being late is what would tell.
    if run["samples"]:
        return bool(run["latest_ms"] > LATE_MS)
    return bool(run["load_cpu"] > LOAD_LIMIT)


def _signs(runs: list[dict[str, Any]]) -> Iterator[str]:
    good = [run for run in runs if "error" not in run]
    if sum(load_is_limit(run) for run in good) * 2 > len(good):
        yield " ‡"
    if good and median([run["others_cpu"] for run in good]) > NOISE:
        yield " ~"
    if len(good) < len(runs) or any(run["stalled"] or run["lost_connections"] for run in good):
        yield " †"


_MEANING = {
    " ‡": "‡ The generator used more than 85 % of its core, or paced was 10 ms late once: it may be the "
    "limit, not the server.",
    " ~": "~ Others used more than a quarter of a core meanwhile.",
    " †": "† Connections were lost, messages went missing or a run failed.",
}


def _marks(runs: Runs) -> list[str]:
    seen = {
        sign for servers in runs.values() for found in servers.values() for sign in _signs(found)
    }
    words = (
        "Medians of so many *rounds*, *of 2* where a server had fewer; in brackets ours ÷ theirs, the median of the "
        "ratios within each round, *no pair* where no round has both. *Ceiling* is a C program that only "
        "copies, beyond which this machine cannot go."
    )
    commits = sorted({run["commit"] for found in _ours(runs) for run in found})
    if len(commits) > 1:
        words += f" The broker's figures are of more than one commit: {', '.join(commits)}."
    lines = [words, *[f"\n{_MEANING[sign]}" for sign in _MEANING if sign in seen]]
    failed = list(_failed(runs))
    if failed:
        lines += ["\nIn no round there is a figure of:\n", *failed]
    return lines


def _ours(runs: Runs) -> Iterator[list[dict[str, Any]]]:
    for servers in runs.values():
        if OURS in servers:
            yield servers[OURS]


def _failed(runs: Runs) -> Iterator[str]:
    """Who has no figure in a scenario although it was run, and why."""
    for scenario in SCENARIOS:
        for server, found in runs.get(scenario.name, {}).items():
            if all("error" in run or run["stalled"] for run in found):
                why = found[-1].get("error", "no message came for a second")
                yield f"- {server}, {scenario.title}: {' '.join(why.split())[-200:]}"


def _goals(runs: Runs) -> list[str]:
    lines = [
        "| goal | asked | measured | | per second of the server's CPU | compiled |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    titles = {scenario.name: scenario.title for scenario in SCENARIOS}
    for goal in GOALS:
        found = _goal_ratio(runs, goal, _values)
        words, unit = _UNITS[goal.metric]
        versus = titles.get(goal.versus.partition("/")[0], goal.versus)
        sign = "" if not goal.versus else "×"
        asked = f"{goal.sign} {goal.bound:.2g}{sign or unit}" + (f" {versus}" if versus else "")
        if found is None:
            measured, met = "no pair" if sign else "", "not measured"
        else:
            measured = f"{found:.2f}×" if sign else f"{found:.3g}{unit}"
            met = "met" if goal.is_met(found) else "**not met**"
        per_cpu = None
        if goal.metric in _RATES:
            per_cpu = _goal_ratio(runs, goal, _per_cpu)
        cost = "" if per_cpu is None else f"{per_cpu:.2f}×"
        compiled = _goal_ratio(runs, goal, _values, COMPILED)
        other = "" if compiled is None else f"{compiled:.2f}×" if sign else f"{compiled:.3g}{unit}"
        lines.append(
            f"| {titles[goal.scenario]}, {words} | {asked} | {measured} | {met} | {cost} | {other} |"
        )
    return lines


def _goal_ratio(runs: Runs, goal: Goal, values: Values, ours_is: str = OURS) -> float | None:
    ours = values(runs, goal.scenario, ours_is, goal.metric)
    if not goal.versus:
        return _middle(ours)
    scenario, slash, server = goal.versus.partition("/")
    if not slash:
        scenario, server = goal.scenario, goal.versus
    return _ratio(ours, values(runs, scenario, server, goal.metric))


def trees(runs: Runs, old: str, same: float = SAME) -> str:
    """The broker beside an older tree of it, as Markdown; ratios are new ÷ old. Worse is what is so by a larger
    part than `same`."""
    head = "| scenario | figure | rounds | old | new | | per second of the server's CPU |"
    lines = [head, "|" + " --- |" * 7]
    for scenario, metric in _rows(runs):
        words, unit = _UNITS[metric]
        before = _values(runs, scenario.name, old, metric)
        now = _values(runs, scenario.name, OURS, metric)
        ratio = _ratio(now, before)
        cells = [
            "fails"
            if (middle := _middle(values)) is None
            else _short(middle, unit) + "".join(_signs(runs[scenario.name].get(name, [])))
            for name, values in ((old, before), (OURS, now))
        ]
        if ratio is None:
            change = "no pair"
        else:
            worse = 1 / ratio if metric in _RATES else ratio
            change = f"{ratio:.3f}×" + (" **worse**" if worse > 1 + same else "")
        rounds = min(len(before), len(now))
        cost = None
        if metric in _RATES:
            by_cpu = [_per_cpu(runs, scenario.name, name, metric) for name in (OURS, old)]
            cost = _ratio(*by_cpu)
        cells += [change, "" if cost is None else f"{cost:.3f}×"]
        lines.append(f"| {' | '.join([scenario.title, words, str(rounds), *cells])} |")
    seen = {s for servers in runs.values() for found in servers.values() for s in _signs(found)}
    lines += [f"\n{_MEANING[sign]}" for sign in _MEANING if sign in seen]
    return "\n".join([*lines, "", f"Worse: by more than {same:.0%}.", *_failed(runs)])


def _losses(runs: Runs) -> list[str]:
    """Every figure at which a peer does better, from the worst on."""
    found: list[tuple[float, str]] = []
    for scenario, metric in _rows(runs):
        ours = _values(runs, scenario.name, OURS, metric)
        better: list[tuple[float, str]] = []
        for peer in PEERS[:-1]:
            ratio = _ratio(ours, _values(runs, scenario.name, peer, metric))
            if ratio is not None:
                loss = 1 / ratio if metric in _RATES else ratio
                if loss > 1.05:
                    better.append((loss, f"{peer} {loss:.2g}×"))
        if better:
            better.sort(reverse=True)
            peers = ", ".join(words for _, words in better)
            found.append((better[0][0], f"{scenario.title}, {_UNITS[metric][0]}: {peers}"))
    if not found:
        return ["No peer does better at anything above."]
    listed = [f"- {words}" for _, words in sorted(found, reverse=True)]
    return ["Where we lose, and how many times better the peer does:", "", *listed]


def _own(runs: Runs) -> list[str]:
    """What a setting changes: the broker against itself."""
    lines = ["| with and without | as it comes | changed | |", "| --- | --- | --- | --- |"]
    for scenario in SCENARIOS:
        for name in runs.get(scenario.name, {}):
            if name.startswith(f"{OURS} "):
                ours = _values(runs, scenario.name, OURS, scenario.metric)
                other = _values(runs, scenario.name, name, scenario.metric)
                ratio, a, b = _ratio(other, ours), _middle(ours), _middle(other)
                if ratio is not None and a is not None and b is not None:
                    lines.append(f"| {scenario.title} | {_short(a)} | {_short(b)} | {ratio:.2f}× |")
    return lines if len(lines) > 2 else []


def _draw(runs: Runs) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed.")
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same figures give the same file
    from matplotlib import pyplot

    drawn = ("1-1-burst-16", "1-100-burst-1", "1-1000-burst-1", "100-100", "direct", "rooms")
    scenarios = [s for s in SCENARIOS if s.name in drawn and s.name in runs]
    servers = [OURS, *PEERS[:-1]]
    colours = dict(
        zip(
            servers,
            ("#1f6f5c", "#3f7fbf", "#8a6fb0", "#c98a2b", "#a0a0a0", "#b0574f"),
            strict=True,
        )
    )
    figure, axes = pyplot.subplots(figsize=(9, 5.2))
    height = 0.8 / len(servers)
    named: set[str] = set()
    for place, scenario in enumerate(scenarios):
        for number, server in enumerate(servers):
            values = _values(runs, scenario.name, server, "deliveries_per_second")
            middle = _middle(values)
            if middle:
                at = place + (number - (len(servers) - 1) / 2) * height
                label = None if server in named else server
                named.add(server)
                axes.barh(at, middle, height * 0.92, color=colours[server], label=label)
                axes.text(middle * 1.05, at, _short(middle), va="center", fontsize=7)
    axes.set_yticks(range(len(scenarios)), [s.title for s in scenarios])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("deliveries a second, one core, 64-byte payloads (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * 2)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(servers), frameon=False)
    figure.tight_layout()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)
