"""Many visitors of the page at the same time: how long a search takes, and how long the page takes to start.

    python benchmarks/app.py INDEX CLIP OUT.json [--clients 50] [--rounds 3]

Starts ``cmacc app INDEX`` on a free port of this machine. Then each client opens the page, uploads CLIP, and searches
with it, round after round, as the page does by HTTP: it joins the queue and waits for its answer. All begin at once.

In the results: ``start_seconds`` until the address was printed; ``errors`` of all searches; ``p50_seconds`` and
``p95_seconds`` from pressing Search to the answer, the time in the queue included; ``searches_per_second``.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np

# The fields of the search tab in their order, between the upload and the checkbox that shows the nearest however bad.
_FIELDS = [None, None, None, None, None, "Picture and sound", "Pictures and sounds", [], "", 10, True]


async def search(client: httpx.AsyncClient, function: int, path: str, session: str) -> str:
    """Search with an upload; the answer as HTML."""
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": ["file", given, *_FIELDS], "fn_index": function, "session_hash": session}
    joined = await client.post("/gradio_api/queue/join", json=body)
    joined.raise_for_status()
    async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        async for line in stream.aiter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                if not message["success"]:
                    raise RuntimeError(str(message["output"]))
                return str(message["output"]["data"][0])
    raise RuntimeError("the stream ended without an answer")


async def visit(address: str, clip: Path, clients: int, rounds: int) -> dict[str, Any]:
    """All clients; times and errors of their searches."""
    seconds: list[float] = []
    errors: list[str] = []

    async def one(number: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            try:
                (await client.get("/")).raise_for_status()
                config = (await client.get("/config")).json()
                [function] = [one["id"] for one in config["dependencies"] if len(one["inputs"]) == len(_FIELDS) + 2]
                sent = await client.post("/gradio_api/upload", files={"files": (clip.name, clip.read_bytes())})
                [path] = sent.raise_for_status().json()
            except Exception as error:
                errors.append(repr(error))
                return
            for turn in range(rounds):
                begun = time.perf_counter()
                try:
                    found = await search(client, function, path, f"client{number}x{turn}")
                    if "<video" not in found and "data-id" not in found:
                        raise RuntimeError(f"no moments: {found[:200]}")
                    seconds.append(time.perf_counter() - begun)
                except Exception as error:
                    errors.append(repr(error))

    begun = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    whole = time.perf_counter() - begun
    p50, p95 = np.quantile(seconds, [0.5, 0.95]) if seconds else (float("nan"), float("nan"))
    return {
        "clients": clients,
        "searches": clients * rounds,
        "errors": len(errors),
        "first_errors": errors[:3],
        "p50_seconds": float(p50),
        "p95_seconds": float(p95),
        "searches_per_second": len(seconds) / whole,
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].partition(": ")[2] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("gradio", "uvicorn", "lancedb")},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    command = [sys.executable, "-m", "cmacc", "app", options.index, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if line.startswith("open ")).strip().removeprefix("open ")
            report: dict[str, Any] = {"start_seconds": time.perf_counter() - begun}
            report |= asyncio.run(visit(address, options.clip, options.clients, options.rounds))
        finally:
            server.terminate()
    report["machine"] = machine()
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
