"""The table of `tutorial_size.py`, from its results files."""

from typing import Any

EPOCHS = 5


def report(results: list[dict[str, Any]]) -> str:
    """A table of one or several machines; in italics what is calculated."""
    lines = []
    for one in results:
        lines += [f"{one['device']}, torch {one['versions']['torch']}, transformers {one['versions']['transformers']}"]
        if "prepare" in one:
            facts = one["prepare"]
            share = facts.get("learnt", 0) / max(1, facts.get("tokens", 0))
            lines[-1] += f": {facts.get('samples')} samples, {facts.get('tokens'):,} tokens, {share:.0%} trained on"
        lines += ["", "| step | GPUs | minutes | tokens/s | MFU | GPU GiB | host GiB | disk GiB | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        if "prepare" in one:
            lines.append(row("prepare", "", minutes(one["prepare"]["seconds"]), one["prepare"], ""))
        for name, facts in one.items():
            if name.startswith("extract, ") and facts.get("tokens"):
                lines += extraction_rows(facts, int(name.split()[1]))
            elif name.startswith("train, "):
                lines += training_rows(one, facts)
        lines += ["", "*In italics*: calculated from what was run."]
        if "scaling" in one:
            lines += ["", *scaling_rows(one["scaling"])]
        lines.append("")
    return "\n".join(lines)


def minutes(seconds: float, calculated: bool = False) -> str:
    text = f"{seconds / 60:.1f}"
    return f"*{text}*" if calculated else text


def row(step: str, gpus: object, time_taken: str, facts: dict[str, Any], remark: str) -> str:
    cells = [step, gpus, time_taken, f"{facts['tokens_per_s']:,.0f}" if facts.get("tokens_per_s") else ""]
    cells += [facts.get(name, "") for name in ("mfu", "gpu_gib", "host_gib", "disk_gib")]
    return "| " + " | ".join(str(cell) for cell in [*cells, remark]) + " |"


def extraction_seconds(facts: dict[str, Any]) -> float:
    """Of all samples: measured, or what was measured and the missing tokens at the measured speed."""
    return facts["seconds"] + (facts["of_tokens"] - facts["tokens"]) / facts["tokens_per_s"]


def extraction_rows(facts: dict[str, Any], gpus: int) -> list[str]:
    done = facts["samples"] == facts["of_samples"]
    remark = f"{facts['storage']}; {facts['samples']:,} of {facts['of_samples']:,} samples"
    return [row("extract", gpus, minutes(extraction_seconds(facts), not done), facts, remark)]


def training_rows(one: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """The start, an epoch, and all epochs; then everything from `prepare` on."""
    known = [attempt for attempt in facts["attempts"] if attempt.get("step_s")]
    if not known:
        return ["| train | | | | | | | | too short to tell |"]
    last, gpus = known[-1], facts["gpus"]
    steps, end = facts["steps_an_epoch"], last.get("epoch_end_s") or 0.0
    logged = sum(attempt.get("logged_steps", 0) for attempt in facts["attempts"])
    epoch = steps * last["step_s"] + end
    whole = last["start_s"] + EPOCHS * epoch
    ran_whole = facts["complete"] and logged >= EPOCHS * (steps - 1)
    if ran_whole:  # a part that was run twice, because it had been cut, counts twice
        whole = sum(attempt["seconds"] for attempt in facts["attempts"])
    how = "states generated in the process" if facts["generated"] else "from the cache"
    wait = f"{last['step_s'] * 1e3:.0f} ms a step; {last['loader_wait']:.1%} of the time waiting for data"
    ending = "" if last.get("epoch_end_s") else ", without validation and saving"
    measured = last | {name: facts[name] for name in ("mfu", "disk_gib") if name in facts}
    lines = [
        row("train: start", gpus, minutes(last["start_s"]), {}, "up to the first step, and what compiling costs"),
        row("train: an epoch", gpus, minutes(epoch, logged < steps), measured, f"{steps} steps, {wait}{ending}"),
        row(f"train: {EPOCHS} epochs", gpus, minutes(whole, not ran_whole), {}, f"{how}; {logged} steps run"),
    ]
    extraction = one.get(f"extract, {gpus} GPUs", {})
    total = whole + one["prepare"]["seconds"]
    if facts["generated"]:
        lines.append(row("everything", gpus, minutes(total, not ran_whole), {}, "prepare, train"))
    elif extraction.get("tokens"):
        total += extraction_seconds(extraction)
        lines.append(row("everything", gpus, minutes(total, not ran_whole), {}, "prepare, extract, train"))
    return lines


def scaling_rows(scaling: dict[str, Any]) -> list[str]:
    lines = ["| GPUs | | ms a step | tokens/s | to one GPU | MFU | GPU GiB |", "|---|---|---|---|---|---|---|"]
    base = scaling.get("ddp, 1", {}).get("tokens_per_s")
    for name, facts in scaling.items():
        kind, count = name.split(", ")
        if not facts.get("step_s"):
            lines.append(f"| {count} | {kind} | failed or too short | | | | |")
            continue
        speed, ratio = facts["tokens_per_s"], facts["tokens_per_s"] / base if base else 0.0
        cells = [count, kind, f"{facts['step_s'] * 1e3:.0f}", f"{speed:,.0f}", f"{ratio:.2f}" if base else ""]
        cells += [facts.get("mfu", ""), facts.get("torch_gib", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
