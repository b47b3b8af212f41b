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
                step, gpus, *server = name.split(", ")
                lines += extraction_rows(", ".join([step, *server]), facts, int(gpus.split()[0]))
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


def is_whole(extraction: dict[str, Any]) -> bool:
    return extraction["samples"] == extraction["of_samples"]


def extraction_rows(step: str, facts: dict[str, Any], gpus: int) -> list[str]:
    done = is_whole(facts)
    remark = f"{facts['storage']}; {facts['samples']:,} of {facts['of_samples']:,} samples"
    return [row(step, gpus, minutes(extraction_seconds(facts), not done), facts, remark)]


def training_rows(one: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """The start, an epoch, and all epochs, by the longest attempt; then everything from `prepare` on.

    An epoch is measured if the attempt has two ends of epochs, and all epochs are if it has all steps.
    """
    known = [attempt for attempt in facts["attempts"] if attempt.get("step_s")]
    if not known:
        return ["| train | | | | | | | | too short to tell |"]
    last, gpus = max(known, key=lambda attempt: attempt["logged_steps"]), facts["gpus"]
    steps, end, logged = facts["steps_an_epoch"], last.get("epoch_end_s") or 0.0, last["logged_steps"]
    epoch = last.get("epoch_s") or steps * last["step_s"] + end
    whole = last["start_s"] + EPOCHS * epoch
    ran_whole = facts["complete"] and logged >= EPOCHS * (steps - 1)
    if ran_whole:
        whole = last["seconds"]
    how = "states generated in the process" if facts["generated"] else "from the cache"
    wait = f"{last['step_s'] * 1e3:.0f} ms a step; {last['loader_wait']:.1%} of the time waiting for data"
    ending = "" if last.get("epoch_s") or last.get("epoch_end_s") else ", without validation and saving"
    measured = last | {name: facts[name] for name in ("mfu", "disk_gib") if name in facts}
    remark, is_calculated = f"{steps} steps, {wait}{ending}", not last.get("epoch_s")
    lines = [
        row("train: start", gpus, minutes(last["start_s"], True), {}, "up to the first step, and what compiling costs"),
        row("train: an epoch", gpus, minutes(epoch, is_calculated), measured, remark),
        row(f"train: {EPOCHS} epochs", gpus, minutes(whole, not ran_whole), {}, f"{how}; {logged} steps run at once"),
    ]
    extraction = one.get(f"extract, {gpus} GPUs") or one.get(f"extract, {gpus} GPUs, vLLM server", {})
    if "prepare" not in one:
        return lines
    total = whole + one["prepare"]["seconds"]
    if facts["generated"]:
        lines.append(row("everything", gpus, minutes(total, not ran_whole), {}, "prepare, train"))
    elif extraction.get("tokens"):
        total += extraction_seconds(extraction)
        is_calculated = not (ran_whole and is_whole(extraction))
        lines.append(row("everything", gpus, minutes(total, is_calculated), {}, "prepare, extract, train"))
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
