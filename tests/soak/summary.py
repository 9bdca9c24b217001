"""What a soak of kills did, as Markdown."""

from collections import Counter
from pathlib import Path

from tests.soak.reads import lines
from tests.soak.rounds import BATCH, EVERY


def summary(folder: Path) -> str:
    """Tables of the kills and rounds so far."""
    every = lines(folder / "kills.jsonl")
    kills = [line for line in every if "kill" in line]
    rounds = [line for line in every if "until" in line]
    moments = sorted({line["moment"].split(" (")[0] for line in kills})
    table = [f"| Killed | {' | '.join(moments)} | all |", "|---" * (len(moments) + 2) + "|"]
    for victim in sorted({line["victim"] for line in kills}):
        at = Counter(k["moment"].split(" (")[0] for k in kills if k["victim"] == victim)
        cells = [victim, *(at[moment] for moment in moments), at.total()]
        table.append("| " + " | ".join(map(str, cells)) + " |")
    launchers = Counter(line["launcher"] for line in kills)
    layouts = Counter(f"{r['ranks']} ranks, stage {r['zero_stage']}" for r in rounds)
    seconds = sorted(line["seconds"] for line in kills if "seconds" in line)
    lost = {name: [k["lost"] for k in kills if k["asynchronous"] == name] for name in (False, True)}
    steps = rounds[-1]["until"] if rounds else 0
    seen = {
        "kills by launcher": ", ".join(f"{name} {n}" for name, n in sorted(launchers.items())),
        "rounds, each bit-equal to one without kills": len(rounds),
        "of them ended by a kill, another layout next": sum(
            r["ended_by"] == "a kill" for r in rounds
        ),
        "layouts": len(layouts),
        "steps trained": f"{steps:,}",
        "sequences read": f"{steps * BATCH:,}",
        "sequences lost": sum(line["sequences_lost"] for line in rounds),
        "sequences repeated": sum(line["sequences_repeated"] for line in rounds),
        f"most steps lost, of {EVERY} between saves": max(lost[False], default=0),
        "the same where saves are asynchronous": max(lost[True], default=0),
        "second starts beside ranks without a launcher": sum(
            not k.get("second_start", "not").startswith("not") for k in kills
        ),
        "of them refused": sum(k.get("second_start", "").startswith("refused") for k in kills),
        "seconds until the rest had ended, median": seconds[len(seconds) // 2] if seconds else "",
        "the longest": max(seconds, default=""),
    }
    more = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in seen.items())]
    return "\n".join([*table, "", *more])
