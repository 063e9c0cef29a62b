"""Run an API workflow on a ComfyUI server, follow its progress, save its pictures. Needs aiohttp, as ComfyUI does.

python client.py edit_one_part.json [--server 127.0.0.1:8188] [--output results]
"""

import argparse
import asyncio
import json
import uuid
from pathlib import Path

import aiohttp


async def run(server: str, workflow: dict, output: Path) -> list[Path]:
    """Queue the workflow and wait for it; the files that were saved, named by the titles of their nodes."""
    client, saved = uuid.uuid4().hex, []
    async with (
        aiohttp.ClientSession(f"http://{server}") as http,
        http.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as events,  # before queueing: no event is missed
    ):
        async with http.post("/prompt", json={"prompt": workflow, "client_id": client}) as answer:
            queued = await answer.json()
        if queued.get("error") or queued.get("node_errors"):
            raise RuntimeError(f"the server refused the workflow: {json.dumps(queued, indent=2)}")
        async for message in events:
            event = json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else {}  # binary: a preview
            data = event.get("data", {})
            if data.get("prompt_id") != queued["prompt_id"]:
                continue
            if event["type"] == "progress":
                print(f"\r{workflow[data['node']]['class_type']}: {data['value']}/{data['max']}   ", end="", flush=True)
            elif event["type"] in ("execution_error", "execution_interrupted"):
                raise RuntimeError(f"{data.get('node_type')}: {data.get('exception_message', 'interrupted')}")
            elif event["type"] == "executing" and data.get("node") is None:  # sent once the outputs are in the history
                break
        async with http.get(f"/history/{queued['prompt_id']}") as answer:
            outputs = (await answer.json())[queued["prompt_id"]]["outputs"]
        output.mkdir(parents=True, exist_ok=True)
        for node, result in outputs.items():
            for number, image in enumerate(result.get("images", [])):
                async with http.get("/view", params=image) as answer:
                    saved.append(output / f"{workflow[node]['_meta']['title'].replace(' ', '_')}_{number}.png")
                    saved[-1].write_bytes(await answer.read())
    return saved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--server", default="127.0.0.1:8188")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    files = asyncio.run(run(options.server, json.loads(options.workflow.read_text("utf-8")), options.output))
    print("\nsaved:", *files)
