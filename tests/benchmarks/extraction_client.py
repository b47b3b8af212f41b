"""What `extract --endpoint` itself takes for a sample: the server answers at once, from a process of its own.

    TMPDIR=/dev/shm python tests/benchmarks/extraction_client.py MODEL [--tokens 200] [--samples 1000] \\
        [--concurrency 32] [--rounds 3]

MODEL is the verifier, of which only the configuration is used. The samples are random, and the server's files are
written beforehand: a request makes another link to one.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file

from peagle_hf import ExtractArguments, extract
from peagle_hf.verifier.loading import check_layer_ids, load_verifier_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=200, help="of a sample on average")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = load_verifier_config(arguments.model)
    layers = check_layer_ids(None, config)
    lengths = torch.randint(arguments.tokens // 2, arguments.tokens * 3 // 2 + 1, (arguments.samples,)).tolist()
    rows = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        served, data = Path(folder) / "served", f"{folder}/data"
        served.mkdir()
        for number, row in enumerate(rows):
            states = torch.randn(len(row), len(layers) + 1, config.hidden_size).bfloat16()
            save_file({"hidden_states": states, "token_ids": torch.tensor(row)}, served / f"{number}.made")
        columns = {"input_ids": rows, "loss_mask": [[1] * length for length in lengths], "seq_len": lengths}
        Dataset.from_dict(columns | {"conversation_id": list(range(len(rows)))}).save_to_disk(data)
        ours, its = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(its, served, rows, arguments.model), daemon=True
        )
        server.start()
        asked = {
            "endpoint": f"http://127.0.0.1:{ours.recv()}",
            "server_hidden_states_path": str(served),
            "target_layer_ids": layers,
            "concurrency": arguments.concurrency,
        }
        for number in range(arguments.rounds + 1):
            start = time.process_time()
            report = extract(ExtractArguments(arguments.model, data, f"{folder}/{number}", **asked))
            shutil.rmtree(f"{folder}/{number}")
            used, speed = (time.process_time() - start) / len(rows), len(rows) / report.seconds
            if number:  # the first round is to warm up
                tokens = report.num_tokens / report.seconds
                print(f"{speed:.0f} samples/s, {tokens:.0f} tokens/s, {1000 * used:.1f} ms CPU a sample")
        server.terminate()


def serve(pipe: Connection, folder: Path, rows: list[list[int]], model: str) -> None:
    """Answer as vLLM does; the port goes into the pipe."""
    made = {tuple(row): folder / f"{number}.made" for number, row in enumerate(rows)}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            headers = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            content: dict = {"object": "list", "data": [{"id": model, "root": model, "object": "model"}]}
            if body:
                path = f"{folder}/cmpl-{headers['x-request-id']}-0.safetensors"
                os.close(os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY))
                os.link(made[tuple(json.loads(body)["prompt"])], path)
                choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
                content = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": model}
                content |= {"choices": [choice], "kv_transfer_params": {"hidden_states_path": path}}
            text = json.dumps(content).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
