"""Extraction in this process beside a vLLM server's, on the same rows in one run: tokens a second, by turns.

    python tests/benchmarks/extraction.py MODEL PREPARED [--rounds 3] [--max-samples 100] [--concurrency 32 128] \\
        [-- --dtype float32]

MODEL is the verifier, PREPARED a folder of `peagle-hf prepare`; flags after `--` go to vLLM. The server idles while the
embedded backend runs. Its start and the loading of the embedded verifier are not counted.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from peagle_hf import ExtractArguments, extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prepared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-samples", type=int, default=100)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32], help="requests to the server at a time")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:split])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "vllm.log", "w") as log:
        served = Path(folder) / "served"
        command = [
            sys.executable,
            "-m",
            "peagle_hf",
            "launch-vllm",
            arguments.model,
            "--hidden-states-path",
            str(served),
            "--",
            "--no-enable-prefix-caching",  # else a round would reuse the one before
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *sys.argv[split + 1 :],
        ]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}/v1"
            while server.poll() is None:
                with suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
                time.sleep(1)
            asked = {"endpoint": url, "server_hidden_states_path": str(served)}
            backends = {"embedded": {}} | {
                f"vLLM server, {number} at a time": asked | {"concurrency": number} for number in arguments.concurrency
            }
            speeds: dict[str, list[float]] = {name: [] for name in backends}
            for number in range(arguments.rounds):
                for name, backend in backends.items():
                    output = f"{folder}/{name} {number}"
                    given = {"output": output, "max_samples": arguments.max_samples, **backend}
                    report = extract(ExtractArguments(arguments.model, arguments.prepared, **given))
                    speeds[name].append(report.num_tokens / report.seconds)
            print(f"| backend | tokens/s, median of {arguments.rounds} | all |\n|---|---|---|")
            for name, found in speeds.items():
                print(f"| {name} | {statistics.median(found):.0f} | {', '.join(f'{value:.0f}' for value in found)} |")
            print(json.dumps({"rows": report.num_rows, "tokens": report.num_tokens}))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
