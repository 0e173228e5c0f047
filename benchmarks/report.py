"""Write the tables of README.md from benchmarks/results/*.json.

    python benchmarks/report.py            fill what stands between <!-- results:NAME --> and <!-- /results:NAME -->
    python benchmarks/report.py --check    change nothing; exit status 1 when README.md is not what would be written

Standard library only.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
PEER_NAMES = {
    "envpool": "EnvPool", "gymnax": "gymnax", "gymnasium_single": "Gymnasium, one env", "gymnasium_sync": "Gymnasium SyncVectorEnv",
    "gymnasium_vector": "Gymnasium vector",
}  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def short(value: float) -> str:
    """Three significant digits with k or M, without an exponent."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{plain(value / size)} {unit}"
    return plain(value)


def plain(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def spread(values: dict[str, Any], form: Callable[[float], str] = plain) -> str:
    return f"{form(values['median'])} ({form(values['min'])}-{form(values['max'])})"


def times(values: dict[str, Any]) -> str:
    return f"{plain(values['median'])}x ({plain(values['min'])}-{plain(values['max'])})"


def provenance(made: dict[str, Any]) -> str:
    machine, versions = made["machine"], made["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if "gpu" in machine else "")
    revision = (made["git"] or {}).get("revision", "")[:10] or "unknown revision"
    if (made["git"] or {}).get("dirty"):
        revision += " with changes"
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "rl")
    return f"`{made['command']}`, {made['date'][:10]}, {revision}. {where}. {known}."


def learning(result: dict[str, Any]) -> list[str]:
    rows = []
    for env, row in result["envs"].items():
        first = spread(row["first_step"], short) if "first_step" in row else "-"
        reached, final = (f"{row[key]}/{row['seeds']}" for key in ("reached", "final_at_bar"))
        bar, seconds = f"{row['bar']:g}", spread(row["wall_seconds"])
        rows.append((env, f"{row['budget']:,}", bar, reached, final, first, signed(row["final"]), seconds))
    head = ("env", "budget, env steps", "bar", "reached it", "at it in the end", "first step at the bar", "final return", "wall seconds")
    made = {row["made"]["command"]: row["made"] for row in result["envs"].values()}
    note = "PPO with its presets and the budget as `total_steps`; returns are means of 100 greedy episodes, medians over seeds."
    return [note, "", *table(head, rows), "", *(provenance(m) for m in made.values())]


def signed(values: dict[str, Any]) -> str:
    return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"


def time_to_skill(result: dict[str, Any]) -> list[str]:
    rows = []
    if "wall_seconds" in result.get("process", {}):
        p = result["process"]
        label = f"`{p['command']}`, process start to exit"
        rows.append((label, f"{p['reached']}/{p['seeds']}", spread(p["wall_seconds"]), spread(p["threshold_step"], short)))
    loop = result.get("loop", {})
    for name, label in (("ours", "learning loop alone, ours"), ("sb3", "learning loop alone, Stable-Baselines3 (RL-Zoo settings)")):
        if "seconds" in loop.get(name, {}):
            row = loop[name]
            rows.append((label, f"{row['solved']}/{loop['seeds']}", spread(row["seconds"]), spread(row["env_steps"], short)))
    note = "The process stops at a greedy evaluation of at least 475, the loops at a mean of 475 over the last 100 training episodes."
    lines = [note, "", *table(("CartPole", "seeds that got there", "seconds", "env steps"), rows), ""]
    if "ratio" in loop:
        lines += [f"Stable-Baselines3's seconds over ours, seed by seed: {times(loop['ratio'])}.", ""]
    return [*lines, provenance(result["made"])]


def throughput(result: dict[str, Any]) -> list[str]:
    names = {
        "sb3": ("Stable-Baselines3, RL-Zoo settings", None),
        "ours_same": ("ours, the same settings", "ratio_same"),
        "ours_preset": ("ours, our preset", "ratio_preset"),
    }
    rates = result["steps_per_second"]
    rows = [(label, spread(rates[key], short), times(result[ratio]) if ratio else "1x") for key, (label, ratio) in names.items()]
    note = f"{result['env']}, {result['steps']:,} steps, learning loop alone, one torch thread, in turn in one process."
    return [note, "", *table(("", "env steps/s", "ratio"), rows), "", provenance(result["made"])]


def env_stepping(result: dict[str, Any]) -> list[str]:
    peers = [name for name in PEER_NAMES if any(name in case["ratio"] for case in result["cases"])]
    rows = []
    for case in result["cases"]:
        rates = case["steps_per_second"]
        ours = (case["env"], f"{case['batch']:,}", spread(rates["ours"], short), short(rates["ours_step_many"]["median"]))
        rows.append((*ours, *(times(case["ratio"][peer]) if peer in case["ratio"] else "-" for peer in peers)))
    head = ("env", "batch", "ours, env steps/s", "fused `step_many`", *(f"ours / {PEER_NAMES[peer]}" for peer in peers))
    lines = [*table(head, rows), ""]
    for case in result.get("pool", []):
        lines.append(f"- {case['env']}, {case['batch']:,} envs, {case['threads']} threads against one: {times(case['ratio'])}")
    return [*lines, "", provenance(result["made"])]


def startup(result: dict[str, Any]) -> list[str]:
    rows = [(f"`{name}`", spread(values)) for name, values in result["commands"].items()]
    for env, row in result["first_step"].items():
        rows.append((f"{env}: first env step beyond imports, kernels cached (not cached: {plain(row['cold'])})", spread(row["warm"])))
    return [*table(("fresh process", "seconds"), rows), "", provenance(result["made"])]


def gpu(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if isinstance(result.get("stepping"), list):
        rows = [(f"{row['envs']:,}", row["call"], spread(row["steps_per_second"], short)) for row in result["stepping"]]
        lines += [*table(("CartPole envs", "call", "env steps/s"), rows), ""]
    rows = []
    for part in ("ppo", "compile"):
        if isinstance(result.get(part), list):
            rows += [(f"{row['envs']:,}", str(row["compile"]).lower(), spread(row["steps_per_second"], short)) for row in result[part]]
    if rows:
        lines += [*table(("PPO, envs", "compile", "env steps/s"), rows), ""]
    for env, row in result.get("agreement", {}).get("envs", {}).items():
        worst = max(row["worst"].values())
        lines.append(f"- {env}: {row['transitions']:,} transitions on CPU and GPU, largest relative difference {worst:.1g}, "
                     f"{row['flags_that_differ']} flags differ")  # fmt: skip
    return [*lines, "", provenance(result["made"])]


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {  # marker: (file of results, its table)
    "learning": ("learning", learning),
    "time_to_skill": ("time_to_skill", time_to_skill),
    "throughput": ("ppo_throughput", throughput),
    "env_stepping": ("env_stepping", env_stepping),
    "startup": ("startup", startup),
    "gpu": ("gpu", gpu),
}


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every marked section written anew."""
    for name, (file, make) in SECTIONS.items():
        path = results / f"{file}.json"
        lines = make(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ["Not measured yet."]
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)", re.DOTALL)
        body = "\n".join(lines).strip("\n")
        text, found = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} sections results:{name}, not one")
    return text


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing")
    options.add_argument("--results", type=Path, default=RESULTS)
    asked = options.parse_args()
    readme = REPO / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, asked.results)
    if asked.check:
        print("README.md is up to date" if before == after else "README.md is out of date: run python benchmarks/report.py")
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
